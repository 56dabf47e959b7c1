"""Laws of the priors: structured = dense for whole layers and networks, compounds against sums and integrals over what they are made of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import bnnp
import reference
from bnnp.conjugate import condition, point_sum
from bnnp.factors import Given, Sites
from bnnp.priors import PLAIN, PRIORS, HeavyTailed, Mixture, layer_priors
from bnnp.seeds import seeded
from bnnp.structures import LayerPrior
from bnnp.tails import EDGES, cell_middles, draw_level, log_mass, log_scale
from laws import randn, relative_error

D_IN, D = 3, 3
WHOLE = [*PLAIN, "diagonal tied", "low_rank tied", "per_layer", "network", "matrix_normal"]


def moved(kind: str, widths: tuple[int, ...] = (D_IN, D), seed: int = 0, **options: object) -> list[LayerPrior]:
    """Priors of the layers of a network, with no parameter at its start."""
    g = torch.Generator().manual_seed(seed)
    name, *tied = kind.split()
    layers = layer_priors(widths, bnnp.Prior(name, rank=2, tied=bool(tied), **options), g)  # type: ignore[arg-type]
    for layer in layers:
        layer.double()
        for parameter in layer.parameters():
            parameter.data += 0.5 * randn(*parameter.shape, generator=g)
    return layers


def points(N: int, seed: int = 1, shared: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    A = torch.cat([randn(1, 1, N, D_IN, generator=g), torch.ones(1, 1, N, 1, dtype=torch.float64)], dim=-1)
    return A, randn(1, N, D, generator=g), (0.7 * randn(1, N, 1 if shared else D, generator=g)).exp()


def whole_layer(A: Tensor, L: Tensor, mean: Tensor, y: Tensor, prec: Tensor) -> dict[str, Tensor]:
    """The layer as one block of d p weights, densely."""
    return reference.condition_block(
        reference.layer_block(A[0, 0], D), L.flatten(0, 1), mean.flatten(), y[0].flatten(), prec.expand(y.shape)[0].flatten()
    )


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("N", [2, 30])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("space", ["weight", "function"])
def test_a_layer_with_several_units_is_the_dense_one(kind: str, N: int, shared: bool, space: str) -> None:
    """Posterior mean, covariance, divergence and evidence of all weights of the layer, with its units coupled as the prior couples them."""
    (layer,), (A, y, root) = moved(kind), points(N, shared=shared)
    given = layer.given().together()
    q = condition(given.core, *given.problem(A, given.sites(A, y, root)), space)
    want = whole_layer(A, layer.dense().detach(), layer.mean.detach(), y, root.square())
    eps = q.mean[0, 0]
    assert relative_error(given.weights(eps).flatten(), want["w_mean"]) <= 1e-9
    L = given.factor.tensors[0].flatten(0, 1)
    assert relative_error(L @ q.covariance[0, 0, 0] @ L.T, want["w_cov"]) <= 1e-9
    assert relative_error(q.kl.squeeze(), want["kl_eps"]) <= 1e-9
    assert relative_error(q.log_z.squeeze(), want["log_z"]) <= 1e-9
    if kind.split()[0] in PLAIN:  # units that are independent may be conditioned one by one
        own = layer.given()
        alone = condition(own.core, *own.problem(A, own.sites(A, y, root)), space)
        assert relative_error(own.weights(alone.mean)[0, 0].flatten(), want["w_mean"]) <= 1e-9
        assert relative_error(alone.kl, q.kl) <= 1e-9 and relative_error(alone.log_z, q.log_z) <= 1e-9


@pytest.mark.parametrize("kind", WHOLE)
def test_sums_over_points_serve_whole_layers_too(kind: str) -> None:
    (layer,), (A, y, root) = moved(kind), points(9)
    given = layer.given().together()
    want = condition(given.core, *given.problem(A, given.sites(A, y, root)))
    parts = [given.problem(A[:, :, at], given.sites(A[:, :, at], y[:, at], root[:, at])) for at in (slice(0, 2), slice(2, 9))]
    sums = [point_sum(*part).whiten(given.core) for part in parts]
    got = (sums[0] + sums[1]).condition(given.core)
    for key in ("mean", "kl", "log_z"):
        assert relative_error(getattr(got, key), getattr(want, key)) <= 1e-9


@pytest.mark.parametrize("kind", ["diagonal", "shared", "matrix_normal", "per_layer"])
def test_correlated_noise_is_that_of_the_dense_layer(kind: str) -> None:
    """With noise of covariance Sigma between the outputs of a point: log N(y; A mean, K + I x Sigma), and the posterior mean."""
    (layer,), (A, y, _) = moved(kind), points(6)
    g = torch.Generator().manual_seed(3)
    C = torch.eye(D, dtype=torch.float64) + 0.5 * randn(D, D, generator=g).tril(-1)
    T = torch.linalg.inv(C)
    diagonal = T.diagonal()
    given = layer.given().together()
    sites = given.sites(A, y, torch.ones(1, 6, 1, dtype=torch.float64) * diagonal)
    q = condition(given.core, *given.problem(A, sites, T / diagonal.unsqueeze(-1)))
    X, L = reference.layer_block(A[0, 0], D), layer.dense().detach().flatten(0, 1)
    noise = torch.block_diag(*[C @ C.T] * 6)
    K = X @ L @ L.T @ X.T + noise
    resid = y[0].flatten() - X @ layer.mean.detach().flatten()
    assert relative_error(q.log_z.squeeze(), reference.gaussian_log_density(resid, torch.zeros_like(resid), K)) <= 1e-9
    want = layer.mean.detach().flatten() + L @ L.T @ X.T @ torch.linalg.solve(K, resid)
    assert relative_error(given.weights(q.mean[0, 0]).flatten(), want) <= 1e-9
    rows = given.rows(A)
    w_cov = L @ L.T - L @ L.T @ X.T @ torch.linalg.solve(K, X @ L @ L.T)
    for n in range(6):
        at = X[n * D : (n + 1) * D]
        assert relative_error(q.group_covariance(rows, D)[0, 0, n], at @ w_cov @ at.T) <= 1e-9


def test_a_network_prior_is_one_gaussian_over_all_weights() -> None:
    """Drawn layer by layer, weights of all layers have the dense mean and covariance: exactly, as W is linear in eps."""
    layers = moved("network", (2, 3, 2))
    eps = [torch.eye(sum(la.rank for la in layers), dtype=torch.float64).split([la.rank for la in layers], dim=-1)[i] for i in range(2)]
    drawn, zero = [], []
    for i, layer in enumerate(layers):
        before = [e[:, None, None, :] for e in eps[:i]]
        drawn.append(layer.given(before).weights(eps[i][:, None, None, :]).flatten(1))
        none = [torch.zeros(1, 1, 1, e.shape[-1], dtype=torch.float64) for e in eps[: i + 1]]
        zero.append(layer.given(none[:i]).weights(none[i]).flatten(1))
    L = (torch.cat(drawn, dim=-1) - torch.cat(zero, dim=-1)).detach().T
    assert bool((L.triu(1).abs().max() == 0).all()), "not lower triangular in layer order"
    rows = torch.cat([torch.nn.functional.pad(la.dense().flatten(0, 1), (0, L.shape[1] - la.dense().shape[-1])) for la in layers])
    assert relative_error(L, rows) <= 1e-12
    default = sum(0.5 * (la.p * (r.square().sum() + m.square().sum()) - r.shape[0] * (1 + math.log(la.p)))
                  for la, r, m in zip(layers, rows.split([la.rank for la in layers]), zero, strict=True))  # fmt: skip
    want = default - torch.linalg.slogdet(L).logabsdet
    assert relative_error(bnnp.priors.NetworkPrior(layers).divergence(), want) <= 1e-9


@pytest.mark.parametrize("kind", WHOLE)
def test_the_divergence_from_the_default_is_that_of_dense_gaussians(kind: str) -> None:
    (layer,) = moved(kind)
    L, size = layer.dense().detach().flatten(0, 1), D * (D_IN + 1)
    want = reference.gaussian_kl(layer.mean.detach().flatten(), L @ L.T, torch.zeros(size).double(), torch.eye(size).double() / (D_IN + 1))
    assert relative_error(layer.divergence(), want) <= 1e-9
    name, *tied = kind.split()
    (start,) = layer_priors((D_IN, D), bnnp.Prior(name, tied=bool(tied)), seeded(0, "x"))
    assert abs(float(start.divergence().detach())) <= (0.02 if name == "low_rank" else 1e-5)


@pytest.mark.parametrize("kind", PRIORS)
def test_samples_of_the_prior_have_its_mean_and_covariance(kind: str) -> None:
    layers = moved(kind, (1, 2, 1), dof=12.0)
    n = 20_000
    draws = bnnp.priors.NetworkPrior(layers).sample(n, torch.Generator().manual_seed(0))
    for layer, W in zip(layers, draws, strict=True):
        C = layer.covariance().detach()
        assert W.shape == (n, layer.d_out, layer.p)
        gap = (W.mean(0) - layer.mean.detach()) / (C.diagonal(dim1=-2, dim2=-1) / n).sqrt()
        assert float(gap.abs().max()) <= 5
        centred = W - W.mean(0)
        got = torch.einsum("nup,nuq->upq", centred, centred) / n
        assert float((got - C).abs().max() / C.abs().max()) <= 0.1


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8])
def test_a_fraction_is_counted_from_the_input_side(kind: str, fraction: float) -> None:
    layers = layer_priors((3, 4, 4, 2), bnnp.Prior(kind, fraction=fraction), seeded(0, "x"))
    learned = torch.cat([layer.learned.flatten() for layer in layers])  # type: ignore[union-attr]
    tolerance = max(layer.d_out for layer in layers) / len(learned) if layers[0].by_column else 0.5 / len(learned)
    assert abs(float(learned.double().mean()) - fraction) <= tolerance
    whole = [bool(layer.learned.all()) for layer in layers]  # type: ignore[union-attr]
    some = [bool(layer.learned.any()) for layer in layers]  # type: ignore[union-attr]
    assert whole == sorted(whole, reverse=True) and sum(s and not w for s, w in zip(some, whole, strict=True)) <= 1
    names = bnnp.BNNP(3, 2, hidden=(4, 4), prior=bnnp.Prior(kind, fraction=fraction)).prior
    assert not names.means() if fraction == 0 else names.means()


# Compounds


def linear(kind: str, **options: object) -> bnnp.BNNP:
    """A network of one layer with one output, whose posterior is exact given the compound's latent."""
    prior = bnnp.Prior(kind, rank=2, **options)  # type: ignore[arg-type]
    model = bnnp.BNNP(1, 1, hidden=(), prior=prior, likelihood=bnnp.Gaussian(0.5, learn_noise=False)).double()
    model.likelihood.raw_noise.data.fill_(math.log(0.5))  # type: ignore[union-attr]  # it was rounded to float32
    g = torch.Generator().manual_seed(0)
    for layer in model.prior:
        for parameter in layer.parameters():
            parameter.data += 0.7 * randn(*parameter.shape, generator=g)
    return model


