"""Moving the sizes of input channels into the weights, where that makes the rounded product better.

A channel that is much larger than the others leaves them few of the integers. With a factor m_k for each channel, the
input is rounded in units of ``s m_k`` and column k of the weights is multiplied by m_k, which is exact, so large
channels can hand on as much of their size as the weights bear. As SmoothQuant (G. Xiao et al., 2023), whose factors
``max|X_k|^alpha / max|W_k|^(1 - alpha)`` these are; but the rounding itself divides, so that no norm in front is
needed, and alpha is chosen for each input by the error of what reads it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trimtab.passes.quantization.samples import InputSample
from trimtab.passes.quantization.scales import Affine, Integers, quantized_rows, row_scales

_ALPHAS = tuple(step / 10 for step in range(1, 11))
_RATIOS = tuple(1 - step / 16 for step in range(12))
"""Of the range to the widest one."""


def choose(
    sample: InputSample, weight: torch.Tensor, plain: Affine, weights: Integers, clip: bool
) -> tuple[torch.Tensor | None, Affine]:
    """Factors of an input's channels, f32 [K] or None, and how the input divided by them is rounded.

    Args:
        sample: of the input.
        weight: of all layers that read it, f32 [N, K].
        plain: how the input is rounded without factors; it stays where nothing else is better.
        weights: the integers of the weight.
        clip: try narrower ranges too, which clip some numbers and have finer steps for the others.
    """
    exact = F.linear(sample.rows, weight)
    best: tuple[torch.Tensor | None, Affine] = (None, plain)
    least = _error(plain.rounded(sample.rows), _rounded(weight, weights), exact)
    for alpha in (0.0, *_ALPHAS):
        factors = _of_alpha(sample, weight, alpha) if alpha else torch.ones_like(sample.low)
        stored, rows = _rounded(weight * factors, weights), sample.rows / factors
        low, high = sample.range(factors)
        for ratio in _RATIOS if clip else _RATIOS[:1]:
            how = Affine.of_range(ratio * low, ratio * high, plain.integers)
            found = _error(how.rounded(rows), stored, exact)
            if found < least:
                best, least = (factors if alpha else None, how), found
    return best


def _of_alpha(sample: InputSample, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    channels = torch.maximum(-sample.low, sample.high).double()
    columns = weight.abs().amax(0).double()
    # A channel or column of zeros has no say: what it is divided by makes no difference.
    used = (channels > 0) & (columns > 0)
    logs = torch.where(used, alpha * channels.log() - (1 - alpha) * columns.log(), 0.0).nan_to_num()
    mean = logs[used].mean() if bool(used.any()) else logs.new_zeros(())
    return torch.where(used, (logs - mean).exp(), 1.0).float()


def _rounded(weight: torch.Tensor, integers: Integers) -> torch.Tensor:
    scales = row_scales(weight, integers, search=False)
    return quantized_rows(weight, scales, integers).float() * scales[:, None]


def _error(rows: torch.Tensor, weight: torch.Tensor, exact: torch.Tensor) -> float:
    """The squared error of the product."""
    return float((F.linear(rows, weight) - exact).square().sum())
