"""Quantized ONNX models: operators against their definition in wide integers, encoders against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType
from quantized_onnx import encoder, images, integers_of, quantized_dynamically, quantized_statically, run, with_outputs

import trimtab
from trimtab.errors import UnsupportedOpError
from trimtab.frontend.onnx import from_onnx
from trimtab.ir import Module, interpret
from trimtab.ir.analysis import count_ops

AT_TIES = 1e-4
"""The share of integers that may differ from ONNX Runtime's because a value lies at a tie: ONNX Runtime multiplies
floats and rounds every sum, and the sums here are exact."""
BEHIND = 0.1
"""The share that may differ behind the first such integer, which moves a little all that is computed from it."""
TIE = 1e-5
"""How far from a tie, relative to the number of steps, the first integers that differ may be."""


def graph_of(node: Any, inputs: dict[str, np.ndarray], constants: dict[str, np.ndarray], outputs: list[int]) -> Any:
    def info(name: str, kind: int, shape: Any) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        [node], "case",
        [info(name, helper.np_dtype_to_tensor_dtype(data.dtype), data.shape) for name, data in inputs.items()],
        [info(name, kind, None) for name, kind in zip(node.output, outputs, strict=True)],
        [numpy_helper.from_array(data, name) for name, data in constants.items()],
    )  # fmt: skip
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=9)


def evaluated(model: Any, inputs: dict[str, np.ndarray]) -> tuple[Module, list[np.ndarray]]:
    module = from_onnx(model)
    return module, [output.numpy() for output in interpret(module, inputs)]


def numbers(rng: np.random.Generator, kind: Any, *shape: int) -> np.ndarray:
    limits = np.iinfo(kind)
    return rng.integers(limits.min, limits.max, shape, dtype=kind, endpoint=True)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("zeros", [(), ((), ()), ((5,), (9,)), ((1,), (1,)), ((5, 1), (1, 9))])
@pytest.mark.parametrize("kinds", [("u1", "i1"), ("i1", "u1"), ("u1", "u1"), ("i1", "i1")])
def test_matmul_integer(kinds: tuple[str, str], zeros: tuple[Any, ...], stored: bool) -> None:
    """Zero points of whole tensors, rows and columns; the second matrix stored in the file or computed."""
    rng = np.random.default_rng([len(zeros), stored, *kinds[0].encode()])
    data = {"x": numbers(rng, kinds[0], 3, 5, 13), "y": numbers(rng, kinds[1], 13, 9)}
    names = ["x", "y", "x_zero", "y_zero"][: 2 + len(zeros)]
    for name, kind, shape in zip(names[2:], kinds, zeros, strict=False):
        data[name] = numbers(rng, kind, *shape)
    wide = {name: array.astype(np.int64) for name, array in data.items()}
    x_zero = wide.get("x_zero", np.int64(0))
    x_zero = x_zero[:, None] if x_zero.ndim == 1 and x_zero.size > 1 else x_zero
    expected = (wide["x"] - x_zero) @ (wide["y"] - wide.get("y_zero", 0))
    constants = {name: data.pop(name) for name in names[1:]} if stored else {}
    node = helper.make_node("MatMulInteger", names, ["out"])
    module, (found,) = evaluated(graph_of(node, data, constants, [TensorProto.INT32]), data)
    np.testing.assert_array_equal(found, expected)
    assert count_ops(module)["linear_integer" if stored else "matmul_integer"] == 1


@pytest.mark.parametrize("kind", ["i1", "u1"])
@pytest.mark.parametrize("pads", [[1, 0, 1, 0], [1, 0, 0, 2]])
@pytest.mark.parametrize("weight_zero", [0, 128, 7])
def test_conv_integer(weight_zero: int, pads: list[int], kind: str) -> None:
    """Exact whether it is one op, as for even padding and centred weights, or computed in double precision."""
    if kind == "i1" and weight_zero == 128:
        weight_zero = -128
    rng = np.random.default_rng([abs(weight_zero), *pads])
    x, w = numbers(rng, "u1", 2, 4, 7, 9), numbers(rng, kind, 6, 2, 3, 2)
    constants = {"w": w, "x_zero": np.array(131, "u1"), "w_zero": np.array(weight_zero, kind)}
    node = helper.make_node(
        "ConvInteger", ["x", "w", "x_zero", "w_zero"], ["out"], pads=pads, strides=[2, 1], group=2
    )  # fmt: skip
    module, (found,) = evaluated(graph_of(node, {"x": x}, constants, [TensorProto.INT32]), {"x": x})
    top, left, bottom, right = pads
    wide = torch.nn.functional.pad(torch.tensor(x).double() - 131, (left, right, top, bottom))
    weight = torch.tensor(w).double() - weight_zero
    expected = torch.nn.functional.conv2d(wide, weight, stride=(2, 1), groups=2)
    np.testing.assert_array_equal(found, expected.numpy())
    centred = weight_zero == (0 if kind == "i1" else 128)
    assert ("conv_integer" in count_ops(module)) == (centred and pads == [1, 0, 1, 0])


@pytest.mark.parametrize("data", [np.zeros(7), np.full(7, 3.0), np.full(7, -2.0), np.array([-1e-40, 1e-40, 0])])
def test_dynamic_quantization_of_extremes(data: np.ndarray) -> None:
    """All zero, all of one sign, denormals: as ONNX Runtime."""
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])
    inputs = {"x": data.astype(np.float32)}
    model = graph_of(node, inputs, {}, [TensorProto.UINT8, TensorProto.FLOAT, TensorProto.UINT8])
    _, found = evaluated(model, inputs)
    for ours, theirs in zip(found, run(model, inputs).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("k", "block"), [(64, 32), (80, 32), (16, 16)])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_a_few_bits(bits: int, k: int, block: int, zeros: bool) -> None:
    """MatMulNBits, the last block perhaps not full, against products in double precision."""
    rng = np.random.default_rng([bits, k, zeros])
    n, blocks = 9, -(-k // block)
    codes = rng.integers(0, 1 << bits, (n, blocks, block), dtype=np.uint8)
    zero = rng.integers(0, 1 << bits, (n, blocks), dtype=np.uint8)
    scale = rng.uniform(0.01, 0.1, (n, blocks)).astype(np.float32)
    x, bias = rng.standard_normal((2, 5, k)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    constants = {"w": _packed(codes, bits), "scale": scale.reshape(-1), "bias": bias}
    if zeros:
        constants["zero"] = _packed(zero, bits)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "scale", "zero" if zeros else "", "", "bias"], ["out"], domain="com.microsoft",
        K=k, N=n, bits=bits, block_size=block,
    )  # fmt: skip
    module, (found,) = evaluated(graph_of(node, {"x": x}, constants, [TensorProto.FLOAT]), {"x": x})
    middle = zero[..., None].astype(float) if zeros else float(1 << (bits - 1))
    weight = ((codes - middle) * scale[..., None]).reshape(n, -1)[:, :k]
    np.testing.assert_allclose(found, x.astype(float) @ weight.T + bias, rtol=1e-5, atol=1e-5)
    assert count_ops(module)["linear_groupwise"] == 1
    stored = n * blocks * block * bits // 8
    assert sum(w.nbytes for w in module.weights.values() if w.type.rank == 2) <= stored + scale.nbytes + zero.nbytes


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Numbers along the last axis in bytes, the first in the lowest bits."""
    if bits == 8:
        return codes
    padded = np.concatenate([codes, np.zeros((*codes.shape[:-1], codes.shape[-1] % 2), np.uint8)], axis=-1)
    return padded[..., ::2] | padded[..., 1::2] << 4


