"""Post-training quantization of attention to products of integers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trimtab.errors import UsageError
from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.printer import print_op
from trimtab.ir.rewrite import NearMiss
from trimtab.ir.rewrite.log import RuleLog
from trimtab.passes.base import Changed, Context, Pass
from trimtab.passes.contracts import Contract, Lossy
from trimtab.passes.integer_math.attention import IntegerAttention, Scheme, refusal
from trimtab.passes.integer_math.log_codes import LogCodes
from trimtab.passes.quantization.observers import Observer, make_observer
from trimtab.passes.quantization.scales import LEAST_SCALE, Integers
from trimtab.passes.quantization.statistics import observe

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Compute attention with products of 8-bit integers, and the softmax between them in float.

    Queries, keys and values have symmetric scales from calibration data, one each for the whole tensor or, with
    ``per_head``, one for each head. ``bits`` may be fewer than 8; the products are still those of bytes. ``observer``
    finds the ranges: minmax, moving, percentile, mse or entropy; with ``per_head`` minmax or moving.

    ``softmax`` says how probabilities become integers: in ``uniform`` steps of ``1 / (2^softmax_bits - 1)``, or as
    codes of a logarithm of base 2 (``log2``) or its square root (``log-sqrt2``), which keep small probabilities apart
    where there are few bits (Lin et al., "FQ-ViT", 2022; Li et al., "RepQ-ViT", 2023). ``softmax_bits=0`` is 8 for
    uniform steps and 4 for codes.

    On processors with fast floating units the fused attention is faster: this is for those without.
    """

    name: ClassVar[str] = "quantize-attention"
    contract: ClassVar[Contract] = Lossy()
    grows_weights: ClassVar[bool] = True  # by a few scales
    bits: int = 8
    softmax: Literal["uniform", "log2", "log-sqrt2"] = "uniform"
    softmax_bits: int = 0
    per_head: bool = False
    observer: str = "minmax"

    def run(self, module: Module, ctx: Context) -> Changed:
        probabilities = self._probabilities()
        if not 2 <= self.bits <= 8:
            raise UsageError("quantize-attention takes from 2 to 8 bits", values={"bits": self.bits})
        found = [op for op in self._found(module, ctx.rewrites.of(self.name)) if ctx.rewrites.permit(self.name, op)]
        if not found:
            return False
        if not ctx.calibration:
            raise UsageError(
                "quantize-attention has no data to find the ranges of queries, keys and values from",
                values={"calibration batches": 0},
                rule="a scale for a whole tensor is chosen beforehand, from real inputs",
                fix="give calibration data (`--calibration data.npz`)",
            )
        schemes = self._schemes(module, found, probabilities, ctx)
        scheme_name = f"A{self.bits}, {self.softmax} P{self.softmax_bits or _default(self.softmax)}"
        for facts in _facts(module, schemes, next(iter(ctx.calibration))):
            ctx.record(facts | {"scheme": scheme_name})
        for op, scheme in schemes.items():
            build = Builder(module, module.main, before=op, made_by=self.name)
            result = IntegerAttention(build, op, scheme, _constant(module, op.mask)).result()
            result.name = op.result.name
            op.result.replace_all_uses_with(result)
            module.main.ops.remove(op)
        ctx.note(f"{len(found)} attentions compute with integers")
        return True

    def _probabilities(self) -> LogCodes | int:
        bits = self.softmax_bits or _default(self.softmax)
        codes = None if self.softmax == "uniform" else LogCodes(self.softmax, bits)
        most = 8 if codes is None else codes.most_bits
        if not 2 <= bits <= most:
            raise UsageError(
                f"quantize-attention takes from 2 to {most} softmax_bits for softmax={self.softmax}",
                values={"softmax_bits": bits},
                rule="uniform steps fit in a byte; codes are shifts of at most 15 bits, whose sums fit in 32",
            )
        return bits if codes is None else codes

    def _found(self, module: Module, log: RuleLog) -> list[ops.Attention]:
        found = []
        for graph in module.all_graphs():
            for op in graph.ops:
                if not isinstance(op, ops.Attention):
                    continue
                log.tried += 1
                in_main = graph is module.main
                reason = refusal(op) if in_main else "it is inside a group or a repeated body: this comes before both"
                if not reason and self.per_head and not isinstance(op.q.type.shape[-3], int):
                    reason = "per_head needs a known number of heads"
                if reason:
                    log.reject(NearMiss(1, 1, print_op(op), str(op.location or ""), reason))
                else:
                    log.matched += 1
                    found.append(op)
        return found

    def _schemes(
        self, module: Module, found: Sequence[ops.Attention], probabilities: LogCodes | int, ctx: Context
    ) -> dict[ops.Attention, Scheme]:
        integers = Integers.symmetric(self.bits)
        axis = -3 if self.per_head else None
        operands = {value for op in found for value in (op.q, op.k, op.v)}
        watched: dict[Value, Observer] = {
            value: make_observer(self.observer, bits=self.bits, symmetric=True, axis=axis)
            for value in operands
            if not value.is_weight
        }
        observe(module, watched, ctx.calibration, what=self.name)
        for value in operands - watched.keys():
            watched[value] = make_observer("minmax", symmetric=True, axis=axis)
            watched[value].update(module.weights[value.weight].tensor())

        def scale(value: Value) -> torch.Tensor:
            _, high = watched[value].range()
            units = (high / integers.high).clamp(min=LEAST_SCALE).float()
            return units.reshape(-1, 1, 1) if units.dim() else units

        return {op: Scheme(scale(op.q), scale(op.k), scale(op.v), integers, probabilities) for op in found}


