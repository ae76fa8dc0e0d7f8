"""Type inference: run an op's reference on shapes alone, symbolic dimensions included.

torch's FakeTensor executes the reference without data.  A named symbol becomes a torch SymInt whose hint is a prime
of its own, so that broadcasting or reshaping across unrelated symbols fails instead of matching by accident.
Results are memoised by op class, operand types and attributes: a model with 96 equal blocks infers one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError, UsageError, VerificationError
from trimtab.ir.attributes import attribute_symbols
from trimtab.ir.dims import Dim, DimExpr, Symbol, dim_max, dim_min, evaluate, floordiv, mod, symbol
from trimtab.ir.dtypes import DType
from trimtab.ir.types import TensorType

if TYPE_CHECKING:
    from trimtab.ir.op import Op

_cache: dict[Any, tuple[TensorType, ...] | TrimtabError] = {}
_CACHE_LIMIT = 100_000


def infer_by_reference(op: Op) -> tuple[TensorType, ...]:
    """Result types of ``op``.

    Raises:
        VerificationError: the reference does not accept these operand types or attributes.
    """
    groups = tuple(
        None if held is None else tuple(v.type for v in held) if isinstance(held, tuple) else held.type
        for _, held in op.arguments()
    )
    try:
        key = (type(op), groups, tuple((name, repr(value), value) for name, value in op.attributes.items()))
        found = _cache.get(key)
    except TypeError as error:
        raise UsageError(f"{op.name} has an attribute that is not hashable", values={"error": error}) from error
    if found is None:
        try:
            found = _run(op, groups)
        except TrimtabError as error:
            found = error
        except _Refusal as error:
            found = VerificationError(
                f"{op.name} does not accept its operands",
                values={field.name: _group_text(group) for field, group in zip(op.operand_fields, groups, strict=True)}
                | op.attributes,
                rule=str(error),
            )
        if len(_cache) >= _CACHE_LIMIT:
            _cache.clear()
        _cache[key] = found
    if isinstance(found, TrimtabError):
        raise type(found)(found.what, values=found.values, rule=found.rule, fix=found.fix, location=op.location)
    return found


def reference_attributes(
    attributes: Mapping[str, Any],
    resolve_dim: Callable[[DimExpr], Any],
    resolve_dtype: Callable[[DType], Any] = DType.to_torch,
) -> dict[str, Any]:
    """Attributes as the reference takes them: dimensions resolved to integers, dtypes to torch dtypes."""

    def convert(value: Any) -> Any:
        if isinstance(value, DimExpr):
            return resolve_dim(value)
        if isinstance(value, DType):
            return resolve_dtype(value)
        return tuple(map(convert, value)) if isinstance(value, tuple) else value

    return {name: convert(value) for name, value in attributes.items()}


def result_tuple(outcome: Any) -> tuple[Any, ...]:
    """A reference's return value as a tuple of tensors."""
    return tuple(outcome) if isinstance(outcome, tuple | list) else (outcome,)


class _Refusal(Exception):
    """A reference raised on the shapes it was given; the text is the first line of why, in terms of our symbols."""


class _Silence:
    """Mutes the warnings torch logs while a reference rejects shapes; the error itself carries the message."""

    def __enter__(self) -> None:
        self._previous = logging.root.manager.disable
        logging.disable(logging.ERROR)

    def __exit__(self, *exc: object) -> None:
        logging.disable(self._previous)


def _run(op: Op, groups: tuple[Any, ...]) -> tuple[TensorType, ...]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    scope = _SymbolScope()
    for group in groups:
        for type in group if isinstance(group, tuple) else (group,) if group is not None else ():
            scope.declare(type.symbols)
    for value in op.attributes.values():
        scope.declare(attribute_symbols(value))

    def fake(type: TensorType) -> Any:
        return torch.empty([scope.to_torch(dim) for dim in type.shape], dtype=type.dtype.to_torch())

    with _Silence(), torch.no_grad(), FakeTensorMode(shape_env=scope.environment, allow_non_fake_inputs=True):
        try:
            operands = [
                None if group is None else [fake(t) for t in group] if isinstance(group, tuple) else fake(group)
                for group in groups
            ]
            outcome = op.reference(*operands, **reference_attributes(op.attributes, scope.to_torch))
        except TrimtabError:
            raise
        except Exception as error:  # whatever torch raises for shapes it refuses
            raise _Refusal(scope.translate(str(error)) or type(error).__name__) from error
    scope.refuse_assumptions(op)
    return tuple(
        TensorType(DType.from_torch(tensor.dtype), tuple(map(scope.from_torch, tensor.shape)))
        for tensor in result_tuple(outcome)
    )


