"""Runs the backend node tests that ship in the onnx package through the ONNX frontend and the reference interpreter, or
through the code of a backend.

    python benchmarks/onnx_node_tests.py [--quick] [--json FILE] [--write-docs] [--only TEXT] [--verbose]
                                         [--backend interpreter|tvm|mlir]

Eligible are the cases of the default domain whose inputs and outputs are plain tensors: no sequences, optionals or
strings, no training or random operators.  Each is imported, verified, interpreted and compared with the outputs that
the package gives.  An outcome is ``passed``; ``refused``, when the import, or the backend's check of what it can
compile, ends in an error of Trimtab's; or ``wrong``: results that differ, or any other exception.

Inputs that hold shapes, axes, counts and other things that must be known when a model is imported are fixed with
``from_onnx(..., constants=...)``; the table counts the cases for which that was necessary.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from trimtab.compiler import BACKENDS
from trimtab.errors import ImportModelError, TrimtabError, UnsupportedByBackendError

DOCS = Path(__file__).resolve().parent.parent / "docs" / "onnx-support.md"
TENSOR = "tensor_type"
LEFT_OUT_OPS = {
    "Bernoulli", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial",
    "SequenceMap", "SequenceInsert", "SequenceEmpty", "SplitToSequence", "OptionalGetElement", "OptionalHasElement",
    "StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch", "TfIdfVectorizer", "ImageDecoder",
}  # fmt: skip
RTOL, ATOL = 1e-3, 1e-7
"""The tolerance of onnx's own test runner; cases may state their own."""
HALF_RTOL = {"bfloat16": 2**-6, "float16": 2**-9}
"""Two units in the last place of 16-bit floats, whose sums depend on the order of additions; onnx's own runner does the
same for bfloat16."""


@dataclass
class Result:
    """What became of one case."""

    case: str
    ops: list[str]
    outcome: str
    error: str = ""
    fixed: list[str] = field(default_factory=list)
    close: bool = True
    """Whether it also passes at a relative tolerance of 1e-5."""

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"case": self.case, "outcome": self.outcome}
        return row | ({"error": self.error} if self.error else {})


def eligible(case: Any) -> bool:
    """Whether a case is in the default domain with plain tensors, and neither training nor random."""
    model = case.model
    if any(entry.domain not in ("", "ai.onnx") for entry in model.opset_import):
        return False
    infos = [*model.graph.input, *model.graph.output]
    if any(info.type.WhichOneof("value") != TENSOR or info.type.tensor_type.elem_type == onnx.TensorProto.STRING
           for info in infos):  # fmt: skip
        return False
    names = {node.op_type for node in _all_nodes(model.graph)}
    if names & LEFT_OUT_OPS:
        return False
    return "training" not in case.name and not any(
        info.type.tensor_type.elem_type == onnx.TensorProto.STRING for info in model.graph.value_info
    )


def _all_nodes(graph: Any) -> list[Any]:
    nodes = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                nodes.extend(_all_nodes(attribute.g))
    return nodes


INTERPRETER = "interpreter"


def run_case(case: Any, backend: str = INTERPRETER) -> Result:
    """Import, verify, evaluate and compare one case."""
    operators = sorted({node.op_type for node in case.model.graph.node})
    result = Result(case.name, operators, "passed")
    try:
        for inputs, outputs in case.data_sets:
            _run_data_set(case, inputs, outputs, result, backend)
    except (ImportModelError, UnsupportedByBackendError) as error:
        result.outcome, result.error = "refused", error.message
    except TrimtabError as error:
        result.outcome, result.error = "wrong", f"{type(error).__name__}: {error.message}"
    except AssertionError as error:
        result.outcome, result.error = "wrong", " ".join(str(error).split())[:400]
    except Exception as error:
        result.outcome, result.error = "wrong", f"{type(error).__name__}: {error}"[:400]
    return result


