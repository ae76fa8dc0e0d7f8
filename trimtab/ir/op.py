"""The declaration of ops: one class an op, from which accessors, checks, printer and parser are derived.

An op reads like a dataclass.  Annotations say what each field is::

    class LayerNorm(Op):
        x: Value                      # an operand
        weight: Value | None = None   # an optional operand
        bias: Value | None = None
        axes: int = 1                 # everything else is an attribute
        eps: float = 1e-5

        @staticmethod
        def reference(x, weight, bias, *, axes, eps):
            return F.layer_norm(x, x.shape[-axes:], weight, bias, eps)

``tuple[Value, ...]`` declares a variable number of operands and ``Graph`` a region.  ``reference``, written with
torch functions, is the one definition of what the op means: evaluation, autograd, type inference and differential
tests all use it.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from trimtab.errors import InternalError, Location, UsageError
from trimtab.ir.attributes import check_attribute
from trimtab.ir.core import Graph, Use, Value
from trimtab.ir.dims import Dim
from trimtab.ir.types import TensorType

OP_CLASSES: dict[str, type[Op]] = {}
"""Every op class by mnemonic."""

_OPERAND_KINDS = {"Value": "one", "Value | None": "optional", "tuple[Value, ...]": "many"}


class OperandField:
    """A declared operand: its name and whether there is one, at most one, or any number of it."""

    def __init__(self, name: str, kind: str, position: int) -> None:
        self.name = name
        self.kind = kind
        self.position = position

    def __get__(self, op: Op | None, owner: type[Op]) -> Any:
        if op is None:
            return self
        values = op._segment(self.position)
        if self.kind == "many":
            return values
        return values[0] if values else None

    def __set__(self, op: Op, value: object) -> None:
        raise InternalError("operands are changed with Op.set_operand", values={"op": op.name, "field": self.name})


class AttributeField:
    """A declared attribute, read-only on an instance: a pass that wants another value builds another op."""

    def __init__(self, name: str, default: Any) -> None:
        self.name = name
        self.default = default

    @property
    def is_required(self) -> bool:
        return self.default is _REQUIRED

    def __get__(self, op: Op | None, owner: type[Op]) -> Any:
        return self if op is None else op.attributes[self.name]

    def __set__(self, op: Op, value: object) -> None:
        raise InternalError(
            "attributes are fixed when an op is built",
            values={"op": op.name, "field": self.name},
            fix="build a new op, e.g. with Op.rebuilt",
        )


_REQUIRED: Any = object()


def _region_property(index: int) -> property:
    def region(op: Op) -> Graph:
        return op.regions[index]

    return property(region)


class Op:
    """Base of all ops. See the module's docstring for how to declare one.

    Args:
        *args, **kwargs: operands and attributes, in the order they are declared.

    The result types are inferred from the reference unless ``clone`` or the parser supplies them.
    """

    name: ClassVar[str] = ""
    """Mnemonic in the text form; by default the class name in snake case."""
    commutative: ClassVar[bool] = False
    """Whether the first two operands may be exchanged."""
    elementwise: ClassVar[bool] = False
    """Whether each result element depends only on the (broadcast) operand elements at the same index."""

    operand_fields: ClassVar[tuple[OperandField, ...]] = ()
    attribute_fields: ClassVar[dict[str, AttributeField]] = {}
    region_fields: ClassVar[tuple[str, ...]] = ()
    _hints: ClassVar[dict[str, Any] | None] = None

    # Set on every instance. Only annotations of subclasses declare fields.
    operands: tuple[Value, ...]
    attributes: dict[str, Any]
    results: tuple[Value, ...]
    regions: tuple[Graph, ...]
    location: Location | None
    graph: Graph | None
    made_by: str
    _previous: Op | None
    _next: Op | None
    _order: int

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        operands: list[OperandField] = list(cls.operand_fields)
        attributes: dict[str, AttributeField] = dict(cls.attribute_fields)
        regions: list[str] = list(cls.region_fields)
        for name, annotation in inspect.get_annotations(cls).items():
            text = str(annotation)
            if name.startswith("_") or text.startswith(("ClassVar", "typing.ClassVar")):
                continue
            if text in _OPERAND_KINDS:
                field = OperandField(name, _OPERAND_KINDS[text], len(operands))
                operands.append(field)
                setattr(cls, name, field)
            elif text == "Graph":
                regions.append(name)
                setattr(cls, name, _region_property(len(regions) - 1))
            else:
                attributes[name] = AttributeField(name, cls.__dict__.get(name, _REQUIRED))
                setattr(cls, name, attributes[name])
        cls.operand_fields, cls.attribute_fields, cls.region_fields = tuple(operands), attributes, tuple(regions)
        cls._hints = None
        if cls.__name__.startswith("_"):
            return  # an abstract family base
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=\d)(?=[A-Z][a-z])", "_", cls.__name__).lower()
        if cls.name in OP_CLASSES:
            raise InternalError("two op classes share a mnemonic", values={"name": cls.name})
        OP_CLASSES[cls.name] = cls

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound = self._bind(args, kwargs)
        groups: list[tuple[Value, ...]] = []
        for field in self.operand_fields:
            groups.append(self._operand_group(field, bound.get(field.name)))
        attributes = {}
        for name, declared in self.attribute_fields.items():
            if name in bound:
                attributes[name] = check_attribute(type(self).name, name, self._attribute_hints()[name], bound[name])
            elif declared.default is _REQUIRED:
                raise UsageError(f"{self.name} needs the attribute {name}")
            else:
                attributes[name] = declared.default
        self._setup(
            tuple(value for group in groups for value in group),
            tuple(len(group) for group in groups),
            attributes,
            tuple(bound[name] for name in self.region_fields),
        )
        self._infer_results()

    @staticmethod
    def reference(*operands: Any, **attributes: Any) -> Any:
        """What the op computes, as a pure torch function of its operands (None where optional and absent, a list
        where variable in number) and its attributes, in which dimensions are integers and dtypes torch dtypes."""
        raise InternalError("an op class has no reference")

    def verify(self) -> None:
        """Check what types alone do not say. Raise :class:`~trimtab.errors.VerificationError`."""

    def macs(self) -> Dim:
        """Multiply-accumulate operations, by the usual count: matrix products and convolutions; 0 for other ops."""
        return 0

    def infer(self) -> tuple[TensorType, ...]:
        """Result types, from the reference run on shapes alone."""
        from trimtab.ir.inference import infer_by_reference

        return infer_by_reference(self)

    # -- operands -----------------------------------------------------------------------------------------------

    def arguments(self) -> Iterator[tuple[OperandField, Value | tuple[Value, ...] | None]]:
        """Each declared operand with what it holds, in order."""
        for field in self.operand_fields:
            yield field, field.__get__(self, type(self))

    def set_operand(self, index: int, value: Value) -> None:
        """Make operand ``index`` (a position in ``operands``) read ``value``."""
        self._set_read(index, value)

    @property
    def result(self) -> Value:
        """The only result."""
        if len(self.results) != 1:
            raise InternalError(
                "an op with several results was used as one value",
                values={"op": self.name, "results": len(self.results)},
            )
        return self.results[0]

    def is_before(self, other: Op) -> bool:
        """Whether this op is executed before ``other``, an op of the same graph. Takes constant time."""
        if self.graph is None or self.graph is not other.graph:
            raise InternalError("ops of different graphs have no order", values={"ops": (self.name, other.name)})
        return self._order < other._order

    # -- copies -------------------------------------------------------------------------------------------------

    def clone(self, operands: Sequence[Value] | None = None, regions: Sequence[Graph] | None = None) -> Op:
        """The same op on other operands of the same types, not yet in a graph. Result types are taken over."""
        op: Op = object.__new__(type(self))
        op._setup(
            tuple(operands if operands is not None else self.operands),
            self._segments,
            self.attributes,
            tuple(regions if regions is not None else (region.copy() for region in self.regions)),
        )
        op.location, op.made_by = self.location, self.made_by
        op._make_results([value.type for value in self.results])
        return op

    def rebuilt(self, operands: Sequence[Value] | None = None, **attributes: Any) -> Op:
        """A new op of this class with some operands or attributes changed; result types are inferred afresh."""
        op: Op = object.__new__(type(self))
        checked = {
            name: check_attribute(self.name, name, self._attribute_hints()[name], value)
            for name, value in attributes.items()
        }
        op._setup(
            tuple(operands if operands is not None else self.operands),
            self._segments,
            {**self.attributes, **checked},
            tuple(region.copy() for region in self.regions),
        )
        op.location, op.made_by = self.location, self.made_by
        op._infer_results()
        return op

    @classmethod
    def from_parts(
        cls,
        groups: Mapping[str, Value | tuple[Value, ...] | None],
        attributes: Mapping[str, Any],
        regions: Sequence[Graph],
        result_types: Sequence[TensorType],
    ) -> Op:
        """Build an op with stated result types instead of inferred ones; the parser's way in."""
        op: Op = object.__new__(cls)
        unknown = set(attributes) - set(cls.attribute_fields)
        if unknown:
            raise UsageError(
                f"{cls.name} has no such attribute",
                values={"unknown": sorted(unknown), "known": list(cls.attribute_fields)},
            )
        filled = [op._operand_group(field, groups.get(field.name)) for field in cls.operand_fields]
        hints = cls._attribute_hints()
        complete = {}
        for name, declared in cls.attribute_fields.items():
            if name in attributes:
                complete[name] = check_attribute(cls.name, name, hints[name], attributes[name])
            elif declared.default is not _REQUIRED:
                complete[name] = declared.default
            else:
                raise UsageError(f"{cls.name} needs the attribute {name}")
        op._setup(tuple(v for group in filled for v in group), tuple(map(len, filled)), complete, tuple(regions))
        op._make_results(result_types)
        return op

    def __repr__(self) -> str:
        from trimtab.ir.printer import print_op

        return print_op(self)

    # -- internals ----------------------------------------------------------------------------------------------

    @classmethod
    def field_order(cls) -> list[str]:
        """Names of operands, then regions, then attributes: the order of positional arguments."""
        return [field.name for field in cls.operand_fields] + list(cls.region_fields) + list(cls.attribute_fields)

    @classmethod
    def _attribute_hints(cls) -> dict[str, Any]:
        if cls._hints is None:
            cls._hints = typing.get_type_hints(cls)
        return cls._hints

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        order = self.field_order()
        if len(args) > len(order):
            raise UsageError(f"{self.name} takes at most {len(order)} arguments", values={"given": len(args)})
        bound = dict(zip(order, args, strict=False))
        for name, value in kwargs.items():
            if name in bound or name not in order:
                raise UsageError(
                    f"{self.name} got an unknown or repeated argument", values={"argument": name, "known": order}
                )
            bound[name] = value
        missing = [name for name in self.region_fields if name not in bound]
        if missing:
            raise UsageError(f"{self.name} needs the regions {missing}")
        return bound

    def _operand_group(self, field: OperandField, given: Any) -> tuple[Value, ...]:
        group = () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)
        if (field.kind == "one" and len(group) != 1) or (field.kind == "optional" and len(group) > 1):
            raise UsageError(
                f"{self.name} needs {'a' if field.kind == 'one' else 'at most one'} value as {field.name}",
                values={"given": given},
            )
        for value in group:
            if not isinstance(value, Value):
                raise UsageError(f"{self.name} takes a Value as {field.name}", values={"given": repr(value)})
        return group

    def _setup(
        self,
        operands: tuple[Value, ...],
        segments: tuple[int, ...],
        attributes: dict[str, Any],
        regions: tuple[Graph, ...],
    ) -> None:
        self.operands = operands
        self._segments = segments
        self.attributes = attributes
        self.regions = regions
        self.location = None
        self.graph = None
        self.made_by = ""
        self._previous = self._next = None
        self._order = 0
        for index, value in enumerate(operands):
            value._add_use(Use(self, index))

    def _infer_results(self) -> None:
        try:
            types = self.infer()
        except Exception:
            # An op that does not come into being reads nothing: its operands must not list it as a user.
            for index, value in enumerate(self.operands):
                value._remove_use(Use(self, index))
            raise
        self._make_results(types)

    def _make_results(self, types: Sequence[TensorType]) -> None:
        self.results = tuple(Value(type, producer=self, index=index) for index, type in enumerate(types))

    def _segment(self, position: int) -> tuple[Value, ...]:
        start = sum(self._segments[:position])
        return self.operands[start : start + self._segments[position]]

    def _set_read(self, index: int, value: Value) -> None:
        self.operands[index]._remove_use(Use(self, index))
        self.operands = (*self.operands[:index], value, *self.operands[index + 1 :])
        value._add_use(Use(self, index))

    def _drop_reads(self) -> None:
        for index, value in enumerate(self.operands):
            value._remove_use(Use(self, index))
        self.operands = ()
        self._segments = (0,) * len(self._segments)
        for region in self.regions:
            region.set_outputs(())
            for op in reversed(region.ops):
                region.ops.remove(op)


ReferenceFunction = Callable[..., Any]


def op_class(name: str) -> type[Op] | None:
    """The op class with this mnemonic, or None."""
    import trimtab.ir.ops  # noqa: F401  the import declares all ops

    return OP_CLASSES.get(name)
