"""The study of diagnostics: its statistics against slow twins, its oracles against the processes, and a run in miniature."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments.trust import pictures, run
from experiments.trust.kinds import draw, kinds
from experiments.trust.statistics import auc, rank_correlation
from experiments.trust.summary import DIAGNOSTICS, alarm, check_table, summarise, text

import bnnp
from bnnp.data.synthetic import Sawtooth, SquaredExponentialGP

CONFIG = {
    "gp": {"process": {"lengthscale": 0.5, "noise_std": 0.1}},
    "inside_tasks": 4,
    "outside_tasks": 2,
    "num_targets": 5,
    "context": [4, 8],
    "num_samples": 30,
    "batch_size": 2,
    "check_samples": [26],
    "check_inside_tasks": 2,
    "check_outside_tasks": 2,
    "seed": 0,
}


def test_area_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 40).astype(float), rng.integers(0, 5, 70).astype(float)
    pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b]
    assert auc(a, b)[0] == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auc(np.array([np.inf, 3.0]), np.array([1.0, 2.0])) == (1.0, 0.0)


def test_standard_error_of_the_area_is_that_of_repetitions() -> None:
    rng = np.random.default_rng(0)
    found = [auc(rng.normal(0.8, 1.0, 60), rng.normal(0.0, 1.0, 90)) for _ in range(1000)]
    areas, errors = np.array(found).T
    # The deviation of 1,000 repetitions is known to 2.2 %.
    assert np.sqrt((errors**2).mean()) == pytest.approx(areas.std(ddof=1), rel=0.09)


def test_rank_correlation_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a = rng.integers(0, 20, 50).astype(float)
    b = a + rng.normal(0, 5, 50)
    assert rank_correlation(a, b)[0] == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert np.isnan(rank_correlation(a, np.ones(50))).all()


@pytest.mark.parametrize("home", [Sawtooth(), SquaredExponentialGP(lengthscale=0.5, noise_std=0.1)])
def test_kinds_differ_from_the_inside_in_one_thing(home: Sawtooth | SquaredExponentialGP) -> None:
    found = kinds(home)
    assert found[0].family == "inside" and found[0].process is home
    assert len({kind.name for kind in found}) == len(found)
    inside = dataclasses.asdict(found[0])
    for kind in found[1:]:
        changed = {key for key, value in dataclasses.asdict(kind).items() if value != inside[key]} - {"family", "strength"}
        assert len(changed) == 1 or type(kind.process) is not type(home), kind
        for task in draw(kind, 2, 0, CONFIG, 1.0):
            assert len(task.xt) == len(task.yt) == len(task.ft) == 5
            assert 4 * kind.context_factor <= len(task.xc) == len(task.yc) <= 8 * kind.context_factor
            assert np.isfinite(task.oracle_joint) != (kind.name == "process steps (Heaviside)")


def test_oracle_knows_scale_and_outliers() -> None:
    home = Sawtooth()
    by_name = {kind.name: kind for kind in kinds(home)}

    def one(name: str) -> tuple[torch.Tensor, ...]:
        task = draw(by_name[name], 1, 3, CONFIG, 1.0)[0]
        return task.xc, task.yc, task.xt, task.yt, torch.tensor(task.oracle_joint)

    xc, yc, xt, yt, oracle = one("inside")
    assert oracle == pytest.approx(float(home.log_prob(xc, yc, xt, yt)) / 5, abs=1e-5)
    _, doubled, _, targets, scaled = one("outputs x 2")
    assert torch.equal(doubled, 2 * yc) and torch.equal(targets, 2 * yt)
    assert float(scaled) == pytest.approx(float(oracle) - np.log(2.0), abs=1e-5)
    _, dirty, _, clean, known = one("outliers 1 of the context")
    off = (dirty - yc).abs()[:, 0]
    assert off[0] == pytest.approx(5.0, abs=1e-5) and not off[1:].any()
    assert torch.equal(clean, yt)
    assert float(known) == pytest.approx(float(home.log_prob(xc[1:], yc[1:], xt, yt)) / 5, abs=1e-5)


def test_a_run_in_miniature_is_resumed_and_summed_up(tmp_path: Path) -> None:
    models = {name: bnnp.BNNP(1, 1, hidden=(6, 6), prior="shared", shared_noise=True) for name in run.homes(CONFIG)}
    found = run.collect(tmp_path, models, CONFIG, progress=False)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")}
    assert len(files) == sum(2 * len(kinds(home)) for home in run.homes(CONFIG).values())
    again = run.collect(tmp_path, models, CONFIG, progress=False)
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")}
    # As text, for NaN equals nothing.
    assert json.dumps(again) == json.dumps(found)
    report = {name: summarise(by_number["all"]) for name, by_number in found.items()}
    for name, by_number in found.items():
        assert report[name]["tasks"] == 4 + 2 * (len(by_number["all"]) - 1)
        assert set(check_table({S: r for S, r in by_number.items() if S != "all"})) == {"30", "26"}
        for record in by_number["all"].values():
            assert all(len(alarm(record, d)) == len(record["joint"]) and not np.isnan(alarm(record, d)).any() for d in DIAGNOSTICS)
    words = text(report)
    assert all(kind in words for by_number in found.values() for kind in by_number["all"])
    pytest.importorskip("matplotlib")
    assert len(pictures.heat(report).axes) == 3
    assert len(pictures.scatter(found["gp"]["all"], report["gp"], "gp").axes) == 8
