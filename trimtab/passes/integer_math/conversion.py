"""From a value in float that is rounded to integers, to ops that compute these integers from others.

The walk starts at a Quantize and goes back through what makes its operand, until it comes to sums of integers, which
Dequantize would make real numbers of, or to constants. Each value on the way is asked for as integers of a
:class:`Target`, and is made right after the op that makes it in float. What has no integer form is rounded there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.dims import product
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.passes.integer_math.fixed_point import MOST, integer, rescaled
from trimtab.passes.integer_math.functions import (
    PROBABILITY_UNIT,
    SCORE_UNIT,
    binary_codes,
    gelu,
    gelu_unit,
    softmax,
)
from trimtab.passes.integer_math.layer_norm import MOST_CHANNELS, normalised, scaled
from trimtab.passes.integer_math.power_factors import PowerFactors

if TYPE_CHECKING:
    import torch

_FINER = 2.0**-8
"""Of a step of the result, where a sum is rounded before it is rounded to the result."""
_WIDEST_ACTIVATION = 8.0
"""Beyond this, either way, GELU is the identity or zero."""


@dataclass(frozen=True)
class Target:
    """The integers that a value is wanted as: ``clamp(round(x / scale) + zero, low, high)``.

    Attributes:
        scale: float64 that broadcasts to the value.
    """

    scale: torch.Tensor
    zero: int
    dtype: DType
    low: int
    high: int

    @staticmethod
    def fixed(unit: float) -> Target:
        """i32 in ``unit``."""
        import torch

        return Target(torch.tensor(unit, dtype=torch.float64), 0, DType.I32, -MOST, MOST)

    @property
    def is_fixed(self) -> bool:
        return self.scale.numel() == 1 and self.dtype is DType.I32 and self.zero == 0 and self.high == MOST

    @property
    def unit(self) -> float:
        """The scale, of a target with one, or the least."""
        return float(self.scale.min())

    @property
    def integers(self) -> dict[str, Any]:
        """All but the scale."""
        return {"zero": self.zero, "dtype": self.dtype, "low": self.low, "high": self.high}

    def key(self) -> object:
        return tuple(self.scale.flatten().tolist()), tuple(self.scale.shape), *self.integers.values()

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers as integers."""
        steps = (x.double() / self.scale).round() + self.zero
        return steps.clamp(self.low, self.high).to(self.dtype.to_torch())


