"""Walking and rewriting TIR expressions from Python.

TVM exports no expression mutator to Python, and its schedule primitives need a whole function to act on.  The code
generator only ever needs three things: substitute variables, replace buffer loads, and lower scalar calls; all three
are one bottom-up rewrite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tvm import ir, tirx

from trimtab.errors import InternalError

Expr = Any
LoadRule = Callable[[Any, list[Expr]], Expr | None]
CastRule = Callable[[str, Expr], Expr | None]
CallRule = Callable[[str, str, list[Expr]], Expr | None]

_BINARY = (
    tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max,
    tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.And, tirx.Or,
    tirx.LShift, tirx.RShift, tirx.BitwiseAnd, tirx.BitwiseOr, tirx.BitwiseXor,
)  # fmt: skip
_UNARY = (tirx.Not, tirx.BitwiseNot)
_LEAVES = (tirx.IntImm, tirx.FloatImm, ir.StringImm)


def dtype_of(expr: Expr) -> str:
    """Element type of an expression, e.g. ``float32``."""
    return str(expr.ty.dtype)


def rewrite(
    expr: Expr,
    variables: Mapping[Any, Expr] | None = None,
    load: LoadRule | None = None,
    call: CallRule | None = None,
    cast: CastRule | None = None,
) -> Expr:
    """Rebuild ``expr`` bottom-up.

    Args:
        variables: replacement for variables.
        load: called with a buffer and its rewritten indices; returns a replacement for the load, or None to keep it.
        call: called with the name of an intrinsic, its result type and rewritten arguments; None keeps the call.
        cast: called with the result type of a cast and its rewritten operand; None keeps the cast.
    """
    table = dict(variables or {})

    def visit(node: Expr) -> Expr:
        if isinstance(node, ir.Var):
            return table.get(node, node)
        if isinstance(node, _LEAVES):
            return node
        if isinstance(node, _BINARY):
            a, b = visit(node.a), visit(node.b)
            return node if a.same_as(node.a) and b.same_as(node.b) else type(node)(*_same_type(a, b))
        if isinstance(node, ir.TensorLoad):
            indices = [visit(index) for index in node.indices]
            replaced = load(node.source, indices) if load is not None else None
            return tirx.BufferLoad(node.source, indices) if replaced is None else replaced
        if isinstance(node, tirx.Cast):
            dtype, value = dtype_of(node), visit(node.value)
            replaced = cast(dtype, value) if cast is not None else None
            return tirx.Cast(dtype, value) if replaced is None else replaced
        if isinstance(node, tirx.Select):
            return tirx.Select(visit(node.condition), visit(node.true_value), visit(node.false_value))
        if isinstance(node, _UNARY):
            return type(node)(visit(node.a))
        if isinstance(node, tirx.Let):
            # A fresh variable each time: an expression may be copied into several places of a function.
            value, fresh = visit(node.value), tirx.Var(node.var.name, node.var.ty)
            table[node.var] = fresh
            return tirx.Let(fresh, value, visit(node.body))
        if isinstance(node, ir.Call):
            args = [visit(arg) for arg in node.args]
            name = getattr(node.op, "name", "")
            replaced = call(name, dtype_of(node), args) if call is not None else None
            return ir.Call(node.op, args, ret_ty=node.ty) if replaced is None else replaced
        raise InternalError("a TIR expression cannot be rewritten", values={"node": type(node).__name__})

    return visit(expr)


def _same_type(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Widen the narrower of two integers: replacing an int32 variable by an int64 index must not break its formula."""
    left, right = dtype_of(a), dtype_of(b)
    if left == right:
        return a, b
    return as_index(a), as_index(b)


def visit_nodes(expr: Expr) -> Iterable[Expr]:
    """Every node of an expression tree, root first."""
    stack = [expr]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, _BINARY):
            stack += [node.a, node.b]
        elif isinstance(node, ir.TensorLoad):
            stack += list(node.indices)
        elif isinstance(node, tirx.Cast):
            stack.append(node.value)
        elif isinstance(node, tirx.Select):
            stack += [node.condition, node.true_value, node.false_value]
        elif isinstance(node, _UNARY):
            stack.append(node.a)
        elif isinstance(node, tirx.Let):
            stack += [node.value, node.body]
        elif isinstance(node, ir.Call):
            stack += list(node.args)


def loads_of(expr: Expr) -> list[Any]:
    """Buffer loads in an expression, nested ones included."""
    return [node for node in visit_nodes(expr) if isinstance(node, ir.TensorLoad)]


def variables_of(*expressions: Expr) -> set[Any]:
    """Variables that expressions read (buffers excluded)."""
    return {node for expr in expressions for node in visit_nodes(expr) if isinstance(node, ir.Var)}


def calls_of(expr: Expr) -> list[str]:
    """Names of the intrinsics an expression calls."""
    return [getattr(node.op, "name", "") for node in visit_nodes(expr) if isinstance(node, ir.Call)]


def int_value(expr: Expr) -> int | None:
    """The value of an integer constant, or None when the expression is symbolic."""
    if isinstance(expr, int):
        return expr
    return int(expr.value) if isinstance(expr, tirx.IntImm) else None