class _SymbolScope:
    """Translates between our symbols and torch's symbolic integers for one inference."""

    def __init__(self) -> None:
        self.environment: Any = None
        self._ours: dict[str, Any] = {}
        self._theirs: dict[Any, Symbol] = {}

    def declare(self, symbols: frozenset[Symbol]) -> None:
        for found in sorted(symbols, key=lambda s: s.name):
            if found.name not in self._ours:
                self._create(found)

    def to_torch(self, dim: Dim) -> Any:
        import torch

        return evaluate(dim, self._ours, {"min": torch.sym_min, "max": torch.sym_max})

    def from_torch(self, size: Any) -> Dim:
        import torch

        return dim_from_sympy(size.node.expr, self._theirs) if isinstance(size, torch.SymInt) else int(size)

    def translate(self, message: str) -> str:
        """The first line of a message of torch, with our names for its symbols."""
        line = next(iter(message.strip().splitlines()), "")
        for name, ours in self._theirs.items():
            line = re.sub(rf"\b{re.escape(str(name))}\b", ours.name, line)
        return line

    def refuse_assumptions(self, op: Op) -> None:
        """Raise if torch took a symbol for a number, or two symbols for one, to make the reference work."""
        if self.environment is None:
            return
        for name, ours in self._theirs.items():
            fixed = self.environment.replacements.get(name)
            if fixed is None or ours.min == ours.max:
                continue
            raise VerificationError(
                f"{op.name} does not accept every size of a symbol",
                values={"symbol": f"{ours}={ours.range_text}", "needs": f"{ours} == {self._theirs.get(fixed, fixed)}"},
                rule="an op is valid for all values of the symbols in its operands' types",
                fix="give both the same symbol or size",
            )

    def _create(self, symbol: Symbol) -> None:
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

        if self.environment is None:
            self.environment = ShapeEnv(specialize_zero_one=False, duck_shape=False)
        hint = _prime_within(len(self._ours), symbol)
        source = ConstantSource(f"trimtab_{symbol.name}")
        name = self.environment.create_symbol(
            hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, do_not_specialize_zero_one=True
        )
        self.environment.constrain_symbol_range(
            name, compiler_min=symbol.min, compiler_max=2**40 if symbol.max is None else symbol.max
        )
        self._ours[symbol.name] = self.environment.create_symintnode(name, hint=hint, source=source)
        self._theirs[name] = symbol


def dim_from_sympy(expression: Any, symbols: Mapping[Any, Symbol]) -> Dim:
    """A size that torch computed as a sympy expression, with torch's symbols replaced by ours.

    Raises:
        VerificationError: the size depends on data, or uses a function that dimensions do not have.
    """
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        found = symbols.get(expression)
        if found is None:
            raise VerificationError(
                "a result's size depends on data",
                values={"size": expression},
                rule="shapes follow from the inputs' shapes alone",
            )
        return symbol(found.name, found.min, found.max)
    args = [dim_from_sympy(arg, symbols) for arg in expression.args] if not expression.is_Pow else []
    match type(expression).__name__:
        case "Add":
            return _fold(args, lambda a, b: a + b)
        case "Mul":
            return _fold(args, lambda a, b: a * b)
        case "Pow":
            return _fold([dim_from_sympy(expression.args[0], symbols)] * int(expression.args[1]), lambda a, b: a * b)
        case "FloorDiv" | "CleanDiv" | "IntTrueDiv":
            return floordiv(*args)
        case "Mod" | "PythonMod":
            return mod(*args)
        case "Max":
            return dim_max(*args)
        case "Min":
            return dim_min(*args)
    raise VerificationError(
        "a result's size has no form as a dimension",
        values={"size": expression},
        rule="dimensions use + - * // % min and max over symbols",
    )


def _fold(args: list[Dim], combine: Callable[[Dim, Dim], Dim]) -> Dim:
    total = args[0]
    for arg in args[1:]:
        total = combine(total, arg)
    return total


_PRIMES = (7919, 6997, 5987, 4993, 3989, 2999, 1997, 997, 499, 251, 127, 61, 31, 17, 11, 7, 5, 3)


def _prime_within(index: int, symbol: Symbol) -> int:
    """A value in the symbol's range, prime and unlike the other symbols' where the range allows it."""
    fitting = [p for p in _PRIMES if p >= symbol.min and (symbol.max is None or p <= symbol.max)]
    if fitting:
        return fitting[index % len(fitting)]
    return symbol.max if symbol.max is not None else symbol.min


def _group_text(group: Any) -> str:
    if group is None:
        return "none"
    return f"({', '.join(map(str, group))})" if isinstance(group, tuple) else str(group)
