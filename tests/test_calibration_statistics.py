"""Statistics of values inside a module: what is seen, in how much memory, what is refused, and files of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trimtab
from trimtab.errors import ArtifactError, CalibrationError, UsageError
from trimtab.ir import Builder, DType, Graph, Module, TensorType, Value, interpret
from trimtab.ir.ops import Add, Div, Fused, Log, Mul, Relu, Repeat
from trimtab.passes.quantization.observers import KINDS, MinMax, Observer, make_observer
from trimtab.passes.quantization.statistics import observe
from trimtab.passes.quantization.statistics_file import load_statistics, save_statistics
from trimtab.tensor_file import TensorSource, write_tensors


class Recorder(MinMax):
    """Keeps copies of all that it is given."""

    def __init__(self) -> None:
        super().__init__(None, False)
        self.seen: list[torch.Tensor] = []

    def _update(self, tensor: torch.Tensor) -> None:
        super()._update(tensor)
        self.seen.append(tensor.clone())


def _f32(*shape: int) -> TensorType:
    return TensorType(DType.F32, shape)


def _perceptron() -> Module:
    net = nn.Sequential(nn.Linear(6, 11), nn.GELU(), nn.Linear(11, 3)).eval()
    return trimtab.trace(net, (torch.randn(2, 6),))


def _values(module: Module) -> list[Value]:
    return [*module.main.inputs, *(value for op in module.main.ops for value in op.results)]


def _ranges(watched: dict[Value, Observer]) -> list[tuple[float, float]]:
    return [tuple(float(end) for end in observer.range()) for observer in watched.values()]  # type: ignore[misc]


def test_every_value_is_seen_in_every_batch() -> None:
    module = _perceptron()
    batches = [(torch.randn(2, 6),) for _ in range(4)]
    watched = {value: Recorder() for value in _values(module)}
    observe(module, watched, batches)
    for number, batch in enumerate(batches):
        computed: list[Any] = []
        outputs = interpret(module, batch, observer=lambda op, results, to=computed: to.extend(results))
        for recorder, tensor in zip(watched.values(), [*batch, *computed], strict=True):
            assert torch.equal(recorder.seen[number], tensor)
        assert torch.equal(list(watched.values())[-1].seen[number], outputs[0])
    assert {len(recorder.seen) for recorder in watched.values()} == {4}


def _repeated() -> tuple[Module, Graph]:
    """x is doubled, has its row of s added and is multiplied with c, three times."""
    b = Builder()
    x, s, c = b.input("x", _f32(2, 4)), b.input("s", _f32(3, 4)), b.input("c", _f32(4))
    body = Graph()
    inner = Builder(b.module, body)
    carried, row, factor = body.add_input(x.type), body.add_input(_f32(4)), body.add_input(c.type)
    body.set_outputs([inner(Mul(inner(Add(inner(Add(carried, carried)), row)), factor))])
    b.output(b(Repeat((x,), (s,), (c,), body, 3)))
    return b.module, body


def test_the_body_of_a_repeat_is_seen_in_every_iteration() -> None:
    module, body = _repeated()
    doubled, added, multiplied = body.ops
    watched = {value: Recorder() for value in [*body.inputs, doubled.result, added.result, multiplied.result]}
    x, s, c = torch.randn(2, 4), torch.randn(3, 4), torch.randn(4)
    observe(module, watched, [(x, s, c)])
    for step in range(3):
        expected = [x, s[step], c, 2 * x, 2 * x + s[step], (2 * x + s[step]) * c]
        for recorder, tensor in zip(watched.values(), expected, strict=True):
            assert torch.equal(recorder.seen[step], tensor)
        x = expected[-1]
    assert {len(recorder.seen) for recorder in watched.values()} == {3}


def test_the_body_of_a_kernel_is_seen() -> None:
    b = Builder()
    x = b.input("x", _f32(2, 3))
    body = Graph()
    inner = Builder(b.module, body)
    y = inner(Relu(body.add_input(x.type)))
    body.set_outputs([inner(Add(y, y))])
    b.output(b(Fused((x,), body, "relu+add")))
    watched = {body.inputs[0]: Recorder(), y: Recorder()}
    data = torch.randn(2, 3)
    observe(b.module, watched, [[data.numpy()]])
    assert torch.equal(watched[body.inputs[0]].seen[0], data)
    assert torch.equal(watched[y].seen[0], data.relu())


class Counted:
    """Batches made as they are asked for; how many of their tensors were alive together, those of the module's inner
    values included."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.alive: set[int] = set()
        self.most = 0

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        key = id(tensor)
        self.alive.add(key)
        weakref.finalize(tensor, self.alive.discard, key)
        self.most = max(self.most, len(self.alive))
        return tensor

    def __iter__(self) -> Iterator[tuple[torch.Tensor]]:
        # A function's frame would keep the last batch.
        return map(self._batch, range(self.count))

    def _batch(self, _: int) -> tuple[torch.Tensor]:
        return (self.note(torch.randn(2, 6)),)


