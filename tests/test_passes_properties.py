"""Every built-in pass and group on random modules: it verifies, keeps its contract and the signature.

Two generators: well-typed graphs of arbitrary ops, and transformers in many spellings.
"""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import modules, random_module
from random_transformers import random_transformer, transformers

from trimtab.errors import PassError, TrimtabError
from trimtab.ir import Module, parse_module, print_module, verify
from trimtab.passes.base import Context
from trimtab.passes.manager import PassManager
from trimtab.passes.pipeline import group_names
from trimtab.passes.registry import load_pass, pass_names, provider
from trimtab.passes.samples import generate_samples

REDUCE_TOKENS = sorted(name for name in pass_names() if provider(name) == "trimtab" and "-tokens" in name)
"""Passes that refuse a model without tokens, and may reduce again what was reduced."""
LEARN_FROM_DATA = ("compensate", "integer-only", "quantize", "quantize-attention", "reparameterize-scales", "smooth")
"""Passes that need calibration data, and refuse what they cannot learn from."""
OWN_PASSES = sorted({name for name in pass_names() if provider(name) == "trimtab"} - {*REDUCE_TOKENS, *LEARN_FROM_DATA})
ADDS_EACH_TIME = {"softmax1"}
"""Passes that change what a model computes, and can do so again."""
PREPARED = "cleanup,raise,"
"""What most passes expect to have run before them."""
ELSEWHERE = {"raise-group-norm", "raise-quantized", "simplify-indexing"}
"""Passes whose patterns neither generator writes; their own tests do."""
SLOW_IS_FINE = settings(max_examples=50, suppress_health_check=list(HealthCheck), deadline=None)


@pytest.mark.parametrize("name", [*OWN_PASSES, *group_names()])
@settings(SLOW_IS_FINE, max_examples=20)
@given(module=st.one_of(modules(), transformers()), before=st.sampled_from(["", PREPARED]))
def test_pass_keeps_its_contract(name: str, module: Module, before: str) -> None:
    text = print_module(module)
    # The manager verifies after each pass, and compares results on ordinary and on special values.
    result, report = PassManager(before + name).run(module)
    assert print_module(module) == text, "the input module was modified"
    verify(result)
    assert [v.type for v in result.main.inputs] == [v.type for v in module.main.inputs]
    assert [v.type for v in result.main.outputs] == [v.type for v in module.main.outputs]
    assert result.main.output_names == module.main.output_names
    # Weights that nothing reads any more are dce's to remove.
    grown = any(row.weight_bytes_after > row.weight_bytes_before for row in report.rows)
    assert not grown or any(load_pass(row.name).grows_weights for row in report.rows)


@pytest.mark.parametrize("name", sorted({*OWN_PASSES} - ADDS_EACH_TIME))
@settings(SLOW_IS_FINE, max_examples=10)
@given(module=transformers())
def test_pass_does_nothing_the_second_time(name: str, module: Module) -> None:
    once, _ = PassManager(PREPARED + name, check="never").run(module)
    _, again = PassManager(name, check="never").run(once)
    assert again.applied == []


@pytest.mark.parametrize("name", LEARN_FROM_DATA)
@settings(SLOW_IS_FINE, max_examples=8)
@given(module=st.one_of(modules(), transformers()), before=st.sampled_from(["cleanup", "cleanup,raise"]))
def test_learning_from_data_refuses_in_words_or_keeps_the_signature(name: str, module: Module, before: str) -> None:
    before += ",quantize" if name in ("compensate", "integer-only") else ""
    samples = [generate_samples(module, Context(seed=seed), 1e9)[0] for seed in range(3)]
    context = Context(calibration=tuple(sample.inputs for sample in samples))
    refusals: list[TrimtabError] = []
    try:
        result, _ = PassManager(f"{before},{name}", check="never").run(module, context)
    except TrimtabError as refusal:
        refusals.append(refusal)
    if refusals:
        assert "fault in the pass" not in refusals[0].rule  # a reason, not a stumble
        return
    verify(result)
    assert [v.type for v in result.main.inputs] == [v.type for v in module.main.inputs]
    assert [v.type for v in result.main.outputs] == [v.type for v in module.main.outputs]


@pytest.mark.parametrize("name", REDUCE_TOKENS)
@settings(SLOW_IS_FINE, max_examples=5)
@given(module=st.one_of(modules(), transformers()))
def test_token_reduction_refuses_in_words_or_keeps_the_signature(name: str, module: Module) -> None:
    refusals: list[PassError] = []
    try:
        result, _ = PassManager(name, check="never").run(module)
    except PassError as refusal:
        refusals.append(refusal)
    if refusals:
        assert refusals[0].rule
        return
    assert [v.type for v in result.main.inputs] == [v.type for v in module.main.inputs]
    assert [v.type for v in result.main.outputs] == [v.type for v in module.main.outputs]


@pytest.mark.parametrize("make", [modules, transformers])
@SLOW_IS_FINE
@given(data=st.data())
def test_text_of_random_module_reads_back(make: object, data: st.DataObject) -> None:
    module = data.draw(make())  # type: ignore[operator]
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


@cache
def _prepared(seed: int, pipeline: str) -> Module:
    return PassManager(pipeline, check="never").run(random_transformer(seed))[0]


@pytest.mark.parametrize("name", sorted(set(OWN_PASSES) - ELSEWHERE))
def test_random_modules_give_the_pass_something_to_do(name: str) -> None:
    changed = 0
    for seed in range(40):
        raised = [_prepared(seed, pipeline) for pipeline in ("cleanup,raise", "raise-linear,raise-attention")]
        for module in (random_module(seed, 20), random_transformer(seed), *raised):
            changed += PassManager(name, check="never").run(module)[1].rows[0].changed
            if changed >= 3:
                return
    pytest.fail(f"{name} changed {changed} of 160 modules")
