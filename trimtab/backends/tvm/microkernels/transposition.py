"""Transposition of rows into the columns of a panel, a square block of registers at a time."""

from __future__ import annotations

from trimtab.backends.tvm.microkernels.llvm_text import Writer

PARAMETERS = "ptr noalias %a, i64 %lda, i64 %rows, i64 %depth, ptr noalias %b, i64 %ldb"
WORD_BYTES = 4


def transposition_body(lanes: int) -> Writer:
    """The body of a function of :data:`PARAMETERS` that sets ``B[d, i] = A[min(i, rows - 1), d]`` for ``i < lanes``.

    The elements are words of 32 bits. ``rows`` is at least 1, and ``depth`` at least ``lanes``: a rest is covered by a
    block that overlaps the one before it.
    """
    f = Writer()
    word = f"<{lanes} x i32>"
    last, stride = f.let("sub i64 %rows, 1"), f.let(f"mul i64 %lda, {WORD_BYTES}")
    rows = [f.offset("%a", f.let(f"mul i64 {_minimum(f, str(i), last)}, {stride}")) for i in range(lanes)]
    end, pitch = f.let(f"sub i64 %depth, {lanes}"), f.let(f"mul i64 %ldb, {WORD_BYTES}")

    def block(state: list[str]) -> list[str]:
        (depth,) = state
        start = _minimum(f, depth, end)
        ahead = f.let(f"mul i64 {start}, {WORD_BYTES}")
        values = _transposed(f, word, lanes, [f.load(word, f.offset(row, ahead), WORD_BYTES) for row in rows])
        for i, value in enumerate(values):
            place = f.let(f"mul i64 {f.let(f'add i64 {start}, {i}')}, {pitch}")
            f.store(word, value, f.offset("%b", place), WORD_BYTES)
        return [f.let(f"add i64 {depth}, {lanes}")]

    f.loop(f.let(f"sdiv i64 {f.let(f'add i64 %depth, {lanes - 1}')}, {lanes}"), [("i64", "0")], block)
    f.do("ret i32 0")
    return f


def _minimum(f: Writer, a: str, b: str) -> str:
    return f.call("i64", "llvm.smin.i64", ("i64", a), ("i64", b))


def _transposed(f: Writer, word: str, lanes: int, rows: list[str]) -> list[str]:
    """A square of registers transposed: at each level the blocks off the diagonal change places, halves first."""
    size = lanes // 2
    while size:
        upper = [lanes + j - size if j & size else j for j in range(lanes)]
        lower = [lanes + j if j & size else j + size for j in range(lanes)]
        for i in range(lanes):
            if not i & size:
                pair = (rows[i], rows[i + size])
                rows[i], rows[i + size] = (_shuffle(f, word, lanes, pair, places) for places in (upper, lower))
        size //= 2
    return rows


def _shuffle(f: Writer, word: str, lanes: int, pair: tuple[str, str], places: list[int]) -> str:
    mask = ", ".join(f"i32 {place}" for place in places)
    return f.let(f"shufflevector {word} {pair[0]}, {word} {pair[1]}, <{lanes} x i32> <{mask}>")
