"""Mixing tokens into fewer ones by trained modules: SiT."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.errors import UsageError
from trimtab.ir.core import Module
from trimtab.ir.dead_code import remove_dead_ops
from trimtab.ir.interpreter import interpret
from trimtab.ir.weights import Weight
from trimtab.passes.base import Changed, Context
from trimtab.passes.samples import generate_samples
from trimtab.passes.tokens.entry import EntryReduction, at_shares
from trimtab.passes.tokens.schedules import Removals
from trimtab.passes.tokens.shortening import Place
from trimtab.passes.tokens.slimming import SlimStep, pooling_weights
from trimtab.passes.tokens.steps import Step
from trimtab.passes.tokens.stream import Stream

if TYPE_CHECKING:
    import torch

_PLACES = (9 / 16, 12 / 16, 14 / 16)
"""The stages of LV-ViT in SiT have 9, 3, 2 and 2 layers, with a module behind each but the last."""
_SAMPLES = 64
"""Of the calibration data, that initial weights are fitted on at most."""
_SAMPLE_MACS = 5e10
"""Multiply-accumulates that evaluating random samples may take."""
_DIGITS = 9
"""To which numbers of tokens are rounded before they are rounded down, as 100 * 0.29 is a little less than 29."""


@dataclass(frozen=True)
class SlimTokens(EntryReduction):
    """Mix the tokens into fewer ones after some layers, by small modules that are to be trained (SiT).

    Each new token is a mean of all tokens, weighted by a softmax over scores that a norm, two linear layers and a GELU
    give to each token. The first tokens, which are read by their position, are kept apart and stay as they are. Means
    over tokens keep counting every original token. From Zong et al., Self-slimmed Vision Transformer, arXiv 2111.12624.

    The weights of the modules are new, in float32. They start close to average pooling of neighbouring tokens, fitted
    on the calibration data or, without any, on random inputs: a start for training through ``trimtab.to_torch``, from
    which ``trimtab.update`` takes the trained weights back, and not a reduction to use untrained.

    - ``keep``: the i-th module leaves this share, to the power of i, of the tokens that there were before the first.
    - ``after``: numbers of the layers, from 0, behind each of which a module stands; empty for the places of SiT, which
      are behind 9, 12 and 14 sixteenths of the layers.
    """

    name: ClassVar[str] = "slim-tokens"
    layers: ClassVar[tuple[int, ...]] = ()  # type: ignore[misc]  # no option here: `after` says where
    keep: float = 0.5
    after: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise UsageError(
                "slim-tokens cannot keep this share of the tokens",
                values={"keep": self.keep},
                rule="0 < keep <= 1",
                fix="for example keep=0.5",
            )
        if self.max_drop:
            raise UsageError(
                "slim-tokens cannot keep to max_drop",
                values={"max_drop": self.max_drop},
                rule="how much is lost shows when the new weights have been trained",
                fix="give keep= or budget=, and train the module",
            )

    def does_nothing(self) -> bool:
        return self.keep == 1

    def default_layers(self, stream: Stream) -> list[int]:
        count = len(stream.layers)
        if not self.after:
            return at_shares(count, *_PLACES)
        if list(self.after) != sorted(set(self.after)) or not 0 <= self.after[0] <= self.after[-1] < count - 1:
            raise UsageError(
                "slim-tokens got wrong places",
                values={"after": list(self.after), "layers": count},
                rule="after has numbers of layers from 0 in rising order; behind the last layer there is no next one",
                fix=f"give some of 0 to {count - 2}" if count > 1 else "leave the pass out for this model",
            )
        return [number + 1 for number in self.after]

    def removals(self, stream: Stream, layers: Sequence[int]) -> Removals:
        free = stream.tokens - stream.protected
        left = [free] + [
            max(1, math.floor(round(free * self.keep**module, _DIGITS))) for module in range(1, len(layers) + 1)
        ]
        return tuple(before - after for before, after in itertools.pairwise(left))

    def reduce(self, place: Place, removed: int) -> Step:
        return SlimStep(place, place.tokens - place.protected - removed, f"slim_tokens.{place.number - 1}")

    def run(self, module: Module, ctx: Context) -> Changed:
        steps: list[Step] = []
        changed = self.rewrite(module, ctx, watch=lambda _, step: steps.append(step))
        if changed:
            batches = _batches(module, ctx)
            generator = ctx.generator(self.name)
            for step in steps:
                assert isinstance(step, SlimStep)
                _initialize(module, step, batches, generator)
        return changed


def _batches(module: Module, ctx: Context) -> list[tuple[torch.Tensor, ...]]:
    """Inputs to fit on: the user's, or random ones."""
    if not ctx.calibration:
        return [sample.inputs for sample in generate_samples(module, ctx, _SAMPLE_MACS) if not sample.special]
    batches: list[tuple[torch.Tensor, ...]] = []
    for batch in ctx.calibration:
        if batches and sum(len(inputs[0]) for inputs in batches) >= _SAMPLES:
            break
        batches.append(batch)
    return batches


def _initialize(
    module: Module, step: SlimStep, batches: Sequence[tuple[torch.Tensor, ...]], generator: torch.Generator
) -> None:
    """Give the module of ``step`` its weights, with those of the ones before it in place."""
    import torch

    tokens = torch.cat([_tokens(module, step, batch) for batch in batches])
    fitted = pooling_weights(tokens, step.count - step.protected, generator)
    for id, tensor in zip(step.weights.ids, fitted, strict=True):
        module.weights[id] = Weight.from_tensor(id, tensor, trainable=True)


def _tokens(module: Module, step: SlimStep, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What the module of ``step`` is given, of which nothing behind it is computed."""
    graph = module.main
    outputs, names = graph.outputs, graph.output_names
    graph.set_outputs([step.free])
    part = module.copy()
    graph.set_outputs(outputs, names)
    remove_dead_ops(part)
    (tokens,) = interpret(part, inputs)
    return tokens  # type: ignore[no-any-return]
