"""Builds modules and graphs by hand, in tests, frontends and passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trimtab.errors import Location
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.ops import Full
from trimtab.ir.types import TensorType
from trimtab.ir.weights import Weight

if TYPE_CHECKING:
    import torch


class Builder:
    """Appends ops to a graph, or inserts them before an anchor op. Gives them ``made_by``, the name of a rule or pass.

    ::

        b = Builder()
        x = b.input("x", TensorType(DType.F32, (2, 64)))
        w = b.weight("w", torch.randn(10, 64))
        b.output(b(Linear(x, w)))
        module = b.module
    """

    def __init__(
        self, module: Module | None = None, graph: Graph | None = None, before: Op | None = None, made_by: str = ""
    ) -> None:
        self.module = module if module is not None else Module()
        self.graph = graph if graph is not None else self.module.main
        self.location: Location | None = before.location if before is not None else None
        self._before = before
        self._made_by = made_by

    def add(self, op: Op, name: str = "") -> Op:
        """Put ``op`` in the graph and return it."""
        op.location = op.location or self.location
        op.made_by = self._made_by or op.made_by
        if name and len(op.results) == 1:
            op.results[0].name = name
        if self._before is not None:
            return self.graph.ops.insert_before(self._before, op)
        return self.graph.ops.append(op)

    def __call__(self, op: Op, name: str = "") -> Value:
        """Put ``op`` in the graph and return its only result."""
        return self.add(op, name).result

    def replace(self, old: Op, new: Op) -> Op:
        """Put ``new`` in the place of ``old``, whose readers read it from now on. Returns ``new``."""
        new.location, new.made_by = old.location, self._made_by
        self.graph.ops.insert_before(old, new)
        for before, after in zip(old.results, new.results, strict=True):
            before.replace_all_uses_with(after)
        self.graph.ops.remove(old)
        return new

    def input(self, name: str, type: TensorType) -> Value:
        return self.graph.add_input(type, name)

    def weight(self, id: str, data: torch.Tensor, *, trainable: bool = False) -> Value:
        """A new weight holding ``data`` (shared, not copied), under ``id`` or a fresh id made from it."""
        weight = Weight.from_tensor(self.module.fresh_weight_id(id), data, trainable=trainable)
        return self.graph.weight(self.module.add_weight(weight))

    def scalar(self, value: float | int | bool, dtype: DType) -> Value:
        """A constant of shape ``[]``."""
        return self(Full(value=_python_scalar(value, dtype), dtype=dtype))

    def output(self, *values: Value, names: Sequence[str] = ()) -> None:
        self.graph.set_outputs(values, names)

    @contextmanager
    def at(self, location: Location | None) -> Iterator[None]:
        """Give the ops built inside this source location."""
        previous, self.location = self.location, location
        try:
            yield
        finally:
            self.location = previous


def _python_scalar(value: Any, dtype: DType) -> float | int | bool:
    if dtype is DType.BOOL:
        return bool(value)
    return float(value) if dtype.is_floating else int(value)
