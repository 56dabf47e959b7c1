"""The twin is right: everything else is judged by it, so it is judged here by textbook identities, simple Monte Carlo and quadrature."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, kl_divergence

import reference as ref
import scenarios as sc

DRAWS = 1_000_000
PHI: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh, "silu": F.silu, "gelu": F.gelu, "sine": torch.sin}


def close(a: Tensor, b: Tensor, tol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def block(name: str, seed: int = 0) -> dict[str, Tensor]:
    N, p, k, masked = sc.BLOCKS[name]
    return sc.random_block(N, p, k, gen(seed), masked)


def within_four_errors(draws: Tensor, expected: Tensor, axis: int = 0) -> None:
    """The mean over one axis is the expected value within four of its standard errors, and these are small enough to tell."""
    error = draws.std(axis) / math.sqrt(draws.shape[axis])
    assert bool((error < 0.02 * (1 + expected.abs())).all())
    assert bool(((draws.mean(axis) - expected).abs() < 4 * error + 1e-12).all()), (draws.mean(axis), expected, error)


def invertible(names: dict[str, tuple[int, int, int, int]]) -> list[str]:
    return [name for name, (_, p, k, _) in names.items() if p == k]


# Gaussians


def test_gaussian_kl_is_torchs() -> None:
    g = gen()
    means, factors = sc.randn(2, 4, generator=g), [sc.random_factor(4, 4, g) for _ in range(2)]
    q, p = (MultivariateNormal(m, scale_tril=L) for m, L in zip(means, factors, strict=True))
    close(ref.gaussian_kl(q.mean, q.covariance_matrix, p.mean, p.covariance_matrix), kl_divergence(q, p))
    close(ref.gaussian_kl(q.mean, q.covariance_matrix, q.mean, q.covariance_matrix), tensor(0.0)[0])


def test_mixture_log_density_is_torchs() -> None:
    g = gen()
    means, weights = sc.randn(5, 3, generator=g), torch.softmax(sc.randn(5, generator=g), 0)
    covs = torch.stack([L @ L.T for L in (sc.random_factor(3, 3, g) for _ in range(5))])
    y = sc.randn(3, generator=g)
    for w in (weights, None):
        mixture = MixtureSameFamily(Categorical(torch.ones(5) if w is None else w), MultivariateNormal(means, covs))
        close(ref.mixture_log_density(y, means, covs, w), mixture.log_prob(y), 1e-7)


# One block


@pytest.mark.parametrize("name", sc.BLOCKS)
def test_block_is_the_conditional_of_the_joint_gaussian(name: str) -> None:
    """(w, y) is jointly normal: E[w | y] = mu + C_wy C_yy^{-1} (y - E y), Cov = C_ww - C_wy C_yy^{-1} C_yw; the same for (eps, y)."""
    b, q = block(name), ref.condition_block(**block(name))
    seen = b["prec"] > 0
    A, y = b["A"][seen], b["y"][seen]
    C_yy = A @ b["L"] @ b["L"].T @ A.T + torch.diag(1 / b["prec"][seen])
    resid = y - A @ b["mu"]
    for mean, factor, key in ((b["mu"], b["L"], "w"), (torch.zeros_like(b["L"][0]), torch.eye(b["L"].shape[1]).double(), "eps")):
        gain = factor @ b["L"].T @ A.T @ torch.linalg.inv(C_yy)
        close(q[f"{key}_mean"], mean + gain @ resid)
        close(q[f"{key}_cov"], factor @ factor.T - gain @ A @ b["L"] @ factor.T)


@pytest.mark.parametrize("name", sc.BLOCKS)
def test_kl_is_expected_log_lik_less_evidence(name: str) -> None:
    q = ref.condition_block(**block(name))
    close(q["kl"], q["expected_log_lik"] - q["log_z"], 1e-8)
    close(q["kl"], q["kl_eps"], 1e-8)
    assert float(q["kl"]) >= -1e-12


def test_cases_reach_both_formulas_of_kl() -> None:
    """In w where the factor has an inverse, in eps elsewhere; the cases hold square, wide and narrow factors."""
    assert 0 < len(invertible(sc.BLOCKS)) < len(sc.BLOCKS)
    assert {(p > k) - (p < k) for _, p, k, _ in sc.BLOCKS.values()} == {-1, 0, 1}
    b = block("many_points")
    singular = b["L"].clone()
    singular[:, 0] = 0.0
    q = ref.condition_block(**(b | {"L": singular}))
    close(q["kl"], q["expected_log_lik"] - q["log_z"], 1e-8)


@pytest.mark.parametrize("name", ["empty", "all_masked"])
def test_no_observations_leave_the_prior(name: str) -> None:
    b, q = block(name), ref.condition_block(**block(name))
    close(q["w_mean"], b["mu"])
    close(q["w_cov"], b["L"] @ b["L"].T)
    for key in ("kl", "kl_eps", "log_z", "expected_log_lik"):
        close(q[key], tensor(0.0)[0])


@pytest.mark.parametrize("name", ["masked", "masked_few", "wide_factor"])
def test_masked_points_are_as_if_not_there(name: str) -> None:
    b = block(name)
    seen = b["prec"] > 0
    dirty = {key: b[key].clone() for key in ("A", "y")}
    for value in dirty.values():
        value[~seen] = math.nan
    short = {key: b[key][seen] for key in ("A", "y", "prec")}
    q, sliced = ref.condition_block(**(b | dirty)), ref.condition_block(**(b | short))
    for key in q:
        close(q[key], sliced[key])


@pytest.mark.parametrize("name", ["many_points", "wide_factor", "narrow_factor"])
def test_block_against_simple_monte_carlo(name: str) -> None:
    """Prior draws weighted by their likelihood give evidence and posterior mean; posterior draws give KL and expected log-likelihood."""
    g, b = gen(1), block(name)
    b["prec"] = b["prec"].clamp(max=0.7)
    seen = b["prec"] > 0
    A, y, std = b["A"][seen], b["y"][seen], b["prec"][seen] ** -0.5
    q = ref.condition_block(**b)

    def log_lik(eps: Tensor) -> Tensor:
        return torch.distributions.Normal((b["mu"] + eps @ b["L"].T) @ A.T, std).log_prob(y).sum(-1)

    eps = sc.randn(DRAWS, b["L"].shape[1], generator=g)
    ratio = torch.exp(log_lik(eps) - q["log_z"])
    within_four_errors(ratio, tensor(1.0)[0])
    within_four_errors(ratio[:, None] * (eps - q["eps_mean"]), torch.zeros_like(q["eps_mean"]))
    draws = q["eps_mean"] + eps @ torch.linalg.cholesky(q["eps_cov"]).T
    within_four_errors(log_lik(draws), q["expected_log_lik"])
    log_q = MultivariateNormal(q["eps_mean"], q["eps_cov"]).log_prob(draws)
    log_p = MultivariateNormal(torch.zeros_like(q["eps_mean"]), torch.eye(len(q["eps_mean"])).double()).log_prob(draws)
    within_four_errors(log_q - log_p, q["kl"])


@pytest.mark.parametrize(("N", "d"), [(1, 1), (2, 3), (8, 2)])
def test_block_is_bayesian_linear_regression_is_a_gaussian_process(N: int, d: int) -> None:
    g = gen(N)
    b = sc.random_block(N, d + 1, d + 1, g)
    xt, noise = sc.randn(4, d, generator=g), 0.6
    problem = (b["A"][:, :-1], b["y"], b["mu"], b["L"] @ b["L"].T, noise, xt)
    blr, gp = sc.bayesian_linear_regression(*problem), sc.gp_linear_kernel(*problem)
    q = ref.condition_block(b["A"], b["L"], b["mu"], b["y"], torch.full((N,), noise**-2, dtype=torch.float64))
    close(q["w_mean"], blr["w_mean"], 1e-8)
    close(q["w_cov"], blr["w_cov"], 1e-8)
    At = ref.features(xt)
    for answer in (blr, gp):
        close(q["log_z"], answer["log_evidence"], 1e-8)
        close(At @ q["w_mean"], answer["mean"], 1e-8)
        close(At @ q["w_cov"] @ At.T, answer["cov"], 1e-8)


# Layer and network


@pytest.mark.parametrize("k", [3, 5])
def test_layer_is_one_block_with_a_block_diagonal_factor(k: int) -> None:
    S, T, N, p, d = 2, 3, 4, 3, 2
    A, factors, mean, y, prec = sc.random_layer(S, T, N, p, d, gen(), k=k, counts=[4, 1, 0])
    q = ref.layer_posterior(A, factors, mean, y, prec)
    assert q["eps_cov"].shape == (S, T, d, k, k)
    for s, t in itertools.product(range(S), range(T)):
        whole = ref.condition_block(
            ref.layer_block(A[s, t], d), torch.block_diag(*factors), mean.flatten(), y[t].flatten(), prec[t].flatten()
        )
        close(q["w_mean"][s, t].flatten(), whole["w_mean"])
        close(torch.block_diag(*q["w_cov"][s, t]), whole["w_cov"])
        close(q["eps_mean"][s, t].flatten(), whole["eps_mean"])
        for key in ("kl", "log_z", "expected_log_lik"):
            close(q[key][s, t], whole[key], 1e-8)
    close(q["kl"][:, 2], torch.zeros(S).double())
    assert bool((q["kl"][:, :2] > 1e-3).all())


@pytest.mark.parametrize("activation", PHI)
def test_activations_are_torchs(activation: str) -> None:
    h = torch.linspace(-6, 6, 101, dtype=torch.float64)
    close(ref.activate(h, activation), PHI[activation](h), 1e-12)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Got 'cube'"):
        ref.activate(tensor(1.0), "cube")


def test_forward_by_hand() -> None:
    """Widths 1, 2, 2, 1 with relu; residual concerns the second layer only, and adds H before the activation.

    x = 2: H1 = (2 * 2 + 1, -2) = (5, -2), phi = (5, 0); H2 = (5 - 1, 10 + 2) = (4, 12), with residual (9, 10);
    f = 0.5 * 4 + 2 * 12 - 7 = 19, with residual 4.5 + 20 - 7 = 17.5.
    x = -1: H1 = (-1, 1), phi = (0, 1); H2 = (-1, 0.5 + 2) = (-1, 2.5), with residual (-2, 3.5); f = 5 - 7 = -2, or 7 - 7 = 0.
    """
    rows = ([[2.0, 1.0], [-1.0, 0.0]], [[1.0, 0.0, -1.0], [2.0, 0.5, 2.0]], [[0.5, 2.0, -7.0]])
    weights = [torch.tensor(W, dtype=torch.float64) for W in rows]
    x = tensor(2.0, -1.0)[:, None]
    close(ref.forward(x, weights, "relu"), tensor(19.0, -2.0)[:, None])
    close(ref.forward(x, weights, "relu", residual=True), tensor(17.5, 0.0)[:, None])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("widths", [(2, 1), (1, 3, 2), (2, 2, 3, 3, 2), (1, 1, 1)])
def test_forward_is_a_composition_of_affine_maps(widths: tuple[int, ...], residual: bool) -> None:
    g = gen()
    x, weights = sc.randn(4, widths[0], generator=g), [W[0] for W in sc.random_weights(widths, 1, g)]
    H = x
    for i, W in enumerate(weights):
        out = F.linear(H if i == 0 else F.silu(H), W[:, :-1], W[:, -1])
        H = out + H if residual and out.shape == H.shape else out
    close(ref.forward(x, weights, "silu", residual), H)
    assert ref.forward(x[:0], weights, "silu", residual).shape == (0, widths[-1])


def test_hidden_kl_adds_up_layers_and_units() -> None:
    """With one particle and two hidden layers: the second layer's features come from the first one's sampled weights."""
    g = gen()
    x, hidden = sc.randn(4, 2, generator=g), sc.random_weights((2, 3, 2), 2, g)
    priors = [sc.random_prior(3, 3, g), sc.random_prior(2, 4, g)]
    sites = [(sc.randn(4, d, generator=g), sc.uniform(4, d, low=0.5, high=2, generator=g)) for d in (3, 2)]
    kl = ref.hidden_kl(x, hidden, priors, sites, "tanh")
    for s in range(2):
        total = tensor(0.0)[0]
        for A, (mean, factors), (y, prec) in zip(
            (ref.features(x), ref.features(torch.tanh(ref.features(x) @ hidden[0][s].T))), priors, sites, strict=True
        ):
            for u in range(len(mean)):
                q = ref.condition_block(A, factors[u], mean[u], y[:, u], prec[:, u])
                total = total + q["expected_log_lik"] - q["log_z"]
        close(kl[s], total, 1e-8)
    assert float((kl[0] - kl[1]).abs()) > 1e-3


# Objectives


def _one_task(d_y: int = 2, residual: bool = False, exact: bool = True, S: int = 3) -> dict[str, Any]:
    """A task of 5 + 3 points under a network 2 -> 4 -> 2 -> d_y with S sets of hidden weights."""
    g = gen(3)
    (xc, yc), (xt, yt) = (sc.random_task(n, 2, d_y, g) for n in (5, 3))
    noise = torch.linspace(0.4, 0.7, d_y, dtype=torch.float64)
    prec = (noise**-2).expand(5, d_y).clone()
    prec = prec if exact else prec * sc.uniform(5, d_y, low=0.3, high=3.0, generator=g)
    prec[3] = 0.0
    data = {"xc": xc, "yc": yc, "xt": xt, "yt": yt, "context_prec": prec, "noise_std": noise}
    hidden, prior = sc.random_weights((2, 4, 2), S, g), sc.random_prior(d_y, 3, g, k=4)
    return data | {"hidden": hidden, "prior": prior, "num_samples": S, "activation": "tanh", "residual": residual}


@pytest.mark.parametrize("residual", [False, True])
def test_collapsed_targets_are_a_ratio_of_evidences(residual: bool) -> None:
    """With the exact last layer, p(yt | particle) = Z(context + target) / Z(context), and KL = ELL - log Z."""
    task = _one_task(residual=residual)
    q = ref.collapsed(**task)
    n, m = len(task["xc"]), len(task["xt"])
    both = {
        "xc": torch.cat([task["xc"], task["xt"]]),
        "yc": torch.cat([task["yc"], task["yt"]]),
        "context_prec": torch.cat([task["context_prec"], (task["noise_std"] ** -2).expand(m, -1)]),
    }
    close(q["log_pt"], ref.collapsed(**(task | both))["log_z"] - q["log_z"], 1e-8)
    close(q["kl"], q["ell_c"] - q["log_z"], 1e-8)
    assert q["mean"].shape == (3, m, 2) and q["cov"].shape == (3, 2, m, m) and n == 5


@pytest.mark.parametrize("residual", [False, True])
def test_collapsed_last_layer_is_the_average_over_its_draws(residual: bool) -> None:
    """Draws of W^L, each pushed through the whole network, give the moments, p(yt) and ELL of each particle."""
    task = _one_task(residual=residual, exact=False, S=2)
    q, g = ref.collapsed(**task), gen(5)
    mean, factors = task["prior"]
    for s in range(2):
        W_h = [W[s] for W in task["hidden"]]
        outputs = {}
        for key in ("c", "t"):
            A, skip = ref.last_layer(task[f"x{key}"], W_h, 2, "tanh", residual)
            W = torch.stack([mean[u] + 0.3 * torch.ones(3).double() for u in range(2)])
            close(A @ W.T + skip, ref.forward(task[f"x{key}"], [*W_h, W], "tanh", residual))
            outputs[key] = (A, skip)
        W = torch.empty(DRAWS // 5, 2, 3, dtype=torch.float64)
        for u in range(2):
            A, skip = outputs["c"]
            b = ref.condition_block(A, factors[u], mean[u], task["yc"][:, u] - skip[:, u], task["context_prec"][:, u])
            W[:, u] = b["w_mean"] + sc.randn(len(W), 4, generator=g) @ (factors[u] @ torch.linalg.cholesky(b["eps_cov"])).T
        f = {key: torch.einsum("np,sdp->snd", A, W) + skip for key, (A, skip) in outputs.items()}
        within_four_errors(f["t"], q["mean"][s])
        gap = f["t"] - q["mean"][s]
        within_four_errors(torch.einsum("smd,snd->sdmn", gap, gap), q["cov"][s])
        log_lik = {key: torch.distributions.Normal(f[key], task["noise_std"]).log_prob(task[f"y{key}"]) for key in "ct"}
        seen = (task["context_prec"] > 0).double()
        within_four_errors((log_lik["c"] * seen).sum((1, 2)), q["ell_c"][s])
        within_four_errors(torch.exp(log_lik["t"].sum((1, 2)) - q["log_pt"][s]), tensor(1.0)[0])


def test_objectives_by_hand() -> None:
    """Two particles: densities 2 and 4 of the targets, so that PPL = log 3."""
    log_pt, ell, kl_h, kl_l = tensor(2.0, 4.0).log(), tensor(-1.0, -2.0), tensor(1.0, 3.0), tensor(0.5, 0.5)
    close(ref.npml(log_pt), tensor(3.0).log()[0])
    close(ref.avi(ell, kl_h, kl_l), tensor(-4.0)[0])
    close(ref.avi(ell, kl_h, kl_l, 0.1), tensor(-1.75)[0])
    close(ref.pp_avi(log_pt, ell, kl_h, kl_l), tensor(math.log(3) - 4)[0])
    close(ref.pp_avi(log_pt, ell, kl_h, kl_l, 0.1), tensor(0.1 * math.log(3) - 1.75)[0])
    close(ref.npml(tensor(-1000.0, -1000.0)), tensor(-1000.0)[0])


def _linear_task(d_y: int = 2) -> tuple[dict[str, Any], Tensor]:
    """A task under a linear model, and log p(yc, yt) of it by Bayesian linear regression of all points together."""
    g = gen(4)
    (xc, yc), (xt, yt) = (sc.random_task(n, 1, d_y, g) for n in (4, 3))
    prior, noise = sc.random_prior(d_y, 2, g), 0.5
    evidence = tensor(0.0)[0]
    for u in range(d_y):
        x, y, L = torch.cat([xc, xt]), torch.cat([yc, yt])[:, u], prior[1][u]
        evidence = evidence + sc.bayesian_linear_regression(x, y, prior[0][u], L @ L.T, noise, xt)["log_evidence"]
    prec = torch.full((4, d_y), noise**-2, dtype=torch.float64)
    task = {"xc": xc, "yc": yc, "xt": xt, "yt": yt, "hidden": [], "prior": prior, "context_prec": prec}
    return task | {"noise_std": tensor(noise), "num_samples": 2}, evidence


def test_objectives_of_a_linear_model_are_exact() -> None:
    """ELBO = log p(yc), PPL = NPVI = log p(yt | yc), so that PP-AVI = log p(yc, yt)."""
    task, evidence = _linear_task()
    q, none = ref.collapsed(**task), torch.zeros(2, dtype=torch.float64)
    close(ref.pp_avi(q["log_pt"], q["ell_c"], none, q["kl"]), evidence, 1e-8)
    close(ref.avi(q["ell_c"], none, q["kl"]), q["log_z"][0], 1e-8)
    prec_t = torch.full_like(task["yt"], 4.0)
    sites = ([(task["yc"], task["context_prec"])], [(task["yt"], prec_t)])
    npvi = ref.npvi(task["xc"], task["xt"], task["yt"], [], [task["prior"]], *sites, task["noise_std"], 2)
    close(npvi["value"], ref.npml(q["log_pt"]), 1e-8)


def _npvi_problem(n: int, m: int, residual: bool) -> dict[str, Any]:
    g = gen(6)
    (xc, yc), (xt, yt) = (sc.random_task(k, 2, 2, g) for k in (n, m))
    noise = tensor(0.5, 0.8)

    def sites(k: int, y: Tensor) -> list[ref.Sites]:
        rows = [(sc.randn(k, d, generator=g), sc.uniform(k, d, low=0.5, high=2.0, generator=g)) for d in (3, 2)]
        rows.append((y, sc.uniform(k, 2, low=0.5, high=2.0, generator=g)))
        for _, prec in rows:
            prec[:1] = 0.0
        return rows

    priors = [sc.random_prior(3, 3, g), sc.random_prior(2, 4, g, k=6), sc.random_prior(2, 3, g)]
    data = {"xc": xc, "xt": xt, "yt": yt, "noise_std": noise, "context_sites": sites(n, yc), "target_sites": sites(m, yt)}
    hidden = sc.random_weights((2, 3, 2), 3, g)
    return data | {"hidden": hidden, "priors": priors, "num_samples": 3, "activation": "tanh", "residual": residual}


@pytest.mark.parametrize("residual", [False, True])
def test_npvi_of_an_empty_context_is_avi_of_the_targets(residual: bool) -> None:
    problem = _npvi_problem(0, 4, residual)
    npvi = ref.npvi(**problem)
    xt, yt, hidden = problem["xt"], problem["yt"], problem["hidden"]
    priors, sites = problem["priors"], problem["target_sites"]
    kl = ref.hidden_kl(xt, hidden, priors[:-1], sites[:-1], "tanh", residual)
    q = ref.collapsed(xt, yt, xt, yt, hidden, priors[-1], sites[-1][1], problem["noise_std"], 3, "tanh", residual)
    close(npvi["kl"], kl + q["kl"], 1e-8)
    close(npvi["ell_t"], q["ell_c"], 1e-8)
    close(npvi["value"], ref.avi(q["ell_c"], kl, q["kl"]), 1e-8)


@pytest.mark.parametrize("residual", [False, True])
def test_npvi_kl_is_between_the_two_posteriors(residual: bool) -> None:
    """KL(q+ || q) = E_q+[log pseudo-likelihood of the targets] - (log Z+ - log Z), added over layers and units."""
    problem = _npvi_problem(4, 3, residual)
    npvi = ref.npvi(**problem)
    for s in range(3):
        weights, total = [W[s] for W in problem["hidden"]], tensor(0.0)[0]
        rows = [ref.layer_inputs(problem[key], weights, "tanh", residual) for key in ("xc", "xt")]
        skips = [ref.last_layer(problem[key], weights, 2, "tanh", residual)[1] for key in ("xc", "xt")]
        for i, (mean, factors) in enumerate(problem["priors"]):
            (y_c, prec_c), (y_t, prec_t) = problem["context_sites"][i], problem["target_sites"][i]
            if i == 2:
                y_c, y_t = y_c - skips[0], y_t - skips[1]
            A_c, A_t = rows[0][i][0], rows[1][i][0]
            for u in range(len(mean)):
                old = ref.condition_block(A_c, factors[u], mean[u], y_c[:, u], prec_c[:, u])
                y, prec = torch.cat([y_c, y_t])[:, u], torch.cat([prec_c, prec_t])[:, u]
                new = ref.condition_block(torch.cat([A_c, A_t]), factors[u], mean[u], y, prec)
                ell = ref.expected_log_lik(y_t[:, u], prec_t[:, u], A_t, new["w_mean"], new["w_cov"])
                total = total + ell - (new["log_z"] - old["log_z"])
        close(npvi["kl"][s], total, 1e-8)
    assert float(npvi["kl"].min()) > 0


def test_npvi_of_no_targets_is_zero() -> None:
    npvi = ref.npvi(**_npvi_problem(4, 0, False))
    close(npvi["kl"], torch.zeros(3).double())
    close(npvi["value"], tensor(0.0)[0])


# Quadrature


TINY = [("tanh", False), ("tanh", True), ("relu", False), ("relu", True)]


@pytest.mark.parametrize(("activation", "residual"), TINY)
def test_quadrature_stays_when_its_nodes_are_doubled(activation: str, residual: bool) -> None:
    coarse = sc.tiny_network_evidence(**sc.tiny_problem(activation, residual))
    fine = sc.tiny_network_evidence(**sc.tiny_problem(activation, residual), nodes=641)
    for key in fine:
        close(coarse[key], fine[key], 1e-9 if activation == "tanh" else 1e-4)


@pytest.mark.parametrize(("activation", "residual"), TINY)
def test_quadrature_against_simple_monte_carlo(activation: str, residual: bool) -> None:
    """All four weights drawn from the prior, pushed through the twin's own network, weighted by the likelihood."""
    p, g = sc.tiny_problem(activation, residual), gen(7)
    answer = sc.tiny_network_evidence(**p)
    W1 = p["hidden_mean"] + p["hidden_std"] * sc.randn(DRAWS, 2, generator=g)
    W2 = p["last_mean"] + sc.randn(DRAWS, 2, generator=g) @ torch.linalg.cholesky(p["last_cov"]).T

    def f(x: Tensor) -> Tensor:
        h = W1[:, :1] * x.T + W1[:, 1:] + (x.T if residual else 0.0)
        return W2[:, :1] * PHI[activation](h) + W2[:, 1:] + (h if residual else 0.0)

    for s in range(3):
        close(f(p["xt"])[s, :, None], ref.forward(p["xt"], [W1[s : s + 1], W2[s : s + 1]], activation, residual))
    log_lik = torch.distributions.Normal(f(p["x"]), p["noise_std"]).log_prob(p["y"].T).sum(-1)
    ratio = torch.exp(log_lik - answer["log_evidence"])[:, None]
    ft, gap = f(p["xt"]), W1 - answer["hidden_mean"]
    within_four_errors(ratio[:, 0], tensor(1.0)[0])
    within_four_errors(ratio * (ft - answer["mean"]), torch.zeros(2).double())
    within_four_errors(ratio * (ft - answer["mean"]) ** 2, answer["variance"])
    within_four_errors(ratio * gap, torch.zeros(2).double())
    within_four_errors(ratio[:, :, None] * gap[:, :, None] * gap[:, None, :], answer["hidden_cov"])


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_quadrature_of_one_observation_integrates_to_one(activation: str) -> None:
    """The evidence is a density of y."""
    axis = torch.linspace(-40, 40, 801, dtype=torch.float64)
    p = sc.tiny_problem(activation, points=1)
    density = torch.stack([sc.tiny_network_evidence(**(p | {"y": y.view(1, 1)}), nodes=41)["log_evidence"] for y in axis]).exp()
    close(density.sum() * (axis[1] - axis[0]), tensor(1.0)[0], 1e-6)


