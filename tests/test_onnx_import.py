"""The ONNX importer: names, weights, shapes that vanish, dynamic axes, control flow, functions."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_models import info, model, names, node, normal, run

from trimtab.errors import ImportModelError, UnsupportedOpError, UsageError
from trimtab.frontend.onnx import from_onnx
from trimtab.ir import verify

I64 = TensorProto.INT64


def test_a_linear_layer_keeps_its_names_weights_and_places(tmp_path):
    w, b = normal(8, 4), normal(8)
    proto = model([node("Gemm", ["x", "w", "b"], ["y"], name="fc", transB=1)], [info("x", ["batch", 4])], ["y"],
                  {"w": w, "b": b})  # fmt: skip
    onnx.save(proto, tmp_path / "net.onnx")
    module = from_onnx(tmp_path / "net.onnx")
    verify(module)
    (op,) = module.main.ops
    assert op.name == "linear"
    assert op.result.name == "y"
    assert str(op.location) == "net.onnx in fc"
    assert set(module.weights) == {"w", "b"}
    assert str(module.main.inputs[0].type) == "f32[batch, 4]"
    assert module.main.output_names == ["y"]
    x = normal(3, 4, seed=1)
    torch.testing.assert_close(run(module, x)[0], torch.tensor(x @ w.T + b))


def test_shape_computations_leave_no_trace():
    """Flatten the leading axes as exporters write it: with Shape, Slice, Concat, ReduceProd and Cast."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Slice", ["s", "zero", "two", "zero"], ["head"]),
        node("ReduceProd", ["head"], ["rows"], keepdims=1),
        node("Cast", ["rows"], ["rows32"], to=TensorProto.INT32),
        node("Cast", ["rows32"], ["rows64"], to=I64),
        node("Concat", ["rows64", "minus"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["y"]),
    ]
    constants = {"zero": np.array([0]), "two": np.array([2]), "minus": np.array([-1])}
    proto = model(nodes, [info("x", ["batch", "seq", 6])], ["y"], constants)
    module = from_onnx(proto)
    assert names(module) == ["reshape"]
    assert str(module.main.outputs[0].type) == "f32[batch*seq, 6]"
    assert not module.weights
    x = normal(2, 3, 6)
    torch.testing.assert_close(run(module, x)[0], torch.tensor(x).reshape(6, 6))


def test_a_size_used_as_data_stays():
    nodes = [node("Shape", ["x"], ["s"]), node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
             node("ReduceSum", ["f"], ["n"]),
             node("Div", ["x", "n"], ["y"])]  # fmt: skip
    module = from_onnx(model(nodes, [info("x", ["n", 3])], ["y"]))
    x = normal(4, 3)
    torch.testing.assert_close(run(module, x)[0], torch.tensor(x) / 7)
    assert "dim_value" in names(module)


def test_a_table_bounds_the_sequence():
    """Cutting a table of 16 rows to the length of the input makes sense for up to 16 only."""
    nodes = [
        node("Shape", ["ids"], ["n"], start=1, end=2),
        node("Slice", ["table", "zero", "n", "zero"], ["rows"]),
        node("Gather", ["words", "ids"], ["e"]),
        node("Add", ["e", "rows"], ["y"]),
    ]
    weights = {"table": normal(16, 4), "words": normal(10, 4), "zero": np.array([0])}
    module = from_onnx(model(nodes, [info("ids", ["batch", "seq"], I64)], ["y"], weights))
    verify(module)
    assert {s.name: s.max for s in module.symbols().values()} == {"batch": None, "seq": 16}
    ids = np.array([[1, 2, 9]])
    torch.testing.assert_close(run(module, ids)[0][0], torch.tensor(weights["words"][ids[0]] + weights["table"][:3]))


def test_dims_fix_and_bound_dynamic_axes():
    proto = model([node("Relu", ["x"], ["y"])], [info("x", ["batch", "a b", None])], ["y"])
    module = from_onnx(proto, dims={"batch": (2, 8), "a b": 5})
    assert str(module.main.inputs[0].type) == "f32[batch, 5, x_axis2]"
    assert module.symbols()["batch"].range_text == "2..8"
    with pytest.raises(UsageError, match="does not have"):
        from_onnx(proto, dims={"sequence": 3})


