"""Outputs that depend on each other, by the prior of the last layer or by their noise: a linear model against one dense Gaussian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import bnnp
import reference
from laws import randn, relative_error

D = 3
KINDS = ["diagonal", "shared", "low_rank", "per_layer", "network", "matrix_normal"]


def model_of(kind: str, correlated: bool, missing: bool = False, last_layer: str = "exact") -> bnnp.BNNP:
    likelihood = bnnp.MultivariateGaussian(0.5) if correlated else bnnp.Gaussian(0.5)
    prior = bnnp.Prior(kind, rank=2)
    model = bnnp.BNNP(1, D, hidden=(), prior=prior, likelihood=likelihood, missing_outputs=missing, last_layer=last_layer).double()
    g = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.4 * randn(*parameter.shape, generator=g)
    x = 2 + 3 * randn(50, 1, generator=g)
    model.fit_scaling([bnnp.Task(x, 5 - 2 * randn(50, D, generator=g))])
    return model


def noise_of(model: bnnp.BNNP) -> Tensor:
    """Covariance of the noise in the user's units."""
    s, likelihood = model.scaling.y_scale, model.likelihood
    own = likelihood.noise_cov if isinstance(likelihood, bnnp.MultivariateGaussian) else torch.diag(likelihood.noise_std**2)  # type: ignore[operator]
    return (own * s * s.unsqueeze(-1)).detach()


