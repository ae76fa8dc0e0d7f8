"""Pruning of tokens in state-space models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.errors import UsageError
from trimtab.ir.core import Module
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Lossy
from trimtab.passes.tokens.reduction import with_attention
from trimtab.passes.tokens.scan import ScanShortening, find_scans


@dataclass(frozen=True)
class PruneScanTokens(Pass):
    """Drop the tokens that matter least to the recurrence of a state-space model.

    A token matters by the mean over channels of the positive part of what the recurrence gives for it. The blocks
    behind run on the tokens that are kept, in their order; between two of them the state decays as often as tokens were
    left out. Behind the last block the others come back as they were when they were dropped. From Zhan et al.,
    Exploring Token Pruning in Vision State Space Models, arXiv 2409.18962.

    - ``keep``: the share of tokens to keep, rounded up.
    - ``after``: numbers of the blocks, from 0, behind which to prune; empty for those at a quarter, half and three
      quarters of the depth. Behind the last block nothing is left to save.
    """

    name: ClassVar[str] = "prune-scan-tokens"
    contract: ClassVar[Contract] = Lossy()
    grows_weights: ClassVar[bool] = True  # by constants that raising computes
    keep: float = 0.7
    after: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UsageError(
                "prune-scan-tokens got a share of tokens that it cannot keep",
                values={"keep": self.keep},
                rule="0 < keep <= 1",
            )

    def run(self, module: Module, ctx: Context) -> Changed:
        if self.keep == 1:
            return False
        raised = with_attention(module)
        scans = find_scans(raised)
        after = list(self.after) or sorted({max(0, len(scans) * part // 4 - 1) for part in (1, 2, 3)})
        if after != sorted(set(after)) or after[0] < 0 or after[-1] >= len(scans) - 1:
            raise UsageError(
                "prune-scan-tokens got wrong blocks",
                values={"after": after, "found": len(scans)},
                rule="after is numbers from 0 in rising order, of blocks that are not the last",
                fix=f"give some of 0 to {len(scans) - 2}" if len(scans) > 1 else "leave the pass out for this model",
            )
        permitted = [number for number in after if ctx.rewrites.permit(self.name, scans[number].site.producer)]
        if not permitted:
            return False
        shortening = ScanShortening(raised, scans, self.keep, permitted, self.name)
        shortening.run()
        if not shortening.counts:
            return False
        module.assign(raised)
        ctx.note(f"{scans[0].tokens} tokens become {' '.join(map(str, shortening.counts))}")
        return True
