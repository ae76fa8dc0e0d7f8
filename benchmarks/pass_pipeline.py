"""Seconds that a pipeline takes on synthetic transformers of growing depth: its cost must be linear in the ops.

    python benchmarks/pass_pipeline.py [--pipeline cleanup] [--blocks 12 24 48 96] [--json FILE]

The blocks are written as a careless exporter would: every linear is a transposed matrix product, heads are split by
chains of reshapes and permutes, constants are computed, and some work is done twice or for nothing.  About 63 ops a
block, 6,000 ops at 96 blocks.  The time includes verification after every pass and the contract check.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

from trimtab.ir import Builder, DType, Module, TensorType, Value, symbol
from trimtab.ir import ops as o
from trimtab.passes.optimize import optimize

TOKENS, WIDTH, HEADS = 17, 64, 4


def build_transformer(blocks: int) -> Module:
    """A pre-norm encoder ``f32[batch, 17, 64] -> f32[batch, 17, 64]`` with random weights."""
    torch.manual_seed(blocks)
    b = Builder()
    batch = symbol("batch", 1, 64)
    x = b.input("x", TensorType(DType.F32, (batch, TOKENS, WIDTH)))

    def scalar(value: float) -> Value:
        return b.scalar(value, DType.F32)

    def linear(x: Value, name: str, width_in: int, width_out: int) -> Value:
        weight = b.weight(f"{name}.weight", torch.randn(width_out, width_in) / math.sqrt(width_in), trainable=True)
        bias = b.weight(f"{name}.bias", torch.randn(width_out) * 0.1, trainable=True)
        return b(o.Add(b(o.Matmul(x, b(o.Permute(weight, dims=(1, 0))))), bias))

    def norm(x: Value, name: str) -> Value:
        weight = b.weight(f"{name}.weight", torch.ones(WIDTH), trainable=True)
        bias = b.weight(f"{name}.bias", torch.zeros(WIDTH), trainable=True)
        return b(o.LayerNorm(b(o.Cast(x, dtype=DType.F32)), weight, bias))

    def heads(x: Value) -> Value:
        split = b(
            o.Reshape(b(o.Reshape(x, shape=(batch * TOKENS, WIDTH))), shape=(batch, TOKENS, HEADS, -(-WIDTH // HEADS)))
        )
        return b(o.Permute(b(o.Permute(split, dims=(2, 0, 1, 3))), dims=(1, 0, 2, 3)))

    for index in range(blocks):
        block = f"blocks.{index}"
        y = norm(x, f"{block}.norm1")
        q, k, v = (heads(linear(y, f"{block}.{part}", WIDTH, WIDTH)) for part in "qkv")
        scale = b(o.Div(scalar(1.0), b(o.Sqrt(scalar(float(WIDTH // HEADS))))))
        scores = b(o.Mul(b(o.Matmul(q, b(o.Permute(k, dims=(0, 1, 3, 2))))), scale))
        b(o.Neg(scores))  # nobody reads this
        attended = b(o.Matmul(b(o.Softmax(b(o.Sub(scores, scalar(0.0))), dim=3)), v))
        joined = b(o.Reshape(b(o.Permute(attended, dims=(0, 2, 1, 3))), shape=(batch, TOKENS, WIDTH)))
        x = b(o.Add(x, linear(joined, f"{block}.proj", WIDTH, WIDTH)))
        y = linear(norm(x, f"{block}.norm2"), f"{block}.fc1", WIDTH, 2 * WIDTH)
        root = b(o.Sqrt(scalar(2.0)))
        gate = b(o.Add(b(o.Erf(b(o.Div(y, root)))), scalar(1.0)))
        y = b(o.Mul(b(o.Mul(y, gate)), scalar(0.5)))
        x = b(o.Add(x, linear(b(o.Mul(y, scalar(1.0))), f"{block}.fc2", 2 * WIDTH, WIDTH)))
    b.output(x)
    return b.module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", default="cleanup")
    parser.add_argument("--blocks", type=int, nargs="+", default=[12, 24, 48, 96])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    optimize(build_transformer(1), arguments.pipeline)  # imports and caches
    print(f"{'blocks':>6} {'ops':>6} {'after':>6} {'seconds':>8} {'passes':>7} {'checks':>7} {'ms/block':>9}")
    for blocks in arguments.blocks:
        module = build_transformer(blocks)
        started = time.perf_counter()
        result = optimize(module, arguments.pipeline)
        seconds = time.perf_counter() - started
        report = result.report
        row = {
            "blocks": blocks,
            "ops": report.rows[0].ops_before,
            "ops_after": report.rows[-1].ops_after,
            "seconds": seconds,
            "pass_seconds": sum(r.seconds for r in report.rows),
            "check_seconds": report.check_seconds,
        }
        rows.append(row)
        print(
            f"{blocks:6} {row['ops']:6} {row['ops_after']:6} {seconds:8.2f} {row['pass_seconds']:7.2f} "
            f"{row['check_seconds']:7.2f} {1000 * seconds / blocks:9.1f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
