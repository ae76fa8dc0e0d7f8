"""When a pass goes wrong: find the pass and the rewrite at fault, and shrink the module that shows it."""

from trimtab.debug.bisect import bisect
from trimtab.debug.checks import Check, Data, Verdict
from trimtab.debug.findings import Bisection, Culprit, RewriteAt
from trimtab.debug.reduce import reduce_module
from trimtab.debug.reproducer import Reproducer, make_reproducer
from trimtab.debug.reproducer_files import write_reproducer

__all__ = [
    "Bisection", "Check", "Culprit", "Data", "Reproducer", "RewriteAt", "Verdict", "bisect", "make_reproducer",
    "reduce_module", "write_reproducer",
]  # fmt: skip