def test_weights_of_bits_that_cannot_be_are_refused() -> None:
    constants = {"w": np.zeros((9, 1, 12), np.uint8), "scale": np.ones(9, np.float32)}
    x = np.zeros((5, 32), np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "scale"], ["out"], domain="com.microsoft", K=32, N=9, bits=3, block_size=32
    )
    with pytest.raises(UnsupportedOpError, match="bits"):
        from_onnx(graph_of(node, {"x": x}, constants, [TensorProto.FLOAT]))


MODELS = {
    "static": lambda model: quantized_statically(model, per_channel=False),
    "static-channels": lambda model: quantized_statically(model, per_channel=True, activations=QuantType.QInt8),
    "static-unsigned": lambda model: quantized_statically(model, per_channel=False, weights=QuantType.QUInt8),
    "dynamic": lambda model: quantized_dynamically(model, per_channel=True, weights=QuantType.QInt8),
    "dynamic-unsigned": lambda model: quantized_dynamically(model, per_channel=False, weights=QuantType.QUInt8),
}


@pytest.fixture(scope="module", params=MODELS)
def quantized(request: pytest.FixtureRequest) -> onnx.ModelProto:
    return MODELS[request.param](encoder(seed=3))


def test_integers_are_those_of_onnx_runtime(quantized: onnx.ModelProto) -> None:
    """After every node that quantizes, as imported and with the products of integers.

    The two see the same floats up to rounding, so integers differ where a float lies at a tie, if any do. Behind the
    first that does, others may.
    """
    places = integers_of(quantized)
    assert len(places) >= 8
    watched = with_outputs(quantized, [name for place in places for name in place])
    imported = from_onnx(watched)
    raised = trimtab.optimize(imported, "cleanup,raise-quantized,cleanup").module
    compared = at_ties = behind = differing_behind = 0
    for seed in range(4):
        inputs = images(seed)
        theirs = {**inputs, **_initializers(quantized), **run(watched, inputs)}
        for module in (imported, raised):
            found = interpret(module, inputs)
            ours = dict(zip(module.main.output_names, (value.numpy() for value in found), strict=True))
            undisturbed = True
            for source, scale, name in places:
                gap = np.abs(ours[name].astype(int) - theirs[name].astype(int))
                different = np.count_nonzero(gap)
                if not undisturbed:
                    behind, differing_behind = behind + gap.size, differing_behind + different
                    continue
                compared, at_ties = compared + gap.size, at_ties + different
                if different:
                    undisturbed = False
                    steps = theirs[source].astype(float)[gap > 0] / theirs[scale]
                    from_tie = np.abs(np.abs(steps - np.floor(steps)) - 0.5)
                    assert gap.max() == 1
                    assert (from_tie <= TIE * np.maximum(np.abs(steps), 1)).all()
    print(f"{at_ties} of {compared} integers differ at ties; behind them {differing_behind} of {behind}")
    assert at_ties <= AT_TIES * compared
    assert differing_behind <= BEHIND * behind


