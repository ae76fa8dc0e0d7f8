"""What decides whether a module is right: a tolerance against a reference, or a function of the user."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from trimtab.errors import InputError, TrimtabError, UsageError
from trimtab.ir.core import Module
from trimtab.ir.dtypes import DType
from trimtab.ir.interpreter import bind_symbols, input_tensors
from trimtab.passes.base import Context
from trimtab.passes.calibration import check_calibration
from trimtab.passes.contract_check import MAC_LIMIT
from trimtab.passes.contracts import Close, Contract, Drift, Exact, Lossy, contract_text, parse_contract
from trimtab.passes.determinism import is_deterministic
from trimtab.passes.evaluation import evaluate, output_drifts, suits
from trimtab.passes.samples import Sample, count_macs, generate_samples, sizes_of
from trimtab.user_file import load_function, one_line

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Verdict:
    """What a check says about a module.

    Attributes:
        kind: "" when the module passes; else ``drift`` (results moved too far), ``evaluation`` (it can no longer be
            evaluated), ``check`` (the user's function says no), ``error`` (the pass raised) or ``verification`` (the
            pass left a module that breaks a rule of the IR).
        reason: what is wrong, in words.
        drift: how far the results moved, when that was measured.
        sample: the inputs on which it shows, when it was evaluated.
        detail: what tells failures of one kind apart, such as the type of an exception.
    """

    kind: str = ""
    reason: str = ""
    drift: Drift | None = None
    sample: Sample | None = None
    detail: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.kind)

    def is_like(self, other: Verdict) -> bool:
        """Whether both fail in the same way."""
        return self.failed and (self.kind, self.detail) == (other.kind, other.detail)

    def __str__(self) -> str:
        if self.failed:
            return f"fails: {self.reason}"
        return "passes" + (f", drift {self.drift}" if self.drift is not None else "")

    def to_dict(self) -> dict[str, Any]:
        return {
            "passes": not self.failed,
            "kind": self.kind,
            "reason": self.reason,
            "drift": self.drift.to_dict() if self.drift is not None else None,
            "sample": self.sample.name if self.sample is not None else None,
        }


Judge: TypeAlias = Callable[[Module], Verdict]
"""A check that knows what to compare with."""
Batch: TypeAlias = "Mapping[str, torch.Tensor]"


@dataclass(frozen=True)
class Data:
    """The tensors that passes and checks see.

    Attributes:
        inputs: what to check on, a tensor per input by name; empty for the calibration batches, or, without those,
            samples made from the signature.
        calibration: batches for passes that need data.
        seed: seed of everything random.
    """

    inputs: tuple[Batch, ...] = ()
    calibration: tuple[Batch, ...] = ()
    seed: int = 0

    @staticmethod
    def of(
        module: Module, inputs: Iterable[Any] | None = None, calibration: Iterable[Any] | None = None, seed: int = 0
    ) -> Data:
        """The user's arrays, checked against the signature of ``module``.

        Raises:
            InputError, CalibrationError: they do not fit.
        """
        names = [value.name for value in module.main.inputs]
        batches = check_calibration(module, calibration) if calibration is not None else ()
        return Data(
            tuple(_checked_inputs(module, given) for given in inputs or ()),
            tuple(dict(zip(names, batch, strict=True)) for batch in batches),
            seed,
        )

    def samples(self, module: Module) -> list[Sample]:
        """Inputs for ``module``: the given ones where it still has the inputs they were given for."""
        named = {f"input {i}": batch for i, batch in enumerate(self.inputs)}
        named = named or {f"calibration batch {i}": batch for i, batch in enumerate(self.calibration)}
        fitting = [(name, fit) for name, batch in named.items() if (fit := _fit(module, batch)) is not None]
        if fitting:
            return [Sample(name, fit, count_macs(module, sizes_of(module.main, fit))) for name, fit in fitting]
        return generate_samples(module, Context(seed=self.seed), MAC_LIMIT)

    def context(self, module: Module) -> Context:
        """A context for one application of a pass to ``module``."""
        batches = tuple(fit for batch in self.calibration if (fit := _fit(module, batch)) is not None)
        if self.calibration and not batches:
            batches = tuple(sample.inputs for sample in self.samples(module) if not sample.special)
        return Context(calibration=batches, seed=self.seed)


class Check(ABC):
    """Decides whether a module is right. ``text`` is the check as ``--check`` takes it."""

    text: str

    @abstractmethod
    def against(self, reference: Module, data: Data) -> Judge:
        """The check for what passes make of ``reference``.

        Raises:
            UsageError: ``reference`` itself fails, or cannot be used to compare with.
        """

    @staticmethod
    def of(given: str | Contract | Callable[[Module], Any] | Check) -> Check:
        """The check that a user wrote: a contract or its text, a function, or ``file.py:function``.

        Raises:
            UsageError: it is none of them, or the file does not run.
        """
        if isinstance(given, Check):
            return given
        if isinstance(given, Exact | Close | Lossy):
            return KeepsContract(given)
        if callable(given):
            return UserFunction(given, _source_of(given))
        file, colon, function = given.rpartition(":")
        if colon and file.endswith(".py"):
            loaded = load_function(Path(file), function, role="check", error=UsageError)
            return UserFunction(loaded, f"{Path(file).absolute()}:{function}")
        return KeepsContract(parse_contract(given))


@dataclass(frozen=True)
class KeepsContract(Check):
    """The results differ from the reference's by no more than a contract allows. NaN equals NaN."""

    contract: Contract

    @property
    def text(self) -> str:  # type: ignore[override]
        return contract_text(self.contract)

    def against(self, reference: Module, data: Data) -> Judge:
        random = next((op.name for op in reference.walk() if not is_deterministic(op)), None)
        if random is not None and not isinstance(self.contract, Lossy):
            raise UsageError(
                "results cannot be compared",
                values={"op": random},
                rule="the model draws random numbers",
                fix="write a check of your own: --check check.py:function",
            )
        samples = [sample for sample in data.samples(reference) if suits(self.contract, sample)]
        expected: list[tuple[Sample, str, tuple[torch.Tensor, ...]]] = []
        refused: TrimtabError | None = None
        for sample in samples:
            for precision in self.contract.precisions:
                try:
                    expected.append((sample, precision, evaluate(reference, sample, precision)))
                except TrimtabError as error:
                    refused = error
                    break
        if not expected:
            raise UsageError(
                f"the model cannot be evaluated before any pass{f': {refused.what}' if refused else ''}",
                values=refused.values if refused else {},
                rule=refused.rule if refused else "",
                fix="give inputs that it accepts: --inputs x.npz",
                where=refused.where if refused else "",
            )
        names = reference.main.output_names

        def judge(module: Module) -> Verdict:
            worst: tuple[Drift, Sample] | None = None
            for sample, precision, before in expected:
                try:
                    after = evaluate(module, sample, precision)
                except TrimtabError as error:
                    reason = f"the module can no longer be evaluated: {error.what}; {error.rule}".removesuffix("; ")
                    return Verdict("evaluation", reason, sample=sample, detail=error.what)
                for drift in output_drifts(names, before, after, sample, precision):
                    if worst is None or self._severity(drift) > self._severity(worst[0]):
                        worst = (drift, sample)
            if worst is None:
                return Verdict()
            drift, sample = worst
            if self.contract.holds(drift):
                return Verdict(drift=drift, sample=sample)
            return Verdict("drift", f"drift is {drift} at {drift.where}", drift, sample)

        return judge

    def _severity(self, drift: Drift) -> tuple[bool, float, float, int]:
        return (not self.contract.holds(drift), drift.relative, drift.absolute, drift.differing)

    def loosest_that_sees(self, drift: Drift) -> KeepsContract:
        """A check with a tolerance of half of ``drift``."""
        relative = drift.relative if math.isfinite(drift.relative) else 1.0
        return KeepsContract(Close(rtol=relative / 2, atol=0.0))


