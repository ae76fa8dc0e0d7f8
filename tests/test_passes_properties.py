"""Every built-in pass and group on random well-typed modules: it verifies, keeps its contract and the signature."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from random_graphs import modules, random_module

from trimtab.ir import Module, parse_module, print_module, verify
from trimtab.passes.manager import PassManager
from trimtab.passes.pipeline import group_names
from trimtab.passes.registry import load_pass, provider

OWN_PASSES = [
    "cse", "dce", "dedup-weights", "fold-constants", "raise-linear", "simplify-identities", "simplify-permutes",
    "simplify-reshapes",
]  # fmt: skip
SLOW_IS_FINE = settings(max_examples=50, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", [*OWN_PASSES, *group_names()])
@SLOW_IS_FINE
@given(module=modules())
def test_pass_keeps_its_contract(name: str, module: Module) -> None:
    text = print_module(module)
    # The manager verifies after each pass, and compares results on ordinary and on special values.
    result, report = PassManager(name).run(module)
    assert print_module(module) == text, "the input module was modified"
    verify(result)
    assert [v.type for v in result.main.inputs] == [v.type for v in module.main.inputs]
    assert [v.type for v in result.main.outputs] == [v.type for v in module.main.outputs]
    assert result.main.output_names == module.main.output_names
    assert result.weight_bytes <= module.weight_bytes or any(load_pass(r.name).grows_weights for r in report.rows)


@SLOW_IS_FINE
@given(module=modules())
def test_text_of_random_module_reads_back(module: Module) -> None:
    text = print_module(module)
    parsed = parse_module(text, lambda id, type: module.weights[id].source)
    assert parsed == module
    assert print_module(parsed) == text


@SLOW_IS_FINE
@given(module=modules())
def test_cleanup_does_nothing_the_second_time(module: Module) -> None:
    once, report = PassManager("cleanup").run(module)
    assert not report.notes, "cleanup reached its fixpoint"
    _, again = PassManager("cleanup").run(once)
    assert again.applied == []


@pytest.mark.parametrize("name", OWN_PASSES)
def test_random_modules_give_the_pass_something_to_do(name: str) -> None:
    changed = checked = 0
    for seed in range(40):
        _, report = PassManager(name).run(random_module(seed, 20))
        changed += report.rows[0].changed
        checked += report.rows[0].drift is not None
    assert changed >= 3
    assert checked >= 0.8 * changed, "most changes are really compared"


def test_all_own_passes_are_tested() -> None:
    from trimtab.passes.registry import pass_names

    assert sorted(name for name in pass_names() if provider(name) == "trimtab") == OWN_PASSES
