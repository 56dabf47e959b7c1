"""Training: the same run whether or not it was interrupted; parts that are frozen stay; bad settings are refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bnnp
from bnnp import training
from bnnp.checkpoint import read_bundle


def tasks(n: int = 12, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        x = torch.rand(int(torch.randint(6, 12, (1,), generator=g)), 1, generator=g) * 4 - 2
        out.append((x, 10 + torch.randn(1, generator=g) * torch.sin(2 * x) + 0.1 * torch.randn(x.shape, generator=g)))
    return out


def model(**options: object) -> bnnp.BNNP:
    return bnnp.BNNP(1, 1, hidden=(6,), **options)  # type: ignore[arg-type]


FAST = {"steps": 12, "num_samples": 3, "progress": False, "validate_every": 4, "log_every": 3, "checkpoint_every": 5}


def same_parameters(a: bnnp.BNNP, b: bnnp.BNNP) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_training_raises_the_objective() -> None:
    m = model()
    result = bnnp.meta_train(m, tasks(40), steps=150, num_samples=4, progress=False, log_every=1, learning_rate=1e-2)
    values = [record["objective"] for record in result.history]
    assert sum(values[-20:]) > sum(values[:20])


@pytest.mark.parametrize("objective", sorted(bnnp.objectives.OBJECTIVES))
def test_every_objective_trains_and_leaves_finite_parameters(objective: str) -> None:
    m = model()
    result = bnnp.meta_train(m, tasks(), objective=objective, **{**FAST, "steps": 4})  # type: ignore[arg-type]
    assert result.skipped == 0
    assert all(bool(p.isfinite().all()) for p in m.parameters())


def test_the_same_seed_gives_the_same_run_and_another_seed_does_not() -> None:
    runs = []
    for seed in (1, 1, 2):
        m = model()
        bnnp.meta_train(m, tasks(), seed=seed, **FAST)  # type: ignore[arg-type]
        runs.append(m)
    assert same_parameters(runs[0], runs[1])
    assert not same_parameters(runs[0], runs[2])


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("when", ["before the gradient", "after the update"])
def test_an_interrupt_within_a_step_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    whole = model()
    bnnp.meta_train(whole, tasks(), **FAST)  # type: ignore[arg-type]
    objective, count = training._Run._objective, training._Run._count

    def stopping(run: training._Run, batch: bnnp.TaskBatch) -> torch.Tensor:
        value = objective(run, batch)
        if run.state.step == 7:
            raise Stop
        return value

    def stopping_late(run: training._Run, value: float, norm: float) -> None:
        if run.state.step == 7:
            raise Stop
        count(run, value, norm)

    name, how = ("_objective", stopping) if when == "before the gradient" else ("_count", stopping_late)
    monkeypatch.setattr(training._Run, name, how)
    with pytest.raises(Stop):
        bnnp.meta_train(model(), tasks(), folder=tmp_path, **FAST)  # type: ignore[arg-type]
    monkeypatch.undo()
    again = model()
    bnnp.meta_train(again, tasks(), folder=tmp_path, resume=True, **FAST)  # type: ignore[arg-type]
    assert same_parameters(whole, again)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str) -> None:
    whole = model()
    expected = bnnp.meta_train(whole, tasks(), validation=tasks(4, 9), folder=tmp_path / "a", keep=keep, **FAST)  # type: ignore[arg-type]

    part, step = model(), training._Run._step

    def stopping(run: training._Run) -> tuple[float, float]:
        if run.state.step == 7:
            raise Stop
        return step(run)

    monkeypatch.setattr(training._Run, "_step", stopping)
    with pytest.raises(Stop):
        bnnp.meta_train(part, tasks(), validation=tasks(4, 9), folder=tmp_path / "b", keep=keep, **FAST)  # type: ignore[arg-type]
    monkeypatch.undo()
    again = model()
    result = bnnp.meta_train(
        again,
        tasks(),
        validation=tasks(4, 9),
        folder=tmp_path / "b",
        keep=keep,
        resume=True,
        **FAST,  # type: ignore[arg-type]
    )
    assert same_parameters(whole, again)
    assert result.best_step == expected.best_step and result.best_score == expected.best_score
    assert result.history == expected.history
    logs = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (tmp_path / d / "log.jsonl").read_text().splitlines()]
        for d in "ab"
    ]
    assert logs[0] == logs[1] == expected.history


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, bnnp
torch.set_num_threads(1)
from test_training import model, tasks
bnnp.meta_train(model(), tasks(), steps=100_000, num_samples=3, folder={str(tmp_path)!r}, checkpoint_every=2, log_every=1, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            log = tmp_path / "log.jsonl"
            if log.exists() and log.read_text().count("\n") > 20:
                break
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    header, tensors = read_bundle(tmp_path / "state", "training")
    done = header["state"]["step"]
    assert done >= 2
    straight = model()
    settings = {"steps": 100_000, "num_samples": 3, "log_every": 1, "progress": False}
    run = _run_until(straight, done, settings)
    assert all(torch.equal(value, tensors[f"last.{key}"]) for key, value in run.state_dict().items())


def _run_until(m: bnnp.BNNP, step: int, settings: dict[str, object]) -> bnnp.BNNP:
    """Take the first steps of a long run without files."""
    original = training._Run._step

    def stopping(run: training._Run) -> tuple[float, float]:
        if run.state.step == step:
            raise Stop
        return original(run)

    training._Run._step = stopping  # type: ignore[method-assign]
    try:
        with pytest.raises(Stop):
            bnnp.meta_train(m, tasks(), **settings)  # type: ignore[arg-type]
    finally:
        training._Run._step = original  # type: ignore[method-assign]
    return m


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    bnnp.meta_train(model(), tasks(), folder=tmp_path, **FAST)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_samples 3 there and 4 here"):
        bnnp.meta_train(model(), tasks(), folder=tmp_path, resume=True, **{**FAST, "num_samples": 4})  # type: ignore[arg-type]


def test_a_checkpoint_of_other_tasks_is_refused(tmp_path: Path) -> None:
    bnnp.meta_train(model(), tasks(), folder=tmp_path, **FAST)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data"):
        bnnp.meta_train(model(), tasks(seed=3), folder=tmp_path, resume=True, **FAST)  # type: ignore[arg-type]


def test_without_a_finite_score_the_last_parameters_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    last = model()
    bnnp.meta_train(last, tasks(), **FAST)  # type: ignore[arg-type]
    monkeypatch.setattr(training._Run, "_validate", lambda run: math.nan)
    m = model()
    with pytest.warns(bnnp.NumericalWarning, match="last step"):
        result = bnnp.meta_train(m, tasks(), validation=tasks(3, 4), **FAST)  # type: ignore[arg-type]
    assert same_parameters(m, last) and result.best_score is None and result.best_step == FAST["steps"]


@pytest.mark.parametrize("offset", [1.7e9, 2.46e6])
def test_large_offsets_are_refused_in_float32_and_work_in_float64(offset: float) -> None:
    shifted = [(x.double() + offset, y) for x, y in tasks()]
    with pytest.raises(ValueError, match=r"Subtract an offset, or use float64: model\.double\(\)"):
        bnnp.meta_train(model(), shifted, **FAST)  # type: ignore[arg-type]
    bnnp.meta_train(model().double(), shifted, **FAST)  # type: ignore[arg-type]


def test_the_best_parameters_are_those_of_the_best_score(tmp_path: Path) -> None:
    m = model()
    result = bnnp.meta_train(m, tasks(), validation=tasks(6, 5), folder=tmp_path, **{**FAST, "learning_rate": 0.3})  # type: ignore[arg-type]
    scores = {r["step"]: r["validation"] for r in result.history if r["validation"] is not None}
    assert result.best_score == max(scores.values())
    assert scores[result.best_step] == result.best_score
    assert same_parameters(bnnp.load(tmp_path / "best"), m)


@pytest.mark.parametrize("kind", ["diagonal", "per_unit", "shared"])
@pytest.mark.parametrize("part", ["mean", "scale"])
def test_frozen_parts_of_the_prior_stay_and_the_rest_moves(kind: str, part: str) -> None:
    spec = bnnp.Prior(kind, learn_mean=part != "mean", learn_scale=part != "scale")
    m = model(prior=spec)
    before = {key: value.clone() for key, value in m.named_parameters()}
    bnnp.meta_train(m, tasks(), **FAST)  # type: ignore[arg-type]
    for key, value in m.named_parameters():
        frozen = ("relative_mean" in key) if part == "mean" else (".prior." in key and "relative_mean" not in key)
        moved = not torch.equal(value, before[key])
        assert moved != frozen, key


def test_the_prior_waits_until_its_step() -> None:
    m = model()
    before = {key: value.clone() for key, value in m.named_parameters() if ".prior." in key}
    settings = {**FAST, "prior_mean_from_step": 8, "prior_scale_from_step": 100}
    early = _run_until(model(), 8, settings)
    assert all(torch.equal(dict(early.named_parameters())[key], value) for key, value in before.items())
    bnnp.meta_train(m, tasks(), **settings)  # type: ignore[arg-type]
    after = dict(m.named_parameters())
    assert all(torch.equal(after[key], before[key]) == ("relative_mean" not in key) for key in before)


def test_steps_that_are_not_finite_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    original = training._Run._objective

    def broken(run: training._Run, batch: bnnp.TaskBatch) -> torch.Tensor:
        value = original(run, batch)
        return value * math.nan if run.state.step in (2, 3) else value

    monkeypatch.setattr(training._Run, "_objective", broken)
    m = model()
    result = bnnp.meta_train(m, tasks(), **FAST)  # type: ignore[arg-type]
    assert result.skipped == 2
    assert all(bool(p.isfinite().all()) for p in m.parameters())


def test_many_bad_steps_end_the_run_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training._Run, "_objective", lambda run, batch: sum(p.sum() for p in run.learned) * math.inf)
    with pytest.raises(bnnp.TrainingError, match=r"10 steps in a row.*learning_rate"):
        bnnp.meta_train(model(), tasks(), **FAST)  # type: ignore[arg-type]


def gradients(shrinkage: float, **settings: object) -> tuple[dict[str, torch.Tensor], bnnp.BNNP]:
    """Return the gradients of the first step, and the model after it."""
    m = model(prior=bnnp.Prior("per_unit", spread=0.5, input_scale=2.0)).double()
    options = {**FAST, "steps": 1, "validate_every": 1, "clip_norm": None, **settings}
    bnnp.meta_train(m, tasks(), shrinkage=shrinkage, **options)  # type: ignore[arg-type]
    return {key: p.grad for key, p in m.named_parameters() if p.grad is not None}, m


@pytest.mark.parametrize("per_point", [False, True])
@pytest.mark.parametrize("validation", [None, 0.25])
def test_shrinkage_adds_the_gradient_of_the_divergence_over_the_training_tasks(per_point: bool, validation: float | None) -> None:
    tau, settings = 3.0, {"per_point": per_point, "validation": validation}
    plain, _ = gradients(0.0, **settings)
    shrunk, _ = gradients(tau, **settings)
    at_start = model(prior=bnnp.Prior("per_unit", spread=0.5, input_scale=2.0)).double()
    at_start.prior.divergence().backward()
    kept, order = tasks(), torch.randperm(12, generator=training.seeded(0, "held out")).tolist()
    if validation is not None:
        kept = [kept[i] for i in order[3:]]
    units = sum(len(x) for x, _ in kept) if per_point else len(kept)
    for key, p in at_start.named_parameters():
        penalty = torch.zeros_like(p) if p.grad is None else p.grad * tau / units
        torch.testing.assert_close(shrunk[key] - plain[key], penalty, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["per_unit", "shared"])
def test_strong_shrinkage_leads_back_to_the_default(kind: str) -> None:
    m = model(prior=bnnp.Prior(kind, spread=0.5, scaled=False, input_scale=2.0))
    settings = {**FAST, "steps": 100, "num_samples": 2, "batch_size": 2, "learning_rate": 0.06, "final_learning_rate": 1e-3}
    start = float(m.prior.divergence().detach())
    result = bnnp.meta_train(m, tasks(), shrinkage=1e4, **settings)  # type: ignore[arg-type]
    logged = result.history[-1]["divergence"]
    assert logged == pytest.approx(float(m.prior.divergence().detach()), abs=1e-5)
    assert abs(logged) < 0.1 < 5 < start
    for layer in m.prior:
        torch.testing.assert_close(layer.covariance(), torch.eye(layer.p).expand(layer.d_out, -1, -1) / layer.p, rtol=0, atol=0.02)
        torch.testing.assert_close(layer.mean, torch.zeros_like(layer.mean), rtol=0, atol=0.02)


def test_validation_knows_nothing_of_the_penalty_and_the_objective_is_logged_without_it() -> None:
    still = {**FAST, "learning_rate": 1e-12, "final_learning_rate": 1e-12, "validation": 0.25}
    logs = []
    for tau in (0.0, 5.0):
        result = bnnp.meta_train(model(prior=bnnp.Prior(spread=0.5)), tasks(), shrinkage=tau, **still)  # type: ignore[arg-type]
        logs.append([r[key] for r in result.history for key in ("objective", "validation") if r[key] is not None])
    assert logs[0] == pytest.approx(logs[1])


def test_shrinkage_is_of_the_run_that_is_resumed(tmp_path: Path) -> None:
    bnnp.meta_train(model(), tasks(), folder=tmp_path, **FAST)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shrinkage 0\.0 there and 0\.5 here"):
        bnnp.meta_train(model(), tasks(), folder=tmp_path, resume=True, shrinkage=0.5, **FAST)  # type: ignore[arg-type]
    # A checkpoint from before there was shrinkage had none.
    path = tmp_path / "state" / "training.json"
    header = json.loads(path.read_text())
    del header["settings"]["shrinkage"]
    path.write_text(json.dumps(header))
    bnnp.meta_train(model(), tasks(), folder=tmp_path, resume=True, **FAST)  # type: ignore[arg-type]


def test_a_fixed_prior_cannot_be_shrunk() -> None:
    for spec in (bnnp.Prior(learn_mean=False, learn_scale=False), bnnp.Prior(fraction=0.0)):
        with pytest.raises(ValueError, match="prior that is learned"):
            bnnp.meta_train(model(prior=spec), tasks(), shrinkage=0.1, **FAST)  # type: ignore[arg-type]


BAD_SETTINGS = {
    "negative steps": ({"steps": -1}, "steps as a positive integer. Got -1"),
    "no steps": ({"steps": 0}, "steps as a positive integer"),
    "unknown objective": ({"objective": "elbo"}, "objective among"),
    "negative rate": ({"learning_rate": -1.0}, "learning_rate to be positive"),
    "context above the task": ({"context": (20, 30)}, "contexts smaller than every task"),
    "proportion above one": ({"context": (0.5, 1.5)}, "range of proportions"),
    "empty range": ({"context": (0.6, 0.2)}, "low to high"),
    "no folder to resume": ({"resume": True}, "folder= to resume"),
    "keep": ({"keep": "first"}, "keep as"),
    "no checkpoints": ({"checkpoint_every": 0}, "checkpoint_every as a positive integer"),
    "no validations": ({"validate_every": 0}, "validate_every as a positive integer"),
    "one number": ({"context": 0.5}, "range \\(low, high\\)"),
    "text": ({"learning_rate": "fast"}, "learning_rate to be positive"),
    "negative start": ({"prior_mean_from_step": -1}, "prior_mean_from_step as a step"),
    "negative shrinkage": ({"shrinkage": -0.1}, "shrinkage in nats, 0 or more"),
    "shrinkage without end": ({"shrinkage": math.inf}, "shrinkage in nats"),
    "validation share": ({"validation": 1.5}, "proportion with tasks on both sides"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_get_one_clear_error(case: str, tmp_path: Path) -> None:
    settings, words = BAD_SETTINGS[case]
    with pytest.raises(ValueError, match=words):
        bnnp.meta_train(model(), tasks(), **{**FAST, **settings})  # type: ignore[arg-type]


def test_one_task_is_no_collection() -> None:
    x, y = tasks(1)[0]
    with pytest.raises(ValueError, match="single data set"):
        bnnp.meta_train(model(), (x, y), **FAST)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 2 tasks"):
        bnnp.meta_train(model(), [(x, y)], **FAST)  # type: ignore[arg-type]


def test_a_fixed_noise_keeps_its_size_in_the_units_of_y() -> None:
    big = [(x, 1000 * y) for x, y in tasks()]
    m = model(likelihood=bnnp.Gaussian(noise_std=30.0, learn_noise=False))
    bnnp.meta_train(m, big, **FAST)  # type: ignore[arg-type]
    noise = m.noise_std
    assert noise is not None
    torch.testing.assert_close(noise, torch.tensor([30.0]))
    p = m.condition(*big[0], num_samples=4).predict(big[1][0])
    torch.testing.assert_close((p.std**2 - p.epistemic_std**2).sqrt(), torch.full_like(p.std, 30.0), rtol=1e-3, atol=0)


def test_a_bound_may_be_below_the_start_of_a_learned_noise() -> None:
    """The start is relative to the spread of y, the bound in its units: they do not compare."""
    small = [(x, 0.01 * y) for x, y in tasks()]
    m = model(likelihood=bnnp.Gaussian(noise_std=0.1, max_noise_std=0.05))
    bnnp.meta_train(m, small, **FAST)  # type: ignore[arg-type]
    assert m.noise_std is not None and 0 < float(m.noise_std) < 0.05


def test_a_bound_on_the_noise_holds_in_the_units_of_y() -> None:
    big = [(x, 1000 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))) for i, (x, _) in enumerate(tasks())]
    m = model(likelihood=bnnp.Gaussian(noise_std=0.1, max_noise_std=200.0))
    bnnp.meta_train(m, big, **{**FAST, "learning_rate": 0.3})  # type: ignore[arg-type]
    noise = m.noise_std
    assert noise is not None and 0 < float(noise) < 200.0
