"""Finds the pass, and the rewrite in it, after which a check fails.

The pipeline runs once, with contracts unchecked, and every state of the module is kept (states share their weights).
A search by halves finds neighbouring states of which the check passes the first and fails the second.  The pass
between them is then run again with a limit on its rewrites (:class:`trimtab.ir.rewrite.Rewrites`), and the same search
finds a number n such that n-1 rewrites pass and n fail.  Both are measured, not inferred, so the answer holds even
where the check goes back and forth; it is then one such place, and ``thorough`` finds the first.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeAlias

from trimtab.debug.checks import Check, Data, Judge, KeepsContract, Verdict
from trimtab.debug.findings import Application, Bisection, Culprit, RewriteAt
from trimtab.errors import Location, PassError, TrimtabError, VerificationError
from trimtab.ir.core import Module
from trimtab.ir.op import Op
from trimtab.ir.printer import describe_op
from trimtab.ir.rewrite.log import Rewrites
from trimtab.passes.base import Context, Pass
from trimtab.passes.contracts import Contract
from trimtab.passes.manager import PassManager
from trimtab.passes.observers import Observer, Step
from trimtab.passes.optimize import DEFAULT_PIPELINE
from trimtab.passes.pipeline import Group, Pipeline, parse_pipeline
from trimtab.user_file import one_line

Progress: TypeAlias = Callable[[str, float], None]
"""Called with what is being done and the fraction of all work done before it."""
DEFAULT_CHECK = "rtol=1e-3"


def bisect(
    module: Module,
    pipeline: str | Pipeline | Iterable[Pass | Group] = DEFAULT_PIPELINE,
    check: str | Contract | Callable[[Module], Any] | Check = DEFAULT_CHECK,
    *,
    inputs: Iterable[Any] | None = None,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    thorough: bool = False,
    progress: Progress | None = None,
) -> Bisection:
    """Find the pass of ``pipeline``, and the rewrite in it, after which ``check`` fails.

    Args:
        module: the module to begin with; it is only read.
        pipeline: passes and groups, as for :func:`trimtab.optimize`. Neither contracts nor required properties are
            enforced.
        check: ``rtol=1e-3,atol=1e-8``, ``exact``, ``rounding`` or ``lossy`` (can be evaluated), compared with
            ``module``; or a function of a module that returns whether it is right, or ``file.py:function``.
        inputs: batches to check on, an array per input, in order or by name; by default the calibration batches, or
            small samples made from the signature.
        calibration: batches of real inputs for passes that need data.
        seed: seed of everything random.
        thorough: look at every state instead of searching by halves.
        progress: told about every step.

    Raises:
        UsageError: the check cannot be read, or fails before any pass.
        InputError, CalibrationError: a batch does not fit the module.
        PassError: a pass breaks a property that a later one requires.
    """
    parsed = parse_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
    items = parsed if isinstance(parsed, Pipeline) else Pipeline(tuple(parsed))
    return find_culprit(
        module, items, Check.of(check), Data.of(module, inputs, calibration, seed), thorough=thorough, progress=progress
    )


def find_culprit(
    module: Module,
    pipeline: Pipeline,
    check: Check,
    data: Data,
    *,
    thorough: bool = False,
    progress: Progress | None = None,
) -> Bisection:
    """What :func:`bisect` does once its arguments are understood."""
    tell = progress or (lambda stage, fraction: None)
    tell("check the model", 0.0)
    judge = check.against(module, data)
    applications = _run(pipeline, module, data.context(module), lambda stage, part: tell(stage, 0.1 + 0.5 * part))

    # A pass that fails ends the run. What comes before it may be at fault all the same, and is then found first.
    changes = [application for application in applications if application.changed]
    states: list[Module | Verdict] = [module, *(application.after for application in changes)]
    search = _Search(lambda n: _verdict(states[n], judge), lambda part: tell("search the pass", 0.6 + 0.2 * part))
    last = len(changes)
    if not search(last).failed:
        return Bisection(pipeline, check, data, len(applications), search(last))
    first = 0
    if isinstance(states[last], Verdict):
        first, last = (0, last - 1) if search(last - 1).failed else (last - 1, last)
    number = search.first_failure(first, last, thorough)
    at = changes[number - 1]
    rewrite, why_not = find_rewrite(
        at.pass_, at.before, judge, data, thorough, lambda part: tell("search the rewrite", 0.8 + 0.2 * part)
    )
    culprit = Culprit(at, search(number - 1), search(number), rewrite, why_not)
    return Bisection(
        pipeline, check, data, len(applications), search(len(changes)), culprit, _notes(culprit, check, data)
    )


def find_rewrite(
    pass_: Pass,
    module: Module,
    judge: Judge,
    data: Data,
    thorough: bool = False,
    progress: Callable[[float], None] = lambda part: None,
) -> tuple[RewriteAt | None, str]:
    """The first rewrite of ``pass_`` on ``module`` with which ``judge`` fails; or None, and the reason."""
    gates: dict[int, Gate] = {}

    def outcome(limit: int) -> Verdict:
        gates[limit] = Gate(limit)
        return _verdict(apply_pass(pass_, module, data, gates[limit]), judge)

    everything = Gate()
    made = apply_pass(pass_, module, data, everything)
    total = everything.applied
    if not total and isinstance(made, Verdict):
        return None, f"{pass_.name} fails before its first rewrite"
    if not total:
        return None, f"{pass_.name} does not ask Context.rewrites.permit before it changes something"
    search = _Search(outcome, progress)
    if search(0).failed:
        return None, f"the check fails even when {pass_.name} is allowed no rewrite: what it does besides is at fault"
    if not search(total).failed:
        return (
            None,
            f"{pass_.name} does not do the same each time: run again with its {total} rewrites, the check passes",
        )
    number = search.first_failure(0, total, thorough)
    gate = gates[number]
    return RewriteAt(number, total, gate.rule, gate.op, gate.location, search(number - 1), search(number)), ""


class Gate(Rewrites):
    """A gate that describes the last rewrite that it let through, and can hold some rules back altogether."""

    def __init__(self, limit: int | None = None, allows: Callable[[str], bool] = lambda rule: True) -> None:
        super().__init__(limit)
        self._allows = allows
        self.rule = self.op = ""
        self.location: Location | None = None

    def permit(self, rule: str, op: Op | None = None) -> bool:
        if not self._allows(rule) or not super().permit(rule, op):
            return False
        if self.applied == self.limit:  # the text is made only once: it names every value of the graph
            self.rule, self.op = rule, describe_op(op) if op is not None else "an op that the pass does not name"
            self.location = op.location if op is not None else None
        return True


def apply_pass(pass_: Pass, module: Module, data: Data, gate: Rewrites | None = None) -> Module | Verdict:
    """What ``pass_`` makes of ``module``, with contracts unchecked; or how it fails."""
    manager = PassManager([pass_], [_UseGate(gate or Rewrites())], check="never", properties=pass_.requires)
    try:
        return manager.run(module, data.context(module))[0]
    except TrimtabError as error:
        return _failure(error)


class _UseGate(Observer):
    def __init__(self, gate: Rewrites) -> None:
        self._gate = gate

    def before_pass(self, step: Step) -> None:
        step.ctx.rewrites = self._gate


class _Record(Observer):
    """Keeps the modules between passes."""

    def __init__(self, pipeline: Pipeline, progress: Progress) -> None:
        self._found: dict[int, Application] = {}
        self._expected = max(1, sum(1 for _ in pipeline.passes))
        self._progress = progress

    @property
    def applications(self) -> list[Application]:
        return list(self._found.values())

    def before_pass(self, step: Step) -> None:
        done = len(self._found)
        self._progress(f"run {step.pass_.name}", done / (done + self._expected))

    def after_pass(self, step: Step) -> None:
        self._add(step, step.after if step.row.changed else step.before)

    def pass_failed(self, step: Step, error: Exception) -> None:
        self._add(step, Verdict("error"))  # the manager's own error says more; see _run

    def _add(self, step: Step, after: Module | Verdict) -> None:
        number = len(step.report.rows)
        self._found[number] = Application(number, step.pass_, step.row.group, step.row.round, step.before, after)


def _run(pipeline: Pipeline, module: Module, ctx: Context, progress: Progress) -> list[Application]:
    """Every application of a pass; the last one with a verdict when it failed."""
    record = _Record(pipeline, progress)
    required = frozenset[str]().union(*(pass_.requires for pass_ in pipeline.passes))
    manager = PassManager(pipeline, [record], check="never", properties=required)
    try:
        manager.run(module, ctx)
    except TrimtabError as error:
        found = record.applications
        if not found or not isinstance(found[-1].after, Verdict):
            raise  # not from a pass: the module does not verify to begin with
        return [*found[:-1], replace(found[-1], after=_failure(error))]
    return record.applications


def _failure(error: TrimtabError) -> Verdict:
    """How a pass failed, from what the manager raises, whose cause is what the pass or an observer raised."""
    cause = error.__cause__
    first_line = error.message.splitlines()[0]
    if isinstance(cause, PassError) and isinstance(cause.__cause__, VerificationError):
        return Verdict("verification", f"{first_line} At {error.where.splitlines()[0]}", detail=cause.__cause__.what)
    if cause is None or isinstance(cause, TrimtabError):
        return Verdict("error", first_line, detail=error.what)
    frame = traceback.extract_tb(cause.__traceback__)[-1]
    raised = f"{one_line(cause)}, raised at {frame.filename}:{frame.lineno} in {frame.name}"
    return Verdict("error", f"{error.what}: {raised}", detail=type(cause).__name__)


def _verdict(state: Module | Verdict, judge: Judge) -> Verdict:
    return state if isinstance(state, Verdict) else judge(state)


class _Search:
    """Finds n such that n-1 passes and n fails, with no state judged twice."""

    def __init__(self, judge: Callable[[int], Verdict], progress: Callable[[float], None]) -> None:
        self._judge = judge
        self._progress = progress
        self._known: dict[int, Verdict] = {}

    def __call__(self, n: int) -> Verdict:
        if n not in self._known:
            self._known[n] = self._judge(n)
        return self._known[n]

    def first_failure(self, low: int, high: int, thorough: bool) -> int:
        """A failing n in ``low < n <= high`` after a passing one; the first if ``thorough``. ``low`` passes, ``high``
        fails."""
        width = high - low
        if thorough:
            for n in range(low + 1, high):
                self._progress((n - low) / width)
                if self(n).failed:
                    return n
            return high
        while high - low > 1:
            self._progress(1 - (high - low) / width)
            middle = (low + high) // 2
            low, high = (low, middle) if self(middle).failed else (middle, high)
        self(low)
        return high


def _notes(culprit: Culprit, check: Check, data: Data) -> list[str]:
    """What makes the answer less than it seems."""
    at = culprit.application
    if not isinstance(check, KeepsContract) or not isinstance(at.after, Module):
        return []
    alone = check.against(at.before, data)(at.after)
    if alone.failed:
        return []
    return [
        f"by itself {at.pass_.name} moves the results by {alone.drift}, which the check allows: "
        "the drift of several passes adds up"
    ]
