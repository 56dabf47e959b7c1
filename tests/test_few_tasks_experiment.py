"""The study of few tasks: what its rivals are, who sees which tasks, what is chosen, and a run in miniature."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments.few_tasks import pictures, run
from experiments.few_tasks.baselines import LearnedGP, _marginal, _padded, fit
from experiments.few_tasks.sources import PROCESSES, abalone, process
from experiments.few_tasks.summary import METHODS, summarise, text
from torch import Tensor

from bnnp.data import CauchyBumps

CONFIG = {
    **run.settings(),
    "sizes": [2, 5, 20],
    "seeds": [1, 2],
    "fractions": [0.5],
    "shrinkages": [0.1],
    "large": {"20": ["fixed", "learned"]},
    "folds": {"2": 2, "5": 2},
    "held_out": {"20": 5},
    "learn_again_below": 20,
    "splits": 1,
    "test_tasks": 2,
    "targets": 4,
    "num_samples": 4,
}
CONFIG["model"] = {**CONFIG["model"], "hidden": [4]}
CONFIG["training"] = {**CONFIG["training"], "steps": 1, "num_samples": 2}


def animals(folder: Path) -> Path:
    """Write a small table in the format of the abalones."""
    rng, rows = np.random.default_rng(0), []
    for sex, count in (("M", 60), ("F", 50), ("I", 130)):
        for _ in range(count):
            size = rng.uniform(0.1, 0.8)
            rows.append(",".join([sex, *(f"{size * rng.uniform(0.8, 1.2):.4f}" for _ in range(7)), str(int(20 * size) + 1)]))
    (folder / "abalone").mkdir()
    (folder / "abalone" / "abalone.data").write_text("\n".join(rows) + "\n")
    return folder


def test_marginal_likelihood_of_a_rival_is_that_of_dense_normals() -> None:
    tasks = [(t.x[:n].double(), t.y[:n].double()) for t, n in zip(CauchyBumps().tasks(3, 0, 8), (8, 3, 5), strict=True)]
    gp = fit(tasks, steps=3)
    noise = torch.tensor(gp.noise_std, dtype=torch.float64)
    got = _marginal(gp, noise, *_padded(tasks))
    want = 0.0
    for x, y in tasks:
        K = gp.kernel(x, x) + noise**2 * torch.eye(len(x), dtype=x.dtype)
        want += float(torch.distributions.MultivariateNormal(gp.mean(x)[:, 0], K).log_prob(y[:, 0]))
    assert float(got) == pytest.approx(want, abs=1e-8)


def test_a_rival_finds_the_numbers_of_a_known_process() -> None:
    one, two = torch.ones((), dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    true = LearnedGP(
        noise_std=0.1, level=2 * one, constant=0.5 * one, slopes=0.3 * two, smooth=one, lengths=0.7 * two, centre=0 * two, unit=two
    )
    g = torch.Generator().manual_seed(0)
    tasks: list[tuple[Tensor, Tensor]] = []
    for _ in range(60):
        x = 4 * torch.rand(25, 2, generator=g, dtype=torch.float64) - 2
        f = true._draw(x.unsqueeze(0), 1, g)[0][0]
        tasks.append((x, f + 0.1 * torch.randn(25, 1, generator=g, dtype=torch.float64)))
    found, noise = fit(tasks), 0.1
    assert found.noise_std == pytest.approx(noise, rel=0.15)
    assert float(found.smooth) == pytest.approx(1.0, rel=0.15)
    assert (found.lengths * found.unit).tolist() == pytest.approx([0.7, 0.7], rel=0.15)
    assert float(found.level) == pytest.approx(2.0, abs=0.5)
    x, y = tasks[0]
    plain = fit(tasks, smooth=False)
    assert not bool(plain.smooth) and not bool(plain.slopes.any())
    assert float(found.log_prob(x[:5], y[:5], x[5:], y[5:])) > float(plain.log_prob(x[:5], y[:5], x[5:], y[5:]))


@pytest.mark.parametrize("source", PROCESSES)
def test_folds_hold_out_what_is_validated_on_and_seeds_share_no_task(source: str) -> None:
    for size in CONFIG["sizes"]:
        collection = process(source, size, 1, CONFIG)
        assert len(collection.tasks) == size
        for k, fold in enumerate(collection.folds):
            kept = {float(v) for x, _ in collection.train(k) for v in x[:, 0]}
            asked = {float(v) for xc, _, xt, _ in collection.validation[k] for v in torch.cat([xc, xt])[:, 0]}
            assert len(collection.train(k)) == size - len(fold) and not kept & asked
            assert asked == {float(v) for i in fold for v in collection.tasks[i][0][:, 0]}
    larger, smaller = (process(source, size, 1, CONFIG) for size in (20, 5))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(larger.tasks, smaller.tasks, strict=False))
    assert not torch.equal(process(source, 2, 2, CONFIG).tasks[0][0], smaller.tasks[0][0])
    test = smaller.test["test"]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(test, process(source, 2, 2, CONFIG).test["test"], strict=True))
    assert {len(xc) for xc, _, _, _ in test} == {CONFIG["sources"][source]["test_context"]}


def test_abalones_are_learned_from_two_sexes_and_tested_on_the_third(tmp_path: Path) -> None:
    data = animals(tmp_path)
    whole, bins = (abalone(data, variant, 1, CONFIG) for variant in ("whole", "size bins"))
    assert [len(x) for x, _ in whole.tasks] == [60, 50] and len(bins.tasks) == 20
    assert torch.equal(torch.cat([x for x, _ in bins.tasks[:10]]).sort(0).values, whole.tasks[0][0].sort(0).values)
    edges = [(float(x[:, 0].min()), float(x[:, 0].max())) for x, _ in bins.tasks[:10]]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(edges))
    for a, b in zip(whole.validation[0], bins.validation[0], strict=True):
        assert torch.equal(a[0], b[0])
    assert [len(split[0]) for split in whole.test["50 seen"]] == [50] * CONFIG["abalone"]["test_splits"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[Any, Any]]:
    """Run the study in miniature."""
    data, out = animals(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("out")
    small = {**CONFIG["abalone"], "candidates": ["fixed", "learned", "shrinkage 0.1"], "test_splits": 1, "validation_splits": 1, "steps": 1}
    config = {**CONFIG, "abalone": {**small, "variants": {"size bins": 2}, "test_contexts": [20]}}
    return out, config, run.collect(out, config, data, progress=False)


def test_a_run_in_miniature_is_resumed_and_summed_up(done: tuple[Path, dict[str, Any], dict[Any, Any]], tmp_path: Path) -> None:
    out, config, found = done
    files = {file: file.stat().st_mtime_ns for file in out.rglob("*.json")}
    assert len(files) == len(found)
    again = run.collect(out, config, tmp_path, progress=False)  # without the abalones
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.json")} == files
    assert all(json.dumps(record) == json.dumps(found[job]) for job, record in again.items()) and len(again) < len(found)
    report = summarise(found, config)
    json.dumps(report)
    assert report["trainings"] == sum("divergence" in record for record in found.values())
    words = text(report)
    assert all(method in words for method in METHODS) and "abalone, 20 seen: rmse" in words
    assert len(pictures.scores({name: report[name] for name in PROCESSES}).axes) == 6
    assert len(pictures.dials({name: report[name] for name in PROCESSES}).axes) == 12
    assert len(pictures.abalone(report["abalone"]).axes) == 2


def test_a_method_is_the_candidate_that_held_out_tasks_chose(done: tuple[Path, dict[str, Any], dict[Any, Any]]) -> None:
    _, config, found = done
    group = summarise(found, config)["sinusoid"]["5 tasks"]
    for i, seed in enumerate(group["seeds"]):
        held_out = {}
        for name in ("fixed", "learned", "shrinkage 0.1"):
            own = [
                r["validation"]["joint"]
                for job, r in found.items()
                if (job.source, job.group) == ("sinusoid", "5 tasks")
                if job.seed == seed and job.candidate == name and job.fold is not None
            ]
            assert len(own) == 2
            held_out[name] = np.mean(np.concatenate(own))
            assert group["validation"][name][i] == pytest.approx(held_out[name])
        best = max(held_out, key=lambda name: held_out[name])
        assert group["chosen"]["shrunk"][i] == best
        last = next(
            r
            for job, r in found.items()
            if (job.source, job.group, job.seed, job.candidate, job.fold) == ("sinusoid", "5 tasks", seed, best, None)
        )
        assert group["scores"]["shrunk, chosen"]["test"]["rmse"][i] == pytest.approx(np.mean(last["test"]["test"]["rmse"]))
    hindsight = group["hindsight"]["fraction"]
    tests = {name: np.mean(group["scores"][name]["test"]["joint"]) for name in ("fixed", "fraction 0.5", "learned")}
    assert tests[hindsight] == max(tests.values()) and math.isfinite(tests[hindsight])


def test_the_fixed_candidate_is_the_default_and_stays(done: tuple[Path, dict[str, Any], dict[Any, Any]]) -> None:
    _, _, found = done
    divergences = {job.candidate: record["divergence"] for job, record in found.items() if "divergence" in record}
    assert divergences["fixed"] == pytest.approx(0, abs=1e-4) and divergences["learned"] > 1
    model, tau = run.build("shrinkage 0.1", 3.0, 1, 0, CONFIG)
    assert tau == 0.1 and model.config["prior"]["input_scale"] == 3.0
