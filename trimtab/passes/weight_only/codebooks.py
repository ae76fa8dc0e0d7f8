"""Codebooks: a weight as indices of a few vectors, found by k-means and chosen again by the error of the layer.

A weight ``[N, K]`` is cut along K into vectors of ``dim`` elements, ``[N, K / dim, dim]``, and each is replaced by one
of the rows of a codebook ``[entries, dim]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trimtab.passes.weight_only.moments import Moments

_ROUNDS = 25
"""Of Lloyd's iteration, at most."""
_PIECE = 1 << 22
"""Distances that are held at a time."""
_SWEEPS = 3
"""Over all vectors when candidates are chosen again."""


@dataclass(frozen=True)
class Palette:
    """A codebook ``[entries, dim]``, f64, and the index of each vector, i64 ``[N, K / dim]``."""

    codebook: torch.Tensor
    indices: torch.Tensor

    def values(self) -> torch.Tensor:
        """What the indices stand for: f64 ``[N, K]``."""
        return self.codebook[self.indices].flatten(-2)


def nearest(vectors: torch.Tensor, codebook: torch.Tensor, count: int = 1) -> torch.Tensor:
    """The ``count`` rows of ``codebook`` nearest to each of ``vectors`` f64 ``[V, dim]``, i64 ``[V, count]``."""
    pieces = vectors.split(max(1, _PIECE // len(codebook)))
    # From differences, not from products, which lose the digits of vectors that are close together.
    compute = "donot_use_mm_for_euclid_dist"
    found = [torch.cdist(piece, codebook, compute_mode=compute).topk(count, largest=False).indices for piece in pieces]
    return torch.cat(found)


def find_codebook(vectors: torch.Tensor, entries: int, generator: torch.Generator) -> torch.Tensor:
    """The codebook f64 ``[entries, dim]`` of ``vectors`` f64 ``[V, dim]`` by Lloyd's k-means.

    It starts from quantiles for single numbers, and else as k-means++ (Arthur and Vassilvitskii, 2007) does. An entry
    that no vector is nearest to moves to the vector that is furthest from its own entry.
    """
    codebook = _quantiles(vectors, entries) if vectors.shape[1] == 1 else _spread(vectors, entries, generator)
    previous = None
    for _ in range(_ROUNDS):
        indices = nearest(vectors, codebook)[:, 0]
        if previous is not None and torch.equal(indices, previous):
            break
        previous = indices
        counts = indices.bincount(minlength=entries)
        sums = torch.zeros_like(codebook).index_add_(0, indices, vectors)
        empty = counts == 0
        if bool(empty.any()):
            distances = (vectors - codebook[indices]).square().sum(1)
            furthest = distances.topk(min(int(empty.sum()), len(vectors))).indices
            places = empty.nonzero()[: len(furthest), 0]
            sums[places], counts[places] = vectors[furthest], 1
        codebook = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codebook)
    return codebook


def reselect(weight: torch.Tensor, palette: Palette, moments: Moments, candidates: int) -> Palette:
    """The palette with indices, and a codebook, for which the layer's result errs less; never more than before.

    VQ4DiT (Deng et al., arXiv 2408.17131) learns weights of the ``candidates`` entries nearest to each vector and keeps
    the best. In place of its gradients, each vector here takes in turn the candidate that is best for the error
    ``tr(D H D^T)`` with all others as they are; rows of the weight do not depend on each other. Between two sweeps over
    the vectors the codebook goes down the error's gradient by the best step.

    Args:
        weight: f64 ``[N, K]``.
        palette: of it.
        moments: of the layer's input.
        candidates: how many entries each vector can choose from.
    """
    if not moments.rows or candidates < 2:
        return palette
    dim = palette.codebook.shape[1]
    vectors = weight.reshape(-1, dim)
    products = moments.products / moments.products.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    best, least = palette, float(moments.error(palette.values() - weight).sum())
    current = palette
    for _ in range(_SWEEPS):
        offered = nearest(vectors, current.codebook, min(candidates, len(current.codebook)))
        indices = _sweep(weight, current, products, offered.reshape(*current.indices.shape, -1))
        current = _descend(weight, Palette(current.codebook, indices), products)
        error = float(moments.error(current.values() - weight).sum())
        if not error < least:
            break
        best, least = current, error
    return best


def together(count: int, bits: int) -> int:
    """How many of ``count`` indices, of ``bits`` bits, are stored in a byte: the most that divide ``count``."""
    return next(size for size in (8, 4, 2, 1) if size * bits <= 8 and count % size == 0)


def pack(palette: Palette, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A table f64 ``[2^(bits s), s dim]`` and indices u8 ``[N, K / (s dim)]`` into it that give the same weight.

    s is that of :func:`together`; of the indices in a byte the first has the lowest bits.
    """
    entries, dim = palette.codebook.shape
    size = together(palette.indices.shape[1], bits)
    shifts = bits * torch.arange(size)
    numbers = torch.arange(1 << bits * size)[:, None] >> shifts & (1 << bits) - 1
    table = palette.codebook[numbers.clamp(max=entries - 1)].reshape(-1, size * dim)
    packed = (palette.indices.unflatten(1, (-1, size)) << shifts).sum(-1)
    return table, packed.to(torch.uint8)


def _sweep(weight: torch.Tensor, palette: Palette, products: torch.Tensor, offered: torch.Tensor) -> torch.Tensor:
    """Indices after each vector took the best of those ``offered`` i64 ``[N, K / dim, candidates]``, in order of K."""
    codebook, indices = palette.codebook, palette.indices.clone()
    dim = codebook.shape[1]
    gradient = (palette.values() - weight) @ products  # half of it
    rows = torch.arange(len(weight))
    for place in range(indices.shape[1]):
        here = slice(place * dim, (place + 1) * dim)
        choices = torch.cat([indices[:, place, None], offered[:, place]], 1)
        steps = codebook[choices] - codebook[indices[:, place, None]]
        change = 2 * (steps @ gradient[:, here, None])[..., 0] + ((steps @ products[here, here]) * steps).sum(-1)
        taken = change.argmin(1)
        indices[:, place] = choices[rows, taken]
        gradient += steps[rows, taken] @ products[here]
    return indices


def _descend(weight: torch.Tensor, palette: Palette, products: torch.Tensor) -> Palette:
    """The palette with the codebook that is best along the gradient, each entry's divided by how often it is used."""
    codebook, indices = palette.codebook, palette.indices
    gradient = (palette.values() - weight) @ products
    flat = indices.reshape(-1)
    total = torch.zeros_like(codebook).index_add_(0, flat, gradient.reshape(-1, codebook.shape[1]))
    direction = total / flat.bincount(minlength=len(codebook)).clamp(min=1)[:, None]
    moved = direction[indices].flatten(-2)
    curvature = float(((moved @ products) * moved).sum())
    if not curvature > 0:
        return palette
    return Palette(codebook - float((gradient * moved).sum()) / curvature * direction, indices)


def _quantiles(vectors: torch.Tensor, entries: int) -> torch.Tensor:
    ordered = vectors[:, 0].sort().values
    places = (torch.arange(entries, dtype=torch.float64) + 0.5) / entries * len(ordered)
    return ordered[places.long().clamp(max=len(ordered) - 1), None]


def _spread(vectors: torch.Tensor, entries: int, generator: torch.Generator) -> torch.Tensor:
    """Vectors drawn one after the other, each in proportion to its squared distance from those drawn before."""
    chosen = [int(torch.randint(len(vectors), (), generator=generator))]
    distances = (vectors - vectors[chosen[0]]).square().sum(1)
    while len(chosen) < entries:
        total = distances.cumsum(0)
        drawn = float(torch.rand((), generator=generator, dtype=torch.float64)) * float(total[-1])
        chosen.append(min(int(torch.searchsorted(total, drawn, right=True)), len(vectors) - 1))
        distances = torch.minimum(distances, (vectors - vectors[chosen[-1]]).square().sum(1))
    return vectors[chosen]
