"""Micro-kernels on vector registers: accumulators are phi nodes of the loop over the depth, so they stay in registers."""

from __future__ import annotations

from trimtab.backends.tvm.microkernels.llvm_text import Writer
from trimtab.backends.tvm.microkernels.products import BITS, NibbleProduct, Product


class VectorKernel:
    """Generates the body of one kernel of ``rows`` by ``vectors`` registers of accumulators.

    The signature's names are ``%a %lda %b %c %ldc %depth %accumulate`` and, for 4-bit weights, ``%scales``.

    Args:
        sets: copies of the accumulators, which take turns along the depth and are added in the end. More than one keeps
            the multiply-add units busy when a tile is small.
        unroll: steps in an iteration, a multiple of ``sets``.
    """

    def __init__(self, product: Product, lanes: int, rows: int, vectors: int, sets: int, unroll: int) -> None:
        self.product, self.lanes, self.rows, self.vectors, self.sets = product, lanes, rows, vectors, sets
        self.unroll = unroll
        self.type = f"<{lanes} x {'float' if product.c_dtype == 'f32' else 'i32'}>"
        self.f = Writer()

    def generate(self) -> Writer:
        f, p = self.f, self.product
        stride = f.let(f"mul i64 %lda, {BITS[p.a_dtype] // 8}")
        self.a_rows = ["%a", *(f.offset("%a", f.let(f"mul i64 {stride}, {row}")) for row in range(1, self.rows))]
        if isinstance(p, NibbleProduct):
            sums = self._scaled_groups(p)
        else:
            steps = f.let(f"sdiv exact i64 %depth, {p.group}")
            sums, _, _ = self._accumulate(steps, "0", "%b")
        self._write(sums)
        return f

    def _accumulate(self, steps: str, a_offset: str, b: str) -> tuple[list[str], str, str]:
        """Sums over ``steps`` steps from an offset in each row of A and a place in B; both are returned advanced."""
        f, size = self.f, self.rows * self.vectors
        state = [("i64", a_offset), ("ptr", b), *[(self.type, "zeroinitializer")] * (size * self.sets)]

        def iteration(count: int) -> None:
            def body(values: list[str]) -> list[str]:
                a_offset, b, *sums = values
                for step in range(count):
                    first = step % self.sets * size
                    sums[first : first + size] = self._step(a_offset, b, step, sums[first : first + size])
                width = self.vectors * self.lanes * self.product.b_bytes
                return [f.let(f"add i64 {a_offset}, {count * self.product.a_bytes}"), f.offset(b, count * width), *sums]

            return body

        if self.unroll > 1:
            main = f.let(f"sdiv i64 {steps}, {self.unroll}")
            values = f.loop(main, state, iteration(self.unroll))
            state = [(type, value) for (type, _), value in zip(state, values, strict=True)]
            steps = f.let(f"srem i64 {steps}, {self.unroll}")
        a_offset, b, *sums = f.loop(steps, state, iteration(1))
        add = "fadd" if self.product.c_dtype == "f32" else "add"
        total = sums[:size]
        for first in range(size, len(sums), size):
            total = [f.let(f"{add} {self.type} {x}, {y}") for x, y in zip(total, sums[first:], strict=False)]
        return total, a_offset, b

    def _step(self, a_offset: str, b: str, step: int, sums: list[str]) -> list[str]:
        f, p, lanes = self.f, self.product, self.lanes
        step_bytes = self.vectors * lanes * p.b_bytes
        b_parts = [
            p.load_b(f, lanes, f.offset(b, step * step_bytes + vector * lanes * p.b_bytes))
            for vector in range(self.vectors)
        ]
        result = []
        for row, place in enumerate(self.a_rows):
            a_parts = p.load_a(f, lanes, f.offset(f.offset(place, a_offset), step * p.a_bytes))
            for vector in range(self.vectors):
                sum = sums[row * self.vectors + vector]
                for a, b in zip(a_parts, b_parts[vector], strict=True):
                    sum = p.multiply_add(f, lanes, sum, a, b)
                result.append(sum)
        return result

    def _write(self, sums: list[str]) -> None:
        f = self.f
        stride = f.let("mul i64 %ldc, 4")
        rows = ["%c", *(f.offset("%c", f.let(f"mul i64 {stride}, {row}")) for row in range(1, self.rows))]
        places = [f.offset(row, vector * self.lanes * 4) for row in rows for vector in range(self.vectors)]
        add, overwrite = f.fresh_labels("add", "overwrite")
        f.do(f"br i1 {f.let('icmp ne i32 %accumulate, 0')}, label %{add}, label %{overwrite}")
        f.start_block(add)
        operation = "fadd" if self.product.c_dtype == "f32" else "add"
        for place, value in zip(places, sums, strict=True):
            f.store(self.type, f.let(f"{operation} {self.type} {value}, {f.load(self.type, place, 4)}"), place, 4)
        f.do("ret i32 0")
        f.start_block(overwrite)
        for place, value in zip(places, sums, strict=True):
            f.store(self.type, value, place, 4)
        f.do("ret i32 0")
