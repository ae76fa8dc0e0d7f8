"""The systems that quantization.py compares: quantization to 8 bits, each as its documentation recommends.

All calibrate on the same batches, which lie in the job's folder. Layer norms, softmax and the residual stream stay in
floating numbers in all of them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from cpu_peers_job import Job
from cpu_peers_systems import Call, OnnxRuntime, OpenVino, System, Trimtab
from quantization_inputs import Batch, read_batches

Rest = Literal["f32", "bf16"]
PIPELINE = "cleanup,fuse,smooth,quantize"


def calibration(job: Job) -> list[Batch]:
    return read_batches(job.folder / "calibration")


class TrimtabInt8(Trimtab):
    """Linear layers with integers; what else multiplies, attention above all, in ``rest``.

    Args:
        rest: the precision of the other products.
        pipeline: the passes.
    """

    def __init__(self, rest: Rest, pipeline: str = PIPELINE) -> None:
        super().__init__()
        self._rest = rest
        self._pipeline = pipeline

    @property
    def label(self) -> str:
        return f"{self.name} {label_of(self._rest)}"

    def unavailable(self) -> str | None:
        return System.unavailable(self)

    def compile(self, model: Any, job: Job) -> Call:
        import trimtab

        module = trimtab.trace(model, job.torch_inputs())
        artifact = trimtab.compile(
            module, target=job.target, threads=job.threads, pipeline=self._pipeline, precision=self._rest,
            calibration=calibration(job),
        )  # fmt: skip
        session = trimtab.load(artifact.save(job.folder / f"{self.label}.trim", check=False), threads=job.threads)
        arrays = tuple(job.inputs.values())
        return lambda: session(*arrays)


class OnnxRuntimeInt8(OnnxRuntime):
    """Static quantization by ONNX Runtime's own tool, in QDQ form: weights by channel, products and convolutions only,
    after its own preparation of the model."""

    @property
    def label(self) -> str:
        return f"{self.name} int8"

    def compile(self, model: Any, job: Job) -> Call:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self._batches = iter(calibration(job))

            def get_next(self) -> Batch | None:
                return next(self._batches, None)

        logging.disable(logging.WARNING)
        prepared, quantized = (job.folder / f"{name}.onnx" for name in ("prepared", "quantized"))
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(quantized), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        )  # fmt: skip
        return super().compile(quantized, job)


class OpenVinoInt8(OpenVino):
    """NNCF's post-training quantization for transformers, which smooths and corrects biases, in OpenVINO.

    Args:
        rest: OpenVINO's hint for what is not quantized.
    """

    modules = ("openvino", "nncf")
    packages = ("openvino", "nncf")

    def __init__(self, rest: Rest) -> None:
        super().__init__(rest)

    @property
    def label(self) -> str:
        return f"{self.name} {label_of(self.precision)}"

    def load(self, job: Job) -> Path:
        return job.onnx

    def compile(self, model: Any, job: Job) -> Call:
        import nncf
        import openvino

        given = calibration(job)
        quantized = nncf.quantize(
            openvino.Core().read_model(model), nncf.Dataset(given), model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(given),
        )  # fmt: skip
        path = job.folder / "nncf.xml"
        openvino.save_model(quantized, path, compress_to_fp16=False)
        return super().compile(path, job)


def label_of(rest: str) -> str:
    """Linear layers with integers, and the precision of the rest where it is not float32."""
    return "int8" if rest == "f32" else f"int8+{rest}"


SYSTEMS: tuple[System, ...] = (
    Trimtab("f32"),
    TrimtabInt8("f32"),
    TrimtabInt8("bf16"),
    OnnxRuntimeInt8(),
    OpenVinoInt8("f32"),
    OpenVinoInt8("bf16"),
)
"""All contenders, in the order of the tables."""
