"""Every op: inferred types are what evaluation gives, text reads back, and the references mean what they say."""

from __future__ import annotations

import math

import pytest
import torch
from op_examples import ALL_EXAMPLES, EXAMPLES, OpExample, build_module, random_inputs

from trimtab.errors import VerificationError
from trimtab.ir import OP_CLASSES, Builder, DType, TensorType, Value, interpret, parse_module, print_module, verify
from trimtab.ir.ops import (
    Add,
    Attention,
    Clamp,
    Div,
    Elu,
    IndexSelect,
    Matmul,
    Opaque,
    Pad,
    Permute,
    Reshape,
    RmsNorm,
    RotaryEmbedding,
    Sign,
    Slice,
    Softmax,
    Split,
)
from trimtab.ir.ops.opaque import encode_call, resolve_operator


def test_every_op_has_an_example() -> None:
    assert set(OP_CLASSES.values()) == set(EXAMPLES)


def test_every_op_is_documented() -> None:
    for cls in OP_CLASSES.values():
        assert cls.__doc__, f"{cls.__name__} has no docstring of its own"


@pytest.mark.parametrize("example", ALL_EXAMPLES, ids=str)
def test_inferred_types_are_those_of_the_results(example: OpExample) -> None:
    module = build_module(example)
    verify(module)
    for bindings in example.bindings:
        results = interpret(module, random_inputs(example, bindings))
        for value, tensor in zip(module.main.outputs, results, strict=True):
            bound = value.type.bind(bindings)
            assert (bound.dtype.to_torch(), bound.shape) == (tensor.dtype, tuple(tensor.shape))


@pytest.mark.parametrize("example", ALL_EXAMPLES, ids=str)
def test_the_text_of_every_op_reads_back(example: OpExample) -> None:
    module = build_module(example)
    text = print_module(module)
    again = parse_module(text)
    verify(again)
    assert again == module
    assert print_module(again) == text
    assert module.copy() == module


