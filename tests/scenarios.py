"""Problems with known answers, and makers of random problems.

The answers come by other roads than the package's: information form and kernels for the linear model, quadrature over the hidden
weights for the smallest networks. All in float64; randomness only through the generator handed in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

Answer = dict[str, Tensor]

# name: (points, features, columns of L, masked points)
BLOCKS: dict[str, tuple[int, int, int, int]] = {
    "empty": (0, 3, 3, 0),
    "one_point": (1, 3, 3, 0),
    "many_points": (9, 3, 3, 0),
    "few_points": (2, 5, 5, 0),
    "square": (4, 4, 4, 0),
    "masked": (7, 3, 3, 3),
    "masked_few": (4, 6, 6, 2),
    "all_masked": (3, 2, 2, 3),
    "wide_factor": (5, 3, 5, 1),
    "wide_factor_few": (2, 3, 6, 0),
    "narrow_factor": (6, 4, 2, 1),
    "one_feature": (3, 1, 1, 0),
}


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(*shape: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Draw uniform numbers in float64."""
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def random_factor(p: int, k: int, generator: torch.Generator) -> Tensor:
    """Draw L (p, k): lower triangular with positive diagonal if square, [diag(s), U] if wide, anything if narrow."""
    scales = torch.diag(uniform(p, low=0.4, high=1.5, generator=generator))
    rest = 0.5 * randn(p, max(p, k), generator=generator)
    if k == p:
        return scales + torch.tril(rest, -1)
    return torch.cat([scales, rest[:, : k - p]], dim=1) if k > p else rest[:, :k]


def random_block(N: int, p: int, k: int, generator: torch.Generator, masked: int = 0) -> Answer:
    """Draw a problem for `condition_block`: A (N, p) with ones last, L (p, k), mu (p,), y (N,), prec (N,), `masked` of them 0."""
    A = torch.cat([randn(N, p - 1, generator=generator), torch.ones(N, 1, dtype=torch.float64)], dim=1)
    prec = uniform(N, low=-1.5, high=2.5, generator=generator).exp()
    # Gaps in the middle too: masked points need not be the last.
    prec[torch.randperm(N, generator=generator)[:masked]] = 0.0
    L, mu, y = random_factor(p, k, generator), randn(p, generator=generator), randn(N, generator=generator)
    return {"A": A, "L": L, "mu": mu, "y": y, "prec": prec}


