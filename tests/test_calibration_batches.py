"""Calibration batches from lists, files, loaders and generators: how often they are drawn, what is kept, and errors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import trimtab
from trimtab.errors import CalibrationError, InputError
from trimtab.ir import Builder, DType, Module, TensorType, symbol
from trimtab.ir.ops import Mul, Relu
from trimtab.passes import Context, Contract, Exact, Lossy, Pass, PassManager
from trimtab.passes.calibration import check_calibration, converted
from trimtab.passes.quantization.observers import make_observer
from trimtab.passes.quantization.statistics import observe


@pytest.fixture
def module() -> Module:
    b = Builder()
    b.output(b(Relu(b.input("x", TensorType(DType.F32, (symbol("n", 1, 9), 3))))), names=["y"])
    return b.module


def _array(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((2, 3)).astype(np.float32)


class Source:
    """Makes batch i anew each time; knows how many were made, and how many of them are alive at once."""

    def __init__(self, count: int, bad: int = -1) -> None:
        self.count, self.bad = count, bad
        self.made: list[int] = []
        self.alive: set[int] = set()
        self.most = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.batch, range(self.count))

    def batch(self, number: int) -> np.ndarray:
        array = _array(number)
        if number == self.bad:
            array[1, 2] = np.nan
        self.made.append(number)
        key = id(array)
        self.alive.add(key)
        weakref.finalize(array, self.alive.discard, key)
        self.most = max(self.most, len(self.alive))
        return array


def _numbers(batches: Sequence[tuple[torch.Tensor, ...]]) -> list[int]:
    """Which batches these are."""
    known = {_array(number).tobytes(): number for number in range(20)}
    return [known[batch[0].numpy().tobytes()] for batch in batches]


def test_a_source_is_drawn_at_each_walk_and_only_so_far(module: Module) -> None:
    source = Source(5)
    batches = check_calibration(module, source)
    assert source.made == [0]
    assert batches
    assert _numbers(batches[:2]) == [0, 1]
    assert source.made.count(2) == 0
    assert _numbers(list(batches)) == _numbers(list(batches)) == [0, 1, 2, 3, 4]
    assert len(batches) == 5
    drawn = len(source.made)
    assert len(batches) == 5
    assert len(source.made) == drawn


def test_an_iterator_is_drawn_once_and_only_so_far(module: Module) -> None:
    source = Source(5)
    batches = check_calibration(module, iter(source))
    assert _numbers(batches[:2]) == _numbers(batches[:2]) == [0, 1]
    assert source.made == [0, 1]
    walk, other = iter(batches), iter(batches)
    for _ in range(4):
        assert torch.equal(next(walk)[0], next(other)[0])
    assert source.made == [0, 1, 2, 3]
    assert _numbers(batches) == _numbers(batches) == [0, 1, 2, 3, 4]
    assert len(batches) == 5
    assert source.made == [0, 1, 2, 3, 4]


def test_an_iterator_may_make_all_batches_in_one_place(module: Module) -> None:
    buffer = np.empty((2, 3), np.float32)

    def same_place() -> Iterator[np.ndarray]:
        for number in range(4):
            buffer[:] = _array(number)
            yield buffer

    assert _numbers(check_calibration(module, same_place())) == [0, 1, 2, 3]


@pytest.mark.parametrize("make", [list, tuple, lambda arrays: iter(list(arrays)), lambda arrays: Source(6)])
def test_it_is_a_sequence(module: Module, make: Any) -> None:
    batches = check_calibration(module, make(map(_array, range(6))))
    expected = list(range(6))
    assert bool(batches)
    assert len(batches) == 6
    for part in (slice(None), slice(2), slice(2, None), slice(1, 5, 2), slice(-2, None), slice(None, -4),
                 slice(None, None, -1), slice(9, 12), slice(4, 2)):  # fmt: skip
        assert _numbers(batches[part]) == expected[part]
    for place in (0, 3, 5, -1, -6):
        assert _numbers([batches[place]]) == [expected[place]]
    for place in (6, -7, 100):
        with pytest.raises(IndexError):
            batches[place]
    assert _numbers([one for one, _ in zip(batches, range(6), strict=True)]) == expected
    with pytest.raises(ValueError, match="zip"):
        list(zip(batches, range(5), strict=True))


def test_batches_of_a_dataset_with_items_only(module: Module) -> None:
    class Items:
        def __getitem__(self, place: int) -> np.ndarray:
            if place >= 3:
                raise IndexError(place)
            return _array(place)

    assert _numbers(check_calibration(module, Items())) == [0, 1, 2]  # type: ignore[arg-type]


def test_a_loader_of_torch(module: Module) -> None:
    data = torch.utils.data.TensorDataset(torch.from_numpy(np.concatenate([_array(n) for n in range(4)])))
    batches = check_calibration(module, torch.utils.data.DataLoader(data, batch_size=2))
    assert _numbers(batches) == _numbers(batches) == [0, 1, 2, 3]


def test_bad_batches_of_a_list_are_refused_at_once(module: Module) -> None:
    arrays = [_array(n) for n in range(5)]
    arrays[4][0, 0] = np.inf
    with pytest.raises(CalibrationError, match="calibration batch 4"):
        check_calibration(module, arrays)


def test_bad_batches_of_a_source_are_refused_at_each_walk(module: Module) -> None:
    batches = check_calibration(module, Source(5, bad=3))
    for _ in range(2):
        with pytest.raises(CalibrationError, match=r"NaN or infinities: input=x, elements=1 of 6.*\n.*batch 3"):
            list(batches)


def test_bad_batches_of_an_iterator_are_not_skipped_later(module: Module) -> None:
    batches = check_calibration(module, iter(Source(5, bad=3)))
    for _ in range(2):
        walk = iter(batches)
        assert _numbers([next(walk) for _ in range(3)]) == [0, 1, 2]
        with pytest.raises(CalibrationError, match="calibration batch 3"):
            next(walk)


class Failing:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Iterator[np.ndarray]:
        yield _array(0)
        raise self.error


@pytest.mark.parametrize("once", [False, True])
def test_a_source_that_raises_is_named(module: Module, once: bool) -> None:
    source = Failing(OSError("the disk is gone"))
    batches = check_calibration(module, iter(source) if once else source)
    for _ in range(2):
        with pytest.raises(CalibrationError, match=r"error=OSError: the disk is gone.*\n.*calibration batch 1"):
            list(batches)
    own = check_calibration(module, Failing(InputError("cannot read an input file")))
    with pytest.raises(InputError, match="cannot read"):
        list(own)


@pytest.mark.parametrize("nothing", [[], (), iter(()), Source(0)])
def test_no_batch_is_refused(module: Module, nothing: Any) -> None:
    with pytest.raises(CalibrationError, match="there is no calibration batch"):
        check_calibration(module, nothing)


@pytest.mark.parametrize("given", [7, {"x": _array(0)}])
def test_what_is_no_batches_is_refused(module: Module, given: Any) -> None:
    with pytest.raises(CalibrationError, match="put a single batch in a list"):
        check_calibration(module, given)


def test_a_source_that_gets_shorter_is_refused(module: Module) -> None:
    source = Source(4)
    batches = check_calibration(module, source)
    assert len(list(batches)) == 4
    source.count = 3
    with pytest.raises(CalibrationError, match="before=4, now=3"):
        list(batches)


def test_converted_batches_are_made_anew(module: Module) -> None:
    source = Source(4)
    doubled = converted(check_calibration(module, source), lambda batch: tuple(2 * tensor for tensor in batch))
    assert bool(doubled)
    assert len(doubled) == 4
    for number, (tensor,) in enumerate(doubled):
        assert torch.equal(tensor, 2 * torch.from_numpy(_array(number)))
    assert source.most <= 2


@dataclass(frozen=True)
class Calibrate(Pass):
    """Scale the output by what was seen on the data."""

    name: ClassVar[str] = "calibrate"
    contract: ClassVar[Contract] = Lossy()
    walks: int = 3

    def run(self, module: Module, ctx: Context) -> bool:
        for _ in range(self.walks):
            watched = {value: make_observer("mse") for op in module.main.ops for value in op.results}
            observe(module, watched, ctx.calibration, what=self.name)
        (relu,) = module.main.ops
        build = Builder(module)
        factor = build.scalar(float(watched[relu.result].range()[1]), relu.result.type.dtype)
        module.main.set_outputs([build(Mul(relu.result, factor))], ["y"])
        return True


@pytest.mark.parametrize("once", [False, True])
def test_memory_of_a_run_does_not_grow_with_the_batches(module: Module, once: bool) -> None:
    most = []
    for count in (4, 60):
        source = Source(count)
        manager = PassManager([Calibrate()])
        manager.run(module, Context(calibration=check_calibration(module, iter(source) if once else source)))
        assert source.made.count(count - 1) == (1 if once else 3)
        most.append(source.most)
    # The contract is checked on two batches; one or two more are being made or looked at. What an iterator gives is
    # copied, so that the arrays themselves are not kept either.
    assert most[0] == most[1] <= 4


def test_a_bad_batch_in_a_pass_names_batch_and_pass(module: Module) -> None:
    batches = check_calibration(module, Source(8, bad=6))
    with pytest.raises(CalibrationError, match=r"the pass calibrate failed: .*NaN.*\n.*batch 6\n.*in pass"):
        PassManager([Calibrate()]).run(module, Context(calibration=batches))


@dataclass(frozen=True)
class Widen(Pass):
    """Add an input that is not read."""

    name: ClassVar[str] = "widen"
    contract: ClassVar[Contract] = Exact()
    changes_signature: ClassVar[bool] = True

    def run(self, module: Module, ctx: Context) -> bool:
        module.main.add_input(replace(module.main.inputs[0].type), "unread")
        return True

    def inputs_after(self, before: Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (*inputs, torch.zeros_like(inputs[0]))


def test_batches_follow_a_changed_signature_one_at_a_time(module: Module) -> None:
    source = Source(40)
    result, _ = PassManager([Widen(), Calibrate()]).run(module, Context(calibration=check_calibration(module, source)))
    assert [value.name for value in result.main.inputs] == ["x", "unread"]
    assert source.most <= 4


def test_optimize_takes_anything_that_can_be_iterated(module: Module) -> None:
    for batches in (Source(3), iter(Source(3)), [_array(n) for n in range(3)], ({"x": _array(n)} for n in range(3))):
        report = trimtab.optimize(module, "cleanup", calibration=batches).report
        assert report.rows
