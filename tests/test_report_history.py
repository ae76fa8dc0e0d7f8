"""What a report keeps of a run: every module exactly, each op followed from pass to pass, and repeated blocks found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import modules

import trimtab
from trimtab.errors import PassError, UsageError
from trimtab.ir import Builder, DType, Graph, Module, TensorType, ops, symbol
from trimtab.ir.attributes import print_attribute
from trimtab.passes.base import Context, Pass
from trimtab.passes.contracts import Contract, Exact, Lossy
from trimtab.passes.manager import PassManager
from trimtab.passes.observers import Observer, Step
from trimtab.report.blocks import LONGEST_STRETCH, SHORTEST_BLOCK, sections
from trimtab.report.history import History
from trimtab.report.recorder import ReportRecorder

F32 = DType.F32


class Reader:
    """The tables of a history, read as the page reads them."""

    def __init__(self, tables: dict[str, Any]) -> None:
        self.tables = json.loads(json.dumps(tables))
        self.strings = self.tables["strings"]

    def states(self, snapshot: int) -> list[list[Any]]:
        """The states of all ops of a snapshot, graph by graph."""
        found = []
        for graph in self.tables["snapshots"][snapshot]:
            runs = self.tables["graphs"][graph]["runs"]
            for first, count in zip(runs[::2], runs[1::2], strict=True):
                found += self.tables["states"][first : first + count]
        return found

    def numbers(self, snapshot: int, mnemonic: str = "") -> list[int]:
        """The numbers of the ops of a snapshot, or of those of one kind."""
        return [s[0] for s in self.states(snapshot) if not mnemonic or self.strings[s[1]] == mnemonic]

    def text(self, snapshot: int) -> list[str]:
        """A line for each op: kind, which earlier value each operand is, attributes, result types."""
        lines = []
        weights = {number: f"@{id}" for number, id, _, _ in self.tables["weights"]}
        for position in self.tables["snapshots"][snapshot]:
            graph = self.tables["graphs"][position]
            places = dict(weights)
            for number, _, _ in graph["inputs"]:
                places[number] = f"%{len(places)}"
            runs = graph["runs"]
            for first, count in zip(runs[::2], runs[1::2], strict=True):
                for number, name, _, _, _, _, _, attributes, _, operands, results in self.tables["states"][
                    first : first + count
                ]:
                    read = ", ".join(places[value] for value in operands)
                    shown = ", ".join(f"{key}={value}" for key, value, _ in self.tables["attributes"][attributes])
                    types = ", ".join(self.strings[type] for type in results[1::2])
                    lines.append(f"{self.strings[name]}({read}) {{{shown}}} : {types}")
                    for index in range(len(results) // 2):
                        places[number + index] = f"%{len(places)}"
            lines.append("return " + ", ".join(f"{self.strings[name]}={places[v]}" for name, v in graph["outputs"]))
        return lines


def _text_of(module: Module, weights: list[str]) -> list[str]:
    """The lines that :meth:`Reader.text` gives, taken from the module itself. ``weights`` are those of the report."""
    lines: list[str] = []

    def add(graph: Graph) -> None:
        places: dict[Any, str] = {id: f"@{id}" for id in weights}
        for value in graph.inputs:
            places[value] = f"%{len(places)}"
        regions = []
        for op in graph.ops:
            read = ", ".join(places[v.weight if v.is_weight else v] for v in op.operands)
            shown = ", ".join(f"{key}={print_attribute(value)}" for key, value in op.attributes.items())
            types = ", ".join(str(value.type) for value in op.results)
            lines.append(f"{op.name}({read}) {{{shown}}} : {types}")
            for value in op.results:
                places[value] = f"%{len(places)}"
            regions += op.regions
        outputs = zip(graph.output_names, graph.outputs, strict=True)
        returned = ", ".join(f"{name}={places[v.weight if v.is_weight else v]}" for name, v in outputs)
        lines.append(f"return {returned}")
        for region in regions:
            add(region)

    for graph in module.graphs.values():
        add(graph)
    return lines


def _chain(*names: str) -> Module:
    """Unary ops one after another on ``f32[batch, 4]``."""
    b = Builder()
    x = b.input("x", TensorType(F32, (symbol("batch", 1, 8), 4)))
    for name in names:
        x = b({"relu": ops.Relu, "tanh": ops.Tanh, "neg": ops.Neg, "exp": ops.Exp}[name](x))
    b.output(x)
    return b.module


def _record(module: Module, *passes: Pass) -> tuple[Module, Reader, dict[str, Any]]:
    recorder = ReportRecorder("test")
    result, _ = PassManager(passes, [recorder], check="never").run(module)
    document = recorder.to_dict()
    return result, Reader(document), document


class Keep(Observer):
    """Keeps the module after every pass, to compare the report with."""

    def __init__(self) -> None:
        self.modules: list[Module] = []

    def before_pass(self, step: Step) -> None:
        if not self.modules:
            self.modules.append(step.before)

    def after_pass(self, step: Step) -> None:
        self.modules.append(step.after if step.row.changed else self.modules[-1])


@given(modules())
@settings(max_examples=40)
def test_every_snapshot_says_what_the_module_was(module: Module) -> None:
    recorder, keep = ReportRecorder(), Keep()
    trimtab.optimize(module, "cleanup,fuse", observers=[recorder, keep], check="never")
    document = recorder.to_dict()
    reader = Reader(document)
    weights = [id for _, id, _, _ in document["weights"]]
    assert len(document["steps"]) == len(keep.modules) == len(document["report"]["passes"]) + 1
    for step, kept in zip(document["steps"], keep.modules, strict=True):
        assert reader.text(step) == _text_of(kept, weights)


def test_passes_that_change_nothing_share_a_snapshot() -> None:
    recorder = ReportRecorder()
    trimtab.optimize(_chain("relu", "tanh"), "dce,cse", observers=[recorder])
    assert recorder.to_dict()["steps"] == [0, 0, 0]


@dataclass(frozen=True)
class Insert(Pass):
    """Put a neg before each tanh."""

    name: ClassVar[str] = "insert"
    contract: ClassVar[Contract] = Lossy()

    def run(self, module: Module, ctx: Context) -> bool:
        for op in list(module.main.ops):
            if op.name == "tanh":
                new = module.main.ops.insert_before(op, ops.Neg(op.operands[0]))
                op.set_operand(0, new.result)
        return True


@dataclass(frozen=True)
class Rebuild(Pass):
    """Replace the module by one with other ops of the same meaning, and one relu more."""

    name: ClassVar[str] = "rebuild"
    contract: ClassVar[Contract] = Lossy()

    def run(self, module: Module, ctx: Context) -> bool:
        fresh = module.copy()
        last = fresh.main.ops.append(ops.Relu(fresh.main.outputs[0]))
        fresh.main.set_outputs([last.result])
        module.assign(fresh)
        return True


def test_ops_keep_their_numbers_and_new_ones_get_new_ones() -> None:
    _, reader, document = _record(_chain("relu", "tanh", "exp"), Insert())
    before, after = document["steps"]
    assert reader.numbers(before) == [n for n in reader.numbers(after) if n not in reader.numbers(after, "neg")]
    assert set(reader.numbers(after, "neg")).isdisjoint(reader.numbers(before))
    # relu and exp are in the same state; tanh reads another value and is in a new one.
    old, new = ({s[0]: s for s in reader.states(step)} for step in (before, after))
    changed = [reader.strings[old[n][1]] for n in old if old[n] != new[n]]
    assert changed == ["tanh"]


def test_ops_of_a_module_that_was_built_anew_are_recognised() -> None:
    _, reader, document = _record(_chain("relu", "tanh"), Insert(), Rebuild())
    _, inserted, rebuilt = document["steps"]
    assert reader.numbers(rebuilt)[:-1] == reader.numbers(inserted)
    assert reader.numbers(rebuilt)[-1] not in reader.numbers(inserted)


def test_a_pass_that_runs_after_one_without_effect_is_followed_too() -> None:
    _, reader, document = _record(_chain("relu", "tanh"), trimtab_pass("dce"), Insert(), trimtab_pass("dce"))
    assert len(set(document["steps"])) == 2
    assert len(reader.numbers(document["steps"][-1], "neg")) == 1


def trimtab_pass(name: str) -> Pass:
    from trimtab.passes.registry import load_pass

    return load_pass(name)()


def test_regions_weights_costs_and_places_are_recorded() -> None:
    b = Builder()
    x = b.input("x", TensorType(F32, (symbol("batch", 2, 8), 4)))
    body = Graph("", [])
    inner = body.add_input(x.type, "carried")
    weight = b.module.add_weight(trimtab.ir.Weight.from_tensor("w", torch.randn(4, 4)))
    op = body.ops.append(ops.Linear(inner, body.weight(weight)))
    body.set_outputs([op.result])
    with b.at(trimtab.errors.Location("model.py", 12, "forward")):
        y = b.add(ops.Repeat([x], [], [], body, n=3))
    b.output(*y.results)
    history = History()
    history.take(b.module)
    reader = Reader(history.to_dict())
    paths = [graph["path"] for graph in reader.tables["graphs"]]
    assert paths == ["main", "main / repeat 1 body"]
    repeat, linear = reader.states(0)
    assert (reader.strings[repeat[3]], repeat[4]) == ("model.py", 12)
    assert linear[6] == 2 * 4 * 4  # at the smallest batch
    assert [row[1:] for row in reader.tables["weights"]] == [["w", "f32[4, 4]", 64]]
    assert [reader.strings[name] for name in linear[8]] == ["x", "weight"]


@dataclass(frozen=True)
class Break(Pass):
    """Leave an op that reads one that is no longer in the graph, and fail."""

    name: ClassVar[str] = "break"
    contract: ClassVar[Contract] = Exact()

    def run(self, module: Module, ctx: Context) -> bool:
        first, second = list(module.main.ops)[:2]
        second.set_operand(0, ops.Neg(first.result).result)
        raise ValueError("half done")


def test_a_failing_pass_is_recorded_as_it_left_the_module() -> None:
    recorder = ReportRecorder()
    with pytest.raises(PassError, match="half done"):
        PassManager([Insert(), Break()], [recorder], check="never").run(_chain("relu", "tanh"))
    document = recorder.to_dict()
    assert document["failed_row"] == 1
    assert "half done" in document["failure"]["what"]
    assert len(document["steps"]) == 3
    assert len(Reader(document).states(document["steps"][-1])) == 3


def test_a_recorder_that_saw_nothing_says_so() -> None:
    with pytest.raises(UsageError, match="nothing to report yet"):
        ReportRecorder().to_dict()


def test_an_empty_pipeline_has_one_snapshot() -> None:
    _, reader, document = _record(_chain("relu"))
    assert document["steps"] == [0]
    assert reader.text(0) == ["relu(%0) {} : f32[batch, 4]", "return output=%1"]


# -- repeated blocks ------------------------------------------------------------------------------------------------


def _last_reads_of_a_chain(count: int) -> list[int]:
    return [min(index + 1, count) for index in range(count)]


def test_repeated_blocks_are_found_between_what_does_not_repeat() -> None:
    block = [1, 2, 3, 1, 2, 4, 5, 6, 7, 8]
    kinds = [90, 91, *block * 5, 92]
    found = sections(kinds, _last_reads_of_a_chain(len(kinds)))
    assert [(s.start, s.length, s.times) for s in found] == [(0, 2, 1), (2, 10, 5), (52, 1, 1)]


def test_a_block_begins_where_the_fewest_values_pass() -> None:
    # Ops 0 to 2 look like the end of a block, so that the repetition could begin at any of four places; a value that is
    # made by the first op of a block and read by the last passes all places within a block.
    block = [10, 11, 12, 13, 14, 15, 16, 1, 2, 3]
    kinds = [1, 2, 3, *block * 4]
    reads = _last_reads_of_a_chain(len(kinds))
    for start in range(3, len(kinds), 10):
        reads[start] = start + 9
    (_, repeated) = sections(kinds, reads)
    assert (repeated.start, repeated.length, repeated.times) == (3, 10, 4)


def test_short_repetitions_are_left_alone() -> None:
    kinds = [1, 2, 3] * 10
    assert len(sections(kinds, _last_reads_of_a_chain(30))) <= 2
    assert all(s.length >= SHORTEST_BLOCK for s in sections(kinds, _last_reads_of_a_chain(30)) if s.times > 1)


@given(st.lists(st.integers(0, 3), max_size=300), st.data())
@settings(max_examples=60)
def test_sections_cover_every_op_once_and_their_blocks_are_equal(kinds: list[int], data: st.DataObject) -> None:
    count = len(kinds)
    reads = [data.draw(st.integers(index, count)) for index in range(count)] if count < 40 else [count - 1] * count
    position = 0
    for section in sections(kinds, reads):
        assert section.start == position
        position = section.stop
        blocks = [kinds[section.start + i * section.length :][: section.length] for i in range(section.times)]
        assert all(block == blocks[0] for block in blocks)
        stretches = zip(section.cuts, [*section.cuts[1:], section.length], strict=True)
        assert section.cuts[0] == 0
        assert all(0 < stop - start <= LONGEST_STRETCH for start, stop in stretches)
    assert position == count
