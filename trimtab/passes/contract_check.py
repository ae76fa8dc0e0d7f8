"""The observer that checks contracts: it evaluates the module before and after a pass, and compares.

The cost is bounded.  Samples are small; the outputs before a pass are those after the previous one; a module that is op
by op the same expressions is not evaluated; and exact passes that follow each other are checked together, whose failure
is then traced to the first pass that is at fault.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from trimtab.errors import CalibrationError, ContractError, TrimtabError, UsageError
from trimtab.ir.analysis.expressions import same_expressions
from trimtab.ir.core import Module
from trimtab.passes.base import Context
from trimtab.passes.contracts import Close, Contract, Drift, Exact, Lossy, contract_text
from trimtab.passes.determinism import is_deterministic
from trimtab.passes.evaluation import evaluate, output_drifts, sensitivities, suits
from trimtab.passes.observers import Observer, Step, counted
from trimtab.passes.report import OptimizeReport
from trimtab.passes.samples import Sample, count_macs, generate_samples, sizes_of

if TYPE_CHECKING:
    import torch

CheckMode: TypeAlias = Literal["always", "close", "never"]
MAC_LIMIT = 100e9
"""Multiply-accumulates of one evaluation above which exact passes are not checked: about a second on two cores."""
_MAX_BATCHES = 2


class ContractCheck(Observer):
    """Checks the contract of every pass that changed the module, and fills ``drift`` of its row.

    Args:
        mode: ``always``; ``close`` to believe exact passes; ``never``.
        mac_limit: multiply-accumulates of one evaluation above which an exact pass is believed, and the report says
            so. Other passes are checked at any cost, on the cheapest sample.

    Raises:
        ContractError: names the pass, the drift, the contract and the sample.
    """

    def __init__(self, mode: CheckMode = "always", mac_limit: float = MAC_LIMIT) -> None:
        if mode not in ("always", "close", "never"):
            raise UsageError("unknown way to check contracts", values={"check": mode}, fix="always, close or never")
        self._mode = mode
        self._mac_limit = mac_limit
        self._samples: list[Sample] = []
        self._pending: list[Step] = []
        self._evaluated: _Evaluations = _Evaluations()

    def pipeline_started(self, module: Module, report: OptimizeReport, ctx: Context) -> None:
        self._pending, self._evaluated, self._samples = [], _Evaluations(), []
        if self._mode == "never":
            report.notes.append("contracts were not checked: check=never")
            return
        random = next((op.name for op in module.walk() if not is_deterministic(op)), None)
        if random is not None:
            report.notes.append(f"contracts were not checked: {random} draws random numbers")
            return
        if ctx.calibration:
            self._samples = [
                Sample(f"calibration batch {index}", batch, count_macs(module, sizes_of(module.main, batch)))
                for index, batch in enumerate(ctx.calibration[:_MAX_BATCHES])
            ]
        else:
            self._samples = generate_samples(module, ctx, self._mac_limit)
        cheapest = min(sample.macs for sample in self._samples)
        if self._mode == "always" and cheapest > self._mac_limit:
            report.notes.append(
                f"exact passes were not checked: an evaluation takes {cheapest:.2g} multiply-accumulates, "
                f"above the limit of {self._mac_limit:.2g}"
            )

    def after_pass(self, step: Step) -> None:
        contract = step.pass_.contract
        if not step.row.changed or self._mode == "never":
            return
        if step.pass_.changes_signature:
            self._flush()
            with counted(step.row):
                behind = list(_samples_behind(step, self._samples))
                self._check([step], step.before, step.after, behind)
            self._samples = behind
            if step.ctx.metric is not None:
                step.row.notes.append("the metric was not asked: the pass changes what the module takes and gives")
            return
        if isinstance(contract, Exact):
            if self._mode == "always" and self._samples_for(contract):
                self._pending.append(step)
            return
        self._flush()
        with counted(step.row):
            self._check([step], step.before, step.after)
            if step.ctx.metric is not None:
                step.row.metric_before = self._evaluated.metric(step.before, step.ctx)
                step.row.metric_after = self._evaluated.metric(step.after, step.ctx)
            elif isinstance(contract, Lossy) and not step.ctx.calibration:
                step.row.notes.append("drift is on random inputs: give calibration data or a metric to judge this pass")

    def pipeline_finished(self, module: Module, report: OptimizeReport) -> None:
        self._flush()
        self._evaluated = _Evaluations()

    def _flush(self) -> None:
        """Check the exact passes since the last check, with as few evaluations as show that they are innocent.

        Those that keep every bit are compared with what was before them, run by run.  For those that may round, it is
        enough that the first and the last module agree in double precision.
        """
        steps, self._pending = self._pending, []
        if not steps:
            return
        runs = [list(run) for _, run in groupby(steps, key=lambda step: step.pass_.contract)]
        rounding = [step for step in steps if step.pass_.contract == Exact(rounding=True)]
        with counted(steps[-1].row):
            together = len(runs) > 2 and len(rounding) > 1 and self._hold_together(rounding, steps[0].before)
            for run in runs:
                if not (together and run[0] in rounding):
                    self._check_run(run)

    def _hold_together(self, rounding: Sequence[Step], first: Module) -> bool:
        """Whether everything from ``first`` to the last of ``rounding`` holds their contract as if it were one pass."""
        try:
            self._check(rounding, first, rounding[-1].after)
        except ContractError:
            return False  # one of the passes is at fault, or small errors add up, which is none's fault
        return True

    def _check_run(self, steps: Sequence[Step]) -> None:
        """Check consecutive passes of one contract together, and when that fails one by one."""
        try:
            self._check(steps, steps[0].before, steps[-1].after)
        except ContractError:
            for step in steps:
                self._check([step], step.before, step.after)
            raise

    def _check(
        self, steps: Sequence[Step], first: Module, last: Module, behind: Sequence[Sample] | None = None
    ) -> None:
        """Compare ``first`` with ``last``, what ``steps``, all of one contract, made of it.

        ``behind`` are the samples for ``last`` where those for ``first`` do not fit it.
        """
        contract = steps[0].pass_.contract
        unchanged = behind is None and same_expressions(first, last)
        for_last = None if behind is None else {sample.name: sample for sample in behind}
        worst = Drift(where="any output: all are the same expressions") if unchanged else None
        unusable: dict[str, None] = {}
        for sample in () if unchanged else self._samples_for(contract):
            if for_last is not None and sample.name not in for_last:
                continue
            for precision in contract.precisions:
                before = self._evaluated.outputs(first, sample, precision)
                if isinstance(before, TrimtabError):
                    unusable[_unusable(sample, before, steps[-1].ctx)] = None
                    break
                after = self._evaluated.outputs(last, sample if for_last is None else for_last[sample.name], precision)
                if isinstance(after, TrimtabError):
                    raise _breach(steps, sample, f"the module can no longer be evaluated: {after.what}", after)
                names = first.main.output_names
                if for_last is not None:
                    named = dict(zip(last.main.output_names, after, strict=True))
                    after = tuple(named[name] for name in names if name in named)
                for index, drift in enumerate(output_drifts(names, before, after, sample, precision)):
                    if not (contract.holds(drift) or self._amplified(first, contract, sample, index, drift)):
                        raise _breach(steps, sample, f"drift is {drift} at {drift.where}")
                    worst = max(worst or drift, drift, key=lambda d: (d.relative, d.absolute, d.differing))
        for step in steps:
            step.row.drift = worst
            step.row.notes += [] if worst is not None else list(unusable)

    def _amplified(self, module: Module, contract: Contract, sample: Sample, output: int, drift: Drift) -> bool:
        """Whether a contract whose bound grows with the module's sensitivity, which takes evaluations, holds by it."""
        if not isinstance(contract, Close) or not contract.unit or output >= len(module.main.outputs):
            return False
        return contract.holds(drift, self._evaluated.sensitivities(module, sample, contract.unit)[output])

    def _samples_for(self, contract: Contract) -> list[Sample]:
        believed_above = self._mac_limit if isinstance(contract, Exact) else math.inf
        return [sample for sample in self._samples if sample.macs <= believed_above and suits(contract, sample)]


