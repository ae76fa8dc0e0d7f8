"""Matrix products with a weight, and additions of a bias, to linear layers."""

from __future__ import annotations

from trimtab.frontend.onnx.raising.matching import Site, either_way, produced_by, read_once
from trimtab.ir.core import Graph, Value
from trimtab.ir.ops import Add, Linear, Matmul, Permute
from trimtab.ir.weights import ComputedSource, Weight


def raise_matmul(op: Matmul, site: Site) -> Value | None:
    """``x @ W^T`` and ``x @ W`` with a weight W.

    In the second form a transposed weight takes W's place in the table, lazily. That is done only when every reader of
    W multiplies by it in this way, so that the bytes of the weights do not grow.
    """
    if op.x.type.rank < 2 or op.y.type.rank != 2:
        return None
    turned = produced_by(op.y, Permute)
    if turned is not None and turned.x.is_weight:
        return site.insert(Linear(op.x, turned.x))
    if not op.y.is_weight or not all(_multiplies(use.user, use.index, op.y) for use in op.y.uses):
        return None
    transposed = _transposed(site, op.y)
    assert op.graph is not None
    return site.insert(Linear(op.x, op.graph.weight(transposed)))


def _multiplies(user: object, index: int, weight: Value) -> bool:
    if isinstance(user, Graph):
        return False
    return isinstance(user, Matmul) and index == 1 and user.x.type.rank >= 2 and not user.x.is_weight


def _transposed(site: Site, value: Value) -> Weight:
    """The weight that holds the transpose of ``value``; made at the first call."""
    weights = site.module.weights
    id = f"{value.weight}.T"
    found = weights.get(id)
    if found is not None:
        return found
    original = weights[value.weight]
    rows, columns = original.type.shape
    source = ComputedSource(lambda: original.tensor().t())
    return site.module.add_weight(
        Weight(id, original.type.with_shape(columns, rows), source, trainable=original.trainable)
    )


def raise_bias(op: Add, site: Site) -> Value | None:
    """``linear(x) + b`` with a weight b of one element per output"""
    for product, bias in either_way(op):
        linear = produced_by(product, Linear)
        if linear is None or linear.bias is not None or not read_once(product):
            continue
        if bias.is_weight and bias.type.shape == linear.weight.type.shape[:1] and bias.type.dtype is product.type.dtype:
            return site.insert(Linear(linear.x, linear.weight, bias))
    return None
