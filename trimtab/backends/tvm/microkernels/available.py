"""Which instruction sets a target has."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from trimtab.backends.tvm.microkernels import isa

FASTEST_FIRST = (isa.AMX, isa.AVX512_BF16, isa.AVX512_VNNI, isa.AVX512, isa.AVX_VNNI, isa.AVX2,
                 isa.NEON_I8MM, isa.NEON_DOTPROD, isa.NEON, isa.PORTABLE)  # fmt: skip


def available_sets(triple: str, features: Collection[str]) -> tuple[isa.InstructionSet, ...]:
    """The instruction sets of a target, the fastest first, each with the products that the target's features allow.

    Args:
        triple: LLVM triple.
        features: the target's CPU features, in LLVM's names.
    """
    architecture, have = triple.split("-", 1)[0], set(features)
    found = []
    for candidate in FASTEST_FIRST:
        if candidate.architecture in ("", architecture) and have.issuperset(candidate.features):
            products = {kind: p for kind, p in candidate.products.items() if have.issuperset(p.features)}
            found.append(replace(candidate, products=products))
    return tuple(found)


def all_features() -> set[str]:
    """Every CPU feature, in LLVM's names, that some micro-kernel uses."""
    needed = {feature for candidate in FASTEST_FIRST for feature in candidate.features}
    return needed | {f for candidate in FASTEST_FIRST for p in candidate.products.values() for f in p.features}
