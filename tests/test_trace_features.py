"""What the PyTorch frontend keeps and what it refuses, on small modules written for each case."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import ImportModelError, UnsupportedOpError, UsageError
from trimtab.frontend.torch_export import import_program, trace
from trimtab.ir import Module, interpret


def op_names(module: Module) -> list[str]:
    return [op.name for op in module.walk()]


class Tied(nn.Module):
    """Embedding and output layer share one parameter, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


class Mutating(nn.Module):
    """Writes through views and in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 1:3] += 1
        y[0].mul_(2)
        z = y.view(-1)
        z.add_(y.sum())
        return y.relu_()


class Nested(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor], extra: dict[str, Tensor], *, shift: Tensor) -> dict[str, Any]:
        first, second = pair
        return {"sum": first + extra["a"], "parts": [second - shift, extra["b"] * 2]}


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(4, 5))
        self.plain = torch.randn(5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.t() + self.table.sum() + (self.plain * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum()


def test_ops_carry_the_users_source_line() -> None:
    module = trace(Tied().eval(), (torch.zeros(2, 3, dtype=torch.long),))
    linear = next(op for op in module.walk() if op.name == "linear")
    lines, first = inspect.getsourcelines(Tied.forward)
    assert linear.location is not None
    assert linear.location.file == __file__
    assert first <= linear.location.line < first + len(lines)


def test_a_shared_parameter_stays_one_weight() -> None:
    model = Tied().eval()
    ids = torch.randint(0, 11, (2, 3))
    module = trace(model, (ids,))
    assert len(module.weights) == 1
    assert module.weight_bytes == 11 * 6 * 4
    (weight,) = module.weights.values()
    assert weight.tensor().data_ptr() == model.embed.weight.data_ptr()
    torch.testing.assert_close(interpret(module, [ids])[0], model(ids).detach())


def test_mutation_and_aliasing_are_functionalised() -> None:
    x = torch.randn(3, 4)
    kept = x.clone()
    expected = Mutating()(x.clone())
    module = trace(Mutating().eval(), (x,))
    torch.testing.assert_close(interpret(module, [x])[0], expected)
    assert torch.equal(x, kept)


def test_nested_containers_and_keyword_arguments() -> None:
    a, b, c, d, shift = (torch.randn(2, 3) for _ in range(5))
    module = trace(Nested().eval(), ((a, b), {"a": c, "b": d}), {"shift": shift})
    assert [value.name for value in module.main.inputs] == ["pair.0", "pair.1", "extra.a", "extra.b", "shift"]
    assert module.main.output_names == ["sum", "parts.0", "parts.1"]
    total, first, second = interpret(module, {"pair.0": a, "pair.1": b, "extra.a": c, "extra.b": d, "shift": shift})
    torch.testing.assert_close(total, a + c)
    torch.testing.assert_close(first, b - shift)
    torch.testing.assert_close(second, d * 2)


def test_buffers_and_constants() -> None:
    model = Constants().eval()
    x = torch.randn(2, 5)
    module = trace(model, (x,))
    torch.testing.assert_close(interpret(module, [x])[0], model(x))
    assert not any(weight.trainable for weight in module.weights.values())


def test_parameters_are_trainable_and_shared_in_memory() -> None:
    model = nn.Linear(3, 2).eval()
    module = trace(model, (torch.randn(1, 3),))
    assert all(weight.trainable for weight in module.weights.values())
    with torch.no_grad():
        model.bias.fill_(7)
    assert module.weights["bias"].tensor().tolist() == [7, 7]


def test_symbol_names_ranges_and_unit_examples() -> None:
    class Pool(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([x, y], dim=1).mean(1)

    batch = torch.export.Dim("batch", min=2, max=8)
    shapes = {"x": {0: batch, 1: "length"}, "y": {0: batch}}
    module = trace(Pool().eval(), (torch.randn(3, 1, 4), torch.randn(3, 2, 4)), dynamic_shapes=shapes)
    assert str(module.main.inputs[0].type) == "f32[batch, length, 4]"
    assert str(module.main.outputs[0].type) == "f32[batch, 4]"
    assert module.symbols()["batch"].range_text == "2..8"
    assert module.symbols()["length"].range_text == "1.."
    for length in (1, 6):
        x, y = torch.randn(5, length, 4), torch.randn(5, 2, 4)
        torch.testing.assert_close(interpret(module, [x, y])[0], torch.cat([x, y], 1).mean(1))


def test_size_arithmetic_becomes_dimensions() -> None:
    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[1]
            both = torch.cat([x, x[:, : n - 1]], 1) * n + torch.arange(2 * n - 1)[None, :, None]
            return both.reshape(x.shape[0], -1)

    module = trace(Pairs().eval(), (torch.randn(2, 5, 3),), dynamic_shapes={"x": {1: torch.export.Dim("n", min=3)}})
    assert str(module.main.outputs[0].type) == "f32[2, 6*n - 3]"
    for n in (3, 7, 10):
        x = torch.randn(2, n, 3)
        torch.testing.assert_close(interpret(module, [x])[0], Pairs()(x))


def test_training_mode_is_refused() -> None:
    with pytest.raises(ImportModelError, match=r"training mode.*call \.eval\(\)"):
        trace(nn.Dropout(), (torch.randn(2),))


def test_state_changes_are_refused_by_name() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x + self.count

    with pytest.raises(ImportModelError, match="changed=count"):
        trace(Counter().eval(), (torch.randn(2),))


def test_unknown_operators_ride_along_as_opaque() -> None:
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x) + 1

    x = torch.randn(4)
    module = trace(Bessel().eval(), (x,))
    assert op_names(module).count("opaque") == 1
    torch.testing.assert_close(interpret(module, [x])[0], torch.special.bessel_j0(x) + 1)


def test_all_unsupported_operators_are_reported_together() -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.nonzero(x), x[x > 0]

    with pytest.raises(UnsupportedOpError) as caught:
        trace(Dynamic().eval(), (torch.randn(4),))
    message = str(caught.value)
    assert "aten.nonzero.default" in message
    assert "aten.index.Tensor" in message
    assert "test_trace_features.py" in message


def test_export_failures_carry_torchs_reason() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ImportModelError, match=r"torch\.export cannot export the model"):
        trace(Branch().eval(), (torch.randn(4),))


def test_dtypes_without_a_counterpart_are_refused() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(x).abs()

    with pytest.raises(ImportModelError, match="complex64"):
        trace(Spectrum().eval(), (torch.randn(4),))


def test_not_a_module_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"torch\.nn\.Module"):
        trace(F.relu, (torch.randn(2),))  # type: ignore[arg-type]


CASES: dict[str, tuple[Any, ...]] = {
    "integer division": (lambda a: a // 3 + a % 3, torch.arange(-7, 8)),
    "true division of integers": (lambda a: a / 4, torch.arange(-3, 4)),
    "promotion with a float scalar": (lambda a: a * 0.5, torch.arange(5)),
    "promotion of two tensors": (lambda a: a + a.double()[0], torch.randn(5)),
    "reverse subtraction": (lambda a: torch.rsub(a, 3, alpha=2), torch.randn(5)),
    "scaled addition": (lambda a: torch.add(a, a, alpha=3) - torch.sub(a, a * 2, alpha=2), torch.randn(5)),
    "powers": (lambda a: a**2 + a.abs() ** 0.5 + 2**a, torch.randn(5)),
    "comparison across dtypes": (lambda a: (a > 1) & (a.double() <= 2.5), torch.randn(7) * 2),
    "clamps": (lambda a: a.clamp(-1, 1) + a.clamp_min(0) + F.relu6(a) + F.hardtanh(a, -2, 0.5), torch.randn(9) * 4),
    "activations": (lambda a: F.elu(a) + F.selu(a) + F.celu(a, 2) + F.leaky_relu(a) + F.mish(a), torch.randn(9)),
    "more activations": (
        lambda a: F.hardswish(a) + F.hardsigmoid(a) + F.softplus(a, 2, 3) + F.logsigmoid(a),
        torch.randn(9),
    ),
    "gated": (lambda a: F.glu(a, -1), torch.randn(3, 8)),
    "negative slices": (lambda a: a[-3:, :-1, ::2] * a[:3, -1:, 1:2], torch.randn(5, 4, 6)),
    "select and unbind": (lambda a: torch.stack(a.unbind(1), -1) + a[:, -1].unsqueeze(-1), torch.randn(5, 4, 4)),
    "chunks": (lambda a: sum(torch.cat([c[:2] for c in a.chunk(3)]) for _ in range(2)), torch.randn(7, 3)),
    "stack and flip": (lambda a: torch.stack([a, a.flip(0)], 1).roll(2, 0).roll(1), torch.randn(5, 3)),
    "movedim": (lambda a: a.movedim((0, 1), (2, 0)) + a.permute(1, 2, 0), torch.randn(2, 3, 4)),
    "padding": (
        lambda a: F.pad(a, (1, -1, 2, 0), value=3) + F.pad(a, (0, 0, 1, 1), mode="reflect"),
        torch.randn(1, 4, 5),
    ),
    "replicate and circular": (
        lambda a: F.pad(a, (2, 1), mode="replicate") + F.pad(a, (1, 2), mode="circular"),
        torch.randn(1, 4, 5),
    ),
    "reductions": (
        lambda a: a.sum() + a.mean((0, -1)) + a.amax(1).amin() + a.prod(2).max() + a.norm(dim=(0, 2)),
        torch.randn(2, 3, 4),
    ),
    "integer sums": (lambda a: a.sum(0) + (a > 1).sum(1).sum(), torch.randint(0, 4, (3, 5), dtype=torch.int32)),
    "variance": (lambda a: a.var(-1) + a.std(-1, unbiased=False) + torch.logsumexp(a, -1), torch.randn(3, 5)),
    "variance with mean": (lambda a: torch.add(*torch.var_mean(a, (0, 2), correction=0)), torch.randn(3, 5, 2)),
    "any and all": (lambda a: (a > 0).any(1) ^ (a > -1).all(1), torch.randn(3, 5)),
    "max with index": (
        lambda a: a.max(1).values + a.min(1).indices + a.argmax() + a.argmin(0, keepdim=True).sum(),
        torch.randn(3, 5),
    ),
    "sorting": (lambda a: a.sort(1, descending=True)[0] + a.argsort(0) + a.topk(2, 1)[0].sum(), torch.randn(3, 5)),
    "scans": (lambda a: a.cumsum(1) + F.softmax(a, 0) + F.log_softmax(a, 1), torch.randn(3, 5)),
    "indexing": (lambda a: a[torch.tensor([2, -1])] + a[[0, 1], :][:, [1, 3, 0, 2]], torch.randn(3, 4)),
    "split indexing": (lambda a: a[torch.tensor([0, 1]), :, torch.tensor([2, -1])], torch.randn(3, 4, 5)),
    "gather and scatter": (lambda a: a.scatter(1, a.argsort(1), a) + a.gather(1, a.argsort(1)), torch.randn(3, 4)),
    "scatter add": (lambda a: a.scatter_add(1, a.argsort(1)[:, :2], a[:, 2:]), torch.randn(3, 4)),
    "index put": (lambda a: a.index_put((torch.tensor([0, 2]),), a[:2] * 2, accumulate=True), torch.randn(3, 4)),
    "masked writes": (lambda a: a.masked_fill(a > 0, 9.0), torch.randn(3, 4)),
    "triangles": (lambda a: a.tril(1) + a.triu(-1), torch.randn(4, 5)),
    "creation": (
        lambda a: a + torch.ones_like(a) + a.new_full((4,), 2) + torch.arange(1, 9, 2) + torch.linspace(0, 1, 4),
        torch.randn(3, 4),
    ),
    "meshgrid": (lambda a: sum(torch.meshgrid(a, a[:3], indexing="xy")), torch.randn(4)),
    "einsum": (lambda a: torch.einsum("bij,bkj->bik", a, a * 2), torch.randn(2, 3, 4)),
    "addmm": (lambda a: torch.addmm(a, a, a, beta=0.5, alpha=2), torch.randn(3, 3)),
    "pooling": (
        lambda a: F.max_pool2d(a, 3, 2, 1).sum() + F.avg_pool2d(a, 2, ceil_mode=True) * F.adaptive_avg_pool2d(a, 1),
        torch.randn(2, 3, 7, 8),
    ),
    "adaptive pooling": (
        lambda a: F.adaptive_avg_pool2d(a, (3, 2)).sum() + F.adaptive_avg_pool1d(a[0], 3),
        torch.randn(2, 3, 7, 8),
    ),
    "nearest": (lambda a: F.interpolate(a, scale_factor=1.5), torch.randn(1, 2, 5, 6)),
    "bilinear": (lambda a: F.interpolate(a, (7, 3), mode="bilinear", align_corners=True), torch.randn(1, 2, 5, 6)),
    "bicubic": (lambda a: F.interpolate(a, scale_factor=1.7, mode="bicubic"), torch.randn(1, 2, 5, 6)),
    "antialias": (lambda a: F.interpolate(a, (3, 2), mode="bilinear", antialias=True), torch.randn(1, 2, 5, 6)),
    "causal attention": (lambda a: F.scaled_dot_product_attention(a, a, a, is_causal=True), torch.randn(1, 2, 5, 4)),
    "attention without heads": (lambda a: F.scaled_dot_product_attention(a, a, a, a @ a.mT), torch.randn(5, 4)),
    "grouped attention": (
        lambda a: F.scaled_dot_product_attention(a, a[:, :2], a[:, 1:3], enable_gqa=True, scale=0.3),
        torch.randn(2, 4, 5, 4),
    ),
    "same convolution": (lambda a: F.conv2d(a, a.new_ones(4, 3, 2, 4), padding="same"), torch.randn(1, 3, 6, 7)),
    "unbatched convolution": (lambda a: F.conv1d(a, a.new_ones(4, 1, 3), stride=2, groups=2), torch.randn(2, 9)),
    "transposed convolution": (
        lambda a: F.conv_transpose2d(a, a.new_ones(3, 2, 3, 3), stride=2, padding=1, output_padding=1),
        torch.randn(1, 3, 4, 5),
    ),
    "norms": (lambda a: F.group_norm(a, 2) + F.rms_norm(a, (5,)) + F.instance_norm(a), torch.randn(2, 4, 5)),
    "layer norm over two axes": (lambda a: F.layer_norm(a, (4, 5)), torch.randn(2, 4, 5)),
    "prelu": (lambda a: F.prelu(a, a.new_tensor([0.1, 0.2, 0.3, 0.4])), torch.randn(2, 4, 5)),
    "no gradient region": (lambda a: torch.no_grad()(lambda b: b * 2)(a) + 1, torch.randn(3)),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_agree_with_eager(name: str) -> None:
    function, x = CASES[name]

    class Case(nn.Module):
        def forward(self, a: Tensor) -> Any:
            return function(a)

    module = trace(Case().eval(), (x,))
    assert "opaque" not in op_names(module)
    torch.testing.assert_close(interpret(module, [x])[0], function(x), rtol=1e-5, atol=1e-6)


def test_a_decomposed_program_is_imported() -> None:
    """Pooling to one element decomposes into a mean and a view with strides of its own."""

    class Pool(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return F.adaptive_avg_pool1d(a.transpose(1, 2), 1).flatten(1)

    batch = torch.export.Dim("batch")
    program = torch.export.export(Pool(), (torch.randn(2, 5, 4),), dynamic_shapes={"a": {0: batch}}, strict=False)
    module = import_program(program.run_decompositions())
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(interpret(module, [x])[0], x.mean(1))
