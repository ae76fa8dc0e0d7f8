"""Reuse of tokens between frames, against a transcription of Eventful Transformers in torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab
from trimtab.errors import PassError, UsageError
from trimtab.ir import Module, interpret, verify
from trimtab.passes.base import Context
from trimtab.passes.manager import PassManager
from trimtab.passes.reuse_tokens import ReuseTokens
from trimtab.passes.samples import count_macs
from trimtab.passes.tokens.gating import next_state

WIDTH, HEADS, TOKENS, DEPTH, PATCH = 16, 2, 17, 2, 4


class Block(nn.Module):
    """Attention and MLP, each behind a norm; ``kind`` has other spellings of the same parts."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.gate, self.down = (nn.Linear(WIDTH, 2 * WIDTH) for _ in range(3))
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def mix(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def mlp(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.down(nn.functional.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "post":
            x = self.first(x + self.out(self.mix(self.qkv(x))))
            return self.second(x + self.mlp(x))
        normed = self.first(x)
        if self.kind == "parallel":
            return x + self.out(self.mix(self.qkv(normed))) + self.mlp(normed)
        x = x + self.out(self.mix(self.qkv(normed)))
        return x + self.mlp(self.second(x))


class Vit(nn.Module):
    """A class token and 16 patches through blocks; logits, and the tokens themselves if ``dense``."""

    def __init__(self, kind: str, dense: bool, depth: int) -> None:
        super().__init__()
        self.dense = dense
        self.patches, self.head = nn.Conv2d(3, WIDTH, PATCH, PATCH), nn.Linear(WIDTH, 5)
        self.first, self.places = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block(kind) for _ in range(depth))

    def embed(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return x if self.dense else self.head(x[:, 0])


@cache
def model(kind: str = "pre", dense: bool = False, depth: int = DEPTH, dtype: torch.dtype = torch.float64) -> Vit:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Vit(kind, dense, depth).eval().to(dtype)


@cache
def traced(net: Vit) -> Module:
    """The module of ``net`` with a symbolic batch, for tests to read."""
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1, max=16)}}
    return trimtab.trace(net, (torch.randn(2, 3, 16, 16, dtype=net.places.dtype),), dynamic_shapes=shapes)


@cache
def starting(module: Module) -> Module:
    start, _ = PassManager([ReuseTokens(start=True)], check="never").run(module)
    verify(start)
    return start


@cache
def reusing(module: Module, **options: Any) -> tuple[Module, Module]:
    """The modules for the first frame and for those after it."""
    start = starting(module)
    frame, _ = PassManager([ReuseTokens(**options)], check="never").run(module)
    verify(frame)
    return start, frame


def play(start: Module, frame: Module, video: Sequence[Tensor]) -> list[Tensor]:
    """The first output of each frame, the state carried by name."""
    outputs = interpret(start, [video[0]])
    shown = [outputs[0]]
    for pixels in video[1:]:
        state = next_state((start if len(shown) == 1 else frame).main.output_names, outputs)
        assert list(state) == [value.name for value in frame.main.inputs[1:]]
        outputs = interpret(frame, [pixels, *state.values()])
        shown.append(outputs[0])
    return shown


