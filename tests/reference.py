"""The slow, obvious twin: what the package computes, written again with loops, explicit inverses and dense Gaussians.

Every law is judged by this file, so it shares no code with the package, works in float64 on one block at a time, and loops over
samples, tasks and units. `test_reference.py` checks it against textbook identities, simple Monte Carlo and quadrature.

Conventions: weights of a unit are w = mu + L eps with eps ~ N(0, I_k); A (N, p) are features, whose last column is one;
a point with precision 0 is masked, and dropped before anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

Factors = Sequence[Tensor]  # one L (p, k) for each unit
Prior = tuple[Tensor, Factors]  # mean (d, p) and factors of one layer
Sites = tuple[Tensor, Tensor]  # pseudo-observations and their precisions, each (N, d), of one layer
Block = dict[str, Tensor]


# Gaussians


def gaussian_kl(mean_q: Tensor, cov_q: Tensor, mean_p: Tensor, cov_p: Tensor) -> Tensor:
    """Return KL(q || p) = 1/2 (tr P S_q + g^T P g - n + log|S_p| - log|S_q|), P = S_p^{-1}, g = mean_p - mean_q."""
    P, gap = torch.linalg.inv(cov_p), mean_p - mean_q
    return 0.5 * (torch.trace(P @ cov_q) + gap @ P @ gap - len(gap) + torch.logdet(cov_p) - torch.logdet(cov_q))


def gaussian_log_density(y: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    """Return log N(y; mean, cov) of all entries together; 0 where there are none."""
    return y.new_zeros(()) if len(y) == 0 else MultivariateNormal(mean, cov, validate_args=False).log_prob(y)


def mixture_log_density(y: Tensor, means: Tensor, covs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return log sum_s weights_s N(y; means_s, covs_s), for means (S, M) and covs (S, M, M); equal weights if None."""
    weights = torch.full((len(means),), 1.0 / len(means), dtype=y.dtype) if weights is None else weights
    terms = [torch.log(w) + gaussian_log_density(y, m, C) for w, m, C in zip(weights, means, covs, strict=True)]
    return torch.logsumexp(torch.stack(terms), 0)


def expected_log_lik(y: Tensor, prec: Tensor, A: Tensor, w_mean: Tensor, w_cov: Tensor) -> Tensor:
    """Return E[sum_n log N(y_n; a_n^T w, 1 / prec_n)] for w ~ N(w_mean, w_cov), over the points with prec > 0."""
    total = w_mean.new_zeros(())
    for n in range(len(y)):
        if prec[n] > 0:
            square = (y[n] - A[n] @ w_mean) ** 2 + A[n] @ w_cov @ A[n]
            total = total + 0.5 * torch.log(prec[n]) - 0.5 * math.log(2 * math.pi) - 0.5 * prec[n] * square
    return total


# One block, one layer


def condition_block(A: Tensor, L: Tensor, mu: Tensor, y: Tensor, prec: Tensor) -> Block:
    """Condition one unit's weights on y_n = a_n^T w + noise of variance 1 / prec_n.

    Arguments:
        A: features with shape (N, p).
        L: factor with shape (p, k).
        mu: prior mean with shape (p,).
        y: pseudo-observations with shape (N,).
        prec: their precisions with shape (N,); 0 = masked.

    Returns:
        eps_mean (k,), eps_cov (k, k), w_mean (p,), w_cov (p, p), kl (between densities of w where L has an inverse, of eps
        elsewhere), kl_eps (always of eps), log_z and expected_log_lik (of the points that are not masked).
    """
    p, k = L.shape
    seen = prec > 0
    A, y, prec = A[seen], y[seen], prec[seen]
    noise_prec = torch.diag(prec)
    eps_cov = torch.linalg.inv(torch.eye(k, dtype=L.dtype) + L.T @ A.T @ noise_prec @ A @ L)
    eps_mean = eps_cov @ L.T @ A.T @ noise_prec @ (y - A @ mu)
    w_mean, w_cov = mu + L @ eps_mean, L @ eps_cov @ L.T
    kl_eps = 0.5 * (eps_mean @ eps_mean + torch.trace(eps_cov) - k - torch.logdet(eps_cov))
    invertible = p == k and int(torch.linalg.matrix_rank(L.detach())) == p
    return {
        "eps_mean": eps_mean,
        "eps_cov": eps_cov,
        "w_mean": w_mean,
        "w_cov": w_cov,
        "kl": gaussian_kl(w_mean, w_cov, mu, L @ L.T) if invertible else kl_eps,
        "kl_eps": kl_eps,
        "log_z": gaussian_log_density(y, A @ mu, A @ L @ L.T @ A.T + torch.diag(1.0 / prec)),
        "expected_log_lik": expected_log_lik(y, prec, A, w_mean, w_cov),
    }


