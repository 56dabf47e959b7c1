"""The study of the priors: its oracle against a slow twin, its sums by hand, and a run in miniature."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments.prior_families import problems, run
from experiments.prior_families.problems import Family
from experiments.prior_families.run import Cell
from experiments.prior_families.summary import at_time, overview, summarise, tables
from torch.distributions import MultivariateNormal

from bnnp.data.synthetic import Heaviside, Sawtooth, SquaredExponentialGP
from bnnp.priors import PRIORS

KINDS = Family((Sawtooth(), SquaredExponentialGP(lengthscale=0.6, noise_std=0.1)), (0.3, 0.7))


def _density(family: Family, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return log sum_k weight_k N(y; mean_k, kernel_k + noise_k^2 I), written out."""
    total = 0.0
    for member, weight in zip(family.members, family.weights, strict=True):
        cov = member.kernel(x, x) + member.noise_std**2 * torch.eye(len(x), dtype=torch.float64)
        total += weight * float(MultivariateNormal(member.mean(x)[:, 0], cov).log_prob(y[:, 0]).exp())
    return math.log(total)


def test_oracle_of_a_family_is_a_ratio_of_mixture_densities() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(9, 1, generator=generator, dtype=torch.float64) - 2
    y = torch.randn(9, 1, generator=generator, dtype=torch.float64)
    joint, each = KINDS.log_prob(x[:4], y[:4], x[4:], y[4:])
    context = _density(KINDS, x[:4], y[:4])
    assert float(joint) == pytest.approx(_density(KINDS, x, y) - context, rel=1e-9)
    for m in range(5):
        one = [0, 1, 2, 3, 4 + m]
        assert float(each[m]) == pytest.approx(_density(KINDS, x[one], y[one]) - context, rel=1e-9)
    several = torch.stack([x, x.flip(0)]), torch.stack([y, 2 * y])
    both, _ = KINDS.log_prob(*(part[:, :4] for part in several), *(part[:, 4:] for part in several))
    assert float(both[0]) == pytest.approx(float(joint), rel=1e-12)


def test_a_family_draws_each_member_as_often_as_it_says() -> None:
    tasks = KINDS.tasks(600, seed=5, num_points=(3, 6))
    again = KINDS.tasks(600, seed=5, num_points=(3, 6))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(tasks, again, strict=True))
    assert {len(x) for x, _ in tasks} == {3, 4, 5}
    # A task of many points tells its member: the oracle of the right one is ahead by far.
    long = KINDS.tasks(200, seed=6, num_points=30)
    x, y = (torch.stack(part) for part in zip(*long, strict=True))
    evidence = torch.stack([m.log_prob(x[:, :0], y[:, :0], x, y) for m in KINDS.members])
    share = float((evidence[0] > evidence[1]).double().mean())
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 200)
    grid = torch.linspace(-2, 2, 7).unsqueeze(-1)
    assert KINDS.sample(grid, 11, torch.Generator().manual_seed(0)).shape == (11, 7, 1)


def test_settings_name_priors_and_problems_that_are_described() -> None:
    config = run.read_config()
    for net in config["nets"].values():
        assert set(net["priors"]) <= set(config["priors"]) and set(net["problems"]) <= set(config["problems"])
    assert set(config["problems"]) == {*problems.processes(), "digits"}
    wanted = list(run.cells(config))
    assert len(set(wanted)) == len(wanted)
    assert {config["priors"][cell.prior]["kind"] for cell in wanted} <= set(PRIORS)
    assert {cell.prior for cell in run.cells(config, ["steps"], ["shared"])} == {"shared"}
    assert isinstance(problems.processes()["steps"], Heaviside)


def _record(joint: list[float], seconds: float) -> dict[str, Any]:
    scores = {"joint": joint, "marginal": joint, "inside_80": [0.8] * len(joint)}
    curve = [[step, step * seconds, float(step)] for step in (1, 2, 3)]
    numbers = {"validation": 3.0, "numbers": 10, "energy_distance": 0.5, "noise_std": [0.1], "skipped": 0, "step_seconds": seconds}
    return {"scores": {"few": scores}, "curve": curve, "seconds": 3 * seconds, **numbers}


def test_differences_are_paired_over_tasks_and_seeds_are_averaged_first() -> None:
    records = {
        ("p", "8", "shared", 0): _record([1.0, 5.0], 1.0),
        ("p", "8", "shared", 1): _record([3.0, 7.0], 1.0),
        ("p", "8", "per_unit", 0): _record([2.0, 7.0], 2.0),
        ("p", "8", "per_unit", 1): _record([4.0, 9.0], 2.0),
        ("p", "8", "diagonal", 0): {"failed": "ten steps in a row"},
    }
    known = {"p": {"scores": {"oracle": {"few": {"joint": [9.0, 9.0], "marginal": [9.0, 9.0]}}}, "energy_distance": 0.0}}
    table = summarise(records, known)
    row = table["p"]["nets"]["8"]["per_unit"]
    assert row["joint"]["few"] == [5.5, pytest.approx(2.5)]
    assert row["less_base"]["few"] == [1.5, pytest.approx(0.5)]
    assert row["seeds"]["few"] == [4.5, 6.5]
    assert (row["step_ms"], row["equal_seconds"], row["validation_at_equal_time"]) == (2000.0, 3.0, 1.0)
    assert table["p"]["nets"]["8"]["shared"]["validation_at_equal_time"] == 3.0
    assert overview(table, "8") == {"shared": {"p": [0.0, 0.0]}, "per_unit": {"p": [1.5, pytest.approx(0.5)]}}
    words = tables(table)
    assert "| `diagonal` | failed |" in words
    assert "| `per_unit` | +1.500 ± 0.500 | 2 | 1 |" in words
    assert "| oracle | 9.000 ± 0.000 |" in words


