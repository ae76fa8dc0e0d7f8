"""Modules as files: round trips, laziness, and every kind of damage refused in words."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import trimtab
from trimtab.errors import ArtifactError, ParseError, TrimtabError, UsageError
from trimtab.ir import Builder, DType, Module, TensorType, Weight, interpret, print_module, symbol, verify
from trimtab.ir.ops import Add, Cast, Embedding, LayerNorm, Linear
from trimtab.ir.storage import module_from_parts, read_module, write_module, write_weights
from trimtab.ir.weights import ArraySource, ComputedSource, TorchSource, pack_sub_byte, unpack_sub_byte
from trimtab.tensor_file import TensorFile

DTYPES = [dtype for dtype in DType if not dtype.is_sub_byte]


def small_model() -> Module:
    generator = torch.Generator().manual_seed(0)
    b = Builder()
    x = b.input("x", TensorType(DType.F32, (symbol("batch", 1, 8), 6)))
    h = b(Linear(x, b.weight("fc.weight", torch.randn(10, 6, generator=generator), trainable=True)))
    h = b(LayerNorm(h, b.weight("norm.weight", torch.rand(10, generator=generator)), None))
    b.output(h)
    return b.module


def module_of_weights(tensors: dict[str, torch.Tensor]) -> Module:
    b = Builder()
    b.output(*(b.weight(id, data) for id, data in tensors.items()))
    return b.module


def test_a_model_survives_and_computes_the_same(tmp_path: Path) -> None:
    module = small_model()
    write_module(module, tmp_path / "m.ttir")
    back = read_module(tmp_path / "m.ttir")
    verify(back)
    assert back == module
    assert back.weights["fc.weight"].trainable
    assert not back.weights["norm.weight"].trainable
    x = torch.randn(3, 6)
    torch.testing.assert_close(interpret(back, [x]), interpret(module, [x]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (2, 3, 7)], ids=str)
def test_every_dtype_and_shape_survives_bit_for_bit(tmp_path: Path, dtype: DType, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    data = torch.randint(0, 256, (*shape, max(dtype.bits // 8, 1)), generator=generator).to(torch.uint8)
    tensor = (data[..., 0] < 128) if dtype is DType.BOOL else data.view(dtype.to_torch()).reshape(shape)
    write_module(module_of_weights({"w": tensor}), tmp_path / "m.ttir")
    back = read_module(tmp_path / "m.ttir", check="now").weights["w"]
    assert back.type == TensorType(dtype, shape)
    assert back.tensor().shape == shape
    assert back.tensor().dtype == dtype.to_torch()
    if tensor.numel():
        assert torch.equal(back.tensor().reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [DType.I4, DType.U4, DType.POT4], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (8,), (3, 5), (2, 3, 1), (0, 3), (3, 0)], ids=str)
def test_sub_byte_weights_are_stored_packed(tmp_path: Path, dtype: DType, shape: tuple[int, ...]) -> None:
    low, high = (-8, 8) if dtype is DType.I4 else (0, 16)
    data = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1)).to(dtype.to_torch())
    weight = Weight("w", TensorType(dtype, shape), TorchSource(data))
    module = Module(weights=[weight])
    module.main.set_outputs([module.main.weight(weight)])
    write_module(module, tmp_path / "m.ttir")
    back = read_module(tmp_path / "m.ttir", check="now").weights["w"]
    assert back.type == weight.type
    assert torch.equal(back.tensor(), data)
    with TensorFileOf(tmp_path / "m.safetensors") as file:
        assert file["w"].array.nbytes == weight.nbytes
        assert file["w"].dtype == "u8"


class TensorFileOf:
    """A tensor file that tests open and forget."""

    def __init__(self, path: Path) -> None:
        self._file = TensorFile.open(path)

    def __enter__(self) -> TensorFile:
        return self._file

    def __exit__(self, *exc: object) -> None:
        del self._file


@pytest.mark.parametrize("dtype", [DType.I4, DType.U4, DType.POT4], ids=str)
def test_packing_has_an_inverse(dtype: DType) -> None:
    low, high = (-8, 8) if dtype is DType.I4 else (0, 16)
    data = torch.arange(low, high).to(dtype.to_torch()).repeat(2)[:31]
    packed = pack_sub_byte(data, dtype)
    assert packed.shape == (16,)
    assert int(packed[0]) == (low & 15) | ((low + 1) & 15) << 4
    assert torch.equal(unpack_sub_byte(packed, dtype, 31), data)


def test_odd_ids_and_shared_weights_survive(tmp_path: Path) -> None:
    ids = ['a "quoted" id', "tab\there", "ünïcode/ключ", "0", "a:", "//comment", "-1", "@%{}", "x" * 300]
    b = Builder()
    x = b.input("0", TensorType(DType.F32, (2,)))
    h = x
    for id in ids:
        w = b.weight(id, torch.randn(2))
        h = b(Add(b(Add(h, w)), w))
    b.output(h, names=["1"])
    write_module(b.module, tmp_path / "m.ttir")
    back = read_module(tmp_path / "m.ttir")
    assert list(back.weights) == ids
    assert back == b.module
    assert [value.name for value in back.main.inputs] == ["0"]
    assert back.main.output_names == ["1"]


def test_weights_are_views_of_the_map(tmp_path: Path) -> None:
    write_module(module_of_weights({"w": torch.randn(1000)}), tmp_path / "m.ttir")
    weight = read_module(tmp_path / "m.ttir", check="never").weights["w"]
    assert weight.tensor().data_ptr() == weight.tensor().data_ptr()
    assert weight.tensor().data_ptr() % 64 == 0


def test_computed_weights_are_written(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    weight = Weight("w", TensorType(DType.F32, (6, 4)), ComputedSource(lambda: base.t()))
    module = Module(weights=[weight])
    module.main.set_outputs([module.main.weight(weight)])
    write_module(module, tmp_path / "m.ttir")
    assert torch.equal(read_module(tmp_path / "m.ttir").weights["w"].tensor(), base.t())


def test_a_module_can_be_written_over_itself(tmp_path: Path) -> None:
    module = small_model()
    write_module(module, tmp_path / "m.ttir")
    again = read_module(tmp_path / "m.ttir", check="never")
    write_module(again, tmp_path / "m.ttir")
    assert read_module(tmp_path / "m.ttir", check="now") == module
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "m.ttir"]


def test_a_module_without_weights_is_one_file(tmp_path: Path) -> None:
    b = Builder()
    b.output(b(Cast(b.input("x", TensorType(DType.I64, ())), dtype=DType.F32)))
    write_module(b.module, tmp_path / "m.ttir")
    assert os.listdir(tmp_path) == ["m.ttir"]
    assert read_module(tmp_path / "m.ttir") == b.module


def test_parts_can_live_in_other_containers() -> None:
    module = small_model()
    file = io.BytesIO()
    size = write_weights(module, file)
    assert size == len(file.getvalue())
    back = module_from_parts(print_module(module), TensorFile(file.getvalue()), check="now")
    assert back == module


def test_public_names(tmp_path: Path) -> None:
    trimtab.write(small_model(), tmp_path / "m.ttir")
    assert trimtab.read(str(tmp_path / "m.ttir")) == small_model()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_module(small_model(), tmp_path / "m.ttir")
    return tmp_path


def refusal(path: Path, **options: object) -> TrimtabError:
    with pytest.raises(TrimtabError) as caught:
        read_module(path / "m.ttir", **options)  # type: ignore[arg-type]
    return caught.value


def test_wrong_suffix(written: Path) -> None:
    with pytest.raises(UsageError, match="has another suffix"):
        write_module(small_model(), written / "m.bin")
    with pytest.raises(UsageError, match="has another suffix"):
        read_module(written / "m.safetensors")


def test_missing_files(written: Path) -> None:
    (written / "m.safetensors").unlink()
    error = refusal(written)
    assert isinstance(error, UsageError)
    assert "m.safetensors" in error.message
    (written / "m.ttir").unlink()
    assert isinstance(refusal(written), UsageError)
    with pytest.raises(UsageError, match="its directory does not exist"):
        write_module(small_model(), written / "nowhere" / "m.ttir")


@pytest.mark.parametrize("keep", [0, 7, 8, 60, 200, -1, -64])
def test_truncated_weights(written: Path, keep: int) -> None:
    path = written / "m.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert isinstance(refusal(written), ArtifactError)


@pytest.mark.parametrize("keep", [0, 5, 40, 150, -30, -3])
def test_truncated_text(written: Path, keep: int) -> None:
    path = written / "m.ttir"
    path.write_bytes(path.read_bytes()[:keep])
    error = refusal(written)
    assert isinstance(error, ParseError | ArtifactError)
    assert isinstance(error, ArtifactError) or "line" in error.message


def test_text_that_is_not_text(written: Path) -> None:
    path = written / "m.ttir"
    path.write_bytes(path.read_bytes().replace(b"batch", b"b\xfftch"))
    assert "not UTF-8" in refusal(written).message


def test_a_flipped_bit_is_found_at_first_use(written: Path) -> None:
    path = written / "m.safetensors"
    data = bytearray(path.read_bytes())
    data[-60] ^= 1  # inside the last weight, before its padding
    path.write_bytes(data)
    assert "content is damaged" in refusal(written, check="now").message
    lazy = read_module(written / "m.ttir")
    assert lazy.weights["fc.weight"].tensor().shape == (10, 6)
    with pytest.raises(ArtifactError, match=r"content is damaged: weight=@norm\.weight"):
        lazy.weights["norm.weight"].tensor()
    read_module(written / "m.ttir", check="never").weights["norm.weight"].tensor()


def test_weights_of_another_module(written: Path) -> None:
    module = small_model()
    write_module(module_of_weights({id: w.tensor() + 1 for id, w in module.weights.items()}), written / "other.ttir")
    (written / "other.safetensors").replace(written / "m.safetensors")
    assert "do not belong together" in refusal(written, check="never").message


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"fc.weight": torch.zeros(10, 6)}, "a weight is missing: weight=@norm.weight"),
        ({"fc.weight": torch.zeros(6, 10), "norm.weight": torch.zeros(10)}, "stored with another type"),
        ({"fc.weight": torch.zeros(10, 6), "norm.weight": torch.zeros(10, dtype=torch.int32)}, "another type"),
    ],
)
def test_weights_that_do_not_fit(written: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    write_module(module_of_weights(tensors), written / "other.ttir")
    (written / "other.safetensors").replace(written / "m.safetensors")
    assert message in refusal(written).message


def test_a_failed_write_leaves_the_old_pair(written: Path) -> None:
    def fail() -> torch.Tensor:
        raise RuntimeError("no data today")

    weight = Weight("w", TensorType(DType.F32, (4,)), ComputedSource(fail), sha256="0" * 64)
    module = Module(weights=[weight])
    module.main.set_outputs([module.main.weight(weight)])
    with pytest.raises(RuntimeError, match="no data today"):
        write_module(module, written / "m.ttir")
    assert read_module(written / "m.ttir", check="now") == small_model()
    assert sorted(os.listdir(written)) == ["m.safetensors", "m.ttir"]


def test_an_embedding_reads_only_its_rows_of_a_mapped_table(tmp_path: Path) -> None:
    b = Builder()
    table = torch.from_numpy(np.random.default_rng(0).standard_normal((50, 4), dtype=np.float32))
    b.output(b(Embedding(b.weight("table", table), b.input("ids", TensorType(DType.I64, (3,))))))
    write_module(b.module, tmp_path / "m.ttir")
    ids = torch.tensor([4, 0, 49])
    (rows,) = interpret(read_module(tmp_path / "m.ttir"), [ids])
    assert torch.equal(rows, table[ids])


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)], ids=str)
def test_an_array_source_keeps_its_shape(shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    tensor = ArraySource(array, DType.F32).tensor()
    assert tuple(tensor.shape) == shape
    assert tensor.tolist() == array.tolist()
