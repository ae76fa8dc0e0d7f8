"""Passes that go wrong on purpose, each in one way, for the tests of ``trimtab bisect``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from trimtab.errors import UsageError
from trimtab.ir import Builder, DType, Module, TensorType, Value, ops
from trimtab.ir.rewrite import Constant, Match, Pattern, Rule, Var, op
from trimtab.passes import Changed, Context, Contract, Exact, Pass, RewritePass


@dataclass(frozen=True)
class PeelNorm(Pass):
    """Take the affine part out of layer norms, and scale the ``wrong``-th one by ``factor``."""

    name: ClassVar[str] = "peel-norm"
    contract: ClassVar[Contract] = Exact(rounding=True)
    wrong: int = 3
    factor: float = 1.5
    asks: bool = True

    def run(self, module: Module, ctx: Context) -> Changed:
        peeled = 0
        for norm in list(module.walk()):
            if isinstance(norm, ops.LayerNorm) and norm.weight is not None:
                if self.asks and not ctx.rewrites.permit("peel", norm):
                    break
                peeled += 1
                build = Builder(module, norm.graph, before=norm)
                y = build(ops.Mul(build(ops.LayerNorm(norm.x, axes=norm.axes, eps=norm.eps)), norm.weight))
                if peeled == self.wrong:
                    y = self.spoil(y, build)
                y = build(ops.Add(y, norm.bias)) if norm.bias is not None else y
                norm.result.replace_all_uses_with(y)
                norm.graph.ops.remove(norm)
        return peeled > 0

    def spoil(self, y: Value, build: Builder) -> Value:
        return build(ops.Mul(y, build.scalar(self.factor, y.type.dtype)))


@dataclass(frozen=True)
class PeelNormAndRaise(PeelNorm):
    """Raise an exception of Python at the ``wrong``-th layer norm."""

    name: ClassVar[str] = "peel-norm-and-raise"

    def spoil(self, y: Value, build: Builder) -> Value:
        scales: dict[str, float] = {}
        return build(ops.Mul(y, build.scalar(scales["layer"], y.type.dtype)))


@dataclass(frozen=True)
class PeelNormAndCorrupt(PeelNorm):
    """Leave a result with a wrong type at the ``wrong``-th layer norm."""

    name: ClassVar[str] = "peel-norm-and-corrupt"

    def spoil(self, y: Value, build: Builder) -> Value:
        y = build(ops.Neg(build(ops.Neg(y))))
        assert y.producer is not None
        y.producer.operands[0].type = TensorType(DType.F32, (99,))
        return y


@dataclass(frozen=True)
class PeelNormAndOverflow(PeelNorm):
    """Make the results infinite and NaN at the ``wrong``-th layer norm."""

    name: ClassVar[str] = "peel-norm-and-overflow"

    def spoil(self, y: Value, build: Builder) -> Value:
        return build(ops.Div(y, build.scalar(0.0, y.type.dtype)))


class BiasAgain(Rule):
    """``gelu(linear(x, w, b))``, to which the bias is added again."""

    def pattern(self, x: Var, w: Constant, b: Constant) -> Pattern:
        return op.gelu(op.linear(x, w, b).bind("y"))

    def rewrite(self, m: Match, build: Builder) -> Value:
        y = build(ops.Add(build(ops.Linear(m.x, m.w, m.b)), m.b))
        return build(m.root.producer.rebuilt([y]))


class DropDouble(Rule):
    """``neg(neg(x))``: harmless."""

    def pattern(self, x: Var) -> Pattern:
        return op.neg(op.neg(x))

    def rewrite(self, m: Match, build: Builder) -> Value:
        return m.x


@dataclass(frozen=True)
class BadFusion(RewritePass):
    """A harmless rule and a wrong one."""

    name: ClassVar[str] = "bad-fusion"
    contract: ClassVar[Contract] = Exact(rounding=True)

    def rules(self) -> Sequence[Rule]:
        return (DropDouble(), BiasAgain())


@dataclass(frozen=True)
class Shift(Pass):
    """Add a number to the output."""

    name: ClassVar[str] = "shift"
    contract: ClassVar[Contract] = Exact()
    by: float = 1.0

    def run(self, module: Module, ctx: Context) -> Changed:
        value = module.main.outputs[0]
        if not ctx.rewrites.permit("shift", value.producer):
            return False
        build = Builder(module)
        shifted = build(ops.Add(value, build.scalar(self.by, value.type.dtype)))
        module.main.set_outputs([shifted, *module.main.outputs[1:]], module.main.output_names)
        return True


@dataclass(frozen=True)
class NeedsProperty(Shift):
    """Shift, if something holds that no pass establishes."""

    name: ClassVar[str] = "needs-property"
    requires: ClassVar[frozenset[str]] = frozenset({"folded"})


@dataclass(frozen=True)
class DoubleInput(Pass):
    """Let every reader of the first input read twice its value."""

    name: ClassVar[str] = "double-input"
    contract: ClassVar[Contract] = Exact()

    def run(self, module: Module, ctx: Context) -> Changed:
        (x, *_), changed = module.main.inputs, False
        for reader in x.users:
            if ctx.rewrites.permit("double", reader):
                twice = Builder(module, module.main, before=reader)(ops.Add(x, x))
                reader.set_operand(reader.operands.index(x), twice)
                changed = True
        return changed


@dataclass(frozen=True)
class Refuse(Pass):
    """Refuse every module in words."""

    name: ClassVar[str] = "refuse"
    contract: ClassVar[Contract] = Exact()

    def run(self, module: Module, ctx: Context) -> Changed:
        raise UsageError("this module is not for me", fix="use another one")


@dataclass(frozen=True)
class ShiftAnyway(Shift):
    """Ask for permission, and shift whatever the answer is."""

    name: ClassVar[str] = "shift-anyway"

    def run(self, module: Module, ctx: Context) -> Changed:
        ctx.rewrites.permit("nothing")
        return Shift(self.by).run(module, Context())


_runs = itertools.count()


@dataclass(frozen=True)
class ShiftOnce(Shift):
    """Shift in the first run of the process only: state that a pass must not have."""

    name: ClassVar[str] = "shift-once"

    def run(self, module: Module, ctx: Context) -> Changed:
        return super().run(module, ctx) if not next(_runs) else not ctx.rewrites.permit("nothing")


def never_shifted(module: Module) -> bool:
    """A check that the shifts fail."""
    return not any(isinstance(op, ops.Add) for op in module.walk())


def install(folder: Path) -> None:
    """Make this file a package in ``folder`` that registers its passes; to be found, ``folder`` is on the path."""
    info = folder / "broken_passes-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-passes\nVersion: 1.0\n")
    own = [cls for cls in globals().values() if isinstance(cls, type) and cls.__module__ == __name__]
    own = [cls for cls in own if issubclass(cls, Pass)]
    lines = [f"{cls.name} = broken_passes:{cls.__name__}" for cls in own]
    (info / "entry_points.txt").write_text("\n".join(["[trimtab.passes]", *lines]) + "\n")
    (folder / "broken_passes.py").write_text(Path(__file__).read_text())
