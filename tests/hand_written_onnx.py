"""Transformers written in ONNX as exporters of 2019 to 2022 wrote them, before ONNX had layer norm, GELU or attention.

    for written in hand_written():
        written.proto, written.inputs, written.counts

Each has two blocks of a well-known architecture. They differ in how a norm, an activation, an attention or a mask is
spelled, and in the operator set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]

BLOCKS, BATCH, LENGTH, WIDTH, HEADS, HIDDEN = 2, 2, 5, 16, 4, 24
HEAD = WIDTH // HEADS
LONGEST = 32
"""Upper bound of the length in models with a buffer for the causal mask."""


@dataclass(frozen=True)
class HandWritten:
    """A model, inputs for it, and how many attentions, norms and activations it has by construction."""

    name: str
    proto: onnx.ModelProto
    inputs: Mapping[str, Array]
    counts: Mapping[str, int]


class Writer:
    """Collects nodes and initializers; a call adds a node and returns the name of its (first) result."""

    def __init__(self, opset: int, seed: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def __call__(self, kind: str, *operands: str | float | Array, **attributes: Any) -> str:
        return self.several(kind, *operands, count=1, **attributes)[0]

    def several(self, kind: str, *operands: str | float | Array, count: int, **attributes: Any) -> list[str]:
        inputs = [operand if isinstance(operand, str) else self.constant(operand) for operand in operands]
        outputs = [f"{kind}_{len(self.nodes)}.{index}" for index in range(count)]
        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs

    def constant(self, value: float | Array) -> str:
        name = f"c{len(self.weights)}"
        array = np.asarray(value, np.float32) if isinstance(value, float) else np.asarray(value)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int, centre: float = 0.0) -> str:
        scale = 0.3 if len(shape) == 1 else 1 / math.sqrt(shape[0])
        return self.constant((centre + scale * self._random.standard_normal(shape)).astype(np.float32))

    def linear(self, x: str, into: int, out: int) -> str:
        return self("Add", self("MatMul", x, self.weight(into, out)), self.weight(out))

    def unsqueeze(self, x: str, *axes: int) -> str:
        """Axes were an attribute before opset 13."""
        if self.opset < 13:
            return self("Unsqueeze", x, axes=list(axes))
        return self("Unsqueeze", x, np.array(axes))

    def split(self, x: str, parts: int, axis: int) -> list[str]:
        return self.several("Split", x, count=parts, axis=axis)

    def size(self, x: str, axis: int) -> str:
        """The size of an axis as a tensor of one element, as PyTorch's tracer writes ``x.size(axis)``."""
        return self.unsqueeze(self("Gather", self("Shape", x), np.array(axis), axis=0), 0)

    def reshape(self, x: str, *sizes: str | int) -> str:
        parts = [size if isinstance(size, str) else np.array([size]) for size in sizes]
        return self("Reshape", x, self("Concat", *parts, axis=0))

    def split_heads(self, x: str, order: Sequence[int] = (0, 2, 1, 3), heads: int = HEADS) -> str:
        split = self.reshape(x, self.size(x, 0), self.size(x, 1), heads, HEAD)
        return self("Transpose", split, perm=list(order))

    def join_heads(self, x: str) -> str:
        x = self("Transpose", x, perm=[0, 2, 1, 3])
        return self.reshape(x, self.size(x, 0), self.size(x, 1), WIDTH)


# -- norms -------------------------------------------------------------------------------------------------------------


def _mean(w: Writer, x: str) -> str:
    return w("ReduceMean", x, axes=[-1], keepdims=1)


def layer_norm_pytorch(w: Writer, x: str, eps: float = 1e-5) -> str:
    """PyTorch 1.5 and later."""
    centred = w("Sub", x, _mean(w, x))
    root = w("Sqrt", w("Add", _mean(w, w("Pow", centred, 2.0)), eps))
    return w("Add", w("Mul", w("Div", centred, root), w.weight(WIDTH, centre=1.0)), w.weight(WIDTH))


