"""Calls of micro-kernels for the tiles of a contraction.

A micro-kernel reads the rows of A where they lie, a fixed number of elements apart, and one panel of B.  Whether the
factors of a contraction are of that form is read off their accesses; a contraction that is not gets loops of TIR.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import ir, tirx
from tvm.sym import Analyzer, detect_linear_equation

from trimtab.backends.tvm.codegen.contraction import Contraction, Flattener, accesses_of, has_only_loads_as_users
from trimtab.backends.tvm.codegen.expression import Expr, as_index, dtype_of, int_value, rewrite, variables_of
from trimtab.backends.tvm.codegen.loops import Stmt, flat_offset, index, load, minimum, scratch, sequence, store
from trimtab.backends.tvm.codegen.register_tile import Tile
from trimtab.backends.tvm.microkernels import (
    InstructionSet,
    MicroKernel,
    Phases,
    claiming,
    microkernel,
    rounding,
    transposition,
)
from trimtab.backends.tvm.microkernels.amx import TileProduct
from trimtab.backends.tvm.microkernels.llvm_text import LINE_BYTES
from trimtab.backends.tvm.microkernels.products import BITS

SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "uint8": "u8", "int8": "s8"}
_FACTORS = {"float32": ("f32", "f16", "bf16"), "int32": ("u8", "s8")}
"""The factors whose products are added in a type."""


@dataclass(frozen=True)
class StridedRows:
    """The first factor of a contraction as rows in memory.

    Attributes:
        at: the element at (values of the batch axes, row, column).
        stride: elements from one row to the next.
        dtype: of the elements.
    """

    at: Callable[[dict[Any, Expr], Expr, Expr], Any]
    stride: Expr
    dtype: str


def strided_rows(contraction: Contraction, m: Flattener, k: Flattener) -> StridedRows | None:
    """The first factor as rows with contiguous elements, or None where it is computed or scattered."""
    a = without_casts(contraction.a)
    if not isinstance(a, ir.TensorLoad) or not (m.is_linear(accesses_of(a)) and k.is_linear(accesses_of(a))):
        return None
    if not (has_only_loads_as_users(a, contraction.m) and has_only_loads_as_users(a, contraction.k)):
        return None
    stride = row_stride(lambda row, column: rewrite(a, {**m.at(row, True), **k.at(column, True)}))
    if stride is None or variables_of(stride) & {axis for axis, _ in contraction.batch}:
        return None

    def at(batch: dict[Any, Expr], row: Expr, column: Expr) -> Any:
        return rewrite(a, {**batch, **m.at(row, True), **k.at(column, True)})

    return StridedRows(at, stride, str(a.source.dtype))


def row_stride(element: Callable[[Expr, Expr], Any]) -> Expr | None:
    """Elements from one row to the next of a matrix with contiguous columns; None where they are not.

    Args:
        element: the load at (row, column).
    """
    row, column = tirx.Var("r", "int64"), tirx.Var("k", "int64")
    load, analyzer = element(row, column), Analyzer()
    found = list(detect_linear_equation(analyzer.simplify(flat_offset(load.source.shape, load.indices)), [row, column]))
    if len(found) != 3 or int_value(analyzer.simplify(found[1])) != 1:
        return None
    return as_index(analyzer.simplify(found[0]))


def product_kind(contraction: Contraction, packs_b: bool) -> str:
    """The kind of data for micro-kernels: the types of the factors where they lie, ``""`` when they are computed.

    Args:
        packs_b: the second factor is copied to panels, in the type in which the product is computed.
    """
    work = str(contraction.stage.buffer.dtype)
    a, b = _stored_type(contraction.a), work if packs_b else _stored_type(contraction.b)
    kinds = [SHORT.get(stored, "") for stored in (a, b)]
    if any(kind not in _FACTORS.get(work, ()) for kind in kinds):
        return ""
    return kinds[0] if kinds[0] == kinds[1] and work == "float32" else "*".join(kinds)


def without_casts(factor: Expr) -> Expr:
    """What a factor widens, in the form in which it lies in memory."""
    while isinstance(factor, tirx.Cast):
        factor = factor.value
    return factor.args[0] if _is_bfloat16_of_bits(factor) else factor


def _stored_type(factor: Expr) -> str:
    """Type of the elements in memory of a factor that is read and perhaps widened; ``""`` of any other."""
    while isinstance(factor, tirx.Cast):
        factor = factor.value
    stored = without_casts(factor)
    return dtype_of(factor) if isinstance(stored, ir.TensorLoad) else ""


def _is_bfloat16_of_bits(value: Expr) -> bool:
    """Whether ``value`` is a bfloat16 whose bits are kept as an integer, as buffers inside of functions hold them."""
    is_reinterpreted = isinstance(value, ir.Call) and getattr(value.op, "name", "") == "tirx.reinterpret"
    return is_reinterpreted and dtype_of(value) == "bfloat16"


def _as_words(values: list[Expr], call: Callable[[list[Expr]], Stmt]) -> Stmt:
    """``call`` with integers that keep their 64 bits: TVM narrows the arguments of a call that depend on loops only.

    They are read from memory, which LLVM turns into registers again.
    """
    if all(int_value(value) is not None for value in values):
        return call(values)

    def stored(words: Any) -> Stmt:
        writes = (store(words, [index(i)], as_index(value)) for i, value in enumerate(values))
        return sequence(*writes, call([load(words, index(i)) for i in range(len(values))]))

    return scratch([len(values)], "int64", stored, "words")


def pointer_to(element: Any, access: str, ahead: Expr | int = 0) -> Expr:
    """The address ``ahead`` elements behind ``element``, in a form that storage planning knows as an access."""
    if str(element.source.dtype) == "bfloat16":
        return tirx.address_of(tirx.BufferLoad(element.source, [*element.indices[:-1], element.indices[-1] + ahead]))
    return element.source.access_ptr(access, offset=flat_offset(element.source.shape, element.indices) + ahead)


class TileProducts:
    """The micro-kernels that a function calls, with their code."""

    def __init__(self, isa: InstructionSet, kind: str) -> None:
        self.isa = isa
        self.kind = kind
        self.used: dict[str, str] = {}

    @property
    def uses_tiles(self) -> bool:
        """Whether they multiply tile registers, which hold many rows."""
        return isinstance(self.isa.products[self.kind], TileProduct)

    def kernel(self, tile: Tile, sharing: int = 0) -> MicroKernel:
        """The micro-kernel of a tile; see :meth:`call` for ``sharing``."""
        return microkernel(self.isa, self.kind, tile.rows, tile.columns, sharing)

    def call(
        self, tile: Tile, a: Any, stride: Expr, b: Any, c: Any, depth: Expr, accumulate: Expr, wanted: Any, part: Expr,
        c_stride: Expr | None = None, sharing: int = 0, size: Expr | None = None,
    ) -> Stmt:  # fmt: skip
        """``c = a b`` or ``c += a b`` for a tile.

        Args:
            a, b, c: the elements at the beginnings of the rows, the panel and the result.
            stride: elements from one row of A to the next.
            accumulate: 1 to add to c, 0 to overwrite it.
            wanted: the element at the beginning of what will be read after the panel.
            part: which part of that to bring into the cache meanwhile; the tiles of a panel take one each.
            c_stride: elements from one row of the result to the next; the tile's columns when None.
            sharing: how many tiles a panel has; 0 when that is not known, or when it is in a cache already.
            size: elements of what will be read; parts beyond it are its last one, so that lines which are not wanted
                yet leave the cache to others. As many as were read when None.
        """
        kernel = self.kernel(tile, sharing)
        one = as_index(self.asked_for(kernel, depth))
        size = as_index(depth) * index(tile.columns) if size is None else size
        ahead = tirx.max(minimum(part * one, size - one), index(0))
        c_stride = index(tile.columns) if c_stride is None else c_stride
        return self.call_kernel(kernel, a, stride, b, c, c_stride, depth, accumulate, wanted, ahead)

    @staticmethod
    def asked_for(kernel: MicroKernel, depth: Expr) -> Expr:
        """How many elements of what will be read a kernel asks for while it computes ``depth``."""
        if not kernel.prefetch_depth:
            return index(0)
        steps = tirx.floordiv(as_index(depth), index(kernel.prefetch_depth))
        return steps * index(kernel.prefetch_lines * LINE_BYTES * 8 // BITS[kernel.b_dtype])

    def begin(self, kernel: MicroKernel, c: Any, c_stride: Expr, accumulate: Expr) -> Stmt:
        """Make the sums of a tile, in registers that :meth:`steps` adds to: zeros, or ``c`` if ``accumulate`` is 1."""
        name = self._phases(kernel).begin
        return self._call(name, [c_stride], lambda words: [pointer_to(c, "rw"), *words, accumulate])

    def steps(
        self, kernel: MicroKernel, a: Any, stride: Expr, b: Any, depth: Expr, wanted: Any, ahead: Expr
    ) -> Stmt:  # fmt: skip
        """Add to the sums of a tile; arguments are those of :meth:`call_kernel`."""

        def arguments(words: list[Expr]) -> list[Expr]:
            lda, length = words
            return [pointer_to(a, "r"), lda, pointer_to(b, "r"), length, pointer_to(wanted, "r", ahead)]

        return self._call(self._phases(kernel).steps, [stride, depth], arguments)

    def end(self, kernel: MicroKernel, c: Any, c_stride: Expr) -> Stmt:
        """Store the sums of a tile."""
        return self._call(self._phases(kernel).end, [c_stride], lambda words: [pointer_to(c, "rw"), *words])

    def _phases(self, kernel: MicroKernel) -> Phases:
        assert kernel.phases is not None
        self.used[kernel.name] = kernel.text
        return kernel.phases

    @staticmethod
    def _call(name: str, words: list[Expr], arguments: Callable[[list[Expr]], list[Expr]]) -> Stmt:
        return _as_words(words, lambda known: tirx.Evaluate(tirx.call_extern("int32", name, *arguments(known))))

    def call_kernel(
        self, kernel: MicroKernel, a: Any, stride: Expr, b: Any, c: Any, c_stride: Expr, depth: Expr, accumulate: Expr,
        wanted: Any, ahead: Expr, scales: Any = None, group: Expr | None = None,
    ) -> Stmt:  # fmt: skip
        """The call of one micro-kernel; other arguments than those of :meth:`call` are

        Args:
            ahead: how many elements behind ``wanted`` to begin to bring into the cache.
            scales: the element at the beginning of the panel's scales, for kernels that take them.
            group: consecutive k that share one.
        """
        self.used[kernel.name] = kernel.text

        def made(words: list[Expr]) -> Stmt:
            lda, ldc, steps, *group = words
            more = [pointer_to(scales, "r"), *group] if scales is not None else []
            return tirx.Evaluate(tirx.call_extern(
                "int32", kernel.name, pointer_to(a, "r"), lda, pointer_to(b, "r"), pointer_to(c, "rw"), ldc, steps,
                accumulate, pointer_to(wanted, "r", ahead), *more,
            ))  # fmt: skip

        return _as_words([stride, c_stride, depth, *([] if group is None else [group])], made)

    def transpose(self, a: Any, stride: Expr, rows: Expr, depth: Expr, b: Any, columns: Expr) -> Stmt:
        """Copy as many rows of ``depth`` words as a vector has lanes to columns of a panel.

        Args:
            a, b: the elements at the beginnings of the rows and of the columns, of 32 bits each.
            stride: elements from one row to the next.
            rows: at least 1; columns past the last row repeat it.
            depth: at least the lanes of a vector.
            columns: of the panel.
        """
        name, text = transposition(self.isa)
        self.used[name] = text

        def made(words: list[Expr]) -> Stmt:
            lda, held, length, ldb = words
            return tirx.Evaluate(
                tirx.call_extern("int32", name, pointer_to(a, "r"), lda, held, length, pointer_to(b, "w"), ldb)
            )

        return _as_words([stride, rows, depth, columns], made)

    def round(self, a: Any, b: Any, count: Expr) -> Stmt:
        """Round ``count`` vectors of numbers from the element ``a`` on to the bits of bfloat16 from ``b`` on."""
        name, text = rounding(self.isa)
        self.used[name] = text

        def made(words: list[Expr]) -> Stmt:
            return tirx.Evaluate(tirx.call_extern("int32", name, pointer_to(a, "r"), pointer_to(b, "w"), *words))

        return _as_words([count], made)

    def claim(self, element: Any) -> Stmt:
        """Ask for the line of ``element``, which will be written."""
        name, text = claiming()
        self.used[name] = text
        return tirx.Evaluate(tirx.call_extern("int32", name, pointer_to(element, "w")))

    def around(self, tile: Tile, body: Stmt) -> Stmt:
        """``body``, which calls kernels of one tile, with what the processor needs before and after in each thread."""
        kernel = microkernel(self.isa, self.kind, tile.rows, tile.columns)
        calls = [tirx.Evaluate(tirx.call_extern("int32", name)) for name in (kernel.setup, kernel.teardown) if name]
        return sequence(calls[0], body, calls[1]) if calls else body

    def link(self, body: Stmt) -> Stmt:
        """``body`` with the code of the kernels that it calls."""
        for text in self.used.values():
            body = tirx.AttrStmt(index(0), "pragma_import_llvm", ir.StringImm(text), body)
        return body
