"""Layer norm and RMS norm are found in every spelling, and left alone where something is not as in a norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pass_harness import Golden, check_case, read

from trimtab import optimize
from trimtab.frontend.torch_export import import_program
from trimtab.ir import Builder, Dim, DType, Module, TensorType, Value, interpret, ops, symbol
from trimtab.ir.rewrite import Rule
from trimtab.passes import raise_layer_norm, raise_rms_norm
from trimtab.passes.raise_group_norm import GroupNormWeight, GroupsOfChannels
from trimtab.passes.raise_layer_norm import LayerNormBias, LayerNormWeight
from trimtab.passes.raise_rms_norm import RmsNormWeight

F32, F16, BF16 = DType.F32, DType.F16, DType.BF16
PIPELINE = "raise-layer-norm,raise-rms-norm,dce"
SHAPES: dict[str, tuple[Dim, ...]] = {
    "matrix": (3, 8),
    "tokens": (2, 5, 8),
    "symbols": (symbol("batch", 1, 8), symbol("length", 1), 8),
    "heads": (symbol("batch", 1, 8), 4, 5, 6),
}

Spelling = Callable[["Writer", Value], Value]


class Writer(Builder):
    """A builder with the pieces of norms. ``x`` is the input, ``w`` and ``b`` are the parameters."""

    def __init__(self, shape: tuple[Dim, ...], dtype: DType = F32, axes: int = 1) -> None:
        super().__init__()
        self.dims = tuple(range(len(shape) - axes, len(shape)))
        self.x = self.input("x", TensorType(dtype, shape))
        tail = [int(dim) for dim in shape[-axes:]]
        generator = torch.Generator().manual_seed(len(shape))
        self.w, self.b = (
            self.weight(name, torch.randn(tail, generator=generator).to(dtype.to_torch())) for name in ("w", "b")
        )

    def number(self, value: float) -> Value:
        return self.scalar(value, F32)

    def mean(self, x: Value) -> Value:
        return self(ops.Mean(x, dims=self.dims, keepdim=True))

    def spread(self, centred: Value, eps: float = 1e-5) -> Value:
        square = self(ops.Pow(centred, self.number(2.0)))
        return self(ops.Add(self.mean(square), self.number(eps)))

    def inverse(self, spread: Value) -> Value:
        return self(ops.Rsqrt(spread))

    def times(self, x: Value, y: Value) -> Value:
        return self(ops.Mul(x, y))

    def plus(self, x: Value, y: Value) -> Value:
        return self(ops.Add(x, y))

    def minus(self, x: Value, y: Value) -> Value:
        return self(ops.Sub(x, y))

    def cast(self, x: Value, dtype: DType) -> Value:
        return self(ops.Cast(x, dtype=dtype))

    def affine(self, x: Value) -> Value:
        return self.plus(self.times(x, self.w), self.b)

    def done(self, *outputs: Value) -> Module:
        self.output(*outputs)
        return self.module


def reason(rule: Rule, module: Module) -> str:
    """Why the rule does not match where it gets furthest."""
    return rule.explain(module).reason


# -- reviewed text -----------------------------------------------------------------------------------------------------

CASES = {
    "raise-layer-norm": {
        "pytorch": """
symbols batch=1..8
weight @w: f32[8]
weight @b: f32[8]
graph main(%x: f32[batch, 5, 8]) {
  %two = full() {value=2.0, dtype=f32} : f32[]
  %eps = full() {value=1e-05, dtype=f32} : f32[]
  %mean = mean(%x) {dims=[2], keepdim=true} : f32[batch, 5, 1]
  %d = sub(%x, %mean) : f32[batch, 5, 8]
  %square = pow(%d, %two) : f32[batch, 5, 8]
  %variance = mean(%square) {dims=[2], keepdim=true} : f32[batch, 5, 1]
  %shifted = add(%variance, %eps) : f32[batch, 5, 1]
  %root = sqrt(%shifted) : f32[batch, 5, 1]
  %n = div(%d, %root) : f32[batch, 5, 8]
  %scaled = mul(%n, @w) : f32[batch, 5, 8]
  %y = add(%scaled, @b) : f32[batch, 5, 8]
  return y=%y
}""",
        "channels_first": """
