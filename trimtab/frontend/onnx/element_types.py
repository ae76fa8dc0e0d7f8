"""ONNX element types and the element types of the IR."""

from __future__ import annotations

import onnx_ir

from trimtab.ir.dtypes import DType

_PAIRS = {
    onnx_ir.DataType.FLOAT: DType.F32,
    onnx_ir.DataType.DOUBLE: DType.F64,
    onnx_ir.DataType.FLOAT16: DType.F16,
    onnx_ir.DataType.BFLOAT16: DType.BF16,
    onnx_ir.DataType.INT64: DType.I64,
    onnx_ir.DataType.INT32: DType.I32,
    onnx_ir.DataType.INT16: DType.I16,
    onnx_ir.DataType.INT8: DType.I8,
    onnx_ir.DataType.UINT64: DType.U64,
    onnx_ir.DataType.UINT32: DType.U32,
    onnx_ir.DataType.UINT16: DType.U16,
    onnx_ir.DataType.UINT8: DType.U8,
    onnx_ir.DataType.BOOL: DType.BOOL,
}
_BACK = {ours: theirs for theirs, ours in _PAIRS.items()}

SUPPORTED_TEXT = ", ".join(str(dtype) for dtype in _PAIRS.values())


def dtype_of(code: int) -> DType | None:
    """The IR's element type for an ONNX type code; None for strings, complex, float8, and sub-byte types."""
    try:
        return _PAIRS.get(onnx_ir.DataType(code))
    except ValueError:
        return None


def name_of(code: int) -> str:
    """The name of an ONNX type code, also of one that does not exist."""
    try:
        return onnx_ir.DataType(code).name
    except ValueError:
        return f"type code {code}"


def onnx_code(dtype: DType) -> int:
    """The ONNX type code of an element type."""
    return int(_BACK[dtype])
