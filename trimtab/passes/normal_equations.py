"""Ridge regression of many rows in constant memory: the sums that the normal equations are made of."""

from __future__ import annotations

import torch


class NormalEquations:
    """Sums over rows of inputs ``[n, C]`` and targets ``[n, D]``, in float64.

    What a fit leaves over can be computed from the sums of other rows than it was made of, so neither set is kept.
    """

    def __init__(self, inputs: int, targets: int) -> None:
        self._count = 0
        self._x, self._y = torch.zeros(inputs, dtype=torch.float64), torch.zeros(targets, dtype=torch.float64)
        self._xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._xy = torch.zeros(inputs, targets, dtype=torch.float64)
        self._yy = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Rows of inputs ``[n, C]`` and the targets ``[n, D]`` that belong to them."""
        x, y = x.double(), y.double()
        self._count += len(x)
        self._x += x.sum(0)
        self._y += y.sum(0)
        self._xx += x.T @ x
        self._xy += x.T @ y
        self._yy += float(y.square().sum())

    def solve(self, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
        """W f64 ``[C, D]`` and b f64 ``[D]`` with the least ``|x W + b - y|^2 + n l |W|^2``; l is ``damping`` times the
        mean variance of the inputs, so the offset is not damped, and the scale of the inputs does not matter."""
        mean_x, mean_y = self._x / self._count, self._y / self._count
        xx = self._xx / self._count - torch.outer(mean_x, mean_x)
        xy = self._xy / self._count - torch.outer(mean_x, mean_y)
        variance = float(xx.diagonal().mean())
        if variance <= 0:
            return torch.zeros_like(xy), mean_y
        weight = torch.linalg.solve(xx + damping * variance * torch.eye(len(xx), dtype=xx.dtype), xy)
        return weight, mean_y - mean_x @ weight

    def left_over(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """The share of ``|y|^2`` that ``x W + b`` leaves over on these rows; 0 where there is nothing to explain."""
        if not self._yy:
            return 0.0
        # |x W + b - y|^2, multiplied out.
        quadratic = (weight * (self._xx @ weight)).sum() + self._count * bias.square().sum()
        cross = 2 * (self._x @ weight @ bias - (weight * self._xy).sum() - bias @ self._y)
        return float(quadratic + cross + self._yy) / self._yy