weight @w: f32[3, 1, 1]
graph main(%x: f32[2, 3, 4, 4]) {
  %eps = full() {value=1e-06, dtype=f32} : f32[]
  %mean = mean(%x) {dims=[1], keepdim=true} : f32[2, 1, 4, 4]
  %d = sub(%x, %mean) : f32[2, 3, 4, 4]
  %square = mul(%d, %d) : f32[2, 3, 4, 4]
  %variance = mean(%square) {dims=[1], keepdim=true} : f32[2, 1, 4, 4]
  %shifted = add(%variance, %eps) : f32[2, 1, 4, 4]
  %gain = rsqrt(%shifted) : f32[2, 1, 4, 4]
  %n = mul(%d, %gain) : f32[2, 3, 4, 4]
  %y = mul(%n, @w) : f32[2, 3, 4, 4]
  return y=%y
}""",
    },
    "raise-rms-norm": {
        "llama": """
weight @w: f16[8]
graph main(%x: f16[2, 8]) {
  %eps = full() {value=1e-06, dtype=f32} : f32[]
  %wide = cast(%x) {dtype=f32} : f32[2, 8]
  %square = mul(%wide, %wide) : f32[2, 8]
  %mean = mean(%square) {dims=[1], keepdim=true} : f32[2, 1]
  %shifted = add(%mean, %eps) : f32[2, 1]
  %gain = rsqrt(%shifted) : f32[2, 1]
  %n = mul(%wide, %gain) : f32[2, 8]
  %narrow = cast(%n) {dtype=f16} : f16[2, 8]
  %y = mul(@w, %narrow) : f16[2, 8]
  return y=%y
}""",
        "eps_outside_the_root": """
graph main(%x: f32[2, 8]) {
  %eps = full() {value=1e-06, dtype=f32} : f32[]
  %square = mul(%x, %x) : f32[2, 8]
  %mean = mean(%square) {dims=[1], keepdim=true} : f32[2, 1]
  %root = sqrt(%mean) : f32[2, 1]
  %shifted = add(%root, %eps) : f32[2, 1]
  %y = div(%x, %shifted) : f32[2, 8]
  return y=%y
}""",
    },
    "raise-group-norm": {
        "instance_norm": """
weight @ones: f32[3]
weight @zeros: f32[3]
weight @w: f32[6, 1, 1]
weight @b: f32[6, 1, 1]
graph main(%x: f32[2, 6, 4, 4]) {
  %parts = reshape(%x) {shape=[2, 3, 32]} : f32[2, 3, 32]
  %n = group_norm(%parts, @ones, @zeros) {groups=3} : f32[2, 3, 32]
  %whole = reshape(%n) {shape=[2, 6, 4, 4]} : f32[2, 6, 4, 4]
  %scaled = mul(%whole, @w) : f32[2, 6, 4, 4]
  %y = add(%scaled, @b) : f32[2, 6, 4, 4]
  return y=%y
}""",
        "layer_norm_of_heads": """
