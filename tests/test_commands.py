"""The commands on a person's own files: two of them lead from a table to predictions, and what goes wrong is one message."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import bnnp
from bnnp import cli
from bnnp.console import expanded, give
from bnnp.runs import Run

runner = CliRunner()
COLUMNS = ["--task", "patient", "--inputs", "day", "site", "--outputs", "level", "--steps", 6]
TINY = ["--set", "model.hidden=[4]", "training.num_samples=2", "training.checkpoint_every=3"]


def bnnp_(*words: Any) -> Result:
    result = runner.invoke(cli.app, expanded([str(word) for word in words]))
    assert "Traceback" not in result.output
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def told(*words: Any) -> Any:
    result = bnnp_(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, patients: int = 12, visits: int = 8, missing: int = 0, seed: int = 0, first: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    lines = ["patient,day,site,level"]
    for i in range(first, first + patients):
        site, base = ("north", "south")[i % 2], rng.normal(60, 8)
        for j, day in enumerate(np.sort(rng.uniform(0, 30, visits))):
            level = "" if j >= visits - missing else f"{base - 0.5 * day + rng.normal():.2f}"
            lines.append(f"p{i},{day:.2f},{site},{level}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    data = write_table(folder / "data.csv")
    result = bnnp_("fit", data, *COLUMNS, *TINY, "--out", folder / "m", "--quiet")
    assert result.exit_code == 0, result.output
    return folder / "m"


# --- arguments ---------------------------------------------------------------------------------------------------


def test_options_of_several_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.csv").write_text("")
    assert expanded(["fit", "d.csv", "--inputs", "a", "b", "--out", "m"]) == [
        "fit",
        "d.csv",
        "--inputs",
        "a",
        "--inputs",
        "b",
        "--out",
        "m",
    ]
    assert expanded(["fit", "--inputs", "a", "b", "d.csv"]) == ["fit", "--inputs", "a", "--inputs", "b", "d.csv"]
    assert expanded(["fit", "--inputs", "d.csv", "x"]) == ["fit", "--inputs", "d.csv", "--inputs", "x"], (
        "the first word is a name in any case"
    )
    assert expanded(["fit", "--inputs", "--out", "m"]) == ["fit", "--inputs", "--out", "m"]
    assert expanded(["x", "--quantiles", "0.1", "0.9"]) == ["x", "--quantiles", "0.1", "--quantiles", "0.9"]
    assert expanded(["x", "--steps", "3", "y"]) == ["x", "--steps", "3", "y"]


# --- from a table to predictions ---------------------------------------------------------------------------------


def test_describe_says_what_is_there(tmp_path: Path) -> None:
    data = write_table(tmp_path / "d.csv", missing=2)
    text = bnnp_("describe", data, "--task", "patient", "--picture", tmp_path / "d.png").stdout
    assert "12 tasks of 6 points" in text and "site=north" in text and "! 12 tasks are few" in text
    assert (tmp_path / "d.png").stat().st_size > 10_000
    found = told("describe", data, "--task", "patient")
    assert found["tasks"] == 12 and found["inputs"][0]["name"] == "day"


def test_fit_says_what_it_chose_and_what_is_next(fitted: Path, tmp_path: Path) -> None:
    text = bnnp_("fit", fitted.parent / "data.csv", "--task", "patient", "--steps", 3, *TINY, "--out", tmp_path / "m", "--quiet").stdout
    for part in ("8 tasks to learn from, 2 to choose the step, 2 held out", "likelihood =", "shrinkage =", "bnnp report", "bnnp explore"):
        assert part in text
    assert (fitted / "config.toml").read_text().count("hidden = [4]") == 1


def test_a_plan_writes_nothing(fitted: Path, tmp_path: Path) -> None:
    found = told("fit", fitted.parent / "data.csv", "--task", "patient", "--plan", "--out", tmp_path / "m")
    assert found["config"]["model"]["prior"] == "matrix_normal" and not (tmp_path / "m").exists()


def test_settings_come_from_a_file_and_flags_go_before(fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[data]\ntask = 'patient'\n[training]\nsteps = 7\nbatch_size = 2\n[model]\nhidden = [3]\n")
    found = told(
        "fit", fitted.parent / "data.csv", "--config", tmp_path / "run.toml", "--steps", 5, "--set", "training.batch_size=4", "--plan"
    )
    assert found["config"]["training"]["steps"] == 5 and found["config"]["training"]["batch_size"] == 4
    assert found["config"]["model"]["hidden"] == [3] and found["recipe"]["task"]


def test_config_prints_and_checks(tmp_path: Path) -> None:
    text = bnnp_("config").stdout
    (tmp_path / "run.toml").write_text(text)
    assert "Nothing is wrong" in bnnp_("config", tmp_path / "run.toml").stdout
    (tmp_path / "run.toml").write_text("[model]\nhiden = [3]\n")
    result = bnnp_("config", tmp_path / "run.toml")
    assert result.exit_code == 2 and "line 2, model.hiden" in result.stderr and "Did you mean hidden?" in result.stderr
    assert bnnp_("config", "--out", tmp_path / "new.toml").exit_code == 0 and (tmp_path / "new.toml").read_text() == text


def test_predictions_stand_beside_the_rows_that_were_asked_about(fitted: Path, tmp_path: Path) -> None:
    context = write_table(tmp_path / "c.csv", 3, 5, seed=1, first=100)
    targets = tmp_path / "t.csv"
    targets.write_text("note,patient,day,site\nb,p101,3,north\na,p100,1,south\nd,p101,4,north\n")
    out = tmp_path / "p.csv"
    bnnp_("predict", fitted, context, targets, "--out", out, "--quantiles", 0.1, 0.9)
    found = rows(out)
    assert [(row["note"], row["patient"], float(row["day"]), row["site"]) for row in found] == [
        ("b", "p101", 3.0, "north"), ("d", "p101", 4.0, "north"), ("a", "p100", 1.0, "south"),
    ]  # fmt: skip
    assert all(
        float(row["level_q10"]) < float(row["level_mean"]) < float(row["level_q90"]) and float(row["level_std"]) > 0 for row in found
    )
    run = Run.open(fitted)
    seen = [row for row in rows(context) if row["patient"] == "p100"]
    x = [[float(row["day"]), row["site"] == "north", row["site"] == "south"] for row in seen]
    names = [column.name for column in run.inputs]
    assert names == ["day", "site=north", "site=south"]
    alone = run.model.condition(np.array(x, float), [[float(row["level"])] for row in seen]).predict([[1.0, 0.0, 1.0]])
    assert float(found[2]["level_mean"]) == pytest.approx(float(alone.mean), rel=1e-4)


@pytest.fixture(scope="module")
def oddly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two outputs, of a table whose columns are called as those of predictions are, with names of tasks such as 007."""
    folder = tmp_path_factory.mktemp("my data")
    rng = np.random.default_rng(0)
    lines = [f"{i // 6:03d},{rng.uniform(0, 9):.3f},{rng.normal():.3f},{rng.normal():.3f},{rng.normal():.3f}" for i in range(72)]
    lines[5] = lines[5].rsplit(",", 1)[0] + ","
    (folder / "bare.csv").write_text("\n".join(lines) + "\n")
    names = ["--names", "id", "distance", "task", "a", "b"]
    columns = ["--task", "id", "--inputs", "distance", "task", "--outputs", "a", "b", "--steps", 3]
    result = bnnp_("fit", folder / "bare.csv", *names, *columns, *TINY, "--out", folder / "my model", "--quiet")
    assert result.exit_code == 0, result.output
    return folder / "my model"


