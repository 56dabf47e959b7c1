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
from bnnp.predictive import Predictive

__all__ = ["LEVELS", "curve", "field", "mixture_quantiles", "score"]

LEVELS = (0.025, 0.25, 0.75, 0.975)
"""Edges of the band of 95 %, and of that of 50 % inside it."""
STEPS = 12


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
        mean, edges = _mean_and_edges(predictive, posterior, output)
    return {"mean": plain(mean), "bands": plain(edges), "curves": plain(drawn)}


def _mean_and_edges(predictive: Predictive, posterior: Posterior, output: int) -> tuple[Array, Array]:
    components = getattr(predictive, "components", None)
    if components is None:
        edges = np.stack([predictive.quantile(q)[..., output].numpy() for q in LEVELS])
        return predictive.mean[..., output].numpy(), edges
    means, stds = (part[..., output].double() for part in components)
    weights = posterior.weights.double()
    return (weights[:, None] * means).sum(0).numpy(), mixture_quantiles(means, stds, weights).numpy()


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
