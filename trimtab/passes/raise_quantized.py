"""Products of dequantized numbers as products of integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Graph, Use, Value
from trimtab.ir.dims import Dim, bounds
from trimtab.ir.dtypes import DType
from trimtab.ir.integer_sums import zero_of_product
from trimtab.ir.printer import value_in_words
from trimtab.ir.rewrite import Constant, Match, Pattern, Rule, Var, maybe, one_of, op, shared
from trimtab.ir.types import TensorType
from trimtab.ir.weights import ComputedSource
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.rewrite_pass import RewritePass

if TYPE_CHECKING:
    import torch

_BYTES = (DType.I8, DType.U8)
_RANGES = {DType.I8: (-128, 127), DType.U8: (0, 255)}
_TRANSPOSE = (1, 0)
_DEEPEST = (2**31 - 1) // 255**2
"""Terms of a sum of products of differences of bytes that is sure to have 32 bits."""


@dataclass(frozen=True)
class RaiseQuantized(RewritePass):
    """Multiply quantized numbers as the integers they are, and apply scales and zero points to the sums.

    A linear layer, matrix product or two-dimensional convolution whose operands are dequantized becomes its integer
    form, a ``dequantize`` of the sums with the product of both scales, and the bias. Scales and zero points are those
    of whole tensors, of rows of x, and of output channels of the weight; zero points leave terms of their own, which
    for weights are constants. Unsigned weights are stored 128 less than they were. The sums of integers are exact, so
    the results are those of the float form without its rounding.
    """

    name: ClassVar[str] = "raise-quantized"
    contract: ClassVar[Contract] = Exact(rounding=True)
    grows_weights: ClassVar[bool] = True  # by the sum of each row of a weight, where x has a zero point

    def rules(self) -> Sequence[Rule]:
        return (QuantizedLinear(), QuantizedMatmul(), QuantizedConvolution())


class QuantizedLinear(Rule):
    """``x W^T`` or ``x W`` of dequantized x and a dequantized weight W, with or without a bias."""

    def pattern(
        self, x: Var, x_scale: Var, x_zero: Var, w: Constant, w_scale: Var, w_zero: Var, b: Var
    ) -> Pattern:  # fmt: skip
        left = shared(op.dequantize(x, x_scale, maybe(x_zero)).bind("left"))
        right = shared(op.dequantize(w, w_scale, maybe(w_zero)).bind("right"))
        factor = one_of(shared(op.permute(right, dims=_TRANSPOSE).bind("transpose")), right)
        return one_of(op.linear(left, factor, maybe(b)), left @ factor)

    def check(self, m: Match) -> str | None:
        if not m.w.is_weight or m.w.type.rank != 2:
            return f"{value_in_words(m.w)} is not one matrix for all rows of x"
        if m.x.type.rank < 2 or m.root.type.shape[:-1] != m.x.type.shape[:-1]:
            return f"x is not a matrix for each of the products, from {m.x.type} to {m.root.type}"
        summed = 1 if _rows_are_outputs(m) else 0
        reasons = (
            _unfit(m.left, m.x, m.x.type.rank - 1, m.x_scale, m.x_zero),
            _unfit(m.right, m.w, summed, m.w_scale, m.w_zero),
            _too_deep(m.x),
        )
        found = next((reason for reason in reasons if reason), None)
        if found is None and (summed == 0 or m.w.type.dtype is DType.U8):
            return _second_copy(m)
        return found

    def rewrite(self, m: Match, build: Builder) -> Value:
        weight, w_zero = _signed(m, build, transposed=not _rows_are_outputs(m))
        x_zero = _integer_zero(m, build, m.x_zero)
        w_zero = None if w_zero is None else _flat(build, w_zero)
        zero = zero_of_product(build, m.x, x_zero, lambda: _sums_of_rows(m, weight), w_zero)
        product = build(ops.LinearInteger(m.x, weight))
        y = _scaled(build, product, m.x_scale, _flat(build, m.w_scale), zero)
        return y if m.b is None else build(ops.Add(y, m.b))


class QuantizedMatmul(Rule):
    """The product of two dequantized values, of which the second may be permuted, as in attention."""

    def pattern(
        self, x: Var, x_scale: Var, x_zero: Var, y: Var, y_scale: Var, y_zero: Var
    ) -> Pattern:  # fmt: skip
        left = shared(op.dequantize(x, x_scale, maybe(x_zero)).bind("left"))
        right = shared(op.dequantize(y, y_scale, maybe(y_zero)).bind("right"))
        return left @ one_of(shared(op.permute(right).bind("permuted")), right)

    def check(self, m: Match) -> str | None:
        if m.y.is_weight and m.y.type.rank == 2:
            return f"{value_in_words(m.y)} is a weight, which makes it a linear layer"
        if min(m.x.type.rank, m.y.type.rank) < 2:
            return "one of the operands is a vector"
        if m.permuted is not None and any(v.type.elements != 1 for v in (m.y_scale, m.y_zero) if v is not None):
            return "the second operand is permuted and has a scale or zero point for each channel"
        reasons = (
            _unfit(m.left, m.x, m.x.type.rank - 1, m.x_scale, m.x_zero),
            _unfit(m.right, m.y, m.y.type.rank - 2, m.y_scale, m.y_zero),
            _too_deep(m.x),
        )
        return next((reason for reason in reasons if reason), None)

    def rewrite(self, m: Match, build: Builder) -> Value:
        y = m.y if m.permuted is None else build(ops.Permute(m.y, dims=m.permuted.producer.dims))

        def sum_columns() -> Value:
            return build(ops.Sum(build(ops.Cast(y, DType.I32)), dims=(y.type.rank - 2,), keepdim=True))

        x_zero, y_zero = (_integer_zero(m, build, zero) for zero in (m.x_zero, m.y_zero))
        zero = zero_of_product(build, m.x, x_zero, sum_columns, y_zero)
        return _scaled(build, build(ops.MatmulInteger(m.x, y)), m.x_scale, _one_or_as_is(build, m.y_scale), zero)


class QuantizedConvolution(Rule):
    """A two-dimensional convolution of a dequantized x by a dequantized weight, with or without a bias."""

    def pattern(
        self, x: Var, x_scale: Var, x_zero: Var, w: Constant, w_scale: Var, w_zero: Var, b: Var
    ) -> Pattern:  # fmt: skip
        left = shared(op.dequantize(x, x_scale, maybe(x_zero)).bind("left"))
        right = shared(op.dequantize(w, w_scale, maybe(w_zero)).bind("right"))
        return op.conv2d(left, right, maybe(b))

    def check(self, m: Match) -> str | None:
        if not m.w.is_weight:
            return f"{value_in_words(m.w)} is not a weight"
        if any(v.type.elements != 1 for v in (m.x_scale, m.x_zero) if v is not None):
            return "x has several scales or zero points"
        reasons = [_unfit(m.left, m.x, 0, m.x_scale, m.x_zero)]
        reasons += [_unfit(m.right, m.w, axis, m.w_scale, m.w_zero) for axis in (1, 2, 3)]
        reasons.append(_unfit_zero(m))
        if not _is_centred(m):
            reasons.append("the weight has a zero point, which the borders of zeros do not have")
        if m.w.type.dtype is DType.U8:
            reasons.append(_second_copy(m))
        return next((reason for reason in reasons if reason), None)

    def rewrite(self, m: Match, build: Builder) -> Value:
        found: ops.Conv2d = m.root_op  # type: ignore[assignment]
        weight, _ = _signed(m, build, transposed=False)
        zero = m.x_zero
        if zero is not None:
            zero = None if _is_zero(m, zero) else build(ops.Reshape(_cast(build, zero, m.x.type.dtype), shape=(1,)))
        product = build(ops.ConvInteger(m.x, weight, zero, **found.attributes))
        behind = () if found.channels_last else (1, 1)
        y = _scaled(build, product, m.x_scale, _flat(build, m.w_scale, behind), None)
        return y if m.b is None else build(ops.Add(y, build(ops.Reshape(m.b, shape=(*m.b.type.shape, *behind)))))


# -- conditions --------------------------------------------------------------------------------------------------------


def _rows_are_outputs(m: Match) -> bool:
    """Whether the weight is stored as ``[N, K]``: as linear layers have it, or transposed for a matrix product."""
    return isinstance(m.root_op, ops.Linear) == (m.transpose is None)


def _unfit(real: Value, integers: Value, summed: int, scale: Value, zero: Value | None) -> str | None:
    """Why a dequantized operand does not fit: its type, or a scale or zero point that varies along the summed axis."""
    if integers.type.dtype not in _BYTES:
        return f"{value_in_words(integers)} is {integers.type.dtype}, and products of integers take i8 and u8"
    if real.type.shape != integers.type.shape:
        return f"{value_in_words(integers)} is repeated by its scale"
    for role, value in (("scale", scale), ("zero point", zero)):
        if value is not None:
            axis = summed - integers.type.rank + value.type.rank
            if axis >= 0 and value.type.shape[axis] != 1:
                return f"{value_in_words(integers)} has more than one {role} along the axis that is summed"
    return None


def _unfit_zero(m: Match) -> str | None:
    """Why the zero point of x is not a number of x's type."""
    if m.x_zero is None or m.x_zero.type.dtype is m.x.type.dtype:
        return None
    low, high = _RANGES.get(m.x.type.dtype, (0, 0))
    number = m.scalar(m.x_zero)
    return None if number is not None and low <= number <= high else "the zero point of x may not be one of its numbers"


