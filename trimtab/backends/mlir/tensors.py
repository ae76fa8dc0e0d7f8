"""Tensors and structured ops: what the rules of the emitter are written in.

A :class:`Code` builds ops at one place of a function. Every tensor is a :class:`Tensor`, an MLIR value with its type
in the IR, whose dimensions may be expressions over symbols; :meth:`Code.size` turns these into values of type index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, tensor

from trimtab.backends.mlir.scalar import Scalar, cast, constant, element_type, work_type
from trimtab.ir.dims import Dim, evaluate, product
from trimtab.ir.dtypes import DType
from trimtab.ir.types import TensorType

DYNAMIC = ir.ShapedType.get_dynamic_size()

Body = Callable[..., Scalar]


@dataclass(frozen=True)
class Tensor:
    """A tensor in the function that is built."""

    value: Any
    type: TensorType

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.type.shape

    @property
    def rank(self) -> int:
        return self.type.rank

    @property
    def dtype(self) -> DType:
        return self.type.dtype


def mlir_type(type: TensorType) -> Any:
    """The ranked tensor type; sizes that are not numbers are dynamic."""
    return ir.RankedTensorType.get(list(map(_extent, type.shape)), element_type(type.dtype))


def _extent(dim: Dim) -> int:
    return dim if isinstance(dim, int) else int(DYNAMIC)


class _Index:
    """Index arithmetic for :func:`trimtab.ir.dims.evaluate`."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @staticmethod
    def of(value: _Index | int) -> _Index:
        return value if isinstance(value, _Index) else _Index(constant(value, None).value)

    def _op(self, build: Callable[..., Any], other: _Index | int) -> _Index:
        return _Index(build(self.value, _Index.of(other).value))

    def __add__(self, other: _Index | int) -> _Index:
        return self._op(arith.addi, other)

    def __mul__(self, other: _Index | int) -> _Index:
        return self._op(arith.muli, other)

    def __floordiv__(self, other: _Index | int) -> _Index:
        return self._op(arith.floordivsi, other)

    def __mod__(self, other: _Index | int) -> _Index:
        # Divisors of dimensions are positive, so the remainder with the divisor's sign is a - (a // b) * b.
        return self + (self // other) * _Index.of(other) * -1

    __radd__, __rmul__ = __add__, __mul__

    def __rfloordiv__(self, other: int) -> _Index:
        return _Index.of(other) // self

    def __rmod__(self, other: int) -> _Index:
        return _Index.of(other) % self


_EXTREMA = {
    "min": lambda *args: _fold(arith.minsi, args),
    "max": lambda *args: _fold(arith.maxsi, args),
}


def _fold(build: Callable[..., Any], args: Iterable[_Index | int]) -> _Index:
    first, *rest = map(_Index.of, args)
    for other in rest:
        first = first._op(build, other)
    return first


class Code:
    """Builds the ops of one function.

    Args:
        symbols: values of type index for the symbols of the function, by name.
    """

    def __init__(self, symbols: dict[str, Any]) -> None:
        self.symbols = symbols

    # -- sizes ------------------------------------------------------------------------------------------------------

    def size(self, dim: Dim) -> Any:
        """``dim`` as a value of type index."""
        return _Index.of(evaluate(dim, {n: _Index(v) for n, v in self.symbols.items()}, _EXTREMA)).value

    def sizes(self, shape: Iterable[Dim]) -> list[Any]:
        """The dynamic sizes of ``shape``, in order."""
        return [self.size(dim) for dim in shape if not isinstance(dim, int)]

    def mixed(self, dims: Iterable[Dim]) -> tuple[list[Any], list[int]]:
        """Dims as MLIR takes mixed lists: the dynamic values, and numbers with a mark where a value stands in."""
        dims = list(dims)
        return self.sizes(dims), list(map(_extent, dims))

    # -- making tensors -----------------------------------------------------------------------------------------------

    def empty(self, type: TensorType) -> Any:
        """A tensor without contents, to be overwritten."""
        sizes = [dim if isinstance(dim, int) else self.size(dim) for dim in type.shape]
        return tensor.empty(sizes, element_type(type.dtype))

    def filled(self, type: TensorType, value: float | int | bool) -> Any:
        """A tensor with the same constant everywhere."""
        return linalg.fill(constant(value, type.dtype).value, outs=[self.empty(type)])

    # -- structured ops ---------------------------------------------------------------------------------------------

    def generic(
        self,
        inputs: Sequence[tuple[Tensor, Any]],
        outputs: Sequence[tuple[Tensor, Any]],
        reduced: Sequence[bool],
        body: Callable[..., Sequence[Scalar] | Scalar],
    ) -> list[Tensor]:
        """A ``linalg.generic``.

        Args:
            inputs, outputs: tensors with the affine maps from the loops to their indices.
            reduced: for each loop, whether it is a reduction.
            body: makes the new output elements from those of inputs and outputs.
        """
        kinds = [
            ir.Attribute.parse(f"#linalg.iterator_type<{'reduction' if is_reduced else 'parallel'}>")
            for is_reduced in reduced
        ]
        op = linalg.GenericOp(
            [t.value.type for t, _ in outputs],
            [t.value for t, _ in inputs],
            [t.value for t, _ in outputs],
            ir.ArrayAttr.get([ir.AffineMapAttr.get(map) for _, map in (*inputs, *outputs)]),
            ir.ArrayAttr.get(kinds),
        )
        operands = [t for t, _ in (*inputs, *outputs)]
        block = op.regions[0].blocks.append(*(element_type(t.dtype) for t in operands))
        with ir.InsertionPoint(block):
            made = body(*(Scalar(a, t.dtype) for a, t in zip(block.arguments, operands, strict=True)))
            results = [made] if isinstance(made, Scalar) else list(made)
            linalg.YieldOp([
                cast(r, t.dtype).value for r, (t, _) in zip(results, outputs, strict=True)
            ])  # fmt: skip
        return [Tensor(value, t.type) for value, (t, _) in zip(op.results, outputs, strict=True)]

    def elementwise(self, type: TensorType, operands: Sequence[Tensor], body: Body) -> Tensor:
        """``body`` of the operands' elements, which broadcast to ``type``; half types are widened first."""
        inputs = [(operand, broadcast_map(operand.type, type)) for operand in operands]
        output = Tensor(self.empty(type), type)
        made = self.generic(
            inputs,
            [(output, ir.AffineMap.get_identity(type.rank))],
            [False] * type.rank,
            lambda *elements: body(*(cast(e, work_type(e.dtype)) for e in elements[:-1])),
        )
        return made[0]

    def compute(self, type: TensorType, body: Callable[[Sequence[Scalar]], Scalar]) -> Tensor:
        """The tensor whose element at ``indices`` is ``body(indices)``, which may :meth:`load` from anywhere."""

        def element(_: Scalar) -> Scalar:
            return body([Scalar(linalg.IndexOp(axis).result, None) for axis in range(type.rank)])

        output = Tensor(self.empty(type), type)
        return self.generic([], [(output, ir.AffineMap.get_identity(type.rank))], [False] * type.rank, element)[0]

    def place(self, axis: int, rank: int) -> Scalar:
        """Where the body of an elementwise op of ``rank`` axes stands along ``axis``."""
        return Scalar(linalg.IndexOp(axis % rank).result, None)

    def load(self, source: Tensor, indices: Sequence[Scalar]) -> Scalar:
        """The element of a tensor at ``indices``, which must lie inside."""
        return Scalar(tensor.extract(source.value, [i.value for i in indices]), source.dtype)

    def load_broadcast(self, source: Tensor, at: Sequence[Scalar], shape: Sequence[Dim]) -> Scalar:
        """The element that the place ``at`` of a tensor of ``shape`` reads from ``source`` under numpy broadcasting."""
        skipped = len(at) - source.rank
        return self.load(source, [
            constant(0, None) if size == 1 and shape[skipped + axis] != 1 else at[skipped + axis]
            for axis, size in enumerate(source.shape)
        ])  # fmt: skip

    def reduce(
        self, x: Tensor, axes: Sequence[int], start: float | int | bool, dtype: DType, body: Body, keepdim: bool = False
    ) -> Tensor:
        """``body(element, so far)`` over ``axes``, beginning with ``start``, in ``dtype``."""
        kept = [axis for axis in range(x.rank) if axis not in axes]
        shape = [1 if axis in axes else x.shape[axis] for axis in range(x.rank) if keepdim or axis not in axes]
        type = TensorType(dtype, tuple(shape))
        output = Tensor(self.filled(type, start), type)
        places = [
            ir.AffineExpr.get_constant(0) if axis in axes else ir.AffineExpr.get_dim(axis)
            for axis in (range(x.rank) if keepdim else kept)
        ]
        maps = (ir.AffineMap.get_identity(x.rank), ir.AffineMap.get(x.rank, 0, places))
        return self.generic(
            [(x, maps[0])],
            [(output, maps[1])],
            [axis in axes for axis in range(x.rank)],
            lambda element, so_far: body(cast(element, dtype), so_far),
        )[0]

    # -- other shapes -----------------------------------------------------------------------------------------------

    def reshape(self, x: Tensor, shape: Sequence[Dim]) -> Tensor:
        """The same elements in row-major order: axes split and joined where products of sizes agree."""
        groups = _matching_groups(x.shape, tuple(shape))
        joined = tuple(product(x.shape[i] for i in own) for own, _ in groups)
        if any(len(own) > 1 for own, _ in groups):
            x = self._collapse(x, [list(own) for own, _ in groups], joined)
        elif len(x.shape) != len(groups):
            x = self._collapse(x, [], ())
        if tuple(shape) != joined:
            x = self._expand(x, [list(new) for _, new in groups], tuple(shape))
        return x

    def _collapse(self, x: Tensor, groups: list[list[int]], shape: tuple[Dim, ...]) -> Tensor:
        type = x.type.with_shape(*shape)
        return Tensor(tensor.collapse_shape(mlir_type(type), x.value, groups), type)

    def _expand(self, x: Tensor, groups: list[list[int]], shape: tuple[Dim, ...]) -> Tensor:
        type = x.type.with_shape(*shape)
        values, numbers = self.mixed(shape)
        return Tensor(tensor.expand_shape(mlir_type(type), x.value, groups, values, numbers), type)

    def permute(self, x: Tensor, dims: Sequence[int]) -> Tensor:
        if list(dims) == list(range(x.rank)):
            return x  # the bindings crash on a permutation of no axes
        type = x.type.with_shape(*(x.shape[axis] for axis in dims))
        op = linalg.transpose(x.value, outs=[self.empty(type)], permutation=list(dims))
        return Tensor(op.result if hasattr(op, "result") else op, type)

    def pad(self, x: Tensor, before: Sequence[int], after: Sequence[Dim], value: float | int | bool) -> Tensor:
        """x with ``before[i]`` and ``after[i]`` elements of ``value`` around axis i."""
        shape = [low + size + high for low, size, high in zip(before, x.shape, after, strict=True)]
        type = x.type.with_shape(*shape)
        high, static_high = self.mixed(after)
        op = tensor.PadOp(mlir_type(type), x.value, [], high, list(before), static_high)
        block = op.regions[0].blocks.append(*[ir.IndexType.get()] * x.rank)
        with ir.InsertionPoint(block):
            tensor.YieldOp(constant(value, x.dtype).value)
        return Tensor(op.result, type)

    def slice(self, x: Tensor, starts: Sequence[Dim], shape: Sequence[Dim], steps: Sequence[int]) -> Tensor:
        """Elements ``starts + i * steps`` along each axis."""
        type = x.type.with_shape(*shape)
        if any(size == 0 for size in shape):  # it may start at the end, which is no place in x
            return Tensor(self.empty(type), type)
        offsets, static_offsets = self.mixed(starts)
        sizes, static_sizes = self.mixed(shape)
        value = tensor.extract_slice(
            mlir_type(type), x.value, offsets, sizes, [], static_offsets, static_sizes, list(steps)
        )
        return Tensor(value, type)

    def insert(self, piece: Tensor, into: Tensor, starts: Sequence[Dim]) -> Tensor:
        """``into`` with ``piece`` at ``starts``."""
        if any(size == 0 for size in piece.shape):
            return into
        offsets, static_offsets = self.mixed(starts)
        sizes, static_sizes = self.mixed(piece.shape)
        value = tensor.insert_slice(
            piece.value, into.value, offsets, sizes, [], static_offsets, static_sizes, [1] * into.rank
        )
        return Tensor(value, into.type)


def broadcast_map(own: TensorType, target: TensorType) -> Any:
    """From the loops over ``target`` to the indices of an operand under numpy broadcasting."""
    skipped = target.rank - own.rank
    places = [
        ir.AffineExpr.get_constant(0) if size == 1 and target.shape[skipped + axis] != 1
        else ir.AffineExpr.get_dim(skipped + axis)
        for axis, size in enumerate(own.shape)
    ]  # fmt: skip
    return ir.AffineMap.get(target.rank, 0, places)


def _matching_groups(own: tuple[Dim, ...], new: tuple[Dim, ...]) -> list[tuple[range, range]]:
    """The finest division of two shapes with equal products into runs of axes whose products agree.

    Sizes of 1 at the end of a run join it, so that no run but the only one is empty.
    """
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(own) and j < len(new):
        first, second = i, j
        left, right = own[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if i < len(own) and (j == len(new) or _is_less(left, right)):
                left, i = left * own[i], i + 1
            elif j < len(new):
                right, j = right * new[j], j + 1
            else:
                break
        groups.append((range(first, i), range(second, j)))
    if groups and (i < len(own) or j < len(new)):
        (last_own, last_new) = groups[-1]
        groups[-1] = (range(last_own.start, len(own)), range(last_new.start, len(new)))
    return groups


def _is_less(left: Dim, right: Dim) -> bool:
    """Whether the left product must grow first: it is smaller, or divides the other where symbols hide the order."""
    if isinstance(left, int) and isinstance(right, int):
        return left < right
    return left != 0 and right % left == 0


__all__ = ["Code", "Tensor", "broadcast_map", "mlir_type"]
