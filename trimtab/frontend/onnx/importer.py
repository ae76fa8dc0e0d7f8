"""Walks an ONNX graph and builds a module from it, one handler call a node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx.defs
import onnx_ir

from trimtab.errors import ImportModelError, Location, TrimtabError, UnsupportedOpError, UsageError, VerificationError
from trimtab.frontend.onnx.element_types import dtype_of
from trimtab.frontend.onnx.emitter import Emitter, check_size
from trimtab.frontend.onnx.functions import schema_defaults, schema_of, standard_body
from trimtab.frontend.onnx.initializers import store
from trimtab.frontend.onnx.loading import OpenedModel
from trimtab.frontend.onnx.locations import location_of
from trimtab.frontend.onnx.node import Node, UseDefinition, advice
from trimtab.frontend.onnx.registry import find_handler, normalized_domain, oldest_version
from trimtab.frontend.onnx.signature import DimSpec, Signature
from trimtab.frontend.onnx.symbolic_folding import SymbolicArray
from trimtab.frontend.onnx.unsupported import UnsupportedOps
from trimtab.ir.core import Module, Value

if TYPE_CHECKING:
    import torch

MAX_CALL_DEPTH = 64
Environment = dict[Any, Value | None]
"""The IR's value for each onnx_ir value seen so far; None for one that could not be computed."""

