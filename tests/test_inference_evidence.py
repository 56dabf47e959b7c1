"""Evidence by every road: right where it is known, the same where it is not, and above every bound."""

from __future__ import annotations

import math

import pytest
import torch
from tests.engines import GaussianTarget, gaussian_target, linear_problem
from torch import Tensor

import bnnp
from bnnp.inference import Draws, Target, functional, run
from bnnp.inference.amortised import Amortised
from bnnp.inference.amortised import build as amortised
from bnnp.inference.evidence import Evidence, agree, annealed, bridge, importance, tempered
from bnnp.inference.proposals import Gaussian
from bnnp.inference.smc import build as smc
from bnnp.seeds import seeded
from bnnp.tasks import make_context


def exact_draws(mean: Tensor, cov: Tensor, n: int, seed: int = 0) -> Tensor:
    z = torch.randn(n, *mean.shape, generator=seeded(seed, "exact draws"), dtype=torch.float64)
    return mean + (torch.linalg.cholesky(cov) @ z.unsqueeze(-1)).squeeze(-1)


def problem(name: str) -> tuple[Target, Tensor, Tensor, Tensor]:
    if name == "gaussian":
        t = gaussian_target()
        return t, t.mean, t.cov, t.log_z
    p = linear_problem()
    return p.target, p.mean, p.cov, p.log_evidence


def wide(mean: Tensor, cov: Tensor) -> Gaussian:
    return Gaussian(mean + 0.3 * cov.diagonal(dim1=-2, dim2=-1).sqrt(), 1.3 * cov.diagonal(dim1=-2, dim2=-1).sqrt())


@pytest.mark.parametrize("name", ["gaussian", "linear"])
def test_every_estimate_is_right_where_the_evidence_is_known(name: str) -> None:
    target, mean, cov, log_z = problem(name)
    q = wide(mean, cov)
    draws = exact_draws(mean, cov, 1000)
    found = [
        importance(target, q, 2000),
        bridge(target, draws, q),
        bridge(target, draws),
        tempered(target, num_particles=250, num_moves=3),
        tempered(target, q, num_particles=100, ess=0.9),
        annealed(target, q, 20, num_particles=250, num_moves=1),
    ]
    for one in found:
        assert bool(((one.log_evidence - log_z).abs() < 4.5 * one.standard_error).all()), (one, log_z)
        assert float(one.standard_error.max()) < 0.15, one
        assert bool(one.trusted.all())
    assert float(agree(found).max()) < 4.5
    off = Evidence(log_z + 1.0, torch.full_like(log_z, 0.01), "wrong")
    assert float(agree([*found, off]).min()) > 6


@pytest.mark.parametrize("widened", [0.6, 1.0, 2.0])
def test_the_errors_of_importance_and_bridge_are_those_of_repeated_runs(widened: float) -> None:
    target, mean, cov, log_z = problem("gaussian")
    q = Gaussian(mean, widened * torch.linalg.cholesky(cov))
    made = {
        "bridge": [bridge(target, exact_draws(mean, cov, 200, s), q, seed=s, n=100) for s in range(80)],
        "importance": [importance(target, q, 300, seed=s) for s in range(80)],
    }
    if widened == 0.6:  # narrower than the posterior: weights without a variance, and a k that says so
        one = importance(target, q, 20_000)
        assert float(one.pareto_k.min()) > 0.5 if one.pareto_k is not None else False
        del made["importance"]
    for estimates in made.values():
        values = torch.stack([e.log_evidence for e in estimates])
        claimed = torch.stack([e.standard_error for e in estimates]).square().mean(0).sqrt()
        spread = values.std(0)
        if widened == 1.0:
            assert float(spread.max()) < 1e-6  # the same density twice: nothing is left to chance
            torch.testing.assert_close(values[0], log_z)
            continue
        assert bool(((values.mean(0) - log_z).abs() < 4.5 * spread / math.sqrt(80) + 0.2 * spread.square()).all())
        assert bool((claimed > 0.75 * spread).all()) and bool((claimed < 1.33 * spread).all()), (claimed, spread)


def test_fewer_effective_draws_mean_a_larger_error() -> None:
    target, mean, cov, log_z = problem("gaussian")
    q, draws = wide(mean, cov), exact_draws(mean, cov, 50)
    repeated = bridge(target, draws.repeat(8, 1, 1), q, effective=50.0, n=400)
    believed = bridge(target, draws.repeat(8, 1, 1), q, n=400)
    assert bool((repeated.standard_error > 1.15 * believed.standard_error).all())
    assert bool(((repeated.log_evidence - log_z).abs() < 4.5 * repeated.standard_error).all())


def test_weighted_draws_are_drawn_by_their_weights() -> None:
    target, mean, cov, log_z = problem("gaussian")
    q = wide(mean, cov)
    eps = q.draw(8000, 0)
    draws = Draws(eps, target.log_joint(eps) - q.log_density(eps))
    found = bridge(target, draws, effective=1000.0)
    assert bool(((found.log_evidence - log_z).abs() < 4.5 * found.standard_error).all())
    wrong = bridge(target, eps, effective=1000.0)
    assert float(((wrong.log_evidence - log_z).abs() / wrong.standard_error).max()) > 4.5


