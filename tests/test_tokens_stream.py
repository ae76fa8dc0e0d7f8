"""Tokens and layers found by structure in models of the zoo: the same from ``torch.export`` and from an ONNX file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_harness import Commands

import trimtab
from producers import Source, exported, write_dynamo
from trimtab.errors import PassError
from trimtab.frontend.onnx import from_onnx
from trimtab.ir import Module, interpret, verify
from trimtab.passes.base import Context
from trimtab.passes.merge_tokens import MergeTokens
from trimtab.passes.tokens.reduction import with_attention
from trimtab.passes.tokens.stream import Blocker, Stream, find_stream
from zoo_models import get

DENSE = "has a row for each token"


@dataclass(frozen=True)
class Found:
    """What is to be found in a model.

    Attributes:
        layers: how many attention layers.
        tokens: in the residual stream.
        protected: leading tokens.
        blocked: for each layer, a part of the first reason why it cannot be reduced; "" where it can.
        merge: how many tokens to merge in each layer when both doors are compared; 0 for no comparison.
    """

    layers: int
    tokens: int
    protected: int
    blocked: tuple[str, ...]
    merge: int = 4


_GRID = "reshape splits the axis of tokens"
_FOUND = {
    "vit": Found(2, 17, 1, ("", "")),
    "deit": Found(2, 18, 2, ("", "")),
    "beit": Found(2, 17, 1, ("a relative position bias for each pair of tokens", "")),
    "dinov2": Found(2, 17, 1, (DENSE, DENSE)),
    "clip-vision": Found(2, 17, 1, (DENSE, DENSE)),
    # Its head pools by an attention that joins batch and heads in one axis.
    "siglip-vision": Found(2, 16, 0, ("operands of 3 axes", "operands of 3 axes"), merge=0),
    "bert": Found(2, 12, 1, (DENSE, DENSE)),
    "distilbert": Found(2, 12, 1, ("", "")),
    "dpt": Found(4, 17, 1, (_GRID,) * 4),
    "segformer": Found(1, 4, 0, (_GRID,), merge=0),
    "mobilevit": Found(2, 64, 0, (_GRID, _GRID), merge=0),
}
_REFUSED = {"swin": (_GRID,), "gpt2": ("attention is causal", "")}
"""Models without any layer, with a part of the reason that each door gives. The exporter to ONNX writes causal
attention with padding as a mask of numbers, which is not quite the same."""
_BY_TORCH_ALONE = frozenset({"dpt", "segformer", "mobilevit", "swin"})
"""Convolutional or windowed models, which take the exporter to ONNX ten seconds each and are refused."""


@dataclass(frozen=True)
class Doors:
    """One model by torch.export and, of most, by ONNX, with the file that this door read."""

    modules: tuple[Module, ...]
    file: Path
    inputs: list[torch.Tensor]


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory):
    """Makes a model with a fixed number of tokens and a symbolic batch from both doors, once a name."""
    made: dict[str, Doors] = {}

    def make(name: str) -> Doors:
        if name not in made:
            entry = get(name)
            source = Source(replace(entry, dynamic_axes={key: {0: "batch"} for key in entry.dynamic_axes}))
            file = tmp_path_factory.mktemp(name) / "model.onnx"
            with _one_thread():
                modules = [exported(source)]
                if name not in _BY_TORCH_ALONE:
                    write_dynamo(source, file)
                    modules.append(from_onnx(file))
            made[name] = Doors(tuple(modules), file, list(entry.inputs(3, 12).values()))
        return made[name]

    return make


@pytest.mark.parametrize("name", _FOUND)
def test_both_doors_find_the_same(doors, name: str) -> None:
    expected, model = _FOUND[name], doors(name)
    streams = [find_stream(with_attention(module)) for module in model.modules]
    for stream in streams:
        assert (len(stream.layers), stream.tokens, stream.protected) == (
            expected.layers, expected.tokens, expected.protected)  # fmt: skip
        for layer, reason in zip(stream.layers, expected.blocked, strict=True):
            assert reason in (layer.blockers[0].reason if layer.blockers else "")
            assert bool(reason) == bool(layer.blockers)
        assert _comparable(stream) == _comparable(streams[0])


@pytest.mark.parametrize("name", [name for name, found in _FOUND.items() if found.merge])
def test_merging_gives_the_same_from_both_doors(doors, name: str) -> None:
    expected, model = _FOUND[name], doors(name)
    pass_ = MergeTokens(r=expected.merge, unmerge=all(expected.blocked))
    outputs = []
    for module in model.modules:
        reduced = module.copy()
        context = Context()
        assert pass_.run(reduced, context)
        verify(reduced)
        assert [str(value.type.shape[1:]) for value in reduced.main.outputs] == [
            str(value.type.shape[1:]) for value in module.main.outputs]  # fmt: skip
        outputs.append(interpret(reduced, model.inputs))
    original = interpret(model.modules[0], model.inputs)
    for first, second, whole in zip(outputs[0], outputs[-1], original, strict=True):
        assert (first - second).abs().max() <= 1e-4 * max(1.0, float(first.abs().max()))
        assert first.isfinite().all()
        assert (first - whole).abs().max() > 1e-6  # something was merged


@pytest.mark.parametrize("name", _REFUSED)
def test_models_without_a_place_are_refused_in_words(doors, name: str) -> None:
    model = doors(name)
    for module, reason in zip(model.modules, _REFUSED[name], strict=True):
        before = module.copy()
        with pytest.raises(PassError) as caught:
            MergeTokens(r=1).run(module, Context())
        text = str(caught.value)
        assert reason in text
        assert "tokens cannot be reduced" in text
        assert re.search(r"\.py:\d+", text)  # the user's line
        assert module == before


@pytest.mark.parametrize("name", ["segformer", "mobilevit", "bert", "dpt", "siglip-vision"])
def test_dense_models_are_refused_with_the_reason(doors, name: str) -> None:
    model = doors(name)
    for module in model.modules:
        with pytest.raises(PassError, match=r"tokens cannot be reduced") as caught:
            MergeTokens(r=1).run(module.copy(), Context())
        assert _FOUND[name].blocked[-1] in str(caught.value)
        assert "unmerge=true" in str(caught.value)
        assert name == "bert" or re.search(r"\.py:\d+", str(caught.value))


def test_an_exported_file_is_compiled_with_merged_tokens(
    doors, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, output = doors("vit"), tmp_path / "m.trim"
    passes = "cleanup,merge-tokens{r=4}"
    Commands(capsys).ok("compile", model.file, "--passes", passes, "-o", output)
    session = trimtab.load(output)
    reduced = trimtab.optimize(from_onnx(model.file), passes, check="never").module
    whole = interpret(model.modules[0], model.inputs)[0].numpy()
    for batch in (1, 3):
        pixels = model.inputs[0][:batch].numpy()
        (expected,) = interpret(reduced, [pixels])
        found = np.asarray(session(pixels))
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
        assert np.abs(found - whole[:batch]).max() > 1e-4


def _comparable(stream: Stream) -> list[object]:
    """What is found without names of values and outputs, which an exporter chooses."""
    return [
        [[_reason(blocker) for blocker in blockers] for layer in stream.layers
         for blockers in (layer.blockers, layer.entry_blockers)],
        [_reason(blocker) for blocker in stream.refused],
    ]  # fmt: skip


def _reason(blocker: Blocker) -> str:
    return blocker.reason if blocker.op is not None else re.sub(r"^the output \S+,", "the output,", blocker.reason)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