def layer_norm_two_differences(w: Writer, x: str, eps: float = 1e-12) -> str:
    """PyTorch 1.4 and before: the difference from the mean is taken twice, and cast before it is squared."""
    mean = _mean(w, x)
    squared = w("Pow", w("Cast", w("Sub", x, mean), to=TensorProto.FLOAT), 2.0)
    root = w("Sqrt", w("Add", _mean(w, squared), eps))
    normed = w("Div", w("Sub", x, mean), root)
    return w("Add", w("Mul", w.weight(WIDTH, centre=1.0), normed), w.weight(WIDTH))


def layer_norm_reciprocal(w: Writer, x: str, eps: float = 1e-6) -> str:
    """A product for the square, the reciprocal of the root."""
    centred = w("Sub", x, _mean(w, x))
    variance = _mean(w, w("Mul", centred, centred))
    inverse = w("Reciprocal", w("Sqrt", w("Add", eps, variance)))
    return w("Add", w.weight(WIDTH), w("Mul", w("Mul", inverse, centred), w.weight(WIDTH, centre=1.0)))


def layer_norm_tensorflow(w: Writer, x: str, eps: float = 1e-12) -> str:
    """TensorFlow: ``x inv + (bias - mean inv)`` with ``inv = weight / sqrt(var + eps)``."""
    mean = _mean(w, x)
    difference = w("Sub", x, mean)
    variance = _mean(w, w("Mul", difference, difference))
    inverse = w("Mul", w("Reciprocal", w("Sqrt", w("Add", variance, eps))), w.weight(WIDTH, centre=1.0))
    return w("Add", w("Mul", x, inverse), w("Sub", w.weight(WIDTH), w("Mul", mean, inverse)))


def layer_norm_expanded(w: Writer, x: str, eps: float = 1e-5) -> str:
    """``(x inv - mean inv) weight + bias``."""
    mean = _mean(w, x)
    difference = w("Sub", x, mean)
    inverse = w("Div", 1.0, w("Sqrt", w("Add", _mean(w, w("Pow", difference, 2.0)), eps)))
    normed = w("Sub", w("Mul", x, inverse), w("Mul", mean, inverse))
    return w("Add", w("Mul", normed, w.weight(WIDTH, centre=1.0)), w.weight(WIDTH))


def rms_norm_quotient(w: Writer, x: str, eps: float = 1e-6) -> str:
    root = w("Sqrt", w("Add", _mean(w, w("Pow", x, 2.0)), eps))
    return w("Mul", w("Div", x, root), w.weight(WIDTH, centre=1.0))


def rms_norm_inverse(w: Writer, x: str, eps: float = 1e-6) -> str:
    """T5 and Llama: ``weight * (x * (1 / sqrt(mean(x^2) + eps)))``."""
    inverse = w("Div", 1.0, w("Sqrt", w("Add", _mean(w, w("Mul", x, x)), eps)))
    return w("Mul", w.weight(WIDTH, centre=1.0), w("Mul", x, inverse))


# -- activations -------------------------------------------------------------------------------------------------------


def _erf_gate(w: Writer, x: str) -> str:
    return w("Add", w("Erf", w("Div", x, math.sqrt(2.0))), 1.0)


def gelu_half_last(w: Writer, x: str) -> str:
    return w("Mul", w("Mul", x, _erf_gate(w, x)), 0.5)


def gelu_half_first(w: Writer, x: str) -> str:
    return w("Mul", w("Mul", x, 0.5), _erf_gate(w, x))


def gelu_half_on_gate(w: Writer, x: str) -> str:
    return w("Mul", x, w("Mul", 0.5, _erf_gate(w, x)))


def gelu_product(w: Writer, x: str) -> str:
    """The argument multiplied by the inverse root, one added from the left, halved by a division."""
    gate = w("Add", 1.0, w("Erf", w("Mul", x, math.sqrt(0.5))))
    return w("Div", w("Mul", gate, x), 2.0)


