"""The option ``--calibration``: batches of real inputs from files, read as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from trimtab.errors import CalibrationError, UsageError

if TYPE_CHECKING:
    from trimtab.cli.array_files import ArrayFile, Header
    from trimtab.ir.core import Module, Value

CalibrationOption: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibration",
        metavar="DATA",
        help="Real inputs for passes that need data: an .npz file with an array of samples for each input, cut into "
        "batches, or a folder of .npz files of one batch each (repeatable).",
    ),
]
CalibrationBatchOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--calibration-batch",
        min=1,
        metavar="N",
        help="Samples in a batch, for a model that takes any number; by default a file is one batch.",
    ),
]


def calibration_files(
    module: Module, paths: Sequence[Path] | None, size: int | None, detail: Callable[[str], None]
) -> CalibrationFiles | None:
    """The batches that the options name, or None for none.

    Args:
        module: that takes them.
        paths: the values of ``--calibration``.
        size: the value of ``--calibration-batch``.
        detail: called with words about each batch that is drawn.

    Raises:
        UsageError, InputError, CalibrationError: as for :class:`CalibrationFiles`.
    """
    if paths:
        return CalibrationFiles(module, paths, size, detail)
    if size is not None:
        raise UsageError(
            "there is nothing to cut into batches", values={"--calibration-batch": size}, fix="give --calibration too"
        )
    return None


class CalibrationFiles:
    """Batches from files and folders in the order given; each walk reads them again, one batch at a time.

    An array with more rows than the static leading size of its input, or than ``size`` where that is symbolic, is cut
    into batches of as many rows. Arrays of one file are cut at the same samples; others are in every batch.

    Args:
        module: that takes the batches.
        paths: ``.npz`` files of samples, ``.npy`` files for a module with one input, and folders of ``.npz`` files that
            are a batch each, in the order of their names.
        size: samples of a batch where the module does not say it; None for all of a file.
        detail: called with words about each batch that is drawn.

    Attributes:
        notes: what was left out, in words.

    Raises:
        UsageError: there is no such file or folder, nothing in it, or the module takes batches of another size.
        InputError: a file is damaged, or of another kind.
        CalibrationError: a file has fewer samples than a batch, or not as many for each input.
    """

    def __init__(
        self, module: Module, paths: Sequence[Path], size: int | None, detail: Callable[[str], None] = lambda text: None
    ) -> None:
        self._detail = detail
        self._parts = [part for path in paths for part in _parts(module, path, size)]
        self.notes = [part.note for part in self._parts if part.note]

    def __len__(self) -> int:
        return sum(part.batches for part in self._parts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number, total = 0, len(self)
        for part in self._parts:
            for batch in part.read():
                number += 1
                self._detail(f"calibration batch {number} of {total}")
                yield batch
                del batch


@dataclass(frozen=True)
class _Part:
    """Batches from one file.

    Attributes:
        path: the file.
        name: of the input that an array without a name is for.
        rows: of each array in a batch; None for all. Empty for a file whose headers have not been looked at.
        batches: how many there are.
        note: what is left out.
    """

    path: Path
    name: str
    rows: dict[str, int | None]
    batches: int = 1
    note: str = ""

    def read(self) -> Iterator[dict[str, Any]]:
        from trimtab.cli.array_files import ArrayFile

        file = ArrayFile(self.path)
        for arrays in islice(file.pieces(self.rows or dict.fromkeys(file.headers)), self.batches):
            yield {name or self.name: array for name, array in arrays.items()}
            del arrays


def _parts(module: Module, path: Path, size: int | None) -> list[_Part]:
    from trimtab.cli.array_files import ArrayFile

    inputs = module.main.inputs
    name = inputs[0].name if len(inputs) == 1 else ""
    if not path.is_dir():
        return [_cut(inputs, ArrayFile(path), size, name)]
    files = sorted(file for file in path.glob("*.npz") if file.is_file())
    if not files:
        raise UsageError(
            "there are no batches in a folder", values={"folder": path}, rule="a batch is an .npz file", fix="check it"
        )
    return [_Part(file, name, {}) for file in files]


def _cut(inputs: Sequence[Value], file: ArrayFile, size: int | None, name: str) -> _Part:
    """How the arrays of ``file`` become batches. What fits no input is left to the check of batches, which names it."""
    headers = {key or name: header for key, header in file.headers.items()}
    rows = {value.name: _rows(value, headers.get(value.name), size) for value in inputs}
    cut = {value.name: value for value in inputs if _has_more(headers.get(value.name), rows[value.name])}
    # With the same leading size an array of one batch, where others have several, has too few samples.
    leads = {value.type.shape[0] for value in cut.values()}
    cut |= {value.name: value for value in inputs if rows[value.name] is not None and value.type.shape[0] in leads}
    if not cut:
        return _Part(file.path, name, dict.fromkeys(file.headers))
    counts = {key: _count(value, headers[key].shape[0], rows[key] or 1) for key, value in cut.items()}
    samples = {key: headers[key].shape[0] for key in cut}
    if len(set(counts.values())) > 1 or (len(leads) == 1 and len(set(samples.values())) > 1):
        raise CalibrationError(
            "inputs have different numbers of samples",
            values={"file": file.path, **samples},
            rule="sample i of a file is row i of each array",
            fix="write as many rows for each input",
        )
    first = next(iter(cut))
    length, count = rows[first] or 1, counts[first]
    if not count:
        raise CalibrationError(
            "a file has fewer samples than a batch",
            values={"file": file.path, "samples": samples[first], "batch": length},
            fix="write more samples, or trace the model with a symbolic batch size",
        )
    left = max(samples[first] - count * length, 0)
    note = f"{left} of {samples[first]} samples of {file.path} are left out: a batch has {length}" if left else ""
    plan = {key: rows[key or name] if (key or name) in cut else None for key in file.headers}
    return _Part(file.path, name, plan, count, note)


def _rows(value: Value, header: Header | None, size: int | None) -> int | None:
    """The rows of an input's array in a batch, or None where it is not cut.

    Raises:
        UsageError: they would have to be cut otherwise than ``size`` says.
    """
    from trimtab.ir.dims import as_symbol

    if header is None or not value.type.shape or len(header.shape) != value.type.rank:
        return None
    lead = value.type.shape[0]
    if not isinstance(lead, int):
        return size if as_symbol(lead) is not None else None
    if size is not None and size != lead and header.shape[0] > lead:
        raise UsageError(
            "the model takes batches of another size",
            values={"--calibration-batch": size, "input": value.name, "type": value.type},
            fix=f"leave --calibration-batch out, or give {lead}",
        )
    return lead or None


def _has_more(header: Header | None, rows: int | None) -> bool:
    return header is not None and rows is not None and header.shape[0] != rows


def _count(value: Value, samples: int, rows: int) -> int:
    """The number of batches: the last may have fewer rows where the input's type allows so few."""
    from trimtab.ir.dims import as_symbol

    symbol = as_symbol(value.type.shape[0])
    whole, rest = divmod(samples, rows)
    return whole + (rest > 0 and symbol is not None and rest >= symbol.min)
