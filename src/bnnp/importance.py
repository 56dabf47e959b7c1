"""Importance weights: what S weighted draws are worth, and whether their sums can be trusted.

Everything takes log weights, not normalised, with the draws on the first axis and any further axes as batch: each column
is an answer of its own. A weight of zero is a log weight of -inf. If all weights of a column are zero they say nothing,
and the draws count as equal. NaN and +inf are not weights; a column that holds one gives NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["effective_sample_size", "log_mean_exp", "normalise", "psis", "systematic"]

FEWEST_DRAWS = 25
FEWEST_IN_TAIL = 5  # with fewer values above the cut, and with fewer draws, there is no shape to speak of
SMALLEST_EXCESS = 1e-290  # in units of the largest weight; below, the grid of the fit would overflow


def _relative(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights in units of the column's largest, with shape (S, ...), and the log of the largest, with shape (...)."""
    top = log_weights.detach().amax(0)
    w = (log_weights - torch.where(top == -math.inf, 0.0, top)).exp()
    return torch.where(top == -math.inf, torch.ones_like(w), w), top


def normalise(log_weights: Tensor) -> Tensor:
    """Return w_s / sum_r w_r, the weights of each column made to sum to one.

    Arguments:
        log_weights: log w with shape (S, ...).

    Returns:
        Weights with shape (S, ...); 1 / S throughout a column without any positive weight.

    Example:
        >>> normalise(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    w, _ = _relative(log_weights)
    return w / w.sum(0)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Return (sum_s w_s)^2 / sum_s w_s^2, the number of equal weights with the same spread.

    It is between 1 and S. A large value is no proof: draws that missed the bulk of the target can all have equal weights.

    Arguments:
        log_weights: log w with shape (S, ...).

    Returns:
        Numbers with shape (...); S for a column without any positive weight.

    References:
        Sequential imputations and Bayesian missing data problems (Kong, Liu and Wong, 1994).

    Example:
        >>> effective_sample_size(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor(2.)
    """
    w, _ = _relative(log_weights)
    return w.sum(0) ** 2 / (w**2).sum(0)


