"""Sorting, running sums and writing at places: algorithms with an order, built as ops of IREE's ``linalg_ext`` dialect.

The dialect is not part of torch-mlir, so its ops are written in generic form; IREE's compiler verifies them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch_mlir import ir

from trimtab.backends.mlir.rules.indexing import place
from trimtab.backends.mlir.rules.registry import lowers
from trimtab.backends.mlir.scalar import Scalar, cast, element_type, maximum, minimum, select
from trimtab.backends.mlir.tensors import Code, Tensor
from trimtab.ir import ops
from trimtab.ir.dims import Dim, product
from trimtab.ir.dtypes import DType
from trimtab.ir.types import TensorType


def _extension(
    name: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    attributes: dict[str, Any],
    elements: Sequence[DType],
    body: Callable[..., Scalar],
) -> list[Tensor]:
    """An op of the dialect with a region on ``elements``; its results have the types of the outputs."""
    segments = ir.DenseI32ArrayAttr.get([len(inputs), len(outputs)])
    op = ir.Operation.create(
        f"iree_linalg_ext.{name}",
        results=[t.value.type for t in outputs],
        operands=[t.value for t in (*inputs, *outputs)],
        attributes={**attributes, "operandSegmentSizes": segments},
        regions=1,
    )
    block = op.regions[0].blocks.append(*map(element_type, elements))
    with ir.InsertionPoint(block):
        made = body(*(Scalar(a, dtype) for a, dtype in zip(block.arguments, elements, strict=True)))
        ir.Operation.create("iree_linalg_ext.yield", operands=[made.value])
    return [Tensor(value, t.type) for value, t in zip(op.results, outputs, strict=True)]


def _i64(value: int) -> Any:
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(64), value)


def _sorted(code: Code, x: Tensor, dim: int, descending: bool) -> tuple[Tensor, Tensor]:
    """x sorted stably along ``dim``, and where each element was. NaN counts as larger than any number."""
    index_type = TensorType(DType.I64, x.shape)
    indices = code.compute(index_type, lambda at: cast(at[dim], DType.I64))

    def before(a: Scalar, b: Scalar, i: Scalar, j: Scalar) -> Scalar:
        small, large = (b, a) if descending else (a, b)
        first, same = small < large, a.equals(b)
        if a.is_float:
            large_nan, small_nan = large.differs(large), small.differs(small)
            first, same = first | (large_nan & ~small_nan), same | (large_nan & small_nan)
        return first | (same & (i < j))

    values, places = _extension(
        "sort", [], [x, indices], {"dimension": _i64(dim)}, [x.dtype, x.dtype, DType.I64, DType.I64], before
    )
    return values, places


@lowers(ops.Sort)
def _sort(op: Any, code: Code, x: Tensor) -> list[Tensor]:
    return list(_sorted(code, x, op.dim, op.descending))


@lowers(ops.Topk)
def _topk(op: Any, code: Code, x: Tensor) -> list[Tensor]:
    shape, steps = op.results[0].type.shape, [1] * x.rank
    return [code.slice(t, [0] * x.rank, shape, steps) for t in _sorted(code, x, op.dim, op.largest)]


@lowers(ops.Cumsum)
def _cumsum(op: Any, code: Code, x: Tensor) -> Tensor:
    type = op.result.type
    source = code.elementwise(type, [x], lambda e: e) if x.dtype is not type.dtype else x
    so_far = type.with_shape(*(size for axis, size in enumerate(type.shape) if axis != op.dim))
    outputs = [Tensor(code.empty(type), type), Tensor(code.filled(so_far, 0), so_far)]
    attributes = {"dimension": _i64(op.dim), "inclusive": ir.BoolAttr.get(True)}
    return _extension("scan", [source], outputs, attributes, [type.dtype, type.dtype], lambda a, b: a + b)[0]


_REDUCTIONS: dict[str, Callable[[Scalar, Scalar], Scalar]] = {
    "none": lambda new, old: new,
    "add": lambda new, old: new + old,
    "mul": lambda new, old: new * old,
    "amax": maximum,
    "amin": minimum,
}


def _scattered(
    code: Code, x: Tensor, shape: Sequence[Dim], coordinates: Callable[[Sequence[Scalar]], list[Scalar]],
    updates: Tensor, reduce: str,
) -> Tensor:  # fmt: skip
    """x with ``updates`` ``[*shape, *rest]`` combined in at ``coordinates(place in shape)`` of its other axes."""
    rest = updates.shape[len(shape) :]
    depth, count = x.rank - len(rest), product(shape)

    def coordinate(at: Sequence[Scalar]) -> Scalar:
        chosen, *others = coordinates(at[:-1])
        for axis, value in enumerate(others, 1):
            chosen = select(at[-1].equals(axis), value, chosen)
        return cast(chosen, DType.I32)

    places = code.compute(TensorType(DType.I32, (*shape, depth)), coordinate)
    attributes = {
        "dimension_map": ir.DenseI64ArrayAttr.get(list(range(depth))),
        "unique_indices": ir.BoolAttr.get(reduce == "none"),
    }
    inputs = [code.reshape(updates, (count, *rest)), code.reshape(places, (count, depth))]
    return _extension("scatter", inputs, [x], attributes, [x.dtype, x.dtype], _REDUCTIONS[reduce])[0]


@lowers(ops.Scatter)
def _scatter(op: Any, code: Code, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    if updates.shape != indices.shape:
        updates = code.slice(updates, [0] * x.rank, indices.shape, [1] * x.rank)

    def coordinates(at: Sequence[Scalar]) -> list[Scalar]:
        row = place(code, code.load(indices, at), x.shape[op.dim])
        return [row if axis == op.dim else i for axis, i in enumerate(at)]

    return _scattered(code, x, indices.shape, coordinates, updates, op.reduce)


@lowers(ops.IndexPut)
def _index_put(op: Any, code: Code, x: Tensor, indices: list[Tensor], updates: Tensor) -> Tensor:
    widest = max(indices, key=lambda t: t.rank)
    shape = tuple(
        next((t.shape[axis - widest.rank] for t in indices
              if t.rank >= widest.rank - axis and t.shape[axis - widest.rank] != 1), 1)
        for axis in range(widest.rank)
    )  # fmt: skip
    whole = TensorType(x.dtype, (*shape, *x.shape[len(indices) :]))
    if updates.shape != whole.shape:
        updates = code.elementwise(whole, [updates], lambda e: e)

    def coordinates(at: Sequence[Scalar]) -> list[Scalar]:
        return [place(code, code.load_broadcast(t, at, shape), x.shape[axis]) for axis, t in enumerate(indices)]

    return _scattered(code, x, shape, coordinates, updates, "add" if op.accumulate else "none")
