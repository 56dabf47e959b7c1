"""Simulation-based calibration: with data drawn from the model's own prior, an exact posterior ranks the truth uniformly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bnnp.networks import BNNP
from laws import randn
from test_networks import build


def ranks(model: BNNP, count: int, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ranks of the true function value among posterior draws, and the PIT of a new observation, each with shape (count,)."""
    g = torch.Generator().manual_seed(seed)
    x = 2 + 3 * randn(8, 2, generator=g)
    truth = model.prior_samples(x, count, seed=seed)
    noise = model.noise_std
    assert noise is not None
    y = truth + noise * randn(*truth.shape, generator=g)
    found, pit = [], []
    for i in range(count):  # one by one: tasks of a batch share their random numbers, so their ranks would not be independent
        p = model.condition(x[:7], y[i, :7], num_samples=1, seed=i).predict(x[7:])
        f = p.sample(draws, noisy=False, seed=seed + 1 + i)
        found.append((f < truth[i, 7:]).sum(0).flatten()[0])
        pit.append(p.cdf(y[i, 7:]).flatten()[0])
    return torch.stack(found), torch.stack(pit)


def distance_from_uniform(values: Tensor) -> float:
    """Kolmogorov-Smirnov distance, in units of its 95 % bound."""
    ordered = values.sort().values
    n = len(ordered)
    steps = torch.arange(n + 1, dtype=ordered.dtype) / n
    return float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max()) / (1.358 / math.sqrt(n))


def check(count: int) -> None:
    model = build(hidden=(), y_dim=1)
    rank, pit = ranks(model, count, 63, 5)
    jitter = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert distance_from_uniform((rank + jitter) / 64) < 1.3
    assert distance_from_uniform(pit) < 1.3


def test_an_exact_posterior_is_calibrated() -> None:
    check(250)


@pytest.mark.slow
def test_an_exact_posterior_is_calibrated_to_two_digits() -> None:
    check(5000)


def test_a_posterior_that_is_too_sure_is_found_out() -> None:
    """The same check, of a model that believes in half the noise there is, fails."""
    model = build(hidden=(), y_dim=1)
    _, pit = ranks(model, 250, 63, 5)
    shrunk = torch.special.ndtr(2.0 * torch.special.ndtri(pit.clamp(1e-9, 1 - 1e-9)))
    assert distance_from_uniform(shrunk) > 1.3
