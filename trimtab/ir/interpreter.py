"""The reference interpreter: runs a module through the torch references of its ops.

Slow and simple on purpose.  It is the yardstick for passes and backends; with ``precision=torch.float64`` it
evaluates a float32 module in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trimtab.errors import InputError, TrimtabError
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.dims import Dim, Symbol, as_symbol, evaluate
from trimtab.ir.dtypes import DType
from trimtab.ir.inference import reference_attributes, result_tuple
from trimtab.ir.op import Op
from trimtab.ir.ops.region import Fused, Repeat

if TYPE_CHECKING:
    import torch

Observer = Callable[[Op, Sequence[Any]], None]
GraphObserver = Callable[[Graph, Sequence[Any]], None]
_WIDEN = (DType.F32, DType.F16, DType.BF16)


@dataclass
class _Run:
    """What one evaluation carries through nested graphs."""

    module: Module
    bindings: dict[str, int]
    precision: torch.dtype | None
    observer: Observer | None
    grad: bool
    row_major: bool
    entered: GraphObserver | None
    weights: dict[str, Any] = field(default_factory=dict)

    def dtype(self, dtype: DType) -> torch.dtype:
        return self.precision if self.precision is not None and dtype in _WIDEN else dtype.to_torch()

    def weight(self, id: str) -> Any:
        if id in self.weights:
            return self.weights[id]
        weight = self.module.weights[id]
        data = weight.tensor()
        if self.precision is None:
            return data
        import torch

        # In row-major order at once, where it would be copied to that afterwards.
        order = torch.contiguous_format if self.row_major else torch.preserve_format
        return data.to(self.dtype(weight.type.dtype), memory_format=order)


def interpret(
    module: Module,
    inputs: Sequence[Any] | Mapping[str, Any],
    *,
    precision: torch.dtype | None = None,
    observer: Observer | None = None,
    weights: Mapping[str, Any] | None = None,
    grad: bool = False,
    row_major: bool = False,
    entered: GraphObserver | None = None,
) -> tuple[Any, ...]:
    """Evaluate ``module.main``.

    Args:
        module: the module; it should verify.
        inputs: a tensor (or numpy array) per graph input, in order or by name.
        precision: evaluate f32, f16 and bf16 values in this type instead, e.g. ``torch.float64``.
        observer: called after each op with the op and its results.
        weights: tensors to use instead of the table's, by id.
        grad: keep torch's autograd graph; by default gradients are off.
        row_major: hand each op its operands in row-major order and aligned in memory, so that results depend on values
            alone: torch picks other kernels, which round differently, for other strides and alignments.
        entered: called before a graph is run, with the graph and a tensor for each of its inputs: once for ``main``,
            and for the body of an op at each of its runs.

    Returns:
        One torch tensor per output. Outputs may share memory with inputs or weights.

    Raises:
        InputError: wrong number, names, dtypes or shapes of inputs, or values that an op refuses.
    """
    import torch

    tensors = input_tensors(module.main, inputs)
    bindings = bind_symbols(module.main, tensors)
    run = _Run(module, bindings, precision, observer, grad, row_major, entered, dict(weights or {}))
    if precision is not None:
        tensors = [t.to(run.dtype(v.type.dtype)) for t, v in zip(tensors, module.main.inputs, strict=True)]
    with torch.set_grad_enabled(grad):
        return tuple(_run_graph(module.main, tensors, run))


def evaluate_op(op: Op, operands: Sequence[Any], bindings: Mapping[str, int] | None = None) -> tuple[Any, ...]:
    """Evaluate one op without regions on torch tensors, as ``interpret`` does with ``row_major``; for folding."""
    return _call_reference(op, [_row_major(operand) for operand in operands], bindings or {}, DType.to_torch)


def input_tensors(graph: Graph, inputs: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
    """``inputs`` as torch tensors in the order of the graph's inputs; their types are not looked at.

    Raises:
        InputError: wrong number or names, or something that is not an array.
    """
    import torch

    names = [value.name for value in graph.inputs]
    if isinstance(inputs, Mapping):
        if set(inputs) != set(names):
            raise InputError("wrong input names", values={"missing": sorted(set(names) - set(inputs)),
                             "unknown": sorted(set(inputs) - set(names)), "expected": names})  # fmt: skip
        inputs = [inputs[name] for name in names]
    if len(inputs) != len(names):
        raise InputError("wrong number of inputs", values={"expected": names, "given": len(inputs)})

    def convert(name: str, value: Any) -> Any:
        try:
            return value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                "an input cannot be made a tensor",
                values={"input": name, "given": type(value).__name__},
                rule=str(error).splitlines()[0],
                fix="give torch tensors or numpy arrays",
            ) from error

    return [convert(name, value) for name, value in zip(names, inputs, strict=True)]


def bind_symbols(graph: Graph, tensors: Iterable[Any]) -> dict[str, int]:
    """The values of the symbols in the inputs' shapes, checked against every input.

    Raises:
        InputError: wrong rank, size or dtype, two values for one symbol, or a value out of its range.
    """
    bindings: dict[str, int] = {}
    pairs = list(zip(graph.inputs, tensors, strict=True))
    for value, tensor in pairs:
        if tensor.dim() != value.type.rank or tensor.dtype is not value.type.dtype.to_torch():
            raise InputError(
                "an input has the wrong rank or dtype",
                values={"input": value.name, "expected": value.type, "given": _type_text(tensor)},
                rule="inputs are not converted silently",
            )
        for dim, size in zip(value.type.shape, tensor.shape, strict=True):
            symbol = as_symbol(dim)
            if symbol is not None and bindings.setdefault(symbol.name, int(size)) != size:
                raise InputError("two inputs disagree about a dimension", values={"symbol": symbol.name,
                                 "sizes": f"{bindings[symbol.name]} and {size}", "input": value.name})  # fmt: skip
    for symbol in graph.symbols().values():
        _check_range(symbol, bindings)
    for value, tensor in pairs:
        expected = tuple(evaluate(dim, bindings) for dim in value.type.shape)
        if expected != tuple(tensor.shape):
            raise InputError(
                "an input has the wrong shape",
                values={"input": value.name, "expected": value.type, "given": _type_text(tensor)},
            )
    return bindings


def _check_range(symbol: Symbol, bindings: Mapping[str, int]) -> None:
    if symbol.name not in bindings:
        raise InputError(
            "a symbol cannot be found from the inputs",
            values={"symbol": symbol.name},
            rule="each symbol is the size of some input's axis by itself",
        )
    size = bindings[symbol.name]
    if size < symbol.min or (symbol.max is not None and size > symbol.max):
        raise InputError("a dimension is out of its range", values={"symbol": symbol.name, "size": size,
                         "range": symbol.range_text}, fix="trace the model with a wider range")  # fmt: skip


def _run_graph(graph: Graph, inputs: Sequence[Any], run: _Run) -> list[Any]:
    if run.entered is not None:
        run.entered(graph, inputs)
    live: dict[Value, Any] = dict(zip(graph.inputs, inputs, strict=True))
    pending = {value: len(value.uses) for op in graph.ops for value in op.results}

    def read(value: Value) -> Any:
        return run.weight(value.weight) if value.is_weight else live[value]

    for op in graph.ops:
        operands = [read(value) for value in op.operands]
        if run.row_major:
            operands = [_row_major(operand) for operand in operands]
        results = _run_op(op, operands, run)
        if run.observer is not None:
            run.observer(op, results)
        live.update((value, result) for value, result in zip(op.results, results, strict=True) if value.uses)
        if not run.grad:
            for value in op.operands:
                if value in pending:
                    pending[value] -= 1
                    if not pending[value]:
                        del live[value]
    return [read(value) for value in graph.outputs]


def _run_op(op: Op, operands: Sequence[Any], run: _Run) -> tuple[Any, ...]:
    if isinstance(op, Repeat):
        return _run_repeat(op, operands, run)
    if isinstance(op, Fused):
        return tuple(_run_graph(op.body, operands, run))
    return _call_reference(op, operands, run.bindings, run.dtype)


def _row_major(tensor: Any) -> Any:
    import torch

    strides = torch.empty(tensor.shape, device="meta").stride()
    if tensor.is_contiguous() and tensor.data_ptr() % 64 == 0:
        return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)
    return tensor.clone(memory_format=torch.contiguous_format).as_strided(tensor.shape, strides)


def _run_repeat(op: Repeat, operands: Sequence[Any], run: _Run) -> tuple[Any, ...]:
    first, second = len(op.carried), len(op.carried) + len(op.stacked)
    carried = list(operands[:first])
    for iteration in range(op.n):
        slices = [stack[iteration] for stack in operands[first:second]]
        carried = _run_graph(op.body, [*carried, *slices, *operands[second:]], run)
    return tuple(carried)


def _call_reference(op: Op, operands: Sequence[Any], bindings: Mapping[str, int],
                    resolve_dtype: Callable[[DType], Any]) -> tuple[Any, ...]:  # fmt: skip
    def resolve(dim: Dim) -> Any:
        return evaluate(dim, bindings, {"min": min, "max": max})

    grouped: list[Any] = []
    rest = iter(operands)
    for _, held in op.arguments():
        if isinstance(held, tuple):
            grouped.append([next(rest) for _ in held])
        else:
            grouped.append(None if held is None else next(rest))
    try:
        return result_tuple(op.reference(*grouped, **reference_attributes(op.attributes, resolve, resolve_dtype)))
    except TrimtabError:
        raise
    except Exception as error:  # whatever torch raises for values it refuses
        raise InputError(
            f"{op.name} cannot be evaluated on these values",
            values={"operands": ", ".join(map(_type_text, operands))},
            rule=str(error).splitlines()[0] if str(error) else type(error).__name__,
            where=f"op {op!r}",
            location=op.location,
        ) from error


def _type_text(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