def gelu_tanh_power(w: Writer, x: str) -> str:
    """GPT-2: ``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``."""
    inner = w("Add", x, w("Mul", w("Pow", x, 3.0), 0.044715))
    gate = w("Add", w("Tanh", w("Mul", inner, math.sqrt(2 / math.pi))), 1.0)
    return w("Mul", w("Mul", x, 0.5), gate)


def gelu_tanh_factored(w: Writer, x: str) -> str:
    """Megatron: ``x 0.5 (1 + tanh(0.79788456 x (1 + 0.044715 x x)))``."""
    inner = w("Add", 1.0, w("Mul", w("Mul", 0.044715, x), x))
    gate = w("Add", 1.0, w("Tanh", w("Mul", w("Mul", 0.79788456, x), inner)))
    return w("Mul", x, w("Mul", 0.5, gate))


def gelu_tanh_tensorflow(w: Writer, x: str) -> str:
    """BERT of Google: ``x * (0.5 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))))`` with the cube as two products."""
    cube = w("Mul", w("Mul", x, x), x)
    inner = w("Mul", math.sqrt(2 / math.pi), w("Add", w("Mul", 0.044715, cube), x))
    return w("Mul", x, w("Mul", 0.5, w("Add", 1.0, w("Tanh", inner))))


def gelu_sigmoid(w: Writer, x: str) -> str:
    """CLIP: ``x sigmoid(1.702 x)``."""
    return w("Mul", x, w("Sigmoid", w("Mul", x, 1.702)))


def silu(w: Writer, x: str) -> str:
    return w("Mul", x, w("Sigmoid", x))


# -- masks: a function of the scores -----------------------------------------------------------------------------------


def mask_none(w: Writer, scores: str) -> str:
    return scores


def mask_additive(w: Writer, scores: str) -> str:
    """BERT: ``scores + (1 - mask) * -10000``."""
    wide = w("Cast", w.unsqueeze("mask", 1, 2), to=TensorProto.FLOAT)
    return w("Add", scores, w("Mul", w("Sub", 1.0, wide), -10000.0))


def mask_additive_first(w: Writer, scores: str) -> str:
    """The same with the smallest float32, added from the left."""
    wide = w("Cast", w.unsqueeze("mask", 1, 2), to=TensorProto.FLOAT)
    return w("Add", w("Mul", w("Sub", 1.0, wide), float(np.finfo(np.float32).min)), scores)


def mask_where(w: Writer, scores: str) -> str:
    """GPT-2 in PyTorch 1.x: ``where(triangle, scores, -10000)``, the triangle cut from a larger buffer of bytes."""
    triangle = w.constant(np.tril(np.ones((LONGEST, LONGEST), np.uint8))[None, None])
    for axis in (2, 3):
        triangle = w("Slice", triangle, np.array([0]), w.size(scores, 3), np.array([axis]), np.array([1]))
    return w("Where", w("Cast", triangle, to=TensorProto.BOOL), scores, -10000.0)


def mask_fill(w: Writer, scores: str) -> str:
    """DistilBERT in PyTorch 1.x: ``masked_fill(mask == 0, -inf)``."""
    hidden = w("Equal", w.unsqueeze("mask", 1, 2), np.array(0))
    shape = w("Shape", scores)
    return w("Where", w("Cast", w("Expand", hidden, shape), to=TensorProto.BOOL), float("-inf"), scores)


# -- attentions: queries, keys and values [batch, length, heads * head] to the same -----------------------------------


Mask = Callable[[Writer, str], str]


def _weighted(w: Writer, scores: str, v: str, mask: Mask) -> str:
    return w.join_heads(w("MatMul", w("Softmax", mask(w, scores), axis=3), w.split_heads(v)))


def attention_divided(w: Writer, q: str, k: str, v: str, mask: Mask) -> str:
    """BERT: the scores divided."""
    scores = w("MatMul", w.split_heads(q), w.split_heads(k, (0, 2, 3, 1)))
    return _weighted(w, w("Div", scores, math.sqrt(HEAD)), v, mask)


