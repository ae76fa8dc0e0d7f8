"""The pass pipeline against equality saturation (egglog) on algebraic rewrites: cost reached and time taken.

    pip install egglog==13.2.0
    python benchmarks/equality_saturation.py [--json FILE]

Both sides get the same expressions: matrix products with associativity, distribution, scales and transposes, around
nonlinear functions that neither looks through.  Both results are priced by the same function: multiply-accumulates of
products, plus ``ELEMENT`` for every element that another op moves; what depends on constants alone is free.  The
e-graph applies its rules in all orders up to a limit and extracts the cheapest tree; the pipeline applies its passes
once, in order.  See docs/design/equality-saturation.md for what came of it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from trimtab.ir import Builder, DType, Module, TensorType, Value, ops
from trimtab.passes.manager import PassManager

PIPELINE = "cleanup,fuse,fold-constants{limit=1000000000},dce"
ELEMENT = 64
"""Multiply-accumulates that take as long as moving one float32 element through memory: 180 G/s to 12 GB/s at 4 bytes
read or written."""

Kind = Literal["leaf", "matmul", "add", "scale", "transpose", "tanh"]


@dataclass(frozen=True, eq=False)
class Term:
    """A matrix expression, made by :func:`term`: equal terms are one object, and computed once."""

    kind: Kind
    rows: int
    columns: int
    operands: tuple[Term, ...]
    name: str
    factor: float
    constant: bool

    def __matmul__(self, other: Term) -> Term:
        assert self.columns == other.rows
        return term("matmul", self.rows, other.columns, (self, other), constant=self.constant and other.constant)

    def __add__(self, other: Term) -> Term:
        return term("add", self.rows, self.columns, (self, other), constant=self.constant and other.constant)

    def __rmul__(self, factor: float) -> Term:
        return term("scale", self.rows, self.columns, (self,), factor=factor, constant=self.constant)

    @property
    def T(self) -> Term:
        return term("transpose", self.columns, self.rows, (self,), constant=self.constant)

    def tanh(self) -> Term:
        return term("tanh", self.rows, self.columns, (self,))


@cache
def term(
    kind: Kind,
    rows: int,
    columns: int,
    operands: tuple[Term, ...] = (),
    *,
    name: str = "",
    factor: float = 1.0,
    constant: bool = False,
) -> Term:
    """The term with these parts."""
    return Term(kind, rows, columns, operands, name, factor, constant)


def walk(root: Term, seen: set[Term] | None = None) -> Iterator[Term]:
    """Each distinct subterm once, operands first."""
    seen = set() if seen is None else seen
    if root not in seen:
        seen.add(root)
        for operand in root.operands:
            yield from walk(operand, seen)
        yield root


def cost(root: Term) -> int:
    """The price of computing ``root``, common subterms once."""
    return sum(_own_cost(part) for part in walk(root))


def _own_cost(part: Term) -> int:
    if part.constant or part.kind == "leaf":
        return 0
    if part.kind == "matmul":
        return part.rows * part.columns * part.operands[0].columns
    return ELEMENT * part.rows * part.columns


# -- the pipeline --------------------------------------------------------------------------------------------------


def to_module(root: Term) -> Module:
    """``root`` as a module: leaves are inputs, or weights where they are constant."""
    b = Builder()
    generator = torch.Generator().manual_seed(0)
    values: dict[Term, Value] = {}

    def leaf(part: Term) -> Value:
        if part.constant:
            return b.weight(part.name, torch.randn(part.rows, part.columns, generator=generator) / part.rows**0.5)
        return b.input(part.name, TensorType(DType.F32, (part.rows, part.columns)))

    makers: dict[str, Callable[..., Value]] = {
        "matmul": lambda part, x, y: b(ops.Matmul(x, y)),
        "add": lambda part, x, y: b(ops.Add(x, y)),
        "scale": lambda part, x: b(ops.Mul(x, b.scalar(part.factor, DType.F32))),
        "transpose": lambda part, x: b(ops.Permute(x, dims=(1, 0))),
        "tanh": lambda part, x: b(ops.Tanh(x)),
    }
    for part in walk(root):
        values[part] = leaf(part) if part.kind == "leaf" else makers[part.kind](part, *map(values.get, part.operands))
    b.output(values[root])
    return b.module


def module_cost(module: Module) -> int:
    """The price of a module by the rules of :func:`cost`."""
    free = (ops.Full, ops.Reshape, ops.Slice, ops.Split)  # no element is moved: a slice is a view
    constant = {value for graph in module.all_graphs() for value in graph.weights}
    total = 0
    for op in module.walk():
        if isinstance(op, free) or all(value in constant for value in op.operands):
            constant.update(op.results if not isinstance(op, ops.Reshape | ops.Slice | ops.Split) else ())
        else:
            macs = int(op.macs())  # type: ignore[call-overload]
            total += macs or ELEMENT * sum(int(value.type.elements) for value in op.results)  # type: ignore[arg-type]
    return total


def by_pipeline(root: Term) -> tuple[int, float]:
    module = to_module(root)
    start = time.perf_counter()
    result, _ = PassManager(PIPELINE, check="never").run(module)
    return module_cost(result), time.perf_counter() - start


# -- the e-graph ---------------------------------------------------------------------------------------------------


def by_saturation(root: Term, rounds: int) -> tuple[int, float]:
    """The cost of the cheapest tree in the e-graph after at most ``rounds`` rounds, and the seconds for all of it."""
    import egglog

    start = time.perf_counter()
    schedule = (
        f"(run-schedule (repeat {rounds} (saturate (run shapes)) (run algebra)) (saturate (run shapes)) (run prices))"
    )
    program = "\n".join([_RULES, *_facts(root), schedule])
    graph = egglog.bindings.EGraph()
    graph.run_program(*graph.parse_program(program))
    (found,) = graph.run_program(*graph.parse_program("(extract $root)"))
    best = _read(found.termdag, found.term, {leaf.name: leaf for leaf in walk(root) if leaf.kind == "leaf"}, {})
    return cost(best), time.perf_counter() - start


def _facts(root: Term) -> Iterator[str]:
    names: dict[Term, str] = {}
    for index, part in enumerate(walk(root)):
        names[part] = f"$t{index}"
        held = " ".join(names[operand] for operand in part.operands)
        if part.kind == "leaf":
            text = f'(Leaf "{part.name}" {part.rows} {part.columns} {int(part.constant)})'
        elif part.kind == "scale":
            text = f"(Scale {part.factor!r} {held})"
        else:
            text = f"({part.kind.capitalize()} {held})"
        yield f"(let {names[part]} {text})"
    yield f"(let $root {names[root]})"


_RULES = """
(with-dynamic-cost (datatype M
  (Leaf String i64 i64 i64) (Matmul M M) (Add M M) (Scale f64 M) (Transpose M) (Tanh M)))
