"""ONNX's own node tests: a spread of them here, all of them in benchmarks/onnx_node_tests.py."""

from __future__ import annotations

import pytest

import onnx_node_tests

STEP = 6


@pytest.fixture(scope="module")
def results():
    return [onnx_node_tests.run_case(case) for case in onnx_node_tests.collect()[::STEP]]


def test_no_case_is_wrong(results):
    assert [(result.case, result.error) for result in results if result.outcome == "wrong"] == []


def test_most_cases_pass(results):
    passed = [result for result in results if result.outcome == "passed"]
    assert len(passed) >= 0.75 * len(results) > 200


def test_refusals_say_what_to_do(results):
    refused = [result for result in results if result.outcome == "refused"]
    assert refused
    for result in refused:
        assert result.error.count(". ") >= 1, result
        assert "Traceback" not in result.error
