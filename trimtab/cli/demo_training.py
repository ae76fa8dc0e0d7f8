"""The demo's data and training: scikit-learn's digits, two thirds to train on and a third held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.errors import MissingDependencyError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from trimtab.cli.demo_model import DigitTransformer

    Array = np.ndarray[Any, Any]

EPOCHS = 60
_BATCH = 64
_LEARNING_RATE = 2e-3
# Of the random views of a digit: rotation in radians, change of scale, shift in pixels, all up to this much.
_ROTATION, _SCALE, _SHIFT = 0.2, 0.1, 0.6


@dataclass(frozen=True)
class Digits:
    """Images f32[n, 1, 8, 8] with pixels from -1 to 1, and labels i64[n]."""

    train_images: Array
    train_labels: Array
    held_out_images: Array
    held_out_labels: Array


def load_digits(seed: int = 0) -> Digits:
    """The 1797 digits that come with scikit-learn, split at random with the same share of each digit on both sides.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as bundled_digits  # noqa: TID251  the demo's data
        from sklearn.model_selection import train_test_split  # noqa: TID251
    except ImportError as error:
        raise MissingDependencyError(
            "the demo needs scikit-learn for its images",
            values={"package": "scikit-learn"},
            fix="pip install scikit-learn",
        ) from error
    data = bundled_digits()
    images = (data.images[:, None] / 8 - 1).astype("float32")
    parts = train_test_split(images, data.target, test_size=1 / 3, stratify=data.target, random_state=seed)
    train_images, held_out_images, train_labels, held_out_labels = parts
    return Digits(train_images, train_labels, held_out_images, held_out_labels)


def train(
    digits: Digits,
    epochs: int,
    seed: int,
    progress: Callable[[float], None],
    options: Mapping[str, Any] | None = None,
) -> DigitTransformer:
    """Train on the training part alone; its held-out part is for the final figures and chooses nothing.

    Args:
        digits: the data.
        epochs: passes over the training images.
        seed: seed of the initial parameters, the order and the views of the images.
        progress: called with the fraction of the training that is done.
        options: arguments of the model, where they are not its defaults.

    Returns:
        The model in eval mode.
    """
    import torch
    import torch.nn.functional as F

    from trimtab.cli.demo_model import DigitTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitTransformer(**(options or {}))
        generator = torch.Generator().manual_seed(seed)
        images, labels = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
        optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.05)
        steps = epochs * -(-len(images) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.2)
        for epoch in range(epochs):
            progress(epoch / epochs)
            for batch in torch.randperm(len(images), generator=generator).split(_BATCH):
                logits = model(random_views(images[batch], generator))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def random_views(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image slightly turned, scaled and shifted; what comes in from outside is background (-1)."""
    import torch
    import torch.nn.functional as F

    def draw(limit: float) -> torch.Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, scale = draw(_ROTATION), 1 + draw(_SCALE)
    shift = 2 * _SHIFT / images.shape[-1]  # in the coordinates of affine_grid an image is 2 wide
    rows = torch.stack(
        [
            torch.stack([angle.cos() * scale, -angle.sin() * scale, draw(shift)], dim=1),
            torch.stack([angle.sin() * scale, angle.cos() * scale, draw(shift)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def accuracy(logits: Array, labels: Array) -> float:
    """The share of rows of f32[n, 10] whose largest element is at the label."""
    return float((logits.argmax(axis=1) == labels).mean())
