"""Which kernels a call of the model runs, in order, and how much work each of them is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tvm import ir, relax

from trimtab.backends.base import KernelCall
from trimtab.backends.tvm.kernels import Kernel, Leaf
from trimtab.ir.analysis.cost import bytes_read
from trimtab.ir.dims import Dim, dim_max
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op


def describe_call(name: str, kernel: Kernel) -> KernelCall:
    """The call of the function ``name`` that was made for ``kernel``."""
    macs: Dim = 0
    for op in kernel.ops:
        macs = macs + op.macs()
    read: Dim = 0
    for number, leaf in enumerate(kernel.leaves):
        if leaf.expr is not None:
            read = read + _bytes_of_leaf(kernel, number, leaf)
    written: Dim = 0
    for type in kernel.output_types:
        written = written + type.bytes
    return KernelCall(name, tuple(map(describe_op, kernel.ops)), macs, _factors(kernel), read, written)


def describe_op(op: Op) -> str:
    """Mnemonic and, where it is known, the line of the user's model."""
    return f"{op.name} at {op.location}" if op.location is not None else op.name


def _bytes_of_leaf(kernel: Kernel, number: int, leaf: Leaf) -> Dim:
    """The most that one of the ops reads of a leaf: what several ops of a kernel read is read once."""
    counts: list[Dim] = []
    for op, sources in zip(kernel.ops, kernel.sources, strict=True):
        for field, source in enumerate(sources):
            if source == number or (isinstance(source, list) and number in source):
                counts.append(bytes_read(op, field, leaf.type))
    return dim_max(*counts)


def _factors(kernel: Kernel) -> str:
    """The dtype in which the kernel multiplies: the widest of the two factors of its first product."""
    for op, sources in zip(kernel.ops, kernel.sources, strict=True):
        if op.macs() == 0:
            continue
        flat = [one for source in sources for one in (source if isinstance(source, list) else [source])]
        dtypes = [_dtype(kernel, source) for source in flat[:2]]
        return str(max(dtypes, key=lambda dtype: (dtype.is_floating, dtype.bits)))
    return ""


def _dtype(kernel: Kernel, source: Any) -> DType:
    return kernel.leaves[source].type.dtype if isinstance(source, int) else kernel.value(source).type.dtype


def calls_in_order(module: Any, known: Mapping[str, KernelCall]) -> Iterator[KernelCall]:
    """The kernel calls of ``main`` in order of execution, those of functions that it calls included.

    Args:
        module: a Relax module.
        known: the calls by the names of the variables that hold their results.
    """
    return _calls_of(module["main"], module, known)


def _calls_of(function: Any, module: Any, known: Mapping[str, KernelCall]) -> Iterator[KernelCall]:
    for block in function.body.blocks:
        for binding in block.bindings:
            if binding.var.name in known:
                yield known[binding.var.name]
            elif isinstance(binding.value, ir.Call) and isinstance(binding.value.op, ir.GlobalVar):
                called = module[binding.value.op]
                if isinstance(called, relax.Function):
                    yield from _calls_of(called, module, known)
