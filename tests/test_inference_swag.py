"""SWAG: its Gaussian is that of the iterates collected, and the iterates have the covariance that is derived."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engines import gaussian_target, moment_errors
from tests.test_inference_stochastic import COPIES, batch_noise, copies, stationary

from bnnp.inference import run, swag


def test_moments_are_those_of_the_iterates() -> None:
    target = gaussian_target()
    engine = swag.build(target, members=2, climb=30, steps=60, every=4, rank=15, batch_size=3)
    state, collected = engine.init(0), []
    for i in range(engine.num_updates):
        state = engine.update(state)
        if i >= 30 and (i - 30) % 4 == 3:
            collected.append(state.ascent.eps)
    mean, variance, D = swag.moments(state)
    assert state.count == len(collected) == 15
    for m in range(2):
        for t in range(2):
            rows = torch.stack([eps[m, t] for eps in collected])
            torch.testing.assert_close(mean[m, t], rows.mean(0))
            torch.testing.assert_close(variance[m, t], rows.var(0))
            torch.testing.assert_close(D[m, t] @ D[m, t].mT / 14, rows.T.cov())


def test_draws_have_the_covariance_of_the_docstring() -> None:
    target = gaussian_target()
    engine = swag.build(target, members=1, climb=30, steps=200, every=4, rank=5, batch_size=3)
    state = engine.init(0)
    for _ in range(engine.num_updates):
        state = engine.update(state)
    mean, variance, D = (t[0] for t in swag.moments(state))
    cov = torch.diag_embed(variance) / 2 + D @ D.mT / 8
    draws = engine.sample(state, 4000, 0).eps
    assert max(moment_errors(draws, mean, cov, 4000)) < 4.5
    # Members share the draws.
    many = swag.build(target, members=3, climb=30, steps=200, every=4, rank=5, batch_size=3)
    state = many.init(0)
    for _ in range(many.num_updates):
        state = many.update(state)
    means, found = swag.moments(state)[0], many.sample(state, 3000, 0).eps
    for m in range(3):
        torch.testing.assert_close(found[m::3].mean(0), means[m], rtol=0, atol=5 * float(found.std(0).max()) / 1000**0.5)


def test_iterates_spread_as_derived_and_not_as_the_posterior() -> None:
    target = copies()
    engine = swag.build(target, climb=200, steps=100, every=10, rank=2, batch_size=3)
    state = engine.init(0)
    for _ in range(engine.num_updates):
        state = engine.update(state)
    P, C = target.cov[0].inverse(), batch_noise(target, 3)
    eye = torch.eye(3, dtype=torch.float64)
    laws = torch.stack([stationary(eye - h * P, h**2 * C) for h in engine.report(state)["step_size"]])
    off = state.ascent.eps[0] - target.mean
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(laws), off.unsqueeze(-1), upper=False).squeeze(-1)
    assert max(moment_errors(whitened.unsqueeze(1), torch.zeros(1, 3).double(), eye.unsqueeze(0), COPIES)) < 5
    assert moment_errors(off.unsqueeze(1), torch.zeros(1, 3).double(), target.cov[:1], COPIES)[1] > 7


def test_the_mean_is_that_of_the_posterior_and_all_points_spread_nothing() -> None:
    target = gaussian_target()
    inference = run(target, swag.build, climb=500, batch_size=6, num_samples=100)
    torch.testing.assert_close(inference.draws.eps.mean(0), target.mean, rtol=0, atol=0.15)
    whole = run(target, swag.build, climb=500, steps=40, every=2, batch_size=None, num_samples=10)
    assert float(whole.draws.eps.std(0).max()) < 1e-3


def test_tasks_never_meet_and_seeds_decide() -> None:
    a, b = gaussian_target(), gaussian_target()
    b.mean[1] += 1
    settings: dict[str, Any] = {"members": 2, "climb": 20, "steps": 40, "rank": 3, "num_samples": 8, "batch_size": 4}
    draws = [run(t, swag.build, **settings).draws.eps for t in (a, a, b)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0][:, 0], draws[2][:, 0])
    assert not torch.equal(draws[0][:, 1], draws[2][:, 1])


def test_wrong_settings_are_named() -> None:
    target = gaussian_target()
    for settings, words in (
        ({"rank": 1}, "Expected rank from 2"),
        ({"steps": 50, "rank": 6}, "Expected rank from 2 to steps // every = 5"),
        ({"rate": 2.0}, "Expected rate below 2"),
        ({"climb": 0}, "Expected climb as a positive integer"),
    ):
        with pytest.raises(ValueError, match=words):
            swag.build(target, **settings)
    engine = swag.build(target)
    with pytest.raises(ValueError, match="Call update more often"):
        engine.sample(engine.init(0), 3, 0)
