"""Converters of layers: matrix products, attention, normalisation, convolution, pooling and resizing."""

from __future__ import annotations

from typing import Any

from trimtab.frontend.torch_export.call import Call
from trimtab.frontend.torch_export.registry import Refusal, converts
from trimtab.frontend.torch_export.shapes import reshape_to
from trimtab.ir import ops
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op

_CONVOLUTIONS: dict[int, type[Op]] = {1: ops.Conv1d, 2: ops.Conv2d, 3: ops.Conv3d}
_TRANSPOSED: dict[int, type[Op]] = {1: ops.ConvTranspose1d, 2: ops.ConvTranspose2d}


@converts("aten.linear.default")
def linear(call: Call, x: Value, weight: Value, bias: Value | None) -> Value:
    return call(ops.Linear(x, weight, bias))


@converts("aten.matmul.default", "aten.mm.default", "aten.bmm.default", "aten.mv.default", "aten.dot.default")
def matmul(call: Call, x: Value, other: Value | None = None, **rest: Value) -> Value:
    right = other if other is not None else next(iter(rest.values()))
    return call(ops.Matmul(x, right))


@converts("aten.addmm.default", "aten.baddbmm.default")
def addmm(
    call: Call,
    x: Value,
    beta: Any,
    alpha: Any,
    mat1: Any = None,
    mat2: Any = None,
    batch1: Any = None,
    batch2: Any = None,
) -> Value:
    left, right = (mat1, mat2) if mat1 is not None else (batch1, batch2)
    if beta == 1 and alpha == 1 and right.is_weight and x.type.rank == 1:
        # GPT-2 keeps weights as [in, out]; as a linear its product is recognised like any other.
        return call(ops.Linear(left, call(ops.Permute(right, dims=(1, 0))), x))
    product = call(ops.Matmul(left, right))
    if alpha != 1:
        product = call(ops.Mul(product, call.operand(alpha, product.type.dtype)))
    if beta == 0:
        return product
    if beta != 1:
        x = call(ops.Mul(x, call.operand(beta, x.type.dtype)))
    return call(ops.Add(product, x))


@converts("aten.einsum.default")
def einsum(call: Call, equation: str, tensors: list[Value], path: Any) -> Value:
    return call(ops.Einsum(tuple(tensors), equation=equation.replace(" ", "")))


@converts("aten.scaled_dot_product_attention.default")
def attention(
    call: Call,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None,
    dropout_p: float,
    is_causal: bool,
    scale: Any,
    enable_gqa: bool,
) -> Value:
    if dropout_p:
        raise Refusal("attention with dropout: the model is in training mode, call .eval() before tracing")
    width = query.type.shape[-1]
    if scale is None and isinstance(width, int):
        scale = width**-0.5
    if not isinstance(scale, int | float):
        raise Refusal("an attention scale that depends on a size")
    if attn_mask is not None and attn_mask.type.dtype is not DType.BOOL:
        attn_mask = call.cast(attn_mask, query.type.dtype)
    if query.type.rank < 3:
        lifted = [reshape_to(call, v, (1, *v.type.shape)) for v in (query, key, value)]
        whole = call(ops.Attention(*lifted, attn_mask, scale=float(scale), causal=is_causal))
        return reshape_to(call, whole, call.shape)
    return call(ops.Attention(query, key, value, attn_mask, scale=float(scale), causal=is_causal))


@converts("aten.layer_norm.default")
def layer_norm(
    call: Call,
    x: Value,
    normalized_shape: list[int],
    weight: Value | None,
    bias: Value | None,
    eps: float,
    cudnn_enable: bool,
) -> Value:
    return call(ops.LayerNorm(x, weight, bias, axes=len(normalized_shape), eps=eps))


