"""Every picture is drawn, written whole, and changes nothing for the rest of the process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import _pylab_helpers
from matplotlib.figure import Figure

from bnnp import plots

RNG = np.random.default_rng(0)
IMAGES = RNG.random((3, 8, 8))
SEEN = RNG.random((3, 8, 8)) < 0.3
X = np.linspace(-1.0, 1.0, 20)
RECORDS = [{"step": i, "objective": -1.0 / (i + 1), "validation": -1.0 if i % 10 == 0 else None} for i in range(50)]
PIT = {"calibrated": RNG.random(500), "too sure": np.where(RNG.random(500) < 0.5, 0.001, 0.999)}
PANELS: list[plots.Panel] = [
    {"title": "Prior", "x": X, "samples": RNG.normal(size=(40, 20))},
    {"title": "Posterior", "x": X, "mean": X, "lower": X - 1, "upper": X + 1, "truth": X, "xc": [0.0], "yc": [0.1]},
]
RANKS = {name: RNG.integers(0, 10, size=60) for name in ("noise", "f(0)", "f(1)", "f(2)", "f(3)")} | {"too high": np.zeros(60, dtype=int)}
BANDS = np.arange(1, 11) / 10 - 0.2 * np.arange(9, -1, -1) / 9, np.minimum(np.arange(1, 11) / 10 + 0.2, 1.0)
TABLE = {"ours": {"10 % seen": (0.5, 0.1), "50 % seen": (0.9, 0.1)}, "other": {"10 % seen": (-0.25, 0.1)}}

PICTURES: dict[str, Callable[[], Figure]] = {
    "learning_curve": lambda: plots.learning_curve(RECORDS),
    "learning_curve_without_validation": lambda: plots.learning_curve([{"step": 1, "objective": -1.0}]),
    "learning_curve_empty": lambda: plots.learning_curve([]),
    "functions_1d": lambda: plots.functions_1d(PANELS),
    "functions_1d_two_rows": lambda: plots.functions_1d(PANELS, columns=1),
    "prior_images": lambda: plots.prior_images(IMAGES - 1.0, IMAGES[:2], torch.from_numpy(IMAGES)),
    "completions": lambda: plots.completions(IMAGES, SEEN, IMAGES, 0.1 * IMAGES),
    "completions_labelled": lambda: plots.completions(IMAGES, SEEN, IMAGES, 0.0 * IMAGES, row_labels=["10 %", "25 %", "50 %"]),
    "coherent_one": lambda: plots.coherent_completions(IMAGES[0], SEEN[0], RNG.random((4, 8, 8))),
    "coherent_many": lambda: plots.coherent_completions(IMAGES, SEEN, RNG.random((4, 3, 8, 8))),
    "calibration": lambda: plots.calibration(PIT, independent=50),
    "rank_ecdf": lambda: plots.rank_ecdf(RANKS, 9, BANDS, dict.fromkeys(RANKS, 0.5)),
    "rank_ecdf_one": lambda: plots.rank_ecdf({"noise": torch.from_numpy(RANKS["noise"])}, 9, BANDS, {"noise": 0.0001}),
    "scores_bar": lambda: plots.scores_bar(TABLE),
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture_is_written_and_global_state_left_alone(name: str, tmp_path: Path) -> None:
    before = copy.deepcopy(dict(matplotlib.rcParams))
    path = plots.save_figure(PICTURES[name](), tmp_path / "new" / f"{name}.png", dpi=50)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 2000
    assert dict(matplotlib.rcParams) == before
    assert not _pylab_helpers.Gcf.figs
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", PICTURES)
def test_every_axis_that_carries_numbers_is_named(name: str) -> None:
    fig = PICTURES[name]()
    for ax in fig.axes:
        if ax.axison and len(ax.get_yticks()) and ax.get_subplotspec() is not None and not ax.images:
            first = ax.get_subplotspec().is_first_col()
            assert ax.get_title() and (ax.get_ylabel() or not first)


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    fig = plots.scores_bar(TABLE)

    def half_way(target: Path, **_: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(fig, "savefig", half_way)
    with pytest.raises(OSError, match="disk full"):
        plots.save_figure(fig, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_replaces_the_old_file_and_takes_its_format_from_the_name(tmp_path: Path) -> None:
    path = tmp_path / "picture.svg"
    path.write_bytes(b"old")
    plots.save_figure(plots.scores_bar(TABLE), str(path))
    assert b"<svg" in path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_learning_curve_shows_finite_values_only_and_marks_the_best() -> None:
    records = [
        {"step": 0, "objective": float("nan"), "validation": -3.0},
        {"step": 5, "objective": 1.0, "validation": -1.0},
        {"step": 9, "objective": 2.0, "validation": -2.0},
    ]
    lines = plots.learning_curve(records).axes[0].lines
    np.testing.assert_array_equal(lines[0].get_xdata(), [5.0, 9.0])
    np.testing.assert_array_equal(lines[2].get_ydata(), [-3.0, -1.0, -2.0])
    assert np.asarray(lines[3].get_xdata()).tolist() == [5.0]


def test_running_mean_is_the_mean_over_the_window() -> None:
    values = RNG.normal(size=450)
    got = plots._running_mean(values)
    for i in (0, 2, 200, 449):
        assert got[i] == pytest.approx(values[max(i - 4, 0) : i + 5].mean())


def test_unseen_pixels_are_not_drawn_in_grey() -> None:
    ax = plots.completions(IMAGES, SEEN, IMAGES, IMAGES).axes[1]
    drawn = np.ma.filled(ax.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(np.isfinite(drawn), SEEN[0])
    red, green, blue, _ = ax.get_facecolor()
    assert not red == green == blue


def test_calibration_line_is_the_share_of_values_below() -> None:
    ranks = np.array([0.1, 0.1, 0.6, 0.9])
    left, right = plots.calibration({"method": ranks}, levels=(0.5, 0.9)).axes
    line = next(line for line in left.lines if line.get_label() == "method")
    for nominal, share in zip(line.get_xdata(), line.get_ydata(), strict=True):
        assert share == np.mean(ranks <= nominal)
    heights = [bar.get_height() for bar in right.patches]
    assert heights == [0.25, 1.0]


def test_calibration_band_has_the_half_width_of_massart() -> None:
    left = plots.calibration({"method": [0.5]}, independent=200).axes[0]
    corners = left.collections[0].get_paths()[0].vertices
    middle = corners[np.isclose(corners[:, 0], 0.5)][:, 1]
    assert middle.max() - middle.min() == pytest.approx(2 * np.sqrt(np.log(2 / 0.05) / 400))
    assert not plots.calibration({"method": [0.5]}).axes[0].collections


def test_scores_bar_draws_the_means() -> None:
    ax = plots.scores_bar(TABLE).axes[0]
    assert sorted(bar.get_height() for bar in ax.patches) == [-0.25, 0.5, 0.9]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["10 % seen", "50 % seen"]


def test_rank_ecdf_draws_the_share_of_ranks_less_the_expected_and_marks_what_is_outside() -> None:
    p_values = dict.fromkeys(RANKS, 0.5) | {"f(0)": 0.004, "too high": 0.0001}
    axes = plots.rank_ecdf(RANKS, 9, BANDS, p_values).axes
    assert [ax.get_title().split("\n")[1] for ax in axes] == ["p = 0.50", "p = 0.004", *["p = 0.50"] * 3, "p < 0.001"]
    for ax, (name, ranks) in zip(axes, RANKS.items(), strict=True):
        line = next(line for line in ax.lines if line.get_label() == "observed")
        marked = next(line for line in ax.lines if line.get_label() == "observed, outside")
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        np.testing.assert_allclose(x, np.arange(11) / 10)
        np.testing.assert_allclose(y, [0.0, *(np.mean(ranks <= i) - (i + 1) / 10 for i in range(10))], atol=1e-12)
        outside = [i for i in range(10) if not BANDS[0][i] - 1e-9 <= np.mean(ranks <= i) <= BANDS[1][i] + 1e-9]
        assert np.flatnonzero(np.isfinite(np.asarray(marked.get_ydata()))).tolist() == [i + 1 for i in outside]
        assert ax.get_title().startswith(name)
    assert len(outside) == 7  # all ranks are 0: above the band until it holds 1


def test_rank_ecdf_says_how_to_read_it_and_fills_rows_evenly() -> None:
    fig = plots.rank_ecdf(RANKS, 9, BANDS, dict.fromkeys(RANKS, 0.5))
    assert fig.legends[0].get_title().get_text() == plots.HOW_TO_READ_RANKS
    assert [ax.get_subplotspec().get_geometry()[:2] for ax in fig.axes] == [(2, 3)] * 6
    assert [bool(ax.get_xlabel()) for ax in fig.axes] == [False] * 3 + [True] * 3
    with pytest.raises(ValueError, match="at least one quantity"):
        plots.rank_ecdf({}, 9, BANDS, {})
