"""Every likelihood is held to its definition, and to what prediction, saving and scoring make of it: add an instance to `CASES`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

import bnnp
from bnnp.likelihoods import LIKELIHOODS, Likelihood, noise_of
from bnnp.likelihoods.special import betainc
from bnnp.mixtures import crps_gaussian_mixture, crps_of_cdf, crps_of_counts, invert_cdf
from laws import randn, relative_error

F64 = torch.float64
CASES: dict[str, Callable[[], Likelihood]] = {
    "bernoulli": bnnp.Bernoulli,
    "beta": bnnp.Beta,
    "categorical": lambda: bnnp.Categorical(4),
    "gaussian": bnnp.Gaussian,
    "heteroscedastic": lambda: bnnp.Heteroscedastic(0.4),
    "multivariategaussian": bnnp.MultivariateGaussian,
    "negativebinomial": bnnp.NegativeBinomial,
    "poisson": bnnp.Poisson,
    "studentt": bnnp.StudentT,
}
EVERY = pytest.mark.parametrize("name", CASES)
REAL = ["gaussian", "heteroscedastic", "multivariategaussian", "studentt"]
COUNTS = ["negativebinomial", "poisson"]
WIRED = [name for name in CASES if name != "multivariategaussian"]


def y_dim_of(name: str) -> int:
    return 1 if name == "categorical" else 2


def bound(name: str, y_dim: int | None = None, seed: int = 0) -> Likelihood:
    """A likelihood in float64 with no parameter at its start."""
    likelihood = CASES[name]().bind(y_dim or y_dim_of(name)).double()
    g = torch.Generator().manual_seed(seed)
    for parameter in likelihood.parameters():
        parameter.data += 0.3 * randn(*parameter.shape, generator=g)
    likelihood.requires_grad_(False)
    return likelihood


def outputs(likelihood: Likelihood, n: int, y_dim: int, seed: int = 1, spread: float = 1.5) -> Tensor:
    spread = 0.5 if isinstance(likelihood, bnnp.Beta) else spread  # or else too much lies within rounding of 0 and 1
    return spread * randn(n, likelihood.f_dim(y_dim), generator=torch.Generator().manual_seed(seed))


def values(name: str, n: int, y_dim: int, seed: int = 2) -> Tensor:
    """Values of y that can occur."""
    u = torch.rand(n, y_dim, generator=torch.Generator().manual_seed(seed), dtype=F64)
    if name in REAL:
        return 6 * u - 3
    return u.clamp(0.01, 0.99) if name == "beta" else (u * {"bernoulli": 2, "categorical": 4}.get(name, 12)).floor()


def test_there_is_a_case_for_every_likelihood() -> None:
    assert set(CASES) == set(LIKELIHOODS)


@EVERY
def test_densities_integrate_and_probabilities_sum_to_one(name: str) -> None:
    for seed in range(3):
        likelihood, d = bound(name, seed=seed), y_dim_of(name)
        f = outputs(likelihood, 5, d, seed=seed)
        if likelihood.discrete:
            grid = torch.arange({"bernoulli": 2, "categorical": 4}.get(name, 20_000), dtype=F64)
            total = likelihood.log_prob_each(f[:, None], grid[None, :, None].expand(5, -1, d)).exp().sum(1)
        else:
            t = torch.linspace(-16, 16, 40_001, dtype=F64)
            if name == "beta":
                grid, rate = t.sigmoid().clamp(1e-16, 1 - 1e-16), t.sigmoid() * (-t).sigmoid()
            else:
                grid, rate = t.sinh() * 1e-2, t.cosh() * 1e-2
            density = likelihood.log_prob_each(f[:, None], grid[None, :, None].expand(5, -1, d)).exp() * rate[None, :, None]
            total = torch.trapezoid(density, t, dim=1)
        assert relative_error(total, torch.ones_like(total)) < (2e-3 if name in ("beta", "studentt") else 1e-6), name


def test_a_correlated_density_integrates_to_one() -> None:
    likelihood = bound("multivariategaussian")
    grid = torch.linspace(-6, 6, 601, dtype=F64)
    y = torch.cartesian_prod(grid, grid)
    total = likelihood.log_prob(torch.tensor([0.1, -0.2], dtype=F64).expand(len(y), 2), y).exp().sum() * 0.02**2
    assert float(total) == pytest.approx(1.0, abs=1e-6)


@EVERY
def test_densities_moments_and_distribution_functions_are_those_of_torch(name: str) -> None:
    likelihood, d = bound(name), y_dim_of(name)
    f, y = outputs(likelihood, 40, d), values(name, 40, d)
    theirs = likelihood.distribution(f)
    want = theirs.log_prob(y.squeeze(-1) if name == "categorical" else y)
    got = likelihood.log_prob(f, y)
    assert relative_error(got, want if want.ndim == 1 else want.sum(-1)) < 1e-9
    assert likelihood.mean(f).shape == likelihood.variance(f).shape
    if name == "categorical":
        assert relative_error(likelihood.mean(f), theirs.probs) < 1e-12  # type: ignore[attr-defined]
        return
    assert relative_error(likelihood.mean(f), theirs.mean) < 1e-9
    assert relative_error(likelihood.variance(f), theirs.variance) < 1e-9
    if not likelihood.discrete and name != "multivariategaussian" and name not in ("beta", "studentt"):
        assert relative_error(likelihood.cdf(f, y), theirs.cdf(y)) < 1e-12


def test_distribution_functions_are_those_of_scipy() -> None:
    for name in ("beta", "studentt", "negativebinomial", "poisson"):
        likelihood, y = bound(name, 1), values(name, 60, 1)
        f = outputs(likelihood, 60, 1)
        parts = {k: v.numpy() for k, v in likelihood.torch_distribution(f, torch.ones(1), torch.zeros(1))[1].items()}
        if name == "beta":
            theirs = scipy.stats.beta(parts["concentration1"], parts["concentration0"])
        elif name == "studentt":
            theirs = scipy.stats.t(parts["df"], parts["loc"], parts["scale"])
        elif name == "poisson":
            theirs = scipy.stats.poisson(parts["rate"])
        else:
            theirs = scipy.stats.nbinom(parts["total_count"], 1 / (1 + np.exp(parts["logits"])))
        np.testing.assert_allclose(likelihood.cdf(f, y).numpy(), theirs.cdf(y.numpy()), rtol=1e-10, atol=1e-300)
        log_density = theirs.logpmf if likelihood.discrete else theirs.logpdf
        np.testing.assert_allclose(likelihood.log_prob_each(f, y).numpy(), log_density(y.numpy()), rtol=1e-9)


def test_the_incomplete_beta_function_is_that_of_scipy() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.exp(3 * randn(500, generator=g)) for _ in range(2))
    x, one = torch.rand(500, generator=g, dtype=F64), torch.ones(2, dtype=F64)
    want = scipy.special.betainc(a.numpy(), b.numpy(), x.numpy())
    np.testing.assert_allclose(betainc(a, b, x, 1 - x).numpy(), want, rtol=1e-9, atol=1e-280)
    end = torch.tensor([0.0, 1.0], dtype=F64)
    ends = betainc(one, one, end, 1 - end)
    assert ends.tolist() == [0.0, 1.0]


@EVERY
def test_draws_have_the_moments_of_the_density(name: str) -> None:
    likelihood, d, n = bound(name), y_dim_of(name), 8_000
    f = outputs(likelihood, 3, d, spread=1.0)
    draws = likelihood.sample(f[None, None].expand(n, 1, -1, -1), torch.Generator().manual_seed(0))[:, 0]
    if name == "categorical":
        draws = torch.nn.functional.one_hot(draws[..., 0].long(), 4).to(F64)
    mean, variance = likelihood.mean(f), likelihood.variance(f)
    assert float(((draws.mean(0) - mean) / (variance / n).sqrt()).abs().max()) < 4.5
    spread = (draws - mean).square()
    if name != "studentt":  # whose fourth moment need not exist
        assert float(((spread.mean(0) - variance) / (spread.std(0) / math.sqrt(n))).abs().max()) < 4.5
    if name == "multivariategaussian":
        cov = torch.einsum("nij,nik->ijk", draws - mean, draws - mean) / n
        assert relative_error(cov, likelihood.noise_cov.expand(3, 2, 2)) < 0.08  # type: ignore[operator, union-attr]
    if name == "studentt":
        u = likelihood.cdf(f.expand(n, -1, -1), draws)
        assert float(scipy.stats.kstest(u[:, 0, 0].numpy(), "uniform").pvalue) > 1e-3


@EVERY
def test_a_task_is_drawn_the_same_whatever_is_beside_it(name: str) -> None:
    likelihood, d = bound(name), y_dim_of(name)
    f = outputs(likelihood, 5 * 2 * 3, d).reshape(5, 2, 3, -1)
    both = likelihood.sample(f, torch.Generator().manual_seed(0))
    alone = likelihood.sample(f[:, 1:], torch.Generator().manual_seed(0))
    assert both.shape == (5, 2, 3, d) and relative_error(both[:, 1:], alone) < 1e-12
    likelihood.check(both)


@EVERY
def test_quantiles_invert_the_distribution_function(name: str) -> None:
    likelihood, d = bound(name), y_dim_of(name)
    f = outputs(likelihood, 10, d)
    for q in (0.001, 0.3, 0.5, 0.99):
        at = likelihood.quantile(f, torch.tensor(q, dtype=F64))
        if likelihood.discrete:
            assert bool((likelihood.cdf(f, at) >= q).all())
            assert bool(((likelihood.cdf(f, at - 1) < q) | (at == 0)).all())
        else:
            assert relative_error(likelihood.cdf(f, at), torch.full((10, d), q, dtype=F64)) < 1e-6


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_densities_and_gradients_stay_finite_far_out(name: str, dtype: torch.dtype) -> None:
    likelihood, d = bound(name).to(dtype), y_dim_of(name)
    likelihood.requires_grad_(True)
    width = likelihood.f_dim(d)
    f = torch.tensor([-1e8, -1e4, -100.0, 0.0, 100.0, 1e4, 1e8], dtype=dtype)[:, None].expand(-1, width).clone().requires_grad_()
    for far in (-1e6, 0.0, 1e6) if name in REAL else (1e-6, 0.5, 1 - 1e-6) if name == "beta" else (0.0, 1.0, 1e5):
        if name in ("bernoulli", "categorical") and far > 1:
            continue
        value = likelihood.log_prob(f, torch.full((7, d), far, dtype=dtype)).sum()
        grads = torch.autograd.grad(value, [f, *likelihood.parameters()], allow_unused=True)
        assert bool(value.isfinite()), (name, far)
        assert all(bool(grad.isfinite().all()) for grad in grads if grad is not None), (name, far)


@EVERY
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1.0, 1e300])
def test_outputs_that_were_not_seen_add_nothing_and_get_no_gradient(name: str, garbage: float) -> None:
    likelihood, d = bound(name), y_dim_of(name)
    likelihood.requires_grad_(True)
    f, y = outputs(likelihood, 6, d).requires_grad_(), values(name, 6, d)
    seen = torch.ones(6, d, dtype=torch.bool)
    seen[:3, -1] = False
    seen[0] = False
    got = likelihood.log_prob(f, torch.where(seen, y, torch.full_like(y, garbage)), seen)
    whole = likelihood.log_prob(f, y)
    assert float(got[0].detach()) == 0.0
    assert relative_error(got[3:], whole[3:]) < 1e-12
    grads = torch.autograd.grad(got.sum(), [f, *likelihood.parameters()])
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert float(grads[0][0].abs().max()) == 0.0
    if d == 2:
        each = likelihood.log_prob_each(f, y)  # of an output on its own: what is left where the other is not seen
        assert relative_error(got[1:3], each[1:3, 0]) < 1e-10
        if name != "heteroscedastic":
            assert float(grads[0][1:3, 1].abs().max()) == 0.0


def test_the_whitener_makes_noise_independent() -> None:
    likelihood = bnnp.MultivariateGaussian(0.3).bind(3).double()
    for parameter in likelihood.parameters():
        parameter.data += 0.5 * randn(*parameter.shape, generator=torch.Generator().manual_seed(0))
    T, cov = likelihood.whitener.detach(), likelihood.noise_cov.detach()
    assert relative_error(T @ cov @ T.mT, torch.eye(3, dtype=F64)) < 1e-12
    assert float(T.triu(1).abs().max()) == 0.0
    noise = noise_of(likelihood)
    assert noise is not None and relative_error(noise.detach(), cov.diagonal().sqrt()) < 1e-12


@EVERY
def test_what_inference_networks_see_is_finite_and_as_wide_as_said(name: str) -> None:
    likelihood, d = bound(name), y_dim_of(name)
    for y in (values(name, 5, d), torch.zeros(5, d, dtype=F64)):
        seen = likelihood.embed(y)
        assert seen.shape == (5, likelihood.embed_dim(d)) and bool(seen.isfinite().all())
    fresh = CASES[name]()
    assert (fresh.f_dim(d), fresh.embed_dim(d)) == (likelihood.f_dim(d), likelihood.embed_dim(d))


REFUSED = {
    "bernoulli": (2.0, "Encode the classes as 0 and 1"),
    "categorical": (4.0, "labels 0 to 3"),
    "poisson": (1.5, "counts 0, 1, 2"),
    "negativebinomial": (-1.0, "counts 0, 1, 2"),
    "beta": (0.0, "strictly between 0 and 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_cannot_occur_are_refused(name: str) -> None:
    value, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        bound(name).check(torch.tensor([[value]]))
    d = y_dim_of(name)
    with pytest.raises(ValueError, match=words):
        bnnp.BNNP(1, d, hidden=(3,), likelihood=CASES[name]()).condition(torch.zeros(1, 1), torch.full((1, d), value))


def test_settings_that_make_no_sense_are_refused() -> None:
    for make in (
        lambda: bnnp.Categorical(1),
        lambda: bnnp.StudentT(dof=2.0),
        lambda: bnnp.StudentT(scale=0.0),
        lambda: bnnp.Beta(-1.0),
        lambda: bnnp.NegativeBinomial(math.inf),
        lambda: bnnp.Heteroscedastic(0.0),
        lambda: bnnp.MultivariateGaussian(math.nan),
        lambda: bnnp.Categorical(3).bind(2),
    ):
        with pytest.raises(ValueError, match="Expected"):
            make()


def test_a_fixed_scale_is_in_the_users_units_and_a_learned_one_starts_in_the_networks() -> None:
    tasks = [bnnp.Task(torch.randn(9, 1, generator=torch.Generator().manual_seed(i)), 50 * torch.randn(9, 1)) for i in range(3)]
    for learn in (False, True):
        model = bnnp.BNNP(1, 1, hidden=(3,), likelihood=bnnp.StudentT(dof=5.0, scale=2.0, learn_scale=learn))
        model.fit_scaling(tasks)
        scale = float(model.likelihood.scale.detach() * (1.0 if learn else model.scaling.y_scale))  # type: ignore[operator, union-attr]
        assert scale == pytest.approx(2.0, rel=1e-5)


def test_levels_of_counts_are_those_of_training_and_survive_saving(tmp_path: Path) -> None:
    tasks = [(torch.zeros(4, 1) + torch.arange(4.0)[:, None], torch.full((4, 1), 200.0 + i)) for i in range(3)]
    for likelihood in (bnnp.Poisson(), bnnp.NegativeBinomial()):
        model = bnnp.BNNP(1, 1, hidden=(3,), likelihood=likelihood)
        model.fit_scaling([bnnp.Task(*task) for task in tasks])
        at_zero = model.likelihood.mean(torch.zeros(1, 1))
        assert float(at_zero) == pytest.approx(201.0, rel=1e-5)
        model.save(tmp_path)
        assert float(bnnp.load(tmp_path).likelihood.mean(torch.zeros(1, 1))) == float(at_zero)


# --- what prediction makes of them -------------------------------------------------------------------------------------


def trained(name: str, y_dim: int, dtype: torch.dtype = F64, **options: Any) -> tuple[bnnp.BNNP, list[tuple[Tensor, Tensor]]]:
    """A model with no parameter at its start, and tasks of 9 points."""
    model = bnnp.BNNP(2, y_dim, hidden=(4,), likelihood=CASES[name](), activation="tanh", **options).to(dtype)
    g = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * randn(*parameter.shape, generator=g).to(dtype)
    tasks = [(randn(9, 2, generator=g).to(dtype), values(name, 9, y_dim, seed=i).to(dtype)) for i in range(4)]
    model.fit_scaling([bnnp.Task(x, y) for x, y in tasks])
    return model, tasks


@pytest.mark.parametrize("name", WIRED)
def test_predictions_are_mixtures_over_the_particles(name: str) -> None:
    d = y_dim_of(name)
    model, tasks = trained(name, d)
    (x, y), (xt, yt) = tasks[:2]
    p = model.condition(x, y, num_samples=5).predict(xt)
    batched = model.condition(x, y, num_samples=5).predict(xt, batch_size=4)
    for question in ("mean", "std", "epistemic_std"):
        assert relative_error(getattr(batched, question), getattr(p, question)) < 1e-12
    for answer in (lambda p: p.log_prob(yt), lambda p: p.log_prob(yt, joint=True), lambda p: p.cdf(yt)):
        assert relative_error(answer(batched), answer(p)) < 1e-9
    if name == "gaussian":
        return  # the closed form has its own twin
    particles, likelihood, s = p._posterior.particles, model.likelihood, model.scaling
    f = particles.outputs(s.x(xt))[:, 0].detach()
    each = torch.stack([likelihood.log_prob(f[i], s.y(yt)) for i in range(5)]).detach() - s.log_volume
    assert relative_error(p.log_prob(yt), each.logsumexp(0) - math.log(5)) < 1e-9
    assert relative_error(p.log_prob(yt, joint=True), each.sum(-1).logsumexp(0) - math.log(5)) < 1e-9
    mean, variance = likelihood.mean(f).detach(), likelihood.variance(f).detach()
    assert relative_error(p.mean, mean.mean(0) * s.y_scale + s.y_shift) < 1e-9
    assert relative_error(p.std, (variance.mean(0) + mean.var(0, correction=0)).sqrt() * s.y_scale) < 1e-9
    assert relative_error(p.epistemic_std, mean.std(0, correction=0) * s.y_scale) < 1e-9
    assert relative_error(p.cdf(yt), likelihood.cdf(f, s.y(yt).expand(5, -1, -1)).mean(0)) < 1e-9
    assert relative_error(p.sample(5, noisy=False), mean * s.y_scale + s.y_shift) < 1e-9
    weighted = model.condition(x, y, num_samples=5).update(xt, yt).predict(xt)
    assert bool(weighted.log_prob(yt).isfinite().all())


@pytest.mark.parametrize("name", WIRED)
def test_quantiles_and_torchs_distribution_of_a_prediction(name: str) -> None:
    d = y_dim_of(name)
    model, tasks = trained(name, d)
    (x, y), (xt, yt) = tasks[:2]
    p = model.condition(x, y, num_samples=5).predict(xt)
    for q in (0.05, 0.5, 0.9):
        at = p.quantile(q)
        assert at.shape == (9, d)
        if p.is_discrete:
            model.likelihood.check(at)
            below = p.cdf((at - 1).clamp(min=0))
            assert bool((p.cdf(at) >= q).all()) and bool(((below < q) | (at == 0)).all())
        else:
            assert relative_error(p.cdf(at), torch.full((9, d), q, dtype=F64)) < 1e-6
    theirs = p.distribution
    assert theirs.batch_shape == ((9,) if name == "categorical" else (9, d))
    want = theirs.log_prob(yt.squeeze(-1) if name == "categorical" else yt)
    if d == 1:
        assert relative_error(p.log_prob(yt), want) < 1e-9
    else:
        one, first = trained(name, 1), 0
        q = one[0].condition(*one[1][0], num_samples=5).predict(xt)
        assert relative_error(q.log_prob(one[1][1][1]), q.distribution.log_prob(one[1][1][1])[:, first]) < 1e-9
    if name != "categorical":
        assert relative_error(theirs.mean, p.mean) < 1e-9 and relative_error(theirs.stddev, p.std) < 1e-9
    assert p.pit(yt, seed=1).shape == (9, d) and bool(((p.pit(yt) >= 0) & (p.pit(yt) <= 1)).all())


@pytest.mark.parametrize("name", [n for n in WIRED if n not in ("categorical", "bernoulli")])
def test_the_score_of_a_prediction_is_the_integral(name: str) -> None:
    model, tasks = trained(name, 1)
    (x, y), (xt, yt) = tasks[:2]
    p = model.condition(x, y, num_samples=4).predict(xt[:2])
    got = p.crps(yt[:2])
    if name in COUNTS:
        k = torch.arange(400, dtype=F64)
        F = torch.stack([p.cdf(v.expand(2, 1)) for v in k])
        want = ((F - (k[:, None, None] >= yt[:2]).to(F64)) ** 2).sum(0)
        assert relative_error(got, want) < 1e-6
        return
    low, high = (1e-9, 1 - 1e-9) if name == "beta" else (-15.0, 15.0)
    batched = model.condition(x, y, num_samples=4).predict(xt[:2], batch_size=1).crps(yt[:2])
    assert relative_error(batched, got) < 1e-3
    grid = torch.linspace(low, high, 401, dtype=F64)
    F = torch.stack([p.cdf(v.expand(2, 1)) for v in grid])
    want = torch.trapezoid((F - (grid[:, None, None] >= yt[:2]).to(F64)) ** 2, grid, dim=0)
    assert relative_error(got, want) < 0.1  # of a coarse grid with a jump
    draws = p.sample(20_000, seed=0)
    draws = draws[torch.randperm(20_000, generator=torch.Generator().manual_seed(0))]
    estimate = (draws - yt[:2]).abs().mean(0) - 0.5 * (draws[::2] - draws[1::2]).abs().mean(0)
    error = (draws - yt[:2]).abs().std(0) / math.sqrt(20_000) + 0.5 * (draws[::2] - draws[1::2]).abs().std(0) / math.sqrt(10_000)
    assert bool(((estimate - got).abs() < 5 * error).all())


def test_quadrature_of_scores_agrees_with_closed_forms() -> None:
    g = torch.Generator().manual_seed(0)
    mean, std = 3 * randn(6, 20, generator=g), (0.5 * randn(6, 20, generator=g)).exp()
    y = 5 * randn(20, generator=g)

    def cdf(x: Tensor) -> Tensor:
        return torch.special.ndtr((x.unsqueeze(1) - mean) / std).mean(1)

    got = crps_of_cdf(cdf, y, torch.full_like(y, 3.0), (-math.inf, math.inf))
    assert relative_error(got, crps_gaussian_mixture(mean, std, y)) < 1e-4
    uniform = crps_of_cdf(lambda x: x.clamp(0, 1), torch.tensor(0.3, dtype=F64), torch.tensor(0.5, dtype=F64), (0.0, 1.0))
    assert float(uniform) == pytest.approx((0.3**3 + 0.7**3) / 3, rel=1e-5)


def test_steps_over_large_counts_give_nearly_the_sum() -> None:
    rate, y = torch.tensor([900.0, 5000.0], dtype=F64), torch.tensor([950.0, 4900.0], dtype=F64)

    def cdf(k: Tensor) -> Tensor:
        return torch.special.gammaincc(k + 1, rate)

    exact = crps_of_counts(cdf, y, last=6000, most=10**6)
    assert relative_error(crps_of_counts(cdf, y, last=6000, most=1500), exact) < 0.01


def test_bisection_finds_quantiles_far_from_where_it_starts() -> None:
    want = torch.tensor([-4e5, 0.0, 7e3], dtype=F64)
    zero = torch.zeros(3, dtype=F64)
    assert relative_error(invert_cdf(lambda y: torch.sigmoid(y - want), 0.5, zero, zero, (-math.inf, math.inf)), want) < 1e-9
    got = invert_cdf(lambda y: torch.sigmoid(y - want.abs() - 0.3), 0.5, zero, zero, (0.0, math.inf), integer=True)
    assert got.tolist() == [4e5 + 1, 1.0, 7e3 + 1]


def test_probabilities_and_modes_are_for_labels_only() -> None:
    model, tasks = trained("categorical", 1)
    p = model.condition(*tasks[0]).predict(tasks[1][0])
    assert p.probs.shape == (9, 4) and relative_error(p.probs.sum(-1), torch.ones(9, dtype=F64)) < 1e-12
    assert torch.equal(p.mode[:, 0], p.probs.argmax(-1).to(F64))
    model, tasks = trained("bernoulli", 2)
    p = model.condition(*tasks[0]).predict(tasks[1][0])
    assert torch.equal(p.mode, (p.probs >= 0.5).to(F64))
    model, tasks = trained("poisson", 1)
    with pytest.raises(AttributeError, match="ask mean, quantile or cdf"):
        _ = model.condition(*tasks[0]).predict(tasks[1][0]).probs


@pytest.mark.parametrize("name", WIRED)
def test_padding_streams_and_files_change_nothing(name: str, tmp_path: Path) -> None:
    d = y_dim_of(name)
    model, tasks = trained(name, d)
    (x, y), (xt, yt) = tasks[:2]
    alone = model.condition(x, y, num_samples=4)
    X, Y = torch.full((1, 12, 2), math.nan, dtype=F64), torch.full((1, 12, d), math.inf, dtype=F64)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    X[0, 2:11], Y[0, 2:11], mask[0, 2:11] = x, y, True
    padded = model.condition(X, Y, mask=mask, num_samples=4)
    streamed = model.condition(x, y, num_samples=4, context_batch_size=4)
    model.save(tmp_path / "model")
    alone.save(tmp_path / "posterior")
    again = bnnp.load_posterior(tmp_path / "posterior", bnnp.load(tmp_path / "model"))
    want = alone.predict(xt).log_prob(yt, joint=True)
    for other, tolerance in ((padded, 1e-9), (streamed, 1e-9), (again, 0.0)):
        assert relative_error(other.elbo, alone.elbo) <= tolerance
        at = yt if other.single else yt[None]
        assert relative_error(other.predict(xt).log_prob(at, joint=True).squeeze(), want) <= tolerance


@pytest.mark.parametrize("name", WIRED)
def test_everything_learned_gets_a_gradient(name: str) -> None:
    d = y_dim_of(name)
    model, tasks = trained(name, d)
    batch = bnnp.TaskBatch(bnnp.collate([(x[:5], y[:5]) for x, y in tasks]), bnnp.collate([(x[5:], y[5:]) for x, y in tasks]))
    for objective in ("pp_avi", "npvi", "iw_avi"):
        value = bnnp.objectives.OBJECTIVES[objective](model, batch, 3, torch.Generator().manual_seed(0))
        grads = torch.autograd.grad(value.sum(), list(model.parameters()))
        assert all(bool(grad.isfinite().all()) and float(grad.abs().max()) > 0 for grad in grads), objective


@pytest.mark.parametrize("name", WIRED)
def test_meta_training_evaluation_and_diagnosis_work(name: str) -> None:
    d = y_dim_of(name)
    model, tasks = trained(name, d, dtype=torch.float32)
    result = bnnp.meta_train(model, tasks * 2, validation=0.25, steps=3, progress=False)
    assert result.best_score is not None and math.isfinite(result.best_score)
    scores = bnnp.evaluate(model, tasks, context_fraction=0.5, num_samples=8)
    assert all(math.isfinite(mean) for mean, _ in scores.summary.values())
    labels = name in ("bernoulli", "categorical")
    assert ("brier" in scores.summary) == labels and ("crps" in scores.summary) != labels
    diagnosis = model.condition(*tasks[0], num_samples=32).diagnose()
    assert 0 < float(diagnosis.p_value_y) <= 1 and math.isfinite(float(diagnosis.distance_y))
    assert "log-likelihood" in bnnp.sbc(model, repetitions=2, num_samples=5).ranks


def test_labels_are_scored_by_their_definitions() -> None:
    model, tasks = trained("categorical", 1)
    scores = bnnp.evaluate(model, [(x[:4], y[:4], x[4:], y[4:]) for x, y in tasks[:1]], num_samples=16, seed=3)
    x, y = tasks[0]
    p = model.condition(x[:4], y[:4], num_samples=16, seed=3).predict(x[4:]).probs
    one_hot = torch.nn.functional.one_hot(y[4:, 0].long(), 4)
    assert scores.summary["brier"][0] == pytest.approx(float((p - one_hot).square().sum(-1).mean()))
    assert scores.summary["accuracy"][0] == pytest.approx(float((p.argmax(-1) == y[4:, 0]).double().mean()))


def test_randomised_pit_values_of_counts_are_uniform() -> None:
    model, tasks = trained("negativebinomial", 1)
    p = model.condition(torch.zeros(0, 2, dtype=F64), torch.zeros(0, 1, dtype=F64), num_samples=64).predict(tasks[0][0][:1])
    draws = p.sample(2048, seed=5)
    u = torch.cat([p.pit(draw, seed=i) for i, draw in enumerate(draws[::8])]).flatten()
    assert float(scipy.stats.kstest(u.numpy(), "uniform").pvalue) > 1e-3


def test_a_linear_poisson_model_is_close_to_its_quadrature() -> None:
    """One weight and a bias of a Poisson regression: importance-weighted particles against a grid."""
    model = bnnp.BNNP(1, 1, hidden=(), likelihood=bnnp.Poisson()).double()
    x = torch.tensor([[-1.0], [0.5], [1.0]], dtype=F64)
    y = torch.tensor([[0.0], [2.0], [4.0]], dtype=F64)
    with torch.no_grad():
        model._layers[0].net[-1].bias += torch.tensor([0.0, 5.0])  # type: ignore[index]  # hardly any information: q is near the prior
    p = model.condition(x, y, num_samples=20_000).predict(x, reweight=True)
    prior = next(iter(model.prior))
    cov, w = prior.covariance()[0].detach(), torch.linspace(-5, 5, 401, dtype=F64)
    W = torch.cartesian_prod(w, w)
    log_p = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), cov).log_prob(W)
    rate = (W[:, :1] * x.T + W[:, 1:]).exp()
    log_p = log_p + torch.distributions.Poisson(rate).log_prob(y.T).sum(-1)
    want = (log_p.softmax(0)[:, None] * rate).sum(0)
    assert relative_error(p.mean[:, 0], want) < 0.03
