"""What a search finds, as data and as a story: the pass, the rewrite in it, and what the check says around them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trimtab.debug.checks import Check, Data, Verdict
from trimtab.errors import Location
from trimtab.ir.core import Module
from trimtab.passes.base import Pass
from trimtab.passes.pipeline import Pipeline


@dataclass(frozen=True)
class Application:
    """One application of a pass in the run of the pipeline.

    Attributes:
        number: its position in the run, from 1; the passes of groups count in every round.
        pass_: the pass.
        group, round: the group that it ran in, "" for none, and the group's round, from 1.
        before: the module before it.
        after: the module after it, or how the pass failed.
    """

    number: int
    pass_: Pass
    group: str
    round: int
    before: Module
    after: Module | Verdict

    @property
    def changed(self) -> bool:
        return self.after is not self.before

    def __str__(self) -> str:
        return f"{self.pass_}{f' (group {self.group}, round {self.round})' if self.group else ''}"


@dataclass(frozen=True)
class RewriteAt:
    """One application of a rewrite rule inside a pass.

    Attributes:
        number, of: its position among the applications of the pass on this module, from 1, and how many there were.
        rule: name of the rule.
        op: the op that it rewrote, as text in the module of that moment.
        location: the user's source line of that op.
        before, after: what the check says after ``number - 1`` and after ``number`` applications.
    """

    number: int
    of: int
    rule: str
    op: str
    location: Location | None
    before: Verdict
    after: Verdict

    def to_dict(self) -> dict[str, Any]:
        return {
            "number": self.number, "of": self.of, "rule": self.rule, "op": self.op,
            "location": str(self.location) if self.location else None,
            "before": self.before.to_dict(), "after": self.after.to_dict(),
        }  # fmt: skip


@dataclass(frozen=True)
class Culprit:
    """The pass at fault.

    Attributes:
        application: the application of the pass.
        before, after: what the check says of the module before and after it.
        rewrite: the rewrite at fault, None when it cannot be told.
        why_not: why the rewrite cannot be told.
    """

    application: Application
    before: Verdict
    after: Verdict
    rewrite: RewriteAt | None = None
    why_not: str = ""

    def to_dict(self) -> dict[str, Any]:
        application = self.application
        return {
            "number": application.number, "pass": application.pass_.name, "text": str(application.pass_),
            "contract": str(application.pass_.contract), "group": application.group, "round": application.round,
            "before": self.before.to_dict(), "after": self.after.to_dict(),
            "rewrite": self.rewrite.to_dict() if self.rewrite is not None else None, "why_not": self.why_not,
        }  # fmt: skip


@dataclass(frozen=True)
class Bisection:
    """What :func:`bisect` found.

    Attributes:
        pipeline: the pipeline.
        check: the check.
        data: the tensors that passes and check saw.
        applications: how many applications of passes the run had.
        final: what the check says of the result of the pipeline, or how a pass failed.
        culprit: the pass at fault; None when nothing is wrong.
        notes: what a reader should know of how sure the answer is.
    """

    pipeline: Pipeline
    check: Check
    data: Data
    applications: int
    final: Verdict
    culprit: Culprit | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The story, for people."""
        lines = [f"pipeline  {self.pipeline}", f"check     {self.check.text}"]
        if self.culprit is None:
            return "\n".join([*lines, f"result    nothing is wrong: the result {self.final}"])
        at, rewrite = self.culprit.application, self.culprit.rewrite
        lines += [
            f"pass      {at.number} of {self.applications}: {at}",
            f"  before  the check {self.culprit.before}",
            f"  after   the check {self.culprit.after}",
        ]
        if rewrite is not None:
            lines += [f"rewrite   {rewrite.number} of {rewrite.of}: {rewrite.rule}", f"  of      {rewrite.op}"]
            lines += [f"  from    {rewrite.location}"] if rewrite.location is not None else []
            lines += [
                f"  with {rewrite.number - 1} of them, the check {rewrite.before}",
                f"  with {rewrite.number} of them, the check {rewrite.after}",
            ]
        else:
            lines.append(f"rewrite   cannot be told: {self.culprit.why_not}")
        return "\n".join([*lines, *(f"note      {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain data."""
        return {
            "pipeline": str(self.pipeline), "check": self.check.text, "applications": self.applications,
            "final": self.final.to_dict(), "culprit": self.culprit.to_dict() if self.culprit is not None else None,
            "notes": list(self.notes),
        }  # fmt: skip