_HANDLER_FAILURES = (
    ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What a handler may raise on a node that is malformed in a way nobody thought of."""


@dataclass(frozen=True)
class _Frame:
    """One call of a function: the attributes given to it, and its parameters that got no argument."""

    attributes: Mapping[str, onnx_ir.Attr] = field(default_factory=dict)
    absent: frozenset[Any] = frozenset()


class Importer:
    """Imports one model once.

    Args:
        opened: the model.
        dims: sizes or ranges of named dimensions.
        constants: contents of graph inputs that become constants.
        limits: upper bounds of symbols, by name.
    """

    def __init__(
        self,
        opened: OpenedModel,
        dims: Mapping[str, DimSpec],
        constants: Mapping[str, torch.Tensor],
        limits: Mapping[str, int],
    ) -> None:
        self._model = opened.model
        self._file = opened.file
        self._files = opened.files
        self._constants = constants
        self._signature = Signature(dims, limits)
        self._unsupported = UnsupportedOps()
        self._functions = dict(opened.model.functions.items())
        self._frames = [_Frame()]
        self.module = Module()
        self.emitter = Emitter(self.module, self.module.main)

    def run(self) -> Module:
        """The imported module, not yet raised."""
        graph = self._model.graph
        env: Environment = {}
        self._check_opsets(self._model.opset_imports)
        self._declare_inputs(graph, env)
        self._import_graph(graph, env, self._model.opset_imports)
        self._unsupported.raise_if_any()
        outputs = []
        for value in graph.outputs:
            outputs.append(self.emitter.place(self._read(value, env, "the graph's outputs")))
            self._check_output(value, outputs[-1])
        self.module.main.set_outputs(outputs, [str(value.name) for value in graph.outputs])
        return self.module

    # -- graphs -------------------------------------------------------------------------------------------------

    def _check_opsets(self, imports: Mapping[str, int]) -> None:
        newest = onnx.defs.onnx_opset_version()
        version = imports.get("", imports.get("ai.onnx"))
        if version is not None and not 1 <= version <= newest:
            raise ImportModelError(
                "the model uses an opset that is not known",
                values={"opset": version, "newest known": newest},
                rule="operators may change their meaning from opset to opset",
                fix="upgrade onnx, or export with an older opset",
            )

    def _declare_inputs(self, graph: onnx_ir.Graph, env: Environment) -> None:
        known = {value.name for value in graph.inputs}
        unknown = [name for name in self._constants if name not in known]
        if unknown:
            raise UsageError("constants names inputs that the model does not have",
                             values={"unknown": unknown, "known": sorted(map(str, known))})  # fmt: skip
        free = [v for v in graph.inputs if v.name not in self._constants and v.name not in graph.initializers]
        for value, type in zip(free, self._signature.input_types(free), strict=True):
            check_size(type)
            env[value] = self.module.main.add_input(type, str(value.name))
        for value in graph.inputs:
            if value.name in self._constants:
                env[value] = self.emitter.known(self._constants[value.name], value.name)

    def _import_graph(self, graph: Any, env: Environment, opsets: Mapping[str, int]) -> None:
        for value in graph.initializers.values():
            if value not in env:
                if value.const_value is None:
                    raise ImportModelError("an initializer has no data", values={"name": value.name})
                try:
                    stored = store(value.const_value, self._files)
                    check_size(stored.type)
                    env[value] = self.emitter.stored(stored)
                except UnsupportedOpError as error:
                    if value.uses():
                        self._unsupported.add(value.name or "", error)
                    env[value] = None
        for node in graph:
            self._import_node(node, env, opsets)

    def _read(self, value: Any, env: Environment, reader: str) -> Value:
        if value not in env:
            late = value.producer() is not None
            raise ImportModelError(
                "a value is read before it is computed" if late else "a value is read that nothing defines",
                values={"value": value.name, "reader": reader},
                rule="the nodes of a graph are sorted, and a graph has no cycles" if late else
                     "a value is an input, an initializer or the output of a node",
                fix="sort the nodes (onnx_ir.passes.common.TopologicalSortPass says when there is a cycle)" if late
                    else "export the model again",
            )  # fmt: skip
        found = env[value]
        if found is None:
            raise ImportModelError(
                "a value is read that its node does not give",
                values={"value": value.name, "reader": reader},
                rule="the node's operator has no such output, or it holds a type that Trimtab does not know",
                fix="export the model without it",
            )
        return found

    # -- nodes --------------------------------------------------------------------------------------------------

    def _import_node(self, node: onnx_ir.Node, env: Environment, opsets: Mapping[str, int]) -> None:
        domain = normalized_domain(node.domain)
        location = location_of(node, self._file)
        given = [None if v is None or v in self._frames[-1].absent else v for v in node.inputs]
        missing = [v for v in given if v is not None and v not in env]
        if missing:
            self._read(missing[0], env, f"node {node.name or node.op_type!r}")
        poisoned = any(v is not None and env[v] is None for v in given)
        inputs = [None if v is None else env[v] for v in given]
        try:
            run = self._prepare(node, domain, inputs, env, opsets, location)
            results: Sequence[Value | None] = [None] * len(node.outputs) if poisoned else run()
        except UnsupportedOpError as error:
            error.location = error.location or location
            self._unsupported.add(node.op_type, error)
            results = [None] * len(node.outputs)
        except VerificationError as error:
            raise ImportModelError(
                f"{node.op_type} does not fit its inputs: {error.what}",
                values=error.values,
                rule=error.rule,
                fix="check the model's shapes; give sizes or ranges of dynamic axes with from_onnx(..., dims={...})",
                where=f"node {node.name or node.op_type!r}",
                location=location,
            ) from error
        except TrimtabError as error:
            error.location = error.location or location
            raise
        except _HANDLER_FAILURES as error:
            raise ImportModelError(
                f"{node.op_type} cannot be imported",
                values={"reason": f"{type(error).__name__}: {error}"[:200]},
                rule="the node is malformed, or Trimtab has a bug",
                fix="if the model runs elsewhere, report it with the model",
                where=f"node {node.name or node.op_type!r}",
                location=location,
            ) from error
        for output, result in zip(node.outputs, results, strict=False):
            env[output] = result
            if result is not None and not result.name and not result.is_weight:
                result.name = str(output.name or "")

    def _prepare(
        self, node: onnx_ir.Node, domain: str, inputs: list[Value | None], env: Environment,
        opsets: Mapping[str, int], location: Location,
    ) -> Callable[[], Sequence[Value | None]]:  # fmt: skip
        """A function that imports ``node``; raises when there is none."""
        attributes = self._attributes_of(node)
        function = self._functions.get(node.op_identifier())
        if function is not None:
            return lambda: self._call(function, inputs, attributes)
        version = opsets.get(domain, opsets.get("ai.onnx") if domain == "" else None)
        if version is None and domain == "":
            raise ImportModelError("the model imports no opset for its operators", values={"operator": node.op_type})
        version = version or 1
        if domain == "" and node.op_type == "If":
            return lambda: self._import_if(node, inputs, env, opsets)
        schema = schema_of(node.op_type, version, domain)
        defined = schema.since_version if schema is not None else version
        handler = find_handler(domain, node.op_type, defined)
        has_body = schema is not None and (schema.has_function or schema.has_context_dependent_function)
        if handler is None and not has_body:
            raise self._unknown(node, domain, version, schema is not None, location)

        def run() -> Sequence[Value | None]:
            self.emitter.location = location
            if handler is not None:
                view = Node(self.emitter, node, defined, inputs, attributes, location)
                try:
                    results = handler(view)
                    view.check_all_read(schema)
                    return results if isinstance(results, tuple) else (results,)
                except UseDefinition as reason:
                    if not has_body:
                        raise reason.refusal from reason
            body = standard_body(node, attributes, version, domain, inputs)
            if body is None:
                raise self._unknown(node, domain, version, True, location)
            made = self._call(body.function, inputs, {**schema_defaults(node.op_type, version, domain), **attributes})
            return [None if place is None else made[place] for place in body.outputs]

        return run

    def _attributes_of(self, node: onnx_ir.Node) -> dict[str, onnx_ir.Attr]:
        """The node's attributes, with references to those of the enclosing call replaced."""
        outer = self._frames[-1].attributes
        found = {}
        for name, attr in node.attributes.items():
            if not attr.is_ref():
                found[name] = attr
            elif (given := outer.get(str(attr.ref_attr_name))) is not None and given.value is not None:
                found[name] = onnx_ir.Attr(name, given.type, given.value)
        return found

    def _unknown(
        self, node: onnx_ir.Node, domain: str, version: int, exists: bool, location: Any
    ) -> UnsupportedOpError:
        oldest = oldest_version(domain, node.op_type)
        name = f"{domain}.{node.op_type}" if domain else node.op_type
        if oldest is not None and exists:
            return UnsupportedOpError(
                f"{name} of opset {version} is not imported",
                values={"node": node.name or "(unnamed)", "opset": version, "imported from opset": oldest},
                rule="older definitions of this operator mean something else",
                fix="convert the model with onnx.version_converter.convert_version(model, 21)",
                location=location,
            )
        return UnsupportedOpError(
            f"{name} is not imported",
            values={"node": node.name or "(unnamed)", "opset": version},
            rule="Trimtab has no counterpart for this operator" if exists or domain else
                 "the ONNX standard has no such operator in this opset",
            fix="export the model without it, or add a handler in trimtab/frontend/onnx/ops",
            location=location,
        )  # fmt: skip

    def _call(
        self, function: onnx_ir.Function, inputs: Sequence[Value | None], attributes: Mapping[str, onnx_ir.Attr]
    ) -> Sequence[Value | None]:
        """Import the body of ``function`` in place of a call."""
        if len(self._frames) > MAX_CALL_DEPTH:
            raise ImportModelError("functions call each other too deep", values={"limit": MAX_CALL_DEPTH})
        given = [*inputs, *[None] * (len(function.inputs) - len(inputs))]
        inner: Environment = dict(zip(function.inputs, given, strict=False))
        absent = frozenset(parameter for parameter, argument in inner.items() if argument is None)
        self._frames.append(_Frame({**function.attributes, **attributes}, absent))
        try:
            for step in function:
                self._import_node(step, inner, function.opset_imports)
        finally:
            self._frames.pop()
        return [inner.get(value) for value in function.outputs]

    def _import_if(
        self, node: onnx_ir.Node, inputs: list[Value | None], env: Environment, opsets: Mapping[str, int]
    ) -> Sequence[Value | None]:
        condition = inputs[0] if inputs else None
        content = None if condition is None else self.emitter.content(condition)
        if content is None or isinstance(content, SymbolicArray) or content.numel() != 1:
            raise UnsupportedOpError(
                "If: the condition is computed from data",
                values={"node": node.name or "(unnamed)"},
                rule="the graph has no branches; a condition must be constant or follow from sizes",
                fix="export the model with this choice made, or "
                + advice([] if condition is None else self.emitter.inputs_behind(condition)),
            )
        truth = bool(content.reshape(-1)[0])
        name = "then_branch" if truth else "else_branch"
        if name not in node.attributes or node.attributes[name].type != onnx_ir.AttributeType.GRAPH:
            raise ImportModelError("If: a branch is missing", values={"branch": name})
        branch = node.attributes[name].as_graph()
        if len(branch.outputs) != len(node.outputs):
            raise ImportModelError("If: a branch has the wrong number of outputs",
                                   values={"branch": len(branch.outputs), "node": len(node.outputs)})  # fmt: skip
        self._import_graph(branch, env, opsets)
        return [env.get(value) for value in branch.outputs]

    def _check_output(self, declared: Any, found: Value) -> None:
        """The file's statement about an output must not contradict what the graph computes."""
        shape = declared.shape
        text = f"{declared.dtype}[{', '.join(str(dim) for dim in shape)}]" if shape is not None else str(declared.dtype)
        wrong = shape is not None and (
            len(shape) != found.type.rank
            or any(
                isinstance(stated, int) and isinstance(size, int) and stated != size
                for stated, size in zip(shape, found.type.shape, strict=True)
            )
        )
        if wrong or (declared.dtype is not None and dtype_of(int(declared.dtype)) is not found.type.dtype):
            raise ImportModelError(
                "an output has another type than the model states",
                values={"output": declared.name, "stated": text, "computed": found.type},
                rule="the file contradicts itself",
                fix="export the model again, or correct the output's type in the file",
            )


def import_model(opened: OpenedModel, dims: Mapping[str, DimSpec], constants: Mapping[str, torch.Tensor]) -> Module:
    """Import ``opened``, bounding symbols where the model is consistent only within bounds.

    A table of 64 positions that is cut to the length of the input makes sense only for lengths up to 64; ONNX does not
    say so, but clips.  When the import fails without such a bound it is tried with it.
    """
    limits: dict[str, int] = {}
    while True:
        importer = Importer(opened, dims, constants, limits)
        try:
            return importer.run()
        except UnsupportedOpError:
            raise
        except TrimtabError:
            tighter = [r for r in importer.emitter.refinements if r.limit < limits.get(r.symbol, r.limit + 1)]
            if not tighter:
                raise
            limits[tighter[0].symbol] = tighter[0].limit
