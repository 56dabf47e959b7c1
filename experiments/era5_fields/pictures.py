"""The pictures of the study: one map completed from a few cells by several methods, and maps drawn from the learned prior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import bnnp
from bnnp.evaluation import Model
from bnnp.plots import DPI, INK, TICK, TITLE
from experiments.common.study import Split
from experiments.era5_fields.fields import Fields

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draws", "maps"]

TEMPERATURE, ERROR, SPREAD = "viridis", "RdBu_r", "magma_r"
UNSEEN = "#E4E4E4"


def maps(model: Model, others: Mapping[str, Model], task: Split, fields: Fields, title: str, particles: int) -> Figure:
    """Draw the truth and what was seen, and for each method its mean, its error and its standard deviation.

    Arguments:
        model: ours.
        others: rivals by name.
        task: (xc, yc, xt, yt).
        fields: says where the cells are.
        title: of the picture.
        particles: of our prediction.
    """
    xc, yc, xt, yt = task
    seen, truth = _grid(fields, xc, yc), _grid(fields, torch.cat([xc, xt]), torch.cat([yc, yt]))
    rows = []
    for name, method in {"this model": model, **others}.items():
        with torch.no_grad():
            found = method.condition(xc[None], yc[None], num_samples=particles).predict(xt[None])
        mean, std = (value.reshape(-1, 1).float() for value in (found.mean, found.std))  # type: ignore[attr-defined]
        whole = _grid(fields, torch.cat([xc, xt]), torch.cat([yc, mean]))
        rows.append((name, whole, _grid(fields, xt, mean - yt), _grid(fields, xt, std)))
    low, high = float(truth.min()), float(truth.max())
    worst = float(np.quantile(np.abs(np.concatenate([row[2][~np.isnan(row[2])] for row in rows])), 0.99))
    widest = float(np.quantile(np.concatenate([row[3][~np.isnan(row[3])] for row in rows]), 0.99))
    fig = _figure(8.4, 2.55 * (len(rows) + 1) + 1.1)
    axes = fig.subplots(len(rows) + 1, 3, squeeze=False)
    for ax, what, values in zip(axes[0], ("truth", f"what is seen ({len(xc)} of {len(fields.x)} cells)"), (truth, seen), strict=False):
        shown = _map(ax, fields, values, what, TEMPERATURE, low, high)
    axes[0, 2].axis("off")
    for i, (name, mean, error, std) in enumerate(rows, start=1):
        _map(axes[i, 0], fields, mean, f"{name}: mean", TEMPERATURE, low, high)
        wrong = _map(axes[i, 1], fields, error, "mean less truth", ERROR, -worst, worst)
        wide = _map(axes[i, 2], fields, std, "standard deviation", SPREAD, 0.0, widest)
    for column, mappable in enumerate((shown, wrong, wide)):
        bar = fig.colorbar(
            mappable, ax=axes[:, column], location="bottom", fraction=0.04, pad=0.01, aspect=24, extend=("neither", "both", "max")[column]
        )
        bar.set_label(("temperature, K", "error, K", "standard deviation, K")[column], color=INK)
        bar.ax.tick_params(labelsize=TICK - 1, colors=INK)
    fig.suptitle(title, fontsize=TITLE, color=INK)
    return fig


def draws(model: bnnp.BNNP, fields: Fields, count: int, seed: int = 0) -> Figure:
    """Draw maps from the learned prior below maps of the test days."""
    drawn = model.prior_samples(fields.x, count, seed=seed, noisy=False).reshape(count, *fields.shape).numpy()
    hours = np.linspace(fields.hours["test"].start, fields.hours["test"].stop - 1, count).round().astype(int)
    real = fields.y[torch.from_numpy(hours)].reshape(count, *fields.shape).numpy()
    low, high = (float(np.quantile(real, q)) for q in (0.002, 0.998))
    fig = _figure(2.35 * count + 0.4, 6.1)
    axes = fig.subplots(2, count, squeeze=False)
    for j in range(count):
        _map(axes[0, j], fields, real[j], fields.times[hours[j]] + ":00", TEMPERATURE, low, high)
        shown = _map(axes[1, j], fields, drawn[j], f"drawn from the prior, {j + 1}", TEMPERATURE, low, high)
    bar = fig.colorbar(shown, ax=axes, location="bottom", fraction=0.05, pad=0.02, aspect=50, extend="both")
    bar.set_label("temperature, K", color=INK)
    bar.ax.tick_params(labelsize=TICK - 1, colors=INK)
    fig.suptitle("Maps of the test days, and maps drawn from the learned prior", fontsize=TITLE, color=INK)
    return fig


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def _grid(fields: Fields, x: torch.Tensor, values: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Put values at places into a map; NaN where there are none."""
    full = np.full(len(fields.x), np.nan)
    places = (x.double()[:, None] - fields.x.double()).abs().sum(-1).argmin(1)
    full[places.numpy()] = values.reshape(-1).double().numpy()
    return full.reshape(fields.shape)


def _map(ax: Axes, fields: Fields, values: np.ndarray[Any, Any], title: str, colours: str, low: float, high: float) -> Any:
    # Cells as wide as they are at this latitude, so that coasts have their shape.
    (west, south), (east, north) = fields.x.amin(0).tolist(), fields.x.amax(0).tolist()
    down = fields.x[0, 1] > fields.x[-1, 1]
    ratio = 1 / np.cos(np.radians(0.5 * (south + north)))
    shown = ax.imshow(
        values,
        origin="upper" if down else "lower",
        extent=(west, east, south, north),
        cmap=colours,
        vmin=low,
        vmax=high,
        aspect=ratio,
        interpolation="nearest",
    )
    ax.set_facecolor(UNSEEN)
    ax.set_title(title, fontsize=TICK, color=INK)
    ax.set_xticks([])
    ax.set_yticks([])
    return shown
