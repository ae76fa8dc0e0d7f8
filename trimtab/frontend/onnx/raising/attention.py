"""Softmax attention from its matrix products.

Recognised: ``softmax(scale * q k^T [+ mask]) v``, the scale before or after the product, on one side or both, as a
multiplication or a division, and torch's guard that turns the NaN of a row without keys into zeros.  An additive mask
stays additive: a mask of large negative numbers and one of minus infinity differ where every key is masked.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.frontend.onnx.raising.matching import READ_LIMIT, Site, either_way, produced_by, read_once
from trimtab.ir.core import Value
from trimtab.ir.dtypes import DType
from trimtab.ir.ops import Add, Attention, Div, Expand, Full, IsNan, Matmul, Mul, Permute, Reshape, Softmax, Where


@dataclass(frozen=True)
class _Scaled:
    """``value`` times ``factor``."""

    value: Value
    factor: float


def raise_attention(op: Matmul, site: Site) -> Value | None:
    probabilities, v = op.x, op.y
    softmax = _softmax(probabilities, site)
    if softmax is None or softmax.dim != softmax.x.type.rank - 1:
        return None
    scores, mask = _split_mask(softmax.x)
    if scores is None:
        return None
    scaled = _unscaled(scores, site)
    product = produced_by(scaled.value, Matmul)
    if product is None or not read_once(product.result):
        return None
    left, right = _unscaled(product.x, site), _unscaled(product.y, site)
    q, transposed = left.value, _transposed_axes(right.value)
    if transposed is None:
        return None
    if q.type.rank < 3 or q.type.rank != right.value.type.rank or v.type.rank != q.type.rank:
        return None
    heads = q.type.shape[:-2]
    if right.value.type.shape[:-2] != heads or v.type.shape[:-2] != heads:
        return None
    if q.type.dtype is not v.type.dtype or (mask is not None and mask.type.dtype is not q.type.dtype):
        return None
    source, order = transposed
    key = source if order == tuple(range(len(order))) else site.insert(Permute(source, dims=order))
    key_scale = _unscaled(key, site)
    if key_scale.factor != 1.0 and key_scale.value.type == key.type:
        key = key_scale.value
    else:
        key_scale = _Scaled(key, 1.0)
    if mask is not None and adds_nothing(mask, site):
        mask = None
    scale = scaled.factor * left.factor * right.factor * key_scale.factor
    return site.insert(Attention(q, key, v, mask, scale=scale))


def _softmax(value: Value, site: Site) -> Softmax | None:
    """The softmax that ``value`` is, also behind ``where(isnan(p), 0, p)``; nothing else may read it."""
    softmax = produced_by(value, Softmax)
    if softmax is not None:
        return softmax if read_once(value) else None
    guard = produced_by(value, Where)
    if guard is None or not read_once(value) or site.scalar(guard.x) != 0.0:
        return None
    test, softmax = produced_by(guard.condition, IsNan), produced_by(guard.y, Softmax)
    if test is None or softmax is None or test.x is not guard.y or not read_once(guard.condition):
        return None
    return softmax if len(guard.y.uses) == 2 and not guard.y.is_output else None


def _split_mask(value: Value) -> tuple[Value | None, Value | None]:
    """The scores and what is added to them; the scores are a product of matrices, perhaps scaled."""
    if not read_once(value):
        return None, None
    addition = produced_by(value, Add)
    if addition is None:
        return value, None
    for scores, mask in either_way(addition):
        if scores.type == value.type and read_once(scores) and _is_product(scores):
            return scores, mask
    return None, None


def _is_product(value: Value) -> bool:
    for _ in range(4):
        op = value.producer
        if isinstance(op, Matmul):
            return True
        if not isinstance(op, Mul | Div):
            return False
        value = op.x if op.x.type == value.type else op.y
    return False


def _unscaled(value: Value, site: Site) -> _Scaled:
    """``value`` with multiplications by constants taken off."""
    factor = 1.0
    while True:
        product, quotient = produced_by(value, Mul), produced_by(value, Div)
        if product is not None:
            pairs = [(x, site.scalar(c)) for x, c in either_way(product) if x.type == value.type]
            found = next(((x, c) for x, c in pairs if c is not None), None)
            if found is None:
                return _Scaled(value, factor)
            value, factor = found[0], factor * found[1]
        elif quotient is not None and quotient.x.type == value.type and (divisor := site.scalar(quotient.y)):
            value, factor = quotient.x, factor / divisor
        else:
            return _Scaled(value, factor)


def _transposed_axes(value: Value) -> tuple[Value, tuple[int, ...]] | None:
    """A value and an order of its axes that give the matrix transpose of ``value`` (last two axes exchanged)."""
    rank = value.type.rank
    permute = produced_by(value, Permute)
    if permute is not None:
        order = permute.dims
        return permute.x, (*order[:-2], order[-1], order[-2])
    # torch's exporter flattens the leading axes, transposes, and restores them.
    restored = produced_by(value, Reshape)
    inner = produced_by(restored.x, Permute) if restored is not None else None
    if inner is not None and inner.dims == (0, 2, 1):
        flattened = produced_by(inner.x, Reshape)
        own = flattened.x if flattened is not None else inner.x
        shape = value.type.shape
        if own.type.rank == rank and own.type.shape == (*shape[:-2], shape[-1], shape[-2]):
            return own, tuple(range(rank))
    return None


def adds_nothing(mask: Value, site: Site) -> bool:
    """Whether an additive mask is zero everywhere."""
    chosen = produced_by(mask, Where)
    if chosen is not None:
        return site.scalar(chosen.x) == 0.0 and all_true(chosen.condition, site)
    full = produced_by(mask, Full)
    if full is not None:
        return full.value == 0
    moved = produced_by(mask, Expand) or produced_by(mask, Reshape)
    return moved is not None and adds_nothing(moved.x, site)


def all_true(value: Value, site: Site) -> bool:
    """Whether a bool value is known to hold everywhere."""
    full = produced_by(value, Full)
    if full is not None:
        return bool(full.value)
    moved = produced_by(value, Expand) or produced_by(value, Reshape)
    if moved is not None:
        return all_true(moved.x, site)
    if value.is_weight and value.type.dtype is DType.BOOL:
        size = value.type.elements
        return isinstance(size, int) and size <= READ_LIMIT and bool(site.module.weights[value.weight].tensor().all())
    return False