def test_an_input_that_holds_a_shape_must_be_fixed():
    proto = model([node("Reshape", ["x", "shape"], ["y"])], [info("x", [2, 6]), info("shape", [2], I64)], ["y"])
    with pytest.raises(UnsupportedOpError, match="constants=\\{'shape': array\\}") as caught:
        from_onnx(proto)
    assert "Reshape" in caught.value.what
    module = from_onnx(proto, constants={"shape": np.array([3, 4])})
    assert [value.name for value in module.main.inputs] == ["x"]
    assert run(module, normal(2, 6))[0].shape == (3, 4)
    with pytest.raises(UsageError):
        from_onnx(proto, constants={"wrong": np.array([1])})


@pytest.mark.parametrize("rank", [2, 3])
def test_if_with_a_condition_from_sizes_is_decided(rank):
    def branch(op: str) -> onnx.GraphProto:
        return helper.make_graph([node(op, ["x"], [f"{op}_out"])], op, [], [info(f"{op}_out", None)])

    nodes = [node("Shape", ["x"], ["s"]), node("Size", ["s"], ["rank"]), node("Equal", ["rank", "three"], ["c"]),
             node("If", ["c"], ["y"], then_branch=branch("Exp"), else_branch=branch("Neg"))]  # fmt: skip
    module = from_onnx(model(nodes, [info("x", ["n"] * rank)], ["y"], {"three": np.array(3)}))
    assert names(module) == (["exp"] if rank == 3 else ["neg"])


def test_if_on_data_is_refused():
    branch = helper.make_graph([node("Exp", ["x"], ["e"])], "b", [], [info("e", None)])
    nodes = [node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    proto = model(nodes, [info("x", [2]), info("c", [], TensorProto.BOOL)], ["y"])
    with pytest.raises(UnsupportedOpError, match="condition is computed from data"):
        from_onnx(proto)
    assert names(from_onnx(proto, constants={"c": np.array(True)})) == ["exp"]


def test_model_local_functions_are_inlined_with_their_attributes():
    scale = node("Constant", [], ["a"])
    scale.attribute.append(
        onnx.AttributeProto(name="value_float", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT)
    )
    body = [scale, node("Mul", ["v", "a"], ["w"])]
    function = helper.make_function("local", "Scale", ["v"], ["w"], body, [helper.make_opsetid("", 20)], ["alpha"])
    nodes = [
        node("Scale", ["x"], ["h"], domain="local", alpha=3.0),
        node("Scale", ["h"], ["y"], domain="local", alpha=2.0),
    ]
    proto = model(nodes, [info("x", [2])], ["y"], functions=[function], domains=[("local", 1)])
    torch.testing.assert_close(run(proto, np.array([1.0, -2.0], np.float32))[0], torch.tensor([6.0, -12.0]))


def test_operators_without_a_handler_use_their_definition():
    x = normal(2, 3, 4)
    (y,) = run(model([node("MeanVarianceNormalization", ["x"], ["y"], axes=[0, 2])], [info("x", [2, 3, 4])], ["y"]), x)
    t = torch.tensor(x)
    centred = t - t.mean((0, 2), keepdim=True)
    torch.testing.assert_close(y, centred / (centred.square().mean((0, 2), keepdim=True).sqrt() + 1e-9))


def test_all_unsupported_operators_are_reported_at_once():
    nodes = [node("GridSample", ["x", "g"], ["a"]), node("NonZero", ["a"], ["b"]), node("Foo", ["b"], ["y"])]
    proto = model(nodes, [info("x", [1, 1, 4, 4]), info("g", [1, 2, 2, 2])], ["y"])
    with pytest.raises(UnsupportedOpError) as caught:
        from_onnx(proto)
    text = str(caught.value)
    assert "GridSample" in text
    assert "Foo" in text


def test_old_definitions_are_refused_with_the_way_out():
    with pytest.raises(UnsupportedOpError, match="version_converter"):
        from_onnx(model([node("Hardmax", ["x"], ["y"])], [info("x", [2, 3])], ["y"], opset=11))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_softmax_of_old_opsets_takes_its_input_for_a_matrix(axis):
    x = normal(2, 3, 4)
    proto = model([node("Softmax", ["x"], ["y"], axis=axis)], [info("x", ["batch", 3, 4])], ["y"], opset=11)
    rows = torch.tensor(x).flatten(axis) if axis else torch.tensor(x).flatten()
    torch.testing.assert_close(run(proto, x)[0], rows.softmax(-1).reshape(2, 3, 4))


def test_attributes_that_no_handler_knows_are_not_ignored():
    """Sliding windows came to Attention in a later opset: they change the result."""
    inputs = [info(name, [1, 2, 6, 4]) for name in "qkv"]
    proto = model([node("Attention", ["q", "k", "v"], ["y"], left_window_size=1)], inputs, ["y"], opset=25)
    q, k, v = (normal(1, 2, 6, 4, seed=s) for s in range(3))
    distance = torch.arange(6)[:, None] - torch.arange(6)
    expected = torch.nn.functional.scaled_dot_product_attention(*map(torch.tensor, (q, k, v)), attn_mask=distance <= 1)
    torch.testing.assert_close(run(proto, q, k, v)[0], expected)


def test_stack_traces_of_torch_become_locations():
    step = node("Relu", ["x"], ["y"])
    trace = """File "/home/me/net.py", line 12, in forward
    x = self.act(x)
  File "/lib/torch/nn/functional.py", line 3, in relu
    y = g(x)"""
    step.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=trace)
    (op,) = from_onnx(model([step], [info("x", [1])], ["y"])).main.ops
    assert str(op.location) == "/home/me/net.py:12 in forward"