def test_quadrature_of_a_network_that_is_linear_is_linear_regression() -> None:
    """Where relu never switches off and w, b hardly vary, the hidden unit is 2 x + 20."""
    p = sc.tiny_problem("relu") | {
        "hidden_mean": tensor(2.0, 20.0),
        "hidden_std": tensor(1e-7, 1e-7),
        "last_cov": torch.eye(2).double() / 100,
    }
    answer = sc.tiny_network_evidence(**p)
    problem = (2 * p["x"] + 20, p["y"][:, 0], p["last_mean"], p["last_cov"], 0.5, 2 * p["xt"] + 20)
    expected = sc.bayesian_linear_regression(*problem)
    close(answer["log_evidence"], expected["log_evidence"], 1e-5)
    close(answer["mean"], expected["mean"], 1e-5)
    close(answer["variance"], expected["cov"].diagonal(), 1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_exact_evidence_bounds_the_twins_elbo(residual: bool) -> None:
    """AVI <= log p(y), by a margin for this crude posterior, with hidden weights drawn from it."""
    p, S, g = sc.tiny_problem("tanh", residual), 400, gen(8)
    priors = [(p["hidden_mean"][None], [torch.diag(p["hidden_std"])]), (p["last_mean"][None], [torch.linalg.cholesky(p["last_cov"])])]
    sites = (p["y"], torch.full((3, 1), 0.3, dtype=torch.float64))
    q = ref.layer_posterior(ref.features(p["x"])[None, None], priors[0][1], priors[0][0], sites[0][None], sites[1][None])
    W1 = q["w_mean"][0, 0] + sc.randn(S, 1, 2, generator=g) @ torch.linalg.cholesky(q["w_cov"][0, 0, 0]).T
    prec = torch.full((3, 1), p["noise_std"] ** -2, dtype=torch.float64)
    last = ref.collapsed(p["x"], p["y"], p["xt"], p["xt"], [W1], priors[1], prec, tensor(p["noise_std"]), S, "tanh", residual)
    kl = ref.hidden_kl(p["x"], [W1], priors[:1], [sites], "tanh", residual)
    evidence = sc.tiny_network_evidence(**p)["log_evidence"]
    assert float(ref.avi(last["ell_c"], kl, last["kl"])) < float(evidence) - 4 * float(last["log_z"].std()) / math.sqrt(S)
    # Weighted by p / q of the hidden weights, the last layer's evidences average to the evidence itself.
    log_q = MultivariateNormal(q["w_mean"][0, 0, 0], q["w_cov"][0, 0, 0]).log_prob(W1[:, 0])
    log_p = torch.distributions.Normal(p["hidden_mean"], p["hidden_std"]).log_prob(W1[:, 0]).sum(-1)
    ratio = torch.exp(last["log_z"] + log_p - log_q - evidence)
    error = float(ratio.std()) / math.sqrt(S)
    assert error < 0.1 and abs(float(ratio.mean()) - 1) < 4 * error


def test_bernoulli_quadrature_stays_and_sums_to_one() -> None:
    coarse, fine = sc.linear_bernoulli_evidence(**sc.bernoulli_problem()), sc.linear_bernoulli_evidence(**sc.bernoulli_problem(), nodes=321)
    for key in fine:
        close(coarse[key], fine[key], 1e-10)
    total = tensor(0.0)[0]
    for labels in itertools.product((0.0, 1.0), repeat=4):
        total = total + sc.linear_bernoulli_evidence(**(sc.bernoulli_problem() | {"y": tensor(*labels)[:, None]}))["log_evidence"].exp()
    close(total, tensor(1.0)[0], 1e-10)


def test_bernoulli_quadrature_against_simple_monte_carlo() -> None:
    p, g = sc.bernoulli_problem(), gen(9)
    answer = sc.linear_bernoulli_evidence(**p)
    w = p["prior_mean"] + sc.randn(DRAWS, 2, generator=g) @ torch.linalg.cholesky(p["prior_cov"]).T

    def prob(x: Tensor) -> Tensor:
        return torch.sigmoid(w[:, :1] * x.T + w[:, 1:])

    lik = torch.distributions.Bernoulli(prob(p["x"])).log_prob(p["y"].T).sum(-1)
    ratio = torch.exp(lik - answer["log_evidence"])[:, None]
    gap = w - answer["w_mean"]
    within_four_errors(ratio[:, 0], tensor(1.0)[0])
    within_four_errors(ratio * (prob(p["xt"]) - answer["prob"]), torch.zeros(2).double())
    within_four_errors(ratio * gap, torch.zeros(2).double())
    within_four_errors(ratio[:, :, None] * gap[:, :, None] * gap[:, None, :], answer["w_cov"])


# Makers of problems


@pytest.mark.parametrize("name", sc.BLOCKS)
def test_random_blocks_are_what_they_say(name: str) -> None:
    N, p, k, masked = sc.BLOCKS[name]
    b, again, other = block(name), block(name), block(name, seed=1)
    assert b["A"].shape == (N, p) and b["L"].shape == (p, k) and int((b["prec"] == 0).sum()) == masked
    assert all(torch.equal(b[key], again[key]) for key in b)
    assert not torch.equal(b["L"], other["L"])
    assert int(torch.linalg.matrix_rank(b["L"])) == min(p, k)


def test_makers_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    g = gen()
    sc.random_layer(1, 2, 3, 2, 2, g, counts=[1, 3])
    sc.random_task(3, 1, 1, g)
    sc.random_weights((1, 2, 1), 2, g)
    assert torch.equal(before, torch.get_rng_state())
