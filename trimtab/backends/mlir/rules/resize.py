"""Resampling of images: nearest by reading, bilinear and bicubic as a matrix of weights an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.backends.mlir.rules.pooling import separable
from trimtab.backends.mlir.rules.registry import lowers
from trimtab.backends.mlir.scalar import Scalar, cast, constant, function, maximum, minimum, select, work_type
from trimtab.backends.mlir.tensors import Code, Tensor
from trimtab.ir import ops
from trimtab.ir.dims import Dim
from trimtab.ir.dtypes import DType
from trimtab.ir.types import TensorType

_CUBIC = -0.75
_CUBIC_ANTIALIAS = -0.5


@lowers(ops.Resize2d)
def _resize(op: Any, code: Code, x: Tensor) -> Tensor:
    if op.mode == "nearest":
        return _nearest(op, code, x)
    weights = [_weights(op, code, axis, x.shape[2 + axis], op.size[axis], work_type(x.dtype)) for axis in range(2)]
    return separable(code, op.result.type, x, weights)


def _ratio(op: Any, code: Code, axis: int, size: Dim, target: Dim, dtype: DType) -> Scalar:
    """Source places per target place."""
    source, wanted = (cast(Scalar(code.size(n), None), dtype) for n in (size, target))
    if op.align_corners:
        return select(wanted > 1, (source - 1) / maximum(wanted - 1, 1), constant(0, dtype))
    return constant(1 / op.scale[axis], dtype) if op.scale[axis] else source / wanted


def _nearest(op: Any, code: Code, x: Tensor) -> Tensor:
    ratios = [_ratio(op, code, axis, x.shape[2 + axis], op.size[axis], DType.F32) for axis in range(2)]
    sizes = [Scalar(code.size(size), None) for size in x.shape[2:]]

    def element(at: Sequence[Scalar]) -> Scalar:
        places = [
            minimum(cast(function("floor", cast(i, DType.F32) * ratio), None), size - 1)
            for i, ratio, size in zip(at[2:], ratios, sizes, strict=True)
        ]
        return code.load(x, [*at[:2], *places])

    return code.compute(op.result.type, element)


def _weights(op: Any, code: Code, axis: int, size: Dim, target: Dim, dtype: DType) -> Tensor:
    """``[target, size]``: how much of each source place goes into each target place."""
    ratio = _ratio(op, code, axis, size, target, dtype)
    last = Scalar(code.size(size), None) - 1
    type = TensorType(dtype, (target, size))
    if op.antialias:
        return _antialiased(op, code, type, ratio)

    def element(at: Sequence[Scalar]) -> Scalar:
        centre = cast(at[0], dtype) * ratio if op.align_corners else (cast(at[0], dtype) + 0.5) * ratio - 0.5
        if op.mode == "bilinear" and not op.align_corners:
            centre = maximum(centre, 0)
        base = function("floor", centre)
        fraction, first = centre - base, cast(base, None)
        total = constant(0, dtype)
        for offset, share in _taps(op.mode, fraction):
            source = minimum(maximum(first + offset, 0), last)
            total = total + select(source.equals(at[1]), share, constant(0, dtype))
        return total

    return code.compute(type, element)


def _taps(mode: str, fraction: Scalar) -> list[tuple[int, Scalar]]:
    if mode == "bilinear":
        return [(0, 1 - fraction), (1, fraction)]
    return [(offset, _cubic(function("absf", fraction - offset), _CUBIC)) for offset in range(-1, 3)]


def _cubic(distance: Scalar, a: float) -> Scalar:
    """Keys' cubic convolution kernel (1981) at a distance of at least 0."""
    d = distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return select(d < 1, near, select(d < 2, far, d * 0))


def _antialiased(op: Any, code: Code, type: TensorType, ratio: Scalar) -> Tensor:
    """Weights of a kernel widened by the ratio where the image shrinks, as in torch's ``antialias``."""
    dtype = type.dtype
    scale = maximum(ratio, 1)
    support = scale * (1.0 if op.mode == "bilinear" else 2.0)
    extent = Scalar(code.size(type.shape[1]), None)

    def raw(at: Sequence[Scalar]) -> Scalar:
        centre = ratio * (cast(at[0], dtype) + 0.5)
        start = maximum(cast(centre - support + 0.5, None), 0)
        end = minimum(cast(centre + support + 0.5, None), extent)
        distance = function("absf", (cast(at[1], dtype) - centre + 0.5) / scale)
        share = maximum(1 - distance, 0) if op.mode == "bilinear" else _cubic(distance, _CUBIC_ANTIALIAS)
        return select((at[1] >= start) & (at[1] < end), share, constant(0, dtype))

    shares = code.compute(type, raw)
    total = code.reduce(shares, [1], 0, dtype, lambda e, so_far: so_far + e, keepdim=True)
    return code.elementwise(type, [shares, total], lambda e, t: e / t)