def _initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_products_are_those_of_integers(quantized: onnx.ModelProto) -> None:
    """Six linear layers a block and the head, and for static models the patches and both products of attention."""
    module = from_onnx(quantized)
    result = trimtab.optimize(module, "cleanup,fuse").module
    counts = count_ops(result)
    static = count_ops(module)["quantize"] > 30
    assert counts["linear_integer"] == 13
    assert counts.get("conv_integer", 0) == (1 if static else 0)
    assert counts.get("matmul_integer", 0) == (4 if static else 0)
    floats = sum(w.nbytes for w in result.weights.values() if w.type.rank == 2 and w.type.dtype.is_floating)
    assert floats == (0 if static else 4 * 48 * 12)  # only products are quantized there, not the patches


def test_compiled_code_agrees_with_onnx_runtime(tmp_path: Path) -> None:
    """Within what a few integers that fell the other way make of the output."""
    model = quantized_statically(encoder(seed=4), per_channel=True)
    made = trimtab.compile(from_onnx(model), target="native", threads=1, include_runtime=False)
    with trimtab.load(made.save(tmp_path / "encoder.trim", check=False)) as session:
        for seed in range(3):
            inputs = images(seed)
            expected = run(model, inputs)["logits"]
            found = np.asarray(session(**inputs))
            assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected)