def test_score_at_a_time_is_the_best_until_then() -> None:
    curve = [[10, 1.0, -2.0], [20, 2.0, -1.0], [30, 3.0, -1.5], [40, 4.0, 0.0]]
    assert [at_time(curve, t) for t in (1.0, 3.5, 9.0)] == [-2.0, -1.0, 0.0]
    assert math.isnan(at_time(curve, 0.5))


@pytest.fixture
def config() -> dict[str, Any]:
    small = copy.deepcopy(run.read_config())
    small["nets"] = {"3": {"hidden": [3], "priors": ["fixed", "shared", "diagonal"], "problems": ["steps", "two kinds"]}}
    small["sizes"] |= {"train": 20, "validation": 4, "test": 3, "functions": 5, "contexts": [2], "targets": 6}
    small["training"] |= {"steps": 8, "batch_size": 2, "num_samples": 3}
    small["rates"] = {"net": "3", "problems": ["steps"], "learning_rates": [0.5], "seeds": [0]}
    small |= {"particles": 4, "validations": 4, "seeds": [0, 1], "factor_dtype": "float64"}
    return small


def test_a_run_in_miniature_is_resumed_and_summed_up(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run, "TIMED_STEPS", 3)
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(config))
    out = tmp_path / "out"
    run.main(["--config", str(settings), "--out", str(out)])
    files = {file: file.stat().st_mtime_ns for file in (out / "scores").iterdir()}
    assert len(files) == 2 * 3 * 2 + 2 + 2
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("measured again"))
    run.main(["--config", str(settings), "--out", str(out)])
    assert files == {file: file.stat().st_mtime_ns for file in (out / "scores").iterdir()}
    whole = json.loads((out / "results.json").read_text())
    table, rates = whole["problems"], whole["learning_rates"]["steps"]
    # Adam's first steps are as long as the rate says, so the scores differ.
    assert set(rates) == {"shared", "diagonal"} and len({score for row in rates.values() for score in row.values()}) == 4
    assert rates["shared"]["0.02"] == json.loads((out / "scores" / "steps,_3,_shared,_0.json").read_text())["validation"]
    rows = table["two kinds"]["nets"]["3"]
    assert list(rows) == ["fixed", "shared", "diagonal"]
    assert rows["fixed"]["numbers"] == 0
    # One hidden layer of 3 units on 2 features, one output on 4; means, and a scale for each weight or a triangle for each layer.
    assert rows["diagonal"]["numbers"] == 2 * (3 * 2 + 4)
    assert rows["shared"]["numbers"] == (3 * 2 + 4) + (3 + 10)
    assert all(np.isfinite(row["joint"]["2 points"]).all() and row["step_ms"] > 0 for row in rows.values())
    assert set(table["two kinds"]["references"]) == {"smooth GP", "oracle"} and set(table["steps"]["references"]) == {"smooth GP"}
    assert (out / "scores.png").stat().st_size > 0
    config["training"]["steps"] = 9
    settings.write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="Got others"):
        run.main(["--config", str(settings), "--out", str(out)])


def test_a_training_that_cannot_go_on_is_a_result(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise run.TrainingError("ten steps in a row")

    monkeypatch.setattr(run.bnnp, "meta_train", fails)
    cell = Cell("steps", "3", "shared", 0)
    assert run.measure(config, cell, problems.load("steps", config["sizes"]), tmp_path) == {"failed": "ten steps in a row"}


def test_digits_are_those_of_the_demo(config: dict[str, Any]) -> None:
    pytest.importorskip("sklearn")
    problem = problems.load("digits", config["sizes"])
    assert [len(split[0]) for split in problem.test["10 % seen"]] == [6] * 3
    assert [len(split[2]) for split in problem.test["50 % seen"]] == [32] * 3
    assert set(problem.references) == {"multivariate normal", "per-pixel normal"}
    assert all(scores["50 % seen"]["joint"].shape == (3,) for scores in problem.references.values())
    whole = torch.cat([problem.test["50 % seen"][0][1], problem.test["50 % seen"][0][3]])
    assert whole.shape == (64, 1)
    seen, unseen = problem.test["10 % seen"][0][0], problem.test["10 % seen"][0][2]
    assert len(torch.cat([seen, unseen]).unique(dim=0)) == 64
