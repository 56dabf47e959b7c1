"""The study of posterior quality: fits of many tasks at once are fits of each, bounds are bounds, and a run in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments.posterior_quality import pictures, run
from experiments.posterior_quality.fitted import VARIANTS, PerTask, build, fit, fitted_model, sampled_avi
from experiments.posterior_quality.methods import METHODS
from experiments.posterior_quality.problem import scored_tasks, training_tasks, validation_tasks
from experiments.posterior_quality.summary import divergence, judge, summarise, tables
from torch import Tensor

from bnnp.inference import ENGINES, functional
from bnnp.objectives import avi
from bnnp.tasks import Context, TaskBatch, collate

CONFIG = {**run.read_config(run.HERE / "quick.json"), "hidden": [4, 3], "net_hidden": [5]}


def batch_of(tasks: list[tuple[Tensor, Tensor]]) -> TaskBatch:
    context = collate(tasks)
    return TaskBatch(context, Context.empty(len(tasks), 1, 1, context.x))


def test_networks_of_several_tasks_are_each_its_own() -> None:
    seeds = [3, 4]
    stacked, x = fitted_model(CONFIG, 0.1, seeds, "amortised"), torch.randn(7, 2, 6, 2, dtype=torch.float64)
    for i, layer in enumerate(stacked.layers):
        assert isinstance(layer.net, PerTask)
        each = [build(CONFIG, 0.1, seed, "amortised").double().layers[i].net(x[:, t]) for t, seed in enumerate(seeds)]
        torch.testing.assert_close(layer.net(x), torch.stack(each, dim=1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_task_moves_only_its_own_networks(variant: str) -> None:
    last_layer, objective = VARIANTS[variant]
    model, tasks = fitted_model(CONFIG, 0.1, [0, 1], last_layer), scored_tasks(CONFIG)
    value = objective(model, batch_of([(t.x, t.y) for t in tasks]), 3, torch.Generator().manual_seed(0))
    value[1].backward()
    for parameter in (p for p in model.parameters() if p.requires_grad):
        assert parameter.grad is not None
        assert float(parameter.grad[0].abs().sum()) == 0.0
    assert sum(float(p.grad[1].abs().sum()) for p in model.parameters() if p.grad is not None) > 0


def test_a_drawn_last_layer_has_the_bound_of_the_collapsed_one_and_more_noise() -> None:
    model, task = fitted_model(CONFIG, 0.5, [0]), scored_tasks(CONFIG)[0]
    batch, n = batch_of([(task.x, task.y)]), 400
    with torch.no_grad():
        found = {}
        for objective in (avi, sampled_avi):
            each = torch.cat([objective(model, batch, 8, torch.Generator().manual_seed(i)) for i in range(n)])
            found[objective.__name__] = each.mean(), each.std() / n**0.5
    (a, ea), (b, eb) = found["avi"], found["sampled_avi"]
    assert abs(a - b) < 5 * (ea**2 + eb**2) ** 0.5
    assert eb > 1.5 * ea


def test_fitting_raises_the_bound_and_leaves_the_prior_alone() -> None:
    tasks = scored_tasks(CONFIG)
    model = fitted_model(CONFIG, 0.3, [0, 1])
    before = [p.clone() for layer in model.layers for p in layer.prior.parameters()]
    batch = batch_of([(t.x, t.y) for t in tasks])
    start = avi(model, batch, 200, torch.Generator().manual_seed(0))
    fit(model, tasks, avi, {"steps": 60, "samples": 4, "learning_rate": 0.01, "final_learning_rate": 0.001}, 0)
    assert bool((avi(model, batch, 200, torch.Generator().manual_seed(0)) > start).all())
    after = [p for layer in model.layers for p in layer.prior.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_inferring_only_the_last_layer_has_the_bound_of_draws_from_the_prior(tmp_path: Path) -> None:
    config = {**CONFIG, "particles": 4000}
    found, tasks = METHODS["prior"](config, {}, 0.3, 0, tmp_path), scored_tasks(config)
    F = functional(build(config, 0.3, 0), [t.x for t in tasks], [t.y for t in tasks], collapse=True)
    eps = torch.randn(4000, F.num_tasks, F.dim, generator=torch.Generator().manual_seed(1), dtype=F.dtype)
    want = F.log_likelihood(eps)
    error = (want.var(0) / 4000 + torch.tensor(found["error"][0]) ** 2).sqrt()
    assert bool(((torch.tensor(found["value"][0]) - want.mean(0)).abs() < 5 * error).all())


def test_everyone_gets_the_same_prior_tasks_and_noise() -> None:
    config = run.read_config()
    model, task = build(config, 0.0346, 0), scored_tasks(config)[0]
    assert model.noise_std is not None and float(model.noise_std) == pytest.approx(0.0346)
    for W in model.prior.sample(4000, torch.Generator().manual_seed(0)):
        assert float(W.std()) == pytest.approx(W.shape[-1] ** -0.5, rel=0.05)
    assert not any(p.requires_grad for layer in model.layers for p in layer.prior.parameters())
    assert len({t.y[0].item() for t in (*scored_tasks(config), *validation_tasks(config))}) == 8
    few = {**config, "meta": {**config["meta"], "tasks": 3}}
    assert not any(torch.equal(t.x[:1], task.x[:1]) for t in training_tasks(few))
    for file in ("config.json", "quick.json"):
        plans = run.read_config(run.HERE / file)["methods"]
        assert all(plan["kind"] in METHODS and plan.get("engine", "nuts") in ENGINES for plan in plans.values())


def test_divergences_and_their_errors_are_those_of_paper_and_pencil() -> None:
    evidence = {"value": [1.0, 4.0], "error": [0.3, 0.4]}
    found = divergence(evidence, [[0.0, 1.0], [0.5, 2.0]], [[0.1, 0.1], [0.1, 0.1]])
    assert found["kl"] == [[1.0, 3.0], [0.5, 2.0]]
    assert found["mean"] == pytest.approx(1.625)
    assert found["by_seed"] == [2.0, 1.25]
    assert found["error"] == pytest.approx((0.25 / 4 + 0.04 / 16) ** 0.5)
    assert not found["within_error"]
    judged = judge(evidence, {"value": [2.0, 4.05], "error": [0.0, 0.0]})
    assert judged["less_reference"] == pytest.approx([1.0, 0.05])
    assert (judged["agree"], judged["of"]) == (1, 2)  # 1.0 is more than three errors of 0.3


def records(config: dict[str, Any]) -> dict[Any, Any]:
    row = {"value": [[1.0, 2.0]], "error": [[0.1, 0.1]], "seconds": 3.0}
    return {
        (m, noise, plan.get("seeds", [None])[0]): {**row, **({"pareto_k": [[0.1, 0.9]]} if plan["kind"] == "importance" else {})}
        for m, plan in config["methods"].items()
        for noise in config["noises"]
    }


def test_where_populations_do_not_agree_the_error_is_the_distance_of_two_estimates() -> None:
    config = run.read_config(run.HERE / "quick.json")
    found = records(config)
    found["tempered from the prior", 1.0, None] |= {"error": [[1.0, 0.1]], "bennett": [[-3.0, 2.5]], "bennett_error": [[0.2, 0.2]]}
    of = summarise(found, config)["evidence"]["1"]
    assert of["estimates"]["tempered from the prior"]["error"] == [4.0, 0.1]
    assert of["against_reference"]["tempered from the prior, bridged"]["agree"] == 2
    other = summarise(found, {**config, "reference_at": {"1": "importance from the amortised"}})["evidence"]["1"]
    assert other["reference"] == "importance from the amortised"


def test_a_summary_has_a_line_for_each_method_and_pictures_show_them() -> None:
    config = run.read_config(run.HERE / "quick.json")
    table = summarise(records(config), config)
    assert json.loads(json.dumps(table)) == table
    words = tables(table)
    assert all(f"| {m} |" in words for m in config["methods"])
    fig = pictures.divergences(table)
    drawn = {text.get_text() for ax in fig.axes for text in ax.get_legend().get_texts()}
    assert drawn == {m for m, plan in config["methods"].items() if not plan.get("evidence")}
    titles = {ax.get_title(loc=at) for ax in pictures.estimates(table).axes for at in ("left", "center")} - {""}
    assert titles == {m for m, plan in config["methods"].items() if plan.get("evidence")} - {config["reference"]}


@pytest.mark.slow
def test_the_quick_study_runs_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["--quick", "--out", str(tmp_path)])
    first = json.loads((tmp_path / "results.json").read_text())
    config = run.read_config(run.HERE / "quick.json")
    assert set(first["methods"]) == {m for m, plan in config["methods"].items() if not plan.get("evidence")}
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("divergences", "evidence"))
    # Bounds are below the evidence, to the errors of both; at noise 1 even these short runs agree on it.
    for of in first["methods"].values():
        assert all(row["mean"] > -4 * row["error"] for row in of.values())
    for judged in first["evidence"]["1"]["against_reference"].values():
        assert judged["agree"] == judged["of"]
    (tmp_path / "cells" / "GIVI_1.json").unlink()
    capsys.readouterr()
    run.main(["--quick", "--out", str(tmp_path)])
    said = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" s") and ":" in line]
    assert [line.split(":")[0] for line in said] == ["GIVI_1"]
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["methods"]["GIVI"]["1"]["bounds"] == first["methods"]["GIVI"]["1"]["bounds"]
