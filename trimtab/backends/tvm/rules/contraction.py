"""Matrix products. The code generator recognises the sums of products and turns them into register-tiled kernels."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from trimtab.backends.tvm.rules.registry import (
    Expr,
    Operand,
    Scope,
    cast,
    compute,
    i64,
    lowers,
    tvm_dtype,
    work_type,
)
from trimtab.ir import ops
from trimtab.ir.dims import Dim


def rounded(op: Any, scope: Scope, tensor: Any) -> Any:
    """``tensor`` converted from the working type to the result's type."""
    result = op.results[0].type
    dtype = tvm_dtype(result.dtype)
    if str(tensor.dtype) == dtype:
        return tensor
    return compute(scope.shape(result.shape), lambda *i: tirx.Cast(dtype, tensor(*i)), op.name + "_round")


@lowers(ops.Linear)
def _linear(op: Any, scope: Scope, x: Operand, weight: Operand, bias: Operand | None) -> Any:
    work = work_type(x.dtype)
    k = te.reduce_axis((i64(0), x.shape[-1]), "k")

    def term(*indices: Expr) -> Expr:
        *rows, column = indices
        factor = weight.packed(column, k.var)
        return te.sum(cast(x(*rows, k.var), work) * cast(factor, work), axis=k)

    shape = scope.shape(op.result.type.shape)
    product = compute(shape, term, "linear")
    if bias is not None:
        product = compute(shape, lambda *i, p=product: p(*i) + cast(bias.broadcast(i), work), "linear_bias")
    return rounded(op, scope, product)


@lowers(ops.Matmul, absorbs_permute=True)
def _matmul(op: Any, scope: Scope, x: Operand, y: Operand) -> Any:
    return rounded(op, scope, matrix_product(op, scope, x, y, work_type(x.dtype)))


def matrix_product(op: Any, scope: Scope, x: Operand, y: Operand, work: str) -> Any:
    """The product of the last two axes of x and y, the others broadcast, in the type ``work``."""
    depth = x.shape[-1]
    k = te.reduce_axis((i64(0), depth), "k")
    batch_rank = op.result.type.rank - (x.rank > 1) - (y.rank > 1)

    def lead(operand: Operand, batch: tuple[Expr, ...]) -> list[Expr]:
        own = batch[len(batch) - max(operand.rank - 2, 0) :] if operand.rank > 2 else ()
        return [i64(0) if dim == 1 else index for dim, index in zip(operand.type.shape, own, strict=False)]

    def term(*indices: Expr) -> Expr:
        batch, rest = indices[:batch_rank], list(indices[batch_rank:])
        left = [*lead(x, batch), *([rest.pop(0)] if x.rank > 1 else []), k.var]
        right = [*lead(y, batch), k.var, *([rest.pop(0)] if y.rank > 1 else [])]
        return te.sum(cast(x(*left), work) * cast(y(*right), work), axis=k)

    return compute(scope.shape(op.result.type.shape), term, "matmul")


def _letters(op: Any) -> tuple[list[list[str]], list[str]]:
    """Axis names of each operand and of the result; an ellipsis becomes names of its own."""
    text = op.equation.replace(" ", "")
    left, _, right = text.partition("->")
    terms = left.split(",")
    width = max(
        (v.type.rank - len(t.replace("...", "")) for t, v in zip(terms, op.operands_list, strict=True) if "..." in t),
        default=0,
    )

    def expand(term: str, rank: int | None) -> list[str]:
        head, dots, tail = term.partition("...")
        count = (rank - len(head) - len(tail)) if rank is not None else width
        return [*head, *(f"*{width - count + i}" for i in range(count if dots else 0)), *tail]

    inputs = [expand(term, value.type.rank) for term, value in zip(terms, op.operands_list, strict=True)]
    if "->" in text:
        return inputs, expand(right, None)
    flat = [letter for term in inputs for letter in term]
    stars = sorted({letter for letter in flat if letter.startswith("*")})
    return inputs, stars + sorted({letter for letter in flat if not letter.startswith("*") and flat.count(letter) == 1})


@lowers(ops.Einsum, check=lambda op: "" if op.operands_list else "it has no operands")
def _einsum(op: Any, scope: Scope, values: list[Operand]) -> Any:
    inputs, output = _letters(op)
    sizes: dict[str, Dim] = {}
    for names, value in zip(inputs, op.operands_list, strict=True):
        for name, size in zip(names, value.type.shape, strict=True):
            if name not in sizes or sizes[name] == 1:
                sizes[name] = size
    work = work_type(values[0].dtype)
    summed = [name for name in sizes if name not in output]
    axes = {name: te.reduce_axis((i64(0), scope.dim(sizes[name])), "r") for name in summed}

    def term(*indices: Expr) -> Expr:
        place = {**dict(zip(output, indices, strict=True)), **{name: axis.var for name, axis in axes.items()}}
        product = None
        for names, operand in zip(inputs, values, strict=True):
            read = [i64(0) if size == 1 else place[name] for name, size in zip(names, operand.type.shape, strict=True)]
            factor = cast(operand(*read), work)
            product = factor if product is None else product * factor
        return te.sum(product, axis=list(axes.values())) if axes else product

    return rounded(op, scope, compute(scope.shape(op.result.type.shape), term, "einsum"))