def test_columns_that_are_called_as_ours_stay(oddly: Path, tmp_path: Path) -> None:
    targets = tmp_path / "t.csv"
    targets.write_text("id,distance,task,note\n003,1.5,2,dry\n002,2.5,3,\n")
    bnnp_("predict", oddly, oddly.parent / "bare.csv", targets, "--out", tmp_path / "p.csv")
    found = rows(tmp_path / "p.csv")
    assert [(row["id"], row["distance"], row["task"], row["note"]) for row in found] == [
        ("003", "1.5", "2", "dry"),
        ("002", "2.5", "3", ""),
    ]
    assert all(float(row["distance_"]) > 0 and row["a_mean"] and row["b_mean"] for row in found)


def test_predictions_stand_in_their_own_rows_with_and_without_a_header(oddly: Path, tmp_path: Path) -> None:
    """The file of the fit has no header; one that has is not shifted by a row."""
    body = "003,1.5,2,,\n003,2.5,3,,\n"
    (tmp_path / "bare.csv").write_text(body)
    (tmp_path / "headed.csv").write_text("id,distance,task,a,b\n" + body)
    for name in ("bare", "headed"):
        bnnp_("predict", oddly, oddly.parent / "bare.csv", tmp_path / f"{name}.csv", "--out", tmp_path / f"p-{name}.csv")
    assert rows(tmp_path / "p-bare.csv") == rows(tmp_path / "p-headed.csv")
    assert [row["distance"] for row in rows(tmp_path / "p-headed.csv")] == ["1.5", "2.5"]


