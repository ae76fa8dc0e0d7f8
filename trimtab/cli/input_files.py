"""Arrays from files for ``run``, ``bench`` and ``bisect``, and random inputs that fit a signature."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.command_options import split_counts
from trimtab.errors import InputError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from trimtab.runtime import Manifest, Session, TensorSpec
    from trimtab.runtime.samples import Sample

    Array = np.ndarray[Any, Any]


def inputs_for(session: Session, given: Sequence[str], seed: int | None, sizes: Sequence[str]) -> dict[str, Array]:
    """The arrays to call a session with: from the files ``given``, or random ones where there is a ``seed``.

    Args:
        session: a loaded artifact.
        given: the values of ``--input``.
        seed: the value of ``--random``.
        sizes: the values of ``--size``.

    Raises:
        UsageError, InputError: as in :func:`read_inputs` and :func:`random_inputs`.
    """
    if seed is None:
        return read_inputs(given, [spec.name for spec in session.signature.inputs])
    bound = split_counts("--size", sizes, "batch=8")
    return random_inputs(session.manifest, seed, bound, _carried_sample(session.path))


def _carried_sample(path: str) -> Sample | None:
    from trimtab.runtime.container import ArtifactReader
    from trimtab.runtime.manifest import CHECK_ENTRY
    from trimtab.runtime.samples import decode_samples

    reader = ArtifactReader(path, verify="code")
    if CHECK_ENTRY not in reader:
        return None
    samples = decode_samples(reader.view(CHECK_ENTRY), reader.manifest, f"{path}/{CHECK_ENTRY}")
    return samples[0] if samples else None


def read_inputs(given: Iterable[str], names: Sequence[str]) -> dict[str, Array]:
    """Arrays by input name from ``x.npz`` (one array per input), ``name=file.npy`` or, for one input, ``file.npy``.

    Args:
        given: the values of ``--input``, in order.
        names: the model's inputs.

    Raises:
        InputError: a file cannot be read, or an input is given twice.
        UsageError: no such file, or a ``.npy`` file without the name of its input.
    """
    arrays: dict[str, Array] = {}
    for text in given:
        name, equals, path = text.rpartition("=")
        found = read_arrays(Path(path if equals else text))
        if isinstance(found, Mapping):
            if equals:
                found = {name: _only(found, path)}
        elif equals or len(names) == 1:
            found = {name or names[0]: found}
        else:
            raise UsageError(
                "an array has no input name",
                values={"given": text, "inputs": ", ".join(names)},
                fix=f"write --input {names[0] if names else 'name'}={text}",
            )
        for key, array in found.items():
            if key in arrays:
                raise InputError("an input is given twice", values={"name": key}, fix="give each input once")
            arrays[key] = array
    return arrays


def _only(arrays: Mapping[str, Array], path: str) -> Array:
    if len(arrays) != 1:
        raise UsageError(
            "a file with several arrays cannot be one input",
            values={"file": path, "arrays": ", ".join(arrays)},
            fix="give it without a name: its arrays are taken by name",
        )
    return next(iter(arrays.values()))


def read_arrays(path: Path) -> dict[str, Array] | Array:
    """The arrays of a ``.npz`` file by name, or the array of a ``.npy`` file. Pickled objects are refused.

    Raises:
        UsageError: there is no such file.
        InputError: it is damaged, of another kind, or holds Python objects.
    """
    import numpy as np

    with readable(path):
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded as archive:
            return {name: archive[name] for name in archive.files}


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Reading the arrays of ``path`` inside.

    Raises:
        UsageError: there is no such file.
        InputError: what is raised inside because the file is damaged, or of another kind.
    """
    if not path.is_file():
        raise UsageError("there is no such input file", values={"file": path}, fix="check the path")
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise InputError(
            "cannot read an input file",
            values={"file": path, "reason": str(error).splitlines()[0] if str(error) else type(error).__name__},
            rule="inputs are .npy or .npz files of plain arrays",
            fix="write it with numpy.save or numpy.savez",
        ) from error


def random_inputs(manifest: Manifest, seed: int, sizes: Mapping[str, int], sample: Sample | None) -> dict[str, Array]:
    """Random arrays that fit the signature of an artifact.

    Floating-point elements are drawn from the standard normal distribution. Integers (token ids, masks) are drawn from
    the range that the artifact's own sample has, because larger ones might be no valid index.

    Args:
        manifest: what the artifact says about itself.
        seed: seed of the numbers.
        sizes: sizes of symbols by name; those not given are the smallest allowed.
        sample: sample inputs that the artifact carries, or None.

    Raises:
        UsageError: a size for something that is no symbol, or out of its range.
    """
    import numpy as np

    from trimtab.runtime.dimension import evaluate

    known = {symbol.name: symbol for symbol in manifest.symbols}
    for name, size in sizes.items():
        if name not in known:
            raise UsageError(
                "there is no such size",
                values={"name": name, "sizes": ", ".join(known) or "none: every size of this model is fixed"},
                fix="leave --size out" if not known else "name one of these",
            )
        symbol = known[name]
        if size < symbol.min or (symbol.max is not None and size > symbol.max):
            raise UsageError("a size is out of its range", values={"size": size, "allowed": symbol})
    bound = {name: sizes.get(name, symbol.min) for name, symbol in known.items()}
    generator = np.random.default_rng(seed)
    arrays = {}
    for index, spec in enumerate(manifest.inputs):
        shape = tuple(evaluate(size, bound) for size in spec.shape)
        arrays[spec.name] = _draw(spec, shape, generator, sample.inputs[index] if sample is not None else None)
    return arrays


def _draw(spec: TensorSpec, shape: tuple[int, ...], generator: Any, example: Array | None) -> Array:
    import numpy as np

    from trimtab.tensor_file import STORAGE_TYPES

    dtype = STORAGE_TYPES[spec.dtype].numpy_dtype
    if spec.dtype == "bf16":
        bits = generator.standard_normal(shape, np.float32).view(np.uint32) >> 16
        return np.asarray(bits, dtype)
    if dtype.kind == "f":
        return np.asarray(generator.standard_normal(shape), dtype)
    if dtype.kind == "c":
        return np.asarray(generator.standard_normal(shape) + 1j * generator.standard_normal(shape), dtype)
    low, high = (0, 1) if example is None or not example.size else (int(example.min()), int(example.max()))
    return np.asarray(generator.integers(low, high, shape, endpoint=True), dtype)
