"""Laws of the whole: conditioning and prediction, against the slow twin, exact problems, and themselves in other clothes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import bnnp
import reference
import scenarios
from bnnp.networks import BNNP
from bnnp.seeds import seeded
from bnnp.tasks import Context, collate
from laws import INSTANCES, randn, relative_error, unit_factors

LAWS = pytest.mark.parametrize("kind, shared", INSTANCES, ids=lambda value: str(value))
LAST = pytest.mark.parametrize("last_layer", ["exact", "amortised"])


def build(kind: str = "per_unit", shared: bool = False, last_layer: str = "exact", seed: int = 0, **options: Any) -> BNNP:
    """A float64 network with no parameter at its start, and a scaling that is not the identity."""
    settings = {"x_dim": 2, "y_dim": 2, "hidden": (5, 4), "activation": "tanh", **options}
    model = BNNP(prior=kind, shared_noise=shared, last_layer=last_layer, **settings).double()
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * randn(*parameter.shape, generator=g)
    y = torch.rand(50, settings["y_dim"], generator=g, dtype=torch.float64)
    model.fit_scaling([bnnp.Task(2 + 3 * randn(50, settings["x_dim"], generator=g), y if model.likelihood.discrete else 5 - 2 * y)])
    return model


def data(sizes: tuple[int, ...], x_dim: int = 2, y_dim: int = 2, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(2 + 3 * randn(n, x_dim, generator=g), 4 + randn(n, y_dim, generator=g)) for n in sizes]


def answers(posterior: bnnp.Posterior, xt: Tensor, yt: Tensor) -> dict[str, Tensor]:
    p = posterior.predict(xt)
    return {
        "mean": p.mean,
        "std": p.std,
        "epistemic_std": p.epistemic_std,
        "joint": p.log_prob(yt, joint=True),
        "marginal": p.log_prob(yt),
        "cdf": p.cdf(yt),
        "quantile": p.quantile(0.3),
        "crps": p.crps(yt),  # type: ignore[attr-defined]
        "sample": p.sample(7, seed=3).movedim(0, -1),
        "weights": posterior.sample_weights(5, seed=4)[-1].movedim(0, -1),
        "function": posterior.sample_functions(3, seed=5)[2](xt),
        "elbo": posterior.elbo,
        "kl": posterior.kl,
    }


def padded(tasks: list[tuple[Tensor, Tensor]], garbage: float) -> tuple[Tensor, Tensor, Tensor]:
    """Lay tasks side by side by hand, with garbage in the padding and points scattered between it."""
    N = max(len(x) for x, _ in tasks) + 2
    X = torch.full((len(tasks), N, tasks[0][0].shape[1]), garbage, dtype=torch.float64)
    Y = torch.full((len(tasks), N, tasks[0][1].shape[1]), garbage, dtype=torch.float64)
    mask = torch.zeros(len(tasks), N, dtype=torch.bool)
    for t, (x, y) in enumerate(tasks):
        at = torch.randperm(N, generator=torch.Generator().manual_seed(t))[: len(x)]
        X[t, at], Y[t, at], mask[t, at] = x, y, True
    return X, Y, mask


@LAWS
@LAST
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_many_padded_tasks_equal_one_after_another(kind: str, shared: bool, last_layer: str, garbage: float) -> None:
    model, tasks = build(kind, shared, last_layer), data((4, 0, 9, 1))
    xt, yt = data((6,), seed=2)[0]
    batch = answers(model.condition(*padded(tasks, garbage), num_samples=6, seed=8), xt, yt.expand(4, -1, -1))
    for t, (x, y) in enumerate(tasks):
        alone = answers(model.condition(x, y, num_samples=6, seed=8), xt, yt)
        for key, value in alone.items():
            assert relative_error(batch[key][t], value) <= 1e-9, key


def test_a_list_of_data_sets_is_a_padded_batch() -> None:
    model, tasks = build(), data((4, 0, 9, 1))
    xt, yt = data((6,), seed=2)[0]
    batch = answers(model.condition(*padded(tasks, 0.0), num_samples=3), xt, yt.expand(4, -1, -1))
    listed = answers(model.condition([x for x, _ in tasks], [y.numpy() for _, y in tasks], num_samples=3), xt, yt.expand(4, -1, -1))
    for key, value in batch.items():
        assert relative_error(listed[key], value) <= 1e-9, key
    with pytest.raises(ValueError, match="list of 4 arrays"):
        model.condition([x for x, _ in tasks], [y for _, y in tasks][:3])
    with pytest.raises(ValueError, match="data set 2: Expected finite"):
        model.condition([x for x, _ in tasks], [*(y for _, y in tasks[:2]), tasks[2][1] * math.nan, tasks[3][1]])


@LAWS
@LAST
def test_the_order_of_the_context_does_not_matter(kind: str, shared: bool, last_layer: str) -> None:
    model, (x, y) = build(kind, shared, last_layer), data((9,))[0]
    xt, yt = data((6,), seed=2)[0]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    first = answers(model.condition(x, y, num_samples=5, seed=1), xt, yt)
    second = answers(model.condition(x[order], y[order], num_samples=5, seed=1), xt, yt)
    for key, value in first.items():
        assert relative_error(second[key], value) <= 1e-9, key


@LAWS
def test_an_empty_context_gives_the_prior_exactly(kind: str, shared: bool) -> None:
    model = build(kind, shared)
    empty = model.condition(torch.zeros(0, 2), torch.zeros(0, 2), num_samples=4, seed=0)
    assert float(empty.kl) == 0.0 and float(empty.elbo) == 0.0
    last = empty.particles.last
    assert last is not None and float(last.mean.abs().max()) == 0.0
    torch.testing.assert_close(last.covariance, torch.eye(last.covariance.shape[-1], dtype=torch.float64).expand_as(last.covariance))
    g = seeded(0, "particles")
    for layer, W in zip(model.prior.layers, empty.particles.weights, strict=False):
        eps = randn(4, 1, layer.d_out, layer.rank, generator=g)
        torch.testing.assert_close(W, layer.given().weights(eps))


def one_layer(kind: str, shared: bool, noise: float = 0.3) -> BNNP:
    model = build(kind, shared, hidden=(), likelihood=bnnp.Gaussian(noise, learn_noise=False), y_dim=1)
    return model


@LAWS
def test_one_layer_is_bayesian_linear_regression_and_a_gp(kind: str, shared: bool) -> None:
    model, (x, y), (xt, yt) = one_layer(kind, shared), data((8,), y_dim=1)[0], data((5,), y_dim=1, seed=2)[0]
    prior, s = next(iter(model.prior)), model.scaling
    noise = float(model.likelihood.noise_std.detach())  # type: ignore[operator, union-attr]
    given = (s.x(x), s.y(y)[:, 0], prior.mean[0].detach(), prior.covariance()[0].detach(), noise, s.x(xt))
    posterior = model.condition(x, y, num_samples=3)
    p, scale = posterior.predict(xt), s.y_scale
    for exact in (scenarios.bayesian_linear_regression(*given), scenarios.gp_linear_kernel(*given)):
        mean, cov = exact["mean"], exact["cov"]
        assert relative_error(p.mean[:, 0], mean * scale + s.y_shift) <= 1e-9
        assert relative_error(p.epistemic_std[:, 0], cov.diagonal().sqrt() * scale) <= 1e-9
        evidence = exact["log_evidence"] - len(x) * scale.log().squeeze()
        assert relative_error(posterior.elbo, evidence) <= 1e-9
        noisy = cov + noise**2 * torch.eye(len(xt), dtype=torch.float64)
        joint = reference.gaussian_log_density(s.y(yt)[:, 0], mean, noisy) - len(xt) * scale.log().squeeze()
        assert relative_error(p.log_prob(yt, joint=True), joint) <= 1e-9


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("hidden", [(4,), (4, 4), (2, 2)])
@LAWS
@LAST
def test_the_posterior_equals_the_slow_twin_given_its_hidden_weights(
    kind: str, shared: bool, last_layer: str, residual: bool, hidden: tuple[int, ...]
) -> None:
    model = build(kind, shared, last_layer, hidden=hidden, residual=residual)
    (x, y), (xt, yt) = data((7,))[0], data((5,), seed=2)[0]
    S, s = 4, model.scaling
    posterior = model.condition(x, y, num_samples=S, seed=2)
    p = posterior.predict(xt)
    weights = [W[:, 0] for W in posterior.particles.weights]
    context = model.scale(Context(x[None], y[None], torch.ones(1, len(x), dtype=torch.bool)))
    sites = [[part[0].detach() for part in model.chain.pseudo(i, context, context.x)[:2]] for i in range(len(model.layers))]
    sites = [[pseudo, root.expand(pseudo.shape).square()] for pseudo, root in sites]
    priors = [(layer.mean.detach(), [L.detach() for L in unit_factors(layer)]) for layer in model.prior]
    noise = model.likelihood.noise_std.detach()  # type: ignore[operator, union-attr]
    task = (context.x[0], context.y[0], s.x(xt), s.y(yt))
    want = reference.collapsed(*task, weights, priors[-1], sites[-1][1], noise, S, "tanh", residual)
    kl = reference.hidden_kl(context.x[0], weights, priors[:-1], [tuple(q) for q in sites[:-1]], "tanh", residual)
    volume = float(s.y_scale.log().sum())
    assert relative_error(posterior.kl, (kl + want["kl"]).mean()) <= 1e-9
    elbo = reference.avi(want["ell_c"], kl, want["kl"]) - len(x) * volume
    assert relative_error(posterior.elbo, elbo) <= 1e-9
    assert relative_error(p.log_prob(yt, joint=True), reference.npml(want["log_pt"]) - len(xt) * volume) <= 1e-9
    assert relative_error(p.mean, s.y_inverse(want["mean"].mean(0))) <= 1e-9
    variance = want["cov"].diagonal(dim1=-2, dim2=-1).mT
    total = variance.mean(0) + want["mean"].var(0, correction=0)
    assert relative_error(p.epistemic_std, total.sqrt() * s.y_scale) <= 1e-9
    assert relative_error(p.std, (total + noise**2).sqrt() * s.y_scale) <= 1e-9
    covs = torch.diag_embed(variance.movedim(0, 0) + noise**2)
    each = torch.stack([reference.mixture_log_density(s.y(yt)[i], want["mean"][:, i], covs[:, i]) for i in range(len(xt))]) - volume
    assert relative_error(p.log_prob(yt), each) <= 1e-9


@LAST
def test_the_collapsed_last_layer_is_what_sampling_it_gives_on_average(last_layer: str) -> None:
    model, (x, y), (xt, yt) = build(last_layer=last_layer, likelihood=bnnp.Gaussian(2.0)), data((7,))[0], data((5,), seed=2)[0]
    S, draws = 4, 20_000
    posterior = model.condition(x, y, num_samples=S, seed=2)
    p = posterior.predict(xt)
    f = p.sample(S * draws, noisy=False, seed=0)
    error = (f.mean(0) - p.mean) / (f.std(0) / math.sqrt(S * draws))
    assert float(error.abs().max()) < 5.0
    assert relative_error(f.std(0), p.epistemic_std) < 5 / math.sqrt(S * draws)
    noise = model.noise_std
    assert noise is not None
    density = torch.distributions.Normal(f, noise).log_prob(yt).sum((-1, -2))
    estimate = density.logsumexp(0) - math.log(S * draws)
    weight = (density - density.max()).exp()
    error_of_log = float(weight.std() / weight.mean() / math.sqrt(S * draws))
    assert abs(float(estimate - p.log_prob(yt, joint=True))) < 5 * error_of_log
    at_context = posterior.predict(x).sample(S * draws, noisy=False, seed=1)
    lik = torch.distributions.Normal(at_context, noise).log_prob(y).sum((-1, -2))
    assert abs(float(lik.mean() - (posterior.elbo + posterior.kl))) < 5 * float(lik.std()) / math.sqrt(S * draws)


def exact_of_tiny(model: BNNP, x: Tensor, y: Tensor, xt: Tensor, activation: str) -> dict[str, Tensor]:
    """Answers by quadrature for a network with one hidden unit."""
    first, last = model.prior
    return scenarios.tiny_network_evidence(
        x, y, xt, first.mean[0].detach(), first.covariance()[0].diagonal().sqrt().detach(), last.mean[0].detach(),
        last.covariance()[0].detach(), float(model.likelihood.noise_std.detach()), activation, nodes=401,  # type: ignore[operator, union-attr]
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@LAST
def test_the_bound_stays_below_the_evidence(activation: str, last_layer: str) -> None:
    model = BNNP(1, 1, hidden=(1,), prior="diagonal", activation=activation, last_layer=last_layer, seed=3).double()
    x, y = scenarios.random_task(6, 1, 1, torch.Generator().manual_seed(0))
    exact = exact_of_tiny(model, x, y, x, activation)
    posterior = model.condition(x, y, num_samples=20_000)
    particles = posterior.particles
    assert particles.last is not None
    spread = particles.expected_log_lik(x[None], y[None], torch.ones(1, 6, dtype=torch.bool)) - particles.kl
    error = float(spread.std()) / math.sqrt(20_000)
    assert float(posterior.elbo) <= float(exact["log_evidence"]) + 4 * error


def test_the_bound_is_the_evidence_where_the_posterior_is_exact() -> None:
    """With a hidden layer that is known (no spread) and an exact last layer, q is the exact posterior."""
    model = build(hidden=(4,), y_dim=1)
    with torch.no_grad():
        model._layers[0].prior.scale_parameters()[0].fill_(-40.0)
        model._layers[0].prior.scale_parameters()[1].zero_()
    (x, y), s = data((8,), y_dim=1)[0], model.scaling
    first, last = model.prior
    A = reference.last_layer(s.x(x), [first.mean.detach()], 1, "tanh", False)[0]
    noise = model.likelihood.noise_std.detach()  # type: ignore[operator, union-attr]
    cov = A @ last.covariance()[0].detach() @ A.T + noise**2 * torch.eye(8, dtype=torch.float64)
    evidence = reference.gaussian_log_density(s.y(y)[:, 0], A @ last.mean[0].detach(), cov) - 8 * s.y_scale.log().squeeze()
    assert relative_error(model.condition(x, y, num_samples=3).elbo, evidence) <= 1e-9


def test_quantiles_invert_the_distribution_function_and_samples_follow_it() -> None:
    posterior = build().condition(*data((6,))[0], num_samples=5)
    p = posterior.predict(data((4,), seed=2)[0][0])
    for q in (0.01, 0.5, 0.9):
        torch.testing.assert_close(p.cdf(p.quantile(q)), torch.full((4, 2), q, dtype=torch.float64), atol=1e-9, rtol=0)
    draws = p.sample(20_000, seed=1)
    below = (draws <= p.quantile(0.3)).double().mean(0)
    assert float((below - 0.3).abs().max()) < 5 * math.sqrt(0.21 / 20_000)


def test_the_density_integrates_to_one_in_the_users_units() -> None:
    model = build(y_dim=1)
    p = model.condition(*data((6,), y_dim=1)[0], num_samples=5).predict(data((1,), seed=2)[0][0])
    grid = torch.linspace(-30, 40, 20_001, dtype=torch.float64)
    density = torch.stack([p.log_prob(v.reshape(1, 1)).exp().squeeze() for v in grid[::10]])
    assert abs(float(torch.trapezoid(density, grid[::10])) - 1) < 1e-3
    one = torch.tensor([[4.0]], dtype=torch.float64)
    torch.testing.assert_close(p.log_prob(one).squeeze(), p.log_prob(one, joint=True))


def test_masked_targets_may_hold_anything() -> None:
    model, (xt, yt) = build(), data((5,), seed=2)[0]
    p = model.condition(*data((6,))[0], num_samples=3).predict(xt)
    mask = torch.tensor([True, True, False, True, True])
    holes = torch.where(mask.unsqueeze(-1), yt, torch.full_like(yt, math.nan))
    seen = model.condition(*data((6,))[0], num_samples=3).predict(xt[mask])
    torch.testing.assert_close(p.log_prob(holes, joint=True, mask=mask), seen.log_prob(yt[mask], joint=True))
    torch.testing.assert_close(p.log_prob(holes, mask=mask)[mask], seen.log_prob(yt[mask]))
    assert float(p.log_prob(holes, mask=mask)[2]) == 0.0
    torch.testing.assert_close(p.cdf(holes, mask=mask)[mask], seen.cdf(yt[mask]))
    torch.testing.assert_close(p.crps(holes, mask=mask)[mask], seen.crps(yt[mask]))  # type: ignore[attr-defined]


def test_a_sampled_function_is_the_same_at_every_call_and_matches_its_weights() -> None:
    model, (x, y) = build(residual=True, hidden=(4, 4)), data((6,))[0]
    posterior = model.condition(x, y, num_samples=5)
    xt = data((9,), seed=2)[0][0]
    functions = posterior.sample_functions(7, seed=1)
    weights = posterior.sample_weights(7, seed=1)
    for i, f in enumerate(functions):
        assert torch.equal(f(xt), f(xt))
        torch.testing.assert_close(f(xt)[3:5], f(xt[3:5]))
        by_hand = reference.forward(model.scaling.x(xt), [W[i] for W in weights], "tanh", True)
        torch.testing.assert_close(f(xt), model.scaling.y_inverse(by_hand))


def test_the_same_seed_gives_the_same_posterior_and_global_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    model, (x, y) = build(), data((6,))[0]
    a, b, c = (model.condition(x, y, num_samples=3, seed=seed).sample_weights(3)[0] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_posterior_does_not_change_when_the_model_is_trained_on() -> None:
    model, (x, y) = build(), data((6,))[0]
    posterior, (xt, yt) = model.condition(x, y, num_samples=3), data((4,), seed=2)[0]
    before = answers(posterior, xt, yt)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor += 1.0
    after = answers(posterior, xt, yt)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_models_precision_and_float32_keeps_four_digits(dtype: torch.dtype) -> None:
    model, (x, y), (xt, yt) = build(), data((8,))[0], data((5,), seed=2)[0]
    want = answers(model.condition(x, y, num_samples=4), xt, yt)
    got = answers(model.to(dtype).condition(x, y, num_samples=4), xt, yt)
    for key, value in got.items():
        assert value.dtype == dtype, key
        if key not in ("sample", "weights", "function"):
            assert relative_error(value.double(), want[key]) <= 1e-4, key


def test_numpy_lists_and_tensors_are_the_same_data() -> None:
    model, (x, y) = build(), data((5,))[0]
    a = model.condition(x, y, num_samples=2).predict(x).mean
    b = model.condition(x.numpy(), y.numpy(), num_samples=2).predict(x.numpy()).mean
    c = model.condition(x.tolist(), y.tolist(), num_samples=2).predict(x.tolist()).mean
    assert torch.equal(a, b) and torch.equal(a, c)


def test_an_untrained_model_has_the_identity_scaling() -> None:
    model = BNNP(2, 1, hidden=(3,))
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.scaling.x(x), x) and torch.equal(model.scaling.y_inverse(x[:, :1]), x[:, :1])
    noise = model.noise_std
    assert noise is not None
    torch.testing.assert_close(noise, torch.tensor([0.1]))


def test_prior_samples_are_coherent_functions_of_the_prior() -> None:
    model = build()
    xt = data((6,), seed=2)[0][0]
    f = model.prior_samples(xt, 5, seed=3)
    assert f.shape == (5, 6, 2)
    assert torch.equal(f, model.prior_samples(xt, 5, seed=3)) and not torch.equal(f, model.prior_samples(xt, 5, seed=4))
    torch.testing.assert_close(model.prior_samples(xt[2:4], 5, seed=3), f[:, 2:4])


def test_layers_drawn_with_equal_seeds_are_independent() -> None:
    """The default seed of the particles and of the draws from them is the same; their numbers must not be."""
    model = BNNP(1, 1, hidden=(1,), seed=1).double()
    posterior = model.condition(torch.zeros(0, 1), torch.zeros(0, 1), num_samples=4000, seed=0)
    first, last = posterior.sample_weights(4000, seed=0)
    correlation = torch.corrcoef(torch.stack([first.flatten(1)[:, 0], last.flatten(1)[:, 0]]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(4000)


def test_a_posterior_does_not_follow_the_arrays_it_was_given() -> None:
    for last_layer in ("exact", "amortised"):
        model, (x, y), (xt, yt) = build(last_layer=last_layer), data((6,))[0], data((4,), seed=2)[0]
        posterior = model.condition(x, y, num_samples=3)
        p, asked = posterior.predict(xt), xt.clone()
        before = posterior.elbo, p.log_prob(yt, joint=True), p.sample(2)
        for tensor in (x, y, xt):
            tensor.mul_(10.0)
        assert torch.equal(posterior.elbo, before[0]) and torch.equal(p.log_prob(yt, joint=True), before[1])
        assert torch.equal(p.sample(2), before[2]) and torch.equal(posterior.predict(asked).mean, p.mean)


def test_predicting_between_does_not_change_a_gradient() -> None:
    found = []
    for look in (False, True):
        model = build()
        posterior = model(collate(data((6,))), num_samples=3)
        if look:
            posterior.predict(torch.zeros(2, 2))
        posterior.kl.sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_call_takes_a_context() -> None:
    with pytest.raises(TypeError, match=r"model\.condition\(x, y\)"):
        build()(torch.zeros(3, 2), torch.zeros(3, 2))


class TestBernoulli:
    def test_a_linear_model_agrees_with_quadrature(self) -> None:
        """The bound stays below the exact evidence, and importance weights of the particles recover it."""
        model = BNNP(1, 1, hidden=(), prior="diagonal", likelihood=bnnp.Bernoulli(), net_hidden=(8,)).double()
        g = torch.Generator().manual_seed(0)
        x = randn(7, 1, generator=g)
        y = (torch.rand(7, 1, generator=g) < x.sigmoid()).double()
        layer = next(iter(model.prior))
        exact = scenarios.linear_bernoulli_evidence(x, y, x, layer.mean[0].detach(), layer.covariance()[0].detach())
        posterior = model.condition(x, y, num_samples=20_000)
        assert float(posterior.elbo) <= float(exact["log_evidence"])
        empty = model.condition(torch.zeros(0, 1), torch.zeros(0, 1), num_samples=200_000).predict(x)
        assert abs(float(empty.log_prob(y, joint=True) - exact["log_evidence"])) < 0.02

    def test_probabilities_samples_and_batches(self) -> None:
        model = build(likelihood=bnnp.Bernoulli())
        g = torch.Generator().manual_seed(0)
        x, y = randn(6, 2, generator=g), (torch.rand(6, 2, generator=g) < 0.5).double()
        p = model.condition(x, y, num_samples=50).predict(x)
        assert p.is_discrete
        both = p.log_prob(torch.ones(6, 2)).exp() * 0
        for a in (0.0, 1.0):
            for b in (0.0, 1.0):
                both = both + p.log_prob(torch.tensor([[a, b]]).expand(6, 2)).exp()
        torch.testing.assert_close(both, torch.ones(6, dtype=torch.float64))
        draws = p.sample(50 * 200, seed=0)
        assert set(draws.unique().tolist()) <= {0.0, 1.0}
        assert float((draws.mean(0) - p.mean).abs().max()) < 0.03
        X, Y, mask = padded([(x, y), (x[:2], y[:2])], 0.0)
        batch = model.condition(X, Y, mask, num_samples=50).predict(x)
        assert relative_error(batch.mean[0], p.mean) <= 1e-9

    def test_labels_outside_zero_and_one_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"in \[0, 1\].*Got 2"):
            build(likelihood=bnnp.Bernoulli()).condition(torch.zeros(2, 2), torch.full((2, 2), 2.0))


BAD = {
    "activation": ({"activation": "swish"}, "activation among gelu, relu"),
    "prior": ({"prior": "dense"}, "prior among diagonal, heavy_tailed, low_rank"),
    "last layer": ({"last_layer": "none"}, "last_layer among"),
    "width": ({"hidden": (0,)}, "hidden width as a positive integer"),
    "x_dim": ({"x_dim": -1}, "x_dim as a positive integer"),
    "precision": ({"factor_dtype": "float16"}, "factor_dtype among"),
    "inference width": ({"net_hidden": (0,)}, "net_hidden width as a positive integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused(case: str) -> None:
    settings, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        BNNP(**{"x_dim": 1, "y_dim": 1, **settings})


@pytest.mark.parametrize(
    "noise", [{"noise_std": -1.0}, {"noise_std": math.nan}, {"noise_std": 1.0, "max_noise_std": 0.5, "learn_noise": False}]
)
def test_bad_noise_is_refused(noise: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="noise_std"):
        bnnp.Gaussian(**noise)


def test_bad_questions_to_a_posterior_are_refused() -> None:
    posterior = build().condition(*data((4,))[0], num_samples=2)
    with pytest.raises(ValueError, match="xt with 2 columns"):
        posterior.predict(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"xt with shape \(points, 2\)"):
        posterior.predict(torch.zeros(2, 3, 2))
    p = posterior.predict(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="3 inputs for 4 outputs"):
        p.log_prob(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="level between 0 and 1"):
        p.quantile(1.0)
    with pytest.raises(ValueError, match="positive integer"):
        p.sample(0)
    with pytest.raises(TypeError, match="seed as an integer"):
        p.sample(1, seed=0.5)  # type: ignore[arg-type]


@pytest.mark.gpu
@LAWS
def test_cuda_gives_the_same_posterior(kind: str, shared: bool) -> None:
    model, (x, y), (xt, yt) = build(kind, shared), data((8,))[0], data((5,), seed=2)[0]
    want = answers(model.condition(x, y, num_samples=4), xt, yt)
    got = answers(model.cuda().condition(x.cuda(), y.cuda(), num_samples=4), xt.cuda(), yt.cuda())
    for key, value in got.items():
        assert value.is_cuda, key
        assert relative_error(value.cpu(), want[key]) <= 1e-9, key


@pytest.mark.parametrize("raw", [-1e4, -50.0, 0.0, 50.0, 1e4])
def test_pseudo_noise_is_bounded_with_a_finite_gradient_however_far_the_network_strays(raw: float) -> None:
    model = build(last_layer="amortised").float()
    net = model._layers[0].net
    assert net is not None
    last = list(net)[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(raw)
    inputs, seen = torch.zeros(1, 3, 4), torch.ones(1, 3, 1, dtype=torch.bool)
    _, root = model._layers[0].pseudo_observations(inputs, inputs[..., :2], seen)
    root.sum().backward()  # type: ignore[no-untyped-call]
    assert bool(root.isfinite().all()) and float(root.detach().max()) <= 1e3 * (1 + 1e-6)
    assert last.bias.grad is not None and bool(last.bias.grad.isfinite().all())
    if raw == 0.0:
        torch.testing.assert_close(root.detach(), torch.full((1, 3, 5), math.exp(2.0)), rtol=1e-4, atol=0)
