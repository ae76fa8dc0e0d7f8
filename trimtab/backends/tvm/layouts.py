"""How weights are stored: plain, or in panels of the columns of a linear layer or of the filters of a depthwise one.

A layout is declared and invertible: the artifact keeps each weight once, in the form the kernel reads, and restores
the plain form from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.register_tile import NOTICEABLE, choose_tile
from trimtab.backends.tvm.microkernels.fixed_point import BLOCK, QUAD, has_fixed_point
from trimtab.backends.tvm.microkernels.tiles import preferred_tiles
from trimtab.ir import ops
from trimtab.ir.core import Graph, Module, Use, Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.weights import Weight

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Layout:
    """Storage order of a weight.

    ``kind="plain"``: row-major, as in the IR.  ``kind="panels"``: a matrix ``[N, K]`` stored as
    ``[ceil(N / block), K, block]`` with element (n, k) at ``[n // block, k, n % block]`` and zeros past row N; with a
    ``group`` of more than 1, which divides K, as ``[ceil(N / block), K / group, block, group]`` with element (n, k) at
    ``[n // block, k // group, n % block, k % group]``, the order in which instructions that sum products of pairs or
    quadruples read it.  ``kind="nibbles"``: panels of 4-bit integers, two of which are in a byte: those at an even
    index of the second axis, k or k / group, in the low half, and those at the next one in the high half.
    ``kind="taps"``: the weight ``[O, C, kh, kw]`` of a convolution as the panels of the matrix ``[O, kh * kw * C]``,
    the channels of a tap together.

    Attributes:
        signed: of nibbles, whether they are of the signed type.
    """

    kind: str = "plain"
    block: int = 0
    group: int = 1
    signed: bool = True

    @property
    def is_plain(self) -> bool:
        return self.kind == "plain"

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in storage of a weight whose plain shape is ``shape``."""
        if self.is_plain:
            return shape
        *stack, rows, depth = self._matrices(shape)
        if self.kind == "nibbles":
            depth //= NIBBLES
        inner = (self.block, self.group) if self.group > 1 else (self.block,)
        return (*stack, -(-rows // self.block), depth // self.group, *inner)

    def stored_dtype(self, dtype: DType) -> DType:
        """Element type in storage of a weight of ``dtype``: sub-byte types in panels take a byte, or half of one."""
        if self.is_plain or not dtype.is_sub_byte:
            return dtype
        return DType.I8 if dtype is DType.I4 and self.kind != "nibbles" else DType.U8

    def _matrices(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``shape`` with the axes of each filter as one."""
        return (*shape[:-3], math.prod(shape[-3:])) if self.kind == "taps" else shape

    def pack(self, data: torch.Tensor) -> torch.Tensor:
        """The stored form of ``data``."""
        if self.is_plain:
            return data
        if self.kind == "taps":
            data = data.movedim(-3, -1).flatten(-3)
        *stack, rows, depth = data.shape
        padded = -(-rows // self.block) * self.block
        full = data.new_zeros(*stack, padded, depth) if padded != rows else data
        if padded != rows:
            full[..., :rows, :] = data
        grouped = full.reshape(*stack, -1, self.block, depth // self.group, self.group).transpose(-2, -3)
        if self.kind == "nibbles":
            codes = (grouped & 15).byte()
            grouped = codes[..., 0::NIBBLES, :, :] | (codes[..., 1::NIBBLES, :, :] << 4)
        return (grouped if self.group > 1 else grouped.squeeze(-1)).contiguous()

    def unpack(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The plain form of what :meth:`pack` made from a weight of ``shape``."""
        if self.is_plain:
            return stored
        *stack, rows, depth = self._matrices(shape)
        grouped = stored if self.group > 1 else stored.unsqueeze(-1)
        if self.kind == "nibbles":
            grouped = _halves(grouped, self.signed)
        matrix = grouped.transpose(-2, -3).reshape(*stack, -1, depth)[..., :rows, :]
        if self.kind == "taps":
            matrix = matrix.unflatten(-1, (*shape[-2:], shape[-3])).movedim(-1, -3)
        return matrix.contiguous()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        if self.is_plain:
            return {"kind": "plain"}
        group = {"group": self.group} if self.group > 1 else {}
        signed = {} if self.signed else {"signed": False}
        return {"kind": self.kind, "block": self.block, **group, **signed}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Layout:
        return Layout(data["kind"], data.get("block", 0), data.get("group", 1), data.get("signed", True))


PLAIN = Layout()
NIBBLES = 2
"""4-bit integers in a byte."""


def _halves(bytes: torch.Tensor, signed: bool) -> torch.Tensor:
    """The 4-bit integers ``[..., 2 D, block, group]`` of panels of bytes ``[..., D, block, group]``, one in a byte."""
    import torch

    codes = torch.stack((bytes & 15, bytes >> 4), dim=-3).flatten(-4, -3)
    return ((codes ^ 8).to(torch.int8) - 8) if signed else codes


_PRODUCTS = (ops.Linear, ops.LinearInteger, ops.Conv2d, ops.ConvInteger)
_NARROW = {(DType.BF16, DType.BF16): "bf16", (DType.U8, DType.I8): "u8*s8", (DType.I8, DType.I8): "s8*s8"}
"""The kinds of factors that instructions multiply in groups of neighbours."""


def packed_blocks(weight: Weight, layout: Layout, panels_at_once: int = 8) -> Iterator[bytes | memoryview]:
    """The stored bytes of a weight, a few panels at a time, so that no second copy of it is ever in memory."""
    if layout.is_plain:
        yield from weight.blocks()
        return
    import torch

    data = weight.tensor()
    step = layout.block * panels_at_once
    rank = 4 if layout.kind == "taps" else 2
    for matrix in data.reshape(-1, *data.shape[-rank:]):
        for start in range(0, matrix.shape[0], step):
            stored = layout.pack(matrix[start : start + step])
            yield stored.reshape(-1).view(torch.uint8).numpy().data


GROUP_VECTORS = 2
"""Vectors of columns in a panel of integers with scales."""
_LONGEST_GROUP = 32768
"""The longest sum of products of two bytes that 32 bits surely hold."""


def choose_layouts(module: Module, machine: Machine) -> dict[str, Layout]:
    """A layout for every weight: panels for a matrix of linear layers and for convolutions with channels last.

    A tied table of embeddings lies in panels too: picking rows from them costs less than packing them in every call.
    """
    readers: dict[str, list[Use]] = {id: [] for id in module.weights}
    for graph in module.all_graphs():
        for value in graph.weights:
            readers[value.weight] += value.uses
    layouts = {}
    for id, uses in readers.items():
        weight = module.weights[id]
        found = list(_readers(uses))
        multiplied = any(map(_is_matrix_of_linear, found))
        packable = multiplied and all(_is_matrix_of_linear(use) or _is_table(use) for use in found)
        filters = bool(found) and all(map(_is_filter, found))
        windows = bool(found) and all(map(_is_kernel_of_windows, found))
        scaled = bool(found) and all(map(_is_of_groups, found))
        layouts[id] = (
            _panels(weight, found, machine)
            if packable
            else _filter_panels(weight, machine)
            if filters
            else _taps(weight, found, machine)
            if windows
            else _scaled_panels(weight, found, machine)
            if scaled
            else PLAIN
        )
    return layouts


def packed_inputs(module: Module, layouts: dict[str, Layout]) -> dict[Value, Layout]:
    """Inputs of repeat bodies that are slices of packed stacked weights, with the layout of a slice."""
    packed: dict[Value, Layout] = {}
    for op in module.walk():
        if isinstance(op, ops.Repeat):
            for value, inner in zip(op.stacked, op.body.inputs[len(op.carried) :], strict=False):
                if value.is_weight and not layouts[value.weight].is_plain:
                    packed[inner] = layouts[value.weight]
    return packed


def slides_over_channels_last(op: Op | Graph) -> bool:
    """Whether an op is a convolution with a filter for each channel, of a tensor of known width with channels last."""
    if not isinstance(op, ops.Conv2d) or not op.channels_last:
        return False
    channels, depth = op.weight.type.shape[:2]
    return op.groups == channels and depth == 1 and isinstance(op.x.type.shape[2], int)


def stored_form(value: Value) -> Value:
    """The weight, or input of a graph, that ``value`` is a wider form of; ``value`` itself when it is no such thing.

    The rules of products widen what they read element by element, so they read the narrow form.
    """
    op = value.producer
    if isinstance(op, ops.Cast) and op.x.type.dtype.is_floating and op.dtype is DType.F32 and op.x.producer is None:
        return op.x if op.x.type.dtype.bits == 16 else value
    return value


def _readers(uses: Iterable[Use]) -> Iterator[Use]:
    """The uses that compute with a weight or with slices of a stack: those inside groups, repeats and behind casts."""
    for use in uses:
        op = use.user
        if isinstance(op, ops.Fused) or (
            isinstance(op, ops.Repeat) and len(op.carried) <= use.index < len(op.carried) + len(op.stacked)
        ):
            yield from _readers(op.body.inputs[use.index].uses)
        elif isinstance(op, ops.Cast) and stored_form(op.result) is not op.result:
            yield from _readers(op.result.uses)
        else:
            yield use


def _is_matrix_of_linear(use: Use) -> bool:
    return isinstance(use.user, ops.Linear | ops.LinearInteger) and use.index == 1


def _is_of_groups(use: Use) -> bool:
    """Whether a use is that of integers in groups, or of their scales or zero points."""
    op = use.user
    return isinstance(op, ops.LinearGroupwise) and op.operands[use.index] in (op.weight, op.scale, op.zero)


def _is_table(use: Use) -> bool:
    return isinstance(use.user, ops.Embedding) and use.index == 0


def _is_filter(use: Use) -> bool:
    return use.index == 1 and slides_over_channels_last(use.user)


def _filter_panels(weight: Weight, machine: Machine) -> Layout:
    """Panels of as many channels as a vector of sums has."""
    return Layout("taps", machine.lanes("float64" if weight.type.dtype.bits == 64 else "float32"))


def _is_kernel_of_windows(use: Use) -> bool:
    """Whether a use is that of a convolution whose kernel reads windows where they lie."""
    op = use.user
    return isinstance(op, ops.Conv2d | ops.ConvInteger) and use.index == 1 and op.channels_last and op.groups == 1


def _taps(weight: Weight, readers: Sequence[Use], machine: Machine) -> Layout:
    """Panels as wide as the tiles that suit the lines of the convolution's result."""
    outputs, inputs, _, across = (int(size) for size in weight.type.shape[-4:])  # type: ignore[arg-type]
    op: Any = readers[0].user
    together = inputs * (across if op.dilation[1] == 1 else 1)
    if (narrow := _narrow_product(weight, readers, machine, together)) is not None:
        return Layout("taps", *narrow)
    work = "float64" if weight.type.dtype.bits == 64 else "float32"
    line = op.result.type.shape[2]
    tile = choose_tile(machine, work, line if isinstance(line, int) else None, outputs, in_lines=True)
    return Layout("taps", tile.columns)


def _panels(weight: Weight, readers: Iterable[Use], machine: Machine) -> Layout:
    """Panels in the order that the fastest product of the weight's type reads."""
    depth = int(weight.type.shape[-1])  # type: ignore[arg-type]
    if (narrow := _narrow_product(weight, readers, machine, depth)) is not None:
        return Layout("panels", *narrow)
    return Layout("panels", _panel_width(weight, machine))


def _narrow_product(weight: Weight, readers: Iterable[Use], machine: Machine, depth: int) -> tuple[int, int] | None:
    """Columns of a panel and neighbours in it for the product of two narrow factors, where an instruction has one.

    ``depth`` is the length of the sums that are taken at once.
    """
    kinds = {_NARROW.get((op.x.type.dtype, op.weight.type.dtype), "") for op in (use.user for use in readers)
             if isinstance(op, _PRODUCTS)}  # fmt: skip
    kind = kinds.pop() if len(kinds) == 1 else ""
    for isa in machine.instruction_sets:
        product = isa.products.get(kind)
        if product is not None and product.group > 1 and depth % product.depth_step == 0:
            return preferred_tiles(isa, kind)[0].vectors * isa.lanes, product.group
    return None


def _scaled_panels(weight: Weight, readers: Sequence[Use], machine: Machine) -> Layout:
    """Panels of one width for the integers of a layer, their scales and their zero points."""
    layers = [use.user for use in readers if isinstance(use.user, ops.LinearGroupwise)]
    block = GROUP_VECTORS * machine.lanes("float32")
    if not all(layer.operands[use.index] is layer.weight for use, layer in zip(readers, layers, strict=True)):
        return Layout("panels", block)
    by_digits = any(map(has_fixed_point, machine.instruction_sets)) and all(
        layer.group % BLOCK == 0 and layer.group <= _LONGEST_GROUP for layer in layers
    )
    group, depth = QUAD if by_digits else 1, int(weight.type.shape[-1])  # type: ignore[arg-type]
    if weight.type.dtype.is_sub_byte and depth % NIBBLES == 0:
        return Layout("nibbles", block, group, weight.type.dtype is DType.I4)
    return Layout("panels", block, group)


def _panel_width(weight: Weight, machine: Machine) -> int:
    """The width of the machine's preferred tile, or of one that saves a noticeable part of the padding."""
    columns = int(weight.type.shape[-2])  # type: ignore[arg-type]
    work = "float64" if weight.type.dtype.bits == 64 else "float32"
    widths = [vectors * machine.lanes(work) for rows, vectors in machine.tiles if rows * vectors >= machine.chains]
    best = widths[0]
    for width in dict.fromkeys(widths):
        if -(-columns // width) * width < -(-columns // best) * best - NOTICEABLE * columns:
            best = width
    return best
