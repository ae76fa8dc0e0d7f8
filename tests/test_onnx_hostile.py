"""Broken and hostile files: a clear error, soon, and without filling the memory."""

from __future__ import annotations

import time
from contextlib import suppress

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_models import info, model, node, normal

from trimtab.errors import ImportModelError, TrimtabError, UsageError
from trimtab.frontend.onnx import from_onnx

I64 = TensorProto.INT64
SECONDS = 5.0
"""Generous: the first import also loads libraries. The memory tests below would take far longer when they failed."""


def refused(source, match: str = ".") -> ImportModelError:
    """Import must raise our error, in time."""
    start = time.monotonic()
    with pytest.raises(ImportModelError, match=match) as caught:
        from_onnx(source)
    assert time.monotonic() - start < SECONDS
    assert caught.value.what
    return caught.value


def sound() -> onnx.ModelProto:
    """A model with a bit of everything, for damaging."""
    then = helper.make_graph([node("Add", ["r", "r"], ["t"])], "then", [], [info("t", None)])
    other = helper.make_graph([node("Sub", ["r", "r"], ["e"])], "other", [], [info("e", None)])
    nodes = [
        node("MatMul", ["x", "w"], ["m"]),
        node("Add", ["m", "b"], ["a"]),
        node("Reshape", ["a", "shape"], ["r"]),
        node("If", ["yes"], ["i"], then_branch=then, else_branch=other),
        node("Slice", ["i", "one", "four", "one"], ["s"]),
        node("Shape", ["s"], ["dims"]),
        node("ConstantOfShape", ["dims"], ["zeros"]),
        node("Tile", ["b", "four"], ["tiled"]),
        node("TopK", ["tiled", "one"], ["best", "at"], axis=0),
        node("Conv", ["image", "kernel"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Resize", ["c", "", "scales"], ["big"], mode="linear"),
        node("Softmax", ["s"], ["y"], axis=-1),
    ]
    weights = {
        "w": normal(4, 8), "b": normal(8), "shape": np.array([0, 2, -1]), "one": np.array([1]), "four": np.array([4]),
        "yes": np.array(True), "kernel": normal(2, 3, 3, 3), "scales": np.array([1, 1, 2, 2], np.float32),
    }  # fmt: skip
    inputs = [info("x", ["n", 4]), info("image", [1, 3, 8, 8])]
    return model(nodes, inputs, ["y", "zeros", "best", "big"], weights)


def test_the_sound_model_is_imported():
    assert len(from_onnx(sound()).main.outputs) == 4


@pytest.mark.parametrize("data", [b"", b"\x00" * 100, b"not an onnx file at all", b"PK\x03\x04" + b"\x00" * 64])
def test_other_files(tmp_path, data):
    (tmp_path / "net.onnx").write_bytes(data)
    refused(tmp_path / "net.onnx", "not an ONNX model")


def test_truncated_files(tmp_path):
    data = sound().SerializeToString()
    for length in range(0, len(data), 37):
        (tmp_path / "net.onnx").write_bytes(data[:length])
        refused(tmp_path / "net.onnx")


def test_no_file(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        from_onnx(tmp_path / "none.onnx")
    with pytest.raises(UsageError):
        from_onnx(tmp_path)
    with pytest.raises(UsageError, match="not a model"):
        from_onnx(3)


def test_cycles():
    nodes = [node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"])]
    refused(model(nodes, [info("x", [2])], ["b"]), "before it is computed")


def test_names_that_nothing_defines():
    refused(model([node("Add", ["x", "ghost"], ["y"])], [info("x", [2])], ["y"]), "nothing defines")
    refused(model([node("Relu", ["x"], ["y"])], [info("x", [2])], ["z"]), "nothing defines")


def test_names_that_are_defined_twice():
    nodes = [node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])]
    refused(model(nodes, [info("x", [2])], ["y"]), "defined twice")
    refused(model([node("Relu", ["x"], ["y"])], [info("x", [2]), info("x", [2])], ["y"]), "not distinct")


def test_shapes_that_do_not_fit():
    error = refused(
        model([node("MatMul", ["x", "w"], ["y"], name="mm")], [info("x", [2, 5])], ["y"], {"w": normal(4, 8)})
    )
    assert "MatMul" in error.what
    assert "mm" in str(error)


@pytest.mark.parametrize("dim", [-1, -(2**62), 2**62, 2**41])
def test_absurd_dimensions_of_inputs(dim):
    refused(model([node("Relu", ["x"], ["y"])], [info("x", [dim, 2])], ["y"]), "absurd")


def test_absurd_sizes_in_total():
    refused(model([node("Relu", ["x"], ["y"])], [info("x", [2**20, 2**20, 2**20])], ["y"]), "absurdly large")


@pytest.mark.parametrize("dims", [[4, 9], [4], [2**62, 2**62], [-4, -8]])
def test_weights_whose_data_does_not_fit(dims):
    proto = sound()
    proto.graph.initializer[0].dims[:] = dims
    refused(proto, "wrong size|negative dimension")


def test_weights_of_unknown_and_strange_types():
    proto = sound()
    proto.graph.initializer[0].data_type = 99
    refused(proto, "unknown element type")
    proto.graph.initializer[0].data_type = TensorProto.STRING
    refused(proto)


BOMB = 2**40
BOMBS = {
    "ConstantOfShape": [node("ConstantOfShape", ["n"], ["z"])],
    "Expand": [node("Expand", ["one", "n"], ["z"])],
    "Tile": [node("Tile", ["one", "n"], ["z"])],
    "Range": [node("Range", ["zero", "ns", "s"], ["z"])],
    "Pad": [node("Pad", ["one", "pads"], ["z"])],
}


@pytest.mark.parametrize("kind", BOMBS)
def test_constants_that_unfold_are_not_computed(kind):
    """They stay ops; nothing of their size is allocated."""
    weights = {"n": np.array([BOMB]), "ns": np.array(BOMB), "zero": np.array(0), "s": np.array(1),
               "one": np.array([1.0], np.float32),
               "pads": np.array([0, BOMB])}  # fmt: skip
    codes = {"z": I64} if kind == "Range" else {}
    start = time.monotonic()
    module = from_onnx(model(BOMBS[kind], [info("x", [1])], ["z"], weights, codes=codes))
    assert time.monotonic() - start < SECONDS
    assert module.weight_bytes < 1000


def test_sizes_that_grow_without_end():
    """Squaring a size again and again: numbers with millions of digits, were it followed."""
    nodes = [node("Shape", ["x"], ["s0"])] + [node("Mul", [f"s{i}", f"s{i}"], [f"s{i + 1}"]) for i in range(60)]
    start = time.monotonic()
    from_onnx(model(nodes, [info("x", ["n"])], ["s60"], codes={"s60": I64}))
    assert time.monotonic() - start < SECONDS


def test_functions_that_expand_without_end():
    """Each function calls the next one twice: 2^40 nodes."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    functions = [helper.make_function("local", "F0", ["a"], ["c"], [node("Relu", ["a"], ["c"])], opsets)]
    for i in range(1, 40):
        body = [node(f"F{i - 1}", ["a"], ["b"], domain="local"), node(f"F{i - 1}", ["b"], ["c"], domain="local")]
        functions.append(helper.make_function("local", f"F{i}", ["a"], ["c"], body, opsets))
    proto = model(
        [node("F39", ["x"], ["y"], domain="local")],
        [info("x", [2])],
        ["y"],
        functions=functions,
        domains=[("local", 1)],
    )
    refused(proto, "expand to too many nodes")


def test_functions_that_call_themselves():
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    functions = [helper.make_function("local", name, ["a"], ["b"], [node(other, ["a"], ["b"], domain="local")], opsets)
                 for name, other in (("F", "G"), ("G", "F"))]  # fmt: skip
    proto = model(
        [node("F", ["x"], ["y"], domain="local")], [info("x", [2])], ["y"], functions=functions, domains=[("local", 1)]
    )
    refused(proto, "calls itself")


@pytest.mark.parametrize("depth", [12, 400])
def test_deep_nesting(tmp_path, depth):
    """Either our limit or protobuf's own refuses it; a moderate depth is fine."""
    graph = helper.make_graph([node("Relu", ["x"], ["o0"])], "g", [], [info("o0", None)])
    data = graph.SerializeToString()
    for i in range(1, depth):
        step = onnx.NodeProto(op_type="If", input=["c"], output=[f"o{i}"])
        for name in ("then_branch", "else_branch")[: 1 if depth > 20 else 2]:
            attribute = step.attribute.add(name=name, type=onnx.AttributeProto.GRAPH)
            attribute.g.SetInParent()
        message = _with_subgraph(step, data)
        data = _length(1, message) + _length(2, b"g") + _length(12, info(f"o{i}", None).SerializeToString())
        if len(data) > 1 << 22:
            break
    graph_bytes = (
        data
        + _length(11, info("x", [2]).SerializeToString())
        + _length(11, info("c", [], TensorProto.BOOL).SerializeToString())
    )
    head = onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 20)]).SerializeToString()
    (tmp_path / "net.onnx").write_bytes(head + _length(7, graph_bytes))
    refused(tmp_path / "net.onnx", "nested too deep|decode as protobuf|condition is computed")


