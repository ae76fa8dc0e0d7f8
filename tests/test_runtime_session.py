"""Calling a loaded model: results, every kind of wrong input, aliasing, threads, profiles."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import runtime_fixture as fixture
import torch
from hypothesis import given

from trimtab.cores import usable_cores, usable_processors
from trimtab.cpu_features import host_features
from trimtab.errors import ArtifactError, InputError, InternalError, MissingDependencyError, UsageError
from trimtab.runtime import Outputs, Session, TensorSpec, native_code
from trimtab.runtime import variants as variants_module
from trimtab.runtime.manifest import CodeVariant, Manifest, SymbolRange, WeightEntry
from trimtab.runtime.session import load


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("session") / "model.trim"
    fixture.write_artifact(path)
    return path


@pytest.fixture(scope="module")
def session(path: Path) -> Session:
    return load(path)


def check(outputs: Outputs, x: np.ndarray[Any, Any], scale: np.ndarray[Any, Any]) -> None:
    for got, expected in zip(outputs, fixture.expected(x, scale), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def with_model(
    path: Path, library: bytes, inputs: Any, outputs: Any, symbols: Any = (), weights: dict[str, Any] | None = None
) -> Session:
    """A session of another model than the fixture's."""
    entries = tuple(WeightEntry(name, "f32", array.shape) for name, array in (weights or {}).items())

    def change(manifest: Manifest) -> Manifest:
        return replace(manifest, inputs=inputs, outputs=outputs, symbols=symbols, weights=entries)

    fixture.write_artifact(path, library=library, weights=weights or {}, change=change)
    return load(path)


# --- calls -----------------------------------------------------------------------------------------------------------


@given(batch=st.integers(1, 64), seed=st.integers(0, 5))
def test_results_for_any_batch(session: Session, batch: int, seed: int) -> None:
    x, scale = fixture.random_inputs(batch, seed)
    check(session(x, scale), x, scale)


def test_ways_to_pass_inputs(session: Session) -> None:
    x, scale = fixture.random_inputs()
    for outputs in (session(x, scale), session(x, scale=scale), session(scale=scale, x=x)):
        check(outputs, x, scale)


def test_several_outputs_are_a_tuple_with_names(session: Session) -> None:
    x, scale = fixture.random_inputs()
    outputs = session(x, scale)
    z, y = outputs
    assert outputs["z"] is z
    assert outputs[1] is y
    assert list(dict(outputs)) == ["z", "y"]
    assert [name for name, _ in outputs.items()] == ["z", "y"]
    with pytest.raises(InputError, match="there are z, y"):
        outputs["w"]


def test_one_output_is_an_array(tmp_path: Path) -> None:
    from tvm.script import ir as I
    from tvm.script import relax as R

    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor((2, 3), "float32")) -> R.Tensor((2, 3), "float32"):
            return R.exp(x)

    spec = TensorSpec("x", "f32", (2, 3))
    session = with_model(tmp_path / "m", fixture.compile_library(Module), (spec,), (spec,))
    x = np.ones((2, 3), np.float32)
    assert isinstance(session(x), np.ndarray)
    np.testing.assert_allclose(session(x), np.exp(x), rtol=1e-6)


VARIANTS: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "fortran order": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=0)[::2],
    "reversed": lambda a: a[::-1].copy()[::-1],
    "unaligned": lambda a: np.frombuffer(b"1234" + a.tobytes(), np.float32, offset=4).reshape(a.shape),
    "odd address": lambda a: (
        np.frombuffer(bytearray(b"x" + a.tobytes()), np.uint8)[1:].view(np.float32).reshape(a.shape)
    ),
    "read-only": lambda a: np.frombuffer(a.tobytes(), np.float32).reshape(a.shape),
    "big endian": lambda a: a.astype(">f4"),
    "broadcast": lambda a: np.broadcast_to(a, a.shape),
    "torch": torch.from_numpy,
    "torch transposed": lambda a: torch.from_numpy(a.T.copy()).T,
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_memory_layout_does_not_matter(session: Session, variant: Callable[..., Any]) -> None:
    x, scale = fixture.random_inputs(4)
    check(session(variant(x), variant(scale)), x, scale)


