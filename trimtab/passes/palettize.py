"""Weights of linear layers as indices into a codebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.errors import UsageError
from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dtypes import DType
from trimtab.ir.weights import Weight
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Lossy
from trimtab.passes.weight_only.codebooks import Palette, find_codebook, nearest, pack, reselect, together
from trimtab.passes.weight_only.layers import Layer, find_layers
from trimtab.passes.weight_only.moments import Moments, in_order
from trimtab.passes.weight_only.report import Tally

if TYPE_CHECKING:
    import torch

_MOST_BITS = 8


@dataclass(frozen=True)
class Palettize(Pass):
    """Store the weights of linear layers as indices into a codebook for each, found by k-means.

    A weight ``[N, K]`` is cut along K into vectors of ``dim`` elements, and each becomes the index, of ``bits`` bits,
    of one of ``2^bits`` codebook entries. As many indices as fit into a byte are stored in one, and looked up together,
    in a table of all sequences of so many entries. The graph looks them up where the weight is read, so that any
    backend can run it.

    With calibration data, each vector chooses again among the ``candidates`` entries nearest to it, layer by layer, so
    that the layer's result errs least, and the codebook follows, after VQ4DiT (Deng et al., arXiv 2408.17131) but
    without gradients; 1 turns this off.

    A weight that several linear layers read stays one; a weight that anything else reads stays in float.
    """

    name: ClassVar[str] = "palettize"
    contract: ClassVar[Contract] = Lossy()
    bits: int = 4
    dim: int = 1
    candidates: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= _MOST_BITS or self.dim < 1 or self.candidates < 1:
            raise UsageError(
                f"{self.name} got options that it does not know",
                values={"bits": self.bits, "dim": self.dim, "candidates": self.candidates},
                rule=f"an index has 1 to {_MOST_BITS} bits, a vector at least one element and one candidate",
                fix="for example bits=4 and dim=1, or bits=8 and dim=4",
            )

    def run(self, module: Module, ctx: Context) -> Changed:
        log = ctx.rewrites.of(self.name)
        layers = find_layers(module, log, self._unfit)
        log.matched += len(layers)
        layers = [layer for layer in layers if ctx.rewrites.permit(self.name, layer.linears[0])]
        if not layers:
            return False
        tally = Tally()
        calibrated = ctx.calibration and self.candidates > 1
        ordered: Iterable[tuple[Layer, Moments | None]] = (
            in_order(module, layers, ctx.calibration) if calibrated else ((layer, None) for layer in layers)
        )
        for layer, moments in ordered:
            data = layer.weight.tensor().double()
            palette = self._palette(data, moments, ctx.generator(f"{self.name} {layer.weight.id}"))
            weights = self._replace(module, layer, palette)
            after = sum(weight.nbytes for weight in weights)
            tally.add(self.bits, layer.weight.nbytes, after, data, palette.values())
        module.drop_unused_weights()
        ctx.note(f"{tally}" + (f"; indices of {self.dim} weights each" if self.dim > 1 else ""))
        return True

    def _unfit(self, weight: Weight) -> str:
        rows, columns = weight.type.shape
        assert isinstance(rows, int)
        assert isinstance(columns, int)
        if columns % self.dim:
            return f"the {columns} input channels of @{weight.id} are no multiple of {self.dim}, the size of a vector"
        size = together(columns // self.dim, self.bits)
        stored = rows * columns // (self.dim * size) + (4 * self.dim * size << self.bits * size)
        if stored >= weight.nbytes:
            return f"indices and table of @{weight.id} would take {stored} bytes, not less than the {weight.nbytes} now"
        return ""

    def _palette(self, data: torch.Tensor, moments: Moments | None, generator: torch.Generator) -> Palette:
        """The palette of a weight f64 ``[N, K]``, its codebook in numbers of float32."""
        vectors = data.reshape(-1, self.dim)
        codebook = find_codebook(vectors, 1 << self.bits, generator)
        palette = Palette(codebook, nearest(vectors, codebook).reshape(len(data), -1))
        if moments is not None:
            palette = reselect(data, palette, moments, self.candidates)
        return Palette(palette.codebook.float().double(), palette.indices)

    def _replace(self, module: Module, layer: Layer, palette: Palette) -> Sequence[Weight]:
        """Let the linear layers read what the codebook says; returns the new weights."""
        id = layer.weight.id
        table, packed = pack(palette, self.bits)
        codebook = module.add_weight(Weight.from_tensor(module.fresh_weight_id(f"{id}.codebook"), table.float()))
        indices = module.add_weight(Weight.from_tensor(module.fresh_weight_id(f"{id}.indices"), packed))
        rebuilt: dict[Graph, Value] = {}
        for linear in layer.linears:
            graph = linear.graph
            assert graph is not None
            if graph not in rebuilt:  # the first reader, and so before all others
                build = Builder(module, graph, before=linear, made_by=self.name)
                wide = build(ops.Cast(graph.weight(indices), DType.I32))
                found = build(ops.Embedding(graph.weight(codebook), wide))
                rebuilt[graph] = build(ops.Reshape(found, shape=layer.weight.type.shape))
            linear.set_operand(linear.operands.index(linear.weight), rebuilt[graph])
        return codebook, indices