def layer_block(A: Tensor, d: int) -> Tensor:
    """Return the features (N d, d p) of a layer's weights as one block, flattened unit after unit; row n d + u is point n, unit u."""
    p = A.shape[1]
    rows = []
    for a in A:
        for u in range(d):
            row = A.new_zeros(d * p)
            row[u * p : (u + 1) * p] = a
            rows.append(row)
    return torch.stack(rows) if rows else A.new_zeros(0, d * p)


def layer_conditionals(A: Tensor, factors: Factors, mean: Tensor, y: Tensor, prec: Tensor) -> list[Block]:
    """Condition each unit of a layer, for one sample and task: A (N, p), mean (d, p), y and prec (N, d)."""
    return [condition_block(A, factors[u], mean[u], y[:, u], prec[:, u]) for u in range(len(mean))]


def layer_posterior(A: Tensor, factors: Factors, mean: Tensor, pseudo_y: Tensor, pseudo_prec: Tensor) -> Block:
    """Condition a layer whose units are independent, by loops over samples, tasks and units.

    Arguments:
        A: features with shape (S, T, N, p).
        factors: one L (p, k) for each of the d units.
        mean: prior mean with shape (d, p).
        pseudo_y: pseudo-observations with shape (T, N, d).
        pseudo_prec: their precisions with shape (T, N, d); 0 = masked.

    Returns:
        eps_mean (S, T, d, k), eps_cov (S, T, d, k, k), w_mean (S, T, d, p), w_cov (S, T, d, p, p), and, summed over units,
        kl, log_z and expected_log_lik (S, T).
    """
    S, T = A.shape[:2]
    grid = [[layer_conditionals(A[s, t], factors, mean, pseudo_y[t], pseudo_prec[t]) for t in range(T)] for s in range(S)]

    def stacked(key: str) -> Tensor:
        return torch.stack([torch.stack([torch.stack([unit[key] for unit in units]) for units in row]) for row in grid])

    out = {key: stacked(key) for key in ("eps_mean", "eps_cov", "w_mean", "w_cov")}
    return out | {key: stacked(key).sum(-1) for key in ("kl", "log_z", "expected_log_lik")}


# The network


def activate(h: Tensor, activation: str) -> Tensor:
    """Return phi(h) from its definition."""
    if activation == "relu":
        return torch.where(h > 0, h, torch.zeros_like(h))
    if activation == "tanh":
        return (torch.exp(h) - torch.exp(-h)) / (torch.exp(h) + torch.exp(-h))
    if activation == "silu":
        return h / (1 + torch.exp(-h))
    if activation == "gelu":
        return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    if activation == "sine":
        return torch.sin(h)
    raise ValueError(f"Expected relu, tanh, silu, gelu or sine. Got {activation!r}.")


def features(h: Tensor) -> Tensor:
    """Return [h, 1]."""
    return torch.cat([h, torch.ones_like(h[..., :1])], dim=-1)


def _layer(A: Tensor, W: Tensor) -> Tensor:
    rows = [torch.stack([(A[n] * W[u]).sum() for u in range(len(W))]) for n in range(len(A))]
    return torch.stack(rows) if rows else A.new_zeros(0, len(W))


