"""Layers that ONNX files have in pieces: the group ``raise`` makes them whole where that changes nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from onnx import TensorProto
from onnx_models import info, model, names, node, normal, run

from trimtab.frontend.onnx import from_onnx
from trimtab.passes.optimize import optimize

ONE, TWO, HALF = np.float32(1), np.float32(2), np.float32(0.5)


def check(nodes, weights, inputs, expected: list[str], opset: int = 20, shapes=None):
    """Import and raise: the ops are ``expected``, the results agree."""
    declared = [info(name, (shapes or {}).get(name, list(x.shape))) for name, x in inputs.items()]
    plain = from_onnx(model(nodes, declared, ["y"], weights, opset=opset))
    raised = optimize(plain, "raise").module
    assert names(raised) == expected
    assert raised.weight_bytes <= plain.weight_bytes
    torch.testing.assert_close(run(raised, *inputs.values()), run(plain, *inputs.values()), rtol=1e-5, atol=1e-6)
    return raised


def layer_norm_nodes(square: str, root: str) -> list:
    nodes = [node("ReduceMean", ["x", "last"], ["m"]), node("Sub", ["x", "m"], ["d"])]
    nodes.append(node("Pow", ["d", "two"], ["s"]) if square == "pow" else node("Mul", ["d", "d"], ["s"]))
    nodes += [node("ReduceMean", ["s", "last"], ["v"]), node("Add", ["v", "eps"], ["ve"]), node("Sqrt", ["ve"], ["r"])]
    if root == "div":
        nodes.append(node("Div", ["d", "r"], ["n"]))
    elif root == "reciprocal":
        nodes += [node("Reciprocal", ["r"], ["i"]), node("Mul", ["i", "d"], ["n"])]
    else:
        nodes += [node("Div", ["one", "r"], ["i"]), node("Mul", ["d", "i"], ["n"])]
    return [*nodes, node("Mul", ["w", "n"], ["nw"]), node("Add", ["nw", "b"], ["y"])]


@pytest.mark.parametrize("root", ["div", "reciprocal", "one over"])
@pytest.mark.parametrize("square", ["pow", "mul"])
def test_layer_norm(square, root):
    weights = {
        "last": np.array([-1]),
        "two": TWO,
        "one": ONE,
        "eps": np.float32(1e-12),
        "w": normal(8),
        "b": normal(8, seed=1),
    }
    module = check(layer_norm_nodes(square, root), weights, {"x": normal(2, 3, 8)}, ["layer_norm"])
    (op,) = module.main.ops
    assert op.eps == 1e-12
    assert op.result.name == "y"


def test_layer_norm_with_eps_outside_the_root_stays():
    weights = {"last": np.array([-1]), "two": TWO, "eps": np.float32(0.1), "w": normal(8), "b": normal(8, seed=1)}
    nodes = layer_norm_nodes("pow", "div")
    nodes[4:6] = [node("Sqrt", ["v"], ["rv"]), node("Add", ["rv", "eps"], ["r"])]
    check(
        nodes,
        weights,
        {"x": normal(2, 8)},
        ["mean", "sub", "full", "pow", "mean", "sqrt", "full", "add", "div", "mul", "add"],
    )


def test_normalising_another_axis_is_no_layer_norm():
    weights = {"last": np.array([1]), "two": TWO, "eps": np.float32(1e-5), "w": normal(8), "b": normal(8, seed=1)}
    proto = model(layer_norm_nodes("pow", "div"), [info("x", [2, 3, 8])], ["y"], weights)
    assert "layer_norm" not in names(from_onnx(proto))


def test_a_mean_of_another_value_is_no_layer_norm():
    weights = {"last": np.array([-1]), "two": TWO, "eps": np.float32(1e-5), "w": normal(8), "b": normal(8, seed=1)}
    nodes = layer_norm_nodes("pow", "div")
    nodes[0] = node("ReduceMean", ["z", "last"], ["m"])
    proto = model(nodes, [info("x", [2, 8]), info("z", [2, 8])], ["y"], weights)
    assert {"layer_norm", "rms_norm"} & set(names(optimize(from_onnx(proto), "raise").module)) == {"rms_norm"}


def test_rms_norm():
    nodes = [node("Mul", ["x", "x"], ["s"]), node("ReduceMean", ["s", "last"], ["v"]),
             node("Add", ["eps", "v"], ["ve"]),
             node("Sqrt", ["ve"], ["r"]), node("Div", ["x", "r"], ["n"]), node("Mul", ["n", "w"], ["y"])]  # fmt: skip
    check(nodes, {"last": np.array([-1]), "eps": np.float32(1e-6), "w": normal(8)}, {"x": normal(2, 8)}, ["rms_norm"])


@pytest.mark.parametrize("order", range(3))
def test_gelu_with_erf(order):
    head = [node("Div", ["x", "root"], ["a"]), node("Erf", ["a"], ["e"]), node("Add", ["e", "one"], ["p"])]
    tails = [
        [node("Mul", ["x", "p"], ["q"]), node("Mul", ["q", "half"], ["y"])],
        [node("Mul", ["half", "x"], ["q"]), node("Mul", ["q", "p"], ["y"])],
        [node("Mul", ["p", "half"], ["q"]), node("Mul", ["q", "x"], ["y"])],
    ]
    weights = {"root": np.float32(math.sqrt(2)), "one": ONE, "half": HALF}
    check(head + tails[order], weights, {"x": normal(2, 8)}, ["gelu"])


def test_gelu_with_tanh():
    nodes = [node("Pow", ["x", "three"], ["c"]), node("Mul", ["c", "k"], ["kc"]), node("Add", ["x", "kc"], ["i"]),
             node("Mul", ["i", "slope"], ["u"]), node("Tanh", ["u"], ["t"]), node("Add", ["t", "one"], ["p"]),
             node("Mul", ["x", "half"], ["h"]), node("Mul", ["h", "p"], ["y"])]  # fmt: skip
    weights = {"three": np.float32(3), "k": np.float32(0.044715), "one": ONE,
               "slope": np.float32(math.sqrt(2 / math.pi)),
               "half": HALF}  # fmt: skip
    module = check(nodes, weights, {"x": normal(2, 8)}, ["gelu"])
    assert next(iter(module.main.ops)).approximate == "tanh"


@pytest.mark.parametrize(("name", "value"), [("half", 0.25), ("root", 1.4), ("one", 1.5)])
def test_almost_gelu_stays(name, value):
    nodes = [node("Div", ["x", "root"], ["a"]), node("Erf", ["a"], ["e"]), node("Add", ["e", "one"], ["p"]),
             node("Mul", ["x", "p"], ["q"]), node("Mul", ["q", "half"], ["y"])]  # fmt: skip
    weights = {"root": np.float32(math.sqrt(2)), "one": ONE, "half": HALF, name: np.float32(value)}
    assert "gelu" not in names(from_onnx(model(nodes, [info("x", [2, 8])], ["y"], weights)))


def test_silu():
    check([node("Sigmoid", ["x"], ["s"]), node("Mul", ["s", "x"], ["y"])], {}, {"x": normal(4)}, ["silu"])


def attention_nodes(mask: bool, guard: bool) -> list:
    nodes = [
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("Mul", ["q", "root"], ["qs"]),
        node("Mul", ["kt", "root"], ["ks"]),
        node("MatMul", ["qs", "ks"], ["s0"]),
        node("Add", ["mask", "s0"], ["s"]) if mask else node("Identity", ["s0"], ["s"]),
        node("Softmax", ["s"], ["p0"], axis=-1),
    ]
    if guard:
        nodes += [node("IsNaN", ["p0"], ["bad"]), node("Where", ["bad", "zero", "p0"], ["p"])]
    else:
        nodes.append(node("Identity", ["p0"], ["p"]))
    return [*nodes, node("MatMul", ["p", "v"], ["y"])]


QKV = {"q": normal(2, 4, 5, 8), "k": normal(2, 4, 7, 8, seed=1), "v": normal(2, 4, 7, 6, seed=2)}
ROOT = {"root": np.float32(8**-0.25), "zero": np.float32(0)}


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_attention(mask, guard):
    inputs = QKV | ({"mask": np.where(normal(2, 1, 5, 7, seed=3) > 0, 0, -1e9).astype(np.float32)} if mask else {})
    module = check(attention_nodes(mask, guard), ROOT, inputs, ["attention"])
    (op,) = module.main.ops
    assert op.scale == pytest.approx(8**-0.5, rel=1e-6)
    assert (op.mask is not None) == mask


def test_attention_with_rows_that_are_masked_completely():
    """A mask of large negative numbers averages the values, one of minus infinity would not."""
    inputs = QKV | {"mask": np.full((2, 1, 5, 7), np.finfo(np.float32).min)}
    check(attention_nodes(True, False), ROOT, inputs, ["attention"])


def test_attention_whose_probabilities_are_returned_stays():
    proto = model(attention_nodes(False, False), [info(n, list(x.shape)) for n, x in QKV.items()], ["y", "p"], ROOT)
    assert "softmax" in names(from_onnx(proto))


def test_softmax_over_another_axis_is_no_attention():
    nodes = attention_nodes(False, False)
    nodes[5] = node("Softmax", ["s"], ["p0"], axis=-2)
    proto = model(nodes, [info(n, list(x.shape)) for n, x in QKV.items()], ["y"], ROOT)
    assert "attention" not in names(from_onnx(proto))


def test_a_mask_that_enlarges_the_scores_stays_outside():
    inputs = {"q": normal(1, 4, 5, 8), "k": normal(1, 4, 7, 8, seed=1), "v": normal(3, 4, 7, 6, seed=2),
              "mask": normal(3, 1, 5, 7)}  # fmt: skip
    proto = model(attention_nodes(True, False), [info(n, list(x.shape)) for n, x in inputs.items()], ["y"], ROOT)
    assert "attention" not in names(from_onnx(proto))
    run(proto, *inputs.values())


def test_a_mask_that_is_true_everywhere_is_dropped():
    nodes = [node("Where", ["cond", "zero", "low"], ["mask"]), *attention_nodes(True, True)]
    weights = ROOT | {"cond": np.ones((1, 1, 5, 7), bool), "low": np.float32(-1e30)}
    (op,) = check(nodes, weights, QKV, ["attention"]).main.ops
    assert op.mask is None


def test_matmul_with_a_weight_and_bias_is_linear():
    w, b = normal(16, 32), normal(32)
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Add", ["b", "m"], ["y"])]
    module = check(nodes, {"w": w, "b": b}, {"x": normal(2, 3, 16)}, ["linear"])
    assert set(module.weights) == {"w.T", "b"}
    torch.testing.assert_close(module.weights["w.T"].tensor(), torch.tensor(w.T))


def test_a_weight_with_other_readers_is_not_stored_twice():
    w = normal(40, 40)
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "w"], ["y"])]
    check(nodes, {"w": w}, {"x": normal(40, 40, seed=1)}, ["matmul", "add"])


def test_tied_embeddings_stay_one_weight():
    w = normal(50, 40)
    nodes = [node("Gather", ["w", "i"], ["e"]), node("Transpose", ["w"], ["t"]), node("MatMul", ["e", "t"], ["y"])]
    module = from_onnx(model(nodes, [info("i", [2, 3], TensorProto.INT64)], ["y"], {"w": w}))
    module = optimize(module, "raise").module
    assert names(module) == ["embedding", "linear"]
    assert list(module.weights) == ["w"]


def test_one_weight_in_two_layers_stays_one():
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("MatMul", ["h", "w"], ["y"])]
    module = check(nodes, {"w": normal(40, 40)}, {"x": normal(2, 40)}, ["linear", "linear"])
    assert len(module.weights) == 1
