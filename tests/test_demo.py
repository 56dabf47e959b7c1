"""The demos leave what they promise, compare fairly, go on where they were stopped, and say where they lose."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import bnnp
from bnnp.demos import common, digits, sawtooth
from bnnp.demos.common import Scores, Table, Worker

TINY: dict[str, dict[str, Any]] = {
    "digits": {"steps": 6, "num_train": 60, "num_test": 4},
    "sawtooth": {"steps": 6, "num_train": 40, "num_test": 4},
}
RUN = {"digits": digits.run, "sawtooth": sawtooth.run}
MODULE = {"digits": digits, "sawtooth": sawtooth}


@pytest.fixture(scope="module", params=sorted(RUN))
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, common.DemoResult]:
    """Return the name and the result of a demo with next to no training."""
    name: str = request.param
    return name, RUN[name](tmp_path_factory.mktemp(name), progress=False, **TINY[name])


def test_a_demo_leaves_its_files(done: tuple[str, common.DemoResult]) -> None:
    name, result = done
    written = json.loads((result.out / "results.json").read_text())
    assert written == json.loads(json.dumps(result.results))
    assert written["dataset"] == name and written["steps"] == 6 and written["reused_training"] is False
    page = (result.out / "results.md").read_text()
    for path, what in result.pictures:
        assert path.stat().st_size > 10_000 and path.read_bytes()[:4] == b"\x89PNG"
        assert f"![{what}]({path.name})" in page
    assert {path.name for path in result.out.glob("*.png")} == set(written["pictures"])
    assert not list(result.out.rglob("*.part*")) and not list(result.out.glob(".*"))
    assert bnnp.load(result.out / "model").x_dim == {"digits": 2, "sawtooth": 1}[name]


def test_every_method_is_scored_at_every_condition(done: tuple[str, common.DemoResult]) -> None:
    name, result = done
    module = MODULE[name]
    scores = result.results["scores"]
    assert list(scores) == list(module.METHODS)
    for of in scores.values():
        assert list(of) == list(module.CONDITIONS)
        for values in of.values():
            numbers = [values[key][part] for key in ("joint", "marginal", "crps", "rmse") for part in ("mean", "se")]
            assert all(math.isfinite(number) for number in numbers)
            assert all(0.0 <= share <= 1.0 for share in values["coverage"].values())
    for table in result.tables:
        assert all(len(row) == len(table.header) for row in table.rows)


def test_a_second_run_trains_nothing_and_finds_the_same(done: tuple[str, common.DemoResult]) -> None:
    name, first = done
    logs = {path: path.read_bytes() for path in first.out.rglob("log.jsonl")}
    assert len(logs) == 2
    second = RUN[name](first.out, progress=False, **TINY[name])
    assert second.results["reused_training"] is True
    assert second.results["scores"] == first.results["scores"]
    assert {path: path.read_bytes() for path in first.out.rglob("log.jsonl")} == logs


def test_a_stopped_training_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = digits.load(60, 4)
    whole, halved, again = (digits.learned_model(0) for _ in range(3))
    digits.fit(whole, images, tmp_path / "whole", 6, 0, progress=False)
    objective = bnnp.training._Run._objective

    def stop(run: Any, batch: Any) -> torch.Tensor:
        if run.state.step == 4:
            raise KeyboardInterrupt
        return objective(run, batch)

    monkeypatch.setattr(bnnp.training._Run, "_objective", stop)
    with pytest.raises(KeyboardInterrupt):
        digits.fit(halved, images, tmp_path / "halved", 6, 0, progress=False)
    monkeypatch.undo()
    assert 0 < common.steps_done(tmp_path / "halved") < 6
    digits.fit(again, images, tmp_path / "halved", 6, 0, progress=False)
    assert common.steps_done(tmp_path / "halved") == 6
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_an_old_run_with_other_settings_is_refused_with_the_way_out(tmp_path: Path) -> None:
    images = digits.load(60, 4)
    digits.fit(digits.learned_model(0), images, tmp_path, 2, 0, progress=False)
    with pytest.raises(ValueError, match="--fresh"):
        digits.fit(digits.fixed_model(0), images, tmp_path, 2, 0, progress=False)


def test_fresh_empties_the_folder_of_the_run_and_no_other(tmp_path: Path) -> None:
    mine, other = common.run_folder(tmp_path, 3, 0, fresh=False), common.run_folder(tmp_path, 4, 0, fresh=False)
    for folder in (mine, other):
        (folder / "file").write_text("old")
    assert common.run_folder(tmp_path, 3, 0, fresh=False) == mine and (mine / "file").exists()
    assert common.run_folder(tmp_path, 3, 0, fresh=True) == mine and not (mine / "file").exists()
    assert (other / "file").exists()
    for steps in (0, -1, True):
        with pytest.raises(ValueError, match="steps"):
            common.run_folder(tmp_path, steps, 0, fresh=False)


def test_digits_are_completed_as_by_a_loop_over_images() -> None:
    images = digits.load(60, 3)
    model = digits.fixed_model(0)
    model.fit_scaling(bnnp.tasks.as_tasks(digits.to_tasks(images.train), 2, 1, model.dtype))
    scored, (x, _) = digits.complete(model, images.test, images.seen[1], seed=5), digits.to_tasks(images.test)[0]
    for i, (truth, seen) in enumerate(zip(images.test, images.seen[1], strict=True)):
        xc, yc = x[torch.from_numpy(seen)], torch.from_numpy(truth[seen, None])
        predictive = model.condition(xc, yc, num_samples=digits.PARTICLES, seed=5).predict(x[torch.from_numpy(~seen)])
        yt = torch.from_numpy(truth[~seen, None])
        c = scored
        close = {"rtol": 2e-3, "atol": 2e-3}
        np.testing.assert_allclose(c.mean[i, ~seen], predictive.mean[:, 0], **close)
        np.testing.assert_allclose(c.std[i, ~seen], predictive.std[:, 0], **close)
        np.testing.assert_allclose(c.pit[i, ~seen], predictive.cdf(yt)[:, 0], **close)
        np.testing.assert_allclose(c.joint[i], predictive.log_prob(yt, joint=True) / len(yt), **close)
        np.testing.assert_allclose(c.marginal[i], predictive.log_prob(yt).mean(), **close)
        assert np.isnan(c.pit[i, seen]).all() and (c.mean[i, seen] == truth[seen]).all()


def test_a_completion_survives_the_file_between_the_processes(tmp_path: Path) -> None:
    images = digits.load(60, 3)
    (scored, *_) = digits.gaussian_rivals(images)[digits.PIXEL]
    common.write_arrays(tmp_path / "a.npz", {**digits.flat_arrays("A/10", scored), **digits.flat_arrays("AA/10", scored)})
    back = digits.read(tmp_path / "a.npz", "A/10", images.test)
    for name in ("mean", "joint", "marginal", "pit", "crps", "unseen"):
        np.testing.assert_array_equal(getattr(back, name), getattr(scored, name))


def test_seen_pixels_are_nested_and_no_test_image_is_learned_from() -> None:
    images = digits.load()
    ten, quarter, half = images.seen
    assert (ten <= quarter).all() and (quarter <= half).all() and ten.sum() < quarter.sum() < half.sum()
    rows = {name: {row.tobytes() for row in getattr(images, name)} for name in ("train", "validation", "test")}
    assert len(set.union(*rows.values())) == sum(len(part) for part in rows.values()) == 1797


def test_the_smooth_gp_is_the_likeliest_of_the_grid() -> None:
    tasks = sawtooth.PROCESS.tasks(6, seed=0, num_points=12)
    found = sawtooth.tuned_gp(tasks, num_tasks=5, num_points=10)

    def evidence(lengthscale: float, amplitude: float, noise: float) -> float:
        total = 0.0
        for x, y in tasks[:5]:
            x, y = x[:10].double(), y[:10, 0].double()
            K = amplitude**2 * torch.exp(-0.5 * (x - x.T) ** 2 / lengthscale**2) + noise**2 * torch.eye(10).double()
            total += float(MultivariateNormal(torch.zeros(10).double(), K).log_prob(y))
        return total

    best = evidence(found.lengthscale, math.sqrt(found.variance), found.noise_std)
    for lengthscale in sawtooth.LENGTHSCALES[::3]:
        for amplitude in sawtooth.AMPLITUDES[::2]:
            assert best >= evidence(lengthscale, amplitude, sawtooth.NOISES[2]) - 1e-6


def test_the_oracle_of_the_sawtooth_is_beaten_by_nobody() -> None:
    test = sawtooth.test_tasks(60)
    oracle = sawtooth.score(sawtooth.PROCESS, test, 0)
    smooth = sawtooth.score(sawtooth.tuned_gp(sawtooth.PROCESS.tasks(64, 0)), test, 0)
    for name in sawtooth.CONDITIONS:
        assert oracle[f"{name}/joint"].mean() > smooth[f"{name}/joint"].mean() + 0.5


def invented() -> Scores:
    ours = np.array([1.0, 2.0, 3.0])
    coverage = np.array([[0.5, 0.8, 0.9], [0.5, 0.8, 1.0], [0.5, 0.8, 1.0]])

    def condition(joint: np.ndarray) -> dict[str, np.ndarray]:
        return {"joint": joint, "marginal": joint, "crps": joint, "rmse": joint, "coverage": coverage}

    return {
        "us": {"a": condition(ours)},
        "weak": {"a": condition(ours - 0.5)},
        "strong": {"a": condition(ours + np.array([0.9, 1.0, 1.1]))},
    }


def test_differences_are_paired_and_have_the_right_sign() -> None:
    compared = common.comparison(invented(), "us")
    # Scores spread by 1 over the tasks; paired, the difference to the weak rival does not spread at all.
    assert compared["weak"]["a"] == (0.5, 0.0)
    mean, error = compared["strong"]["a"]
    assert mean == pytest.approx(-1.0) and error == pytest.approx(0.1 / math.sqrt(3))
    assert common.joint_table(invented(), "point").rows[0] == ("us", "2.000 ± 0.577")
    against = common.difference_table(invented(), "us")
    assert against.rows == (("weak", "a", "better by 0.500 ± 0.000"), ("strong", "a", "worse by 1.000 ± 0.058"))
    assert common.other_table(invented(), "point").rows[0] == ("a", "us", "2.000", "2.000", "2.000", "50 / 80 / 97")


@pytest.mark.parametrize(
    ("mean", "error", "words"),
    [(0.3, 0.1, "better by 0.300 ± 0.100"), (-0.3, 0.1, "worse by 0.300 ± 0.100"), (0.2, 0.1, "no clear difference (+0.200 ± 0.100)")],
)
def test_a_difference_within_two_standard_errors_is_none(mean: float, error: float, words: str) -> None:
    assert common.verdict(mean, error) == words


def test_remarks_tell_where_we_lose() -> None:
    def results(ahead: bool) -> dict[str, Any]:
        return {
            "better_by_two_standard_errors_everywhere": {rival: ahead or rival != digits.GP for rival in digits.METHODS[1:]},
            "difference": {digits.MVN: {c: {"verdict": "worse by 0.400 ± 0.010"} for c in digits.CONDITIONS}},
        }

    lost, won = (" ".join(digits.remarks(results(ahead), 359)) for ahead in (False, True))
    assert f"no, not than {digits.GP}" in lost and "standard errors: yes." in won
    assert "worse by 0.400" in lost and "worse by 0.400" in won


def test_a_table_becomes_markdown() -> None:
    assert Table("T", ("a", "b"), (("x", "1"),)).markdown() == "**T**\n\n| a | b |\n| --- | ---: |\n| x | 1 |"


def leave_a_note(path: str) -> None:
    Path(path).write_text(f"{torch.get_num_threads()} {os.getpid()}")


def fail(message: str) -> None:
    raise OSError(message)


def wait_to_be_stopped(path: str) -> None:
    try:
        Path(path).write_text("started")
        for _ in range(1200):
            time.sleep(0.05)
    except KeyboardInterrupt:
        Path(path).write_text("stopped")
        raise


def lose_an_interrupt(path: str) -> None:
    try:
        wait_to_be_stopped(path)
    except KeyboardInterrupt:
        wait_to_be_stopped(path)


def test_a_worker_works_in_a_process_of_one_thread(tmp_path: Path) -> None:
    with Worker(leave_a_note, str(tmp_path / "note")) as worker:
        worker.wait()
        assert not worker.running
    threads, pid = (tmp_path / "note").read_text().split()
    assert threads == "1" and int(pid) != os.getpid()


def test_a_worker_that_fails_says_why() -> None:
    with Worker(fail, "the disk is full") as worker, pytest.raises(RuntimeError, match="the disk is full"):
        worker.wait()


def test_a_worker_is_stopped_when_the_block_is_left(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with Worker(wait_to_be_stopped, str(path)) as worker:
        while worker.running and not (path.exists() and path.read_text()):
            time.sleep(0.05)
    assert not worker.running and path.read_text() == "stopped"


@pytest.mark.slow
def test_an_interrupt_that_was_lost_is_sent_again(tmp_path: Path) -> None:
    path, start = tmp_path / "state", time.monotonic()
    with Worker(lose_an_interrupt, str(path)) as worker:
        while worker.running and not (path.exists() and path.read_text()):
            time.sleep(0.05)
    assert not worker.running and path.read_text() == "stopped" and time.monotonic() - start < 40


def test_what_is_missing_is_named_before_the_work() -> None:
    with pytest.raises(ImportError, match=r"needs not_there\. Run: pip install"):
        common.require("torch", "not_there")
