"""How many attentions, norms and activations a PyTorch model applies, found without any part of this compiler.

    from architecture_counts import count_by_configuration, count_by_running

    count_by_running(model, inputs)         # {"attention": 12, "layer_norm": 25, "gelu": 12}
    count_by_configuration(model)           # the same, from the numbers of layers in the model's configuration

The first watches one run of the model: calls of torch's functions, and modules that spell a norm or an activation out;
autograd tells which of them the outputs depend on. The second knows the architectures as published.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Counts = Mapping[str, int]

_FUNCTIONS: dict[Any, str] = {
    F.scaled_dot_product_attention: "attention",
    F.multi_head_attention_forward: "attention",
    F.softmax: "attention",  # no model of the zoo has a softmax of another purpose: the configurations agree
    torch.softmax: "attention",
    Tensor.softmax: "attention",
    F.layer_norm: "layer_norm",
    F.rms_norm: "rms_norm",
    F.group_norm: "group_norm",
    F.batch_norm: "batch_norm",
    F.gelu: "gelu",
    F.silu: "silu",
    F.relu: "relu",
    torch.relu: "relu",
    torch.tanh: "tanh",
    F.softplus: "softplus",
    torch.sigmoid: "sigmoid",
}
_SPELLED_OUT = {
    "RMSNorm": "rms_norm",
    "T5LayerNorm": "rms_norm",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "gelu_sigmoid",
}
"""Endings of the names of modules that compute a norm or an activation from elementary functions."""
_ELEMENTARY = (torch.rsqrt, torch.erf, Tensor.rsqrt, Tensor.erf)
"""Functions that only a norm or an activation calls: outside of the modules above one has been overlooked."""


class _Watch(TorchFunctionMode):
    """Notes the kind and the autograd node of every call that counts, but of none that is made inside of another."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []
        self.depth = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        result = function(*args, **kwargs)
        if self.depth:
            return result
        if function in _ELEMENTARY:
            raise ValueError(f"{function.__name__} is called by a module that is not known: add it to _SPELLED_OUT")
        kind = _FUNCTIONS.get(function, "")
        if kind == "gelu" and kwargs.get("approximate", "none") != "none":
            kind = f"gelu_{kwargs['approximate']}"
        self.note(kind, result)
        return result

    def enter(self, module: nn.Module, args: Any) -> None:
        self.depth += 1

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self.depth -= 1
        self.note(_spells(module), result)

    def note(self, kind: str, result: Any) -> None:
        if kind and not self.depth:
            self.seen.append((kind, (result[0] if isinstance(result, tuple) else result).grad_fn))


def _spells(module: nn.Module) -> str:
    """The norm or activation that a module spells out; empty when it does not."""
    return next((kind for ending, kind in _SPELLED_OUT.items() if type(module).__name__.endswith(ending)), "")


