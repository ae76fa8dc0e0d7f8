"""Puts whole ops together again from the pieces that exporters leave.

A rewrite looks at one op, the root, and what produces its operands, and returns the value that takes the root's place,
or None.  It goes by structure alone, never by names, and applies only where the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.frontend.onnx.raising.activations import raise_gelu, raise_silu
from trimtab.frontend.onnx.raising.attention import raise_attention
from trimtab.frontend.onnx.raising.linear import raise_bias, raise_matmul
from trimtab.frontend.onnx.raising.matching import Site
from trimtab.frontend.onnx.raising.normalizations import raise_norm, raise_scale, raise_shift
from trimtab.ir.core import Module, Value
from trimtab.ir.op import Op
from trimtab.ir.ops import Add, Div, Matmul, Mul

Rewrite = Callable[[Any, Site], Value | None]

STAGES: tuple[tuple[tuple[tuple[type[Op], ...], Rewrite], ...], ...] = (
    (((Mul,), raise_silu), ((Mul, Div), raise_gelu), ((Mul, Div), raise_norm), ((Matmul,), raise_attention)),
    (((Mul,), raise_scale), ((Matmul,), raise_matmul)),
    (((Add,), raise_shift), ((Add,), raise_bias)),
)
"""Rewrites by the class of their root. A stage builds on what the one before it made."""


def raise_module(module: Module) -> dict[str, int]:
    """Apply every rewrite to ``module`` in place. Returns how often each one applied, by name."""
    counts: dict[str, int] = {}
    for stage in STAGES:
        for graph in module.all_graphs():
            for op in graph.ops:
                for roots, rewrite in stage:
                    found = rewrite(op, Site(module, op)) if isinstance(op, roots) else None
                    if found is not None:
                        found.name = found.name or op.result.name
                        op.result.replace_all_uses_with(found)
                        counts[rewrite.__name__] = counts.get(rewrite.__name__, 0) + 1
                        break
        remove_dead_ops(module)
    return counts


def remove_dead_ops(module: Module) -> None:
    """Take out ops whose results nothing reads."""
    for graph in module.all_graphs():
        for op in reversed(graph.ops):
            if not any(value.uses for value in op.results):
                graph.ops.remove(op)