def test_a_contradiction_about_an_output_is_an_error():
    proto = model([node("Relu", ["x"], ["y"])], [info("x", [2, 3])], ["y"])
    proto.graph.output[0].CopyFrom(info("y", [2, 4]))
    with pytest.raises(ImportModelError, match="another type than the model states"):
        from_onnx(proto)


def test_a_dynamic_range_and_mask():
    """arange(seq) <= position, with a symbolic length."""
    nodes = [node("Shape", ["x"], ["n1"], start=1, end=2), node("Squeeze", ["n1"], ["n"]),
             node("Range", ["zero", "n", "one"], ["r"]), node("Unsqueeze", ["r", "last"], ["col"]),
             node("LessOrEqual", ["r", "col"], ["m"]), node("Cast", ["m"], ["y"], to=1)]  # fmt: skip
    weights = {"zero": np.array(0), "one": np.array(1), "last": np.array([1])}
    module = from_onnx(model(nodes, [info("x", ["b", "seq"])], ["y"], weights))
    torch.testing.assert_close(run(module, normal(1, 4))[0], torch.ones(4, 4).tril())


def test_parameters_of_layers_are_trainable():
    nodes = [node("BatchNormalization", ["x", "g", "b", "m", "v"], ["n"]), node("Conv", ["n", "k"], ["c"]),
             node("Mul", ["c", "scale"], ["y"])]  # fmt: skip
    weights = {
        "g": normal(3),
        "b": normal(3),
        "m": normal(3),
        "v": normal(3) ** 2 + 1,
        "k": normal(2, 3, 1, 1),
        "scale": normal(2, 1, 1),
    }
    module = from_onnx(model(nodes, [info("x", [1, 3, 4, 4])], ["y"], weights))
    assert {id for id, weight in module.weights.items() if weight.trainable} == {"g", "b", "k"}


def test_negative_token_ids_count_from_the_end():
    w = normal(10, 4)
    proto = model([node("Gather", ["w", "i"], ["y"])], [info("i", [3], I64)], ["y"], {"w": w})
    assert names(from_onnx(proto)) == ["embedding"]
    torch.testing.assert_close(run(proto, np.array([-1, 0, -10]))[0], torch.tensor(w[[-1, 0, -10]]))
