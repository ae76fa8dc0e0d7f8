"""Merging of the tokens with the highest energy, from the formulas of PiToMe (Tran et al., Accelerating Transformers
with Spectrum-Preserving Token Merging, arXiv 2405.16148)."""

from __future__ import annotations

from typing import Literal

from trimtab.errors import UsageError
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import Add, Argmax, Elu, Exp, Gt, Matmul, Mean, Mul, Permute, Reshape, Sub, Where
from trimtab.passes.tokens.assignment import Assignment, identity
from trimtab.passes.tokens.matching import interleaved, match, most_merged, without_padding
from trimtab.passes.tokens.rows import joined, numbers, put, ranking, span, take, token_count, unit_rows

Kernel = Literal["elu", "gaussian"]
"""How a similarity adds to the energy: of images, or of text."""


def energy(build: Builder, unit: Value, margin: float, kernel: Kernel = "elu") -> Value:
    """How redundant each token is: ``[B, T]`` of rows of unit length ``[B, T, D]``.

    With c the cosine of two tokens: the mean over all tokens of ``ELU(c - margin)``, that is ``c - margin`` where
    positive and else ``e^(c - margin) - 1``; or of ``e^(-((1 - c) / (1 - margin))^2 / 2)``, which is the normal density
    that the original takes but for a factor common to all tokens.
    """
    cosines = build(Matmul(unit, build(Permute(unit, dims=(0, 2, 1)))))
    if kernel == "elu":
        terms = build(Elu(build(Sub(cosines, build.scalar(margin, unit.type.dtype)))))
    else:
        distance = build(Sub(build.scalar(1.0, unit.type.dtype), cosines))
        rate = build.scalar(-0.5 / (1 - margin) ** 2, unit.type.dtype)
        terms = build(Exp(build(Mul(build(Mul(distance, distance)), rate))))
    return build(Mean(terms, dims=(2,)))


def energy_matching(
    build: Builder,
    metric: Value,
    r: int,
    margin: float,
    protected: int = 1,
    kernel: Kernel = "elu",
    sizes: Value | None = None,
) -> Assignment:
    """Merge r of the 2r tokens with the highest energy into the other r; tokens of lower energy stay as they are.

    By falling energy the 2r tokens are candidates and receivers in turn (with the gaussian kernel, for text, the
    first r and the last r), and each candidate is merged into the receiver of the largest cosine. Of equal energies,
    and of equal cosines, the first wins.

    The result holds the protected tokens, those of lower energy from the highest of them down, then the receivers.

    Args:
        build: where ops go.
        metric: ``[B, N, D]``, see :func:`trimtab.passes.tokens.matching.key_metric`.
        r: how many tokens to merge, at most half of those not protected; 0 gives the identity.
        margin: cosines below it count as dissimilar.
        protected: how many leading tokens neither merge nor receive, and have no energy.
        kernel: see :func:`energy`.
        sizes: ``[B, N, 1]``, if some tokens are padding, of size 0: that comes before all energies, is like padding
            only, and takes no token's own features from it where it has to be merged with one.

    Raises:
        UsageError: r or the margin is out of range, or N is a symbol.
    """
    tokens = _checked(metric, r, margin, protected)
    if r == 0:
        return identity(build, metric, tokens)
    unit, order = _ranked(build, metric, margin, protected, kernel, sizes)
    if kernel == "elu":
        candidates, receivers = (span(build, order, start, 2 * r, step=2) for start in (0, 1))
    else:
        candidates, receivers = span(build, order, 0, r), span(build, order, r, 2 * r)
    rows = take(build, unit, receivers)
    cosines = build(Matmul(take(build, unit, candidates), build(Permute(rows, dims=(0, 2, 1)))))
    alone = tokens - protected - 2 * r
    start = build.scalar(protected + alone, DType.I64)
    merged = build(Add(build(Argmax(cosines, dim=2)), start))
    kept = numbers(build, metric, r, protected + alone)
    pairs = interleaved(build, merged, kept) if kernel == "elu" else joined(build, merged, kept)
    by_energy = joined(build, pairs, numbers(build, metric, alone, protected))
    return _in_place(build, order, by_energy, tokens - r, protected)


def energy_bipartite_matching(
    build: Builder,
    metric: Value,
    r: int,
    margin: float,
    protected: int = 1,
    kernel: Kernel = "elu",
    sizes: Value | None = None,
) -> Assignment:
    """Bipartite matching (see :mod:`trimtab.passes.tokens.matching`) in which tokens are candidates and receivers in
    turn by falling energy, not by position: ``pitome_bsm`` of the original. No token is kept from merging for its
    low energy.

    The result holds the protected tokens, then candidates that were not merged, then the receivers, each by falling
    energy. Args and errors are those of :func:`energy_matching`.
    """
    tokens = _checked(metric, r, margin, protected)
    if r == 0:
        return identity(build, metric, tokens)
    unit, order = _ranked(build, metric, margin, protected, kernel, sizes)
    candidates, receivers = (take(build, unit, span(build, order, start, step=2)) for start in (0, 1))
    start = tokens - r - token_count(receivers)
    fixed = [None if place % 2 == 0 else start + place // 2 for place in range(tokens - protected)]
    by_energy = match(build, candidates, receivers, r, protected, fixed)
    return _in_place(build, order, by_energy, tokens - r, protected)


def _ranked(
    build: Builder, metric: Value, margin: float, protected: int, kernel: Kernel, sizes: Value | None
) -> tuple[Value, Value]:
    """The metric ``[B, T, D]`` of the tokens that are not protected, of unit length, and their positions by energy."""
    if sizes is None:
        unit = unit_rows(build, span(build, metric, protected))
        return unit, ranking(build, energy(build, unit, margin, kernel))
    own = span(build, sizes, protected)
    unit = without_padding(build, span(build, metric, protected), own)
    energies = energy(build, unit, margin, kernel)
    present = build(Gt(build(Reshape(own, shape=energies.type.shape)), build.scalar(0.0, own.type.dtype)))
    above = build.scalar(2.0 + abs(margin), energies.type.dtype)  # an energy is at most 1 - margin, or 1
    return unit, ranking(build, build(Where(present, energies, above)))


def _in_place(build: Builder, order: Value, by_energy: Value, count: int, protected: int) -> Assignment:
    """The assignment whose targets ``by_energy`` ``[B, T]`` are listed in ``order``."""
    target = put(build, order, order, by_energy)
    return Assignment(joined(build, numbers(build, order, protected), target), count)


def _checked(metric: Value, r: int, margin: float, protected: int) -> int:
    tokens = token_count(metric)
    most = most_merged(tokens, protected)
    if not 0 <= r <= most or margin >= 1:
        raise UsageError(
            "tokens cannot be merged by energy",
            values={"r": r, "margin": margin, "tokens": tokens, "protected": protected},
            rule=f"0 <= r <= {most}, half of the tokens that are not protected, and margin < 1, the largest cosine",
        )
    return tokens
