"""The study of priors in other hands: its pieces by hand, and a run in miniature."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments.prior_transfer import run
from experiments.prior_transfer.engines import KINDS, Answering, fixed_twin
from experiments.prior_transfer.problems import build, processes, read_config, splits, training_tasks
from experiments.prior_transfer.run import Cell
from experiments.prior_transfer.summary import gains, overview, summarise, tables

import bnnp
from bnnp.evaluation import evaluate
from bnnp.inference import functional

QUICK = Path(run.__file__).parent / "quick.json"


@pytest.fixture
def config() -> dict[str, Any]:
    small = copy.deepcopy(read_config())
    small["network"] |= {"hidden": [6, 5], "net_hidden": [8]}
    small["sizes"] |= {"train": 12, "validation": 4, "settings": 2, "test": 3, "points": 20}
    for own in small["processes"].values():
        own["training"] |= {"steps": 6, "num_samples": 2}
    small["training"] |= {"batch_size": 2}
    small |= {"draws": 8}
    return small


def scaled(name: str, config: dict[str, Any]) -> bnnp.BNNP:
    model = build(name, config)
    model.fit_scaling([bnnp.Task(x, y) for x, y in training_tasks(name, config, "train")])
    return model


def test_tasks_of_engines_are_others_than_those_of_learning_and_of_choosing(config: dict[str, Any]) -> None:
    config["sizes"] |= {"test": 16, "points": 50}
    for name in config["processes"]:
        test, settings = splits(name, config, "test"), splits(name, config, "settings")
        assert len(test) == 16 and all(len(xc) + len(xt) == 50 for xc, _, xt, _ in test)
        shares = [len(xc) / 50 for xc, *_ in test]
        assert min(shares) >= 0.04 and max(shares) <= 0.5 and len(set(shares)) > 4
        edge = 2.0 if name == "sawtooth" else 4.0
        assert max(float(x.abs().max()) for xc, _, xt, _ in test for x in (xc, xt)) <= edge
        seen = {float(x) for part in ("train", "validation") for task in training_tasks(name, config, part) for x in task.x[:, 0]}
        assert not seen & {float(x) for xc, *_ in (*test, *settings) for x in xc[:, 0]}
        assert not {float(x) for xc, *_ in test for x in xc[:, 0]} & {float(x) for xc, *_ in settings for x in xc[:, 0]}
        assert all(
            torch.equal(a, b) for one, two in zip(test, splits(name, config, "test"), strict=True) for a, b in zip(one, two, strict=True)
        )


def test_noise_is_the_same_everywhere(config: dict[str, Any]) -> None:
    for name, process in processes(config["noise"]).items():
        model = scaled(name, config)
        assert process.noise_std == config["noise"]
        x, y, *_ = splits(name, config, "test")[0]
        for prior in (None, config["fixed_prior"]):
            likelihood: Any = functional(model, x, y, prior=prior).likelihood
            assert float(likelihood.noise_std * model.scaling.y_scale) == pytest.approx(config["noise"], rel=1e-6)
        for other in (model, fixed_twin(model, config)):
            assert other.noise_std is not None
            assert float(other.noise_std) == pytest.approx(config["noise"], rel=1e-6)
            assert not any(p.requires_grad for p in other.likelihood.parameters())


def test_fixed_prior_of_engines_and_of_the_network_fitted_to_a_task_is_the_same(config: dict[str, Any]) -> None:
    model = scaled("smooth", config)
    twin = fixed_twin(model, config)
    x, y, *_ = splits("smooth", config, "test")[0]
    target = functional(model, x, y, prior=config["fixed_prior"])
    for layer, other in zip(twin.prior, target.layers, strict=True):
        for one in (layer, other):
            assert torch.equal(one.mean, torch.zeros_like(one.mean))
            expected = torch.eye(one.p).expand(one.d_out, one.p, one.p) / one.p
            torch.testing.assert_close(one.covariance().float(), expected)
    assert not any(p.requires_grad for p in (*twin.prior.means(), *twin.prior.scales()))
    assert torch.equal(twin.scaling.y_scale, model.scaling.y_scale) and torch.equal(twin.scaling.x_shift, model.scaling.x_shift)


def test_amortised_row_is_the_model_and_the_oracle_row_the_process(config: dict[str, Any]) -> None:
    model, tasks = scaled("sawtooth", config), splits("sawtooth", config, "test")
    options = {"num_samples": 8, "seed": 0, "batch_size": 3}
    for kind, other in (("amortised", model), ("oracle", processes(config["noise"])["sawtooth"])):
        row = Answering("sawtooth", model, {"kind": kind}, "learned", config)
        found, wanted = evaluate(row, tasks, **options), evaluate(other, tasks, **options)
        assert all(torch.equal(found.per_task[name], values) for name, values in wanted.per_task.items())
        assert row.integrated is None and row.seconds > 0


def test_a_network_fitted_to_a_task_has_a_higher_bound_than_before(config: dict[str, Any]) -> None:
    model, tasks = scaled("smooth", config), splits("smooth", config, "test")[:1]
    bounds = []
    for steps in (1, 60):
        row = {"kind": "fit", "settings": {"steps": steps, "num_samples": 8, "learning_rate": 0.02}}
        answering = Answering("smooth", model, row, "fixed", config)
        evaluate(answering, tasks, num_samples=8, batch_size=1)
        bounds.append(answering.report["elbo"][0])
        assert answering.gradients == 8 * steps
    assert bounds[1] > bounds[0] + 5


def test_settings_are_those_best_on_their_own_tasks(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config["rows"] = {"a": {"kind": "engine", "engine": "hmc", "settings": {"draws": 2}, "trials": [{"x": 1}, {"x": 2}, {"x": 3}]}}
    joint = {1: [0.0, 1.0], 3: [2.0, -2.0]}
    asked = []

    def answered(cell: Cell, row: dict[str, Any], model: Any, tasks: list[Any], config: dict[str, Any]) -> dict[str, Any]:
        asked.append((len(tasks), row["settings"]))
        found = joint.get(row["settings"]["x"])
        return {"failed": "no"} if found is None else {"scores": {"as it is": {"joint": found}}}

    monkeypatch.setattr(run, "answer", answered)
    cell = Cell("smooth", "fixed", "a")
    assert run.choose(cell, tmp_path, build("smooth", config), config) == {"x": 1}
    assert asked == [(2, {"draws": 2, "x": x}) for x in (1, 2, 3)]
    assert run.choose(cell, tmp_path, build("smooth", config), config) == {"x": 1} and len(asked) == 3
    config["rows"]["a"]["trials"].pop()
    with pytest.raises(SystemExit, match="Got others"):
        run.choose(cell, tmp_path, build("smooth", config), config)


def _record(joint: list[float], seconds: float, rhat: list[float]) -> dict[str, Any]:
    scores = dict.fromkeys(run.SCORES, joint)
    return {"chosen": {}, "scores": {"as it is": scores}, "seconds": seconds, "gradients": 7, "report": {"rhat": rhat}}


def test_differences_are_paired_and_chains_that_did_not_mix_are_counted() -> None:
    records = {
        ("p", "learned", "amortised"): _record([1.0, 5.0], 2.0, []),
        ("p", "learned", "NUTS"): _record([2.0, 8.0], 50.0, [1.01, 3.0]),
        ("p", "fixed", "NUTS"): _record([0.0, 0.0], 50.0, [math.nan, math.inf]),
        ("p", "fixed", "SMC"): {"failed": "of one thing or another"},
    }
    table = summarise(records, ["amortised", "NUTS", "SMC"])
    row = table["p"]["learned"]["NUTS"]
    assert row["ahead of amortised"] == [2.0, pytest.approx(1.0)]
    assert row["as it is"]["joint"] == [5.0, pytest.approx(3.0)]
    assert (row["tasks_mixed"], row["seconds_per_task"]) == (1, 25.0)
    assert gains(table) == {"p": {"seconds": [25.0, 1.0], "times": 25.0, "given up": [2.0, pytest.approx(1.0)]}}
    assert "| SMC |  | failed |" in overview(table)
    assert table["p"]["fixed"]["NUTS"]["tasks_mixed"] == 0
    assert table["p"]["fixed"]["NUTS"]["report"]["rhat"][2] is None
    words = tables(table)
    assert "+2.000 ± 1.000" in words and "1 of 2" in words and "failed: of one thing" in words


def test_every_row_is_known(config: dict[str, Any]) -> None:
    for file in (None, QUICK):
        settings = read_config(file)
        assert {row["kind"] for row in settings["rows"].values()} <= set(KINDS)
        wanted = list(run.cells(settings))
        assert len({cell.name for cell in wanted}) == len(wanted)
        assert {cell.prior for cell in wanted if cell.row.startswith("amortised")} == {"learned"}
    full = read_config()
    assert full["sizes"]["test"] >= 16 and full["network"]["hidden"] == [48, 48]


@pytest.mark.slow
def test_the_study_in_miniature_is_resumed_and_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    run.main(["--quick", "--out", str(tmp_path)])
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "scores").iterdir()}
    settings = read_config(QUICK)
    assert len(files) == len(list(run.cells(settings)))
    monkeypatch.setattr(run, "answer", lambda *_: pytest.fail("run again"))
    run.main(["--quick", "--out", str(tmp_path)])
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "scores").iterdir()}
    table = json.loads((tmp_path / "results.json").read_text())["processes"]
    for priors in table.values():
        for rows in priors.values():
            for name, row in rows.items():
                assert "failed" not in row, (name, row)
                assert all(math.isfinite(row["as it is"][score][0]) for score in ("joint", "marginal", "crps", "rmse"))
    assert (tmp_path / "score_against_seconds.png").stat().st_size > 0
