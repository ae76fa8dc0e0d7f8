"""Which ops the TVM backend can compile. Everything that it cannot is reported at once, before lowering starts."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import Location, UnsupportedByBackendError
from trimtab.ir import ops
from trimtab.ir.core import Module
from trimtab.ir.op import Op


@dataclass(frozen=True)
class Unsupported:
    """One op that cannot be compiled.

    Attributes:
        op: mnemonic.
        text: the op as printed.
        reason: why, in words.
        fix: what the user can do.
        location: the user's source line.
    """

    op: str
    text: str
    reason: str
    fix: str
    location: Location | None

    def __str__(self) -> str:
        where = f" (from {self.location})" if self.location is not None else ""
        return f"{self.op}{where}: {self.reason}; {self.fix}"


def unsupported_ops(module: Module) -> list[Unsupported]:
    """Every op of ``module`` that the backend has no code for."""
    return [found for op in module.walk() if (found := _examine(op)) is not None]


def check_supported(module: Module) -> None:
    """Raise one error that lists every unsupported op.

    Raises:
        UnsupportedByBackendError: there are some.
    """
    problems = unsupported_ops(module)
    if not problems:
        return
    shown = [str(problem) for problem in problems[:20]]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    raise UnsupportedByBackendError(
        "the TVM backend cannot compile some ops",
        values={"count": len(problems), "ops": sorted({problem.op for problem in problems})},
        rule="\n  - ".join(["unsupported ops", *shown]),
        fix="rewrite these parts of the model with supported ops (docs/tvm-backend.md lists them)",
        location=next((problem.location for problem in problems if problem.location is not None), None),
    )


def _examine(op: Op) -> Unsupported | None:
    reason, fix = _reason(op)
    return Unsupported(op.name, repr(op), reason, fix, op.location) if reason else None


def _reason(op: Op) -> tuple[str, str]:
    from trimtab.backends.tvm.rules import rule_for

    packed = sorted({str(v.type.dtype) for v in (*op.operands, *op.results) if v.type.dtype.is_sub_byte})
    if packed:
        return f"it uses the sub-byte types {', '.join(packed)}", "convert to i8, u8 or a floating type first"
    if isinstance(op, ops.Repeat | ops.Fused):
        return "", ""
    if isinstance(op, ops.Opaque):
        return f"it calls the torch operator {op.target}, for which there is no code", "express it with other operators"
    rule = rule_for(op)
    if rule is None:
        return "there is no lowering rule for it", "express it with other operators"
    reason = rule.check(op)
    return reason, "change the model so that this holds" if reason else ""
