"""QwT: a linear repair of each block of a lossy module, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from trimtab.errors import PassError, UsageError
from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.dead_code import remove_dead_ops
from trimtab.ir.dtypes import DType
from trimtab.ir.interpreter import interpret
from trimtab.ir.op import Op
from trimtab.ir.printer import print_op
from trimtab.ir.rewrite.log import NearMiss
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Lossy
from trimtab.passes.normal_equations import NormalEquations
from trimtab.passes.residual_blocks import Block, find_blocks

_HELD_OUT = 4
"""Every fourth batch is held out."""


@dataclass(frozen=True)
class Compensate(Pass):
    """Add to the output of each block a linear function of its input that repairs what lossy passes did to it.

    Quantization without Tears (Fu et al., arXiv 2411.13918): a block with the input x and the output y gives
    ``y + x W + b``, where W and b fit, by ridge regression on the calibration data, the difference to the output of the
    same block of the module before the first lossy pass. Blocks are repaired one after the other: x and y are those
    behind the repairs so far. Every fourth batch is held out, and a repair is kept only if it explains some of the
    difference there. It costs a product with a matrix ``[C, C]`` for each block, about an eighth of the block.

    - ``damping``: of the regression, in units of the mean variance of the inputs.
    - ``weights``: the type that W is stored in; it is widened to compute.
    """

    name: ClassVar[str] = "compensate"
    contract: ClassVar[Contract] = Lossy()
    grows_weights: ClassVar[bool] = True

    damping: float = 1e-3
    weights: Literal["f32", "bf16"] = "f32"

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise UsageError(
                "compensate got a wrong damping", values={"damping": self.damping}, rule="damping is above 0"
            )

    def run(self, module: Module, ctx: Context) -> Changed:
        reference = _reference(module, ctx)
        blocks, originals = find_blocks(module), find_blocks(reference)
        _check_alike(blocks, originals)
        log = ctx.rewrites.of(self.name)
        repaired: list[float] = []
        for number in range(len(blocks)):
            # A repair is part of the next block's start, so the places are looked up again.
            block = blocks[number]
            log.tried += 1
            weight, bias, explained = self._fit(module, block, reference, originals[number], ctx)
            if not explained > 0:
                reason = f"a linear repair explains nothing of the difference on held-out batches (R^2 {explained:.2g})"
                at = block.end.producer
                assert at is not None
                log.reject(NearMiss(1, 1, print_op(at), str(at.location or ""), reason))
                continue
            log.matched += 1
            if not ctx.rewrites.permit(self.name, block.end.producer):
                break
            blocks = _moved(blocks, block.end, self._insert(module, block, weight, bias, number))
            repaired.append(explained)
        if repaired:
            share = sum(repaired) / len(repaired)
            ctx.note(
                f"repaired {len(repaired)} of {len(blocks)} blocks, R^2 {share:.2f} on average on held-out batches"
            )
        return bool(repaired)

    def _fit(
        self, module: Module, block: Block, reference: Module, original: Block, ctx: Context
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """W ``[C, C]`` and b ``[C]`` as they are stored, and the share of the difference that they explain on held-out
        batches, 1 - |rest|^2 / |difference|^2: at most 1, and 0 where they do as well as no repair."""
        lossy, exact = _prefix(module, block.start, block.end), _prefix(reference, original.end)
        width = block.start.type.shape[-1]
        assert isinstance(width, int)  # what find_blocks asks for
        fitted, held_out = NormalEquations(width, width), NormalEquations(width, width)
        for number, batch in enumerate(ctx.calibration):
            x, y = interpret(lossy, batch)
            (wanted,) = interpret(exact, batch)
            sums = held_out if number % _HELD_OUT == min(_HELD_OUT, len(ctx.calibration)) - 1 else fitted
            sums.add(x.reshape(-1, width), (wanted.double() - y.double()).reshape(-1, width))
        weight, bias = fitted.solve(self.damping)
        stored = weight.to(torch.bfloat16 if self.weights == "bf16" else torch.float32)
        bias = bias.float()
        return stored, bias, 1 - held_out.left_over(stored.double(), bias.double())

    def _insert(self, module: Module, block: Block, weight: torch.Tensor, bias: torch.Tensor, number: int) -> Value:
        """Put the repair behind the block. Returns the block's new end."""
        end, last = block.end, block.end.producer
        assert last is not None
        assert last.graph is not None
        graph, location = last.graph, last.location
        build = Builder(module, graph)

        def behind(op: Op) -> Value:
            nonlocal last
            assert last is not None
            op.location, op.made_by = location, self.name
            last = graph.ops.insert_after(last, op)
            return op.result

        matrix = build.weight(f"compensate.{number}.weight", weight.T.contiguous())
        if matrix.type.dtype is not end.type.dtype:
            matrix = behind(ops.Cast(matrix, dtype=end.type.dtype))
        repair = behind(ops.Linear(block.start, matrix, build.weight(f"compensate.{number}.bias", bias)))
        total = behind(ops.Add(end, repair))
        end.replace_all_uses_with(total)
        last.set_operand(0, end)
        return total


