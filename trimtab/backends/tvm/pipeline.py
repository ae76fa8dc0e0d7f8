"""The compile pipeline: Relax module to Relax module in which every kernel is generated loops."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.codegen.schedule import schedule_module


def lowering_passes(machine: Machine) -> Any:
    """Legalise, generate the loops of our kernels, plan memory and lower to the virtual machine."""

    @tvm.transform.module_pass(opt_level=0, name="ScheduleKernels")
    def schedule(module: Any, context: Any) -> Any:
        return schedule_module(module, machine)

    return tvm.transform.Sequential([
        relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),
        relax.transform.DeadCodeElimination(),
        relax.transform.RewriteDataflowReshape(),
        schedule,
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ])  # fmt: skip


def lower(module: Any, target: dict[str, Any], machine: Machine) -> Any:
    """Run the passes for a target."""
    with tvm.target.Target(target), tvm.transform.PassContext(opt_level=3):
        return lowering_passes(machine)(module)


def build_executable(module: Any, target: dict[str, Any]) -> Any:
    """Machine code for a lowered module: a Relax executable."""
    return relax.build(module, target=tvm.target.Target(target), relax_pipeline=None)
