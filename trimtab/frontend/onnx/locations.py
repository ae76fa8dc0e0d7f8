"""Where a node came from: the user's line of Python if the exporter left it, else the node's name in the file."""

from __future__ import annotations

import re
from typing import Any

from trimtab.errors import Location

_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in (\S+)')
_LIBRARY = re.compile(r"[/\\]torch[/\\](nn|_dynamo|fx|export|_export|autograd|utils|_ops|functional)\b")


def location_of(node: Any, file: str) -> Location:
    """The location of an onnx_ir node.

    torch's exporter writes the stack of the call into the node's metadata; the innermost frame that is not torch's own
    is the line the user wrote.
    """
    trace = node.metadata_props.get("pkg.torch.onnx.stack_trace") or node.metadata_props.get(
        "pkg.torch.export.stack_trace"
    )
    if trace:
        frames = _FRAME.findall(trace)
        own = [frame for frame in frames if not _LIBRARY.search(frame[0])] or frames
        if own:
            path, line, function = own[-1]
            return Location(path, int(line), function)
    return Location(file, function=node.name or node.op_type)
