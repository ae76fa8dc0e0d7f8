"""Halves the work of a small vision transformer by reducing tokens, and trains the result on what the original says.

    python distil.py [--pass "merge-tokens{budget=0.5}"] [--seconds 120] [--out model.trim]

The original is trained on the digits of scikit-learn first, in about a minute.  Then a pass reduces its tokens, and the
reduced network is trained to give the original's class probabilities (Hinton et al., Distilling the Knowledge in a
Neural Network, arXiv 1503.02531); labels are not used again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import trimtab
from trimtab.cli.demo_model import DigitTransformer
from trimtab.cli.demo_training import Digits, accuracy, load_digits, random_views, train
from trimtab.ir import Module
from trimtab.passes.samples import count_macs, smallest_sizes

ORIGINAL = {"depth": 5, "patch": 3, "stride": 1, "patch_dropout": 0.8}
"""Options of the original: 36 overlapping patches of an image of 8 x 8 pixels, and a class token. Leaving patches out
makes the training quicker, and the model depends less on each."""
EPOCHS = 40
_BATCH = 64
_LEARNING_RATE = 1e-3
_TEMPERATURE = 2.0


def train_original(digits: Digits, epochs: int = EPOCHS) -> DigitTransformer:
    """The model that is to be reduced, trained by the code of ``trimtab demo``."""
    return train(digits, epochs, 0, lambda done: None, ORIGINAL)


def traced(model: DigitTransformer) -> Module:
    """The model as a module that takes any number of images."""
    return trimtab.trace(model, (torch.zeros(2, 1, 8, 8),), dynamic_shapes={"images": {0: "batch"}})


def distil(
    student: torch.nn.Module,
    teacher: Callable[[Tensor], Tensor],
    images: Tensor,
    seconds: float,
    seed: int = 0,
    most_steps: int = 100_000,
) -> int:
    """Train ``student`` to give the class probabilities of ``teacher`` on random views of ``images``.

    Args:
        student: takes images and returns logits; trained in place.
        teacher: the same for the original.
        images: f32[n, 1, 8, 8], the training part alone.
        seconds: how long to train; the learning rate falls to zero over this time.
        seed: of the order and the views.
        most_steps: end after so many steps of 64 images, if that is earlier.

    Returns:
        How many steps were made.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.01)
    start, step = time.monotonic(), 0
    while True:
        for batch in torch.randperm(len(images), generator=generator).split(_BATCH):
            done = max((time.monotonic() - start) / seconds, step / most_steps)
            if done >= 1:
                return step
            optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 + math.cos(math.pi * done)) / 2
            views = random_views(images[batch], generator)
            with torch.no_grad():
                wanted = F.softmax(teacher(views) / _TEMPERATURE, dim=-1)
            found = F.log_softmax(student(views) / _TEMPERATURE, dim=-1)
            loss = F.kl_div(found, wanted, reduction="batchmean") * _TEMPERATURE**2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


def accuracy_of(network: Callable[[Tensor], Tensor], digits: Digits) -> float:
    """The share of held-out digits that ``network`` gets right."""
    with torch.no_grad():
        return accuracy(network(torch.from_numpy(digits.held_out_images)).numpy(), digits.held_out_labels)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--pass", dest="reduction", default="merge-tokens{budget=0.5}", help="which pass reduces tokens"
    )
    parser.add_argument("--seconds", type=float, default=120, help="how long to distil")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the training of the original")
    parser.add_argument("--out", type=Path, default=Path("model.trim"), help="the file to write")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the layers are too small for more

    digits = load_digits()
    images = torch.from_numpy(digits.train_images)
    model = train_original(digits, args.epochs)
    module = trimtab.optimize(traced(model), "cleanup").module
    reduced = trimtab.optimize(module, args.reduction, calibration=[images[:_BATCH].numpy()], check="never").module
    taken, whole = (count_macs(each, smallest_sizes(each.main)) for each in (reduced, module))
    print(f"original: accuracy {accuracy_of(model, digits):.2%}, {whole / 1e6:.2f} million multiply-accumulates")

    network = trimtab.to_torch(reduced)
    print(f"{args.reduction}: accuracy {accuracy_of(network, digits):.2%} at {taken / whole:.1%} of them", flush=True)
    steps = distil(network, model, images, args.seconds)
    print(f"after {steps} steps: accuracy {accuracy_of(network, digits):.2%}", flush=True)

    trimtab.update(reduced, network)
    trimtab.compile(reduced, target="native").save(args.out)
    with trimtab.load(args.out) as session:
        found = accuracy(np.asarray(session(digits.held_out_images)), digits.held_out_labels)
    print(f"{args.out}, compiled: accuracy {found:.2%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
