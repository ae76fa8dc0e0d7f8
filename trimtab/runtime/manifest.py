"""The manifest of an artifact: what a model takes and gives, what its code needs, and what is in the file.

``manifest.json`` mirrors these dataclasses field by field (see docs/artifact-format.md).  A reader ignores fields it
does not know; a change that an older reader must not ignore raises :data:`SCHEMA`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import ArtifactError
from trimtab.runtime.dimension import Dimension, is_symbol, symbols_of
from trimtab.runtime.json_fields import decode_fields
from trimtab.tensor_file import STORAGE_TYPES

SCHEMA = 1

MANIFEST_ENTRY = "manifest.json"
MODULE_ENTRY = "module.ttir"
WEIGHTS_ENTRY = "weights.safetensors"
CHECK_ENTRY = "check.npz"


@dataclass(frozen=True)
class TensorSpec:
    """An input or output.

    Args:
        name: unique among the inputs, or among the outputs.
        dtype: a name such as ``f32``, ``bf16``, ``i64``, ``bool``.
        shape: sizes; each an int, a symbol, or (outputs, rarely inputs) an expression over symbols as text.
    """

    name: str
    dtype: str
    shape: tuple[Dimension, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class SymbolRange:
    """The sizes a symbol of the signature may take: ``min <= size <= max``, without a limit where ``max`` is None."""

    name: str
    min: int = 1
    max: int | None = None

    def __str__(self) -> str:
        return f"{self.min} <= {self.name}" + (f" <= {self.max}" if self.max is not None else "")


@dataclass(frozen=True)
class WeightLayout:
    """How a weight that is not stored as its plain self relates to the tensor of the model.

    Args:
        kind: ``blocked`` (tiled for a micro-kernel), ``packed`` (sub-byte elements), or another name of the compiler's.
        dtype: dtype of the tensor in the model; None if it is the stored one.
        shape: shape of the tensor in the model.
        parameters: free JSON, such as block sizes.
    """

    kind: str
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightEntry:
    """A tensor of ``weights.safetensors``, as stored and as handed to the code.

    Args:
        name: its key in the file.
        dtype: stored dtype.
        shape: stored shape.
        layout: None when the stored tensor is the model's own, in row-major order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    layout: WeightLayout | None = None


@dataclass(frozen=True)
class KernelCall:
    """One of the kernel calls that a call of the model makes, for profiles.

    Args:
        name: the kernel's name in the code.
        ops: the ops it computes, as ``mnemonic at location``.
        macs: multiply-accumulates; like the other counts an int or an expression over symbols.
        factors: dtype of the numbers that are multiplied; empty without multiply-accumulates.
        bytes_read: bytes of its operands, weights included; each counts once, however often it is read.
        bytes_written: bytes of its results.
    """

    name: str
    ops: tuple[str, ...] = ()
    macs: Dimension = 0
    factors: str = ""
    bytes_read: Dimension = 0
    bytes_written: Dimension = 0


@dataclass(frozen=True)
class CodeVariant:
    """Code for one target.

    Args:
        target: target triple, such as ``x86_64-unknown-linux-gnu``.
        library: entry of the file that holds the code.
        backend: ``tvm``: a shared library with a Relax executable; ``mlir``: a module of IREE's virtual machine.
        entry: the function to call, with all inputs, then all weights, then the arena if it takes one.
        features: CPU features the code needs, by LLVM name; levels such as ``x86-64-v3`` too.
        runtime: entries with the shared libraries of the backend's runtime, in loading order; empty if left out.
        weights: names of the weights to pass, in order; None means all of the manifest's.
        requires: versions of the packages the code was built for, such as ``{"apache-tvm": "0.27.0.post1"}``.
        kernels: the kernel calls that a call of the model makes, in order; empty where the compiler does not tell.
        parameters: names under which ``mlir`` code asks for the weights, in the same order; empty when their own.
        driver: the driver of IREE's runtime that runs ``mlir`` code; empty for other backends.
        arena: the function that takes all inputs and returns how many bytes the arena must have, the memory for
            intermediate tensors; empty when the entry takes none.
    """

    target: str
    library: str
    backend: str = "tvm"
    entry: str = "main"
    features: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()
    weights: tuple[str, ...] | None = None
    requires: dict[str, str] = field(default_factory=dict)
    kernels: tuple[KernelCall, ...] = ()
    arena: str = ""
    parameters: tuple[str, ...] = ()
    driver: str = ""