def count_by_running(model: nn.Module, inputs: Sequence[Tensor]) -> Counts:
    """Run ``model`` once and count what its outputs depend on.

    Raises:
        ValueError: a module spells out a norm or an activation and is not known to.
    """
    watch = _Watch()
    hooks = []
    for module in model.modules():
        if _spells(module):
            hooks += [module.register_forward_pre_hook(watch.enter), module.register_forward_hook(watch.leave)]
    try:
        with torch.enable_grad(), _watch_rotations(model, watch), watch:
            outputs = [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
    finally:
        for hook in hooks:
            hook.remove()
    needed = _history(outputs)
    return Counter(kind for kind, node in watch.seen if node in needed)


def _history(outputs: Sequence[Tensor]) -> set[Any]:
    """The nodes of autograd's graph that lead to the outputs."""
    waiting = [output.grad_fn for output in outputs]
    found: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return found


@contextmanager
def _watch_rotations(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """Notes the queries and the keys that transformers' function turns by their positions."""

    def watched(rotate: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def call(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            rotated = rotate(*args, **kwargs)
            for part in rotated:
                watch.note("rotary_embedding", part)
            return rotated

        return call

    with ExitStack() as patches:
        for name in {type(module).__module__ for module in model.modules()}:
            rotate = getattr(sys.modules[name], "apply_rotary_pos_emb", None)
            if rotate is not None:
                patches.enter_context(patch.object(sys.modules[name], "apply_rotary_pos_emb", watched(rotate)))
        yield


def count_by_configuration(model: nn.Module) -> Counts:
    """What the published architecture has, given the layers in the configuration of a zoo model.

    Raises:
        KeyError: the architecture is not in the table.
    """
    inner: Any = model.model
    counts = _ARCHITECTURES[type(inner).__name__](inner.config)
    if "pooler_output" not in model.outputs:
        counts.pop("tanh", None)  # which only poolers have
    return counts


def _blocks(layers: int, norms: int, activation: str = "gelu", **others: int) -> dict[str, int]:
    """``layers`` blocks with an attention and an activation each, ``norms`` layer norms in all."""
    return {"attention": layers, "layer_norm": norms, activation: layers, **others}


def _vit(c: Any) -> dict[str, int]:
    """Two norms a block and one at the end."""
    return _blocks(c.num_hidden_layers, 2 * c.num_hidden_layers + 1)


def _bert(c: Any) -> dict[str, int]:
    """Two norms a block and one after the embeddings; a pooler with tanh."""
    return _vit(c) | {"tanh": 1}


def _llama(c: Any) -> dict[str, int]:
    layers = c.num_hidden_layers
    return {"attention": layers, "rms_norm": 2 * layers + 1, "silu": layers, "rotary_embedding": 2 * layers}


def _swin(c: Any) -> dict[str, int]:
    """Beside two a block, norms after the embeddings, in each merge of patches, and at the end."""
    return _blocks(sum(c.depths), 2 * sum(c.depths) + len(c.depths) + 1)


def _convnext(c: Any) -> dict[str, int]:
    """Beside one a block, norms after the embeddings, before each later stage, and after pooling."""
    return {"layer_norm": sum(c.depths) + len(c.depths) + 1, "gelu": sum(c.depths)}


def _resnet(c: Any) -> dict[str, int]:
    """Three convolutions a bottleneck, one at the start, and one for the shortcut of each stage, without ReLU."""
    convolutions = 3 * sum(c.depths) + 1
    return {"batch_norm": convolutions + len(c.depths), "relu": convolutions}


def _mobilevit(c: Any) -> dict[str, int]:
    """Seven inverted residuals of three convolutions, the last linear; three transformers of 2, 4 and 3 blocks between
    three more convolutions each; one convolution at the start and one at the end."""
    blocks, transformers, residuals = 2 + 4 + 3, 3, 7
    convolutions = 3 * residuals + 3 * transformers + 2
    return {
        "attention": blocks,
        "layer_norm": 2 * blocks + transformers,
        "batch_norm": convolutions,
        "silu": blocks + convolutions - residuals,
    }


def _segformer(c: Any) -> dict[str, int]:
    """Norms: two a block, one more where keys are reduced, and two a stage. The head: a batch norm and a ReLU."""
    blocks = sum(c.depths)
    reduced = sum(depth for depth, ratio in zip(c.depths, c.sr_ratios, strict=True) if ratio > 1)
    return _blocks(blocks, 2 * blocks + reduced + 2 * len(c.depths), batch_norm=1, relu=1)


def _dpt(c: Any) -> dict[str, int]:
    """A ViT whose last norm nothing reads, a projection with GELU for each of four stages, seven residual units and a
    head with two ReLUs each."""
    layers, stages = c.num_hidden_layers, len(c.backbone_out_indices)
    return _blocks(layers, 2 * layers, relu=2 * (2 * stages - 1) + 2) | {"gelu": layers + stages}


def _siglip(c: Any) -> dict[str, int]:
    """A ViT whose head is an attention with a block of its own."""
    layers = c.num_hidden_layers
    return _blocks(layers + 1, 2 * layers + 2, "gelu_tanh") | {"gelu_tanh": layers + 1}


def _wav2vec2(c: Any) -> dict[str, int]:
    """Convolutions with GELU, the first with a group norm; norms before the projection and after the positions."""
    layers = c.num_hidden_layers
    return _blocks(layers, 2 * layers + 2, group_norm=1) | {"gelu": layers + len(c.conv_dim) + 1}


_ARCHITECTURES: dict[str, Callable[[Any], dict[str, int]]] = {
    "ViTForImageClassification": _vit,
    "DeiTForImageClassificationWithTeacher": _vit,
    "BeitForImageClassification": _vit,
    "Dinov2Model": _vit,
    "SwinModel": _swin,
    "ConvNextForImageClassification": _convnext,
    "ResNetForImageClassification": _resnet,
    "MobileViTForImageClassification": _mobilevit,
    "SegformerForSemanticSegmentation": _segformer,
    "DPTForDepthEstimation": _dpt,
    "CLIPVisionModelWithProjection": lambda c: _blocks(
        c.num_hidden_layers, 2 * c.num_hidden_layers + 2, "gelu_sigmoid"
    ),
    "CLIPTextModelWithProjection": lambda c: _blocks(
        c.num_hidden_layers, 2 * c.num_hidden_layers + 1, "gelu_sigmoid"
    ),
    "SiglipVisionModel": _siglip,
    "BertModel": _bert,
    "DistilBertForSequenceClassification": lambda c: _blocks(c.n_layers, 2 * c.n_layers + 1, relu=1),
    "RobertaModel": _bert,
    "AlbertModel": lambda c: _blocks(c.num_hidden_layers, 2 * c.num_hidden_layers + 1, "gelu_tanh", tanh=1),
    "ElectraModel": _vit,
    "MPNetModel": _bert,
    "T5EncoderModel": lambda c: {
        "attention": c.num_layers, "rms_norm": 2 * c.num_layers + 1, "gelu_tanh": c.num_layers,
    },
    "GPT2LMHeadModel": lambda c: _blocks(c.n_layer, 2 * c.n_layer + 1, "gelu_tanh"),
    "LlamaForCausalLM": _llama,
    "Qwen2ForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "PhiForCausalLM": lambda c: _blocks(
        c.num_hidden_layers, c.num_hidden_layers + 1, "gelu_tanh", rotary_embedding=2 * c.num_hidden_layers
    ),
    "WhisperEncoder": lambda c: _vit(c) | {"gelu": c.num_hidden_layers + 2},
    "Wav2Vec2Model": _wav2vec2,
    "MambaForCausalLM": lambda c: {
        "rms_norm": c.num_hidden_layers + 1, "silu": 2 * c.num_hidden_layers, "softplus": c.num_hidden_layers,
    },
}  # fmt: skip