graph main(%x: f32[2, 5, 32]) {
  %heads = reshape(%x) {shape=[2, 20, 8]} : f32[2, 20, 8]
  %n = layer_norm(%heads) : f32[2, 20, 8]
  %y = reshape(%n) {shape=[2, 5, 32]} : f32[2, 5, 32]
  return y=%y
}""",
    },
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_rewrites_as_reviewed(name: str, case: str, golden: Golden) -> None:
    module = read(CASES[name][case], ones=torch.ones(3), zeros=torch.zeros(3))
    check_case(golden, f"{name}-{case}", name, module)


# -- spellings ---------------------------------------------------------------------------------------------------------


def layer_norm_root(f: Writer, x: Value) -> Value:
    centred = f.minus(x, f.mean(x))
    return f.affine(f(ops.Div(centred, f(ops.Sqrt(f.spread(centred))))))


def layer_norm_power(f: Writer, x: Value) -> Value:
    centred = f.minus(x, f.mean(x))
    return f.affine(f.times(f(ops.Pow(f.spread(centred), f.number(-0.5))), centred))


def layer_norm_reciprocal(f: Writer, x: Value) -> Value:
    centred = f.minus(x, f.mean(x))
    variance = f.mean(f.times(centred, centred))
    root = f(ops.Sqrt(f.plus(f.number(1e-5), variance)))
    return f.plus(f.b, f.times(f.w, f.times(centred, f(ops.Reciprocal(root)))))


def layer_norm_one_over(f: Writer, x: Value) -> Value:
    centred = f.minus(x, f.mean(x))
    root = f(ops.Pow(f.spread(centred), f.number(0.5)))
    return f.affine(f.times(centred, f(ops.Div(f.number(1.0), root))))


def layer_norm_mean_of_its_own(f: Writer, x: Value) -> Value:
    """PyTorch's decomposition, and PyTorch 1.4: mean and difference are computed twice."""
    centred = f.minus(x, f.mean(x))
    return f.affine(f.times(f.minus(x, f.mean(x)), f.inverse(f.spread(centred))))


def layer_norm_moments(f: Writer, x: Value) -> Value:
    """Flax: the variance from the mean square."""
    mean = f.mean(x)
    variance = f.minus(f.mean(f.times(x, x)), f.times(mean, mean))
    gain = f.times(f.inverse(f.plus(variance, f.number(1e-5))), f.w)
    return f.plus(f.times(f.minus(x, mean), gain), f.b)


def layer_norm_tensorflow(f: Writer, x: Value) -> Value:
    mean = f.mean(x)
    gain = f.times(f.inverse(f.spread(f.minus(x, mean))), f.w)
    return f.plus(f.times(x, gain), f.minus(f.b, f.times(mean, gain)))


def layer_norm_multiplied_out(f: Writer, x: Value) -> Value:
    mean = f.mean(x)
    gain = f.inverse(f.spread(f.minus(x, mean)))
    return f.affine(f.minus(f.times(gain, x), f.times(gain, mean)))


def rms_norm_root(f: Writer, x: Value) -> Value:
    return f.times(f(ops.Div(x, f(ops.Sqrt(f.spread(x))))), f.w)


def rms_norm_llama(f: Writer, x: Value) -> Value:
    return f.times(f.w, f.times(x, f.inverse(f.spread(x))))


def rms_norm_weighted_gain(f: Writer, x: Value) -> Value:
    return f.times(x, f.times(f.w, f.inverse(f.spread(x))))


def rms_norm_reciprocal(f: Writer, x: Value) -> Value:
    root = f(ops.Sqrt(f.plus(f.mean(f.times(x, x)), f.number(1e-5))))
    return f.times(f.times(f(ops.Reciprocal(root)), x), f.w)


def spellings(*prefixes: str) -> list[Spelling]:
    """The functions above whose names begin like this."""
    return [value for name, value in globals().items() if name.startswith(prefixes)]


SPELLINGS = spellings("layer_norm_", "rms_norm_")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
def test_every_spelling_becomes_one_op(spelling: Spelling, shape: str) -> None:
    f = Writer(SHAPES[shape])
    module = optimize(f.done(spelling(f, f.x)), PIPELINE).module  # checks the contract
    (op,) = module.main.ops
    assert spelling.__name__.startswith(op.name)
    assert [operand.weight for operand in op.operands[1:]] == ["w", "b"][: len(op.operands) - 1]
    assert op.attributes["eps"] == 1e-5
    assert op.made_by.startswith(op.name.replace("_", "-"))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