class Noting(MinMax):
    """Counts the tensors that it is given among those alive."""

    def __init__(self, counted: Counted) -> None:
        super().__init__(None, False)
        self._counted = counted

    def update(self, tensor: torch.Tensor) -> None:
        super().update(self._counted.note(tensor))


def test_memory_does_not_grow_with_the_batches() -> None:
    module = _perceptron()
    most = []
    for count in (1, 30):
        batches = Counted(count)
        observe(module, {value: Noting(batches) for value in _values(module)[1:]}, batches)
        assert not batches.alive
        most.append(batches.most)
    assert most[0] == most[1]


class Unstable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * 2
        return torch.log(scaled) + 1  # the line


@pytest.mark.parametrize(("value", "elements"), [(0.0, "1 of 6"), (-1.0, "1 of 6")])
def test_what_is_not_finite_is_named(value: float, elements: str) -> None:
    module = trimtab.trace(Unstable().eval(), (torch.rand(2, 3),))
    (log,) = (op for op in module.walk() if isinstance(op, Log))
    batches = [(torch.rand(2, 3) + 0.1,) for _ in range(4)]
    batches[2][0][1, 1] = value
    with pytest.raises(CalibrationError) as caught:
        observe(module, {log.x: make_observer("minmax"), log.result: make_observer("minmax")}, batches, what="quantize")
    error = caught.value
    assert error.where == "calibration batch 2, for quantize"
    assert str(error.values["value"]).endswith(": f32[2, 3]")
    assert "log" in str(error.values["op"])
    assert str(error.values["elements"]).startswith(elements)
    assert error.location is not None
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith("# the line"))
    assert (Path(error.location.file).name, error.location.line) == (Path(__file__).name, line)


def test_an_input_that_is_not_finite_is_named() -> None:
    module = _perceptron()
    with pytest.raises(CalibrationError, match=r"%input: f32\[2, 6\], op=an input.*\n.*calibration batch 0"):
        observe(module, {module.main.inputs[0]: make_observer("minmax")}, [(torch.full((2, 6), float("nan")),)])


def test_an_integer_may_be_observed() -> None:
    module = trimtab.trace(nn.Embedding(9, 2).eval(), (torch.zeros(2, 3, dtype=torch.int64),))
    watched = {module.main.inputs[0]: make_observer("minmax")}
    observe(module, watched, [(torch.tensor([[1, 5, 2], [8, 3, 3]]),)])
    assert _ranges(watched) == [(1.0, 8.0)]


def test_a_module_that_cannot_be_evaluated_names_the_batch() -> None:
    module = trimtab.trace(nn.Embedding(9, 2).eval(), (torch.zeros(2, 3, dtype=torch.int64),))
    with pytest.raises(CalibrationError, match=r"cannot be evaluated.*\n.*calibration batch 1, op"):
        observe(module, {}, [(torch.full((2, 3), 8),), (torch.full((2, 3), 9),)])


def test_channels_that_change_are_named() -> None:
    b = Builder()
    n = trimtab.ir.symbol("n", 1, 9)
    x = b.input("x", TensorType(DType.F32, (n, 2)))
    y = b(Div(x, x))
    b.output(y)
    with pytest.raises(CalibrationError, match=r"another number of channels.*\n.*calibration batch 1"):
        observe(b.module, {y: make_observer("minmax", axis=0)}, [(torch.ones(3, 2),), (torch.ones(4, 2),)])


def test_no_batch_is_refused() -> None:
    with pytest.raises(CalibrationError, match="there is no calibration batch"):
        observe(_perceptron(), {}, iter(()))


def test_weights_and_values_of_others_are_refused() -> None:
    module = _perceptron()
    weight = next(value for graph in module.all_graphs() for value in graph.weights)
    with pytest.raises(UsageError, match="it is a weight"):
        observe(module, {weight: make_observer("minmax")}, [(torch.randn(2, 6),)])
    with pytest.raises(UsageError, match="not in the module"):
        observe(module, {module.copy().main.inputs[0]: make_observer("minmax")}, [(torch.randn(2, 6),)])


def _all_kinds(module: Module) -> dict[Value, Observer]:
    return {value: make_observer(KINDS[n % len(KINDS)], bits=4 + n) for n, value in enumerate(_values(module))}


