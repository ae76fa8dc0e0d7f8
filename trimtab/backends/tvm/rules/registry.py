"""The table of lowering rules and what rules are given.

A rule gets the op, a :class:`Scope` that turns dimensions into TIR expressions, and one argument per declared operand
(a :class:`Operand`, a list of them, or None).  It returns tensors of TE, or a finished ``PrimFunc`` for algorithms
that are loops by nature (scans, sorting, scattering).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import te, tirx

from trimtab.backends.tvm.codegen.expression import let
from trimtab.backends.tvm.codegen.loops import store
from trimtab.backends.tvm.codegen.machine import Machine
from trimtab.backends.tvm.layouts import NIBBLES, PLAIN, Layout
from trimtab.ir.dims import Dim, as_symbol, evaluate, symbols_of
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.types import TensorType

Expr = Any

_TVM_NAMES = {
    DType.F64: "float64", DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16", DType.I64: "int64",
    DType.I32: "int32", DType.I16: "int16", DType.I8: "int8", DType.U64: "uint64", DType.U32: "uint32",
    DType.U16: "uint16", DType.U8: "uint8", DType.BOOL: "bool",
}  # fmt: skip


def tvm_dtype(dtype: DType) -> str:
    """TVM's name of an element type. Raises ``KeyError`` for sub-byte types, which the capability check refuses."""
    return _TVM_NAMES[dtype]


def const(value: float | int | bool, dtype: str) -> Expr:
    """A constant of a TVM type."""
    return tirx.const(bool(value) if dtype == "bool" else value, dtype)


def i64(value: int) -> Expr:
    return tirx.const(value, "int64")


class Scope:
    """What a rule may ask about: the processor, and the dimensions of its PrimFunc as int64 variables."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.variables: dict[str, Any] = {}

    def dim(self, dim: Dim) -> Expr:
        """``dim`` as an int64 expression."""
        if isinstance(dim, int):
            return i64(dim)
        for symbol in symbols_of(dim):
            if symbol.name not in self.variables:
                self.variables[symbol.name] = tirx.Var(symbol.name, "int64")
        value = evaluate(dim, self.variables, {"min": tirx.min, "max": tirx.max})
        return i64(value) if isinstance(value, int) else value

    def dim_variable(self, name: str) -> Any:
        """The variable of a symbol by name."""
        return self.variables.setdefault(name, tirx.Var(name, "int64"))

    def free_symbols(self, types: Sequence[TensorType]) -> list[str]:
        """Symbols in use that no axis of ``types`` equals, so that they must be passed beside the tensors."""
        shown = {found.name for type in types for dim in type.shape if (found := as_symbol(dim)) is not None}
        return [name for name in self.variables if name not in shown]

    def shape(self, dims: Sequence[Dim]) -> list[Expr]:
        """Extents as int64 expressions."""
        return [self.dim(dim) for dim in dims]


@dataclass
class Operand:
    """A tensor a rule reads.

    Attributes:
        type: its type in the IR.
        shape: its extents.
        tensor: the TE tensor, None for a scalar constant.
        constant: the value when the operand is a constant fill.
        layout: how a weight is stored; one that is not plain is read by :meth:`packed` instead of by its own indices.
        order: where each axis lies in ``tensor`` when that holds the axes in another order; empty when not.
        starts: the index of the first element along each axis of ``tensor`` when that holds more; empty when not.
        steps: how far apart elements are along each axis of ``tensor``; empty where all are neighbours.
    """

    type: TensorType
    shape: list[Expr]
    tensor: Any = None
    constant: Expr | None = None
    layout: Layout = PLAIN
    order: tuple[int, ...] = ()
    starts: tuple[Expr, ...] = ()
    steps: tuple[int, ...] = ()

    @property
    def dtype(self) -> str:
        return tvm_dtype(self.type.dtype)

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __call__(self, *indices: Expr) -> Expr:
        """The element at ``indices``."""
        if self.constant is not None:
            return self.constant
        place = physical(indices, self.order)
        if self.steps:
            place = tuple(at if step == 1 else at * i64(step) for step, at in zip(self.steps, place, strict=True))
        if self.starts:
            place = tuple(start + index for start, index in zip(self.starts, place, strict=True))
        return self.tensor(*place) if isinstance(self.tensor, te.Tensor) else tirx.BufferLoad(self.tensor, list(place))

    def packed(self, row: Expr, column: Expr) -> Expr:
        """The element (row, column) of a matrix, however it is stored; 4-bit integers as ``int32``."""
        if self.layout.is_plain:
            return self(row, column)
        block, group = i64(self.layout.block), i64(self.layout.group)
        panel, within = tirx.floordiv(row, block), tirx.floormod(row, block)
        if self.layout.kind == "nibbles":
            half = tirx.floormod(tirx.floordiv(column, group), i64(NIBBLES))
            column = tirx.floordiv(column, group * i64(NIBBLES)) * group + tirx.floormod(column, group)
            byte = tirx.Cast("int32", self._in_panel(panel, within, column))
            code = tirx.bitwise_and(
                tirx.shift_right(byte, tirx.Cast("int32", half) * tirx.const(4, "int32")), tirx.const(15, "int32")
            )
            eight = tirx.const(8, "int32")
            return tirx.bitwise_xor(code, eight) - eight if self.layout.signed else code
        return self._in_panel(panel, within, column)

    def _in_panel(self, panel: Expr, within: Expr, column: Expr) -> Expr:
        """The stored element of a row of a panel."""
        group = i64(self.layout.group)
        if self.layout.group == 1:
            return self(panel, column, within)
        return self(panel, tirx.floordiv(column, group), within, tirx.floormod(column, group))

    def broadcast(self, indices: Sequence[Expr], shape: Sequence[Dim] | None = None) -> Expr:
        """The element that the result's ``indices`` read under numpy broadcasting.

        ``shape`` is the result's. Where that has size 1 too the index itself is used, because TVM fuses an
        elementwise stage only if it reads exactly where it writes.
        """
        if self.constant is not None:
            return self.constant
        skipped = len(indices) - self.rank
        own, sizes = list(indices)[skipped:], list(shape or ())[skipped:] or [0] * self.rank
        return self(*(
            i64(0) if dim == 1 and size != 1 else index
            for dim, size, index in zip(self.type.shape, sizes, own, strict=True)
        ))  # fmt: skip


def physical(indices: Sequence[Expr], order: tuple[int, ...]) -> tuple[Expr, ...]:
    """Indices in storage order: logical axis i is stored as axis ``order[i]``."""
    if not order:
        return tuple(indices)
    placed = list(indices)
    for axis, place in enumerate(order):
        placed[place] = indices[axis]
    return tuple(placed)


@dataclass
class Target:
    """A buffer that a loop rule fills; ``order`` as in :class:`Operand`."""

    type: TensorType
    shape: list[Expr]
    buffer: Any
    order: tuple[int, ...] = ()

    @property
    def dtype(self) -> str:
        return tvm_dtype(self.type.dtype)

    def store(self, indices: Sequence[Expr], value: Expr) -> Any:
        """A statement that writes one element."""
        return store(self.buffer, physical(indices, self.order), value)

    def load(self, *indices: Expr) -> Expr:
        """An element written before."""
        return tirx.BufferLoad(self.buffer, list(physical(indices, self.order)))


Result = Any
RuleFunction = Callable[..., Result]


@dataclass(frozen=True)
class Rule:
    """How one op class is lowered.

    Attributes:
        function: for ``loops`` rules, makes a statement from ``(op, scope, targets, *operands)``; else makes TE tensors
            from ``(op, scope, *operands)``.
        check: returns why this very op cannot be lowered, or "".
        loops: whether the function writes loops itself.
        absorbs_permute: whether operands may be read through a permutation or slice instead of being copied first.
        broadcasts: names of operands that are read by :meth:`Operand.broadcast`, so that what they were expanded from
            serves as well.
        reads_sub_byte: names of operands that may be of sub-byte types, where they are weights.
    """

    function: RuleFunction
    check: Callable[[Any], str] = field(default=lambda op: "")
    loops: bool = False
    absorbs_permute: bool = False
    broadcasts: tuple[str, ...] = ()
    reads_sub_byte: tuple[str, ...] = ()


_RULES: dict[type[Op], Rule] = {}


def _supported(op: Any) -> str:
    return ""


def lowers(
    *classes: type[Op],
    check: Callable[[Any], str] = _supported,
    absorbs_permute: bool = False,
    broadcasts: tuple[str, ...] = (),
    reads_sub_byte: tuple[str, ...] = (),
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule that makes TE tensors."""

    def register(function: RuleFunction) -> RuleFunction:
        for cls in classes:
            _RULES[cls] = Rule(function, check, absorbs_permute=absorbs_permute, broadcasts=broadcasts,
                               reads_sub_byte=reads_sub_byte)  # fmt: skip
        return function

    return register