@converts("aten.native_layer_norm.default")
def native_layer_norm(
    call: Call, x: Value, normalized_shape: list[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, None, None]:
    return call(ops.LayerNorm(x, weight, bias, axes=len(normalized_shape), eps=eps)), None, None


@converts("aten.rms_norm.default", "aten._fused_rms_norm.default")
def rms_norm(call: Call, x: Value, normalized_shape: list[int], weight: Value | None, eps: float | None) -> Any:
    import torch

    epsilon = eps if eps is not None else torch.finfo(x.type.dtype.to_torch()).eps
    value = call(ops.RmsNorm(x, weight, axes=len(normalized_shape), eps=epsilon))
    return (value, None) if isinstance(call.meta, tuple | list) else value


@converts("aten.group_norm.default")
def group_norm(
    call: Call, x: Value, num_groups: int, weight: Value | None, bias: Value | None, eps: float, cudnn_enabled: bool
) -> Value:
    return call(ops.GroupNorm(x, weight, bias, groups=num_groups, eps=eps))


@converts("aten.native_group_norm.default")
def native_group_norm(
    call: Call,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    N: Any,
    C: Any,
    HxW: Any,
    group: int,
    eps: float,
) -> tuple[Value, None, None]:
    return call(ops.GroupNorm(x, weight, bias, groups=group, eps=eps)), None, None


@converts("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default")
def batch_norm(
    call: Call,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value | None,
    running_var: Value | None,
    momentum: float,
    eps: float,
    training: bool = False,
    cudnn_enabled: bool = False,
) -> Any:
    if training or running_mean is None or running_var is None:
        raise Refusal("batch norm in training mode: call .eval() before tracing")
    value = call(ops.BatchNorm(x, running_mean, running_var, weight, bias, eps=eps))
    return (value, None, None) if isinstance(call.meta, tuple | list) else value


@converts("aten.instance_norm.default")
def instance_norm(
    call: Call, x: Value, weight: Value | None, bias: Value | None, use_input_stats: bool, eps: float, **_: Any
) -> Value:
    if not use_input_stats:
        raise Refusal("instance norm with running statistics")
    channels = x.type.shape[1]
    if not isinstance(channels, int):
        raise Refusal("instance norm over a symbolic number of channels")
    return call(ops.GroupNorm(x, weight, bias, groups=channels, eps=eps))


@converts("aten._weight_norm.default")
def weight_norm(call: Call, v: Value, g: Value, dim: int) -> Value:
    dims = tuple(axis for axis in range(v.type.rank) if axis != dim % v.type.rank)
    norm = call(ops.Sqrt(call(ops.Sum(call(ops.Mul(v, v)), dims=dims, keepdim=True))))
    return call(ops.Mul(v, call(ops.Div(g, norm))))


@converts("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
def convolution(
    call: Call, x: Value, weight: Value, bias: Value | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Value:
    spatial = weight.type.rank - 2
    widths = [_per_axis(option, spatial) for option in (stride, padding, dilation)]
    lifted = x.type.rank == weight.type.rank - 1  # an input without a batch axis
    x = reshape_to(call, x, (1, *x.type.shape)) if lifted else x
    cls = _CONVOLUTIONS[spatial]
    value = call(cls(x, weight, bias, stride=widths[0], padding=widths[1], dilation=widths[2], groups=groups))
    return reshape_to(call, value, value.type.shape[1:]) if lifted else value


@converts("aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding")
def convolution_same(
    call: Call, x: Value, weight: Value, bias: Value | None, stride: Any, padding: str, dilation: Any, groups: int
) -> Value:
    spatial = weight.type.rank - 2
    steps = _per_axis(dilation, spatial)
    if padding == "valid":
        return convolution(call, x, weight, bias, stride, 0, dilation, groups)
    totals = [step * (int(size) - 1) for step, size in zip(steps, _static(weight.type.shape[2:]), strict=True)]
    if any(total % 2 for total in totals):
        # torch pads the odd element at the end.
        offset = x.type.rank - spatial
        x = call(ops.Pad(x, before=(0,) * x.type.rank, after=(*(0,) * offset, *(total % 2 for total in totals))))
    return convolution(call, x, weight, bias, stride, [total // 2 for total in totals], dilation, groups)


@converts("aten.convolution.default")
def general_convolution(
    call: Call,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Value:
    if transposed:
        return transposed_convolution(call, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return convolution(call, x, weight, bias, stride, padding, dilation, groups)


@converts("aten.conv_transpose1d.default", "aten.conv_transpose2d.input")
def transposed_convolution(
    call: Call,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Value:
    spatial = weight.type.rank - 2
    if spatial not in _TRANSPOSED or x.type.rank != weight.type.rank:
        raise Refusal("a transposed convolution of more than two spatial axes or without a batch axis")
    a, b, c, d = (_per_axis(option, spatial) for option in (stride, padding, output_padding, dilation))
    return call(_TRANSPOSED[spatial](x, weight, bias, stride=a, padding=b, output_padding=c, dilation=d, groups=groups))


@converts("aten.max_pool2d.default", "aten.max_pool2d_with_indices.default")
def max_pool(call: Call, x: Value, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Any:
    kernel = _per_axis(kernel_size, 2)
    value = call(
        ops.MaxPool2d(
            x,
            kernel=kernel,
            stride=_per_axis(stride or kernel, 2),
            padding=_per_axis(padding, 2),
            dilation=_per_axis(dilation, 2),
            ceil_mode=ceil_mode,
        )
    )
    return (value, None) if isinstance(call.meta, tuple | list) else value


@converts("aten.avg_pool2d.default")
def avg_pool(
    call: Call,
    x: Value,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Value:
    if divisor_override is not None:
        raise Refusal("average pooling with a divisor of its own")
    kernel = _per_axis(kernel_size, 2)
    return call(
        ops.AvgPool2d(
            x,
            kernel=kernel,
            stride=_per_axis(stride or kernel, 2),
            padding=_per_axis(padding, 2),
            ceil_mode=ceil_mode,
            count_include_pad=count_include_pad,
        )
    )


@converts("aten.adaptive_avg_pool2d.default", "aten._adaptive_avg_pool2d.default")
def adaptive_avg_pool2d(call: Call, x: Value, output_size: list[int]) -> Value:
    if tuple(output_size) == (1, 1):
        return call(ops.Mean(x, dims=(x.type.rank - 2, x.type.rank - 1), keepdim=True))
    return call(ops.AdaptiveAvgPool2d(x, size=tuple(output_size)))


@converts("aten.adaptive_avg_pool1d.default")
def adaptive_avg_pool1d(call: Call, x: Value, output_size: list[int]) -> Value:
    if tuple(output_size) == (1,):
        return call(ops.Mean(x, dims=(x.type.rank - 1,), keepdim=True))
    wide = reshape_to(call, x, (*x.type.shape[:-1], 1, x.type.shape[-1]))
    return reshape_to(call, call(ops.AdaptiveAvgPool2d(wide, size=(1, output_size[0]))), call.shape)


@converts(
    "aten.upsample_bilinear2d.vec",
    "aten.upsample_bicubic2d.vec",
    "aten._upsample_bilinear2d_aa.vec",
    "aten._upsample_bicubic2d_aa.vec",
)
def upsample(call: Call, x: Value, output_size: Any, align_corners: bool, scale_factors: Any) -> Value:
    target = str(call.node.target)
    return _resize(
        call, x, "bicubic" if "bicubic" in target else "bilinear", align_corners, scale_factors, "_aa" in target
    )


@converts("aten.upsample_nearest2d.vec")
def upsample_nearest(call: Call, x: Value, output_size: Any, scale_factors: Any) -> Value:
    return _resize(call, x, "nearest", False, scale_factors, False)


def _resize(call: Call, x: Value, mode: str, align_corners: bool, factors: Any, antialias: bool) -> Value:
    scale = tuple(map(float, factors)) if factors else (0.0, 0.0)
    size = call.shape[-2:]
    return call(ops.Resize2d(x, size=size, mode=mode, align_corners=align_corners, antialias=antialias, scale=scale))


def _per_axis(option: Any, axes: int) -> tuple[int, ...]:
    """An int or list option as one int per spatial axis."""
    values = list(option) if isinstance(option, list | tuple) else [option]
    if any(not isinstance(value, int) for value in values):
        raise Refusal("a stride, padding or kernel size that depends on a size")
    return tuple(values * axes if len(values) == 1 else values)


def _static(dims: Any) -> list[int]:
    if any(not isinstance(dim, int) for dim in dims):
        raise Refusal("a kernel whose size is symbolic")
    return list(dims)