@pytest.mark.parametrize("name", sorted({cls.name for cls in OP_CLASSES.values() if cls.elementwise}))
def test_elementwise_ops_act_element_by_element(name: str) -> None:
    cls = OP_CLASSES[name]
    for example in EXAMPLES[cls]:
        for bindings in example.bindings:
            inputs = random_inputs(example, bindings, seed=1)
            module = build_module(example)
            (whole,) = interpret(module, inputs)
            if not whole.numel():
                continue
            operands = torch.broadcast_tensors(*inputs[: len(example.named_types)])
            place = tuple(size // 2 for size in whole.shape)
            b = Builder()
            names = [b.input(f"x{i}", TensorType(t.dtype, ())) for i, (_, t) in enumerate(example.named_types)]
            b.output(b(cls(*names, **example.attributes)))
            (single,) = interpret(b.module, [operand[place].clone() for operand in operands])
            torch.testing.assert_close(single, whole[place], equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted({cls.name for cls in OP_CLASSES.values() if cls.commutative}))
def test_commutative_ops_commute(name: str) -> None:
    for example in EXAMPLES[OP_CLASSES[name]]:
        for bindings in example.bindings:
            left, right, *rest = random_inputs(example, bindings, seed=2)
            swapped = OpExample(example.cls, "swapped", example.operands[::-1], example.attributes)
            (a,) = interpret(build_module(example), [left, right, *rest])
            (b,) = interpret(build_module(swapped), [right, left, *rest])
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# -- references against formulas written out ------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES[Attention], ids=str)
def test_attention_is_its_formula(example: OpExample) -> None:
    for bindings in example.bindings:
        q, k, v, *rest = [t.double() if t.is_floating_point() else t for t in random_inputs(example, bindings, seed=3)]
        mask = rest[0] if example.operands[3] is not None else None
        repeats = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)
        scores = q @ k.transpose(-1, -2) * example.attributes["scale"]
        allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
        if example.attributes.get("causal"):
            allowed = allowed.tril()
        if mask is not None and mask.dtype is torch.bool:
            allowed = allowed & mask
        elif mask is not None:
            scores = scores + mask
        scores = scores.masked_fill(~allowed, -math.inf)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)  # a row that may attend to nothing
        (result,) = interpret(build_module(example), random_inputs(example, bindings, seed=3))
        torch.testing.assert_close(result.double(), weights @ v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("example", EXAMPLES[RotaryEmbedding], ids=str)
def test_rotary_embedding_turns_complex_numbers(example: OpExample) -> None:
    for bindings in example.bindings:
        x, table, *_ = random_inputs(example, bindings, seed=3)
        half = table.shape[-1] // 2
        angles = torch.randn(*x.shape[:-1], half, generator=torch.Generator().manual_seed(0))
        interleaved = bool(example.attributes.get("interleaved"))
        first = slice(0, 2 * half, 2) if interleaved else slice(half)
        second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
        expected = x.double().clone()
        turned = torch.complex(expected[..., first], expected[..., second]) * torch.exp(1j * angles.double())
        expected[..., first], expected[..., second] = turned.real, turned.imag
        spread = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(*[1] * (angles.dim() - 1), 2)
        cos, sin = spread.cos().to(x.dtype), spread.sin().to(x.dtype)
        result = RotaryEmbedding.reference(x, cos, sin, interleaved=interleaved)
        close = 1e-1 if x.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(result.double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize(
    ("x", "cos", "sin", "rule"),
    [
        ((4, 8), (4, 10), (4, 10), "at most that of the last axis of x"),
        ((4, 8), (4, 3), (4, 3), "known, even size"),
        ((4, 8), (4, 8), (4, 4), "one last axis"),
        ((4, 8), (3, 4, 8), (4, 8), "broadcast to the leading axes of x"),
        ((4, 8), (5, 8), (4, 8), "broadcast to the leading axes of x"),
    ],
)
def test_rotary_embedding_refuses_tables_that_do_not_fit(x, cos, sin, rule) -> None:
    values = [Value(TensorType(DType.F32, shape)) for shape in (x, cos, sin)]
    with pytest.raises(VerificationError, match=rule):
        RotaryEmbedding(*values)


def test_rotary_embedding_refuses_tables_of_another_dtype() -> None:
    half, table = Value(TensorType(DType.F16, (4, 8))), Value(TensorType(DType.F32, (4, 8)))
    with pytest.raises(VerificationError, match="one floating dtype"):
        RotaryEmbedding(half, table, table)


def test_negative_indices_count_from_the_end() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    picked = IndexSelect.reference(x, torch.tensor([-1, 0, -4]), dim=1)
    assert torch.equal(picked, x[:, [3, 0, 0]])


def test_rounding_of_division() -> None:
    x, y = torch.tensor([7, -7, 7, -7]), torch.tensor([2, 2, -2, -2])
    assert Div.reference(x, y, rounding="trunc").tolist() == [3, -3, -3, 3]
    assert Div.reference(x, y, rounding="floor").tolist() == [3, -4, -4, 3]


def test_nan_is_kept_where_documented() -> None:
    nan = torch.tensor([math.nan, -2.0, 0.0])
    assert Sign.reference(nan).isnan().tolist() == [True, False, False]
    assert Clamp.reference(nan, min=0.0, max=1.0).isnan().tolist() == [True, False, False]


def test_selu_and_celu_are_forms_of_elu() -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    selu = Elu.reference(x, alpha=1.6732632423543772, scale=1.0507009873554805, input_scale=1.0)
    torch.testing.assert_close(selu, torch.nn.functional.selu(x))
    celu = Elu.reference(x, alpha=2.5, scale=1.0, input_scale=1 / 2.5)
    torch.testing.assert_close(celu, torch.nn.functional.celu(x, 2.5))


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_padding_modes_agree_with_numpy(mode: str) -> None:
    import numpy as np

    x = torch.randn(3, 5)
    padded = Pad.reference(x, before=(2, 1), after=(1, 4), mode=mode, value=0)
    expected = np.pad(x.numpy(), ((2, 1), (1, 4)), mode=mode)  # type: ignore[call-overload]
    assert np.array_equal(padded.numpy(), expected)


def test_rms_norm_is_its_formula() -> None:
    x, w = torch.randn(4, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    expected = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3) * w
    torch.testing.assert_close(RmsNorm.reference(x, w, axes=1, eps=1e-3), expected)


# -- refusals ---------------------------------------------------------------------------------------------------------


def value(*shape: object, dtype: DType = DType.F32) -> Value:
    return Value(TensorType(dtype, shape))  # type: ignore[arg-type]


REFUSED = {
    "shapes that do not broadcast": lambda: Add(value(3), value(4)),
    "inner sizes that differ": lambda: Matmul(value(3, 4), value(5, 6)),
    "reshape to other elements": lambda: Reshape(value(3, 4), (5, 2)),
    "slice past the end": lambda: Slice(value(3, 4), 1, 0, 5),
    "slice of no axis": lambda: Slice(value(3, 4), 2, 0, 1),
    "split sizes": lambda: Split(value(3, 4), 1, (1, 2)),
    "pad widths": lambda: Pad(value(3, 4), (1,), (1,)),
    "permute of another rank": lambda: Permute(value(3, 4), (0, 1, 2)),
    "unknown torch operator": lambda: Opaque((value(3),), "aten.no_such_operator.default", '[{"operand": 0}]'),
    "operator that writes": lambda: Opaque((value(3),), "aten.relu_.default", '[{"operand": 0}]'),
    "operator of files": lambda: Opaque((), "aten.from_file.default", '["/etc/passwd", false, 10]'),
    "python function": lambda: Opaque((), "load_library", '["x.so"]'),
    "attribute of python": lambda: Opaque((), "aten.__class__.__init__", "[]"),
    "call that is not text of a call": lambda: Opaque((value(3),), "aten.erfinv.default", "[{"),
    "call of a missing operand": lambda: Opaque((value(3),), "aten.erfinv.default", '[{"operand": 4}]'),
    "call with a wrong dtype": lambda: Opaque((value(3),), "aten.sum.default", '[{"operand": 0}, {"dtype": "nn"}]'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_operands_are_refused_when_the_op_is_built(name: str) -> None:
    with pytest.raises(VerificationError):
        REFUSED[name]()


def test_two_symbols_are_not_taken_for_one() -> None:
    from trimtab.ir import symbol

    # Both ranges leave one number only to try, so that a lucky guess would let them broadcast.
    a, b = symbol("a", 3, 4), symbol("b", 3, 4)
    with pytest.raises(VerificationError):
        Add(value(a, 2), value(b, 2))
    with pytest.raises(VerificationError):
        Add(value(a), value(3))
    assert Add(value(a, 2), value(1, 2)).result.type.shape == (a, 2)


def test_what_the_ops_own_checks_refuse() -> None:
    def check(op: object) -> str:
        with pytest.raises(VerificationError) as caught:
            op.verify()  # type: ignore[attr-defined]
        return str(caught.value)

    assert "share one dtype" in check(Add(value(3), value(3, dtype=DType.F64)))
    assert "true division" in check(Div(value(3, dtype=DType.I64), value(3, dtype=DType.I64)))
    assert "rank 3 or more" in check(Attention(value(3, 4), value(3, 4), value(3, 4), scale=1.0))
    assert "distinct" in check(Softmax(value(3, 4), -1))


def test_calls_of_torch_operators_encode() -> None:
    x = object()
    assert encode_call((x, [x, 1], torch.float16, None, 0.5, "s"), [x]) == (
        '[{"operand": 0}, [{"operand": 0}, 1], {"dtype": "float16"}, null, 0.5, "s"]'
    )
    with pytest.raises(TypeError, match="no text form"):
        encode_call((object(),), [x])
    assert resolve_operator("aten.__and__.Tensor") is torch.ops.aten.__and__.Tensor


def test_repeat_unrolls() -> None:
    for example in EXAMPLES[OP_CLASSES["repeat"]]:
        for bindings in example.bindings:
            module = build_module(example)
            (repeat,) = module.main.ops
            inputs = random_inputs(example, bindings, seed=4)
            carried = inputs[: len(repeat.carried)]
            stacked = inputs[len(carried) : len(carried) + len(repeat.stacked)]
            invariants = inputs[len(carried) + len(stacked) : len(example.named_types)]
            for i in range(repeat.n):
                b = Builder()
                given = [b.input(f"x{j}", v.type) for j, v in enumerate(repeat.body.inputs)]
                mapping = dict(zip(repeat.body.inputs, given, strict=True))
                for op in repeat.body.ops:
                    clone = b.add(op.clone([mapping[v] for v in op.operands]))
                    mapping.update(zip(op.results, clone.results, strict=True))
                b.output(*(mapping[v] for v in repeat.body.outputs))
                carried = list(interpret(b.module, [*carried, *(s[i] for s in stacked), *invariants]))
            for got, expected in zip(interpret(module, inputs), carried, strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=0)
