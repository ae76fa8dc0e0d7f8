"""The memory for intermediate tensors that a session keeps between calls."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

from trimtab.runtime.signature import Array, aligned_empty

_HUGE_PAGE = 2 << 20
_GROWTH = 1.5
"""An arena that is too small is replaced by one at least so many times its size: sizes that creep up cost little."""


class Arena:
    """One block of memory that grows with demand and belongs to one session.

    Its pages are taken from the system when they are first written.
    """

    def __init__(self) -> None:
        self.memory: Array = aligned_empty((0,), np.dtype(np.uint8))

    def fits(self, nbytes: int) -> bool:
        """Whether the block has ``nbytes``."""
        return nbytes <= self.memory.nbytes

    def grow(self, nbytes: int) -> None:
        """Replace the block by one of at least ``nbytes``; what is in it is lost."""
        nbytes = max(nbytes, int(_GROWTH * self.memory.nbytes))
        self.memory = aligned_empty((0,), np.dtype(np.uint8))  # never hold both
        self.memory = _allocate(nbytes)


def _allocate(nbytes: int) -> Array:
    if nbytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return aligned_empty((nbytes,), np.dtype(np.uint8))
    # Fewer page faults at the first call, and fewer entries of the processor's table of pages.
    block = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        block.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(block, np.uint8)
    start = -memory.__array_interface__["data"][0] % _HUGE_PAGE
    return memory[start : start + nbytes]
