"""Writes the page: data, script, style and the two libraries it uses in one file that needs no network.

The script draws; dagre places the ops of a stretch in layers, d3 moves and scales the picture.  Both come from the
packages XStatic-Dagre and XStatic-D3, the optional extra ``report``.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
from importlib.resources import files
from typing import Any

from trimtab.atomic_file import write_atomically
from trimtab.errors import MissingDependencyError
from trimtab.report.recorder import ReportRecorder

_LIBRARIES = {"xstatic.pkg.d3": "d3.js", "xstatic.pkg.dagre": "dagre.min.js"}
_SCRIPTS = (
    "model.js", "stretch.js", "layout.js", "folds.js", "alignment.js", "changes.js", "drawing.js", "overview.js",
    "picture.js", "search.js", "details.js", "pipeline.js", "app.js",
)  # fmt: skip
_ASSETS = files("trimtab.report") / "assets"


def write_page(path: str | os.PathLike[str], recorder: ReportRecorder) -> None:
    """Write the report of a run to ``path``, atomically. Errors as in :func:`render_page` and ``write_atomically``."""
    write_atomically(path, render_page(recorder))


def render_page(recorder: ReportRecorder) -> str:
    """The HTML text of the report of a run.

    Raises:
        MissingDependencyError: the extra ``report`` is not installed.
        UsageError: no pass has run yet.
    """
    libraries = require_libraries()
    script = "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    scripts = [*libraries, f'(() => {{\n"use strict";\n{script}\n}})();\n']
    # Nothing but these scripts may run, and nothing may be fetched: names in the data come from anywhere.
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in scripts)
    parts = {
        "policy": html.escape(f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}"),
        "title": html.escape(recorder.title or "Trimtab report"),
        "style": (_ASSETS / "page.css").read_text(encoding="utf-8"),
        "data": _json_for_html(recorder.to_dict()),
        "scripts": "\n".join(f"<script>{text}</script>" for text in scripts),
    }
    page = (_ASSETS / "page.html").read_text(encoding="utf-8")
    # One pass over the template: what is put in is not searched again.
    pieces = page.split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces[1:]))


def require_libraries() -> list[str]:
    """The texts of the libraries that the page contains.

    Raises:
        MissingDependencyError: the extra ``report`` is not installed.
    """
    try:
        return [(files(package) / "data" / name).read_text(encoding="utf-8") for package, name in _LIBRARIES.items()]
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise MissingDependencyError(
            "a report needs packages that are not installed",
            values={"missing": error},
            rule="the page contains the libraries dagre and d3, which come with the extra `report`",
            fix='pip install "trimtab[report]"',
        ) from error


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _json_for_html(data: Any) -> str:
    """JSON that may stand inside a script element: ASCII without ``<``, so that no name can close the element."""
    return json.dumps(_finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    """``value`` with infinities and NaN, which JSON lacks, as strings."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
