"""Matrix products and convolutions of quantized numbers.

Sums of products of bytes are exact in 32 bits, and so is what zero points take away from them: every form below gives
the integers of the definition, however it is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.ops.convolution import convolve, kernel_sizes
from trimtab.frontend.onnx.ops.quantization import is_zero, quantize
from trimtab.frontend.onnx.ops.windows import read_window
from trimtab.frontend.onnx.registry import CONTRIB, onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.integer_sums import zero_of_product
from trimtab.ir.types import TensorType

if TYPE_CHECKING:
    import torch

_BYTES = (DType.I8, DType.U8)


@onnx_op("MatMulInteger", since=10)
def matmul_integer(node: Node) -> Value:
    sums, zero = _matrix_product(node, node.input(0), node.optional(2), node.input(1), node.optional(3))
    return sums if zero is None else node.emit(ops.Sub(sums, zero))


@onnx_op("QLinearMatMul", since=10)
def qlinear_matmul(node: Node) -> Value:
    """The sums, times both scales in one product, quantized again."""
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (node.input(i) for i in range(8))

    def factor(scale: Value, rows: bool) -> Value:
        return node.cast(_along_rows(node, scale) if rows else _tensor_wide(node, scale), DType.F32)

    sums, zero = _matrix_product(node, a, a_zero, b, b_zero)
    scale = node.emit(ops.Mul(factor(a_scale, True), factor(b_scale, False)))
    real = node.emit(ops.Dequantize(sums, scale, zero))
    return quantize(node, real, factor(y_scale, True), _along_rows(node, y_zero), y_zero.type.dtype)


def _matrix_product(
    node: Node, x: Value, x_zero: Value | None, y: Value, y_zero: Value | None
) -> tuple[Value, Value | None]:
    """Sums of products of x and y as they are stored, in i32, and what is to be subtracted from them.

    A zero point of x may belong to its rows, one of y to its columns.
    """
    if x_zero is not None:
        x_zero = None if is_zero(node, x_zero) else _along_rows(node, node.cast(x_zero, DType.I32))
    y_zero = None if y_zero is None or is_zero(node, y_zero) else _tensor_wide(node, node.cast(y_zero, DType.I32))
    if min(x.type.rank, y.type.rank) < 2 or any(v.type.dtype not in _BYTES for v in (x, y)):
        return node.emit(ops.Matmul(_centred(node, x, x_zero), _centred(node, y, y_zero))), None
    weight = _stored_bytes(node, y, lambda data: data.t()) if y.type.rank == 2 else None
    if weight is None:

        def sum_columns() -> Value:
            return node.emit(ops.Sum(node.cast(y, DType.I32), dims=(y.type.rank - 2,), keepdim=True))

        return node.emit(ops.MatmulInteger(x, y)), zero_of_product(node.emit, x, x_zero, sum_columns, y_zero)

    if y.type.dtype is DType.U8:
        y_zero = _minus_128(node, y_zero)
    return (
        node.emit(ops.LinearInteger(x, weight)),
        zero_of_product(node.emit, x, x_zero, lambda: _sums_of_rows(node, weight), y_zero),
    )


def _centred(node: Node, x: Value, zero: Value | None) -> Value:
    wide = node.cast(x, DType.I32)
    return wide if zero is None else node.emit(ops.Sub(wide, zero))


def _along_rows(node: Node, value: Value) -> Value:
    """A scale or zero point of the first operand, which may have one element for each row of the matrix."""
    value = _tensor_wide(node, value)
    return node.reshape(value, (*value.type.shape, 1)) if value.type.rank == 1 else value


def _tensor_wide(node: Node, value: Value) -> Value:
    return node.reshape(value, ()) if value.type.shape == (1,) else value


def _stored_bytes(node: Node, y: Value, arrange: Callable[[torch.Tensor], torch.Tensor]) -> Value | None:
    """The bytes of a constant as i8, in another order of elements; 128 less than they are where they are unsigned.

    None when ``y`` is computed from data.
    """
    import torch

    def signed(data: torch.Tensor) -> torch.Tensor:
        # Flipping the highest bit of a byte subtracts 128.
        data = data if data.dtype is torch.int8 else (data ^ 128).view(torch.int8)
        return arrange(data).contiguous()

    sizes = [size for size in y.type.shape if isinstance(size, int)]
    shape = tuple(arrange(torch.empty(sizes, device="meta")).shape)
    return node.emitter.derived(y, "rows", TensorType(DType.I8, shape), signed)


def _sums_of_rows(node: Node, weight: Value) -> Value:
    """The sums of the rows of a constant matrix, in i32."""
    import torch

    type = TensorType(DType.I32, weight.type.shape[:1])
    sums = node.emitter.derived(weight, "sums", type, lambda data: data.sum(1, dtype=torch.int32))
    assert sums is not None  # it is made of a constant
    return sums


def _minus_128(node: Node, zero: Value | None) -> Value | None:
    """The zero point of numbers from which 128 was subtracted."""
    shift = node.scalar(128, DType.I32)
    less = node.emit(ops.Sub(node.scalar(0, DType.I32) if zero is None else zero, shift))
    return None if is_zero(node, less) else less


@onnx_op("ConvInteger", since=10)
def conv_integer(node: Node) -> Value:
    return _convolution(node, node.input(0), node.optional(2), node.input(1), node.optional(3), None)


@onnx_op("QLinearConv", since=10)
def qlinear_conv(node: Node) -> Value:
    """The sums and the bias, which is in units of both scales, requantized."""
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (node.input(i) for i in range(8))
    total = _convolution(node, x, x_zero, w, w_zero, node.optional(8))
    scale = node.emit(ops.Mul(_along_channels(node, x_scale, x), _along_channels(node, w_scale, x)))
    real = node.emit(ops.Dequantize(total, scale))
    return quantize(
        node, real, _along_channels(node, y_scale, x), _along_channels(node, y_zero, x), y_zero.type.dtype
    )  # fmt: skip


def _along_channels(node: Node, value: Value, x: Value) -> Value:
    """A value per tensor or per output channel, in a shape that broadcasts to the result of a convolution of x."""
    value = _tensor_wide(node, value)
    return node.reshape(value, (*value.type.shape, *[1] * (x.type.rank - 2))) if value.type.rank == 1 else value


def _convolution(
    node: Node, x: Value, x_zero: Value | None, w: Value, w_zero: Value | None, bias: Value | None
) -> Value:
    """``conv(x - x_zero, w - w_zero) + bias`` in i32."""
    x_zero = None if x_zero is None or is_zero(node, x_zero) else x_zero
    w_zero = None if w_zero is None or is_zero(node, w_zero) else w_zero
    total = _convolution_of_bytes(node, x, x_zero, w, w_zero)
    if total is None:
        return _convolution_in_double(node, x, x_zero, w, w_zero, bias)
    return total if bias is None else node.emit(ops.Add(total, _along_channels(node, bias, x)))


def _convolution_of_bytes(
    node: Node, x: Value, x_zero: Value | None, w: Value, w_zero: Value | None
) -> Value | None:  # fmt: skip
    """The sums as one op; None where there is none: other than two axes, uneven padding, or uneven weights."""
    if x.type.rank != 4 or w.type.rank != 4 or x.type.dtype not in _BYTES or w.type.dtype not in _BYTES:
        return None
    window = read_window(node, x, kernel_sizes(node, x, w))
    if not window.is_symmetric or min(window.before) < 0 or (x_zero is not None and x_zero.type.elements != 1):
        return None
    if w.type.dtype is DType.U8:
        w_zero = _minus_128(node, None if w_zero is None else node.cast(w_zero, DType.I32))
    weight = _stored_bytes(node, w, lambda data: data) if w.type.dtype is DType.U8 else w
    if w_zero is not None or weight is None:
        return None
    return node.emit(
        ops.ConvInteger(x, weight, None if x_zero is None else node.reshape(x_zero, (1,)), stride=window.stride,
                        padding=window.before, dilation=window.dilation, groups=node.int_attr("group", 1))
    )  # fmt: skip


def _convolution_in_double(
    node: Node, x: Value, x_zero: Value | None, w: Value, w_zero: Value | None, bias: Value | None
) -> Value:
    """Exact in double precision: sums of 8-bit products stay far below 2^53."""

    def wide(value: Value, zero: Value | None) -> Value:
        if zero is not None:
            zero = _tensor_wide(node, node.cast(zero, DType.I32))
            zero = node.reshape(zero, (*zero.type.shape, *[1] * (value.type.rank - 1))) if zero.type.rank else zero
        return node.cast(_centred(node, value, zero), DType.F64)

    total = convolve(node, wide(x, x_zero), wide(w, w_zero), None if bias is None else node.cast(bias, DType.F64))
    return node.cast(total, DType.I32)


@onnx_op("MatMulNBits", since=1, domain=CONTRIB)
def matmul_nbits(node: Node) -> Value:
    """Weights of 2, 4 or 8 bits in blocks along K, each with a scale and perhaps a zero point, of f16 or f32 x.

    B is u8 ``[N, blocks, bytes]``, the first element of a byte in its lowest bits; so are the zero points, u8
    ``[N, bytes]``, which are half of the range where they are missing. ``accuracy_level``, which lets ONNX Runtime
    round x, is not followed: x is used as it is.
    """
    x, packed, scale, zero, bias = node.input(0), node.input(1), node.input(2), node.optional(3), node.optional(5)
    n, k, block = node.int_attr("N"), node.int_attr("K"), node.int_attr("block_size")
    bits = node.int_attr("bits", 4)
    node.ignore("accuracy_level", "weight_prepacked")
    if bits not in (2, 4, 8) or min(n, k, block) < 1:
        node.refuse("the number of bits or the size", "use 2, 4 or 8 bits", bits=bits, N=n, K=k, block_size=block)
    if node.optional(4) is not None:
        node.refuse("weights in another order (g_idx)", "quantize without reordering of channels")
    if zero is not None and zero.type.dtype is not DType.U8:
        node.refuse("zero points that are no integers", "quantize with integer zero points", type=zero.type.dtype)
    blocks = -(-k // block)
    if packed.type.elements != n * blocks * -(-block * bits // 8) or scale.type.elements != n * blocks:
        node.inconsistent("the weights fit N, K, block_size and bits")
    weight = _unpacked(node, packed, bits, (n, blocks, block), zero is None)
    zeros = None if zero is None else _unpacked_zeros(node, zero, bits, (n, blocks))
    wide = node.cast(x, DType.F32)
    if blocks * block > k:
        before = (0,) * x.type.rank
        wide = node.emit(ops.Pad(wide, before=before, after=(*before[1:], blocks * block - k)))
    scales = node.cast(node.reshape(scale, (n, blocks)), DType.F32)
    y = node.emit(
        ops.LinearGroupwise(
            wide, weight, scales, zeros, None if bias is None else node.cast(bias, DType.F32), group=block
        )
    )  # fmt: skip
    return node.cast(y, x.type.dtype)


def _unpacked(node: Node, packed: Value, bits: int, sizes: tuple[int, int, int], centred: bool) -> Value:
    """The weights ``[N, blocks * block]``; ``centred``, with half of their range subtracted."""
    import torch

    n, blocks, block = sizes

    def unpack(data: torch.Tensor) -> torch.Tensor:
        numbers = _numbers(data.reshape(n, blocks, -1), bits)[..., :block].reshape(n, blocks * block)
        return (numbers.to(torch.int16) - (1 << (bits - 1))).to(torch.int8) if centred else numbers

    wide = bits == 8
    dtype = (DType.I8 if wide else DType.I4) if centred else (DType.U8 if wide else DType.U4)
    return _constant(node, packed, "unpacked", TensorType(dtype, (n, blocks * block)), unpack)


def _unpacked_zeros(node: Node, packed: Value, bits: int, sizes: tuple[int, int]) -> Value:
    n, blocks = sizes
    type = TensorType(DType.U8, sizes)
    return _constant(node, packed, "unpacked", type, lambda data: _numbers(data.reshape(n, -1), bits)[:, :blocks])


def _numbers(data: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes ``[..., n]`` as the numbers ``[..., n * 8 / bits]`` in them, the lowest bits first."""
    import torch

    places = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((data.unsqueeze(-1) >> places) & ((1 << bits) - 1)).flatten(-2)


def _constant(
    node: Node, value: Value, part: str, type: TensorType, compute: Callable[[torch.Tensor], torch.Tensor]
) -> Value:
    found = node.emitter.derived(value, part, type, compute)
    if found is None:
        node.refuse("packed numbers that are computed from data", "make them initializers")
    return found
