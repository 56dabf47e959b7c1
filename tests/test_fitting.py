"""From tasks to a folder with a model: what is chosen, what is written, and that no kill changes the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bnnp
import bnnp.workflow.fitting
from bnnp.config import Config
from bnnp.data.collection import Collection, Column
from bnnp.runs import Run, read_record
from bnnp.sizes import choose_settings, roughness
from bnnp.workflow.fitting import fit, plan, resume

QUICK = Config({"training": {"steps": 12, "checkpoint_every": 3, "num_samples": 2}, "model": {"hidden": [4]}})


def tasks(n: int = 24, points: int = 8, seed: int = 0, outputs: int = 1) -> Collection:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        x = rng.normal(size=(points, 1))
        made.append((x, np.sin(x + rng.normal(size=(1, outputs))) + 0.1 * rng.normal(size=(points, outputs))))
    return Collection.of(made, [Column("t", "s")], [f"y{j}" for j in range(outputs)], names=[f"task {i}" for i in range(n)])


def same(a: Run, b: Run) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))


def test_a_fit_leaves_what_is_needed_to_use_it(tmp_path: Path) -> None:
    told: list[Any] = []
    run = fit(tasks(), tmp_path / "model", QUICK, progress=False, announce=told.append)
    assert sorted(p.name for p in (tmp_path / "model").iterdir() if p.suffix != ".safetensors") == [
        "config.toml",
        "fit",
        "model.json",
        "run.json",
    ]
    again = Run.open(tmp_path / "model")
    assert same(run, again) and again.inputs == (Column("t", "s"),) and again.config["training"]["steps"] == 12
    parts = [set(again.division[name]) for name in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [16, 4, 4] and set.union(*parts) == set(tasks().names)
    assert list(again.part("test", tasks()).names) == again.division["test"]
    assert told[0].config.to_dict() == again.config
    record = read_record(tmp_path / "model")
    assert record["status"] == "done" and record["result"]["best_step"] > 0
    assert bnnp.load(tmp_path / "model").config == again.model.config
    with pytest.raises(ValueError, match="All tasks of another source are new"):
        again.part("test", tasks(3))


def test_what_is_held_out_is_not_learned_from(tmp_path: Path) -> None:
    """Other values in test tasks change nothing of the model."""
    source = tasks()
    test = set(plan(source, QUICK).division.test)
    changed = Collection.of([(x, 1e3 + y) if i in test else (x, y) for i, (x, y, _) in enumerate(source)], ["t"], ["y0"])
    assert same(fit(source, tmp_path / "a", QUICK, progress=False), fit(changed, tmp_path / "b", QUICK, progress=False))


def test_a_folder_with_a_run_is_kept_unless_it_may_go(tmp_path: Path) -> None:
    first = fit(tasks(), tmp_path / "model", QUICK, progress=False)
    with pytest.raises(ValueError, match=r"bnnp resume .*--fresh"):
        fit(tasks(seed=1), tmp_path / "model", QUICK, progress=False)
    assert same(first, Run.open(tmp_path / "model"))
    (tmp_path / "model" / "notes.txt").write_text("mine")
    second = fit(tasks(seed=1), tmp_path / "model", QUICK, fresh=True, progress=False)
    assert not same(first, second) and (tmp_path / "model" / "notes.txt").read_text() == "mine"
    bnnp.BNNP(1, 1, hidden=(2,)).save(tmp_path / "other")
    with pytest.raises(ValueError, match="another origin"):
        fit(tasks(), tmp_path / "other", QUICK, fresh=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Got a file"):
        fit(tasks(), tmp_path / "file", QUICK)


def test_resume_knows_its_data(tmp_path: Path) -> None:
    fit(tasks(), tmp_path, QUICK, progress=False)
    with pytest.raises(ValueError, match="changed since"):
        resume(tmp_path, tasks(seed=1))
    assert same(resume(tmp_path, tasks(), progress=False), Run.open(tmp_path)), "a finished fit stays what it is"


def test_a_fit_that_was_stopped_is_no_run_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnnp.workflow.fitting.meta_train", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(tasks(), tmp_path, QUICK, progress=False)
    with pytest.raises(FileNotFoundError, match="bnnp resume"):
        Run.open(tmp_path)


def stopped(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_networks_are_tried_and_the_best_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the second trial, the fit goes on to the same choice."""
    tried = Config({"training": {**QUICK.section("training"), "trial_steps": 6}, "model": {"hidden": [4]}})
    whole = fit(tasks(), tmp_path / "whole", tried, progress=False)
    trials = read_record(tmp_path / "whole")["trials"]
    best = max(trials, key=lambda trial: trial["score"])
    assert len(trials) == 2 and all(trial["score"] is not None for trial in trials)
    assert (whole.config["model"]["activation"], whole.config["training"]["learning_rate"]) == (best["activation"], best["learning_rate"])
    assert whole.model.config["activation"] == best["activation"]
    learn, calls = bnnp.workflow.fitting.meta_train, []  # type: ignore[attr-defined]

    def stop_at_second(*arguments: Any, **options: Any) -> Any:
        calls.append(options["folder"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learn(*arguments, **options)

    monkeypatch.setattr("bnnp.workflow.fitting.meta_train", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        fit(tasks(), tmp_path / "stopped", tried, progress=False)
    monkeypatch.undo()
    assert same(whole, resume(tmp_path / "stopped", tasks(), progress=False))


@pytest.mark.parametrize(
    ("said", "steps"),
    [({}, 166), ({"model": {"activation": "relu"}}, 0), ({"training": {"learning_rate": 0.1}}, 0), ({"split": {"validation": 0.0}}, 0)],
)
def test_what_a_person_chose_is_not_tried(said: Any, steps: int) -> None:
    config = (
        Config({"training": {"steps": 1000}}) if "training" not in said else Config({"training": {"steps": 1000, "learning_rate": 0.1}})
    )
    assert choose_settings(tasks(), 20, Config(said).over(config)).config.get("training.trial_steps") == steps


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("training", {"context": [8, 9]}),
        ("training", {"objective": "iw_avi"}),
        ("model", {"likelihood": "negativebinomial"}),
        ("model", {"likelihood": "categorical", "classes": 3}),
    ],
)
def test_what_cannot_be_trained_on_writes_nothing_and_throws_nothing_away(section: str, settings: Any, tmp_path: Path) -> None:
    wrong = Config({section: settings}).over(Config({"model": {"last_layer": "amortised"}}).over(QUICK))
    with pytest.raises(ValueError, match="Expected"):
        fit(tasks(), tmp_path / "m", wrong, progress=False)
    assert not (tmp_path / "m").exists()
    first = fit(tasks(), tmp_path / "m", QUICK, progress=False)
    with pytest.raises(ValueError, match="Expected"):
        fit(tasks(), tmp_path / "m", wrong, fresh=True, progress=False)
    assert same(first, Run.open(tmp_path / "m"))


def test_a_run_that_was_half_thrown_away_can_be_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any file that it deletes, `fresh` finds a folder that is still its own."""
    first = fit(tasks(), tmp_path / "m", QUICK, progress=False)
    unlink, left = Path.unlink, [0]

    def killed(path: Path, missing_ok: bool = False) -> None:
        left[0] -= 1
        if left[0] < 0 and path.parent == tmp_path / "m":
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    for moment in range(4):
        left[0] = moment
        with pytest.raises(KeyboardInterrupt):
            fit(tasks(), tmp_path / "m", QUICK, fresh=True, progress=False)
    monkeypatch.undo()
    assert same(first, fit(tasks(), tmp_path / "m", QUICK, fresh=True, progress=False))


@pytest.mark.parametrize("damage", ["gone", "cut", "newer", "other", "keys", "binary"])
def test_a_damaged_record_is_refused(damage: str, tmp_path: Path) -> None:
    fit(tasks(), tmp_path, QUICK, progress=False)
    path = tmp_path / "run.json"
    record = json.loads(path.read_text())
    if damage == "gone":
        next(tmp_path.glob("model-*.safetensors")).unlink()
    elif damage == "cut":
        path.write_text(path.read_text()[:100])
    elif damage == "binary":
        path.write_bytes(b"\xff\x00\xfe")
    elif damage == "newer":
        path.write_text(json.dumps({**record, "version": 99}))
    elif damage == "other":
        path.write_text(json.dumps({**record, "format": "x"}))
    else:
        path.write_text(json.dumps({k: v for k, v in record.items() if k != "recipe"}))
    with pytest.raises(ValueError, match="Expected"):
        Run.open(tmp_path)


@pytest.mark.parametrize(("frequency", "x_dim"), [(3.0, 1), (6.0, 1), (12.0, 1), (4.0, 2)])
def test_the_scale_follows_how_quickly_outputs_vary(frequency: float, x_dim: int) -> None:
    """Sinusoids of twice the frequency ask for twice the scale, whatever the units of x, whatever is missing, and with noise."""
    rng = np.random.default_rng(0)

    def made(f: float, unit: float) -> list[Any]:
        drawn = []
        for _ in range(60):
            x = rng.uniform(-1.7, 1.7, (120, x_dim))
            y = np.sin(f * x[:, :1] + rng.uniform(0, 6.3)) + 0.1 * rng.normal(size=(120, 1))
            drawn.append((unit * x, y, rng.random(y.shape) < 0.9))
        return drawn

    once, twice = roughness(made(frequency, 1.0)), roughness(made(2 * frequency, 1e3))
    assert once is not None and twice is not None and 1.5 < twice / once < 2.6
    # Half way from nothing to the variance a sinusoid is at f h = pi / 3; in the plane h has another direction as well.
    expected = 1.5 * 1.18 * (x_dim + 1) ** 0.5 / (np.pi / 3 / frequency) * (1 if x_dim == 1 else 0.7)
    assert once == pytest.approx(expected, rel=0.3)


def test_rough_data_take_a_sine_network_without_a_trial() -> None:
    """Beats of 0.03 of the window: a tanh network would score better at first, and stay where it is."""
    t = np.linspace(0, 1, 200)[:, None]
    beats = [(t, np.exp(-((t - at) ** 2) / 2 / 0.01**2)) for at in np.linspace(0.1, 0.9, 30)]
    chosen = choose_settings(Collection.of(beats, ["t"], ["mV"]), 20, Config()).config
    assert chosen.get("model.activation") == "sine" and chosen.get("model.input_scale") > 15
    assert chosen.get("training.trial_steps") == 0 and choose_settings(tasks(), 20, Config()).config.get("training.trial_steps") > 0


def test_noise_is_not_taken_for_a_function_that_turns_fast() -> None:
    rng = np.random.default_rng(0)

    def made(signal: float) -> list[Any]:
        x = rng.uniform(-3, 3, (34, 20, 1))
        y = signal * np.sin(x + rng.normal(size=(34, 1, 1))) + rng.normal(size=x.shape)
        return [(a, b, np.ones((20, 1), dtype=bool)) for a, b in zip(x, y, strict=True)]

    found = [roughness(made(1.0)) or 60.0 for _ in range(7)]
    assert np.median(found) < 8  # without noise it is 4; a crest of the noise among the nearest pairs made it up to 34
    assert sum(roughness(made(0.0)) is None for _ in range(7)) >= 5


def test_too_few_points_say_nothing_of_the_scale() -> None:
    assert roughness([(np.zeros((3, 1)), np.ones((3, 1)), np.ones((3, 1), bool))]) is None


# --- what is chosen ----------------------------------------------------------------------------------------------


def test_what_a_person_says_is_not_chosen_otherwise() -> None:
    said = Config({"model": {"hidden": [7], "activation": "relu"}, "training": {"steps": 3, "shrinkage": 0.5}, "split": {"test": 0.3}})
    chosen = choose_settings(tasks(), 20, said).config
    assert all(chosen.get(f"{s}.{k}") == v for s, keys in said.values.items() for k, v in keys.items())


def test_few_tasks_are_shrunk_and_many_are_not() -> None:
    found = [choose_settings(tasks(), n, Config()) for n in (5, 30, 80, 500)]
    assert [f.config.get("training.shrinkage") for f in found] == [0.1, 0.03, 0.01, 0.0]
    assert any("held back" in reason for reason in found[0].reasons)


def with_outputs(y: Any, **others: Any) -> Collection:
    y = np.asarray(y, dtype=float)
    return Collection.of(
        [(np.linspace(0, 1, len(y))[:, None], y)] * 4, ["t"], [str(j) for j in range(np.atleast_2d(y.T).shape[0])], **others
    )


def test_the_likelihood_follows_the_outputs() -> None:
    def chosen(source: Collection) -> Any:
        return choose_settings(source, 4, Config()).config.get("model.likelihood")

    assert chosen(with_outputs([0, 1, 0, 1])) == "bernoulli"
    assert chosen(with_outputs([0, 3, 2, 1])) == chosen(with_outputs([0, 9, 2, 30])) == "negativebinomial"
    assert chosen(with_outputs([9, 8, 9, 7])) == "gaussian"
    assert chosen(with_outputs([0.5, 3, 2, 1])) == chosen(with_outputs([1000, 3000, 2000, 1005])) == "gaussian"
    three = with_outputs([0, 1, 2, 1], recipe={"kind": "table", "labels": {"y": ["a", "b", "c"]}})
    assert chosen(three) == "categorical" and choose_settings(three, 4, Config()).config.get("model.classes") == 3


def test_gaps_and_fine_columns_are_noticed() -> None:
    gaps = choose_settings(with_outputs([[1.0, np.nan], [np.nan, np.nan], [2.5, 3.0]]), 4, Config()).config
    assert gaps.get("model.missing_outputs") is True and choose_settings(tasks(), 4, Config()).config.get("model.missing_outputs") is None
    fine = choose_settings(with_outputs([1e6 + 0.1, 1e6 + 0.2, 1e6]), 4, Config())
    assert fine.config.get("model.dtype") == "float64" and any("varies little" in reason for reason in fine.reasons)


@pytest.mark.parametrize(
    ("usual", "rare", "chosen"),
    [
        ([0.0, 1.0], 0.5, ("model.likelihood", "gaussian")),
        ([0.0, 4.0], -1.0, ("model.likelihood", "gaussian")),
        ([0.5, 1.5], np.nan, ("model.missing_outputs", True)),
    ],
)
def test_one_value_in_one_task_of_many_counts(usual: list[float], rare: float, chosen: tuple[str, Any]) -> None:
    made = [(np.zeros((2, 1)), np.stack([usual, usual], axis=1)) for _ in range(300)]
    made[201][1][0, 0] = rare
    made = made if chosen[1] is True else [(x, y[:, :1]) for x, y in made]
    source = Collection.of(made, ["t"], [str(j) for j in range(made[0][1].shape[1])])
    assert choose_settings(source, 200, Config()).config.get(chosen[0]) == chosen[1]


@pytest.mark.parametrize("kind", ["bernoulli", "labels", "counts", "gaps", "two outputs", "fine"])
def test_what_is_chosen_can_be_learned(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sources = {
        "bernoulli": lambda: (rng.random((9, 1)) < 0.5) * 1.0,
        "labels": lambda: rng.integers(0, 3, (9, 1)) * 1.0,
        "counts": lambda: rng.poisson(3, (9, 1)) * 1.0,
        "gaps": lambda: np.where(rng.random((9, 2)) < 0.3, np.nan, rng.normal(size=(9, 2))),
        "two outputs": lambda: rng.normal(size=(9, 2)),
        "fine": lambda: 1e7 + rng.normal(size=(9, 1)),
    }
    made = [(rng.normal(size=(9, 3)), sources[kind]()) for _ in range(6)]
    recipe = {"kind": "table", **({"labels": {"y": ["a", "b", "c"]}} if kind == "labels" else {})}
    source = Collection.of(made, list("abc"), [str(j) for j in range(made[0][1].shape[1])], recipe=recipe)
    run = fit(source, tmp_path, Config({"training": {"steps": 2}}), progress=False)
    x, y, mask = source[0]
    assert bool(run.model.condition(x, y, mask=mask).predict(x).mean.isfinite().all())


@pytest.mark.parametrize(("x", "y"), [(0.0, None), (None, 0.0)])
def test_a_column_that_never_varies_is_named(x: float | None, y: float | None) -> None:
    made = [
        (np.full((5, 1), 2.0) if x is not None else task[0], np.full((5, 1), 2.0) if y is not None else task[1]) for task in tasks(6, 5)
    ]
    with pytest.raises(ValueError, match=r"(input 'dose'|output 'level') to vary. Got 2"):
        plan(Collection.of(made, ["dose"], ["level"]))


def test_one_task_is_not_many() -> None:
    with pytest.raises(ValueError, match="at least 2 tasks"):
        plan(tasks(1))


# --- kill -9 -----------------------------------------------------------------------------------------------------

CHILD = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.test_fitting import QUICK, tasks
from bnnp.workflow import fit, resume
folder = Path(sys.argv[1])
fit(tasks(), folder, QUICK, progress=False) if not (folder / "run.json").exists() else resume(folder, tasks(), progress=False)
"""


def start(folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.Popen([sys.executable, "-c", CHILD.format(root=root), str(folder)], env=env, cwd=root, stderr=subprocess.PIPE)


def kill_when(folder: Path, ready: Any) -> bool:
    """Start a fit and kill it with SIGKILL as soon as `ready` says so; return whether it was in time."""
    child = start(folder)
    deadline = time.monotonic() + 120
    while child.poll() is None and not ready() and time.monotonic() < deadline:
        time.sleep(0.002)
    in_time = child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return in_time


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_killed_fit_resumes_to_the_same_result(tmp_path: Path) -> None:
    """Killed when the folder appears, when the record is there, after checkpoints, and while the model is being saved."""
    whole = fit(tasks(), tmp_path / "whole", QUICK, progress=False)
    folder = tmp_path / "killed"
    moments = [
        lambda: folder.exists(),
        lambda: (folder / "run.json").exists(),
        lambda: (folder / "fit" / "state" / "training.json").exists(),
        lambda: (folder / "fit" / "log.jsonl").exists(),
        lambda: any(folder.glob("model-*")) or any(folder.glob(".model*")),
    ]
    killed = sum(kill_when(folder, moment) for moment in moments)
    assert killed >= 2, "the kills came too late to show anything"
    if not (folder / "run.json").exists():
        fit(tasks(), folder, QUICK, progress=False)
    assert same(whole, resume(folder, tasks(), progress=False))
    logs = [[json.loads(row) for row in (f / "fit" / "log.jsonl").read_text().splitlines()] for f in (tmp_path / "whole", folder)]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in logs[0]] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in logs[1]
    ]
    assert not [p for p in folder.rglob(".*")], "nothing half-written is left"
