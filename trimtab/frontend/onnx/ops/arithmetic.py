"""Elementwise operators of two and more inputs: arithmetic, comparison, logic, bits, selection."""

from __future__ import annotations

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.ops.unsigned import WIDENED, compute
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op

_WRAPPING: dict[str, type[Op]] = {"Add": ops.Add, "Sub": ops.Sub, "Mul": ops.Mul}
_COMPARISONS: dict[str, type[Op]] = {
    "Less": ops.Lt, "LessOrEqual": ops.Le, "Greater": ops.Gt, "GreaterOrEqual": ops.Ge,
}  # fmt: skip
_LOGIC: dict[str, type[Op]] = {"And": ops.LogicalAnd, "Or": ops.LogicalOr, "Xor": ops.LogicalXor}
_BITS: dict[str, type[Op]] = {
    "BitwiseAnd": ops.BitwiseAnd, "BitwiseOr": ops.BitwiseOr, "BitwiseXor": ops.BitwiseXor,
}  # fmt: skip


@onnx_op("Add", "Sub", "Mul", since=7)
def wrapping(node: Node) -> Value:
    return compute(node, _WRAPPING[node.op], _pair(node), wraps=True)


@onnx_op("Div", since=7)
def divide(node: Node) -> Value:
    x, y = _pair(node)
    if x.type.dtype.is_floating:
        return node.emit(ops.Div(x, y))
    return compute(node, lambda a, b: ops.Div(a, b, rounding="trunc"), (x, y))


@onnx_op("Mod", since=10)
def modulo(node: Node) -> Value:
    x, y = _pair(node)
    if node.flag("fmod"):
        return compute(node, ops.Fmod, (x, y))
    if x.type.dtype.is_floating and node.version < 28:
        node.inconsistent("floating inputs need fmod=1")
    return compute(node, ops.Remainder, (x, y))


@onnx_op("Pow", since=7)
def power(node: Node) -> Value:
    """The result has the type of the base; the exponent may have any other."""
    x, y = node.input(0), node.input(1)
    own, other = x.type.dtype, y.type.dtype
    if own.is_floating:
        return node.emit(ops.Pow(x, node.cast(y, own)))
    if other.is_floating:
        wide = node.emit(ops.Pow(node.cast(x, DType.F64), node.cast(y, DType.F64)))
        return node.cast(wide, own)
    if own is DType.U64 or other is DType.U64:
        node.refuse("unsigned 64-bit integers", "use int64")
    return node.cast(node.emit(ops.Pow(node.cast(x, DType.I64), node.cast(y, DType.I64))), own)


@onnx_op("Equal", since=7)
def equal(node: Node) -> Value:
    return compute(node, ops.Eq, _pair(node), wraps=True)


@onnx_op("Less", "LessOrEqual", "Greater", "GreaterOrEqual", since=7)
def compare(node: Node) -> Value:
    x, y = _pair(node)
    if x.type.dtype is DType.U64:
        x, y = signed_order(node, x), signed_order(node, y)
    return compute(node, _COMPARISONS[node.op], (x, y))


def signed_order(node: Node, x: Value) -> Value:
    """u64 as i64 in the same order: flipping the top bit maps one order to the other."""
    return _flipped(node, node.cast(x, DType.I64))


def _flipped(node: Node, x: Value) -> Value:
    return node.emit(ops.BitwiseXor(x, node.scalar(-(2**63), DType.I64)))


@onnx_op("And", "Or", "Xor", since=7)
def logic(node: Node) -> Value:
    return node.emit(_LOGIC[node.op](*_pair(node)))


@onnx_op("BitwiseAnd", "BitwiseOr", "BitwiseXor", since=18)
def bits(node: Node) -> Value:
    return compute(node, _BITS[node.op], _pair(node), wraps=True)


@onnx_op("BitShift", since=11)
def shift(node: Node) -> Value:
    x, y = _pair(node)
    direction = node.string_attr("direction")
    if direction == "LEFT":
        return compute(node, ops.ShiftLeft, (x, y), wraps=True)
    if direction != "RIGHT":
        node.inconsistent("direction is LEFT or RIGHT", direction=direction)
    if x.type.dtype is not DType.U64:
        return compute(node, ops.ShiftRight, (x, y))
    # A signed shift copies the top bit: shift by one and clear it, then shift by the rest.
    wide, count = node.cast(x, DType.I64), node.cast(y, DType.I64)
    one, largest = node.scalar(1, DType.I64), node.scalar(2**63 - 1, DType.I64)
    half = node.emit(ops.BitwiseAnd(node.emit(ops.ShiftRight(wide, one)), largest))
    rest = node.emit(ops.Maximum(node.emit(ops.Sub(count, one)), node.scalar(0, DType.I64)))
    shifted = node.emit(ops.ShiftRight(half, rest))
    unshifted = node.emit(ops.Eq(count, node.scalar(0, DType.I64)))
    return node.cast(node.emit(ops.Where(unshifted, wide, shifted)), DType.U64)


@onnx_op("Where", since=9)
def where(node: Node) -> Value:
    condition, x, y = node.input(0), node.input(1), node.input(2)
    return compute(node, lambda a, b: ops.Where(condition, a, b), (x, y), wraps=True)


@onnx_op("Max", "Min", since=8)
def extremum(node: Node) -> Value:
    make = ops.Maximum if node.op == "Max" else ops.Minimum
    first, *rest = node.all_inputs()
    if first.type.dtype is DType.U64:
        ordered = signed_order(node, first)
        for value in rest:
            ordered = node.emit(make(ordered, signed_order(node, value)))
        return node.cast(_flipped(node, ordered), DType.U64)
    for value in rest:
        first = compute(node, make, (first, value))
    return first


@onnx_op("Sum", since=8)
def total(node: Node) -> Value:
    first, *rest = node.all_inputs()
    for value in rest:
        first = node.emit(ops.Add(first, value))
    return first


@onnx_op("Mean", since=8)
def mean(node: Node) -> Value:
    values = node.all_inputs()
    return node.emit(ops.Div(total(node), node.scalar(float(len(values)), values[0])))


@onnx_op("PRelu", since=7)
def prelu(node: Node) -> Value:
    x, slope = node.input(0), node.input(1)
    if x.type.dtype in WIDENED:
        return x
    negative = node.emit(ops.Lt(x, node.scalar(0, x)))
    return node.emit(ops.Where(negative, node.emit(ops.Mul(x, slope)), x))


def _pair(node: Node) -> tuple[Value, Value]:
    x, y = node.input(0), node.input(1)
    if x.type.dtype is not y.type.dtype and node.op != "BitShift":
        node.inconsistent("both inputs have one type")
    return x, y
