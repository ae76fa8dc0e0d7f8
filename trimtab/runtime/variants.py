"""The codes that an artifact carries: which of them suits this machine, and how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

from trimtab.cpu_features import (
    host_architecture,
    host_level,
    host_system,
    missing_features,
    processor_features,
    split_triple,
)
from trimtab.errors import ArtifactError
from trimtab.runtime.container import ArtifactReader
from trimtab.runtime.manifest import CodeVariant
from trimtab.runtime.profile import FunctionTime
from trimtab.runtime.signature import Array, Signature


class ModelCode(Protocol):
    """The code of a model with its weights, loaded for one session. Its calls must not overlap."""

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        """New output arrays for inputs that fit the signature. Errors of the code come out as they are."""
        ...

    def time_kernels(self, arrays: Sequence[Array], repeat: int) -> list[FunctionTime]:
        """The functions that a call runs, each with the least time it took in ``repeat`` calls; none if unknown."""
        ...

    def close(self) -> None:
        """Let go of weights and memory. Arrays returned by earlier calls stay valid."""
        ...


_LOADERS = {"tvm": "trimtab.runtime.tvm_code", "mlir": "trimtab.runtime.iree_code"}
"""For each backend whose code can run, the module whose ``load_code`` loads it."""

_PROCESSOR, _INTERPRETED = "local-task", "vmvx"  # the driver of processors; code for none, which it interprets


def select_variant(variants: Sequence[CodeVariant], source: str) -> CodeVariant:
    """The variant for this machine; of several, the first of those that need the most CPU features.

    Code for this machine's processor comes before code for a device beside it, whose driver is looked for at loading.

    Raises:
        ArtifactError: none fits: wrong architecture or operating system, missing CPU features, unknown backend.
    """
    architecture, system = host_architecture(), host_system()
    here = [v for v in variants if split_triple(v.target)[0] == architecture]
    here = [v for v in here if split_triple(v.target)[1] in (None, system)]
    here = here or [v for v in variants if v.driver not in ("", _PROCESSOR) or v.target == _INTERPRETED]
    if not here:
        raise ArtifactError(
            "the artifact has no code for this machine",
            values={
                "file": source,
                "built_for": ", ".join(variant.target for variant in variants),
                "machine": f"{architecture}-{system}",
            },
            rule="native code runs on the architecture and operating system it was built for only",
            fix=f"compile it for this target: trimtab compile {source} --target {architecture}-{system} -o model.trim",
        )
    runnable = [variant for variant in here if not missing_features(variant.features)]
    if not runnable:
        missing = missing_features(min(here, key=lambda v: len(missing_features(v.features))).features)
        level = host_level()
        rule = "running it would stop the process with an illegal instruction"
        if set(missing) <= (processor_features() or frozenset()):
            rule = "the processor has them, but the system does not let this process use them"
        raise ArtifactError(
            "the artifact needs CPU features that this machine does not have",
            values={"file": source, "missing": " ".join(missing), "machine_level": level or architecture},
            rule=rule,
            fix=f"compile it for this machine: trimtab compile {source} --target native -o model.trim",
        )
    known = [variant for variant in runnable if variant.backend in _LOADERS]
    if not known:
        raise ArtifactError(
            "the artifact's code is of a backend this runtime cannot run",
            values={"file": source, "backend": ", ".join(variant.backend for variant in runnable)},
            rule=f"this version runs code of the backends {', '.join(_LOADERS)}",
            fix=f"compile it with one of them: trimtab compile {source} --backend tvm -o model.trim",
        )
    return max(known, key=lambda variant: len(variant.features))


def load_code(
    reader: ArtifactReader, variant: CodeVariant, signature: Signature, threads: int, *, prefer_carried: bool = False
) -> ModelCode:
    """Load a variant, as :func:`select_variant` chose it.

    Args:
        reader: the artifact.
        variant: one of its variants.
        signature: of the model.
        threads: threads that a call computes with.
        prefer_carried: use a runtime library carried in the file even where it is installed.

    Raises:
        MissingDependencyError: a package or library of the runtime is missing.
        ArtifactError: the code does not load.
    """
    module = import_module(_LOADERS[variant.backend])
    code: ModelCode = module.load_code(reader, variant, signature, threads, prefer_carried=prefer_carried)
    return code


def variant_weights(reader: ArtifactReader, variant: CodeVariant) -> list[str]:
    """Names of the weights that a variant reads, in order."""
    if variant.weights is not None:
        return list(variant.weights)
    return [weight.name for weight in reader.manifest.weights]
