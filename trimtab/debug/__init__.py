"""When a pass goes wrong: find the pass and the rewrite at fault, and shrink the module that shows it."""

from trimtab.debug.bisect import bisect
from trimtab.debug.checks import Check, Data, Verdict
from trimtab.debug.findings import Bisection
from trimtab.debug.reduce import reduce_module

__all__ = ["Bisection", "Check", "Data", "Verdict", "bisect", "reduce_module"]
