"""A complete match: what the variables of a pattern are, and the ops it covers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.errors import UsageError
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.op import Op
from trimtab.ir.rewrite import constants
from trimtab.ir.types import TensorType
from trimtab.ir.weights import TensorSource, Weight


class Match:
    """A match of a pattern, with its variables as attributes: ``m.x``.

    A ``Var`` or ``Constant`` is a :class:`~trimtab.ir.core.Value`, a ``Scalar`` a float, an ``Attr`` the attribute.
    What is absent is None; what stands inside ``repeated`` is a list.

    Attributes:
        outputs: the values that the rule replaces, the root first.
        ops: the ops that the pattern covers.
        module, graph: where they are.
    """

    def __init__(
        self,
        module: Module,
        graph: Graph,
        outputs: tuple[Value, ...],
        ops: tuple[Op, ...],
        leaves: tuple[Value, ...],
        bindings: Mapping[str, Any],
    ) -> None:
        self.module = module
        self.graph = graph
        self.outputs = outputs
        self.ops = ops
        self.leaves = leaves
        self._bindings = bindings

    @property
    def root(self) -> Value:
        """The value that the rule is about."""
        return self.outputs[0]

    @property
    def root_op(self) -> Op:
        """The op that computes the root."""
        assert self.root.producer is not None
        return self.root.producer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._bindings:
            raise UsageError(
                "a rule asks its match for a variable that the pattern does not have",
                values={"variable": name, "pattern": sorted(self._bindings)},
            )
        return self._bindings[name]

    def scalar(self, value: Value) -> float | None:
        """The number that ``value`` holds everywhere, None when it is no such constant."""
        return constants.scalar(self.module, value)

    def weight(self, value: Value) -> Weight:
        """The weight behind ``value``."""
        return self.module.weights[value.weight]

    def add_weight(self, wish: str, type: TensorType, source: TensorSource, *, trainable: bool = False) -> Value:
        """Put a weight into the module's table, under the id ``wish`` or a fresh one made from it."""
        weight = Weight(self.module.fresh_weight_id(wish), type, source, trainable=trainable)
        return self.graph.weight(self.module.add_weight(weight))
