"""The softmax of a row of scores, a block of keys at a time.

Over several blocks the largest score and the sum of the powers are kept from block to block (M. Milakov and
N. Gimelshein, "Online normalizer calculation for softmax", 2018), and the division is left to the end.  Exponents are
to the base 2, so the factor that takes scores to exponents includes the binary logarithm of e.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from trimtab.backends.tvm.codegen.comparison import eq
from trimtab.backends.tvm.codegen.expression import Expr, int_value
from trimtab.backends.tvm.codegen.loops import (
    Stmt,
    bind,
    ceil_div,
    floor_div,
    index,
    lanes_of,
    load,
    loop,
    scratch,
    sequence,
    store,
)
from trimtab.backends.tvm.codegen.vector_math import exp2_at_most_one

Mask = Callable[[Expr], Expr]
Keep = Callable[[Expr, Expr, Expr], Expr]


@dataclass(frozen=True)
class RowSoftmax:
    """Generates the softmax of rows.

    Attributes:
        dtype: of scores and powers.
        lanes: elements of a vector.
        scale: what scores are multiplied by before the mask is applied.
        mask_is_bool: whether a mask says which keys count, instead of being added.
    """

    dtype: str
    lanes: int
    scale: float
    mask_is_bool: bool = False

    def block(
        self, scores: Any, r: Expr, count: Expr, covered: Expr, mask: Mask | None,
        largest: Any, total: Any, at: Expr, rescale: Callable[[Expr], Stmt] | None, bias: Mask | None = None,
    ) -> Stmt:  # fmt: skip
        """Replace the scores of a row in a block of keys by the powers of their differences from the largest so far.

        Args:
            scores: ``[rows, columns]``, with room for a vector behind the last key.
            count: keys of the block that the row attends to, the first ones of it.
            covered: keys of the block for which powers are wanted: those after ``count`` are 0.
            mask: the mask at a key of the block.
            largest, total: the largest exponent and the sum of the powers at position ``at``, both up to date when
                earlier blocks are done.
            rescale: multiplies what else depends on earlier blocks by a factor; None in a row's only block.
            bias: instead of a mask, what is added to exponents, with room for a vector behind the last key.
        """
        lanes = self.lanes
        full = floor_div(count, lanes)
        rest = count - full * index(lanes)
        ragged = int_value(rest) != 0
        low, zero = tirx.const(-math.inf, self.dtype), tirx.const(0, self.dtype)
        factor = tirx.const(self.scale * math.log2(math.e), self.dtype)
        # Without a mask and with a positive factor the largest exponent is that of the largest score.
        plain = mask is None and bias is None and self.scale > 0

        def raw(j: Expr) -> Expr:
            return load(scores, r, j)

        def exponent(j: Expr) -> Expr:
            if bias is not None:
                return raw(j) * factor + bias(j)
            return raw(j) if mask is not None else raw(j) * factor

        def masked(j: Expr) -> Stmt:
            assert mask is not None
            value = raw(j) * factor
            if self.mask_is_bool:
                value = tirx.Select(mask(j), value, low)
            else:
                value = value + self.bias_of(mask(j))
            return store(scores, [r, j], value)

        def vector(n: Expr, body: Callable[[Expr], Stmt]) -> Stmt:
            return lanes_of(n * index(lanes), lanes, body)

        def all_vectors(body: Callable[[Expr, Keep], Stmt]) -> Stmt:
            """``body(vector, keep)`` for every vector; ``keep`` replaces what is past the last key by another value."""

            def keep_all(lane: Expr, value: Expr, other: Expr) -> Expr:
                return value

            def keep_some(lane: Expr, value: Expr, other: Expr) -> Expr:
                return tirx.Select(lane < rest, value, other)

            whole = loop(full, lambda n: body(n, keep_all), name="vector")
            return sequence(whole, body(full, keep_some)) if ragged else whole

        def all_masked() -> Stmt:
            return sequence(
                loop(full, lambda n: vector(n, masked), name="vector"),
                loop(rest, lambda c: masked(full * index(lanes) + c), name="key"),
            )

        def with_lanes(acc: Any) -> Stmt:
            def find(n: Expr, keep: Keep) -> Stmt:
                def step(lane: Expr) -> Stmt:
                    j = n * index(lanes) + lane
                    value = keep(lane, raw(j) if plain else exponent(j), low)
                    # A NaN is not found here, and makes the sum NaN.
                    return store(acc, [lane], tirx.max(value, load(acc, lane)))

                return lanes_of(index(0), lanes, step)

            def powers(shift: Expr) -> Stmt:
                def raise_(n: Expr, keep: Keep) -> Stmt:
                    def power(lane: Expr) -> Stmt:
                        j = n * index(lanes) + lane
                        return store(scores, [r, j], keep(lane, self._power(exponent(j) - shift), zero))

                    def add(lane: Expr) -> Stmt:
                        return store(acc, [lane], load(acc, lane) + raw(n * index(lanes) + lane))

                    return sequence(lanes_of(index(0), lanes, power), lanes_of(index(0), lanes, add))

                return all_vectors(raise_)

            def update(new: Expr) -> Stmt:
                def shifted(shift: Expr) -> Stmt:
                    def correct(correction: Any) -> Stmt:
                        assert rescale is not None
                        factor = load(correction, index(0))
                        return sequence(
                            store(correction, [index(0)], self._power(load(largest, at) - shift)),
                            store(total, [at], load(total, at) * factor + load(acc, index(0))),
                            rescale(factor),
                            store(largest, [at], new),
                        )

                    if rescale is None:
                        finish = store(total, [at], load(acc, index(0)))
                    else:
                        finish = scratch([1], self.dtype, correct, "correction")
                    return sequence(
                        lanes_of(index(0), lanes, lambda c: store(acc, [c], zero)),
                        powers(shift), self._fold(acc, lambda a, b: a + b), finish,
                    )  # fmt: skip

                return bind(tirx.Select(eq(new, low), zero, new), shifted, "shift")

            found = load(acc, index(0)) * factor if plain else load(acc, index(0))
            before = load(largest, at) if rescale is not None else low
            return sequence(
                lanes_of(index(0), lanes, lambda c: store(acc, [c], low)),
                all_masked() if mask is not None else None, all_vectors(find), self._fold(acc, tirx.max),
                bind(tirx.max(before, found) if rescale is not None else found, update, "largest"),
            )  # fmt: skip

        first_clear = full + index(1 if ragged else 0)
        clear = loop(
            tirx.max(ceil_div(covered, lanes) - first_clear, index(0)),
            lambda n: vector(first_clear + n, lambda j: store(scores, [r, j], zero)),
            name="vector",
        )
        same = int_value(covered) is not None and int_value(covered) == int_value(count)
        return sequence(scratch([lanes], self.dtype, with_lanes, "lane_values"), None if same else clear)

    def reciprocal(self, total: Expr) -> Expr:
        """What powers are multiplied by in the end; 0 for a row that may attend to nothing."""
        zero = tirx.const(0, self.dtype)
        return tirx.Select(eq(total, zero), zero, tirx.const(1, self.dtype) / total)

    def bias_of(self, mask: Expr) -> Expr:
        """What an addend of scores adds to exponents."""
        return mask * tirx.const(math.log2(math.e), self.dtype)

    def _power(self, exponent: Expr) -> Expr:
        return exp2_at_most_one(exponent) if self.dtype == "float32" else tirx.exp2(exponent)

    def _fold(self, acc: Any, combine: Callable[[Expr, Expr], Expr]) -> Stmt:
        return fold_lanes(acc, self.lanes, combine)


def fold_lanes(acc: Any, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Stmt:
    """Combine the lanes of a vector into lane 0."""

    def halve(half: int) -> Stmt:
        return lanes_of(index(0), half, lambda c: store(acc, [c], combine(load(acc, c), load(acc, c + index(half)))))

    return sequence(*(halve(lanes >> level) for level in range(1, lanes.bit_length())))
