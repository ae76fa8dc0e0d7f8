"""The passes there are: Trimtab's own by name, and those of installed packages. None is imported before it is used.

A package registers a pass in its ``pyproject.toml``::

    [project.entry-points."trimtab.passes"]
    my-pass = "my_package.my_pass:MyPass"
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from trimtab.errors import PassError, UsageError
from trimtab.passes.base import Pass
from trimtab.passes.contracts import Close, Exact, Lossy
from trimtab.passes.options import did_you_mean

ENTRY_POINT_GROUP = "trimtab.passes"

_OWN: Mapping[str, str] = {
    "cast-precision": "trimtab.passes.cast_precision:CastPrecision",
    "channels-last": "trimtab.passes.channels_last:ChannelsLast",
    "cluster-tokens": "trimtab.passes.cluster_tokens:ClusterTokens",
    "compensate": "trimtab.passes.compensate:Compensate",
    "cse": "trimtab.passes.cse:Cse",
    "dce": "trimtab.passes.dce:Dce",
    "dedup-weights": "trimtab.passes.dedup_weights:DedupWeights",
    "drop-dead-heads": "trimtab.passes.drop_dead_heads:DropDeadHeads",
    "fold-constants": "trimtab.passes.fold_constants:FoldConstants",
    "fold-conv-affine": "trimtab.passes.fold_conv_affine:FoldConvAffine",
    "fold-layer-scale": "trimtab.passes.fold_layer_scale:FoldLayerScale",
    "fold-norm-affine": "trimtab.passes.fold_norm_affine:FoldNormAffine",
    "fold-scale": "trimtab.passes.fold_scale:FoldScale",
    "gate-tokens": "trimtab.passes.gate_tokens:GateTokens",
    "group-fusions": "trimtab.passes.group_fusions:GroupFusions",
    "integer-only": "trimtab.passes.integer_only:IntegerOnly",
    "merge-adapters": "trimtab.passes.merge_adapters:MergeAdapters",
    "merge-tokens": "trimtab.passes.merge_tokens:MergeTokens",
    "merge-tokens-spectral": "trimtab.passes.merge_tokens_spectral:MergeTokensSpectral",
    "pack-linears": "trimtab.passes.pack_linears:PackLinears",
    "palettize": "trimtab.passes.palettize:Palettize",
    "prune-tokens": "trimtab.passes.prune_tokens:PruneTokens",
    "prune-scan-tokens": "trimtab.passes.prune_scan_tokens:PruneScanTokens",
    "push-slices": "trimtab.passes.push_slices:PushSlices",
    "quantize": "trimtab.passes.quantize:Quantize",
    "quantize-attention": "trimtab.passes.quantize_attention:QuantizeAttention",
    "quantize-weights": "trimtab.passes.quantize_weights:QuantizeWeights",
    "raise-activations": "trimtab.passes.raise_activations:RaiseActivations",
    "raise-attention": "trimtab.passes.raise_attention:RaiseAttention",
    "raise-gelu": "trimtab.passes.raise_gelu:RaiseGelu",
    "raise-group-norm": "trimtab.passes.raise_group_norm:RaiseGroupNorm",
    "raise-layer-norm": "trimtab.passes.raise_layer_norm:RaiseLayerNorm",
    "raise-linear": "trimtab.passes.raise_linear:RaiseLinear",
    "raise-patch-embedding": "trimtab.passes.raise_patch_embedding:RaisePatchEmbedding",
    "raise-quantized": "trimtab.passes.raise_quantized:RaiseQuantized",
    "raise-rms-norm": "trimtab.passes.raise_rms_norm:RaiseRmsNorm",
    "raise-rotary": "trimtab.passes.raise_rotary:RaiseRotary",
    "raise-silu": "trimtab.passes.raise_silu:RaiseSilu",
    "reassociate-matmuls": "trimtab.passes.reassociate_matmuls:ReassociateMatmuls",
    "remove-repeat-kv": "trimtab.passes.remove_repeat_kv:RemoveRepeatKv",
    "reparameterize-scales": "trimtab.passes.reparameterize_scales:ReparameterizeScales",
    "reuse-tokens": "trimtab.passes.reuse_tokens:ReuseTokens",
    "sample-tokens": "trimtab.passes.sample_tokens:SampleTokens",
    "simplify-expands": "trimtab.passes.simplify_expands:SimplifyExpands",
    "simplify-identities": "trimtab.passes.simplify_identities:SimplifyIdentities",
    "simplify-indexing": "trimtab.passes.simplify_indexing:SimplifyIndexing",
    "simplify-masks": "trimtab.passes.simplify_masks:SimplifyMasks",
    "simplify-permutes": "trimtab.passes.simplify_permutes:SimplifyPermutes",
    "simplify-reshapes": "trimtab.passes.simplify_reshapes:SimplifyReshapes",
    "sink-permutes": "trimtab.passes.sink_permutes:SinkPermutes",
    "slim-tokens": "trimtab.passes.slim_tokens:SlimTokens",
    "smooth": "trimtab.passes.smooth:Smooth",
    "softmax1": "trimtab.passes.softmax1:Softmax1",
    "unmerge-batch-axes": "trimtab.passes.unmerge_batch_axes:UnmergeBatchAxes",
}


def pass_names() -> set[str]:
    """Names of all passes, own and installed. Imports none of them."""
    return set(_OWN) | set(_installed())


def provider(name: str) -> str:
    """The package that provides the pass ``name``."""
    return "trimtab" if name in _OWN else _package(_installed()[name][0])


def load_pass(name: str) -> type[Pass]:
    """The class of the pass called ``name``.

    Raises:
        UsageError: there is none.
        PassError: the package that provides it is broken; the message names the package.
    """
    installed = _installed().get(name, [])
    if (name in _OWN and installed) or len(installed) > 1:
        packages = [*(["trimtab"] if name in _OWN else []), *map(_package, installed)]
        raise PassError(
            f"two packages provide a pass {name}",
            values={"packages": ", ".join(packages)},
            rule="a pass has one name and a name one pass",
            fix=f"uninstall one of them, or rename its entry point in the group {ENTRY_POINT_GROUP}",
        )
    if name in _OWN:
        module, _, attribute = _OWN[name].partition(":")
        found: type[Pass] = getattr(importlib.import_module(module), attribute)
        return found
    if not installed:
        raise UsageError(f"there is no pass {name}", fix=did_you_mean(name, pass_names()))
    entry = installed[0]
    try:
        loaded = entry.load()
    except Exception as error:  # whatever a third party's module raises while it is imported
        raise PassError(
            f"the package {_package(entry)} provides the pass {name} but cannot be loaded",
            values={"entry point": entry.value, "error": f"{type(error).__name__}: {error}"},
            fix=f"repair or uninstall {_package(entry)}; the other passes work without it",
        ) from error
    check_declaration(loaded, f"the entry point {entry.value} of the package {_package(entry)}")
    if loaded.name != name:
        raise PassError(
            f"the package {_package(entry)} registers a pass under another name than its own",
            values={"entry point": name, "name": loaded.name},
            fix="make the two the same",
        )
    return loaded  # type: ignore[no-any-return]


def check_declaration(cls: Any, source: str) -> None:
    """Check that ``cls`` is declared as a pass is.

    Raises:
        PassError: it is not a subclass of Pass, not a frozen dataclass, or lacks a name or contract.
    """
    problem = ""
    if not (inspect.isclass(cls) and issubclass(cls, Pass)):
        problem = "a pass is a subclass of trimtab.passes.Pass"
    elif inspect.isabstract(cls):
        problem = "a pass has a method run(self, module, ctx)"
    elif "__dataclass_params__" not in vars(cls) or not vars(cls)["__dataclass_params__"].frozen:
        problem = "a pass is decorated with @dataclass(frozen=True), so that its fields are its options"
    elif not isinstance(getattr(cls, "name", None), str) or not cls.name:
        problem = 'a pass has a name: `name: ClassVar[str] = "my-pass"`'
    elif not isinstance(getattr(cls, "contract", None), Exact | Close | Lossy):
        problem = "a pass has a contract: `contract: ClassVar[Contract] = Exact()`, Close(...) or Lossy()"
    if problem:
        raise PassError(f"{source} is not declared as a pass", values={"class": repr(cls)}, rule=problem)


@cache
def _installed() -> Mapping[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(entry.name, []).append(entry)
    return found


def forget_installed() -> None:
    """Look at the installed packages again at the next question."""
    _installed.cache_clear()


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value.split(".")[0].split(":")[0]