def test_a_row_with_one_of_two_outputs_is_filled(oddly: Path, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("id,distance,task,a,b\n003,1.5,2,0.5,0.1\n003,2.5,3,0.5,\n")
    said = told("predict", oddly, tmp_path / "c.csv", "--samples", 4)
    assert said["rows"] == 1 and said["columns"]["distance"] == [2.5]


def test_two_tables_of_one_task_each_are_of_one_task_only_where_they_say_so(fitted: Path, tmp_path: Path) -> None:
    context = write_table(tmp_path / "c.csv", 1, 5, first=100)
    for text, code in (("patient,day,site\np101,3,north\n", 2), ("patient,day,site\np100,3,north\n", 0), ("day,site\n3,north\n", 0)):
        (tmp_path / "t.csv").write_text(text)
        result = bnnp_("predict", fitted, context, tmp_path / "t.csv", "--samples", 4)
        assert result.exit_code == code and (code == 0 or "'p101'" in result.stderr)


@pytest.mark.parametrize("ending", [".parquet", ".nc", ".json"])
def test_other_endings_are_other_formats(fitted: Path, tmp_path: Path, ending: str) -> None:
    context = write_table(tmp_path / "c.csv", 2, 5, missing=2)
    said = told("predict", fitted, context, "--out", tmp_path / f"p{ending}")
    assert said["rows"] == 4 and (tmp_path / f"p{ending}").stat().st_size > 200


def test_without_targets_the_gaps_are_filled(fitted: Path, tmp_path: Path) -> None:
    context = write_table(tmp_path / "c.csv", 2, 5, missing=2)
    said = told("predict", fitted, context)
    gaps = [row for row in rows(context) if row["level"] == ""]
    assert said["rows"] == 4 and said["columns"]["day"] == [float(row["day"]) for row in gaps]
    told("predict", fitted, context, "--out", tmp_path / "p.csv")
    assert list(said["columns"]) == list(rows(tmp_path / "p.csv")[0])  # one answer, whether printed or written
    shown = bnnp_("predict", fitted, context).stdout
    assert all(name in shown.split("(not shown")[0] for name in ("level_mean", "level_std"))
    result = bnnp_("predict", fitted, write_table(tmp_path / "whole.csv", 2, 5))
    assert result.exit_code == 2 and "rows of the first with missing outputs" in result.stderr


def test_none_is_the_prior_and_draws_are_coherent(fitted: Path, tmp_path: Path) -> None:
    targets = write_table(tmp_path / "t.csv", 1, 4)
    said = told("predict", fitted, "none", targets)
    assert said["rows"] == 4
    drawn = told("sample", fitted, targets, "-n", 3)
    assert [name for name in drawn["columns"] if "sample" in name] == ["level_sample1", "level_sample2", "level_sample3"]


def test_evaluate_and_diagnose(fitted: Path, tmp_path: Path) -> None:
    own = told("evaluate", fitted, "--shares", 0.5, "--samples", 4)
    assert "held out" in own["how"] and own["shares"]["0.5"]["num_tasks"] == 2
    new = told("evaluate", fitted, write_table(tmp_path / "n.csv", 4, seed=5, first=50), "--samples", 4)
    assert "another source" in new["how"] and set(new["shares"]) == {"0.1", "0.3", "0.5"}
    few = told("evaluate", fitted, tmp_path / "n.csv", "--samples", 4, "--max-tasks", 3)
    assert few["how"].startswith("3 of the 4 tasks") and few["shares"]["0.1"]["num_tasks"] == 3
    assert "joint log density" in bnnp_("evaluate", fitted, "--samples", 4).stdout
    said = told("diagnose", fitted, tmp_path / "n.csv", "--samples", 32)
    assert len(said) == 4 and all(row["sentence"] for row in said)
    assert "how far to trust it" in bnnp_("diagnose", fitted, tmp_path / "n.csv", "--samples", 32).stdout


def test_how_a_table_is_written_is_said_once(tmp_path: Path) -> None:
    """What the fit was told of gaps, encoding and delimiter holds when its data are read again."""
    lines = write_table(tmp_path / "d.csv").read_text().replace(",", ";").splitlines()
    lines[3] = lines[3].replace(lines[3].split(";")[1], "")
    (tmp_path / "d.csv").write_bytes("\n".join(lines).encode("utf-16-le"))
    said = ["data.drop_missing_inputs=true", "data.encoding=utf-16-le", "data.delimiter=;"]
    assert bnnp_("fit", tmp_path / "d.csv", *COLUMNS, *TINY, *said, "--out", tmp_path / "m", "--quiet").exit_code == 0
    assert told("evaluate", tmp_path / "m", "--samples", 2)["how"].startswith("2 tasks held out")
    assert told("evaluate", tmp_path / "m", tmp_path / "d.csv", "--samples", 2)["how"].startswith("2 tasks held out")
    assert told("resume", tmp_path / "m", "--quiet")["status"] == "done"


def test_a_file_that_grew_is_judged_on_what_is_new(fitted: Path, tmp_path: Path) -> None:
    """What the model learned from is left out, whether the file is the fit's own or another with the same tasks in it."""
    data, more = fitted.parent / "data.csv", write_table(tmp_path / "more.csv", 3, seed=9, first=200)
    division = Run.open(fitted).division
    (tmp_path / "all.csv").write_text(data.read_text() + more.read_text().split("\n", 1)[1])
    said = told("evaluate", fitted, tmp_path / "all.csv", "--samples", 2)
    assert said["shares"]["0.1"]["num_tasks"] == len(division["test"]) + 3 and "without 10" in said["how"]
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "seen.csv").write_text("".join(line for line in lines if line.split(",")[0] in {"patient", *division["train"]}))
    result = bnnp_("evaluate", fitted, tmp_path / "seen.csv")
    assert result.exit_code == 2 and "all of which it learned from" in result.stderr
    other = write_table(tmp_path / "other.csv", 12, seed=9)
    assert told("evaluate", fitted, other, "--samples", 2)["shares"]["0.1"]["num_tasks"] == 12, "other tasks may have the same names"


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    give(True, {"a": float("nan"), 2: [np.float32(1.5), np.int64(3), (np.inf, None, Path("x"))], "b": np.bool_(True)}, lambda: None)
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "2": [1.5, 3, [None, None, "x"]], "b": True}


