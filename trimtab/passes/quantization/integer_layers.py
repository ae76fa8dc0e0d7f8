"""A layer as a product of integers: rounding of its input, the product, and what makes real numbers of the sums.

For x with scale s and zero point z, and weights W with a scale w_n for each output n, the sums ``a = q_x q_W^T`` are
exact, and ``y = (a - z sum_k q_W + b / (s w_n)) * (s w_n)``. The zero point and the bias, rounded to units of the sums,
are one integer for each output. The borders of a convolution are filled with the zero point, so that its sums need no
other correction. Where the channels of x have factors, x is multiplied by their reciprocals first: a
scale for each channel would have to divide each element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.passes.quantization.preparation import Rounding, Stored
from trimtab.passes.quantization.scales import LEAST_SCALE, Affine, Integers
from trimtab.passes.quantization.sites import Site

if TYPE_CHECKING:
    import torch

_LARGEST_BIAS = 2.0**30
"""Of the 31 bits of a sum a bias takes at most one."""


class IntegerLayers:
    """Replaces the layers of one module. A weight that several layers read, and an input that several read, is rounded
    once.

    Args:
        module: rewritten in place.
        made_by: name of the pass.
    """

    def __init__(self, module: Module, made_by: str) -> None:
        self._module = module
        self._made_by = made_by
        self._weights: dict[Stored, Value] = {}
        self._inputs: dict[tuple[Value, Rounding], tuple[Value, Value | None]] = {}

    def replace(self, site: Site, rounding: Rounding, weight: Stored) -> None:
        """Compute a layer with integers."""
        import torch

        op = site.op
        build = Builder(self._module, site.graph, before=op, made_by=self._made_by)
        name, bias, how = site.weight, op.bias, rounding.how
        if weight not in self._weights:
            self._weights[weight] = build.weight(f"{name}.i8", weight.integers)
        rounded, row_scale = self._input(build, op.x, rounding)
        total = build(self._sums(site, rounded, self._weights[weight], how))
        per_output = (-1,) if not site.is_convolution else (-1, 1, 1)  # the shape that broadcasts to the sums
        if isinstance(how, Affine):
            scale = (weight.scales.double() * how.scale).float()
            offset = weight.integers.long().flatten(1).sum(1) * how.zero
            units = self._in_units(bias, scale)
            if units is not None:
                offset, bias = offset - units, None
            zero = None
            if bool(offset.any()):
                zero = build.weight(f"{name}.zero", offset.to(torch.int32).reshape(per_output))
            y = build(ops.Dequantize(total, build.weight(f"{name}.scale", scale.reshape(per_output)), zero))
        else:
            y = build(ops.Dequantize(total, build.weight(f"{name}.scale", weight.scales)))
            y = build(ops.Mul(y, row_scale))
        if bias is not None:
            bias = build(ops.Reshape(bias, shape=(bias.type.shape[0], 1, 1))) if site.is_convolution else bias
            y = build(ops.Add(y, bias))
        y.name = op.result.name
        op.result.replace_all_uses_with(y)
        site.graph.ops.remove(op)

    @staticmethod
    def _sums(site: Site, x: Value, weight: Value, how: Affine | Integers) -> Op:
        """The product of a layer's integers."""
        if not isinstance(site.op, ops.Conv2d):
            return ops.LinearInteger(x, weight)
        attributes = {name: site.op.attributes[name] for name in ("stride", "padding", "dilation", "channels_last")}
        return ops.ConvInteger(x, weight, border=how.zero if isinstance(how, Affine) else 0, **attributes)

    def _in_units(self, bias: Value | None, scale: torch.Tensor) -> torch.Tensor | None:
        """A constant bias [N] in units of the sums' scales, or None where there is none or it is too large for that."""
        import torch

        if bias is None or not bias.is_weight:
            return None
        units = (self._module.weights[bias.weight].tensor().double() / scale.double()).round()
        return units.to(torch.int64) if bool((units.abs() < _LARGEST_BIAS).all()) else None

    def _input(self, build: Builder, x: Value, rounding: Rounding) -> tuple[Value, Value | None]:
        """x in integers, and the scales of its rows if they are computed."""
        if (x, rounding) not in self._inputs:
            how = rounding.how
            made = self._by_row(build, x, how) if isinstance(how, Integers) else self._static(build, x, rounding, how)
            self._inputs[x, rounding] = made
        return self._inputs[x, rounding]

    @staticmethod
    def _static(build: Builder, x: Value, rounding: Rounding, how: Affine) -> tuple[Value, None]:
        import torch

        integers = how.integers
        if rounding.factors is not None:
            x = build(ops.Mul(x, build.weight("input.factors", 1 / rounding.factors)))
        zero = None
        if how.zero:
            zero = build.weight("input.zero", torch.tensor(how.zero, dtype=integers.dtype.to_torch()))
        scale = build.weight("input.scale", torch.tensor(how.scale, dtype=torch.float32))
        return build(ops.Quantize(x, scale, zero, dtype=integers.dtype, low=integers.low, high=integers.high)), None

    @staticmethod
    def _by_row(build: Builder, x: Value, integers: Integers) -> tuple[Value, Value]:
        largest = build(ops.Amax(build(ops.Abs(x)), dims=(x.type.rank - 1,), keepdim=True))
        scale = build(ops.Mul(largest, build.scalar(1 / integers.high, DType.F32)))
        scale = build(ops.Clamp(scale, min=LEAST_SCALE))
        return build(ops.Quantize(x, scale, dtype=integers.dtype, low=integers.low, high=integers.high)), scale
