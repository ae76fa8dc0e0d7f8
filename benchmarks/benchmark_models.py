"""The models that benchmarks time, each with the sizes of its inputs.

    from benchmark_models import BENCHMARK_MODELS

    entry = BENCHMARK_MODELS["deit-s-b8"]
    model, inputs = entry.build(), entry.inputs()       # a torch.nn.Module, {name: tensor} in the order of forward

Architectures of Hugging Face with random weights, and MiniLM with its trained ones; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from zoo_models import (
    ZooModel,
    bert_base,
    convnext_t,
    deit_s,
    get,
    gpt2_small,
    llama_1b,
    minilm_pretrained,
    resnet50,
    swin_t,
    vit_b,
)

Kind = Literal["transformer", "convolution"]


@dataclass(frozen=True)
class BenchmarkModel:
    """A model with fixed sizes.

    Attributes:
        name: what the command line calls it.
        make: the model of the zoo; a function, because full-size models are described when they are asked for.
        batch: size of the first axis.
        length: tokens of a text model, or positions of the cache of a decode step; 0 for images.
        kind: which mean it counts in.
        cache: layers, heads and channels of a head; then the model computes one token, with the keys and values of
            ``length`` earlier positions as inputs and outputs.
    """

    name: str
    make: Callable[[], ZooModel]
    batch: int = 1
    length: int = 0
    kind: Kind = "transformer"
    cache: tuple[int, int, int] | None = None

    def build(self) -> nn.Module:
        """The module, always with the same weights, in float32 and evaluation mode."""
        model = self.make().build()
        return DecodeStep(model.model).eval() if self.cache else model

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Random inputs by name, the same at every call."""
        entry = self.make()
        if self.cache is None:
            return entry.inputs(self.batch, self.length or 12, dtype)
        layers, heads, channels = self.cache
        generator = torch.Generator().manual_seed(self.length)
        past = {
            f"past_{part}_{layer}": torch.randn(self.batch, heads, self.length, channels, generator=generator).to(dtype)
            for layer in range(layers)
            for part in ("key", "value")
        }
        return {"input_ids": entry.inputs(self.batch, 1)["input_ids"], **past}


class DecodeStep(nn.Module):
    """One step of a decoder with its cache as plain tensors.

    Takes ``input_ids`` i64[batch, 1] and for each layer the keys and the values, f32[batch, heads, past, channels].
    Returns the logits f32[batch, 1, vocabulary] and for each layer the keys and values with one position more.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(zip(past[::2], past[1::2], strict=True))
        result = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        present = [part for layer in result.past_key_values.layers for part in (layer.keys, layer.values)]
        return (result.logits, *present)


_ALL = (
    BenchmarkModel("deit-s", deit_s),
    BenchmarkModel("deit-s-b8", deit_s, batch=8),
    BenchmarkModel("vit-b", vit_b),
    BenchmarkModel("swin-t", swin_t),
    BenchmarkModel("bert-base", bert_base, length=128),
    BenchmarkModel("minilm-l6", minilm_pretrained, length=128),
    BenchmarkModel("minilm-l6-s16", minilm_pretrained, length=16),
    BenchmarkModel("gpt2-prefill", gpt2_small, length=128),
    BenchmarkModel("gpt2-decode", gpt2_small, length=128, cache=(12, 12, 64)),
    BenchmarkModel("convnext-t", convnext_t, kind="convolution"),
    BenchmarkModel("resnet-50", resnet50, kind="convolution"),
)

BENCHMARK_MODELS: dict[str, BenchmarkModel] = {entry.name: entry for entry in _ALL}
"""By name, in the order of the tables."""

LARGE_MODELS: dict[str, BenchmarkModel] = {
    "llama-1b-decode": BenchmarkModel("llama-1b-decode", llama_1b, length=128, cache=(22, 4, 64)),
}
"""Too large for benchmarks of many systems: gigabytes of weights, minutes to build and to compile."""

TINY_MODELS: dict[str, BenchmarkModel] = {
    "tiny-bert": BenchmarkModel("tiny-bert", lambda: get("bert"), length=12),
    "tiny-gpt2-decode": BenchmarkModel("tiny-gpt2-decode", lambda: get("gpt2"), length=12, cache=(2, 4, 16)),
    "tiny-resnet": BenchmarkModel("tiny-resnet", lambda: get("resnet"), kind="convolution"),
}
"""To try the benchmark itself: they take a second to build, and their times mean nothing."""