def log_mean_exp(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return log 1/S sum_s w_s and its standard error.

    The error is that of the delta method, sd(w) / (mean(w) sqrt(S)), sd with S - 1 degrees of freedom. Beyond about 0.5, or
    where the Pareto k of `psis` is large, it is too small itself: the draws that would widen it have not been seen.

    Arguments:
        log_weights: log w with shape (S, ...).

    Returns:
        The logarithm with shape (...), -inf for a column without any positive weight, and its standard error with shape
        (...), NaN for such a column and for a single draw.

    Example:
        >>> log_mean_exp(torch.tensor([1.0, 3.0]).log())
        (tensor(0.6931), tensor(0.5000))
    """
    S = log_weights.shape[0]
    w, top = _relative(log_weights)
    mean = w.mean(0)
    if S == 1:
        return top + mean.log(), torch.full_like(mean, math.nan)
    error = ((w - mean) ** 2).sum(0).div(S * (S - 1.0)).sqrt() / mean
    return top + mean.log(), torch.where(top == -math.inf, math.nan, error)


def psis(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return Pareto-smoothed log weights, and the shape k of their upper tail.

    The M = ceil(min(S / 5, 3 sqrt(S))) largest weights, less the largest of the others, are fitted by a generalised Pareto
    distribution and replaced by its quantiles at (i - 1/2) / M, cut off at the largest raw weight. Below k = 1/2 the weights
    have a variance, below 1 a mean. Sums over S draws are reliable for k < min(1 - 1 / log10(S), 0.7): beyond 0.7 no
    practical S helps. With few draws k is rough: at k = 1/2 its standard deviation is 0.25 for S = 64, 0.13 for S = 1,000.

    Arguments:
        log_weights: log w with shape (S, ...).

    Returns:
        Log weights with shape (S, ...), of which each column exponentiates to sum one, and k with shape (...). The weights are
        only normalised where there is nothing to fit, with k = 0 if the tail's logarithms agree to rounding, k = inf if fewer than
        five draws carry all the weight, and k = NaN if S < 25 or fewer than five weights lie above a tie at the tail's foot.

    References:
        Pareto smoothed importance sampling (Vehtari, Simpson, Gelman, Yao and Gabry, 2024).
    """
    with torch.no_grad():
        lw = _double(log_weights)
        lw = lw.reshape(lw.shape[0], -1)
        S, top = lw.shape[0], lw.amax(0)
        lw = torch.where(top == -math.inf, torch.zeros_like(lw), lw - top)
        k = torch.full_like(top, math.nan)
        if S >= FEWEST_DRAWS:
            M = math.ceil(min(S / 5, 3 * math.sqrt(S)))
            # Log weights are sums of many terms: what differs by less than a billionth does not differ.
            rounding = 1e-9 + 10 * torch.finfo(log_weights.dtype).eps * top.abs()
            # Stable, so that equal weights at the cut are told apart by their place and not by chance.
            ordered, place = lw.sort(dim=0, stable=True)
            tail, k = _smooth_tail(ordered[-M:], ordered[-M - 1], rounding)
            k = torch.where(top == -math.inf, math.inf, k)
            lw = lw.scatter(0, place[-M:], tail)
        lw = lw.log_softmax(0).reshape(log_weights.shape)
        return lw.to(log_weights), k.reshape(log_weights.shape[1:]).to(log_weights)


def _double(x: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its device has none."""
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)


def _smooth_tail(tail: Tensor, cut: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tail's log weights as expected order statistics, and k.

    Arguments:
        tail: the M largest log weights in increasing order with shape (M, C); the largest is 0.
        cut: the largest log weight that is not among them, with shape (C,).
        rounding: difference of log weights that means nothing, with shape (C,).
    """
    M = len(tail)
    # exp(tail) - exp(cut), without loss where the two are close.
    excess = tail.exp() * -torch.expm1(cut - tail)
    # What is level with the cut, as copies of one draw are, is left there.
    above = (tail - cut > rounding) & (excess > SMALLEST_EXCESS)
    n = above.sum(0)
    lowest = torch.where(above, tail, 0.0).amin(0)
    invalid, few = tail[-1].isnan(), n < FEWEST_IN_TAIL
    level = (tail[0] >= -rounding) | (~few & (lowest >= -rounding))
    kept = invalid | few | level
    # A column that cannot be fitted borrows values that can: the batch stays whole.
    i = torch.arange(1, M + 1, dtype=tail.dtype, device=tail.device).unsqueeze(-1)
    n = torch.where(kept, M, n)
    k, sigma = _fit_pareto(torch.where(kept, i / M, torch.where(above, excess, 0.0)), n)
    hazard = -torch.log1p(-((i - (M - n) - 0.5) / n).clamp_min(0.0))
    quantile = sigma * torch.where(k == 0, hazard, torch.expm1(k * hazard) / k)
    smoothed = torch.logaddexp(quantile.log(), cut).clamp_max(0.0)
    k = torch.where(few, torch.where(cut.exp() <= SMALLEST_EXCESS, math.inf, math.nan), k)
    k = torch.where(level, 0.0, k)
    return torch.where(kept | ~above, tail, smoothed), torch.where(invalid, math.nan, k)


def _fit_pareto(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the density (1 + k x / sigma)^(-1/k - 1) / sigma to each column.

    The posterior mean of theta = -k / sigma over a grid gives k and sigma; k is then drawn towards 1/2 with the weight of ten
    observations.

    Arguments:
        x: increasing values with shape (M, C), of which the last n are positive and the others zero.
        n: number of positive values with shape (C,).

    Returns:
        k and sigma, each with shape (C,).

    References:
        A new and efficient estimation method for the generalized Pareto distribution (Zhang and Stephens, 2009).
        Pareto smoothed importance sampling (Vehtari, Simpson, Gelman, Yao and Gabry, 2024), for the prior of k.
    """
    M = len(x)
    quartile = x.gather(0, (M - n + (n + 2) // 4 - 1).unsqueeze(0))[0]
    size = 30 + math.isqrt(M)
    j = torch.arange(1, size + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
    theta = 1 / x[-1] + (1 - (size / (j - 0.5)).sqrt()) / (3 * quartile)
    k = torch.stack([torch.log1p(-t * x).sum(0) / n for t in theta])  # a zero adds nothing
    mean = x.sum(0) / n
    log_lik = n * (-_scale(theta, k, mean).log() - k - 1)
    theta = (theta * log_lik.softmax(0)).sum(0)
    k = torch.log1p(-theta * x).sum(0) / n
    return (n * k + 5) / (n + 10), _scale(theta, k, mean)


def _scale(theta: Tensor, k: Tensor, mean: Tensor) -> Tensor:
    """Return sigma = -k / theta, and its limit, the mean, at theta = 0."""
    return torch.where(theta == 0, mean, -k / theta)


def systematic(log_weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw n indices of each column by systematic resampling.

    Index s is drawn as often as a number (i + u) / n, i = 0, ..., n - 1, falls into its stretch of the cumulated weights: n w_s
    times on average, and never a whole one more or less. One uniform u serves all columns, so a column's indices do not depend
    on which others it is drawn with; its indices are dependent, so nothing here gives a standard error.

    Arguments:
        log_weights: log w with shape (S, ...).
        n: number of draws of each column.
        generator: source of u.

    Returns:
        Indices in increasing order with shape (n, ...); 0, ..., S - 1 if n = S and all weights are equal.

    Raises:
        ValueError: a weight is NaN or infinite.

    References:
        Comparison of resampling schemes for particle filtering (Douc, Cappe and Moulines, 2005).

    Example:
        >>> systematic(torch.tensor([0.5, 0.0, 0.5]).log(), 4, torch.Generator().manual_seed(0))
        tensor([0, 0, 2, 2])
    """
    with torch.no_grad():
        w, _ = _relative(_double(log_weights))
        if bool(w.isnan().any()):
            raise ValueError(
                f"Expected log weights below +inf to draw from. Got NaN or +inf in {int(w.isnan().any(0).sum())} of "
                f"{w[0].numel()} columns. Look for values that are not finite in the data behind the weights."
            )
        u = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device).to(w.device)
        total = w.reshape(len(w), -1).mT.contiguous().cumsum(-1)
        whole = total[:, -1:]
        # Equal weights are ones, so these ends are exact; the last is n, whatever the rounding.
        end = torch.where(total < whole, (n * total / whole).clamp_max(n), n)
        below = end.floor()
        # The number of i with i + u < end, without adding u to a large number.
        drawn = below + (end - below > u)
        i = torch.arange(n, dtype=drawn.dtype, device=drawn.device).expand(len(drawn), n).contiguous()
        index = torch.searchsorted(drawn, i, right=True)
        return index.mT.reshape(n, *log_weights.shape[1:]).to(log_weights.device)
