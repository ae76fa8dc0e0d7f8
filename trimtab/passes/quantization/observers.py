"""Observers: the range of a stream of tensors, in memory that does not grow with the stream."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import CalibrationError, UsageError
from trimtab.passes.quantization.clipping import least_divergence_range, least_squares_range, percentile_range
from trimtab.passes.quantization.histogram import Histogram

if TYPE_CHECKING:
    import torch

State = dict[str, NDArray[Any]]
_MOVING_SHARE = 0.1
"""Of a new batch in a moving average: calibration has tens of batches, not the thousands that training has."""


class Observer(ABC):
    """Sees tensors one after the other and says what range stands for all of them.

    Attributes:
        kind: what :func:`make_observer` calls it.
        axis: the axis whose channels have ranges of their own; None for one range.
        symmetric: whether low is minus high.
        options: what :func:`make_observer` was given besides the kind, to make such an observer again.
    """

    kind: ClassVar[str]

    def __init__(self, axis: int | None, symmetric: bool) -> None:
        self.axis = axis
        self.symmetric = symmetric
        self.options: dict[str, Any] = {}

    def update(self, tensor: torch.Tensor) -> None:
        """Take in a tensor of any shape and real type; one without elements is no data and changes nothing.

        Raises:
            CalibrationError: it contains NaN or infinities, or has not the axis, or other channels than before.
        """
        if not tensor.numel():
            return
        ends = tensor.detach().aminmax()
        if not (math.isfinite(ends.min) and math.isfinite(ends.max)):
            raise CalibrationError(
                "a tensor to observe contains NaN or infinities",
                values={"elements": f"{int((~tensor.isfinite()).sum())} of {tensor.numel()}"},
                rule="statistics of such data are meaningless",
            )
        self._update(tensor.detach())

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Low and high, float64: each [], or [C] with an axis.

        Raises:
            CalibrationError: nothing was seen.
        """
        import torch

        if not self.has_data:
            raise CalibrationError(
                "there is no range of a value that was never seen",
                values={"observer": self.kind},
                fix="give calibration data, on which the value is computed and has elements",
            )
        low, high = self._range()
        if self.symmetric:
            high = np.maximum(-np.asarray(low), high)
            low = -high
        return torch.from_numpy(np.array(low, np.float64)), torch.from_numpy(np.array(high, np.float64))

    @property
    @abstractmethod
    def has_data(self) -> bool:
        """Whether anything was seen."""

    @abstractmethod
    def state(self) -> State:
        """All that was seen, as arrays that :meth:`load` takes: f64 and i64."""

    @abstractmethod
    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Become as the observer whose :meth:`state` this is."""

    @abstractmethod
    def _update(self, tensor: torch.Tensor) -> None: ...

    @abstractmethod
    def _range(self) -> tuple[Any, Any]: ...


class MinMax(Observer):
    """The least and the largest number of all, or of each channel."""

    kind = "minmax"

    def __init__(self, axis: int | None, symmetric: bool) -> None:
        super().__init__(axis, symmetric)
        self._ends: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    @property
    def has_data(self) -> bool:
        return self._ends is not None

    def state(self) -> State:
        return {"low": self._ends[0].copy(), "high": self._ends[1].copy()} if self._ends is not None else {}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._ends = (np.array(state["low"]), np.array(state["high"])) if state else None

    def _update(self, tensor: torch.Tensor) -> None:
        ends = self._ends_of(tensor)
        low, high = ends if self._ends is None else self._joined(self._ends, ends)
        self._ends = np.asarray(low), np.asarray(high)  # of numbers, numpy's functions do not return arrays

    def _range(self) -> tuple[Any, Any]:
        assert self._ends is not None
        return self._ends

    def _joined(self, before: tuple[Any, Any], new: tuple[Any, Any]) -> tuple[Any, Any]:
        return np.minimum(before[0], new[0]), np.maximum(before[1], new[1])

    def _ends_of(self, tensor: torch.Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if self.axis is None:
            ends = tensor.aminmax()
            return ends.min.double().numpy(), ends.max.double().numpy()
        if not -tensor.dim() <= self.axis < tensor.dim():
            raise CalibrationError(
                "a tensor to observe has no such axis", values={"axis": self.axis, "shape": list(tensor.shape)}
            )
        rows = tensor.movedim(self.axis, 0).flatten(1) if tensor.dim() > 1 else tensor[:, None]
        if self._ends is not None and len(self._ends[0]) != len(rows):
            raise CalibrationError(
                "a tensor to observe has another number of channels than those before",
                values={"axis": self.axis, "before": len(self._ends[0]), "now": len(rows)},
                fix="observe an axis of fixed size",
            )
        return rows.amin(1).double().numpy(), rows.amax(1).double().numpy()


class Moving(MinMax):
    """Exponential moving averages of the least and the largest number of each batch: a tenth of the newest, and nine
    tenths of what was before. The order of the batches matters."""

    kind = "moving"

    def _joined(self, before: tuple[Any, Any], new: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = (old + _MOVING_SHARE * (now - old) for old, now in zip(before, new, strict=True))
        return low, high


class _OfHistogram(Observer):
    """What is found in the histogram of all numbers."""

    def __init__(self, symmetric: bool) -> None:
        super().__init__(None, symmetric)
        self._histogram = Histogram()

    @property
    def has_data(self) -> bool:
        return self._histogram.low <= self._histogram.high

    def state(self) -> State:
        return self._histogram.state()

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._histogram.load(dict(state))

    def _update(self, tensor: torch.Tensor) -> None:
        self._histogram.add(tensor)


class Percentile(_OfHistogram):
    """The range that a percentage of all numbers are in: see :func:`.clipping.percentile_range`."""

    kind = "percentile"

    def __init__(self, percentile: float, symmetric: bool) -> None:
        super().__init__(symmetric)
        self._percentile = percentile

    def _range(self) -> tuple[float, float]:
        return percentile_range(self._histogram, self._percentile, self.symmetric)


class LeastSquares(_OfHistogram):
    """The range with the least squared error of rounding and clipping: see :func:`.clipping.least_squares_range`."""

    kind = "mse"

    def __init__(self, bits: int, symmetric: bool) -> None:
        super().__init__(symmetric)
        self._bits = bits

    def _range(self) -> tuple[float, float]:
        return least_squares_range(self._histogram, self._bits, self.symmetric)


class Entropy(_OfHistogram):
    """The range with the least divergence, as TensorRT: see :func:`.clipping.least_divergence_range`."""

    kind = "entropy"

    def __init__(self, bits: int, symmetric: bool) -> None:
        super().__init__(symmetric)
        self._bits = bits

    def _range(self) -> tuple[float, float]:
        return least_divergence_range(self._histogram, self._bits, self.symmetric)


KINDS = (MinMax.kind, Moving.kind, Percentile.kind, LeastSquares.kind, Entropy.kind)
"""What :func:`make_observer` makes."""


def make_observer(
    kind: str, *, axis: int | None = None, bits: int = 8, symmetric: bool = False, percentile: float = 99.99
) -> Observer:
    """An observer that has seen nothing.

    Args:
        kind: ``minmax``; ``moving``, the moving average of each batch's; ``percentile``; ``mse``, the least squared
            error of quantizing; ``entropy``, the least divergence from what was before quantizing.
        axis: for ``minmax`` and ``moving``: ranges for each channel of this axis, which may count from the back.
        bits: of the integers that numbers become, 2 to 16; for ``mse`` and ``entropy``.
        symmetric: make low minus high.
        percentile: of the numbers that are inside, above 0 and at most 100.

    Raises:
        UsageError: an unknown kind, a bad option, or an axis for a kind that has one range.
    """
    if kind not in KINDS:
        raise UsageError("there is no such observer", values={"observer": kind, "known": ", ".join(KINDS)})
    if not 2 <= bits <= 16:
        raise UsageError("an observer is for integers of 2 to 16 bits", values={"bits": bits})
    if not 0 < percentile <= 100:
        raise UsageError(
            "a percentile is above 0 and at most 100", values={"percentile": percentile}, fix="for example 99.99"
        )
    if axis is not None and kind not in (MinMax.kind, Moving.kind):
        raise UsageError(
            "this observer has one range for a whole tensor",
            values={"observer": kind, "axis": axis},
            rule="a histogram for each channel would need much memory",
            fix="use minmax or moving",
        )
    made: Observer
    match kind:
        case "minmax":
            made = MinMax(axis, symmetric)
        case "moving":
            made = Moving(axis, symmetric)
        case "percentile":
            made = Percentile(percentile, symmetric)
        case "mse":
            made = LeastSquares(bits, symmetric)
        case _:
            made = Entropy(bits, symmetric)
    made.options = {"axis": axis, "bits": bits, "symmetric": symmetric, "percentile": percentile}
    return made
