"""Resize and Upsample.

What torch's two-dimensional resampling expresses becomes one ``resize2d``.  Everything else is separable: along each
axis the result is an index selection (nearest) or a product with a small constant matrix of interpolation weights,
computed from the operator's definition at import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trimtab.frontend.onnx.node import Node
from trimtab.frontend.onnx.registry import onnx_op
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, bounds
from trimtab.ir.dtypes import DType

LARGEST_AXIS = 1 << 14
LARGEST_MATRIX = 1 << 22
"""Sizes up to which interpolation weights are computed at import."""


@dataclass(frozen=True)
class _Axis:
    """One resized axis: sizes, scale (output over input), output length before rounding, and region of interest."""

    dim: int
    size: int
    target: int
    scale: float
    length: float
    start: float = 0.0
    end: float = 1.0


@onnx_op("Resize", since=11)
def resize(node: Node) -> Value:
    x = node.input(0)
    rank = x.type.rank
    chosen = node.axes_in(node.ints_attr("axes", tuple(range(rank))), rank)
    mode = node.string_attr("mode", "nearest")
    transform = node.string_attr("coordinate_transformation_mode", "half_pixel")
    sizes, scales = _targets(node, x, chosen)
    node.ignore("nearest_mode", "cubic_coeff_a", "exclude_outside", "extrapolation_value", "antialias",
                "keep_aspect_ratio_policy")  # fmt: skip
    if (
        all(size == target for size, target in zip(x.type.shape, sizes, strict=True))
        and transform != "tf_crop_and_resize"
    ):
        return x
    whole = _as_resize2d(node, x, sizes, scales, mode, transform)
    if whole is not None:
        return whole
    region = _region(node, chosen, rank) if transform == "tf_crop_and_resize" else [(0.0, 1.0)] * rank
    dtype = x.type.dtype
    if not dtype.is_floating and mode != "nearest":
        x = node.cast(x, DType.F32)
    for dim in chosen:
        size, target = x.type.shape[dim], sizes[dim]
        if size == target and scales[dim] == 1.0 and transform != "tf_crop_and_resize":
            continue
        if not isinstance(size, int) or not isinstance(target, int):
            node.refuse(
                "resizing a dynamic axis in this mode",
                "fix its size with from_onnx(..., dims={...})",
                mode=mode,
                coordinate_transformation_mode=transform,
            )
        if max(size, target) > LARGEST_AXIS or (mode != "nearest" and size * target > LARGEST_MATRIX):
            node.refuse("resizing a very long axis in this mode", mode=mode, size=size, target=target)
        scale = scales[dim] or target / size
        length = scale * size if scales[dim] else float(target)
        x = _along(node, x, _Axis(dim, size, target, scale, length, *region[dim]), mode, transform)
    if dtype.is_floating or mode == "nearest":
        return x
    return node.cast(node.emit(ops.Round(x)), dtype)


@onnx_op("Upsample", since=9)
def upsample(node: Node) -> Value:
    x = node.input(0)
    scales = [float(s) for s in node.tensor(1, "scales").reshape(-1).tolist()]
    node.ignore("nearest_mode")
    if len(scales) != x.type.rank or node.string_attr("mode", "nearest") != "nearest":
        node.refuse("modes other than nearest", "convert the model to opset 13 or newer")
    for dim, scale in enumerate(scales):
        size = x.type.shape[dim]
        if scale != 1.0:
            if not isinstance(size, int):
                node.refuse("a dynamic axis", "fix its size with from_onnx(..., dims={...})")
            axis = _Axis(dim, size, math.floor(size * scale), scale, size * scale)
            x = _along(node, x, axis, "nearest", "asymmetric", rounding="floor")
    return x


def _targets(node: Node, x: Value, axes: tuple[int, ...]) -> tuple[list[Dim], list[float]]:
    """Sizes per axis of the result, and scales (0 where they follow from the sizes)."""
    sizes, scales = list(x.type.shape), [1.0] * x.type.rank
    by_scale = node.optional(2) is not None and node.input(2).type.shape != (0,)
    policy = node.string_attr("keep_aspect_ratio_policy", "stretch")
    if by_scale:
        given = [float(s) for s in node.tensor(2, "scales").reshape(-1).tolist()]
        if len(given) != len(axes) or min(given) <= 0 or max(given) > 1e6:
            node.inconsistent("one positive scale per axis", scales=given)
        for axis, scale in zip(axes, given, strict=True):
            size = sizes[axis]
            scales[axis] = scale
            if scale == 1.0:
                continue
            if isinstance(size, int):
                sizes[axis] = math.floor(size * scale)
            elif scale == int(scale):
                sizes[axis] = size * int(scale)
            else:
                node.refuse("a fractional scale on a dynamic axis", "fix its size with from_onnx(..., dims={...})")
        return sizes, scales
    wanted = node.dims(3, "sizes")
    if len(wanted) != len(axes):
        node.inconsistent("one size per axis", sizes=list(map(str, wanted)))
    if policy != "stretch":
        return _keep_ratio(node, sizes, axes, wanted, policy)
    for axis, target in zip(axes, wanted, strict=True):
        if bounds(target)[0] < 1:
            node.inconsistent("sizes are positive", sizes=list(map(str, wanted)))
        scales[axis] = 1.0 if target == sizes[axis] else 0.0
        sizes[axis] = target
    return sizes, scales


def _keep_ratio(
    node: Node, sizes: list[Dim], axes: tuple[int, ...], wanted: Sequence[Dim], policy: str
) -> tuple[list[Dim], list[float]]:
    ratios, scales = [], [1.0] * len(sizes)
    for axis, target in zip(axes, wanted, strict=True):
        size = sizes[axis]
        if not isinstance(size, int) or not isinstance(target, int):
            node.refuse("keeping the aspect ratio of a dynamic axis", "fix its size with from_onnx(..., dims={...})")
        ratios.append(target / size)
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    for axis in axes:
        size = sizes[axis]
        assert isinstance(size, int)
        sizes[axis], scales[axis] = math.floor(scale * size + 0.5), scale
    return sizes, scales


def _region(node: Node, axes: tuple[int, ...], rank: int) -> list[tuple[float, float]]:
    given = [float(v) for v in node.tensor(1, "roi").reshape(-1).tolist()]
    if len(given) != 2 * len(axes):
        node.inconsistent("roi holds a start and an end per axis", roi=given)
    region = [(0.0, 1.0)] * rank
    for place, axis in enumerate(axes):
        region[axis] = (given[place], given[place + len(axes)])
    return region


def _as_resize2d(
    node: Node, x: Value, sizes: list[Dim], scales: list[float], mode: str, transform: str
) -> Value | None:
    """A whole ``resize2d`` where it means the same; None where it does not."""
    kinds = {"nearest": "nearest", "linear": "bilinear", "cubic": "bicubic"}
    if x.type.rank != 4 or sizes[:2] != list(x.type.shape[:2]) or not x.type.dtype.is_floating:
        return None
    if node.flag("exclude_outside") or node.flag("antialias") or mode not in kinds:
        return None
    if mode == "nearest":
        if transform != "asymmetric" or node.string_attr("nearest_mode", "round_prefer_floor") != "floor":
            return None
    elif transform == "pytorch_half_pixel":
        if any(not isinstance(size, int) or size <= 1 for size in sizes[2:]):
            return None
    elif transform not in ("half_pixel", "align_corners"):
        return None
    if mode == "cubic" and node.float_attr("cubic_coeff_a", -0.75) != -0.75:
        return None
    corners = transform == "align_corners"
    if corners and any(size == 1 for size in sizes[2:]):
        return None
    exact = all(
        not scale or (isinstance(size, int) and isinstance(target, int) and scale * size == target)
        for scale, size, target in zip(scales[2:], x.type.shape[2:], sizes[2:], strict=True)
    )
    if corners and not exact:
        return None  # ONNX aligns the corners of the output before its size is rounded down
    scale = (0.0, 0.0) if exact else (scales[2], scales[3])
    if not exact and 0.0 in scale:
        return None
    return node.emit(ops.Resize2d(x, size=(sizes[2], sizes[3]), mode=kinds[mode], align_corners=corners, scale=scale))


def _along(node: Node, x: Value, axis: _Axis, mode: str, transform: str, rounding: str = "") -> Value:
    """x resampled along one axis."""
    places = [_source(node, axis, i, transform) for i in range(axis.target)]
    inside = [transform != "tf_crop_and_resize" or 0 <= p <= axis.size - 1 for p in places]
    if mode == "nearest":
        pick = _rounding(node, rounding or node.string_attr("nearest_mode", "round_prefer_floor"))
        rows = [min(max(pick(p), 0), axis.size - 1) for p in places]
        y = node.emit(ops.IndexSelect(x, node.emitter.known(torch.tensor(rows)), dim=axis.dim))
    else:
        weights = torch.tensor([_weights(node, axis, p, mode) for p in places], dtype=torch.float64)
        last = x.type.rank - 1
        order = [d for d in range(x.type.rank) if d != axis.dim] + [axis.dim]
        back = [order.index(d) for d in range(x.type.rank)]
        moved = x if axis.dim == last else node.emit(ops.Permute(x, dims=tuple(order)))
        y = node.emit(ops.Linear(moved, node.emitter.known(weights.to(x.type.dtype.to_torch()))))
        y = y if axis.dim == last else node.emit(ops.Permute(y, dims=tuple(back)))
    if all(inside):
        return y
    shape = [axis.target if d == axis.dim else 1 for d in range(x.type.rank)]
    mask = node.emitter.known(torch.tensor(inside).reshape(shape))
    return node.emit(ops.Where(mask, y, node.scalar(node.float_attr("extrapolation_value", 0.0), y)))


def _source(node: Node, axis: _Axis, index: int, transform: str) -> float:
    """The place in the input that output element ``index`` reads."""
    if transform == "half_pixel":
        return (index + 0.5) / axis.scale - 0.5
    if transform == "pytorch_half_pixel":
        return 0.0 if axis.length <= 1 else (index + 0.5) / axis.scale - 0.5
    if transform == "asymmetric":
        return index / axis.scale
    if transform == "align_corners":
        return 0.0 if axis.length == 1 else index * (axis.size - 1) / (axis.length - 1)
    if transform == "half_pixel_symmetric":
        adjustment = axis.target / axis.length
        return axis.size / 2 * (1 - adjustment) + (index + 0.5) / axis.scale - 0.5
    if transform == "tf_crop_and_resize":
        first = axis.start * (axis.size - 1)
        if axis.length == 1:
            return 0.5 * (axis.start + axis.end) * (axis.size - 1)
        return first + index * (axis.end - axis.start) * (axis.size - 1) / (axis.length - 1)
    node.inconsistent("unknown coordinate_transformation_mode", mode=transform)


def _rounding(node: Node, mode: str) -> Callable[[float], int]:
    known: dict[str, Callable[[float], int]] = {
        "round_prefer_floor": lambda p: math.ceil(p - 0.5),
        "round_prefer_ceil": lambda p: math.floor(p + 0.5),
        "floor": math.floor,
        "ceil": math.ceil,
    }
    if mode not in known:
        node.inconsistent("unknown nearest_mode", nearest_mode=mode)
    return known[mode]


def _weights(node: Node, axis: _Axis, place: float, mode: str) -> list[float]:
    """The weight of each input element in the output element that reads at ``place``."""
    narrow = min(axis.scale, 1.0) if node.flag("antialias") else 1.0
    if mode not in ("linear", "cubic"):
        node.inconsistent("unknown mode", mode=mode)
    a = node.float_attr("cubic_coeff_a", -0.75)
    reach = 1.0 if mode == "linear" else 2.0
    row = [0.0] * axis.size
    exclude = node.flag("exclude_outside")
    total = 0.0
    for tap in range(math.ceil(place - reach / narrow), math.floor(place + reach / narrow) + 1):
        distance = abs(place - tap) * narrow
        weight = max(1.0 - distance, 0.0) if mode == "linear" else _cubic(distance, a)
        if exclude and not 0 <= tap < axis.size:
            continue
        row[min(max(tap, 0), axis.size - 1)] += weight
        total += weight
    return [weight / total for weight in row] if total else row


def _cubic(d: float, a: float) -> float:
    """Keys' cubic convolution kernel (IEEE TASSP 29, 1981)."""
    if d <= 1:
        return ((a + 2) * d - (a + 3)) * d * d + 1
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a if d < 2 else 0.0
