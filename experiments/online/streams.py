"""A stream of points of one task, and the ways of keeping a posterior up to date with it.

Each way is a function from the posterior and the new point to the next posterior. All are scored before they see the point: the
sum of log p(y_n | x_n, points before n) is the log evidence that a way gives to the stream, so no held-out set is needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bnnp
from bnnp.data.synthetic import GaussianProcess
from bnnp.linalg import cholesky, solve_lower

__all__ = ["BLOCK", "EVERY", "ORDERS", "WAYS", "Way", "follow", "in_order", "oracle"]

EVERY = 10  # points from one conditioning afresh to the next
GROWTH = 1.1  # growth of the number of points from one conditioning afresh to the next
BLOCK = 10  # points averaged for one value of a curve
ORDERS = ("random", "increasing")


@dataclass(frozen=True)
class Way:
    """Name one way of following a stream.

    Arguments:
        label: for people.
        step: from the posterior, the new point (1, d_x), (1, d_y), and its number n (points seen, this one included) to the next
            posterior, and whether it was conditioned afresh.
        costly: run on the first task only.
    """

    label: str
    step: Callable[[bnnp.Posterior, Tensor, Tensor, int], tuple[bnnp.Posterior, bool]]
    costly: bool = False


def _few(posterior: bnnp.Posterior, share: float) -> bool:
    return float(posterior.effective_sample_size) < share * posterior.num_samples


def last_layer(posterior: bnnp.Posterior, x: Tensor, y: Tensor, n: int) -> tuple[bnnp.Posterior, bool]:
    """Update the last layer of every particle, the particles' weights staying equal: the paper's way."""
    return posterior.update(x, y, reweight=False), False


def reweighted(posterior: bnnp.Posterior, x: Tensor, y: Tensor, n: int) -> tuple[bnnp.Posterior, bool]:
    """Update the last layer, and weight each particle by how well it predicted the point."""
    return posterior.update(x, y), False


def resampled(posterior: bnnp.Posterior, x: Tensor, y: Tensor, n: int) -> tuple[bnnp.Posterior, bool]:
    """Update and reweight; draw particles by their weights when fewer than half are left in effect."""
    posterior = posterior.update(x, y)
    return (posterior.resample(seed=n) if _few(posterior, 0.5) else posterior), False


def when_few(posterior: bnnp.Posterior, x: Tensor, y: Tensor, n: int) -> tuple[bnnp.Posterior, bool]:
    """Update and reweight; condition afresh when fewer than a quarter of the particles are left in effect."""
    posterior = posterior.update(x, y)
    few = _few(posterior, 0.25)
    return (posterior.refresh() if few else posterior), few


def when_grown(posterior: bnnp.Posterior, x: Tensor, y: Tensor, n: int) -> tuple[bnnp.Posterior, bool]:
    """Condition afresh whenever the number of points has grown by a tenth; update and reweight in between."""
    grown = n > 1 and math.floor(math.log(n, GROWTH)) > math.floor(math.log(n - 1, GROWTH))
    return (posterior.refresh(x, y) if grown else posterior.update(x, y)), grown


def every_tenth(posterior: bnnp.Posterior, x: Tensor, y: Tensor, n: int) -> tuple[bnnp.Posterior, bool]:
    """Condition afresh at every tenth point; update the last layer in between, the particles' weights staying equal."""
    due = n % EVERY == 0
    return (posterior.refresh(x, y) if due else posterior.update(x, y, reweight=False)), due


def every_point(posterior: bnnp.Posterior, x: Tensor, y: Tensor, n: int) -> tuple[bnnp.Posterior, bool]:
    """Condition afresh at every point, on all points seen."""
    return posterior.refresh(x, y), True


WAYS = {
    "last layer": Way("last layer only (the paper)", last_layer),
    "reweighted": Way("last layer, reweighted", reweighted),
    "resampled": Way("last layer, reweighted, resampled when ESS < S/2", resampled),
    "when few": Way("reweighted, afresh when ESS < S/4", when_few),
    "when grown": Way("reweighted, afresh at every 10 % more points", when_grown),
    "every tenth": Way("afresh at every tenth point", every_tenth),
    "every point": Way("afresh at every point", every_point, costly=True),
}


def in_order(x: Tensor, y: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """Return the points as they came ("random"), or sorted by the first column of x, ties by the next ("increasing")."""
    if order == "random":
        return x, y
    index = torch.from_numpy(np.lexsort(tuple(x.numpy().T[::-1])))
    return x[index], y[index]


def follow(model: bnnp.BNNP, way: Way, x: Tensor, y: Tensor, start: int, particles: int) -> dict[str, Any]:
    """Condition on the first `start` points, then predict and take in the others one by one.

    Arguments:
        model: the learned network.
        way: of taking them in.
        x: points of one task in the order of the stream, with shape (N, d_x).
        y: outputs with shape (N, d_y).
        start: size of the first context.
        particles: S.

    Returns:
        For each point of the stream the log density given the points before it ("log_prob"), the effective sample size after it
        ("ess") and the processor seconds to take it in ("seconds"); the mean seconds of a prediction ("predict_seconds"), the number of
        points at which the posterior was conditioned afresh ("afresh") and how many different particles are left ("distinct").
    """
    posterior = model.condition(x[:start], y[:start], num_samples=particles)
    found: dict[str, list[float]] = {"log_prob": [], "ess": [], "seconds": []}
    afresh, predicting = 0, 0.0
    for n in range(start, len(x)):
        x_n, y_n = x[n : n + 1], y[n : n + 1]
        begun = time.process_time()
        found["log_prob"].append(float(posterior.predict(x_n).log_prob(y_n)))
        predicted = time.process_time()
        posterior, fresh = way.step(posterior, x_n, y_n, n + 1)
        found["seconds"].append(time.process_time() - predicted)
        found["ess"].append(float(posterior.effective_sample_size))
        predicting += predicted - begun
        afresh += fresh
    distinct = len(torch.unique(posterior.particles.weights[0].flatten(1), dim=0))
    return {**found, "predict_seconds": predicting / (len(x) - start), "afresh": afresh, "distinct": distinct}


def oracle(process: GaussianProcess, x: Tensor, y: Tensor, start: int) -> list[float]:
    """Return log p(y_n | y_1 ... y_{n-1}) of a Gaussian process for every n from `start` on.

    One factorisation has them all: with R R^T = K + noise^2 I and z = R^{-1} (y - mean), it is log N(z_n; 0, 1) - log R_nn.
    """
    x, y = x.double(), y.double()
    R = cholesky(process.kernel(x, x) + process.noise_std**2 * torch.eye(len(x), dtype=x.dtype))
    z = solve_lower(R, y - process.mean(x)).squeeze(-1)
    each = -0.5 * z**2 - R.diagonal().log() - 0.5 * math.log(2 * math.pi)
    return each[start:].tolist()
