"""The two processes for few tasks: their inputs, their functions, and oracles against slow dense twins and published anchors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from bnnp.data import CauchyBumps, SinusoidLine
from bnnp.evaluation import evaluate

LINE = SinusoidLine(dtype=torch.float64)


def dense(x: Tensor, y: Tensor, process: SinusoidLine) -> tuple[Tensor, list[MultivariateNormal]]:
    """Return log p(y, node) of each node, and the law of y at x given the node, from the dense covariance of the line."""
    A, s, log_weight = (v[:, 0, 0] for v in process.nodes())
    (m_slope, d_slope), (m_offset, d_offset) = process.line
    cov = d_slope**2 * x @ x.T + d_offset**2 + process.noise_std**2 * torch.eye(len(x), dtype=x.dtype)
    laws = [MultivariateNormal(m_slope * x[:, 0] + m_offset + a * torch.sin(1.5 * (x[:, 0] - b)), cov) for a, b in zip(A, s, strict=True)]
    return log_weight + torch.stack([law.log_prob(y[:, 0]) for law in laws]), laws


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> SinusoidLine:
    """Return the process with a coarse grid, on which the twin is affordable."""
    monkeypatch.setattr("bnnp.data.pacoh._NODES", (4, 5))
    return LINE


@pytest.mark.parametrize("n", [0, 1, 4])
def test_oracle_of_the_sinusoid_is_the_dense_mixture(n: int, small: SinusoidLine) -> None:
    x, y = small.tasks(1, 3, n + 5)[0]
    xc, yc, xt, yt = x[:n], y[:n], x[n:], y[n:]
    before, _ = dense(xc, yc, small) if n else (small.nodes()[2][:, 0, 0], [])
    after, laws = dense(x, y, small)
    predictive = small.condition(xc, yc).predict(xt)
    assert float(predictive.log_prob(yt, joint=True)) == pytest.approx(float(after.logsumexp(0) - before.logsumexp(0)), abs=1e-8)
    weights = before.softmax(0)
    # Given a node all is Gaussian: condition its dense covariance.
    K = laws[0].covariance_matrix
    gain = K[n:, :n] @ torch.linalg.inv(K[:n, :n]) if n else torch.zeros(5, 0, dtype=x.dtype)
    means = torch.stack([law.loc[n:] + gain @ (yc[:, 0] - law.loc[:n]) for law in laws])
    var = (K[n:, n:] - gain @ K[:n, n:]).diagonal()
    mean = weights @ means
    std = (weights @ (var + (means - mean) ** 2)).sqrt()
    torch.testing.assert_close(predictive.mean[:, 0], mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(predictive.std[:, 0], std, rtol=0, atol=1e-9)
    torch.testing.assert_close(predictive.epistemic_std[:, 0], (std**2 - small.noise_std**2).sqrt(), rtol=0, atol=1e-9)
    each = Normal(means, var.sqrt())
    torch.testing.assert_close(predictive.log_prob(yt), (each.log_prob(yt[:, 0]).exp().T @ weights).log(), rtol=0, atol=1e-8)
    torch.testing.assert_close(predictive.cdf(yt)[:, 0], each.cdf(yt[:, 0]).T @ weights, rtol=0, atol=1e-9)
    torch.testing.assert_close(predictive.cdf(predictive.quantile(0.3)), torch.full_like(yt, 0.3), rtol=0, atol=1e-9)


def test_padding_and_other_tasks_do_not_change_the_oracle() -> None:
    tasks = LINE.tasks(2, 5, 9)
    short, full = tasks[0].x[:3], tasks[1].x[:6]
    xc, yc = torch.full((2, 6, 1), 1e3, dtype=torch.float64), torch.full((2, 6, 1), math.nan, dtype=torch.float64)
    xc[0, :3], yc[0, :3], xc[1], yc[1] = short, tasks[0].y[:3], full, tasks[1].y[:6]
    mask = torch.arange(6) < torch.tensor([[3], [6]])
    xt, yt = torch.stack([t.x[6:] for t in tasks]), torch.stack([t.y[6:] for t in tasks])
    seen_t = torch.tensor([[True, True, False], [True, True, True]])
    together = LINE.condition(xc, yc, mask).predict(xt)
    for t, n in enumerate((3, 6)):
        k = int(seen_t[t].sum())
        alone = LINE.condition(tasks[t].x[:n], tasks[t].y[:n]).predict(xt[t, :k])
        torch.testing.assert_close(together.mean[t, :k], alone.mean)
        joint = together.log_prob(yt, joint=True, mask=seen_t)[t]
        torch.testing.assert_close(joint, alone.log_prob(yt[t, :k], joint=True))


def test_draws_of_the_oracle_have_its_moments() -> None:
    x, y = LINE.tasks(1, 1, 12)[0]
    predictive = LINE.condition(x[:3], y[:3]).predict(x[3:])
    for noisy, std in ((True, predictive.std), (False, predictive.epistemic_std)):
        drawn = predictive.sample(4000, noisy=noisy, seed=2)
        assert drawn.shape == (4000, 9, 1)
        assert float(((drawn.mean(0) - predictive.mean) / std).abs().max()) < 4.5 / 4000**0.5
        torch.testing.assert_close(drawn.std(0), std, rtol=0.06, atol=0)


def test_latents_of_a_sinusoid_make_its_function() -> None:
    task = LINE.tasks(1, 4, 20)[0]
    A, s, slope, offset = task.latents
    torch.testing.assert_close(task.f, slope * task.x + A * torch.sin(1.5 * (task.x - s)) + offset)
    assert 0.7 < float(A) < 1.3


def test_bumps_are_the_sum_of_two_cauchy_densities_up_to_scale() -> None:
    process = CauchyBumps(dtype=torch.float64)
    x = torch.tensor([[-1.0, -1.0], [2.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    far = 1 / (math.pi * (1 + 18.0))
    want = [6 / math.pi + 3 * far + 1, 6 * far + 3 / math.pi + 1, 6 / (math.pi * 3) + 3 / (math.pi * 9) + 1]
    torch.testing.assert_close(process.mean(x)[:, 0], torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(process.kernel(x, x).diagonal(), torch.full((3,), 0.04, dtype=torch.float64))
    deviations = process.sample(x, 4000, torch.Generator().manual_seed(0)) - process.mean(x)
    torch.testing.assert_close(deviations.std(0), torch.full((3, 1), 0.2, dtype=torch.float64), rtol=0.05, atol=0)


def test_inputs_of_the_bumps_are_normal_and_cut_off() -> None:
    stats = pytest.importorskip("scipy.stats")
    x = torch.cat([task.x for task in CauchyBumps(dtype=torch.float64).tasks(40, 0, 50)]).flatten()
    assert stats.kstest(x.numpy(), stats.truncnorm(-3, 2, scale=2.5).cdf).pvalue > 0.01


# Exact scores of independent code, over other draws: mean root squared error and log density of single targets.
ANCHORS = [(SinusoidLine(), 5, 0.150, 0.480), (CauchyBumps(), 20, 0.173, 0.398)]


@pytest.mark.parametrize(("process", "context", "rmse", "density"), ANCHORS)
def test_oracles_score_what_others_found(process: SinusoidLine | CauchyBumps, context: int, rmse: float, density: float) -> None:
    tasks = process.context_target_tasks(40, 8, (context, context + 1), 60)
    found = evaluate(process, tasks, batch_size=4).summary
    # The anchors come with an error of their own, from about as many tasks.
    for name, anchor in (("rmse", rmse), ("marginal_log_density", density)):
        mean, se = found[name]
        assert abs(mean - anchor) < 4 * se * math.sqrt(2), name
    error, se = found["calibration_error"]
    assert error < 0.03
