"""Ensembles: plain members sit at modes; anchored ones are draws of a linear network's posterior."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engines import gaussian_target, linear_problem, moment_errors

import bnnp
from bnnp.inference import ensemble, functional, run


def problem(num_tasks: int = 3, **settings: Any) -> Any:
    model = bnnp.BNNP(1, 1, hidden=(6,), seed=1).double()
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None].expand(num_tasks, 7, 1)
    y = torch.sin(3 * x) + torch.arange(num_tasks).reshape(-1, 1, 1)
    return functional(model, x, y, **settings), x, y


def test_plain_members_are_at_the_mode_of_a_gaussian() -> None:
    target = gaussian_target()
    inference = run(target, ensemble.build, members=5, steps=800, num_samples=5)
    torch.testing.assert_close(inference.draws.eps, target.mean.expand(5, -1, -1), rtol=0, atol=1e-4)
    torch.testing.assert_close(inference.report["log_joint"], target.log_joint(target.mean), rtol=0, atol=1e-6)


def test_anchored_members_are_draws_of_a_linear_network() -> None:
    exact = linear_problem()
    inference = run(exact.target, ensemble.build, members=2000, steps=500, anchored=True, num_samples=2000)
    assert max(moment_errors(inference.draws.eps, exact.mean, exact.cov, 2000)) < 4.5
    # Plain members have no spread: the test can tell.
    plain = run(exact.target, ensemble.build, members=2000, steps=500, num_samples=2000)
    assert moment_errors(plain.draws.eps, exact.mean, exact.cov, 2000)[1] > 20
    # Tasks have noise of their own.
    a, b = ((inference.draws.eps[:, t] - exact.mean[t]) @ torch.linalg.cholesky(exact.cov[t].inverse()) for t in range(2))
    assert float((a.mT @ b / 2000).abs().max()) < 4.5 / 2000**0.5


@pytest.mark.parametrize("anchored", [False, True])
def test_members_climb_whatever_the_other_tasks_are(anchored: bool) -> None:
    (F, x, y), settings = problem(), {"members": 3, "steps": 60, "anchored": anchored, "num_samples": 3}
    moved = y.clone()
    moved[1] += 1
    other = functional(bnnp.BNNP(1, 1, hidden=(6,), seed=1).double(), x, moved)
    a, b = (run(f, ensemble.build, **settings).draws.eps for f in (F, other))
    assert torch.equal(a, run(F, ensemble.build, **settings).draws.eps)
    assert torch.equal(a[:, [0, 2]], b[:, [0, 2]])
    assert not torch.equal(a[:, 1], b[:, 1])


def test_many_tasks_are_a_loop_over_tasks() -> None:
    F, _, _ = problem()
    start = torch.randn(2, 3, F.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = {"members": 2, "steps": 50, "num_samples": 2}
    whole = run(F, ensemble.build, start=start, **settings).draws.eps
    for t in range(3):
        torch.testing.assert_close(run(F.task(t), ensemble.build, start=start[:, t : t + 1], **settings).draws.eps, whole[:, t : t + 1])


def test_batches_lead_to_the_same_mode() -> None:
    target = gaussian_target()
    inference = run(target, ensemble.build, members=2, steps=1500, batch_size=6, num_samples=2)
    torch.testing.assert_close(inference.draws.eps, target.mean.expand(2, -1, -1), rtol=0, atol=0.1)


def test_every_member_is_drawn_as_often_as_the_others() -> None:
    F, _, _ = problem()
    inference = run(F, ensemble.build, members=3, steps=10, num_samples=7)
    found, counts = torch.unique(inference.draws.eps[:, 0], dim=0, return_counts=True)
    assert len(found) == 3
    assert sorted(counts.tolist()) == [2, 2, 3]
    assert inference.gradients == 30


def test_wrong_settings_are_named() -> None:
    F, x, y = problem()
    with pytest.raises(TypeError, match="Expected a functional for anchored=True"):
        ensemble.build(gaussian_target(), anchored=True)
    for f in (problem(collapse=True)[0], functional(bnnp.BNNP(1, 1, likelihood=bnnp.Bernoulli()), x, (y > 0).double())):
        with pytest.raises(ValueError, match="Expected a Gaussian likelihood, collapse=False"):
            ensemble.build(f, anchored=True)
    with pytest.raises(ValueError, match="Expected members as a positive integer"):
        ensemble.build(F, members=0)
    with pytest.raises(ValueError, match="Expected batch_size=None with collapse=True"):
        ensemble.build(problem(collapse=True)[0], batch_size=3)
