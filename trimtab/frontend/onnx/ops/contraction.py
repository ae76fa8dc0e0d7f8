"""Matrix products."""

from __future__ import annotations

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType


@onnx_op("MatMul", since=1)
def matmul(node: Node) -> Value:
    x, y = node.input(0), node.input(1)
    if x.type.dtype.is_floating:
        return node.emit(ops.Matmul(x, y))
    if DType.U64 in (x.type.dtype, y.type.dtype):
        node.refuse("unsigned 64-bit integers", "use int64")
    wide = node.emit(ops.Matmul(node.cast(x, DType.I64), node.cast(y, DType.I64)))
    return node.cast(wide, x.type.dtype)


@onnx_op("Gemm", since=7)
def gemm(node: Node) -> Value:
    """``alpha * op(A) op(B) + beta * C``."""
    a, b, c = node.input(0), node.input(1), node.optional(2)
    alpha, beta = node.float_attr("alpha", 1.0), node.float_attr("beta", 1.0)
    if a.type.rank != 2 or b.type.rank != 2:
        node.inconsistent("A and B are matrices")
    floating = a.type.dtype.is_floating
    if node.flag("transA"):
        a = node.emit(ops.Permute(a, dims=(1, 0)))
    out = b.type.shape[0 if node.flag("transB") else 1]
    rows_of_bias = c is not None and c.type.shape == (out,)
    if node.flag("transB") and alpha == 1.0 and floating and (c is None or (beta == 1.0 and rows_of_bias)):
        return node.emit(ops.Linear(a, b, c))
    if node.flag("transB"):
        y = (
            node.emit(ops.Linear(a, b))
            if floating
            else node.emit(ops.Matmul(a, node.emit(ops.Permute(b, dims=(1, 0)))))
        )
    else:
        y = node.emit(ops.Matmul(a, b))
    if alpha != 1.0:
        y = _scaled(node, y, alpha)
    if c is None or beta == 0.0:
        return y
    return node.emit(ops.Add(y, c if beta == 1.0 else _scaled(node, c, beta)))


def _scaled(node: Node, value: Value, factor: float) -> Value:
    dtype = value.type.dtype
    if dtype.is_floating:
        return node.emit(ops.Mul(value, node.scalar(factor, value)))
    if factor == int(factor):
        return node.emit(ops.Mul(value, node.scalar(int(factor), value)))
    node.refuse("a fractional factor on integers", factor=factor)


@onnx_op("Einsum", since=12)
def einsum(node: Node) -> Value:
    equation = node.string_attr("equation").replace(" ", "")
    letters = sorted({c for c in equation if c.isalpha()})
    free = iter(c for c in "abcdefghijklmnopqrstuvwxyz" if c not in letters)
    try:
        renamed = {c: next(free) for c in letters if c.isupper()}
    except StopIteration:
        node.refuse("more than 26 indices", equation=equation)
    if renamed and "->" not in equation:
        # The implied output lists indices in alphabetical order, upper case first: spell it out before renaming.
        terms = equation.replace("...", "").replace(",", "")
        once = "".join(c for c in letters if terms.count(c) == 1)
        equation += "->" + ("..." if "..." in equation else "") + once
    equation = "".join(renamed.get(c, c) for c in equation)
    return node.emit(ops.Einsum(node.all_inputs(), equation=equation))


@onnx_op("Det", since=11)
def determinant(node: Node) -> Value:
    from trimtab.ir.ops.opaque import encode_call

    x = node.input(0)
    return node.emit(ops.Opaque((x,), target="aten.linalg_det.default", call=encode_call((x,), [x])))
