"""The rivals against dense, slow twins: what they predict, what masks mean, and what they learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, NegativeBinomial, Normal

import bnnp
from bnnp.data.collection import Collection
from bnnp.rivals import (
    ClassFrequencies,
    CountRates,
    GaussianPrediction,
    Marginal,
    PooledRegression,
    TaskGP,
    TaskMean,
    default_rivals,
    left_out,
)
from bnnp.rivals.gaussian import Levels
from bnnp.rivals.process import FLOOR

RNG = np.random.default_rng(0)


def collection(tasks: list[Any]) -> Collection:
    x, y = (np.asarray(part) for part in tasks[0][:2])
    return Collection.of(tasks, [f"x{i}" for i in range(x.shape[1])], [f"y{i}" for i in range(y.shape[1])])


def curves(count: int = 12, n: int = 10, level: float = 2.0) -> list[Any]:
    tasks = []
    for _ in range(count):
        x = RNG.uniform(-2, 2, size=(n, 2))
        y = np.stack([np.sin(2 * x[:, 0]), x[:, 1]], -1) + level * RNG.normal(size=(1, 2)) + 0.1 * RNG.normal(size=(n, 2))
        y[RNG.random(y.shape) < 0.15] = np.nan
        tasks.append((x, y))
    return tasks


def labels(count: int = 30, n: int = 12, classes: int = 2) -> list[Any]:
    draw = lambda: RNG.choice(classes, size=(n, 1), p=RNG.dirichlet(np.ones(classes))).astype(float)  # noqa: E731
    return [(RNG.normal(size=(n, 1)), draw()) for _ in range(count)]


def counts(count: int = 40, n: int = 8) -> list[Any]:
    return [(RNG.normal(size=(n, 1)), RNG.poisson(RNG.gamma(3.0, 2.0), size=(n, 1)).astype(float)) for _ in range(count)]


TRAIN, LABELS, CLASSES, COUNTS = collection(curves()), collection(labels()), collection(labels(classes=3)), collection(counts())
GP = TaskGP(TRAIN)
GAUSSIAN: dict[str, Any] = {
    "marginal": Marginal(TRAIN),
    "task mean": TaskMean(TRAIN),
    "regression": PooledRegression(TRAIN),
    "gp": GP,
    "gp refitted": GP.fitted_to_the_task(),
    "gp about regression": TaskGP(TRAIN, about=PooledRegression(TRAIN)),
}
DISCRETE: dict[str, tuple[Any, Collection]] = {
    "frequencies": (ClassFrequencies(LABELS, None, per_task=False), LABELS),
    "own frequencies": (ClassFrequencies(LABELS, None, per_task=True), LABELS),
    "own frequencies of three": (ClassFrequencies(CLASSES, 3, per_task=True), CLASSES),
    "counts": (CountRates(COUNTS, per_task=False), COUNTS),
    "own rate": (CountRates(COUNTS, per_task=True), COUNTS),
}
EVERY = {name: (rival, TRAIN) for name, rival in GAUSSIAN.items()} | DISCRETE


def tensors(task: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, y, mask = (torch.from_numpy(np.ascontiguousarray(part)) for part in task)
    return x, torch.where(mask, y, 0.0), mask


def dense(prediction: GaussianPrediction, output: int) -> MultivariateNormal:
    """Build the covariance of one output of a task, entry by entry."""
    size = prediction.mean.shape[-2]
    shared = prediction.factor[output] @ prediction.factor[output].T
    if prediction.covariance is not None:
        shared = shared + prediction.covariance[output]
    return MultivariateNormal(prediction.mean[:, output], shared + torch.diag(prediction.noise[:, output].expand(size)))


def kernel_twin(theta: Tensor, a: Tensor, b: Tensor) -> Tensor:
    level, amplitude, _, *lengths = theta.exp().tolist()
    rows = [
        [
            level**2 + amplitude**2 * math.exp(-0.5 * sum(((u - v) / s) ** 2 for u, v, s in zip(p, q, lengths, strict=True)))
            for q in b.tolist()
        ]
        for p in a.tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64)


def twin_of_levels(rival: Any, about: Callable[[Tensor], Tensor], task: Any, xt: Tensor, j: int) -> MultivariateNormal:
    """Condition a dense Gaussian over context and targets of one output on the context, by an explicit inverse."""
    x, y, mask = task
    keep = mask[:, j]
    both = torch.cat([x[keep], xt])
    levels, n = rival.levels, int(keep.sum())
    prior = levels.between[j] * torch.ones(len(both), len(both), dtype=x.dtype) + levels.within[j] * torch.eye(len(both), dtype=x.dtype)
    return conditioned(about(both)[:, j] + levels.mean[j], prior, y[keep, j], n)


def conditioned(mean: Tensor, covariance: Tensor, y: Tensor, n: int) -> MultivariateNormal:
    gain = covariance[n:, :n] @ covariance[:n, :n].inverse()
    rest = covariance[n:, n:] - gain @ covariance[:n, n:]
    return MultivariateNormal(mean[n:] + gain @ (y - mean[:n]), 0.5 * (rest + rest.T))


@pytest.mark.parametrize("name", ["task mean", "regression"])
def test_a_level_is_conditioned_as_a_dense_gaussian_is(name: str) -> None:
    rival, task = GAUSSIAN[name], tensors(TRAIN[0])
    about = rival.regress if name == "regression" else torch.zeros_like
    xt, yt = torch.from_numpy(RNG.normal(size=(4, 2))), torch.from_numpy(RNG.normal(size=(4, 2)))
    found = rival.condition(*task).predict(xt)
    twins = [twin_of_levels(rival, about, task, xt, j) for j in range(2)]
    for j, twin in enumerate(twins):
        torch.testing.assert_close(found.mean[:, j], twin.mean)
        torch.testing.assert_close(dense(found, j).covariance_matrix, twin.covariance_matrix)
    torch.testing.assert_close(found.log_prob(yt, joint=True), sum(twin.log_prob(yt[:, j]) for j, twin in enumerate(twins)))


@pytest.mark.parametrize("name", ["gp", "gp about regression"])
def test_the_process_is_conditioned_as_a_dense_gaussian_is(name: str) -> None:
    gp = GAUSSIAN[name]
    x, y, mask = tensors(TRAIN[1])
    xt, yt = torch.from_numpy(RNG.normal(size=(4, 2))), torch.from_numpy(RNG.normal(size=(4, 2)))
    found = gp.condition(x, y, mask).predict(xt)
    total = torch.zeros((), dtype=torch.float64)
    for j in range(2):
        keep = mask[:, j]
        both = torch.cat([x[keep], xt]) / gp.x_scale
        mean = gp.mean[j].expand(len(both)) + (0.0 if gp.about is None else gp.about.regress(torch.cat([x[keep], xt]))[:, j])
        noise = float((2 * gp.theta[j, 2]).exp()) + FLOOR
        covariance = gp.y_scale[j] ** 2 * (kernel_twin(gp.theta[j], both, both) + noise * torch.eye(len(both)))
        twin = conditioned(mean, covariance, y[keep, j], int(keep.sum()))
        torch.testing.assert_close(found.mean[:, j], twin.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.std[:, j], twin.stddev, rtol=1e-6, atol=1e-6)
        total = total + twin.log_prob(yt[:, j])
    torch.testing.assert_close(found.log_prob(yt, joint=True), total, rtol=1e-6, atol=1e-6)


def test_one_gaussian_has_the_moments_of_all_points() -> None:
    pooled = np.concatenate([np.where(mask, y, np.nan) for _, y, mask in TRAIN])
    found = GAUSSIAN["marginal"].condition(*tensors(TRAIN[0])).predict(torch.zeros(3, 2))
    np.testing.assert_allclose(found.mean[0].numpy(), np.nanmean(pooled, 0))
    np.testing.assert_allclose(found.std[0].numpy(), np.nanstd(pooled, 0))


@pytest.mark.parametrize("name", GAUSSIAN)
def test_scores_are_those_of_torch(name: str) -> None:
    found = GAUSSIAN[name].condition(*tensors(TRAIN[2])).predict(torch.from_numpy(RNG.normal(size=(5, 2))))
    y = torch.from_numpy(RNG.normal(size=(5, 2)))
    each = Independent(Normal(found.mean, found.std), 1)
    torch.testing.assert_close(found.log_prob(y), each.log_prob(y))
    torch.testing.assert_close(found.cdf(y), each.base_dist.cdf(y))
    torch.testing.assert_close(
        found.log_prob(y, joint=True), sum(dense(found, j).log_prob(y[:, j]) for j in range(2)), rtol=1e-5, atol=1e-6
    )
    draws = found.sample(20_000, seed=1)
    torch.testing.assert_close(draws.mean(0), found.mean, rtol=0.0, atol=0.04 * float(found.std.max()) + 1e-9)
    torch.testing.assert_close(
        torch.cov(draws[..., 0].T), dense(found, 0).covariance_matrix, rtol=0.0, atol=0.06 * float(found.std.max() ** 2)
    )
    torch.testing.assert_close(found.crps(y), bnnp.evaluation.crps(draws, y), rtol=0.0, atol=0.03 * float(found.std.max()))
    assert found.sample(500, noisy=False).var(0).sum() < draws.var(0).sum()


@pytest.mark.parametrize("name", EVERY)
def test_masked_is_sliced_and_many_tasks_are_a_loop(name: str) -> None:
    rival, data = EVERY[name]
    tasks = [tensors(data[i]) for i in range(3)]
    cuts = [(4, 3), (1, 2), (0, 4)]
    xc, yc, mc, xt, yt, mt = (
        torch.full((3, 5, *tasks[0][i % 3].shape[1:]), v, dtype=tasks[0][i % 3].dtype) for i, v in enumerate([9.0, 1.0, 0.0] * 2)
    )
    for t, (task, (n, m)) in enumerate(zip(tasks, cuts, strict=True)):
        for i in range(3):
            (xc, yc, mc)[i][t, :n], (xt, yt, mt)[i][t, :m] = task[i][:n], task[i][n : n + m]
    together = rival.condition(xc, yc, mask=mc).predict(xt)
    for t, (task, (n, m)) in enumerate(zip(tasks, cuts, strict=True)):
        x, y, mask = (part[n : n + m] for part in task)
        alone = rival.condition(*(part[:n] for part in task)).predict(x)
        torch.testing.assert_close(together.mean[t, :m], alone.mean)
        for joint in (False, True):
            got = together.log_prob(yt, joint=joint, mask=mt)[t]
            torch.testing.assert_close(got if joint else got[:m], alone.log_prob(y, joint=joint, mask=mask))


@pytest.mark.parametrize("name", EVERY)
def test_joint_densities_chain(name: str) -> None:
    """Log p(both) = log p(first) + log p(second | first), if hyper-parameters stay."""
    rival, data = EVERY[name]
    x, y, mask = tensors(data[3])
    if name == "gp refitted":
        pytest.skip("hyper-parameters depend on the context")
    first, second = slice(2, 5), slice(5, 8)
    given = lambda n: rival.condition(x[:n], y[:n], mask[:n])  # noqa: E731
    whole = given(2).predict(x[2:8]).log_prob(y[2:8], joint=True, mask=mask[2:8])
    parts = given(2).predict(x[first]).log_prob(y[first], joint=True, mask=mask[first])
    parts = parts + given(5).predict(x[second]).log_prob(y[second], joint=True, mask=mask[second])
    torch.testing.assert_close(whole, parts, rtol=1e-7, atol=1e-7)


def test_levels_maximise_the_likelihood() -> None:
    tasks = [(torch.from_numpy(y), torch.from_numpy(mask)) for _, y, mask in collection(curves(count=15, n=6))]
    levels = Levels.fit(tasks)

    def log_lik(mean: float, between: float, within: float) -> float:
        value = 0.0
        for y, mask in tasks:
            seen = y[mask[:, 0], 0]
            eye, ones = torch.eye(len(seen), dtype=y.dtype), torch.ones(len(seen), len(seen), dtype=y.dtype)
            value += (
                float(MultivariateNormal(torch.full_like(seen, mean), between * ones + within * eye).log_prob(seen)) if len(seen) else 0.0
            )
        return value

    best = [float(part[0]) for part in (levels.mean, levels.between, levels.within)]
    assert log_lik(*best) == pytest.approx(float(levels.log_lik[0]), abs=1e-6)
    for i, step in [(0, 0.05), (0, -0.05), (1, 1.05), (1, 0.95), (2, 1.05), (2, 0.95)]:
        other = list(best)
        other[i] = other[i] + step if i == 0 else other[i] * step
        assert log_lik(*other) < log_lik(*best)


def test_what_is_there_to_learn_is_learned() -> None:
    regression = GAUSSIAN["regression"]
    assert (regression.levels.within < 0.05).all() and (regression.levels.between > 1.0).all()  # noise 0.1, levels of deviation 2
    assert float(GP.theta[0, 3]) < float(GP.theta[0, 4]) - 1.0  # the first output does not depend on the second input
    noise = GP.theta[:, 2].exp() * GP.y_scale
    assert ((noise > 0.05) & (noise < 0.2)).all()


def test_fitting_to_the_task_raises_its_evidence() -> None:
    from bnnp.rivals.process import _evidence

    x = np.linspace(-2, 2, 30)
    other = collection([(np.stack([x, x], -1), np.stack([np.sin(8 * x), np.sin(8 * x)], -1))])
    task = tensors(other[0])
    posterior, learned = GAUSSIAN["gp refitted"].condition(*task), GP.condition(*task)
    assert (_evidence(posterior.theta, *posterior.context) > _evidence(learned.theta, *learned.context) + 1.0).all()
    assert torch.equal(GAUSSIAN["gp refitted"].condition(*(part[:0] for part in task)).theta, GP.theta)


def test_a_large_context_is_thinned() -> None:
    x = torch.from_numpy(RNG.normal(size=(700, 2)))
    posterior = GP.condition(x, x)
    assert posterior.context[0].shape == (500, 2) and posterior.predict(x[:3]).mean.shape == (3, 2)


def test_counts_are_negative_binomial() -> None:
    rival = DISCRETE["own rate"][0]
    x, y, mask = tensors(COUNTS[0])
    found = rival.condition(x[:3], y[:3], mask[:3]).predict(x[3:])
    shape, rate = float(rival.shape + y[:3].sum()), float(rival.rate + 3)
    twin = NegativeBinomial(shape, probs=torch.tensor(1.0 / (1.0 + rate), dtype=torch.float64))
    torch.testing.assert_close(found.log_prob(y[3:]), twin.log_prob(y[3:]).squeeze(-1))
    torch.testing.assert_close(
        found.cdf(y[3:]), torch.stack([twin.log_prob(torch.arange(int(v) + 1.0).double()).exp().sum() for v in y[3:]])[:, None]
    )
    draws = found.sample(20_000)
    torch.testing.assert_close(draws.mean(0), found.mean, rtol=0.05, atol=0.05)
    low, high = found.cdf(y[3:] - 1), found.cdf(y[3:])
    pit = found.pit(y[3:])
    assert ((low <= pit) & (pit <= high)).all()
    assert abs(float(rival.shape) - 3.0) < 2.0 and abs(float(rival.shape / rival.rate) - 6.0) < 1.5  # made with shape 3, mean 6


def test_label_draws_have_the_stated_probabilities() -> None:
    for name in ("own frequencies", "own frequencies of three"):
        rival, data = DISCRETE[name]
        x, y, mask = tensors(data[0])
        found = rival.condition(x[:4], y[:4], mask[:4]).predict(x[4:6])
        drawn = found.sample(20_000)
        for k in range(3 if "three" in name else 2):
            p = found.probs[0, k] if "three" in name else torch.where(torch.tensor(k == 1), found.probs[0, 0], 1 - found.probs[0, 0])
            assert float((drawn[:, 0, 0] == k).double().mean()) == pytest.approx(float(p), abs=0.015)
        torch.testing.assert_close(found.sample(4000, noisy=False).mean(0), found.probs, rtol=0.0, atol=0.03)


@pytest.mark.parametrize(
    ("data", "likelihood"),
    [(TRAIN, None), (TRAIN, bnnp.Gaussian()), (LABELS, bnnp.Bernoulli()), (CLASSES, bnnp.Categorical(3)), (COUNTS, bnnp.Poisson())],
)
def test_the_default_rivals_are_judged_as_models_are(data: Collection, likelihood: Any) -> None:
    rivals = default_rivals(data, likelihood=likelihood)
    tests = [data[i] for i in range(4)]
    for rival in rivals.values():
        scores = bnnp.evaluate(rival, tests, num_samples=4, context_fraction=0.3)
        assert all(math.isfinite(mean) for mean, _ in scores.summary.values())
    words = "" if likelihood is None else left_out(likelihood)
    assert bool(words) == (len(rivals) == 2)


@pytest.mark.parametrize("tasks", [curves(count=1), curves(count=2, n=1), [(x, 0 * y + 5) for x, y in curves(count=4)]])
def test_one_task_one_point_and_constant_outputs_are_survived(tasks: list[Any]) -> None:
    tasks = [(x, np.nan_to_num(y, nan=1.0)) for x, y in tasks]
    for rival in default_rivals(collection(tasks)).values():
        found = rival.condition(torch.zeros(0, 2), torch.zeros(0, 2)).predict(torch.zeros(2, 2))
        assert found.log_prob(torch.ones(2, 2), joint=True).isfinite() and (found.std > 0).all()


def test_without_outputs_there_is_nothing_to_learn_from() -> None:
    with pytest.raises(ValueError, match="Got none"):
        Marginal(collection([(np.zeros((2, 1)), np.full((2, 1), np.nan))]))