def line(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    x = randn(n, 1, generator=g)
    return x, 1.5 * x - 0.5 + 0.4 * randn(n, 1, generator=g)


def exact(layer: Given, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    A = torch.cat([x, torch.ones_like(x)], dim=-1)
    L = layer.together().factor.tensors[0].detach()[0] * math.sqrt(scale)
    return reference.condition_block(A, L, layer.mean.detach()[0], y[:, 0], torch.full((len(x),), 4.0).double())


@pytest.mark.parametrize("of", PLAIN)
@pytest.mark.parametrize("n", [0, 1, 7])
def test_a_mixture_of_linear_models_is_the_exact_one(of: str, n: int) -> None:
    """Responsibilities, evidence, predictions: those of a sum over components, each an exact Bayesian linear regression."""
    model, (x, y) = linear("mixture", of=of, components=3), line(n)
    layer = model.prior.layers[0]
    assert isinstance(layer, Mixture)
    parts = [exact(part.given(), x, y) for part in layer.parts]
    joint = torch.stack([log + part["log_z"] for log, part in zip(layer.log_share.detach(), parts, strict=True)])
    evidence, share = joint.logsumexp(0), joint.softmax(0)
    posterior = model.condition(x, y, num_samples=7)
    assert abs(float(posterior.elbo - evidence)) <= 1e-9
    assert abs(float(posterior.diagnose().log_evidence - evidence)) <= 1e-9
    K = torch.arange(7) % 3
    got = torch.stack([posterior.weights[k == K].sum() for k in range(3)])
    torch.testing.assert_close(got, share)
    xt = torch.linspace(-2, 2, 5, dtype=torch.float64).unsqueeze(-1)
    A = torch.cat([xt, torch.ones_like(xt)], dim=-1)
    mean = sum(s * (A @ part["w_mean"]) for s, part in zip(share, parts, strict=True))
    torch.testing.assert_close(posterior.predict(xt).mean[:, 0], mean)
    yt = A[:, :1] * 0.3
    means, covs = (
        torch.stack([f(part) for part in parts]) for f in (lambda q: A @ q["w_mean"], lambda q: A @ q["w_cov"] @ A.T + 0.25 * torch.eye(5))
    )
    want = reference.mixture_log_density(yt[:, 0], means, covs, share)
    assert abs(float(posterior.predict(xt).log_prob(yt, joint=True) - want)) <= 1e-9
    new = posterior.update(*line(9))  # the responsibilities of an update are those of all points
    again = model.condition(torch.cat([x, line(9)[0]]), torch.cat([y, line(9)[1]]), num_samples=7)
    torch.testing.assert_close(new.weights, again.weights)
    torch.testing.assert_close(new.log_evidence, again.elbo - posterior.elbo)


@pytest.mark.parametrize("likelihood", [bnnp.Gaussian(), bnnp.Bernoulli()])
def test_functions_of_the_prior_of_a_mixture_are_all_different(likelihood: bnnp.Likelihood) -> None:
    """Each is of a component drawn by its share, with weights of its own."""
    model = bnnp.BNNP(1, 1, hidden=(3,), prior=bnnp.Prior("mixture", components=3), likelihood=likelihood).double()
    first = model.prior.layers[0]
    assert isinstance(first, Mixture)
    first.logits.data.copy_(torch.tensor([3.0, 0.0, -1.0]))
    x = torch.linspace(-1, 1, 4).unsqueeze(-1)
    assert len(model.prior_samples(x, 40).flatten(1).unique(dim=0)) == 40
    assert model.prior_samples(x, 1, noisy=True).shape == (1, 4, 1)


def test_log_scales_are_those_of_the_inverse_gamma() -> None:
    scipy = pytest.importorskip("scipy.stats")
    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    for dof in (2.5, 4.0, 30.0):
        want = scipy.invgamma(dof / 2, scale=dof / 2 - 1).ppf(torch.special.ndtr(z).numpy())
        torch.testing.assert_close(log_scale(z, dof), torch.as_tensor(want).log(), atol=2e-3, rtol=0)


def test_levels_follow_their_density() -> None:
    g = torch.Generator().manual_seed(0)
    share = torch.tensor([0.1, 0.0, 0.5, 0.3, 0.0, 0.05, 0.0, 0.05], dtype=torch.float64).clamp(min=1e-12).log().log_softmax(0)
    u = torch.rand(100_000, generator=g, dtype=torch.float64)
    z, ratio = draw_level(share, u)
    cell = (z.unsqueeze(-1) > torch.tensor(EDGES)).sum(-1)
    got = torch.bincount(cell, minlength=8) / len(u)
    assert float((got - share.exp()).abs().max()) <= 0.01
    torch.testing.assert_close(ratio, (share - log_mass(share))[cell])
    torch.testing.assert_close(log_mass(share).exp().sum(), torch.tensor(1.0).double())
    within = z[cell == 2]
    assert abs(float((within < cell_middles()[2]).double().mean()) - 0.5) <= 0.01  # as the prior is in the cell


@pytest.mark.parametrize("n", [0, 1, 7])
def test_a_heavy_tailed_linear_model_against_quadrature(n: int) -> None:
    """Its importance-weighted evidence and prediction are those of an integral over the scale, and the bound lies below."""
    model, (x, y) = linear("heavy_tailed", of="diagonal", dof=3.0), line(n)
    layer = model.prior.layers[0]
    assert isinstance(layer, HeavyTailed)
    z = torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    nodes = [exact(layer.given(), x, y, float(log_scale(v, 3.0).exp())) for v in z]
    joint = torch.stack([q["log_z"] for q in nodes])
    evidence = joint.logsumexp(0) - math.log(len(nodes))
    posterior = model.condition(x, y, num_samples=8000)
    found = posterior.diagnose()
    assert abs(float(found.log_evidence - evidence)) <= 5 * float(found.log_evidence_se) + 1e-3
    assert float(posterior.elbo) <= float(evidence) + 1e-3
    assert float(evidence - posterior.elbo) <= 0.2  # eight cells come close
    xt = torch.tensor([[1.3]], dtype=torch.float64)
    a = torch.tensor([1.3, 1.0], dtype=torch.float64)
    share = joint.softmax(0)
    want = sum(s * (a @ q["w_mean"]) for s, q in zip(share, nodes, strict=True))
    assert abs(float(posterior.predict(xt, reweight=True).mean) - float(want)) <= 0.02
    assert 1.0 <= float(posterior.particles.given.scale.max() / posterior.particles.given.scale.min())  # type: ignore[union-attr]


def test_a_heavy_tailed_prior_is_student_t() -> None:
    """The marginal of a weight at dof 5 has the kurtosis of Student-t, 3 + 6 / (5 - 4) = 9, and its quantiles."""
    scipy = pytest.importorskip("scipy.stats")
    layers = layer_priors((1, 1), bnnp.Prior("heavy_tailed", dof=5.0, scaled=False), seeded(0, "x"))
    (W,) = bnnp.priors.NetworkPrior(layers).sample(400_000, torch.Generator().manual_seed(0))
    for level in (0.001, 0.01, 0.1, 0.5, 0.9, 0.999):
        want = float(scipy.t(5.0, scale=math.sqrt(3 / 5)).ppf(level))
        got = float((W[:, 0, 0] <= want).double().mean())
        assert abs(got - level) <= 5 * math.sqrt(level * (1 - level) / 400_000)


def test_a_prior_that_cannot_be_is_refused() -> None:
    for bad, words in (
        ({"kind": "dense"}, "a prior among"),
        ({"kind": "dense", "tied": True}, "a prior among"),
        ({"fraction": 1.5}, r"fraction in \[0, 1\]"),
        ({"kind": "heavy_tailed", "dof": 2.0}, "dof to be finite and above 2"),
        ({"kind": "mixture", "components": 1}, "at least 2 components"),
        ({"kind": "mixture", "of": "per_layer"}, "of= among diagonal, low_rank"),
        ({"rank": 0}, "rank as a positive integer"),
        ({"kind": "per_unit", "tied": True}, "tied=True with 'diagonal' or 'low_rank'"),
    ):
        with pytest.raises(ValueError, match=words):
            bnnp.Prior(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_samples of at least 3"):
        linear("mixture").condition(*line(3), num_samples=2)
    tasks = [line(6), line(8)]
    with pytest.raises(ValueError, match="without components"):
        bnnp.meta_train(linear("mixture"), tasks, objective="npvi", steps=1, progress=False)


def test_sites_are_residuals_from_the_mean_of_each_particle() -> None:
    layers = moved("network", (2, 3, 2))
    eps = randn(4, 2, 1, layers[0].rank, generator=torch.Generator().manual_seed(0))
    given = layers[1].given([eps])
    A = randn(4, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    y, root = torch.zeros(2, 5, 2, dtype=torch.float64), torch.ones(2, 5, 1, dtype=torch.float64)
    sites = given.sites(A, y, root)
    assert isinstance(sites, Sites) and given.mean.shape == (4, 2, 2, 4)
    torch.testing.assert_close(sites.resid, -torch.einsum("stnp,stup->stnu", A, given.mean))


def test_a_layer_of_a_network_prior_is_the_dense_conditional_given_the_layers_before() -> None:
    """The prior of the second layer given the first, by the Schur complement of one dense covariance, and its posterior."""
    layers = moved("network", (2, 3, 2))
    n1, g = layers[0].rank, torch.Generator().manual_seed(3)
    rows = torch.cat([torch.nn.functional.pad(la.dense().flatten(0, 1), (0, 17 - la.dense().shape[-1])) for la in layers]).detach()
    C, mean = rows @ rows.T, torch.cat([la.mean.flatten() for la in layers]).detach()
    eps = randn(1, 1, 1, n1, generator=g)
    first = layers[0].given().weights(eps).flatten().detach()
    gain = C[n1:, :n1] @ torch.linalg.inv(C[:n1, :n1])
    prior_mean, prior_cov = mean[n1:] + gain @ (first - mean[:n1]), C[n1:, n1:] - gain @ C[:n1, n1:]
    given = layers[1].given([eps])
    A = torch.cat([randn(1, 1, 5, 3, generator=g), torch.ones(1, 1, 5, 1, dtype=torch.float64)], dim=-1)
    y, root = randn(1, 5, 2, generator=g), randn(1, 5, 2, generator=g).exp()
    q = condition(given.core, *given.problem(A, given.sites(A, y, root)))
    X, noise = reference.layer_block(A[0, 0], 2), torch.diag(1 / root[0].flatten().square())
    K = X @ prior_cov @ X.T + noise
    want = prior_mean + prior_cov @ X.T @ torch.linalg.solve(K, y[0].flatten() - X @ prior_mean)
    assert relative_error(given.weights(q.mean).flatten(), want) <= 1e-9
    L = given.factor.tensors[0].flatten(0, 1)
    assert relative_error(L @ q.covariance[0, 0, 0] @ L.T, prior_cov - prior_cov @ X.T @ torch.linalg.solve(K, X @ prior_cov)) <= 1e-9
    assert relative_error(q.log_z.squeeze(), reference.gaussian_log_density(y[0].flatten(), X @ prior_mean, K)) <= 1e-9
