"""Gates and buffers of Eventful Transformers against a transcription of their formulas in loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from token_harness import Array, built, check_compiled, evaluated, normal

from trimtab.errors import UsageError
from trimtab.ir import Builder, DType, TensorType, Value, interpret
from trimtab.passes.tokens.gating import next_state, token_buffer, token_gate

CASES = [(1, 17, 4), (8, 17, 5), (3, 16, 16), (2, 13, 1), (1, 1, 1)]
"""Batch, tokens, r."""


def gate_by_formula(c: Array, p: Array, r: int) -> list[int]:
    """``topk_r(||c - p||_2)`` of one sample; of equal distances the first."""
    far = [float(np.sqrt(((row - old) ** 2).sum())) for row, old in zip(c, p, strict=True)]
    left = list(range(len(far)))
    index = []
    for _ in range(r):
        best = left[0]
        for i in left:
            if far[i] > far[best]:
                best = i
        index.append(best)
        left.remove(best)
    return index


def gating(r: int) -> Any:
    def make(build: Builder, c: Value, p: Value, b: Value, updates: Value) -> list[Value]:
        gate = token_gate(build, c, p, r)
        return [gate.rows, gate.tokens, gate.reference, token_buffer(build, gate, b, updates)]

    return make


@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize(("batch", "tokens", "r"), CASES)
def test_gate_and_buffer_follow_the_formula(batch: int, tokens: int, r: int, levels: int) -> None:
    """With two levels many distances are equal: the token at the smaller position passes."""
    c, p = normal(batch, tokens, 6, seed=1), normal(batch, tokens, 6, seed=2)
    if levels:
        c, p = np.sign(c), np.sign(p)
    b, updates = normal(batch, tokens, 4, seed=3), normal(batch, r, 4, seed=4)
    rows, passed, reference, buffer = evaluated(gating(r), c, p, b, updates)
    for i in range(batch):
        index = gate_by_formula(c[i], p[i], r)
        assert rows[i].tolist() == index
        np.testing.assert_array_equal(passed[i], c[i][index])
        expected_p, expected_b = p[i].copy(), b[i].copy()
        expected_p[index], expected_b[index] = c[i][index], updates[i]
        np.testing.assert_array_equal(reference[i], expected_p)
        np.testing.assert_array_equal(buffer[i], expected_b)


def test_small_changes_add_up_until_a_token_passes() -> None:
    """Token 3 creeps by 1 a frame, token 0 jumps by 2 in every frame: at the third frame token 3 has moved further."""

    def make(build: Builder, c: Value, p: Value) -> list[Value]:
        gate = token_gate(build, c, p, 1)
        return [gate.rows, gate.reference]

    module = built(make, np.zeros((1, 4, 1)), np.zeros((1, 4, 1)))
    p, passed = torch.zeros(1, 4, 1), []
    for frame in range(1, 5):
        c = torch.tensor([[[2.0 * frame], [0.0], [0.0], [1.0 * frame]]])
        rows, p = interpret(module, [c, p])
        passed.append(int(rows))
    assert passed == [0, 0, 3, 0]


def test_compiled_gate() -> None:
    for batch, tokens, r in [(2, 17, 5)]:
        arrays = [normal(batch, count, 8, seed=s) for s, count in enumerate((tokens, tokens, tokens, r))]
        check_compiled(gating(r), *arrays)


def test_half_types_do_not_overflow_in_the_distance() -> None:
    """Squares of 300 and 400 are infinite in float16; the larger distance must still win."""
    build = Builder()
    kind = TensorType(DType.F16, (1, 2, 1))
    c, p = (build.input(name, kind) for name in "cp")
    build.output(token_gate(build, c, p, 1).rows)
    (rows,) = interpret(build.module, [torch.tensor([[[300.0], [400.0]]]).half(), torch.zeros(1, 2, 1).half()])
    assert rows.tolist() == [[1]]


@pytest.mark.parametrize("r", [0, -1, 8])
def test_r_out_of_range(r: int) -> None:
    with pytest.raises(UsageError, match=r"1 <= r <= 7"):
        built(lambda build, c, p: [token_gate(build, c, p, r).rows], *(normal(1, 7, 2),) * 2)


def test_state_is_renamed_for_the_next_frame() -> None:
    assert next_state(["logits", "next.0.gate.0", "next.0.buffer.0"], [1, 2, 3]) == {
        "state.0.gate.0": 2,
        "state.0.buffer.0": 3,
    }
