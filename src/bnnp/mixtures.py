"""Mixtures, component by component on the first axis: the form that predictions take, their quantiles, and scores of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["crps_gaussian_mixture", "crps_of_cdf", "crps_of_counts", "invert_cdf", "mixture_cdf", "mixture_moments", "mixture_quantile"]

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


def invert_cdf(
    cdf: Callable[[Tensor], Tensor], q: float | Tensor, low: Tensor, high: Tensor, support: tuple[float, float], integer: bool = False
) -> Tensor:
    """Return the smallest y with cdf(y) >= q, by bisection; over the whole numbers where y is one.

    Arguments:
        cdf: distribution function, from (...) to (...).
        q: levels in (0, 1), broadcastable to (...).
        low: where to look first, with shape (...); the interval grows as needed.
        high: the same from above.
        support: smallest and largest value of y.
        integer: y takes whole numbers.
    """
    least, most = support
    low, high = low.clamp(least, most), high.clamp(least, most)
    if integer:
        low, high = low.floor(), high.ceil()
    width = (high - low).clamp(min=1.0 if integer else 1e-6)
    for _ in range(100):
        far = (cdf(low) >= q) & (low > least)
        if not bool(far.any()):
            break
        low, width = torch.where(far, low - width, low).clamp(min=least), torch.where(far, 2 * width, width)
    for _ in range(100):
        far = (cdf(high) < q) & (high < most)
        if not bool(far.any()):
            break
        high, width = torch.where(far, high + width, high).clamp(max=most), torch.where(far, 2 * width, width)
    if integer:
        low = torch.where((cdf(low) >= q) & (low <= least), low - 1, low)
    for _ in range(100 if integer else 60):
        if integer and not bool((high - low > 1).any()):
            break
        middle = (0.5 * (low + high)).floor() if integer else 0.5 * (low + high)
        below = cdf(middle) < q
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high if integer else 0.5 * (low + high)


def crps_of_cdf(
    cdf: Callable[[Tensor], Tensor],
    y: Tensor,
    width: Tensor,
    support: tuple[float, float],
    accuracy: float = 1e-4,
    most: int = 2048,
    at_once: int = 16,
) -> Tensor:
    """Return the continuous ranked probability score, the integral of (F(x) - 1{x >= y})^2, by quadrature.

    Each side of y is mapped to the real line by x = y -+ width exp(pi/2 sinh t) (or between y and the end of the support), where the
    trapezoidal rule converges fast; nodes are doubled until no score moves by more than the share `accuracy` of it, or there are `most`.

    Arguments:
        cdf: distribution function, from (k, ...) to (k, ...).
        y: observations with shape (...).
        width: a length of the size of the distribution's spread and its distance from y, with shape (...).
        support: smallest and largest value of y.
        accuracy: largest relative change at which the doubling stops.
        most: largest number of nodes on each side.
        at_once: number of nodes k that are taken together.

    References:
        Double exponential formulas for numerical integration (Takahasi and Mori, 1974).

    Example:
        >>> y, width = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        >>> round(float(crps_of_cdf(torch.special.ndtr, y, width, (-math.inf, math.inf))), 6)
        0.233695
    """

    def side(sign: int, t: Tensor) -> Tensor:
        end = support[0] if sign < 0 else support[1]
        s, slope = 0.5 * math.pi * t.sinh(), 0.5 * math.pi * t.cosh()
        if math.isinf(end):
            length = width * s.exp()
            x, rate = y + sign * length, length * slope
        else:
            x, rate = y + (end - y) * (2 * s).sigmoid(), (end - y).abs() * 0.5 * slope / s.cosh().square()
        F = cdf(x)
        return (rate * (F if sign < 0 else 1 - F).square()).sum(0)

    def both(nodes: Tensor) -> Tensor:
        parts = nodes.reshape(-1, *[1] * y.ndim).to(y).split(at_once)
        return sum((side(sign, part) for sign in (-1, 1) for part in parts), torch.zeros_like(y))

    reach, count = 3.5, 32  # at t = -+3.5 lengths are 5e-12 and 2e11 widths
    total = both(torch.linspace(-reach, reach, count + 1, dtype=torch.float64))
    value = total * (2 * reach / count)
    while count < most:
        total = total + both(-reach + 2 * reach * (torch.arange(count, dtype=torch.float64) + 0.5) / count)
        count, old = 2 * count, value
        value = total * (2 * reach / count)
        if bool(((value - old).abs() <= accuracy * value).all()):
            break
    return value


def crps_of_counts(cdf: Callable[[Tensor], Tensor], y: Tensor, last: int, most: int = 4096, at_once: int = 16) -> Tensor:
    """Return the same score of whole numbers from 0, the sum over k of (F(k) - 1{k >= y})^2, with F = 1 taken from `last` on.

    Where there are more than `most` terms they are taken in steps, at the middle of each. Other arguments as for `crps_of_cdf`.

    Example:
        >>> crps_of_counts(lambda k: (k >= 2).double(), torch.tensor(5.0), last=9)
        tensor(3.)
    """
    end = max(last, int(y.max())) + 1 if y.numel() else 1
    step = -(-end // most)
    total = torch.zeros_like(y)
    for start in torch.arange(0, end, step).reshape(-1, *[1] * y.ndim).to(y).split(at_once):
        below = (y - start).clamp(0, step) / step  # share of the step's numbers that are below y
        F = cdf((start + (step - 1) // 2).expand(-1, *y.shape)).to(y.dtype)
        total = total + step * (below * F.square() + (1 - below) * (1 - F).square()).sum(0)
    return total


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
