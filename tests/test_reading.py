"""Reading a prior: numbers against dense twins for every kind; a layer that is put back is the default and nothing else changes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

import bnnp
from bnnp import plots_prior, reading
from bnnp.priors import PRIORS


def tasks(n: int, seed: int, d_x: int = 1) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    xs = [torch.rand(12, d_x, generator=g, dtype=torch.float64) * 4 - 2 for _ in range(n)]
    return [(x, torch.sin(2 * x.sum(-1, keepdim=True)) + 0.1 * torch.randn(12, 1, generator=g, dtype=torch.float64)) for x in xs]


def model(kind: str = "per_unit", moved: bool = True, d_x: int = 1, **options: object) -> bnnp.BNNP:
    """Return a model whose prior is no longer at its start."""
    spec = bnnp.Prior(kind, components=2, rank=2, **options)  # type: ignore[arg-type]
    m = bnnp.BNNP(d_x, 1, hidden=(4, 3), prior=spec, activation="tanh").double()
    g = torch.Generator().manual_seed(1)
    for layer in m.prior if moved else ():
        for parameter in layer.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    return m


@pytest.mark.parametrize("kind", PRIORS)
def test_summary_is_that_of_dense_moments(kind: str) -> None:
    m = model(kind)
    table = m.prior.summary()
    assert len(table.rows) == 3
    for row, layer in zip(table.rows, m.prior, strict=True):
        mean, cov = layer.mean.detach().numpy(), layer.covariance().detach().numpy()
        d, p = row["shape"]
        assert mean.shape == (d, p) and cov.shape == (d, p, p)
        sds = np.array([np.sqrt(p * cov[u, j, j]) for u in range(d) for j in range(p)])
        ranks = []
        for u in range(d):
            values = np.linalg.svd(cov[u], compute_uv=False)
            q = values / values.sum()
            ranks.append(np.exp(-(q * np.log(np.clip(q, 1e-300, None))).sum()))
        assert row["mean"] == pytest.approx(np.sqrt(p * (mean**2).mean()))
        assert (row["sd_min"], row["sd_max"]) == pytest.approx((sds.min(), sds.max()))
        assert sds.min() <= row["sd_median"] <= sds.max() and (sds <= row["sd_median"] + 1e-12).mean() >= 0.5
        assert row["effective_rank"] == pytest.approx(np.mean(ranks)) and 1 <= row["effective_rank"] <= p + 1e-9
        assert row["divergence"] == pytest.approx(float(layer.divergence().detach()))
    assert table.divergence == pytest.approx(float(m.prior.divergence().detach()))
    assert sum(row["share"] for row in table.rows) == pytest.approx(1.0)
    assert str(table).count("\n") == 4 and f"{table.divergence:.1f} nats" in str(table)


def test_summary_needs_mean_covariance_and_divergence_only() -> None:
    class Known(torch.nn.Module):
        d_out, p = 2, 3

        def __init__(self) -> None:
            super().__init__()
            self.mean = torch.nn.Parameter(torch.ones(2, 3))

        def covariance(self) -> Tensor:
            return torch.diag_embed(torch.tensor([[1.0, 4.0, 0.0], [1.0, 4.0, 0.0]])) / 3

        def divergence(self) -> Tensor:
            return torch.tensor(2.0)

    row = reading.summary([Known()]).rows[0]  # type: ignore[arg-type]
    assert row["mean"] == pytest.approx(3**0.5) and row["sd_max"] == pytest.approx(2.0) and row["sd_min"] == 0.0
    assert row["effective_rank"] == pytest.approx(np.exp(-(0.2 * np.log(0.2) + 0.8 * np.log(0.8))))
    assert row["learned"] == 1.0 and row["share"] == 1.0


def test_the_default_reads_as_the_default() -> None:
    for row in model("shared", moved=False).prior.summary().rows:
        numbers = [row[key] for key in ("mean", "sd_min", "sd_median", "sd_max", "effective_rank", "divergence")]
        assert numbers == pytest.approx([0, 1, 1, 1, row["shape"][1], 0], abs=1e-9)


def test_what_is_learned_is_told_of_each_layer() -> None:
    fractions = [row["learned"] for row in model("per_unit", fraction=0.5).prior.summary().rows]
    sizes = [8, 15, 4]
    assert fractions[0] == 1.0 and 0 < fractions[1] < 1 and fractions[2] == 0.0
    assert sum(f * n for f, n in zip(fractions, sizes, strict=True)) == pytest.approx(0.5 * 27, abs=1)
    m = model("per_unit")
    m.prior.learn(False, False)
    assert [row["learned"] for row in m.prior.summary().rows] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", PRIORS)
def test_directions_are_those_of_many_weight_vectors(kind: str) -> None:
    m = model(kind)
    for found, layer in zip(reading.directions(m.prior), m.prior, strict=True):
        mean, cov = layer.mean.detach(), layer.covariance().detach()
        second = sum((cov[u] + torch.outer(mean[u], mean[u]) for u in range(layer.d_out)), torch.zeros(layer.p, layer.p)) / layer.d_out
        rebuilt = found.vectors @ torch.diag(found.values) @ found.vectors.mT / layer.p
        torch.testing.assert_close(rebuilt, second.double(), rtol=0, atol=1e-12)
        assert bool((found.values.diff() <= 1e-12).all())
        largest = found.vectors.gather(0, found.vectors.abs().argmax(0, keepdim=True))
        assert bool((largest > 0).all())
        for k in range(layer.p):
            along = (mean.double() @ found.vectors[:, k]).square().mean() * layer.p
            assert float(found.between[k] * found.values[k]) == pytest.approx(float(along), abs=1e-9)


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_layer_that_is_put_back_is_the_default_and_the_others_stay(kind: str, index: int) -> None:
    m = model(kind, scaled=False, input_scale=3.0)
    before = {key: value.clone() for key, value in m.named_parameters()}
    other = reading.with_default_layer(m, index)
    assert all(torch.equal(value, before[key]) for key, value in m.named_parameters())
    for i, (was, now) in enumerate(zip(m.prior, other.prior, strict=True)):
        if i == index:
            assert not bool(now.mean.any())
            default = torch.eye(now.p, dtype=torch.float64).expand(now.d_out, -1, -1) / now.p
            torch.testing.assert_close(now.covariance(), default, rtol=0, atol=1e-12)
            continue
        torch.testing.assert_close(now.mean, was.mean)
        if kind != "network" or i < index:  # later layers lose what they shared with the one put back
            torch.testing.assert_close(now.covariance(), was.covariance())
    x, y = tasks(1, 0)[0]
    assert bool(other.condition(x[:4], y[:4], num_samples=3).predict(x).mean.isfinite().all())
    assert bool(other.prior_samples(x, 3).isfinite().all())


def test_there_is_no_layer_behind_the_last() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 2\. Got 3"):
        reading.with_default_layer(model(), 3)


def test_effects_are_differences_of_scores_and_none_where_nothing_was_learned() -> None:
    data = tasks(4, 5)
    for effect in bnnp.layer_effects(model(moved=False), data, num_samples=8):
        assert (effect.change, effect.se, effect.change_rmse) == (0.0, 0.0, 0.0)
    m = model()
    effects = bnnp.layer_effects(m, data, 0.5, num_samples=8, seed=2)
    assert [e.layer for e in effects] == [1, 2, 3]
    own = bnnp.evaluate(m, data, num_samples=8, seed=2, context_fraction=0.5).per_task
    for effect in effects:
        theirs = bnnp.evaluate(effect.model, data, num_samples=8, seed=2, context_fraction=0.5).per_task
        change = (theirs["joint_log_density"] - own["joint_log_density"]).numpy()
        assert (effect.change, effect.se) == pytest.approx((change.mean(), change.std(ddof=1) / 2))
        assert effect.change_rmse == pytest.approx(float((theirs["rmse"] - own["rmse"]).mean()))
        assert effect.change != 0


def drawn(d_x: int) -> dict[str, Callable[[], Figure]]:
    m = model(d_x=d_x)
    effects = bnnp.layer_effects(m, tasks(2, 1, d_x), num_samples=4)
    return {
        "scales": lambda: plots_prior.scales(m),
        "directions": lambda: plots_prior.directions(m, count=2),
        "functions": lambda: plots_prior.functions(m, n=4),
        "layer_effects": lambda: plots_prior.layer_effects(m, effects, n=3),
    }


@pytest.mark.parametrize("d_x", [1, 2])
def test_pictures_are_drawn_and_named_and_change_nothing(d_x: int) -> None:
    rc = copy.deepcopy(dict(matplotlib.rcParams))
    for name, draw in drawn(d_x).items():
        fig = draw()
        fig.savefig("/dev/null", format="png", dpi=30)
        panels = [ax for ax in fig.axes if ax.axison and ax.get_title()]
        assert panels and panels[0].get_ylabel(), name
    assert dict(matplotlib.rcParams) == rc


def test_the_range_of_a_picture_is_that_of_meta_training_unless_another_is_given() -> None:
    m = model()
    m.fit_scaling([bnnp.Task(x + 100, y) for x, y in tasks(3, 0)])
    low, high = plots_prior.functions(m).axes[0].lines[0].get_xdata()[[0, -1]]  # type: ignore[index, call-overload]
    assert 97.9 < low < 99 and 101 < high < 102.1
    assert plots_prior.functions(m, (0.0, 1.0)).axes[0].lines[0].get_xdata()[-1] == 1.0  # type: ignore[index]


def test_models_of_many_inputs_have_no_picture_of_functions() -> None:
    m = model(d_x=3)
    with pytest.raises(ValueError, match="one or two inputs"):
        plots_prior.functions(m)
    with pytest.raises(ValueError, match=r"3 input columns\. Got 1"):
        plots_prior.directions(m, columns=["a"])
    assert len(plots_prior.directions(m, columns=["a", "b", "c"]).axes) == 2
    assert dataclasses.is_dataclass(m.prior.summary())
