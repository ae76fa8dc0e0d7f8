"""The user's calibration batches: drawn, and checked against the module's signature, as they are walked.

No batch is kept, unless it can be had only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from trimtab.errors import CalibrationError, InputError, TrimtabError
from trimtab.ir.core import Graph, Module, Value
from trimtab.ir.interpreter import bind_symbols

if TYPE_CHECKING:
    import torch

Batch: TypeAlias = "Sequence[Any] | Mapping[str, Any]"
"""An array or tensor per input of the module, in order or by name; a single array for a module with one input."""
Tensors: TypeAlias = "tuple[torch.Tensor, ...]"
"""A checked batch: a tensor per input of the module, in order."""


def check_calibration(module: Module, batches: Iterable[Any]) -> Sequence[Tensors]:
    """The batches as tensors in the order of the module's inputs. Data is shared with the caller, not copied.

    What comes back draws the batches again each time it is walked, and checks each when it comes. Batches of a list or
    tuple are checked here already, of anything else only the first. Those of an iterator, which gives each only once,
    are kept as they are drawn: it is drawn no further than it is walked.

    Args:
        module: takes the batches.
        batches: of anything that can be iterated; the same ones each time, where it can be more than once.

    Raises:
        CalibrationError: there is no batch, or one has wrong names, dtypes or shapes, or contains NaN or infinities;
            the message names the batch and the input. Walking the result raises it too, also when ``batches`` fails.
    """
    if isinstance(batches, Mapping) or not any(hasattr(batches, name) for name in ("__iter__", "__getitem__")):
        raise CalibrationError(
            "calibration data are not batches",
            values={"given": type(batches).__name__},
            rule="they are a list of batches, or anything else that can be iterated",
            fix="put a single batch in a list",
        )
    # The signature as it is now, whatever becomes of the module.
    signature = Graph("main", (Value(value.type, name=value.name) for value in module.main.inputs))
    checked = CalibrationBatches(batches, lambda batch, index: _check_batch(signature, batch, index))
    for _ in checked if isinstance(batches, list | tuple) else islice(checked, 1):
        pass
    if not checked:
        raise CalibrationError("there is no calibration batch", fix="give at least one, or calibration=None")
    return checked


def converted(batches: Sequence[Tensors], function: Callable[[Tensors], Tensors]) -> Sequence[Tensors]:
    """What ``function`` makes of each of ``batches``, made anew each time that the sequence is walked."""
    return CalibrationBatches(batches, lambda batch, _: function(batch))


class CalibrationBatches(Sequence[Tensors]):
    """Batches that are converted as they are drawn, and drawn again in each walk.

    A walk has one batch in memory at a time, and the caller's loop the one before. An element or a slice is found by
    walking there. What can be iterated only once is copied and kept as far as it was drawn.

    Args:
        source: the batches; an iterator is what can be iterated once.
        convert: makes tensors of a batch and its number.
    """

    def __init__(self, source: Iterable[Any], convert: Callable[[Any, int], Tensors]) -> None:
        self._source = source
        self._convert = convert
        self._kept: list[Tensors] = []
        self._failure: TrimtabError | None = None
        self._length: int | None = None
        self._any = False

    def __repr__(self) -> str:
        return f"CalibrationBatches({type(self._source).__name__})"

    def __iter__(self) -> Iterator[Tensors]:
        return self._walk_kept(self._source) if isinstance(self._source, Iterator) else self._walk()

    def __bool__(self) -> bool:
        return self._any or any(True for _ in islice(self, 1))

    def __len__(self) -> int:
        """The number of batches; where the source does not say it, by drawing them all."""
        if self._length is None:
            if isinstance(self._source, Iterator):
                return sum(1 for _ in self)
            self._length = len(self._source) if isinstance(self._source, Sized) else sum(1 for _ in self)
        return self._length

    @overload
    def __getitem__(self, index: int) -> Tensors: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensors]: ...

    def __getitem__(self, index: int | slice) -> Tensors | Sequence[Tensors]:
        if isinstance(index, slice):
            bounds = (index.start, index.stop, index.step)
            if any(bound is not None and bound < 0 for bound in bounds):
                return tuple(self[place] for place in range(*index.indices(len(self))))
            return tuple(islice(self, *bounds))
        place = index + len(self) if index < 0 else index
        found = next(islice(self, place, None), None) if place >= 0 else None
        if found is None:
            raise IndexError(f"there is no calibration batch {index}")
        return found

    def _walk(self) -> Iterator[Tensors]:
        count = 0
        source = iter(self._source)
        while (batch := self._next(source, count)) is not _END:
            self._any = True
            yield self._convert(batch, count)
            del batch  # before the next one is drawn
            count += 1
        if self._length not in (None, count):
            raise CalibrationError(
                "calibration data gave another number of batches than before",
                values={"before": self._length, "now": count},
                rule="they are read several times",
                fix="give the same batches each time, or a list",
            )
        self._length = count

    def _walk_kept(self, source: Iterator[Any]) -> Iterator[Tensors]:
        place = 0
        while place < len(self._kept) or self._keep_one_more(source):
            yield self._kept[place]
            place += 1

    def _keep_one_more(self, source: Iterator[Any]) -> bool:
        if self._failure is not None:
            raise self._failure
        try:
            batch = self._next(source, len(self._kept))
            if batch is _END:
                return False
            # A copy, because whoever makes the batches may make the next one in the same place.
            self._kept.append(tuple(tensor.clone() for tensor in self._convert(batch, len(self._kept))))
        except TrimtabError as error:
            self._failure = error  # the bad batch is gone, and must not be missing silently from the next walk
            raise
        self._any = True
        return True

    @staticmethod
    def _next(source: Iterator[Any], number: int) -> Any:
        try:
            return next(source, _END)
        except TrimtabError:
            raise
        except Exception as error:
            raise CalibrationError(
                "calibration data could not be made",
                values={"error": f"{type(error).__name__}: {error}"},
                rule="what the batches come from raised it",
                where=f"calibration batch {number}",
            ) from error


_END = object()


def _check_batch(graph: Graph, batch: Any, index: int) -> Tensors:
    import torch

    inputs = graph.inputs
    names = [value.name for value in inputs]
    where = f"calibration batch {index}"
    if isinstance(batch, Mapping):
        if set(batch) != set(names):
            raise CalibrationError(
                "a calibration batch has wrong input names",
                values={"missing": sorted(set(names) - set(batch)), "unknown": sorted(set(batch) - set(names))},
                fix=f"name the inputs {', '.join(names)}",
                where=where,
            )
        given = [batch[name] for name in names]
    else:
        given = list(batch) if isinstance(batch, tuple | list) else [batch]
    if len(given) != len(inputs):
        raise CalibrationError(
            "a calibration batch has a wrong number of inputs",
            values={"expected": ", ".join(names), "given": len(given)},
            where=where,
        )
    tensors = []
    for value, data in zip(inputs, given, strict=True):
        try:
            tensor = data.detach() if isinstance(data, torch.Tensor) else torch.as_tensor(data)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CalibrationError(
                "a calibration batch holds something that is not an array",
                values={"input": value.name, "given": type(data).__name__},
                rule=str(error).splitlines()[0] if str(error) else "",
                where=where,
            ) from error
        if tensor.dtype.is_floating_point and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise CalibrationError(
                "a calibration batch contains NaN or infinities",
                values={"input": value.name, "elements": f"{bad} of {tensor.numel()}"},
                rule="statistics of such data are meaningless",
                fix="look at how the batch was made",
                where=where,
            )
        tensors.append(tensor)
    try:
        bind_symbols(graph, tensors)
    except InputError as error:
        raise CalibrationError(
            f"a calibration batch does not fit the module: {error.what}",
            values=error.values,
            rule=error.rule,
            fix=error.fix,
            where=where,
        ) from error
    return tuple(tensors)
