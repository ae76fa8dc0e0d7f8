"""The ops with regions: a body run several times, and a body that is one kernel."""

from __future__ import annotations

from typing import Any

from trimtab.errors import InternalError, VerificationError
from trimtab.ir.core import Graph, Value
from trimtab.ir.op import Op
from trimtab.ir.types import TensorType


class Repeat(Op):
    """Run ``body`` ``n`` times: recursive weight sharing and other repeated blocks, as one copy of code.

    The body's inputs are, in order, the ``carried`` values (results of the previous iteration), one slice of each
    ``stacked`` value (leading axis n, slice i in iteration i) and the ``invariants`` (the same every time).  Its
    outputs are the carried values of the next iteration; the last ones are the results.  A weight that the body
    reads directly is shared by all iterations.
    """

    carried: tuple[Value, ...]
    stacked: tuple[Value, ...]
    invariants: tuple[Value, ...]
    body: Graph
    n: int

    @staticmethod
    def reference(*operands: Any, **attributes: Any) -> Any:
        raise InternalError("repeat is evaluated by the interpreter, which runs its body")

    def infer(self) -> tuple[TensorType, ...]:
        return tuple(value.type for value in self.carried)

    def body_input_types(self) -> list[TensorType]:
        """The types the body's inputs must have."""
        slices = [value.type.with_shape(*value.type.shape[1:]) for value in self.stacked]
        return [*(v.type for v in self.carried), *slices, *(v.type for v in self.invariants)]

    def verify(self) -> None:
        def fail(rule: str, **values: Any) -> None:
            raise VerificationError("repeat is malformed", values=values, rule=rule, location=self.location)

        if self.n < 1:
            fail("a body runs at least once", n=self.n)
        for value in self.stacked:
            if not value.type.shape or value.type.shape[0] != self.n:
                fail("the leading axis of a stacked value is n", value=value, n=self.n)
        given = [value.type for value in self.body.inputs]
        if given != self.body_input_types():
            fail(
                "the body's inputs are the carried values, slices of the stacked ones and the invariants",
                body=list(map(str, given)),
                expected=list(map(str, self.body_input_types())),
            )
        if [value.type for value in self.body.outputs] != [value.type for value in self.carried]:
            fail(
                "the body returns the next carried values", outputs=list(self.body.outputs), carried=list(self.carried)
            )


class Fused(Op):
    """Compute ``body`` on ``inputs`` in one kernel: what a backend makes of it, in the model's own ops.

    What the body computes and does not return never reaches memory.  Weights and constants are read by the body
    itself; every other value comes in through ``inputs``.  ``kind`` names the ops for people and profiles, as in
    ``linear+gelu``.  :mod:`trimtab.ir.fused` makes such ops and inlines them again.
    """

    inputs: tuple[Value, ...]
    body: Graph
    kind: str

    @staticmethod
    def reference(*operands: Any, **attributes: Any) -> Any:
        raise InternalError("fused is evaluated by the interpreter, which runs its body")

    def infer(self) -> tuple[TensorType, ...]:
        return tuple(value.type for value in self.body.outputs)

    def verify(self) -> None:
        def fail(rule: str, **values: Any) -> None:
            raise VerificationError("fused is malformed", values=values, rule=rule, location=self.location)

        given, expected = [v.type for v in self.body.inputs], [v.type for v in self.inputs]
        if given != expected:
            fail("the body's inputs are the operands", body=list(map(str, given)), expected=list(map(str, expected)))
        if not self.body.outputs:
            fail("a kernel has a result")
        nested = [op.name for op in self.body.ops if op.regions]
        if nested:
            fail("a kernel has no regions inside", ops=nested)
