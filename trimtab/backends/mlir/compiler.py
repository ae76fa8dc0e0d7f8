"""IR module to a module of IREE's virtual machine: emit, then ``iree-compile``."""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Sequence

from trimtab.backends.base import CompiledCode, StoredWeight
from trimtab.backends.mlir.availability import require_compiler
from trimtab.backends.mlir.support import check_supported
from trimtab.backends.mlir.targets import TargetSpec, find_target
from trimtab.errors import BackendError, Location
from trimtab.ir.core import Module
from trimtab.ir.weights import Weight

_FLAGS = (
    # The reference's types are kept; by default the compiler narrows float64.
    "--iree-input-demote-f64-to-f32=false",
    # What depends on no input is computed at load, on the machine that runs it, and not by the compiler.
    "--iree-opt-const-eval=false",
)


def build(module: Module, target: str = "", threads: int | None = None) -> CompiledCode:
    """Compile ``module``.

    The code is a module of IREE's virtual machine; ``main`` takes the inputs and asks for the weights as parameters of
    the scope ``model``, by id and in row-major order.

    Args:
        module: a verified module.
        target: a name from :func:`trimtab.backends.mlir.targets.target_names`; the portable baseline when empty.
        threads: not used: the code is divided among threads when it runs.

    Raises:
        UsageError: unknown target.
        UnsupportedByBackendError: some ops cannot be compiled; all are listed.
        MissingDependencyError: torch-mlir or IREE's compiler is missing.
        BackendError: the compiler failed.
    """
    require_compiler()
    from trimtab.backends.mlir.emitter import emit

    spec = find_target(target)
    check_supported(module)
    started = time.perf_counter()
    emitted = emit(module)
    emitted_at = time.perf_counter()
    code = _compile(emitted.text, spec)
    weights = tuple(_stored(module.weights[id]) for id in emitted.weights)
    return CompiledCode(
        backend="mlir",
        triple=spec.triple,
        features=spec.features,
        library=code,
        weights=weights,
        requires={"iree-base-runtime": importlib.metadata.version("iree-base-compiler")},
        memory={"weight_bytes": sum(weight.nbytes for weight in weights)},
        driver=spec.driver,
        suffix=".vmfb",
        seconds={"emit": emitted_at - started, "compile": time.perf_counter() - emitted_at},
    )


def _compile(text: str, spec: TargetSpec) -> bytes:
    """The code with the flags that make it fastest, or without them where the compiler refuses the module with them."""
    if spec.preferred:
        try:
            return compile_text(text, (*spec.flags, *spec.preferred))
        except BackendError:
            pass
    return compile_text(text, spec.flags)


def compile_text(text: str, flags: Sequence[str]) -> bytes:
    """The code that ``iree-compile`` makes of an MLIR module.

    Raises:
        BackendError: it refused the module or crashed.
    """
    from iree.compiler import tools

    try:
        return bytes(tools.compile_str(text, extra_args=[*_FLAGS, *flags]))
    except tools.CompilerToolError as error:
        raise _explain(str(error)) from error


def _stored(weight: Weight) -> StoredWeight:
    shape = tuple(int(size) for size in weight.type.shape)  # type: ignore[arg-type]
    dtype = str(weight.type.dtype)
    return StoredWeight(weight.id, dtype, shape, weight.blocks, None, dtype, shape)


_PLACE = re.compile(r'loc\("(?P<op>[^"]*)"(?:\("(?P<file>[^"]*)":(?P<line>\d+))?')
_POINT = re.compile(r"^(?P<file>[^:\n]+):(?P<line>\d+):\d+: error: (?P<text>.*)$", re.MULTILINE)


def _explain(text: str) -> BackendError:
    """A message of the compiler in terms of the user's model: its locations are the ops' own."""
    errors = [line.strip() for line in text.splitlines() if "error:" in line]
    crash = re.search(r"Error code: -(\d+)", text)
    said = errors[0] if errors else f"the compiler crashed with signal {crash[1]}" if crash else text.strip()
    place, point = _PLACE.search(text), _POINT.search(text)
    location = None
    if place is not None and place["file"]:
        location = Location(place["file"], int(place["line"]))
    elif point is not None and not point["file"].startswith("<"):
        location = Location(point["file"], int(point["line"]))
    return BackendError(
        "IREE could not compile the module",
        values={"op": place["op"] if place is not None else "unknown", "error": said[:400]},
        rule="a module that passed the capability check should compile",
        fix="try another target, or report it with the module's text",
        location=location,
    )
