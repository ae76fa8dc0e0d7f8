"""Reuse of tokens between the frames of a video: Eventful Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from trimtab.errors import PassError, UsageError
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.dead_code import remove_dead_ops
from trimtab.ir.dims import evaluate
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Lossy
from trimtab.passes.samples import count_macs, smallest_sizes
from trimtab.passes.tokens.gating import NEXT, STATE, check_passing, next_state, token_buffer, token_gate
from trimtab.passes.tokens.reduction import with_attention
from trimtab.passes.tokens.rowwise import Region, find_regions
from trimtab.passes.tokens.stream import find_stream

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ReuseTokens(Pass):
    """Compute again only the r tokens of a frame that changed most since the last one (Eventful Transformers).

    For videos. Before each part of the model that treats tokens one by one, as the linear layers around attention and
    the MLP do, a gate compares each token with the one that was computed last and lets the r most different pass; what
    was computed for the others is reused. Attention itself is computed in whole. From Dutson et al., Eventful
    Transformers: Leveraging Temporal Redundancy in Vision Transformers, arXiv 2308.13494.

    What is remembered becomes inputs ``state.*`` behind the model's own, and outputs ``next.*`` that are the state of
    the next frame. The first frame takes a module of its own, made with ``start=true``: the model as it is, with the
    outputs ``next.*`` as well.

    - ``r``: how many tokens pass each gate; 0 leaves the model as it is.
    - ``budget``: the share of the model's multiply-accumulates to use, instead of r; 0 for none.
    - ``layers``: numbers of the layers that reuse tokens, from 0; empty for all.
    - ``start``: make the module for the first frame instead.
    """

    name: ClassVar[str] = "reuse-tokens"
    contract: ClassVar[Contract] = Lossy()
    changes_signature: ClassVar[bool] = True
    grows_weights: ClassVar[bool] = True  # by constants that raising computes
    r: int = 0
    budget: float = 0.0
    layers: tuple[int, ...] = ()
    start: bool = False

    def __post_init__(self) -> None:
        if self.r < 0 or not 0 <= self.budget <= 1 or (self.r and self.budget):
            raise UsageError(
                "reuse-tokens got a wrong amount",
                values={"r": self.r, "budget": self.budget},
                rule="give r, a number of tokens, or budget, a share of multiply-accumulates between 0 and 1",
                fix="for example r=64, or budget=0.5",
            )

    def run(self, module: Module, ctx: Context) -> Changed:
        if not (self.r or self.budget or self.start):
            return False
        _check_stateless(module)
        raised = with_attention(module)
        regions = self._regions(raised, ctx)
        rows = self._rows(raised, regions)
        if rows == _tokens(regions) and not (self.r or self.start):
            return False
        regions = [region for region in regions if ctx.rewrites.permit(self.name, region.ops[0])]
        if not regions:
            return False
        state = _started(regions) if self.start else _gated(raised, regions, rows, self.name)
        graph = raised.main
        names = [*graph.output_names, *(NEXT + name for name, _ in state)]
        graph.set_outputs([*graph.outputs, *(value for _, value in state)], names)
        remove_dead_ops(raised)
        raised.drop_unused_weights()
        sizes = smallest_sizes(graph)
        nbytes = sum(int(evaluate(value.type.bytes, sizes)) for _, value in state)
        module.assign(raised)
        passing = f"all {rows} tokens are computed" if self.start else f"{rows} of {_tokens(regions)} tokens pass"
        ctx.note(f"{passing} {len(regions)} gates; the state has {len(state)} tensors, {nbytes / 1e6:.3g} MB")
        if not self.start:
            ctx.note("drift is for a frame like the one before: what a moving picture loses shows only on videos")
        return True

    def inputs_after(self, before: Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """``inputs`` with the state that a frame of just these values leaves."""
        if self.start:
            return inputs
        from trimtab.ir.interpreter import interpret

        first = before.copy()
        replace(self, r=0, budget=0.0, start=True).run(first, Context())
        state = next_state(first.main.output_names, interpret(first, inputs))
        return (*inputs, *state.values())

    def _regions(self, module: Module, ctx: Context) -> list[Region]:
        """The regions of the layers asked for."""
        stream = find_stream(module)
        count = len(stream.layers)
        if any(not 0 <= number < count for number in self.layers):
            raise UsageError(
                f"{self.name} got wrong layers",
                values={"layers": list(self.layers), "found": count},
                rule="layers are numbers from 0 of attention layers that were found",
                fix=f"give some of 0 to {count - 1}",
            )
        found, refused = find_regions(module, stream)
        regions = [region for region in found if region.layer in (self.layers or range(count))]
        if not regions:
            raise PassError(
                "no tokens can be reused",
                values={"layers": count, "because": refused[0].reason if refused else "no linear layer reads tokens"},
                rule="what is reused is computed for each token by itself, as by linear layers around attention",
                fix="leave the pass out for this model",
                location=refused[0].location if refused else None,
            )
        if refused:
            ctx.note(f"{len(refused)} matrix products are computed for all tokens: {refused[0]}")
        return regions

    def _rows(self, module: Module, regions: Sequence[Region]) -> int:
        """How many tokens pass each gate."""
        tokens = _tokens(regions)
        if self.r:
            check_passing(self.r, tokens)
            return self.r
        if self.start:
            return tokens
        sizes = smallest_sizes(module.main)
        total = count_macs(module, sizes)
        gated = sum(int(evaluate(op.macs(), sizes)) for region in regions for op in region.ops)
        rows = int((self.budget * total - (total - gated)) * tokens / gated)
        if rows < 1:
            raise UsageError(
                "the budget is too small",
                values={"budget": self.budget, "least": f"{(total - gated + gated / tokens) / total:.3f}"},
                rule="attention, and what is before and behind the layers, is computed in whole for each frame",
                fix="give a larger budget",
            )
        return min(rows, tokens)


def _tokens(regions: Sequence[Region]) -> int:
    size = regions[0].source.type.shape[1]
    assert isinstance(size, int)
    return size


def _names(regions: Sequence[Region]) -> list[tuple[str, list[str]]]:
    """The names of the gate and the buffers of each region, counted in each layer."""
    gates: dict[int, int] = {}
    buffers: dict[int, int] = {}
    names = []
    for region in regions:
        layer, here = region.layer, []
        for _ in region.ends:
            here.append(f"{layer}.buffer.{buffers.setdefault(layer, 0)}")
            buffers[layer] += 1
        names.append((f"{layer}.gate.{gates.setdefault(layer, 0)}", here))
        gates[layer] += 1
    return names


def _started(regions: Sequence[Region]) -> list[tuple[str, Value]]:
    """The state after a frame that is computed in whole: what begins and ends each region, by name."""
    state = []
    for region, (gate, buffers) in zip(regions, _names(regions), strict=True):
        state += [(gate, region.source), *zip(buffers, region.ends, strict=True)]
    return state


def _gated(module: Module, regions: Sequence[Region], rows: int, made_by: str) -> list[tuple[str, Value]]:
    """Put gates and buffers around ``regions``; the state for the next frame, by name."""
    graph = module.main
    state: list[tuple[str, Value]] = []
    present: dict[Value, Value] = {}  # what stands for an end of a region that another one begins with
    for region, (gate_name, buffer_names) in zip(regions, _names(regions), strict=True):
        source = present.get(region.source, region.source)
        reference = graph.add_input(source.type, STATE + gate_name)
        build = Builder(module, graph, before=region.ops[0], made_by=made_by)
        gate = token_gate(build, source, reference, rows)
        state.append((gate_name, gate.reference))
        buffers = dict(zip(region.ends, buffer_names, strict=True))
        passing = {region.source: gate.tokens, source: gate.tokens}
        for op in region.ops:
            build = Builder(module, graph, before=op, made_by=made_by)
            new = build.add(region.rebuilt(op, [passing.get(value, value) for value in op.operands], rows))
            passing.update(zip(op.results, new.results, strict=True))
            for old in op.results:
                if old in buffers:
                    buffer = graph.add_input(old.type, STATE + buffers[old])
                    whole = token_buffer(build, gate, buffer, passing[old])
                    state.append((buffers[old], whole))
                    present[old] = whole
        for old in region.ends:
            old.replace_all_uses_with(present[old])
    return state


def _check_stateless(module: Module) -> None:
    graph = module.main
    taken = [value.name for value in graph.inputs if value.name.startswith(STATE)]
    taken += [name for name in graph.output_names if name.startswith(NEXT)]
    if taken:
        raise PassError(
            "tokens are reused already",
            values={"state": taken[0]},
            rule="inputs named state.* and outputs named next.* are the state between frames",
            fix="leave the pass out the second time; for the first frame, apply it with start=true to the plain model",
        )
