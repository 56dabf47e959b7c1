"""Laws of the whitened layer: structured = dense, weight space = function space, sums over points, values and gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from bnnp import conjugate, draws, linalg
from bnnp.conjugate import Conditional, Sites, condition, site_sum
from bnnp.draws import draw_canonical, draw_fused
from bnnp.priors import Diagonal, PerUnit, Shared
from laws import INSTANCES, Layer, random_layer, relative_error

SIZES = {"N < k": ((2, 3), 3), "N > k": ((7, 5), 7), "N = 1": ((1, 1), 1), "N = 0 beside others": ((0, 6), 6), "gaps": ((2, 0, 5), 5)}
LAWS = pytest.mark.parametrize("kind, shared", INSTANCES, ids=lambda value: str(value))
ALL_SIZES = pytest.mark.parametrize("size", SIZES)


def build(kind: str, shared: bool, size: str, S: int = 2, seed: int = 0) -> Layer:
    counts, N = SIZES[size]
    return random_layer(kind, shared, seed, counts, N, S)


def quantities(q: Conditional, layer: Layer) -> dict[str, Tensor]:
    d = layer.y.shape[-1]
    covariance = q.covariance.expand(*q.covariance.shape[:-3], d if q.covariance.shape[-3] == 1 else -1, -1, -1)
    return {
        "eps_mean": q.mean,
        "eps_cov": covariance,
        "kl": q.kl,
        "log_z": q.log_z,
        "expected_log_lik": q.expected_log_lik(layer.A, layer.sites),
        "w_mean": layer.prior.mean + q.factor.apply(q.mean),
        "variance": q.variance(layer.A),
        "joint": q.joint_covariance(layer.A),
    }


def dense(layer: Layer) -> dict[str, Tensor]:
    want = reference.layer_posterior(layer.A, layer.factors, layer.prior.mean, layer.y.expand(*layer.y.shape), layer.prec)
    joint = torch.einsum("stnp,stdpq,stmq->stdnm", layer.A, want["w_cov"], layer.A)
    want["joint"] = joint
    want["variance"] = joint.diagonal(dim1=-2, dim2=-1).mT
    return want


def gradients(value: Tensor, layer: Layer) -> list[Tensor]:
    leaves = [layer.A, layer.y, layer.root_prec, *layer.prior.parameters()]
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def weighted(value: Tensor) -> Tensor:
    """A scalar that sees every entry of a tensor."""
    return (value * torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)).sum()


@LAWS
@ALL_SIZES
@pytest.mark.parametrize("space", ["weight", "function"])
def test_structured_equals_dense_in_values_and_gradients(kind: str, shared: bool, size: str, space: str) -> None:
    layer = build(kind, shared, size)
    got = quantities(condition(layer.prior.given().core, layer.A, layer.sites, space), layer)
    want = dense(layer)
    for key, value in got.items():
        assert relative_error(value, want[key]) <= 1e-9, key
        if value.numel() == 0:
            continue
        for mine, theirs in zip(gradients(weighted(value), layer), gradients(weighted(want[key]), layer), strict=True):
            assert float((mine - theirs).abs().max()) <= 1e-9 * max(1.0, float(theirs.abs().max())), key


@LAWS
@ALL_SIZES
def test_kl_is_expected_log_lik_minus_log_evidence_and_not_negative(kind: str, shared: bool, size: str) -> None:
    layer = build(kind, shared, size)
    q = condition(layer.prior.given().core, layer.A, layer.sites)
    torch.testing.assert_close(q.kl, q.expected_log_lik(layer.A, layer.sites) - q.log_z, rtol=1e-9, atol=1e-9)
    assert bool((q.kl >= 0).all())


@LAWS
def test_without_points_the_posterior_is_the_prior(kind: str, shared: bool) -> None:
    layer = random_layer(kind, shared, 0, (0, 0), 3)
    for space in ("weight", "function"):
        q = condition(layer.prior.given().core, layer.A, layer.sites, space)
        for value in (q.kl, q.log_z, q.mean):
            assert float(value.detach().abs().max()) <= 1e-12
        torch.testing.assert_close(q.covariance, torch.eye(layer.prior.rank, dtype=torch.float64).expand_as(q.covariance))


def normal(seed: int) -> Callable[[tuple[int, ...]], Tensor]:
    g = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=g, dtype=torch.float64)


def plain_draw(layer: Layer, S: int, seed: int) -> tuple[Tensor, Tensor]:
    """eps = M^{-1} (B^T (r - z') + eps_0) for N < k, else m + R^{-T} z; densely, unit by unit, in the order in which noise is asked for."""
    source = normal(seed)
    Sa, T, N, _ = layer.A.shape
    d, k = layer.y.shape[-1], layer.prior.rank
    eps_0 = source((S, T, d, k))
    z = source((S, T, N, d)) if N < k else torch.zeros(S, T, N, d)
    found = torch.zeros_like(eps_0)
    for s in range(S):
        for t in range(T):
            for u in range(d):
                A = layer.A[min(s, Sa - 1), t]
                root = layer.root_prec[t].expand(N, d)[:, u]
                B = root[:, None] * (A @ layer.factors[u])
                r = root * (layer.y[t, :, u] - A @ layer.prior.mean[u])
                M = torch.eye(k, dtype=torch.float64) + B.T @ B
                noise = eps_0[s, t, u] if N < k else torch.linalg.cholesky(M) @ eps_0[s, t, u]
                found[s, t, u] = torch.linalg.solve(M, B.T @ (r - z[s, t, :, u]) + noise)
    return found, dense(layer)["kl"]


@LAWS
@ALL_SIZES
@pytest.mark.parametrize("once", [False, True], ids=["sampled features", "first layer"])
def test_the_fused_draw_equals_the_plain_one_in_values_and_gradients(
    kind: str, shared: bool, size: str, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "CHUNK_BYTES", 2000)  # several chunks even at this size
    S = 3
    layer = build(kind, shared, size, S=1 if once else S)
    eps, kl = draw_fused(layer.prior.given().core, layer.A, layer.sites, S, normal(7), torch.float64)
    want_eps, want_kl = plain_draw(layer, S, 7)
    assert relative_error(eps, want_eps) <= 1e-9 and relative_error(kl, want_kl) <= 1e-9
    got, want = weighted(eps) + weighted(kl), weighted(want_eps) + weighted(want_kl)
    for mine, theirs in zip(gradients(got, layer), gradients(want, layer), strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-9 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("draw", [draw_fused, draw_canonical])
@pytest.mark.parametrize("size", ["N < k", "N > k"])
@LAWS
def test_draws_have_the_posterior_moments(kind: str, shared: bool, size: str, draw: Callable[..., tuple[Tensor, Tensor]]) -> None:
    layer = build(kind, shared, size, S=1)
    S = 40_000
    with torch.no_grad():
        eps, *_ = draw(layer.prior.given().core, layer.A, layer.sites, S, normal(3), torch.float64)
        want = dense(layer)
    error = eps.mean(0) - want["eps_mean"][0]
    deviation = want["eps_cov"][0].diagonal(dim1=-2, dim2=-1).sqrt()
    assert float((error / deviation).abs().max()) < 5 / math.sqrt(S)
    centred = eps - want["eps_mean"]
    covariance = torch.einsum("stdi,stdj->tdij", centred, centred) / S
    scale = deviation.unsqueeze(-1) * deviation.unsqueeze(-2)
    assert float(((covariance - want["eps_cov"][0]) / scale).abs().max()) < 5 * math.sqrt(2 / S)


@LAWS
def test_function_space_draws_from_weights_noise_have_the_posterior_covariance(kind: str, shared: bool) -> None:
    layer = build(kind, shared, "N < k", S=1)
    q = condition(layer.prior.given().core, layer.A, layer.sites, "function")
    d, k = layer.y.shape[-1], layer.prior.rank
    columns = torch.eye(k, dtype=torch.float64)[:, None, None, None, :].expand(k, 1, 2, d, k)
    root = (q.draw(columns.contiguous()) - q.mean).movedim(0, -1)
    want = dense(layer)["eps_cov"]
    assert relative_error(root @ root.mT, want) <= 1e-9


@LAWS
@given(order=st.permutations(range(8)), cuts=st.lists(st.integers(0, 8), max_size=3))
@settings(max_examples=15)
def test_any_partition_and_order_of_the_points_gives_the_same_posterior(kind: str, shared: bool, order: list[int], cuts: list[int]) -> None:
    layer = random_layer(kind, shared, 1, (8, 6), 8)
    factor, whole = layer.prior.given().core, condition(layer.prior.given().core, layer.A, layer.sites, "weight")
    edges = sorted({0, 8, *cuts})
    parts = [order[i:j] for i, j in itertools.pairwise(edges)]
    pieces = [(layer.A[..., part, :], Sites(layer.sites.resid[..., part, :], layer.sites.root_prec[..., part, :])) for part in parts]
    total = site_sum(factor, *pieces[0])
    for piece in pieces[1:]:
        total = total + site_sum(factor, *piece)
    updated = {space: condition(factor, *pieces[0], space) for space in ("weight", "function")}
    for piece in pieces[1:]:
        updated = {space: q.update(*piece) for space, q in updated.items()}
    for q in (total.condition(factor), *updated.values()):
        for key in ("mean", "kl", "log_z", "covariance"):
            assert relative_error(getattr(q, key), getattr(whole, key)) <= 1e-9, key
    z = normal(0)((5, *whole.mean.shape))
    assert relative_error(total.condition(factor).draw(z), whole.draw(z)) <= 1e-9


@pytest.mark.parametrize("space", ["weight", "function"])
@LAWS
def test_an_update_may_have_other_noise_per_unit_than_the_points_before(kind: str, shared: bool, space: str) -> None:
    layer, more = build(kind, shared, "N < k"), build(kind, not shared, "N < k", seed=5)
    factor, d = layer.prior.given().core, layer.y.shape[-1]
    both = condition(factor, layer.A, layer.sites, space).update(more.A, Sites(more.sites.resid, more.sites.root_prec))
    root = torch.cat([layer.sites.root_prec.expand(2, 2, 3, d), more.sites.root_prec.expand(2, 2, 3, d)], dim=-2)
    joined = Sites(torch.cat([layer.sites.resid, more.sites.resid], dim=-2), root)
    want = condition(factor, torch.cat([layer.A, more.A], dim=-2), joined, "weight")
    for key in ("mean", "kl", "log_z"):
        assert relative_error(getattr(both, key), getattr(want, key)) <= 1e-9, key


@LAWS
@pytest.mark.parametrize("draw", [draw_fused, draw_canonical])
def test_masked_points_have_no_effect_and_no_gradient(kind: str, shared: bool, draw: Callable[..., tuple[Tensor, Tensor]]) -> None:
    layer = random_layer(kind, shared, 2, (3, 5), 6)
    eps, kl, *_ = draw(layer.prior.given().core, layer.A, layer.sites, 2, normal(1), torch.float64)
    found = gradients(weighted(eps) + weighted(kl), layer)
    for t, count in enumerate((3, 5)):
        assert float(found[0][:, t, count:].abs().max()) == 0.0 and float(found[1][t, count:].abs().max()) == 0.0
    other = Layer(layer.prior, layer.A.detach().clone(), layer.y.detach().clone(), layer.root_prec.detach())
    other.A[:, 0, 3:, :3], other.y[0, 3:] = 1e3, -1e3
    again, kl_again, *_ = draw(other.prior.given().core, other.A, other.sites, 2, normal(1), torch.float64)
    assert torch.equal(eps, again) and torch.equal(kl, kl_again)


@LAWS
def test_extra_leading_axes_are_batch(kind: str, shared: bool) -> None:
    layer = random_layer(kind, shared, 3, (4, 5), 5, S=6)
    flat = condition(layer.prior.given().core, layer.A, layer.sites)
    A = layer.A.unflatten(0, (2, 3))
    sites = Sites(layer.sites.resid.unflatten(0, (2, 3)), layer.sites.root_prec.unflatten(0, (2, 3)))
    q = condition(layer.prior.given().core, A, sites)
    for key in ("mean", "kl", "log_z"):
        torch.testing.assert_close(getattr(q, key).flatten(0, 1), getattr(flat, key), rtol=1e-12, atol=1e-12)


@LAWS
def test_float32_features_keep_four_digits(kind: str, shared: bool) -> None:
    layer = build(kind, shared, "N > k")
    want = dense(layer)
    single = Layer(layer.prior.float(), layer.A.detach().float(), layer.y.detach().float(), layer.root_prec.detach().float())
    for dtype in (torch.float64, torch.float32):
        factor, A, sites = conjugate.computed(single.prior.given().core, single.A, single.sites, dtype)
        q = condition(factor, A, sites)
        for key in ("kl", "log_z"):
            assert relative_error(getattr(q, key).double(), want[key]) <= 1e-4
        assert relative_error(q.mean.double(), want["eps_mean"]) <= 1e-4


def test_shared_prior_is_per_unit_with_equal_factors_and_diagonal_is_per_unit_with_diagonal_ones() -> None:
    g = torch.Generator().manual_seed(0)
    shared, diagonal, one, two = Shared(3, 2).double(), Diagonal(3, 2).double(), PerUnit(3, 2).double(), PerUnit(3, 2).double()
    for p in (*shared.parameters(), *diagonal.parameters()):
        p.data += torch.randn(p.shape, generator=g, dtype=torch.float64)
    one.log_diagonal.data.copy_(shared.log_diagonal.expand(2, -1))
    one.strict_lower.data.copy_(shared.strict_lower.expand(2, -1, -1))
    two.log_diagonal.data.copy_(diagonal.log_scale)
    torch.testing.assert_close(one.covariance(), shared.covariance())
    torch.testing.assert_close(two.covariance(), diagonal.covariance())


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("spread", [0.0, 0.9])
@pytest.mark.parametrize("kind", [Diagonal, PerUnit, Shared])
def test_the_prior_starts_at_the_fan_in_scale(kind: type[PerUnit], scaled: bool, spread: float) -> None:
    prior = kind(4, 2000, scaled).double()
    if spread:
        prior.start(spread, torch.Generator().manual_seed(0))
    unit = 1 / 5 if scaled else 1.0
    want = (1 - spread) * unit * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(prior.covariance()[0], want)
    total = prior.mean.detach().square().mean() + want[0, 0]
    assert float((total / unit - 1).abs()) < 0.05


def test_a_failed_factorisation_says_which_and_what_to_do() -> None:
    bad = torch.stack([torch.eye(2), torch.full((2, 2), math.nan)])
    with pytest.raises(linalg.NotPositiveDefiniteError, match=r"batch index \(1,\)"):
        linalg.cholesky(bad)
    with pytest.raises(linalg.NotPositiveDefiniteError, match="no jitter"):
        linalg.cholesky(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


def test_jitter_is_reported_with_its_amount() -> None:
    v = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    M = torch.outer(v, v) - 1e-15 * torch.eye(3, dtype=torch.float64)
    with pytest.warns(linalg.NumericalWarning, match=r"needed a jitter of up to 2\.\d+e-14"):
        R = linalg.cholesky(M)
    torch.testing.assert_close(R @ R.mT, M, atol=1e-12, rtol=0)


def test_apple_devices_factorise_on_the_cpu() -> None:
    assert linalg.compute_device(torch.device("mps")).type == "cpu"
    assert linalg.compute_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
