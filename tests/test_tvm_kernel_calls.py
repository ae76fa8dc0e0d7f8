"""What the compiler says about kernel calls: their order, their ops, and their work at every size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import trimtab
from trimtab.artifact import Artifact
from trimtab.ir import Builder, DType, Graph, Module, TensorType, Value, ops
from trimtab.ir.analysis import module_cost
from trimtab.ir.dims import symbol
from trimtab.runtime.profile import KernelEvent

pytest.importorskip("tvm")

BATCH = symbol("batch", 1, 64)


def f32(*shape: object) -> TensorType:
    return TensorType(DType.F32, shape)  # type: ignore[arg-type]


def weight(b: Builder, name: str, *shape: int) -> Value:
    return b.weight(name, torch.randn(shape, generator=torch.Generator().manual_seed(len(name))))


def kernels_run(artifact: Artifact, folder: Path, *inputs: np.ndarray) -> list[KernelEvent]:
    artifact.save(folder / "m.trim", check=False)
    with trimtab.load(folder / "m.trim", threads=1) as session:
        return [event for event in session.profile(*inputs, repeat=1).events if event.is_kernel]


def embedded_perceptron() -> Module:
    b = Builder()
    ids = b.input("ids", TensorType(DType.I32, (BATCH, 5)))
    h = b(ops.Embedding(weight(b, "table", 1000, 16), ids))
    up = b(ops.Gelu(b(ops.Linear(h, weight(b, "up", 64, 16), weight(b, "bias", 64)))))
    b.output(b(ops.Add(b(ops.Linear(up, weight(b, "down", 16, 64))), h)))
    return b.module


@pytest.mark.parametrize("batch", [1, 7])
def test_work_of_every_call_at_run_time(tmp_path: Path, batch: int) -> None:
    module = embedded_perceptron()
    artifact = trimtab.compile(module, target="native")
    events = kernels_run(artifact, tmp_path, np.zeros((batch, 5), np.int32))
    assert [event.name for event in events] == [call.name for call in artifact.code.calls]
    assert [op for event in events for op in event.ops] == ["embedding", "linear", "gelu", "linear", "add"]
    assert sum(event.macs for event in events) == module_cost(module).bind({"batch": batch}).macs
    gather, up, down = events
    rows = batch * 5
    assert (gather.macs, gather.factors) == (0, "")
    assert gather.bytes_read == rows * 16 * 4 + rows * 4  # the rows that are picked, not the table
    assert gather.bytes_written == rows * 16 * 4
    assert (up.macs, up.factors) == (rows * 16 * 64, "f32")
    assert up.bytes_read == (rows * 16 + 64 * 16 + 64) * 4
    assert down.bytes_read == (rows * 64 + 16 * 64 + rows * 16) * 4
    assert down.bytes_written == rows * 16 * 4


def test_a_repeated_body_runs_its_kernels_every_time(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", f32(BATCH, 16))
    table = weight(b, "table", 16, 16)
    body = Graph()
    h = body.add_input(f32(BATCH, 16), "h")
    grown = body.ops.append(ops.Linear(h, body.weight(b.module.weights[table.weight]))).result
    body.set_outputs([body.ops.append(ops.Softmax(grown, 1)).result])
    b.output(b(ops.Tanh(b(ops.Repeat((x,), (), (), body, 3)))))
    artifact = trimtab.compile(b.module, target="native", pipeline=None)
    events = kernels_run(artifact, tmp_path, np.zeros((2, 16), np.float32))
    assert [event.ops for event in events] == [("linear",), ("softmax",)] * 3 + [("tanh",)]
    assert sum(event.macs for event in events) == 3 * 2 * 16 * 16


def test_what_nobody_reads_is_no_call() -> None:
    b = Builder()
    x = b.input("x", f32(4, 6))
    b(ops.Exp(x))
    b.output(b(ops.Tanh(x)))
    artifact = trimtab.compile(b.module, target="native", pipeline=None)
    assert [call.ops for call in artifact.code.calls] == [("tanh",)]


def test_the_source_lines_of_a_traced_model_are_told() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval()
    artifact = trimtab.compile(trimtab.trace(net, (torch.zeros(2, 8),)), target="native")
    (call,) = artifact.manifest.variants[0].kernels
    assert [op.split(" at ")[0] for op in call.ops] == ["linear", "relu"]
    assert (call.macs, call.factors) == (2 * 8 * 8, "f32")


def test_equal_layers_share_their_kernels() -> None:
    def kernels(layers: int) -> list[str]:
        layer = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True, activation="gelu")
        net = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
        artifact = trimtab.compile(trimtab.trace(net, (torch.randn(1, 7, 32),)), target="native")
        return [call.name for call in artifact.code.calls]

    two, five = kernels(2), kernels(5)
    assert len(five) > 2 * len(two)
    assert set(five) == set(two)