(ruleset shapes)
(ruleset algebra)
(ruleset prices)
(function rows (M) i64 :merge (min old new))
(function columns (M) i64 :merge (min old new))
(function constant (M) i64 :merge (max old new))
(rule ((= e (Leaf n r c k))) ((set (rows e) r) (set (columns e) c) (set (constant e) k)) :ruleset shapes)
(rule ((= e (Matmul a b)) (= r (rows a)) (= c (columns b)) (= p (constant a)) (= q (constant b)))
  ((set (rows e) r) (set (columns e) c) (set (constant e) (* p q))) :ruleset shapes)
(rule ((= e (Add a b)) (= r (rows a)) (= c (columns a)) (= p (constant a)) (= q (constant b)))
  ((set (rows e) r) (set (columns e) c) (set (constant e) (* p q))) :ruleset shapes)
(rule ((= e (Scale s a)) (= r (rows a)) (= c (columns a)) (= p (constant a)))
  ((set (rows e) r) (set (columns e) c) (set (constant e) p)) :ruleset shapes)
(rule ((= e (Transpose a)) (= r (rows a)) (= c (columns a)) (= p (constant a)))
  ((set (rows e) c) (set (columns e) r) (set (constant e) p)) :ruleset shapes)
(rule ((= e (Tanh a)) (= r (rows a)) (= c (columns a)))
  ((set (rows e) r) (set (columns e) c) (set (constant e) 0)) :ruleset shapes)

(birewrite (Matmul (Matmul a b) c) (Matmul a (Matmul b c)) :ruleset algebra)
(birewrite (Add (Matmul a c) (Matmul b c)) (Matmul (Add a b) c) :ruleset algebra)
(birewrite (Add (Matmul a b) (Matmul a c)) (Matmul a (Add b c)) :ruleset algebra)
(birewrite (Matmul (Scale s a) b) (Scale s (Matmul a b)) :ruleset algebra)
(birewrite (Matmul a (Scale s b)) (Scale s (Matmul a b)) :ruleset algebra)
(birewrite (Add (Scale s a) (Scale s b)) (Scale s (Add a b)) :ruleset algebra)
(rewrite (Scale s (Scale t a)) (Scale (* s t) a) :ruleset algebra)
(rewrite (Add a b) (Add b a) :ruleset algebra)
(birewrite (Transpose (Matmul a b)) (Matmul (Transpose b) (Transpose a)) :ruleset algebra)
(rewrite (Transpose (Transpose a)) a :ruleset algebra)

(rule ((= e (Leaf n r c k))) ((set-cost (Leaf n r c k) 0)) :ruleset prices)
(rule ((= e (Matmul a b)) (= z (constant e)) (= r (rows a)) (= k (columns a)) (= c (columns b)))
  ((set-cost (Matmul a b) (* (- 1 z) (* r (* k c))))) :ruleset prices)
(rule ((= e (Add a b)) (= z (constant e)) (= r (rows a)) (= c (columns a)))
  ((set-cost (Add a b) (* (- 1 z) (* ELEMENT (* r c))))) :ruleset prices)
