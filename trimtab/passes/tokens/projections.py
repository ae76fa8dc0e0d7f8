"""The projections to queries and keys of a layer, as matrices, found by structure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from trimtab.ir import ops
from trimtab.ir.builder import Builder
from trimtab.ir.core import Module, Value
from trimtab.ir.interpreter import interpret
from trimtab.ir.op import Op
from trimtab.passes.samples import smallest_sizes
from trimtab.passes.tokens.stream import Layer

if TYPE_CHECKING:
    import torch

_ARRANGING = (ops.Reshape, ops.Permute, ops.Slice, ops.Split, ops.Select)
NORM_EPS = 1e-5
_LARGEST_PRODUCT = 2.0
"""What products of queries and keys are typically at most: a sigmoid of much more is 1 for all tokens alike, and has
no gradient."""


@dataclass(frozen=True)
class Projections:
    """Maps of tokens of C channels to queries and keys of H heads of D channels; products of these have no scale.

    Attributes:
        query, key: ``[H, D, C]``, float32.
        query_bias, key_bias: ``[H, D]``; None for zeros.
        norm: what tokens go through before, without scale and shift.
        eps: of the norm.
    """

    query: torch.Tensor
    key: torch.Tensor
    query_bias: torch.Tensor | None
    key_bias: torch.Tensor | None
    norm: Literal["", "layer", "rms"]
    eps: float

    def tempered(self) -> Projections:
        """The same, scaled down until the products of normalised tokens are typically 2 or less.

        For tokens of independent elements of mean 0 and variance 1, the mean square of ``(Q x + p) . (K y + k)`` is
        ``|K^T Q|^2 + |Q^T k|^2 + |K^T p|^2 + (p . k)^2``; it is averaged over heads, which keep their proportions.
        """
        import torch

        def with_bias(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            column = torch.zeros_like(weight[:, :, :1]) if bias is None else bias[:, :, None]
            return torch.cat((weight, column), 2)

        products = with_bias(self.query, self.query_bias).mT @ with_bias(self.key, self.key_bias)
        typical = float(products.square().sum((1, 2)).mean().sqrt())
        factor = (_LARGEST_PRODUCT / max(typical, _LARGEST_PRODUCT)) ** 0.5
        query_bias, key_bias = (None if b is None else b * factor for b in (self.query_bias, self.key_bias))
        return replace(self, query=self.query * factor, key=self.key * factor, query_bias=query_bias, key_bias=key_bias)


@dataclass(frozen=True)
class _Path:
    """From a linear layer's result to the queries or keys, and what the layer reads."""

    linear: ops.Linear
    arranging: tuple[Op, ...]
    norm: ops.LayerNorm | ops.RmsNorm | None


def layer_projections(module: Module, layer: Layer) -> Projections | None:
    """What the layer projects its residual to, with the scale of its attention shared out and the norm's own scale and
    shift folded in; None where that is not a linear layer on the residual or its norm.

    Args:
        module: that holds the weights.
        layer: one whose ops are still in the graph.
    """
    paths = _path(layer.q, layer.residual), _path(layer.k, layer.residual)
    if paths[0] is None or paths[1] is None or paths[0].norm is not paths[1].norm or layer.attention.scale <= 0:
        return None
    found = [_matrix(module, path, value) for path, value in zip(paths, (layer.q, layer.k), strict=True) if path]
    (query, query_bias), (key, key_bias) = ((w * layer.attention.scale**0.5, b) for w, b in found)
    groups = len(query) // len(key)
    biases = [None if b is None else b * layer.attention.scale**0.5 for b in (query_bias, key_bias)]
    norm = paths[0].norm
    return Projections(
        query,
        key.repeat_interleave(groups, 0),
        biases[0],
        biases[1] if biases[1] is None else biases[1].repeat_interleave(groups, 0),
        "" if norm is None else "layer" if isinstance(norm, ops.LayerNorm) else "rms",
        NORM_EPS if norm is None else norm.eps,
    )