def layer_inputs(x: Tensor, weights: Sequence[Tensor], activation: str = "relu", residual: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Walk through the network with one set of weights.

    Arguments:
        x: inputs with shape (N, d_x).
        weights: W of layers 1, 2, ... with shape (d_l, p_l), any number of them from the input side.

    Returns:
        (A^l, H^{l-1}) of each of these layers and of the one behind them: its features (N, p_l), and what entered it (N, d_{l-1}).
    """
    H, rows = x, []
    for i, W in enumerate(weights):
        A = features(H if i == 0 else activate(H, activation))
        rows.append((A, H))
        H = _layer(A, W) + H if residual and H.shape[1] == len(W) else _layer(A, W)
    rows.append((features(H if not weights else activate(H, activation)), H))
    return rows


def forward(x: Tensor, weights: Sequence[Tensor], activation: str = "relu", residual: bool = False) -> Tensor:
    """Return f_W(x) with shape (N, d_y) for one set of weights, W^l (d_l, p_l) with the bias last."""
    return layer_inputs(x, weights, activation, residual)[-1][1]


def last_layer(x: Tensor, hidden: Sequence[Tensor], d_y: int, activation: str, residual: bool) -> tuple[Tensor, Tensor]:
    """Return the last layer's features (N, p), and what a residual connection adds to its output (N, d_y), given hidden weights."""
    A, H = layer_inputs(x, hidden, activation, residual)[-1]
    return A, H if residual and H.shape[1] == d_y else x.new_zeros(len(x), d_y)


def hidden_kl(
    xc: Tensor, hidden: Sequence[Tensor], priors: Sequence[Prior], sites: Sequence[Sites], activation: str = "relu", residual: bool = False
) -> Tensor:
    """Return, for each particle, the KL divergences of the hidden layers added up, each given the particle's earlier weights.

    Arguments:
        xc: context inputs with shape (N, d_x).
        hidden: sampled weights of each hidden layer with shape (S, d_l, p_l).
        priors: prior of each hidden layer.
        sites: pseudo-observations of A^l (W^l)^T for each hidden layer.

    Returns:
        With shape (S,).
    """
    values = []
    for s in range(len(hidden[0])):
        rows = layer_inputs(xc, [W[s] for W in hidden], activation, residual)
        kl = xc.new_zeros(())
        for (mean, factors), (y, prec), (A, _) in zip(priors, sites, rows[:-1], strict=True):
            for unit in layer_conditionals(A, factors, mean, y, prec):
                kl = kl + unit["kl"]
        values.append(kl)
    return torch.stack(values)


# Objectives of one task with a Gaussian likelihood, given S sets of hidden weights


def collapsed(
    xc: Tensor,
    yc: Tensor,
    xt: Tensor,
    yt: Tensor,
    hidden: Sequence[Tensor],
    prior: Prior,
    context_prec: Tensor,
    noise_std: Tensor,
    num_samples: int,
    activation: str = "relu",
    residual: bool = False,
) -> Block:
    """Integrate the last layer out, for each particle.

    Arguments:
        xc, yc: context with shapes (N, d_x) and (N, d_y).
        xt, yt: targets with shapes (M, d_x) and (M, d_y).
        hidden: sampled weights of each hidden layer with shape (S, d_l, p_l); empty for a linear model.
        prior: prior of the last layer.
        context_prec: precisions with which the last layer sees yc, with shape (N, d_y): 1 / noise_std^2 if "exact"; 0 = masked.
        noise_std: noise of the likelihood with shape (d_y,).
        num_samples: S.

    Returns:
        mean (S, M, d_y) and cov (S, d_y, M, M) of f at the targets; log_pt (S,), log p(yt | particle) of all targets together;
        ell_c (S,), E[log p(yc | f)] over q of the last layer; kl (S,), its KL divergence; log_z (S,), its evidence of the context.
    """
    mean, factors = prior
    noise_std = noise_std.expand(len(mean))
    particles = []
    for s in range(num_samples):
        weights = [W[s] for W in hidden]
        A_c, skip_c = last_layer(xc, weights, len(mean), activation, residual)
        A_t, skip_t = last_layer(xt, weights, len(mean), activation, residual)
        units = []
        for u in range(len(mean)):
            q = condition_block(A_c, factors[u], mean[u], yc[:, u] - skip_c[:, u], context_prec[:, u])
            f_mean, f_cov = skip_t[:, u] + A_t @ q["w_mean"], A_t @ q["w_cov"] @ A_t.T
            variance = noise_std[u] ** 2
            noise = variance * torch.eye(len(xt), dtype=xt.dtype)
            lik_prec = torch.where(context_prec[:, u] > 0, 1.0 / variance, torch.zeros_like(variance))
            ell = expected_log_lik(yc[:, u] - skip_c[:, u], lik_prec, A_c, q["w_mean"], q["w_cov"])
            log_pt = gaussian_log_density(yt[:, u], f_mean, f_cov + noise)
            units.append({"mean": f_mean, "cov": f_cov, "log_pt": log_pt, "ell_c": ell, "kl": q["kl"], "log_z": q["log_z"]})
        particles.append({key: torch.stack([unit[key] for unit in units]) for key in units[0]})
    out = {key: torch.stack([particle[key] for particle in particles]) for key in particles[0]}
    summed = {key: out[key].sum(-1) for key in ("log_pt", "ell_c", "kl", "log_z")}
    return {"mean": out["mean"].transpose(1, 2), "cov": out["cov"]} | summed


def avi(ell_c: Tensor, kl_hidden: Tensor, kl_last: Tensor, beta: float = 1.0) -> Tensor:
    """Return ELL_c - beta KL from one value of each per particle, with shape (S,)."""
    return ell_c.mean() - beta * (kl_hidden + kl_last).mean()


def npml(log_pt: Tensor) -> Tensor:
    """Return PPL_t = log 1/S sum_s p(Y_t | particle s), from log densities of all targets together, with shape (S,)."""
    return torch.logsumexp(log_pt, 0) - math.log(len(log_pt))


def pp_avi(log_pt: Tensor, ell_c: Tensor, kl_hidden: Tensor, kl_last: Tensor, beta: float = 1.0) -> Tensor:
    """Return beta PPL_t + ELL_c - beta KL from one value of each per particle, with shape (S,)."""
    return beta * npml(log_pt) + avi(ell_c, kl_hidden, kl_last, beta)


def npvi(
    xc: Tensor,
    xt: Tensor,
    yt: Tensor,
    hidden: Sequence[Tensor],
    priors: Sequence[Prior],
    context_sites: Sequence[Sites],
    target_sites: Sequence[Sites],
    noise_std: Tensor,
    num_samples: int,
    activation: str = "relu",
    residual: bool = False,
) -> Block:
    """Return E_q+[log p(yt | W)] - KL(q+ || q), q+ = q(. | context + target) and q = q(. | context), along given hidden weights.

    Arguments:
        xc, xt, yt: inputs of the context (N, d_x), inputs (M, d_x) and outputs (M, d_y) of the targets.
        hidden: weights of each hidden layer drawn from q+, with shape (S, d_l, p_l).
        priors: prior of each layer, the last one included.
        context_sites: pseudo-observations (N, d_l) of each layer; those of the last layer are of y.
        target_sites: the same for the targets.
        noise_std: noise of the likelihood with shape (d_y,).
        num_samples: S.

    Returns:
        value (), and for each particle kl (S,), ell_t (S,).
    """
    d_y = len(priors[-1][0])
    noise_std = noise_std.expand(d_y)
    ells, kls = [], []
    for s in range(num_samples):
        weights = [W[s] for W in hidden]
        rows_c, rows_t = (layer_inputs(x, weights, activation, residual) for x in (xc, xt))
        kl, ell = xc.new_zeros(()), xc.new_zeros(())
        for i, (mean, factors) in enumerate(priors):
            A_c, A_t, (y_c, prec_c), (y_t, prec_t) = rows_c[i][0], rows_t[i][0], context_sites[i], target_sites[i]
            skip_t = torch.zeros_like(y_t)
            if i == len(hidden):
                y_c = y_c - last_layer(xc, weights, d_y, activation, residual)[1]
                skip_t = last_layer(xt, weights, d_y, activation, residual)[1]
                y_t = y_t - skip_t
            both = (torch.cat([A_c, A_t]), factors, mean, torch.cat([y_c, y_t]), torch.cat([prec_c, prec_t]))
            old, new = layer_conditionals(A_c, factors, mean, y_c, prec_c), layer_conditionals(*both)
            for u in range(len(mean)):
                # In eps, where covariances have inverses whatever the factor; the divergence is the same.
                kl = kl + gaussian_kl(new[u]["eps_mean"], new[u]["eps_cov"], old[u]["eps_mean"], old[u]["eps_cov"])
                if i == len(hidden):
                    lik_prec = torch.where(prec_t[:, u] > 0, noise_std[u] ** -2, torch.zeros_like(noise_std[u]))
                    ell = ell + expected_log_lik(yt[:, u] - skip_t[:, u], lik_prec, A_t, new[u]["w_mean"], new[u]["w_cov"])
        kls.append(kl)
        ells.append(ell)
    kl_s, ell_s = torch.stack(kls), torch.stack(ells)
    return {"value": ell_s.mean() - kl_s.mean(), "kl": kl_s, "ell_t": ell_s}