def test_nan_and_infinity_are_legal(session: Session) -> None:
    x, scale = fixture.random_inputs()
    x[0, 0], x[1, 0], x[2] = np.nan, np.inf, 1e30
    z, _ = session(x, scale)
    assert np.isnan(z[0]).all()
    assert not np.isfinite(z[1]).any()
    assert np.isfinite(z[2]).all()


def test_results_stay_valid(path: Path) -> None:
    session = load(path)
    x, scale = fixture.random_inputs(7)
    first = session(x, scale)
    kept = [array.copy() for array in first]
    for seed in range(20):
        session(*fixture.random_inputs(7, seed + 1))
    session.close()
    del session
    gc.collect()
    for array, copy in zip(first, kept, strict=True):
        assert np.array_equal(array, copy)
        array[:] = 0  # the caller's own


@pytest.mark.parametrize("exec_mode", ["bytecode", "compiled"])
def test_outputs_that_are_inputs_or_weights_are_copies(tmp_path: Path, exec_mode: str) -> None:
    weight = np.array([3, 4], np.float32)
    spec = TensorSpec("x", "f32", (2,))
    outputs = tuple(replace(spec, name=name) for name in ("a", "b", "w", "sum"))
    library = fixture.passthrough_library(exec_mode)
    session = with_model(tmp_path / "m", library, (spec,), outputs, weights={"w": weight})
    memory = np.zeros(64, np.float32)
    x = memory[(-memory.ctypes.data % 64) // 4 :][:2]  # aligned, so that it is not copied on the way in
    x[:] = [1, 2]
    a, b, w, total = session(x)
    for array in (a, b, w, total):
        array += 100
    assert x.tolist() == [1, 2]
    assert a.tolist() == b.tolist() == [101, 102]
    assert session(x)["w"].tolist() == [3, 4]
    assert session(x)["sum"].tolist() == [4, 6]
    # Kernels can be timed only where the virtual machine calls them.
    assert bool(session.profile(x).kernels) == (exec_mode == "bytecode")


def test_bfloat16_integers_and_booleans(tmp_path: Path) -> None:
    inputs = (TensorSpec("h", "bf16", ("n",)), TensorSpec("k", "i64", ("n",)), TensorSpec("m", "bool", ("n",)))
    outputs = (TensorSpec("chosen", "bf16", ("n",)), TensorSpec("double", "i64", ("n",)))
    session = with_model(tmp_path / "m", fixture.cast_library(), inputs, outputs, (SymbolRange("n", 1),))
    h = np.array([1.5, -2, 3], ml_dtypes.bfloat16)
    k, m = np.array([1, 1 << 40, -3]), np.array([True, False, True])
    tensor = torch.tensor([1.5, -2, 3], dtype=torch.bfloat16)
    for value in (h, h.view(np.uint16), tensor, torch.stack([tensor, tensor], 1)[:, 0]):
        chosen, double = session(value, k, m)
        assert chosen.dtype == np.uint16
        assert chosen.view(ml_dtypes.bfloat16).tolist() == [1.5, 2, 3]
        assert double.tolist() == [2, 1 << 41, -6]
    with pytest.raises(InputError, match="given=f32, expected=bf16"):
        session(h.astype(np.float32), k, m)
    with pytest.raises(InputError, match="given=bf16, expected=i64"):
        session(h, tensor, m)


# --- wrong inputs ----------------------------------------------------------------------------------------------------

X, SCALE = fixture.random_inputs(3)


class OnAnotherDevice:
    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("must not be read")


@pytest.mark.parametrize(
    ("inputs", "named", "words"),
    [
        ((), {}, "inputs are missing: missing=x, scale"),
        ((X,), {}, "inputs are missing: missing=scale"),
        ((X, SCALE, X), {}, "too many inputs: given=3, expected=2"),
        ((X,), {"scalar": SCALE}, "unknown input: name='scalar'.*the model takes x: f32.*scale: f32"),
        ((X, SCALE), {"x": X}, "an input is given twice: name='x'"),
        ((X.astype(np.float64), SCALE), {}, "input=x, given=f64, expected=f32.*astype.'float32'"),
        ((X, SCALE.astype(np.int32)), {}, "input=scale, given=i32, expected=f32"),
        ((X.astype(np.complex64), SCALE), {}, "given=complex64"),
        ((X.astype(object), SCALE), {}, "given=object"),
        ((X[0], SCALE), {}, r"wrong rank: input=x, given=\[8\], expected=\[batch, 8\]"),
        ((X[:, :7].copy(), SCALE), {}, r"wrong size: input=x, axis=1, given=\[3, 7\]"),
        ((X, SCALE[:2]), {}, "contradict each other: input=scale, axis=0.*'batch' is 3 in 'x'"),
        ((X[:0], SCALE[:0]), {}, "'batch' is out of range: size=0"),
        (fixture.random_inputs(65), {}, "'batch' is out of range: size=65, allowed=1 <= batch <= 64, input=x"),
        ((X.tolist(), SCALE), {}, "not an array: input=x, type=list"),
        ((None, SCALE), {}, "not an array: input=x, type=NoneType"),
        ((np.float32(3), SCALE), {}, "wrong rank: input=x"),
        ((OnAnotherDevice(), SCALE), {}, "another device: input=x"),
        ((torch.from_numpy(X).requires_grad_(), SCALE), {}, "through DLPack: input=x.*detach"),
        ((torch.from_numpy(X).double(), SCALE), {}, "input=x, given=f64"),
    ],
)
def test_wrong_inputs_are_named(session: Session, inputs: Any, named: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        session(*inputs, **named)
    check(session(X, SCALE), X, SCALE)


def test_expressions_in_inputs_are_checked(tmp_path: Path) -> None:
    from tvm.script import ir as I
    from tvm.script import relax as R

    @I.ir_module
    class Module:
        @R.function
        def main(a: R.Tensor(("n",), "float32"), b: R.Tensor(("m",), "float32")):
            return (R.exp(a), R.exp(b))

    inputs = (TensorSpec("a", "f32", ("n",)), TensorSpec("b", "f32", ("2 * n - 1",)))
    session = with_model(tmp_path / "m", fixture.compile_library(Module), inputs, inputs, (SymbolRange("n", 1, 9),))
    a, b = np.zeros(3, np.float32), np.zeros(5, np.float32)
    assert [array.shape for array in session(a, b)] == [(3,), (5,)]
    with pytest.raises(InputError, match=r"with the other sizes given, 2 \* n - 1 is 5"):
        session(a, a)


def test_compiled_code_that_disagrees_with_the_manifest_is_an_internal_error(tmp_path: Path) -> None:
    spec = TensorSpec("x", "f32", (5,))
    session = with_model(
        tmp_path / "m", fixture.passthrough_library(), (spec,), (spec,), weights={"w": np.ones(2, "f4")}
    )
    for _ in range(2):
        with pytest.raises(InternalError, match=r"the compiled code failed.*x\[5\]"):
            session(np.zeros(5, np.float32))
    spec = TensorSpec("x", "f32", (2,))
    session = with_model(
        tmp_path / "m", fixture.passthrough_library(), (spec,), (spec,), weights={"w": np.ones(2, "f4")}
    )
    with pytest.raises(InternalError, match="returned=4, signature=1"):
        session(np.zeros(2, np.float32))


# --- loading ---------------------------------------------------------------------------------------------------------


def altered(tmp_path: Path, carried: bool = True, library: bytes | None = None, **changes: Any) -> Path:
    def change(manifest: Manifest) -> Manifest:
        return replace(manifest, variants=tuple(replace(variant, **changes) for variant in manifest.variants))

    fixture.write_artifact(tmp_path / "m", change=change, carried=carried, library=library)
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "riscv64-unknown-linux-gnu"}, "no code for this machine.*trimtab compile"),
        ({"target": f"{fixture.host_architecture()}-apple-macosx"}, "no code for this machine"),
        ({"features": ("x86-64-v3", "no-such-feature")}, "missing=.*no-such-feature.*--target native"),
        ({"backend": "other"}, "backend this runtime cannot run"),
        ({"entry": "absent"}, "cannot be loaded"),
    ],
)
def test_artifacts_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        load(altered(tmp_path, **changes))


