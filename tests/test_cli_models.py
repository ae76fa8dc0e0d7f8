"""The MODEL argument: every form imports, and everything wrong with one is a message that says what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_harness import Commands, write_model_file

import trimtab
from trimtab.cli.model_argument import load_model, model_name
from trimtab.errors import ImportModelError, TrimtabError, UsageError
from trimtab.ir import interpret


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model_file(tmp_path)
    monkeypatch.chdir(tmp_path)


def _expected(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    hidden, head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
    with torch.no_grad():
        return head(torch.relu(hidden(x)))


def _check(module: trimtab.Module, batch: int = 2) -> None:
    x = torch.randn(batch, 6, generator=torch.Generator().manual_seed(1))
    (result,) = interpret(module, [x])
    torch.testing.assert_close(result, _expected(x))


def test_a_function() -> None:
    _check(load_model("model.py:build"))
    assert model_name("model.py:build") == "build"


def test_a_function_with_dynamic_shapes() -> None:
    module = load_model("model.py:dynamic")
    assert list(module.symbols()) == ["batch"]
    _check(module, batch=5)


def test_a_function_in_a_file_that_imports_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "neighbour_of_main.py").write_text("import torch\nmodel = torch.nn.Linear(2, 2).eval()\n")
    text = "import torch\nfrom neighbour_of_main import model\ndef build(): return model, torch.ones(1, 2)\n"
    (tmp_path / "deeper" / "main.py").write_text(text)
    assert len(load_model("deeper/main.py:build").weights) == 2


def test_a_ttir_file() -> None:
    trimtab.write(load_model("model.py:build"), "saved.ttir")
    _check(load_model("saved.ttir"))
    assert model_name("saved.ttir") == "saved"


def test_a_pt2_file() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    torch.export.save(torch.export.export(model, (torch.randn(2, 6),)), "saved.pt2")
    _check(load_model("saved.pt2"))


def test_an_onnx_file() -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    matrix = np.arange(6, dtype=np.float32).reshape(3, 2)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(matrix, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), "saved.onnx")
    (result,) = interpret(load_model("saved.onnx"), [torch.ones(1, 3)])
    np.testing.assert_allclose(result.numpy(), np.ones((1, 3)) @ matrix)


@pytest.mark.parametrize(
    ("spec", "error", "parts"),
    [
        ("model.onnx", UsageError, ["there is no such model file"]),
        ("nowhere/model.ttir", UsageError, ["the directory nowhere does not exist either"]),
        ("other.py:build", UsageError, ["there are: model.py"]),
        ("model.py", UsageError, ["name the function too: model.py:build"]),
        ("model.bin", UsageError, ["holds weights without the model"]),
        ("bert-base", UsageError, ["write a function"]),
        ("model.py:", UsageError, ["a function name is missing"]),
        ("model.py:nope", UsageError, ["the file has no such function", "build, dynamic"]),
        ("model.py:table", UsageError, ["the file has no such function"]),
        ("model.py:number", UsageError, ["returned=int", "return module, (example_input,)"]),
        ("model.py:not_a_module", UsageError, ["returned=(str, (Tensor))"]),
        ("model.py:training", ImportModelError, ["training mode", ".eval()"]),
        ("model.py:fails", ImportModelError, ["KeyError: 'model'", 'return values["model"]', "model.py:41 in fails"]),
        ("model.py:leaves", ImportModelError, ["SystemExit: 3", "sys.exit(3)"]),
    ],
)
def test_a_wrong_argument(spec: str, error: type[TrimtabError], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        load_model(spec)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("def build(:\n", ["not valid Python", "bad.py:1"]),
        ("import no_such_package_at_all\n", ["No module named", "bad.py:1"]),
        ("x = 1\ny = x / 0\n", ["ZeroDivisionError", "y = x / 0", "bad.py:2"]),
    ],
)
def test_a_file_that_does_not_load(tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ImportModelError) as caught:
        load_model("bad.py:build")
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x05\x06" + bytes(18)], ids=["empty", "text", "empty zip"])
def test_a_broken_pt2_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.pt2").write_bytes(content)
    with pytest.raises(ImportModelError, match=r"torch\.export|cannot load"):
        load_model("broken.pt2")


def test_ttir_without_weights(tmp_path: Path) -> None:
    trimtab.write(load_model("model.py:build"), "saved.ttir")
    (tmp_path / "saved.safetensors").unlink()
    with pytest.raises(TrimtabError, match="weights are missing"):
        load_model("saved.ttir")


def test_the_command_line_names_the_users_line(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = Commands(capsys)("inspect", "model.py:fails")
    assert outcome.code == ImportModelError.exit_code
    assert outcome.err.endswith('  at return values["model"]\n  from model.py:41 in fails\n')
