"""Contracts: what a pass promises about the results of a module, and how far two results are apart.

A contract is checked, not believed: :mod:`trimtab.passes.contract_check` evaluates the module before and after a
pass and asks :meth:`Contract.holds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from trimtab.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Drift:
    """How far the outputs of a module moved.

    Attributes:
        absolute: largest ``|after - before|``; infinite where only one of them is finite, but 0 where ``before`` is
            NaN: what is undefined may become anything, and only counts as differing.
        scale: largest finite ``|before|`` in the same output.
        differing: how many elements are not the same bit for bit (two NaNs count as the same).
        where: the sample, output and precision of the worst element, in words.
        resolution: relative distance of neighbouring numbers in the type that the outputs were computed in; 0 for
            integers and truth values.
    """

    absolute: float = 0.0
    scale: float = 0.0
    differing: int = 0
    where: str = ""
    resolution: float = 0.0

    @property
    def relative(self) -> float:
        """``absolute`` as a fraction of the output's ``scale``."""
        if self.absolute == 0.0:
            return 0.0
        return self.absolute / self.scale if self.scale else math.inf

    def __str__(self) -> str:
        if not self.differing:
            return "none"
        return f"{self.absolute:.3g} absolute, {self.relative:.3g} relative, {self.differing} elements differ"

    def to_dict(self) -> dict[str, Any]:
        return {"absolute": self.absolute, "relative": self.relative, "differing": self.differing, "where": self.where}


@dataclass(frozen=True)
class Exact:
    """The results do not change.

    By default bit for bit: the same sums in the same order, signed zeros and NaNs included.  With ``rounding`` the
    results are equal in real arithmetic but may be rounded differently (a reassociated sum, packed matrices, a
    constant rounded to float32): checked in float64, relative to the largest element of each output.
    """

    rounding: bool = False

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions to evaluate in: a torch dtype's name, or "" for the module's own."""
        return ("float64",) if self.rounding else ("",)

    def holds(self, drift: Drift) -> bool:
        if self.rounding:
            return drift.absolute <= 1e-12 + 1e-6 * drift.scale
        return drift.differing == 0

    def __str__(self) -> str:
        return "exact up to rounding" if self.rounding else "exact"


@dataclass(frozen=True)
class Close:
    """``|after - before| <= atol + rtol * max|before|`` for every element of an output, in float64 and as declared.

    The bound is relative to the largest element of the output, because an element near zero is the difference of
    large ones and no rewrite of a sum keeps its digits.  Where the type of the output is so coarse that 8 of its steps
    are more than ``rtol``, as half types are, these count instead.

    With ``unit`` the pass rounds values inside of the module to this relative precision, and how far that moves an
    output depends on the module.  So the bound grows with what the module makes of its own rounding: it is at least
    ``AMPLIFICATION`` times as far as the outputs of the module before the pass move when its inputs and weights are
    changed by up to ``unit``, relatively and at random.  Integers and truth values, which comparisons of rounded
    values decide, are then reported and not bounded.
    """

    rtol: float = 1e-5
    atol: float = 1e-8
    unit: float = 0.0

    AMPLIFICATION: ClassVar[float] = 16.0

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("float64", "")

    def holds(self, drift: Drift, sensitivity: float = 0.0) -> bool:
        """Whether ``drift`` is allowed for an output that moves by ``sensitivity`` when all is changed by ``unit``."""
        if self.unit and drift.differing and not drift.resolution:
            return True
        bound = self.atol + max(self.rtol, 8 * drift.resolution) * drift.scale
        return drift.absolute <= max(bound, self.AMPLIFICATION * sensitivity)

    def __str__(self) -> str:
        growing = f", or {self.AMPLIFICATION:g} times the effect of {self.unit:.2g}" if self.unit else ""
        return f"close (rtol={self.rtol:g}, atol={self.atol:g}{growing})"


@dataclass(frozen=True)
class Lossy:
    """The results change. The drift and the user's metric are reported, for the user to judge."""

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("",)

    def holds(self, drift: Drift) -> bool:
        return True

    def __str__(self) -> str:
        return "lossy"


Contract: TypeAlias = Exact | Close | Lossy


def contract_text(contract: Contract) -> str:
    """The contract as ``trimtab bisect --check`` takes it; :func:`parse_contract` is its inverse."""
    match contract:
        case Exact(rounding=rounding):
            return "rounding" if rounding else "exact"
        case Close(unit=unit) if unit:
            return "lossy"  # the bound depends on the module, which a tolerance cannot say
        case Close(rtol=rtol, atol=0.0):
            return f"rtol={rtol!r}"
        case Close(rtol=rtol, atol=atol):
            return f"rtol={rtol!r},atol={atol!r}"
        case Lossy():
            return "lossy"


def parse_contract(text: str) -> Contract:
    """Read ``exact``, ``rounding``, ``lossy``, or ``rtol=1e-3,atol=1e-8``, where a tolerance left out is 0.

    Raises:
        UsageError: the text is something else, or a tolerance is negative or no number.
    """
    words: dict[str, Contract] = {"exact": Exact(), "rounding": Exact(rounding=True), "lossy": Lossy()}
    if text.strip() in words:
        return words[text.strip()]
    tolerances: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in ("rtol", "atol") or name in tolerances or not number >= 0:
            raise UsageError(
                "cannot read the contract to check",
                values={"given": repr(text)},
                rule="it is rtol=NUMBER and atol=NUMBER, exact (the same bits), rounding (equal in real arithmetic), "
                "or lossy (can be evaluated)",
                fix="for example rtol=1e-3",
            )
        tolerances[name] = number
    return Close(**{"rtol": 0.0, "atol": 0.0, **tolerances})


def measure(before: torch.Tensor, after: torch.Tensor, where: str = "") -> Drift:
    """The drift between two results of one shape and dtype; results of different shapes are infinitely far apart."""
    import torch

    if before.shape != after.shape or before.dtype != after.dtype:
        return Drift(math.inf, 0.0, max(before.numel(), after.numel(), 1), where)
    if not before.numel():
        return Drift(where=where)
    if torch.equal(_bits(before), _bits(after)):
        return Drift(0.0, _scale(before), 0, where)
    same = before == after
    if before.dtype.is_floating_point:
        # == calls 0.0 and -0.0 the same, and NaN and NaN not.
        same &= torch.signbit(before) == torch.signbit(after)
        same |= before.isnan() & after.isnan()
    differing = int(before.numel() - same.sum())
    wide_before, wide_after = before.to(torch.float64), after.to(torch.float64)
    scale = _scale(wide_before)
    if not differing:
        return Drift(0.0, scale, 0, where)
    unmoved = same | wide_before.isnan()
    gap = torch.where(unmoved, 0.0, (wide_after - wide_before).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    resolution = torch.finfo(before.dtype).eps if before.dtype.is_floating_point else 0.0
    return Drift(float(gap.max()), scale, differing, where, resolution)


def _bits(data: torch.Tensor) -> torch.Tensor:
    """``data``, or for a floating type integers of the same bits."""
    import torch

    if not data.dtype.is_floating_point:
        return data
    return data.view({2: torch.int16, 4: torch.int32, 8: torch.int64}.get(data.element_size(), torch.uint8))


def _scale(data: torch.Tensor) -> float:
    """The largest finite magnitude in ``data``, or 0."""
    import torch

    if not data.dtype.is_floating_point:
        return float(data.to(torch.float64).abs().max())
    return float(data.abs().nan_to_num_(nan=0.0, posinf=0.0).max())