def identity_projections(layer: Layer) -> Projections:
    """Queries and keys that are the normalised tokens themselves, cut into heads: their products are like cosines."""
    import torch

    channels = int(layer.residual.type.shape[2])  # type: ignore[arg-type]  # checked to be a number
    heads = int(layer.q.type.shape[1])  # type: ignore[arg-type]
    heads = heads if channels % heads == 0 else 1
    width = channels // heads
    cut = (torch.eye(channels) * width**-0.25).reshape(heads, width, channels)
    return Projections(cut, cut.clone(), None, None, "layer", NORM_EPS)


def _path(value: Value, residual: Value) -> _Path | None:
    passed: list[Op] = []
    op = value.producer
    while isinstance(op, _ARRANGING) or (isinstance(op, ops.Mul) and _factor(op) is not None):
        passed.append(op)
        op = op.operands[_data(op)].producer
    if not isinstance(op, ops.Linear) or not op.weight.is_weight or (op.bias is not None and not op.bias.is_weight):
        return None
    if op.x is residual:
        return _Path(op, tuple(reversed(passed)), None)
    norm = op.x.producer
    if not isinstance(norm, ops.LayerNorm | ops.RmsNorm) or norm.x is not residual or norm.axes != 1:
        return None
    constant = all(weight.is_weight for weight in norm.operands[1:])
    return _Path(op, tuple(reversed(passed)), norm) if constant else None


def _factor(op: ops.Mul) -> int | None:
    """Which operand of ``op`` is a scalar constant."""
    for index, operand in enumerate(op.operands):
        if operand.type.rank == 0 and isinstance(operand.producer, ops.Full):
            return index
    return None


def _data(op: Op) -> int:
    """Which operand of an op of a path comes from the linear layer."""
    return 1 - (_factor(op) or 0) if isinstance(op, ops.Mul) else 0


def _matrix(module: Module, path: _Path, value: Value) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight ``[H, D, C]`` and bias ``[H, D]``: the layer's rows, taken the way that its results go."""
    import torch

    def data(weight: Value) -> torch.Tensor:
        return module.weights[str(weight.weight)].tensor().double()

    weight = data(path.linear.weight)
    bias = data(path.linear.bias) if path.linear.bias is not None else None
    norm = path.norm
    if isinstance(norm, ops.LayerNorm) and norm.bias is not None:
        bias = weight @ data(norm.bias) + (0 if bias is None else bias)
    if norm is not None and norm.weight is not None:
        weight = weight * data(norm.weight)
    rows = weight.T if bias is None else torch.cat((weight.T, bias[None]))
    taken = _arranged(path, value, rows).float()
    return taken[:, :, : weight.shape[1]], None if bias is None else taken[:, :, -1]


def _arranged(path: _Path, value: Value, rows: torch.Tensor) -> torch.Tensor:
    """``rows`` ``[R, O]`` as if they were tokens that the linear layer gave: ``[H, D, R]``."""
    import torch

    build = Builder()
    there = {path.linear.result: build.input("rows", path.linear.result.type)}
    for op in path.arranging:
        operands = [
            there[operand] if operand in there else build(operand.producer.clone())  # type: ignore[union-attr]
            for operand in op.operands
        ]
        clone = build.add(op.clone(operands))
        there.update(zip(op.results, clone.results, strict=True))
    build.output(there[value])
    batch, tokens, channels = path.linear.result.type.bind(smallest_sizes(build.module.main)).shape
    pieces = []
    for piece in rows.split(int(tokens)):  # type: ignore[arg-type]  # sizes are bound
        full = torch.zeros(batch, tokens, channels, dtype=torch.float64)  # type: ignore[arg-type]
        full[:, : len(piece)] = piece
        (result,) = interpret(build.module, [full.to(path.linear.result.type.dtype.to_torch())])
        pieces.append(result[0, :, : len(piece)])
    return torch.cat(pieces, 1).permute(0, 2, 1)
