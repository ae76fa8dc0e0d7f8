"""Layer norms, GELU, softmax and what else lies between products of integers, in integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from trimtab.errors import UsageError
from trimtab.ir import ops
from trimtab.ir.core import Module, Value
from trimtab.ir.dead_code import remove_dead_ops
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.printer import print_op
from trimtab.ir.rewrite import NearMiss
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Lossy
from trimtab.passes.integer_math.conversion import MOVES, Conversion, is_integer_norm
from trimtab.passes.integer_math.fixed_point import power_of_two_above
from trimtab.passes.integer_math.power_factors import power_factors
from trimtab.passes.quantization.observers import make_observer
from trimtab.passes.quantization.scales import LEAST_SCALE
from trimtab.passes.quantization.statistics import observe

_STREAM_BITS = 22
"""Of a residual stream in i32 within its range on calibration data; eight more are left for other data."""
_FREE = (*MOVES, ops.Quantize, ops.Dequantize, ops.Full, ops.Split, ops.Cast)
"""Ops of floats that do not compute."""


@dataclass(frozen=True)
class IntegerOnly(Pass):
    """Compute what lies between integers in integers: for targets without floating numbers.

    Comes after ``quantize`` and ``quantize-attention``. Where a value is made real and rounded again, one Requantize by
    ``M 2^-N`` takes the place of both. Between them, layer norms have integer means and variances, after inputs whose
    channels have scales a power of two apart (Lin et al., "FQ-ViT", 2022); GELU and softmax are polynomials of integers
    (Kim et al., "I-BERT", 2021); ReLU, sums, means over a known number and moves of elements are what they are.

    The residual stream is kept as i32 with one unit for each sum, 22 bits within its range on calibration data, so that
    it loses next to nothing. ``residual=float`` keeps it in float and makes only integers of what lies between it.
    What is left in floating point is noted in the report with the reason.
    """

    name: ClassVar[str] = "integer-only"
    contract: ClassVar[Contract] = Lossy()
    grows_weights: ClassVar[bool] = True  # by multipliers and shifts
    residual: Literal["integer", "float"] = "integer"

    def run(self, module: Module, ctx: Context) -> Changed:
        log = ctx.rewrites.of(self.name)
        found = [op for op in module.main.ops if isinstance(op, ops.Quantize)]
        log.tried += len(found)
        allowed = [op for op in found if ctx.rewrites.permit(self.name, op)]
        if not allowed:
            return False
        if not ctx.calibration:
            raise UsageError(
                "integer-only has no data to find the ranges of layer norms' inputs from",
                values={"calibration batches": 0},
                rule="integers have scales that are chosen beforehand, from real inputs",
                fix="give calibration data (`--calibration data.npz`)",
            )
        ends = _ends(module) if self.residual == "integer" else []
        conversion = self._conversion(module, ends, ctx)
        computed = 0
        for op in allowed:
            made = conversion.of_quantize(op)
            if made is None:
                reason = conversion.rounded_floats[op.x]
                log.reject(NearMiss(1, 1, print_op(op), str(op.location or ""), reason))
                continue
            computed += 1
            op.result.replace_all_uses_with(made)
        if not computed:
            return False
        log.matched += computed
        for value in ends:
            conversion.make_shared(value)
        conversion.replace_floats()
        remove_dead_ops(module)
        module.drop_unused_weights()
        ctx.note(f"{computed} of {len(found)} roundings are of integers")
        for text in _left(module, conversion):
            ctx.note(text)
        return True

    def _conversion(self, module: Module, ends: Sequence[Value], ctx: Context) -> Conversion:
        main = module.main
        norms = [op for op in main.ops if isinstance(op, ops.LayerNorm) and is_integer_norm(module, op)]
        inputs = list(dict.fromkeys(op.x for op in norms))
        shared = [op.result for op in main.ops if isinstance(op, ops.Add) and _is_stream(op.result)]
        factors = power_factors(module, [x for x in inputs if not x.is_weight], ctx.calibration, self.name)
        if self.residual == "float":
            return Conversion(module, self.name, factors, {}, frozenset([*factors, *_stream(module)]))
        shared += [op.result for op in norms if _is_summed(op.result)]
        ranges = {value: make_observer("minmax", symmetric=True) for value in (*shared, *ends)}
        if ranges:
            observe(module, ranges, ctx.calibration, what=self.name)
        units = {
            value: power_of_two_above(max(float(seen.range()[1]), LEAST_SCALE)) * 2.0**-_STREAM_BITS
            for value, seen in ranges.items()
        }
        return Conversion(module, self.name, factors, units, frozenset())


def _is_stream(value: Value) -> bool:
    """Whether a sum has several readers, and a norm or the rounding for a product is one, perhaps behind moves."""
    return value.type.dtype is DType.F32 and len(value.users) > 1 and any(map(_is_end, value.users))


def _stream(module: Module) -> set[Value]:
    """The sums with several readers, and those that they go into, to the end of the stream."""
    found: set[Value] = set()
    for op in module.main.ops:
        is_moved = isinstance(op, MOVES)
        if (is_moved or isinstance(op, ops.Add)) and any(value in found for value in op.operands):
            found.add(op.results[0])
        elif isinstance(op, ops.Add) and _is_stream(op.result):
            found.add(op.result)
    return found


def _is_end(op: Op) -> bool:
    if isinstance(op, MOVES):
        return any(map(_is_end, op.results[0].users))
    return isinstance(op, ops.LayerNorm | ops.RmsNorm | ops.Quantize)


def _is_summed(value: Value) -> bool:
    """Whether a norm's result has several readers, and a sum is one, perhaps behind moves: norms behind sums."""
    return len(value.users) > 1 and any(map(_is_sum, value.users))


def _is_sum(op: Op) -> bool:
    return isinstance(op, ops.Add) or (isinstance(op, MOVES) and any(map(_is_sum, op.results[0].users)))


def _ends(module: Module) -> list[Value]:
    """Sums and norms that the module's outputs are, perhaps behind moves."""
    found, left = [], [value for value in module.main.outputs if value.type.dtype is DType.F32]
    while left:
        value = left.pop()
        maker = value.producer
        if isinstance(maker, MOVES):
            left += maker.operands
        elif isinstance(maker, ops.Add) or (isinstance(maker, ops.LayerNorm) and is_integer_norm(module, maker)):
            found.append(value)
    return list(dict.fromkeys(found))


def _left(module: Module, conversion: Conversion) -> Iterator[str]:
    """What is still in float: ops that compute, and values that are rounded from it."""
    computing = Counter(
        op.name
        for graph in module.all_graphs()
        for op in graph.ops
        if not isinstance(op, _FREE) and any(value.type.dtype.is_floating for value in (*op.operands, *op.results))
    )
    if computing:
        names = ", ".join(f"{count} {name}" for name, count in sorted(computing.items()))
        yield f"in floating point: {names}; these have no integer form here, or ops or a stream in float read them"
    reasons = Counter(
        reason
        for value, reason in conversion.rounded_floats.items()
        if value.is_weight or any(isinstance(op, ops.Quantize) for op in value.users)
    )
    for reason, count in sorted(reasons.items()):
        yield f"{count} rounded from float: {reason}"
