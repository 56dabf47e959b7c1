"""Pictures of data and predictions: every kind is drawn, names are shown as written, maps put values where they belong."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import _pylab_helpers
from matplotlib.figure import Figure

import bnnp
from bnnp import plots, plots_data
from bnnp.data.collection import Collection, Column
from bnnp.data.images import pixel_grid
from bnnp.plots_data import Lattice
from bnnp.runs import Run

RNG = np.random.default_rng(0)
HOSTILE = "<b>$\\frac$ \n\x00 \N{SNOWMAN}</b>" + "x" * 200


def lattice_inputs(rows: int = 4, columns: int = 5) -> Any:
    latitude, longitude = np.meshgrid(np.linspace(50, 53, rows), np.linspace(-3, 1, columns), indexing="ij")
    return np.stack([longitude.ravel(), latitude.ravel()], -1)


def several(x_dim: int, y_dim: int, x: Any = None, count: int = 7, n: int = 12) -> list[Any]:
    tasks = []
    for _ in range(count):
        at = RNG.normal(size=(n, x_dim)) if x is None else x
        y = RNG.normal(size=(len(at), y_dim))
        y[RNG.random(y.shape) < 0.1] = np.nan
        tasks.append((at, y))
    return tasks


def named(count: int, prefix: str) -> list[Column]:
    return [Column(f"{prefix}{i} {HOSTILE if i == 0 else ''}", "m$^2$") for i in range(count)]


PIXELS = pixel_grid(3, 4, torch.float64).numpy()
SOURCES: dict[str, tuple[list[Any], str]] = {
    "curves": (several(1, 1), "arrays"),
    "long curves of two outputs": (several(1, 2, n=100), "signal"),
    "two fields": (several(2, 2, lattice_inputs()), "grid"),
    "image": (several(2, 1, PIXELS), "images"),
    "colours": ([(x, 0.5 + 0.1 * y) for x, y in several(2, 3, PIXELS)], "images"),
    "large table": (several(4, 2, n=300), "table"),
    "one task": (several(2, 1, count=1), "table"),
    "field and height": (several(3, 1, np.c_[lattice_inputs(), RNG.normal(size=20)]), "grid"),
}


def source(name: str) -> Collection:
    tasks, kind = SOURCES[name]
    x_dim, y_dim = np.shape(tasks[0][0])[1], np.shape(tasks[0][1])[1]
    names = [f"{i} {HOSTILE}" for i in range(len(tasks))]
    return Collection.of(tasks, named(x_dim, "x"), named(y_dim, "y"), recipe={"kind": kind}, names=names)


def run_of(data: Collection, **options: Any) -> Run:
    options = {"missing_outputs": data.y_dim > 1} | options
    model = bnnp.BNNP(data.x_dim, data.y_dim, hidden=(4,), **options)
    return Run.of(model, data.inputs, data.outputs, recipe=data.recipe)


def halves(task: Any) -> tuple[Any, Any]:
    n = len(task[0]) // 3
    return tuple(part[:n] for part in task), tuple(part[n:] for part in task)


def drawn(fig: Figure, path: Path) -> None:
    with np.errstate(all="raise"):
        file = plots.save_figure(fig, path / "picture.png", dpi=40)
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:Glyph")  # what the font lacks is drawn as a box
@pytest.mark.parametrize("name", SOURCES)
def test_every_source_and_its_prediction_and_prior_are_drawn(name: str, tmp_path: Path) -> None:
    before = copy.deepcopy(dict(matplotlib.rcParams))
    data = source(name)
    run = run_of(data)
    context, target = halves(data[0])
    drawn(plots_data.collection(data), tmp_path)
    drawn(plots_data.prior(run, data), tmp_path)
    drawn(plots_data.prediction(run, context, target, num_samples=4, title=HOSTILE), tmp_path)
    if name in ("curves", "image", "one task"):
        drawn(plots_data.prediction(run, context, (target[0], None), num_samples=4), tmp_path)
    assert dict(matplotlib.rcParams) == before and not _pylab_helpers.Gcf.figs


@pytest.mark.parametrize(
    ("likelihood", "x_dim"), [(bnnp.Bernoulli(), 1), (bnnp.Categorical(3), 1), (bnnp.Categorical(3), 3), (bnnp.Poisson(), 3)]
)
def test_labels_and_counts_are_drawn(likelihood: Any, x_dim: int, tmp_path: Path) -> None:
    tasks = [(RNG.normal(size=(9, x_dim)), RNG.integers(0, 2, size=(9, 1)).astype(float)) for _ in range(3)]
    data = Collection.of(tasks, [f"x{i}" for i in range(x_dim)], ["label"])
    run = run_of(data, likelihood=likelihood)
    drawn(plots_data.prediction(run, *halves(data[0]), num_samples=4), tmp_path)
    drawn(plots_data.prior(run, data), tmp_path)


def test_labels_are_drawn_with_their_names() -> None:
    data = Collection.of([(RNG.normal(size=(9, 1)), RNG.integers(0, 3, size=(9, 1)).astype(float)) for _ in range(3)], ["x"], ["label"])
    run = run_of(data, likelihood=bnnp.Categorical(3))
    named = replace(run, recipe={**run.recipe, "labels": {"label": ["ill", "well", "a $ sign"]}})
    for shown, said in ((run, "probability of 1"), (named, "probability of well (1)"), (named, r"probability of a \$ sign (2)")):
        fig = plots_data.prediction(shown, *halves(data[0]), num_samples=4)
        assert said in [
            text.get_text() for legend in (*fig.legends, *(ax.get_legend() for ax in fig.axes)) if legend for text in legend.texts
        ]


def test_nothing_to_draw_is_said() -> None:
    fig = plots_data.collection(Collection.of([], ["x"], ["y"]))
    assert "no points" in fig.texts[0].get_text()


def test_an_empty_context_is_drawn(tmp_path: Path) -> None:
    data = source("curves")
    x, y, mask = data[0]
    drawn(plots_data.prediction(run_of(data), (x[:0], y[:0], mask[:0]), (x, y, mask), num_samples=4), tmp_path)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_lattice_puts_values_where_they_belong(order: list[int]) -> None:
    x = lattice_inputs(4, 5)
    keep = np.sort(RNG.permutation(len(x))[:15])
    columns = [Column("longitude"), Column("latitude")]
    lattice = Lattice.of(x[:, order], [columns[i] for i in order], "grid")
    assert lattice is not None and (lattice.horizontal, lattice.vertical) == (order.index(0), order.index(1))
    values = RNG.normal(size=len(keep))
    found = lattice.place(x[keep][:, order], values)
    slow = np.full((4, 5), np.nan)
    for (longitude, latitude), value in zip(x[keep], values, strict=True):
        slow[np.flatnonzero(lattice.rows == latitude)[0], np.flatnonzero(lattice.columns == longitude)[0]] = value
    np.testing.assert_array_equal(found, slow)


def test_images_have_their_first_row_at_the_top() -> None:
    lattice = Lattice.of(PIXELS, [Column("row"), Column("column")], "images")
    assert lattice is not None and lattice.downwards and (lattice.vertical, lattice.horizontal) == (0, 1)
    assert lattice.place(PIXELS, np.arange(12.0)).tolist() == np.arange(12.0).reshape(3, 4).tolist()


def test_scattered_or_repeated_places_are_no_lattice() -> None:
    columns = [Column("a"), Column("b")]
    assert Lattice.of(RNG.normal(size=(30, 2)), columns, "table") is None
    assert Lattice.of(np.repeat(lattice_inputs(), 2, axis=0), columns, "table") is None


def test_points_that_a_model_cannot_take_are_left_out() -> None:
    x, y = np.arange(4.0)[:, None], np.array([[1.0, np.nan], [1.0, 2.0], [np.nan, np.nan], [3.0, 4.0]])
    all_of_them = plots_data.usable((x, y), bnnp.BNNP(1, 2, hidden=()))
    any_of_them = plots_data.usable((x, y, np.array([True, True, True, False])), bnnp.BNNP(1, 2, hidden=(), missing_outputs=True))
    assert all_of_them[0].ravel().tolist() == [1.0, 3.0] and any_of_them[0].ravel().tolist() == [0.0, 1.0]
    assert np.isfinite(any_of_them[1]).all() and any_of_them[2].tolist() == [[True, False], [True, True]]


def test_names_are_shown_as_written() -> None:
    assert plots_data.plain(HOSTILE).startswith("<b>\\$\\frac\\$") and len(plots_data.plain(HOSTILE, 20)) <= 22
    data = source("curves")
    labels = {ax.get_ylabel() for ax in plots_data.collection(data).axes}
    assert labels == {plots_data.plain(data.outputs[0])}
