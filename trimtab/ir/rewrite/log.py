"""What a run of rewrite rules did, and the gate that every application passes through.

The engine counts on behalf of the rules: an author of a rule does nothing for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.ir.op import Op

NEAR_MISS_LIMIT = 8
"""Near misses that are kept for a rule; the count in ``rejected`` goes on."""


@dataclass(frozen=True)
class NearMiss:
    """A place that looked like a match for a good part of the pattern.

    Attributes:
        matched, of: ops of the pattern that matched, and all of them.
        at: the root op, as text.
        location: the user's source line of the root; empty when unknown.
        reason: the first thing that did not fit, or the condition that failed.
    """

    matched: int
    of: int
    at: str
    location: str
    reason: str


@dataclass
class RuleLog:
    """The record of one rule in one run.

    Attributes:
        rule: name of the rule.
        tried: ops of the root's class that were looked at.
        matched: how often pattern and condition held.
        applied: how often the rule rewrote; less than ``matched`` only when the run has a limit.
        rejected: reasons why a place that matched, wholly or for a good part, was left alone, with their numbers.
        near_misses: the first of these places.
    """

    rule: str
    tried: int = 0
    matched: int = 0
    applied: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    near_misses: list[NearMiss] = field(default_factory=list)

    def reject(self, miss: NearMiss) -> None:
        """Record a place that was left alone."""
        self.rejected[miss.reason] += 1
        if len(self.near_misses) < NEAR_MISS_LIMIT and miss not in self.near_misses:
            self.near_misses.append(miss)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data."""
        return {**asdict(self), "rejected": dict(self.rejected)}


class Rewrites:
    """The log and the gate of one run of a pass.

    Args:
        limit: how many applications to allow; None for all. ``trimtab bisect`` searches with it for the first one
            that breaks a check.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.applied = 0
        self._log: dict[str, RuleLog] = {}
        self._last: tuple[str, Op | None] | None = None

    @property
    def log(self) -> Mapping[str, RuleLog]:
        """The record of each rule that was tried, by name."""
        return self._log

    @property
    def last(self) -> tuple[str, Op | None] | None:
        """The rule that was permitted last and the op it was going to rewrite."""
        return self._last

    def of(self, rule: str) -> RuleLog:
        """The record of ``rule``, a new one at the first call."""
        return self._log.setdefault(rule, RuleLog(rule))

    @property
    def exhausted(self) -> bool:
        """Whether the limit is reached, so that nothing more will be permitted."""
        return self.limit is not None and self.applied >= self.limit

    def permit(self, rule: str, op: Op | None = None) -> bool:
        """Whether ``rule`` may rewrite, here ``op``. Counts it if so; when not, the caller leaves the place alone."""
        if self.exhausted:
            return False
        self.applied += 1
        self.of(rule).applied += 1
        self._last = (rule, op)
        return True