def random_layer(
    S: int, T: int, N: int, p: int, d: int, generator: torch.Generator, k: int | None = None, counts: Sequence[int] | None = None
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """Draw a problem for `layer_posterior`: A (S, T, N, p), factors, mean (d, p), pseudo_y and pseudo_prec (T, N, d).

    Task t has its first `counts[t]` points observed, the others have precision 0; all are observed if `counts` is None.
    """
    A = torch.cat([randn(S, T, N, p - 1, generator=generator), torch.ones(S, T, N, 1, dtype=torch.float64)], dim=-1)
    factors = [random_factor(p, k or p, generator) for _ in range(d)]
    prec = uniform(T, N, d, low=-1.5, high=2.5, generator=generator).exp()
    for t, count in enumerate(counts or []):
        prec[t, count:] = 0.0
    return A, factors, randn(d, p, generator=generator), randn(T, N, d, generator=generator), prec


def random_prior(d: int, p: int, generator: torch.Generator, k: int | None = None) -> tuple[Tensor, list[Tensor]]:
    """Draw the prior of one layer: mean (d, p) and one factor (p, k) for each unit."""
    return 0.5 * randn(d, p, generator=generator), [random_factor(p, k or p, generator) for _ in range(d)]


def random_weights(widths: Sequence[int], S: int, generator: torch.Generator) -> list[Tensor]:
    """Draw weights (S, d_l, d_{l-1} + 1) of each layer of a network with widths d_0, d_1, ..., d_L."""
    return [randn(S, b, a + 1, generator=generator) for a, b in itertools.pairwise(widths)]


def random_task(n: int, d_x: int, d_y: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw x (n, d_x) uniform in [-2, 2] and y (n, d_y), a noisy sine of it."""
    x = uniform(n, d_x, low=-2.0, high=2.0, generator=generator)
    phases = torch.arange(d_y, dtype=torch.float64)
    return x, torch.sin(x.sum(-1, keepdim=True) + phases) + 0.1 * randn(n, d_y, generator=generator)


# Linear models


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def bayesian_linear_regression(x: Tensor, y: Tensor, prior_mean: Tensor, prior_cov: Tensor, noise_std: float, xt: Tensor) -> Answer:
    """Solve y = [x, 1] w + noise, w ~ N(prior_mean, prior_cov), in information form.

    The evidence is Bayes' rule read backwards, log p(y) = log p(y | w) + log p(w) - log p(w | y), at w = the posterior mean.

    Arguments:
        x, y: data with shapes (N, d) and (N,).
        prior_mean, prior_cov: with shapes (d + 1,) and (d + 1, d + 1), bias last.
        noise_std: standard deviation of the noise.
        xt: test inputs with shape (M, d).

    Returns:
        w_mean, w_cov, log_evidence, and the noise-free predictive mean (M,) and cov (M, M).
    """
    A, At, prior_prec = _with_one(x), _with_one(xt), torch.linalg.inv(prior_cov)
    w_cov = torch.linalg.inv(prior_prec + A.T @ A / noise_std**2)
    w_mean = w_cov @ (prior_prec @ prior_mean + A.T @ y / noise_std**2)
    log_lik = torch.distributions.Normal(A @ w_mean, noise_std).log_prob(y).sum()
    log_prior = MultivariateNormal(prior_mean, prior_cov).log_prob(w_mean)
    log_posterior = MultivariateNormal(w_mean, (w_cov + w_cov.T) / 2).log_prob(w_mean)
    evidence = log_lik + log_prior - log_posterior
    return {"w_mean": w_mean, "w_cov": w_cov, "log_evidence": evidence, "mean": At @ w_mean, "cov": At @ w_cov @ At.T}


def gp_linear_kernel(x: Tensor, y: Tensor, prior_mean: Tensor, prior_cov: Tensor, noise_std: float, xt: Tensor) -> Answer:
    """Solve the same as a Gaussian process with mean [x, 1] prior_mean and kernel [x, 1] prior_cov [x', 1]^T.

    Returns:
        log_evidence, and the noise-free predictive mean (M,) and cov (M, M).
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return _with_one(a) @ prior_cov @ _with_one(b).T

    K = kernel(x, x) + noise_std**2 * torch.eye(len(x), dtype=x.dtype)
    inverse, resid = torch.linalg.inv(K), y - _with_one(x) @ prior_mean
    evidence = -0.5 * (resid @ inverse @ resid + torch.logdet(K) + len(x) * math.log(2 * math.pi))
    mean = _with_one(xt) @ prior_mean + kernel(xt, x) @ inverse @ resid
    return {"log_evidence": evidence, "mean": mean, "cov": kernel(xt, xt) - kernel(xt, x) @ inverse @ kernel(x, xt)}


# Quadrature over two weights


def _grid(nodes: int, width: float = 8.0) -> tuple[Tensor, Tensor]:
    """Return eps (G, 2) on a square of +- width standard deviations, and the log of its weights under N(0, I), which sum to one."""
    axis = torch.linspace(-width, width, nodes, dtype=torch.float64)
    eps = torch.cartesian_prod(axis, axis)
    return eps, torch.log_softmax(-0.5 * (eps**2).sum(-1), 0)


def _moments(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and covariance (D, D) of values (G, D) under weights (G,) that sum to one."""
    mean = weights @ values
    return mean, (values - mean).T @ (weights[:, None] * (values - mean))


def tiny_network_evidence(
    x: Tensor,
    y: Tensor,
    xt: Tensor,
    hidden_mean: Tensor,
    hidden_std: Tensor,
    last_mean: Tensor,
    last_cov: Tensor,
    noise_std: float,
    activation: str = "tanh",
    residual: bool = False,
    nodes: int = 321,
) -> Answer:
    """Solve the network x -> one hidden unit -> y with a Gaussian likelihood by quadrature over its two hidden weights.

    h = w x + b, f = v phi(h) + c; (w, b) has independent normal priors, (v, c) is integrated out exactly given (w, b). With
    `residual`, h and f get x and h added.

    Arguments:
        x, y: data with shapes (N, 1) and (N, 1).
        xt: test inputs with shape (M, 1).
        hidden_mean, hidden_std: of the prior of (w, b), each with shape (2,).
        last_mean, last_cov: of the prior of (v, c), with shapes (2,) and (2, 2).
        noise_std: standard deviation of the noise.
        activation: "tanh" (the error falls exponentially in `nodes`) or "relu" (as nodes^-2, for its kink).
        nodes: number of nodes along each of the two axes.

    Returns:
        log_evidence (), mean and variance (M,) of the noise-free f at xt under the exact posterior, and the exact posterior's
        hidden_mean (2,) and hidden_cov (2, 2) of (w, b).
    """
    phi = {"tanh": torch.tanh, "relu": torch.relu}[activation]
    eps, log_weight = _grid(nodes)
    wb = hidden_mean + hidden_std * eps

    def look(inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (G, N, 2) and what a residual connection adds to the output (G, N)."""
        h = wb[:, :1] * inputs[:, 0] + wb[:, 1:] + (inputs[:, 0] if residual else 0.0)
        return torch.stack([phi(h), torch.ones_like(h)], dim=-1), h if residual else torch.zeros_like(h)

    (A, skip), (At, skip_t) = look(x), look(xt)
    mean, cov = last_mean.expand(len(wb), 2), last_cov.expand(len(wb), 2, 2)
    log_lik = torch.zeros(len(wb), dtype=x.dtype)
    for n in range(len(x)):  # one observation after another: p(y_n | y_<n, w, b), then a rank-one update of q(v, c)
        a = A[:, n]
        cov_a = torch.einsum("gij,gj->gi", cov, a)
        s = (a * cov_a).sum(-1) + noise_std**2
        gap = y[n, 0] - skip[:, n] - (a * mean).sum(-1)
        log_lik = log_lik - 0.5 * (gap**2 / s + torch.log(2 * math.pi * s))
        mean = mean + cov_a * (gap / s)[:, None]
        cov = cov - cov_a[:, :, None] * cov_a[:, None, :] / s[:, None, None]
    log_joint = log_weight + log_lik
    evidence = torch.logsumexp(log_joint, 0)
    weight = torch.exp(log_joint - evidence)
    f_mean = skip_t + torch.einsum("gmj,gj->gm", At, mean)
    f_var = torch.einsum("gmi,gij,gmj->gm", At, cov, At)
    f = weight @ f_mean
    hidden = _moments(weight, wb)
    variance = weight @ (f_var + (f_mean - f) ** 2)
    return {"log_evidence": evidence, "mean": f, "variance": variance, "hidden_mean": hidden[0], "hidden_cov": hidden[1]}


def linear_bernoulli_evidence(x: Tensor, y: Tensor, xt: Tensor, prior_mean: Tensor, prior_cov: Tensor, nodes: int = 161) -> Answer:
    """Solve p(y = 1 | x) = 1 / (1 + exp(-(w x + b))) by quadrature over (w, b).

    Arguments:
        x, y: data with shapes (N, 1) and (N, 1), y in {0, 1}.
        xt: test inputs with shape (M, 1).
        prior_mean, prior_cov: of the prior of (w, b), with shapes (2,) and (2, 2).
        nodes: number of nodes along each of the two axes.

    Returns:
        log_evidence (), prob (M,) of y = 1 at xt under the exact posterior, and the exact posterior's w_mean (2,) and w_cov (2, 2).
    """
    eps, log_weight = _grid(nodes)
    wb = prior_mean + eps @ torch.linalg.cholesky(prior_cov).T
    logit = wb @ _with_one(x).T
    log_joint = log_weight + (y[:, 0] * logit - torch.log1p(torch.exp(logit))).sum(-1)
    evidence = torch.logsumexp(log_joint, 0)
    weight = torch.exp(log_joint - evidence)
    w_mean, w_cov = _moments(weight, wb)
    prob = weight @ (1 / (1 + torch.exp(-(wb @ _with_one(xt).T))))
    return {"log_evidence": evidence, "prob": prob, "w_mean": w_mean, "w_cov": w_cov}


# Small problems for these


def _column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def tiny_problem(activation: str = "tanh", residual: bool = False, points: int = 3) -> dict[str, Any]:
    """Return arguments for `tiny_network_evidence`: up to three points, two test inputs, priors away from standard normal."""
    data = {"x": _column(-1.2, 0.3, 1.5)[:points], "y": _column(0.8, -0.4, 0.9)[:points], "xt": _column(-0.5, 2.0)}
    hidden = {"hidden_mean": _column(0.4, -0.3)[:, 0], "hidden_std": _column(1.1, 0.8)[:, 0]}
    last = {"last_mean": _column(0.5, 0.1)[:, 0], "last_cov": torch.tensor([[1.2, 0.3], [0.3, 0.7]], dtype=torch.float64)}
    return {**data, **hidden, **last, "noise_std": 0.5, "activation": activation, "residual": residual}


def bernoulli_problem() -> dict[str, Any]:
    """Return arguments for `linear_bernoulli_evidence`: four points that no line separates, two test inputs."""
    data = {"x": _column(-1.0, 0.2, 0.9, 1.7), "y": _column(0.0, 1.0, 0.0, 1.0), "xt": _column(-2.0, 0.5)}
    cov = torch.tensor([[1.5, 0.4], [0.4, 0.8]], dtype=torch.float64)
    return {**data, "prior_mean": _column(0.5, -0.2)[:, 0], "prior_cov": cov}
