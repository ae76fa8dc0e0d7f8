"""A small writer of LLVM IR text: values get fresh names, loops get their phi nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

LINE_BYTES = 64
"""What a prefetch brings."""


class Writer:
    """Collects the body of one function and what it refers to.

    Values are passed around as text: ``%12``-like names or constants. Types are LLVM's (``<16 x float>``, ``ptr``).
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.declarations: set[str] = set()
        self._values = 0
        self._labels = 0
        self.block = self.start_block("entry")

    def let(self, instruction: str) -> str:
        """Append ``instruction`` and return the name of its result."""
        self._values += 1
        self.do(f"%v{self._values} = {instruction}")
        return f"%v{self._values}"

    def do(self, instruction: str) -> None:
        self.lines.append("  " + instruction)

    def start_block(self, label: str) -> str:
        self.block = label
        self.lines.append(f"{label}:")
        return label

    def fresh_labels(self, *stems: str) -> list[str]:
        self._labels += 1
        return [f"{stem}{self._labels}" for stem in stems]

    def call(self, result: str, function: str, *arguments: tuple[str, str]) -> str:
        """Call ``function`` with (type, value) arguments; an intrinsic is declared on its first use."""
        self.declare(result, function, *(type for type, _ in arguments))
        text = ", ".join(f"{type} {value}" for type, value in arguments)
        if result == "void":
            self.do(f"call void @{function}({text})")
            return ""
        return self.let(f"call {result} @{function}({text})")

    def declare(self, result: str, function: str, *types: str) -> None:
        if function.startswith("llvm."):
            self.declarations.add(f"declare {result} @{function}({', '.join(types)})")

    def offset(self, pointer: str, bytes: str | int) -> str:
        """``pointer + bytes``."""
        return pointer if bytes == 0 else self.let(f"getelementptr i8, ptr {pointer}, i64 {bytes}")

    def load(self, type: str, pointer: str, align: int) -> str:
        return self.let(f"load {type}, ptr {pointer}, align {align}")

    def store(self, type: str, value: str, pointer: str, align: int) -> None:
        self.do(f"store {type} {value}, ptr {pointer}, align {align}")

    def prefetch(self, pointer: str, level: int = 2, written: bool = False) -> None:
        """Ask for the line at ``pointer``, which need not be valid, to be brought to the cache of ``level``, 1 or 2.

        Args:
            written: ask for it as the only one who has it, to write to it.
        """
        numbers = (("i32", str(int(written))), ("i32", str(4 - level)), ("i32", "1"))
        self.call("void", "llvm.prefetch.p0", ("ptr", pointer), *numbers)

    def settle(self, type: str, values: list[str], constraint: str) -> None:
        """Have ``values`` computed before anything that comes later is loaded. No instruction is generated for it.

        Args:
            constraint: LLVM's letter for vector registers in inline assembly; only loads are ordered without one.
        """
        kept = values if constraint else []
        constraints = ",".join([*[constraint] * len(kept), "~{memory}"])
        arguments = ", ".join(f"{type} {value}" for value in kept)
        self.do(f'call void asm sideeffect "", "{constraints}"({arguments})')

    def splat(self, lanes: int, type: str, value: str) -> str:
        """A vector with ``value`` in every lane."""
        one = self.let(f"insertelement <{lanes} x {type}> poison, {type} {value}, i64 0")
        return self.let(f"shufflevector <{lanes} x {type}> {one}, <{lanes} x {type}> poison, "
                        f"<{lanes} x i32> zeroinitializer")  # fmt: skip

    def integers(self, lanes: int, pointer: str, signed: bool) -> str:
        """A vector of f32 from as many bytes at ``pointer``."""
        narrow = self.load(f"<{lanes} x i8>", pointer, 1)
        wide = self.let(f"{'sext' if signed else 'zext'} <{lanes} x i8> {narrow} to <{lanes} x i32>")
        return self.let(f"sitofp <{lanes} x i32> {wide} to <{lanes} x float>")

    def loop(
        self, count: str, state: Sequence[tuple[str, str]], body: Callable[[list[str]], Sequence[str]]
    ) -> list[str]:
        """Run ``body`` ``count`` times (an i64, possibly 0).

        Args:
            state: type and first value of what goes from one iteration to the next, in registers.
            body: next values from the current ones.

        Returns:
            The values after the last iteration.
        """
        before = self.block
        top, end = self.fresh_labels("loop", "after")
        some = self.let(f"icmp sgt i64 {count}, 0")
        self.do(f"br i1 {some}, label %{top}, label %{end}")
        self.start_block(top)
        place = len(self.lines)
        names = []
        for _ in state:
            self._values += 1
            names.append(f"%v{self._values}")
        done = self.let("phi i64")  # completed below, when the last block of the body is known
        following = list(body(names))
        done_next = self.let(f"add nuw nsw i64 {done}, 1")
        more = self.let(f"icmp slt i64 {done_next}, {count}")
        latch = self.block
        self.do(f"br i1 {more}, label %{top}, label %{end}")
        phis = [
            f"  {name} = phi {type} [ {first}, %{before} ], [ {next}, %{latch} ]"
            for name, (type, first), next in zip(names, state, following, strict=True)
        ]
        counter = f"  {done} = phi i64 [ 0, %{before} ], [ {done_next}, %{latch} ]"
        self.lines[place : place + 1] = [*phis, counter]
        self.start_block(end)
        return [
            self.let(f"phi {type} [ {first}, %{before} ], [ {next}, %{latch} ]")
            for (type, first), next in zip(state, following, strict=True)
        ]

    def function(self, signature: str, attributes: str) -> str:
        """The definition, e.g. for signature ``i32 @f(ptr %a)``; one text may define it in several modules."""
        return "\n".join([f"define linkonce_odr {signature} {attributes} {{", *self.lines, "}"])
