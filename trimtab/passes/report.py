"""What a run of a pipeline did: one row for each application of a pass, as data for people and for ``--json``."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from trimtab.passes.contracts import Drift


@dataclass
class PassRow:
    """One application of a pass.

    Attributes:
        name, text: the pass, and the pass with its options as in the pipeline.
        contract: what the pass promises.
        group, round: the group it ran in ("" for none) and the group's round, from 1.
        changed: whether the module changed.
        seconds: time of the pass alone.
        check_seconds: time to verify the module and check the contract. Consecutive exact passes are checked
            together; their cost stands in the last one's row.
        ops_before, ops_after: numbers of ops, those of regions included.
        macs_before, macs_after: multiply-accumulates of one evaluation, with the symbols at their smallest sizes.
        weight_bytes_before, weight_bytes_after: bytes of the weights that graphs read, each counted once.
        drift: how far the results moved; None when it was not measured.
        metric_before, metric_after: the user's metric around a pass that is not exact.
        notes: remarks of the pass and of the manager.
        layers: what the pass did to each layer, for passes that say so: facts by name.
        rules: what each rewrite rule tried, matched and rejected; see :class:`trimtab.ir.rewrite.RuleLog`.
    """

    name: str
    text: str
    contract: str
    group: str = ""
    round: int = 1
    changed: bool = False
    seconds: float = 0.0
    check_seconds: float = 0.0
    ops_before: int = 0
    ops_after: int = 0
    macs_before: int = 0
    macs_after: int = 0
    weight_bytes_before: int = 0
    weight_bytes_after: int = 0
    drift: Drift | None = None
    metric_before: float | None = None
    metric_after: float | None = None
    notes: list[str] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    rules: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        row = asdict(self)
        row["drift"] = self.drift.to_dict() if self.drift is not None else None
        return row


@dataclass
class OptimizeReport:
    """The rows of a run in order, and its totals.

    Attributes:
        pipeline: the pipeline's text.
        rows: one per application of a pass.
        seconds: wall time of the whole run.
        notes: remarks that belong to no pass, such as why contracts were not checked.
    """

    pipeline: str
    rows: list[PassRow] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def check_seconds(self) -> float:
        """What verifying and checking contracts cost."""
        return sum(row.check_seconds for row in self.rows)

    @property
    def applied(self) -> list[str]:
        """The passes that changed the module, with their options, in order."""
        return [row.text for row in self.rows if row.changed]

    def near_misses(self, at_most: int = 3) -> list[str]:
        """The most frequent reasons why a rule left a place alone that it almost matched, in words.

        Of a pass that ran several times, the last run counts.
        """
        last = {row.text: row for row in self.rows}
        reasons = Counter(
            {
                f"{rule['rule']}: {reason}": count
                for row in last.values()
                for rule in row.rules
                for reason, count in rule["rejected"].items()
            }
        )
        return [f"{text} ({count} times)" if count > 1 else text for text, count in reasons.most_common(at_most)]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, the form ``--json`` prints and the artifact's manifest keeps."""
        return {
            "pipeline": self.pipeline,
            "seconds": self.seconds,
            "check_seconds": self.check_seconds,
            "notes": list(self.notes),
            "passes": [row.to_dict() for row in self.rows],
        }