class _Evaluations:
    """Outputs and metrics of the two modules asked for last: what is after one pass is before the next."""

    def __init__(self) -> None:
        self._modules: list[tuple[Module, dict[Any, Any]]] = []

    def outputs(self, module: Module, sample: Sample, precision: str) -> tuple[torch.Tensor, ...] | TrimtabError:
        known = self._known(module)
        key = (sample.name, precision)
        if key not in known:
            try:
                known[key] = evaluate(module, sample, precision)
            except TrimtabError as error:
                known[key] = error
        outputs: tuple[torch.Tensor, ...] | TrimtabError = known[key]
        return outputs

    def sensitivities(self, module: Module, sample: Sample, unit: float) -> list[float]:
        known = self._known(module)
        key = (sample.name, unit)
        if key not in known:
            known[key] = sensitivities(module, sample, unit)
        found: list[float] = known[key]
        return found

    def metric(self, module: Module, ctx: Context) -> float:
        known = self._known(module)
        if "metric" not in known:
            assert ctx.metric is not None
            known["metric"] = float(ctx.metric(module))
        value: float = known["metric"]
        return value

    def _known(self, module: Module) -> dict[Any, Any]:
        for candidate, known in self._modules:
            if candidate is module:
                return known
        self._modules = [*self._modules[-1:], (module, {})]
        return self._modules[-1][1]


def _samples_behind(step: Step, samples: Sequence[Sample]) -> Iterator[Sample]:
    """The samples for the module after a pass that changes the signature, without those that cannot be evaluated."""
    for sample in samples:
        try:
            yield replace(sample, inputs=step.pass_.inputs_after(step.before, sample.inputs))
        except TrimtabError as error:
            step.row.notes.append(_unusable(sample, error, step.ctx))


def _unusable(sample: Sample, error: TrimtabError, ctx: Context) -> str:
    """The remark that ``sample`` cannot be evaluated; an error when the sample is the user's own data."""
    if ctx.calibration:
        raise CalibrationError(
            f"the module cannot be evaluated on {sample.name}: {error.what}",
            values=error.values, rule=error.rule, fix=error.fix, where=error.where, location=error.location,
        ) from error  # fmt: skip
    return f"not checked on {sample.name}: {error.what}"


def _breach(steps: Sequence[Step], sample: Sample, what: str, cause: TrimtabError | None = None) -> ContractError:
    names = ", ".join(dict.fromkeys(step.pass_.name for step in steps))
    subject = f"the pass {names} broke its contract" if len(steps) == 1 else f"the passes {names} broke their contract"
    contract = steps[0].pass_.contract
    bisect = f"trimtab bisect MODEL --passes {shlex.quote(steps[0].report.pipeline)} --check {contract_text(contract)}"
    return ContractError(
        f"{subject}: {what}",
        values={"contract": contract, "sample": sample.name},
        rule=(cause.rule if cause is not None else "") or "the manager evaluates the module before and after a pass",
        fix=f"correct the pass, or declare the contract it does keep; to find the rewrite at fault: {bisect}",
        where=steps[-1].place,
    )
