"""Where the ops of a rewrite go."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from trimtab.ir.core import Value
from trimtab.ir.op import Op


def insertion_point(outputs: Sequence[Value], ops: Collection[Op], leaves: Sequence[Value]) -> Op | None:
    """The op before which a match is rewritten: every leaf is computed before it, every reader comes after it.

    Args:
        outputs: the values that are replaced.
        ops: the ops of the match; where they read an output does not count, because the rewrite replaces them.
        leaves: the values that the rewrite may read.

    Returns:
        None when there is no such place.
    """
    first, *others = [value.producer for value in outputs if value.producer is not None]
    for op in others:
        first = op if op.is_before(first) else first
    last = first
    for leaf in leaves:
        if leaf.producer is not None and last.is_before(leaf.producer):
            last = leaf.producer
    if last is first:
        return first
    if any(not last.is_before(reader) for value in outputs for reader in value.users if reader not in ops):
        return None
    return last._next
