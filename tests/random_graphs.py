"""Random well-typed modules, built from the declarations of the ops: what property tests run on.

An op class is drawn, its operands from the values there are, its attributes from their declared types.  What the op's
own inference and checks refuse is thrown away; what they accept is well typed by definition.  Basic ops are drawn more
often than others, and some ops repeat or undo earlier ones, so that there is something to clean up.

::

    @given(modules())
    def test_text_round_trip(module): ...
"""

from __future__ import annotations

import random
import typing
from collections.abc import Sequence
from typing import Any, Literal

import torch
from hypothesis import strategies as st

from trimtab.errors import TrimtabError
from trimtab.ir import OP_CLASSES, Builder, Dim, DType, Module, Op, TensorType, Value, ops, symbol
from trimtab.ir.interpreter import evaluate_op
from trimtab.ir.op import OperandField

BATCH = symbol("batch", 1, 8)
SHAPES: tuple[tuple[Dim, ...], ...] = (
    (BATCH, 4, 6),
    (4, 6),
    (6,),
    (BATCH, 1, 6),
    (1, 4, 6),
    (2, 3, 4),
    (BATCH, 4, 1),
    (),
)
DTYPES = (DType.F32,) * 6 + (DType.F64, DType.F16, DType.BF16, DType.I64, DType.I64, DType.I32, DType.BOOL, DType.BOOL)

_BASIC = (
    ops.Reshape, ops.Reshape, ops.Permute, ops.Permute, ops.Cast, ops.Add, ops.Sub, ops.Mul, ops.Div, ops.Neg, ops.Abs,
    ops.Relu, ops.Full, ops.Expand, ops.Slice, ops.Concat, ops.Linear, ops.Matmul, ops.Where, ops.LogicalNot,
    ops.Maximum, ops.Sum, ops.LayerNorm, ops.Softmax,
)  # fmt: skip
_LEFT_OUT = frozenset({"fused", "repeat", "opaque", "einsum"})
"""Ops whose attributes or regions are a language of their own; examples of them are tested elsewhere."""


@st.composite
def modules(draw: st.DrawFn, max_ops: int = 24) -> Module:
    """Modules of up to ``max_ops`` ops with one to three inputs and a few weights. They verify."""
    return random_module(draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, max_ops)))


def random_module(seed: int, size: int) -> Module:
    """The module of a seed: the same at every call."""
    return _Generator(random.Random(seed)).module(size)


