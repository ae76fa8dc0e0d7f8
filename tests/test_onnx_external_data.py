"""External data: mapped, not read; and never outside the model's directory."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx_models import info, model, node, normal, run

from trimtab.errors import ImportModelError
from trimtab.frontend.onnx import from_onnx
from trimtab.frontend.onnx.embedded_data import read_without_weights


@pytest.fixture
def saved(tmp_path):
    """A model with one external weight, and that weight."""
    w = normal(64, 32)
    proto = model([node("MatMul", ["x", "w"], ["y"])], [info("x", ["n", 64])], ["y"], {"w": w})
    path = tmp_path / "inside" / "net.onnx"
    path.parent.mkdir()
    onnx.save(proto, path, save_as_external_data=True, location="net.data", size_threshold=0)
    return path, w


def rewrite(path, **entries: str) -> None:
    """Change fields of the weight's reference to its data."""
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key in entries:
            entry.value = entries.pop(entry.key)
    for key, value in entries.items():
        proto.graph.initializer[0].external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def test_weights_are_mapped_and_read_when_used(saved):
    path, w = saved
    module = from_onnx(path)
    (weight,) = module.weights.values()
    assert weight.nbytes == w.nbytes
    # Changing the file shows that the data was not copied at import.
    data = np.memmap(path.parent / "net.data", np.float32, mode="r+")
    data[:] = 1.0
    data.flush()
    torch.testing.assert_close(run(module, np.ones((1, 64), np.float32))[0], torch.full((1, 32), 64.0))


def test_a_file_larger_than_memory_allows_is_only_mapped(tmp_path):
    """A sparse data file of 64 GB costs nothing until it is read."""
    rows = 1 << 24
    proto = model([node("Gather", ["w", "i"], ["y"])], [info("i", [1], onnx.TensorProto.INT64)], ["y"])
    weight = proto.graph.initializer.add(name="w", data_type=1, dims=[rows, 1024], data_location=1)
    for key, value in (("location", "big.data"), ("offset", "0"), ("length", str(rows * 4096))):
        weight.external_data.add(key=key, value=value)
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    with open(tmp_path / "big.data", "wb") as file:
        file.truncate(rows * 4096)
    module = from_onnx(tmp_path / "net.onnx")
    assert module.weight_bytes == rows * 4096
    assert run(module, np.array([rows - 1]))[0].abs().sum() == 0


@pytest.mark.parametrize(
    "location", ["../outside.data", "/etc/passwd", "link.data", "sub/../../outside.data", "", ".", "a\0b"]
)
def test_paths_out_of_the_directory_are_refused(saved, location):
    path, w = saved
    (path.parent.parent / "outside.data").write_bytes(w.tobytes())
    (path.parent / "sub").mkdir()
    (path.parent / "link.data").symlink_to(path.parent.parent / "outside.data")
    rewrite(path, location=location)
    with pytest.raises(ImportModelError, match=r"outside the model's directory|malformed"):
        from_onnx(path)


def test_a_missing_file_is_named(saved):
    path, _ = saved
    (path.parent / "net.data").unlink()
    with pytest.raises(ImportModelError, match=r"external data is missing.*net\.data"):
        from_onnx(path)


@pytest.mark.parametrize(
    "change", [{"offset": "4096"}, {"offset": "99999999999999"}, {"length": "8"}, {"offset": "-4"}, {"length": "-1"}]
)
def test_data_out_of_bounds_is_refused(saved, change):
    path, _ = saved
    rewrite(path, **change)
    with pytest.raises(ImportModelError):
        from_onnx(path)


def test_a_truncated_data_file_is_refused(saved):
    path, w = saved
    (path.parent / "net.data").write_bytes(w.tobytes()[:-4])
    with pytest.raises(ImportModelError, match="outside its file"):
        from_onnx(path)


@pytest.mark.parametrize("shift", range(4))
def test_weights_inside_the_model_file_are_mapped_too(tmp_path, shift):
    """At any offset: the name of the graph moves the data by a byte a time."""
    w, b = normal(64, 32), normal(32)
    proto = model([node("Gemm", ["x", "w", "b"], ["y"])], [info("x", ["n", 64])], ["y"], {"w": w, "b": b})
    proto.producer_name = "p" * (1 + shift)
    onnx.save(proto, tmp_path / "net.onnx")
    assert len(read_without_weights(tmp_path / "net.onnx")) < 1000
    x = normal(3, 64, seed=1)
    torch.testing.assert_close(run(from_onnx(tmp_path / "net.onnx"), x)[0], torch.tensor(x @ w + b))


def test_a_model_file_of_more_than_2_gb_is_read(tmp_path):
    """Beyond what protobuf parses: one weight of 3 GB, a hole in the file."""
    rows = 3 << 18
    proto = model([node("Gather", ["w", "i"], ["y"])], [info("i", [1], onnx.TensorProto.INT64)], ["y"])
    head = proto.graph.SerializeToString()
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[rows, 1024]).SerializeToString()
    raw = b"\x4a" + varint(rows * 4096)
    inner = b"\x2a" + varint(len(tensor) + len(raw) + rows * 4096) + tensor + raw
    del proto.graph.node[:]
    proto.ClearField("graph")
    start = proto.SerializeToString() + b"\x3a" + varint(len(head) + len(inner) + rows * 4096) + head + inner
    with open(tmp_path / "net.onnx", "wb") as file:
        file.write(start)
        file.truncate(len(start) + rows * 4096)
    module = from_onnx(tmp_path / "net.onnx")
    assert module.weight_bytes == rows * 4096


def varint(number: int) -> bytes:
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes((*data, number))
