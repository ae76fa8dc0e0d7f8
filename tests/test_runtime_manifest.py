"""Manifests: round trips, refusals in words, dimension expressions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from runtime_fixture import MANIFEST

from trimtab.errors import ArtifactError
from trimtab.runtime.dimension import evaluate, is_symbol, symbols_of
from trimtab.runtime.manifest import (
    CodeVariant,
    FileEntry,
    KernelCall,
    Manifest,
    SymbolRange,
    TensorSpec,
    Tolerance,
    WeightEntry,
    WeightLayout,
)

FULL = replace(
    MANIFEST,
    outputs=(*MANIFEST.outputs, TensorSpec("pooled", "bf16", ("(batch + 1) // 2", 4))),
    weights=(
        *MANIFEST.weights,
        WeightEntry("p", "u8", (2, 8), WeightLayout("packed", "i4", (4, 8), {"order": "low first"})),
    ),
    variants=(*MANIFEST.variants, CodeVariant("aarch64-linux-gnu", "code/arm/model.so", weights=("b",))),
    versions={"trimtab": "0.1.0"},
    pipeline="cleanup,fuse",
    report=[{"pass": "cleanup", "seconds": 0.5}],
    memory={"arena_bytes": 4096},
    tolerance=Tolerance(1e-4, 0.0),
    entries={"weights.safetensors": FileEntry(10, "0" * 64)},
)


def test_round_trip() -> None:
    assert Manifest.from_json(FULL.to_json()) == FULL
    assert Manifest.from_json(MANIFEST.to_json().encode()) == MANIFEST


def test_unknown_fields_are_ignored() -> None:
    data = json.loads(FULL.to_json())
    data["signature_of_the_future"] = {}
    data["inputs"][0]["comment"] = "hello"
    assert Manifest.from_json(json.dumps(data)) == FULL


@pytest.mark.parametrize(("schema", "words"), [(2, "upgrade Trimtab"), (0, "compile the model again")])
def test_other_schemas_are_refused_with_what_to_do(schema: int, words: str) -> None:
    data = json.loads(FULL.to_json()) | {"schema": schema}
    with pytest.raises(ArtifactError, match=words) as caught:
        Manifest.from_json(json.dumps(data))
    assert caught.value.values == {"schema": schema, "supported": 1}


@pytest.mark.parametrize(
    "text", ["", "nonsense", "[]", "3", "{}", '{"schema": NaN}', '{"schema": true}', '{"schema": "1"}', "[" * 100_000]
)
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["inputs"], {}, r"manifest\.inputs.*a list is expected"),
        (["inputs", 0], "x", r"manifest\.inputs\[0\].*an object is expected"),
        (["inputs", 0, "dtype"], 3, r"manifest\.inputs\[0\]\.dtype.*text is expected"),
        (["inputs", 0, "dtype"], "f7", "unknown dtype"),
        (["inputs", 0, "shape", 0], 1.5, r"shape\[0\].*an integer or text is expected"),
        (["inputs", 0, "shape", 0], True, "an integer or text is expected"),
        (["inputs", 0, "shape", 0], -1, "a size is negative"),
        (["inputs", 0, "shape", 0], "batch +", "a dimension cannot be read"),
        (["inputs", 0, "shape", 0], "other", "symbol without a range"),
        (["inputs", 0, "name"], "scale", "two inputs have one name"),
        (["outputs"], [], "no outputs"),
        (["outputs", 0, "shape", 0], "n", "symbol without a range"),
        (["symbols", 0, "max"], 0, "empty range"),
        (["symbols", 0, "name"], "a b", "not an identifier"),
        (["weights", 1, "name"], "w", "two weights have one name"),
        (["variants"], [], "variants is empty"),
        (["variants", 0, "library"], None, "text is expected"),
        (["variants", 1, "weights"], ["nope"], "takes weights that are not listed"),
        (["tolerance", "rtol"], "small", "a number is expected"),
        (["entries", "weights.safetensors", "sha256"], "abc", "bad size or SHA-256"),
        (["entries", "weights.safetensors", "size"], -1, "bad size or SHA-256"),
    ],
)
def test_wrong_fields_are_named(path: list[Any], value: Any, words: str) -> None:
    data = json.loads(FULL.to_json())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ArtifactError, match=words):
        Manifest.from_json(json.dumps(data))


def test_missing_fields_are_named() -> None:
    data = json.loads(FULL.to_json())
    del data["inputs"][0]["dtype"]
    with pytest.raises(ArtifactError, match=r"manifest\.inputs\[0\]\.dtype.*missing"):
        Manifest.from_json(json.dumps(data))


def test_a_symbol_needs_an_input_that_gives_it_a_value() -> None:
    manifest = replace(
        MANIFEST, symbols=(*MANIFEST.symbols, SymbolRange("n")), outputs=(TensorSpec("y", "f32", ("2 * n",)),)
    )
    with pytest.raises(ArtifactError, match="no input's size by itself"):
        manifest.to_json()


@pytest.mark.parametrize("report", [{"a": float("nan")}, {"a": object()}, {1: {2}}])
def test_reports_must_be_plain_json(report: Any) -> None:
    with pytest.raises(ArtifactError, match="plain JSON"):
        replace(MANIFEST, report=report).to_json()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_no_json_makes_it_crash(data: st.DataObject) -> None:
    document = json.loads(FULL.to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = document
        for _ in range(data.draw(st.integers(0, 3))):
            keys = list(place) if isinstance(place, dict) else range(len(place))
            inner = [key for key in keys if isinstance(place[key], (dict, list)) and place[key]]
            if not inner:
                break
            place = place[data.draw(st.sampled_from(inner))]
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        place[key] = data.draw(json_values)
    try:
        manifest = Manifest.from_json(json.dumps(document))
    except ArtifactError:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("text", "value"), [(7, 7), ("n", 5), ("2 * n + 1", 11), ("(n + m) // 2", 4), ("-n % m", 1), ("n - -m", 8)]
)
def test_dimensions_are_evaluated(text: int | str, value: int) -> None:
    assert evaluate(text, {"n": 5, "m": 3}) == value


def test_counts_of_kernels_use_symbols_that_have_values() -> None:
    calls = (KernelCall("k", ("linear",), "16*n", "f32", "4*n + 64", "4*n"),)
    variant = CodeVariant("x86_64-unknown-linux-gnu", "code/m.so", kernels=calls)
    spec = TensorSpec("x", "f32", ("n",))
    manifest = Manifest((spec,), (spec,), (variant,), symbols=(SymbolRange("n"),), threads=2)
    assert Manifest.from_json(manifest.to_json()) == manifest
    wrong = replace(variant, kernels=(replace(calls[0], bytes_read="4*m"),))
    with pytest.raises(ArtifactError, match="a count uses a symbol that has no value"):
        replace(manifest, variants=(wrong,)).to_json()
    with pytest.raises(ArtifactError, match="number of threads"):
        replace(manifest, threads=0).to_json()


def test_symbols_of_dimensions() -> None:
    assert symbols_of("(n + m) // n") == {"n", "m"}
    assert symbols_of(3) == frozenset()
    assert is_symbol("n")
    assert not is_symbol("n + 1")
    assert not is_symbol(3)


@pytest.mark.parametrize(
    "text",
    [
        *("", "n +", "n / 2", "f(n)", "n.real", "n[0]", "1.5", "'a'", "True", "n if n else 1", "n ** 9", "n\0"),
        *("(" * 300, "+".join("n" * 600), "-" * 5000 + "n", "__import__('os')", "n; n", "n = 1"),
    ],
)
def test_other_expressions_are_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="a dimension cannot be read"):
        symbols_of(text)


def test_division_by_zero_is_said_in_words() -> None:
    with pytest.raises(ArtifactError, match="divides by zero"):
        evaluate("n // (n - 5)", {"n": 5})