def _too_deep(x: Value) -> str | None:
    most = bounds(x.type.shape[-1])[1]
    if most <= _DEEPEST:
        return None
    return f"sums of {most:g} terms may not have 32 bits; up to {_DEEPEST} are sure to"


def _second_copy(m: Match) -> str | None:
    """Why other bytes cannot take the place of the weight: something other than such products reads it too."""
    for use in m.module.readers(m.w.weight):
        if not isinstance(use.user, ops.Dequantize) or not all(map(_multiplies, use.user.result.uses)):
            reader = "the graph's outputs" if isinstance(use.user, Graph) else use.user.name
            return f"the weight @{m.w.weight} is also read by {reader}: other bytes of it would be a second weight"
    return None


def _multiplies(use: Use) -> bool:
    """Whether a reader of a dequantized weight is a product, perhaps of the transposed weight."""
    reader = use.user
    if isinstance(reader, ops.Permute):
        return all(map(_multiplies, reader.result.uses))
    return isinstance(reader, (ops.Linear, ops.Matmul, ops.Conv2d)) and use.index == 1


def _is_zero(m: Match, value: Value) -> bool:
    """Whether a zero point is known to be zero everywhere."""
    if value.is_weight:
        return not bool(m.weight(value).tensor().any())
    return isinstance(value.producer, ops.Full) and value.producer.value == 0


