"""Puts ops into the graph under construction, and computes at once what is already known.

ONNX files compute shapes with ordinary nodes.  The emitter follows such content: a value may be known as a concrete
tensor (an initializer, a constant) or as an array of dimensions (what ``Shape`` gives).  An op on known values is
evaluated instead of emitted, so that no shape computation reaches the IR, with a limit on the size of what is computed.
A known value becomes a weight, a ``full`` or a ``dim_value`` only when an op that stays reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.errors import ImportModelError, Location
from trimtab.frontend.onnx.initializers import StoredTensor
from trimtab.frontend.onnx.symbolic_folding import SymbolicArray, fold_symbolically
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import Dim, bounds
from trimtab.ir.dtypes import DType
from trimtab.ir.interpreter import evaluate_op
from trimtab.ir.op import Op
from trimtab.ir.ops import Concat, Dequantize, DimValue, Full, Reshape
from trimtab.ir.types import TensorType
from trimtab.ir.weights import ComputedSource, TorchSource, Weight

if TYPE_CHECKING:
    import torch

FOLDING_LIMIT = 1 << 16
"""Elements of the largest tensor that is computed during import."""
PARAMETER_LIMIT = 1024
"""Elements of the largest floating tensor of the file that is computed with: bigger ones are weights and stay."""
SYMBOLIC_LIMIT = 1024
"""Elements of the largest array of dimensions that is followed."""
LARGEST_TENSOR = 1 << 44
"""Elements of the largest tensor that a sensible model has."""


@dataclass(frozen=True)
class Refinement:
    """A bound on a symbol under which the model may turn out to be consistent: ``symbol <= limit``."""

    symbol: str
    limit: int


class Emitter:
    """Appends ops to ``graph``; see the module's docstring.

    Attributes:
        location: given to ops that have none.
        refinements: bounds that slices suggested, see :meth:`suggest`.
    """

    def __init__(self, module: Module, graph: Graph) -> None:
        self.module = module
        self.graph = graph
        self.location: Location | None = None
        self.refinements: list[Refinement] = []
        self._known: dict[Value, torch.Tensor | SymbolicArray | StoredTensor] = {}
        self._placed: dict[Value, Value] = {}
        self._fulls: dict[Any, Value] = {}

    # -- ops ----------------------------------------------------------------------------------------------------

    def emit(self, op: Op) -> Value:
        """The only result of ``op``."""
        return self.emit_all(op)[0]

    def emit_all(self, op: Op) -> tuple[Value, ...]:
        """The results of ``op``: known values where it can be computed, else its results in the graph."""
        for result in op.results:
            check_size(result.type)
        folded = self._fold(op)
        if folded is not None:
            op._drop_reads()
            return folded
        for index, value in enumerate(op.operands):
            op.set_operand(index, self.place(value))
        op.location = op.location or self.location
        self.graph.ops.append(op)
        return op.results

    def _fold(self, op: Op) -> tuple[Value, ...] | None:
        if op.regions or not all(value in self._known for value in op.operands):
            return None
        if isinstance(op, DimValue):
            return (self.dims((op.dim,), op.dtype, scalar=True),)
        if any(self._is_parameter(value) for value in op.operands):
            return None
        if isinstance(op, Dequantize) and op.x.type.rank > 1:
            return None  # a weight stays as few bits as the file has it in
        contents = [self.content(value) for value in op.operands]
        if any(content is None for content in contents) or not all(r.type.is_static for r in op.results):
            return None
        sizes = [result.type.elements for result in op.results]
        if any(isinstance(content, SymbolicArray) for content in contents):
            if any(isinstance(size, int) and size > SYMBOLIC_LIMIT for size in sizes):
                return None
            outcome = fold_symbolically(op, contents)
            if outcome is None:
                return None
            return tuple(
                self.known(item, result.name)
                if not isinstance(item, SymbolicArray)
                else self._symbolic(item, result.type)
                for item, result in zip(outcome, op.results, strict=True)
            )
        if any(isinstance(size, int) and size > FOLDING_LIMIT for size in sizes) or not _is_concrete(op):
            return None
        return tuple(self.known(tensor) for tensor in evaluate_op(op, contents))

    def _is_parameter(self, value: Value) -> bool:
        found = self._known[value]
        return isinstance(found, StoredTensor) and found.type.dtype.is_floating and found.elements > PARAMETER_LIMIT

    # -- known values -------------------------------------------------------------------------------------------

    def known(self, tensor: torch.Tensor, name: str = "") -> Value:
        """A value whose content is ``tensor``."""
        value = Value(TensorType(DType.from_torch(tensor.dtype), tuple(tensor.shape)), name=name)
        self._known[value] = tensor.detach()
        return value

    def stored(self, tensor: StoredTensor) -> Value:
        """A value whose content is a tensor of the file, read when needed."""
        value = Value(tensor.type, name=tensor.name)
        self._known[value] = tensor
        return value

    def scalar(self, value: float | int | bool, dtype: DType) -> Value:
        """A known value of shape ``[]``."""
        import torch

        return self.known(torch.tensor(value, dtype=dtype.to_torch()))

    def dims(self, dims: tuple[Dim, ...], dtype: DType = DType.I64, *, scalar: bool = False) -> Value:
        """A known value of shape ``[n]`` (or ``[]``) that holds dimensions."""
        import torch

        if all(isinstance(dim, int) for dim in dims):
            return self.known(torch.tensor(dims[0] if scalar else list(dims), dtype=dtype.to_torch()))
        return self._symbolic(
            SymbolicArray(list(dims), () if scalar else (len(dims),)), TensorType(dtype, (len(dims),))
        )

    def _symbolic(self, array: SymbolicArray, type: TensorType) -> Value:
        import torch

        if array.is_concrete:
            return self.known(torch.tensor(array.items, dtype=type.dtype.to_torch()).reshape(array.shape))
        value = Value(TensorType(type.dtype, array.shape))
        self._known[value] = array
        return value

    def content(self, value: Value) -> torch.Tensor | SymbolicArray | None:
        """What is known about the content of ``value``; None when it depends on data or is large."""
        found = self._known.get(value)
        if isinstance(found, StoredTensor):
            if found.elements > FOLDING_LIMIT:
                return None
            return found.tensor()
        return found

    def derived(
        self, value: Value, part: str, type: TensorType, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> Value | None:
        """What ``compute`` makes of a constant of any size, when its data is asked for.

        Args:
            value: the constant.
            part: joined to its name to make that of the result.
            type: of the result.
            compute: a function of the constant's data.

        Returns:
            A known value; None when ``value`` depends on data or holds dimensions.
        """
        import torch

        found = self._known.get(value)
        if isinstance(found, StoredTensor):
            name, read = found.name, found.tensor
        elif isinstance(found, torch.Tensor):
            name, read = value.name, lambda: found
        else:
            return None
        source = ComputedSource(lambda: compute(read()))
        return self.stored(StoredTensor(f"{name or 'constant'}.{part}", type, source))

    def is_constant(self, value: Value) -> bool:
        """Whether ``value`` is known or a tensor of the file of any size."""
        return value in self._known

    def place(self, value: Value) -> Value:
        """``value`` as the graph can read it: a known one becomes a weight, a constant or sizes as data."""
        found = self._known.get(value)
        if found is None:
            return value
        placed = self._placed.get(value)
        if placed is None:
            placed = self._placed[value] = self._place(value, found)
        return placed

    def _place(self, value: Value, found: torch.Tensor | SymbolicArray | StoredTensor) -> Value:
        if isinstance(found, SymbolicArray):
            return self._place_dims(value, found)
        stored = isinstance(found, StoredTensor)
        if (found.elements if isinstance(found, StoredTensor) else found.numel()) <= FOLDING_LIMIT:
            tensor = found.tensor() if isinstance(found, StoredTensor) else found
            uniform = (
                tensor.numel() == 1 if stored else tensor.numel() > 0 and bool((tensor == tensor.reshape(-1)[0]).all())
            )
            # A stored tensor of one element but some axes may well be a parameter; it stays a weight.
            if uniform and not (stored and tensor.dim() > 0):
                return self._full(value, tensor)
        id = self.module.fresh_weight_id(value.name or "constant")
        source = found.source if isinstance(found, StoredTensor) else TorchSource(found.contiguous().clone())
        return self.graph.weight(self.module.add_weight(Weight(id, value.type, source)))

    def _full(self, value: Value, tensor: torch.Tensor) -> Value:
        item = tensor.reshape(-1)[0].item()
        key = (repr(item), value.type)
        if key not in self._fulls:
            op = Full(value=item, dtype=value.type.dtype, shape=value.type.shape)
            op.results[0].name = value.name
            self._fulls[key] = self._append(op)
        return self._fulls[key]

    def _place_dims(self, value: Value, array: SymbolicArray) -> Value:
        dtype = value.type.dtype
        parts = [
            self._append(Full(value=item, dtype=dtype) if isinstance(item, bool) else DimValue(dim=item, dtype=dtype))
            for item in array.items
        ]
        if not array.shape:
            return parts[0]
        rows = [self._append(Reshape(part, shape=(1,))) for part in parts]
        joined = self._append(Concat(rows, dim=0))
        return joined if len(array.shape) == 1 else self._append(Reshape(joined, shape=array.shape))

    def _append(self, op: Op) -> Value:
        op.location = self.location
        self.graph.ops.append(op)
        return op.results[0]

    def inputs_behind(self, value: Value) -> list[str]:
        """Names of the graph inputs from whose data ``value`` is computed."""
        seen, waiting = {value}, [value]
        while waiting:
            current = waiting.pop()
            if current.producer is not None:
                waiting.extend(new for new in current.producer.operands if new not in seen)
                seen.update(current.producer.operands)
        return [found.name for found in self.graph.inputs if found in seen]

    def suggest(self, symbol: str, limit: int) -> None:
        """Remember that ``symbol <= limit`` would decide a slice; the importer tries it if the model fails without."""
        refinement = Refinement(symbol, limit)
        if refinement not in self.refinements:
            self.refinements.append(refinement)


def check_size(type: TensorType) -> None:
    """Refuse tensors no machine holds.

    Raises:
        ImportModelError: a negative dimension or more than ``LARGEST_TENSOR`` elements.
    """
    smallest = 1
    for dim in type.shape:
        low = bounds(dim)[0]
        if isinstance(dim, int) and dim < 0:
            raise ImportModelError("a tensor has a negative dimension", values={"type": type})
        smallest *= max(low, 1)
    if smallest > LARGEST_TENSOR:
        raise ImportModelError(
            "a tensor is absurdly large",
            values={"type": type, "limit": f"{LARGEST_TENSOR} elements"},
            rule="a broken or hostile file must not exhaust memory",
            fix="check the file that states these dimensions",
        )


def _is_concrete(op: Op) -> bool:
    """Whether an op's attributes contain no symbols."""
    from trimtab.ir.attributes import attribute_symbols

    return not any(attribute_symbols(value) for value in op.attributes.values())
