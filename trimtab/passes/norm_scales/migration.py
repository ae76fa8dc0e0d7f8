"""Scales and shifts collected for many links, and written into the weights at once.

A link whose value x becomes ``x / s - t`` leaves its readers with ``W s`` and ``b + W (s t)``, its norm with ``g / s``
and ``c / s - t``, or the layer that makes it with ``W / s`` and ``b / s`` in its rows.  A linear layer may read one
link and make another: all factors are gathered in float64 and every weight is rounded once, when its data is asked
for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.types import TensorType
from trimtab.ir.weights import ComputedSource, Weight
from trimtab.passes.norm_scales.links import Link, Norm, Reader

_KEPT_BYTES = 1 << 20
"""Smaller weights are kept once they are computed."""


class Migration:
    """Collects what moves, then rewrites.

    Args:
        module: where; it is read until :meth:`apply`.
        made_by: name of the pass, for the new ops.
    """

    def __init__(self, module: Module, made_by: str) -> None:
        self._module = module
        self._made_by = made_by
        self._inputs: dict[ops.Linear, torch.Tensor] = {}
        self._shifts: dict[ops.Linear, torch.Tensor] = {}
        self._outputs: dict[ops.Linear, torch.Tensor] = {}
        self._norms: dict[Norm, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def weight(self, reader: Reader) -> torch.Tensor:
        """The weight f64 ``[N, K]`` of a reader, with the factors that its rows and columns have so far."""
        data = _double(self._module.weights[reader.op.weight.weight])
        rows, columns = self._outputs.get(reader.op), self._inputs.get(reader.op)
        data = data if rows is None else data * rows[:, None]
        return data if columns is None else data * columns

    def divide(self, link: Link, scale: torch.Tensor, shift: torch.Tensor | None = None) -> None:
        """Let the value of ``link`` be ``x / scale - shift`` from now on.

        Args:
            link: its value; one that a norm makes can be divided once.
            scale: f64 ``[C]``, positive; the same for all channels that one output of the maker is.
            shift: f64 ``[C]``, for a layer norm only.
        """
        for reader in link.readers:
            self._inputs[reader.op] = self._inputs.get(reader.op, 1.0) * scale[reader.channels]
            if shift is not None:
                self._shifts[reader.op] = shift[reader.channels]
        if link.norm is not None:
            self._norms[link.norm] = (scale, shift)
        if link.maker is not None:
            outputs = link.maker.weight.type.shape[0]
            assert isinstance(outputs, int)  # the size of a weight
            rows = self._outputs.setdefault(link.maker, torch.ones(outputs, dtype=torch.float64))
            # Channels that are one output have one scale, so it does not matter whose is written last.
            factor = torch.ones_like(rows)
            factor[link.rows] = 1 / scale
            rows *= factor

    def apply(self) -> None:
        """Put the new ops and weights in the places of the old ones. Weights that nothing reads any more go."""
        graphs = {op: op.graph for op in (*self._norms, *self._inputs, *self._outputs)}
        for norm, (scale, shift) in self._norms.items():
            self._replace(norm, self._new_norm(norm, scale, shift))
        for op in dict.fromkeys((*self._inputs, *self._outputs)):
            assert graphs[op] is not None
            self._replace(op, self._new_linear(op))
        self._module.drop_unused_weights()

    def _replace(self, old: ops.Linear | Norm, new: ops.Linear | Norm) -> None:
        Builder(self._module, old.graph, made_by=self._made_by).replace(old, new)

    def _new_norm(self, norm: Norm, scale: torch.Tensor, shift: torch.Tensor | None) -> Norm:
        type = _vector(norm.result.type)
        gain = self._data(norm.weight)
        weight = self._add(norm, norm.weight, "weight", type, lambda: (1.0 if gain is None else gain()) / scale)
        if isinstance(norm, ops.RmsNorm):
            assert shift is None  # an RMS norm has nowhere to put it
            return ops.RmsNorm(norm.x, weight, axes=norm.axes, eps=norm.eps)
        bias, offset = norm.bias, self._data(norm.bias)
        if offset is not None or shift is not None:

            def moved() -> torch.Tensor:
                base = torch.zeros_like(scale) if offset is None else offset() / scale
                return base if shift is None else base - shift

            bias = self._add(norm, bias, "bias", type, moved)
        return ops.LayerNorm(norm.x, weight, bias, axes=norm.axes, eps=norm.eps)

    def _new_linear(self, op: ops.Linear) -> ops.Linear:
        old, offset = self._data(op.weight), self._data(op.bias)
        rows, columns, shift = self._outputs.get(op), self._inputs.get(op), self._shifts.get(op)
        assert old is not None

        def scaled() -> torch.Tensor:
            data = old() if rows is None else old() * rows[:, None]
            return data if columns is None else data * columns

        weight = self._add(op, op.weight, "weight", op.weight.type, scaled)
        bias = op.bias
        if shift is not None or (bias is not None and rows is not None):

            def moved() -> torch.Tensor:
                weights = scaled()
                base = weights.new_zeros(len(weights)) if offset is None else offset()
                base = base if rows is None else base * rows
                return base if shift is None else base + weights @ shift

            bias = self._add(op, bias, "bias", op.weight.type.with_shape(op.weight.type.shape[0]), moved)
        return ops.Linear(op.x, weight, bias)

    def _data(self, value: Value | None) -> Callable[[], torch.Tensor] | None:
        if value is None:
            return None
        weight = self._module.weights[value.weight]
        return lambda: _double(weight)

    def _add(
        self, op: ops.Linear | Norm, old: Value | None, part: str, type: TensorType, compute: Callable[[], torch.Tensor]
    ) -> Value:
        """A weight with the numbers of ``compute`` in the place of ``old``, which may not exist."""
        known = self._module.weights[old.weight] if old is not None else None
        like = op.weight if known is None and isinstance(op, ops.Linear) else None
        stem = known.id.split(".scaled")[0] + ".scaled" if known is not None else ""
        if like is not None:
            stem = f"{like.weight.split('.scaled')[0].removesuffix('.weight')}.{part}"
        trainable = known is not None and known.trainable
        dtype, size = type.dtype.to_torch(), type.bytes
        keep = isinstance(size, int) and size <= _KEPT_BYTES
        source = ComputedSource(lambda: compute().to(dtype), keep=keep)
        id = self._module.fresh_weight_id(stem or f"{op.result.name or op.name}.{part}")
        weight = self._module.add_weight(Weight(id, type, source, trainable=trainable))
        assert op.graph is not None
        return op.graph.weight(weight)


def _vector(type: TensorType) -> TensorType:
    """The type of one number a channel."""
    return type.with_shape(type.shape[-1])


def _double(weight: Weight) -> torch.Tensor:
    return weight.tensor().to(torch.float64)
