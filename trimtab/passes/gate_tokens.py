"""Keeping tokens by a learned gate: IA-RED2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.errors import UsageError
from trimtab.ir.core import Module
from trimtab.ir.weights import Weight
from trimtab.passes.base import Changed, Context
from trimtab.passes.tokens.class_attention import kept_tokens
from trimtab.passes.tokens.entry import EntryReduction, at_shares
from trimtab.passes.tokens.learned_gate import GateStep
from trimtab.passes.tokens.projections import identity_projections, layer_projections
from trimtab.passes.tokens.schedules import Removals
from trimtab.passes.tokens.shortening import Place
from trimtab.passes.tokens.steps import Step
from trimtab.passes.tokens.stream import Stream

if TYPE_CHECKING:
    import torch
_PLACES = (0.25, 0.5, 0.75)
_NOISE = 1e-3
"""Of the largest element, in weights that were not found."""


@dataclass(frozen=True)
class GateTokens(EntryReduction):
    """Keep the tokens that a small learned policy scores highest, before groups of layers (IA-RED2).

    The score of a token is the mean over heads of ``sigmoid(F_q(p) . F_k(x))``, where p is the class token, or the mean
    of the tokens where none is read by its position. As many as ``keep`` says stay, a fixed number, where the original
    keeps those with scores above one half; padding and then the lowest scores are dropped. The first tokens, which are
    read by their position, stay. Without ``layers``, those at a quarter, a half and three quarters of the depth have a
    gate before them: 3, 6 and 9 of 12. From Pan et al., IA-RED2: Interpretability-Aware Redundancy Reduction for Vision
    Transformers, arXiv 2106.12620.

    F_q and F_k are new weights in float32. They start as the layer's own projections to queries and keys, with its norm
    before them, so that tokens stay that the layer would attend to, scaled down where products are so large that a
    sigmoid has no gradient; where these are not found, products are cosines of the normalised tokens. Training goes
    through ``trimtab.to_torch``, and ``trimtab.update`` takes the weights back. For it, the layers up to the next gate
    add ``score - score`` to the attention scores of kept tokens, which is 0, and of which the gradient reaches the
    policy through the first score alone (straight-through estimation): results are those of the selection alone. The
    original trains by reinforcement instead.

    - ``keep``: the share of the tokens that stay at each gate, rounded up.
    """

    name: ClassVar[str] = "gate-tokens"
    keep: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise UsageError(
                "gate-tokens cannot keep this share of the tokens",
                values={"keep": self.keep},
                rule="0 < keep <= 1",
                fix="for example keep=0.7",
            )

    def does_nothing(self) -> bool:
        return self.keep == 1

    def default_layers(self, stream: Stream) -> list[int]:
        return at_shares(len(stream.layers), *_PLACES)

    def removals(self, stream: Stream, layers: Sequence[int]) -> Removals:
        tokens, removals = stream.tokens, []
        for _ in layers:
            removals.append(tokens - stream.protected - kept_tokens(self.keep, tokens, stream.protected))
            tokens -= removals[-1]
        return tuple(removals)

    def reduce(self, place: Place, removed: int) -> Step:
        keep = place.tokens - place.protected - removed
        found = layer_projections(place.build.module, place.layer)
        initial = (found or identity_projections(place.layer)).tempered()
        return GateStep(place, keep, f"gate_tokens.{place.number}", initial, found is None)

    def run(self, module: Module, ctx: Context) -> Changed:
        guessed: list[tuple[Place, GateStep]] = []

        def watch(place: Place, step: Step) -> None:
            assert isinstance(step, GateStep)
            if step.guessed:
                guessed.append((place, step))

        changed = self.rewrite(module, ctx, watch)
        generator = ctx.generator(self.name)
        for place, step in guessed:
            ctx.note(f"no projections found in layer {place.number}: its gate starts with cosines")
            for id in step.weights.ids:
                _disturb(module, id, generator)
        return changed


def _disturb(module: Module, id: str, generator: torch.Generator) -> None:
    """Add small random numbers to a weight, so that it equals no other, with which it would be joined."""
    import torch

    data = module.weights[id].tensor()
    noise = torch.randn(data.shape, generator=generator) * (_NOISE * float(data.abs().max()))
    module.weights[id] = Weight.from_tensor(id, data + noise, trainable=True)
