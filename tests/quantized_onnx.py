"""A transformer encoder in ONNX, quantized by ONNX Runtime, and the values inside of it.

static = quantized_statically(encoder(seed=1), per_channel=True)
values = run(static, inputs, every_integer(static))
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

Array = NDArray[Any]
BLOCKS, BATCH, LENGTH, WIDTH, HEADS, HIDDEN, CLASSES = 2, 2, 13, 48, 3, 80, 7


class _Writer:
    """Nodes and initializers of a graph under construction."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def __call__(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, data: Any) -> str:
        name = f"c_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(data), name))
        return name

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> str:
        return self.constant((mean + scale * self.rng.standard_normal(shape)).astype(np.float32))

    def norm(self, x: str) -> str:
        return self(
            "LayerNormalization", x, self.normal(WIDTH, scale=0.2, mean=1), self.normal(WIDTH, scale=0.2), axis=-1
        )

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        product = self("MatMul", x, self.normal(inputs, outputs, scale=inputs**-0.5))
        return self("Add", product, self.normal(outputs, scale=0.1))

    def heads(self, x: str, *perm: int) -> str:
        split = self("Reshape", x, self.constant(np.array([BATCH, LENGTH, HEADS, WIDTH // HEADS])))
        return self("Transpose", split, perm=perm)


def encoder(seed: int) -> onnx.ModelProto:
    """``images`` f32 ``[2, 3, 13, 4]`` cut in patches by a convolution, two blocks, and a class by ``Gemm``."""
    w = _Writer(seed)
    patches = w(
        "Conv", "images", w.normal(WIDTH, 3, 1, 4, scale=0.3), w.normal(WIDTH, scale=0.1),
        kernel_shape=[1, 4], strides=[1, 4],
    )  # fmt: skip
    x = w("Transpose", w("Reshape", patches, w.constant(np.array([BATCH, WIDTH, LENGTH]))), perm=[0, 2, 1])
    for _ in range(BLOCKS):
        h = w.norm(x)
        q, k, v = (w.linear(h, WIDTH, WIDTH) for _ in range(3))
        scores = w("MatMul", w.heads(q, 0, 2, 1, 3), w.heads(k, 0, 2, 3, 1))
        scores = w("Mul", scores, w.constant(np.float32((WIDTH // HEADS) ** -0.5)))
        mixed = w("MatMul", w("Softmax", scores, axis=-1), w.heads(v, 0, 2, 1, 3))
        joined = w("Transpose", mixed, perm=[0, 2, 1, 3])
        joined = w("Reshape", joined, w.constant(np.array([BATCH, LENGTH, WIDTH])))
        x = w("Add", x, w.linear(joined, WIDTH, WIDTH))
        h = w.linear(w.norm(x), WIDTH, HIDDEN)
        erf = w("Erf", w("Mul", h, w.constant(np.float32(2**-0.5))))
        gelu = w("Mul", w("Mul", h, w.constant(np.float32(0.5))), w("Add", erf, w.constant(np.float32(1))))
        x = w("Add", x, w.linear(gelu, HIDDEN, WIDTH))
    pooled = w("ReduceMean", w.norm(x), axes=[1], keepdims=0)
    logits = w("Gemm", pooled, w.normal(CLASSES, WIDTH, scale=0.2), w.normal(CLASSES, scale=0.1), transB=1)
    w.nodes.append(helper.make_node("Identity", [logits], ["logits"]))
    graph = helper.make_graph(
        w.nodes, "encoder",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [BATCH, 3, LENGTH, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [BATCH, CLASSES])],
        w.initializers,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def images(seed: int) -> dict[str, Array]:
    return {"images": np.random.default_rng(seed).standard_normal((BATCH, 3, LENGTH, 4)).astype(np.float32)}


class _Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self._batches: Iterator[dict[str, Array]] = map(images, range(100, 108))

    def get_next(self) -> dict[str, Array] | None:  # type: ignore[override]
        return next(self._batches, None)


def quantized_statically(
    model: onnx.ModelProto, *, per_channel: bool, activations: QuantType = QuantType.QUInt8,
    weights: QuantType = QuantType.QInt8,
) -> onnx.ModelProto:  # fmt: skip
    """``model`` with QuantizeLinear and DequantizeLinear around what it computes, from calibration on 8 batches."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "static.onnx"
        quantize_static(
            model, path, _Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel,
            activation_type=activations, weight_type=weights,
        )  # fmt: skip
        return onnx.load(path)


def quantized_dynamically(model: onnx.ModelProto, *, per_channel: bool, weights: QuantType) -> onnx.ModelProto:
    """``model`` with weights of bytes, and activations that are quantized by what they are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dynamic.onnx"
        quantize_dynamic(model, path, per_channel=per_channel, weight_type=weights, op_types_to_quantize=["MatMul"])
        return onnx.load(path)


def integers_of(model: onnx.ModelProto) -> list[tuple[str, str, str]]:
    """The value, the scale and the integers of every node that quantizes, in order of execution."""
    kinds = {"QuantizeLinear": (1, 0), "DynamicQuantizeLinear": (None, 1)}
    found = []
    for node in model.graph.node:
        if node.op_type in kinds:
            scale = node.input[1] if node.op_type == "QuantizeLinear" else node.output[1]
            found.append((node.input[0], scale, node.output[0]))
    return found


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of ``model`` that gives these values too; inputs and initializers among them are left out."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    inferred = onnx.shape_inference.infer_shapes(model)
    types = {info.name: info for info in [*inferred.graph.value_info, *model.graph.output]}
    known = {info.name for info in [*model.graph.input, *model.graph.output, *model.graph.initializer]}
    copy.graph.output.extend(types[name] for name in dict.fromkeys(names) if name not in known)
    return copy


def run(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs of ONNX Runtime with graph optimizations disabled."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))
