"""Pipelines as text: parsing and printing are inverse, and mistakes get clear messages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import TrimtabError, UsageError
from trimtab.ir import Module
from trimtab.passes import Changed, Context, Contract, Exact, Lossy, Pass
from trimtab.passes import registry as registry_module
from trimtab.passes.options import build_pass, describe_options
from trimtab.passes.pipeline import Pipeline, parse_pipeline


@dataclass(frozen=True)
class Tunable(Pass):
    """A pass with an option of every kind."""

    name: ClassVar[str] = "tunable"
    contract: ClassVar[Contract] = Lossy()
    bits: int = 8
    ratio: float = 0.5
    symmetric: bool = True
    mode: Literal["fast", "good"] = "fast"
    layers: tuple[int, ...] = ()
    scheme: str = "per-tensor"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.bits < 1:
            raise ValueError("a number has at least one bit")

    def run(self, module: Module, ctx: Context) -> Changed:
        return False


@dataclass(frozen=True)
class Needy(Pass):
    """A pass whose option has no default."""

    name: ClassVar[str] = "needy"
    contract: ClassVar[Contract] = Exact()
    path: str

    def run(self, module: Module, ctx: Context) -> Changed:
        return False


@pytest.fixture(autouse=True)
def _own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {**registry_module._OWN, "tunable": f"{__name__}:Tunable", "needy": f"{__name__}:Needy"}
    monkeypatch.setattr(registry_module, "_OWN", own)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dce",
        "cleanup,fuse",
        "cleanup,tunable{bits=4},dce",
        "tunable{bits=4, ratio=0.25, symmetric=false, mode=good, layers=[1, 2, 3], scheme=per-channel, limit=7}",
        "tunable{ratio=inf}",
        'tunable{scheme="8"}',
        'tunable{scheme="a, b}"}',
        'tunable{scheme="true"}',
        'needy{path=""}',
    ],
)
def test_text_reads_and_prints_back(text: str) -> None:
    assert str(parse_pipeline(text)) == text


def test_spaces_defaults_and_dashes_do_not_matter() -> None:
    pipeline = parse_pipeline("  tunable { bits = 8 ,ratio=1 } ,  dce ")
    assert str(pipeline) == "tunable{ratio=1.0},dce"
    assert isinstance(next(pipeline.passes), Tunable)


@given(
    passes=st.lists(
        st.builds(
            Tunable,
            bits=st.integers(1, 99),
            ratio=st.floats(allow_nan=False),
            symmetric=st.booleans(),
            mode=st.sampled_from(["fast", "good"]),
            layers=st.lists(st.integers()).map(tuple),
            scheme=st.text(),
            limit=st.none() | st.integers(),
        ),
        max_size=3,
    )
)
def test_any_options_print_and_read_back(passes: list[Tunable]) -> None:
    own = {**registry_module._OWN, "tunable": f"{__name__}:Tunable"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry_module, "_OWN", own)
        pipeline = Pipeline(tuple(passes))
        assert parse_pipeline(str(pipeline)) == pipeline


MISTAKES = {
    "unknown-pass": "cleanup,simplify-reshape",
    "unknown-pass-far": "xyzzy",
    "unknown-option": "tunable{bit=4}",
    "option-of-a-pass-without": "dce{fast=true}",
    "wrong-type": "tunable{bits=many}",
    "wrong-type-float-for-int": "tunable{bits=4.5}",
    "wrong-choice": "tunable{mode=slow}",
    "wrong-list": "tunable{layers=[1, two]}",
    "missing-option": "needy",
    "refused-by-the-pass": "tunable{bits=0}",
    "group-with-options": "cleanup{rounds=2}",
    "missing-comma": "dce cse",
    "trailing-comma": "dce,",
    "unclosed": "tunable{bits=4",
    "no-value": "tunable{bits=}",
    "given-twice": "tunable{bits=4, bits=8}",
    "not-a-name": "dce,{",
    "bad-string": 'tunable{scheme="\\x"}',
    "unclosed-list": "tunable{layers=[1, 2}",
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_explained(case: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(TrimtabError) as caught:
        parse_pipeline(MISTAKES[case])
    golden(f"passes/errors/pipeline-{case}.txt", f"{MISTAKES[case]}\n---\n[{caught.value.code}] {caught.value}")


def test_options_are_described() -> None:
    described = {row["name"]: row for row in describe_options(Tunable)}
    assert described["bits"] == {"name": "bits", "type": "an integer", "default": "8"}
    assert described["mode"] == {"name": "mode", "type": "one of fast, good", "default": "fast"}
    assert described["limit"]["type"] == "an integer or none"


def test_options_given_as_values_are_checked_too() -> None:
    assert build_pass(Tunable, {"layers": [1, 2]}) == Tunable(layers=(1, 2))
    with pytest.raises(UsageError, match="layers is a list of an integer"):
        build_pass(Tunable, {"layers": "1"})


def test_names_are_known_without_importing_torch() -> None:
    code = "import sys, trimtab.passes, trimtab.passes.registry as r; r.pass_names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
