"""Counts with more spread than a Poisson has: two likelihoods, and rivals, on tasks whose truth is known.

A task is one shop: calls at hours of a week, with its own level, daily rhythm and trend. A hidden mood multiplies each count, so the
variance is m + 0.4 m^2 for a mean m. The oracle knows the shop's true mean and the dispersion.
Run: python examples/counts.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import PoissonRegressor
from torch import Tensor
from torch.distributions import NegativeBinomial, Poisson

import bnnp

Array = np.ndarray[Any, np.dtype[np.float64]]
DISPERSION, POINTS, SEEN = 0.4, 40, 12


def shops(count: int, seed: int) -> list[tuple[Array, Array, Array]]:
    """Make tasks (x, y, true mean), each with shape (40, 1): hours are counted from 0 to 1 over three days."""
    rng, tasks = np.random.default_rng(seed), []
    for _ in range(count):
        x = rng.uniform(0, 1, (POINTS, 1))
        wave = rng.uniform(0.3, 1.0) * np.sin(2 * np.pi * (3 * x + rng.uniform(0, 1)))
        mean = np.exp(rng.normal(2.0, 0.7) + wave + rng.normal(0, 0.5) * (x - 0.5))
        mood = rng.gamma(1 / DISPERSION, DISPERSION, x.shape)
        tasks.append((x, rng.poisson(mean * mood).astype(float), mean))
    return tasks


def negative_binomial(mean: Tensor, dispersion: float) -> NegativeBinomial:
    """Return the distribution with variance m + dispersion m^2."""
    r = torch.as_tensor(1 / dispersion, dtype=mean.dtype)
    return NegativeBinomial(r, probs=mean / (mean + r))


def basis(x: Array) -> Array:
    """Return what the regression is given: the rhythm is known to have three periods."""
    return np.hstack([x, np.sin(6 * np.pi * x), np.cos(6 * np.pi * x)])


def regression(shop: tuple[Array, Array, Array], penalty: float) -> Tensor:
    """Return the log probability of the unseen counts under a Poisson regression fitted to the seen ones."""
    x, y, _ = shop
    fitted = PoissonRegressor(alpha=penalty, max_iter=1000).fit(basis(x[:SEEN]), y[:SEEN, 0]).predict(basis(x[SEEN:]))
    return Poisson(torch.as_tensor(fitted)).log_prob(torch.as_tensor(y[SEEN:, 0])).mean()


def rivals(train: list[tuple[Array, Array, Array]], new: list[tuple[Array, Array, Array]]) -> dict[str, list[Tensor]]:
    """Return the log probability of each shop's unseen counts under distributions that need no network."""
    counts = torch.as_tensor(np.concatenate([y for _, y, _ in train]))
    level = counts.mean()
    spread = float(((counts.var() - level) / level.square()).clamp(min=1e-3))  # moments of all counts of all shops
    penalty = max([0.03, 0.1, 0.3, 1.0, 3.0, 10.0], key=lambda v: float(sum(regression(shop, v) for shop in train[:100])))
    unseen = [(torch.as_tensor(mean[SEEN:]), torch.as_tensor(y[SEEN:])) for _, y, mean in new]
    return {
        "oracle": [negative_binomial(mean, DISPERSION).log_prob(y).mean() for mean, y in unseen],
        "all counts of training": [negative_binomial(level, spread).log_prob(y).mean() for _, y in unseen],
        "Poisson regression on the context": [regression(shop, penalty) for shop in new],
    }


def main(steps: int = 1500, tests: int = 200) -> dict[str, tuple[float, float]]:
    """Train with both likelihoods; print the mean log probability of unseen counts."""
    train, new = shops(400, seed=0), shops(tests, seed=1)
    tasks = [(x[:SEEN], y[:SEEN], x[SEEN:], y[SEEN:]) for x, y, _ in new]
    found = {name: (float(torch.stack(v).mean()), float(torch.stack(v).std() / tests**0.5)) for name, v in rivals(train, new).items()}
    print("likelihood          95 % intervals hold   score (CRPS)")
    for likelihood in (bnnp.NegativeBinomial(), bnnp.Poisson()):
        prior = bnnp.Prior("per_unit", spread=0.9, input_scale=3.0)
        model = bnnp.BNNP(1, 1, hidden=(24,), prior=prior, likelihood=likelihood, activation="tanh")
        bnnp.meta_train(model, [(x, y) for x, y, _ in train], steps=steps, learning_rate=1e-2, context=(4, 20))
        name, scores = type(likelihood).__name__, bnnp.evaluate(model, tasks, num_samples=128).summary
        found[f"this model, {name}"] = scores["marginal_log_density"]
        (held, held_se), (crps, crps_se) = scores["coverage_0.95"], scores["crps"]
        print(f"{name:<18}  {100 * held:10.1f} +- {100 * held_se:.1f}   {crps:8.3f} +- {crps_se:.3f}")
        if isinstance(model.likelihood, bnnp.NegativeBinomial):
            print(f"dispersion: learned {float(model.likelihood.dispersion.detach()):.3f}, true {DISPERSION:.3f}")
    print(f"{'log probability of an unseen count, ' + str(tests) + ' new shops':<60} mean")
    for name, (mean, se) in sorted(found.items(), key=lambda item: -item[1][0]):
        print(f"{name:<58} {mean:7.3f} +- {se:.3f}")
    return found


if __name__ == "__main__":
    main()
