"""Laplace is exact where the network is linear, and is the exact posterior of the network's expansion elsewhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.engines import gaussian_target, linear_problem, moment_errors
from tests.laws import COMBINATIONS, Combination, randn
from torch import Tensor

import bnnp
from bnnp.inference import Functional, functional, laplace, linearised, run

BUILDS = {"full": laplace.build, "diagonal": laplace.build_diagonal, "last_layer": laplace.build_last_layer}
WHOLE = [c for c in COMBINATIONS if c.fraction == 1.0 and not c.options and c.last == "exact"]


def finished(target: Functional, structure: str = "full", seed: int = 0, **settings: Any) -> tuple[Any, laplace.State]:
    engine = laplace.build(target, structure=structure, **settings)
    state = engine.init(seed)
    for _ in range(engine.num_updates):
        state = engine.update(state)
    return engine, state


def small(points: int = 5, num_tasks: int = 2, likelihood: bnnp.likelihoods.Likelihood | None = None) -> Functional:
    likelihood = bnnp.Gaussian(0.3, learn_noise=False) if likelihood is None else likelihood
    model = bnnp.BNNP(1, 1, hidden=(4,), activation="tanh", seed=1, likelihood=likelihood).double()
    g = torch.Generator().manual_seed(3)
    x = randn(num_tasks, points, 1, generator=g)
    y = torch.sin(3 * x) + 0.2 * randn(num_tasks, points, 1, generator=g)
    return functional(model, x, (y > 0).double() if likelihood.labels else y.round().abs() if likelihood.discrete else y)


def test_it_is_exact_for_a_linear_network() -> None:
    exact = linear_problem()
    inference = run(exact.target, laplace.build, steps=200, num_samples=4000)
    torch.testing.assert_close(inference.report["log_evidence"], exact.log_evidence, rtol=0, atol=1e-6)  # the noise is kept in float32
    assert float(inference.report["decrement"].max()) < 1e-15
    assert max(moment_errors(inference.draws.eps, exact.mean, exact.cov, 4000)) < 4.5
    assert inference.posterior is not None
    predictive = inference.posterior.predict(exact.x)
    assert float(((predictive.mean.squeeze(-1) - exact.f_mean).abs() / (exact.f_std / 4000**0.5)).max()) < 4.5
    torch.testing.assert_close(predictive.epistemic_std.squeeze(-1), exact.f_std, rtol=5 * 8000**-0.5, atol=0)
    # All of a linear network is its last layer.
    engine, state = finished(exact.target, "last_layer", steps=100)
    assert engine.name == "laplace_last_layer"
    torch.testing.assert_close(state.curvature.covariance.squeeze(1), exact.cov, rtol=1e-6, atol=0)  # type: ignore[union-attr]


def written_out(F: Functional, eps: Tensor, noise: float) -> Tensor:
    """M of one task by loops: I + sum over points of gradient gradient^T / noise^2."""
    M = torch.eye(F.dim, dtype=torch.float64)
    at = eps.clone().requires_grad_()
    f = F.outputs(at).squeeze(-1)
    for n in range(len(f)):
        (g,) = torch.autograd.grad(f[n], at, retain_graph=True)
        M = M + torch.outer(g, g) / noise**2
    return M


@pytest.mark.parametrize("points", [5, 40])
def test_the_precision_is_that_of_gauss_and_newton_in_both_spaces(points: int) -> None:
    F = small(points)
    _, state = finished(F, steps=30)
    _, diagonal = finished(F, "diagonal", steps=30, newton=0)
    _, last = finished(F, "last_layer", steps=30)
    assert state.mode is not None
    assert diagonal.mode is not None
    assert last.mode is not None
    assert diagonal.precision is not None
    for s in (state, last):
        assert s.curvature is not None
        assert (s.curvature.B is None) == (points >= s.curvature.m.shape[-2])
    for t in range(2):
        noise = float(F.likelihood.noise_std)
        cov = state.curvature.covariance[t, 0]  # type: ignore[union-attr]
        M = written_out(F.task(t), state.mode[t], noise)
        torch.testing.assert_close(cov, M.inverse(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(diagonal.precision[t], written_out(F.task(t), diagonal.mode[t], noise).diagonal())
        M_last = written_out(F.task(t), last.mode[t], noise)[-5:, -5:]
        torch.testing.assert_close(last.curvature.covariance[t, 0], M_last.inverse(), rtol=1e-9, atol=1e-12)  # type: ignore[union-attr]


def test_chunks_of_points_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for points in (5, 40):
        F = small(points)
        eps = randn(2, F.dim, generator=torch.Generator().manual_seed(0))
        whole = laplace._dense(F, eps, 3)
        monkeypatch.setattr(laplace, "CHUNK", 2 * (F.dim - 3) * 3)
        torch.testing.assert_close(laplace._dense(F, eps, 3).covariance, whole.covariance)
        monkeypatch.undo()


def test_draws_have_the_moments_of_each_structure() -> None:
    for points in (5, 40):
        F = small(points)
        for structure in laplace.STRUCTURES:
            engine, state = finished(F, structure, steps=100, newton=2)
            eps = engine.sample(state, 4000, 0).eps
            assert state.mode is not None
            if state.precision is not None:
                cov, first = torch.diag_embed(1 / state.precision), 0
            else:
                assert state.curvature is not None
                cov = state.curvature.covariance.squeeze(1)
                first = F.dim - cov.shape[-1]
            assert bool((eps[..., :first] == state.mode[:, :first]).all())
            assert max(moment_errors(eps[..., first:], state.mode[:, first:], cov, 4000)) < 4.5


def test_the_expansion_is_linear_and_has_its_posterior() -> None:
    """The Gaussian is the exact posterior of the expanded network: the log-joint of the expansion is quadratic with that precision."""
    F = small(8)
    _, state = finished(F, steps=1200, newton=2)
    assert state.mode is not None
    assert state.curvature is not None
    L = linearised(F, state.mode)
    torch.testing.assert_close(L.outputs(state.mode), F.outputs(state.mode))
    eps = randn(6, 2, F.dim, generator=torch.Generator().manual_seed(0))
    slope = torch.einsum("tnfad,sad->stnf", torch.func.jacrev(F.outputs)(state.mode), eps - state.mode)
    torch.testing.assert_close(L.outputs(eps), F.outputs(state.mode) + slope)
    gaussian = torch.distributions.MultivariateNormal(state.mode, state.curvature.covariance.squeeze(1))
    differences = L.log_joint(eps) - gaussian.log_prob(eps)
    torch.testing.assert_close(differences, differences[:1].expand(6, -1), rtol=0, atol=1e-6)
    found = laplace.report(state, target=F)
    torch.testing.assert_close(found["log_evidence"], differences[0], rtol=0, atol=1e-6)
    assert float(found["decrement"].max()) < 1e-9


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_the_expansion_under_every_prior(case: Combination) -> None:
    model, tasks = case.build(), case.tasks((5, 3))
    F = functional(model, [x for x, _ in tasks], [y for _, y in tasks], component=1 if case.kind == "mixture" else None)
    g = torch.Generator().manual_seed(0)
    mode, off = randn(2, F.dim, generator=g), 1e-4 * randn(3, 2, F.dim, generator=g)
    L = linearised(F, mode)
    # First order: what is left falls with the square of the distance.
    left = [(F.outputs(mode + s * off) - L.outputs(mode + s * off)).abs().max() for s in (1.0, 2.0)]
    assert 3.5 < float(left[1] / left[0]) < 4.5
    f = L.posterior(mode + off).predict(tasks[0][0][:2]).mean
    assert bool(f.isfinite().all())


def test_draws_predict_through_the_expansion_unless_told_otherwise() -> None:
    F = small(8).task(0)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    found = run(F, laplace.build, steps=200, num_samples=50)
    assert found.posterior is not None
    mode = finished(F.batched, steps=200)[1].mode
    assert mode is not None
    own = linearised(F, mode[0]).predict(found.draws.eps.squeeze(1), x)
    torch.testing.assert_close(found.posterior.predict(x).mean, own.mean)
    through = run(F, laplace.build, steps=200, num_samples=50, linearised=False)
    assert through.posterior is not None
    assert torch.equal(through.draws.eps, found.draws.eps)
    torch.testing.assert_close(through.posterior.predict(x).mean, F.predict(found.draws.eps.squeeze(1), x).mean)
    assert not torch.allclose(through.posterior.predict(x).mean, own.mean)


@pytest.mark.parametrize(
    "likelihood",
    [
        bnnp.Bernoulli(),
        bnnp.Poisson(),
        bnnp.StudentT(),
        bnnp.Heteroscedastic(),
        bnnp.MultivariateGaussian(),
        bnnp.NegativeBinomial(),
    ],
    ids=lambda l: type(l).__name__,
)
def test_the_noise_enters_by_the_hessian_of_any_likelihood(likelihood: bnnp.likelihoods.Likelihood) -> None:
    F = small(6, likelihood=likelihood)
    f = 0.7 * randn(2, 6, likelihood.f_dim(1), generator=torch.Generator().manual_seed(0))
    root = laplace._root_precision(F, f)
    for t in range(2):
        for n in range(6):

            def log_prob(at: Tensor, t: int = t, n: int = n) -> Tensor:
                return F.likelihood.log_prob(at, F.scaled.y[t, n])

            values, vectors = torch.linalg.eigh(-torch.autograd.functional.hessian(log_prob, f[t, n]))
            want = vectors @ torch.diag(values.clamp(min=0)) @ vectors.T
            torch.testing.assert_close(root[t, n] @ root[t, n].T, want, rtol=1e-8, atol=1e-10)
    inference = run(F, laplace.build, steps=100, num_samples=20)
    assert bool(inference.report["log_evidence"].isfinite().all())
    assert bool((inference.report["log_evidence"] < inference.report["log_joint"] + 0.5 * F.dim * math.log(2 * math.pi)).all())


def test_the_evidence_of_labels_is_near_that_of_quadrature() -> None:
    """One weight and a bias, many labels: the posterior is nearly Gaussian."""
    model = bnnp.BNNP(1, 1, hidden=(), likelihood=bnnp.Bernoulli()).double()
    x = torch.linspace(-2, 2, 60, dtype=torch.float64)[:, None]
    F = functional(model, x, (x > 0.2 * torch.sin(40 * x)).double())
    grid = torch.linspace(-9, 9, 361, dtype=torch.float64)
    whole = F.log_joint(torch.cartesian_prod(grid, grid)).logsumexp(0) + 2 * math.log(0.05)
    found = run(F, laplace.build, steps=300).report["log_evidence"]
    assert abs(float(found - whole)) < 0.1
    torch.testing.assert_close(run(F, BUILDS["diagonal"], steps=300).report["log_evidence"], found, rtol=0, atol=0.5)


@pytest.mark.parametrize("structure", laplace.STRUCTURES)
def test_many_tasks_are_a_loop_over_tasks(structure: str) -> None:
    F = small(7, num_tasks=3)
    start = randn(2, 3, F.dim, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"steps": 60, "members": 2}
    _, state = finished(F, structure, start=start, **settings)
    whole = laplace.report(state, target=F)
    for t in range(3):
        one = F.task(t).batched
        _, alone = finished(one, structure, start=start[:, t : t + 1], **settings)
        torch.testing.assert_close(alone.mode, state.mode[t : t + 1])  # type: ignore[index]
        for name, value in laplace.report(alone, target=one).items():
            torch.testing.assert_close(value, whole[name][t : t + 1], rtol=1e-6, atol=1e-9)
    a, b = (run(F, BUILDS[structure], num_samples=5, **settings).draws.eps for _ in range(2))
    assert torch.equal(a, b)


def test_points_that_are_padding_say_nothing() -> None:
    model = bnnp.BNNP(1, 1, hidden=(4,), seed=1).double()
    x, y = torch.zeros(2, 6, 1, dtype=torch.float64), torch.full((2, 6, 1), 1e9, dtype=torch.float64)
    x[:, :4] = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
    y[:, :4] = x[:, :4] ** 2
    mask = (torch.arange(6) < 4).expand(2, 6).clone()
    padded, plain = functional(model, x, y, mask), functional(model, x[:, :4], y[:, :4])
    a, b = (run(F, laplace.build, steps=50, num_samples=3) for F in (padded, plain))
    torch.testing.assert_close(a.report["log_evidence"], b.report["log_evidence"])


def test_no_points_leave_the_prior() -> None:
    F = small(0)
    found = run(F, laplace.build, steps=400)
    torch.testing.assert_close(found.report["log_evidence"], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float((found.draws.eps.square().mean() - 1).abs()) < 5 * math.sqrt(2 / found.draws.eps.numel())


def test_wrong_settings_are_named() -> None:
    F = small()
    with pytest.raises(TypeError, match="Expected a functional, whose outputs have a Jacobian"):
        laplace.build(gaussian_target())
    model = bnnp.BNNP(1, 1, hidden=(4,))
    collapsed = functional(model, [[0.0]], [[1.0]], collapse=True)
    for attempt in (lambda: laplace.build(collapsed), lambda: linearised(collapsed, torch.zeros(collapsed.dim))):
        with pytest.raises(ValueError, match="Expected a functional that holds all layers"):
            attempt()
    with pytest.raises(ValueError, match="Expected structure as one of full, diagonal, last_layer"):
        laplace.build(F, structure="kron")
    with pytest.raises(ValueError, match="Expected newton as a positive integer"):
        laplace.build(F, newton=-1)
    with pytest.raises(ValueError, match="Expected eps with shape"):
        linearised(F, torch.zeros(F.dim))
    engine = laplace.build(F)
    with pytest.raises(ValueError, match="Call update more often"):
        engine.sample(engine.init(0), 3, 0)
    L = linearised(F, torch.zeros(2, F.dim))
    with pytest.raises(ValueError, match=r"Expected weights of all layers and of the 2 task\(s\)"):
        L.task(0).log_joint(torch.zeros(3, F.dim, dtype=torch.float64))
