"""What a page shows of a posterior: a curve with its band, a map, or the probabilities of classes, as plain numbers.

Everything here is read off one posterior; nothing is drawn again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnnp.explorer.wire import Array, plain
from bnnp.likelihoods import Categorical
from bnnp.posterior import Posterior
from bnnp.predictive import GaussianPredictive, Predictive

__all__ = ["LEVELS", "curve", "field", "mixture_quantiles", "score", "tabulated_quantiles"]

LEVELS = (0.025, 0.25, 0.75, 0.975)
"""Edges of the band of 95 %, and of that of 50 % inside it."""
STEPS = 12
DIGITS = 9
"""Of the numbers of a curve: values may vary little around a large one."""
NODES = 0.25 * np.sinh(np.linspace(-4.0, 4.0, 31))
"""Where the distribution function is tabulated, in standard deviations from the mean: dense in the middle, seven out."""
THINNED = 4
"""Of so many inputs, the band is worked out at one where it is tabulated."""


def mixture_quantiles(mean: Tensor, std: Tensor, weights: Tensor, levels: tuple[float, ...] = LEVELS) -> Tensor:
    """Return quantiles of mixtures of Gaussians with shape (levels, M), to about a millionth of the width of the mixture.

    A few bisections for all levels at once and one step along the chord: `Predictive.quantile` halves 60 times, for each level alone,
    which takes longer than all the rest of a change.

    Arguments:
        mean: of the S components with shape (S, M).
        std: of the components with shape (S, M).
        weights: summing to one, with shape (S,).
        levels: of the quantiles.

    Example:
        >>> mixture_quantiles(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1), (0.5, 0.975)).flatten().tolist()
        [0.0, 1.95...]
    """
    q = torch.tensor(levels, dtype=torch.float64)[:, None]
    mean, std, w = mean.double()[:, None], std.double().clamp(min=1e-300)[:, None], weights.double()[:, None, None]
    each = mean + std * torch.special.ndtri(q)
    low, high = each.amin(0), each.amax(0)

    def above(y: Tensor) -> Tensor:
        return (w * torch.special.ndtr((y - mean) / std)).sum(0) - q

    at_low, at_high = above(low), above(high)
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        value = above(middle)
        right = value < 0
        low, at_low = torch.where(right, middle, low), torch.where(right, value, at_low)
        high, at_high = torch.where(right, high, middle), torch.where(right, at_high, value)
    rise = at_high - at_low
    return torch.where(rise > 0, low - at_low * (high - low) / rise.clamp(min=1e-300), 0.5 * (low + high))


def curve(posterior: Posterior, x: Array, output: int, curves: int) -> dict[str, Any]:
    """Return what one output does along some inputs.

    Arguments:
        posterior: of one task.
        x: inputs (M, d_x).
        output: number of the output; without meaning for class labels of more than two kinds.
        curves: number of sampled functions; each is one function along all inputs.

    Returns:
        "mean" and "bands" (edges at `LEVELS`, each M numbers) and "curves" (n times M); for `Categorical` instead "probs" (K times M). For
        labels of two kinds all three are of the probability of a 1, and the band says how sure the model is of that probability.
    """
    predictive = posterior.predict(torch.as_tensor(x))
    likelihood = posterior.likelihood
    if isinstance(likelihood, Categorical):
        return {"probs": plain(predictive.mean.numpy().T, 4)}
    drawn = predictive.sample(curves, noisy=False)[..., output].numpy() if curves else np.zeros((0, len(x)))
    if likelihood.labels:
        all_of_them = predictive.sample(max(posterior.num_samples, 64), noisy=False)[..., output].numpy()
        mean, edges = predictive.mean[..., output].numpy(), np.quantile(all_of_them, LEVELS, axis=0)
    else:
        mean, edges = _mean_and_edges(predictive, posterior, x, output)
    return {"mean": plain(mean, DIGITS), "bands": plain(edges, DIGITS), "curves": plain(drawn, DIGITS)}


def _mean_and_edges(predictive: Predictive, posterior: Posterior, x: Array, output: int) -> tuple[Array, Array]:
    mean = predictive.mean[..., output].double().numpy()
    if isinstance(predictive, GaussianPredictive):
        means, stds = (part[..., output] for part in predictive.components)
        return mean, mixture_quantiles(means, stds, posterior.weights).numpy()
    if predictive.is_discrete:
        return mean, np.stack([predictive.quantile(q)[..., output].numpy() for q in LEVELS])
    few = np.unique(np.linspace(0, len(x) - 1, -(-len(x) // THINNED)).round().astype(int))
    edges = tabulated_quantiles(posterior.predict(torch.as_tensor(x[few])), posterior.likelihood.support)[..., output]
    return mean, np.stack([np.interp(np.arange(len(x)), few, edge) for edge in edges])


def tabulated_quantiles(predictive: Predictive, support: tuple[float, float]) -> Array:
    """Return quantiles at `LEVELS` with shape (levels, M, d_y), from a table of the distribution function: where one value of it is dear.

    Between the entries its probit is taken as straight, which it is for a Gaussian; the error is about a hundredth of the spread.
    """
    mean, std = (part.double().numpy() for part in (predictive.mean, predictive.std))
    shares = support == (0.0, 1.0)  # these are tabulated by their logit, since they may crowd at the ends
    at = np.broadcast_to(3 * NODES[:, None, None], (len(NODES), *mean.shape)) / 2 if shares else mean + NODES[:, None, None] * std

    def value(y: Array) -> Array:
        return 1 / (1 + np.exp(-y)) if shares else y

    below = torch.stack([predictive.cdf(torch.as_tensor(value(y))) for y in at]).double()
    probit = torch.special.ndtri(below.clamp(1e-12, 1 - 1e-12)).numpy()
    wanted = torch.special.ndtri(torch.tensor(LEVELS, dtype=torch.float64)).numpy()
    found = np.empty((len(LEVELS), *mean.shape))
    for place in np.ndindex(*mean.shape):
        found[(slice(None), *place)] = np.interp(wanted, probit[(slice(None), *place)], at[(slice(None), *place)])
    return value(found)


def field(posterior: Posterior, x: Array, output: int, curves: int) -> dict[str, Any]:
    """Return mean, standard deviation (noise included) and coherent samples at the cells of a map; of probabilities for class labels.

    For labels of more than two kinds the mean is that of the label's number, which the page says.
    """
    predictive = posterior.predict(torch.as_tensor(x))
    if isinstance(posterior.likelihood, Categorical):
        number = torch.arange(posterior.likelihood.classes, dtype=predictive.mean.dtype)
        p, drawn = predictive.mean, predictive.sample(curves, noisy=False)
        mean = p @ number
        return {
            "mean": plain(mean.numpy(), 4),
            "std": plain(((p * number.square()).sum(-1) - mean.square()).clamp(min=0).sqrt().numpy(), 4),
            "samples": plain((drawn @ number).numpy(), 4),
        }
    return {
        "mean": plain(predictive.mean[..., output].numpy(), 4),
        "std": plain(predictive.std[..., output].numpy(), 4),
        "samples": plain(predictive.sample(curves, noisy=False)[..., output].numpy(), 4),
    }


def score(posterior: Posterior, x: Array, y: Array) -> dict[str, Any]:
    """Return how well targets (M, d_x) and (M, d_y) are predicted; what is NaN in y was not observed.

    Returns:
        "targets", "log_prob" per point of all of them together, "rmse" and "inside", the share of observed outputs in their intervals of
        95 %; for class labels "accuracy" instead of the last two.
    """
    seen = ~np.isnan(y)
    keep = seen.any(-1)
    x, y, seen = x[keep], y[keep], seen[keep]
    if not len(x):
        return {"targets": 0}
    predictive, truth = posterior.predict(torch.as_tensor(x)), torch.as_tensor(np.where(seen, y, 0.0))
    if posterior.likelihood.labels:
        truth = torch.as_tensor(np.where(seen, y, posterior.likelihood.placeholder))
    mask = None if seen.all() else torch.as_tensor(seen)
    found = {"targets": len(x), "log_prob": plain(float(predictive.log_prob(truth, joint=True, mask=mask)) / len(x))}
    if posterior.likelihood.labels:
        return {**found, "accuracy": plain(float((predictive.mode.numpy() == y)[seen].mean()))}
    low, high = (predictive.quantile(q).numpy() for q in (LEVELS[0], LEVELS[-1]))
    error = (predictive.mean.numpy() - y)[seen]
    return {**found, "rmse": plain(float(np.sqrt((error**2).mean()))), "inside": plain(float(((y >= low) & (y <= high))[seen].mean()))}
