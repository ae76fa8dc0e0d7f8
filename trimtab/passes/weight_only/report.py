"""What quantization of weights did, in numbers: how many layers, how many bytes, and how much noise."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from statistics import fmean

import torch


@dataclass
class Tally:
    """Sums over the layers that were replaced.

    Attributes:
        layers: how many have how many bits.
        before, after: bytes of their weights.
        ratios: for each, ``10 log10(|W|^2 / |W' - W|^2)``, the ratio of signal to quantization noise in decibels;
            infinite where nothing was lost.
    """

    layers: Counter[int] = field(default_factory=Counter)
    before: int = 0
    after: int = 0
    ratios: list[float] = field(default_factory=list)

    def add(self, bits: int, before: int, after: int, weight: torch.Tensor, quantized: torch.Tensor) -> None:
        """Count a layer; the weight and what became of it are f64 of one shape."""
        self.layers[bits] += 1
        self.before += before
        self.after += after
        self.ratios.append(signal_to_noise(weight, quantized))

    def __str__(self) -> str:
        counts = ", ".join(
            f"{count} {'layer' if count == 1 else 'layers'} in {bits} bits"
            for bits, count in sorted(self.layers.items())
        )
        finite = [ratio for ratio in self.ratios if math.isfinite(ratio)]
        mean = f"{fmean(finite):.1f} dB" if finite else "infinite"
        return f"{counts}; {_size(self.before)} become {_size(self.after)}; mean SQNR of the weights {mean}"


def signal_to_noise(weight: torch.Tensor, quantized: torch.Tensor) -> float:
    """The ratio of signal to quantization noise in decibels, of f64 tensors of one shape."""
    noise = float((quantized - weight).square().sum())
    signal = float(weight.square().sum())
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB" if count >= 1e3 else f"{count} bytes"
