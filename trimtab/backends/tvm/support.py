"""Which ops the TVM backend can compile."""

from __future__ import annotations

from trimtab.backends import capability
from trimtab.backends.capability import Unsupported
from trimtab.ir.core import Module
from trimtab.ir.op import Op


def unsupported_ops(module: Module) -> list[Unsupported]:
    """Every op of ``module`` that the backend has no code for."""
    return capability.unsupported_ops(module, _examine)


def check_supported(module: Module) -> None:
    """Raise one error that lists every unsupported op.

    Raises:
        UnsupportedByBackendError: there are some.
    """
    capability.check_supported(module, _examine, "TVM", "docs/tvm-backend.md")


def _examine(op: Op) -> tuple[str, str]:
    from trimtab.backends.tvm.rules import rule_for

    return capability.examine(op, rule_for)
