"""The amortised posterior in eps: its density is that of its own draws, and what is made of it is right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.engines import gaussian_target, linear_problem, moment_errors
from tests.laws import COMBINATIONS, Combination
from torch import Tensor

import bnnp
from bnnp.draws import Normal
from bnnp.importance import log_mean_exp
from bnnp.inference import Functional, functional, run
from bnnp.inference.amortised import Amortised, build
from bnnp.inference.proposals import Gaussian
from bnnp.networks import BNNP
from bnnp.tasks import Context, make_context

GAUSSIAN_IN_EPS = [c for c in COMBINATIONS if c.kind not in ("mixture", "heavy_tailed") and c.fraction == 1.0]
SIZES = (5, 3)


def scaled_context(model: BNNP, case: Combination, sizes: tuple[int, ...] = SIZES) -> tuple[Context, list[tuple[Tensor, Tensor]]]:
    tasks = case.tasks(sizes)
    context, _ = make_context([x for x, _ in tasks], [y for _, y in tasks], x_dim=2, y_dim=2, dtype=model.dtype)
    return model.scale(context), tasks


def noise(seed: int = 0) -> Normal:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("sizes", [SIZES, (14, 9), (2, 0)], ids=str)
@pytest.mark.parametrize("case", GAUSSIAN_IN_EPS, ids=str)
def test_eps_is_drawn_as_particles_are_and_has_their_density(case: Combination, sizes: tuple[int, ...]) -> None:
    model = case.build()
    context, _ = scaled_context(model, case, sizes)
    particles = model.chain.particles(context, 4, noise(), canonical=True)
    layers = len(particles.weights)
    eps, ratio = model.chain.draw_eps(context, 4, noise(), layers)
    weights, before = [], []
    for layer, z in zip(model.prior, eps, strict=False):
        weights.append(layer.given(before).weights(z))
        before.append(z)
    for W, own in zip(weights, particles.weights, strict=True):
        torch.testing.assert_close(W, own, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ratio, particles.log_ratio, rtol=1e-8, atol=1e-7)
    torch.testing.assert_close(model.chain.log_ratio(context, eps), particles.log_ratio, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("case", GAUSSIAN_IN_EPS, ids=str)
def test_the_last_layer_has_its_density_too(case: Combination) -> None:
    model = case.build()
    context, _ = scaled_context(model, case)
    eps, ratio = model.chain.draw_eps(context, 3, noise(), 3)
    log_ratio = model.chain.log_ratio(context, eps)
    torch.testing.assert_close(log_ratio, ratio)
    assert [z.shape[-2] for z in eps] == [1 if layer.joint else layer.d_out for layer in model.prior]
    if case.last == "exact" and not case.options:
        # Then log p(y | eps) - (log q - log p) is the same whatever was drawn of the last layer: the evidence given the layers before.
        _, tasks = scaled_context(model, case)
        F = functional(model, [x for x, _ in tasks], [y for _, y in tasks], collapse=True)
        whole = functional(model, [x for x, _ in tasks], [y for _, y in tasks])
        hidden = torch.cat([z.flatten(-2) for z in eps[:-1]], -1)
        both = torch.cat([hidden, eps[-1].flatten(-2)], -1)
        want = F.log_likelihood(hidden) - model.chain.log_ratio(context, eps[:-1])
        torch.testing.assert_close(whole.log_likelihood(both) - log_ratio, want, rtol=1e-8, atol=1e-7)


def test_the_density_is_differentiable() -> None:
    model = Combination("per_unit", "exact", False).build()
    context, _ = scaled_context(model, Combination("per_unit", "exact", False))
    eps, _ = model.chain.draw_eps(context, 2, noise(), 2)
    at = [z.detach().requires_grad_() for z in eps]
    assert torch.autograd.gradcheck(lambda *z: model.chain.log_ratio(context, z), at)


@pytest.mark.parametrize("kind", ["mixture", "heavy_tailed"])
def test_priors_that_are_not_gaussian_are_refused(kind: str) -> None:
    case = Combination(kind, "exact", True)
    model = case.build()
    context, _ = scaled_context(model, case)
    with pytest.raises(ValueError, match="Expected a prior whose q is Gaussian in eps"):
        model.chain.draw_eps(context, 2, noise(), 2)


def trained_like(seed: int = 0) -> tuple[BNNP, Any, Any]:
    """A small network with its data, the functional of all layers and that without the last."""
    case = Combination("per_unit", "exact", False)
    model, tasks = case.build(seed), case.tasks(SIZES)
    data = [x for x, _ in tasks], [y for _, y in tasks]
    return model, functional(model, *data), functional(model, *data, collapse=True)


@pytest.mark.parametrize("kind", ["per_unit", "network", "low_rank"])
def test_the_proposal_has_the_density_of_its_draws(kind: str) -> None:
    """E_q[p / q] = 1 for any normalised p, here one close to q; and the density is that of the chain written out."""
    case = Combination(kind, "exact", False)
    model, tasks = case.build(), case.tasks(SIZES)
    F = functional(model, [x for x, _ in tasks], [y for _, y in tasks], collapse=True)
    q = Amortised(F, model)
    eps = q.draw(4000, seed=1)
    assert eps.shape == (4000, 2, F.dim)
    other = Gaussian(eps.mean(0), 0.4 * eps.std(0))
    ratio = (other.log_density(eps) - q.log_density(eps)).exp()
    back = other.draw(4000, seed=2)
    # By draws from the other side too, where the ratio is bounded: E_other[q / (q + other)] = E_q[other / (q + other)].
    both = (q.log_density(back) - other.log_density(back)).sigmoid(), (other.log_density(eps) - q.log_density(eps)).sigmoid()
    error = (both[0].var(0) / 4000 + both[1].var(0) / 4000).sqrt()
    assert bool(((both[0].mean(0) - both[1].mean(0)).abs() < 4.5 * error).all()), (ratio.mean(0), both)
    extra = q.log_density(eps[:6].reshape(2, 3, 2, F.dim))
    torch.testing.assert_close(extra, q.log_density(eps[:6]).reshape(2, 3, 2))
    far = eps[:2].clone()
    far[0, 0, 0], far[1, 1, 0] = math.nan, 1e6
    assert (q.log_density(far) == -math.inf).tolist() == [[True, False], [False, True]]


def test_the_engine_gives_what_the_posterior_says_of_itself() -> None:
    model, whole, collapsed = trained_like()
    posterior = model.condition(
        [x[m] for x, m in zip(whole.context.x, whole.context.mask, strict=True)],
        [y[m] for y, m in zip(whole.context.y, whole.context.mask, strict=True)],
        num_samples=1000,
    )
    for F in (whole, collapsed):
        found = run(F, build, num_samples=64, model=model, num_particles=1000)
        r = found.report
        bounds = posterior.bounds
        error = (r["elbo_se"].square() + bounds.var(0) / 1000).sqrt()
        assert bool(((r["elbo"] - bounds.mean(0)).abs() < 4.5 * error).all())
        assert bool((r["log_evidence"] >= r["elbo"]).all()) and found.gradients == 0
        assert found.draws.log_weights is None and found.draws.eps.shape == (64, 2, F.dim)
        assert found.posterior is not None
    # An exact last layer adds nothing to the weights, drawn or not.
    w, c = (run(F, build, num_samples=4, model=model, num_particles=1000).report["elbo_se"] for F in (whole, collapsed))
    torch.testing.assert_close(w, c, rtol=0.3, atol=0)


def take(model: BNNP, target: Functional) -> None:
    for own, layer in zip(model.prior, target.layers, strict=True):
        own.load_state_dict(layer.state_dict())


def test_importance_leads_to_the_posterior() -> None:
    p = linear_problem()
    model = bnnp.BNNP(2, 1, hidden=(), prior="per_unit", likelihood=bnnp.Gaussian(0.8, learn_noise=False)).double()
    take(model, p.target)
    proposal = Amortised(p.target, model)  # of a larger noise than the target's
    assert not proposal.same_likelihood
    eps = proposal.draw(20_000, seed=0)
    log_weights = p.target.log_joint(eps) - proposal.log_density(eps)
    W = log_weights.softmax(0).unsqueeze(-1)
    assert float(((W * eps).sum(0) - p.mean).abs().max()) < 0.05
    found, error = log_mean_exp(log_weights)
    assert bool(((found - p.log_evidence).abs() < 4.5 * error).all())
    exact = bnnp.BNNP(2, 1, hidden=(), prior="per_unit", likelihood=bnnp.Gaussian(0.4, learn_noise=False)).double()
    take(exact, p.target)
    engine = run(p.target, build, num_samples=3000, model=exact, num_particles=3000, importance=True)
    assert engine.draws.log_weights is not None
    torch.testing.assert_close(engine.report["elbo"], p.log_evidence)  # here q is the posterior itself, and every weight the evidence
    assert max(moment_errors(engine.draws.eps, p.mean, p.cov, 3000)) < 4.5
    fewer = run(p.target, build, num_samples=1000, model=exact, num_particles=3000, importance=True).draws
    assert fewer.log_weights is None and max(moment_errors(fewer.eps, p.mean, p.cov, 900)) < 4.5


def test_what_cannot_be_computed_weighs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, F, _ = trained_like()
    plain = run(F, build, num_samples=64, model=model, num_particles=64, importance=True)
    own = Functional.log_likelihood
    lost = plain.draws.eps[7, :, 0]

    def holed(self: Functional, eps: Tensor, batch: Tensor | None = None) -> Tensor:
        return own(self, eps, batch).masked_fill((eps[..., 0] == lost), math.nan)

    monkeypatch.setattr(Functional, "log_likelihood", holed)
    found = run(F, build, num_samples=64, model=model, num_particles=64, importance=True)
    assert plain.draws.log_weights is not None and found.draws.log_weights is not None
    assert bool((found.draws.log_weights[7] == -math.inf).all()) and bool(found.report["log_evidence"].isfinite().all())
    W = found.draws.log_weights.softmax(0)
    assert bool(W.isfinite().all()) and float(W.max()) > 1.5 / 64  # not equal


def test_what_does_not_fit_is_refused() -> None:
    model, _, _ = trained_like()
    data = [[[0.0, 1.0]], [[1.0, 2.0]]]
    fits = functional(model, *data)
    assert build(fits, model=model).name == "amortised"
    refused = {
        "prior and scaling of the model": functional(model, *data, prior="per_unit"),
        "likelihood of the model": functional(model, *data, likelihood=bnnp.Gaussian(0.01, learn_noise=False)),
    }
    for words, F in refused.items():
        with pytest.raises(ValueError, match=words):
            build(F, model=model)
    with pytest.raises(ValueError, match="prior and scaling of the model"):
        build(fits, model=Combination("diagonal", "exact", False).build())
    with pytest.raises(ValueError, match="Expected no start"):
        build(fits, model=model, start=torch.zeros(3, 1, fits.dim))
    with pytest.raises(TypeError, match="Expected a functional"):
        build(gaussian_target(), model=model)
    with pytest.raises(TypeError, match=r"Expected model as a bnnp\.BNNP"):
        build(fits, model=fits)
    mixed = Combination("mixture", "exact", True).build()
    with pytest.raises(ValueError, match="one chain of Gaussians"):
        build(functional(mixed, *data, component=0), model=mixed)
    heavy = Combination("heavy_tailed", "exact", True).build()
    with pytest.raises(ValueError, match="Gaussian in eps"):
        run(functional(heavy, *data), build, num_samples=2, model=heavy)
