"""The pass that gives every intermediate tensor a place in one block of memory, the arena, which the caller passes in.

It stands where TVM has ``StaticPlanBlockMemory``: tensors are allocated by ``builtin.alloc_tensor`` and written by the
calls that follow.  ``main`` gets the arena as its last parameter, and a function ``arena_bytes`` of the same inputs
says how large it must be.  Tensors become views of the arena, made once at the start of a call.

- What ``main`` returns is not in the arena: those tensors stay allocated one by one, because they outlive the call.
- A private function (the body of a repeat) gets its results' memory and a part of the arena from its caller, who plans
  both with its own tensors.
- A tensor lives from its allocation to the last reading of it or of anything that may share its memory: every result of
  an op that is no kernel counts as such.
- No kernel's result takes the place of an operand that dies there: kernels are compiled under the promise that
  their parameters do not overlap (``tirx.noalias``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import ir, relax, tirx

from trimtab.backends.tvm.memory_plan import Buffer, live_bytes, plan_memory
from trimtab.backends.tvm.symbolic_sizes import dim_of, expression_of
from trimtab.ir.dims import Dim, Symbol, product

ENTRY_SIZE = "arena_bytes"
"""Name of the function that says how large the arena must be."""
SAMPLE_SIZES = (2, 16, 128)
"""What symbols are taken to be, as far as their ranges allow, to make plans that are small there."""


@dataclass(frozen=True)
class Planned:
    """A module after planning.

    Attributes:
        module: the module.
        arena_bytes: size of the arena.
        live_bytes: the most bytes of tensors in it that are needed at one time, which no plan can be below.
    """

    module: Any
    arena_bytes: Dim
    live_bytes: Dim


def plan_arena(module: Any, symbols: Mapping[str, Symbol]) -> Planned:
    """Plan the memory of ``main`` and of the functions it calls.

    Args:
        module: a Relax module whose kernels write into tensors they are given (after ``CallTIRRewrite``).
        symbols: those of the model, with their ranges, by name.
    """
    planner = _Planner(module, symbols)
    main = planner.plan(module.get_global_var("main"))
    kept = {variable: function for variable, function in module.functions.items() if variable not in planner.done}
    functions = kept | {body.variable: body.function for body in planner.done.values()}
    result = ir.IRModule(functions, attrs=module.attrs, global_infos=module.global_infos)
    result[ENTRY_SIZE] = _size_function(main.function, main.arena_bytes, symbols)
    return Planned(result, main.arena_bytes, main.live_bytes)


Roots = Any
"""What a value may share memory with: a set of numbers of allocations, or for a tuple a list with one per element."""


@dataclass(frozen=True)
class _Allocation:
    """A tensor that a function allocates: where in the function, and its type."""

    step: int
    shape: tuple[Dim, ...]
    dtype: Any

    @property
    def nbytes(self) -> Dim:
        bits = tvm.DataType(self.dtype.value).bits
        return product(self.shape) * ((bits + 7) // 8)


@dataclass(frozen=True)
class _Body:
    """A planned function, as its callers see it.

    Attributes:
        variable: its global variable.
        function: the new function.
        arena_bytes: what it needs of its caller's arena.
        live_bytes: the bound on that.
        results: tensors that the caller allocates for it, parameters after its own.
        returns: what each returned value may share memory with: numbers of parameters.
    """

    variable: Any
    function: Any
    arena_bytes: Dim
    live_bytes: Dim
    results: list[_Allocation]
    returns: Roots


class _Planner:
    def __init__(self, module: Any, symbols: Mapping[str, Symbol]) -> None:
        self.module = module
        self.symbols = symbols
        self.samples = [{name: _clip(size, found) for name, found in symbols.items()} for size in SAMPLE_SIZES]
        self.done: dict[Any, _Body] = {}

    def plan(self, variable: Any) -> _Body:
        if variable not in self.done:
            self.done[variable] = _FunctionPlanner(self, variable).run()
        return self.done[variable]


@dataclass
class _Call:
    """A call of a private function, with the numbers of what it needs: its part of the arena, and its results."""

    body: _Body
    part: int
    results: list[int] = field(default_factory=list)


class _FunctionPlanner:
    """Plans one function.

    Attributes:
        allocations: everything that needs memory, by number; parts of the arena for calls too.
        last: the last step that uses each.
        of_variable: the number of the allocation that a variable is bound to.
        calls: the calls of private functions, by step.
        roots: what the variables seen so far may share memory with; parameters count from -1 downwards.
    """

    def __init__(self, owner: _Planner, variable: Any) -> None:
        self.owner = owner
        self.name = variable.name_hint
        self.function = function = owner.module[variable]
        self.bindings = [binding for block in function.body.blocks for binding in block.bindings]
        self.allocations: list[_Allocation] = []
        self.last: list[int] = []
        self.of_variable: dict[Any, int] = {}
        self.calls: dict[int, _Call] = {}
        self.roots: dict[Any, Roots] = {p: {-1 - n} for n, p in enumerate(function.params)}
        self.variables = {v.name: v for v in _symbolic_variables(function)}

    def run(self) -> _Body:
        for step, binding in enumerate(self.bindings):
            self.roots[binding.var] = self._visit(step, binding)
        returned = self._roots_of(self.function.body.body)
        escaping = sorted(number for number in _flat(returned) if number >= 0)
        placed = [n for n in range(len(self.allocations)) if n not in escaping]
        buffers = [Buffer(self.allocations[n].step, self.last[n], self.allocations[n].nbytes) for n in placed]
        bodies = {call.part: call.body for call in self.calls.values()}
        live = [Buffer(b.first, b.last, bodies[n].live_bytes if n in bodies else b.nbytes)
                for n, b in zip(placed, buffers, strict=True)]  # fmt: skip
        plan = plan_memory(buffers, self.owner.samples)
        offsets = dict(zip(placed, plan.offsets, strict=True))
        rewritten = _Rewriter(self, offsets, [] if self.name == "main" else escaping).run()
        names = {number: -1 - len(self.function.params) - index for index, number in enumerate(escaping)}
        results = [self.allocations[n] for n in escaping]
        return _Body(self._new_variable(rewritten), rewritten, plan.nbytes, live_bytes(live), results,
                     _mapped(returned, lambda number: {names.get(number, number)}))  # fmt: skip

    def _new_variable(self, function: Any) -> Any:
        """A global variable for the new function: that of the old one has its type, which cannot be changed."""
        variable = ir.GlobalVar(self.name)
        relax.expr._update_type(variable, function.ty)
        return variable

    def _visit(self, step: int, binding: Any) -> Roots:
        """Take note of what a binding allocates and uses; returns what its variable may share memory with."""
        value = binding.value
        for used in _variables_in(value):
            self._use(self.roots.get(used, set()), step)
        if not isinstance(value, ir.Call):
            return self._roots_of(value)
        if getattr(value.op, "name", "") == "relax.builtin.alloc_tensor":
            shape = tuple(self.dim(extent) for extent in value.args[0].values)
            self.of_variable[binding.var] = self._allocate(_Allocation(step, shape, value.args[1]))
            return {self.of_variable[binding.var]}
        if isinstance(value.op, ir.GlobalVar):
            if isinstance(self.owner.module[value.op], relax.Function):
                return self._visit_call(step, value)
            return set()
        return set().union(*(_flat(self._roots_of(argument)) for argument in value.args))

    def _visit_call(self, step: int, call: Any) -> Roots:
        body = self.owner.plan(call.op)
        part = self._allocate(_Allocation(step, (body.arena_bytes,), _dtype("uint8")))
        results = [self._allocate(_Allocation(step, tensor.shape, tensor.dtype)) for tensor in body.results]
        self.calls[step] = _Call(body, part, results)
        given = [*(_flat(self._roots_of(argument)) for argument in call.args), *({number} for number in results)]
        return _mapped(body.returns, lambda number: given[-1 - number])

    def _allocate(self, allocation: _Allocation) -> int:
        self.allocations.append(allocation)
        self.last.append(allocation.step)
        return len(self.allocations) - 1

    def _use(self, roots: Roots, step: int) -> None:
        for number in _flat(roots):
            if number >= 0:
                self.last[number] = step

    def _roots_of(self, value: Any) -> Roots:
        if isinstance(value, relax.Tuple):
            return [self._roots_of(element) for element in value.fields]
        if isinstance(value, relax.TupleGetItem):
            whole = self._roots_of(value.tuple_value)
            return whole[value.index] if isinstance(whole, list) else whole
        return self.roots.get(value, set()) if isinstance(value, relax.Var) else set()

    def dim(self, extent: Any) -> Dim:
        """An extent in the function's variables as an expression over the model's symbols."""
        return dim_of(extent, self.owner.symbols)

    def expression(self, dim: Dim) -> Any:
        """The reverse of :meth:`dim`."""
        return expression_of(dim, self.variables)


class _Rewriter:
    """Makes the new function from a plan.

    Args:
        planner: the analysis of the function.
        offsets: where in the arena each allocation lies; those that are not there stay as they are.
        given: allocations whose memory the caller gives.
    """

    def __init__(self, planner: _FunctionPlanner, offsets: Mapping[int, Dim], given: Sequence[int]) -> None:
        self.planner = planner
        self.offsets = offsets
        self.given = {number: self._parameter(number, f"result{index}") for index, number in enumerate(given)}
        extent = tirx.Var("arena_extent", "int64")
        self.arena = relax.Var("arena", relax.TensorType([extent], "uint8"))
        self.start: list[Any] = []
        self.views: dict[Any, Any] = {}
        self.named: dict[Dim, Any] = {}

    def run(self) -> Any:
        planner, function = self.planner, self.planner.function
        self._name_offsets()
        body = list(itertools.chain.from_iterable(map(self._binding, range(len(planner.bindings)), planner.bindings)))
        params = [*function.params, *self.given.values(), self.arena]
        block = relax.BindingBlock([*self.start, *body])
        new_body = relax.SeqExpr([block], function.body.body)
        return relax.Function(params, new_body, function.ret_ty, function.is_pure, function.attrs)

    def _name_offsets(self) -> None:
        """Compute the offsets that depend on symbols, all at once, and give each a variable."""
        wanted = [offset for offset in dict.fromkeys(self.offsets.values()) if not isinstance(offset, int)]
        if wanted:
            self.named = {offset: tirx.Var(f"offset{n}", "int64") for n, offset in enumerate(wanted)}
            values = relax.ShapeExpr([self.planner.expression(offset) for offset in wanted])
            computed = self._bind(ir.Call(_COPY, [values]), "computed", relax.ShapeType(ndim=len(wanted)))
            type = relax.ShapeType(list(self.named.values()))
            self.start.append(relax.MatchCast(relax.Var("offsets", type), computed, type))

    def _binding(self, step: int, binding: Any) -> Iterator[Any]:
        planner, value = self.planner, binding.value
        if binding.var in planner.of_variable:
            number = planner.of_variable[binding.var]
            if number in self.given or number in self.offsets:
                value = self._memory(number)
        elif step in planner.calls:
            call = planner.calls[step]
            results = []
            for number in call.results:
                if number in self.given or number in self.offsets:
                    results.append(self._memory(number))
                else:
                    results.append(relax.Var(f"output{number}", self._type(number)))
                    yield relax.VarBinding(results[-1], self._allocated(number))
            value = ir.Call(call.body.variable, [*value.args, *results, self._memory(call.part)])
            relax.expr._update_type(value, binding.value.ty)
        yield relax.VarBinding(binding.var, value)

    def _memory(self, number: int) -> Any:
        """A tensor over the place of an allocation; equal ones are made once."""
        if number in self.given:
            return self.given[number]
        allocation, offset = self.planner.allocations[number], self.offsets[number]
        key = offset, allocation.shape, str(allocation.dtype.value)
        if key not in self.views:
            type, dtype = self._type(number), allocation.dtype
            position = tirx.const(offset, "int64") if isinstance(offset, int) else self.named[offset]
            view = self._bind(
                ir.Call(_CREATE_VIEW, [self.arena, type.shape, dtype, position], ty_args=[type]), f"place{number}", type
            )
            # Kernels want their data at offset 0 of a tensor: this moves the pointer and copies nothing.
            self.views[key] = self._bind(ir.Call(_MOVE_POINTER, [view], ty_args=[type]), f"memory{number}", type)
        return self.views[key]

    def _bind(self, value: Any, name: str, type: Any) -> Any:
        relax.expr._update_type(value, type)
        variable = relax.Var(name, type)
        self.start.append(relax.VarBinding(variable, value))
        return variable

    def _allocated(self, number: int) -> Any:
        """The call that allocates a tensor by itself."""
        dtype = self.planner.allocations[number].dtype
        call = relax.op.builtin.alloc_tensor(self._type(number).shape, dtype, 0, "global")
        relax.expr._update_type(call, self._type(number))
        return call

    def _parameter(self, number: int, name: str) -> Any:
        return relax.Var(name, self._type(number))

    def _type(self, number: int) -> Any:
        allocation = self.planner.allocations[number]
        return relax.TensorType([self.planner.expression(d) for d in allocation.shape], str(allocation.dtype.value))


_COPY = relax.ExternFunc("vm.builtin.copy")
_CREATE_VIEW = relax.ExternFunc("runtime.TVMTensorCreateView")
_MOVE_POINTER = relax.ExternFunc("vm.builtin.ensure_zero_offset")


def _size_function(main: Any, nbytes: Dim, symbols: Mapping[str, Symbol]) -> Any:
    """The function of the inputs of ``main`` that returns the size of its arena."""
    variables = {name: tirx.Var(name, "int64") for name in symbols}
    inputs = []
    for parameter in main.params[: int(main.attrs["num_input"])]:
        dims = [dim_of(extent, symbols) for extent in parameter.ty.shape]
        shape = [expression_of(dim, variables) for dim in dims]
        inputs.append(relax.Var(parameter.name, relax.TensorType(shape, parameter.ty.dtype)))
    value = expression_of(nbytes, variables)
    function = relax.Function(inputs, relax.SeqExpr([], value), value.ty, True)
    return function.with_attr("global_symbol", ENTRY_SIZE)


def _symbolic_variables(function: Any) -> list[Any]:
    found = [parameter for parameter in function.params if isinstance(parameter, tirx.Var)]
    return [*found, *relax.analysis.defined_symbolic_vars(function)]


def _variables_in(value: Any) -> list[Any]:
    return list(relax.analysis.free_vars(value))


def _dtype(name: str) -> Any:
    return ir.expr.GenericConst(tvm.DataType(name), relax.AnyType())


def _clip(size: int, found: Symbol) -> int:
    return max(found.min, size if found.max is None else min(size, found.max))


def _flat(roots: Roots) -> set[int]:
    return set().union(*map(_flat, roots)) if isinstance(roots, list) else roots


def _mapped(roots: Roots, function: Any) -> Roots:
    """``roots`` with every number replaced by the set that ``function`` gives for it."""
    if isinstance(roots, list):
        return [_mapped(element, function) for element in roots]
    return set().union(*map(function, roots))
