"""Rewriting by rules: patterns written like a model, a condition that can say why not, and what to build instead.

See docs/writing-passes.md for a guide.
"""

from trimtab.ir.rewrite.driver import apply_rules
from trimtab.ir.rewrite.explain import Explanation
from trimtab.ir.rewrite.log import NearMiss, Rewrites, RuleLog
from trimtab.ir.rewrite.match import Match
from trimtab.ir.rewrite.patterns import (
    Attr,
    Constant,
    Pattern,
    Scalar,
    Var,
    maybe,
    one_of,
    op,
    optional,
    product,
    repeated,
    scaled,
    shared,
)
from trimtab.ir.rewrite.rule import Rule

__all__ = [
    "Attr",
    "Constant",
    "Explanation",
    "Match",
    "NearMiss",
    "Pattern",
    "Rewrites",
    "Rule",
    "RuleLog",
    "Scalar",
    "Var",
    "apply_rules",
    "maybe",
    "one_of",
    "op",
    "optional",
    "product",
    "repeated",
    "scaled",
    "shared",
]
