"""How much memory a kernel takes for itself while it runs: packed panels, tiles, rows.

TVM's runtime hands it out from a pool that every thread has of its own, and keeps it for the next kernel.  So the peak
of a thread is the largest need of one kernel: scratch outside of its parallel loop, on the calling thread, and inside,
on every thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import DataType, tirx

from trimtab.backends.tvm.memory_plan import largest
from trimtab.backends.tvm.symbolic_sizes import dim_of
from trimtab.ir.dims import Dim, Symbol, product

_STACK_BYTES = 1024
"""Below this TVM takes buffers of constant size from the stack (kMaxStackAlloca of its runtime)."""


def scratch_bytes(function: Any, symbols: Mapping[str, Symbol]) -> Dim:
    """The most scratch that a thread holds at one time in ``function``, a PrimFunc of loops."""
    return _need(function.body, symbols)


def _need(statement: Any, symbols: Mapping[str, Symbol]) -> Dim:
    if isinstance(statement, tirx.SeqStmt):
        held: Dim = 0
        peak: Dim = 0
        for part in statement.seq:
            if isinstance(part, tirx.AllocBuffer):
                held = held + _bytes(part.buffer, symbols)
            peak = largest((peak, held + _need(part, symbols)))
        return peak
    if isinstance(statement, tirx.AllocBuffer):
        return 0
    children = [getattr(statement, name, None) for name in ("body", "block", "then_case", "else_case")]
    return largest(_need(child, symbols) for child in children if child is not None)


def _bytes(buffer: Any, symbols: Mapping[str, Symbol]) -> Dim:
    dtype = DataType(str(buffer.dtype))
    nbytes = product(dim_of(extent, symbols) for extent in buffer.shape) * ((dtype.bits * dtype.lanes + 7) // 8)
    return 0 if isinstance(nbytes, int) and nbytes < _STACK_BYTES else nbytes
