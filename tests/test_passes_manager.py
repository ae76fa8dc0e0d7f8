"""The pass manager holds passes to their declarations: contract, order, weights, honesty; and spares its input."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from trimtab.errors import CalibrationError, ContractError, PassError, TrimtabError, UsageError, VerificationError
from trimtab.ir import Builder, DType, Module, TensorType, ops, parse_module, print_module, symbol
from trimtab.ir.weights import TorchSource
from trimtab.passes import Changed, Close, Context, Contract, Dump, Exact, Lossy, Observer, Pass, PassManager, Step
from trimtab.passes import registry as registry_module
from trimtab.passes.calibration import check_calibration
from trimtab.passes.optimize import optimize
from trimtab.passes.pipeline import Group, Pipeline, parse_pipeline


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply the output by a factor, whatever the contract says."""

    name: ClassVar[str] = "scale"
    contract: ClassVar[Contract] = Exact()
    factor: float = 1.001

    def run(self, module: Module, ctx: Context) -> Changed:
        build = Builder(module)
        (value,) = module.main.outputs
        scaled = build(ops.Mul(value, build.scalar(self.factor, value.type.dtype)))
        module.main.set_outputs([scaled], module.main.output_names)
        return True


@dataclass(frozen=True)
class CloseScale(Scale):
    name: ClassVar[str] = "close-scale"
    contract: ClassVar[Contract] = Close(rtol=1e-4)


@dataclass(frozen=True)
class LossyScale(Scale):
    name: ClassVar[str] = "lossy-scale"
    contract: ClassVar[Contract] = Lossy()


@dataclass(frozen=True)
class RoundingScale(Scale):
    name: ClassVar[str] = "rounding-scale"
    contract: ClassVar[Contract] = Exact(rounding=True)


@dataclass(frozen=True)
class AddZero(Pass):
    """Add 0.0: equal in every number, and wrong for -0.0."""

    name: ClassVar[str] = "add-zero"
    contract: ClassVar[Contract] = Exact()

    def run(self, module: Module, ctx: Context) -> Changed:
        (op,) = [op for op in module.walk() if isinstance(op, ops.Neg)]
        build = Builder(module)
        module.main.set_outputs([build(ops.Add(op.result, build.scalar(0.0, DType.F32)))], module.main.output_names)
        return True


@dataclass(frozen=True)
class CopyWeights(Pass):
    """Give every reader a copy of the weight of its own."""

    name: ClassVar[str] = "copy-weights"
    contract: ClassVar[Contract] = Exact()

    def run(self, module: Module, ctx: Context) -> Changed:
        for value in module.main.weights:
            for use in value.uses[1:]:
                weight = module.weights[value.weight].renamed(module.fresh_weight_id("copy"))
                use.user._set_read(use.index, module.main.weight(module.add_weight(weight)))
        return True


@dataclass(frozen=True)
class DeclaredCopyWeights(CopyWeights):
    name: ClassVar[str] = "declared-copy-weights"
    grows_weights: ClassVar[bool] = True


@dataclass(frozen=True)
class Misbehave(Pass):
    """Go wrong in the way that is asked for, after spoiling the module."""

    name: ClassVar[str] = "misbehave"
    contract: ClassVar[Contract] = Exact()
    how: str = "raise"

    def run(self, module: Module, ctx: Context) -> Changed:
        if self.how == "lie":
            return Scale().run(module, ctx) and False
        if self.how == "boast":
            return True
        if self.how == "silence":
            return None  # type: ignore[return-value]
        for op in list(module.main.ops):
            if not op.result.uses:
                module.main.ops.remove(op)
        if self.how == "corrupt":
            module.main.ops.first.result.type = TensorType(DType.F32, (99,))  # type: ignore[union-attr]
            return True
        if self.how == "refuse":
            raise UsageError("there is nothing to merge", fix="use another model")
        raise KeyError("blocks.0")


@dataclass(frozen=True)
class Drop(Pass):
    """Swap the output for another of a wrong shape at run time only: an index out of range."""

    name: ClassVar[str] = "drop"
    contract: ClassVar[Contract] = Lossy()

    def run(self, module: Module, ctx: Context) -> Changed:
        build = Builder(module)
        (value,) = module.main.outputs
        index = build(ops.Full(value=99, dtype=DType.I64, shape=(1,)))
        module.main.set_outputs([build(ops.IndexSelect(value, index, dim=0))], module.main.output_names)
        return True


