"""The examples run, are short, and show what they say; fewer steps than a reader would take, so bounds are wide."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest

import bnnp

FOLDER = Path(__file__).parents[1] / "examples"
CHECKED = {"classes", "counts", "engines", "linear", "quickstart", "stream", "table"}


def run(name: str, **arguments: Any) -> Any:
    """Run an example's `main`, as `python examples/<name>.py` would."""
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"](**arguments)


def test_every_example_is_short_and_checked() -> None:
    sizes = {path.stem: len(path.read_text("utf-8").splitlines()) for path in FOLDER.glob("*.py")}
    assert set(sizes) == CHECKED
    assert max(sizes.values()) < 100, sizes


def test_quickstart_learns_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = run("quickstart", steps=200, folder=tmp_path).summary
    # Values of y have a standard deviation of about 0.75, so this is what training brings.
    assert scores["rmse"][0] < 0.5
    assert 0.75 < scores["coverage_0.95"][0] <= 1.0
    assert "calibration: 95 % intervals hold" in capsys.readouterr().out
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_stream_is_followed_renewed_and_taken_up_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run("stream", steps=200, folder=tmp_path)
    inside = [low <= level <= high for level, low, high in zip(record["level"], record["low"], record["high"], strict=True)]
    assert len(inside) == 48 and sum(inside) >= 40
    renewed = [i for i, new in enumerate(record["renewed"]) if new]
    assert renewed and all(record["effective"][i] < 32 for i in renewed)
    # Levels have a standard deviation of about 0.8 m; what was learned and read narrows the prediction.
    widths = [high - low for low, high in zip(record["low"], record["high"], strict=True)]
    assert sum(widths[24:]) / 24 < 0.5 * widths[0]
    saved = bnnp.load_posterior(tmp_path / "gauge", bnnp.load(tmp_path / "gauge"))
    assert int(saved.counts) == 48
    assert "conditioned afresh" in capsys.readouterr().out
    assert (tmp_path / "stream.png").read_bytes().startswith(b"\x89PNG")


def test_table_predicts_later_visits(capsys: pytest.CaptureFixture[str]) -> None:
    error, inside = run("table", steps=120, shown=2)
    # Measurements have a standard deviation of about 12 and a noise of 1.5.
    assert 1.5 < error < 7.0
    assert 0.85 < inside <= 1.0
    assert "the last visit" in capsys.readouterr().out


def test_linear_is_exact_and_finds_the_prior() -> None:
    found = run("linear", steps=200)
    assert found["elbo"] == pytest.approx(found["by_hand"], abs=1e-9)
    # Standard errors over 300 data sets: 0.03 and 0.06.
    assert found["slope"] == pytest.approx(2.0, abs=0.15)
    assert found["intercept"] == pytest.approx(-1.0, abs=0.3)
    assert found["noise"] == pytest.approx(0.3, abs=0.02)


def test_classes_are_told_apart_from_a_few_labelled_images(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("classes", steps=150, tests=20)
    (log_p, accuracy), _ = found["this model"]
    # A third and log 1/3 without learning anything.
    assert accuracy > 0.5 and log_p > -1.0
    assert found["class frequencies"][0][0] == pytest.approx(-math.log(3))
    assert found["nearest class mean"][0][1] > 0.7
    assert "logistic regression" in capsys.readouterr().out


def test_counts_are_predicted_with_their_spread(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("counts", steps=150, tests=30)
    assert max(found, key=lambda name: found[name][0]) == "oracle"
    assert found["this model, NegativeBinomial"][0] > found["this model, Poisson"][0]
    assert found["this model, NegativeBinomial"][0] > found["oracle"][0] - 1.0
    assert "95 % intervals hold" in capsys.readouterr().out


def test_engines_are_compared_on_the_same_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("engines", steps=150, tests=2, quick=True, folder=tmp_path)
    assert [(row.name, row.failed) for row in found.rows] == [("amortised", None), ("mean_field", None), ("nuts", None)]
    # Values have a standard deviation of about 0.75: a density of log 0.3 or so a point without learning anything.
    assert all(row.scores["joint_log_density"][0] > -1.0 for row in found.rows)
    assert "last layer integrated out: all rows" in capsys.readouterr().out
    again = run("engines", steps=150, tests=2, quick=True, folder=tmp_path)
    assert [row.per_task for row in again.rows] == [row.per_task for row in found.rows]
    assert all((tmp_path / name).is_file() for name in ("engines.json", "scores.png", "predictions.png"))
