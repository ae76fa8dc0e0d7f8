"""Matrix products, as structured ops that the compiler tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_mlir import ir

from trimtab.backends.mlir.rules.registry import lowers
from trimtab.backends.mlir.scalar import Scalar, cast, work_type
from trimtab.backends.mlir.tensors import Code, Tensor
from trimtab.ir import ops
from trimtab.ir.dims import product
from trimtab.ir.types import TensorType


def contract(code: Code, type: TensorType, operands: Sequence[tuple[Tensor, str]], result: str) -> Tensor:
    """A sum of products in Einstein notation, one letter an axis, accumulated in the working type of ``type``.

    Letters of an operand may also be ``1`` for an axis of size 1 that is broadcast.
    """
    letters = list(dict.fromkeys(result + "".join(term for _, term in operands if term)))
    letters = [letter for letter in letters if letter != "1"]
    work = type.with_dtype(work_type(type.dtype))
    output = Tensor(code.filled(work, 0), work)

    def places(term: str) -> Any:
        exprs = [
            ir.AffineExpr.get_constant(0) if letter == "1" else ir.AffineExpr.get_dim(letters.index(letter))
            for letter in term
        ]
        return ir.AffineMap.get(len(letters), 0, exprs)

    def body(*elements: Scalar) -> Scalar:
        *factors, so_far = elements
        value = cast(factors[0], work.dtype)
        for factor in factors[1:]:
            value = value * cast(factor, work.dtype)
        return so_far + value

    inputs = [(operand, places(term)) for operand, term in operands]
    made = code.generic(inputs, [(output, places(result))], [letter not in result for letter in letters], body)[0]
    return made if work == type else code.elementwise(type, [made], lambda e: e)


@lowers(ops.Linear)
def _linear(op: Any, code: Code, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear_product(op, code, x, weight, bias)


def linear_product(op: Any, code: Code, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, summed in the working type of the op's result."""
    type = op.result.type
    rows = product(x.shape[:-1])
    flat = code.reshape(x, (rows, x.shape[-1])) if x.rank != 2 else x
    made = contract(
        code, type.with_shape(flat.shape[0], weight.shape[0]).with_dtype(work_type(type.dtype)),
        [(flat, "mk"), (weight, "nk")], "mn",
    )  # fmt: skip
    if bias is not None:
        made = code.elementwise(made.type, [made, bias], lambda a, b: a + b)
    if made.dtype is not type.dtype:
        made = code.elementwise(made.type.with_dtype(type.dtype), [made], lambda e: e)
    return code.reshape(made, type.shape) if type.rank != 2 else made


@lowers(ops.Matmul)
def _matmul(op: Any, code: Code, x: Tensor, y: Tensor) -> Tensor:
    return matrix_product(op, code, x, y)


def matrix_product(op: Any, code: Code, x: Tensor, y: Tensor) -> Tensor:
    """The product of the last two axes of x and y, the others broadcast, in the working type of the op's result."""
    shape = op.result.type.shape
    leading = shape[: len(shape) - (x.rank > 1) - (y.rank > 1)]
    names = "abcdefgh"[: len(leading)]

    def batch(operand: Tensor) -> str:
        own = operand.shape[:-2]
        skipped = len(leading) - len(own)
        return "".join(
            "1" if size == 1 and leading[skipped + i] != 1 else names[skipped + i] for i, size in enumerate(own)
        )

    left = "k" if x.rank == 1 else batch(x) + "mk"
    right = "k" if y.rank == 1 else batch(y) + "kn"
    result = names + ("m" if x.rank > 1 else "") + ("n" if y.rank > 1 else "")
    return contract(code, op.result.type, [(x, left), (y, right)], result)


@lowers(ops.Einsum)
def _einsum(op: Any, code: Code, operands: list[Tensor]) -> Tensor:
    left, _, right = op.equation.replace(" ", "").partition("->")
    ellipsis = max(
        (operand.rank - len(term.replace("...", "")) for term, operand in zip(left.split(","), operands, strict=True)
         if "..." in term), default=0,
    )  # fmt: skip
    names = "ABCDEFGH"[:ellipsis]
    terms = []
    for term, operand in zip(left.split(","), operands, strict=True):
        own = operand.rank - len(term.replace("...", ""))
        text = term.replace("...", names[ellipsis - own :] if own else "")
        terms.append(text)
    sizes = _letter_sizes(terms, operands)
    if not right and "->" not in op.equation:
        joined = "".join(terms)
        right = "..." + "".join(sorted({c for c in joined if joined.count(c) == 1 and c not in names}))
    result = right.replace("...", names)
    placed = [
        "".join("1" if size == 1 and sizes[c] != 1 else c for c, size in zip(term, operand.shape, strict=True))
        for term, operand in zip(terms, operands, strict=True)
    ]
    return contract(code, op.result.type, list(zip(operands, placed, strict=True)), result)


def _letter_sizes(terms: Sequence[str], operands: Sequence[Tensor]) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for term, operand in zip(terms, operands, strict=True):
        for letter, size in zip(term, operand.shape, strict=True):
            if sizes.get(letter, 1) == 1:
                sizes[letter] = size
    return sizes
