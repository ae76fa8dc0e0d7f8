"""Convolutions as sums of products: the code generator treats them as matrix products over packed patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tvm import te, tirx

from trimtab.backends.tvm.layouts import slides_over_channels_last
from trimtab.backends.tvm.rules.contraction import rounded
from trimtab.backends.tvm.rules.registry import (
    Expr,
    Operand,
    Scope,
    cast,
    compute,
    const,
    guarded,
    i64,
    lowers,
    work_type,
)
from trimtab.ir import ops


def padded(x: Operand, before: Sequence[int], after: Sequence[int], first: int, dtype: str, border: int = 0) -> Any:
    """x with zeros, or ``border``, around its spatial axes, in another type, as a buffer of its own.

    ``first`` is the first of the spatial axes.
    """
    if not any(before) and not any(after):
        return lambda *i: cast(x(*i), dtype)
    stop = first + len(before)
    sizes = x.shape[first:stop]
    around = [e + i64(a + b) for e, a, b in zip(sizes, before, after, strict=True)]
    shape = [*x.shape[:first], *around, *x.shape[stop:]]

    # Storage planning does not see that products read a buffer of bfloat16 made here, but it sees one of its bits.
    is_bits = dtype == "bfloat16"
    stored = "uint16" if is_bits else dtype

    def element(*indices: Expr) -> Expr:
        def inside(at: list[Expr]) -> Expr:
            value = cast(x(*indices[:first], *at, *indices[stop:]), dtype)
            return tirx.reinterpret(stored, value) if is_bits else value

        places = [index - i64(low) for index, low in zip(indices[first:stop], before, strict=True)]
        return guarded(places, sizes, inside, const(border, stored))

    tensor = compute(shape, element, "padded", materialize=True)
    return lambda *i: tirx.reinterpret(dtype, tensor(*i)) if is_bits else tensor(*i)


class Windows(Protocol):
    """Per spatial axis, how far apart windows and the elements of a window are, and the zeros before the tensor."""

    @property
    def stride(self) -> Sequence[int]: ...
    @property
    def padding(self) -> Sequence[int]: ...
    @property
    def dilation(self) -> Sequence[int]: ...


def window_places(windows: Windows, at: Sequence[Expr], taps: Sequence[Any]) -> list[Expr]:
    """What the window of the result at ``at`` reads: a place on each spatial axis, perhaps outside of the tensor."""
    return [
        i * i64(stride) - i64(padding) + tap.var * i64(dilation)
        for i, tap, stride, padding, dilation in zip(
            at, taps, windows.stride, windows.padding, windows.dilation, strict=True
        )
    ]


@lowers(ops.Conv1d, ops.Conv2d, ops.Conv3d)
def _convolution(op: Any, scope: Scope, x: Operand, weight: Operand, bias: Operand | None) -> Any:
    work = work_type(x.dtype)
    last = isinstance(op, ops.Conv2d) and op.channels_last
    if slides_over_channels_last(op):
        return rounded(op, scope, _with_bias(op, scope, _depthwise(op, scope, x, weight), bias))
    # Factors that an instruction multiplies in pairs stay as they are.
    read = padded(x, op.padding, op.padding, 1 if last else 2, x.dtype if weight.layout.group > 1 else work)
    return rounded(op, scope, _with_bias(op, scope, window_sums(op, scope, read, weight, work), bias))


def window_sums(op: Any, scope: Scope, read: Callable[..., Expr], weight: Operand, work: str) -> Any:
    """The sums of a convolution over the windows of what ``read`` gives, padding included, in the type ``work``."""
    last = isinstance(op, ops.Conv2d | ops.ConvInteger) and op.channels_last
    per_group_in = op.weight.type.shape[1]
    outputs = op.weight.type.shape[0]
    per_group_out = outputs // op.groups
    channel = te.reduce_axis((i64(0), i64(per_group_in)), "c")
    taps = [te.reduce_axis((i64(0), i64(size)), "t") for size in op.weight.type.shape[2:]]
    channels = [channel] if per_group_in != 1 else []
    wide = [t for t, n in zip(taps, op.weight.type.shape[2:], strict=True) if n != 1]
    axes = [*wide, *channels] if last else [*channels, *wide]

    def term(*indices: Expr) -> Expr:
        batch, *spatial = indices
        out = spatial.pop(-1 if last else 0)
        c: Expr = channel.var if per_group_in != 1 else i64(0)
        offsets = [t.var if n != 1 else i64(0) for t, n in zip(taps, op.weight.type.shape[2:], strict=True)]
        if op.groups == 1:
            source: Expr = c
        elif per_group_out == 1:
            source = out * i64(per_group_in) + c
        else:
            source = tirx.floordiv(out, i64(per_group_out)) * i64(per_group_in) + c
        places = [
            s * i64(stride) + t * i64(dilation)
            for s, t, stride, dilation in zip(spatial, offsets, op.stride, op.dilation, strict=True)
        ]
        element = read(batch, *places, source) if last else read(batch, source, *places)
        product = cast(element, work) * cast(_tap(op, weight, out, c, offsets), work)
        return te.sum(product, axis=axes) if axes else product

    return compute(scope.shape(op.result.type.shape), term, "conv")


def _with_bias(op: Any, scope: Scope, product: Any, bias: Operand | None) -> Any:
    if bias is None:
        return product
    channel = -1 if isinstance(op, ops.Conv2d) and op.channels_last else 1
    work = str(product.dtype)
    return compute(
        scope.shape(op.result.type.shape), lambda *i: product(*i) + cast(bias(i[channel]), work), "conv_bias"
    )


def _depthwise(op: Any, scope: Scope, x: Operand, weight: Operand) -> Any:
    """One filter a channel, channels last: windows read in place, each with the elements inside of the tensor only."""
    work = work_type(x.dtype)
    height, width = op.weight.type.shape[2:]
    taps = [te.reduce_axis((i64(0), i64(size)), "t") for size in (height, width)]

    def term(batch: Expr, row: Expr, column: Expr, channel: Expr) -> Expr:
        places = window_places(op, (row, column), taps)
        value = guarded(places, x.shape[1:3], lambda at: cast(x(batch, *at, channel), work), const(0, work))
        return te.sum(value * cast(_tap(op, weight, channel, i64(0), [t.var for t in taps]), work), axis=taps)

    return compute(scope.shape(op.result.type.shape), term, "conv")


def _tap(op: Any, weight: Operand, out: Expr, channel: Expr, offsets: Sequence[Expr]) -> Expr:
    """An element of a weight, which may be stored in panels with the channels of a tap together."""
    if weight.layout.is_plain:
        return weight(out, channel, *offsets)
    column: Expr = i64(0)
    for offset, size in zip((*offsets, channel), (*op.weight.type.shape[2:], op.weight.type.shape[1]), strict=True):
        column = column * i64(size) + offset
    return weight.packed(out, column)


@lowers(ops.ConvTranspose1d, ops.ConvTranspose2d)
def _transposed(op: Any, scope: Scope, x: Operand, weight: Operand, bias: Operand | None) -> Any:
    """Gather form: result(y) sums x((y + p - t d) / s) w(t) over the taps t for which the quotient is exact."""
    work = work_type(x.dtype)
    inputs, per_group_out = op.weight.type.shape[:2]
    per_group_in = inputs // op.groups
    channel = te.reduce_axis((i64(0), i64(per_group_in)), "c")
    taps = [te.reduce_axis((i64(0), i64(size)), "t") for size in op.weight.type.shape[2:]]

    def term(*indices: Expr) -> Expr:
        batch, out, *spatial = indices
        exact, places = None, []
        for s, t, stride, pad, dilation in zip(spatial, taps, op.stride, op.padding, op.dilation, strict=True):
            shifted = s + i64(pad) - t.var * i64(dilation)
            places.append(tirx.floordiv(shifted, i64(stride)))
            if stride != 1:
                test = tirx.EQ(tirx.floormod(shifted, i64(stride)), i64(0))
                exact = test if exact is None else tirx.And(exact, test)
        source = (
            tirx.floordiv(out, i64(per_group_out)) * i64(per_group_in) + channel.var if op.groups > 1 else channel.var
        )
        value = guarded(places, x.shape[2:], lambda at: cast(x(batch, source, *at), work), const(0, work), exact)
        within = tirx.floormod(out, i64(per_group_out)) if op.groups > 1 else out
        return te.sum(value * cast(weight(source, within, *(t.var for t in taps)), work), axis=[channel, *taps])

    shape = scope.shape(op.result.type.shape)
    product = compute(shape, term, "conv_transpose")
    if bias is not None:
        product = compute(shape, lambda *i, p=product: p(*i) + cast(bias(i[1]), work), "conv_transpose_bias")
    return rounded(op, scope, product)
