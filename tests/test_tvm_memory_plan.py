"""Memory plans: placing buffers, for known sizes and for all sizes at once."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest

from trimtab.backends.tvm.memory_plan import ALIGNMENT, Buffer, MemoryPlan, live_bytes, plan_memory
from trimtab.ir.dims import Dim, evaluate, symbol


def at(dim: Dim, sizes: Mapping[str, int]) -> int:
    return int(evaluate(dim, sizes))


def check(buffers: Sequence[Buffer], plan: MemoryPlan, sizes: Mapping[str, int]) -> None:
    """No two buffers overlap in time and space, all lie inside, and the bound is one."""
    places = [(at(offset, sizes), at(b.nbytes, sizes)) for offset, b in zip(plan.offsets, buffers, strict=True)]
    for n, (start, nbytes) in enumerate(places):
        assert start >= 0
        assert start % ALIGNMENT == 0
        assert start + nbytes <= at(plan.nbytes, sizes)
        for other, (begin, length) in zip(buffers[:n], places, strict=False):
            together = buffers[n].first <= other.last and other.first <= buffers[n].last
            assert not together or start >= begin + length or begin >= start + nbytes, (buffers[n], other, sizes)
    steps = range(max((b.last for b in buffers), default=-1) + 1)
    live = [sum(n for b, (_, n) in zip(buffers, places, strict=True) if b.first <= s <= b.last) for s in steps]
    assert at(live_bytes(buffers), sizes) == max(live, default=0)
    assert at(live_bytes(buffers), sizes) <= at(plan.nbytes, sizes)


def random_buffers(generator: random.Random, sizes: Sequence[Dim], most: int) -> list[Buffer]:
    buffers = []
    for _ in range(generator.randrange(1, most)):
        first = generator.randrange(30)
        buffers.append(Buffer(first, first + int(generator.expovariate(0.3)), generator.choice(sizes)))
    return buffers


@pytest.mark.parametrize("seed", range(30))
def test_random_buffers_do_not_overlap(seed: int) -> None:
    generator = random.Random(seed)
    buffers = random_buffers(generator, [generator.choice([0, 1, 63, 64, 65, 4096, 10**6]) for _ in range(5)], 40)
    check(buffers, plan_memory(buffers), {})


@pytest.mark.parametrize("seed", range(12))
def test_plans_with_symbols_hold_at_all_sizes(seed: int) -> None:
    generator = random.Random(seed)
    batch, length = symbol("batch", 1, 64), symbol("length", 0, 512)
    sizes: list[Dim] = [256, 4 * batch, 1536 * batch * length, 6144 * batch * length, 4 * length * length]
    sizes.append(4 * batch * length + 4)
    buffers = random_buffers(generator, sizes, 16)
    plan = plan_memory(buffers, [{"batch": 2, "length": 0}, {"batch": 8, "length": 64}])
    for bound in ({"batch": b, "length": s} for b in (1, 2, 7, 64) for s in (0, 1, 17, 64, 512)):
        check(buffers, plan, bound)


def test_nothing_to_place() -> None:
    assert plan_memory([]) == MemoryPlan((), 0)
    assert live_bytes([]) == 0


def test_a_chain_alternates_between_two_places() -> None:
    """Each buffer is read by the step that writes the next one: two sizes at a time, never three."""
    buffers = [Buffer(step, step + 1, 640) for step in range(12)]
    assert plan_memory(buffers).nbytes == 1280 == live_bytes(buffers)


def test_a_residual_stays_while_wide_buffers_come_and_go() -> None:
    """Two layers of a transformer: the wide hidden buffer in both, around residuals that outlive it."""
    width = 64 * 100
    layer = [(0, 2, 1), (1, 2, 3), (2, 5, 1), (3, 4, 1), (4, 5, 4), (5, 8, 1)]
    buffers = [Buffer(6 * n + a, 6 * n + b, width * size) for n in range(2) for a, b, size in layer]
    assert plan_memory(buffers).nbytes == live_bytes(buffers)


@pytest.mark.parametrize(
    ("spans", "best"),
    [
        # In order of time the small one is put in the middle and the large one has to go above it.
        ([(0, 1, 2), (0, 3, 1), (2, 3, 3)], 4),
        # By size alone the longest-lived buffer ends up on top of a gap.
        ([(0, 2, 1), (1, 4, 1), (3, 6, 1), (5, 8, 1), (2, 3, 2)], 4),
        # A staircase: only placing it from one end keeps it flat.
        ([(0, 0, 4), (0, 1, 1), (1, 1, 3), (1, 2, 2), (2, 2, 2), (2, 3, 3), (3, 3, 2)], 7),
    ],
)  # fmt: skip
def test_known_hard_cases(spans: list[tuple[int, int, int]], best: int) -> None:
    buffers = [Buffer(first, last, 64 * size) for first, last, size in spans]
    plan = plan_memory(buffers)
    check(buffers, plan, {})
    assert plan.nbytes == 64 * best


def test_sizes_that_grow_alike_need_no_maximum() -> None:
    """What is in a manifest stays short: comparable sizes leave one polynomial."""
    length = symbol("length", 1, 512)
    buffers = [Buffer(step, step + 1, 1536 * length * (1 + step % 3)) for step in range(30)]
    plan = plan_memory(buffers, [{"length": 64}])
    assert str(plan.nbytes) == "7680*length"
    assert str(live_bytes(buffers)) == "7680*length"


def test_more_incomparable_sizes_than_a_maximum_holds() -> None:
    """The plan then takes more than the largest of them, and is still one."""
    names = [f"n{number}" for number in range(20)]
    buffers = [Buffer(number, number, 64 * symbol(name)) for number, name in enumerate(names)]
    sample = dict.fromkeys(names, 3)
    plan = plan_memory(buffers, [sample])
    assert at(plan.nbytes, sample) >= 3 * 64
    assert set(plan.offsets) == {0}
