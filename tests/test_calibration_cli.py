"""``--calibration``: which batches the passes get from files and folders, in how much memory, and what is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cli_harness import Commands, write_model_file

import trimtab
from trimtab.cli.array_files import ArrayFile
from trimtab.cli.calibration_files import CalibrationFiles, calibration_files
from trimtab.cli.progress import Stages
from trimtab.errors import CalibrationError, InputError, UsageError
from trimtab.ir import Builder, DType, Module, TensorType, symbol
from trimtab.ir.ops import Relu
from trimtab.passes import Context, Contract, Lossy, Pass, registry

SEEN: list[tuple[torch.Tensor, ...]] = []


@dataclass(frozen=True)
class SeeBatches(Pass):
    """Keep the calibration batches for the test that runs this."""

    name: ClassVar[str] = "see-batches"
    contract: ClassVar[Contract] = Lossy()

    def run(self, module: Module, ctx: Context) -> bool:
        SEEN[:] = [tuple(tensor.clone() for tensor in batch) for batch in ctx.calibration]
        return False


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    write_model_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(registry._OWN, SeeBatches.name, "test_calibration_cli:SeeBatches")  # type: ignore[index]
    SEEN.clear()
    return Commands(capsys)


def _samples(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 6)).astype(np.float32)


def _sizes() -> list[int]:
    return [len(batch[0]) for batch in SEEN]


def _joined() -> np.ndarray:
    return torch.cat([batch[0] for batch in SEEN]).numpy()


def test_samples_are_cut_into_batches_of_the_traced_size(commands: Commands) -> None:
    data = _samples(7)
    np.savez("data.npz", x=data)
    outcome = commands.ok("optimize", "model.py:build", "--passes", "see-batches", "--calibration", "data.npz")
    assert _sizes() == [2, 2, 2]
    np.testing.assert_array_equal(_joined(), data[:6])
    assert "1 of 7 samples of data.npz are left out: a batch has 2" in " ".join(outcome.out.split())


@pytest.mark.parametrize(("given", "sizes"), [([], [7]), (["3"], [3, 3, 1]), (["7"], [7]), (["100"], [7])])
def test_samples_are_cut_as_said_where_any_number_fits(commands: Commands, given: list[str], sizes: list[int]) -> None:
    data = _samples(7)
    np.savez_compressed("data.npz", x=data)
    options = ["--calibration", "data.npz", *(("--calibration-batch", *given) if given else ())]
    document = commands.ok("optimize", "model.py:dynamic", "--passes", "see-batches", *options, "--json").json
    assert _sizes() == sizes
    np.testing.assert_array_equal(_joined(), data)
    assert document["calibration"] == {"batches": len(sizes), "notes": []}


def test_a_folder_has_a_batch_in_each_file(commands: Commands) -> None:
    folder = Path("data")
    folder.mkdir()
    batches = [_samples(n) for n in (2, 5, 3)]
    for name, batch in zip(("a", "b", "c"), batches, strict=True):
        np.savez(folder / f"{name}.npz", x=batch)
    (folder / "readme.txt").write_text("not a batch")
    np.savez("more.npz", x=_samples(4))
    options = ["--calibration", "data", "--calibration", "more.npz", "--calibration-batch", "2"]
    commands.ok("optimize", "model.py:dynamic", "--passes", "see-batches", *options)
    assert _sizes() == [2, 5, 3, 2, 2]
    np.testing.assert_array_equal(_joined(), np.concatenate([*batches, _samples(4)]))


def test_quantize_takes_calibration_from_the_command_line(commands: Commands) -> None:
    np.savez("data.npz", x=_samples(64))
    passes = ["--passes", "cleanup,fuse,quantize", "--calibration", "data.npz"]
    document = commands.ok("optimize", "model.py:build", *passes, "-o", "q.ttir", "--json").json
    assert document["calibration"]["batches"] == 32
    assert "linear_integer" in {op.name for op in trimtab.read("q.ttir").walk()}


def test_compile_passes_calibration_on(commands: Commands) -> None:
    pytest.importorskip("tvm")
    np.savez("data.npz", x=_samples(6))
    options = ["--target", "native", "--passes", "see-batches", "--calibration", "data.npz"]
    outcome = commands.ok("compile", "model.py:build", "-o", "m.trim", *options)
    assert _sizes() == [2, 2, 2]
    assert "3 calibration batches" in outcome.out
    document = commands.ok("compile", "model.py:build", "-o", "m.trim", *options, "--json").json
    assert document["calibration"] == {"batches": 3, "notes": []}


def test_compile_of_the_package_passes_calibration_on(commands: Commands) -> None:
    pytest.importorskip("tvm")
    module = trimtab.trace(torch.nn.ReLU().eval(), (torch.randn(2, 6),))
    trimtab.compile(module, "native", pipeline="see-batches", calibration=(_samples(2) for _ in range(5)))
    assert _sizes() == [2] * 5
    with pytest.raises(CalibrationError, match="calibration batch 0"):
        trimtab.compile(module, "native", pipeline="see-batches", calibration=[_samples(3)])


def test_bisect_takes_the_same_data(commands: Commands) -> None:
    np.savez("data.npz", x=_samples(6))
    commands.ok("bisect", "model.py:build", "--passes", "see-batches", "--calibration", "data.npz")
    assert _sizes() == [2, 2, 2]


def _bad_samples() -> None:
    data = _samples(6)
    data[5, 0] = np.nan
    np.savez("bad.npz", x=data)


def _truncated() -> None:
    np.savez("bad.npz", x=_samples(600))
    Path("bad.npz").write_bytes(Path("bad.npz").read_bytes()[:9000])


def _empty_folder() -> None:
    Path("bad.npz").mkdir()


def _objects() -> None:
    np.savez("bad.npz", x=np.array([{}, "a"], dtype=object))


@pytest.mark.parametrize(
    ("prepare", "options", "code", "part"),
    [
        (_bad_samples, [], CalibrationError, "calibration batch 2"),
        (_truncated, [], InputError, "cannot read an input file"),
        (_objects, [], InputError, "Python objects"),
        (_empty_folder, [], UsageError, "no batches in a folder"),
        (lambda: None, [], UsageError, "no such input file"),
        (lambda: np.savez("bad.npz", x=_samples(1)), [], CalibrationError, "fewer samples than a batch"),
        (lambda: np.savez("bad.npz", y=_samples(2)), [], CalibrationError, "unknown=['y']"),
        (lambda: np.savez("bad.npz", x=_samples(4)[:, :5]), [], CalibrationError, "wrong shape"),
        (lambda: np.savez("bad.npz", x=_samples(4).astype(int)), [], CalibrationError, "rank or dtype"),
        (lambda: np.savez("bad.npz", x=np.float32(1)), [], CalibrationError, "rank or dtype"),
        (lambda: np.savez("bad.npz", x=_samples(4)), ["--calibration-batch", "3"], UsageError, "of another size"),
        (lambda: Path("bad.npz").write_text("text"), [], InputError, "cannot read an input file"),
    ],
)
def test_bad_data_are_refused(
    commands: Commands, prepare: Callable[[], object], options: list[str], code: Any, part: str
) -> None:
    prepare()
    outcome = commands("optimize", "model.py:build", "--passes", "see-batches", "--calibration", "bad.npz", *options)
    assert outcome.code == code.exit_code
    assert part in " ".join(outcome.err.split())


def test_options_without_use_are_refused(commands: Commands) -> None:
    outcome = commands("optimize", "model.py:build", "--calibration-batch", "3")
    assert (outcome.code, "give --calibration too" in outcome.err) == (2, True)
    np.savez("data.npz", x=_samples(2))
    outcome = commands("compile", "model.py:build", "--passes", "", "--calibration", "data.npz")
    assert (outcome.code, "nothing to calibrate" in outcome.err) == (2, True)


def _module(*types: TensorType) -> Module:
    b = Builder()
    inputs = [b.input(f"x{number}", type) for number, type in enumerate(types)]
    b.output(*(b(Relu(x)) for x in inputs))
    return b.module


def _f32(*shape: Any) -> TensorType:
    return TensorType(DType.F32, shape)


def _floats(*shape: int) -> np.ndarray:
    return np.random.standard_normal(shape).astype(np.float32)


N = symbol("n", 2, 50)


@pytest.mark.parametrize(
    ("types", "shapes", "size", "expected"),
    [
        # Static sizes: one sample a batch; several; two rows of one input for each of another.
        ([_f32(1, 3), _f32(1, 2)], [(5, 3), (5, 2)], None, [[(1, 3), (1, 2)]] * 5),
        ([_f32(4, 3), _f32(8, 2)], [(12, 3), (24, 2)], None, [[(4, 3), (8, 2)]] * 3),
        # What has no samples is in every batch.
        ([_f32(2, 3), _f32(7, 3), _f32()], [(6, 3), (7, 3), ()], None, [[(2, 3), (7, 3), ()]] * 3),
        ([_f32(7, 3), _f32(2, 3)], [(7, 3), (6, 3)], None, [[(7, 3), (2, 3)]] * 3),
        # A symbol: the last batch has the rest, unless that is fewer than the module takes.
        ([_f32(N, 3), _f32(N)], [(8, 3), (8,)], 3, [[(3, 3), (3,)], [(3, 3), (3,)], [(2, 3), (2,)]]),
        ([_f32(N, 3)], [(7, 3)], 3, [[(3, 3)], [(3, 3)]]),
        ([_f32(N, 3), _f32(3, 3)], [(6, 3), (3, 3)], 3, [[(3, 3), (3, 3)]] * 2),
        ([_f32(N, 3)], [(7, 3)], None, [[(7, 3)]]),
        ([_f32(2 * N, 3)], [(8, 3)], 3, [[(8, 3)]]),
    ],
)
@pytest.mark.parametrize("columns_first", [False, True])
def test_how_arrays_are_cut(
    tmp_path: Path, types: list[TensorType], shapes: list[tuple[int, ...]], size: int | None,
    expected: list[list[tuple[int, ...]]], columns_first: bool,
) -> None:  # fmt: skip
    arrays = {f"x{n}": np.asarray(_floats(*shape)) for n, shape in enumerate(shapes)}
    stored = {key: np.asfortranarray(array) if columns_first and array.ndim else array for key, array in arrays.items()}
    np.savez(tmp_path / "data.npz", **stored)
    batches = CalibrationFiles(_module(*types), [tmp_path / "data.npz"], size)
    assert len(batches) == len(expected)
    for _ in range(2):
        drawn = list(batches)
        assert [[batch[key].shape for key in arrays] for batch in drawn] == expected
    starts = dict.fromkeys(arrays, 0)
    for batch in drawn:
        for key, array in arrays.items():
            if batch[key].shape == array.shape:
                np.testing.assert_array_equal(batch[key], array)
                continue
            end = starts[key] + len(batch[key])
            np.testing.assert_array_equal(batch[key], array[starts[key] : end])
            starts[key] = end


@pytest.mark.parametrize(
    ("types", "shapes", "size"),
    [
        ([_f32(1, 3), _f32(1, 2)], [(5, 3), (1, 2)], None),
        ([_f32(2, 3), _f32(2, 2)], [(6, 3), (7, 2)], None),
        ([_f32(4, 3), _f32(8, 2)], [(12, 3), (12, 2)], None),
        ([_f32(N, 3), _f32(N)], [(8, 3), (4,)], 4),
    ],
)
def test_different_numbers_of_samples_are_refused(
    tmp_path: Path, types: list[TensorType], shapes: list[tuple[int, ...]], size: int | None
) -> None:
    np.savez(tmp_path / "data.npz", **{f"x{n}": _floats(*shape) for n, shape in enumerate(shapes)})
    with pytest.raises(CalibrationError, match="different numbers of samples"):
        CalibrationFiles(_module(*types), [tmp_path / "data.npz"], size)


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">i8", "|b1", "<f2"])
def test_arrays_of_any_kind_are_read_in_pieces(tmp_path: Path, dtype: str) -> None:
    array = (10 * _floats(9, 4)).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    np.savez_compressed(tmp_path / "a.npz", a=array, b=array[:, :0])
    pieces = [piece[""] for piece in ArrayFile(tmp_path / "a.npy").pieces({"": 4})]
    np.testing.assert_array_equal(np.concatenate(pieces), array)
    assert pieces[0].dtype == np.dtype(dtype).newbyteorder("=")
    both = list(ArrayFile(tmp_path / "a.npz").pieces({"a": 5, "b": None}))
    np.testing.assert_array_equal(np.concatenate([piece["a"] for piece in both]), array)
    assert [piece["b"].shape for piece in both] == [(9, 0)] * 2


def test_an_array_file_is_for_the_only_input(commands: Commands) -> None:
    np.save("data.npy", _samples(4))
    commands.ok("optimize", "model.py:build", "--passes", "see-batches", "--calibration", "data.npy")
    assert _sizes() == [2, 2]


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x0=_floats(6, 3))
    file = ArrayFile(tmp_path / "data.npz")
    np.savez(tmp_path / "data.npz", x0=_floats(8, 3))
    with pytest.raises(InputError, match="changed while it was used"):
        list(file.pieces({"x0": 2}))


def test_a_file_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    peaks = []
    for count in (20, 400):
        np.savez(tmp_path / "data.npz", x0=np.zeros((count, 20_000), np.float32))
        batches = CalibrationFiles(_module(_f32(1, 20_000)), [tmp_path / "data.npz"], None)
        tracemalloc.start()
        for batch in batches:
            assert batch["x0"].nbytes == 80_000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The larger file has 32 MB.
    assert max(peaks) < 2_000_000
    assert peaks[1] < peaks[0] + 500_000


def test_each_batch_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    stages = Stages(lambda stage, fraction: told.append((stage, fraction)))
    stages("quantize", 0.25)
    np.savez(tmp_path / "data.npz", x0=_floats(2, 3))
    batches = calibration_files(_module(_f32(1, 3)), [tmp_path / "data.npz"], None, stages.detail)
    assert batches is not None
    list(batches)
    assert told[1:] == [(f"quantize, calibration batch {n} of 2", 0.25) for n in (1, 2)]