@dataclass(frozen=True)
class UserFunction(Check):
    """A function of the user that takes a module.

    It passes the module by returning True or nothing, and fails it by returning False or a text with the reason, or
    by raising.
    """

    function: Callable[[Module], Any]
    text: str

    def against(self, reference: Module, data: Data) -> Judge:
        verdict = self._judge(reference)
        if verdict.failed:
            raise UsageError(
                "the model fails the check before any pass",
                values={"check": self.text, "reason": verdict.reason},
                rule="no pass can be at fault",
                fix="correct the check or the model",
            )
        return self._judge

    def _judge(self, module: Module) -> Verdict:
        try:
            said = self.function(module.copy())
        except Exception as error:  # a failed assertion is the usual way to say no; the rest is reported as it is
            return Verdict("check", one_line(error), detail=type(error).__name__)
        if isinstance(said, str):
            return Verdict("check", said) if said else Verdict()
        if said is None or _truth(said) is True:
            return Verdict()
        if _truth(said) is False:
            return Verdict("check", f"{self.text} returned False")
        raise UsageError(
            "a check returned something that is no verdict",
            values={"check": self.text, "returned": type(said).__name__},
            rule="it returns True or False, nothing, or a text with what is wrong, or raises",
        )


def _truth(said: Any) -> bool | None:
    """The truth value of a bool, or of an array of one; None for anything else."""
    value = said.item() if getattr(said, "size", None) == 1 or getattr(said, "ndim", None) == 0 else said
    return value if isinstance(value, bool) else None


def _source_of(function: Callable[..., Any]) -> str:
    """``file.py:function``, or the name where the source is not known."""
    name = getattr(function, "__qualname__", type(function).__name__)
    try:
        return f"{inspect.getsourcefile(function)}:{name}"
    except TypeError:
        return name


def _checked_inputs(module: Module, given: Any) -> Batch:
    values = module.main.inputs
    names = [value.name for value in values]
    fitted = input_tensors(module.main, given if isinstance(given, Mapping | tuple | list) else [given])
    # numpy has no bfloat16: such inputs are stored as float32, which holds them exactly.
    for index, (value, tensor) in enumerate(zip(values, fitted, strict=True)):
        if value.type.dtype is DType.BF16 and tensor.dtype is DType.F32.to_torch():
            fitted[index] = tensor.to(DType.BF16.to_torch())
    bind_symbols(module.main, fitted)
    return dict(zip(names, fitted, strict=True))


def _fit(module: Module, batch: Batch) -> tuple[torch.Tensor, ...] | None:
    """The inputs of ``module`` from ``batch``, by name; None when one is missing or of another type."""
    try:
        tensors = tuple(batch[value.name] for value in module.main.inputs)
        bind_symbols(module.main, tensors)
    except (KeyError, InputError):
        return None
    return tensors