class _Generator:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._build = Builder()
        self._values: list[Value] = []
        # Sorted, and without ops that tests declare, because which ones there are depends on what ran before.
        own = [cls for _, cls in sorted(OP_CLASSES.items()) if cls.__module__.startswith("trimtab.")]
        self._classes = [cls for cls in own if cls.name not in _LEFT_OUT]

    def module(self, size: int) -> Module:
        rng, build = self._rng, self._build
        self._values.append(build.input("x0", TensorType(DType.F32, SHAPES[0])))
        for index in range(1, rng.randint(1, 3)):
            self._values.append(build.input(f"x{index}", TensorType(rng.choice(DTYPES), rng.choice(SHAPES))))
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        for shape in ((6, 6), (6,), (4, 6), (6, 6)):
            data = torch.randn(shape, generator=generator)
            twin = rng.random() < 0.2
            self._values += [build.weight(f"w{i}", data.clone(), trainable=True) for i in range(1 + twin)]
        for number in (0.0, -0.0, 1.0):
            self._values.append(build.scalar(number, DType.F32))
        while len(build.graph.ops) < size + 3:
            self._grow()
        results = [value for op in build.graph.ops for value in op.results]
        unread = [value for value in results if not value.uses]
        outputs = list(dict.fromkeys([*rng.sample(unread, min(len(unread), 4)), rng.choice(results)]))
        build.output(*outputs)
        build.module.drop_unused_weights()
        return build.module

    def _grow(self) -> None:
        done = list(self._build.graph.ops)
        if self._rng.random() < 0.15:
            self._accept(self._rng.choice(done).clone)
            return
        newest: Value | None = None
        if self._rng.random() < 0.2 and done[-1].operand_fields:
            cls, newest = type(done[-1]), done[-1].results[0]
        else:
            cls = self._rng.choice(_BASIC) if self._rng.random() < 0.6 else self._rng.choice(self._classes)
        for _ in range(8):
            if self._accept(lambda: self._draw_op(cls, newest)):
                return

    def _accept(self, make: typing.Callable[[], Op]) -> bool:
        try:
            op = make()
        except TrimtabError:
            return False
        if not _is_usable(op):
            op._drop_reads()
            return False
        self._build.add(op)
        self._values += op.results
        return True

    def _draw_op(self, cls: type[Op], newest: Value | None) -> Op:
        """An op of this class, on the ``newest`` value if one is given: a chain such as permute of permute."""
        arguments: dict[str, Any] = {}
        first: Value | None = None
        for field in cls.operand_fields:
            drawn = self._draw_operand(field, first)
            arguments[field.name] = newest if first is None and newest is not None and field.kind == "one" else drawn
            held = arguments[field.name]
            first = first or (held[0] if isinstance(held, tuple) else held)
        hints = cls._attribute_hints()
        for name, declared in cls.attribute_fields.items():
            has_default = isinstance(declared.default, int | float | bool | str | tuple | None)
            if has_default and self._rng.random() < 0.5:
                continue
            arguments[name] = self._draw_attribute(name, hints[name], first, arguments)
        return cls(**arguments)

    def _draw_operand(self, field: OperandField, first: Value | None) -> Any:
        rng = self._rng
        if field.kind == "optional" and rng.random() < 0.5:
            return None
        # Ops of several operands mostly want one dtype, and often one shape.
        pool = self._values
        if first is not None and rng.random() < 0.8:
            pool = [v for v in pool if v.type.dtype is first.type.dtype]
        if first is not None and rng.random() < 0.3:
            pool = [v for v in pool if v.type == first.type]
        if "ind" in field.name:
            pool = [v for v in self._values if v.type.dtype in (DType.I64, DType.I32)] or pool
        if "condition" in field.name:
            pool = [v for v in self._values if v.type.dtype is DType.BOOL] or pool
        if field.name in ("y", "weight", "bias") and rng.random() < 0.3:
            pool = [v for v in self._values if v.is_weight]
        elif field.name == "y" and rng.random() < 0.4:
            pool = [v for v in self._values if isinstance(v.producer, ops.Full)]
        # The newest values come first to mind, so that graphs grow deep.
        recent = pool[-5:] if rng.random() < 0.6 else pool
        if field.kind != "many":
            return rng.choice(recent)
        return tuple(rng.choice(recent) for _ in range(rng.randint(1, 3)))

    def _draw_attribute(self, name: str, declared: Any, first: Value | None, drawn: dict[str, Any]) -> Any:
        rng = self._rng
        shape = first.type.shape if first is not None else ()
        rank = max(len(shape), 1)
        axis = drawn.get("dim", 0)
        size = shape[axis] if axis < len(shape) else 1
        match name:
            case "dim":
                return rng.randrange(rank)
            case "dims":
                axes = rng.sample(range(rank), rank)
                return tuple(axes if rng.random() < 0.6 else sorted(axes[: rng.randint(0, rank)]))
            case "shape":
                return self._draw_shape(first)
            case "shifts":
                return tuple(rng.randint(0, 2) for _ in range(len(drawn.get("dims", shape))))
            case "start" | "index":
                return rng.choice((0, 0, 1))
            case "stop":
                return rng.choice((size, size, 1, 2))
            case "sizes":
                return (size,) if rng.random() < 0.3 else (1, size - 1)
            case "before" | "after" | "repeats":
                return tuple(rng.choice((0, 0, 1) if name != "repeats" else (1, 1, 2)) for _ in shape)
        return self._draw_by_type(declared)

    def _draw_by_type(self, declared: Any) -> Any:
        rng = self._rng
        origin, options = typing.get_origin(declared), typing.get_args(declared)
        if origin is Literal:
            return rng.choice(options)
        if origin is tuple:
            count = rng.randint(1, 2) if Ellipsis in options else len(options)
            return tuple(self._draw_by_type(options[0]) for _ in range(count))
        if options:
            return self._draw_by_type(rng.choice(options))
        if declared is bool:
            return rng.random() < 0.5
        if declared is int:
            return rng.randint(0, 3)
        if declared is float:
            return rng.choice((0.0, -0.0, 1.0, 0.5, -2.0))
        return rng.choice(DTYPES) if declared is DType else None

    def _draw_shape(self, first: Value | None) -> Sequence[Dim]:
        """Another shape for the elements of ``first``, or a shape that it broadcasts to."""
        rng = self._rng
        if first is None:
            return rng.choice(SHAPES)
        shape = list(first.type.shape)
        place = rng.randint(0, len(shape))
        dim = shape[place] if place < len(shape) else 1
        choices: list[list[Dim]] = [
            shape,
            [*shape[:place], 1, *shape[place:]],
            [first.type.elements],
            [size for size in shape if size != 1],
            [2, *shape],
            [4 if size == 1 else size for size in shape],
            [BATCH, *shape],
        ]
        if isinstance(dim, int) and dim > 1 and dim % 2 == 0:
            choices.append([*shape[:place], 2, dim // 2, *shape[place + 1 :]])
        if place + 1 < len(shape):
            choices.append([*shape[:place], shape[place] * shape[place + 1], *shape[place + 2 :]])
        return rng.choice(choices)


def _is_usable(op: Op) -> bool:
    """Whether ``op`` passes its own checks, is small, and can be evaluated: torch infers shapes for some operands, such
    as shifted floats, that it then cannot compute."""
    sizes = {"batch": 3}
    try:
        op.verify()
        if any(value.type.bind(sizes).elements > 4096 for value in op.results):
            return False
        ones = [torch.ones(v.type.bind(sizes).shape, dtype=v.type.dtype.to_torch()) for v in op.operands]
        evaluate_op(op, ones, sizes)
    except TrimtabError:
        return False
    return True
