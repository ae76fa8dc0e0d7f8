"""Merging of redundant tokens by their energy: PiToMe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from trimtab.errors import UsageError
from trimtab.passes.tokens.energy import Kernel, energy_bipartite_matching, energy_matching
from trimtab.passes.tokens.matching import key_metric
from trimtab.passes.tokens.reduction import TokenReduction
from trimtab.passes.tokens.schedules import Removals, margins, ratio
from trimtab.passes.tokens.shortening import Place
from trimtab.passes.tokens.steps import MergeStep, Step
from trimtab.passes.tokens.stream import Stream


@dataclass(frozen=True)
class MergeTokensSpectral(TokenReduction):
    """Merge the tokens that are like many others after the attention of each layer (PiToMe).

    The energy of a token is high where its keys are like those of many tokens, and low for what stands alone, such as
    small objects. Of T tokens, besides the first ones that are read by their position, ``floor(T - T * keep)`` are
    merged in each layer, the most redundant ones, each into the one that it is most like; means are weighted by how
    many tokens each stands for. From Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging,
    arXiv 2405.16148.

    - ``keep``: the share of tokens to keep in each layer, at least 0.5.
    - ``variant``: which layers do what. ``energy`` merges among the tokens of the highest energy alone and
      ``bipartite`` the most similar pairs of all, split by their rank of energy; ``deit`` is ``bipartite`` in the first
      half of the layers and ``energy`` in the second, and ``mae`` the reverse, for models that were trained so.
    - ``margin``, ``fall``: cosines below ``margin - fall * l / L`` count as dissimilar in layer l of L.
    - ``kernel``: how a cosine adds to the energy: ``elu`` for images, ``gaussian`` for text.
    - ``proportional``: attention counts a merged token as often as it stands for original ones. False as in the
      original, which keeps the sizes of tokens for means alone.
    """

    name: ClassVar[str] = "merge-tokens-spectral"
    keep: float = 0.925
    variant: Literal["deit", "mae", "energy", "bipartite"] = "deit"
    margin: float = 0.75
    fall: float = 0.75
    kernel: Literal["elu", "gaussian"] = "elu"
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.5 <= self.keep <= 1:
            raise UsageError(
                "merge-tokens-spectral got a share that cannot be kept",
                values={"keep": self.keep},
                rule="at most half of the tokens can be merged into the other half: keep is 0.5 to 1",
                fix="for example keep=0.925, or budget=0.6 for a share of the multiply-accumulates",
            )
        if max(self.margin, self.margin - self.fall) >= 1:
            raise UsageError(
                "merge-tokens-spectral got a margin that no pair of tokens is above",
                values={"margin": self.margin, "fall": self.fall},
                rule="margins, from margin in the first layer to nearly margin - fall in the last, are below 1",
                fix="for example margin=0.75 and fall=0.75",
            )

    def does_nothing(self) -> bool:
        return self.keep == 1

    def removals(self, stream: Stream, layers: Sequence[int]) -> Removals:
        return ratio(self.keep, stream.tokens, stream.protected, len(layers))

    def reduce(self, place: Place, removed: int) -> Step:
        margin = margins(place.depth, self.margin, self.fall)[place.number]
        matching = energy_bipartite_matching if self._bipartite(place) else energy_matching
        kernel: Kernel = self.kernel
        sizes = place.sizes if place.padded else None
        metric = key_metric(place.build, place.k)
        assignment = matching(place.build, metric, removed, margin, place.protected, kernel, sizes)
        return MergeStep(place, assignment, self.proportional)

    def _bipartite(self, place: Place) -> bool:
        """Whether the layer merges the most similar pairs of all tokens."""
        first_half = place.number < (place.depth + 1) // 2
        return self.variant == "bipartite" or self.variant == ("deit" if first_half else "mae")