def test_norms_over_two_axes(spelling: Spelling) -> None:
    f = Writer((2, 3, 4), axes=2)
    (op,) = optimize(f.done(spelling(f, f.x)), PIPELINE).module.main.ops
    assert op.attributes["axes"] == 2


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
def test_large_means_and_spreads_give_the_same_as_before(spelling: Spelling) -> None:
    f = Writer(SHAPES["symbols"])
    before = f.done(spelling(f, f.x))
    after = optimize(before, PIPELINE).module
    for batch, length in ((1, 1), (3, 7)):
        x = 100 * torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(length)) + 1000
        expected, found = (interpret(module, [x], precision=torch.float64)[0] for module in (before, after))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_without_parameters() -> None:
    f = Writer((2, 8))
    centred = f.minus(f.x, f.mean(f.x))
    normed = f(ops.Div(centred, f(ops.Sqrt(f.spread(centred)))))
    assert _texts(optimize(f.done(normed), PIPELINE).module) == ["layer_norm(%x)"]


def test_parameters_with_leading_axes_of_size_1() -> None:
    f = Writer((2, 5, 8))
    f.w, f.b = (f(ops.Reshape(value, shape=(1, 1, 8))) for value in (f.w, f.b))
    module = optimize(f.done(layer_norm_root(f, f.x)), f"{PIPELINE},fold-constants,simplify-reshapes,dce").module
    assert [op.name for op in module.walk()] == ["layer_norm"]


def test_eps_is_the_shortest_decimal_of_its_float32() -> None:
    f = Writer((2, 8))
    centred = f.minus(f.x, f.mean(f.x))
    root = f(ops.Sqrt(f.spread(centred, float(torch.tensor(1e-12)))))
    (op,) = optimize(f.done(f(ops.Div(centred, root))), PIPELINE).module.main.ops
    assert op.attributes["eps"] == 1e-12


def test_a_mean_that_is_read_elsewhere_is_no_obstacle() -> None:
    f = Writer((2, 8))
    module = optimize(f.done(layer_norm_root(f, f.x), f.mean(f.x)), f"cse,{PIPELINE}").module
    assert sorted(op.name for op in module.walk()) == ["layer_norm", "mean"]


def test_the_norm_of_a_norm() -> None:
    f = Writer((2, 8))
    module = optimize(f.done(layer_norm_root(f, layer_norm_tensorflow(f, f.x))), PIPELINE).module
    assert [op.name for op in module.walk()] == ["layer_norm", "layer_norm"]


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_half_precision_as_hugging_face_writes_it(dtype: DType) -> None:
    """``weight * norm(x.float()).half()``"""
    f = Writer((2, 8), dtype)
    wide = f.cast(f.x, F32)
    narrow = f.cast(f.times(wide, f.inverse(f.spread(wide))), dtype)
    assert _texts(optimize(f.done(f.times(f.w, narrow)), PIPELINE).module) == ["rms_norm(%x, @w) {eps=1e-05}"]


def test_half_precision_with_the_parameters_cast_as_well() -> None:
    f = Writer((2, 8), F16)
    wide, f.w, f.b = (f.cast(value, F32) for value in (f.x, f.w, f.b))
    narrow = f.cast(layer_norm_root(f, wide), F16)
    assert _texts(optimize(f.done(narrow), PIPELINE).module) == ["layer_norm(%x, @w, @b)"]


def test_casts_from_float32_to_float64_stay() -> None:
    f = Writer((2, 8))
    wide = f.cast(f.x, DType.F64)
    square = f.mean(f.times(wide, wide))
    gain = f(ops.Rsqrt(f(ops.Add(square, f.scalar(1e-5, DType.F64)))))
    module = optimize(f.done(f.cast(f.times(wide, gain), F32)), PIPELINE).module
    assert [op.name for op in module.walk()] == ["cast", "rms_norm", "cast"]


# -- group norm --------------------------------------------------------------------------------------------------------


class Images(Writer):
    """Images of 6 channels with a weight and a bias for each."""

    def __init__(self, dtype: DType = F32) -> None:
        super().__init__((symbol("batch", 1, 8), 6, 4, 5), dtype)
        self.w, self.b = (self.weight(name, torch.randn(6, 1, 1)) for name in ("w", "b"))
        self.parts = self(ops.Reshape(self.x, shape=(self.x.type.shape[0], 3, 40)))

    def whole(self, x: Value) -> Value:
        return self(ops.Reshape(x, shape=self.x.type.shape))


