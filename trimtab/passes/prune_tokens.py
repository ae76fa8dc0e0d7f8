"""Pruning of the tokens that get the least attention: EViT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from trimtab.errors import UsageError
from trimtab.ir.core import Value
from trimtab.passes.tokens.assignment import initial_sizes, made_up
from trimtab.passes.tokens.class_attention import (
    class_scores,
    keep_and_fuse,
    keep_best,
    kept_tokens,
    padding_last,
    received_scores,
)
from trimtab.passes.tokens.reduction import TokenReduction
from trimtab.passes.tokens.schedules import Removals
from trimtab.passes.tokens.selection import Selection
from trimtab.passes.tokens.shortening import Place
from trimtab.passes.tokens.steps import FuseStep, MergeStep, SelectStep, Step, counted
from trimtab.passes.tokens.stream import Stream


@dataclass(frozen=True)
class PruneTokens(TokenReduction):
    """Keep the tokens that get the most attention in a few layers, and fuse the others into one (EViT).

    A layer that prunes keeps ``ceil(keep * T)`` of its T tokens besides the first ones, which are read by their
    position and stay. The fused token comes last and is a token like others in later layers. Padding goes first and is
    never part of a fused token. Without ``layers``, those at a quarter, a half and three quarters of the depth prune:
    3, 6 and 9 of 12. From Liang et al., Not All Patches are What You Need, arXiv 2202.07800.

    - ``keep``: the share of tokens to keep in each of the layers.
    - ``score``: ``class`` for the attention that the class token, at position 0, pays; ``received`` for the mean over
      all tokens, which computes the attention matrix a second time; ``auto`` for ``class`` where there is a token that
      is read by its position.
    - ``fuse``: ``attention`` adds up the others times their scores, as the original does; ``mean`` takes their mean;
      ``drop`` drops them. Means over tokens count the fused token as all that it stands for; where tokens are dropped,
      the kept ones count for them in equal parts.
    """

    name: ClassVar[str] = "prune-tokens"
    keep: float = 0.7
    score: Literal["auto", "class", "received"] = "auto"
    fuse: Literal["attention", "mean", "drop"] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise UsageError(
                "prune-tokens got a share that cannot be kept",
                values={"keep": self.keep},
                rule="keep is above 0, and at most 1 for all tokens",
                fix="for example keep=0.7",
            )

    def does_nothing(self) -> bool:
        return self.keep == 1

    def default_layers(self, stream: Stream) -> list[int]:
        depth = len(stream.layers)
        return list(dict.fromkeys(depth * part // 4 for part in (1, 2, 3)))

    def removals(self, stream: Stream, layers: Sequence[int]) -> Removals:
        tokens, removals = stream.tokens, []
        for _ in layers:
            dropped = tokens - stream.protected - kept_tokens(self.keep, tokens, stream.protected)
            removals.append(max(0, dropped - (self.fuse != "drop")))
            tokens -= removals[-1]
        return tuple(removals)

    def reduce(self, place: Place, removed: int) -> Step | None:
        build = place.build
        keep = place.tokens - place.protected - removed - (self.fuse != "drop")
        if keep < 1:
            return None
        scores = self._scores(place)
        if self.fuse == "drop":
            return _dropped(place, keep_best(build, scores, keep, place.protected))
        weighted = keep_and_fuse(build, scores, keep, place.protected)
        if self.fuse == "mean":
            return MergeStep(place, weighted.assignment, proportional=False)
        return FuseStep(place, weighted)

    def _scores(self, place: Place) -> Value:
        """``[B, T]`` of the tokens behind the protected ones, below 0 for padding."""
        if self.score == "class" and not place.protected:
            raise UsageError(
                "tokens cannot be ranked by the attention of a class token",
                values={"score": self.score, "protected tokens": place.protected},
                rule="a class token is the first token, and is read by its position behind the layers",
                fix="give score=received",
                location=place.layer.attention.location,
            )
        build, scale = place.build, place.layer.attention.scale
        sizes = place.sizes if place.padded else None
        if self.score == "received" or not place.protected:
            scores = received_scores(build, place.q, place.k, scale, place.protected, place.key_mask, sizes)
        else:
            scores = class_scores(build, place.q, place.k, scale, place.protected, place.key_mask)
        return scores if sizes is None else padding_last(build, scores, sizes)


def _dropped(place: Place, selection: Selection) -> SelectStep:
    """The step that keeps a selection, whose tokens count for the dropped ones in means over tokens."""
    build = place.build
    before = place.sizes if place.sizes is not None else initial_sizes(build, place.x)
    kept = selection.select(build, before)
    sizes = made_up(build, kept, before, place.protected)
    return SelectStep(selection, sizes, counted(build, sizes) if place.padded else None)
