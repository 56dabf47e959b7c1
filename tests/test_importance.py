"""Importance weights against hand computation, a slow twin of the Pareto fit, and draws whose tail or mean is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bnnp.importance import effective_sample_size, log_mean_exp, normalise, psis, systematic

INF = math.inf
Vector = np.ndarray[Any, np.dtype[np.float64]]


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def twin(log_weights: Vector) -> tuple[Vector, float]:
    """Smooth the weights of one column, which all differ, step by step as the paper says."""
    S = len(log_weights)
    M = math.ceil(min(S / 5, 3 * math.sqrt(S)))
    order = np.argsort(log_weights)
    w = np.exp(log_weights - log_weights.max())
    cut = w[order[S - M - 1]]
    x = [w[s] - cut for s in order[S - M :]]
    m = 30 + int(math.sqrt(M))
    theta, score = [], []
    for j in range(1, m + 1):
        t = 1 / x[-1] + (1 - math.sqrt(m / (j - 0.5))) / (3 * x[math.floor(M / 4 + 0.5) - 1])
        k = sum(math.log(1 - t * v) for v in x) / M
        theta.append(t)
        score.append(M * (math.log(-t / k) - k - 1))
    weight = [1 / sum(math.exp(other - own) for other in score) for own in score]
    t = sum(a * b for a, b in zip(weight, theta, strict=True))
    k = sum(math.log(1 - t * v) for v in x) / M
    sigma = -k / t
    k = (M * k + 5) / (M + 10)
    for i, s in enumerate(order[S - M :], start=1):
        w[s] = min(cut + sigma / k * ((1 - (i - 0.5) / M) ** (-k) - 1), 1.0)
    return np.log(w / w.sum()), k


def test_by_hand() -> None:
    w = torch.tensor([[1.0, 0.0, 5.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(normalise(w.log()), torch.tensor([[0.25, 0.5, 1.0], [0.75, 0.5, 0.0]], dtype=w.dtype))
    torch.testing.assert_close(effective_sample_size(w.log()), torch.tensor([1.6, 2.0, 1.0], dtype=w.dtype))
    value, error = log_mean_exp(w.log())
    torch.testing.assert_close(value, torch.tensor([math.log(2.0), -INF, math.log(2.5)], dtype=w.dtype))
    torch.testing.assert_close(error, torch.tensor([0.5, math.nan, 1.0], dtype=w.dtype), equal_nan=True)
    value, error = log_mean_exp(w[:1].log())
    assert value.tolist() == [0.0, -INF, math.log(5.0)] and bool(error.isnan().all())


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_a_common_factor_changes_only_the_logarithm_of_the_mean(shift: float) -> None:
    lw = normal(40, 3, 2, scale=2.0)
    torch.testing.assert_close(normalise(lw + shift), normalise(lw))
    torch.testing.assert_close(effective_sample_size(lw + shift), effective_sample_size(lw))
    torch.testing.assert_close(log_mean_exp(lw + shift)[0], log_mean_exp(lw)[0] + shift)
    torch.testing.assert_close(log_mean_exp(lw + shift)[1], log_mean_exp(lw)[1])
    for a, b in zip(psis(lw + shift), psis(lw), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_the_error_of_the_delta_method_is_the_spread_over_repetitions() -> None:
    value, error = log_mean_exp(normal(2000, 4000, scale=0.5))
    assert value.mean().item() == pytest.approx(0.125, abs=1e-3)  # log E exp(N(0, 1/4)) = 1/8
    assert error.mean().item() == pytest.approx(value.std().item(), rel=0.05)  # a deviation of 4,000 is known to 1.1 %


def test_normalised_weights_carry_gradients() -> None:
    lw = normal(5, 2).requires_grad_()
    assert torch.autograd.gradcheck(normalise, lw)
    assert torch.autograd.gradcheck(lambda x: log_mean_exp(x)[0], lw)


@pytest.mark.parametrize("S", [25, 64, 100, 226, 1000])
@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 5.0])
def test_psis_is_its_slow_twin(S: int, scale: float) -> None:
    lw = normal(S, 4, scale=scale, seed=S)
    smoothed, k = psis(lw.reshape(S, 2, 2) - 300.0)
    assert k.shape == (2, 2)
    for c, column in enumerate((lw - 300.0).T.numpy()):
        expected, shape = twin(column)
        np.testing.assert_allclose(smoothed.reshape(S, 4)[:, c], expected, rtol=1e-9, atol=1e-9)
        assert k.flatten()[c].item() == pytest.approx(shape, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("shape", [0.3, 0.7, 1.0])
def test_psis_finds_the_shape_of_a_pareto_tail(shape: float) -> None:
    S, columns = 20_000, 50
    # P(w > t) = t^(-1/k): the excesses over any threshold are exactly generalised Pareto with this k.
    uniform = torch.rand(S, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, k = psis(-shape * uniform.log())
    M = math.ceil(3 * math.sqrt(S))
    prior = (M * shape + 5) / (M + 10)
    error = (1 + shape) / math.sqrt(M)  # of maximum likelihood, one column
    assert k.std().item() == pytest.approx(error, rel=0.35)
    assert abs(k.mean().item() - prior) < 4 * error / math.sqrt(columns)
    assert bool(((k - prior).abs() < 4.5 * error).all())


def test_smoothing_lowers_the_error_of_a_known_mean() -> None:
    # Target N(0, 1), draws of N(0, 0.5^2): w has k = 0.75. Truth: E x^2 = 1.
    x = normal(500, 2000, scale=0.5, seed=3)
    lw = -0.5 * x**2 + 0.5 * (x / 0.5) ** 2
    truth = 1.0
    raw = (normalise(lw) * x**2).sum(0) - truth
    smooth = (psis(lw)[0].exp() * x**2).sum(0) - truth
    assert smooth.square().mean() < 0.9 * raw.square().mean()
    assert 0.5 < psis(lw)[1].median() < 0.75


def test_smoothed_weights_sum_to_one_keep_their_order_and_do_not_pass_the_largest() -> None:
    lw = normal(300, 7, scale=3.0)
    smoothed, _ = psis(lw)
    torch.testing.assert_close(smoothed.exp().sum(0), torch.ones(7, dtype=lw.dtype))
    order = lw.argsort(0)
    assert bool((smoothed.gather(0, order).diff(dim=0) >= 0).all())
    # Untouched weights keep their ratios, and the largest is no larger against them than before.
    low, high = order[0], order[-1]
    columns = torch.arange(7)
    gain = (smoothed[high, columns] - smoothed[low, columns]) - (lw[high, columns] - lw[low, columns])
    assert bool((gain <= 1e-12).all())


@given(st.integers(0, 2**20), st.sampled_from([30, 64, 130]))
def test_psis_does_not_depend_on_the_order_of_the_draws(seed: int, S: int) -> None:
    lw = normal(S, 3, scale=2.0, seed=seed)
    lw[: S // 3, 0] = -INF
    order = torch.randperm(S, generator=torch.Generator().manual_seed(seed))
    smoothed, k = psis(lw)
    again, k_again = psis(lw[order])
    torch.testing.assert_close(again, smoothed[order])
    torch.testing.assert_close(k_again, k)


def column(*parts: tuple[int, float]) -> Tensor:
    return torch.cat([torch.full((count,), value, dtype=torch.float64) for count, value in parts])


@pytest.mark.parametrize(
    ("name", "lw", "k"),
    [
        ("equal", column((100, -7.0)), 0.0),
        ("equal but for rounding", -1000.0 + 1e-13 * normal(100), 0.0),
        ("equal at the top", torch.cat([normal(80), column((20, 9.0))]), 0.0),
        ("half are zero", column((50, -INF), (50, 1.0)), 0.0),
        ("one carries all", column((99, -900.0), (1, 0.0)), INF),
        ("one is not zero", column((99, -INF), (1, 0.0)), INF),
        ("one carries all, by far", normal(100, scale=2000.0), INF),
        ("all are zero", column((100, -INF)), INF),
        ("a tie below four", torch.cat([normal(50) - 20.0, column((46, 0.0)), torch.tensor([0.1, 0.2, 0.3, 0.4])]), math.nan),
        ("too few draws", normal(24), math.nan),
        ("one draw", normal(1), math.nan),
    ],
)
def test_weights_that_cannot_be_fitted_are_left_alone(name: str, lw: Tensor, k: float) -> None:
    # Beside a column that can be fitted, and which must not notice.
    other = normal(len(lw), seed=5)
    smoothed, shape = psis(torch.stack([lw, other], -1))
    torch.testing.assert_close(smoothed[:, 0].exp(), normalise(lw), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(shape[0], torch.tensor(k, dtype=lw.dtype), equal_nan=True, rtol=0.0, atol=0.0)
    alone, shape_alone = psis(other)
    torch.testing.assert_close(smoothed[:, 1], alone)
    torch.testing.assert_close(shape[1], shape_alone, equal_nan=True)


def test_copies_level_with_the_foot_of_the_tail_are_not_part_of_it() -> None:
    # 226 draws have a tail of 46; the 6 lowest of it equal the cut, so the other 40 are fitted alone.
    lw = normal(226, seed=8).sort().values
    lw[170:186] = lw[185]
    smoothed, k = psis(lw)
    assert bool((smoothed[170:186] == smoothed[170]).all()) and bool(smoothed[185] < smoothed[186])
    assert bool(k.isfinite()) and abs(k - psis(normal(226, seed=8))[1]) < 0.2


def test_what_is_no_weight_gives_nan_in_its_own_column_only() -> None:
    lw = normal(64, 3)
    lw[3, 0], lw[3, 1] = math.nan, INF
    smoothed, k = psis(lw)
    assert k.isnan().tolist() == [True, True, False]
    assert smoothed.isnan().all(0).tolist() == [True, True, False]
    for values in (normalise(lw)[0], effective_sample_size(lw), log_mean_exp(lw)[0]):
        assert values.isnan().tolist() == [True, True, False]
    with pytest.raises(ValueError, match="2 of 3 columns"):
        systematic(lw, 4, torch.Generator())


def test_float32_is_fitted_in_float64_and_returned_in_float32() -> None:
    lw = normal(100, 5, scale=2.0).float()
    smoothed, k = psis(lw)
    expected, shape = psis(lw.double())
    assert smoothed.dtype == k.dtype == torch.float32
    torch.testing.assert_close((smoothed, k), (expected.float(), shape.float()))
    coarse = (-1000.0 + 1e-5 * normal(100)).float()  # no more than rounding at a thousand
    assert psis(coarse)[1].item() == 0.0


class FixedUniform:
    """Stand in for torch.rand, with a chosen number."""

    def __init__(self, u: float) -> None:
        self.u = u

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        return torch.tensor(self.u, dtype=torch.float64)


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.3, 1.0 - 2.0**-53])
@pytest.mark.parametrize("S", [1, 3, 49, 1000, 4097])
def test_equal_weights_are_all_drawn_once(u: float, S: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", FixedUniform(u))
    lw = torch.full((S, 2), -0.1234567)
    index = systematic(lw, S, torch.Generator())
    torch.testing.assert_close(index, torch.arange(S).unsqueeze(-1).expand(S, 2))
    torch.testing.assert_close(systematic(torch.full_like(lw, -INF), S, torch.Generator()), index)
    # Twice as many: each twice.
    torch.testing.assert_close(systematic(lw, 2 * S, torch.Generator()), index.repeat_interleave(2, 0))


@given(st.integers(0, 2**20), st.integers(1, 40), st.integers(1, 60), st.sampled_from([0.0, 2.0**-53, 0.5, 1.0 - 2.0**-53, None]))
def test_systematic_draws_every_index_its_share_of_times(seed: int, S: int, n: int, u: float | None) -> None:
    lw = normal(S, 3, 2, scale=3.0, seed=seed)
    lw[0, 0, 0] = -INF
    with pytest.MonkeyPatch.context() as patch:
        if u is not None:
            patch.setattr(torch, "rand", FixedUniform(u))
        index = systematic(lw, n, torch.Generator().manual_seed(seed))
    assert index.shape == (n, 3, 2) and index.dtype == torch.int64
    assert bool((index.diff(dim=0) >= 0).all())
    counts = torch.zeros_like(lw).scatter_add(0, index, torch.ones(n, 3, 2, dtype=lw.dtype))
    assert bool(((counts - n * normalise(lw)).abs() < 1 + 1e-9).all())
    assert counts.sum() == 6 * n and (S == 1 or counts[0, 0, 0] == 0)


def test_systematic_draws_are_unbiased() -> None:
    lw, n = normal(7, scale=1.5), 5
    g = torch.Generator().manual_seed(2)
    counts = torch.stack([torch.bincount(systematic(lw, n, g), minlength=7) for _ in range(4000)]).double()
    error = counts.std(0) / math.sqrt(4000)
    assert bool(((counts.mean(0) - n * normalise(lw)).abs() <= 4.5 * error + 1e-12).all())


def test_a_column_is_drawn_the_same_alone_and_in_company() -> None:
    lw = normal(50, 4, 3, scale=2.0)
    together = systematic(lw, 30, torch.Generator().manual_seed(7))
    for t in range(4):
        alone = systematic(lw[:, t, 1], 30, torch.Generator().manual_seed(7))
        torch.testing.assert_close(together[:, t, 1], alone)