def _default(softmax: str) -> int:
    return 8 if softmax == "uniform" else 4


def _constant(module: Module, value: Value | None) -> torch.Tensor | None:
    return module.weights[value.weight].tensor() if value is not None and value.is_weight else None


def _facts(
    module: Module, schemes: Mapping[ops.Attention, Scheme], batch: Sequence[torch.Tensor]
) -> list[dict[str, Any]]:
    """Ranges, the share of numbers clipped, and signal to noise of each attention alone, on one batch."""
    from trimtab.ir.interpreter import interpret

    wanted = {v for op in schemes for v in (op.q, op.k, op.v, op.mask) if v is not None}
    held: dict[Value, torch.Tensor] = dict(zip(module.main.inputs, batch, strict=True))
    held |= {v: module.weights[v.weight].tensor() for v in wanted if v.is_weight}
    facts: list[dict[str, Any]] = []

    def computed(op: Any, results: Sequence[torch.Tensor]) -> None:
        for value, tensor in zip(op.results, results, strict=True):
            if value in wanted:
                held[value] = tensor
        if op in schemes:
            data = [held[v] for v in (op.q, op.k, op.v, op.mask) if v is not None]
            facts.append(_measured(len(facts), op, schemes[op], data, results[0]))

    interpret(module, batch, observer=computed)
    return facts


def _measured(
    number: int, op: ops.Attention, scheme: Scheme, data: Sequence[torch.Tensor], expected: torch.Tensor
) -> dict[str, Any]:
    from trimtab.ir import DType, TensorType
    from trimtab.ir.interpreter import interpret

    build = Builder()
    given = [
        build.input(f"x{n}", TensorType(DType.from_torch(tensor.dtype), tuple(tensor.shape)))
        for n, tensor in enumerate(data)
    ]
    alone = ops.Attention(*given[:3], given[3] if len(given) > 3 else None, scale=op.scale, causal=op.causal)
    build.output(IntegerAttention(build, alone, scheme).result())
    (found,) = interpret(build.module, data)
    exact = expected.double()
    noise, signal = float((found.double() - exact).square().sum()), float(exact.square().sum())
    outside = [
        float((tensor.abs() > scale * (scheme.integers.high + 0.5)).double().mean()) if tensor.numel() else 0.0
        for tensor, scale in zip(data, (scheme.q, scheme.k, scheme.v), strict=False)
    ]
    return {
        "number": number,
        "layer": f"attention {op.result.name} ({op.location})" if op.location else f"attention {op.result.name}",
        "q": float(scheme.q.max()) * scheme.integers.high,
        "k": float(scheme.k.max()) * scheme.integers.high,
        "v": float(scheme.v.max()) * scheme.integers.high,
        "clipped": max(outside),
        "sqnr_db": math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf,
    }
