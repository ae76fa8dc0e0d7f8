"""One operator call as converters see it: metadata of the exported node, and short ways to emit ops."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from trimtab.errors import ImportModelError, Location
from trimtab.frontend.torch_export.registry import Refusal
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, DimExpr, Symbol
from trimtab.ir.dtypes import DType
from trimtab.ir.inference import dim_from_sympy
from trimtab.ir.op import Op
from trimtab.ir.ops import Cast, DimValue
from trimtab.ir.types import TensorType

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


class Call:
    """One operator call as converters see it: the node's metadata, and short ways to emit ops."""

    def __init__(self, builder: Builder, symbols: Mapping[Any, Symbol], node: Node) -> None:
        self.builder = builder
        self.symbols = symbols
        self.node = node
        self.meta: Any = node.meta.get("val")

    def __call__(self, op: Op) -> Value:
        """Emit an op with one result."""
        return self.builder(op, self.node.name if not op.results[0].name else "")

    def add(self, op: Op) -> tuple[Value, ...]:
        """Emit an op with several results."""
        return self.builder.add(op).results

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Shape of the call's (first) result."""
        return self.type_of(self._first()).shape

    @property
    def dtype(self) -> DType:
        """Dtype of the call's (first) result."""
        return self.type_of(self._first()).dtype

    def shapes(self) -> list[tuple[Dim, ...]]:
        """Shape of each result of a call that returns several."""
        return [self.type_of(meta).shape for meta in self.meta]

    def type_of(self, meta: torch.Tensor) -> TensorType:
        """The IR type of a tensor in the exported program's metadata."""
        try:
            dtype = DType.from_torch(meta.dtype)
        except ValueError as error:
            raise ImportModelError(
                "a tensor has a dtype that the IR lacks",
                values={"dtype": meta.dtype, "node": self.node.name},
                location=location_of(self.node),
            ) from error
        return TensorType(dtype, tuple(self.dim(size) for size in meta.shape))

    def dim(self, size: Any) -> Dim:
        """A size of the exported program as a dimension."""
        if isinstance(size, torch.SymInt):
            return dim_from_sympy(size.node.expr, self.symbols)
        return int(size)

    def cast(self, value: Value, dtype: DType) -> Value:
        """``value`` in another dtype; itself when it has it."""
        return value if value.type.dtype is dtype else self.builder(Cast(value, dtype=dtype))

    def operand(self, given: Any, dtype: DType) -> Value:
        """A tensor, number or dimension as a value of ``dtype``."""
        if isinstance(given, Value):
            return self.cast(given, dtype)
        if isinstance(given, DimExpr):
            return self.builder(DimValue(dim=given, dtype=dtype))
        if isinstance(given, UnrepresentableNumber):
            raise Refusal(f"the number {given.text} has no form in the IR")
        return self.builder.scalar(given, dtype)

    def promoted(self, *given: Any) -> list[Value]:
        """Operands converted to their common dtype by torch's promotion rules."""
        dtype = self.common_dtype(*given)
        return [self.operand(item, dtype) for item in given]

    def common_dtype(self, *given: Any) -> DType:
        def sample(item: Any) -> Any:
            if isinstance(item, Value):
                # Promotion ranks tensors with axes above scalars, so the sample keeps the rank.
                return torch.empty([1] * item.type.rank, dtype=item.type.dtype.to_torch())
            return 2 if isinstance(item, DimExpr) else item

        first, *rest = map(sample, given)
        dtype = first.dtype if isinstance(first, torch.Tensor) else torch.result_type(first, rest[0])
        for other in rest:
            dtype = torch.result_type(first, other) if len(given) == 2 else torch.promote_types(dtype, other.dtype)
        return DType.from_torch(dtype)

    def axis(self, dim: int, value: Value) -> int:
        """A possibly negative axis of ``value`` as a non-negative one."""
        return dim % value.type.rank if value.type.rank else 0

    def axes(self, dims: Any, value: Value) -> tuple[int, ...]:
        """Axes as a sorted tuple; None or an empty list means all of them."""
        if dims is None or (isinstance(dims, list | tuple) and not dims):
            return tuple(range(value.type.rank))
        return tuple(sorted(self.axis(dim, value) for dim in (dims if isinstance(dims, list | tuple) else [dims])))

    def _first(self) -> torch.Tensor:
        first = self.meta[0] if isinstance(self.meta, tuple | list) else self.meta
        assert isinstance(first, torch.Tensor)
        return first


def location_of(node: Node) -> Location | None:
    """The innermost line of the node's stack trace that is not inside torch itself."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return None
    outside = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    file, line, function = outside[-1]
    return Location(file, int(line), function)


class UnrepresentableNumber:
    """A symbolic number (a float or bool computed from sizes) that the IR has no form for; an error only if used."""

    def __init__(self, text: str) -> None:
        self.text = text