def attention_multiplied(w: Writer, q: str, k: str, v: str, mask: Mask) -> str:
    """ViT of timm: the scores multiplied, the keys transposed in two steps."""
    keys = w("Transpose", w.split_heads(k), perm=[0, 1, 3, 2])
    return _weighted(w, w("Mul", w("MatMul", w.split_heads(q), keys), HEAD**-0.5), v, mask)


def attention_scaled_query(w: Writer, q: str, k: str, v: str, mask: Mask) -> str:
    """DistilBERT: the queries divided after the heads are split."""
    queries = w("Div", w.split_heads(q), math.sqrt(HEAD))
    return _weighted(w, w("MatMul", queries, w.split_heads(k, (0, 2, 3, 1))), v, mask)


def attention_scaled_early(w: Writer, q: str, k: str, v: str, mask: Mask) -> str:
    """BART: the queries multiplied before the heads are split; batch and heads are one axis in the products."""
    queries = w.split_heads(w("Mul", q, HEAD**-0.5))
    keys, values = w.split_heads(k), w.split_heads(v)
    batch, length = w.size(keys, 0), w.size(keys, 2)
    queries, keys, values = (w.reshape(part, -1, length, HEAD) for part in (queries, keys, values))
    scores = w("MatMul", queries, w("Transpose", keys, perm=[0, 2, 1]))
    scores = mask(w, w.reshape(scores, batch, HEADS, length, length))
    weights = w("Softmax", w.reshape(scores, -1, length, length), axis=2)
    return w.join_heads(w.reshape(w("MatMul", weights, values), batch, HEADS, length, HEAD))


def attention_roots(w: Writer, q: str, k: str, v: str, mask: Mask) -> str:
    """PyTorch's scaled_dot_product_attention: the fourth root of the head size on both sides, computed from shapes."""
    queries, keys = w.split_heads(q), w.split_heads(k, (0, 2, 3, 1))
    width = w("Cast", w.size(queries, -1), to=TensorProto.FLOAT)
    root = w("Sqrt", w("Div", 1.0, w("Sqrt", width)))
    scores = w("MatMul", w("Mul", queries, root), w("Mul", keys, root))
    return _weighted(w, scores, v, mask)


# -- architectures -----------------------------------------------------------------------------------------------------


Norm = Callable[[Writer, str], str]
Activation = Callable[[Writer, str], str]
Attention = Callable[[Writer, str, str, str, Mask], str]


@dataclass(frozen=True)
class Spelling:
    """How a model is written.

    Attributes:
        norm, activation, attention, mask: writers of each part.
        opset: version of the operator set.
    """

    norm: Norm = layer_norm_pytorch
    activation: Activation = gelu_half_last
    attention: Attention = attention_divided
    mask: Mask = mask_none
    opset: int = 12


def bert(w: Writer, spelling: Spelling, x: str) -> str:
    """Norms after the residual sums; three linear layers for queries, keys and values."""
    for _ in range(BLOCKS):
        q, k, v = (w.linear(x, WIDTH, WIDTH) for _ in range(3))
        attended = w.linear(spelling.attention(w, q, k, v, spelling.mask), WIDTH, WIDTH)
        x = spelling.norm(w, w("Add", attended, x))
        hidden = spelling.activation(w, w.linear(x, WIDTH, HIDDEN))
        x = spelling.norm(w, w("Add", w.linear(hidden, HIDDEN, WIDTH), x))
    return x


def vit(w: Writer, spelling: Spelling, x: str) -> str:
    """Norms before the layers and one at the end; queries, keys and values are cut from one linear layer."""
    for _ in range(BLOCKS):
        q, k, v = w.split(w.linear(spelling.norm(w, x), WIDTH, 3 * WIDTH), 3, axis=2)
        x = w("Add", x, w.linear(spelling.attention(w, q, k, v, spelling.mask), WIDTH, WIDTH))
        hidden = spelling.activation(w, w.linear(spelling.norm(w, x), WIDTH, HIDDEN))
        x = w("Add", x, w.linear(hidden, HIDDEN, WIDTH))
    return spelling.norm(w, x)


