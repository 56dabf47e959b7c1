"""Chains on stochastic gradients: their stationary law is the one their docstrings derive, with batches and without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.engines import GaussianTarget, gaussian_target, linear_problem, moment_errors
from torch import Tensor

from bnnp.inference import Target, run, sghmc, sgld
from bnnp.inference.ascent import begin, stiffness
from bnnp.seeds import seeded

ENGINES: dict[str, Callable[..., Any]] = {"sgld": sgld.build, "sghmc": sghmc.build}
COPIES = 800
FRICTION = 2.0


def copies(n: int = COPIES) -> GaussianTarget:
    """The same problem many times: as tasks, each draws batches of its own."""
    one = gaussian_target(dim=3, num_tasks=1)
    return GaussianTarget(*(t.expand(n, *t.shape[1:]) for t in (one.mean, one.cov, one.log_z, one.shares)))


def batch_noise(target: GaussianTarget, size: int) -> Tensor:
    """Covariance of the gradient of N / b times the sum over b of N points, drawn without replacement."""
    shares, N = target.shares[0], target.shares.shape[1]
    return N**2 / size * (1 - size / N) * (shares.mT @ shares) / (N - 1)


def stationary(A: Tensor, Q: Tensor) -> Tensor:
    """S = A S A^T + Q, by brute force."""
    k = len(A)
    whole = torch.eye(k * k, dtype=A.dtype) - torch.kron(A, A)
    return torch.linalg.solve(whole, Q.flatten()).reshape(k, k)


def sgld_law(P: Tensor, C: Tensor, h: Tensor) -> Tensor:
    eye = torch.eye(len(P), dtype=P.dtype)
    return stationary(eye - h * P, 2 * h * eye + h**2 * C)


def sghmc_law(P: Tensor, C: Tensor, h: Tensor) -> Tensor:
    """The linear map of (eps, p), part after part."""
    d = len(P)
    eye, O = torch.eye(d, dtype=P.dtype), torch.zeros(d, d, dtype=P.dtype)
    a = (-FRICTION * h).exp()
    B = torch.cat([torch.cat([eye, O], 1), torch.cat([-h * P, eye], 1)])
    half = torch.cat([torch.cat([eye, h / 2 * eye], 1), torch.cat([O, eye], 1)])
    keep = torch.cat([torch.cat([eye, O], 1), torch.cat([O, a * eye], 1)])
    of_batch = torch.cat([torch.cat([O, O], 1), torch.cat([O, h**2 * C], 1)])
    of_friction = torch.cat([torch.cat([O, O], 1), torch.cat([O, (1 - a**2) * eye], 1)])
    after = half @ keep @ half
    Q = after @ of_batch @ after.mT + half @ of_friction @ half.mT
    return stationary(after @ B, Q)[:d, :d]


LAWS = {"sgld": sgld_law, "sghmc": sghmc_law}
RATES = {"sgld": 0.8, "sghmc": 1.2}


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("name", LAWS)
def test_draws_have_the_covariance_that_is_derived(name: str, batch_size: int | None) -> None:
    target = copies()
    engine = ENGINES[name](target, num_chains=1, climb=30, warmup=120, steps=4, thin=1, rate=RATES[name], batch_size=batch_size)
    state = engine.init(0)
    for _ in range(engine.num_updates):
        state = engine.update(state)
    end = state.chains.kept[-1][0]  # one draw of each copy
    P = target.cov[0].inverse()
    C = torch.zeros_like(P) if batch_size is None else batch_noise(target, batch_size)
    laws = torch.stack([LAWS[name](P, C, h) for h in engine.report(state)["step_size"]])
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(laws), (end - target.mean).unsqueeze(-1), upper=False).squeeze(-1)
    eye = torch.eye(target.dim, dtype=torch.float64).unsqueeze(0)
    assert max(moment_errors(whitened.unsqueeze(1), torch.zeros(1, target.dim).double(), eye, COPIES)) < 5
    # The law is not that of the posterior but where it should be, and the test can tell.
    off = moment_errors(end.unsqueeze(1), target.mean[:1], target.cov[:1], COPIES)[1]
    assert off < 5 if (name, batch_size) == ("sghmc", None) else off > 7


@pytest.mark.parametrize("name", ENGINES)
def test_small_steps_recover_the_posterior(name: str) -> None:
    """Many chains from a few steps apart: as many independent draws."""
    problem = linear_problem()
    settings = {"num_chains": 400, "climb": 100, "warmup": 1500, "steps": 4, "thin": 1, "rate": 0.2 if name == "sgld" else 0.5}
    inference = run(problem.target, ENGINES[name], num_samples=1600, **settings)
    errors = moment_errors(inference.draws.eps, problem.mean, problem.cov, 400)
    assert max(errors) < 5
    assert inference.posterior is not None
    predictive = inference.posterior.predict(problem.x)
    assert float(((predictive.mean.squeeze(-1) - problem.f_mean).abs() / (problem.f_std / 20)).max()) < 5
    torch.testing.assert_close(predictive.epistemic_std.squeeze(-1), problem.f_std, rtol=0.18, atol=0)
    assert float((inference.report["temperature"] - 1).abs().max()) < 0.25


@pytest.mark.parametrize("name", ENGINES)
def test_the_report_tells_chains_that_have_mixed_from_those_that_have_not(name: str) -> None:
    target = gaussian_target()
    settings = {"num_chains": 4, "warmup": 200, "thin": 5, "rate": 0.5}
    good = run(target, ENGINES[name], steps=1500, **settings).report
    assert float(good["rhat"].max()) < 1.05
    assert float(good["ess_bulk"].min()) > 60
    assert float(good["ess_tail"].min()) > 40
    apart = torch.linspace(-3, 3, 4, dtype=torch.float64).reshape(4, 1, 1).expand(4, 2, target.dim)
    bad = run(target, ENGINES[name], steps=20, start=apart, **{**settings, "warmup": 0, "thin": 1, "rate": 0.01}).report
    assert float(bad["rhat"].min()) > 1.5


def test_stiffness_is_the_largest_curvature() -> None:
    target = gaussian_target(dim=5, num_tasks=3)
    eps = begin(target, 4, None, seeded(0, "x")).eps
    found, cost = stiffness(target, eps, seeded(0, "y"), rounds=40)
    torch.testing.assert_close(found, torch.linalg.eigvalsh(target.cov.inverse())[:, -1], rtol=1e-3, atol=0)
    assert cost == 80


@pytest.mark.parametrize("name", ENGINES)
def test_tasks_never_meet_and_seeds_decide(name: str) -> None:
    a, b = gaussian_target(num_tasks=2), gaussian_target(num_tasks=2)
    b.mean[1] += 1
    settings = {"num_chains": 2, "climb": 20, "warmup": 10, "steps": 40, "num_samples": 8, "batch_size": 4, "schedule": "cosine"}
    draws = [run(t, ENGINES[name], **settings).draws.eps for t in (a, a, b)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0][:, 0], draws[2][:, 0])
    assert not torch.equal(draws[0][:, 1], draws[2][:, 1])
    assert not torch.equal(draws[0], run(a, ENGINES[name], seed=1, **settings).draws.eps)


def test_steps_fall_along_the_cosine_and_stay() -> None:
    target = gaussian_target()
    engine = sgld.build(target, climb=5, warmup=20, steps=8, thin=2, schedule="cosine")
    plan = engine.update.keywords["plan"]  # type: ignore[attr-defined]
    state, factors = engine.init(0), []
    for _ in range(engine.num_updates):
        state = engine.update(state)
        factors.append(sgld.step_of(state.chains, plan))
    walk = torch.tensor(factors[5:])
    assert walk[0] == 4
    assert bool((walk[:20].diff() < 0).all())
    assert bool((walk[20:] == 1).all())
    assert len(state.chains.kept) == 4


@pytest.mark.parametrize("name", ENGINES)
def test_large_steps_at_first_are_stable_all_the_same(name: str) -> None:
    target = gaussian_target()
    settings = {"num_chains": 2, "climb": 30, "warmup": 100, "steps": 40, "thin": 4, "rate": 1.5, "schedule": "cosine"}
    eps = run(target, ENGINES[name], num_samples=20, **settings).draws.eps
    assert float((eps - target.mean).abs().max()) < 20


@pytest.mark.parametrize("name", ENGINES)
def test_every_chain_gives_as_many_draws(name: str) -> None:
    target = gaussian_target()
    engine = ENGINES[name](target, num_chains=4, climb=0, warmup=0, steps=10, thin=1)
    state = engine.init(0)
    for _ in range(engine.num_updates):
        state = engine.update(state)
    kept = torch.stack(state.chains.kept, dim=1)  # (C, K, T, dim)
    for n in (8, 20):
        eps = engine.sample(state, n, 0).eps
        found = [int((eps[:, None, 0] == kept[None, c, :, 0]).all(-1).sum()) for c in range(4)]
        assert found == [n // 4] * 4


@dataclass(frozen=True, eq=False)
class Walled(GaussianTarget):
    """A posterior that cannot be computed beyond a wall."""

    def log_likelihood(self, eps: Tensor, batch: Tensor | None = None) -> Tensor:
        value = super().log_likelihood(eps, batch)
        return value + torch.where(eps[..., 0] > self.mean[:, 0] + 0.3, torch.nan, 0.0) * eps[..., 0]


@pytest.mark.parametrize("name", ENGINES)
def test_what_cannot_be_computed_is_left_again_and_counted(name: str) -> None:
    plain = gaussian_target()
    target = Walled(plain.mean, plain.cov, plain.log_z, plain.shares)
    start = plain.mean.expand(3, -1, -1)
    inference = run(target, ENGINES[name], num_chains=3, warmup=20, steps=200, thin=2, start=start, num_samples=100)
    assert bool((inference.draws.eps[..., 0] <= plain.mean[:, 0] + 0.3).all())
    assert bool((inference.report["divergences"] > 0).all())
    assert inference.draws.eps.std(0).min() > 0.05


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rate": 2.5}, "Expected rate below 2"),
        ({"num_chains": 0}, "Expected num_chains as a positive integer"),
        ({"steps": 10, "thin": 4}, "Expected steps of at least 4 times thin"),
        ({"schedule": "linear"}, "Expected schedule as one of constant, cosine"),
        ({"batch_size": 0}, "Expected batch_size as a positive integer"),
        ({"start": torch.zeros(3, 4)}, "Expected start with shape"),
        ({"start": torch.full((1, 2, 4), torch.nan)}, "Expected finite draws"),
    ],
)
@pytest.mark.parametrize("name", ENGINES)
def test_wrong_settings_are_named(name: str, settings: dict[str, Any], words: str) -> None:
    target: Target = gaussian_target()
    with pytest.raises(ValueError, match=words):
        ENGINES[name](target, **settings)
