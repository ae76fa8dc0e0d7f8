"""What commands print: one JSON document, or tables for people.  Numbers and sizes look the same in all of them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_streams: dict[str, TextIO] = {}


def keep_stdout_for_json(stream: TextIO) -> None:
    """Send the document of :func:`print_json` to ``stream``, whatever standard output is redirected to later."""
    _streams["json"] = stream


def print_json(document: Any) -> None:
    """Print one JSON document. Infinities and NaN, which JSON lacks, become strings; paths too."""
    stream = _streams.get("json", sys.stdout)
    stream.write(json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    stream.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, frozenset | set):
        return sorted(_plain(item) for item in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "item"):  # a numpy scalar
        return _plain(value.item())
    return str(value)


def console(stderr: bool = False) -> Console:
    """A rich console that neither wraps nor colours text that goes to a file or a pipe."""
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit by itself; trimtab.cli.error_report decides

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 200
    return PlainConsole(file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


def table(title: str, columns: Sequence[str], right: Iterable[str] = ()) -> Table:
    """A table of plain text; the columns named in ``right`` are aligned to the right."""
    from rich import box
    from rich.table import Table

    made = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    on_the_right = set(right)
    for name in columns:
        made.add_column(name, justify="right" if name in on_the_right else "left", overflow="fold")
    return made


def text_bytes(count: float) -> str:
    """``512 B``, ``3.4 MB``: powers of 1000."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def text_count(count: float) -> str:
    """``950``, ``12.3 k``, ``86.6 M``, ``17.6 G``."""
    return _scaled(count, ("", "k", "M", "G", "T"))


def _scaled(count: float, units: Sequence[str]) -> str:
    """Three digits and a unit, each unit 1000 times the one before."""
    step = 0
    while round(count) >= 1000 and step < len(units) - 1:
        count, step = count / 1000, step + 1
    number = f"{count:.0f}" if step == 0 or count >= 100 else f"{count:.3g}"
    return f"{number} {units[step]}".strip()


def text_time_pair(first: float, second: float) -> str:
    """``1.23/0.98 ms``: two times in the unit that suits the first."""
    factor, unit = (1.0, "s") if first >= 1 else (1e3, "ms") if first >= 1e-3 else (1e6, "us")
    return f"{first * factor:.3g}/{second * factor:.3g} {unit}"


def text_seconds(seconds: float) -> str:
    """``1.23 s``, or milliseconds or microseconds when shorter."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