def _reference(module: Module, ctx: Context) -> Module:
    """The module to repair towards.

    Raises:
        UsageError: there are less than two calibration batches.
        PassError: nothing lossy ran before, or what ran changed the inputs.
    """
    if len(ctx.calibration) < 2:
        raise UsageError(
            "compensate needs calibration data",
            values={"calibration batches": len(ctx.calibration)},
            rule="repairs are fitted on some batches and judged on others",
            fix="give optimize() two calibration batches or more",
        )
    if ctx.reference is None:
        raise PassError(
            "there is nothing to compensate",
            values={"lossy passes before": 0},
            rule="a repair is fitted to the module before the first lossy pass of the pipeline",
            fix="put compensate behind a lossy pass, such as quantize",
        )
    before, after = ([value.type for value in m.main.inputs] for m in (ctx.reference, module))
    if before != after:
        raise PassError(
            "the original cannot be evaluated on the inputs of the lossy module",
            values={"inputs before": len(before), "inputs now": len(after)},
            rule="a repair is fitted to the outputs of both on the same inputs",
            fix="leave out the pass that changes the inputs, or run it after compensate",
        )
    return ctx.reference


def _check_alike(blocks: Sequence[Block], originals: Sequence[Block]) -> None:
    if len(blocks) != len(originals):
        raise PassError(
            "the lossy module has not the blocks of the original",
            values={"blocks": len(blocks), "original": len(originals)},
            rule="a block is repaired towards the one at its place in the module before the first lossy pass",
            fix="leave compensate out behind passes that remove or share blocks",
        )
    for number, (block, original) in enumerate(zip(blocks, originals, strict=True)):
        if block.end.type.shape != original.end.type.shape or block.start.type.shape != block.end.type.shape:
            raise PassError(
                "a block of the lossy module has another shape than the original",
                values={
                    "block": number,
                    "start": block.start.type,
                    "end": block.end.type,
                    "original": original.end.type,
                },
                rule="a repair maps the channels of a block's input to those of its output, token by token",
                fix="leave compensate out behind passes that remove tokens or channels",
            )
        if block.end.type.dtype is not DType.F32:
            raise PassError(
                "a block is not computed in f32", values={"block": number, "end": block.end.type},
                fix="put compensate before passes that store values in 16 bits",
            )  # fmt: skip


def _moved(blocks: Sequence[Block], old: Value, new: Value) -> list[Block]:
    """``blocks`` with ``new`` in the place of ``old``."""
    return [
        Block(new if block.start is old else block.start, new if block.end is old else block.end) for block in blocks
    ]


def _prefix(module: Module, *values: Value) -> Module:
    """A copy of ``module`` that computes ``values`` and nothing else. Weights are shared."""
    copy = module.copy()
    twins = dict(zip(module.main.inputs, copy.main.inputs, strict=True))
    for op, twin in zip(module.main.ops, copy.main.ops, strict=True):
        twins.update(zip(op.results, twin.results, strict=True))
    copy.main.set_outputs([twins[value] for value in values])
    remove_dead_ops(copy)
    return copy
