"""Lower precision end to end: the zoo keeps the contract, and is no worse than PyTorch's own bfloat16."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_harness import Commands
from op_examples import ALL_EXAMPLES, OpExample, random_inputs
from torch import Tensor, nn

import trimtab
from precision import error, pytorch_errors
from trimtab.artifact import TOLERANCE
from trimtab.compiler import PRECISIONS
from trimtab.errors import ArtifactError, UsageError
from trimtab.ir import Builder, DType, Module, TensorType, Value, interpret, ops
from trimtab.ir.analysis.statistics import count_ops
from trimtab.passes.cast_precision import _MOVES, _PRODUCTS
from trimtab.passes.manager import PassManager
from zoo_models import get

BF, HALF = "cast-precision", "cast-precision{to=f16-storage}"


@pytest.fixture(scope="module", params=["deit", "bert", "gpt2", "swin"])
def traced(request: pytest.FixtureRequest) -> tuple[str, Module]:
    entry = get(request.param)
    module = trimtab.trace(entry.build(), tuple(entry.inputs(2, 12).values()), dynamic_shapes=entry.dynamic_shapes())
    return entry.name, PassManager("cleanup,fuse", check="never").run(module)[0]


def test_zoo_models_keep_the_contract(traced: tuple[str, Module]) -> None:
    _, module = traced
    for passes, drift in ((BF, 2**-5), (HALF, 2**-8)):
        result, report = PassManager(passes).run(module)
        assert module.weight_bytes > 1.65 * result.weight_bytes
        row = report.rows[0]
        assert row.drift is not None
        assert 0 < row.drift.relative < drift
        assert not row.rules[0]["rejected"]


def test_bfloat16_is_no_worse_than_that_of_pytorch(traced: tuple[str, Module]) -> None:
    """Both by the reference interpreter and compiled, on a size that was not traced."""
    name, module = traced
    entry = get(name)
    inputs = entry.inputs(3, 33)
    expected, theirs = pytorch_errors(name, entry.build, inputs)
    bfloat16 = next(row for row in theirs if row.system == "PyTorch bfloat16()")
    result, _ = PassManager(f"{BF},group-fusions", check="never").run(module)
    ways = {"interpreter": interpret(result, list(inputs.values()))}
    if _has_tvm():
        from tvm_harness import Compiled

        ways["tvm"] = tuple(Compiled(result)(*inputs.values()))
    for system, outputs in ways.items():
        ours = error(name, system, expected, outputs)
        print(f"{ours}\n{bfloat16}")
        assert ours.rms <= bfloat16.rms


def _has_tvm() -> bool:
    from trimtab.compiler import find_backend

    return find_backend("tvm").status().works


# -- every op that the pass makes, in TVM ------------------------------------------------------------------------------


def _half(type: TensorType, dtype: DType) -> TensorType:
    return type.with_dtype(dtype) if type.dtype is DType.F32 else type


def _examples() -> list[OpExample]:
    wanted = (*_PRODUCTS, *_MOVES)
    chosen = [e for e in ALL_EXAMPLES if issubclass(e.cls, wanted) and not e.is_symbolic and not e.special]
    return [e for e in chosen if any(type.dtype is DType.F32 for _, type in e.named_types)]


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_every_op_of_the_pass_compiles_in_16_bits(dtype: DType) -> None:
    """Products within two roundings of the interpreter, whose sums are rounded elsewhere; moves bit for bit."""
    pytest.importorskip("tvm")
    from tvm_harness import Compiled

    builder, inputs, exact, results = Builder(), [], [], []
    for number, example in enumerate(_examples()):
        values: list[Value] = []
        for (_, plain), data in zip(example.named_types, random_inputs(example, {}, 0), strict=True):
            values.append(builder.input(f"x{number}_{len(values)}", _half(plain, dtype)))
            inputs.append(data.to(values[-1].type.dtype.to_torch()))
        flat = iter(values)
        groups = [
            tuple(next(flat) for _ in given) if isinstance(given, tuple) else None if given is None else next(flat)
            for given in example.operands
        ]
        op = builder.add(example.cls(*groups, **example.attributes))
        results += op.results
        exact += [not issubclass(example.cls, _PRODUCTS)] * len(op.results)
    builder.output(*results)
    assert {type(value.producer) for value in results} >= {ops.Linear, ops.Attention, ops.Conv2d, ops.Embedding}
    for value, same, found, expected in zip(
        results, exact, Compiled(builder.module)(*inputs), interpret(builder.module, inputs), strict=True
    ):
        assert found.dtype is expected.dtype
        if same:
            assert torch.equal(found, expected), value.producer
        else:
            scale = float(expected.double().abs().max())
            gap = float((found.double() - expected.double()).abs().max())
            assert gap <= 2 * torch.finfo(expected.dtype).eps * scale, value.producer


def test_weights_in_16_bits_are_packed_and_read_as_they_are_stored() -> None:
    """In main, in a repeat's body and stacked, the panels of a linear layer are float16; nothing widened is stored."""
    pytest.importorskip("tvm")
    from pass_harness import read
    from tvm_harness import Compiled

    calm = {"w": torch.randn(48, 64) / 8, "stack": torch.randn(3, 48, 48) / 14, "shared": torch.randn(48, 48) / 14}
    text = """
symbols n=1..64
weight @w: f32[48, 64]
weight @stack: f32[3, 48, 48]
weight @shared: f32[48, 48]
weight @kernel: f32[5, 48]
graph main(%x: f32[n, 64]) {
  %h = linear(%x, @w) : f32[n, 48]
  %y = repeat([%h], [@stack], []) {n=3} : f32[n, 48] graph (%c: f32[n, 48], %s: f32[48, 48]) {
    %a = linear(%c, %s) : f32[n, 48]
    %b = linear(%a, @shared) : f32[n, 48]
    %t = tanh(%b) : f32[n, 48]
    return output=%t
  }
  %k = permute(@kernel) {dims=[1, 0]} : f32[48, 5]
  %z = matmul(%y, %k) : f32[n, 5]
  return z=%z
}"""
    module = read(text, **calm)
    for passes, rtol in ((HALF, 1e-5), (BF, 2e-2)):
        result, _ = PassManager(f"{passes},group-fusions").run(module)
        compiled = Compiled(result)
        kinds = {weight.name.split(".")[0]: weight.layout for weight in compiled.code.weights}
        assert all(kinds[id] is not None for id in ("w", "stack", "shared"))
        assert all(weight.dtype in ("f16", "bf16") for weight in compiled.code.weights)
        for rows in (1, 7, 33):
            x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
            (found,), (expected,) = compiled(x), interpret(result, [x], precision=torch.float32)
            torch.testing.assert_close(found, expected, rtol=0, atol=rtol * float(expected.abs().max()))