def group_norm_of_rows(f: Images) -> Value:
    """ONNX GroupNormalization, expanded."""
    f.dims = (2,)
    centred = f.minus(f.parts, f.mean(f.parts))
    return f.affine(f.whole(f(ops.Div(centred, f(ops.Sqrt(f.spread(centred)))))))


def group_norm_of_instances(f: Images) -> Value:
    """torch.onnx.export(dynamo=False): an instance norm with ones and zeros."""
    ones, zeros = f.weight("ones", torch.ones(3)), f.weight("zeros", torch.zeros(3))
    return f.affine(f.whole(f(ops.GroupNorm(f.parts, ones, zeros, groups=3))))


def group_norm_multiplied_out(f: Images) -> Value:
    """torch's own decomposition."""
    batch = f.x.type.shape[0]
    parts = f(ops.Reshape(f.x, shape=(batch, 3, 2, 20)))
    f.dims = (2, 3)
    mean = f.mean(parts)
    w, b = (f(ops.Reshape(value, shape=(1, 3, 2, 1))) for value in (f.w, f.b))
    gain = f.times(f.inverse(f.spread(f.minus(parts, mean))), w)
    shift = f.plus(f.times(f(ops.Neg(mean)), gain), b)
    gain, shift = (f(ops.Reshape(value, shape=(batch, 6, 1, 1))) for value in (gain, shift))
    return f.plus(f.times(f.x, gain), shift)


GROUP_PIPELINE = "fold-constants,raise-layer-norm,raise-group-norm,cleanup"


@pytest.mark.parametrize("spelling", spellings("group_norm_"), ids=lambda spelling: spelling.__name__)
def test_every_spelling_becomes_one_group_norm(spelling: Callable[[Images], Value]) -> None:
    f = Images()
    (op,) = optimize(f.done(spelling(f)), GROUP_PIPELINE).module.main.ops
    assert isinstance(op, ops.GroupNorm)
    assert (op.groups, op.eps, op.x.name) == (3, 1e-5, "x")
    assert (op.weight is not None, op.bias is not None) == (True, True)


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("affine", [True, False])
def test_the_decomposition_of_torch(groups: int, affine: bool) -> None:
    from torch._decomp import get_decompositions

    norm = torch.nn.GroupNorm(groups, 6, affine=affine)
    if affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    program = torch.export.export(norm.eval(), (torch.randn(2, 6, 4, 5),))
    taken_apart = program.run_decompositions(get_decompositions([torch.ops.aten.native_group_norm]))
    module = optimize(import_program(taken_apart), f"cleanup,{GROUP_PIPELINE}").module
    assert [op.name for op in module.walk()] == ["group_norm"]
    x = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(interpret(module, [x])[0], norm(x), rtol=1e-5, atol=1e-5)


def test_a_layer_norm_between_reshapes_is_no_group_norm() -> None:
    f = Writer((2, 3, 8))
    module = f.done(f(ops.Reshape(f(ops.LayerNorm(f(ops.Reshape(f.x, shape=(2, 3, 8))))), shape=(2, 3, 2, 4))))
    assert reason(GroupsOfChannels(), module) == "each group is one row: this is a layer norm"


def test_parameters_of_groups_stay() -> None:
    f = Images()
    normed = f(ops.GroupNorm(f.parts, f.weight("scale", torch.randn(3)), groups=3))
    assert reason(GroupsOfChannels(), f.done(f.whole(normed))) == "the norm has parameters for groups, not for channels"


def test_a_scale_of_positions_stays_outside() -> None:
    f = Images()
    module = f.done(f.times(f(ops.GroupNorm(f.x, groups=3)), f.weight("s", torch.randn(4, 5))))
    assert reason(GroupNormWeight(), module) == "f32[4, 5] is not one number for each channel of f32[batch, 6, 4, 5]"


# -- what is no norm ---------------------------------------------------------------------------------------------------


