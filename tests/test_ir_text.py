"""The text form: golden files, print and parse as inverses, errors with line and column, and fuzzing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import random_module

from trimtab.errors import Location, ParseError, VerificationError
from trimtab.ir import (
    Builder,
    DType,
    Graph,
    Module,
    Symbol,
    TensorType,
    parse_module,
    print_graph,
    print_module,
    symbol,
    verify,
)  # fmt: skip
from trimtab.ir.attributes import print_attribute
from trimtab.ir.ops import (
    Add,
    Attention,
    Clamp,
    Concat,
    Full,
    Linear,
    Neg,
    Pad,
    Permute,
    Repeat,
    Reshape,
    Softmax,
    Split,
)  # fmt: skip
from trimtab.ir.parser import _Parser

Golden = Callable[[str, str], None]
BATCH, SEQ = symbol("batch", 1, 64), symbol("seq", 2)


def f32(*shape: object) -> TensorType:
    return TensorType(DType.F32, shape)  # type: ignore[arg-type]


def filled(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


def attention_block() -> Module:
    """One head-split attention with a mask, source lines, and a symbolic batch and length."""
    b = Builder()
    x = b.input("x", f32(BATCH, SEQ, 8))
    mask = b.input("mask", TensorType(DType.BOOL, (BATCH, 1, 1, SEQ)))
    with b.at(Location("model.py", 12, "forward")):
        weight = b.weight("qkv.weight", filled(24, 8), trainable=True)
        qkv = b(Linear(x, weight, b.weight("qkv.bias", filled(24), trainable=True)), "qkv")
    parts = b.add(Split(qkv, 2, (8, 8, 8))).results
    heads = [b(Permute(b(Reshape(part, (BATCH, SEQ, 2, 4))), (0, 2, 1, 3))) for part in parts]
    with b.at(Location("model.py", 14)):
        y = b(Attention(*heads, mask, scale=0.5), "attended")
    y = b(Reshape(b(Permute(y, (0, 2, 1, 3))), (BATCH * SEQ, 8)))
    b.output(y, b(Softmax(y, 1)), names=["hidden", "probabilities"])
    return b.module


def nested_repeat() -> Module:
    """A repeat inside a repeat, with stacked weights, a shared weight, and odd names."""
    b = Builder()
    x = b.input("0", f32(BATCH, 4))
    stack = b.weight("stack", filled(3, 4, 4))
    shared = b.weight("shared weight", filled(4))
    inner = Graph()
    carried, invariant = inner.add_input(f32(BATCH, 4), "c"), inner.add_input(f32(BATCH, 4))
    total = inner.ops.append(Add(carried, invariant)).result
    inner.set_outputs([inner.ops.append(Add(total, inner.weight(b.module.weights["shared weight"]))).result])
    outer = Graph()
    c, w = outer.add_input(f32(BATCH, 4), "c"), outer.add_input(f32(4, 4), "w")
    projected = outer.ops.append(Linear(c, w)).result
    outer.set_outputs([outer.ops.append(Repeat((projected,), (), (c,), inner, 2)).result])
    looped = b(Repeat((x,), (stack,), (), outer, 3))
    b.output(b(Concat((looped, b(Add(x, shared))), 1)), names=["a:"])
    return b.module


MODULES = {"attention_block": attention_block, "nested_repeat": nested_repeat}


@pytest.mark.parametrize("name", MODULES)
def test_text_of_a_module(name: str, golden: Golden) -> None:
    module = MODULES[name]()
    verify(module)
    text = print_module(module)
    golden(f"ir/{name}.ttir", text)
    again = parse_module(text)
    verify(again)
    assert again == module
    assert print_module(again) == text
    assert print_module(module.copy()) == text
    assert [op.location for op in again.walk()] == [op.location for op in module.walk()]


def test_text_for_people(golden: Golden) -> None:
    module = attention_block()
    golden("ir/attention_block_graph.txt", print_graph(module.main))
    assert str(module) == print_module(module)
    assert repr(module) == "Module(12 ops, 2 weights, 864 weight bytes)"
    assert repr(next(iter(module.main.ops))) == "%qkv = linear(%x, @qkv.weight, @qkv.bias) : f32[batch, seq, 24]"


@given(st.integers(0, 2**32))
@settings(max_examples=40)
def test_random_modules_read_back(seed: int) -> None:
    module = random_module(seed, 25)
    text = print_module(module)
    again = parse_module(text)
    assert again == module
    assert print_module(again) == text


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(), st.sampled_from(list(DType)),
    st.integers(-5, 5).map(lambda n: BATCH * n + 1),
)  # fmt: skip


@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=8))
@settings(max_examples=300)
def test_attributes_read_back(value: object) -> None:
    text = print_attribute(value) + " }"
    parser = _Parser(text, "", lambda id, type: None)  # type: ignore[arg-type,return-value]
    parser._symbols = {"batch": Symbol("batch", 1, 64)}
    back = parser._attribute()
    # repr tells 1, 1.0 and True apart, and takes NaN for NaN.
    assert repr(back) == repr(value)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=6))
@settings(max_examples=100)
def test_any_names_read_back(names: list[str]) -> None:
    b = Builder()
    distinct = list(dict.fromkeys(names))
    h = b.input(distinct[0], f32(2))
    for name in names:
        h = b(Add(h, b.weight(name, torch.ones(2))), name)
    b.output(*[h] * len(distinct), names=distinct)
    again = parse_module(print_module(b.module))
    assert again == b.module
    assert print_module(again) == print_module(b.module)


def test_many_equal_names_do_not_slow_printing() -> None:
    b = Builder()
    h = b.input("x", f32(2))
    for _ in range(3000):
        h = b(Neg(h), "same")
    b.output(h)
    assert "%same_2999 = neg(%same_2998)" in print_module(b.module)


def test_defaults_are_left_out_and_special_floats_are_words() -> None:
    b = Builder()
    x = b.input("x", f32(2, 3))
    h = b(Clamp(x, max=math.inf))
    h = b(Pad(h, (0, 0), (1, 1), value=-math.inf))
    b(Full(value=math.nan, dtype=DType.F32))
    b.output(h)
    text = print_module(b.module)
    assert "clamp(%x) {max=inf}" in text
    assert "{before=[0, 0], after=[1, 1], value=-inf}" in text
    assert "full() {value=nan, dtype=f32}" in text
    assert parse_module(text) == b.module


# -- errors -----------------------------------------------------------------------------------------------------------

HEAD = "trimtab.ir 1\nsymbols n=1..8\nweight @w: f32[4]\n\ngraph main(%x: f32[n, 4]) {\n"
ERRORS = {
    "empty": "",
    "other-format": "module { }\n",
    "newer-version": "trimtab.ir 2\n",
    "no-main": "trimtab.ir 1\n",
    "symbol-range": "trimtab.ir 1\nsymbols n=8..1\n",
    "symbol-name": "trimtab.ir 1\nsymbols f32=1..\n",
    "symbol-twice": "trimtab.ir 1\nsymbols n=1.., n=1..\n",
    "symbol-unknown": "trimtab.ir 1\ngraph main(%x: f32[m]) {\n",
    "weight-twice": "trimtab.ir 1\nweight @w: f32[1]\nweight @w: f32[1]\n",
    "weight-symbolic": "trimtab.ir 1\nsymbols n=1..\nweight @w: f32[n]\n",
    "dtype": "trimtab.ir 1\nweight @w: float[1]\n",
    "hash": "trimtab.ir 1\nweight @w: f32[1] sha256=12ab\n",
    "integer-too-long": "trimtab.ir 1\nsymbols n=" + "1" * 5000 + "..\n",
    "unknown-op": HEAD + "  %y = frobnicate(%x) : f32[n, 4]\n  return y=%y\n}\n",
    "undefined-value": HEAD + "  %y = add(%x, %z) : f32[n, 4]\n  return y=%y\n}\n",
    "undeclared-weight": HEAD + "  %y = add(%x, @v) : f32[n, 4]\n  return y=%y\n}\n",
    "defined-twice": HEAD + "  %x = neg(%x) : f32[n, 4]\n  return y=%x\n}\n",
    "too-many-operands": HEAD + "  %y = neg(%x, %x) : f32[n, 4]\n  return y=%y\n}\n",
    "missing-operand": HEAD + "  %y = add(%x) : f32[n, 4]\n  return y=%y\n}\n",
    "missing-attribute": HEAD + "  %y = softmax(%x) : f32[n, 4]\n  return y=%y\n}\n",
    "unknown-attribute": HEAD + "  %y = softmax(%x) {axis=1} : f32[n, 4]\n  return y=%y\n}\n",
    "attribute-twice": HEAD + "  %y = softmax(%x) {dim=1, dim=0} : f32[n, 4]\n  return y=%y\n}\n",
    "attribute-type": HEAD + '  %y = softmax(%x) {dim="1"} : f32[n, 4]\n  return y=%y\n}\n',
    "attribute-nested": HEAD + "  %y = softmax(%x) {dim=" + "[" * 3000 + "} : f32[n, 4]\n",
    "result-count": HEAD + "  %y, %z = neg(%x) : f32[n, 4]\n  return y=%y\n}\n",
    "dimension": HEAD + "  %y = neg(%x) : f32[n + +, 4]\n  return y=%y\n}\n",
    "division-by-zero": HEAD + "  %y = neg(%x) : f32[n//0, 4]\n  return y=%y\n}\n",
    "string": HEAD + '  %y = neg(%x) : f32[n, 4] loc "a\\q":1\n  return y=%y\n}\n',
    "missing-region": HEAD + "  %y = repeat([%x], [], []) {n=2} : f32[n, 4]\n  return y=%y\n}\n",
    "unfinished": HEAD + "  %y = neg(%x) : f32[n, 4]\n",
    "text-after": HEAD + "  return y=%x\n}\nthank you\n",
    "graph-twice": HEAD + "  return y=%x\n}\ngraph main() {\n  return\n}\n",
}


def test_errors_have_their_place(golden: Golden) -> None:
    lines = []
    for name, text in ERRORS.items():
        with pytest.raises(ParseError) as caught:
            parse_module(text, file="m.ttir")
        assert "m.ttir, line " in caught.value.message
        lines += [f"# {name}", caught.value.message, ""]
    golden("ir/parse_errors.txt", "\n".join(lines))


def test_line_and_column_point_at_the_fault() -> None:
    with pytest.raises(ParseError) as caught:
        parse_module(ERRORS["unknown-op"], file="m.ttir")
    assert caught.value.where.startswith("m.ttir, line 6, column 8, near `frobnicate(%x)")


def test_comments_and_free_spacing_are_accepted() -> None:
    text = """
        // a comment
        trimtab.ir 1   symbols n=1..8
        graph main ( %x : f32[ n , 4 ] ) { // inside
          %y
            = neg ( %x ) : f32[n,4]
          return out = %y }
    """
    module = parse_module(text)
    verify(module)
    assert module.main.output_names == ["out"]


def test_data_is_asked_for_only_when_used() -> None:
    module = parse_module(print_module(attention_block()))
    assert module.weights["qkv.bias"].sha256 == attention_block().weights["qkv.bias"].sha256
    with pytest.raises(ParseError, match="a weight has no data"):
        module.weights["qkv.bias"].tensor()


@pytest.mark.parametrize("depth", [60, 70, 5000])
def test_deep_nesting_parses_or_is_refused(depth: int) -> None:
    head = "graph (%c: f32[2]) {\n%y = repeat([%c], [], []) {n=1} : f32[2] "
    text = "trimtab.ir 1\ngraph main(%c: f32[2]) {\n%y = repeat([%c], [], []) {n=1} : f32[2] " + head * depth
    text += "graph (%c: f32[2]) {\nreturn output=%c }\n" + "return output=%y }\n" * (depth + 1)
    if depth < 64:
        module = parse_module(text)
        verify(module)
        assert parse_module(print_module(module)) == module
    else:
        with pytest.raises(ParseError, match="nested too deeply"):
            parse_module(text)


# -- fuzzing ----------------------------------------------------------------------------------------------------------

TEXTS = [print_module(make()) for make in MODULES.values()]
TEXTS += [print_module(random_module(seed, 12)) for seed in range(6)]
PIECES = [*"%@{}[](),=:*\"\\\n\0é", "-1", "0", "99999999999999999999", "none", "inf", "f32", "i4", "graph", "return",
          "repeat", "batch", "//", "min(", "loc", ".."]  # fmt: skip


def handles(text: str) -> None:
    """Parse and verify: both succeed or raise an error of ours, whatever the text."""
    try:
        module = parse_module(text)
        verify(module)
    except (ParseError, VerificationError):
        return
    assert parse_module(print_module(module)) == module


@given(st.sampled_from(TEXTS), st.data())
@settings(max_examples=250)
def test_mutated_text_is_read_or_refused(text: str, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = min(len(text), start + data.draw(st.integers(0, 12)))
        middle = data.draw(st.one_of(st.just(""), st.sampled_from(PIECES), st.text(max_size=6)))
        text = text[:start] + middle + text[stop:]
    handles(text)


@given(st.sampled_from(TEXTS), st.floats(0, 1))
@settings(max_examples=100)
def test_truncated_text_is_refused(text: str, part: float) -> None:
    cut = text[: int(part * (len(text) - 2))]
    with pytest.raises(ParseError):
        parse_module(cut)


@pytest.mark.parametrize("seed", range(40))
def test_exchanged_lines_and_words_are_read_or_refused(seed: int) -> None:
    generator = random.Random(seed)
    text = generator.choice(TEXTS)
    separator = generator.choice(["\n", " ", ", "])
    parts = text.split(separator)
    for _ in range(3):
        i, j = generator.randrange(len(parts)), generator.randrange(len(parts))
        if generator.random() < 0.5:
            parts[i], parts[j] = parts[j], parts[i]
        else:
            parts[i] = parts[j]
    handles(separator.join(parts))
