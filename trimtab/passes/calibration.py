"""The user's calibration batches: checked against the module's signature before any pass sees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from trimtab.errors import CalibrationError, InputError
from trimtab.ir.core import Module
from trimtab.ir.interpreter import bind_symbols

if TYPE_CHECKING:
    import torch

Batch: TypeAlias = "Sequence[Any] | Mapping[str, Any]"
"""An array or tensor per input of the module, in order or by name; a single array for a module with one input."""


def check_calibration(module: Module, batches: Iterable[Any]) -> tuple[tuple[torch.Tensor, ...], ...]:
    """The batches as tensors in the order of the module's inputs. Data is shared with the caller, not copied.

    Raises:
        CalibrationError: there is no batch, or one has wrong names, dtypes or shapes, or contains NaN or infinities;
            the message names the batch and the input.
    """
    checked = tuple(_check_batch(module, batch, index) for index, batch in enumerate(batches))
    if not checked:
        raise CalibrationError("there is no calibration batch", fix="give at least one, or calibration=None")
    return checked


def _check_batch(module: Module, batch: Any, index: int) -> tuple[torch.Tensor, ...]:
    import torch

    inputs = module.main.inputs
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
        bind_symbols(module.main, tensors)
    except InputError as error:
        raise CalibrationError(
            f"a calibration batch does not fit the module: {error.what}",
            values=error.values,
            rule=error.rule,
            fix=error.fix,
            where=where,
        ) from error
    return tuple(tensors)