def timm(w: Writer, spelling: Spelling, x: str) -> str:
    """Like ViT; queries, keys and values are a leading axis of five, from which each is gathered."""
    for _ in range(BLOCKS):
        packed = w.linear(spelling.norm(w, x), WIDTH, 3 * WIDTH)
        packed = w.reshape(packed, w.size(x, 0), w.size(x, 1), 3, HEADS, HEAD)
        packed = w("Transpose", packed, perm=[2, 0, 3, 1, 4])
        q, k, v = (w("Gather", packed, np.array(index), axis=0) for index in range(3))
        scores = w("Mul", w("MatMul", q, w("Transpose", k, perm=[0, 1, 3, 2])), HEAD**-0.5)
        attended = w.join_heads(w("MatMul", w("Softmax", scores, axis=3), v))
        x = w("Add", x, w.linear(attended, WIDTH, WIDTH))
        x = w("Add", x, w.linear(spelling.activation(w, w.linear(spelling.norm(w, x), WIDTH, HIDDEN)), HIDDEN, WIDTH))
    return spelling.norm(w, x)


def gpt2(w: Writer, spelling: Spelling, x: str) -> str:
    """Like ViT; a linear layer is a Gemm on the rows of a matrix."""

    def rows(x: str, into: int, out: int) -> str:
        flat = w("Gemm", w.reshape(x, -1, into), w.weight(into, out), w.weight(out), alpha=1.0, beta=1.0)
        return w.reshape(flat, w.size(x, 0), w.size(x, 1), out)

    for _ in range(BLOCKS):
        q, k, v = w.split(rows(spelling.norm(w, x), WIDTH, 3 * WIDTH), 3, axis=2)
        x = w("Add", x, rows(spelling.attention(w, q, k, v, spelling.mask), WIDTH, WIDTH))
        hidden = spelling.activation(w, rows(spelling.norm(w, x), WIDTH, HIDDEN))
        x = w("Add", x, rows(hidden, HIDDEN, WIDTH))
    return spelling.norm(w, x)


