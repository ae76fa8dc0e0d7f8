"""The region op: a body run several times."""

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