def no_norm_eps_outside_the_root(f: Writer, x: Value) -> Value:
    centred = f.minus(x, f.mean(x))
    root = f(ops.Sqrt(f.mean(f.times(centred, centred))))
    return f(ops.Div(centred, f.plus(root, f.number(1e-5))))


def no_norm_another_power(f: Writer, x: Value) -> Value:
    centred = f.minus(x, f.mean(x))
    return f.times(centred, f.inverse(f.plus(f.mean(f(ops.Pow(centred, f.number(2.5)))), f.number(1e-5))))


def no_norm_mean_of_another_value(f: Writer, x: Value) -> Value:
    centred = f.minus(x, f.mean(f(ops.Tanh(x))))
    return f(ops.Div(f.minus(x, f.mean(x)), f(ops.Sqrt(f.spread(centred)))))


def no_norm_negative_eps(f: Writer, x: Value) -> Value:
    centred = f.minus(x, f.mean(x))
    return f(ops.Div(centred, f(ops.Sqrt(f.spread(centred, -1e-5)))))


def no_norm_sum_of_squares(f: Writer, x: Value) -> Value:
    total = f(ops.Sum(f.times(x, x), dims=f.dims, keepdim=True))
    return f.times(x, f.inverse(f.plus(total, f.number(1e-5))))


@pytest.mark.parametrize("spelling", spellings("no_norm"), ids=lambda spelling: spelling.__name__)
def test_what_is_no_norm_stays(spelling: Spelling) -> None:
    f = Writer((2, 8))
    module = f.done(spelling(f, f.x))
    after = optimize(module, PIPELINE).module
    assert [op.name for op in after.walk()] == [op.name for op in module.walk()]


def test_another_axis_is_named() -> None:
    f = Writer((2, 8, 8))
    f.dims = (1,)
    assert reason(raise_layer_norm.Normalise(), f.done(layer_norm_root(f, f.x))) == (
        "the mean is over the axes (1,) of f32[2, 8, 8], not over the last ones"
    )


def test_a_centred_value_is_left_to_layer_norm() -> None:
    f = Writer((2, 8))
    assert reason(raise_rms_norm.Normalise(), f.done(layer_norm_root(f, f.x))) == (
        "x is the difference from its mean: this is a layer norm"
    )


def test_a_weight_of_another_shape_is_named() -> None:
    f = Writer((2, 8))
    module = f.done(f.times(f(ops.RmsNorm(f.x)), f.weight("rows", torch.randn(2, 1))))
    assert reason(RmsNormWeight(), module) == "f32[2, 1] has not the shape of the last axes of f32[2, 8]"
    f = Writer((2, 8))
    module = f.done(f.plus(f(ops.LayerNorm(f.x)), f.weight("grown", torch.randn(3, 1, 8))))
    assert reason(LayerNormBias(), module) == "f32[3, 1, 8] has not the shape of the last axes of f32[2, 8]"


def test_a_norm_that_is_read_elsewhere_keeps_its_weight_outside() -> None:
    f = Writer((2, 8))
    normed = f(ops.LayerNorm(f.x))
    module = f.done(f.times(normed, f.w), f(ops.Tanh(normed)))
    assert reason(LayerNormWeight(), module) == "an inner value, the result of layer_norm, is also read by tanh"
    assert [op.name for op in optimize(module, PIPELINE).module.walk()] == ["layer_norm", "mul", "tanh"]


def test_the_report_tells_why_not() -> None:
    f = Writer((2, 8, 8))
    f.dims = (1,)
    report = optimize(f.done(layer_norm_root(f, f.x)), "raise-layer-norm").report
    row = next(row for row in report.rows[0].rules if row["rule"] == "layer-norm")
    assert row["rejected"] == {"the mean is over the axes (1,) of f32[2, 8, 8], not over the last ones": 1}


def _texts(module: Module) -> list[str]:
    from trimtab.ir.printer import print_op

    return [print_op(op).split(" = ")[1].split(" : ")[0] for op in module.walk()]
