"""R-hat and effective sample sizes: those of ArviZ, for many quantities at once, and what they say of chains with known correlation."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from bnnp.inference import diagnostics
from bnnp.seeds import seeded


def autoregressive(draws: int, chains: int, phi: float, seed: int = 0, batch: int = 1) -> Tensor:
    """x_t = phi x_{t-1} + noise, stationary with variance 1: its effective sample size is n (1 - phi) / (1 + phi)."""
    g = seeded(seed, "autoregressive")
    x = torch.randn(draws, chains, batch, generator=g, dtype=torch.float64)
    for t in range(1, draws):
        x[t] = phi * x[t - 1] + math.sqrt(1 - phi**2) * x[t]
    return x


CHAINS = {
    "independent": autoregressive(200, 4, 0.0),
    "slow": autoregressive(300, 4, 0.95, 1),
    "alternating": autoregressive(250, 3, -0.7, 2),
    "odd number": autoregressive(101, 2, 0.4, 3),
    "few": autoregressive(9, 4, 0.3, 4),
    "heavy tails": autoregressive(200, 4, 0.5, 5).tan(),
    "ties": autoregressive(200, 4, 0.5, 6).round(),
    "apart": autoregressive(200, 4, 0.3, 7) + torch.arange(4.0)[:, None],
    "other spread": autoregressive(200, 4, 0.3, 8) * torch.tensor([1.0, 1.0, 1.0, 4.0])[:, None],
    "even, odd number of pairs": autoregressive(52, 4, 0.99, 9),
    "drifting": autoregressive(200, 4, 0.3, 10) + torch.linspace(0, 3, 200, dtype=torch.float64)[:, None, None],
}


@pytest.mark.parametrize("case", CHAINS)
def test_the_numbers_are_those_of_arviz(case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
    x = CHAINS[case]
    theirs = np.asarray(x[..., 0]).T  # (chains, draws)
    expected = {
        "rhat": arviz.rhat(theirs, method="rank"),
        "ess_bulk": arviz.ess(theirs, method="bulk"),
        "ess_tail": arviz.ess(theirs, method="tail"),
        "ess_mean": arviz.ess(theirs, method="mean"),
        "mcse_mean": arviz.mcse(theirs, method="mean"),
    }
    for name, value in expected.items():
        assert getattr(diagnostics, name)(x).item() == pytest.approx(float(value), rel=1e-9), name


@pytest.mark.parametrize("name", sorted(set(diagnostics.__all__) - {"mixing"}))
def test_many_quantities_are_a_loop_over_them(name: str) -> None:
    x = autoregressive(120, 3, 0.6, batch=6).unflatten(-1, (2, 3))
    x[..., 1, 1] += torch.arange(3.0)
    function = getattr(diagnostics, name)
    one = torch.stack([torch.stack([function(x[..., i, j]) for j in range(3)]) for i in range(2)])
    torch.testing.assert_close(function(x), one, rtol=1e-12, atol=0)


@pytest.mark.parametrize("phi", [-0.5, 0.0, 0.6, 0.9])
def test_the_effective_size_is_the_known_one(phi: float) -> None:
    x = autoregressive(4000, 4, phi, batch=20)
    known = 16000 * (1 - phi) / (1 + phi)
    # Geyer's estimate is within a few percent at this length.
    assert float(diagnostics.ess_mean(x).mean()) == pytest.approx(known, rel=0.06)
    errors = x.mean((0, 1)) / diagnostics.mcse_mean(x)
    assert errors.square().mean() < 1 + 5 * math.sqrt(2 / 20)


def test_what_never_changes_and_what_is_not_finite() -> None:
    x = autoregressive(50, 2, 0.2, batch=4)
    x[..., 1] = 3.1
    x[7, 1, 2] = torch.inf
    x[..., 3] = torch.tensor([0.3, 0.7])  # two chains that stand still, apart
    r, bulk, tail = diagnostics.rhat(x), diagnostics.ess_bulk(x), diagnostics.ess_tail(x)
    assert r[0] < 1.1
    assert r[1].isnan()
    assert r[2].isnan()
    assert r[3].isinf()
    assert bulk[1] == 100
    assert bulk[2].isnan()
    assert tail[2].isnan()
    # Standing apart is worth about one draw per chain.
    assert bulk[3] < 10


def test_one_chain_is_compared_with_itself() -> None:
    steady = autoregressive(400, 1, 0.2)
    assert diagnostics.rhat(steady) < 1.02
    assert diagnostics.rhat(steady + torch.linspace(0, 4, 400)[:, None, None]) > 1.5


def test_too_few_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 draws"):
        diagnostics.rhat(torch.zeros(3, 4))


def test_mixing_is_the_worst_of_what_is_watched_and_leaves_out_what_never_changes() -> None:
    x = autoregressive(120, 3, 0.6, batch=6).unflatten(-1, (2, 3))
    still = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    found = diagnostics.mixing(list(still), torch.zeros(2, dtype=x.dtype))
    torch.testing.assert_close(found["rhat"], diagnostics.rhat(x).amax(-1))
    for name in ("ess_bulk", "ess_tail"):
        torch.testing.assert_close(found[name], getattr(diagnostics, name)(x).amin(-1))
    assert all(bool(value.isnan().all()) for value in diagnostics.mixing(list(x[:3]), torch.zeros(2)).values())
