"""The compile pipeline: Relax module to Relax module in which every kernel is generated loops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from trimtab.backends.tvm.arena import plan_arena
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.schedule import schedule_module
from trimtab.backends.tvm.kernel_scratch import scratch_bytes
from trimtab.backends.tvm.memory_plan import largest
from trimtab.ir.dims import Dim, Symbol


@dataclass(frozen=True)
class Lowered:
    """A module ready for code generation.

    Attributes:
        module: the Relax module.
        arena_bytes: memory for intermediate tensors that a call needs.
        live_bytes: the most bytes of them that are needed at one time, a lower bound of ``arena_bytes``.
        scratch_bytes: the most scratch that a thread holds inside of a kernel.
    """

    module: Any
    arena_bytes: Dim
    live_bytes: Dim
    scratch_bytes: Dim


def lower(module: Any, target: dict[str, Any], machine: Machine, symbols: Mapping[str, Symbol]) -> Lowered:
    """Legalise, generate the loops of our kernels, plan memory and lower to the virtual machine."""
    with tvm.target.Target(target), tvm.transform.PassContext(opt_level=3):
        module = tvm.transform.Sequential([
            relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),
            relax.transform.DeadCodeElimination(),
            relax.transform.RewriteDataflowReshape(),
        ])(module)  # fmt: skip
        module = schedule_module(module, machine)
        kernels = [function for _, function in module.functions_items() if isinstance(function, tirx.PrimFunc)]
        scratch = largest(scratch_bytes(function, symbols) for function in kernels)
        module = tvm.transform.Sequential([
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
        ])(module)  # fmt: skip
        planned = plan_arena(module, symbols)
        module = tvm.transform.Sequential([
            relax.transform.CanonicalizeBindings(),
            relax.transform.LowerAllocTensor(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ])(planned.module)  # fmt: skip
    return Lowered(module, planned.arena_bytes, planned.live_bytes, scratch)


def build_executable(module: Any, target: dict[str, Any]) -> Any:
    """Machine code for a lowered module: a Relax executable."""
    return relax.build(module, target=tvm.target.Target(target), relax_pipeline=None)
