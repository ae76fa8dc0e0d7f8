"""Modules as files: ``model.ttir`` (text) and ``model.safetensors`` (weights) beside it.

The weights are written first and the text last, each atomically.  The text names every weight with its type and hash,
and the weights file carries a fingerprint of that list, so a pair that does not belong together is refused without
reading the data.  Weights come back as views of the mapped file: nothing is read before it is used, and no second copy
of the data is made on either way.

The two parts can also live in other containers: :func:`write_weights` writes to any binary file, and
:func:`module_from_parts` takes the text and a mapping of tensors, wherever they come from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, TypeAlias

from trimtab.atomic_file import write_atomically
from trimtab.errors import ArtifactError, ParseError, UsageError
from trimtab.ir.core import Module
from trimtab.ir.dtypes import DType
from trimtab.ir.parser import parse_module
from trimtab.ir.printer import print_module
from trimtab.ir.types import TensorType
from trimtab.ir.weights import ArraySource, Weight, unpack_sub_byte
from trimtab.tensor_file import TensorFile, TensorRecord, TensorSource, map_file, write_tensors

if TYPE_CHECKING:
    import torch

HashCheck: TypeAlias = Literal["first-use", "now", "never"]
"""When the content of weights is compared with the hashes in the text."""

TEXT_SUFFIX = ".ttir"
WEIGHTS_SUFFIX = ".safetensors"
_FINGERPRINT = "trimtab.weights"
_MAX_TEXT_BYTES = 256 << 20


def write_module(module: Module, path: str | os.PathLike[str]) -> None:
    """Write ``module`` to ``path`` (``*.ttir``) and its weights beside it; a module without weights is text alone.

    Every weight is read twice, once for its hash and once to be written, a block at a time.

    Raises:
        UsageError: the name does not end in ``.ttir``, or its directory does not exist.
        ArtifactError: the disk is full, or a weight cannot be stored.
    """
    target = _text_path(path)
    if module.weights:
        write_weights(module, target.with_suffix(WEIGHTS_SUFFIX))
    write_atomically(target, print_module(module))


def read_module(path: str | os.PathLike[str], *, check: HashCheck = "first-use") -> Module:
    """Read what :func:`write_module` wrote.

    Args:
        path: the ``.ttir`` file; the weights are expected beside it.
        check: when each weight's content is hashed and compared: at its first use, now, or never.

    Raises:
        UsageError: a file is missing or cannot be opened.
        ParseError: the text does not follow the grammar; the message has the line and column.
        ArtifactError: the weights file is truncated or damaged, belongs to another text, lacks a weight, or holds one
            of another type or (by ``check``) content.
    """
    source = _text_path(path)
    text = _read_text(source)
    weights_path = source.with_suffix(WEIGHTS_SUFFIX)
    needs_weights = any(line.startswith("weight ") for line in text.splitlines())
    if needs_weights and not weights_path.exists():
        raise UsageError(
            "a module's weights are missing",
            values={"module": source, "weights": weights_path},
            rule="the text names its weights; their data is in the file of the same name beside it",
            fix="copy both files",
        )
    tensors = TensorFile.open(weights_path) if needs_weights else {}
    module = module_from_parts(text, tensors, file=str(source), weights_file=str(weights_path), check=check)
    if isinstance(tensors, TensorFile) and tensors.metadata.get(_FINGERPRINT, "") not in ("", _fingerprint(module)):
        raise ArtifactError(
            "text and weights of a module do not belong together",
            values={"module": source, "weights": weights_path},
            rule="the weights were written for a text that lists other weights or contents",
            fix="copy both files again from the same place, or write the module again",
        )
    return module


def write_weights(module: Module, destination: str | os.PathLike[str] | BinaryIO) -> int:
    """Write all weights of ``module``, in the order of its table, as an aligned safetensors file.

    Args:
        module: the module.
        destination: a path, written atomically, or a binary file open for writing.

    Returns:
        The number of bytes written.

    Raises:
        ArtifactError: the disk is full, or a weight cannot be stored.
    """
    tensors = {
        weight.id: TensorSource(*storage_type(weight.type), chunks=weight.blocks) for weight in module.weights.values()
    }
    return write_tensors(destination, tensors, {_FINGERPRINT: _fingerprint(module)})


def module_from_parts(
    text: str,
    tensors: Mapping[str, TensorRecord],
    *,
    file: str = "module text",
    weights_file: str = "weights",
    check: HashCheck = "first-use",
) -> Module:
    """Build a module from its text and the tensors it names.

    Args:
        text: the text form, with hashes.
        tensors: the stored weights by id, e.g. a :class:`~trimtab.tensor_file.TensorFile`; views are kept, not copied.
        file: name of the text in error messages.
        weights_file: name of the container of the weights in error messages.
        check: when each weight's content is hashed and compared.

    Raises:
        ParseError: the text does not follow the grammar.
        ArtifactError: a weight is missing, or has another type or (by ``check``) content.
    """

    def find(id: str, type: TensorType) -> StoredSource:
        if id not in tensors:
            raise ArtifactError(
                "a weight is missing",
                values={"weight": f"@{id}", "file": weights_file, "stored": len(tensors)},
                rule="every weight that the text declares is in the file",
                fix="copy both files again from the same place, or write the module again",
            )
        record = tensors[id]
        if (record.dtype, record.shape) != storage_type(type):
            dtype, shape = storage_type(type)
            raise ArtifactError(
                "a weight is stored with another type",
                values={"weight": f"@{id}", "file": weights_file, "text": f"{dtype}{list(shape)}",
                        "stored": f"{record.dtype}{list(record.shape)}"},
                fix="copy both files again from the same place, or write the module again",
            )  # fmt: skip
        return StoredSource(id, type, record, weights_file)

    module = parse_module(text, find, file=file)
    for weight in module.weights.values():
        source = weight.source
        if isinstance(source, StoredSource) and check != "never":
            source.expect(weight._sha256)
            if check == "now":
                source.tensor()
    return module


def storage_type(type: TensorType) -> tuple[str, tuple[int, ...]]:
    """Dtype name and shape with which a static type is stored; sub-byte rows are packed into ``u8``."""
    shape = tuple(int(dim) for dim in type.shape if isinstance(dim, int))
    if not type.dtype.is_sub_byte:
        return str(type.dtype), shape
    per_byte = 8 // type.dtype.bits
    return str(DType.U8), (*shape[:-1], -(-shape[-1] // per_byte)) if shape else (1,)


class StoredSource:
    """A weight in a mapped file. The content is compared with the expected hash at the first use."""

    def __init__(self, id: str, type: TensorType, record: TensorRecord, file: str) -> None:
        self._id = id
        self._type = type
        self._file = file
        self._array = ArraySource(record.array, DType(record.dtype), record.shape)
        self._expected = ""

    def expect(self, sha256: str) -> None:
        """Compare the content with this hash (hex) when it is first used."""
        self._expected = sha256

    def tensor(self) -> torch.Tensor:
        """The data, sharing memory with the map; sub-byte types are unpacked into a new tensor.

        Raises:
            ArtifactError: the content does not have the expected hash.
        """
        if self._expected:
            actual = Weight(self._id, self._type, _Unchecked(self)).sha256
            if actual != self._expected:
                raise ArtifactError(
                    "a weight's content is damaged",
                    values={"weight": f"@{self._id}", "file": self._file, "expected_sha256": self._expected,
                            "actual_sha256": actual},
                    rule="the text holds the hash of every weight",
                    fix="copy both files again from the same place, or write the module again",
                )  # fmt: skip
            self._expected = ""
        return self.unchecked()

    def unchecked(self) -> torch.Tensor:
        """The data without looking at its hash."""
        data = self._array.tensor()
        if not self._type.dtype.is_sub_byte:
            return data
        length = self._type.shape[-1] if self._type.shape else 1
        assert isinstance(length, int)  # weights have static types: the parser refuses others
        unpacked = unpack_sub_byte(data, self._type.dtype, length)
        return unpacked if self._type.shape else unpacked.reshape(())


class _Unchecked:
    def __init__(self, source: StoredSource) -> None:
        self.tensor = source.unchecked


def _fingerprint(module: Module) -> str:
    digest = hashlib.sha256()
    for weight in module.weights.values():
        digest.update(f"{weight.id}\0{weight.sha256}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _text_path(path: str | os.PathLike[str]) -> Path:
    result = Path(path)
    if result.suffix != TEXT_SUFFIX:
        raise UsageError(
            "a module's file has another suffix",
            values={"path": result},
            rule=f"text is in *{TEXT_SUFFIX} and weights are in *{WEIGHTS_SUFFIX} beside it",
            fix=f"name it {result.stem or 'model'}{TEXT_SUFFIX}",
        )
    return result


def _read_text(path: Path) -> str:
    with map_file(path) as data:
        if len(data) > _MAX_TEXT_BYTES:
            raise ParseError("a module's text is too long", values={"bytes": len(data), "limit": _MAX_TEXT_BYTES})
        try:
            return data[:].decode("utf-8")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise ParseError(
                "a module's text is not UTF-8", values={"byte": error.start}, where=f"{path}, line {line}"
            ) from error