def llama(w: Writer, spelling: Spelling, x: str) -> str:
    """RMS norms, rotary positions, two key heads that four query heads share, and a gated activation."""
    length = w.size(x, 1)
    positions = w("Cast", w("Range", np.array(0), w("Squeeze", length), np.array(1)), to=TensorProto.FLOAT)
    frequencies = (10000.0 ** (-np.arange(0, HEAD, 2) / HEAD)).astype(np.float32)[None]
    angles = w("MatMul", w.unsqueeze(positions, 1), frequencies)
    angles = w("Concat", angles, angles, axis=-1)
    cos, sin = w("Cos", angles), w("Sin", angles)

    def rotate(x: str) -> str:
        low = w("Slice", x, np.array([0]), np.array([HEAD // 2]), np.array([3]))
        high = w("Slice", x, np.array([HEAD // 2]), np.array([2**63 - 1]), np.array([3]))
        turned = w("Concat", w("Neg", high), low, axis=-1)
        return w("Add", w("Mul", x, cos), w("Mul", turned, sin))

    def repeat(x: str) -> str:
        shape = w("Concat", w.size(x, 0), np.array([2, HEADS // 2]), length, np.array([HEAD]), axis=0)
        return w.reshape(w("Expand", w.unsqueeze(x, 2), shape), w.size(x, 0), HEADS, length, HEAD)

    for _ in range(BLOCKS):
        y = spelling.norm(w, x)
        q = rotate(w.split_heads(w("MatMul", y, w.weight(WIDTH, WIDTH))))
        k = repeat(rotate(w.split_heads(w("MatMul", y, w.weight(WIDTH, WIDTH // 2)), heads=2)))
        v = repeat(w.split_heads(w("MatMul", y, w.weight(WIDTH, WIDTH // 2)), heads=2))
        scores = w("Div", w("MatMul", q, w("Transpose", k, perm=[0, 1, 3, 2])), math.sqrt(HEAD))
        attended = w.join_heads(w("MatMul", w("Softmax", spelling.mask(w, scores), axis=-1), v))
        x = w("Add", x, w("MatMul", attended, w.weight(WIDTH, WIDTH)))
        y = spelling.norm(w, x)
        gate = spelling.activation(w, w("MatMul", y, w.weight(WIDTH, HIDDEN)))
        hidden = w("Mul", gate, w("MatMul", y, w.weight(WIDTH, HIDDEN)))
        x = w("Add", x, w("MatMul", hidden, w.weight(HIDDEN, WIDTH)))
    return spelling.norm(w, x)


Architecture = Callable[[Writer, Spelling, str], str]

_VARIANTS: tuple[tuple[Architecture, Spelling], ...] = (
    (bert, Spelling(mask=mask_additive, opset=11)),
    (bert, Spelling(layer_norm_two_differences, gelu_half_on_gate, mask=mask_additive_first, opset=11)),
    (bert, Spelling(layer_norm_tensorflow, gelu_tanh_tensorflow, attention_multiplied, mask_additive, opset=12)),
    (bert, Spelling(layer_norm_reciprocal, gelu_half_first, attention_scaled_query, mask_fill, opset=13)),
    (bert, Spelling(layer_norm_expanded, gelu_product, attention_scaled_early, mask_additive, opset=14)),
    (vit, Spelling(layer_norm_pytorch, gelu_half_first, attention_multiplied, opset=12)),
    (vit, Spelling(layer_norm_reciprocal, gelu_half_last, attention_roots, opset=14)),
    (vit, Spelling(layer_norm_expanded, gelu_sigmoid, attention_scaled_early, opset=13)),
    (timm, Spelling(layer_norm_pytorch, gelu_half_last, opset=12)),
    (gpt2, Spelling(layer_norm_pytorch, gelu_tanh_power, attention_divided, mask_where, opset=11)),
    (gpt2, Spelling(layer_norm_two_differences, gelu_tanh_factored, attention_divided, mask_where, opset=12)),
    (llama, Spelling(rms_norm_inverse, silu, mask=mask_additive, opset=14)),
    (llama, Spelling(rms_norm_quotient, silu, opset=13)),
)


def hand_written() -> list[HandWritten]:
    """All models, always the same."""
    return [_write(seed, architecture, spelling) for seed, (architecture, spelling) in enumerate(_VARIANTS)]


def _write(seed: int, architecture: Architecture, spelling: Spelling) -> HandWritten:
    writer = Writer(spelling.opset, seed)
    result = architecture(writer, spelling, "x")
    random = np.random.default_rng(seed)
    x = random.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)
    mask = (np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 2]])).astype(np.int64)
    inputs = {"x": x, "mask": mask} if "mask" in {name for node in writer.nodes for name in node.input} else {"x": x}
    declared = {
        "x": helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", WIDTH]),
        "mask": helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", "length"]),
    }
    output = helper.make_tensor_value_info(result, TensorProto.FLOAT, ["batch", "length", WIDTH])
    graph = helper.make_graph(writer.nodes, "graph", [declared[name] for name in inputs], [output], writer.weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", spelling.opset)], ir_version=7)
    onnx.checker.check_model(proto, full_check=True)
    parts: list[Callable[..., str]] = [spelling.norm, spelling.activation, spelling.attention, spelling.mask]
    if architecture in (timm, llama):
        parts.remove(spelling.attention)  # they have one of their own
    name = f"{architecture.__name__}-{spelling.opset}: {', '.join(part.__name__ for part in parts)}"
    counts = {"attention": BLOCKS, _kind(spelling.norm): 2 * BLOCKS, _kind(spelling.activation): BLOCKS}
    if architecture is not bert:
        counts[_kind(spelling.norm)] += 1  # the one at the end
    if architecture is llama:
        counts["rotary_embedding"] = 2 * BLOCKS
    return HandWritten(name, proto, inputs, counts)


def _kind(writer: Norm | Activation) -> str:
    """The op that a part is to become: the beginning of its writer's name."""
    kinds = ("layer_norm", "rms_norm", "gelu_tanh", "gelu_sigmoid", "gelu", "silu")
    return next(kind for kind in kinds if writer.__name__.startswith(kind))
