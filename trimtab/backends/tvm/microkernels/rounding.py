"""Rounding of float32 to bfloat16, of a row or of one vector, by the processor's own instruction where it has one."""

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


def vector_body(lanes: int, has_instruction: bool) -> Writer:
    """The body of ``<lanes x i16> name(<lanes x float> %a)``: the bits of the nearest bfloat16, of the even one of two.

    Without the instruction LLVM would call a function of the C library for each lane. The arithmetic on integers that
    is done instead makes a zero of a NaN whose mantissa is nearly full; those that arithmetic yields are not.
    """
    f = Writer()
    words, halves = f"<{lanes} x i32>", f"<{lanes} x i16>"
    if has_instruction:
        narrow = f.let(f"fptrunc <{lanes} x float> %a to <{lanes} x bfloat>")
        bits = f.let(f"bitcast <{lanes} x bfloat> {narrow} to {halves}")
    else:
        shift, one, half = (f.splat(lanes, "i32", str(value)) for value in (16, 1, 0x7FFF))
        exact = f.let(f"bitcast <{lanes} x float> %a to {words}")
        odd = f.let(f"and {words} {f.let(f'lshr {words} {exact}, {shift}')}, {one}")
        above = f.let(f"add {words} {f.let(f'add {words} {exact}, {half}')}, {odd}")
        bits = f.let(f"trunc {words} {f.let(f'lshr {words} {above}, {shift}')} to {halves}")
    f.do(f"ret {halves} {bits}")
    return f
