"""Inputs of the imported module: names, types, and the symbols of their dynamic axes."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from typing import Any

import onnx_ir

from trimtab.errors import ImportModelError, ParseError, UsageError
from trimtab.frontend.onnx.element_types import SUPPORTED_TEXT, dtype_of
from trimtab.ir.dims import RESERVED_WORDS, Dim, parse_dim, symbol, symbols_of
from trimtab.ir.types import TensorType

LARGEST_DIMENSION = 1 << 40
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_TAKEN_WORDS = RESERVED_WORDS | {"min", "max", "loc", "graph", "symbols", "weight", "return"}

DimSpec = int | tuple[int, int | None]


class Signature:
    """Turns dimension names of an ONNX graph into symbols.

    Args:
        dims: what the caller says about them: a size fixes a dimension, a pair is its inclusive range.
        limits: largest values that were found necessary for the model to be consistent.
    """

    def __init__(self, dims: Mapping[str, DimSpec], limits: Mapping[str, int]) -> None:
        self._given = dict(dims)
        self._limits = limits
        self._dims: dict[str, Dim] = {}
        self._names: dict[str, str] = {}
        for name, spec in dims.items():
            if isinstance(spec, bool) or not (isinstance(spec, int) or (isinstance(spec, tuple) and len(spec) == 2)):
                raise UsageError(
                    "a dimension is described wrongly",
                    values={"name": name, "given": repr(spec)},
                    rule="a dimension is a size or a pair of smallest and largest size (None: no limit)",
                    fix=f'for example dims={{"{name}": (1, 64)}}',
                )

    def input_types(self, inputs: list[Any]) -> list[TensorType]:
        """The types of graph inputs (onnx_ir values).

        Raises:
            ImportModelError: an input that is not a tensor, has no rank, an unknown element type, or absurd dimensions.
        """
        plain = {name for value in inputs for name in _names_of(value)}
        for name in sorted(plain):
            if _IDENTIFIER.fullmatch(name):
                self._declare(name)
        unknown = [name for name in self._given if name not in plain]
        if unknown:
            raise UsageError(
                "dims names dimensions that the model does not have",
                values={"unknown": unknown, "known": sorted(plain)},
            )
        return [self._type(value) for value in inputs]

    def _type(self, value: Any) -> TensorType:
        described: Any = value.type
        if not isinstance(described, onnx_ir.TensorType):
            raise ImportModelError(
                "an input is not a tensor",
                values={"input": value.name, "type": described or "none"},
                rule="inputs are dense tensors; sequences, maps and optionals have no counterpart",
                fix="export the model with tensor inputs",
            )
        dtype = dtype_of(int(described.dtype))
        if dtype is None:
            raise ImportModelError(
                "an input has an element type that Trimtab does not know",
                values={"input": value.name, "type": described.dtype},
                rule=f"tensors hold {SUPPORTED_TEXT}",
                fix="export the model with another type",
            )
        if value.shape is None:
            raise ImportModelError(
                "an input has no shape",
                values={"input": value.name},
                rule="the number of axes of every input is known when a model is imported",
                fix="state the input's shape in the model, with names for dynamic axes",
            )
        return TensorType(dtype, tuple(self._dim(value.name, axis, dim) for axis, dim in enumerate(value.shape)))

    def _dim(self, input: str, axis: int, dim: Any) -> Dim:
        if isinstance(dim, int):
            if not 0 <= dim <= LARGEST_DIMENSION:
                raise ImportModelError(
                    "an input has an absurd dimension",
                    values={"input": input, "axis": axis, "size": dim},
                    rule=f"sizes lie between 0 and {LARGEST_DIMENSION}",
                    fix="check the file",
                )
            return dim
        name = dim.value
        if not name:
            return self._declare(f"{input}_axis{axis}")
        if name not in self._dims and not _IDENTIFIER.fullmatch(name):
            # Exporters also write expressions such as `2*batch`; anything else is a name with odd characters.
            symbols = {key: next(iter(symbols_of(value))) for key, value in self._dims.items() if symbols_of(value)}
            try:
                self._dims[name] = parse_dim(name, symbols)
            except (ParseError, ArithmeticError):
                return self._declare(name)
        return self._declare(name)

    def _declare(self, name: str) -> Dim:
        if name not in self._dims:
            given = self._given.get(name, (1, None))
            low, high = (given, given) if isinstance(given, int) else given
            limit = self._limits.get(self._clean(name))
            if limit is not None:
                high = limit if high is None else min(high, limit)
            if low < 0 or (high is not None and high < low):
                raise UsageError("an empty range of sizes", values={"dimension": name, "range": f"{low}..{high}"})
            self._dims[name] = low if isinstance(given, int) else symbol(self._clean(name), low, high)
        return self._dims[name]

    def _clean(self, name: str) -> str:
        """A distinct identifier made from ``name``."""
        if name not in self._names:
            text = re.sub(r"\W", "_", name, flags=re.ASCII)
            if not text or text[0].isdigit() or text in _TAKEN_WORDS or keyword.iskeyword(text):
                text = f"d_{text}"
            while text in self._names.values():
                text += "_"
            self._names[name] = text
        return self._names[name]


def _names_of(value: Any) -> list[str]:
    if value.shape is None:
        return []
    return [dim.value or f"{value.name}_axis{axis}" for axis, dim in enumerate(value.shape) if not isinstance(dim, int)]
