"""Which ops the TVM backend can compile."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.backends.capability import Capability, Rule
from trimtab.ir.op import Op


def _rules() -> Callable[[Op], Rule | None]:
    from trimtab.backends.tvm.rules import rule_for

    return rule_for


CAPABILITY = Capability("TVM", "docs/tvm-backend.md", _rules)
unsupported_ops = CAPABILITY.unsupported_ops
check_supported = CAPABILITY.check_supported