def _is_centred(m: Match) -> bool:
    """Whether the weight has no zero point, or as an unsigned one that of 128."""
    if m.w.type.dtype is DType.I8:
        return m.w_zero is None or _is_zero(m, m.w_zero)
    if m.w_zero is None:
        return False
    if m.w_zero.is_weight:
        return bool((m.weight(m.w_zero).tensor() == 128).all())
    return isinstance(m.w_zero.producer, ops.Full) and m.w_zero.producer.value == 128


# -- what is built -----------------------------------------------------------------------------------------------------


def _signed(m: Match, build: Builder, *, transposed: bool) -> tuple[Value, Value | None]:
    """The weight as i8, transposed if so asked, and its zero point in i32."""
    zero = None if _is_centred(m) else _integer_zero(m, build, m.w_zero)
    unsigned = m.w.type.dtype is DType.U8
    if unsigned and not _is_centred(m):
        zero = build(ops.Sub(build.scalar(0, DType.I32) if zero is None else zero, build.scalar(128, DType.I32)))
    if not unsigned and not transposed:
        return m.w, zero
    weight = m.weight(m.w)

    def compute() -> torch.Tensor:
        import torch

        data = weight.tensor()
        # Flipping the highest bit of a byte subtracts 128.
        data = (data ^ 128).view(torch.int8) if unsigned else data
        return (data.t() if transposed else data).contiguous()

    shape = m.w.type.shape
    type = TensorType(DType.I8, tuple(reversed(shape)) if transposed else shape)
    return m.add_weight(f"{weight.id}.{'T' if transposed else 'signed'}", type, ComputedSource(compute)), zero


def _scaled(build: Builder, sums: Value, x_scale: Value, y_scale: Value, zero: Value | None) -> Value:
    """``(sums - zero) * x_scale * y_scale``; scales of rows and columns are not multiplied to a matrix of scales."""
    x_scale = _one_or_as_is(build, x_scale)
    if x_scale.type.rank and y_scale.type.rank:
        return build(ops.Mul(build(ops.Dequantize(sums, x_scale, zero)), y_scale))
    return build(ops.Dequantize(sums, build(ops.Mul(x_scale, y_scale)), zero))


def _sums_of_rows(m: Match, weight: Value) -> Value:
    """The sums of the rows of a weight ``[N, K]``, as a weight of their own."""
    import torch

    rows, type = m.weight(weight), TensorType(DType.I32, weight.type.shape[:1])
    return m.add_weight(f"{rows.id}.sums", type, ComputedSource(lambda: rows.tensor().sum(1, dtype=torch.int32)))


def _integer_zero(m: Match, build: Builder, zero: Value | None) -> Value | None:
    """A zero point in i32, a single one as a scalar; None for zero."""
    return None if zero is None or _is_zero(m, zero) else _one_or_as_is(build, _cast(build, zero, DType.I32))


def _cast(build: Builder, value: Value, dtype: DType) -> Value:
    return value if value.type.dtype is dtype else build(ops.Cast(value, dtype=dtype))


def _flat(build: Builder, value: Value, behind: tuple[int, ...] = ()) -> Value:
    """One element, or one for each output channel, in front of axes of size 1."""
    count = value.type.elements
    shape: tuple[Dim, ...] = () if count == 1 else (count, *behind)
    return value if value.type.shape == shape else build(ops.Reshape(value, shape=shape))


def _one_or_as_is(build: Builder, value: Value) -> Value:
    """A value of one element as a scalar, so that it has no axes to be aligned with others."""
    return build(ops.Reshape(value, shape=())) if value.type.rank and value.type.elements == 1 else value