def loops_for(
    *classes: type[Op],
    check: Callable[[Any], str] = _supported,
    absorbs_permute: bool = False,
    broadcasts: tuple[str, ...] = (),
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule that writes loops, for algorithms that are loops by nature (attention, scans, sorting)."""

    def register(function: RuleFunction) -> RuleFunction:
        for cls in classes:
            _RULES[cls] = Rule(function, check, loops=True, absorbs_permute=absorbs_permute, broadcasts=broadcasts)
        return function

    return register


def rule_for(op: Op) -> Rule | None:
    """The rule for an op, or None when its class has none."""
    return _RULES.get(type(op))


def compute(shape: Sequence[Expr], function: Callable[..., Expr], name: str, *, materialize: bool = False) -> Any:
    """A TE tensor; rank 0 included. ``materialize`` keeps the generator from recomputing it in its readers."""
    attributes = {"materialize": 1} if materialize else None
    return te.compute(tuple(shape), lambda *indices: function(*indices), name=name, attrs=attributes)


def work_type(dtype: str) -> str:
    """The type arithmetic is done in: half types compute in float32 and round once, as torch does."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def cast(value: Expr, dtype: str) -> Expr:
    """``value`` converted, unchanged when it has the type already."""
    return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)


def guarded(
    places: Sequence[Expr],
    extents: Sequence[Expr],
    read: Callable[[list[Expr]], Expr],
    otherwise: Expr,
    inside: Expr | None = None,
) -> Expr:
    """``read(places)`` where every place lies in ``0 .. extent - 1`` (and ``inside`` holds), else ``otherwise``.

    Both arms of a select are computed, so the places are clamped.  They are given names, because TVM's simplifier
    drops a clamp that the condition of the select around it implies.
    """
    tests = [tirx.And(at >= i64(0), at < extent) for at, extent in zip(places, extents, strict=True)]
    if inside is not None:
        tests.append(inside)
    condition = tests[0]
    for test in tests[1:]:
        condition = tirx.And(condition, test)

    def bind(position: int, bound: list[Expr]) -> Expr:
        if position == len(places):
            return tirx.Select(condition, read(bound), otherwise)
        clamped = tirx.max(i64(0), tirx.min(places[position], extents[position] - i64(1)))
        return let(clamped, lambda v: bind(position + 1, [*bound, v]), "place")

    return bind(0, [])