class Conversion:
    """Integer forms of the values of one module.

    Args:
        module: rewritten in place.
        made_by: name of the pass.
        factors: of the inputs of layer norms that have an integer form.
        units: of values that several ops read, such as a residual stream: these are made once, in this unit.
        floats: values that stay in float, and are rounded where they are wanted.
    """

    def __init__(
        self, module: Module, made_by: str, factors: Mapping[Value, PowerFactors], units: Mapping[Value, float],
        floats: frozenset[Value],
    ) -> None:  # fmt: skip
        self._module = module
        self._made_by = made_by
        self._factors = factors
        self._units = units
        self._floats = floats
        self._made: dict[tuple[Value, object], Value] = {}
        self._normals: dict[ops.LayerNorm, Value] = {}
        originals = list(module.main.ops)
        self._next: dict[Op, Op | None] = dict(itertools.pairwise(originals))
        self._first = originals[0] if originals else None
        self.rounded_floats: dict[Value, str] = {}
        """Values that were rounded from float, with the reason."""

    def of_quantize(self, op: ops.Quantize) -> Value | None:
        """The result of ``op`` from integers, or None where its operand has no integer form."""
        scale, zero = constant(self._module, op.scale), constant(self._module, op.zero)
        if scale is None or (op.zero is not None and (zero is None or zero.numel() != 1)):
            self.rounded_floats.setdefault(op.x, "its scale is computed")
            return None
        offset = 0 if zero is None else int(zero.reshape(()))
        made = self._computed(op.x, Target(scale.double(), offset, op.dtype, op.low, op.high))
        if made is None:
            self.rounded_floats.setdefault(op.x, _reason(op.x, self._floats))
        return made

    def rounded(self, value: Value, target: Target) -> Value:
        """``value`` as integers: computed from others, or rounded from float."""
        made = self._computed(value, target)
        return made if made is not None else self._from_float(value, target)

    def make_shared(self, value: Value) -> None:
        """Make one of the shared values in integers, so that :meth:`replace_floats` finds it."""
        self._computed(value, Target.fixed(self._units[value]))

    def replace_floats(self) -> None:
        """Make real numbers of the shared values in integers, for those that still read them in float."""
        for value, unit in self._units.items():
            made = self._made.get((value, Target.fixed(unit).key()))
            if made is not None:
                build = self._after(value)
                again = build(ops.Dequantize(made, build.scalar(unit, DType.F32)))
                again.name = value.name
                value.replace_all_uses_with(again)

    def _after(self, value: Value) -> Builder:
        """Builds right after the op that makes ``value``, behind what was built there before."""
        maker = value.producer
        build = Builder(
            self._module,
            self._module.main,
            before=self._first if maker is None else self._next.get(maker),
            made_by=self._made_by,
        )
        build.location = maker.location if maker is not None else None
        return build

    def _computed(self, value: Value, target: Target) -> Value | None:
        key = (value, target.key())
        if key not in self._made:
            made = self._make(value, target)
            if made is None:
                return None
            self._made[key] = made
        return self._made[key]

    def _from_float(self, value: Value, target: Target) -> Value:
        key = (value, target.key())
        if key not in self._made:
            import torch

            build = self._after(value)
            self.rounded_floats.setdefault(value, _reason(value, self._floats))
            zero = None
            if target.zero:
                zero = build.weight("zero", torch.tensor(target.zero, dtype=torch.int32))
            scale = build.weight("scale", target.scale.float())
            made = ops.Quantize(value, scale, zero, dtype=target.dtype, low=target.low, high=target.high)
            self._made[key] = build(made)
        return self._made[key]

    def _make(self, value: Value, target: Target) -> Value | None:
        if value in self._floats:
            return None
        if value.is_weight:
            build = self._after(value)
            data = self._module.weights[value.weight].tensor()
            return build.weight(f"{value.weight}.{target.dtype}", target.of(data))
        maker = value.producer
        if value in self._units and not (target.is_fixed and target.unit == self._units[value]):
            unit = self._units[value]
            build = self._after(value)
            return rescaled(build, self.rounded(value, Target.fixed(unit)), unit / target.scale, **target.integers)
        if maker is None:
            return None
        if isinstance(maker, ops.Split):
            return self._part(value, maker, target)
        rule = _RULES.get(type(maker))
        return rule(self, maker, target) if rule is not None else None

    def _finer(self, op: Op, target: Target) -> Value:
        """A result that is only made in i32 of one unit, in a finer one and then rounded to ``target``."""
        unit = target.unit * _FINER
        build = self._after(op.results[0])
        return rescaled(
            build, self.rounded(op.results[0], Target.fixed(unit)), unit / target.scale, **target.integers
        )  # fmt: skip

    # -- rules, by the op that makes a value in float --------------------------------------------------------------

    def _part(self, value: Value, op: ops.Split, target: Target) -> Value | None:
        """One result of a split: a slice."""
        place = list(op.results).index(value)
        start = sum(op.sizes[:place])
        part = self._after(value)(ops.Slice(op.x, dim=op.dim, start=start, stop=start + op.sizes[place]))
        part_maker = part.producer
        assert part_maker is not None
        self._next[part_maker] = self._next.get(op)
        return self._make(part, target)

    def _dequantize(self, op: ops.Dequantize | ops.Slice, target: Target) -> Value | None:
        """Sums to which slices are applied first, so that only what is read is rounded."""
        found = self._sums(op.result)
        if found is None:
            return self._move(op, target) if isinstance(op, ops.Slice) else None
        sums, zero, scale = found
        build = self._after(op.result)
        if sums.type.dtype is not DType.I32:
            sums = build(ops.Cast(sums, DType.I32))
        if zero is not None:
            sums = build(ops.Sub(sums, build.weight("zero", zero.int())))
        return rescaled(build, sums, scale.double() / target.scale, **target.integers)

    def _sums(self, value: Value) -> tuple[Value, torch.Tensor | None, torch.Tensor] | None:
        """The integers, zero points and scales that ``value`` is made of, if it is a Dequantize or slices of one."""
        maker = value.producer
        if value in self._floats or value in self._units:
            return None
        if isinstance(maker, ops.Dequantize):
            scale, zero = constant(self._module, maker.scale), constant(self._module, maker.zero)
            return None if scale is None or (maker.zero is not None and zero is None) else (maker.x, zero, scale)
        found = self._sums(maker.x) if isinstance(maker, ops.Slice) else None
        if found is None or max(part.dim() for part in found[1:] if part is not None) > 1:
            return None
        assert isinstance(maker, ops.Slice)
        sums, zero, scale = found
        is_last = maker.dim == value.type.rank - 1
        if is_last and not (isinstance(maker.start, int) and isinstance(maker.stop, int)):
            return None
        places = slice(maker.start, maker.stop, maker.step) if is_last else slice(None)

        def cut(part: torch.Tensor) -> torch.Tensor:
            return part[places] if part.numel() > 1 else part

        return self._after(value)(maker.rebuilt([sums])), None if zero is None else cut(zero), cut(scale)

    def _move(self, op: Op, target: Target) -> Value | None:
        """Ops that move elements do so with integers."""
        if target.scale.numel() != 1:
            return self._finer(op, target)
        made = [self.rounded(operand, target) for operand in op.operands]
        return self._after(op.results[0])(op.rebuilt(made))

    def _sum(self, op: ops.Add | ops.Sub, target: Target) -> Value | None:
        if not target.is_fixed:
            return self._finer(op, target)
        parts = [self.rounded(operand, target) for operand in (op.x, op.y)]
        build = self._after(op.result)
        return build(ops.Clamp(build(type(op)(*parts)), min=-MOST, max=MOST))

    def _product(self, op: ops.Mul, target: Target) -> Value | None:
        """A product with positive constants, such as the factors of channels, is another scale."""
        for x, other in ((op.x, op.y), (op.y, op.x)):
            factors = constant(self._module, other)
            if factors is not None and x.type.shape == op.result.type.shape and bool((factors > 0).all()):
                scale = target.scale / factors.double()
                return self.rounded(x, Target(scale, target.zero, target.dtype, target.low, target.high))
        return None

    def _mean(self, op: ops.Mean, target: Target) -> Value | None:
        count = product(op.x.type.shape[dim] for dim in op.dims)
        if not isinstance(count, int) or not count:
            return None
        if not target.is_fixed:
            return self._finer(op, target)
        x = self.rounded(op.x, target)
        build = self._after(op.result)
        total = build(ops.Sum(build(ops.Cast(x, DType.I64)), dims=op.dims, keepdim=op.keepdim))
        total = build(ops.Add(total, integer(build, count // 2, DType.I64)))
        mean = build(ops.Div(total, integer(build, count, DType.I64), rounding="floor"))
        return build(ops.Cast(mean, DType.I32))

    def _where(self, op: ops.Where, target: Target) -> Value | None:
        if target.scale.numel() != 1:
            return self._finer(op, target)
        branches = [self.rounded(operand, target) for operand in (op.x, op.y)]
        return self._after(op.result)(ops.Where(op.condition, *branches))

    def _full(self, op: ops.Full, target: Target) -> Value | None:
        import torch

        if target.scale.numel() != 1:
            return None
        number = int(target.of(torch.tensor(float(op.value), dtype=torch.float64)).reshape(()))
        return self._after(op.result)(ops.Full(value=number, dtype=target.dtype, shape=op.shape))

    def _relu(self, op: ops.Relu, target: Target) -> Value | None:
        positive = Target(target.scale, target.zero, target.dtype, max(target.low, target.zero), target.high)
        return self._computed(op.x, positive)

    def _gelu(self, op: ops.Gelu, target: Target) -> Value | None:
        largest = float(target.scale.max()) * (target.high - target.zero)
        if op.approximate == "sigmoid" or target.is_fixed:
            return None
        unit = gelu_unit(max(largest, _WIDEST_ACTIVATION))
        x = self.rounded(op.x, Target(target.scale.new_tensor(unit), 0, DType.I32, -(1 << 15), (1 << 15) - 1))
        build = self._after(op.result)
        y, of_result = gelu(build, x, unit)
        return rescaled(build, y, of_result / target.scale, **target.integers)

    def _softmax(self, op: ops.Softmax, target: Target) -> Value | None:
        p = self._probabilities(op)
        return p if target.is_fixed and target.unit == PROBABILITY_UNIT else rescaled(
            self._after(op.result), p, PROBABILITY_UNIT / target.scale, **target.integers
        )  # fmt: skip

    def _probabilities(self, op: ops.Softmax) -> Value:
        key = (op.result, Target.fixed(PROBABILITY_UNIT).key())
        if key not in self._made:
            x = self.rounded(op.x, Target.fixed(SCORE_UNIT))
            self._made[key] = softmax(self._after(op.result), x, op.dim)
        return self._made[key]

    def _negative(self, op: ops.Neg, target: Target) -> Value | None:
        """Minus the logarithm of probabilities, in octaves or half octaves."""
        log = op.x.producer
        if not isinstance(log, ops.Log) or target.scale.numel() != 1 or target.zero or target.low:
            return None
        per_octave = round(math.log(2) / target.unit)
        if per_octave not in (1, 2) or not math.isclose(target.unit * per_octave, math.log(2), rel_tol=1e-6):
            return None
        p = self._computed(log.x, Target.fixed(PROBABILITY_UNIT))
        if p is None:
            return None
        build = self._after(op.result)
        return build(ops.Cast(binary_codes(build, p, per_octave, target.high), target.dtype))

    def _layer_norm(self, op: ops.LayerNorm, target: Target) -> Value | None:
        import torch

        if op.x not in self._factors or not is_integer_norm(self._module, op):
            return None
        factors = self._factors[op.x]
        build = self._after(op.result)
        if op not in self._normals:
            codes = self.rounded(op.x, Target(factors.scales, factors.zero, DType.U8, 0, 255))
            self._normals[op] = normalised(build, codes, factors, op.eps)
        weight, bias = constant(self._module, op.weight), constant(self._module, op.bias)
        one = torch.ones((), dtype=torch.float64) if weight is None else weight.double()
        nothing = torch.zeros((), dtype=torch.float64) if bias is None else bias.double()
        parts = torch.broadcast_tensors(one / target.scale, nothing / target.scale)
        return scaled(build, self._normals[op], parts[0].clone(), parts[1].clone(), **target.integers)


Rule: TypeAlias = Callable[[Conversion, Any, Target], "Value | None"]

MOVES = (ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Select, ops.Concat)
_RULES: dict[type[Op], Rule] = {
    ops.Dequantize: Conversion._dequantize,
    ops.Add: Conversion._sum,
    ops.Sub: Conversion._sum,
    ops.Mul: Conversion._product,
    ops.Mean: Conversion._mean,
    ops.Where: Conversion._where,
    ops.Full: Conversion._full,
    ops.Relu: Conversion._relu,
    ops.Gelu: Conversion._gelu,
    ops.Softmax: Conversion._softmax,
    ops.Neg: Conversion._negative,
    ops.LayerNorm: Conversion._layer_norm,
    **dict.fromkeys(MOVES, Conversion._move),
    ops.Slice: Conversion._dequantize,
}


def constant(module: Module, value: Value | None) -> torch.Tensor | None:
    """The data of a weight or a constant; None where a value is computed, or there is none."""
    import torch

    if value is None:
        return None
    if value.is_weight:
        return module.weights[value.weight].tensor()
    maker = value.producer
    if isinstance(maker, ops.Full) and not maker.shape:
        return torch.tensor(maker.value, dtype=maker.dtype.to_torch())
    return None


def is_integer_norm(module: Module, op: ops.LayerNorm) -> bool:
    """Whether a layer norm has an integer form: over one axis of a known size, with constant weights."""
    channels = op.x.type.shape[-1]
    known = all(v is None or v.is_weight for v in (op.weight, op.bias))
    return known and op.axes == 1 and op.x.type.dtype is DType.F32 and isinstance(channels, int) and (
        0 < channels <= MOST_CHANNELS
    )  # fmt: skip


def _reason(value: Value, floats: frozenset[Value]) -> str:
    if value in floats:
        return "the residual stream is in float"
    if value.producer is None:
        return "it is an input"
    return f"{value.producer.name} has no integer form here"
