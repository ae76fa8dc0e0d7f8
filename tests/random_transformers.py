"""Random transformers, each part spelled in one of the ways in which people and exporters write it.

What the exact passes look for stands here in many variations: norms, activations and attention in pieces, products with
turned weights, scales and masks in different places, shared weights, values that are also read elsewhere.

::

    @given(transformers())
    def test_pass_keeps_its_contract(module): ...
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from hypothesis import strategies as st

from trimtab.ir import Builder, Dim, DType, Module, TensorType, Value, ops, symbol

F32 = DType.F32
Spelling = Callable[[Value], Value]


@st.composite
def transformers(draw: st.DrawFn) -> Module:
    """Modules of one or two blocks over ``f32[batch, tokens, width]`` or an image. They verify."""
    return random_transformer(draw(st.integers(0, 2**32 - 1)))


def random_transformer(seed: int) -> Module:
    """The module of a seed: the same at every call."""
    return _Writer(random.Random(seed)).module()


class _Writer:
    """Draws the spellings of one module. Layers that models do not have stand here too: pruned heads, adapters,
    attention without softmax."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._b = Builder()
        self._data = torch.Generator().manual_seed(rng.randrange(2**31))
        self._heads = rng.choice((1, 2, 4))
        self._groups = rng.choice([g for g in (1, 2, 4) if self._heads % g == 0])
        self._size = rng.choice((2, 4, 6))
        self._width = self._heads * self._size
        self._tokens: Dim = rng.choice((1, 5, 7))
        self._batch: Dim = symbol("batch", 1, 8) if rng.random() < 0.5 else rng.choice((1, 3))
        self._shared: dict[tuple[int, ...], Value] = {}
        self._also_returned: list[Value] = []

    def module(self) -> Module:
        rng, b = self._rng, self._b
        x = self._stem()
        for _ in range(rng.choice((1, 1, 2))):
            x = self._block(x)
        x = self._norm(x)
        if rng.random() < 0.4:
            x = b(ops.Select(x, dim=1, index=0))
        outputs = [x, self._linear(x, 3)] if rng.random() < 0.3 else [self._linear(x, 3)]
        b.output(*outputs, *self._also_returned)
        return b.module

    # -- parts --------------------------------------------------------------------------------------------------

    def _stem(self) -> Value:
        """Tokens, or patches of an image behind a convolution and perhaps a batch norm."""
        rng, b = self._rng, self._b
        if rng.random() < 0.7:
            return b.input("x", TensorType(F32, (self._batch, self._tokens, self._width)))
        side = rng.choice((1, 2, 3))
        image = b.input("image", TensorType(F32, (self._batch, 3, 4 * side, 4 * side)))
        padding = rng.choice((0, 0, 2)) if side > 1 else 0
        kernel = self._weight(self._width, 3, 4 + padding, 4 + padding)
        bias = self._weight(self._width) if rng.random() < 0.6 else None
        pads = (padding // 2, padding // 2)
        y = b(ops.Conv2d(image, kernel, bias, stride=(4, 4), padding=pads, dilation=(1, 1)))
        if rng.random() < 0.5:
            mean, weight, shift = (self._weight(self._width) for _ in range(3))
            variance = self._weight(self._width, positive=True)
            y = b(ops.BatchNorm(y, mean, variance, weight, shift))
        self._tokens = side * side
        flat = b(ops.Reshape(y, shape=(self._batch, self._width, self._tokens)))
        return b(ops.Permute(flat, dims=(0, 2, 1)))

    def _block(self, x: Value) -> Value:
        rng, b = self._rng, self._b
        before = rng.random() < 0.6
        y = self._norm(x) if before else x
        x = b(ops.Add(x, self._layer_scale(self._attention(y))))
        x = x if before else self._norm(x)
        y = self._norm(x) if before else x
        x = b(ops.Add(self._layer_scale(self._mlp(y)), x))
        return x if before else self._norm(x)

    def _layer_scale(self, x: Value) -> Value:
        if self._rng.random() < 0.3:
            return self._b(ops.Mul(*self._either(x, self._weight(self._width))))
        return self._times(x, 0.5) if self._rng.random() < 0.2 else x

    def _mlp(self, x: Value) -> Value:
        rng, b = self._rng, self._b
        hidden = 2 * self._width
        if rng.random() < 0.3:
            gate, up = self._linear(x, hidden), self._linear(x, hidden)
            y = b(ops.Mul(*self._either(self._silu(gate), up)))
        else:
            act = rng.choice((self._gelu_erf, self._gelu_tanh, self._silu, self._quick_gelu, lambda v: b(ops.Relu(v))))
            y = act(self._linear(x, hidden))
        return self._linear(y, self._width)

    def _attention(self, x: Value) -> Value:
        rng, b = self._rng, self._b
        inner = self._groups * self._size
        q, k, v = self._linear(x, self._width), self._linear(x, inner), self._linear(x, inner)
        q, k, v = self._split(q, self._heads), self._split(k, self._groups), self._split(v, self._groups)
        if rng.random() < 0.3:
            q, k = self._rotary(q), self._rotary(k)
        scale = 1 / math.sqrt(self._size)
        kind = rng.random()
        if kind < 0.1:
            k = self._repeat_heads(k)
            joined = b(ops.Matmul(b(ops.Matmul(q, b(ops.Permute(k, dims=(0, 1, 3, 2))))), self._repeat_heads(v)))
        elif kind < 0.35:
            joined = b(ops.Attention(q, k, v, scale=scale, causal=rng.random() < 0.3))
        else:
            k, v = self._repeat_heads(k), self._repeat_heads(v)
            place = rng.choice(("q", "both", "after"))
            if place == "q":
                q = self._times(q, scale)
            elif place == "both":
                q, k = self._times(q, math.sqrt(scale)), self._times(k, math.sqrt(scale))
            scores = b(ops.Matmul(q, b(ops.Permute(k, dims=(0, 1, 3, 2)))))
            scores = self._times(scores, scale) if place == "after" else scores
            if rng.random() < 0.4:
                scores = b(ops.Add(*self._either(scores, self._mask())))
            probabilities = b(ops.Softmax(scores, dim=3))
            if rng.random() < 0.1:
                self._also_returned.append(probabilities)
            joined = b(ops.Matmul(probabilities, v))
        back = b(ops.Permute(joined, dims=(0, 2, 1, 3)))
        flat = b(ops.Reshape(back, shape=(self._batch, self._tokens, self._width)))
        return self._pruned(flat) if self._heads > 1 and rng.random() < 0.2 else self._linear(flat, self._width)

    def _pruned(self, x: Value) -> Value:
        """A projection that ignores the first head."""
        value = self._weight(self._width, self._width)
        data = self._b.module.weights[value.weight].tensor().clone()
        data[:, : self._size] = 0
        return self._b(ops.Linear(x, self._b.weight("pruned", data, trainable=True)))

    def _split(self, x: Value, heads: int) -> Value:
        b = self._b
        parts = b(ops.Reshape(x, shape=(self._batch, self._tokens, heads, self._size)))
        return b(ops.Permute(parts, dims=(0, 2, 1, 3)))

    def _repeat_heads(self, x: Value) -> Value:
        """As ``repeat_kv`` of many models does."""
        b, times = self._b, self._heads // self._groups
        if times == 1:
            return x
        batch, groups, tokens, size = x.type.shape
        apart = b(ops.Reshape(x, shape=(batch, groups, 1, tokens, size)))
        wide = b(ops.Expand(apart, shape=(batch, groups, times, tokens, size)))
        return b(ops.Reshape(wide, shape=(batch, self._heads, tokens, size)))

    def _rotary(self, x: Value) -> Value:
        b, half = self._b, self._size // 2
        cos, sin = self._weight(self._tokens, self._size), self._weight(self._tokens, self._size)
        low = b(ops.Slice(x, dim=3, start=0, stop=half))
        high = b(ops.Slice(x, dim=3, start=half, stop=self._size))
        turned = b(ops.Concat([b(ops.Neg(high)), low], dim=3))
        return b(ops.Add(b(ops.Mul(x, cos)), b(ops.Mul(turned, sin))))

    def _mask(self) -> Value:
        rng, b = self._rng, self._b
        tokens = self._tokens
        if rng.random() < 0.3:
            return b(ops.Full(value=0.0, dtype=F32, shape=(1, 1, tokens, tokens)))
        if rng.random() < 0.5:
            keep = b.weight("keep", torch.ones(1, 1, int(tokens), int(tokens)).tril().bool())
            nothing = self._number(0.0)
            return b(ops.Where(keep, nothing, self._number(float("-inf"))))
        return self._weight(1, self._heads, tokens, tokens)

    def _linear(self, x: Value, width: int) -> Value:
        rng, b = self._rng, self._b
        depth = int(x.type.shape[-1])
        bias = self._weight(width) if rng.random() < 0.7 else None
        spelling = rng.random()
        if spelling < 0.15:
            low = b(ops.Linear(x, self._weight(2, depth)))
            adapter = self._times(b(ops.Linear(low, self._weight(width, 2))), 0.5)
            return b(ops.Add(*self._either(b(ops.Linear(x, self._weight(width, depth), bias)), adapter)))
        if spelling < 0.5:
            return b(ops.Linear(x, self._weight(width, depth), bias))
        if spelling < 0.75:
            y = b(ops.Matmul(x, self._weight(depth, width)))
        else:
            y = b(ops.Matmul(x, b(ops.Permute(self._weight(width, depth), dims=(1, 0)))))
        return y if bias is None else b(ops.Add(*self._either(y, bias)))

    def _norm(self, x: Value) -> Value:
        rng, b = self._rng, self._b
        last = x.type.rank - 1
        weight, bias = self._weight(self._width), self._weight(self._width)
        kind = rng.choice(("layer", "rms", "whole", "whole rms"))
        if kind == "whole":
            return b(ops.LayerNorm(x, weight, bias))
        if kind == "whole rms":
            return b(ops.RmsNorm(x, weight))

        def mean(value: Value) -> Value:
            return b(ops.Mean(value, dims=(last,), keepdim=True))

        if kind == "layer":
            middle = mean(x)
            centred = b(ops.Sub(x, middle))
            again = b(ops.Sub(x, middle)) if rng.random() < 0.2 else centred
        else:
            centred = again = x
        spread = b(ops.Add(*self._either(mean(self._square(again)), self._number(1e-5))))
        root = rng.choice(("sqrt", "rsqrt", "reciprocal"))
        if root == "sqrt":
            y = b(ops.Div(centred, b(ops.Sqrt(spread))))
        else:
            inverse = b(ops.Rsqrt(spread)) if root == "rsqrt" else b(ops.Reciprocal(b(ops.Sqrt(spread))))
            y = b(ops.Mul(*self._either(centred, inverse)))
        y = b(ops.Mul(*self._either(y, weight)))
        return b(ops.Add(*self._either(y, bias))) if kind == "layer" else y

    # -- activations --------------------------------------------------------------------------------------------

    def _gelu_erf(self, x: Value) -> Value:
        b = self._b
        gate = b(ops.Add(*self._either(b(ops.Erf(self._times(x, math.sqrt(0.5)))), self._number(1.0))))
        return self._half_of(x, gate)

    def _gelu_tanh(self, x: Value) -> Value:
        b = self._b
        cube = b(ops.Mul(self._square(x), x)) if self._rng.random() < 0.5 else b(ops.Pow(x, self._number(3.0)))
        inner = b(ops.Add(x, self._times(cube, 0.044715)))
        gate = b(ops.Add(b(ops.Tanh(self._times(inner, math.sqrt(2 / math.pi)))), self._number(1.0)))
        return self._half_of(x, gate)

    def _half_of(self, x: Value, gate: Value) -> Value:
        b, order = self._b, self._rng.randrange(3)
        if order == 0:
            return b(ops.Mul(*self._either(self._times(x, 0.5), gate)))
        if order == 1:
            return self._times(b(ops.Mul(*self._either(x, gate))), 0.5)
        return b(ops.Mul(*self._either(x, self._times(gate, 0.5))))

    def _silu(self, x: Value) -> Value:
        return self._b(ops.Mul(*self._either(x, self._b(ops.Sigmoid(x)))))

    def _quick_gelu(self, x: Value) -> Value:
        return self._b(ops.Mul(*self._either(x, self._b(ops.Sigmoid(self._times(x, 1.702))))))

    # -- pieces -------------------------------------------------------------------------------------------------

    def _either(self, x: Value, y: Value) -> tuple[Value, Value]:
        return (x, y) if self._rng.random() < 0.5 else (y, x)

    def _times(self, x: Value, factor: float) -> Value:
        if self._rng.random() < 0.5:
            return self._b(ops.Mul(*self._either(x, self._number(factor))))
        return self._b(ops.Div(x, self._number(1 / factor)))

    def _square(self, x: Value) -> Value:
        return self._b(ops.Mul(x, x)) if self._rng.random() < 0.5 else self._b(ops.Pow(x, self._number(2.0)))

    def _number(self, value: float) -> Value:
        return self._b.scalar(value, F32)

    def _weight(self, *shape: Dim, positive: bool = False) -> Value:
        """A new weight, or now and then an earlier one of the same shape."""
        sizes = tuple(int(size) for size in shape)
        if sizes in self._shared and not positive and self._rng.random() < 0.1:
            return self._shared[sizes]
        data = torch.randn(sizes, generator=self._data) / math.sqrt(max(math.prod(sizes[1:]), 1))
        value = self._b.weight("w", data.abs() + 0.5 if positive else data, trainable=True)
        if not positive:
            self._shared[sizes] = value
        return value