@dataclass(frozen=True)
class Tolerance:
    """How far outputs may be from ``check.npz``: ``max|got - expected| <= atol + rtol * max|expected|`` per tensor.

    Args:
        rtol: see above.
        atol: see above.
        integers: whether integer and boolean outputs have to agree; not where rounded values decide about them.
    """

    rtol: float = 0.0
    atol: float = 0.0
    integers: bool = True


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (lower-case hex) of one entry of the file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything an artifact says about itself.

    Args:
        name: what the model is called, for people.
        inputs: in calling order.
        outputs: in order of return.
        symbols: a range for every symbol of the signature.
        weights: in the order in which code without its own list takes them.
        variants: code, for one or several targets.
        versions: compiler and dependency versions at build time.
        pipeline: text of the pass pipeline that made the module.
        report: per-pass report, free JSON.
        memory: bytes by purpose, as integers or expressions over symbols; free JSON.
        threads: threads the code was planned for, which a session uses where there are as many cores; None if any.
        tolerance: for ``check.npz``; None if the file carries none.
        precision: ``f32``, ``bf16`` or ``f16-storage``, the precision that the module was compiled in.
        entries: filled in by the writer; every entry but ``manifest.json`` itself.
        schema: version of this description.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: tuple[CodeVariant, ...]
    name: str = ""
    symbols: tuple[SymbolRange, ...] = ()
    weights: tuple[WeightEntry, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    pipeline: str = ""
    report: Any = None
    memory: Any = None
    threads: int | None = None
    tolerance: Tolerance | None = None
    precision: str = "f32"
    entries: dict[str, FileEntry] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        """The text of ``manifest.json``; raises :class:`ArtifactError` if the manifest contradicts itself."""
        check_manifest(self)
        try:
            return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ArtifactError(
                "a manifest cannot be written",
                values={"reason": error},
                rule="report, memory and layout parameters must be plain JSON values without NaN or infinity",
            ) from error

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read and check ``manifest.json``.

        Raises:
            ArtifactError: not JSON, an unknown schema, a missing field or one of the wrong type, or a contradiction.
        """
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise _wrong("it is not JSON", reason=error) from None
        if not isinstance(data, dict) or type(data.get("schema")) is not int:
            raise _wrong("it has no schema number", schema=data.get("schema") if isinstance(data, dict) else None)
        if data["schema"] != SCHEMA:
            newer = data["schema"] > SCHEMA
            raise ArtifactError(
                "the artifact has another schema than this version of Trimtab reads",
                values={"schema": data["schema"], "supported": SCHEMA},
                rule="it was written by " + ("a newer" if newer else "an older") + " version",
                fix="upgrade Trimtab on this machine: pip install -U trimtab"
                if newer
                else "compile the model again with this version: trimtab compile MODEL -o model.trim",
            )
        manifest = decode_fields(cls, data, "manifest")
        check_manifest(manifest)
        return manifest


def check_manifest(manifest: Manifest) -> None:
    """Check what the field types alone do not say; raises :class:`ArtifactError` that names the contradiction."""
    for kind, names in (
        ("input", [spec.name for spec in manifest.inputs]),
        ("output", [spec.name for spec in manifest.outputs]),
        ("symbol", [symbol.name for symbol in manifest.symbols]),
        ("weight", [weight.name for weight in manifest.weights]),
    ):
        _check_unique(kind, names)
    if not manifest.outputs:
        raise _wrong("the model has no outputs")
    if not manifest.variants:
        raise _wrong("the file has no code: variants is empty")
    tensors: tuple[TensorSpec | WeightEntry, ...] = (*manifest.inputs, *manifest.outputs, *manifest.weights)
    for tensor in tensors:
        if tensor.dtype not in STORAGE_TYPES:
            known = ", ".join(STORAGE_TYPES)
            raise _wrong(f"unknown dtype (known are {known})", tensor=tensor.name, dtype=tensor.dtype)
        if any(isinstance(size, int) and size < 0 for size in tensor.shape):
            raise _wrong("a size is negative", tensor=tensor.name, shape=list(tensor.shape))
    if manifest.threads is not None and manifest.threads < 1:
        raise _wrong("the number of threads is less than one", threads=manifest.threads)
    _check_symbols(manifest)
    weights = {weight.name for weight in manifest.weights}
    for variant in manifest.variants:
        unknown = set(variant.weights or ()) - weights
        if unknown:
            raise _wrong("a variant takes weights that are not listed", target=variant.target, weights=sorted(unknown))
    for name, entry in manifest.entries.items():
        if entry.size < 0 or not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
            raise _wrong("an entry has a bad size or SHA-256", entry=name)


def check_entries(manifest: Manifest) -> None:
    """Check that every file entry the manifest refers to is listed among its entries."""
    needed = [name for variant in manifest.variants for name in (variant.library, *variant.runtime)]
    needed += [WEIGHTS_ENTRY] if manifest.weights else []
    missing = sorted(set(needed) - set(manifest.entries))
    if missing:
        raise _wrong("it refers to entries the file does not have", entries=", ".join(missing))


def _check_symbols(manifest: Manifest) -> None:
    for symbol in manifest.symbols:
        if not symbol.name.isidentifier():
            raise _wrong("a symbol is not an identifier", symbol=repr(symbol.name))
        if symbol.min < 0 or (symbol.max is not None and symbol.max < symbol.min):
            raise _wrong("a symbol has an empty range", symbol=symbol)
    bound = {size for spec in manifest.inputs for size in spec.shape if is_symbol(size)}
    declared = {symbol.name for symbol in manifest.symbols}
    for spec in (*manifest.inputs, *manifest.outputs):
        for size in spec.shape:
            used = symbols_of(size)
            if not used <= declared:
                raise _wrong("a size uses a symbol without a range", tensor=spec.name, size=size)
            if not used <= bound:
                raise _wrong("a symbol is no input's size by itself, so it has no value", tensor=spec.name, size=size)
    for variant in manifest.variants:
        for call in variant.kernels:
            for count in (call.macs, call.bytes_read, call.bytes_written):
                if not symbols_of(count) <= bound:
                    raise _wrong("a count uses a symbol that has no value", kernel=call.name, count=count)


def _check_unique(kind: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if not name or name in seen:
            raise _wrong(f"two {kind}s have one name" if name else f"an {kind} has no name", name=repr(name))
        seen.add(name)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _wrong(problem: str, **values: object) -> ArtifactError:
    return ArtifactError(
        "the manifest of the artifact is not valid",
        values=values,
        rule=problem,
        fix="compile the model again: trimtab compile MODEL -o model.trim",
    )
