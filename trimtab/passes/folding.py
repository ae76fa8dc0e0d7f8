"""Folding of scales and shifts into the weights beside them: where it may be done, and the new weights.

A linear layer or a convolution whose output channels are scaled and shifted is one with other weights, and so is one
whose input channels are.  With ``y = W x + b``, scale s and shift t, these are ``s W`` and ``s b + t`` after it, and
``W s`` and ``b + W t`` before it.

New weights are computed when somebody asks for their data, in float64 from the old ones, and rounded once to the type
they have: each is off by half a unit in its last place, as if it had been trained to that value.  The old ones go when
nothing reads them any more, so nothing is folded into a weight that has other readers.  Half-precision weights are too
coarse to be rounded once more and take only powers of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from trimtab.ir import ops
from trimtab.ir.analysis.channels import Channels, readers, source_of
from trimtab.ir.builder import Builder
from trimtab.ir.core import Graph, Use, Value
from trimtab.ir.dims import Dim
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.printer import value_in_words
from trimtab.ir.rewrite import Match
from trimtab.ir.types import TensorType
from trimtab.ir.weights import ComputedSource, Weight

if TYPE_CHECKING:
    import torch

Vector: TypeAlias = Callable[[], "torch.Tensor"]
"""Computes float64 numbers when they are needed."""

_CONVOLUTIONS = (ops.Conv1d, ops.Conv2d, ops.Conv3d)
_TRANSPOSED = (ops.ConvTranspose1d, ops.ConvTranspose2d)
_FINE = (DType.F32, DType.F64)
_KEPT_BYTES = 1 << 20
"""Smaller results are kept once they are computed."""


@dataclass(frozen=True)
class Affine:
    """``scale * x + shift``; None leaves one out."""

    scale: Vector | None = None
    shift: Vector | None = None


@dataclass(frozen=True)
class Site:
    """A linear layer or convolution to fold into.

    Attributes:
        op: it.
        channels: where its output channels are in the value that is scaled, or the channels of the value that is
            scaled in its input.
    """

    op: Any
    channels: Channels


def producer(
    m: Match,
    value: Value,
    shape: Sequence[Dim] = (),
    *,
    reader: Op | None = None,
    scaled: bool = True,
    exact: bool = False,
) -> Site | str:
    """The linear layer or convolution whose output channels ``value`` has, possibly moved around.

    Args:
        m: the match.
        value: the value to scale or shift.
        reader: the op that reads it scaled; by default the root's.
        shape: the shape of the constants, which broadcast against ``value``.
        scaled: whether there is a scale, and not just a shift.
        exact: whether the fold rounds nothing.

    Returns:
        Where to fold; or, in words, why not: for one, when something else sees the same channels.
    """
    reader = reader or m.ops[0]
    source = source_of(value)
    op = source.producer
    if not isinstance(op, (ops.Linear, *_CONVOLUTIONS, *_TRANSPOSED)):
        return f"{value_in_words(source)} is no result of a linear layer or convolution"
    here = Use(reader, reader.operands.index(value))
    seen = dict(readers(op.result, _channel_axis(op)))
    if here not in seen:
        return f"between {op.name} and {reader.name} channels are mixed with other axes"
    channels = seen.pop(here)
    for axis, size in enumerate(shape, value.type.rank - len(shape)):
        if axis < 0 or size not in (1, value.type.shape[axis]):
            return f"a constant of shape [{', '.join(map(str, shape))}] makes more of {value.type}"
        if size != 1 and not channels.strides[axis]:
            return f"the constant varies along axis {axis}, which is not one of channels"
    for use, others in seen.items():
        if channels.meets(others):
            return f"the same channels of {op.name} are also read by {_reader(use)}"
    reason = _unsuitable(m, op, (op.weight, op.bias) if scaled else (op.bias,), exact)
    return reason or Site(op, channels)


def consumers(m: Match, value: Value, axis: int, *, shifted: bool) -> list[Site] | str:
    """The linear layers and convolutions that are all that reads ``value``, possibly moved around.

    Args:
        m: the match.
        value: a value whose channels, along ``axis``, are to be scaled in its readers.
        axis: an axis of static size.
        shifted: whether the channels are to be shifted too, which a convolution does not do to its padding.

    Returns:
        Where to fold; or, in words, why not.
    """
    sites = []
    for use, channels in readers(value, axis):
        op = use.user
        if isinstance(op, Graph) or not isinstance(op, (ops.Linear, *_CONVOLUTIONS)) or use.index != 0:
            return f"it is also read by {_reader(use)}"
        if not set(channels.axes) <= {_channel_axis(op)}:
            return f"{op.name} does not sum over the channels alone"
        if shifted and not isinstance(op, ops.Linear) and any(op.padding):
            return f"the padding of {op.name} is not shifted"
        reason = _unsuitable(m, op, (op.weight, op.bias) if shifted else (op.weight,), exact=False)
        if reason:
            return reason
        sites.append(Site(op, channels))
    return sites or "no layer reads it"


def reason(found: object) -> str | None:
    """What :func:`producer` and :func:`consumers` say against a fold, for the check of a rule."""
    return found if isinstance(found, str) else None


def constant(m: Match, value: Value) -> Vector:
    """The data of a weight, or the number of a ``full``, in float64."""
    if isinstance(value.producer, ops.Full):
        return number(float(value.producer.value))
    weight = m.weight(value)
    return lambda: _double(weight)


def number(value: float) -> Vector:
    """One number in float64."""

    def compute() -> torch.Tensor:
        import torch

        return torch.tensor(value, dtype=torch.float64)

    return compute


def fold_after(m: Match, build: Builder, site: Site, affine: Affine, value: Value) -> Value:
    """Scale and shift the output channels of an op by its weights, and thereby ``value``, which has them.

    The vectors of ``affine`` broadcast against ``value``.

    Returns:
        The scaled and shifted value: ``value``, or the result of the new op if it was that of the old one.
    """
    op, scale, shift = site.op, _per_output(site, affine.scale, 1.0), _per_output(site, affine.shift, 0.0)
    weight, bias = m.weight(op.weight), m.weight(op.bias) if op.bias is not None else None
    parts = {"x": op.x, "weight": op.weight, "bias": op.bias}
    if scale is not None:
        parts["weight"] = _derived(m, weight, lambda: _outputs_times(op, weight, scale()))
    if shift is not None or (scale is not None and bias is not None):
        parts["bias"] = _derived_bias(m, op, lambda: _affine(bias, scale, shift))
    new = build.replace(op, type(op)(**parts, **op.attributes))
    return new.result if value is op.result else value


def fold_before(m: Match, build: Builder, site: Site, affine: Affine) -> None:
    """Scale and shift the input channels of an op by its weights. The vectors of ``affine`` are over the channels."""
    op, scale, shift = site.op, _per_input(site, affine.scale), _per_input(site, affine.shift)
    weight, bias = m.weight(op.weight), m.weight(op.bias) if op.bias is not None else None
    parts = {"x": op.x, "weight": op.weight, "bias": op.bias}
    if scale is not None:
        parts["weight"] = _derived(m, weight, lambda: _inputs_times(op, weight, scale()))
    if shift is not None:
        parts["bias"] = _derived_bias(m, op, lambda: _affine(bias, None, lambda: _response(op, weight, shift())))
    build.replace(op, type(op)(**parts, **op.attributes))


# -- conditions --------------------------------------------------------------------------------------------------


def _unsuitable(m: Match, op: Op, parts: Sequence[Value | None], exact: bool) -> str | None:
    """Why the weights ``parts`` of ``op`` cannot be replaced by others."""
    for value in parts:
        if value is None:
            continue
        if not value.is_weight:
            return f"{value_in_words(value)} is read by {op.name} where a weight is needed"
        if not value.type.dtype.is_floating or not (exact or value.type.dtype in _FINE):
            return f"the weight @{value.weight} is too coarse to be rounded once more: {value.type.dtype}"
        count = sum(1 for _ in m.module.readers(value.weight))
        if count > 1:
            return f"the weight @{value.weight} is shared by {count} readers"
    return None


def _channel_axis(op: Op) -> int:
    """The axis of the channels in the input and in the result of a linear layer or convolution."""
    is_last = isinstance(op, ops.Linear) or (isinstance(op, ops.Conv2d) and op.channels_last)
    return op.result.type.rank - 1 if is_last else 1


def _reader(use: Use) -> str:
    return "the graph's outputs" if isinstance(use.user, Graph) else use.user.name


# -- new weights -------------------------------------------------------------------------------------------------


def _derived(m: Match, old: Weight, compute: Vector) -> Value:
    """A weight like ``old`` with other numbers."""
    return _lazy(m, f"{old.id.split('.folded')[0]}.folded", old.type, compute, old.trainable)


def _derived_bias(m: Match, op: Any, compute: Vector) -> Value:
    """A weight for the bias of ``op``, which may have none."""
    if op.bias is not None:
        return _derived(m, m.weight(op.bias), compute)
    weight = m.weight(op.weight)
    outputs = op.result.type.shape[_channel_axis(op)]
    return _lazy(m, f"{weight.id.split('.folded')[0]}.bias", weight.type.with_shape(outputs), compute, weight.trainable)


def _lazy(m: Match, id: str, type: TensorType, compute: Vector, trainable: bool) -> Value:
    dtype, size = type.dtype.to_torch(), type.bytes
    keep = isinstance(size, int) and size <= _KEPT_BYTES
    return m.add_weight(id, type, ComputedSource(lambda: compute().to(dtype), keep=keep), trainable=trainable)


def _outputs_times(op: Any, weight: Weight, scale: torch.Tensor) -> torch.Tensor:
    data = _double(weight)
    matrices = _matrices(op, data)
    matrices *= scale.reshape(matrices.shape[0], -1, 1, 1)
    return data


def _inputs_times(op: Any, weight: Weight, scale: torch.Tensor) -> torch.Tensor:
    data = _double(weight)
    matrices = _matrices(op, data)
    matrices *= scale.reshape(matrices.shape[0], 1, -1, 1)
    return data


def _response(op: Any, weight: Weight, x: torch.Tensor) -> torch.Tensor:
    """The result of ``op``, without its bias, where all inputs of a channel are the same number."""
    matrices = _matrices(op, _double(weight))
    return (matrices * x.reshape(matrices.shape[0], 1, -1, 1)).sum((2, 3)).reshape(-1)


def _affine(bias: Weight | None, scale: Vector | None, shift: Vector | None) -> torch.Tensor:
    """``scale * bias + shift`` with the missing ones neutral; not all are missing."""
    result = None if bias is None else _double(bias)
    if result is not None and scale is not None:
        result = result * scale()
    if shift is None:
        assert result is not None
        return result
    return shift() if result is None else result + shift()


def _per_output(site: Site, vector: Vector | None, missing: float) -> Vector | None:
    """Numbers that broadcast against a value, as numbers per output channel of the op that made it."""
    if vector is None:
        return None
    outputs = site.op.result.type.shape[_channel_axis(site.op)]

    def compute() -> torch.Tensor:
        import torch

        numbers = site.channels.numbers()
        result = torch.full((outputs,), missing, dtype=torch.float64)
        result[numbers.reshape(-1)] = vector().expand(numbers.shape).reshape(-1)
        return result

    return compute


def _per_input(site: Site, vector: Vector | None) -> Vector | None:
    """Numbers per channel of a value, or one for all, as numbers per input channel of an op that reads the value."""
    if vector is None:
        return None
    inputs = site.op.x.type.shape[_channel_axis(site.op)]

    def compute() -> torch.Tensor:
        values = vector()
        return (values[site.channels.numbers().reshape(-1)] if values.numel() > 1 else values).expand(inputs)

    return compute


def _matrices(op: Any, data: torch.Tensor) -> torch.Tensor:
    """The weight of a linear layer or convolution as ``[groups, outputs, inputs, taps]``, in the same memory."""
    if isinstance(op, ops.Linear):
        return data[None, :, :, None]
    shape = (op.groups, data.shape[0] // op.groups, data.shape[1], -1)
    return data.reshape(shape).transpose(1, 2) if isinstance(op, _TRANSPOSED) else data.reshape(shape)


def _double(weight: Weight) -> torch.Tensor:
    """A copy of the data in float64, in row-major order."""
    import torch

    return weight.tensor().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
