"""The base of passes that reduce tokens: finding the places, keeping to a budget, rewriting what follows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.errors import PassError, UsageError
from trimtab.ir.core import Module
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Lossy
from trimtab.passes.drop import Drop
from trimtab.passes.samples import count_macs, smallest_sizes
from trimtab.passes.tokens.budget import MacEstimate
from trimtab.passes.tokens.schedules import Removals, within_budget
from trimtab.passes.tokens.sensitivity import sensitivities, within_drop, worth
from trimtab.passes.tokens.shortening import Place, Plan, Watch, shorten
from trimtab.passes.tokens.steps import Step
from trimtab.passes.tokens.stream import Blocker, Layer, Stream, find_stream


@dataclass(frozen=True)
class TokenReduction(Pass):
    """Base of passes that reduce tokens between attention and MLP of each layer.

    Options that all of them have:

    - ``budget``: the share of the model's multiply-accumulates to use, instead of the pass's own amount; 0 for none.
    - ``max_drop``: remove as many tokens as lose at most this much of the metric or, where there is none, move the
      outputs by at most this much on the calibration data, relatively; where, is chosen by how much each layer minds.
    - ``layers``: numbers of the layers that may reduce, from 0; empty for all.
    - ``unmerge``: give ops and outputs that need a row for each token such rows back.
    """

    contract: ClassVar[Contract] = Lossy()
    grows_weights: ClassVar[bool] = True  # by constants that raising computes
    gives_back: ClassVar[bool] = True
    """Whether ``unmerge`` is possible: not where tokens are dropped."""
    budget: float = 0.0
    max_drop: float = 0.0
    layers: tuple[int, ...] = ()
    unmerge: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.budget <= 1:
            raise UsageError(
                f"{self.name} got a budget that is not a share",
                values={"budget": self.budget},
                rule="the budget is the share of multiply-accumulates to use: between 0 and 1, where 0 stands for none",
                fix="for example budget=0.6",
            )
        if self.max_drop < 0 or (self.max_drop and self.budget):
            raise UsageError(
                f"{self.name} got options that do not go together",
                values={"max_drop": self.max_drop, "budget": self.budget},
                rule="max_drop is not negative, and chooses the amount as budget does",
                fix="give one of the two",
            )

    @abstractmethod
    def removals(self, stream: Stream, layers: Sequence[int]) -> Removals:
        """How many tokens each of ``layers`` is to remove, by the pass's own options.

        Raises:
            UsageError: the options ask for more than there are.
        """

    @abstractmethod
    def reduce(self, place: Place, removed: int) -> Step | None:
        """Make the reduction by ``removed`` tokens at the site of a layer; None for none."""

    def spread(self, layers: int) -> Sequence[float]:
        """In which proportion ``layers`` layers remove tokens under a budget."""
        return (1.0,) * layers

    def plan(self, stream: Stream, removals: Removals, layers: Sequence[int]) -> Plan:
        """Where to reduce: at the sites of ``layers``."""

        def reduction(removed: int) -> object:
            return lambda place: self.reduce(place, removed)

        return Plan(
            {
                stream.layers[number].site: (number, reduction(removed))  # type: ignore[misc]
                for number, removed in zip(layers, removals, strict=True)
                if removed
            },
            {},
            self.unmerge,
        )

    def blockers(self, layer: Layer) -> tuple[Blocker, ...]:
        """What needs the tokens that this pass removes in ``layer``."""
        return layer.blockers

    def default_layers(self, stream: Stream) -> list[int]:
        """The numbers of the layers that may reduce where the option does not say."""
        return list(range(len(stream.layers)))

    def does_nothing(self) -> bool:
        """Whether the options ask for no reduction, so that the module stays as it is."""
        return False

    def run(self, module: Module, ctx: Context) -> Changed:
        return self.rewrite(module, ctx)

    def rewrite(self, module: Module, ctx: Context, watch: Watch | None = None) -> Changed:
        """What ``run`` does, with ``watch`` told about each reduction."""
        if self.does_nothing() and not self.budget and not self.max_drop:
            return False
        raised = with_attention(module)
        stream = find_stream(raised)
        layers = self._usable(stream, ctx)
        removals = self._chosen(raised, stream, layers, ctx)
        if not any(removals):
            return False
        permitted = [
            number
            for number, removed in zip(layers, removals, strict=True)
            if removed and ctx.rewrites.permit(self.name, stream.layers[number].attention)
        ]
        if not permitted:
            return False
        plan = self.plan(stream, tuple(removals[layers.index(number)] for number in permitted), permitted)
        steps = shorten(raised, stream, plan, self.name, watch)
        module.assign(raised)
        counts = " ".join(str(step.count) for step in steps)
        ctx.note(f"{stream.tokens} tokens, {stream.protected} protected, become {counts}")
        return True

    def _usable(self, stream: Stream, ctx: Context) -> list[int]:
        """The numbers of the layers that can be reduced, of those asked for."""
        asked = list(self.layers) or self.default_layers(stream)
        unknown = [number for number in asked if not 0 <= number < len(stream.layers)]
        if unknown or asked != sorted(set(asked)):
            raise UsageError(
                f"{self.name} got wrong layers",
                values={"layers": list(asked), "found": len(stream.layers)},
                rule="layers are numbers from 0 in rising order, of attention layers that were found",
                fix=f"give some of 0 to {len(stream.layers) - 1}",
            )
        if self.unmerge:
            return asked
        blocked = {number: self.blockers(stream.layers[number]) for number in asked}
        usable = [number for number, blockers in blocked.items() if not blockers]
        if not usable:
            blocker = blocked[asked[-1]][0]
            raise PassError(
                "tokens cannot be reduced",
                values={"because": blocker.reason},
                rule=f"that is behind the last of {len(stream.layers)} layers and needs all {stream.tokens} tokens",
                fix=f"give them back there with {self.name if self.gives_back else 'merge-tokens'}{{unmerge=true}}, "
                "or leave the pass out",
                location=blocker.location,
            )
        kept = [number for number in asked if number not in usable]
        if kept:
            ctx.note(f"layers {', '.join(map(str, kept))} keep their tokens: {blocked[kept[-1]][0]}")
        return usable

    def _chosen(self, module: Module, stream: Stream, layers: Sequence[int], ctx: Context) -> Removals:
        """How many tokens each of ``layers`` removes, by whichever option says so."""
        if self.max_drop:
            return self._bounded(module, stream, layers, ctx)
        return self._budgeted(module, stream, layers) if self.budget else self.removals(stream, layers)

    def _budgeted(self, module: Module, stream: Stream, layers: Sequence[int]) -> Removals:
        estimate = self._estimate(module, stream, layers)
        weights = self.spread(len(layers))
        full = count_macs(module, smallest_sizes(module.main))
        share = self.budget
        while True:  # the estimate leaves out what the reduction itself takes
            removals = within_budget(share, stream.tokens, stream.protected, weights, estimate)
            reduced = self._reduced(module, removals, layers)
            taken = count_macs(reduced, smallest_sizes(reduced.main)) / full
            if taken <= self.budget:
                return removals
            share -= max(taken - self.budget, 0.001)

    def _estimate(self, module: Module, stream: Stream, layers: Sequence[int]) -> MacEstimate:
        return MacEstimate(module, stream, self.plan(stream, (1,) * len(layers), layers), layers)

    def _bounded(self, module: Module, stream: Stream, layers: Sequence[int], ctx: Context) -> Removals:
        drop = Drop(module, ctx, self.name, "or budget= instead of max_drop=")

        def reduced(removals: Removals) -> Module:
            return self._reduced(module, removals, layers)

        found = sensitivities(stream.tokens, stream.protected, len(layers), reduced, drop)
        weights = worth(found, self._estimate(module, stream, layers))
        removals, measured = within_drop(self.max_drop, stream.tokens, stream.protected, weights, reduced, drop)
        listed = ", ".join(f"layer {number} {value:.3g}" for number, value in zip(layers, found, strict=True))
        ctx.note(f"drop when a layer alone reduces: {listed}")
        ctx.note(f"drop {measured:.3g}, at most {self.max_drop:g} allowed")
        return removals

    def _reduced(self, module: Module, removals: Removals, layers: Sequence[int]) -> Module:
        """A copy of ``module`` under a schedule."""
        copy = module.copy()
        stream = find_stream(copy)
        shorten(copy, stream, self.plan(stream, removals, layers), self.name)
        return copy


def with_attention(module: Module) -> Module:
    """A copy of ``module`` in which attention and layers are raised and masks simplified, as the passes know them."""
    from trimtab.passes.manager import PassManager

    return PassManager("raise", check="never").run(module)[0]
