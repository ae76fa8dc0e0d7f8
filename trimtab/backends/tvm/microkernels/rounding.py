"""Rounding of a row of float32 to bfloat16, by the processor's own instruction where it has one."""

from __future__ import annotations

from trimtab.backends.tvm.microkernels.llvm_text import Writer

PARAMETERS = "ptr noalias %a, ptr noalias %b, i64 %vectors"


def rounding_body(lanes: int) -> Writer:
    """The body of a function of :data:`PARAMETERS` that sets ``B[i] = A[i]`` for ``i < vectors * lanes``."""
    f = Writer()
    wide, narrow = f"<{lanes} x float>", f"<{lanes} x bfloat>"

    def vector(state: list[str]) -> list[str]:
        a, b = state
        f.store(narrow, f.let(f"fptrunc {wide} {f.load(wide, a, 4)} to {narrow}"), b, 2)
        return [f.offset(a, 4 * lanes), f.offset(b, 2 * lanes)]

    f.loop("%vectors", [("ptr", "%a"), ("ptr", "%b")], vector)
    f.do("ret i32 0")
    return f
