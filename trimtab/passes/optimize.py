"""``trimtab.optimize``: one call that runs a pipeline on a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import PassError, UsageError
from trimtab.ir.analysis.statistics import count_ops
from trimtab.ir.core import Module
from trimtab.ir.op import OP_CLASSES
from trimtab.passes.base import Context, Metric, Seconds
from trimtab.passes.calibration import check_calibration
from trimtab.passes.contract_check import MAC_LIMIT, CheckMode
from trimtab.passes.manager import PassManager
from trimtab.passes.observers import Observer
from trimtab.passes.options import did_you_mean
from trimtab.passes.pipeline import Pipeline
from trimtab.passes.report import OptimizeReport

DEFAULT_PIPELINE = "cleanup,fuse"


@dataclass(frozen=True)
class OptimizeResult:
    """The optimized module and the report on how it came about."""

    module: Module
    report: OptimizeReport


def optimize(
    module: Module,
    pipeline: str | Pipeline = DEFAULT_PIPELINE,
    calibration: Iterable[Any] | None = None,
    metric: Metric | None = None,
    expect: Mapping[str, int] | None = None,
    observers: Sequence[Observer] = (),
    *,
    check: CheckMode = "always",
    mac_limit: float = MAC_LIMIT,
    seed: int = 0,
    seconds: Seconds | None = None,
) -> OptimizeResult:
    """Run ``pipeline`` on ``module``, which is not modified; weights are shared with the result.

    Args:
        module: the module to optimize.
        pipeline: passes and groups, for example ``cleanup,fuse,quantize{bits=8}``.
        calibration: batches of real inputs: an array per input, in order or by name. They serve the passes that need
            data, and contracts are checked on the first ones instead of on random inputs. Anything that can be iterated
            more than once is drawn anew for each use and not kept; of an iterator all that is drawn is kept.
        metric: scores a module, higher is better; reported around every pass that is not exact.
        expect: how many ops of a kind the result must have, for example ``{"attention": 12}``.
        observers: told about every pass; see :mod:`trimtab.passes.observers`.
        check: check contracts ``always``, only those that are not exact (``close``), or ``never``.
        mac_limit: multiply-accumulates of one evaluation above which exact passes are believed.
        seed: seed of everything random.
        seconds: times a module on the target, for passes that choose by what is faster; ``trimtab.compile`` gives one.

    Raises:
        UsageError, ParseError: the pipeline names unknown passes or options, or cannot be read.
        PassError: a pass failed, passes are in a wrong order, or ``expect`` does not hold.
        ContractError: a pass broke its contract.
        CalibrationError: a calibration batch cannot be used.
    """
    manager = PassManager(pipeline, observers, check=check, mac_limit=mac_limit)
    for name in expect or {}:
        if name not in OP_CLASSES:
            raise UsageError(
                "expect names an unknown op",
                values={"op": name},
                fix=did_you_mean(name, OP_CLASSES) or "see the IR reference",
            )
    batches = check_calibration(module, calibration) if calibration is not None else ()
    result, report = manager.run(module, Context(batches, metric, seed, seconds=seconds))
    if expect:
        _check_expected(result, expect, report)
    return OptimizeResult(result, report)


def _check_expected(module: Module, expect: Mapping[str, int], report: OptimizeReport) -> None:
    found = count_ops(module)
    wrong = {name: f"{found[name]} instead of {count}" for name, count in expect.items() if found[name] != count}
    if wrong:
        misses = report.near_misses()
        raise PassError(
            "the pipeline did not give the ops that were expected",
            values={**wrong, "near misses": "; ".join(misses)} if misses else wrong,
            rule=f"the pipeline is {report.pipeline}",
            fix="ask the rule that should have matched why it did not, with Rule.explain, or look at the graph around "
            "each pass with `trimtab optimize MODEL --passes ... --report report.html`",
        )
