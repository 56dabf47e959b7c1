"""The processes against their definitions, and the oracles against dense twins."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch import Tensor

from bnnp.data import Heaviside, KnownBNN, Process, Sawtooth, SquaredExponentialGP, SyntheticTask
from bnnp.data.synthetic import GaussianProcess
from bnnp.evaluation import evaluate, mean_and_se

F64 = torch.float64
PROCESSES: dict[str, Process] = {
    "sawtooth": Sawtooth(dtype=F64),
    "heaviside": Heaviside(dtype=F64),
    "gp": SquaredExponentialGP(dtype=F64, lengthscale=0.5, variance=2.0),
    "bnn": KnownBNN(dtype=F64, hidden=(8, 8), x_dim=2, y_dim=3),
}
ORACLES: dict[str, GaussianProcess] = {
    "sawtooth": Sawtooth(dtype=F64),
    "gp": SquaredExponentialGP(dtype=F64, lengthscale=0.4, variance=1.7, noise_std=0.3),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", PROCESSES)
def test_tasks_are_reproducible_pairs_in_range(name: str) -> None:
    process = PROCESSES[name]
    tasks, again, other = process.tasks(300, 7), process.tasks(300, 7), process.tasks(300, 8)
    assert len(tasks) == 300
    sizes = {len(x) for x, _ in tasks}
    assert min(sizes) >= 40 and max(sizes) == 99
    for (x, y), (x2, y2) in zip(tasks, again, strict=True):
        assert x.shape == (len(x), process.x_dim) and y.shape == (len(x), process.y_dim) and x.dtype == F64
        assert torch.equal(x, x2) and torch.equal(y, y2)
        assert float(x.min()) >= process.x_range[0] and float(x.max()) <= process.x_range[1]
    assert not any(torch.equal(x[:40], x2[:40]) for (x, _), (x2, _) in zip(tasks, other, strict=True))
    inputs = torch.cat([x for x, _ in tasks])
    low, high = process.x_range
    assert abs(float(inputs.mean()) - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * inputs.numel())
    noise = torch.cat([task.y - task.f for task in tasks])
    assert abs(float(noise.std()) / process.noise_std - 1.0) < 5 / math.sqrt(2 * noise.numel())
    # Neighbouring tasks share no noise and no function.
    assert not torch.allclose(tasks[0].f[:40], tasks[1].f[:40])


@pytest.mark.parametrize("name", PROCESSES)
def test_float32_and_global_state(name: str) -> None:
    process = PROCESSES[name]
    single = dataclasses.replace(process, dtype=torch.float32)
    torch_state = torch.random.get_rng_state()
    task = single.tasks(2, 3)[1]
    drawn = single.sample(torch.rand((5, process.x_dim), generator=generator()), 4, generator())
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert {v.dtype for v in (*task, task.f, drawn, *task.latents)} == {torch.float32}
    assert drawn.shape == (4, 5, process.y_dim)


@pytest.mark.parametrize("name", PROCESSES)
def test_sample_matches_tasks_in_distribution(name: str) -> None:
    process = PROCESSES[name]
    x = torch.full((1, process.x_dim), 0.8, dtype=F64)
    f = process.sample(x, 4000, generator(1))[:, 0]
    again = process.sample(x, 4000, generator(1))[:, 0]
    assert torch.equal(f, again)
    centre = process.mean(x) if isinstance(process, GaussianProcess) else torch.zeros(1, 1, dtype=F64)
    z = (f.mean(0) - centre[0]) / (f.std(0) / math.sqrt(4000))
    assert float(z.abs().max()) < 4.5


def test_task_is_a_tuple_that_copies_whole() -> None:
    task = KnownBNN(hidden=(4,)).tasks(1, 0)[0]
    for twin in (pickle.loads(pickle.dumps(task)), copy.deepcopy(task)):
        assert isinstance(twin, SyntheticTask) and len(twin) == 2
        assert torch.equal(twin.x, task[0]) and torch.equal(twin.y, task[1]) and torch.equal(twin.f, task.f)
        assert len(twin.latents) == 2 and torch.equal(twin.latents[1], task.latents[1])


def test_sizes_and_split_tasks() -> None:
    process = Sawtooth()
    assert {len(x) for x, _ in process.tasks(5, 0, num_points=7)} == {7}
    assert {len(x) for x, _ in process.tasks(200, 0, num_points=(3, 6))} == {3, 4, 5}
    splits = process.context_target_tasks(200, 0, context=(0, 3), num_targets=4)
    assert {len(xc) for xc, *_ in splits} == {0, 1, 2}
    assert all(len(xc) == len(yc) and len(xt) == len(yt) == 4 for xc, yc, xt, yt in splits)
    with pytest.raises(ValueError, match=r"low < high"):
        process.tasks(1, 0, num_points=(5, 5))


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="x_range"):
        Sawtooth(x_range=(1.0, 1.0))
    with pytest.raises(ValueError, match="noise_std"):
        Heaviside(noise_std=0.0)
    with pytest.raises(ValueError, match="lengthscale"):
        SquaredExponentialGP(lengthscale=-1.0)
    with pytest.raises(ValueError, match="num_samples"):
        KnownBNN().log_evidence_monte_carlo(torch.zeros(1, 1), torch.zeros(1, 1), num_samples=1)


def test_sawtooth_definition() -> None:
    process = Sawtooth(dtype=F64)
    assert process.noise_std == 0.05 and process.x_range == (-2.0, 2.0)
    for task in process.tasks(20, 5):
        a, b = (float(v) for v in task.latents)
        for x, f in zip(task.x[:, 0].tolist(), task.f[:, 0].tolist(), strict=True):
            assert f == pytest.approx(1.33 * ((x % 0.75) - 0.375) + a * x / 3 + 0.25 * b, abs=1e-12)
    # Period 0.75 up to the line, a jump of 1.33 * 0.75 at its multiples.
    grid = torch.tensor([-1.5 + 1e-9, -0.75 - 1e-9, -0.75 + 1e-9, 0.1, 0.85], dtype=F64)
    f = process.sample(grid, 6, generator(2))[..., 0]
    slope = (f[:, 4] - f[:, 3]) / 0.75
    torch.testing.assert_close((f[:, 2] - f[:, 1]), torch.full((6,), -1.33 * 0.75, dtype=F64), atol=1e-7, rtol=0)
    torch.testing.assert_close((f[:, 2] - f[:, 0]) / 0.75, slope, atol=1e-7, rtol=0)
    many = process.sample(torch.tensor([0.0, 1.5], dtype=F64), 20000, generator(3))[..., 0]
    assert float(many[:, 0].std()) == pytest.approx(0.25, rel=0.03)  # 0.25 b
    assert float((many[:, 1] - many[:, 0]).std()) == pytest.approx(0.5, rel=0.03)  # a * 1.5 / 3


def test_heaviside_definition() -> None:
    process = Heaviside(dtype=F64)
    assert process.noise_std == 0.01 and process.x_range == (-5.0, 5.0) and not process.has_oracle
    f = process.sample(torch.tensor([0.0, 0.5, 4.0], dtype=F64), 20000, generator(1))[..., 0]
    assert set(f.flatten().tolist()) == {-1.0, 1.0}
    # Orthant probability: E sign(g) sign(g') = 2 / pi asin(k).
    for column, distance in ((1, 0.5), (2, 4.0)):
        expected = 2 / math.pi * math.asin(math.exp(-0.5 * distance**2))
        assert float((f[:, 0] * f[:, column]).mean()) == pytest.approx(expected, abs=4 / math.sqrt(20000))


def test_gp_draws_have_the_kernel() -> None:
    process = SquaredExponentialGP(dtype=F64, lengthscale=0.5, variance=2.0)
    x = torch.tensor([[0.0], [0.3], [1.4]], dtype=F64)
    f = process.sample(x, 40000, generator(4))[..., 0]
    expected = torch.tensor([[2.0 * math.exp(-0.5 * ((a - b) / 0.5) ** 2) for b in (0.0, 0.3, 1.4)] for a in (0.0, 0.3, 1.4)], dtype=F64)
    torch.testing.assert_close(f.T @ f / 40000, expected, atol=5 * 2 * math.sqrt(2 / 40000), rtol=0)
    dense = process.sample(torch.linspace(-2, 2, 400, dtype=F64), 2, generator(0))  # singular kernel: no warning
    assert float((dense[:, 1:] - dense[:, :-1]).abs().max()) < 0.2


def test_bnn_definition_and_prior() -> None:
    process = KnownBNN(dtype=F64, hidden=(5, 4), x_dim=2, y_dim=1)
    task = process.tasks(3, 9)[2]
    for n in range(4):
        h = task.x[n].tolist()
        for layer, W in enumerate(task.latents):
            inputs = h if layer == 0 else [max(v, 0.0) for v in h]
            rows = W.tolist()
            h = [sum(w * v for w, v in zip(row[:-1], inputs, strict=True)) + row[-1] for row in rows]
        assert float(task.f[n, 0]) == pytest.approx(h[0], abs=1e-12)
    weights = process.sample_weights(4000, generator(2))
    assert [tuple(W.shape[1:]) for W in weights] == [(5, 3), (4, 6), (1, 5)]
    for W in weights:
        scale = W.shape[-1] ** -0.5
        assert float(W.std()) == pytest.approx(scale, rel=5 / math.sqrt(2 * W.numel()))
        assert abs(float(W.mean())) < 5 * scale / math.sqrt(W.numel())
    unscaled = KnownBNN(hidden=(5,), scaled=False).sample_weights(4000, generator(2))
    assert float(unscaled[1].std()) == pytest.approx(1.0, rel=0.03)
    # Chunked drawing: no two tasks share weights.
    firsts = torch.stack([t.latents[0].flatten()[0] for t in process.tasks(300, 1, num_points=2)])
    assert len(set(firsts.tolist())) == 300


def test_monte_carlo_evidence_agrees_with_a_linear_model() -> None:
    process = KnownBNN(dtype=F64, hidden=(), noise_std=0.7)  # no hidden layer: f = w x + b, w, b ~ N(0, 1/2)
    x = torch.tensor([[-1.0], [0.5], [2.0]], dtype=F64)
    y = torch.tensor([[0.3], [-0.4], [0.9]], dtype=F64)
    A = torch.cat([x, torch.ones_like(x)], -1)
    cov = A @ A.T / 2 + 0.7**2 * torch.eye(3, dtype=F64)
    exact = float(dense_log_prob(torch.zeros(3, dtype=F64), cov, y[:, 0]))
    estimate, se = process.log_evidence_monte_carlo(x, y, num_samples=40000, seed=1)
    assert 0 < se < 0.02
    assert abs(estimate - exact) < 4 * se
    runs = torch.tensor([process.log_evidence_monte_carlo(x, y, 500, seed=s) for s in range(200)])
    assert float(runs[:, 0].std()) == pytest.approx(float(runs[:, 1].mean()), rel=0.25)


def dense_log_prob(mean: Tensor, cov: Tensor, y: Tensor) -> Tensor:
    value: Tensor = torch.distributions.MultivariateNormal(mean, cov).log_prob(y)
    return value


def dense_predictive(process: GaussianProcess, xc: Tensor, yc: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
    """Slow twin: condition the joint normal of (yc, ft) with an explicit inverse, kernels entry by entry."""

    def k(a: Tensor, b: Tensor) -> Tensor:
        def entry(u: float, v: float) -> float:
            if isinstance(process, SquaredExponentialGP):
                return process.variance * math.exp(-0.5 * ((u - v) / process.lengthscale) ** 2)
            return u * v / 9 + 1 / 16

        return torch.tensor([[entry(u, v) for v in b[:, 0].tolist()] for u in a[:, 0].tolist()], dtype=F64)

    inverse = torch.linalg.inv(k(xc, xc) + process.noise_std**2 * torch.eye(len(xc), dtype=F64))
    mean = process.mean(xt) + k(xt, xc) @ inverse @ (yc - process.mean(xc))
    return mean, k(xt, xt) - k(xt, xc) @ inverse @ k(xc, xt)


@pytest.mark.parametrize("name", ORACLES)
def test_oracle_matches_dense_normal(name: str) -> None:
    process = ORACLES[name]
    assert process.has_oracle
    xc, yc, xt, yt = process.context_target_tasks(1, 3, context=(9, 10), num_targets=6)[0]
    mean, cov = dense_predictive(process, xc, yc, xt)
    got_mean, got_cov = process.posterior(xc, yc, xt)
    torch.testing.assert_close(got_mean, mean)
    torch.testing.assert_close(got_cov, cov)
    full = cov + process.noise_std**2 * torch.eye(6, dtype=F64)
    joint = dense_log_prob(mean[:, 0], full, yt[:, 0])
    torch.testing.assert_close(process.log_prob(xc, yc, xt, yt), joint)
    each = [dense_log_prob(mean[n], full[n : n + 1, n : n + 1], yt[n]) for n in range(6)]
    torch.testing.assert_close(process.log_prob(xc, yc, xt, yt, joint=False), torch.stack(each))


@pytest.mark.parametrize("name", ORACLES)
def test_joint_is_the_sum_of_one_step_terms(name: str) -> None:
    process = ORACLES[name]
    x, y = process.tasks(1, 4, num_points=12)[0]
    for start in (0, 5):  # from the prior, and from a context
        steps = sum(float(process.log_prob(x[:n], y[:n], x[n : n + 1], y[n : n + 1])) for n in range(start, 12))
        assert float(process.log_prob(x[:start], y[:start], x[start:], y[start:])) == pytest.approx(steps, abs=1e-8)


@pytest.mark.parametrize("name", ORACLES)
def test_masked_equals_sliced(name: str) -> None:
    process = ORACLES[name]
    x, y = (torch.stack(v) for v in zip(*process.tasks(3, 5, num_points=14), strict=True))
    xc, yc, xt, yt = x[:, :8].clone(), y[:, :8].clone(), x[:, 8:].clone(), y[:, 8:].clone()
    sizes_c, sizes_t = (8, 3, 0), (6, 1, 4)
    mask_c = torch.stack([torch.arange(8) < n for n in sizes_c])
    mask_t = torch.stack([torch.arange(6) < n for n in sizes_t])
    xc[~mask_c], yc[~mask_c], yt[~mask_t] = 1.5, 1e6, -1e6
    predictive = process.condition(xc, yc, mask=mask_c).predict(xt)
    joint, each = predictive.log_prob(yt, joint=True, mask=mask_t), predictive.log_prob(yt, mask=mask_t)
    for t, (n, m) in enumerate(zip(sizes_c, sizes_t, strict=True)):
        alone = process.condition(xc[t, :n], yc[t, :n]).predict(xt[t, :m])
        torch.testing.assert_close(joint[t], alone.log_prob(yt[t, :m], joint=True))
        torch.testing.assert_close(each[t, :m], alone.log_prob(yt[t, :m]))
        torch.testing.assert_close(predictive.std[t, :m], alone.std)
        assert not each[t, m:].any()


def test_predictive_verbs_agree() -> None:
    process = ORACLES["gp"]
    xc, yc, xt, yt = process.context_target_tasks(1, 6, context=(5, 6), num_targets=4)[0]
    predictive = process.condition(xc, yc).predict(xt)
    quantile = predictive.quantile(0.3)
    torch.testing.assert_close(predictive.cdf(quantile), torch.full_like(quantile, 0.3))
    n = 40000
    clean, noisy = predictive.sample(n, noisy=False, seed=1), predictive.sample(n, noisy=True, seed=2)
    assert clean.shape == (n, 4, 1) and torch.equal(clean, predictive.sample(n, noisy=False, seed=1))
    tolerance = 6 * float(predictive.std.max()) / math.sqrt(n)
    torch.testing.assert_close(clean.mean(0), predictive.mean, atol=tolerance, rtol=0)
    torch.testing.assert_close(torch.cov(clean[..., 0].T), predictive.cov, atol=2 * tolerance, rtol=0)
    torch.testing.assert_close(noisy.std(0), predictive.std, atol=tolerance, rtol=0)
    torch.testing.assert_close(clean.std(0), predictive.epistemic_std, atol=tolerance, rtol=0)
    half = (noisy[: n // 2] - noisy[n // 2 :]).abs().mean(0)
    torch.testing.assert_close(predictive.crps(yt), (noisy - yt).abs().mean(0) - half / 2, atol=tolerance, rtol=0)


def test_ar_cnp_anchor() -> None:
    """Exact scores of the EQ task of the AR-CNP suite, computed once independently: -0.253, -0.668, trivial -1.441."""
    process = SquaredExponentialGP(lengthscale=0.25, noise_std=0.05**0.5, dtype=F64)
    tasks = process.context_target_tasks(400, seed=30, context=(0, 31), num_targets=50)
    result = evaluate(process, tasks, batch_size=50)
    trivial = torch.stack([-0.5 * (yt**2 / 1.05 + math.log(2 * math.pi * 1.05)).mean() for *_, yt in tasks])
    for (mean, se), anchor in (
        (result.summary["joint_log_density"], -0.253),
        (result.summary["marginal_log_density"], -0.668),
        (mean_and_se(trivial), -1.441),
    ):
        assert se < 0.03
        assert abs(mean - anchor) < 4 * math.hypot(se, 0.012)
    # The oracle is calibrated, within the error that its tasks allow.
    for level in (0.5, 0.8, 0.95):
        mean, se = result.summary[f"coverage_{level:g}"]
        assert abs(mean - level) < 4 * se
