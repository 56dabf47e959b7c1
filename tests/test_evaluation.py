"""The scores against slow twins and numerical integrals, and `evaluate` against the definition, task by task."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from bnnp import mixtures
from bnnp.data import SquaredExponentialGP
from bnnp.data.synthetic import GaussianPosterior, GaussianPredictive
from bnnp.evaluation import (
    calibration_error,
    coverage,
    crps,
    crps_gaussian_mixture,
    energy_distance,
    energy_distance_test,
    evaluate,
    mae,
    mean_and_se,
    rmse,
    split_tasks,
)

F64 = torch.float64
GP = SquaredExponentialGP(lengthscale=0.5, noise_std=0.2, dtype=F64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=F64)


# CRPS


def test_crps_equals_the_double_loop() -> None:
    x, y = randn(7, 2, 3), randn(2, 3, seed=1)
    spread = sum((x[i] - x[j]).abs() for i in range(7) for j in range(7) if i != j)
    torch.testing.assert_close(crps(x, y), (x - y).abs().mean(0) - spread / (2 * 7 * 6))


def test_crps_gaussian_mixture_equals_the_integral() -> None:
    mean, std = 2 * randn(5, 4), 0.2 + randn(5, 4, seed=1).abs()
    y = 2 * randn(4, seed=2)
    grid = torch.linspace(-25, 25, 200_001, dtype=F64)
    for k in range(4):
        F = torch.special.ndtr((grid - mean[:, k, None]) / std[:, k, None]).mean(0)
        integral = torch.trapezoid((F - (grid >= y[k]).to(F64)) ** 2, grid)
        assert float(crps_gaussian_mixture(mean, std, y)[k]) == pytest.approx(float(integral), abs=5e-4)


def test_fair_crps_is_unbiased_for_few_samples() -> None:
    mean, std = torch.tensor([-1.0, 2.0], dtype=F64), torch.tensor([0.5, 1.0], dtype=F64)
    y = torch.tensor(0.3, dtype=F64)
    n = 40_000
    pick = torch.randint(2, (2, n), generator=generator(3))
    scores = crps(mean[pick] + std[pick] * randn(2, n, seed=4), y.expand(n))
    average, se = mean_and_se(scores)
    exact = float(crps_gaussian_mixture(mean, std, y))
    assert abs(average - exact) < 4 * se
    # The usual estimator, with n^2 instead of n (n - 1), would be told apart.
    assert se < 0.01 * exact


def test_crps_gaussian_mixture_blocks_and_broadcasts(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, y = randn(6, 3, 2), randn(3, 2, seed=1)
    std = torch.tensor(0.4, dtype=F64)
    whole = crps_gaussian_mixture(mean, std, y)
    sizes: list[int] = []
    inner = mixtures._mean_abs_normal

    def watched(m: Tensor, v: Tensor) -> Tensor:
        sizes.append(max(m.numel(), v.numel()) if m.ndim == 3 else 0)
        return inner(m, v)

    monkeypatch.setattr(mixtures, "_mean_abs_normal", watched)
    for elements in (1, 8, 40, 100):  # less than a row, a row, several rows, several points
        monkeypatch.setattr(mixtures, "_BLOCK_BYTES", elements * 64)
        sizes.clear()
        torch.testing.assert_close(crps_gaussian_mixture(mean, std, y), whole)
        assert 0 < max(sizes) <= max(elements, 6)
    # Points without width: |m - y| - 1/2 mean |m - m'|.
    sharp = (mean - y).abs().mean(0) - (mean[:, None] - mean).abs().mean((0, 1)) / 2
    torch.testing.assert_close(crps_gaussian_mixture(mean, torch.zeros_like(mean), y), sharp)


def test_crps_refuses_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="n >= 2"):
        crps(torch.zeros(1, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="first axis"):
        crps(torch.zeros(3, 5), torch.zeros(3))
    with pytest.raises(ValueError, match="components first"):
        crps_gaussian_mixture(torch.zeros(3, 5), torch.ones(3, 5), torch.zeros(3))


# Calibration


@pytest.mark.parametrize(("ratio", "shift"), [(1.0, 0.0), (2.0, 0.0), (0.5, 0.0), (1.0, 1.0)])
def test_pit_tells_calibrated_from_wrong(ratio: float, shift: float) -> None:
    n = 20_000
    pit = torch.special.ndtr((randn(n, seed=5) - shift) / ratio)
    levels = (0.5, 0.8, 0.95)
    error = (coverage(pit, levels) - torch.tensor(levels, dtype=F64)).abs()
    if (ratio, shift) == (1.0, 0.0):
        assert float(error.max()) < 4 * 0.5 / math.sqrt(n)
        assert float(calibration_error(pit)) < 3 * 0.313 / math.sqrt(n)
    else:
        assert float(error[0]) > 0.1
        assert float(calibration_error(pit)) > 0.05


def test_calibration_error_and_coverage_by_hand() -> None:
    pit = torch.rand((4, 5), generator=generator(2), dtype=F64)
    values = pit.flatten().tolist()
    by_hand = [abs(sum(v <= u / 100 for v in values) / 20 - u / 100) for u in range(1, 100)]
    assert float(calibration_error(pit)) == pytest.approx(sum(by_hand) / 99, abs=1e-12)
    inside = [0.1 <= v <= 0.9 for v in values]
    assert float(coverage(pit, (0.8,))) == pytest.approx(sum(inside) / 20)
    n = 400
    mean, se = mean_and_se(torch.stack([calibration_error(torch.rand(n, generator=generator(s))) for s in range(300)]))
    assert abs(mean - 0.313 / math.sqrt(n)) < 5 * se  # the value that the docstring promises for a perfect prediction
    with pytest.raises(ValueError, match="levels"):
        coverage(pit, (95.0,))


# Errors, means


def test_errors_respect_the_mask() -> None:
    prediction, y = randn(2, 3, 2), randn(2, 3, 2, seed=1)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    prediction[1, 1:] = math.nan
    d = [(prediction[0] - y[0]).flatten(), (prediction[1, :1] - y[1, :1]).flatten()]
    torch.testing.assert_close(rmse(prediction, y, mask), torch.stack([(v**2).mean().sqrt() for v in d]))
    torch.testing.assert_close(mae(prediction, y, mask), torch.stack([v.abs().mean() for v in d]))
    torch.testing.assert_close(rmse(prediction[0], y[0]), (d[0] ** 2).mean().sqrt())


def test_mean_and_se() -> None:
    values = randn(50)
    mean, se = mean_and_se(values)
    assert mean == pytest.approx(np.mean(values.numpy()))
    assert se == pytest.approx(np.std(values.numpy(), ddof=1) / math.sqrt(50))
    assert math.isnan(mean_and_se(values[:1])[1])


# Energy distance


def test_energy_distance_equals_the_double_loop() -> None:
    a, b = randn(6, 3), 1 + randn(5, 3, seed=1)

    def pairs(u: Tensor, v: Tensor) -> float:
        return sum(float((p - q).norm()) for p in u for q in v)

    expected = 2 * pairs(a, b) / 30 - pairs(a, a) / 30 - pairs(b, b) / 20
    assert float(energy_distance(a, b)) == pytest.approx(expected, abs=1e-12)
    assert energy_distance_test(a, b, generator())[0] == pytest.approx(expected, abs=1e-12)


def test_energy_distance_is_unbiased_at_zero_and_the_test_has_its_level() -> None:
    estimates, p_values = [], []
    for seed in range(200):
        both = randn(14, 4, seed=seed)
        value, p = energy_distance_test(both[:6], both[6:], generator(seed), num_permutations=39)
        estimates.append(value)
        p_values.append(p)
    mean, se = mean_and_se(torch.tensor(estimates))
    assert abs(mean) < 4 * se and min(estimates) < 0
    observed = torch.tensor(p_values)
    assert abs(float((observed <= 0.25).float().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 200)
    assert abs(float((observed <= 0.75).float().mean()) - 0.75) < 4 * math.sqrt(0.25 * 0.75 / 200)


def test_energy_distance_sees_a_difference_in_spread() -> None:
    value, p = energy_distance_test(randn(60, 2), 3 * randn(60, 2, seed=1), generator(), num_permutations=199)
    assert value > 0 and p == 1 / 200
    # Two against two, far apart: 2 of the 6 labellings give the observed value, and ties count.
    pair = torch.tensor([[0.0, 0.1], [0.3, -0.2]], dtype=F64)
    tied = energy_distance_test(pair, pair * 1.3 + 10, generator(), num_permutations=2999)[1]
    assert abs(tied - 1 / 3) < 4 * math.sqrt(2 / 9 / 3000)
    same = randn(5, 2)
    assert energy_distance_test(same, same, generator(), num_permutations=50)[1] > 0.9
    with pytest.raises(ValueError, match=r"n and m >= 2"):
        energy_distance(torch.zeros(4), torch.zeros(4))


# evaluate


@dataclass(frozen=True)
class Stretched:
    """The oracle of `GP` with its standard deviations multiplied, hiding its closed-form CRPS."""

    factor: float = 1.0

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> StretchedPosterior:
        return StretchedPosterior(GP.condition(xc, yc, mask), self.factor)


@dataclass(frozen=True)
class StretchedPosterior:
    inner: GaussianPosterior
    factor: float

    def predict(self, xt: Tensor) -> StretchedPredictive:
        p = self.inner.predict(xt)
        return StretchedPredictive(GaussianPredictive(p.mean, p.cov * self.factor**2, p.noise_std * self.factor))


@dataclass(frozen=True)
class StretchedPredictive:
    inner: GaussianPredictive

    @property
    def mean(self) -> Tensor:
        return self.inner.mean

    def log_prob(self, yt: Tensor, joint: bool = False, mask: Tensor | None = None) -> Tensor:
        return self.inner.log_prob(yt, joint=joint, mask=mask)

    def cdf(self, yt: Tensor) -> Tensor:
        return self.inner.cdf(yt)

    def sample(self, n: int, noisy: bool = True, seed: int = 0) -> Tensor:
        return self.inner.sample(n, noisy=noisy, seed=seed)


@dataclass(frozen=True)
class Coin:
    """A discrete model: P(y = 1) is the shrunken mean of the context, for all points, independently."""

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> Coin.Posterior:
        observed = torch.ones(yc.shape[:-1]) if mask is None else mask
        total = torch.where(observed.unsqueeze(-1) > 0, yc, torch.zeros_like(yc)).sum(-2)
        return Coin.Posterior((1 + total) / (2 + observed.sum(-1, keepdim=True)))

    @dataclass(frozen=True)
    class Posterior:
        p: Tensor

        def predict(self, xt: Tensor) -> Coin.Predictive:
            return Coin.Predictive(self.p.unsqueeze(-2).expand(*xt.shape[:-1], 1))

    @dataclass(frozen=True)
    class Predictive:
        mean: Tensor
        is_discrete: bool = True

        def log_prob(self, yt: Tensor, joint: bool = False, mask: Tensor | None = None) -> Tensor:
            each = torch.where(yt > 0.5, self.mean, 1 - self.mean).log().squeeze(-1)
            observed = torch.ones(each.shape) if mask is None else mask
            each = torch.where(observed > 0, each, torch.zeros_like(each))
            return each.sum(-1) if joint else each

        def cdf(self, yt: Tensor) -> Tensor:
            raise AssertionError("a discrete prediction has no PIT")

        def sample(self, n: int, noisy: bool = True, seed: int = 0) -> Tensor:
            raise AssertionError("not needed for discrete outputs")


def ragged_tasks(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    sizes = torch.randint(0, 9, (count,), generator=generator(seed)).tolist()
    pairs = GP.tasks(count, seed, num_points=(12, 25))
    return [(x[:n], y[:n], x[n:], y[n:]) for (x, y), n in zip(pairs, sizes, strict=True)]


def test_evaluate_follows_the_definitions() -> None:
    tasks = ragged_tasks(11)
    assert any(len(xc) == 0 for xc, *_ in tasks)
    result = evaluate(GP, tasks, batch_size=4, levels=(0.5, 0.9))
    assert list(result.per_task) == [
        "joint_log_density",
        "marginal_log_density",
        "rmse",
        "mae",
        "crps",
        "coverage_0.5",
        "coverage_0.9",
    ]
    pits = []
    for t, (xc, yc, xt, yt) in enumerate(tasks):
        predictive = GP.condition(xc, yc).predict(xt)
        pits.append(predictive.cdf(yt).flatten())
        expected = {
            "joint_log_density": predictive.log_prob(yt, joint=True) / len(yt),
            "marginal_log_density": predictive.log_prob(yt).mean(),
            "rmse": ((yt - predictive.mean) ** 2).mean().sqrt(),
            "mae": (yt - predictive.mean).abs().mean(),
            "crps": crps_gaussian_mixture(predictive.mean[None], predictive.std[None], yt).mean(),
            "coverage_0.9": ((yt - predictive.mean).abs() <= 1.6448536 * predictive.std).to(F64).mean(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(result.per_task[name][t], value)
    assert result.pit is not None and result.num_tasks == 11
    torch.testing.assert_close(result.pit, torch.cat(pits))
    assert result.summary["rmse"] == mean_and_se(result.per_task["rmse"])
    error, se = result.summary["calibration_error"]
    assert error == pytest.approx(float(calibration_error(torch.cat(pits))), abs=1e-12)
    without = torch.stack([calibration_error(torch.cat([*pits[:t], *pits[t + 1 :]])) for t in range(11)])
    assert se == pytest.approx(math.sqrt(10 / 11 * float(((without - without.mean()) ** 2).sum())), abs=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_padded_batches_equal_one_by_one(batch_size: int) -> None:
    tasks = ragged_tasks(7, seed=1)
    whole = evaluate(GP, tasks, batch_size=batch_size)
    for t, task in enumerate(tasks):
        alone = evaluate(GP, [task])
        for name, values in whole.per_task.items():
            torch.testing.assert_close(values[t : t + 1], alone.per_task[name])
        assert math.isnan(alone.summary["calibration_error"][1])


def test_calibrated_model_passes_and_wrong_ones_are_flagged() -> None:
    tasks = ragged_tasks(150, seed=2)
    right = evaluate(Stretched(1.0), tasks, batch_size=50)
    exact = evaluate(GP, tasks, batch_size=50)
    for level in (0.5, 0.8, 0.95):
        mean, se = right.summary[f"coverage_{level:g}"]
        assert abs(mean - level) < 4 * se
    assert right.summary["calibration_error"][0] < 4 * right.summary["calibration_error"][1]
    # Sampled and closed-form CRPS agree.
    assert right.summary["crps"][0] == pytest.approx(exact.summary["crps"][0], rel=0.02)
    assert not torch.equal(right.per_task["crps"], exact.per_task["crps"])
    for factor in (0.5, 2.0):
        wrong = evaluate(Stretched(factor), tasks, batch_size=50)
        mean, se = wrong.summary["coverage_0.5"]
        assert abs(mean - 0.5) > 5 * se
        assert wrong.summary["calibration_error"][0] > 3 * right.summary["calibration_error"][0]
        for name, sign in (("joint_log_density", 1), ("marginal_log_density", 1), ("crps", -1)):
            assert sign * (right.summary[name][0] - wrong.summary[name][0]) > 0
        torch.testing.assert_close(wrong.per_task["rmse"], right.per_task["rmse"])


def test_seeds_reach_the_model_and_nothing_global_moves() -> None:
    seen: list[tuple[int, int, tuple[int, ...]]] = []

    class Watched:
        def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> GaussianPosterior:
            assert mask is not None and not torch.is_grad_enabled()
            # What is not observed must not tell the answer.
            assert not yc[~mask].any()
            seen.append((num_samples, seed, tuple(xc.shape)))
            return GP.condition(xc, yc, mask)

    state = torch.random.get_rng_state()
    tasks = [(xc[:0], yc[:0], xt, yt) for xc, yc, xt, yt in ragged_tasks(5)]
    evaluate(Watched(), tasks, num_samples=9, seed=20, batch_size=2)
    assert seen == [(9, 20, (2, 1, 1)), (9, 21, (2, 1, 1)), (9, 22, (1, 1, 1))]
    assert torch.equal(torch.random.get_rng_state(), state) and torch.is_grad_enabled()
    a, b, c = (evaluate(Stretched(), tasks, seed=s).per_task["crps"] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_discrete_outputs_get_the_brier_score() -> None:
    y = [(torch.rand((n, 1), generator=generator(n)) < 0.8).to(F64) for n in (6, 9, 5)]
    tasks = [(torch.zeros(2, 1), v[:2], torch.zeros(len(v) - 2, 1), v[2:]) for v in y]
    result = evaluate(Coin(), tasks)
    assert result.pit is None
    assert set(result.summary) == {"joint_log_density", "marginal_log_density", "rmse", "mae", "brier", "accuracy"}
    for t, v in enumerate(y):
        p = (1 + v[:2].sum()) / 4
        torch.testing.assert_close(result.per_task["brier"][t], ((p - v[2:]) ** 2).mean())
        density = torch.where(v[2:] > 0.5, p, 1 - p).log()
        torch.testing.assert_close(result.per_task["joint_log_density"][t], density.mean())


def test_pairs_are_split() -> None:
    pairs = GP.tasks(8, 3, num_points=(10, 20))
    splits = split_tasks(pairs, (0.2, 0.5), seed=4)
    for (x, y), (xc, yc, xt, yt) in zip(pairs, splits, strict=True):
        assert 0.2 * len(x) - 0.5 <= len(xc) <= 0.5 * len(x) + 0.5
        both = torch.cat([torch.cat([xc, yc], -1), torch.cat([xt, yt], -1)])
        order, back = both[:, 0].argsort(), x[:, 0].argsort()
        torch.testing.assert_close(both[order], torch.cat([x, y], -1)[back])
        assert not torch.equal(torch.cat([xc, xt]), x)
    direct = evaluate(GP, pairs, context_fraction=(0.2, 0.5), seed=4)
    torch.testing.assert_close(direct.per_task["rmse"], evaluate(GP, splits).per_task["rmse"])
    assert [len(xc) for xc, *_ in split_tasks(pairs, 0.0)] == [0] * 8
    assert [len(xt) for _, _, xt, _ in split_tasks(pairs, 1.0)] == [1] * 8
    other = split_tasks(pairs, (0.2, 0.5), seed=5)
    assert not all(torch.equal(a[2], b[2]) for a, b in zip(splits, other, strict=True))


def test_arrays_are_accepted() -> None:
    tasks = ragged_tasks(4)
    arrays = [tuple(v.numpy()[::-1] for v in task) for task in tasks]
    vectors = [tuple(v[:, 0].tolist() for v in task) for task in tasks]
    reference = evaluate(GP, tasks).per_task["joint_log_density"]
    torch.testing.assert_close(evaluate(GP, arrays).per_task["joint_log_density"], reference)
    single = evaluate(GP, vectors).per_task["joint_log_density"]  # lists become float32
    torch.testing.assert_close(single, reference, atol=1e-3, rtol=1e-3)
    empty: list[tuple[list[float] | Tensor, ...]] = [([], [], xt, yt) for *_, xt, yt in tasks]
    sliced = [(xt[:0], yt[:0], xt, yt) for *_, xt, yt in tasks]
    assert torch.equal(evaluate(GP, empty).per_task["rmse"], evaluate(GP, sliced).per_task["rmse"])


def test_report_is_readable_and_json() -> None:
    result = evaluate(GP, ragged_tasks(3))
    table = result.table()
    mean, se = result.summary["crps"]
    line = next(row for row in table.splitlines() if row.startswith("crps"))
    assert line.split() == ["crps", f"{mean:.4f}", f"{se:.4f}"]
    assert table.endswith("(3 tasks)") and len(table.splitlines()) == 2 + len(result.summary)
    back = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert back["per_task"]["rmse"] == result.per_task["rmse"].tolist()
    assert back["summary"]["crps"] == {"mean": mean, "se": se}
    single = evaluate(GP, ragged_tasks(1)).to_dict()
    assert single["summary"]["rmse"]["se"] is None and json.dumps(single, allow_nan=False)


def test_wrong_tasks_are_refused() -> None:
    x, y = torch.zeros(4, 1), torch.zeros(4, 1)
    with pytest.raises(ValueError, match="at least one task"):
        evaluate(GP, [])
    with pytest.raises(ValueError, match="context_fraction"):
        evaluate(GP, [(x, y)])
    with pytest.raises(ValueError, match="context_fraction"):
        evaluate(GP, [(x, y, x, y)], context_fraction=0.5)
    with pytest.raises(ValueError, match="context_fraction"):
        evaluate(GP, [(x, y)], context_fraction=1.5)
    with pytest.raises(ValueError, match="at least one target"):
        evaluate(GP, [(x, y, x[:0], y[:0])])
    with pytest.raises(ValueError, match="in task 1"):
        evaluate(GP, [(x, y, x, y), (x, y[:2], x, y)])
    with pytest.raises(ValueError, match="in task 0"):
        evaluate(GP, [(x[:0], y, x, y)])
    with pytest.raises(ValueError, match="d_x = 1"):
        evaluate(GP, [(x, y, x, y), (x, y, torch.zeros(4, 2), y)])
    with pytest.raises(ValueError, match="finite"):
        evaluate(GP, [(x, y, x, torch.full((4, 1), math.nan))])
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(GP, [(x, y, x, y)], batch_size=0)
    with pytest.raises(ValueError, match=r"\(N, d\)"):
        evaluate(GP, [(torch.zeros(1, 4, 1), y, x, y)])
