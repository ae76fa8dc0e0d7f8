"""Rounding with feedback: each column's error is made up for by the columns that are not rounded yet.

From the formulas of Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers, arXiv 2210.17323.
"""

from __future__ import annotations

import torch

from trimtab.passes.weight_only.grouping import Grid, Quantized, Scales, dequantize, fit, fit_clipped, quantize
from trimtab.passes.weight_only.moments import Moments

_DAMPENING = 0.01
"""Of the mean of the diagonal, added to it, as in the paper."""


def inverse_factor(moments: Moments) -> torch.Tensor:
    """U, upper triangular, with ``U^T U`` the inverse of ``X^T X`` after dampening: f64 ``[K, K]``."""
    products = moments.products
    mean = float(products.diagonal().mean())
    eye = torch.eye(len(products), dtype=products.dtype)
    if not mean:  # nothing ever came in: all weights count the same
        return eye
    # In units of the mean, so that tiny inputs do not underflow. With the axes reversed, the factor of H itself is
    # upper triangular, H = R R^T, and U is its inverse: H is never inverted.
    damped = products / mean + _DAMPENING * eye
    upper: torch.Tensor = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    inverse: torch.Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return inverse


def round_with_feedback(
    weight: torch.Tensor, grid: Grid, factor: torch.Tensor, *, clip: bool = False, products: torch.Tensor | None = None
) -> Quantized:
    """A weight f64 ``[N, K]`` rounded column by column, in order of K.

    With ``e = (w_k - q_k) / U_kk``, the columns j behind k change by ``-e U_kj``. The scales of a group are chosen when
    its first column is reached.

    Args:
        weight: K is a multiple of the group.
        grid: the integers.
        factor: of :func:`inverse_factor`; a positive factor to it makes no difference.
        clip: search for the clipping ratio of each group.
        products: for the search, f64 ``[K / group, group, group]``; see :func:`~.grouping.fit_clipped`.
    """
    # [K, N], so that a column is contiguous.
    rest = weight.T.contiguous()
    codes = torch.empty_like(rest)
    chosen: list[Scales] = []
    for start in range(0, len(rest), grid.group):
        stop = start + grid.group
        block = rest[start:stop].T.contiguous()
        metric = products[start // grid.group] if products is not None else None
        scales = fit_clipped(block, grid, metric) if clip else fit(block, grid)
        errors = torch.empty_like(rest[start:stop])
        for k in range(start, stop):
            column = rest[k, :, None]
            rounded = quantize(column, grid, scales)
            codes[k] = rounded[:, 0]
            error = (column - dequantize(rounded, scales))[:, 0] / factor[k, k]
            rest[k + 1 : stop].addr_(factor[k, k + 1 : stop], error, alpha=-1)
            errors[k - start] = error
        # What the columns of a group do to those behind it is one product.
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        chosen.append(scales)
    scale, zero = (torch.stack(parts, -1) for parts in zip(*((s.scale, s.zero) for s in chosen), strict=True))
    return Quantized(grid, codes.T, Scales(scale, zero))
