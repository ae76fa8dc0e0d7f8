"""What is seen of a layer's input beyond its range: the range of each channel, and some of its rows."""

from __future__ import annotations

import torch

_ROWS = 256
"""Rows that are kept of all batches together: enough to rank a few choices by their error."""


class InputSample:
    """A sample of the rows of a value ``[..., K]``, each row of all batches as likely as any other.

    Each row draws a number, and those with the largest ones are kept (J. Vitter, "Random Sampling with a Reservoir",
    1985, has the same distribution in one pass).

    Args:
        generator: of the numbers.

    Attributes:
        rows: f32 ``[at most 256, K]``.
        low, high: the least and the largest element of each channel, of all rows: f32 ``[K]``.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._drawn = torch.zeros(0)
        self.rows = torch.zeros(0, 0)
        self.low = self.high = torch.zeros(0)

    def update(self, tensor: torch.Tensor) -> None:
        """Take in another batch."""
        rows = tensor.detach().float().reshape(-1, tensor.shape[-1])
        if not len(rows):
            return
        low, high = rows.amin(0), rows.amax(0)
        if len(self.rows):
            low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
        self.low, self.high = low, high
        drawn = torch.rand(len(rows), generator=self._generator)
        some = drawn.topk(min(_ROWS, len(rows))).indices
        drawn = torch.cat((self._drawn, drawn[some]))
        rows = torch.cat((self.rows, rows[some])) if len(self.rows) else rows[some]
        kept = drawn.topk(min(_ROWS, len(drawn))).indices
        self._drawn, self.rows = drawn[kept], rows[kept].clone()

    def range(self, divisor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the largest element of all rows when each channel is divided by its ``divisor`` [K]."""
        return (self.low / divisor).min(), (self.high / divisor).max()
