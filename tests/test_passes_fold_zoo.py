"""What is folded into the weights of whole models: as often as their architectures say."""

from __future__ import annotations

from collections import Counter

import pytest
from pass_harness import rewritten

from trimtab.frontend.torch_export import trace
from trimtab.ir import Module
from trimtab.ir.analysis import count_ops
from trimtab.passes.manager import PassManager
from trimtab.passes.report import PassRow
from zoo_models import ZooModel, get, vit_b

PASSES = "fold-conv-affine,raise-patch-embedding,fold-layer-scale,fold-scale,fold-norm-affine"

FOLDS = {"patch-embedding", "scaled-query", "scaled-result", "scaled-channels", "norm-affine", "batch-norm-after-layer"}
EXPECTED = {
    # Two blocks have two norms and one attention each; a last norm feeds the head.
    "vit": {"patch-embedding": 1, "scaled-query": 2, "norm-affine": 5},
    "beit": {"patch-embedding": 1, "scaled-query": 2, "norm-affine": 5, "scaled-channels": 4},
    # The model returns its last norm.
    "dinov2": {"patch-embedding": 1, "scaled-query": 2, "norm-affine": 4, "scaled-channels": 4},
    # The stem is a patch embedding, downsampling has patches of two pixels and a norm that it pads.
    "convnext": {"patch-embedding": 1, "scaled-channels": 2, "norm-affine": 4},
    "resnet": {"batch-norm-after-layer": 12},
    # The last norm of each transformer feeds a convolution of one pixel.
    "mobilevit": {"batch-norm-after-layer": 32, "scaled-query": 9, "norm-affine": 21},
    "segformer": {"patch-embedding": 1, "batch-norm-after-layer": 1, "scaled-query": 4, "norm-affine": 11},
    # The queries go through rotary embeddings. The last norm feeds the head, which in qwen2 is also the embedding.
    "llama": {"scaled-query": 2, "norm-affine": 5},
    "qwen2": {"scaled-query": 2, "norm-affine": 4},
    # Residuals start at the norms of BERT.
    "bert": {"scaled-query": 2},
    # The layers of ALBERT share their weights; the norm of the embeddings has a reader of its own.
    "albert": {"norm-affine": 1},
}


def raised(entry: ZooModel) -> Module:
    inputs = tuple(entry.inputs().values())
    module = trace(entry.build(), inputs, dynamic_shapes=entry.dynamic_shapes())
    return rewritten(module, "cleanup,raise")[0]


def applied(rows: list[PassRow]) -> Counter[str]:
    return +Counter({rule["rule"]: rule["applied"] for row in rows for rule in row.rules})


@pytest.mark.parametrize("name", EXPECTED)
def test_zoo(name: str) -> None:
    module = raised(get(name))
    result, rows = rewritten(module, PASSES)
    assert applied(rows) == EXPECTED[name]
    worst = max(row.drift.relative for row in rows if row.drift is not None)
    assert worst < 5e-7, "the contract has room"
    assert result.weight_bytes <= module.weight_bytes
    removed = count_ops(module) - count_ops(result)
    assert removed["batch_norm"] == EXPECTED[name].get("batch-norm-after-layer", 0)
    assert removed["mul"] == EXPECTED[name].get("scaled-channels", 0)
    plain = [op for op in result.walk() if op.name in ("layer_norm", "rms_norm") and op.weight is None]
    assert len(plain) == EXPECTED[name].get("norm-affine", 0)


def test_albert_says_that_its_weights_are_shared() -> None:
    module = raised(get("albert"))
    _, rows = rewritten(module, "fold-scale,fold-norm-affine")
    reasons = {reason for row in rows for rule in row.rules for reason in rule["rejected"]}
    assert any("q" in reason and reason.endswith("is shared by 2 readers") for reason in reasons)


def test_vit_b() -> None:
    """Twelve attentions, 25 norms of which each feeds linear layers only, and one patch embedding."""
    entry = vit_b()
    module = trace(entry.build(), tuple(entry.inputs().values()), dynamic_shapes=entry.dynamic_shapes())
    result, report = PassManager(f"cleanup,raise,{PASSES}", check="never").run(module)
    counts = {rule: count for rule, count in applied(report.rows).items() if rule in FOLDS}
    assert counts == {"patch-embedding": 1, "scaled-query": 12, "norm-affine": 25}
    assert count_ops(result)["conv2d"] == 0
    folds = [row for row in report.rows if row.name in PASSES.split(",")]
    assert folds[0].weight_bytes_before - folds[-1].weight_bytes_after == 25 * 2 * 768 * 4
