"""Powers of two between the scales of channels: the PTF of FQ-ViT.

Channels of a transformer's residual stream have ranges that differ by far, and each gets ``2^alpha`` times one scale,
alpha from 0 to 3, so that its integers are brought to the same scale by shifts. From Lin et al., "FQ-ViT: Post-Training
Quantization for Fully Quantized Vision Transformer", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.ir.core import Module, Value
from trimtab.passes.quantization.observers import make_observer
from trimtab.passes.quantization.scales import LEAST_SCALE
from trimtab.passes.quantization.statistics import observe

if TYPE_CHECKING:
    import torch

MOST_ALPHA = 3
_STEPS = 255


@dataclass(frozen=True, eq=False)
class PowerFactors:
    """How the channels of a tensor become u8: ``clamp(round(x / (2^alpha unit)) + zero, 0, 255)``.

    Attributes:
        unit: the scale of channels with an alpha of 0.
        zero: one zero point for all.
        alphas: i32 [C].
    """

    unit: float
    zero: int
    alphas: torch.Tensor

    @property
    def scales(self) -> torch.Tensor:
        """Of the channels, float64 [C]."""
        import torch

        return torch.ldexp(torch.tensor(self.unit, dtype=torch.float64), self.alphas.double())


def power_factors(
    module: Module, values: Sequence[Value], batches: Sequence[tuple[torch.Tensor, ...]], what: str
) -> dict[Value, PowerFactors]:
    """Factors for each of ``values``, whose channels are the last axis, with the least squared errors on ``batches``.

    The data are read twice: once for ranges and once for the errors of each alpha.

    Raises:
        CalibrationError: a value is not finite, or the module cannot be evaluated.
    """
    ranges = {value: make_observer("minmax") for value in values}
    if not ranges:
        return {}
    observe(module, ranges, batches, what=what)
    errors = {}
    for value, seen in ranges.items():
        low, high = (float(end) for end in seen.range())
        errors[value] = _Errors(min(low, 0.0), max(high, 0.0))
    observe(module, errors, batches, what=what)
    return {value: its.best() for value, its in errors.items()}


class _Errors:
    """Sums of the squared errors of each channel with each alpha."""

    def __init__(self, low: float, high: float) -> None:
        import torch

        widest = max((high - low) / _STEPS, LEAST_SCALE * 2**MOST_ALPHA)
        # Kernels read scales as float32.
        self._unit = float(torch.tensor(widest / 2**MOST_ALPHA, dtype=torch.float32))
        self._zero = min(max(round(-low / widest), 0), _STEPS)
        self._sums: Any = 0.0

    def update(self, tensor: torch.Tensor) -> None:
        import torch

        rows = tensor.double().reshape(-1, tensor.shape[-1])
        found = []
        for alpha in range(MOST_ALPHA + 1):
            scale = self._unit * 2**alpha
            steps = ((rows / scale).round() + self._zero).clamp(0, _STEPS) - self._zero
            found.append((steps * scale - rows).square().sum(0))
        self._sums = self._sums + torch.stack(found)

    def best(self) -> PowerFactors:
        import torch

        return PowerFactors(self._unit, self._zero, self._sums.argmin(0).to(torch.int32))