def constant_factor(expr: Expr) -> int:
    """The product of the integer constants that a product is made of: 16 for ``16 * batch``, 1 for a variable."""
    if isinstance(expr, tirx.Mul):
        return constant_factor(expr.a) * constant_factor(expr.b)
    if isinstance(expr, tirx.Cast):
        return constant_factor(expr.value)
    value = int_value(expr)
    return 1 if value is None else value


def product(extents: Sequence[Expr], dtype: str = "int64") -> Expr:
    """Product of extents; constant when all are."""
    total: Expr = tirx.const(1, dtype)
    for extent in extents:
        total = total * as_index(extent, dtype)
    return total


def as_index(expr: Expr, dtype: str = "int64") -> Expr:
    """``expr`` as an index of the given integer type."""
    if isinstance(expr, int):
        return tirx.const(expr, dtype)
    if isinstance(expr, tirx.IntImm):
        return tirx.const(int(expr.value), dtype)
    return expr if dtype_of(expr) == dtype else tirx.Cast(dtype, expr)


def let(value: Expr, body: Callable[[Expr], Expr], name: str = "t") -> Expr:
    """Bind ``value`` once and use it several times in ``body``."""
    if isinstance(value, (ir.Var, *_LEAVES)):
        return body(value)
    var = tirx.Var(name, value.ty)
    return tirx.Let(var, value, body(var))


def hoist_lets(expr: Expr) -> tuple[list[tuple[Any, Expr]], Expr]:
    """The bindings inside an expression, in order, and the expression without them.

    TVM's passes take time exponential in the depth of let expressions nested in each other's values, so code is
    emitted with let statements instead.  All of our expressions may be evaluated unconditionally.
    """
    bindings: list[tuple[Any, Expr]] = []

    def strip(node: Expr) -> Expr:
        if isinstance(node, tirx.Let):
            bindings.append((node.var, strip(node.value)))
            return strip(node.body)
        if isinstance(node, (ir.Var, *_LEAVES)):
            return node
        if isinstance(node, _BINARY):
            a, b = strip(node.a), strip(node.b)
            return node if a.same_as(node.a) and b.same_as(node.b) else type(node)(a, b)
        if isinstance(node, ir.TensorLoad):
            return tirx.BufferLoad(node.source, [strip(index) for index in node.indices])
        if isinstance(node, tirx.Cast):
            return tirx.Cast(dtype_of(node), strip(node.value))
        if isinstance(node, tirx.Select):
            return tirx.Select(strip(node.condition), strip(node.true_value), strip(node.false_value))
        if isinstance(node, _UNARY):
            return type(node)(strip(node.a))
        if isinstance(node, ir.Call):
            return ir.Call(node.op, [strip(arg) for arg in node.args], ret_ty=node.ty)
        return node

    result = strip(expr)
    return bindings, result


def name_invariants(expr: Expr, written: Sequence[Any]) -> tuple[list[tuple[Any, Expr]], Expr]:
    """Quotients that ``expr`` names by a let, computes from memory, and that are the same for all elements.

    Returns the bindings in order, and the expression without them: outside of all loops they are computed once. LLVM
    leaves them inside where it cannot see that no loop writes to what they read. What takes less time than a division
    stays where it is.

    Args:
        expr: the value of an element.
        written: buffers that the function itself writes.
    """
    outer: list[tuple[Any, Expr]] = []
    names: set[Any] = set()

    def is_invariant(value: Expr) -> bool:
        loads = loads_of(value)
        own = any(load.source.same_as(buffer) for load in loads for buffer in written)
        is_quotient = isinstance(value, tirx.Div) and dtype_of(value) == "float32"
        return is_quotient and bool(loads) and not own and not variables_of(value) - names

    lets, result = hoist_lets(expr)
    inner = []
    for var, value in lets:
        if is_invariant(value):
            outer.append((var, value))
            names.add(var)
        else:
            inner.append((var, value))
    if not outer:
        return [], expr
    for var, value in reversed(inner):
        result = tirx.Let(var, value, result)
    return outer, result


def name_positions(expr: Expr, varying: Iterable[Any]) -> tuple[list[tuple[Any, Expr]], Expr]:
    """Positions that ``expr`` reads from memory and that do not depend on ``varying`` variables, each given a name.

    Returns the bindings in order, and the expression that uses them. What a gather reads is the same along a row: with
    a name it is loaded and clamped once a row instead of once an element.
    """
    moving, outer, inner = set(varying), [], []

    def is_position(value: Expr) -> bool:
        return (
            dtype_of(value).startswith(("int", "uint")) and bool(loads_of(value)) and not variables_of(value) & moving
        )

    def named(value: Expr) -> Expr:
        if not is_position(value):
            return value
        var = tirx.Var("position", value.ty)
        outer.append((var, value))
        return var

    def with_names(value: Expr) -> Expr:
        return rewrite(value, load=lambda buffer, indices: tirx.BufferLoad(buffer, [named(i) for i in indices]))

    lets, plain = hoist_lets(expr)
    for var, value in lets:
        bound = with_names(value)
        if is_position(bound):
            outer.append((var, bound))
        else:
            inner.append((var, bound))
            moving.add(var)
    result = with_names(plain)
    for var, value in reversed(inner):
        result = tirx.Let(var, value, result)
    return outer, result
