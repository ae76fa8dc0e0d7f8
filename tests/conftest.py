"""Settings of the whole test suite: offline, reproducible, one thread per worker.

Random numbers depend on the test that draws them and on ``--seed``, and not on the tests that ran before it.
"""

from __future__ import annotations

import os
import signal

# Before anything imports torch, transformers or tvm. Subprocesses of tests inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers already fill the cores: a thread pool each would make them wait for one another.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TVM_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

# A shell starts background commands with the interrupt ignored, and processes that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import difflib
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile("trimtab", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("trimtab")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the files in tests/golden to what tests produce"
    )
    parser.addoption("--seed", type=int, default=0, help="draw other random numbers in all tests (default: 0)")


def _seed(config: pytest.Config, drawn_by: str) -> None:
    seed = zlib.crc32(f"{config.getoption('--seed')} {drawn_by}".encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pytest_collectstart(collector: pytest.Collector) -> None:
    _seed(collector.config, collector.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> None:
    _seed(request.config, f"{request.node.nodeid} {fixturedef.argname} {request.param_index}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _seed(item.config, item.nodeid)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` fails when ``text`` differs from the file tests/golden/``name``, and shows the diff.

    Golden files are reviewed like code. ``pytest --update-golden`` rewrites them.
    """

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        text = text if text.endswith("\n") else text + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"tests/golden/{name} does not exist; write it with pytest --update-golden")
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            diff = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), f"tests/golden/{name}", "produced", lineterm=""
            )
            pytest.fail("\n".join(diff) + "\nIf this is what you want: pytest --update-golden", pytrace=False)

    return check