def moving(frames: int, batch: int, patches: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A video in which a few patches change in each frame, others in each sample."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(batch, 3, 16, 16, generator=generator, dtype=dtype)
    video = [pixels]
    for _ in range(frames - 1):
        pixels = pixels.clone()
        for sample in pixels:
            for place in torch.randperm(16, generator=generator)[:patches].tolist():
                y, x = PATCH * (place // 4), PATCH * (place % 4)
                sample[:, y : y + PATCH, x : x + PATCH] = torch.randn(3, PATCH, PATCH, generator=generator, dtype=dtype)
        video.append(pixels)
    return video


class Remembered:
    """One gate and its buffer around a function of tokens, a sample at a time, as the paper describes them."""

    def __init__(self, function: Any, r: int) -> None:
        self.function, self.r = function, r
        self.p: list[Tensor] = []
        self.b: list[Tensor] = []

    def __call__(self, c: Tensor) -> Tensor:
        if not self.p:
            self.p, self.b = list(c.clone()), list(self.function(c).clone())
        else:
            for sample, (p, b) in enumerate(zip(self.p, self.b, strict=True)):
                index = torch.topk(torch.linalg.vector_norm(c[sample] - p, dim=-1), self.r).indices
                p[index] = c[sample][index]
                b[index] = self.function(c[sample][index])
        return torch.stack(self.b)


class Eventful:
    """The network with a gate before each of qkv, projection and MLP of each block."""

    def __init__(self, net: Vit, r: int) -> None:
        self.net = net
        self.parts = [(Remembered(b.qkv, r), Remembered(b.out, r), Remembered(b.mlp, r)) for b in net.blocks]

    def __call__(self, pixels: Tensor) -> Tensor:
        x = self.net.embed(pixels)
        for block, (qkv, out, mlp) in zip(self.net.blocks, self.parts, strict=True):
            x = x + out(block.mix(qkv(block.first(x))))
            x = x + mlp(block.second(x))
        return x if self.net.dense else self.net.head(x[:, 0])


@pytest.mark.parametrize("r", [1, 5, TOKENS])
def test_frames_follow_the_formula(r: int) -> None:
    net, video = model(dense=True), moving(5, batch=3)
    eventful = Eventful(net, r)
    with torch.no_grad():
        expected = [eventful(pixels) for pixels in video]
        plain = [net(pixels) for pixels in video]
    for shown, wanted in zip(play(*reusing(traced(net), r=r), video), expected, strict=True):
        torch.testing.assert_close(shown, wanted, rtol=1e-9, atol=1e-9)
    assert (r == TOKENS) == torch.allclose(expected[-1], plain[-1], atol=1e-9), "the video is one where r matters"


@pytest.mark.parametrize("kind", ["pre", "post", "parallel", "swiglu"])
def test_with_all_tokens_every_frame_is_the_plain_model(kind: str) -> None:
    net, video = model(kind), moving(3, batch=2, patches=9)
    shown = play(*reusing(traced(net), r=TOKENS), video)
    for got, pixels in zip(shown, video, strict=True):
        torch.testing.assert_close(got, net(pixels).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["pre", "post", "parallel", "swiglu"])
def test_a_picture_that_stands_still_is_the_plain_model(kind: str) -> None:
    net = model(kind)
    pixels = moving(1, batch=2)[0]
    for got in play(*reusing(traced(net), r=1), [pixels] * 3):
        torch.testing.assert_close(got, net(pixels).detach(), rtol=1e-9, atol=1e-9)


def test_a_picture_that_moved_once_is_caught_up_with() -> None:
    """After enough frames every gate has let every token pass."""
    net = model()
    first, second = moving(2, batch=2, patches=16)
    *_, last = play(*reusing(traced(net), r=9), [first, *[second] * 13])
    torch.testing.assert_close(last, net(second).detach(), rtol=1e-9, atol=1e-9)


KINDS = {"pre": (6, 6), "swiglu": (6, 6), "parallel": (4, 6), "post": (5, 6)}
"""Gates and buffers. In parallel blocks qkv and MLP read the same tokens; behind a post-norm the MLP, the norm and the
qkv of the next block are one region, whose norm the next residual reads too."""


@pytest.mark.parametrize("kind", KINDS)
def test_gates_and_buffers_by_structure(kind: str) -> None:
    start, frame = reusing(traced(model(kind)), r=3)
    names = [value.name for value in frame.main.inputs]
    gates, buffers = ([name for name in names if f".{part}." in name] for part in ("gate", "buffer"))
    assert (len(gates), len(buffers)) == KINDS[kind]
    assert start.main.output_names == frame.main.output_names
    assert names[1:] == [name.replace("next", "state") for name in frame.main.output_names[1:]]
    taken, given, first = (
        [value.type for value in values[1:]] for values in (frame.main.inputs, frame.main.outputs, start.main.outputs)
    )
    assert taken == given == first
    assert all(value.type.shape[0] == frame.main.inputs[0].type.shape[0] for value in frame.main.inputs), "B, a symbol"


def test_macs_fall_as_predicted() -> None:
    """Linear layers take r of N rows; patches, head and attention take what they took."""
    module = traced(model())
    start, frame = reusing(module, r=5)
    a_row = DEPTH * (3 * WIDTH * WIDTH + WIDTH * WIDTH + 2 * 2 * WIDTH * WIDTH)
    whole = count_macs(module, {"batch": 3})
    assert count_macs(start, {"batch": 3}) == whole
    assert whole - count_macs(frame, {"batch": 3}) == 3 * (TOKENS - 5) * a_row


def test_budget_gives_the_largest_r_within_it() -> None:
    module = traced(model())
    whole = count_macs(module, {"batch": 1})
    _, frame = reusing(module, budget=0.6)
    shape = next(op.results[0].type.shape for op in frame.walk() if op.name == "gather")
    assert isinstance(shape[1], int)
    assert count_macs(frame, {"batch": 1}) <= 0.6 * whole
    _, more = reusing(module, r=shape[1] + 1)
    assert count_macs(more, {"batch": 1}) > 0.6 * whole
    with pytest.raises(PassError, match="the budget is too small"):
        reusing(module, budget=0.05)


def test_some_layers() -> None:
    module = traced(model())
    start, frame = (PassManager([ReuseTokens(r=4, layers=(1,), start=s)]).run(module)[0] for s in (True, False))
    assert {value.name.split(".")[1] for value in frame.main.inputs[1:]} == {"1"}
    pixels = moving(1, batch=2)[0]
    torch.testing.assert_close(play(start, frame, [pixels] * 2)[1], interpret(module, [pixels])[0])


@pytest.mark.parametrize("options", [{}, {"budget": 1.0}])
def test_nothing_to_do_leaves_the_module_as_it_is(options: Any) -> None:
    module = traced(model())
    copy = module.copy()
    assert not ReuseTokens(**options).run(copy, Context())
    assert copy == module


def test_compiled_frames_with_the_state_carried(tmp_path: Path) -> None:
    start, frame = reusing(traced(model(depth=1, dtype=torch.float32)), r=5)
    trimtab.compile(frame, target="native", include_runtime=False).save(tmp_path / "frame.trim")
    session = trimtab.load(tmp_path / "frame.trim")
    for batch in (1, 8):
        video = moving(5, batch, dtype=torch.float32)
        expected = play(start, frame, video)
        first = interpret(start, [video[0]])
        names, outputs = start.main.output_names, [value.numpy() for value in first]
        for pixels, wanted in zip(video[1:], expected[1:], strict=True):
            outputs = session(pixels.numpy(), **next_state(names, outputs))
            names = outputs.names
            np.testing.assert_allclose(outputs["output"], wanted.numpy(), rtol=1e-4, atol=1e-4)


def test_training_has_gradients() -> None:
    module = traced(model(depth=1, dtype=torch.float32))
    start, frame = reusing(module, r=5)
    first, second = moving(2, batch=2, dtype=torch.float32)
    net = trimtab.to_torch(frame)
    outputs = net(second, *interpret(start, [first])[1:])
    outputs[0].square().sum().backward()
    grads = [weight.grad for weight in net.parameters() if weight.requires_grad]
    assert grads
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert any(grad.abs().max() > 0 for grad in grads if grad is not None)


def test_the_check_compares_a_picture_that_stands_still() -> None:
    """The pass adds inputs, so that samples and calibration data get the state that they leave themselves."""
    module = traced(model(depth=1, dtype=torch.float32))
    result, report = PassManager("cleanup,reuse-tokens{r=4},cleanup,raise").run(module)
    row = next(row for row in report.rows if row.name == "reuse-tokens")
    assert row.drift is not None
    assert row.drift.relative < 1e-5
    assert row.macs_after < row.macs_before
    assert any("4 of 17 tokens pass 3 gates" in note for note in row.notes)
    batch = moving(1, batch=3, dtype=torch.float32)
    again = trimtab.optimize(module, "reuse-tokens{r=4},cast-precision", calibration=[batch])
    assert len(again.module.main.inputs) == len(result.main.inputs) == 1 + 3 + 3
    drift = again.report.rows[-1].drift
    assert drift is not None
    assert drift.relative < 0.1


def test_a_wrong_reuse_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If buffers were wrong, the drift of a still picture would not be zero."""
    from trimtab.passes import reuse_tokens

    monkeypatch.setattr(reuse_tokens, "token_buffer", lambda build, gate, buffer, updates: buffer)
    module, net = traced(model()), model()
    shown = play(*reusing(module, r=TOKENS), moving(2, batch=2, patches=16))
    assert not torch.allclose(shown[1], net(moving(2, batch=2, patches=16)[1]), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"r": TOKENS + 1}, "1 <= r <= 17"), ({"r": 3, "layers": (2,)}, "attention layers that were found")],
)
def test_too_much_is_refused(options: Any, message: str) -> None:
    with pytest.raises(PassError, match=message):
        reusing(traced(model()), **options)


@pytest.mark.parametrize("options", [{"r": -1}, {"budget": 1.5}, {"r": 3, "budget": 0.5}])
def test_wrong_amounts(options: Any) -> None:
    with pytest.raises(UsageError, match="give r, a number of tokens, or budget"):
        ReuseTokens(**options)


def test_a_second_time_is_refused() -> None:
    _, frame = reusing(traced(model()), r=3)
    with pytest.raises(PassError, match="tokens are reused already"):
        reusing(frame, r=3)


class _Conditioned(nn.Module):
    """An MLP whose rows a second input scales: what was computed for them last is of no use when it changes."""

    def __init__(self, vit: Vit) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixels: Tensor, scale: Tensor) -> Tensor:
        x = self.vit.embed(pixels)
        for block in self.vit.blocks:
            x = x + block.out(block.mix(block.qkv(block.first(x))))
            x = x + block.down(block.up(block.second(x)) * scale[:, None])
        return self.vit.head(x[:, 0])


def test_what_depends_on_another_input_is_not_reused_across_it() -> None:
    net = _Conditioned(model()).eval()
    scales = torch.randn(2, 2, 2 * WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    pixels = moving(1, batch=2)[0]
    module = trimtab.trace(net, (pixels, scales[0]))
    start, frame = reusing(module, r=TOKENS // 2)
    outputs = interpret(start, [pixels, scales[0]])
    state = next_state(start.main.output_names, outputs)
    got = interpret(frame, [pixels, scales[1], *state.values()])[0]
    # The products before the scale reuse all tokens; those behind it find all of them changed, and let half pass.
    assert sum(".gate." in name for name in state) == 4 * DEPTH
    assert not torch.allclose(got, outputs[0])
    whole = reusing(module, r=TOKENS)[1]
    got = interpret(whole, [pixels, scales[1], *state.values()])[0]
    torch.testing.assert_close(got, net(pixels, scales[1]).detach(), rtol=1e-9, atol=1e-9)
