"""What a pass is: a frozen dataclass with a name, a contract, options as fields, and ``run``.

::

    @dataclass(frozen=True)
    class MergeTokens(Pass):
        \"\"\"Merge the r most similar tokens after each attention.\"\"\"

        name: ClassVar[str] = "merge-tokens"
        contract: ClassVar[Contract] = Lossy()
        r: int = 13

        def run(self, module: Module, ctx: Context) -> Changed: ...

The fields are the command-line flags, the printed pipeline ``merge-tokens{r=13}`` and the search space.
"""

from __future__ import annotations

import math
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from trimtab.passes.contracts import Contract
from trimtab.passes.options import print_options

if TYPE_CHECKING:
    import torch

    from trimtab.ir import Module
    from trimtab.ir.rewrite import Rewrites

Changed: TypeAlias = bool
"""Whether a pass changed the module. The manager compares: a pass that says no and changed something is an error."""

Metric: TypeAlias = "Callable[[Module], float]"
"""A score of a module, higher is better: for example its accuracy on the user's data."""

Seconds: TypeAlias = "Callable[[Module], float]"
"""How long a call of a module takes."""


def _fresh_rewrites() -> Rewrites:
    from trimtab.ir.rewrite import Rewrites  # imports torch, which declaring passes does not

    return Rewrites()


@dataclass
class Context:
    """What a run of a pipeline offers its passes.

    Attributes:
        calibration: checked batches, each a tensor per input of the module in order; empty when the user gave none.
            They may be more than memory holds: walk them, and keep nothing that grows with their number.
        metric: the user's score of a module, or None.
        seed: seed of everything random in passes and samples.
        rewrites: the log of this application of the pass, and the gate that its rewrites go through.
        reference: the module before the first lossy pass of the pipeline, which shares its weights and is only read;
            None before that pass. A caller who has the original of a lossy module may give it.
        seconds: compiles a module for the target and times a call of it; None where nothing is compiled.
    """

    calibration: Sequence[tuple[torch.Tensor, ...]] = ()
    metric: Metric | None = None
    seed: int = 0
    rewrites: Rewrites = field(default_factory=_fresh_rewrites, repr=False)
    reference: Module | None = field(default=None, repr=False)
    seconds: Seconds | None = None
    _notes: list[str] = field(default_factory=list, repr=False)
    _records: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def note(self, text: str) -> None:
        """Put a remark in the running pass's row of the report."""
        self._notes.append(text)

    def take_notes(self) -> list[str]:
        """The remarks since the last call; the manager's side of :meth:`note`."""
        notes, self._notes = self._notes, []
        return notes

    def record(self, facts: Mapping[str, Any]) -> None:
        """Put what the running pass did to one layer in its row of the report.

        Args:
            facts: text, numbers and truth values by name, with the key ``layer``; a number that is not finite is none.
        """
        finite = {name: fact for name, fact in facts.items() if not isinstance(fact, float) or math.isfinite(fact)}
        self._records.append({name: finite.get(name) for name in facts})

    def take_records(self) -> list[dict[str, Any]]:
        """The records since the last call; the manager's side of :meth:`record`."""
        records, self._records = self._records, []
        return records

    def generator(self, purpose: str) -> torch.Generator:
        """A random generator of its own for ``purpose``, so that one pass does not change the numbers of another."""
        import torch

        # Of a seed torch's generator takes 32 bits.
        return torch.Generator().manual_seed(zlib.crc32(purpose.encode(), self.seed & 0xFFFFFFFF))


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes. Subclasses are frozen dataclasses; their fields are the options and have defaults.

    A pass edits the module it is given, which is a working copy: when it raises, or breaks its contract, the copy
    is thrown away.  It keeps no state between runs.
    """

    name: ClassVar[str]
    """What the pass is called in pipelines: lower case with dashes."""
    contract: ClassVar[Contract]
    """What the pass promises about results; checked by the manager."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """Properties that passes before this one must have established."""
    establishes: ClassVar[frozenset[str]] = frozenset()
    """Properties that hold after this pass."""
    breaks: ClassVar[frozenset[str]] = frozenset()
    """Properties that no longer hold after this pass."""
    grows_weights: ClassVar[bool] = False
    """Whether the pass may increase the module's unique weight bytes."""
    changes_signature: ClassVar[bool] = False
    """Whether the pass adds inputs and outputs. Results are then compared on what :meth:`inputs_after` gives, for the
    outputs that the module has before and after."""

    @abstractmethod
    def run(self, module: Module, ctx: Context) -> Changed:
        """Rewrite ``module`` in place and say whether anything changed.

        Raises:
            TrimtabError: the pass cannot do its work; whatever it raises is reported as the failure of this pass.
        """

    def inputs_after(self, before: Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Inputs of the module after the pass that stand for ``inputs`` of the module ``before``; a pass that
        declares ``changes_signature`` overrides it. Samples and calibration batches become these."""
        return inputs

    def __str__(self) -> str:
        return self.name + print_options(self)

    @classmethod
    def summary(cls) -> str:
        """The first sentence of the docstring, on one line."""
        paragraph = " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())
        return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]

    @classmethod
    def declaration(cls) -> dict[str, Any]:
        """Name, contract, properties and summary as plain data."""
        return {
            "name": cls.name,
            "contract": str(cls.contract),
            "requires": sorted(cls.requires),
            "establishes": sorted(cls.establishes),
            "breaks": sorted(cls.breaks),
            "grows_weights": cls.grows_weights,
            "summary": cls.summary(),
        }
