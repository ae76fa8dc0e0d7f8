"""What an operator's handler sees of its node: inputs, typed attributes, known content, and refusals in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import onnx_ir

from trimtab.errors import ImportModelError, Location, UnsupportedOpError
from trimtab.frontend.onnx.emitter import Emitter
from trimtab.frontend.onnx.initializers import StoredTensor
from trimtab.frontend.onnx.symbolic_folding import SymbolicArray
from trimtab.ir.attributes import shortest_float
from trimtab.ir.core import Value
from trimtab.ir.dims import Dim
from trimtab.ir.dtypes import DType
from trimtab.ir.op import Op
from trimtab.ir.ops import Cast, Reshape

if TYPE_CHECKING:
    import torch

_REQUIRED: Any = object()


class UseDefinition(Exception):
    """A handler leaves this form of its operator to the body by which the standard defines it."""

    def __init__(self, refusal: UnsupportedOpError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class Node:
    """A node during its import.

    Attributes:
        op: operator name; ``domain`` and ``version`` (of the opset that defines it) complete it.
        inputs: the values read; None where an optional input is absent.
        outputs: for each output whether something reads it.
        location: where the node came from.
    """

    def __init__(
        self,
        emitter: Emitter,
        source: onnx_ir.Node,
        version: int,
        inputs: Sequence[Value | None],
        attributes: dict[str, onnx_ir.Attr],
        location: Location,
    ) -> None:
        self.emitter = emitter
        self.op = source.op_type
        self.version = version
        self.inputs = tuple(inputs)
        self.outputs = tuple(bool(value.name) for value in source.outputs)
        self.location = location
        self.name = source.name or ""
        self._attributes = attributes
        self._read: set[str] = set()

    # -- building -----------------------------------------------------------------------------------------------

    def emit(self, op: Op) -> Value:
        """Add an op with one result."""
        return self.emitter.emit(op)

    def emit_all(self, op: Op) -> tuple[Value, ...]:
        """Add an op with several results."""
        return self.emitter.emit_all(op)

    def scalar(self, value: float | int | bool, like: Value | DType) -> Value:
        """A constant of shape ``[]``, in the dtype of ``like``."""
        return self.emitter.scalar(value, like if isinstance(like, DType) else like.type.dtype)

    def cast(self, value: Value, dtype: DType) -> Value:
        """``value`` in another dtype; itself when it has that dtype."""
        return value if value.type.dtype is dtype else self.emit(Cast(value, dtype=dtype))

    def reshape(self, value: Value, shape: Sequence[Dim]) -> Value:
        """``value`` in another shape; itself when it has that shape."""
        return value if value.type.shape == tuple(shape) else self.emit(Reshape(value, shape=tuple(shape)))

    # -- inputs -------------------------------------------------------------------------------------------------

    def input(self, index: int) -> Value:
        """Input ``index``, which the operator requires."""
        value = self.optional(index)
        if value is None:
            raise ImportModelError(
                f"{self.op} lacks an input",
                values={"input": index, "given": len(self.inputs)},
                rule="the operator requires it",
                fix="export the model again",
                where=self.where,
                location=self.location,
            )
        return value

    def optional(self, index: int) -> Value | None:
        """Input ``index``, or None where it is absent."""
        return self.inputs[index] if index < len(self.inputs) else None

    def all_inputs(self) -> list[Value]:
        """Every input of a variadic operator."""
        return [self.input(index) for index in range(len(self.inputs))]

    def axis_in(self, axis: int, rank: int) -> int:
        """``axis`` counted from the front.

        Raises:
            ImportModelError: it is not an axis of a tensor of this rank.
        """
        if not -rank <= axis < rank:
            self.inconsistent("axis is out of range", axis=axis, rank=rank)
        return axis % rank if rank else 0

    def axes_in(self, axes: Sequence[int], rank: int) -> tuple[int, ...]:
        """Axes counted from the front, in the given order, checked to be distinct."""
        found = tuple(self.axis_in(axis, rank) for axis in axes)
        if len(set(found)) != len(found):
            self.inconsistent("an axis is given twice", axes=list(axes))
        return found

    # -- known content ------------------------------------------------------------------------------------------

    def content(self, index: int) -> torch.Tensor | SymbolicArray | None:
        """What is known about the content of an input; None when absent or not known."""
        value = self.optional(index)
        return None if value is None else self.emitter.content(value)

    def tensor(self, index: int, role: str) -> torch.Tensor:
        """The content of an input that must be constant."""
        found = self.content(index)
        if found is None or isinstance(found, SymbolicArray):
            self._needs_constant(index, role)
        return found

    def dims(self, index: int, role: str) -> tuple[Dim, ...]:
        """The content of an integer input as dimensions, flattened; sizes of symbolic axes may occur in it."""
        found = self.content(index)
        if isinstance(found, SymbolicArray):
            return tuple(int(item) if isinstance(item, bool) else item for item in found.items)
        if found is None or found.dtype.is_floating_point:
            self._needs_constant(index, role)
        return tuple(int(item) for item in found.reshape(-1).tolist())

    def ints_input(self, index: int, role: str) -> tuple[int, ...] | None:
        """The content of an optional integer input as integers; None when absent."""
        if self.optional(index) is None:
            return None
        found = self.dims(index, role)
        if not all(isinstance(item, int) for item in found):
            self.refuse(
                f"{role} depends on a symbolic dimension", f"export with fixed sizes, or give {role} as integers"
            )
        return tuple(item for item in found if isinstance(item, int))

    def _needs_constant(self, index: int, role: str) -> NoReturn:
        value = self.input(index)
        self.refuse(
            f"{role} is computed from data",
            "make it an initializer, or " + advice(self.emitter.inputs_behind(value)),
            rule="shapes and axes are known when a model is imported",
        )

    # -- attributes ---------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        return name in self._attributes

    def ignore(self, *names: str) -> None:
        """Say of attributes that they make no difference here."""
        self._read.update(names)

    def check_all_read(self, schema: Any) -> None:
        """Attributes that a handler did not look at have their default values.

        A newer definition of an operator may have attributes that its handler has never heard of.
        """
        for name, attribute in self._attributes.items():
            known = schema.attributes.get(name) if schema is not None else None
            if name in self._read or known is None:
                continue
            default = known.default_value
            if default.name and onnx_ir.serde.deserialize_attribute(default).value == attribute.value:
                continue
            self.use_definition(f"the attribute {name}={attribute.value}")

    def _attribute(self, name: str, kinds: tuple[onnx_ir.AttributeType, ...], default: Any) -> Any:
        self._read.add(name)
        found = self._attributes.get(name)
        if found is None:
            if default is _REQUIRED:
                self.inconsistent(f"the attribute {name} is missing")
            return default
        if found.type not in kinds:
            self.inconsistent(f"the attribute {name} has the wrong kind", kind=found.type, expected=kinds[0])
        return found.value

    def int_attr(self, name: str, default: int | None = _REQUIRED) -> Any:
        """An integer attribute."""
        return self._attribute(name, (onnx_ir.AttributeType.INT,), default)

    def flag(self, name: str, default: bool = False) -> bool:
        """An integer attribute that means yes or no."""
        return bool(self.int_attr(name, 1 if default else 0))

    def float_attr(self, name: str, default: float | None = _REQUIRED) -> Any:
        """A float attribute, with the shortest decimal that is the same float32: 1e-12, not 9.99999996e-13."""
        found = self._attribute(name, (onnx_ir.AttributeType.FLOAT,), None)
        if found is None:
            return self._attribute(name, (), default)
        return shortest_float(found)

    def ints_attr(self, name: str, default: Sequence[int] | None = _REQUIRED) -> Any:
        """A list of integers as a tuple."""
        found = self._attribute(name, (onnx_ir.AttributeType.INTS,), default)
        return None if found is None else tuple(found)

    def floats_attr(self, name: str, default: Sequence[float] | None = _REQUIRED) -> Any:
        """A list of floats as a tuple."""
        found = self._attribute(name, (onnx_ir.AttributeType.FLOATS,), default)
        return None if found is None else tuple(map(shortest_float, found))

    def string_attr(self, name: str, default: str = _REQUIRED) -> str:
        """A string attribute."""
        found = self._attribute(name, (onnx_ir.AttributeType.STRING,), default)
        try:
            return found.decode() if isinstance(found, bytes) else str(found)
        except UnicodeDecodeError:
            self.inconsistent(f"the attribute {name} is not text")

    def tensor_attr(self, name: str) -> StoredTensor:
        """A tensor attribute."""
        from trimtab.frontend.onnx.external_data import ExternalFiles
        from trimtab.frontend.onnx.initializers import store

        return store(self._attribute(name, (onnx_ir.AttributeType.TENSOR,), _REQUIRED), ExternalFiles(None))

    def graph_attr(self, name: str) -> onnx_ir.Graph:
        """A graph attribute."""
        return self._attribute(name, (onnx_ir.AttributeType.GRAPH,), _REQUIRED)

    # -- refusals -----------------------------------------------------------------------------------------------

    @property
    def where(self) -> str:
        return (
            f"node {self.name!r} ({self.op}, opset {self.version})" if self.name else f"{self.op}, opset {self.version}"
        )

    def refuse(self, reason: str, fix: str = "", *, rule: str = "", **values: Any) -> NoReturn:
        """Raise the error for a form of this operator that is not imported."""
        raise UnsupportedOpError(
            f"{self.op}: {reason}",
            values=values,
            rule=rule or "Trimtab does not import this form of the operator",
            fix=fix,
            where=self.where,
            location=self.location,
        )

    def use_definition(self, reason: str) -> NoReturn:
        """Leave this node to the operator's standard definition; a refusal for ``reason`` where it has none."""
        try:
            self.refuse(reason)
        except UnsupportedOpError as refusal:
            raise UseDefinition(refusal) from None

    def inconsistent(self, what: str, **values: Any) -> NoReturn:
        """Raise the error for a node that breaks the operator's definition."""
        raise ImportModelError(
            f"{self.op} is malformed: {what}",
            values=values | {"inputs": ", ".join(_type_text(value) for value in self.inputs)},
            rule="the node breaks the definition of its operator",
            fix="export the model again",
            where=self.where,
            location=self.location,
        )


def advice(inputs: Sequence[str]) -> str:
    """How to fix graph inputs at import."""
    names = ", ".join(f"{name!r}: array" for name in inputs[:4])
    return f"fix graph inputs that it depends on with from_onnx(..., constants={{{names or '...'}}})"


def _type_text(value: Value | None) -> str:
    return "none" if value is None else str(value.type)
