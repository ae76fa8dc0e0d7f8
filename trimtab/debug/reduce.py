"""Shrinks a module while something about it stays true: delta debugging over the graph.

A candidate leaves out a part of the graph; if it still fails it becomes the module, and the search goes on in it.
Parts are large at first and halved when none of them can be left out, as in A. Zeller and R. Hildebrandt, "Simplifying
and Isolating Failure-Inducing Input" (IEEE TSE 28(2), 2002).  A candidate that cannot be evaluated, or fails in another
way, is not a failure: it is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, TypeAlias

from trimtab.debug.resize import fix_symbols, resized
from trimtab.errors import TrimtabError, UsageError
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import Dim, Symbol
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import Full
from trimtab.ir.printer import print_module
from trimtab.ir.types import TensorType
from trimtab.ir.verifier import verify

Fails: TypeAlias = Callable[[Module], bool]
Progress: TypeAlias = Callable[[str, float], None]

_SMALL = 3
"""Sizes up to this are left alone."""
_BYPASSES = 3
"""How many earlier values are tried in the place of a result."""


def reduce_module(module: Module, fails: Fails, *, evaluations: int = 400, progress: Progress | None = None) -> Module:
    """A small module for which ``fails`` still holds.

    Outputs are dropped and moved up to inner values, inner values become inputs, ops are bypassed, symbols become
    small numbers, and axes and weights are shortened.  What is not needed by any remaining op is left out.

    Args:
        module: the module to begin with; it is only read.
        fails: whether a module still shows the failure, and no other. An exception counts as no.
        evaluations: how often ``fails`` may be asked. The best module so far is returned when that is used up.
        progress: told the size of the module and the fraction of evaluations used, before each.

    Raises:
        UsageError: ``fails`` does not hold for ``module`` itself.
    """
    if not fails(module):
        raise UsageError(
            "there is nothing to reduce", rule="the module does not fail", fix="give a module for which `fails` is true"
        )
    reducer = _Reducer(module, fails, evaluations, progress or (lambda stage, fraction: None))
    reducer.run()
    return reducer.module


class _Reducer:
    """The smallest failing module so far, and what has been tried."""

    def __init__(self, module: Module, fails: Fails, evaluations: int, progress: Progress) -> None:
        self.module = module
        self._fails = fails
        self._evaluations = self._left = evaluations
        self._progress = progress
        self._tried = {_text(module)}
        self._signature = frozenset(value.name for value in module.main.inputs)

    def run(self) -> None:
        if not self._try(_keep_main):
            self._try(_return_unread)  # what fails may be an op that nothing reads
        self._fix_symbols()
        # A user's check may insist on the inputs that it knows: inner values then become constants.
        stand_in = _new_input if self._holds_for(_with_another_input(self.module)) else _new_constant
        # Large parts first, and then small sizes, so that most candidates are evaluated in no time.
        self._keep_one_output()
        self._move_outputs_up()
        self._cut_ops(stand_in, shortest=max(1, len(self.module.main.ops) // 8))
        self._shorten_axes()
        before = ""
        while before != (before := _text(self.module)):
            self._keep_one_output()
            self._move_outputs_up()
            self._promote_regions()
            self._cut_ops(stand_in)
            self._bypass_ops()
            self._drop_operands()
            self._drop_inputs()
            self._shorten_axes()

    def _try(self, edit: Callable[..., Module], *arguments: Any) -> bool:
        """Take what ``edit`` makes of the module if that fails. A candidate is tried once only."""
        if not self._left:
            return False
        try:
            candidate = _cleaned(edit(self.module, *arguments), self._signature)
            verify(candidate)
        except TrimtabError:
            return False
        text = _text(candidate)
        if text in self._tried:
            return False
        self._tried.add(text)
        if self._holds_for(candidate):
            self.module = candidate
            return True
        return False

    def _holds_for(self, candidate: Module) -> bool:
        self._progress(f"{len(self.module.main.ops)} ops", 1 - self._left / self._evaluations)
        self._left -= 1
        try:
            return self._fails(candidate)
        except Exception:  # neither passes nor fails, which delta debugging calls unresolved
            return False

    def _fix_symbols(self) -> None:
        """All symbols at once, or else one by one; small sizes first, but those of size 1 broadcast."""
        symbols = self.module.symbols().values()
        for size in (2, 3, 1):
            if self._try(fix_symbols, {symbol.name: _clipped(symbol, size) for symbol in symbols}):
                return
        for symbol in symbols:
            for size in (2, 1):
                if self._try(fix_symbols, {symbol.name: _clipped(symbol, size)}):
                    break

    def _keep_one_output(self) -> None:
        """One output, or else as few as can be."""
        count = len(self.module.main.outputs)
        if count == 1 or any(self._try(_keep_outputs, {index}) for index in range(count)):
            return
        for index in reversed(range(count)):
            self._try(_keep_outputs, set(range(len(self.module.main.outputs))) - {index})

    def _move_outputs_up(self) -> None:
        """Return what the first ops compute instead of the outputs: half of the ops, three quarters, and so on."""
        left_out = len(self.module.main.ops) // 2
        while left_out:
            if self._try(_end_after, len(self.module.main.ops) - left_out):
                self._keep_one_output()
                left_out = len(self.module.main.ops) // 2
            else:
                left_out //= 2

    def _promote_regions(self) -> None:
        for position, op in enumerate(self.module.main.ops):
            if any(self._try(_promote, position, index) for index in range(len(op.regions))):
                return

    def _cut_ops(self, stand_in: StandIn, shortest: int = 1) -> None:
        """Replace the results of a row of ops, long rows first."""
        length = max(1, len(self.module.main.ops) // 2)
        while length >= shortest:
            start = 0
            while start < len(self.module.main.ops):
                if not self._try(_cut, start, length, stand_in):
                    start += length
            length //= 2

    def _bypass_ops(self) -> None:
        """Read an earlier value of the same type instead of a result, the last ops first."""
        position = len(self.module.main.ops) - 1
        while position >= 0:
            any(self._try(_bypass, position, back) for back in range(_BYPASSES))
            position = min(position, len(self.module.main.ops)) - 1

    def _drop_operands(self) -> None:
        for position, op in enumerate(self.module.main.ops):
            for field, held in op.arguments():
                if field.kind == "optional" and held is not None:
                    self._try(_without_operand, position, field.name)

    def _drop_inputs(self) -> None:
        unread = {value.name for value in self.module.main.inputs if not value.uses}
        if unread:
            kept, self._signature = self._signature, self._signature - unread
            if not self._try(Module.copy):
                self._signature = kept

    def _shorten_axes(self) -> None:
        """Divide many sizes by the same number, which keeps their relations, and then make each one small."""
        for divisor in (64, 16, 8, 4, 3, 2):
            smallest = 0
            while smallest := next((size for size in _sizes(self.module) if size > max(smallest, divisor)), 0):
                if self._try(resized, partial(_divided, smallest, divisor)):
                    smallest = 0
        for size in reversed(_sizes(self.module)):
            for small in (2, 3):
                if self._try(resized, partial(_replaced, size, small)):
                    break


# -- edits: each makes a candidate of a module and leaves the module as it is ----------------------------------------

StandIn: TypeAlias = Callable[[Graph, Value], Value]
"""Makes a value of the same type as another one, to be read in its place."""


def _keep_main(module: Module) -> Module:
    return Module(module.main.copy(), module.weights.values())


def _with_another_input(module: Module) -> Module:
    copy = module.copy()
    copy.main.add_input(TensorType(DType.F32, (1,)), _fresh_name(copy.main))
    return copy


def _return_unread(module: Module) -> Module:
    copy = module.copy()
    unread = [value for op in copy.main.ops for value in op.results if not value.uses]
    if not unread:
        raise UsageError("every result is read")
    copy.main.set_outputs([*unread, *copy.main.outputs])
    return copy


def _keep_outputs(module: Module, kept: set[int]) -> Module:
    copy = module.copy()
    outputs, names = copy.main.outputs, copy.main.output_names
    copy.main.set_outputs([outputs[i] for i in sorted(kept)], [names[i] for i in sorted(kept)])
    return copy


def _end_after(module: Module, count: int) -> Module:
    """Return the values that the first ``count`` ops compute and that something after them reads."""
    copy = module.copy()
    first = list(copy.main.ops)[:count]
    kept = set(first)
    results = [value for op in first for value in op.results if any(use.user not in kept for use in value.uses)]
    copy.main.set_outputs(results)
    return copy


def _promote(module: Module, position: int, index: int) -> Module:
    """Make the region of an op the module."""
    body = list(module.main.ops)[position].regions[index].copy()
    body.name = "main"
    for number, value in enumerate(body.inputs):
        value.name = f"x{number}"
    return Module(body, module.weights.values())


def _cut(module: Module, start: int, length: int, stand_in: StandIn) -> Module:
    """Read stand-ins instead of the results of some ops."""
    copy = module.copy()
    cut = dict.fromkeys(list(copy.main.ops)[start : start + length])
    for value in [value for op in cut for value in op.results]:
        if any(use.user not in cut for use in value.uses):
            value.replace_all_uses_with(stand_in(copy.main, value))
    return copy


def _bypass(module: Module, position: int, back: int) -> Module:
    """Read the ``back``-th value before the op instead of its result, counted among those of the same type."""
    copy = module.copy()
    first = list(copy.main.ops)[: position + 1]
    op = first.pop()
    earlier = [*copy.main.inputs, *(value for other in first for value in other.results)]
    alike = [value for value in reversed(earlier) if value.type == op.results[0].type]
    if len(op.results) != 1 or back >= len(alike):
        raise UsageError("no other value can stand for the result")
    op.result.replace_all_uses_with(alike[back])
    return copy


def _without_operand(module: Module, position: int, name: str) -> Module:
    copy = module.copy()
    op = list(copy.main.ops)[position]
    arguments = {field.name: held for field, held in op.arguments() if field.name != name}
    lean = copy.main.ops.insert_before(op, type(op)(**arguments, **op.attributes))
    lean.location, lean.made_by = op.location, op.made_by
    for old, new in zip(op.results, lean.results, strict=True):
        old.replace_all_uses_with(new)
    return copy


def _new_input(graph: Graph, value: Value) -> Value:
    return graph.add_input(value.type, _fresh_name(graph))


def _new_constant(graph: Graph, value: Value) -> Value:
    producer = value.producer
    if isinstance(producer, Full):
        raise UsageError("a constant cannot be replaced by a constant")
    number: Any = True if value.type.dtype is DType.BOOL else 0.5 if value.type.dtype.is_floating else 1
    assert producer is not None  # results are cut
    return graph.ops.insert_before(producer, Full(number, value.type.dtype, value.type.shape)).result


def _cleaned(module: Module, signature: frozenset[str]) -> Module:
    """``module`` itself, without what nothing reads; the inputs in ``signature`` stay."""
    graph = module.main
    computed = dict.fromkeys(value for value in graph.outputs if value.producer is not None)
    if not computed:
        raise UsageError("nothing is left that is computed")
    if len(computed) < len(graph.outputs):
        names = [graph.output_names[graph.outputs.index(value)] for value in computed]
        graph.set_outputs(list(computed), names)
    for op in reversed(graph.ops):
        if not any(result.uses for result in op.results):
            graph.ops.remove(op)
    graph.inputs[:] = [value for value in graph.inputs if value.uses or value.name in signature]
    for index, value in enumerate(graph.inputs):
        value.index = index
    module.drop_unused_weights()
    return module


def _fresh_name(graph: Graph) -> str:
    taken = {value.name for value in graph.inputs}
    return next(name for number in count() if (name := f"x{number}") not in taken)


def _clipped(symbol: Symbol, size: int) -> int:
    return max(symbol.min, size if symbol.max is None else min(size, symbol.max))


def _sizes(module: Module) -> list[int]:
    """The sizes of inputs, weights and results that may be made smaller, in ascending order."""
    types = [value.type for graph in module.all_graphs() for value in (*graph.inputs, *graph.weights)]
    types += [value.type for op in module.walk() for value in op.results]
    return sorted({dim for type in types for dim in type.shape if isinstance(dim, int) and dim > _SMALL})


def _divided(smallest: int, divisor: int, dim: Dim) -> Dim:
    return dim // divisor if isinstance(dim, int) and dim >= smallest and dim % divisor == 0 else dim


def _replaced(size: int, by: int, dim: Dim) -> Dim:
    return by if dim == size else dim


def _text(module: Module) -> str:
    return print_module(module, locations=False, hashes=False)