def test_what_cannot_be_trusted_says_so() -> None:
    target, mean, cov, _ = problem("gaussian")
    away = Gaussian(mean + 60 * cov.diagonal(dim1=-2, dim2=-1).sqrt(), 0.05 * cov.diagonal(dim1=-2, dim2=-1).sqrt())
    draws = exact_draws(mean, cov, 400)
    assert not bool(importance(target, away, 400).trusted.any())
    none = bridge(target, draws, away)
    assert none.overlap is not None and not bool(none.trusted.any())
    good = bridge(target, draws)
    assert good.overlap is not None and bool((good.overlap > 0.9).all()) and bool((good.overlap <= 1.0 + 1e-9).all())


def fitted_network() -> tuple[bnnp.BNNP, Tensor, Tensor]:
    """A small network with a prior that is not where priors start, its inference networks fitted a little to one data set."""
    noise = bnnp.Gaussian(0.3, learn_noise=False)
    model = bnnp.BNNP(1, 1, hidden=(4,), prior="shared", activation="tanh", likelihood=noise, net_hidden=(16,), shared_noise=True).double()
    g = seeded(0, "prior")
    for layer in model.prior:
        for parameter in layer.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        layer.requires_grad_(False)
    x = torch.linspace(-1.5, 1.5, 6, dtype=torch.float64)[:, None]
    y = torch.sin(2 * x)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    context, _ = make_context(x, y, x_dim=1, y_dim=1, dtype=torch.float64)
    for step in range(150):
        optimiser.zero_grad()
        (-model(context, num_samples=16, seed=step).elbo.mean()).backward()
        optimiser.step()
    return model, x, y


def test_all_agree_on_a_network_and_lie_above_its_bounds() -> None:
    model, x, y = fitted_network()
    found = []
    bounds = []
    for collapse in (True, False):
        F = functional(model, x, y, collapse=collapse).batched
        q = Amortised(F, model)
        report = run(F, amortised, num_samples=2, model=model, num_particles=1000).report
        bounds.append((report["elbo"], report["elbo_se"]))
        draws = run(F, smc, num_samples=400, num_particles=100, num_moves=3, seed=1).draws
        found += [importance(F, q, 1500), bridge(F, draws, q, effective=150.0), tempered(F, num_particles=80, num_moves=2)]
        if collapse:
            found += [tempered(F, q, num_particles=50, ess=0.85), bridge(F, draws, effective=150.0)]
    assert float(agree(found).max()) < 4.5, found
    assert float(torch.stack([e.standard_error for e in found]).max()) < 0.35
    for one in found:
        for bound, error in bounds:
            assert bool((one.log_evidence > bound - 4.5 * (error.square() + one.standard_error.square()).sqrt()).all())
    torch.testing.assert_close(bounds[0][0], bounds[1][0], atol=0.2, rtol=0)


def test_a_gaussian_has_its_own_density_and_moments() -> None:
    g = seeded(0, "gaussian")
    mean = torch.randn(2, 3, generator=g, dtype=torch.float64)
    L = torch.randn(2, 3, 3, generator=g, dtype=torch.float64).tril(-1) + torch.eye(3, dtype=torch.float64)
    full, flat = Gaussian(mean, L), Gaussian(mean, L.diagonal(dim1=-2, dim2=-1) + 0.5)
    eps = torch.randn(4, 5, 2, 3, generator=g, dtype=torch.float64)
    for q, cov in ((full, L @ L.mT), (flat, torch.diag_embed(flat.L.square()))):
        torch.testing.assert_close(q.log_density(eps), torch.distributions.MultivariateNormal(mean, cov).log_prob(eps))
        draws = q.draw(20_000, seed=1)
        assert float((draws.mean(0) - mean).abs().max()) < 5 * float(cov.diagonal(dim1=-2, dim2=-1).max()) ** 0.5 / math.sqrt(20_000)
        back = Gaussian.fitted(draws, full=not q.diagonal)
        torch.testing.assert_close(back.L @ back.L.mT if not q.diagonal else back.L.square(), cov if not q.diagonal else q.L.square(),
                                   rtol=0.06, atol=0.05)  # fmt: skip
    few = Gaussian.fitted(eps[0][:2].expand(2, 2, 3), full=True)  # two draws in three dimensions: shrunk, so that there is a factor
    assert bool(few.log_density(eps).isfinite().all())


def test_wrong_questions_are_named() -> None:
    target: GaussianTarget = gaussian_target()
    with pytest.raises(ValueError, match="Expected at least four draws with shape"):
        bridge(target, torch.zeros(10, 3))
    with pytest.raises(ValueError, match="Expected at least two estimates"):
        agree([Evidence(torch.zeros(1), torch.ones(1), "one")])
    with pytest.raises(ValueError, match="Expected at least two finite draws"):
        Gaussian.fitted(torch.full((3, 1, 2), math.nan))
    with pytest.raises(ValueError, match="Expected n as a positive integer"):
        importance(target, Gaussian(target.mean, torch.ones_like(target.mean)), 0)