# -- artifacts ---------------------------------------------------------------------------------------------------------


class Chooser(nn.Module):
    """Logits and the choice between them, which rounding may change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(24, 64), nn.Linear(64, 500)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.down(nn.functional.gelu(self.up(x)))
        return logits, logits.argmax(-1)


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.mark.parametrize("precision", ["bf16", "f16-storage"])
def test_artifacts_say_their_precision_and_pass_their_check(precision: str, tmp_path: Path, commands: Commands) -> None:
    pytest.importorskip("tvm")
    x = torch.randn(16, 24)
    module = trimtab.trace(Chooser().eval(), (x,))
    artifact = trimtab.compile(module, target="native", precision=precision)
    path = artifact.save(tmp_path / "model.trim")
    assert artifact.precision == artifact.manifest.precision == precision
    assert PRECISIONS[precision] in artifact.manifest.pipeline.split(",")
    assert any(row["name"] == "cast-precision" and row["changed"] for row in artifact.report["passes"])
    assert artifact.manifest.tolerance is not None
    assert (artifact.manifest.tolerance == TOLERANCE) == (precision == "f16-storage")
    document = commands.ok("inspect", str(path), "--json").json
    assert document["precision"] == precision
    assert f"precision {precision}" in " ".join(commands.ok("inspect", str(path)).out.split())
    with trimtab.load(path) as session:
        logits, choice = session(x.numpy())
    (expected, _) = interpret(module, [x])
    assert logits.dtype == np.float32
    assert np.abs(logits - expected.numpy()).max() < 0.03 * float(expected.abs().max())
    assert np.array_equal(choice, logits.argmax(-1))


def test_the_check_of_a_bfloat16_artifact_finds_wrong_code(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    import dataclasses

    module = trimtab.trace(Chooser().eval(), (torch.randn(16, 24),))
    artifact = trimtab.compile(module, precision="bf16")
    first = artifact.samples[0]
    wrong = dataclasses.replace(first, outputs=(first.outputs[0] * 1.2, first.outputs[1]))
    with pytest.raises(ArtifactError, match="failed its self-check"):
        dataclasses.replace(artifact, samples=(wrong,)).save(tmp_path / "model.trim")


def test_a_model_in_bfloat16_is_checked_with_the_tolerance_of_its_rounding(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    module = trimtab.trace(Chooser().eval().bfloat16(), (torch.randn(16, 24).bfloat16(),))
    artifact = trimtab.compile(module)
    assert artifact.precision == "f32"
    with zipfile.ZipFile(artifact.save(tmp_path / "model.trim")) as file:
        tolerance = json.loads(file.read("manifest.json"))["tolerance"]
    assert tolerance["rtol"] >= 2**-5
    assert not tolerance["integers"]


def test_the_command_compiles_in_a_precision(tmp_path: Path, commands: Commands) -> None:
    pytest.importorskip("tvm")
    model, path = tmp_path / "model.ttir", tmp_path / "model.trim"
    trimtab.write(trimtab.trace(Chooser().eval(), (torch.randn(3, 24),)), model)
    document = commands.ok("compile", str(model), "-o", str(path), "--precision", "bf16", "--json").json
    assert document["precision"] == "bf16"
    assert "cast-precision" in document["pipeline"]
    assert count_ops(trimtab.read(model))["cast"] == 0


def test_an_unknown_precision_is_refused() -> None:
    b = Builder()
    b.output(b(ops.Relu(b.input("x", TensorType(DType.F32, (2,))))))
    with pytest.raises(UsageError, match="precision=half, known=f32, bf16, f16-storage"):
        trimtab.compile(b.module, precision="half")
