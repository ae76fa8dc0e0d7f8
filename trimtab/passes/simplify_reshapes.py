"""Clean-up of reshapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.op import Op
from trimtab.ir.ops import Reshape
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Exact
from trimtab.passes.local_rewrite import rewrite_each


@dataclass(frozen=True)
class SimplifyReshapes(Pass):
    """Make reshape(reshape(x)) one reshape, and remove reshapes to the shape a value already has.

    A round trip ``[2, 6] -> [2, 2, 3] -> [2, 6]`` disappears. Shapes with symbols compare by their normal form.
    """

    name: ClassVar[str] = "simplify-reshapes"
    contract: ClassVar[Contract] = Exact()

    def run(self, module: Module, ctx: Context) -> Changed:
        return rewrite_each(module, _simplify, self.name, ctx.rewrites)


def _simplify(op: Op, build: Builder) -> Value | None:
    if not isinstance(op, Reshape):
        return None
    source = op.x
    while isinstance(source.producer, Reshape):
        source = source.producer.x
    if source.type == op.result.type:
        return source
    return build(Reshape(source, shape=op.shape)) if source is not op.x else None