def dense(model: bnnp.BNNP, x: Tensor, y: Tensor, seen: Tensor, xt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log evidence of what was seen of y, and mean and covariance of y at xt (points by outputs, flattened), by one Gaussian of all."""
    s, layer = model.scaling, model.prior.layers[0]
    L, mean = layer.dense().detach().flatten(0, 1), layer.mean.detach().flatten()

    def rows(x: Tensor) -> Tensor:
        A = torch.cat([s.x(x), torch.ones_like(x)], dim=-1)
        return reference.layer_block(A, D) * s.y_scale.repeat(len(x)).unsqueeze(-1)

    X, Xt, noise = rows(x), rows(xt), noise_of(model)
    K, keep = X @ L @ L.T @ X.T + torch.block_diag(*[noise] * len(x)), seen.flatten()
    shift, shift_t = X @ mean + s.y_shift.repeat(len(x)), Xt @ mean + s.y_shift.repeat(len(xt))
    r, K_oo = (y.flatten() - shift)[keep], K[keep][:, keep]
    cross = Xt @ L @ L.T @ X[keep].T
    Kt = Xt @ L @ L.T @ Xt.T + torch.block_diag(*[noise] * len(xt))
    evidence = reference.gaussian_log_density(r, torch.zeros_like(r), K_oo)
    return evidence, shift_t + cross @ torch.linalg.solve(K_oo, r), Kt - cross @ torch.linalg.solve(K_oo, cross.T)


def data(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 2 + 3 * randn(n, 1, generator=g), 5 + randn(n, D, generator=g)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("missing", [False, True])
def test_a_linear_model_with_coupled_outputs_is_one_dense_gaussian(kind: str, correlated: bool, missing: bool) -> None:
    model = model_of(kind, correlated, missing)
    (x, y), (xt, yt) = data(6), data(4, seed=2)
    seen = torch.rand(6, D, generator=torch.Generator().manual_seed(3)) < 0.6 if missing else torch.ones(6, D, dtype=torch.bool)
    garbage = torch.where(seen, y, torch.full_like(y, math.nan))
    posterior = model.condition(x, garbage, mask=seen if missing else None, num_samples=3)
    evidence, mean, cov = dense(model, x, y, seen, xt)
    assert relative_error(posterior.elbo, evidence) <= 1e-9
    p = posterior.predict(xt)
    assert relative_error(p.mean.flatten(), mean) <= 1e-9
    assert relative_error(p.std.flatten(), cov.diagonal().sqrt()) <= 1e-9
    want = MultivariateNormal(mean, cov).log_prob(yt.flatten())
    assert relative_error(p.log_prob(yt, joint=True), want) <= 1e-9
    for n in range(4):
        at = slice(n * D, (n + 1) * D)
        each = MultivariateNormal(mean[at], cov[at, at]).log_prob(yt[n])
        assert relative_error(p.log_prob(yt)[n], each) <= 1e-9
        if posterior.particles.coupled:
            assert relative_error(p.distribution.log_prob(yt)[n], each) <= 1e-9
    some = torch.tensor([[True, False, True]] * 4)
    at = torch.tensor([0, 2])
    if missing:
        each = MultivariateNormal(mean[at], cov[at][:, at]).log_prob(yt[0, at])
        assert relative_error(p.log_prob(yt, mask=some)[0], each) <= 1e-9
        keep = some.flatten()
        together = MultivariateNormal(mean[keep], cov[keep][:, keep]).log_prob(yt.flatten()[keep])
        assert relative_error(p.log_prob(yt, joint=True, mask=some), together) <= 1e-9
    # Draws of y have the covariance of all points and outputs together.
    draws = p.sample(40_000, seed=1).flatten(1)
    assert float((torch.cov(draws.T) - cov).abs().max() / cov.abs().max()) <= 0.05


@pytest.mark.parametrize("kind", ["shared", "matrix_normal", "per_layer"])
@pytest.mark.parametrize("last_layer", ["exact", "amortised"])
def test_correlated_noise_streams_updates_and_survives_a_file(kind: str, last_layer: str, tmp_path: object) -> None:
    model, (x, y), (xt, yt) = model_of(kind, True, last_layer=last_layer), data(7), data(4, seed=2)
    whole = model.condition(x, y, num_samples=3)
    batches = model.condition(x, y, num_samples=3, context_batch_size=2)
    parts = model.condition(x[:3], y[:3], num_samples=3).update(x[3:], y[3:])
    parts.save(f"{tmp_path}/posterior")
    for other in (batches, parts, bnnp.load_posterior(f"{tmp_path}/posterior", model)):
        assert relative_error(other.predict(xt).log_prob(yt), whole.predict(xt).log_prob(yt)) <= 1e-9
        assert relative_error(other.log_importance, whole.log_importance) <= 1e-9
    evidence = dense(model, x, y, torch.ones(7, D, dtype=torch.bool), xt)[0]
    assert relative_error(whole.log_importance[0], evidence) <= 1e-9  # that of an exact last layer, whichever it is


def test_a_learned_noise_covariance_is_found() -> None:
    """Meta-training on tasks with noise of a known correlation ends near it."""
    g = torch.Generator().manual_seed(0)
    C = torch.tensor([[0.5, 0.0], [0.4, 0.3]])
    tasks = []
    for _ in range(40):
        x = torch.rand(20, 1, generator=g) * 4 - 2
        slope = torch.randn(2, generator=g)
        tasks.append((x, x * slope + torch.randn(20, 2, generator=g) @ C.T))
    model = bnnp.BNNP(1, 2, hidden=(), prior="shared", likelihood=bnnp.MultivariateGaussian(0.5))
    bnnp.meta_train(model, tasks, steps=150, num_samples=2, learning_rate=0.03, objective="avi", progress=False)
    found = noise_of(model)
    correlation = float(found[0, 1] / (found[0, 0] * found[1, 1]).sqrt())
    assert abs(correlation - 0.8) <= 0.1
    assert 0.8 <= float(found[0, 0].sqrt()) / 0.5 <= 1.2


def test_a_temperature_is_the_same_as_larger_pseudo_noise() -> None:
    """With it, hidden precisions are (1 + N)^-kappa times as large, N the observed points of the task, whatever the padding."""
    options = {"hidden": (4, 3), "prior": "shared", "activation": "tanh", "seed": 3}
    hot, plain = bnnp.BNNP(1, 1, temperature=True, **options).double(), bnnp.BNNP(1, 1, **options).double()  # type: ignore[arg-type]
    shared = {k: v for k, v in hot.state_dict().items() if "kappa" not in k}
    plain.load_state_dict(shared)
    for layer in list(hot.layers)[:-1]:
        layer.raw_kappa.data.fill_(math.log(math.expm1(0.7)))  # type: ignore[union-attr]
    g = torch.Generator().manual_seed(1)
    x, y = randn(9, 1, generator=g), randn(9, 1, generator=g)
    context = plain.scale(bnnp.collate([(x, y), (x[:4], y[:4])]))
    for i in (0, 1):
        _, root, _ = plain.chain.pseudo(i, context, context.x)
        sites = hot.chain._tempered(i, bnnp.factors.Sites(root, root), context.counts)
        want = root.square() * torch.tensor([10.0, 5.0], dtype=torch.float64).pow(-0.7)[:, None, None]
        assert relative_error(sites.root_prec.square(), want) <= 1e-9
    wide = torch.linspace(-3, 3, 7, dtype=torch.float64).unsqueeze(-1)
    spread = [model.condition(x, y, num_samples=200).kl for model in (hot, plain)]
    assert float(spread[0]) < float(spread[1])  # less is taken from the data
    assert not torch.equal(hot.condition(x, y, num_samples=8).predict(wide).mean, plain.condition(x, y, num_samples=8).predict(wide).mean)


def test_a_trunk_is_one_network_with_heads() -> None:
    options = {"hidden": (6, 5), "net_hidden": (7, 8)}
    separate, joined = bnnp.BNNP(2, 1, **options), bnnp.BNNP(2, 1, trunk=True, **options)  # type: ignore[arg-type]
    assert [m.out_features for m in joined.trunk.modules() if isinstance(m, torch.nn.Linear)] == [7, 8]  # type: ignore[union-attr]
    heads = [layer.net for layer in joined.layers if layer.net is not None]
    assert [[m.in_features for m in head.modules() if isinstance(m, torch.nn.Linear)] for head in heads] == [[8], [8]]  # type: ignore[union-attr]
    assert sum(p.numel() for p in joined.parameters()) < sum(p.numel() for p in separate.parameters())
    fed = bnnp.BNNP(2, 1, trunk=True, feed_activations=True, **options)  # type: ignore[arg-type]
    nets = [layer.net for layer in fed.layers if layer.net is not None]
    assert [next(m.in_features for m in net.modules() if isinstance(m, torch.nn.Linear)) for net in nets] == [8, 14]  # type: ignore[union-attr]
