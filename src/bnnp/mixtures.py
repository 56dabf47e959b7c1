"""Mixtures of Gaussians, component by component on the first axis: the form that predictions take, and exact scores of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["crps_gaussian_mixture", "mixture_cdf", "mixture_moments", "mixture_quantile"]

_BLOCK_BYTES = 64 * 2**20  # largest working set of crps_gaussian_mixture


def mixture_moments(mean: Tensor, variance: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of a mixture, sum_s w_s m_s and sum_s w_s (v_s + (m_s - m)^2).

    Arguments:
        mean: of the S components, with shape (S, ...).
        variance: of the components, with shape (S, ...).
        weights: summing to one over the first axis, broadcastable to (S, ...).
    """
    m = (weights * mean).sum(0)
    return m, (weights * (variance + (mean - m).square())).sum(0)


def mixture_cdf(y: Tensor, mean: Tensor, std: Tensor, weights: Tensor) -> Tensor:
    """Return P(Y <= y) = sum_s w_s Phi((y - m_s) / s_s) with the shape (...) of y; other arguments as for `mixture_moments`."""
    return (weights * torch.special.ndtr((y - mean) / std)).sum(0)


def mixture_quantile(q: float, mean: Tensor, std: Tensor, weights: Tensor) -> Tensor:
    """Return the q-quantile with shape (...), by bisection between the smallest and largest quantile of the components."""
    each = mean + std * math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * q - 1, dtype=torch.float64)))
    low, high = each.amin(0) - 1e-9, each.amax(0) + 1e-9
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = mixture_cdf(middle, mean, std, weights) < q
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 0.5 * (low + high)


def crps_gaussian_mixture(mean: Tensor, std: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the exact continuous ranked probability score of a mixture of Gaussians.

    CRPS = sum_s w_s A(y - m_s, v_s) - 1/2 sum_{s,s'} w_s w_s' A(m_s - m_s', v_s + v_s'), A(m, v) = E|N(m, v)|. Time S^2
    per point; the S x S x points terms are taken in blocks of about 64 MiB.

    Arguments:
        mean: of the S components, with shape (S, ...).
        std: of the components, >= 0, broadcastable to (S, ...).
        y: observations with shape (...).
        weights: of the components, summing to one over the first axis, broadcastable to (S, ...); equal where not given.

    Returns:
        Scores with shape (...), in the units of y.

    Raises:
        ValueError: the shapes disagree.

    References:
        Calibrated probabilistic forecasting using ensemble model output statistics (Grimit et al., 2006).

    Example:
        >>> crps_gaussian_mixture(torch.zeros(1), torch.ones(1), torch.tensor(0.0))
        tensor(0.2337)
    """
    if mean.ndim < 1 or mean.shape[1:] != y.shape:
        raise ValueError(f"Expected mean with shape (S, *{tuple(y.shape)}). Got {tuple(mean.shape)}. Put the components first.")
    S = mean.shape[0]
    m = (mean - y).reshape(S, -1)
    v = (std**2).expand_as(mean).reshape(S, -1)
    w = (mean.new_full((), 1.0 / S) if weights is None else weights).expand_as(mean).reshape(S, -1)
    elements = max(1, _BLOCK_BYTES // (8 * m.element_size()))  # about eight temporaries of a block live at once
    rows = max(1, min(S, elements // S))
    points = max(1, elements // (rows * S))
    spread = torch.zeros_like(m[0])
    for p in range(0, m.shape[1], points):
        block = slice(p, p + points)
        for r in range(0, S, rows):
            m_r, v_r, w_r = (x[r : r + rows, None, block] for x in (m, v, w))
            spread[block] += (w_r * w[None, :, block] * _mean_abs_normal(m_r - m[None, :, block], v_r + v[None, :, block])).sum((0, 1))
    return ((w * _mean_abs_normal(m, v)).sum(0) - 0.5 * spread).reshape(y.shape)


def _mean_abs_normal(m: Tensor, v: Tensor) -> Tensor:
    """Return E|N(m, v)|, |m| at v = 0."""
    s = v.sqrt().clamp_min(torch.finfo(m.dtype).tiny)
    z = m / s
    return m * torch.erf(z / math.sqrt(2.0)) + math.sqrt(2.0 / math.pi) * s * torch.exp(-0.5 * z**2)
