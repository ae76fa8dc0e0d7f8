"""How weights are stored: plain, or with the columns of a linear layer in panels.

A layout is declared and invertible: the artifact keeps each weight once, in the form the kernel reads, and restores
the plain form from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.ir import ops
from trimtab.ir.core import Module
from trimtab.ir.weights import Weight

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Layout:
    """Storage order of a weight.

    ``kind="plain"``: row-major, as in the IR.  ``kind="panels"``: a matrix ``[N, K]`` stored as
    ``[ceil(N / block), K, block]`` with element (n, k) at ``[n // block, k, n % block]`` and zeros past row N.
    """

    kind: str = "plain"
    block: int = 0

    @property
    def is_plain(self) -> bool:
        return self.kind == "plain"

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in storage of a weight whose plain shape is ``shape``."""
        if self.is_plain:
            return shape
        rows, depth = shape
        return (-(-rows // self.block), depth, self.block)

    def pack(self, data: torch.Tensor) -> torch.Tensor:
        """The stored form of ``data``."""
        if self.is_plain:
            return data
        import torch

        rows, depth = data.shape
        panels, _, block = self.stored_shape((rows, depth))
        stored = torch.zeros(panels, block, depth, dtype=data.dtype)
        stored.view(-1, depth)[:rows] = data
        return stored.transpose(1, 2).contiguous()

    def unpack(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The plain form of what :meth:`pack` made from a weight of ``shape``."""
        if self.is_plain:
            return stored
        rows, depth = shape
        return stored.transpose(1, 2).reshape(-1, depth)[:rows].contiguous()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        return {"kind": self.kind, "block": self.block} if not self.is_plain else {"kind": "plain"}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Layout:
        return Layout(data["kind"], data.get("block", 0))


PLAIN = Layout()


def packed_blocks(weight: Weight, layout: Layout, panels_at_once: int = 8) -> Iterator[bytes | memoryview]:
    """The stored bytes of a weight, a few panels at a time, so that no second copy of it is ever in memory."""
    if layout.is_plain:
        yield from weight.blocks()
        return
    import torch

    data = weight.tensor()
    step = layout.block * panels_at_once
    for start in range(0, data.shape[0], step):
        stored = layout.pack(data[start : start + step])
        yield memoryview(stored.reshape(-1).view(torch.uint8).numpy())


def choose_layouts(module: Module, machine: Machine) -> dict[str, Layout]:
    """A layout for every weight: panels for a matrix that only linear layers read, else plain."""
    readers: dict[str, list[Any]] = {id: [] for id in module.weights}
    for graph in module.all_graphs():
        for value in graph.weights:
            readers[value.weight] += [(use.user, use.index) for use in value.uses]
    layouts = {}
    for id, uses in readers.items():
        weight = module.weights[id]
        only_linear = all(isinstance(user, ops.Linear) and index == 1 for user, index in uses)
        if uses and only_linear and weight.type.dtype.is_floating:
            layouts[id] = Layout("panels", _panel_width(weight, machine))
        else:
            layouts[id] = PLAIN
    return layouts


def _panel_width(weight: Weight, machine: Machine) -> int:
    """The tile width that wastes least padding, the machine's preferred one on a tie."""
    columns = int(weight.type.shape[0])  # type: ignore[arg-type]
    work = "float64" if weight.type.dtype.bits == 64 else "float32"
    widths = [vectors * machine.lanes(work) for rows, vectors in machine.tiles if rows * vectors >= machine.chains]
    return min(dict.fromkeys(widths), key=lambda width: -(-columns // width) * width)
