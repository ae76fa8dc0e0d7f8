"""Run an artifact on arrays of an ``.npz`` file: ``python -m trimtab.runtime model.trim --input x.npz --output y.npz``.

The input file has one array per input, by name; the output file gets one per output.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Sequence

import numpy as np

from trimtab.atomic_file import atomic_writer
from trimtab.errors import InputError, TrimtabError
from trimtab.runtime.session import load


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m trimtab.runtime", description="Run a compiled model.")
    parser.add_argument("artifact", help="a .trim file")
    parser.add_argument("--input", help=".npz file with one array per input, by name; without it, print the signature")
    parser.add_argument("--output", help=".npz file to write the outputs to; without it, print their shapes")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: all usable cores)")
    options = parser.parse_args(arguments)
    try:
        run(options.artifact, options.input, options.output, options.threads)
    except TrimtabError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(artifact: str, input_path: str | None, output_path: str | None, threads: int | None) -> None:
    """Run once; prints the signature when there is no input."""
    with load(artifact, threads) as session:
        if input_path is None:
            print(session.signature)
            return
        try:
            with np.load(input_path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise InputError("cannot read the input file", values={"path": input_path, "reason": error}) from error
        result = session(**arrays)
        names = [spec.name for spec in session.signature.outputs]
        outputs = dict(zip(names, [result] if isinstance(result, np.ndarray) else result, strict=True))
        for name, array in outputs.items():
            print(f"{name}: {array.dtype}{list(array.shape)}")
        if output_path is not None:
            with atomic_writer(output_path) as file:
                np.savez(file, **outputs)


if __name__ == "__main__":
    sys.exit(main())