@pytest.mark.skipif(os.name != "posix", reason="pipes are of POSIX")
def test_a_reader_that_has_seen_enough_and_a_terminal_without_letters(fitted: Path) -> None:
    command = [sys.executable, "-m", "bnnp", "evaluate", str(fitted), "--samples", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "ascii"}
    found = subprocess.run(command, env=env, capture_output=True, text=True)
    assert found.returncode == 0 and "\\xb1" in found.stdout
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.wait() == 0 and child.stderr.read() == b""
    child.stderr.close()


def test_a_table_that_is_too_wide_says_what_it_leaves_out(oddly: Path) -> None:
    text = bnnp_("predict", oddly, oddly.parent / "bare.csv", oddly.parent / "bare.csv", "--samples", 2).stdout
    assert "a_std_epistemic" in text and "not shown: " in text and max(map(len, text.splitlines()[:10])) <= 100


def test_ctrl_c_before_there_is_a_run_names_none(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("bnnp.workflow.verbs.open_data", stopped)
    result = bnnp_("fit", fitted.parent / "data.csv", *COLUMNS, "--out", tmp_path / "m")
    assert result.exit_code == 130 and "Stopped." in result.stderr and "resume" not in result.stderr


def test_a_stopped_fit_goes_on(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, learn = fitted.parent / "data.csv", bnnp.training._Run._objective  # type: ignore[attr-defined]

    def stopped(self: Any, batch: Any) -> Any:
        if self.state.step == 4:
            raise KeyboardInterrupt
        return learn(self, batch)

    command = ["fit", data, *COLUMNS, *TINY, "--out", tmp_path / "m", "--quiet"]
    monkeypatch.setattr(bnnp.training._Run, "_objective", stopped)  # type: ignore[attr-defined]
    result = bnnp_(*command)
    assert result.exit_code == 130 and f"bnnp resume {tmp_path / 'm'}" in result.stderr
    monkeypatch.undo()
    assert bnnp_("predict", tmp_path / "m", data).exit_code == 2, "a fit that was stopped is no model yet"
    assert bnnp_(*command).exit_code == 2, "and another fit does not go over it"
    assert told("resume", tmp_path / "m", "--quiet")["status"] == "done"
    a, b = Run.open(fitted).model.state_dict(), Run.open(tmp_path / "m").model.state_dict()
    assert all(bool((p == b[name]).all()) for name, p in a.items())


# --- other sources -----------------------------------------------------------------------------------------------


def test_a_grid_goes_in_and_a_grid_comes_out(tmp_path: Path) -> None:
    import xarray

    rng = np.random.default_rng(0)
    lat, lon = np.arange(5.0), np.arange(4.0)
    values = rng.normal(size=(12, 1, 1)) + lat[:, None] + 0.1 * rng.normal(size=(12, 5, 4))
    ds = xarray.Dataset(
        {"t2m": (("time", "lat", "lon"), values, {"units": "K"})}, {"time": np.arange(12), "lat": lon[:0].tolist() or lat, "lon": lon}
    )
    ds.to_netcdf(tmp_path / "d.nc")
    assert bnnp_("fit", tmp_path / "d.nc", "--task", "time", "--steps", 3, *TINY, "--out", tmp_path / "m", "--quiet").exit_code == 0
    field = ds.isel(time=[0]).copy(deep=True)
    field["t2m"][0, 2:] = np.nan
    field.to_netcdf(tmp_path / "f.nc")
    bnnp_("predict", tmp_path / "m", tmp_path / "f.nc", "--out", tmp_path / "p.nc")
    with xarray.open_dataset(tmp_path / "p.nc") as found:
        assert found["t2m_mean"].shape[-2:] == (5, 4) and found["t2m_mean"].attrs["units"] == "K" and bool((found["t2m_std"] > 0).all())
    ds.isel(time=slice(0, 6)).to_netcdf(tmp_path / "part1.nc")
    ds.isel(time=slice(6, 12)).to_netcdf(tmp_path / "part2.nc")
    several = ["fit", tmp_path / "part*.nc", "--task", "time", "--steps", 2, *TINY, "--out", tmp_path / "s", "--quiet"]
    assert bnnp_(*several).exit_code == 0
    assert told("evaluate", tmp_path / "s", "--samples", 4)["how"].startswith("2 tasks held out"), "several files are found again"
    (tmp_path / "points.csv").write_text("lat,lon,t2m\n0,0,1.0\n1,1,\n3.5,2.5,\n")
    assert told("predict", tmp_path / "m", tmp_path / "points.csv")["rows"] == 2, "a table of points serves any model"
    assert set(told("evaluate", tmp_path / "m", "--samples", 4)["shares"]) == {"0.025", "0.1", "0.25"}


def test_signals_and_images_take_the_same_two_commands(tmp_path: Path) -> None:
    wfdb = pytest.importorskip("wfdb")
    rng = np.random.default_rng(0)
    wave = np.sin(np.arange(4000) / 8)[:, None] + 0.1 * rng.normal(size=(4000, 1))
    with warnings.catch_warnings():  # it uses what pandas means to take away
        warnings.simplefilter("ignore")
        wfdb.wrsamp("rec", fs=100, units=["mV"], sig_name=["II"], p_signal=wave, fmt=["16"], write_dir=str(tmp_path))
    np.save(tmp_path / "i.npy", rng.integers(0, 255, (12, 6, 6)).astype(np.uint8))
    signal = ["fit", tmp_path / "rec", "--window", 1, "--rate", 50, "--steps", 2, *TINY, "--out", tmp_path / "s", "--quiet"]
    images = ["fit", tmp_path / "i.npy", "--steps", 2, *TINY, "--out", tmp_path / "i", "--quiet"]
    assert bnnp_(*signal).exit_code == 0 and bnnp_(*images).exit_code == 0
    assert told("evaluate", tmp_path / "s", "--samples", 4)["shares"]["0.1"]["num_tasks"] == 6
    assert "another source" in told("evaluate", tmp_path / "s", tmp_path / "rec", "--start", "-10", "--samples", 4)["how"]
    assert set(told("evaluate", tmp_path / "i", "--samples", 4)["shares"]) == {"0.05", "0.2", "0.5"}
    assert told("predict", tmp_path / "i", tmp_path / "i.npy", "--samples", 2)["rows"] == 12 * 36


# --- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["describe", "gone.csv"], "Got nothing there"),
        (["describe", "d.csv"], "--task"),
        (["describe", "d.csv", "--task", "patiant"], "patiant"),
        (["describe", "d.csv", "--task", "patient", "--outputs", "zzz"], "zzz"),
        (["describe", "d.csv", "--kind", "grid"], "Expected"),
        (["describe", "d.csv", "--kind", "tabel"], "table, grid, signal, images"),
        (["describe", "d.csv", "--task", "patient", "--rate", "3"], "rate"),
        (["describe", "d.csv", "--task", "patient", "--set", "model.hiden=3"], "Did you mean hidden?"),
        (["describe", "d.csv", "--task", "patient", "--set", "steps=3"], "section.key=value"),
        (["describe", "d.csv", "--config", "gone.toml"], "no such file"),
        (["fit", "d.csv", "--task", "patient", "--out", "d.csv"], "Got a file"),
        (["fit", "one.csv", "--task", "patient"], "Expected"),
        (["evaluate", "gone"], "Expected"),
        (["predict", "gone", "d.csv"], "Expected"),
        (["resume", "gone"], "bnnp fit"),
        (["predict", "{m}", "d.csv", "--out", "p.xls"], "ends in .csv"),
        (["predict", "{m}", "none"], "Got neither"),
        (["predict", "{m}", "c.csv"], "day"),
        (["predict", "{m}", "d.csv", "--quantiles", "2"], "between 0 and 1"),
        (["predict", "{m}", "d.csv", "west.csv"], "west"),
        (["explore", "gone"], "Expected"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_a_wrong_request_is_one_message_and_leaves_nothing(
    words: list[str], said: str, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "d.csv")
    write_table(tmp_path / "one.csv", patients=1)
    (tmp_path / "c.csv").write_text("patient,level\np1,3\n")
    (tmp_path / "west.csv").write_text("patient,day,site\np1,3,west\n")
    before = sorted(tmp_path.rglob("*"))
    result = bnnp_(*[word.replace("{m}", str(fitted)) for word in words])
    assert result.exit_code == 2 and said in result.stderr and result.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_is_json_too() -> None:
    result = bnnp_("describe", "gone.csv", "--json")
    assert result.exit_code == 2 and json.loads(result.stdout)["type"] == "FileNotFoundError"


def test_a_fault_of_the_program_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("x")

    monkeypatch.setattr("bnnp.workflow.verbs.open_data", broken)
    result = bnnp_("describe", "d.csv")
    assert result.exit_code == 70 and "fault of the program" in result.stderr
    monkeypatch.setenv("BNNP_DEBUG", "1")
    with pytest.raises(KeyError):
        bnnp_("describe", "d.csv")


@pytest.mark.parametrize("folder", ["/proc/nowhere/m", "file/m"])
def test_a_folder_that_cannot_be_written_to(folder: str, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if folder.startswith("/proc") and not Path("/proc").exists():
        pytest.skip("there is no /proc here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    result = bnnp_("fit", fitted.parent / "data.csv", "--task", "patient", "--steps", 1, *TINY, "--out", folder, "--quiet")
    assert result.exit_code in (1, 2) and folder.split("/m")[0] in result.stderr


@pytest.mark.skipif(sys.platform == "win32" or os.name != "posix", reason="limits of files are of POSIX")
def test_a_full_disk_leaves_what_was_there(fitted: Path, tmp_path: Path) -> None:
    """With files limited to 4 KB, which is what a full disk looks like from inside: the old model stays, and resume goes on later."""
    data = fitted.parent / "data.csv"
    command = ["fit", str(data), *COLUMNS, *TINY, "--out", str(tmp_path / "m"), "--quiet"]
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY)); "
        "from bnnp.cli import app; from bnnp.console import expanded, give; app(args=expanded(sys.argv[1:]))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code, *map(str, command)], env=env, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr and "File too large" in result.stderr
    assert not [p for p in tmp_path.rglob(".*")] and json.loads((tmp_path / "m" / "run.json").read_text())["status"] == "training"
    assert told("resume", tmp_path / "m", "--quiet")["status"] == "done"
    a, b = Run.open(fitted).model.state_dict(), Run.open(tmp_path / "m").model.state_dict()
    assert all(bool((p == b[name]).all()) for name, p in a.items())
