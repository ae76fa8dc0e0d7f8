"""Merging of similar tokens: ToMe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from trimtab.errors import UsageError
from trimtab.passes.tokens.matching import bipartite_matching, key_metric, most_merged, without_padding
from trimtab.passes.tokens.reduction import TokenReduction
from trimtab.passes.tokens.schedules import Removals, clamped, constant, linear, ratio, slope
from trimtab.passes.tokens.shortening import Place
from trimtab.passes.tokens.steps import MergeStep, Step
from trimtab.passes.tokens.stream import Stream


@dataclass(frozen=True)
class MergeTokens(TokenReduction):
    """Merge the r most similar tokens after the attention of each layer (ToMe).

    Every second token looks for the one of the others whose keys are most like its own, and the r best pairs are
    averaged, weighted by how many tokens each stands for. The first tokens, which are read by their position, stay as
    they are. Means over tokens keep counting every original token. From Bolya et al., Token Merging: Your ViT But
    Faster, arXiv 2210.09461.

    - ``r``: how many tokens to merge in each layer.
    - ``schedule``: ``constant``; ``linear`` with the slope ``inflect``, from -1 for twice as many in the first layer
      and none in the last, to 1 for the reverse, which a budget keeps; ``ratio`` to keep the share ``keep`` of the
      tokens in each layer.
    - ``proportional``: attention counts a merged token as often as it stands for original ones; not for models that
      were trained by masked autoencoding alone, nor during training.
    """

    name: ClassVar[str] = "merge-tokens"
    r: int = 13
    schedule: Literal["constant", "linear", "ratio"] = "constant"
    inflect: float = 0.0
    keep: float = 0.9
    proportional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 0:
            raise UsageError("merge-tokens got a negative r", values={"r": self.r}, rule="r is 0 or more")
        if (self.budget and self.schedule == "ratio") or (self.max_drop and self.schedule != "constant"):
            raise UsageError(
                "merge-tokens got options that do not go together",
                values={"schedule": self.schedule, "budget": self.budget, "max_drop": self.max_drop},
                rule="a budget finds the number of tokens for schedule=constant or linear, and max_drop chooses also "
                "how many go in which layer",
                fix="leave schedule out, or give r or keep with it",
            )

    def does_nothing(self) -> bool:
        return self.r == 0 if self.schedule != "ratio" else self.keep == 1

    def removals(self, stream: Stream, layers: Sequence[int]) -> Removals:
        tokens, count = stream.tokens, len(layers)
        if self.schedule == "ratio":
            return ratio(self.keep, tokens, stream.protected, count)
        most = most_merged(tokens, stream.protected)
        if self.r > most:
            raise UsageError(
                "so many tokens cannot be merged",
                values={"r": self.r, "tokens": tokens, "protected": stream.protected},
                rule="at most half of the tokens that are not protected can be merged into the other half",
                fix=f"give r={most} or less, or budget=0.6 for a share of the multiply-accumulates",
            )
        wanted = linear(self.r, self.inflect, count) if self.schedule == "linear" else constant(self.r, count)
        return clamped(wanted, tokens, stream.protected)

    def spread(self, layers: int) -> Sequence[float]:
        return slope(self.inflect, layers) if self.schedule == "linear" else super().spread(layers)

    def reduce(self, place: Place, removed: int) -> Step:
        build = place.build
        metric = key_metric(build, place.k)
        if place.padded and place.sizes is not None:
            metric = without_padding(build, metric, place.sizes)
        assignment = bipartite_matching(build, metric, removed, place.protected)
        return MergeStep(place, assignment, self.proportional)
