"""Run an artifact on the sample inputs it carries, and compare with the outputs it carries.

    python -m trimtab.runtime.self_check model.trim [--json] [--threads N] [--carried]

Exit code 0: every output is within the manifest's tolerance.  7: it is not, or the file was refused.  Other codes are
those of trimtab.errors.  The compiler ends every build with this in a fresh process: a file that does not run is never
reported as built.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from trimtab.errors import ArtifactError, TrimtabError
from trimtab.runtime.container import ArtifactReader
from trimtab.runtime.manifest import CHECK_ENTRY
from trimtab.runtime.samples import Difference, compare, decode_samples
from trimtab.runtime.session import load


def check_artifact(
    path: str | os.PathLike[str], *, threads: int | None = None, prefer_carried: bool = False
) -> list[Difference]:
    """Run every sample of an artifact and return the difference of every output.

    Raises:
        ArtifactError: the file is refused, or carries no samples or no tolerance.
    """
    reader = ArtifactReader(path, verify="full")
    manifest = reader.manifest
    if CHECK_ENTRY not in reader or manifest.tolerance is None:
        raise ArtifactError(
            "the artifact cannot be checked",
            values={"file": path},
            rule=f"it carries no {CHECK_ENTRY}, or its manifest no tolerance",
            fix="compile the model with sample inputs",
        )
    samples = decode_samples(reader.view(CHECK_ENTRY), manifest, f"{path}/{CHECK_ENTRY}")
    if not samples:
        raise ArtifactError("the artifact cannot be checked", values={"file": path}, rule="it carries no samples")
    differences: list[Difference] = []
    with load(path, threads, verify="code", prefer_carried=prefer_carried) as session:
        for number, sample in enumerate(samples):
            got = session(*sample.inputs)
            differences += compare(number, manifest.outputs, got, sample, manifest.tolerance)
    return differences


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m trimtab.runtime.self_check", description=__doc__.split("\n")[0])
    parser.add_argument("artifact", help="a .trim file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: all usable cores)")
    parser.add_argument(
        "--carried", action="store_true", help="use the runtime library in the file even if tvm is installed"
    )
    options = parser.parse_args(arguments)
    try:
        differences = check_artifact(options.artifact, threads=options.threads, prefer_carried=options.carried)
    except TrimtabError as error:
        if options.json:
            print(json.dumps({"passed": False, "error": error.to_dict()}))
        else:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    passed = all(difference.passed for difference in differences)
    if options.json:
        print(json.dumps({"passed": passed, "outputs": [_plain(difference) for difference in differences]}))
    else:
        for difference in differences:
            print(_line(difference))
        print("passed" if passed else "FAILED")
    return 0 if passed else ArtifactError.exit_code


def _plain(difference: Difference) -> dict[str, Any]:
    return {
        "sample": difference.sample,
        "output": difference.output,
        "max_difference": difference.largest if not difference.reason else None,
        "allowed": difference.allowed,
        "passed": difference.passed,
        "reason": difference.reason,
    }


def _line(difference: Difference) -> str:
    head = f"sample {difference.sample}, output {difference.output}"
    if difference.reason:
        return f"{head}: {difference.reason}"
    return f"{head}: max difference {difference.largest:.3g} (allowed {difference.allowed:.3g})"


if __name__ == "__main__":
    sys.exit(main())
