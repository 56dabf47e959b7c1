"""The naive twin of the benchmarks is correct: a wrong baseline would make every ratio meaningless."""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks.twin import Style, Twin, TwinLayer
from torch import Tensor

STYLES: tuple[Style, ...] = ("published", "lean")


def _task(n: int = 5, m: int = 3, y_dim: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = ((n, 2), (n, y_dim), (m, 2), (m, y_dim))
    xc, yc, xt, yt = (torch.randn(s, generator=g, dtype=torch.float64) for s in sizes)
    return xc, yc, xt, yt


def _twin(hidden: tuple[int, ...], style: Style, y_dim: int = 1, seed: int = 1) -> Twin:
    """Return a twin whose every parameter is set from the seed, away from its starting value."""
    g = torch.Generator().manual_seed(seed)
    twin = Twin(2, y_dim, hidden, style=style)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return twin


def _first(twin: Twin, index: int = 0) -> TwinLayer:
    layer = twin.layers[index]
    assert isinstance(layer, TwinLayer)
    return layer


@pytest.mark.parametrize("style", STYLES)
def test_posterior_is_bayesian_linear_regression_of_each_unit(style: Style) -> None:
    """One observation after another, by the rank-one update of a Gaussian, unit by unit."""
    xc, yc, _, _ = _task()
    layer = _first(_twin((3,), style))
    A = torch.cat((xc, torch.ones_like(xc[:, :1])), -1)
    q = layer.posterior(torch.stack((A, 2.0 * A)), xc, yc, layer.prior())
    raw = layer.net(torch.cat((xc, yc), -1))
    pseudo_y, variance = raw[:, :3], (raw[:, 3:] - 2.0).exp() ** 2 + 1e-6
    factor = layer.log_diagonal.exp().diag_embed() + layer.strict_lower.tril(-1)
    assert q.batch_shape == (2, 3)
    for s, features in enumerate((A, 2.0 * A)):
        for d in range(3):
            mean, cov = layer.mean[d], factor[d] @ factor[d].T
            for a, y, v in zip(features, pseudo_y[:, d], variance[:, d], strict=True):
                gain = cov @ a / (a @ cov @ a + v)
                mean, cov = mean + gain * (y - a @ mean), cov - torch.outer(gain, a @ cov)
            torch.testing.assert_close(q.loc[s, d], mean, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(q.covariance_matrix[s, d], cov, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("style", STYLES)
def test_last_layer_takes_the_true_targets(style: Style) -> None:
    xc, yc, _, _ = _task(y_dim=2)
    twin = _twin((3,), style, y_dim=2)
    pseudo_y, pseudo_prec = _first(twin, 1).pseudo_observations(xc, yc)
    assert pseudo_y is yc
    assert pseudo_prec.shape == (5, 2)
    assert float(pseudo_prec.detach().max()) <= 1e6


@pytest.mark.parametrize("style", STYLES)
def test_kl_of_one_layer_in_closed_form(style: Style) -> None:
    """KL = 1/2 (tr(P S) + (m - mu)^T P (m - mu) - p + log|Sigma| - log|S|), summed over units, P = Sigma^{-1}."""
    xc, yc, xt, _ = _task(y_dim=2)
    twin = _twin((), style, y_dim=2)
    layer = _first(twin)
    kl = twin.propagate(xc, yc, xt, 4)[2]
    A = torch.cat((xc, torch.ones_like(xc[:, :1])), -1)
    prior = layer.prior()
    q = layer.posterior(A.unsqueeze(0), xc, yc, prior)
    expected = torch.zeros((), dtype=torch.float64)
    for d in range(2):
        S, Sigma = q.covariance_matrix[0, d], prior.covariance_matrix[d]
        P, gap = torch.linalg.inv(Sigma), q.loc[0, d] - prior.loc[d]
        expected = expected + 0.5 * ((P @ S).trace() + gap @ P @ gap - 3 + Sigma.logdet() - S.logdet())
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-9)


def test_styles_agree_in_value_and_gradient() -> None:
    """The two styles differ in cost only; the draw is the same, so are loss and gradients."""
    tasks = [_task(seed=i, n=4 + i) for i in range(2)]
    losses, gradients = [], []
    for style in STYLES:
        twin = _twin((3, 3), style)
        loss = twin.step(tasks, 3, torch.Generator().manual_seed(7))
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, list(twin.parameters())))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=1e-8)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_objective_is_pp_avi_of_the_same_particles() -> None:
    task = _task(y_dim=2)
    twin = _twin((3,), "lean", y_dim=2)
    xc, yc, xt, yt = task
    with torch.no_grad():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            value = twin.task_objective(task, 4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            fc, ft, kl = twin.propagate(xc, yc, xt, 4)
        var = (2.0 * twin.log_noise).exp()
        log_c, log_t = ((-0.5 * (y - f) ** 2 / var - 0.5 * (2.0 * math.pi * var).log()).sum((1, 2)) for y, f in ((yc, fc), (yt, ft)))
    torch.testing.assert_close(value, log_t.exp().mean().log() + log_c.mean() - kl)


def test_global_generator_is_left_alone_and_the_seed_decides() -> None:
    xc, yc, xt, _ = _task()
    twin = _twin((3,), "lean")
    before = torch.get_rng_state()
    draws = [twin.predict(xc, yc, xt, 6, torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].shape == (6, 3, 1)
