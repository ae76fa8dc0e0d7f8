"""Inputs and expected outputs that an artifact carries for its self-check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimtab.artifact import TOLERANCE
from trimtab.runtime.manifest import Tolerance
from trimtab.runtime.samples import Sample

if TYPE_CHECKING:
    from trimtab.ir import Module

# Two computations that round the same values to 16 bits differ by no more than this many times what rounding costs.
_ROUNDING_MARGIN = 4
# How far two computations in float32 are apart where a value is rounded to an integer: some end on different sides.
_UNIT = 2.0**-22
# More sample sizes are tried only while one evaluation costs less than this, about a minute on a small machine.
_SAMPLE_MACS = 1e12


def expected_outputs(module: Module) -> tuple[tuple[Sample, ...], Tolerance]:
    """Random inputs at one or two bindings of the symbols with the outputs expected for them, and how far off code may
    be.

    Where ``module`` rounds values to 16 bits, the outputs are those without this rounding (of its weights as they are
    stored), so that no other program's rounding is taken for the truth.  The tolerance is then the bound of the pass
    that makes such modules, or a multiple of what rounding moves the reference interpreter's outputs, if that is more.

    Where it rounds values to integers, a difference in the last digit of float32 before that is one of a whole step
    after it. The tolerance is then a multiple of what such differences move the outputs.
    """
    from trimtab.ir import interpret, ops
    from trimtab.passes.base import Context
    from trimtab.passes.cast_precision import CastPrecision, rounds_values
    from trimtab.passes.contracts import measure
    from trimtab.passes.evaluation import sensitivities
    from trimtab.passes.samples import generate_samples

    rounds, samples, cost = rounds_values(module), [], 0.0
    steps = any(isinstance(op, ops.Quantize) for op in module.walk())
    for sample in generate_samples(module, Context(), _SAMPLE_MACS):
        if sample.special:
            continue
        outputs = interpret(module, sample.inputs)
        if rounds:
            import torch

            wide = interpret(module, sample.inputs, precision=torch.float32)
            wide = tuple(exact.to(found.dtype) for exact, found in zip(wide, outputs, strict=True))
            drifts = [measure(exact, found) for exact, found in zip(wide, outputs, strict=True)]
            cost = max([cost, *(drift.relative for drift in drifts if drift.resolution)])
            outputs = wide
        if steps:
            moved = zip(outputs, sensitivities(module, sample, _UNIT), strict=True)
            cost = max([cost, *(far / float(made.abs().max()) for made, far in moved if far and made.abs().max())])
        samples.append(Sample(tuple(map(_to_numpy, sample.inputs)), tuple(map(_to_numpy, outputs))))
    if not rounds:
        if not steps:
            return tuple(samples), TOLERANCE
        return tuple(samples), Tolerance(max(TOLERANCE.rtol, _ROUNDING_MARGIN * cost), TOLERANCE.atol, integers=False)
    contract = CastPrecision.contract
    return tuple(samples), Tolerance(max(contract.rtol, _ROUNDING_MARGIN * cost), contract.atol, integers=False)


def _to_numpy(tensor: Any) -> Any:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
