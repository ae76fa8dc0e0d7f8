"""What only a fresh process shows: imports, the runtime carried in the file, the self check, forks and kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runtime_fixture as fixture

from trimtab.runtime.manifest import Manifest, Tolerance, WeightEntry
from trimtab.runtime.samples import Sample, encode_samples


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("process") / "model.trim"
    fixture.write_artifact(path)
    return path


def python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


def self_check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trimtab.runtime.self_check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


RUN = """
import sys
import numpy as np
from trimtab.runtime import load
session = load(sys.argv[1], prefer_carried=len(sys.argv) > 2)
x, scale = np.ones((3, 8), np.float32), np.ones((3, 1), np.float32)
z, y = session(x, scale)
assert z.shape == (3, 4) and np.array_equal(y, np.maximum(z, 0))
origin = session._code.runtime.origin
"""
NOTHING_HEAVY = """
heavy = {"torch", "tvm", "onnx", "networkx", "scipy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
assert not [name for name in sys.modules if name.startswith(("trimtab.ir", "trimtab.passes", "trimtab.backends"))]
"""


@pytest.mark.parametrize(("arguments", "origin"), [((), "installed"), (("carried",), "artifact")])
def test_a_process_that_runs_imports_neither_torch_nor_tvm(path: Path, arguments: Any, origin: str) -> None:
    done = python(RUN + NOTHING_HEAVY + "print(origin)", path, *arguments)
    assert (done.returncode, done.stdout.strip()) == (0, origin), done.stderr


def test_torch_can_be_imported_afterwards(path: Path) -> None:
    done = python(RUN + "import torch; print(session(torch.from_numpy(x), torch.from_numpy(scale))[0].shape)", path)
    assert (done.returncode, done.stdout.strip()) == (0, "(3, 4)"), done.stderr


def test_tvm_can_be_imported_after_the_installed_runtime(path: Path) -> None:
    done = python(RUN + "import tvm; tvm.tirx.Var('n', 'int64'); session(x, scale); print('fine')", path)
    assert (done.returncode, done.stdout.strip()) == (0, "fine"), done.stderr


def test_importing_tvm_after_the_carried_runtime_is_an_error_not_an_abort(path: Path) -> None:
    found = "import importlib.util; assert importlib.util.find_spec('tvm') is not None\n"
    done = python(RUN + found + "import tvm", path, "carried")
    assert done.returncode == 1
    assert "ImportError: this process runs the TVM runtime carried in" in done.stderr


WITHOUT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "tvm" else find(name, *rest)
"""


def test_a_file_without_runtime_says_what_to_install(tmp_path: Path) -> None:
    fixture.write_artifact(tmp_path / "m", carried=False)
    assert python(RUN, tmp_path / "m").returncode == 0
    done = python(WITHOUT + RUN, tmp_path / "m")
    assert done.returncode == 1
    assert "MissingDependencyError: no TVM runtime library" in done.stderr
    assert "pip install apache-tvm==" in done.stderr


def test_a_missing_ffi_package_says_what_to_install(path: Path) -> None:
    done = python("import sys; sys.modules['tvm_ffi'] = None\n" + RUN, path)
    assert done.returncode == 1
    assert "pip install apache-tvm-ffi==" in done.stderr


def test_a_runtime_library_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    library = fixture.runtime_library()
    for broken in (library[: len(library) // 2], b"\x7fELF", library.replace(b"libtvm_ffi.so", b"libtvm_xyz.so")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fixture, "runtime_library", lambda broken=broken: broken)
            fixture.write_artifact(tmp_path / "m")
        done = python(RUN, tmp_path / "m", "carried")
        assert done.returncode == 1
        assert "ArtifactError" in done.stderr


MEMORY = """
import resource, sys
from trimtab.runtime import load
import numpy as np
load(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
session = load(sys.argv[2], verify=sys.argv[3])
session(np.ones((3, 8), np.float32), np.ones((3, 1), np.float32))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("verify", ["full", "code"])
def test_weights_that_are_not_used_take_no_memory(path: Path, tmp_path: Path, verify: str) -> None:
    table = np.ones((200, 1 << 18), np.float32)  # 200 MiB that the code does not take

    def with_table(manifest: Manifest) -> Manifest:
        weights = (*manifest.weights, WeightEntry("table", "f32", table.shape))
        variants = tuple(replace(variant, weights=("w", "b")) for variant in manifest.variants)
        return replace(manifest, weights=weights, variants=variants)

    fixture.write_artifact(tmp_path / "m", weights=fixture.WEIGHTS | {"table": table}, change=with_table)
    done = python(MEMORY, path, tmp_path / "m", verify)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60 * 1024  # KiB, on Linux


def test_importing_the_runtime_is_quick_and_light() -> None:
    code = "import trimtab.runtime, sys; assert 'numpy' not in sys.modules and 'tvm_ffi' not in sys.modules"
    assert python(code).returncode == 0


# --- self check ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--carried"], ["--threads", "1"]])
def test_self_check_passes(path: Path, options: list[str]) -> None:
    done = self_check(path, *options)
    assert done.returncode == 0, done.stderr
    assert "sample 1, output y: max difference" in done.stdout
    assert done.stdout.endswith("passed\n")
    data = json.loads(self_check(path, "--json", *options).stdout)
    assert data["passed"] is True
    assert [output["output"] for output in data["outputs"]] == ["z", "y", "z", "y"]


def test_self_check_fails_on_wrong_results(tmp_path: Path) -> None:
    inputs = fixture.random_inputs()
    z, y = fixture.expected(*inputs)
    for wrong in (z + 0.01, np.where(z == z[0, 0], np.float32("nan"), z), z[:2], z.astype(np.float64)):
        fixture.write_artifact(tmp_path / "m", check=encode_samples([Sample(inputs, (wrong, y))]))
        done = self_check(tmp_path / "m", "--json")
        assert done.returncode == 7
        assert json.loads(done.stdout)["passed"] is False


def test_self_check_keeps_to_the_tolerance(tmp_path: Path) -> None:
    def loose(manifest: Manifest) -> Manifest:
        return replace(manifest, tolerance=Tolerance(rtol=0.0, atol=0.02))

    inputs = fixture.random_inputs()
    z, y = fixture.expected(*inputs)
    fixture.write_artifact(tmp_path / "m", check=encode_samples([Sample(inputs, (z + 0.01, y))]), change=loose)
    assert self_check(tmp_path / "m").returncode == 0


@pytest.mark.parametrize(
    "check", [b"", b"PK\x05\x06" + bytes(18), b"garbage", encode_samples([]), encode_samples(fixture.samples())[:-50]]
)
def test_self_check_refuses_broken_samples(tmp_path: Path, check: bytes) -> None:
    fixture.write_artifact(tmp_path / "m", check=check)
    done = self_check(tmp_path / "m", "--json")
    assert done.returncode == 7
    assert json.loads(done.stdout)["error"]["code"] == "artifact"


def test_self_check_refuses_damage(path: Path, tmp_path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "m").write_bytes(data)
    done = self_check(tmp_path / "m")
    assert done.returncode == 7
    assert "SHA-256" in done.stderr
    assert self_check(tmp_path / "absent").returncode == 2


def test_running_from_the_command_line(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trimtab.runtime", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("(x: f32[batch, 8], scale: f32[batch, 1]) -> ")
    x, scale = fixture.random_inputs(4)
    np.savez(tmp_path / "in.npz", x=x, scale=scale)
    files = ["--input", str(tmp_path / "in.npz"), "--output", str(tmp_path / "out.npz")]
    subprocess.run([*command, *files], check=True, capture_output=True, timeout=60)
    with np.load(tmp_path / "out.npz") as outputs:
        np.testing.assert_allclose(outputs["z"], fixture.expected(x, scale)[0], rtol=1e-5, atol=1e-5)
    np.savez(tmp_path / "in.npz", x=x)
    done = subprocess.run([*command, *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 8
    assert "inputs are missing: missing=scale" in done.stderr


# --- forks and kills -------------------------------------------------------------------------------------------------

FORKED = (
    RUN
    + """
import os
child = os.fork()
if child == 0:
    again = load(sys.argv[1])
    ok = np.array_equal(session(x, scale)[0], z) and np.array_equal(again(x, scale)[0], z)
    os._exit(0 if ok else 3)
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(session(x, scale)[0], z)
"""
)


def test_a_forked_child_can_call_its_parents_session(path: Path) -> None:
    done = python(FORKED, path)
    assert done.returncode == 0, done.stderr


WRITE = """
import sys
sys.path[:0] = [sys.argv[2]]
from pathlib import Path
import numpy as np
from trimtab.runtime import ArtifactWriter
with ArtifactWriter(Path(sys.argv[1])) as writer:
    with writer.open_entry("weights.safetensors") as file:
        print("writing", flush=True)
        while True:
            file.write(bytes(1 << 20))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_kill_while_writing_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    target = tmp_path / "model.trim"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(target), os.path.dirname(__file__)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    process.wait(timeout=30)
    process.stdout.close()
    assert not target.exists()
    if number is signal.SIGINT:
        assert os.listdir(tmp_path) == []