@dataclass(frozen=True)
class Fold(Pass):
    """Establishes a property."""

    name: ClassVar[str] = "fold-norms"
    contract: ClassVar[Contract] = Exact()
    establishes: ClassVar[frozenset[str]] = frozenset({"norms-folded"})

    def run(self, module: Module, ctx: Context) -> Changed:
        return False


@dataclass(frozen=True)
class Quantize(Pass):
    """Requires it."""

    name: ClassVar[str] = "quantize-all"
    contract: ClassVar[Contract] = Lossy()
    requires: ClassVar[frozenset[str]] = frozenset({"norms-folded"})

    def run(self, module: Module, ctx: Context) -> Changed:
        return False


@dataclass(frozen=True)
class Unfold(Pass):
    """Breaks it."""

    name: ClassVar[str] = "unfold-norms"
    contract: ClassVar[Contract] = Exact()
    breaks: ClassVar[frozenset[str]] = frozenset({"norms-folded"})

    def run(self, module: Module, ctx: Context) -> Changed:
        return False


def build() -> Module:
    """``y = -(W(Wx))`` with a shared weight and dead code."""
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (symbol("batch", 1, 64), 8)))
    w = b.weight("w", torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    y = b(ops.Linear(b(ops.Linear(x, w), "h"), w), "z")
    b(ops.Exp(y))
    b.output(b(ops.Neg(y)), names=["y"])
    return b.module


def items(text: str) -> tuple[Pass | Group, ...]:
    return parse_pipeline(text).items


@pytest.fixture
def module() -> Iterator[Module]:
    """A module that no test may modify."""
    made = build()
    text = print_module(made)
    yield made
    assert print_module(made) == text, "the input module was modified"


def failure(run: Callable[[], Any]) -> TrimtabError:
    with pytest.raises(TrimtabError) as caught:
        run()
    return caught.value


# -- contracts --------------------------------------------------------------------------------------------------


def test_broken_exact_pass_is_named_among_honest_ones(module: Module) -> None:
    error = failure(lambda: PassManager([*items("cleanup"), Scale(), *items("dce")]).run(module))
    assert isinstance(error, ContractError)
    assert "the pass scale broke its contract" in error.what
    assert error.values["contract"] == Exact()
    assert "after dedup-weights, simplify-identities" in error.where


def test_a_culprit_is_named_among_passes_of_both_exact_contracts(module: Module) -> None:
    honest = [Scale(1.0), RoundingScale(1 + 1e-8), Scale(1.0), RoundingScale(1 - 1e-8)]
    _, report = PassManager(honest).run(module)
    assert [row.drift is not None and row.drift.relative < 1e-7 for row in report.rows] == [True] * 4
    for culprit in (Scale(1 + 1e-3), RoundingScale(1 + 1e-3)):
        error = failure(lambda: PassManager([*honest, culprit, *honest]).run(module))  # noqa: B023
        assert isinstance(error, ContractError)
        assert f"the pass {culprit.name} broke its contract" in error.what


def test_an_exact_pass_is_not_excused_by_another_one_that_undoes_it(module: Module) -> None:
    passes = [RoundingScale(1.0), Scale(2.0), RoundingScale(1.0), Scale(0.5), RoundingScale(1.0)]
    assert "the pass scale broke its contract" in failure(lambda: PassManager(passes).run(module)).what


def test_small_errors_that_add_up_are_nobodys_fault(module: Module) -> None:
    passes = [RoundingScale(1 + 7e-7), Scale(1.0)] * 3
    _, report = PassManager(passes).run(module)
    assert all(row.drift is not None and row.drift.relative < 1e-6 for row in report.rows)


def test_a_module_of_the_same_expressions_is_not_evaluated(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.passes import contract_check

    evaluated: list[Module] = []
    evaluate = contract_check.evaluate
    monkeypatch.setattr(contract_check, "evaluate", lambda *given: evaluated.append(given[0]) or evaluate(*given))
    _, report = PassManager("dce,group-fusions").run(module)
    assert [row.changed for row in report.rows] == [True, True]
    assert [str(row.drift) for row in report.rows] == ["none", "none"]
    assert not evaluated
    PassManager([Scale(1.0)]).run(module)
    assert evaluated


def test_signed_zeros_count() -> None:
    b = Builder()
    b.output(b(ops.Neg(b.input("x", TensorType(DType.F32, (64,))))))
    error = failure(lambda: PassManager([AddZero()]).run(b.module))
    assert isinstance(error, ContractError)
    assert "add-zero" in error.what


@pytest.mark.parametrize(
    ("pass_", "holds"),
    [
        (CloseScale(1 + 1e-5), True),
        (CloseScale(1 + 1e-3), False),
        (RoundingScale(1 + 1e-3), False),
        (LossyScale(2.0), True),
        (Scale(1.0), True),
    ],
)
def test_contract_is_checked_by_its_tolerance(module: Module, pass_: Scale, holds: bool) -> None:
    if holds:
        _, report = PassManager([pass_]).run(module)
        drift = report.rows[0].drift
        assert drift is not None
        assert drift.relative == pytest.approx(abs(pass_.factor - 1), rel=0.02, abs=1e-12)
        assert report.check_seconds > 0
    else:
        assert isinstance(failure(lambda: PassManager([pass_]).run(module)), ContractError)


def test_pass_after_which_the_module_cannot_run_breaks_even_a_lossy_contract(module: Module) -> None:
    error = failure(lambda: PassManager([Drop()]).run(module))
    assert isinstance(error, ContractError)
    assert "can no longer be evaluated" in error.what


@pytest.mark.parametrize(("check", "caught"), [("always", True), ("close", False), ("never", False)])
def test_checks_can_be_turned_off(module: Module, check: Any, caught: bool) -> None:
    run = lambda: PassManager([Scale()], check=check).run(module)  # noqa: E731
    if caught:
        failure(run)
    else:
        _, report = run()
        assert report.rows[0].drift is None
    with pytest.raises(UsageError):
        PassManager([], check="sometimes")  # type: ignore[arg-type]


def test_exact_passes_are_believed_above_the_mac_limit_and_the_report_says_so(module: Module) -> None:
    _, report = PassManager([Scale()], mac_limit=10).run(module)
    assert report.rows[0].drift is None
    assert "exact passes were not checked" in report.notes[0]
    assert isinstance(failure(lambda: PassManager([CloseScale(2.0)], mac_limit=10).run(module)), ContractError)


def test_weights_may_grow_only_when_declared(module: Module) -> None:
    error = failure(lambda: PassManager([CopyWeights()]).run(module))
    assert isinstance(error, ContractError)
    assert "grew the weights" in error.what
    assert (error.values["bytes before"], error.values["bytes after"]) == (256, 512)
    grown, _ = PassManager([DeclaredCopyWeights()]).run(module)
    assert grown.weight_bytes == 512
    shrunk, report = PassManager("dedup-weights").run(grown)
    assert shrunk.weight_bytes == report.rows[0].weight_bytes_after == 256


# -- failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raise", "refuse", "lie", "silence", "corrupt"])
def test_failing_pass_is_explained(module: Module, how: str, golden: Callable[[str, str], None]) -> None:
    error = failure(lambda: PassManager([*items("cse,dce"), Misbehave(how)]).run(module))
    assert isinstance(error, PassError)
    golden(f"passes/errors/manager-{how}.txt", str(error))


def test_boasting_pass_gets_a_note_and_counts_as_unchanged(module: Module) -> None:
    _, report = PassManager([Misbehave("boast")]).run(module)
    assert not report.rows[0].changed
    assert "nothing changed" in report.rows[0].notes[0]


def test_bad_input_module_is_the_callers_fault() -> None:
    module = build()
    module.main.ops.first.result.type = TensorType(DType.F32, (99,))  # type: ignore[union-attr]
    assert isinstance(failure(lambda: PassManager("dce").run(module)), VerificationError)


def test_result_does_not_share_graphs_with_the_input(module: Module) -> None:
    result, _ = PassManager([]).run(module)
    assert result == module
    assert result.main is not module.main
    for id, weight in module.weights.items():
        assert result.weights[id] is weight, "weights are shared"


# -- order ------------------------------------------------------------------------------------------------------


@pytest.fixture
def property_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {**registry_module._OWN, "fold-norms": f"{__name__}:Fold", "quantize-all": f"{__name__}:Quantize"}
    monkeypatch.setattr(registry_module, "_OWN", own)


@pytest.mark.usefixtures("property_passes")
def test_wrong_order_is_refused_with_the_pass_to_add(module: Module, golden: Callable[[str, str], None]) -> None:
    golden("passes/errors/order-missing.txt", str(failure(lambda: PassManager([Quantize()]))))
    golden("passes/errors/order-broken.txt", str(failure(lambda: PassManager([Fold(), Unfold(), Quantize()]))))
    PassManager([Fold(), Quantize()]).run(module)
    PassManager([Quantize()], properties=["norms-folded"]).run(module)


# -- observers and report ---------------------------------------------------------------------------------------


def test_observers_see_each_pass_and_dump_writes_the_changed_modules(module: Module, tmp_path: Path) -> None:
    events: list[str] = []

    class Recorder(Observer):
        def before_pass(self, step: Step) -> None:
            events.append(f"before {step.pass_}")

        def after_pass(self, step: Step) -> None:
            events.append(f"after {step.pass_} {step.row.changed}")

        def pass_failed(self, step: Step, error: Exception) -> None:
            events.append(f"failed {step.pass_}")

    passes = [*items("cse,dce"), Misbehave("raise")]
    failure(lambda: PassManager(passes, [Recorder(), Dump(tmp_path)]).run(module))
    assert events == [
        "before cse", "after cse False", "before dce", "after dce True",
        "before misbehave", "failed misbehave",
    ]  # fmt: skip
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["000-input.ttir", "002-dce.ttir", "003-misbehave-failed.ttir"]
    assert "exp(" in (tmp_path / "000-input.ttir").read_text()
    assert "exp(" not in (tmp_path / "002-dce.ttir").read_text()


def test_report_is_plain_data(module: Module) -> None:
    import json

    _, report = PassManager([*items("cleanup"), LossyScale(2.0)]).run(module)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["pipeline"] == "cleanup,lossy-scale{factor=2.0}"
    assert [row["text"] for row in data["passes"] if row["changed"]] == report.applied
    last = data["passes"][-1]
    assert last["ops_after"] == last["ops_before"] + 2
    assert last["drift"]["relative"] == pytest.approx(1.0)
    assert "give calibration data or a metric" in last["notes"][0]
    assert all(row["seconds"] >= 0 for row in data["passes"])


def test_group_runs_until_nothing_changes_and_is_bounded(module: Module) -> None:
    _, report = PassManager(Pipeline((Group("grow", (LossyScale(1.0),), rounds=3),))).run(module)
    assert [row.round for row in report.rows] == [1, 2, 3]
    assert "still changed the module after 3 rounds" in report.notes[0]


# -- optimize ---------------------------------------------------------------------------------------------------


def test_expectations_are_checked(module: Module) -> None:
    assert optimize(module, "cleanup", expect={"linear": 2, "exp": 0}).report.applied
    error = failure(lambda: optimize(module, "cleanup", expect={"linear": 3}))
    assert isinstance(error, PassError)
    assert error.values == {"linear": "2 instead of 3"}
    with pytest.raises(UsageError, match="did you mean `linear`"):
        optimize(module, "cleanup", expect={"linaer": 3})


def test_a_missed_expectation_tells_the_near_misses() -> None:
    text = """trimtab.ir 1
weight @w: f32[4, 4]
weight @down: f32[2, 4]
weight @up: f32[4, 2]
graph main(%x: f32[2, 4]) {
  %p = linear(%x, @w) : f32[2, 4]
  %d = linear(%x, @down) : f32[2, 2]
  %u = linear(%d, @up) : f32[2, 4]
  %s = add(%p, %u) : f32[2, 4]
  %q = linear(%s, @w) : f32[2, 4]
  return q=%q
}"""
    module = parse_module(text, lambda id, type: TorchSource(torch.randn(type.shape)))
    with pytest.raises(PassError) as caught:
        optimize(module, "merge-adapters", expect={"linear": 2})
    assert caught.value.values == {
        "linear": "4 instead of 2",
        "near misses": "merge-adapter: @w is read at 2 places, which differ afterwards",
    }


def test_metric_is_reported_around_lossy_passes(module: Module) -> None:
    manager = PassManager([*items("cleanup"), LossyScale(2.0)])
    _, report = manager.run(module, Context(metric=lambda m: float(sum(1 for _ in m.walk()))))
    assert (report.rows[-1].metric_before, report.rows[-1].metric_after) == (3.0, 5.0)
    assert all(row.metric_before is None for row in report.rows[:-1])


def test_contracts_are_checked_on_calibration_data(module: Module) -> None:
    batch = np.zeros((5, 8), np.float32)  # scaling zero changes nothing
    context = Context(calibration=check_calibration(module, [batch]))
    PassManager([Scale(2.0)]).run(module, context)
    context = Context(calibration=check_calibration(module, [{"x": batch}, batch + 1]))
    error = failure(lambda: PassManager([Scale(2.0)]).run(module, context))
    assert error.values["sample"] == "calibration batch 1"


BAD_BATCHES: dict[str, list[Any]] = {
    "none": [],
    "nan": [np.ones((2, 8), np.float32), np.full((2, 8), np.nan, np.float32)],
    "infinite": [torch.tensor([[1.0] * 7 + [float("inf")]])],
    "shape": [np.ones((2, 7), np.float32)],
    "rank": [np.ones((8,), np.float32)],
    "range": [np.ones((65, 8), np.float32)],
    "dtype": [np.ones((2, 8), np.float64)],
    "name": [{"input": np.ones((2, 8), np.float32)}],
    "count": [(np.ones((2, 8), np.float32), np.ones((2, 8), np.float32))],
    "kind": ["a picture"],
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_calibration_data_is_refused(module: Module, case: str, golden: Callable[[str, str], None]) -> None:
    error = failure(lambda: optimize(module, "cleanup", calibration=BAD_BATCHES[case]))
    assert isinstance(error, CalibrationError)
    golden(f"passes/errors/calibration-{case}.txt", str(error))


# -- third parties ----------------------------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, str], None]]:
    """``install(package, entry points, code)`` puts a package with these entry points on the path."""

    def put(package: str, points: str, code: str) -> None:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[trimtab.passes]\n{points}\n")
        (tmp_path / f"{package.replace('-', '_')}.py").write_text(code)
        importlib.invalidate_caches()
        registry_module.forget_installed()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield put
    monkeypatch.undo()
    registry_module.forget_installed()


THIRD_PARTY = '''
from dataclasses import dataclass
from typing import ClassVar
from trimtab.ir import Module, ops
from trimtab.passes import Changed, Context, Contract, Exact, Pass

@dataclass(frozen=True)
class DropExp(Pass):
    """Remove exponentials that nobody reads."""
    name: ClassVar[str] = "drop-exp"
    contract: ClassVar[Contract] = Exact()
    limit: int = 10

    def run(self, module: Module, ctx: Context) -> Changed:
        dead = [op for op in module.main.ops if isinstance(op, ops.Exp) and not op.result.uses][: self.limit]
        for op in dead:
            module.main.ops.remove(op)
        ctx.note(f"dropped {len(dead)}")
        return bool(dead)
'''


def test_third_party_pass_is_found_and_run(module: Module, install: Callable[[str, str, str], None]) -> None:
    install("nice-passes", "drop-exp = nice_passes:DropExp", THIRD_PARTY)
    report = optimize(module, "drop-exp{limit=3}").report
    assert report.applied == ["drop-exp{limit=3}"]
    assert report.rows[0].notes == ["dropped 1"]
    assert registry_module.provider("drop-exp") == "nice-passes"


def test_broken_third_party_package_is_named_only_when_used(
    module: Module, install: Callable[[str, str, str], None], golden: Callable[[str, str], None]
) -> None:
    install("bad-passes", "broken = bad_passes:Broken", "raise RuntimeError('no licence found')")
    optimize(module, "cleanup")
    golden("passes/errors/third-party-broken.txt", str(failure(lambda: optimize(module, "broken"))))


WRONG_DECLARATIONS = {
    "not-a-pass": "class Wrong: pass",
    "not-a-dataclass": THIRD_PARTY.replace("@dataclass(frozen=True)", "").replace("DropExp", "Wrong"),
    "not-frozen": THIRD_PARTY.replace("(frozen=True)", "(unsafe_hash=True)").replace("DropExp", "Wrong"),
    "no-contract": THIRD_PARTY.replace("contract: ClassVar[Contract] = Exact()", "").replace("DropExp", "Wrong"),
    "no-run": THIRD_PARTY.replace("def run", "def walk").replace("DropExp", "Wrong"),
    "other-name": THIRD_PARTY.replace('"drop-exp"', '"drop"').replace("DropExp", "Wrong"),
}


@pytest.mark.parametrize("case", WRONG_DECLARATIONS)
def test_wrongly_declared_pass_is_explained(
    case: str, install: Callable[[str, str, str], None], golden: Callable[[str, str], None]
) -> None:
    package = f"wrong-{case}"
    install(package, f"drop-exp = {package.replace('-', '_')}:Wrong", WRONG_DECLARATIONS[case])
    error = failure(lambda: registry_module.load_pass("drop-exp"))
    golden(f"passes/errors/third-party-{case}.txt", str(error))


def test_two_packages_with_one_name_are_both_named(
    module: Module, install: Callable[[str, str, str], None], golden: Callable[[str, str], None]
) -> None:
    install("second-dce", "dce = second_dce:DropExp", THIRD_PARTY.replace('"drop-exp"', '"dce"'))
    golden("passes/errors/third-party-duplicate.txt", str(failure(lambda: optimize(module, "dce"))))
