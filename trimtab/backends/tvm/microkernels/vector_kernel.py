"""Micro-kernels on vector registers: the accumulators are phi nodes of the loop over the depth, so they stay there."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.backends.tvm.microkernels.isa import InstructionSet
from trimtab.backends.tvm.microkernels.llvm_text import LINE_BYTES, Writer
from trimtab.backends.tvm.microkernels.products import BITS, DotProduct, Product, ScaledProduct

AHEAD_BYTES = 2048
"""How far ahead of where it reads a kernel asks for lines: as long as memory takes, and they stay in the cache."""
SCALE_BYTES = 4
SUM_DEPTH = 384
"""Products of f32 that are added up before their sum is added to the result. The error of a sum grows with the root of
its length; so that of 3072 products grows as that of 384 and of 8."""
PARTS = 2
"""Places of a panel that are read at a time, for one row."""


class VectorKernel:
    """Generates the body of one kernel of ``rows`` by ``vectors`` registers of results.

    Its parameters are ``%a %lda %b %c %ldc %depth %accumulate %next`` and, for integers with scales, ``%scales`` and
    ``%group``.

    Args:
        isa: the instruction set.
        product: how it multiplies.
        sets: copies of the accumulators, which take turns along the depth and are added in the end. More than one keeps
            the multiply-add units busy when a tile is small.
        unroll: steps in an iteration of the loop over the depth, a multiple of ``sets``.
        lines: how many lines of ``%next`` an iteration of more than one step asks for.
        alone: the kernel is for the only tile of a panel, which then comes from memory and not from a cache. It asks
            for the lines ``AHEAD_BYTES`` ahead of where it reads, instead of for ``%next``. For one row it reads
            ``PARTS`` parts of the depth side by side, because memory is faster where several places are read at a time;
            with more rows the parts drive each other out of the first-level cache. Integers with scales are read in one
            place: what they are waiting for is mostly their conversion.
    """

    def __init__(
        self,
        isa: InstructionSet,
        product: Product,
        rows: int,
        vectors: int,
        sets: int = 1,
        unroll: int = 1,
        lines: int = 1,
        alone: bool = False,
    ) -> None:
        lanes = isa.lanes
        self.product, self.lanes, self.rows, self.columns = product, lanes, rows, vectors * lanes
        self.constraint = isa.register_constraint
        self.sets, self.unroll, self.lines, self.alone = sets, unroll, lines, alone
        self.parts = PARTS if alone and rows == 1 and not isinstance(product, ScaledProduct) else 1
        self.type = f"<{lanes} x {'float' if product.c_dtype == 'f32' else 'i32'}>"
        self.add = "fadd" if product.c_dtype == "f32" else "add"
        self.span = lanes // product.rows_at_once  # columns of an accumulator
        self.accumulators = -(-rows // product.rows_at_once) * (self.columns // self.span)
        self.f = Writer()

    def generate(self) -> Writer:
        """The function's body, from its parameters to its return."""
        f, p = self.f, self.product
        stride = f.let(f"mul i64 %lda, {BITS[p.a_dtype] // 8}")
        self.a_rows = ["%a", *(f.offset("%a", f.let(f"mul i64 {stride}, {row}")) for row in range(1, self.rows))]
        if isinstance(p, ScaledProduct):
            self._write(self._by_row(self._scaled_groups(p)), "%accumulate")
        elif p.a_dtype == "f32" and not self.alone:
            self._add_sums(f.let(f"sdiv exact i64 %depth, {p.group}"))
        else:
            first = self._row_corrections(p) if isinstance(p, DotProduct) and p.toggles_b else None
            sums, _ = self._accumulate(f.let(f"sdiv exact i64 %depth, {p.group}"), ["0", "%b", "%next"], first)
            self._write(self._by_row(sums), "%accumulate")
        f.do("ret i32 0")
        return f

    def _add_sums(self, steps: str) -> None:
        """Store or add the sums over every `SUM_DEPTH` of the depth."""
        f, part = self.f, SUM_DEPTH // self.product.group

        def body(values: list[str]) -> list[str]:
            *places, left, accumulate = values
            now = f.let(f"select i1 {f.let(f'icmp slt i64 {left}, {part}')}, i64 {left}, i64 {part}")
            sums, places = self._accumulate(now, places)
            self._write(self._by_row(sums), accumulate)
            return [*places, f.let(f"sub i64 {left}, {now}"), "1"]

        count = f.let(f"sdiv i64 {f.let(f'add i64 {steps}, {part - 1}')}, {part}")
        once = f.let(f"select i1 {f.let(f'icmp slt i64 {count}, 1')}, i64 1, i64 {count}")
        start = [("i64", "0"), ("ptr", "%b"), ("ptr", "%next"), ("i64", steps), ("i32", "%accumulate")]
        f.loop(once, start, body)

    def _accumulate(self, steps: str, places: list[str], first: list[str] | None = None) -> tuple[list[str], list[str]]:
        """Accumulators after ``steps`` steps, and the places where the steps ended.

        Args:
            places: bytes from the start of each row of A, a pointer into the panel, and the next line to prefetch.
            first: what the accumulators start from instead of 0.
        """
        f, size = self.f, self.accumulators
        zeros = ["zeroinitializer"] * size
        values = [*places, *(first or zeros), *zeros * (self.sets - 1)]
        types = ["i64", "ptr", "ptr", *[self.type] * (size * self.sets)]

        def iteration(count: int) -> Callable[[list[str]], list[str]]:
            def body(values: list[str]) -> list[str]:
                a_offset, b, wanted, *sums = values
                if self.alone and count > 1:
                    for line in range(0, count * self.columns * self.product.b_bytes, LINE_BYTES):
                        f.prefetch(f.offset(b, AHEAD_BYTES + line))
                elif count > 1:
                    for _ in range(self.lines):
                        f.prefetch(wanted)
                        wanted = f.offset(wanted, LINE_BYTES)
                for step in range(count):
                    place = step % self.sets * size
                    sums[place : place + size] = self._step(a_offset, b, step, sums[place : place + size])
                a_next = f.let(f"add i64 {a_offset}, {count * self.product.a_bytes}")
                return [a_next, f.offset(b, count * self.columns * self.product.b_bytes), wanted, *sums]

            return body

        if self.parts > 1:
            values, steps = self._accumulate_parts(steps, list(zip(types, values, strict=True)))
        elif self.unroll > 1:
            values = f.loop(f.let(f"sdiv i64 {steps}, {self.unroll}"), list(zip(types, values, strict=True)),
                            iteration(self.unroll))  # fmt: skip
            steps = f.let(f"srem i64 {steps}, {self.unroll}")
        a_offset, b, wanted, *sums = f.loop(steps, list(zip(types, values, strict=True)), iteration(1))
        while len(sums) > size:
            half = len(sums) // 2
            sums = [f.let(f"{self.add} {self.type} {x}, {y}") for x, y in zip(sums[:half], sums[half:], strict=True)]
        return sums, [a_offset, b, wanted]

    def _accumulate_parts(self, steps: str, state: list[tuple[str, str]]) -> tuple[list[str], str]:
        """The state of the loop after equal parts of the depth, taken side by side, and the number of steps left."""
        f, size, p = self.f, self.accumulators, self.product
        iterations = f.let(f"sdiv i64 {steps}, {self.unroll * self.parts}")
        part = f.let(f"mul i64 {iterations}, {self.unroll}")
        a_parts, b_parts = (
            ["0", *(f.let(f"mul i64 {part}, {number * bytes}") for number in range(1, self.parts))]
            for bytes in (p.a_bytes, self.columns * p.b_bytes)
        )
        span = self.unroll * self.columns * p.b_bytes

        def body(values: list[str]) -> list[str]:
            a_offset, b, wanted, *sums = values
            for number, (a_part, b_part) in enumerate(zip(a_parts, b_parts, strict=True)):
                a, panel = f.let(f"add i64 {a_offset}, {a_part}"), f.offset(b, b_part)
                for line in range(0, span, LINE_BYTES):
                    f.prefetch(f.offset(panel, AHEAD_BYTES + line))
                first = number % self.sets * size
                place = slice(first, first + size)
                for step in range(self.unroll):
                    sums[place] = self._step(a, panel, step, sums[place])
            return [f.let(f"add i64 {a_offset}, {self.unroll * p.a_bytes}"), f.offset(b, span), wanted, *sums]

        a_offset, b, *others = f.loop(iterations, state, body)
        done = f.let(f"mul i64 {part}, {self.parts}")
        after = [f.let(f"add i64 {a_offset}, {a_parts[-1]}"), f.offset(b, b_parts[-1]), *others]
        return after, f.let(f"sub i64 {steps}, {done}")

    def _step(self, a_offset: str, b: str, step: int, sums: list[str]) -> list[str]:
        """The accumulators after one step, the ``step``-th from the given places."""
        f, p, lanes = self.f, self.product, self.lanes
        starts = range(step * self.columns, (step + 1) * self.columns, self.span)
        b_parts = [p.load_b(f, lanes, f.offset(b, column * p.b_bytes)) for column in starts]
        result: list[str] = []
        for first in range(0, self.rows, p.rows_at_once):
            rows = [min(first + i, self.rows - 1) for i in range(p.rows_at_once)]
            places = [f.offset(f.offset(self.a_rows[row], a_offset), step * p.a_bytes) for row in rows]
            a_parts = p.load_a(f, lanes, *places)
            for b_part in b_parts:
                sum = sums[len(result)]
                for x, y in zip(a_parts, b_part, strict=True):
                    sum = p.multiply_add(f, lanes, sum, x, y)
                result.append(sum)
            # Else LLVM loads for many rows and steps at once, and has to put some of it on the stack.
            f.settle(self.type, result[-len(b_parts) :], self.constraint)
        return result

    def _row_corrections(self, product: DotProduct) -> list[str]:
        """-128 times the sum of each row of A, in every accumulator of the row: its products with ones are added up."""
        f, lanes, width = self.f, self.lanes, self.lanes * 4
        ones = "splat (i8 1)"

        def whole(values: list[str]) -> list[str]:
            offset, *sums = values
            loaded = [f.load(product.operand, f.offset(row, offset), 1) for row in self.a_rows]
            added = [product.multiply_add(f, lanes, sum, a, ones) for sum, a in zip(sums, loaded, strict=True)]
            return [f.let(f"add i64 {offset}, {width}"), *added]

        def group(values: list[str]) -> list[str]:
            offset, *sums = values
            added = []
            for sum, row in zip(sums, self.a_rows, strict=True):
                word = f.load("i32", f.offset(row, offset), 1)
                lane = f.let(f"insertelement <{lanes} x i32> zeroinitializer, i32 {word}, i64 0")
                a = f.let(f"bitcast <{lanes} x i32> {lane} to {product.operand}")
                added.append(product.multiply_add(f, lanes, sum, a, ones))
            return [f.let(f"add i64 {offset}, {product.group}"), *added]

        types = ["i64", *[self.type] * self.rows]
        values = ["0", *["zeroinitializer"] * self.rows]
        values = f.loop(f.let(f"sdiv i64 %depth, {width}"), list(zip(types, values, strict=True)), whole)
        rest = f.let(f"sdiv i64 {f.let(f'srem i64 %depth, {width}')}, {product.group}")
        _, *sums = f.loop(rest, list(zip(types, values, strict=True)), group)
        result: list[str] = []
        for sum in sums:
            total = f.call("i32", f"llvm.vector.reduce.add.v{lanes}i32", (self.type, sum))
            spread = f.splat(lanes, "i32", f.let(f"mul i32 {total}, -128"))
            result += [spread] * (self.columns // lanes)
        return result

    def _scaled_groups(self, product: ScaledProduct) -> list[str]:
        """Accumulators with the sum over each group of k multiplied by its scales."""
        f, lanes = self.f, self.lanes
        vectors = self.columns // lanes
        steps = f.let(f"sdiv exact i64 %group, {product.group}")

        def group(values: list[str]) -> list[str]:
            places, scales, totals = values[:3], values[3], values[4:]
            if self.alone:
                for line in range(0, self.columns * SCALE_BYTES, LINE_BYTES):
                    f.prefetch(f.offset(scales, AHEAD_BYTES // 4 + line), level=1)
            sums, places = self._accumulate(steps, places)
            starts = range(0, vectors * lanes * SCALE_BYTES, lanes * SCALE_BYTES)
            factors = [f.load(self.type, f.offset(scales, start), 4) for start in starts]
            totals = [
                f.call(self.type, f"llvm.fmuladd.v{lanes}f32", *((self.type, x) for x in (sum, scale, total)))
                for sum, scale, total in zip(sums, factors * self.rows, totals, strict=True)
            ]
            return [*places, f.offset(scales, self.columns * SCALE_BYTES), *totals]

        start = [("i64", "0"), ("ptr", "%b"), ("ptr", "%next"), ("ptr", "%scales")]
        start += [(self.type, "zeroinitializer")] * self.accumulators
        _, _, _, _, *totals = f.loop(f.let("sdiv exact i64 %depth, %group"), start, group)
        return totals

    def _by_row(self, sums: list[str]) -> list[str]:
        """The results as ``rows`` x ``vectors`` registers, row after row."""
        if self.product.rows_at_once == 1:
            return sums
        # Each pair of 2 x 2 accumulators holds four columns of two rows.
        across = self.columns // self.span
        result: list[str] = []
        for row in range(self.rows):
            lanes = ("i32 0, i32 1, i32 4, i32 5", "i32 2, i32 3, i32 6, i32 7")[row % 2]
            block = sums[row // 2 * across : (row // 2 + 1) * across]
            result += [
                self.f.let(f"shufflevector {self.type} {x}, {self.type} {y}, <4 x i32> <{lanes}>")
                for x, y in zip(block[::2], block[1::2], strict=True)
            ]
        return result

    def _write(self, results: list[str], accumulate: str) -> None:
        """Store the results, or add them where ``accumulate`` is not 0."""
        f = self.f
        stride = f.let("mul i64 %ldc, 4")
        rows = ["%c", *(f.offset("%c", f.let(f"mul i64 {stride}, {row}")) for row in range(1, self.rows))]
        places = [f.offset(row, column * 4) for row in rows for column in range(0, self.columns, self.lanes)]
        add, overwrite, written = f.fresh_labels("add", "overwrite", "written")
        f.do(f"br i1 {f.let(f'icmp ne i32 {accumulate}, 0')}, label %{add}, label %{overwrite}")
        f.start_block(add)
        for place, value in zip(places, results, strict=True):
            sum = f.let(f"{self.add} {self.type} {value}, {f.load(self.type, place, 4)}")
            f.store(self.type, sum, place, 4)
        f.do(f"br label %{written}")
        f.start_block(overwrite)
        for place, value in zip(places, results, strict=True):
            f.store(self.type, value, place, 4)
        f.do(f"br label %{written}")
        f.start_block(written)
