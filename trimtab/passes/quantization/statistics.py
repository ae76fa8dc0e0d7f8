"""Statistics of the values inside a module, on batches of inputs that are in memory one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from trimtab.errors import CalibrationError, InputError, UsageError
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.interpreter import interpret
from trimtab.ir.op import Op
from trimtab.ir.printer import describe_op, describe_value

if TYPE_CHECKING:
    import torch


class Watcher(Protocol):
    """What is given values as they are computed, such as an observer of ranges."""

    def update(self, tensor: torch.Tensor) -> object:
        """Take in a tensor, which must not be changed or kept."""
        ...


def observe(
    module: Module,
    watched: Mapping[Value, Watcher],
    batches: Iterable[Sequence[Any] | Mapping[str, Any]],
    *,
    what: str = "",
) -> None:
    """Run ``module`` on each of ``batches`` once, and give each watched value to its observer as it is computed.

    A value in the body of a repeat, or an input of the body, is given once for each iteration. No tensor of a batch is
    kept: memory is that of one evaluation and of the observers.

    Args:
        module: evaluated by the interpreter.
        watched: results of ops and inputs of graphs, of ``module`` itself and not of a copy.
        batches: tensors for the inputs of ``module.main``, in order or by name.
        what: the pass that asks, for messages.

    Raises:
        CalibrationError: there is no batch; the module cannot be evaluated on one; a watched value contains NaN or
            infinities, which names the batch, the value, its op and the line it is from.
        UsageError: something watched is a weight, or not in ``module``.
    """
    watch = _Watch(module, watched, what)
    number = 0
    # Neither enumerate() nor the loop's variable may hold a batch while the next one is made.
    for batch in batches:
        watch.run(batch, f"calibration batch {number}")
        del batch
        number += 1
    if not number:
        raise CalibrationError("there is no calibration batch", fix="give at least one", where=what)


class _Watch:
    """Passes what an evaluation computes on to the observers."""

    def __init__(self, module: Module, watched: Mapping[Value, Watcher], what: str) -> None:
        self._module = module
        self._watched = watched
        self._what = what
        self._batch = ""
        self._graphs = {value: graph for graph in module.all_graphs() for value in _defined(graph)}
        for value in watched:
            if value not in self._graphs:
                raise UsageError(
                    "a value cannot be observed",
                    values={"value": value},
                    rule="it is a weight, whose numbers are known" if value.is_weight else "it is not in the module",
                    fix="observe inputs and results of ops of the module that is run",
                    where=what,
                )

    def run(self, batch: Sequence[Any] | Mapping[str, Any], name: str) -> None:
        self._batch = name
        try:
            interpret(self._module, batch, observer=self._computed, entered=self._entered)
        except InputError as error:
            raise CalibrationError(
                f"the module cannot be evaluated on a calibration batch: {error.what}",
                values=error.values,
                rule=error.rule,
                fix=error.fix,
                where=f"{self._where()}, {error.where}" if error.where else self._where(),
                location=error.location,
            ) from error

    def _computed(self, op: Op, results: Sequence[Any]) -> None:
        for value, tensor in zip(op.results, results, strict=True):
            self._see(value, tensor)

    def _entered(self, graph: Graph, inputs: Sequence[Any]) -> None:
        for value, tensor in zip(graph.inputs, inputs, strict=True):
            self._see(value, tensor)

    def _see(self, value: Value, tensor: torch.Tensor) -> None:
        observer = self._watched.get(value)
        if observer is None or not tensor.numel():
            return
        ends = tensor.aminmax()
        if not (math.isfinite(ends.min) and math.isfinite(ends.max)):
            raise self._error(
                value,
                "a value is not finite on calibration data",
                {"elements": f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} are NaN or infinite"},
                "statistics of such data are meaningless",
                "look at the data of this batch, and at what the op is given",
            )
        try:
            observer.update(tensor)
        except CalibrationError as error:
            raise self._error(value, error.what, error.values, error.rule, error.fix) from error

    def _error(self, value: Value, what: str, values: Mapping[str, Any], rule: str, fix: str) -> CalibrationError:
        op = value.producer
        named = {"value": describe_value(self._graphs[value], value), "op": describe_op(op) if op else "an input"}
        return CalibrationError(
            what,
            values={**named, **values},
            rule=rule,
            fix=fix,
            where=self._where(),
            location=op.location if op else None,
        )

    def _where(self) -> str:
        return f"{self._batch}, for {self._what}" if self._what else self._batch


def _defined(graph: Graph) -> Iterable[Value]:
    yield from graph.inputs
    for op in graph.ops:
        yield from op.results
