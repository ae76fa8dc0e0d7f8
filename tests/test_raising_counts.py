"""Attention, norms and activations are found again, as many as the architecture has, whoever took them apart."""

from __future__ import annotations

import re
from pathlib import Path

import onnxruntime
import pytest
import torch
from hand_written_onnx import HandWritten, hand_written

from architecture_counts import count_by_configuration, count_by_running
from producers import PRODUCERS, Source
from raising_counts import PIPELINE, architecture, count, counts_text, measure
from trimtab import from_onnx, interpret, optimize
from zoo_models import bert_base, deit_s, get, zoo

PAGE = Path(__file__).parent.parent / "docs" / "raising.md"

every_model = pytest.mark.parametrize("name", [entry.name for entry in zoo()])
either_attention = pytest.mark.parametrize("eager", [False, True], ids=["fused", "eager"])


@every_model
@either_attention
def test_running_a_model_confirms_its_configuration(name: str, eager: bool) -> None:
    source = Source(get(name), eager)
    assert dict(count_by_running(source.model, source.sample)) == dict(count_by_configuration(source.model))


@pytest.mark.parametrize(("name", "eager"), [("deit", False), ("bert", False), ("bert", True), ("llama", False)])
def test_every_producer_gives_the_counts_of_the_architecture(name: str, eager: bool) -> None:
    """All models: docs/raising.md."""
    source = Source(get(name), eager)
    own = architecture(source)
    assert {producer: str(measure(source, producer, own)) for producer in PRODUCERS} == dict.fromkeys(PRODUCERS, "same")


@either_attention
@every_model
def test_the_legacy_exporter_gives_the_counts_of_the_architecture(name: str, eager: bool) -> None:
    """The quickest producer, and the one that leaves the smallest pieces."""
    source = Source(get(name), eager)
    assert str(measure(source, "onnx legacy", architecture(source))) == "same"


@pytest.mark.parametrize("written", hand_written(), ids=lambda written: written.name)
def test_hand_written_models_are_raised(written: HandWritten) -> None:
    imported = from_onnx(written.proto)
    assert not set(count(imported)) & set(written.counts)
    module = optimize(imported, PIPELINE).module
    assert count(module) == written.counts
    session = onnxruntime.InferenceSession(written.proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, dict(written.inputs))
    (found,) = interpret(module, [torch.from_numpy(x) for x in written.inputs.values()])
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_the_page_has_every_model_with_its_counts_and_no_exception() -> None:
    rows = re.findall(r"^\| ([\w-]+) \| (\d[^|]*) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    entries = (*zoo(), deit_s(), bert_base())
    assert [name for name, _, _ in rows] == [entry.name for entry in entries]
    for entry, (_, counts, cells) in zip(entries, rows, strict=True):
        assert sorted(counts.split(", ")) == sorted(counts_text(count_by_configuration(entry.build())).split(", "))
        assert cells.split(" | ") == ["same"] * (2 * len(PRODUCERS))
