"""Convolutions, pooling and resizing of ``[B, C, spatial...]`` tensors.

Those of two spatial axes also take ``[B, H, W, C]`` and give a result of that order: attribute ``channels_last``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import VerificationError
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim, product
from trimtab.ir.op import Op


def _in_order(compute: Callable[[Tensor], Tensor], x: Tensor, channels_last: bool) -> Tensor:
    """``compute`` of ``x``, which knows channels in the second place only."""
    if not channels_last:
        return compute(x)
    # torch's depthwise convolution in float64 takes ten times as long on permuted data.
    return compute(x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)


class _Convolution(Op):
    x: Value
    weight: Value
    bias: Value | None = None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def macs(self) -> Dim:
        return self.result.type.elements * product(self.weight.type.shape[1:])

    def verify(self) -> None:
        spatial = self.weight.type.rank - 2
        if self.x.type.rank != self.weight.type.rank or not all(
            len(values) == spatial for values in (self.stride, self.padding, self.dilation)
        ):
            raise VerificationError(
                f"{self.name} has ranks that do not agree",
                values={"x": self.x.type, "weight": self.weight.type, "stride": self.stride},
                rule="x and weight have one rank; stride, padding and dilation one number per spatial axis",
                location=self.location,
            )


class Conv1d(_Convolution):
    """Cross-correlation: x ``[B, C, L]``, weight ``[O, C/groups, k]``, bias ``[O]``; zero padding on both sides."""

    @staticmethod
    def reference(
        x: Tensor, weight: Tensor, bias: Tensor | None,
        *, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], groups: int,
    ) -> Tensor:  # fmt: skip
        return F.conv1d(x, weight, bias, stride, padding, dilation, groups)


class Conv2d(_Convolution):
    """Cross-correlation: x ``[B, C, H, W]``, weight ``[O, C/groups, kh, kw]``, bias ``[O]``; zeros on both sides.

    With ``channels_last``, x is ``[B, H, W, C]`` and the result ``[B, H, W, O]``; the weight is the same.
    """

    channels_last: bool = False

    @staticmethod
    def reference(
        x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: tuple[int, ...], padding: tuple[int, ...],
        dilation: tuple[int, ...], groups: int, channels_last: bool,
    ) -> Tensor:  # fmt: skip
        return _in_order(lambda x: F.conv2d(x, weight, bias, stride, padding, dilation, groups), x, channels_last)


class Conv3d(_Convolution):
    """Cross-correlation: x ``[B, C, D, H, W]``, weight ``[O, C/groups, kd, kh, kw]``, bias ``[O]``."""

    @staticmethod
    def reference(
        x: Tensor, weight: Tensor, bias: Tensor | None,
        *, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], groups: int,
    ) -> Tensor:  # fmt: skip
        return F.conv3d(x, weight, bias, stride, padding, dilation, groups)


class _ConvTranspose(Op):
    x: Value
    weight: Value
    bias: Value | None = None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def macs(self) -> Dim:
        return self.x.type.elements * product(self.weight.type.shape[1:])


class ConvTranspose1d(_ConvTranspose):
    """Transposed convolution: x ``[B, C, L]``, weight ``[C, O/groups, k]``."""

    @staticmethod
    def reference(
        x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: tuple[int, ...], padding: tuple[int, ...],
        output_padding: tuple[int, ...], dilation: tuple[int, ...], groups: int,
    ) -> Tensor:  # fmt: skip
        return F.conv_transpose1d(x, weight, bias, stride, padding, output_padding, groups, dilation)


class ConvTranspose2d(_ConvTranspose):
    """Transposed convolution: x ``[B, C, H, W]``, weight ``[C, O/groups, kh, kw]``."""

    @staticmethod
    def reference(
        x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: tuple[int, ...], padding: tuple[int, ...],
        output_padding: tuple[int, ...], dilation: tuple[int, ...], groups: int,
    ) -> Tensor:  # fmt: skip
        return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)


class MaxPool2d(Op):
    """Largest element of each window of x ``[B, C, H, W]``; padding counts as minus infinity.

    With ``channels_last``, x is ``[B, H, W, C]`` and so is the result.
    """

    x: Value
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    channels_last: bool = False

    @staticmethod
    def reference(
        x: Tensor, *, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
        dilation: tuple[int, ...], ceil_mode: bool, channels_last: bool,
    ) -> Tensor:  # fmt: skip
        return _in_order(lambda x: F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode), x, channels_last)


class AvgPool2d(Op):
    """Mean of each window of x ``[B, C, H, W]``; ``count_include_pad`` says whether padding counts as zeros.

    With ``channels_last``, x is ``[B, H, W, C]`` and so is the result.
    """

    x: Value
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    channels_last: bool = False

    @staticmethod
    def reference(
        x: Tensor, *, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
        ceil_mode: bool, count_include_pad: bool, channels_last: bool,
    ) -> Tensor:  # fmt: skip
        window = (kernel, stride, padding, ceil_mode, count_include_pad)
        return _in_order(lambda x: F.avg_pool2d(x, *window), x, channels_last)


class AdaptiveAvgPool2d(Op):
    """Mean over windows that divide ``[H, W]`` of x ``[B, C, H, W]`` into ``size`` parts.

    With ``channels_last``, x is ``[B, H, W, C]`` and so is the result.
    """

    x: Value
    size: tuple[int, int]
    channels_last: bool = False

    @staticmethod
    def reference(x: Tensor, *, size: tuple[int, int], channels_last: bool) -> Tensor:
        return _in_order(lambda x: F.adaptive_avg_pool2d(x, size), x, channels_last)


class Resize2d(Op):
    """Resample x ``[B, C, H, W]`` to ``size``.

    Pixel centres are at half-integers unless ``align_corners``; bicubic uses a = -0.75. ``scale`` overrides the
    ratio of sizes in the coordinate map (source = (target + 1/2) / scale - 1/2), as torch does when a scale factor
    was given; zeros mean the ratio of the sizes.
    """

    x: Value
    size: tuple[Dim, Dim]
    mode: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    align_corners: bool = False
    antialias: bool = False
    scale: tuple[float, float] = (0.0, 0.0)

    @staticmethod
    def reference(
        x: Tensor, *, size: tuple[int, int], mode: str, align_corners: bool, antialias: bool, scale: tuple[float, float]
    ) -> Tensor:
        import torch

        factors = [value or None for value in scale]
        aten = torch.ops.aten
        if mode == "nearest":
            return aten.upsample_nearest2d(x, size, *factors)  # type: ignore[no-any-return]
        suffix = "_aa" if antialias else ""
        function = getattr(aten, f"_upsample_{mode}2d_aa" if suffix else f"upsample_{mode}2d")
        return function(x, size, align_corners, *factors)  # type: ignore[no-any-return]
