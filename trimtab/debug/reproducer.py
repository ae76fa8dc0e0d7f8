"""A failure as small as it gets: a reduced module, and the inputs on which the pass at fault fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trimtab.debug.bisect import Gate, Progress, apply_pass, find_culprit
from trimtab.debug.checks import Check, Data, Judge, KeepsContract, Verdict
from trimtab.debug.findings import Bisection, Culprit
from trimtab.debug.reduce import reduce_module
from trimtab.errors import UsageError
from trimtab.ir.core import Module
from trimtab.passes.contracts import Lossy
from trimtab.passes.pipeline import Pipeline

if TYPE_CHECKING:
    pass

MODULE_FILE = "reproducer.ttir"


@dataclass(frozen=True)
class Reproducer:
    """A small module on which a pass fails as it did in the user's pipeline.

    Attributes:
        found: the failure in the user's pipeline.
        module: the module before the pass, reduced.
        shown: the failure of the pass alone on ``module``, with the check and the inputs that go with it.
        evaluations: how many candidates were looked at.
        notes: what a reader should know.
    """

    found: Bisection
    module: Module
    shown: Bisection
    evaluations: int
    notes: list[str] = field(default_factory=list)

    @property
    def ops_before(self) -> int:
        """The number of ops of the module before it was reduced."""
        return sum(1 for _ in culprit_of(self.found).application.before.walk())

    def to_dict(self) -> dict[str, Any]:
        return {
            "ops_before": self.ops_before,
            "ops": sum(1 for _ in self.module.walk()),
            "weight_bytes": self.module.weight_bytes,
            "evaluations": self.evaluations,
            "shown": self.shown.to_dict(),
            "notes": list(self.notes),
        }


def make_reproducer(found: Bisection, *, evaluations: int = 400, progress: Progress | None = None) -> Reproducer:
    """Reduce the module before the pass at fault while the pass, and the same rule in it, fails in the same way.

    Args:
        found: a failure that :func:`~trimtab.debug.bisect.bisect` found.
        evaluations: how many candidates to look at at most; 0 keeps the module as it is.
        progress: told about every candidate.

    Raises:
        UsageError: nothing was found.
    """
    culprit = culprit_of(found)
    at = culprit.application
    check, notes = _check_for(culprit, found.check, found.data)
    shows = _Shows(culprit, check, found.data)
    module = at.before
    if not shows(module):
        notes.append("the failure does not show again on the same module, so it was not reduced")
    elif evaluations:
        module = reduce_module(module, shows, evaluations=evaluations, progress=progress)
    module = module.copy()
    module.drop_unused_weights()
    pipeline = Pipeline((at.pass_,))
    first = find_culprit(module, pipeline, check, found.data)
    data = _data_of(first, module, found.data)
    shown = find_culprit(module, pipeline, check, data)
    if shown.culprit is None:
        notes.append("the failure does not show on these inputs: it does not happen every time")
    elif culprit.rewrite and (shown.culprit.rewrite is None or shown.culprit.rewrite.rule != culprit.rewrite.rule):
        notes.append(f"in the reduced module the failure is not that of the rule {culprit.rewrite.rule}")
    return Reproducer(found, module, shown, shows.count, notes)


class _Shows:
    """Whether a pass fails on a module as it did in the user's pipeline, and because of the same rule."""

    def __init__(self, culprit: Culprit, check: Check, data: Data) -> None:
        self.count = 0
        self._pass = culprit.application.pass_
        self._wanted = culprit.after
        self._check = check
        self._data = data
        self._rule = culprit.rewrite.rule if culprit.rewrite is not None else ""
        # The first evidence against the rule that holds for the module as it was is asked for in candidates too.
        self._evidence = ""
        for evidence in ("needed", "enough", "") if self._rule else ():
            self._evidence = evidence
            if self(culprit.application.before):
                break

    def __call__(self, module: Module) -> bool:
        self.count += 1
        judge = self._check.against(module, self._data)
        if not self._outcome(module, judge, Gate()).is_like(self._wanted):
            return False
        if self._evidence == "needed":
            return not self._outcome(module, judge, Gate(allows=lambda rule: rule != self._rule)).failed
        if self._evidence == "enough":
            return self._outcome(module, judge, Gate(allows=lambda rule: rule == self._rule)).failed
        return True

    def _outcome(self, module: Module, judge: Judge, gate: Gate) -> Verdict:
        made = apply_pass(self._pass, module, self._data, gate)
        return made if isinstance(made, Verdict) else judge(made)


def culprit_of(found: Bisection) -> Culprit:
    if found.culprit is None:
        raise UsageError("there is nothing to reproduce", rule="no pass was found at fault")
    return found.culprit


def _check_for(culprit: Culprit, check: Check, data: Data) -> tuple[Check, list[str]]:
    """The check to reduce with, and why it is another one than the user's."""
    at = culprit.application
    if culprit.after.kind in ("error", "verification", "evaluation"):
        return KeepsContract(Lossy()), []
    if isinstance(check, KeepsContract) and isinstance(at.after, Module):
        alone = check.against(at.before, data)(at.after)
        if not alone.failed and alone.drift is not None:
            finer = check.loosest_that_sees(alone.drift)
            return finer, [f"by itself the pass moves results by {alone.drift} only, hence the tolerance {finer.text}"]
    return check, []


def _data_of(shown: Bisection, module: Module, data: Data) -> Data:
    """The batches to keep: the inputs on which the failure shows, and what the pass was given for calibration."""
    sample = shown.culprit.after.sample if shown.culprit is not None else None
    names = [value.name for value in module.main.inputs]
    inputs = (sample or data.samples(module)[0]).inputs
    given = data.context(module).calibration
    return Data(
        (dict(zip(names, inputs, strict=True)),), tuple(dict(zip(names, b, strict=True)) for b in given), data.seed
    )
