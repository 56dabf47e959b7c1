"""Have chains mixed, and how many independent draws are they worth? R-hat and effective sample sizes, for many quantities at once.

Functions of draws with shape (draws, chains, *batch): each batch element is a quantity of its own, and gets a number of its own. Chains are
split in halves, so that one that drifts disagrees with itself, and draws are replaced by their ranks, so that heavy tails do no harm. A
quantity with a draw that is not finite, and one that never changes, have no R-hat (NaN). Time is that of a sort and an FFT.

References:
    Rank-normalization, folding, and localization: an improved R-hat for assessing convergence of MCMC (Vehtari, Gelman, Simpson, Carpenter
    and Bürkner, 2021).
    Practical Markov chain Monte Carlo (Geyer, 1992), section 3.3: the initial monotone sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ess_bulk", "ess_mean", "ess_tail", "mcse_mean", "mixing", "rhat"]

FEWEST = 4
TAILS = (0.05, 0.95)


def mixing(traces: Sequence[Tensor], like: Tensor) -> dict[str, Tensor]:
    """Return "rhat", "ess_bulk" and "ess_tail" of each task, the worst over the quantities watched; NaN after fewer than four draws.

    Arguments:
        traces: what was watched at each draw, with shape (C, T, q).
        like: a tensor (T,) to take precision and device from.
    """
    if len(traces) < FEWEST:
        return dict.fromkeys(("rhat", "ess_bulk", "ess_tail"), torch.full_like(like, torch.nan))
    draws = torch.stack(list(traces))
    # What never changes, such as the output at an input where it is known, says nothing.
    still = (draws == draws[:1, :1]).all(0).all(0)
    still = still & ~still.all(-1, keepdim=True)
    return {
        "rhat": rhat(draws).masked_fill(still, -torch.inf).amax(-1),
        "ess_bulk": ess_bulk(draws).masked_fill(still, torch.inf).amin(-1),
        "ess_tail": ess_tail(draws).masked_fill(still, torch.inf).amin(-1),
    }


def rhat(draws: Tensor) -> Tensor:
    """Return the rank-normalised split R-hat: the larger of that of the location and that of the spread.

    sqrt(var_plus / W) of normal scores, with W the variance within chains and var_plus that of all. Above 1.01 chains have not mixed.

    Arguments:
        draws: with shape (draws, chains, *batch), at least 4 draws; one chain is compared with itself.

    Returns:
        R-hat with shape (*batch,); infinite where chains stand still at different values.

    Example:
        >>> rhat(torch.arange(40.0).reshape(20, 2) % 7).item() < 1.1
        True
    """
    x = _split(_checked(draws))
    folded = (x - _median(x)).abs()
    return torch.fmax(_rhat(_normal_scores(x)), _rhat(_normal_scores(folded)))


def ess_bulk(draws: Tensor) -> Tensor:
    """Return the effective sample size of the normal scores, with shape (*batch,): how well the centre of the distribution is known."""
    return _ess(_normal_scores(_split(_checked(draws))))


def ess_tail(draws: Tensor) -> Tensor:
    """Return the smaller effective sample size of the 5 % and 95 % quantiles, with shape (*batch,)."""
    x = _checked(draws)
    ordered = x.flatten(0, 1).sort(dim=0).values
    each = []
    for p in TAILS:
        below = (x <= _quantile(ordered, p)).to(x)
        each.append(_ess(_split(torch.where(x.isfinite().all(0).all(0), below, torch.nan))))
    return torch.minimum(*each)


def ess_mean(draws: Tensor) -> Tensor:
    """Return the effective sample size of the mean itself, with shape (*batch,)."""
    return _ess(_split(_checked(draws)))


def mcse_mean(draws: Tensor) -> Tensor:
    """Return the Monte Carlo standard error of the mean, std / sqrt(ess_mean), with shape (*batch,)."""
    return _checked(draws).flatten(0, 1).std(0) / ess_mean(draws).sqrt()


def _checked(draws: Tensor) -> Tensor:
    if draws.ndim < 2 or len(draws) < FEWEST:
        raise ValueError(f"Expected draws with shape (draws, chains, ...) and at least {FEWEST} draws. Got {tuple(draws.shape)}.")
    return draws.double()


def _split(x: Tensor) -> Tensor:
    """Return the first and the last half of each chain as chains, with shape (n // 2, 2 C, *batch)."""
    half = len(x) // 2
    return torch.cat([x[:half], x[-half:]], dim=1)


def _quantile(ordered: Tensor, p: float) -> Tensor:
    """Return a quantile of sorted values (n, *batch), linear between them."""
    n = len(ordered)
    place = n * p + 1.0 - p
    k = math.floor(min(max(place, 1), n - 1))
    part = min(max(place - k, 0.0), 1.0)
    return (1.0 - part) * ordered[k - 1] + part * ordered[k]


def _median(x: Tensor) -> Tensor:
    ordered = x.flatten(0, 1).sort(dim=0).values
    n = len(ordered)
    return 0.5 * (ordered[(n - 1) // 2] + ordered[n // 2])


def _normal_scores(x: Tensor) -> Tensor:
    """Return normal quantiles of the ranks among all chains, ties sharing their mean rank; NaN where not all are finite."""
    flat = x.reshape(x.shape[0] * x.shape[1], -1).T.contiguous()  # (batch, n)
    ordered = flat.sort(dim=-1).values
    twice = torch.searchsorted(ordered, flat) + torch.searchsorted(ordered, flat, right=True) + 1
    score = torch.special.ndtri((0.5 * twice.double() - 0.375) / (flat.shape[-1] + 0.25))
    score = torch.where(flat.isfinite().all(-1, keepdim=True), score, torch.nan)
    return score.T.reshape(x.shape)


def _rhat(x: Tensor) -> Tensor:
    n = len(x)
    within, between = x.var(0).mean(0), x.mean(0).var(0)
    # Of equal draws rounding leaves a little variance.
    still = torch.where(between > 1e-20, torch.inf, torch.nan)
    return torch.where(within > 1e-20, (between / within + (n - 1) / n).sqrt(), torch.where(x.isnan().any(0).any(0), torch.nan, still))


def _autocovariance(x: Tensor) -> Tensor:
    """Return the autocovariance of each chain at all lags, divided by n, with shape like x."""
    n = len(x)
    spectrum = torch.fft.rfft(x - x.mean(0), n=2 ** math.ceil(math.log2(2 * n)), dim=0)
    return torch.fft.irfft(spectrum.abs().square(), n=2 ** math.ceil(math.log2(2 * n)), dim=0)[:n] / n


def _ess(x: Tensor) -> Tensor:
    """Return n C / tau, tau = -1 + 2 sum of autocorrelations over Geyer's initial monotone sequence."""
    n, C = x.shape[:2]
    acov = _autocovariance(x).mean(1)  # (n, *batch)
    within = acov[0] * n / (n - 1)
    var_plus = acov[0] + (x.mean(0).var(0) if C > 1 else 0.0)
    rho = 1.0 - (within - acov) / var_plus
    rho[0] = 1.0
    # Sums of neighbours are positive for a reversible chain: the first that is not is noise, and all after it.
    last = max(math.ceil((n - 2) / 2) - 1, 0)
    pairs = (rho[0 : 2 * last + 2 : 2] + rho[1 : 2 * last + 2 : 2])[: last + 1]
    positive = (pairs >= 0).long().cumprod(0)
    stop = positive.sum(0).clamp(max=last)  # the pair of which only the first counts, if it is positive
    counts = torch.arange(last + 1).to(x.device).reshape(-1, *(1 for _ in range(pairs.ndim - 1))) < stop
    end = rho[0 : 2 * last + 2 : 2].gather(0, stop.unsqueeze(0)).squeeze(0)
    # At the end of the chain the last pair was no failure, and its first counts as it is.
    end = torch.where(positive[-1].bool(), end, end.clamp(min=0))
    tau = -1.0 + 2.0 * (pairs.cummin(0).values * counts).sum(0) + end
    found = n * C / tau.clamp(min=1.0 / math.log10(n * C))
    flat = x.flatten(0, 1)
    constant = flat.amax(0) - flat.amin(0) < 1e-15
    found = torch.where(constant, float(n * C), found)
    return torch.where(x.isfinite().all(0).all(0), found, torch.nan)
