"""Sessions and Python threads: several of both at the same time, and the interpreter's lock while code runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runtime_fixture as fixture

from trimtab.cores import usable_processors
from trimtab.runtime import Session, TensorSpec
from trimtab.runtime.session import load

MORE_THAN_ONE = pytest.mark.skipif(len(usable_processors()) < 2, reason="this process may run on one processor only")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("threads") / "model.trim"
    fixture.write_artifact(path)
    return path


def at_the_same_time(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(0)`` to ``work(count - 1)`` in a Python thread each; what one of them raises is raised here."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(count)

    def guarded(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


def check(session: Session, batch: int, seed: int) -> None:
    x, scale = fixture.random_inputs(batch, seed)
    for got, expected in zip(session(x, scale), fixture.expected(x, scale), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_one_session_in_many_threads(path: Path) -> None:
    session = load(path, threads=1)

    def work(number: int) -> None:
        for step in range(30):
            check(session, 1 + (number * step) % 20, number)

    at_the_same_time(6, work)


@MORE_THAN_ONE
def test_two_sessions_with_different_thread_counts_take_turns(path: Path) -> None:
    narrow, wide = load(path, threads=1), load(path, threads=2)
    for step in range(10):
        check(narrow, 1 + step, step)
        check(wide, 20 - step, step)
    assert (narrow.threads, wide.threads) == (1, 2)
    x, scale = fixture.random_inputs(4)
    assert narrow.profile(x, scale, repeat=1).threads == 1
    assert wide.profile(x, scale, repeat=1).threads == 2


def test_many_sessions_in_many_threads(path: Path) -> None:
    counts = [1 + number % len(usable_processors()) for number in range(4)]

    def work(number: int) -> None:
        with load(path, threads=counts[number]) as session:
            for step in range(20):
                check(session, 1 + (3 * number + step) % 20, number)

    at_the_same_time(len(counts), work)


@MORE_THAN_ONE
def test_a_thread_uses_sessions_that_other_threads_use_too(path: Path) -> None:
    sessions = [load(path, threads=1), load(path, threads=2)]

    def work(number: int) -> None:
        for step in range(20):
            check(sessions[(number + step) % 2], 1 + step, number)

    at_the_same_time(4, work)


ANSWERED, RUNNING = 0, 1

CONVERSATION = """
define i32 @converse(ptr %flags) {
entry:
  %running = getelementptr i8, ptr %flags, i64 4
  store atomic volatile i32 1, ptr %running seq_cst, align 4
  br label %wait
wait:
  %i = phi i64 [0, %entry], [%next, %wait]
  %answer = load atomic volatile i32, ptr %flags seq_cst, align 4
  %answered = icmp ne i32 %answer, 0
  %next = add i64 %i, 1
  %tired = icmp eq i64 %next, 20000000000
  %done = or i1 %answered, %tired
  br i1 %done, label %exit, label %wait
exit:
  ret i32 %answer
}
"""
"""Sets one flag and waits for the other, in vain after some ten seconds; returns the other one."""


def conversing_library() -> bytes:
    from tvm.script import ir as I
    from tvm.script import relax as R
    from tvm.script import tirx as T

    @I.ir_module
    class Module:
        @T.prim_func(private=True, s_tir=True)
        def converse(a: T.handle, o: T.handle):
            T.func_attr({"tirx.is_scheduled": True})
            flags = T.match_buffer(a, (16,), "int32")
            answer = T.match_buffer(o, (1,), "int32")
            with T.attr(0, "pragma_import_llvm", CONVERSATION):
                answer[0] = T.call_extern("int32", "converse", T.address_of(flags[0]))

        @R.function
        def main(flags: R.Tensor((16,), "int32")):
            cls = Module
            with R.dataflow():
                answer = R.call_tir(cls.converse, (flags,), out_ty=R.Tensor((1,), "int32"))
                R.output(answer)
            return answer

    return fixture.compile_library(Module)


def test_other_python_threads_run_while_compiled_code_runs(tmp_path: Path) -> None:
    """The code waits for an answer that only another Python thread can give, after that has seen the code running."""
    inputs, outputs = (TensorSpec("flags", "i32", (16,)),), (TensorSpec("answer", "i32", (1,)),)
    fixture.write_artifact(
        tmp_path / "m",
        library=conversing_library(),
        weights={},
        check=fixture.encode_samples([]),
        change=lambda manifest: replace(manifest, inputs=inputs, outputs=outputs, symbols=(), weights=()),
    )
    session = load(tmp_path / "m", threads=1)
    memory = np.zeros(32, np.int32)
    start = (-memory.ctypes.data % 64) // 4
    flags: np.ndarray[Any, Any] = memory[start : start + 16]
    given_up = threading.Event()

    def answer() -> None:
        while not flags[RUNNING] and not given_up.is_set():
            pass
        flags[ANSWERED] = 1

    partner = threading.Thread(target=answer)
    partner.start()
    result = session(flags)
    given_up.set()
    partner.join()
    assert flags[RUNNING] == 1
    assert result == [1]
