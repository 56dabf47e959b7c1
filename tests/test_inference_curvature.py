"""Moves in the metric of sensitivities: these are the derivatives of f, and the moves leave the posterior as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engines import gaussian_target, linear_problem, moment_errors
from tests.laws import COMBINATIONS, Combination
from torch import Tensor

import bnnp
from bnnp.inference import Functional, functional, run, smc
from bnnp.inference.curvature import Metric, check_metric, move, sensitivities
from bnnp.seeds import seeded

INDEPENDENT = [c for c in COMBINATIONS if c.kind not in ("mixture", "heavy_tailed", "network") and c.last == "exact" and not c.options]


def made(case: Combination, collapse: bool = False, **settings: Any) -> Functional:
    tasks = case.tasks((5, 3))
    return functional(case.build(**settings), [x for x, _ in tasks], [y for _, y in tasks], collapse=collapse)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("case", INDEPENDENT, ids=str)
def test_sensitivities_are_derivatives_of_the_outputs(case: Combination, residual: bool) -> None:
    F = made(case, residual=residual, hidden=(3, 3))
    eps = torch.randn(2, 2, F.dim, generator=seeded(0, "eps"), dtype=torch.float64)
    J = sensitivities(F, eps)
    noise = F.likelihood.noise_std
    for s in range(2):
        for t in range(2):

            def f(e: Tensor, s: int = s, t: int = t) -> Tensor:
                return F.task(t).outputs(e) / noise

            want = torch.autograd.functional.jacobian(f, eps[s, t]).flatten(0, 1)
            n = int(F.counts[t]) * 2
            torch.testing.assert_close(J[s, t, :n], want[:n])
            assert bool((J[s, t, n:] == 0).all())


@pytest.mark.parametrize("case", INDEPENDENT, ids=str)
def test_a_last_layer_that_is_integrated_out_makes_noise_of_what_it_can_explain(case: Combination) -> None:
    """J^T J = J_h^T (I + J_l J_l^T)^{-1} J_h, J_h and J_l those of all layers at the mean of the last given the others."""
    whole, F = made(case), made(case, collapse=True)
    eps = torch.randn(2, 2, F.dim, generator=seeded(0, "eps"), dtype=torch.float64)
    posterior = F.posterior(eps).particles
    assert posterior.last is not None
    last = posterior.given.weights(posterior.last.mean)
    both = whole.eps((*F.weights(eps), last))
    if case.kind != "low_rank":
        torch.testing.assert_close(both[..., : F.dim], eps)
    J = sensitivities(whole, torch.cat([eps, both[..., F.dim :]], -1))
    hidden, own = J[..., : F.dim], J[..., F.dim :]
    K = torch.eye(J.shape[-2], dtype=torch.float64) + own @ own.mT
    found = sensitivities(F, eps)
    torch.testing.assert_close(found.mT @ found, hidden.mT @ torch.linalg.solve(K, hidden))


def test_the_metric_is_the_matrix_written_out() -> None:
    g = seeded(0, "metric")
    B, c = torch.randn(3, 2, 4, 6, generator=g, dtype=torch.float64), torch.tensor([1.5, 3.0]).double()
    metric, p = Metric.of(B, c), torch.randn(3, 2, 6, generator=g, dtype=torch.float64)
    dense = c[:, None, None] * torch.eye(6, dtype=torch.float64) + B.mT @ B
    torch.testing.assert_close(metric.solve(p), torch.linalg.solve(dense, p))
    many = Metric.of(B[:1].expand(20_000, 2, 4, 6), c).draw(g)
    torch.testing.assert_close(torch.einsum("sti,stj->tij", many, many) / 20_000, dense[0], rtol=0.15, atol=0.4)


def moved(F: Functional, eps: Tensor, tau: float, times: int, broken: bool = False) -> Tensor:
    path, g = smc._Path(F, None).value_and_grad, seeded(1, "moves")
    b, spread = torch.ones(F.num_tasks, dtype=torch.float64), torch.full((F.num_tasks,), tau, dtype=torch.float64)
    for _ in range(times):
        found = move(F, lambda e, t: path(e, 0.7 * t if broken else t), eps, b, spread, g)
        eps = found[0]
        assert float(found[2].mean()) > 0.5
    return eps


@pytest.mark.parametrize("tau", [0.2, 1.0, 8.0])
def test_moves_lead_to_the_posterior_and_stay_there(tau: float) -> None:
    p = linear_problem()
    z = torch.randn(1500, *p.mean.shape, generator=seeded(0, "start"), dtype=torch.float64)
    exact = p.mean + (torch.linalg.cholesky(p.cov) @ z.unsqueeze(-1)).squeeze(-1)
    assert max(moment_errors(moved(p.target, exact, tau, 4), p.mean, p.cov, 1500)) < 4.5
    if tau >= 1:
        assert max(moment_errors(moved(p.target, z, tau, 12), p.mean, p.cov, 1500)) < 4.5
        assert max(moment_errors(moved(p.target, z, tau, 12, broken=True), p.mean, p.cov, 1500)) > 4.5


def test_moves_leave_the_posterior_of_a_network_as_it_is() -> None:
    """Draws weighted by importance from the prior, then moved: what was expected of them does not change."""
    model = bnnp.BNNP(1, 1, hidden=(2,), prior="diagonal", activation="tanh", likelihood=bnnp.Gaussian(0.5, learn_noise=False)).double()
    F = functional(model, [[[-1.0], [0.0], [1.0]]], [[[-0.5], [0.4], [0.2]]])
    eps = torch.randn(20_000, 1, F.dim, generator=seeded(0, "prior"), dtype=torch.float64)
    W = F.log_likelihood(eps).softmax(0)
    index = torch.multinomial(W.squeeze(-1), 6000, replacement=True, generator=seeded(0, "pick"))
    before = F.monitor(eps[index])
    after = F.monitor(moved(F, eps[index], 0.7, 5))
    effective = float(1 / W.square().sum())
    error = (before.var(0) * (1 / min(effective, 6000) + 1 / 6000)).sqrt()
    assert float(((after.mean(0) - before.mean(0)).abs() / error).max()) < 4.5
    assert (
        float(((after.square().mean(0) - before.square().mean(0)).abs() / (before.square().var(0) / min(effective, 6000) * 2).sqrt()).max())
        < 4.5
    )


def test_tempering_with_curvature_finds_the_evidence() -> None:
    p = linear_problem(noise=0.05)
    r = run(p.target, smc.build, num_samples=4, num_particles=40, num_populations=4, curvature=True, num_moves=1, seed=0).report
    assert bool(((r["log_evidence"] - p.log_evidence).abs() < 4.5 * r["log_evidence_se"]).all())
    assert float(r["log_evidence_se"].max()) < 0.5


def test_what_has_no_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected independent Gaussian noise"):
        check_metric(functional(Combination("per_unit", "drawn", False).build(), [[0.0, 1.0]], [[1.0, 0.0]]))
    with pytest.raises(ValueError, match="layers are independent and Gaussian"):
        smc.build(functional(Combination("network", "exact", True).build(), [[0.0, 1.0]], [[1.0, 2.0]]), curvature=True)
    with pytest.raises(TypeError, match="Expected a functional for curvature=True"):
        smc.build(gaussian_target(), curvature=True)
