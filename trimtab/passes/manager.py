"""The pass manager: runs a pipeline on copies of a module, and holds every pass to what it declares."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from trimtab.errors import ContractError, PassError, TrimtabError
from trimtab.ir.rewrite.log import Rewrites
from trimtab.passes.base import Context, Pass
from trimtab.passes.calibration import converted
from trimtab.passes.contract_check import MAC_LIMIT, CheckMode, ContractCheck
from trimtab.passes.contracts import Lossy
from trimtab.passes.observers import Observer, Step, Timing, Verify
from trimtab.passes.pipeline import Group, Pipeline, parse_pipeline
from trimtab.passes.registry import check_declaration, load_pass, pass_names
from trimtab.passes.report import OptimizeReport, PassRow
from trimtab.passes.samples import count_macs, smallest_sizes

if TYPE_CHECKING:
    from trimtab.ir.core import Module


class PassManager:
    """Runs a pipeline.

    Args:
        pipeline: text such as ``cleanup,merge-tokens{r=13}``, a parsed pipeline, or passes.
        observers: told about every pass, outside of the manager's own (contract check, verifier, timing).
        check: whether contracts are checked ``always``, only those that are not exact (``close``), or ``never``.
        mac_limit: multiply-accumulates of one evaluation above which exact passes are believed.
        properties: properties that hold for the modules given to :meth:`run`.

    Raises:
        PassError: a pass comes before one that establishes what it requires; the message says which one to add.
    """

    def __init__(
        self,
        pipeline: str | Pipeline | Iterable[Pass | Group],
        observers: Sequence[Observer] = (),
        *,
        check: CheckMode = "always",
        mac_limit: float = MAC_LIMIT,
        properties: Iterable[str] = (),
    ) -> None:
        if isinstance(pipeline, str):
            pipeline = parse_pipeline(pipeline)
        self.pipeline = pipeline if isinstance(pipeline, Pipeline) else Pipeline(tuple(pipeline))
        self.observers: list[Observer] = [*observers, ContractCheck(check, mac_limit), Verify(), Timing()]
        for pass_ in self.pipeline.passes:
            check_declaration(type(pass_), f"{type(pass_).__name__} in the pipeline")
        _check_order(self.pipeline, frozenset(properties))

    def run(self, module: Module, ctx: Context | None = None) -> tuple[Module, OptimizeReport]:
        """The module after the pipeline, and the report. ``module`` itself is only read; weights are shared.

        Raises:
            PassError: a pass failed; the message names it and the passes that ran before it.
            ContractError: a pass changed results by more than its contract allows, or grew the weights.
            VerificationError: ``module`` is not correct to begin with.
        """
        return _Run(self, module, ctx or Context()).whole()


class _Run:
    """One run of a pipeline: the module so far, and a working copy for the next pass."""

    def __init__(self, manager: PassManager, module: Module, ctx: Context) -> None:
        self._pipeline = manager.pipeline
        self._observers = manager.observers
        self._ctx = ctx
        self._report = OptimizeReport(str(manager.pipeline))
        self._module = module
        self._copy: Module | None = None
        self._macs = 0

    def whole(self) -> tuple[Module, OptimizeReport]:
        started = time.perf_counter()
        for observer in self._observers:
            observer.pipeline_started(self._module, self._report, self._ctx)
        original = self._module
        self._macs = _macs(original)
        for item in self._pipeline.items:
            self._item(item, "", 1)
        for observer in reversed(self._observers):
            observer.pipeline_finished(self._module, self._report)
        self._report.seconds = time.perf_counter() - started
        return original.copy() if self._module is original else self._module, self._report

    def _item(self, item: Pass | Group, group: str, round: int) -> bool:
        """Run a pass, or a group until its items change nothing any more. Returns whether anything changed."""
        if not isinstance(item, Group):
            return self._apply(item, group, round)
        changed, unchanged = False, 0
        for turn in range(1, item.rounds + 1):
            for part in item.items:
                here = self._item(part, item.name, turn)
                changed, unchanged = changed or here, 0 if here else unchanged + 1
                if unchanged == len(item.items):
                    return changed
        if item.rounds > 1:
            self._report.notes.append(f"the group {item.name} still changed the module after {item.rounds} rounds")
        return changed

    def _apply(self, pass_: Pass, group: str, round: int) -> bool:
        before = self._module
        # A pass that changed nothing leaves a copy as good as new for the next one.
        after = self._copy if self._copy is not None else before.copy()
        self._copy = None
        row = PassRow(pass_.name, str(pass_), str(pass_.contract), group, round)
        row.ops_before, row.weight_bytes_before = _size(before)
        row.macs_before = self._macs
        self._report.rows.append(row)
        step = Step(pass_, before, after, row, self._report, self._ctx)
        self._ctx.rewrites = Rewrites()  # an observer may put one with a limit in its place
        try:
            for observer in self._observers:
                observer.before_pass(step)
            self._ctx.take_notes()
            self._ctx.take_records()
            claimed = pass_.run(after, self._ctx)
            row.notes += self._ctx.take_notes()
            row.layers = self._ctx.take_records()
            row.rules = [log.to_dict() for log in self._ctx.rewrites.log.values()]
            row.ops_after, row.weight_bytes_after = _size(after)
            row.changed = _really_changed(claimed, step)
            for observer in reversed(self._observers):
                observer.after_pass(step)
            _check_weight_bytes(step)
            row.macs_after = self._macs = _macs(after) if row.changed else row.macs_before
        except Exception as error:  # a pass may raise anything; it is reported with the pass's name
            for observer in reversed(self._observers):
                observer.pass_failed(step, error)
            raise _failure(step, error) from error
        if row.changed:
            self._module = after
            if self._ctx.reference is None and isinstance(pass_.contract, Lossy):
                self._ctx = replace(self._ctx, reference=before)
            if pass_.changes_signature and self._ctx.calibration:
                batches = converted(self._ctx.calibration, partial(pass_.inputs_after, before))
                self._ctx = replace(self._ctx, calibration=batches)
        else:
            self._copy = after
        return row.changed


def _size(module: Module) -> tuple[int, int]:
    """The number of ops, and the bytes of the weights that are read."""
    read = {value.weight for graph in module.all_graphs() for value in graph.weights}
    known = [module.weights[id] for id in read if id in module.weights]
    return sum(1 for _ in module.walk()), sum(weight.nbytes for weight in known)


def _macs(module: Module) -> int:
    """The multiply-accumulates of one evaluation at the smallest sizes; the module verifies."""
    return count_macs(module, smallest_sizes(module.main))


def _really_changed(claimed: object, step: Step) -> bool:
    if not isinstance(claimed, bool):
        raise PassError(
            f"the pass {step.pass_.name} did not say whether it changed the module",
            values={"returned": repr(claimed)},
            rule="run returns True or False",
        )
    same = step.before == step.after
    if claimed and same:
        step.row.notes.append("the pass says that it changed the module, but nothing changed")
    if not claimed and not same:
        raise PassError(
            f"the pass {step.pass_.name} changed the module and says it did not",
            values={"ops before": step.row.ops_before, "ops after": step.row.ops_after},
            rule="a change that is not reported is neither verified nor checked",
            fix="return True from run when anything changed",
        )
    return not same


def _check_weight_bytes(step: Step) -> None:
    row = step.row
    if row.weight_bytes_after > row.weight_bytes_before and not step.pass_.grows_weights:
        raise ContractError(
            f"the pass {row.name} grew the weights",
            values={"bytes before": row.weight_bytes_before, "bytes after": row.weight_bytes_after},
            rule="unique weight bytes do not grow unless the pass declares it",
            fix="share weights instead of copying them, or declare `grows_weights: ClassVar[bool] = True`",
            where=step.place,
        )


def _failure(step: Step, error: Exception) -> TrimtabError:
    """The error to raise for whatever a pass or an observer raised: its own kind if it is ours, with the place."""
    if isinstance(error, PassError):
        error.where = error.where or step.place
        return type(error)(
            error.what, values=error.values, rule=error.rule, fix=error.fix, where=error.where, location=error.location
        )
    if isinstance(error, TrimtabError):
        kind = PassError if error.exit_code != 8 else type(error)  # bad data stays the user's data's fault
        return kind(
            f"the pass {step.pass_.name} failed: {error.what}",
            values=error.values,
            rule=error.rule,
            fix=error.fix,
            where=f"{error.where}\n  in {step.place}" if error.where else step.place,
            location=error.location,
        )
    return PassError(
        f"the pass {step.pass_.name} failed",
        values={"error": f"{type(error).__name__}: {error}"},
        rule="a pass refuses what it cannot do with a TrimtabError; anything else is a fault in the pass",
        fix=f"report it to the author of {step.pass_.name}, or leave the pass out",
        where=step.place,
    )


def _check_order(pipeline: Pipeline, holding: frozenset[str]) -> None:
    broken_by: dict[str, str] = {}
    for pass_ in pipeline.passes:
        missing = sorted(pass_.requires - holding)
        if missing:
            culprit = broken_by.get(missing[0])
            makers = _passes_that_establish(missing[0])
            raise PassError(
                f"the pass {pass_.name} cannot run here",
                values={"pipeline": pipeline, "missing property": missing[0]},
                rule=f"{pass_.name} requires the property {missing[0]}, which "
                + (f"{culprit} breaks before it" if culprit else "no pass before it establishes"),
                fix=f"add {' or '.join(makers)} before {pass_.name}"
                if makers
                else "no pass that is installed establishes it",
            )
        broken_by.update(dict.fromkeys(pass_.breaks, pass_.name))
        holding = (holding - pass_.breaks) | pass_.establishes


def _passes_that_establish(property: str) -> list[str]:
    makers = []
    for name in sorted(pass_names()):
        try:
            if property in load_pass(name).establishes:
                makers.append(name)
        except PassError:
            continue  # a broken third-party pass is no advice
    return makers
