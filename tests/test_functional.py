"""A network as one log-joint: its densities are those of the weights, under every prior; it batches, maps and comes back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws import COMBINATIONS, Combination, randn
from torch import Tensor

import bnnp
from bnnp.inference import functional
from bnnp.tails import log_scale

WHOLE = [c for c in COMBINATIONS if c.fraction == 1.0 and not c.options]
SIZES = (5, 3)


def made(case: Combination, **settings: Any) -> tuple[bnnp.BNNP, Any, list[tuple[Tensor, Tensor]]]:
    model, tasks = case.build(), case.tasks(SIZES)
    component = 1 if case.kind == "mixture" else None
    return model, functional(model, [x for x, _ in tasks], [y for _, y in tasks], component=component, **settings), tasks


def draws(F: Any, n: int = 3, seed: int = 0) -> Tensor:
    lead = (n,) if F.single else (n, F.num_tasks)
    return randn(*lead, F.dim, generator=torch.Generator().manual_seed(seed))


def dense_weights(model: bnnp.BNNP, F: Any, eps: Tensor) -> list[Tensor]:
    """W of each layer of one draw of one task, by loops: mean + L eps with L written out for the whole layer."""
    found, at, parts = [], 0, []
    for layer in F.layers:
        base = getattr(layer, "base", layer)
        rows = 1 if base.joint else base.d_out
        if type(base).__name__ in ("PerLayer", "Network", "MatrixNormal"):
            k = base.d_out * base.p
            own = eps[at : at + k]
            parts.append(own)
            z = torch.cat(parts) if type(base).__name__ == "Network" else own
            drawn = base.dense() @ z
        else:
            k = rows * base.rank
            z = eps[at : at + k].reshape(rows, base.rank)
            L = base.given().factor.project(torch.eye(base.p, dtype=torch.float64)).transpose(0, 1)
            drawn = torch.stack([L[u % len(L)] @ z[u] for u in range(rows)])
        at += k
        if layer is not base:
            drawn = drawn * (0.5 * log_scale(eps[at], layer.dof)).exp()
            at += 1
        found.append(base.mean + drawn)
    assert at == len(eps)
    return found


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_the_joint_density_is_that_of_the_weights_written_out(case: Combination) -> None:
    model, F, tasks = made(case)
    eps = draws(F)
    log_joint, f, weights = F.log_joint(eps), F.outputs(eps), F.weights(eps)
    for s in range(3):
        for t, (x, y) in enumerate(tasks):
            W = dense_weights(model, F, eps[s, t])
            for l, layer in enumerate(W):
                torch.testing.assert_close(weights[l][s, t], layer, rtol=1e-10, atol=1e-10)
            h = model.scaling.x(x)
            for l, layer in enumerate(W):
                h = torch.cat([h if l == 0 else torch.tanh(h), torch.ones(len(h), 1).double()], -1) @ layer.T
            torch.testing.assert_close(f[s, t, : len(x)], h)
            lik = model.likelihood.log_prob_each(h, model.scaling.y(y)).sum() - len(x) * model.scaling.y_scale.log().sum()
            prior = torch.distributions.Normal(0.0, 1.0).log_prob(eps[s, t]).sum()
            torch.testing.assert_close(log_joint[s, t], lik + prior)


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_weights_go_to_eps_and_back(case: Combination) -> None:
    _, F, _ = made(case)
    weights = F.weights(draws(F))
    back = F.eps(weights)
    for a, b in zip(F.weights(back), weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    if case.kind not in ("low_rank", "heavy_tailed"):  # where eps has no more elements than there are weights
        torch.testing.assert_close(back, draws(F), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", [c for c in WHOLE if c.last != "drawn"], ids=str)
def test_a_collapsed_last_layer_is_the_integral_over_it(case: Combination) -> None:
    """log p(y | hidden) = log p(y | hidden, w) + log p(w) - log p(w | y, hidden) at any w: here through a posterior of the last layer."""
    _, whole, _ = made(case)
    _, F, _ = made(case, collapse=True)
    eps = draws(F, n=2)
    drawn = torch.zeros(2, len(SIZES), whole.dim - F.dim, dtype=torch.float64)
    at, heavy = F.dim, case.kind == "heavy_tailed"
    full = torch.cat([eps[..., : at - heavy], drawn, eps[..., at - heavy :]], -1)
    hidden, base = whole.weights(full)[:-1], whole.log_likelihood(full)
    assert all(torch.equal(a, b) for a, b in zip(F.weights(eps), hidden, strict=True))
    # The likelihood is Gaussian in the last layer's eps: its value, gradient and Hessian at 0 give the integral.
    for s in range(2):
        for t in range(len(SIZES)):

            def log_lik(z: Tensor, s: int = s, t: int = t) -> Tensor:
                parts = torch.cat([eps[s, t, : at - heavy], z, eps[s, t, at - heavy :]])
                return whole.log_likelihood(parts.expand(1, len(SIZES), -1))[0, t]

            zero = torch.zeros(drawn.shape[-1], dtype=torch.float64)
            g = torch.func.grad(log_lik)(zero)
            M = torch.eye(len(zero), dtype=torch.float64) - torch.func.jacrev(torch.func.grad(log_lik))(zero)
            want = base[s, t] + 0.5 * g @ torch.linalg.solve(M, g) - 0.5 * torch.logdet(M)
            torch.testing.assert_close(F.log_likelihood(eps)[s, t], want, rtol=1e-8, atol=1e-8)


def test_many_tasks_are_a_loop_over_tasks_and_padding_says_nothing() -> None:
    for collapse in (False, True):
        _, F, tasks = made(Combination("shared", "exact", True), collapse=collapse)
        eps = draws(F)
        for t in range(len(SIZES)):
            one = F.task(t)
            alone = functional(Combination("shared", "exact", True).build(), *tasks[t], collapse=collapse)
            torch.testing.assert_close(one.log_joint(eps[:, t]), F.log_joint(eps)[:, t])
            torch.testing.assert_close(alone.log_joint(eps[:, t]), F.log_joint(eps)[:, t])
            torch.testing.assert_close(alone.batched.monitor(eps[:, t : t + 1])[..., -1], F.monitor(eps)[:, t : t + 1, -1])


@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize("kind", ["diagonal", "per_unit", "matrix_normal", "network", "heavy_tailed"])
def test_it_maps_over_chains_and_tasks_and_differentiates(kind: str, collapse: bool) -> None:
    _, F, tasks = made(Combination(kind, "exact", True), collapse=collapse)
    eps = draws(F)
    torch.testing.assert_close(torch.func.vmap(F.log_joint)(eps), F.log_joint(eps))
    value, gradient = F.value_and_grad(eps)
    mapped = torch.func.vmap(torch.func.grad(lambda e: F.log_joint(e).sum()))(eps)
    torch.testing.assert_close(value, F.log_joint(eps))
    torch.testing.assert_close(gradient, mapped)
    x, y = torch.stack([tasks[0][0], tasks[0][0] + 1]), torch.stack([tasks[0][1], tasks[0][1] - 1])
    over_tasks = torch.func.vmap(lambda e, x, y: F.on(x, y).log_joint(e), (0, 0, 0))(eps[0], x, y)
    torch.testing.assert_close(over_tasks, F.on(x, y).log_joint(eps[0]))


def test_batches_of_points_are_unbiased() -> None:
    _, F, _ = made(Combination("per_unit", "exact", False))
    eps = draws(F)
    torch.testing.assert_close(F.log_joint(eps, torch.arange(5).expand(2, 5)), F.log_joint(eps))
    g = torch.Generator().manual_seed(0)
    for t in range(2):
        # Every batch of two points of the task, each as often as the other.
        pairs = [torch.tensor([i, j]) for i in range(SIZES[t]) for j in range(SIZES[t]) if i != j]
        each = torch.stack([F.log_joint(eps, pair.expand(2, 2))[:, t] for pair in pairs])
        torch.testing.assert_close(each.mean(0), F.log_joint(eps)[:, t])
    drawn = torch.stack([F.draw_batch(2, g) for _ in range(400)])
    assert all(bool((drawn[:, t] < SIZES[t]).all()) and bool((drawn[:, t, 0] != drawn[:, t, 1]).all()) for t in range(2))
    share = torch.stack([(drawn[:, 0] == i).any(-1).double().mean() for i in range(5)])
    assert bool(((share - 0.4).abs() < 5 * (0.4 * 0.6 / 400) ** 0.5).all())


def test_a_posterior_of_draws_predicts_as_its_networks_do() -> None:
    model, F, tasks = made(Combination("shared", "exact", True))
    eps, xt = draws(F, n=6), tasks[0][0][:2]
    log_weights = draws(F, n=6)[..., 0]
    predictive = F.predict(eps, xt, log_weights)
    f = model.architecture.hidden(model.scaling.x(xt), F.weights(eps)) * model.scaling.y_scale + model.scaling.y_shift
    torch.testing.assert_close(predictive.mean, torch.einsum("st,stmd->tmd", log_weights.softmax(0), f))
    functions = F.posterior(eps).sample_functions(6)
    torch.testing.assert_close(torch.stack([g(xt) for g in functions]).mean(0), f.mean(0))


def test_a_collapsed_posterior_is_the_limit_of_one_with_drawn_last_layers() -> None:
    _, F, tasks = made(Combination("shared", "exact", True), collapse=True)
    _, whole, _ = made(Combination("shared", "exact", True))
    posterior = F.posterior(draws(F, n=4))
    drawn = whole.start(posterior, 40_000, seed=1)
    f = whole.outputs(drawn, F.source.scaling.x(tasks[0][0][:3]).expand(2, 3, 2))
    f = f * F.source.scaling.y_scale + F.source.scaling.y_shift
    predictive = posterior.predict(tasks[0][0][:3])
    error = (f.mean(0) - predictive.mean).abs() / (f.std(0) / 200)
    assert float(error.max()) < 5
    torch.testing.assert_close(f.std(0), predictive.epistemic_std, rtol=0.05, atol=0)


@pytest.mark.parametrize("collapse", [False, True])
def test_updates_weigh_draws_by_what_they_predict(collapse: bool) -> None:
    model, F, tasks = made(Combination("shared", "exact", True), collapse=collapse)
    eps = draws(F, n=5)
    x, y = tasks[0][0][:2].expand(2, 2, 2), tasks[0][1][:2].expand(2, 2, 2) + 0.3
    updated = F.posterior(eps).update(x, y)
    both = functional(model, torch.cat([F.context.x, x], 1), torch.cat([F.context.y, y], 1),
                      torch.cat([F.context.mask, torch.ones(2, 2, dtype=torch.bool)], 1), collapse=collapse)  # fmt: skip
    gained = both.log_likelihood(eps) - F.log_likelihood(eps)
    torch.testing.assert_close(updated.weights, gained.softmax(0))
    torch.testing.assert_close(updated.log_evidence, (gained.logsumexp(0) - torch.tensor(5.0).log()).double())


def test_the_amortised_posterior_can_be_started_from() -> None:
    model, F, tasks = made(Combination("network", "exact", True))
    posterior = model.condition([x for x, _ in tasks], [y for _, y in tasks], num_samples=8)
    eps = F.start(posterior, 8)
    for a, b in zip(F.weights(eps), posterior.sample_weights(8), strict=True):
        assert a.shape == b.shape
    single = functional(model, *tasks[0]).start(model.condition(*tasks[0], num_samples=8), 8)
    assert single.shape == (8, F.dim)


def test_other_priors_and_likelihoods() -> None:
    model, _, tasks = made(Combination("per_unit", "exact", True))
    fixed = functional(model, *tasks[0], prior="diagonal", likelihood=bnnp.Gaussian(0.5, learn_noise=False))
    W = fixed.weights(torch.ones(fixed.dim, dtype=torch.float64))
    torch.testing.assert_close(W[1], torch.full_like(W[1], 4**-0.5))
    torch.testing.assert_close(fixed.likelihood.noise_std * model.scaling.y_scale, torch.full((2,), 0.5).double())
    other = Combination("shared", "exact", True).build(seed=3)
    borrowed, own = functional(model, *tasks[0], prior=other), functional(other, *tasks[0])
    eps = draws(own)
    assert all(torch.equal(a, b) for a, b in zip(borrowed.weights(eps), own.weights(eps), strict=True))
    before = fixed.log_joint(torch.ones(fixed.dim).double())
    for parameter in model.parameters():
        parameter.data += 1  # what becomes of the model afterwards does not reach it
    torch.testing.assert_close(fixed.log_joint(torch.ones(fixed.dim).double()), before)


def test_another_likelihood_keeps_what_belongs_to_the_network_and_forgets_nothing() -> None:
    model, _, tasks = made(Combination("shared", "exact", True))
    assert isinstance(model.likelihood, bnnp.Gaussian)
    model.likelihood.raw_noise.data += 0.7  # as learned
    eps = torch.zeros(functional(model, *tasks[0]).dim, dtype=torch.float64)
    torch.testing.assert_close(
        functional(model, *tasks[0], likelihood=model.likelihood).log_joint(eps), functional(model, *tasks[0]).log_joint(eps)
    )
    counts = bnnp.BNNP(1, 1, hidden=(3,), likelihood=bnnp.Poisson()).double()
    counts.likelihood.fit(torch.tensor([[7.0], [9.0]]), torch.ones(2, 1, dtype=torch.bool))
    x, y, eps = [[0.0], [1.0]], [[7.0], [8.0]], torch.zeros(10, dtype=torch.float64)
    own = functional(counts, x, y).log_joint(eps)
    torch.testing.assert_close(functional(counts, x, y, likelihood=bnnp.Poisson()).log_joint(eps), own)
    assert float(functional(counts, x, y, likelihood=bnnp.NegativeBinomial(1e-6)).log_joint(eps) - own) == pytest.approx(0, abs=1e-3)
    assert functional(bnnp.BNNP(1, 1, hidden=(3,), likelihood=bnnp.Bernoulli()), x, y, likelihood=bnnp.Poisson()).dim == 10
    several = bnnp.BNNP(1, 2, hidden=(3,), likelihood=bnnp.MultivariateGaussian(0.5)).double()
    assert functional(several, [[0.0]], [[1.0, 2.0]], likelihood=bnnp.MultivariateGaussian(0.3)).dim == 14
    several.likelihood.get_parameter("lower").data += 0.1
    with pytest.raises(ValueError, match="nothing is learned here"):
        functional(bnnp.BNNP(1, 2, hidden=(3,)), [[0.0]], [[1.0, 2.0]], likelihood=several.likelihood)


def test_what_cannot_be_computed_is_no_error_for_a_sampler() -> None:
    _, F, _ = made(Combination("shared", "exact", True), collapse=True)
    eps = draws(F, n=2)
    eps[0, 0] = 1e200
    value, gradient = F.value_and_grad(eps)
    good = F.value_and_grad(eps[1:])
    torch.testing.assert_close(value[1:], good[0])
    torch.testing.assert_close(gradient[1:], good[1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prior": 3}, "Expected prior as None, a name"),
        ({"component": 0}, "Expected no component"),
        ({"likelihood": bnnp.Bernoulli()}, "Expected a likelihood of as many"),
        ({"likelihood": 0.1}, "Expected likelihood as one of"),
        ({"likelihood": bnnp.Gaussian(0.3)}, "nothing is learned here"),
        ({"likelihood": Combination("shared", "exact", True).build().likelihood}, "nothing is learned here"),
        ({"dtype": torch.float16}, "Expected dtype as"),
        ({"prior": bnnp.BNNP(2, 2, hidden=(5,))}, "Expected a prior of weights with shapes"),
        ({"prior": bnnp.Prior("mixture")}, "Expected component= from 0 to 2"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: str) -> None:
    model, _, tasks = made(Combination("shared", "exact", True))
    with pytest.raises((ValueError, TypeError), match=words):
        functional(model, *tasks[0], **settings)


def test_wrong_draws_and_questions_are_named(tmp_path: Path) -> None:
    model, F, tasks = made(Combination("shared", "exact", True))
    with pytest.raises(ValueError, match="Expected draws of eps with shape"):
        F.posterior(torch.zeros(3, F.dim))
    with pytest.raises(ValueError, match="Expected finite draws"):
        F.posterior(torch.full((3, 2, F.dim), torch.nan))
    for weights in (torch.full((3, 2), torch.nan), torch.tensor([[0.0, -torch.inf]] * 3), torch.tensor([[0.0, torch.inf]] * 3)):
        with pytest.raises(ValueError, match="Expected log_weights below infinity"):
            F.posterior(draws(F), weights)
    with pytest.raises(ValueError, match=r"Expected log_weights with shape \(3, 2\)"):
        F.posterior(draws(F), torch.zeros(3, 1))
    whole, fewer = torch.zeros(3, 2, F.dim).double(), functional(model, [x for x, _ in tasks], [y for _, y in tasks], collapse=True)
    for ask in (fewer.log_joint, fewer.weights, fewer.monitor, fewer.value_and_grad):
        with pytest.raises(ValueError, match=f"Expected eps with {fewer.dim} elements"):
            ask(whole)
    with pytest.raises(ValueError, match=f"Expected eps with {F.dim} elements"):
        F.outputs(whole[..., 1:])
    with pytest.raises(ValueError, match="Expected weights of 3 layers"):
        F.eps(F.weights(whole)[:1])
    for index in (-1, 2):
        with pytest.raises(ValueError, match="Expected the number of a task from 0 to 1"):
            F.task(index)
    posterior = F.posterior(draws(F))
    for question in (lambda: posterior.elbo, lambda: posterior.kl, posterior.diagnose):
        with pytest.raises(ValueError, match="Got draws of another inference engine"):
            question()
    with pytest.raises(TypeError, match="Give its run a folder"):
        posterior.save(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="Run the engine again"):
        dataclasses.replace(posterior, kept=(F.context,)).refresh()
    with pytest.raises(ValueError, match=r"Expected a posterior of 2 task\(s\)"):
        F.start(model.condition(*tasks[0]), 3)
    collapsed = functional(model, *tasks[0], collapse=True)
    with pytest.raises(ValueError, match="points depend on each other"):
        collapsed.log_likelihood(torch.zeros(1, collapsed.dim), torch.tensor([0]))
    with pytest.raises(ValueError, match="no closed form"):
        functional(bnnp.BNNP(1, 1, likelihood=bnnp.Bernoulli()), [[0.0]], [[1.0]], collapse=True)


@pytest.mark.parametrize("kind", ["per_unit", "shared", "matrix_normal"])
def test_a_prior_without_width_in_some_directions_has_starts_all_the_same(kind: str) -> None:
    """Draws in single precision, whose rounding a nearly singular factor would make as large as one likes."""
    model = bnnp.BNNP(1, 1, hidden=(5, 5), prior=kind)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.prior:
            low = next(p for name, p in layer.named_parameters() if "log" in name)
            low[..., -3:-1] = -30.0
            for name, parameter in layer.named_parameters():
                if "log" not in name:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=g)
    x = torch.linspace(-1, 1, 6)[:, None]
    posterior = model.condition(x, x.square(), num_samples=8)
    F = functional(model, x, x.square())
    eps = F.start(posterior, 8)
    assert float(eps.abs().max()) < 20
    drawn = posterior.draws(8, seeded(0, "start"))
    for W, own in zip(F.weights(eps), drawn, strict=True):
        torch.testing.assert_close(W.unsqueeze(-3), own.double(), rtol=0, atol=3e-5)