(rule ((= e (Scale s a)) (= z (constant e)) (= r (rows a)) (= c (columns a)))
  ((set-cost (Scale s a) (* (- 1 z) (* ELEMENT (* r c))))) :ruleset prices)
(rule ((= e (Transpose a)) (= z (constant e)) (= r (rows a)) (= c (columns a)))
  ((set-cost (Transpose a) (* (- 1 z) (* ELEMENT (* r c))))) :ruleset prices)
(rule ((= e (Tanh a)) (= r (rows a)) (= c (columns a)))
  ((set-cost (Tanh a) (* ELEMENT (* r c)))) :ruleset prices)
""".replace("ELEMENT", str(ELEMENT))
"""The same algebra as the passes know, as rewrites in both directions; shapes and prices are learned by rules."""


def _read(dag: Any, index: int, leaves: dict[str, Term], known: dict[int, Term]) -> Term:
    """The term with this number in an extraction."""
    if index not in known:
        node = dag.get(index)
        if node.name == "Leaf":
            known[index] = leaves[dag.get(node.args[0]).value.value]
        elif node.name == "Scale":
            known[index] = float(dag.get(node.args[0]).value.value) * _read(dag, node.args[1], leaves, known)
        else:
            parts = [_read(dag, part, leaves, known) for part in node.args]
            known[index] = {
                "Matmul": lambda x, y: x @ y,
                "Add": lambda x, y: x + y,
                "Transpose": lambda x: x.T,
                "Tanh": lambda x: x.tanh(),
            }[node.name](*parts)
    return known[index]


# -- the comparison ------------------------------------------------------------------------------------------------


def leaf(name: str, rows: int, columns: int, constant: bool = False) -> Term:
    return term("leaf", rows, columns, name=name, constant=constant)


def chain(length: int, seed: int) -> Term:
    """A product of matrices of random sizes."""
    draw = random.Random(seed)
    sizes = [draw.choice((4, 16, 64, 256)) for _ in range(length + 1)]
    found = leaf("m0", sizes[0], sizes[1])
    for index in range(1, length):
        found = found @ leaf(f"m{index}", sizes[index], sizes[index + 1])
    return found


def adapter(x: Term, prefix: str, width: int, rank: int, merged: bool) -> Term:
    """A linear layer with a low-rank adapter, added to the result or to the weight."""
    w = leaf(f"{prefix}w", width, width, True)
    a, b = leaf(f"{prefix}a", width, rank, True), leaf(f"{prefix}b", rank, width, True)
    return x @ (w + 0.5 * (a @ b)) if merged else x @ w + 0.5 * (x @ a @ b)


def linear_attention(x: Term, prefix: str, width: int) -> Term:
    """Attention without softmax, in the order that takes quadratic work in the tokens."""
    q, k, v = (x @ leaf(f"{prefix}{part}", width, width, True) for part in "qkv")
    return (q.tanh() @ k.tanh().T) @ (0.125 * v)


def blocks(count: int, tokens: int, width: int) -> Term:
    x = leaf("x", tokens, width)
    for index in range(count):
        x = x + linear_attention(x, f"b{index}", width)
        x = x + adapter(x, f"c{index}", width, 8, merged=False).tanh()
    return x


CASES: dict[str, Callable[[], Term]] = {
    "chain of 4": lambda: chain(4, 1),
    "chain of 6": lambda: chain(6, 2),
    "chain of 8": lambda: chain(8, 3),
    "adapter, in the result": lambda: adapter(leaf("x", 128, 64), "", 64, 8, merged=False),
    "adapter, in the weight": lambda: adapter(leaf("x", 128, 64), "", 64, 8, merged=True),
    "linear attention": lambda: linear_attention(leaf("x", 256, 32), "", 32),
    "scaled and turned": lambda: (2.0 * (0.5 * leaf("x", 64, 64)).T @ leaf("w", 64, 64, True).T).T,
    "1 block": lambda: blocks(1, 256, 32),
    "2 blocks": lambda: blocks(2, 256, 32),
    "4 blocks": lambda: blocks(4, 256, 32),
    "12 blocks": lambda: blocks(12, 256, 32),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    by_pipeline(chain(3, 0))  # imports
    rows = []
    print(
        f"{'case':24s} {'given':>9s} {'pipeline':>9s} {'ms':>7s}  "
        + "  ".join(f"{n} rounds: cost, ms" for n in args.rounds)
    )
    for name, make in CASES.items():
        given = make()
        reached, seconds = by_pipeline(given)
        row: dict[str, Any] = {"case": name, "given": cost(given), "pipeline": reached, "pipeline_ms": 1e3 * seconds}
        texts = []
        for rounds in args.rounds:
            found, taken = by_saturation(given, rounds)
            row[f"egglog_{rounds}"], row[f"egglog_{rounds}_ms"] = found, 1e3 * taken
            texts.append(f"{found / 1e6:9.3f} {1e3 * taken:8.1f}")
        rows.append(row)
        print(
            f"{name:24s} {row['given'] / 1e6:9.3f} {reached / 1e6:9.3f} {1e3 * seconds:7.1f}  " + "  ".join(texts),
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