def _with_subgraph(step: onnx.NodeProto, graph: bytes) -> bytes:
    """The node's bytes, its graph attributes filled with ``graph`` without parsing it."""
    names = [attribute.name for attribute in step.attribute]
    del step.attribute[:]
    data = step.SerializeToString()
    for name in names:
        data += _length(5, _length(1, name.encode()) + _length(6, graph) + b"\xa0\x01\x05")
    return data


def _length(field: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(field << 3 | 2) + _varint(len(payload)) + payload


def _varint(number: int) -> bytes:
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


def test_attributes_of_the_wrong_kind():
    step = node("Softmax", ["x"], ["y"])
    step.attribute.append(helper.make_attribute("axis", "last"))
    refused(model([step], [info("x", [2])], ["y"]), "wrong kind")


@pytest.mark.parametrize("pads", [[0, 0, 2**40, 0], [1, 1, 1], [2**62] * 4])
def test_absurd_windows(pads):
    proto = model(
        [node("Conv", ["x", "k"], ["y"], pads=pads)], [info("x", [1, 3, 8, 8])], ["y"], {"k": normal(2, 3, 3, 3)}
    )
    refused(proto)


def test_a_newer_opset_than_is_known():
    refused(model([node("Relu", ["x"], ["y"])], [info("x", [2])], ["y"], opset=999), "opset")


SOUND = sound().SerializeToString()


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(1, 255)), min_size=1, max_size=4), st.integers(0, 24)
)
@example([(0, 255)], 0)
def test_damaged_bytes_never_crash(tmp_path, flips, cut):
    """Flip bytes and cut a piece out: the import succeeds or raises our error, and nothing else."""
    data = bytearray(SOUND)
    for place, mask in flips:
        data[place] ^= mask
    del data[flips[0][0] : flips[0][0] + cut]
    (tmp_path / "net.onnx").write_bytes(data)
    start = time.monotonic()
    with suppress(TrimtabError):
        from_onnx(tmp_path / "net.onnx")
    assert time.monotonic() - start < SECONDS