@pytest.mark.parametrize("library", [b"", b"not a library", b"\x7fELF" + bytes(200)])
def test_what_is_no_library_is_refused(tmp_path: Path, library: bytes) -> None:
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load(altered(tmp_path, library=library))


def test_a_cut_library_is_refused_or_complete_enough(tmp_path: Path) -> None:
    library = fixture.model_library()
    refused = 0
    for length in range(1, len(library), len(library) // 25):
        try:
            session = load(altered(tmp_path, library=library[:length]))
        except ArtifactError:
            refused += 1
        else:  # only the symbol table for debuggers is missing
            check(session(X, SCALE), X, SCALE)
    assert refused > 10


def test_a_library_for_another_machine_is_refused_whatever_the_manifest_says(tmp_path: Path) -> None:
    library = bytearray(fixture.model_library())
    library[18:20] = (8).to_bytes(2, "little")  # e_machine: MIPS
    with pytest.raises(ArtifactError, match="it is code for ELF machine 8"):
        load(altered(tmp_path, library=bytes(library)))


def test_of_several_variants_the_most_demanding_that_runs_is_taken() -> None:
    here = fixture.TARGET
    variants = [
        CodeVariant("riscv64-linux-gnu", "a"),
        CodeVariant(here, "b"),
        CodeVariant(here, "c", features=("no-such-feature",)),
    ]
    assert variants_module.select_variant(variants, "m").library == "b"
    some = sorted(host_features() or ())[:1]
    if some:
        variants.append(CodeVariant(here, "d", features=tuple(some)))
        assert variants_module.select_variant(variants, "m").library == "d"


def test_another_ffi_version_is_refused() -> None:
    variant = CodeVariant(fixture.TARGET, fixture.LIBRARY, requires={"apache-tvm-ffi": "7.8.9"})
    with pytest.raises(MissingDependencyError, match=r"pip install apache-tvm-ffi==7\.8\.9"):
        native_code._import_ffi(variant)


def test_libraries_load_from_real_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(native_code, "_modules", {})
    session = load(altered(tmp_path))
    check(session(X, SCALE), X, SCALE)


def test_missing_files_and_bad_options(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot open a file"):
        load(tmp_path / "absent.trim")
    for threads_given in (0, -1, 1.5, True, "2"):
        with pytest.raises(UsageError, match="bad number of threads"):
            load(path, threads=threads_given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="verify"):
        load(path, verify="no")  # type: ignore[arg-type]


def test_a_closed_session_says_so(path: Path) -> None:
    with load(path) as session:
        assert "closed" not in repr(session)
    assert "closed" in repr(session)
    for use in (lambda: session(X, SCALE), lambda: session.profile(X, SCALE)):
        with pytest.raises(UsageError, match="closed"):
            use()
    session.close()


# --- threads and profiles --------------------------------------------------------------------------------------------


def test_thread_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    cores = usable_cores()
    assert load(path).threads == cores
    for count in range(1, cores + 1):
        session = load(path, threads=count)
        assert session.threads == count
        check(session(X, SCALE), X, SCALE)
    processors = len(usable_processors())
    with pytest.warns(RuntimeWarning, match="lowered"):
        assert load(path, threads=processors + 1).threads == processors
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    assert load(path).threads == 1


def test_affinity_of_the_caller_is_left_alone(session: Session) -> None:
    before = os.sched_getaffinity(0)
    session(X, SCALE)
    assert os.sched_getaffinity(0) == before


def test_profile(session: Session) -> None:
    profile = session.profile(X, SCALE, repeat=5)
    assert len(profile.calls) == 5
    assert 0 < profile.best <= profile.median <= profile.worst
    names = {kernel.name for kernel in profile.kernels}
    assert "matmul" in names
    assert all(kernel.seconds >= 0 and kernel.calls > 0 for kernel in profile.kernels)
    assert "matmul" in str(profile)
    assert profile.to_dict()["repeat"] == 5
    with pytest.raises(UsageError, match="repeat"):
        session.profile(X, SCALE, repeat=0)


def test_signature_reads_well(session: Session) -> None:
    assert str(session.signature) == (
        "(x: f32[batch, 8], scale: f32[batch, 1]) -> (z: f32[batch, 4], y: f32[batch, 4]) where 1 <= batch <= 64"
    )
    assert session.signature.output_shapes({"batch": 6}) == [(6, 4), (6, 4)]
