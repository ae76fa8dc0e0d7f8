"""``trimtab.bisect`` names the pass and the rewrite that a broken pass gets wrong, and says when it cannot."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import broken_passes
import pytest
import torch
from broken_passes import (
    BadFusion,
    DoubleInput,
    NeedsProperty,
    PeelNorm,
    PeelNormAndCorrupt,
    PeelNormAndOverflow,
    PeelNormAndRaise,
    Refuse,
    Shift,
    ShiftAnyway,
    ShiftOnce,
)

import trimtab
from trimtab.debug import Bisection, Culprit, bisect
from trimtab.errors import InputError, TrimtabError, UsageError
from trimtab.ir import Builder, DType, Module, TensorType, interpret, ops, symbol
from trimtab.passes import Close, Contract, Exact, Lossy, Pass, parse_pipeline
from trimtab.passes.contracts import contract_text, parse_contract
from trimtab.passes.pipeline import Pipeline
from zoo_models import get


@functools.cache
def zoo_module(name: str) -> Module:
    entry = get(name)
    return trimtab.trace(entry.build(), tuple(entry.inputs().values()), None, entry.dynamic_shapes())


def around(pass_: Pass) -> Pipeline:
    """``pass_`` between two runs of a group of harmless passes."""
    cleanup = parse_pipeline("cleanup").items
    return Pipeline((*cleanup, pass_, *cleanup))


def small_module() -> Module:
    """``y = relu(x)``"""
    build = Builder()
    x = build.input("x", TensorType(DType.F32, (symbol("batch", 1, 8), 3)))
    build.output(build(ops.Relu(x)), names=["y"])
    return build.module


def culprit(found: Bisection) -> Culprit:
    assert found.culprit is not None
    return found.culprit


@pytest.mark.parametrize("model", ["bert", "vit"])
@pytest.mark.parametrize("thorough", [False, True])
def test_the_third_match_is_found(model: str, thorough: bool) -> None:
    module = zoo_module(model)
    before = module.copy()
    found = bisect(module, around(PeelNorm()), "rtol=1e-3", thorough=thorough)
    assert module == before
    at, rewrite = culprit(found).application, culprit(found).rewrite
    assert at.pass_ == PeelNorm()
    assert 1 < at.number < found.applications
    assert rewrite is not None
    norms = [op for op in at.before.walk() if isinstance(op, ops.LayerNorm)]
    assert (rewrite.number, rewrite.of, rewrite.rule) == (3, len(norms), "peel")
    assert rewrite.location == norms[2].location
    assert "layer_norm" in rewrite.op
    assert not rewrite.before.failed
    assert (rewrite.after.kind, culprit(found).after.kind) == ("drift", "drift")
    assert rewrite.before.drift is not None
    assert rewrite.before.drift.relative < 1e-5
    assert rewrite.after.drift is not None
    assert rewrite.after.drift.relative > 1e-3
    story = str(found)
    assert f"pass      {at.number} of {found.applications}: peel-norm" in story
    assert f"rewrite   3 of {len(norms)}: peel" in story
    assert str(norms[2].location) in story


def test_a_rule_of_the_engine_is_named() -> None:
    found = bisect(zoo_module("vit"), around(BadFusion()), "rtol=1e-3")
    rewrite = culprit(found).rewrite
    assert rewrite is not None
    assert (rewrite.number, rewrite.rule) == (1, "bias-again")
    assert "gelu" in rewrite.op


@pytest.mark.parametrize(
    ("pass_", "kind", "parts"),
    [
        (PeelNormAndRaise(), "error", ["peel-norm-and-raise failed", "KeyError: 'layer'", "broken_passes.py:"]),
        (PeelNormAndCorrupt(), "verification", ["does not verify", "wrong result types", "neg("]),
        (PeelNormAndOverflow(), "drift", ["inf absolute"]),
    ],
    ids=lambda value: value.name if isinstance(value, Pass) else None,
)
def test_every_kind_of_failure_is_found(pass_: Pass, kind: str, parts: list[str]) -> None:
    found = bisect(zoo_module("bert"), around(pass_), "rtol=1e-3")
    rewrite = culprit(found).rewrite
    assert rewrite is not None
    assert (rewrite.number, rewrite.rule) == (3, "peel")
    assert culprit(found).after.kind == rewrite.after.kind == kind
    for part in parts:
        assert part in culprit(found).after.reason


def test_nothing_is_wrong() -> None:
    found = bisect(zoo_module("vit"), "cleanup,fuse", "rounding")
    assert found.culprit is None
    assert not found.final.failed
    assert "nothing is wrong" in str(found)
    assert found.to_dict()["culprit"] is None


def test_a_group_is_opened_and_its_rounds_count() -> None:
    module = zoo_module("vit")
    _, report = trimtab.passes.PassManager("cleanup").run(module)
    found = bisect(module, around(Shift()))
    assert culprit(found).application.number == len(report.rows) + 1
    assert culprit(found).application.group == ""


def test_a_pass_that_asks_for_no_permission_is_named_alone() -> None:
    found = bisect(zoo_module("bert"), around(PeelNorm(asks=False)))
    assert culprit(found).application.pass_ == PeelNorm(asks=False)
    assert culprit(found).rewrite is None
    assert "does not ask Context.rewrites.permit" in culprit(found).why_not
    assert "rewrite   cannot be told: peel-norm does not ask" in str(found)


def test_a_pass_that_changes_more_than_it_asks_for() -> None:
    found = bisect(small_module(), [ShiftAnyway()])
    assert culprit(found).rewrite is None
    assert "fails even when shift-anyway is allowed no rewrite" in culprit(found).why_not


def test_a_pass_that_does_something_else_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broken_passes, "_runs", itertools.count())
    found = bisect(small_module(), [ShiftOnce()])
    assert culprit(found).application.pass_ == ShiftOnce()
    assert "does not do the same each time" in culprit(found).why_not


def test_a_pass_that_raises_before_any_rewrite() -> None:
    found = bisect(small_module(), [Refuse()])
    assert culprit(found).after.kind == "error"
    assert "this module is not for me" in culprit(found).after.reason
    assert "refuse fails before its first rewrite" in str(found)


def test_a_fault_before_the_pass_that_raises_is_found_first() -> None:
    found = bisect(small_module(), [Shift(), Refuse()])
    assert culprit(found).application.pass_ == Shift()
    assert found.final.kind == "error"


def test_a_check_that_goes_back_and_forth() -> None:
    pipeline = [Shift(1.0), Shift(-1.0), Shift(1.0), Shift(-1.0), Shift(3.0)]
    for thorough in (False, True):
        found = bisect(small_module(), pipeline, "rtol=1e-3", thorough=thorough)
        assert not culprit(found).before.failed
        assert culprit(found).after.failed
        if thorough:
            assert culprit(found).application.number == 1


def test_a_drift_that_adds_up_is_said_to() -> None:
    found = bisect(small_module(), [Shift(1e-3)] * 5, "rtol=0,atol=2.5e-3")
    assert culprit(found).application.number == 3
    (note,) = found.notes
    assert "the drift of several passes adds up" in note
    assert note in str(found)


def test_required_properties_are_not_enforced() -> None:
    assert culprit(bisect(small_module(), [NeedsProperty()])).application.pass_ == NeedsProperty()


def test_nan_equals_nan() -> None:
    build = Builder()
    x = build.input("x", TensorType(DType.F32, (3,)))
    zero = build.scalar(0.0, DType.F32)
    build.output(build(ops.Div(zero, zero)), build(ops.Neg(x)), names=["nan", "y"])
    assert bisect(build.module, "cleanup", "exact").culprit is None
    assert bisect(build.module, [Shift()], "rtol=1e-3").culprit is None  # NaN + 1 is NaN


def test_a_result_that_becomes_nan_fails_any_tolerance() -> None:
    found = bisect(small_module(), [Shift(math.nan)], Close(rtol=1e30))
    drift = culprit(found).after.drift
    assert drift is not None
    assert math.isinf(drift.absolute)


def test_given_inputs_are_what_is_checked_on() -> None:
    """Whatever stands before ``relu(x - 100)`` shows for large numbers only."""
    build = Builder()
    x = build.input("x", TensorType(DType.F32, (2,)))
    build.output(build(ops.Relu(build(ops.Sub(x, build.scalar(100.0, DType.F32))))))
    module = build.module

    assert bisect(module, [DoubleInput()]).culprit is None
    found = bisect(module, [DoubleInput()], inputs=[{"x": torch.tensor([200.0, 1.0])}])
    assert culprit(found).after.sample is not None
    assert culprit(found).after.sample.name == "input 0"  # type: ignore[union-attr]
    with pytest.raises(InputError, match="wrong input names"):
        bisect(module, [DoubleInput()], inputs=[{"z": torch.zeros(2)}])


def is_not_negative(module: Module) -> bool:
    (y,) = interpret(module, [torch.linspace(-1, 1, 6).reshape(2, 3)])
    return bool((y >= 0).all())


@pytest.mark.parametrize(
    ("say", "reason"),
    [
        (lambda good: good, "returned False"),
        (lambda good: torch.tensor(good), "returned False"),
        (lambda good: None if good else "there are negative numbers", "there are negative numbers"),
        (lambda good: "" if good else "negative", "negative"),
        (lambda good: 1 / int(good) and None, "ZeroDivisionError: division by zero"),
    ],
    ids=["bool", "tensor", "text", "empty text", "raises"],
)
def test_a_check_of_the_user(say: Any, reason: str) -> None:
    found = bisect(small_module(), [Shift(1.0), Shift(-3.0)], lambda module: say(is_not_negative(module)))
    assert culprit(found).application.number == 2
    assert culprit(found).after.kind == "check"
    assert reason in culprit(found).after.reason


def test_a_check_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "check.py").write_text(
        "import torch\nfrom trimtab.ir import interpret\n\n\ndef positive(module):\n"
        "    (y,) = interpret(module, [torch.ones(1, 3)])\n    assert (y >= 0).all(), f'{float(y.min())} is there'\n"
    )
    found = bisect(small_module(), [Shift(-3.0)], f"{tmp_path}/check.py:positive")
    assert "AssertionError: -2.0 is there" in culprit(found).after.reason
    assert found.check.text == f"{tmp_path}/check.py:positive"


@pytest.mark.parametrize(
    ("check", "parts"),
    [
        (lambda module: False, ["the model fails the check before any pass"]),
        (lambda module: 3, ["returned something that is no verdict", "returned=int"]),
        (lambda module: torch.zeros(2), ["no verdict"]),
        ("rtol=-1", ["cannot read the contract to check", "for example rtol=1e-3"]),
        ("rtol=x", ["cannot read"]),
        ("rtol=1,rtol=2", ["cannot read"]),
        ("tolerance=1", ["cannot read"]),
        ("", ["cannot read"]),
        ("nowhere.py:check", ["there is no such check file"]),
    ],
    ids=["input fails", "int", "tensor", "negative", "no number", "twice", "other word", "empty", "no file"],
)
def test_a_check_that_cannot_be_used(check: Any, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        bisect(small_module(), [Shift()], check)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["def check(:\n", "import no_such_package\n", "x = 1\n"])
def test_a_check_file_that_does_not_run(text: str, tmp_path: Path) -> None:
    (tmp_path / "check.py").write_text(text)
    with pytest.raises(UsageError, match=r"check\.py"):
        bisect(small_module(), [Shift()], f"{tmp_path}/check.py:check")


def test_a_model_that_draws_random_numbers_needs_a_check_of_its_own() -> None:
    class Noisy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    module = trimtab.trace(Noisy().eval(), (torch.ones(3),))
    with pytest.raises(UsageError, match="draws random numbers"):
        bisect(module, [Shift()])
    assert bisect(module, [Shift()], "lossy").culprit is None
    assert bisect(module, [Shift(-5.0)], lambda m: bool((interpret(m, [torch.ones(3)])[0] > 0).all())).culprit


def test_a_module_that_does_not_verify_is_refused() -> None:
    module = small_module()
    module.main.ops.first.result.type = TensorType(DType.F32, (99,))  # type: ignore[union-attr]
    with pytest.raises(TrimtabError, match="wrong result types"):
        bisect(module, [Shift()], "lossy")


def test_progress_never_goes_back() -> None:
    told: list[tuple[str, float]] = []
    bisect(zoo_module("vit"), around(PeelNorm()), progress=lambda stage, part: told.append((stage, part)))
    fractions = [part for _, part in told]
    assert fractions == sorted(fractions)
    assert all(0 <= part <= 1 for part in fractions)
    assert {"search the pass", "search the rewrite", "run peel-norm"} <= {stage for stage, _ in told}


@pytest.mark.parametrize(
    "contract", [Exact(), Exact(rounding=True), Lossy(), Close(rtol=1e-3, atol=0.0), Close(0.0, 2.0), Close(0.25, 1e-9)]
)
def test_the_text_of_a_contract_reads_back(contract: Contract) -> None:
    assert parse_contract(contract_text(contract)) == contract


def test_a_breach_names_the_command_that_finds_the_rewrite() -> None:
    with pytest.raises(TrimtabError) as caught:
        trimtab.optimize(small_module(), Pipeline((Shift(2.0),)))
    assert "trimtab bisect MODEL --passes 'shift{by=2.0}' --check exact" in caught.value.fix