def _run_data_set(case: Any, inputs: list[Any], outputs: list[Any], result: Result, backend: str) -> None:
    from trimtab.frontend.onnx import from_onnx
    from trimtab.ir import verify

    names = [info.name for info in case.model.graph.input]
    given = dict(zip(names, map(_array, inputs), strict=False))
    module, fixed = None, []
    while module is None:
        try:
            module = from_onnx(case.model, constants={name: given[name] for name in fixed})
        except ImportModelError as error:
            # The error names the input that has to be known; fix it, as a user would.
            wanted = [n for n in names if n not in fixed and f"{n!r}: array" in error.message]
            if not wanted:
                raise
            fixed.extend(wanted)
    result.fixed = fixed
    verify(module)
    found = _evaluated(module, {value.name: _tensor(given[value.name]) for value in module.main.inputs}, backend)
    rtol = getattr(case, "rtol", RTOL) or RTOL
    atol = getattr(case, "atol", ATOL) or ATOL
    expected = [_array(output) for output in outputs]
    assert len(found) == len(expected), f"{len(found)} outputs instead of {len(expected)}"
    for actual, wanted in zip(found, expected, strict=True):
        array = _numpy(actual)
        assert _same_dtype(array, wanted), f"dtype {array.dtype} instead of {wanted.dtype}"
        assert array.shape == wanted.shape, f"shape {array.shape} instead of {wanted.shape}"
        left, right = _comparable(array), _comparable(wanted)
        np.testing.assert_allclose(left, right, rtol=max(rtol, HALF_RTOL.get(wanted.dtype.name, 0.0)), atol=atol)
        result.close &= bool(np.allclose(left, right, rtol=1e-5, atol=1e-7, equal_nan=True))


def _evaluated(module: Any, inputs: dict[str, Any], backend: str) -> Sequence[Any]:
    """The outputs as tensors, of the interpreter or of compiled code."""
    import torch

    import trimtab

    if backend == INTERPRETER:
        return trimtab.interpret(module, inputs)
    with tempfile.TemporaryDirectory() as folder:
        made = trimtab.compile(module, target="native", backend=backend, threads=1, include_runtime=False)
        with trimtab.load(made.save(Path(folder) / "case.trim", check=False)) as session:
            outputs = session(**inputs)
            listed = list(outputs) if len(module.main.outputs) > 1 else [outputs]
            tensors = [torch.from_numpy(np.array(output)) for output in listed]
    types = [value.type.dtype.to_torch() for value in module.main.outputs]
    # Sessions give bfloat16 as the bits, in the unsigned type of numpy.
    return [x.view(dtype) if dtype is torch.bfloat16 else x for x, dtype in zip(tensors, types, strict=True)]


def _array(data: Any) -> Any:
    return onnx.numpy_helper.to_array(data) if isinstance(data, onnx.TensorProto) else np.asarray(data)


def _tensor(array: Any) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array).copy()).reshape(array.shape)


def _numpy(tensor: Any) -> Any:
    import torch

    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _same_dtype(actual: Any, wanted: Any) -> bool:
    return bool(actual.dtype == wanted.dtype)


def _comparable(array: Any) -> Any:
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def collect() -> list[Any]:
    """All eligible cases."""
    import logging

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from onnx.backend.test.case.node import collect_testcases

    return [case for case in collect_testcases(None) if eligible(case)]