def test_statistics_are_kept_in_a_file(tmp_path: Path) -> None:
    module = _perceptron()
    first, second = ([(torch.randn(2, 6),) for _ in range(n)] for n in (3, 2))
    watched = _all_kinds(module)
    channels = next(iter(module.main.ops)).result
    watched[channels] = make_observer("minmax", axis=-1)
    observe(module, watched, first)
    save_statistics(tmp_path / "s.safetensors", module, watched)
    trimtab.write(module, tmp_path / "m.ttir")
    again = trimtab.read(tmp_path / "m.ttir")
    loaded = load_statistics(tmp_path / "s.safetensors", again)
    for value, other in zip(_values(module), _values(again), strict=True):
        for one, two in zip(watched[value].range(), loaded[other].range(), strict=True):
            assert torch.equal(one, two)
        assert loaded[other].options == watched[value].options
    observe(module, watched, second)
    observe(again, loaded, second)
    for value, other in zip(_values(module), _values(again), strict=True):
        for one, two in zip(watched[value].range(), loaded[other].range(), strict=True):
            assert torch.equal(one, two)


def test_statistics_of_a_body_are_kept(tmp_path: Path) -> None:
    module, body = _repeated()
    _, added, _ = body.ops
    watched: dict[Value, Observer] = {body.inputs[1]: make_observer("mse"), added.result: make_observer("minmax")}
    observe(module, watched, [(torch.randn(2, 4), torch.randn(3, 4), torch.randn(4))])
    save_statistics(tmp_path / "s", module, watched)
    loaded = load_statistics(tmp_path / "s", module)
    assert loaded.keys() == watched.keys()
    assert _ranges({value: loaded[value] for value in watched}) == _ranges(watched)


def test_statistics_of_another_module_are_refused(tmp_path: Path) -> None:
    module = _perceptron()
    observe(module, watched := _all_kinds(module), [(torch.randn(2, 6),)])
    save_statistics(tmp_path / "s", module, watched)
    shorter = module.copy()
    shorter.main.set_outputs([next(iter(shorter.main.ops)).result])
    with pytest.raises(CalibrationError, match="statistics are of another module"):
        load_statistics(tmp_path / "s", _perceptron())  # other weights
    with pytest.raises(CalibrationError, match="statistics are of another module"):
        load_statistics(tmp_path / "s", shorter)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    module = _perceptron()
    observe(module, watched := _all_kinds(module), [(torch.randn(2, 6),)])
    path = tmp_path / "s"
    save_statistics(path, module, watched)
    data = path.read_bytes()
    for size in [0, 1, 7, 8, 100, *np.random.randint(0, len(data), 40), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(ArtifactError):
            load_statistics(path, module)
    begin = len(data) - int.from_bytes(data[:8], "little")
    for place in np.random.randint(begin, len(data), 40):
        changed = bytearray(data)
        changed[place] ^= 0x41
        path.write_bytes(changed)
        try:
            loaded = load_statistics(path, module)
        except (ArtifactError, CalibrationError):
            continue
        # Padding between tensors is nobody's data.
        assert _ranges({value: loaded[value] for value in watched}) == _ranges(watched)


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ({}, "no statistics that this version reads"),
        ({"format": "trimtab.statistics 2"}, "found=trimtab.statistics 2"),
        ({"observers": "[]"}, "about its observers"),
        ({"observers": "{"}, "about its observers"),
        ({"observers": '{"main/7/0": {"kind": "minmax"}}'}, "about its observers"),
        ({"observers": '{"main/input/0": {"kind": "mse"}}'}, "about its observers"),
        ({"observers": '{"main/input/0": {"king": "mse"}}'}, "about its observers"),
        ({"data": "0"}, "not what was written"),
    ],
)
def test_files_with_something_else_are_refused(tmp_path: Path, metadata: dict[str, str], part: str) -> None:
    module = _perceptron()
    save_statistics(tmp_path / "s", module, {})
    from trimtab.tensor_file import TensorFile

    written = TensorFile.open(tmp_path / "s").metadata
    empty = {"x:low": TensorSource("f64", (1,), np.zeros(1))} if "data" in metadata else {}
    write_tensors(tmp_path / "other", empty, {**written, **metadata} if metadata else {"format": "pt"})
    with pytest.raises(CalibrationError, match=part):
        load_statistics(tmp_path / "other", module)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    module = _perceptron()
    with pytest.raises(UsageError, match="not in the module"):
        save_statistics(tmp_path / "s", module, {_perceptron().main.inputs[0]: make_observer("minmax")})
    with pytest.raises(UsageError, match="does not exist"):
        save_statistics(tmp_path / "none" / "s", module, {})

    class Own(Recorder):
        kind = "own"

    with pytest.raises(UsageError, match="observer=own"):
        save_statistics(tmp_path / "s", module, {module.main.inputs[0]: Own()})
