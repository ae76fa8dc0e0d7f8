"""Reductions of tokens as steps: what each does to any value that has a row for every token, and how rows come back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from trimtab.errors import PassError
from trimtab.ir.builder import Builder
from trimtab.ir.core import Value
from trimtab.ir.ops import Cast, Gt, Mul, Reshape
from trimtab.passes.tokens.assignment import Assignment, divided, initial_sizes, size_bias
from trimtab.passes.tokens.selection import Selection, WeightedAssignment

if TYPE_CHECKING:
    from trimtab.passes.tokens.shortening import Place


class Step(ABC):
    """One reduction from N to ``count`` tokens.

    Attributes:
        count: how many tokens are left.
        sizes: ``[B, count, 1]``, for how many original tokens each counts in a mean or sum over tokens, 0 for padding;
            None where all count alike.
        key_mask: what is added to attention scores from here on, ``[B, 1, 1, count]`` floating, or bool: which keys may
            be attended to. It stands for the model's own key mask as well. None for none.
    """

    count: int
    sizes: Value | None = None
    key_mask: Value | None = None

    @abstractmethod
    def shorten(self, build: Builder, y: Value) -> Value:
        """Rows of y ``[B, N, C]`` as ``[B, count, C]``."""

    def shorten_side(self, build: Builder, y: Value) -> Value:
        """Rows of y ``[B, N, C]`` that belong to tokens without being computed from them, such as a mask."""
        return self.shorten(build, y)

    @abstractmethod
    def restore(self, build: Builder, y: Value) -> Value:
        """Rows y ``[B, count, C]`` for all N tokens again, ``[B, N, C]``.

        Raises:
            PassError: nothing is left of the tokens that were dropped.
        """

    def target(self, build: Builder) -> Value | None:
        """The row of each of the N tokens, i64 ``[B, N]``, -1 for those that were dropped; None where that is not
        known, as for tokens that are mixed of all others."""
        return None


class MergeStep(Step):
    """Tokens that become the mean of their group, weighted by size.

    Args:
        place: where.
        assignment: which group each token goes to.
        proportional: attention counts a merged token as often as it stands for original ones (proportional attention of
            ToMe, arXiv 2210.09461), by the logarithm of its size added to the scores.
    """

    sizes: Value

    def __init__(self, place: Place, assignment: Assignment, proportional: bool) -> None:
        build = place.build
        self.assignment = assignment
        self.count = assignment.count
        # Behind the last layer a classifier reads the class token alone.
        self._apart = place.protected if place.number == place.depth - 1 else 0
        self._before = place.sizes if place.sizes is not None else initial_sizes(build, place.x)
        self.sizes = assignment.sum(build, self._before, self._apart)
        if proportional:
            self.key_mask = size_bias(build, self.sizes)
        elif place.padded:
            self.key_mask = counted(build, self.sizes)

    def shorten(self, build: Builder, y: Value) -> Value:
        if self._apart:
            weights, sizes = (_as(build, value, y) for value in (self._before, self.sizes))
            return divided(build, self.assignment.sum(build, build(Mul(y, weights)), self._apart), sizes)
        shares = _as(build, self.assignment.shares(build, self._before, self.sizes), y)
        return self.assignment.sum(build, build(Mul(y, shares)))

    def restore(self, build: Builder, y: Value) -> Value:
        return self.assignment.unmerge(build, y)

    def target(self, build: Builder) -> Value:
        return self.assignment.target


class FuseStep(MergeStep):
    """Tokens that are kept, and one that is the sum of the others times their weights.

    In means over tokens the fused one counts as all those that it stands for. What belongs to tokens without being
    computed from them, such as a mask, has no weights: the fused token has its mean, by size.

    Args:
        place: where.
        weighted: which tokens are kept, and the weights of the others.
    """

    def __init__(self, place: Place, weighted: WeightedAssignment) -> None:
        super().__init__(place, weighted.assignment, proportional=False)
        self.weighted = weighted

    def shorten(self, build: Builder, y: Value) -> Value:
        weights = self.weighted.weights
        if y.type.dtype is not weights.type.dtype:
            weights = build(Cast(weights, dtype=y.type.dtype))
        return WeightedAssignment(self.assignment, weights).fuse(build, y)

    def shorten_side(self, build: Builder, y: Value) -> Value:
        return super().shorten(build, y)


class SelectStep(Step):
    """Tokens that are kept; the others are dropped."""

    def __init__(self, selection: Selection, sizes: Value | None, key_mask: Value | None) -> None:
        self.selection = selection
        self.count = selection.count
        self.sizes = sizes
        self.key_mask = key_mask

    def shorten(self, build: Builder, y: Value) -> Value:
        return self.selection.select(build, y)

    def restore(self, build: Builder, y: Value) -> Value:
        raise PassError(
            "tokens that were dropped cannot be given back",
            values={"kept": self.count, "of": self.selection.tokens},
            rule="an output with a row for each token needs something to put in the places of dropped ones",
            fix="merge or fuse tokens instead: merge-tokens{unmerge=true}",
        )

    def target(self, build: Builder) -> Value:
        return self.selection.target(build)


def _as(build: Builder, value: Value, y: Value) -> Value:
    """``value`` in the dtype of y."""
    return value if value.type.dtype is y.type.dtype else build(Cast(value, dtype=y.type.dtype))


def counted(build: Builder, sizes: Value) -> Value:
    """A bool mask ``[B, 1, 1, N]`` of the tokens that stand for something: all but padding."""
    batch, tokens, _ = sizes.type.shape
    rows = build(Reshape(sizes, shape=(batch, 1, 1, tokens)))
    return build(Gt(rows, build.scalar(0.0, sizes.type.dtype)))
