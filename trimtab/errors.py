"""Every error a user can meet, with the parts of its message as fields.

A message reads ``<what failed>: <values>. <rule>. <fix>.`` followed by where it happened. The parts are kept
apart so that the command line, ``--json`` output and tests read the same data.  This module imports nothing but
the standard library, because the runtime on a device uses it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Location:
    """A place in the user's program: a source file line, or a named node of a model file."""

    file: str
    line: int = 0
    function: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place} in {self.function}" if self.function else place


class TrimtabError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what failed, without a final full stop.
        values: the concrete values involved, by name.
        rule: which rule was broken, or why it matters.
        fix: what the user can do next.
        where: pass, value or op concerned, in words.
        location: the user's source line, when known.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        values: Mapping[str, Any] | None = None,
        rule: str = "",
        fix: str = "",
        where: str = "",
        location: Location | None = None,
    ) -> None:
        self.what = what
        self.values = dict(values or {})
        self.rule = rule
        self.fix = fix
        self.where = where
        self.location = location
        super().__init__(self.message)

    @property
    def message(self) -> str:
        text = self.what.rstrip(".")
        if self.values:
            text += ": " + ", ".join(f"{name}={value}" for name, value in self.values.items())
        sentences = [text, *(part.rstrip(".") for part in (self.rule, self.fix) if part)]
        text = ". ".join(sentences) + "."
        if self.where:
            text += f"\n  at {self.where}"
        if self.location is not None:
            text += f"\n  from {self.location}"
        return text

    def __str__(self) -> str:
        return self.message

    def to_dict(self) -> dict[str, Any]:
        """The error as plain data, the form ``--json`` prints."""
        return {
            "code": self.code,
            "what": self.what,
            "values": {name: str(value) for name, value in self.values.items()},
            "rule": self.rule,
            "fix": self.fix,
            "where": self.where,
            "location": str(self.location) if self.location else None,
        }


class UsageError(TrimtabError):
    """A call or command that cannot mean anything: unknown pass, malformed option, missing file."""

    code = "usage"
    exit_code = 2


class MissingDependencyError(UsageError):
    """An optional package that the requested feature needs is not installed."""

    code = "missing-dependency"


class VerificationError(TrimtabError):
    """A module breaks a rule of the IR."""

    code = "verification"
    exit_code = 3


class ParseError(TrimtabError):
    """IR or pipeline text that does not follow the grammar."""

    code = "parse"
    exit_code = 3


class ImportModelError(TrimtabError):
    """A model that a frontend cannot read, or will not read because it is broken or hostile."""

    code = "import"
    exit_code = 4


class UnsupportedOpError(ImportModelError):
    """An operator (or a form of it) that Trimtab does not import."""

    code = "unsupported-op"


class PassError(TrimtabError):
    """A pass failed, was given bad options, or was asked to run in an order its properties forbid."""

    code = "pass"
    exit_code = 5


class ContractError(PassError):
    """A pass changed the results of a module by more than its contract allows."""

    code = "contract"


class UnsupportedByBackendError(TrimtabError):
    """Ops that a backend cannot compile, all reported at once before lowering starts."""

    code = "unsupported-by-backend"
    exit_code = 6


class BackendError(TrimtabError):
    """A code generator failed on a module that passed its capability check."""

    code = "backend"
    exit_code = 6


class ArtifactError(TrimtabError):
    """An artifact that cannot be written, or that the runtime refuses to load."""

    code = "artifact"
    exit_code = 7


class InputError(TrimtabError):
    """Wrong inputs given to a session or the interpreter: names, dtypes or shapes."""

    code = "input"
    exit_code = 8


class CalibrationError(TrimtabError):
    """Sample or calibration data that cannot be used."""

    code = "calibration"
    exit_code = 8


class InternalError(TrimtabError):
    """A bug in Trimtab. The message names the reproducer that was written."""

    code = "internal"
    exit_code = 70
