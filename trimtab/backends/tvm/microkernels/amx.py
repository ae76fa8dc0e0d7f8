"""Micro-kernels for Intel AMX: tile registers of up to 16 rows of 64 bytes.

Eight tile registers hold ``row tiles x column tiles`` accumulators, one tile of A per 16 rows and the tiles of B.  A
tile of A is 16 rows of a step of the row-major matrix as it lies, a tile of B the same step of 16 packed columns.  The
number of rows in a tile is part of the configuration, which is why every number of rows has its own ``setup``.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.backends.tvm.microkernels.llvm_text import LINE_BYTES, Writer

TILE_ROWS = 16
ROW_BYTES = 64
REGISTERS = 8
FEW_TILES = 4
"""Tiles that take turns with a panel where their number is not known: if there are more, some ask for too much."""
# Linux lets a process use AMX only after it asked: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
_PERMITTED = "trimtab_amx_permitted"


@dataclass(frozen=True)
class TileProduct:
    """A tile instruction.

    Attributes:
        intrinsic: C += A * B on tile numbers.
        group: consecutive k interleaved in B.
    """

    a_dtype: str
    b_dtype: str
    c_dtype: str
    group: int
    features: tuple[str, ...]
    intrinsic: str
    parts: int = 1

    @property
    def depth_step(self) -> int:
        """Depth of a tile."""
        return TILE_ROWS * self.group


def row_tiles(rows: int) -> list[int]:
    """Rows in each tile of A."""
    return [min(TILE_ROWS, rows - start) for start in range(0, rows, TILE_ROWS)]


BEGIN_PARAMETERS = "ptr noalias %c, i64 %ldc, i32 %accumulate"
STEPS_PARAMETERS = "ptr noalias %a, i64 %lda, ptr noalias %b, i64 %depth, ptr %next"
END_PARAMETERS = "ptr noalias %c, i64 %ldc"


@dataclass(frozen=True)
class TileKernel:
    """The code of a tile of ``rows`` x ``columns`` in three phases, between which the tile registers keep the sums.

    Attributes:
        lines: of ``%next`` to ask for in each step, which reads as many lines of B as the tile has columns.
    """

    product: TileProduct
    rows: int
    columns: int
    lines: int

    def whole(self, f: Writer) -> None:
        """All phases: parameters as the vector kernels have them."""
        self.begin(f)
        self.steps(f)
        self.end(f)

    def begin(self, f: Writer) -> None:
        """Zero the sums or, if ``%accumulate`` is not 0, load them from ``%c``."""
        add, clear, start = f.fresh_labels("add", "clear", "start")
        f.do(f"br i1 {f.let('icmp ne i32 %accumulate, 0')}, label %{add}, label %{clear}")
        f.start_block(add)
        self._for_sums(f, "tileloadd64")
        f.do(f"br label %{start}")
        f.start_block(clear)
        for tile in range(self._sums):
            _tile_op(f, "tilezero", ("i8", str(tile)))
        f.do(f"br label %{start}")
        f.start_block(start)

    def steps(self, f: Writer) -> None:
        """Add the products of ``%depth`` to the sums.

        A is loaded with the hint not to keep it in the first-level cache: the next tile reads the same panel, which is
        to stay there, and these rows come back only with the next panel.
        """
        heights, widths = row_tiles(self.rows), range(self.columns // TILE_ROWS)
        a_tiles = range(self._sums, self._sums + len(heights))
        b_tiles = range(self._sums + len(heights), REGISTERS)
        a_stride = f.let(f"mul i64 %lda, {4 // self.product.group}")
        a_rows = [_row(f, "%a", a_stride, TILE_ROWS * i) for i in range(len(heights))]

        def step(state: list[str]) -> list[str]:
            a_offset, b, wanted = state
            for line in range(self.lines):
                f.prefetch(f.offset(wanted, line * LINE_BYTES))
            for j in widths:
                b_tile = b_tiles[j % len(b_tiles)]
                place = f.offset(b, ROW_BYTES * j)
                _tile_op(f, "tileloadd64", ("i8", str(b_tile)), ("ptr", place), ("i64", str(self.columns * 4)))
                for i, a_tile in enumerate(a_tiles):
                    if j == 0:
                        place = f.offset(a_rows[i], a_offset)
                        _tile_op(f, "tileloaddt164", ("i8", str(a_tile)), ("ptr", place), ("i64", a_stride))
                    numbers = (i * len(widths) + j, a_tile, b_tile)
                    _tile_op(f, self.product.intrinsic, *(("i8", str(number)) for number in numbers))
            a_next = f.let(f"add i64 {a_offset}, {ROW_BYTES}")
            return [a_next, f.offset(b, TILE_ROWS * self.columns * 4), f.offset(wanted, self.lines * LINE_BYTES)]

        count = f.let(f"sdiv exact i64 %depth, {self.product.depth_step}")
        f.loop(count, [("i64", "0"), ("ptr", "%b"), ("ptr", "%next")], step)

    def end(self, f: Writer) -> None:
        """Store the sums to ``%c``."""
        self._for_sums(f, "tilestored64")
        f.do("ret i32 0")

    @property
    def _sums(self) -> int:
        return len(row_tiles(self.rows)) * (self.columns // TILE_ROWS)

    def _for_sums(self, f: Writer, name: str) -> None:
        """The tile instruction ``name`` for every tile of sums and its place in C."""
        stride, across = f.let("mul i64 %ldc, 4"), self.columns // TILE_ROWS
        for i in range(len(row_tiles(self.rows))):
            row = _row(f, "%c", stride, TILE_ROWS * i)
            for j in range(across):
                place = ("ptr", f.offset(row, ROW_BYTES * j))
                _tile_op(f, name, ("i8", str(i * across + j)), place, ("i64", stride))


def _tile_op(f: Writer, name: str, *arguments: tuple[str, str]) -> None:
    f.call("void", f"llvm.x86.{name}", *arguments)


def _row(f: Writer, base: str, stride: str, row: int) -> str:
    return base if row == 0 else f.offset(base, f.let(f"mul i64 {stride}, {row}"))


def setup_text(f: Writer, rows: int, columns: int) -> str:
    """The body that asks for the permission once per process and loads the tile configuration, and its globals.

    The function returns 0, or the negated error number with which the system refused.
    """
    heights = row_tiles(rows)
    accumulators = [height for height in heights for _ in range(columns // TILE_ROWS)]
    tiles = [*accumulators, *heights]
    tiles += [TILE_ROWS] * (REGISTERS - len(tiles))
    row_bytes = b"".join(ROW_BYTES.to_bytes(2, "little") for _ in tiles)
    configuration = bytes([1, 0, *[0] * 14]) + row_bytes + bytes(16) + bytes(tiles) + bytes(8)
    text = "".join(f"\\{byte:02x}" for byte in configuration)
    f.do(f"%configuration = alloca [{len(configuration)} x i8], align 64")
    f.do(f'store [{len(configuration)} x i8] c"{text}", ptr %configuration, align 64')
    ask, configure, refused = f.fresh_labels("ask", "configure", "refused")
    known = f.let(f"load atomic i32, ptr @{_PERMITTED} monotonic, align 4")
    f.do(f"br i1 {f.let(f'icmp ne i32 {known}, 0')}, label %{configure}, label %{ask}")
    f.start_block(ask)
    status = f.let(
        'call i64 asm sideeffect "syscall", "={rax},{rax},{rdi},{rsi},~{rcx},~{r11},~{memory}"'
        f"(i64 {_SYS_ARCH_PRCTL}, i64 {_REQUEST_PERMISSION}, i64 {_TILE_DATA})"
    )
    granted = f.let(f"icmp eq i64 {status}, 0")
    f.do(f"store atomic i32 {f.let(f'zext i1 {granted} to i32')}, ptr @{_PERMITTED} monotonic, align 4")
    f.do(f"br i1 {granted}, label %{configure}, label %{refused}")
    f.start_block(refused)
    f.do(f"ret i32 {f.let(f'trunc i64 {status} to i32')}")
    f.start_block(configure)
    f.call("void", "llvm.x86.ldtilecfg", ("ptr", "%configuration"))
    f.do("ret i32 0")
    return f"@{_PERMITTED} = linkonce_odr global i32 0"


def teardown_text(f: Writer) -> None:
    """The body that gives the tile registers back, which makes context switches cheap again."""
    f.call("void", "llvm.x86.tilerelease")
    f.do("ret i32 0")