def table(results: list[Result]) -> str:
    """The supported operators and the counts, as Markdown."""
    from trimtab.frontend.onnx.registry import registered

    groups: dict[str, Counter[str]] = defaultdict(Counter)
    fixed: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    for result in results:
        name = _subject(result)
        groups[name][result.outcome] += 1
        fixed[name] += bool(result.fixed)
        if result.outcome == "refused":
            reasons.setdefault(name, result.error.split("\n")[0].split(". ")[0])
    handled = {name: since for domain, name, since in registered() if domain == ""}
    lines = ["| operator | imported from opset | passed | refused | wrong | with fixed inputs | first refusal |",
             "|---|---|---:|---:|---:|---:|---|"]  # fmt: skip
    for name in sorted(groups):
        counts = groups[name]
        how = str(handled[name]) if name in handled else "by its definition" if counts["passed"] else "no"
        reason = reasons.get(name, "").replace("|", "\\|")[:140]
        numbers = " | ".join(str(counts[outcome]) for outcome in ("passed", "refused", "wrong"))
        lines.append(f"| {name} | {how} | {numbers} | {fixed[name]} | {reason} |")
    return "\n".join(lines)


def _subject(result: Result) -> str:
    """The operator a case is about; cases of expanded functions go by the operator that was expanded."""
    if len(result.ops) == 1:
        return result.ops[0]
    return "(bodies of functions)" if "expanded" in result.case else "+".join(result.ops[:3])


def summary(results: list[Result]) -> str:
    counts = Counter(result.outcome for result in results)
    share = 100 * counts["passed"] / max(len(results), 1)
    loose = sum(1 for result in results if result.outcome == "passed" and not result.close)
    fixed = sum(1 for result in results if result.outcome == "passed" and result.fixed)
    return (
        f"{len(results)} eligible cases: {counts['passed']} passed ({share:.1f} %), {counts['refused']} refused, "
        f"{counts['wrong']} wrong. {fixed} of the passed ones have inputs fixed at import; "
        f"{loose} need the package's own tolerance (relative 1e-3) instead of 1e-5."
    )


def document(results: list[Result]) -> str:
    """The text of docs/onnx-support.md."""
    from trimtab.frontend.onnx.registry import registered

    contrib = ", ".join(name for domain, name, _ in registered() if domain)
    return f"""# ONNX operators

Generated by `python benchmarks/onnx_node_tests.py --write-docs` with onnx {onnx.__version__}
(opset {onnx.defs.onnx_opset_version()}); do not edit.

The node tests that ship in the `onnx` package, default domain, plain tensors (no sequences, optionals or strings, no
training or random operators): import, verify, interpret, compare.

{summary(results)}

"Imported from opset" is the oldest definition of the operator that is followed; "by its definition" means that the
operator is expanded to the body the ONNX standard gives for it. Inputs that hold shapes, axes or counts must be known
when a model is imported: the tests fix them with `from_onnx(..., constants={{...}})`, counted in "with fixed inputs".
Everything refused ends in an `UnsupportedOpError` that names the node, the reason and what to do.

Operators of ONNX Runtime (`com.microsoft`) that are imported: {contrib}.

{table(results)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every eighth case")
    parser.add_argument("--json", metavar="FILE", help="write rows {case, outcome[, error]}")
    parser.add_argument("--write-docs", action="store_true", help=f"write docs/{DOCS.name}")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains TEXT")
    parser.add_argument("--verbose", action="store_true", help="print every case that did not pass")
    parser.add_argument("--backend", choices=[INTERPRETER, *BACKENDS], default=INTERPRETER, help="what computes")
    options = parser.parse_args()
    cases = [case for case in collect() if options.only in case.name]
    results = []
    for case in cases[::8] if options.quick else cases:
        results.append(run_case(case, options.backend))
        if options.verbose and results[-1].outcome != "passed":
            print(f"{results[-1].outcome:8} {case.name}: {results[-1].error.splitlines()[0][:300]}")
    print(table(results))
    print()
    for result in results:
        if result.outcome == "wrong":
            print(f"WRONG {result.case}: {result.error[:300]}")
    print(summary(results))
    if options.json:
        Path(options.json).write_text(json.dumps([result.row() for result in results], indent=1) + "\n")
    if options.write_docs:
        DOCS.parent.mkdir(exist_ok=True)
        DOCS.write_text(document(results))
    return 1 if any(result.outcome == "wrong" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
