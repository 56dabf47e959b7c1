"""Pictures of a collection of tasks, and of what a run predicts for one of them, by the number of inputs.

One input gives curves, two inputs on a lattice (a field, an image) give maps, anything else gives scatter plots. Names of columns and tasks
come from files: they are shortened, and shown as they are written, never read as formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from bnnp.data.collection import BoolArray, Collection, Column, FloatArray, Triple
from bnnp.networks import BNNP
from bnnp.plots import BLUE, CYCLE, GRID, INK, LABEL, ORANGE, RED, SKY, TICK, TITLE, UNSEEN, _figure, _legend_below, dress
from bnnp.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Lattice", "collection", "plain", "prediction", "prior", "usable"]

VERTICAL = ("lat", "row", "y", "north", "height", "depth", "level", "alt")
MOST_POINTS = 3000  # of a scatter plot
MOST_INPUTS = 6
CURVE = 240  # points of a drawn function of one input
MOST_ROWS = 4  # outputs drawn in one picture


def plain(text: object, most: int = 34) -> str:
    """Return a name as matplotlib draws it letter by letter: on one line, not too long, no formula.

    Example:
        >>> plain("a $name$"), plain("x" * 50, most=4)
        ('a \\\\$name\\\\$', 'xxx…')
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return (line if len(line) <= most else line[: most - 1] + "…").replace("$", r"\$")


@dataclass(frozen=True, eq=False)
class Lattice:
    """Hold two inputs whose values form a lattice, so that a task is a map.

    Arguments:
        vertical: which input goes from bottom to top (or from top to bottom).
        horizontal: which goes from left to right.
        rows: values of the vertical input, increasing.
        columns: values of the horizontal input, increasing.
        downwards: the vertical input increases from top to bottom.
        aspect: of the axes, for matplotlib.
    """

    vertical: int
    horizontal: int
    rows: FloatArray
    columns: FloatArray
    downwards: bool
    aspect: float | Literal["auto", "equal"]

    @staticmethod
    def of(x: FloatArray, inputs: Sequence[Column], kind: str) -> Lattice | None:
        """Find two of the first four inputs that form a lattice at least half full, each pair of values once; None where there are none."""
        for i in range(min(x.shape[1], 4)):
            for j in range(i + 1, min(x.shape[1], 4)):
                sides = len(np.unique(x[:, i])), len(np.unique(x[:, j]))
                full = min(sides) >= 3 and len(x) >= 0.5 * sides[0] * sides[1]
                if full and len(np.unique(x[:, [i, j]], axis=0)) == len(x):
                    return Lattice._oriented(x, i, j, inputs, kind)
        return None

    @staticmethod
    def _oriented(x: FloatArray, i: int, j: int, inputs: Sequence[Column], kind: str) -> Lattice:
        """Put what is called latitude, row or the like upright; of an image the first."""
        upright = [inputs[k].name.lower().startswith(VERTICAL) for k in (i, j)]
        if (kind == "images" and not upright[1]) or (upright[0] and not upright[1]):
            i, j = j, i
        down = kind == "images" or inputs[j].name.lower().startswith(("row", "depth"))
        rows, columns = np.unique(x[:, j]), np.unique(x[:, i])
        aspect: float | Literal["auto", "equal"] = "equal" if kind == "images" else "auto"
        if inputs[j].name.lower().startswith("lat") and inputs[i].name.lower().startswith("lon"):
            aspect = 1.0 / max(math.cos(math.radians(float(rows.mean()))), 0.2)
        return Lattice(j, i, rows, columns, down, aspect)

    def place(self, x: FloatArray, values: FloatArray) -> FloatArray:
        """Return values (n,) or (n, 3) of the points x on the lattice, NaN where there are none."""
        rows, columns = np.searchsorted(self.rows, x[:, self.vertical]), np.searchsorted(self.columns, x[:, self.horizontal])
        full = np.full((len(self.rows), len(self.columns), *values.shape[1:]), np.nan)
        full[rows.clip(max=len(self.rows) - 1), columns.clip(max=len(self.columns) - 1)] = values
        return full

    def draw(self, ax: Axes, x: FloatArray, values: FloatArray, title: str, **options: Any) -> Any:
        """Draw values as a map; three columns of values are red, green and blue."""
        full = self.place(x, values)
        ax.set_facecolor(UNSEEN)
        if full.ndim == 3:
            there = np.isfinite(full[..., :1] + full[..., 1:2] + full[..., 2:]).astype(np.float64)
            full = np.concatenate([np.nan_to_num(full).clip(0, 1), there], axis=-1)
        shown = ax.pcolormesh(self.columns, self.rows, full, shading="nearest", rasterized=True, **options)
        if self.downwards:
            ax.invert_yaxis()
        ax.set_aspect(self.aspect)
        ax.set_title(title, fontsize=LABEL, color=INK)
        ax.tick_params(labelsize=TICK - 2, colors=INK)
        if isinstance(self.aspect, str) and self.aspect == "equal":
            ax.set_xticks([])
            ax.set_yticks([])
        return shown


def usable(task: Any, model: BNNP) -> Triple:
    """Return the points of (x, y, mask) that the model can be given: with any output, or with all where it knows no missing ones."""
    x, y, *rest = (np.asarray(part.cpu() if isinstance(part, torch.Tensor) else part) for part in task if part is not None)
    x, y = (np.asarray(part, dtype=np.float64).reshape(len(part), d) for part, d in ((x, model.x_dim), (y, model.y_dim)))
    mask = np.broadcast_to((rest[0] if rest[0].ndim == 2 else rest[0][:, None]) if rest else True, y.shape) & ~np.isnan(y)
    keep = mask.any(-1) if model.missing_outputs else mask.all(-1)
    return x[keep], np.where(mask, y, 0.0)[keep], mask[keep]


def collection(collection: Collection, seed: int = 0) -> Figure:
    """Draw what the data look like: some tasks as curves or maps; or, with more inputs, outputs against inputs, and the sizes of tasks.

    Arguments:
        collection: of any number of tasks.
        seed: of the choice of tasks.
    """
    rng = np.random.default_rng(seed)
    picked = np.sort(rng.permutation(len(collection))[:6])
    tasks = [(collection.names[i], *collection[int(i)]) for i in picked]
    if not tasks or all(len(x) == 0 for _, x, _, _ in tasks):
        fig = _figure(5.0, 1.2)
        fig.text(0.5, 0.5, "There are no points to draw.", ha="center", color=INK)
        return fig
    kind = str(collection.recipe.get("kind", "arrays"))
    if collection.x_dim == 1:
        return _curves(collection, tasks)
    if (lattice := Lattice.of(tasks[0][1], collection.inputs, kind)) is not None:
        return _maps(collection, tasks, lattice, kind)
    return _clouds(collection, rng)


def _curves(data: Collection, tasks: Sequence[Any]) -> Figure:
    """Draw each task as points joined by a thin line, or as a line alone where points would touch."""
    rows = min(data.y_dim, MOST_ROWS)
    fig = _figure(7.0, 2.7 * rows + 1.2)
    axes = fig.subplots(rows, 1, squeeze=False, sharex=True)[:, 0]
    for j, ax in enumerate(axes):
        for colour, (name, x, y, mask) in zip(CYCLE, tasks, strict=False):
            order = np.argsort(x[:, 0], kind="stable")
            order = order[mask[order, j]]
            style = "o-" if len(order) <= 80 else "-"
            ax.plot(x[order, 0], y[order, j], style, color=colour, markersize=3.5, linewidth=0.8, alpha=0.9, label=plain(name, 22))
        bottom = plain(data.inputs[0]) if j == rows - 1 else ""
        dress(ax, f"{len(tasks)} of {len(data)} tasks" if j == 0 else "", bottom, plain(data.outputs[j]))
    handles, names = axes[0].get_legend_handles_labels()
    _legend_below(fig, handles, names, columns=3)
    return fig


def _is_colour(kind: str, y_dim: int) -> bool:
    return kind == "images" and y_dim == 3


def _map_options(kind: str, values: FloatArray) -> dict[str, Any]:
    """Return colours and their range; an image of one output is grey."""
    seen = values[np.isfinite(values)]
    low, high = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 1.0)
    return {"cmap": "gray" if kind == "images" else "viridis", "vmin": low, "vmax": high if high > low else low + 1.0}


def _maps(data: Collection, tasks: Sequence[Any], lattice: Lattice, kind: str) -> Figure:
    """Draw tasks as maps: six of one output, or three of each of several."""
    colour = _is_colour(kind, data.y_dim)
    outputs = [0] if colour else list(range(min(data.y_dim, MOST_ROWS)))
    tasks = tasks if len(outputs) == 1 else tasks[:3]
    columns = min(len(tasks), 3)
    rows = math.ceil(len(tasks) / columns) * len(outputs)
    fig = _figure(7.0, (5.4 / columns * _height(lattice) + 0.35) * rows + 0.6)
    axes = fig.subplots(rows, columns, squeeze=False)
    for k, j in enumerate(outputs):
        block = axes.ravel() if len(outputs) == 1 else axes[k]
        values = np.concatenate([np.where(mask[:, j], y[:, j], np.nan) for _, _, y, mask in tasks])
        for ax, (name, x, y, mask) in zip(block, tasks, strict=False):
            own = Lattice.of(x, data.inputs, kind) or lattice
            if colour:
                own.draw(ax, x, np.where(mask, y, np.nan), plain(name, 22))
            else:
                shown = own.draw(ax, x, np.where(mask[:, j], y[:, j], np.nan), plain(name, 22), **_map_options(kind, values))
        for ax in block[len(tasks) :]:
            ax.set_axis_off()
        if not colour:
            _side_bar(fig, shown, list(block), plain(data.outputs[j]))
    if lattice.aspect != "equal":
        fig.supxlabel(plain(data.inputs[lattice.horizontal]), fontsize=LABEL, color=INK)
        fig.supylabel(plain(data.inputs[lattice.vertical]), fontsize=LABEL, color=INK)
    fig.suptitle(f"{len(tasks)} of {len(data)} tasks", fontsize=TITLE - 1, color=INK)
    return fig


def _height(lattice: Lattice) -> float:
    """Return how high a map is beside its width."""
    if lattice.aspect == "auto":
        return 0.8
    stretch = 1.0 if isinstance(lattice.aspect, str) else lattice.aspect
    return float(np.clip(stretch * np.ptp(lattice.rows) / max(np.ptp(lattice.columns), 1e-12), 0.4, 1.5))


def _side_bar(fig: Figure, shown: Any, axes: Any, label: str) -> None:
    bar = fig.colorbar(shown, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(label, fontsize=TICK, color=INK)
    bar.ax.tick_params(labelsize=TICK - 1, colors=INK)
    bar.outline.set_edgecolor(GRID)


def _clouds(data: Collection, rng: np.random.Generator) -> Figure:
    """Draw the first outputs against each input, over tasks, and how large tasks are."""
    picked = rng.permutation(len(data))[:100]
    x, y = _pooled(data, picked, rng)
    outputs, inputs = min(data.y_dim, 3), min(data.x_dim, MOST_INPUTS)
    columns = 2 if inputs in (2, 4) else min(inputs, 3)
    per_output = math.ceil(inputs / columns)
    rows = per_output * outputs + 1
    fig = _figure(7.0, 2.1 * rows + 0.6)
    grid = fig.add_gridspec(rows, columns)
    for j in range(outputs):
        for i in range(inputs):
            ax = fig.add_subplot(grid[j * per_output + i // columns, i % columns])
            seen = ~np.isnan(y[:, j])
            if seen.sum() > 1000:
                ax.hexbin(x[seen, i], y[seen, j], gridsize=24, cmap="Blues", mincnt=1, linewidths=0.1)
            else:
                ax.plot(x[seen, i], y[seen, j], "o", color=BLUE, markersize=2.5, alpha=0.5)
            dress(ax, "", plain(data.inputs[i], 22), plain(data.outputs[j], 22) if i % columns == 0 else "")
            ax.tick_params(labelsize=TICK - 2)
    ax = fig.add_subplot(grid[-1, :])
    ax.hist(np.asarray(data.sizes), bins=min(30, max(5, len(set(data.sizes)))), color=SKY, edgecolor="white")
    dress(ax, "", "points of a task", "tasks")
    left_out = f", {data.x_dim - inputs} further inputs not drawn" if data.x_dim > inputs else ""
    fig.suptitle(f"{len(x)} points of {len(picked)} tasks{left_out}", fontsize=TITLE - 1, color=INK)
    return fig


def _pooled(data: Collection, picked: Any, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Return points of some tasks together, at most a fixed number, NaN where an output is missing."""
    tasks = [data[int(i)] for i in picked]
    x = np.concatenate([x for x, _, _ in tasks])
    y = np.concatenate([np.where(mask, y, np.nan) for _, y, mask in tasks])
    keep = rng.permutation(len(x))[:MOST_POINTS]
    return x[keep], y[keep]


def prediction(run: Run, context: Any, target: Any, num_samples: int = 64, seed: int = 0, title: str = "") -> Figure:
    """Draw what a run predicts for one task, given its context.

    One input: mean, intervals and sampled functions. A lattice of two inputs: maps of truth, context, mean and standard deviation.
    Otherwise: predicted against observed. Class labels: their probabilities.

    Arguments:
        run: the model with the names of its columns.
        context: what is seen, (x, y) or (x, y, mask) with shapes (n, d_x), (n, d_y).
        target: what is predicted, likewise; y is None or NaN where it is not known.
        num_samples: particles.
        seed: of the particles.
        title: above the picture, for instance the name of the task.

    Returns:
        The figure, a row for each of the first four outputs.
    """
    model, known = run.model, usable(context, run.model)
    x = np.asarray(target[0], dtype=np.float64).reshape(-1, model.x_dim)
    y = (
        np.full((len(x), model.y_dim), np.nan)
        if target[1] is None
        else np.asarray(target[1], dtype=np.float64).reshape(len(x), model.y_dim)
    )
    if len(target) > 2 and target[2] is not None:
        mask = np.asarray(target[2])
        y = np.where(mask if mask.ndim == 2 else mask[:, None], y, np.nan)
    seen = known[2] if model.missing_outputs else None
    posterior = model.condition(known[0], known[1], mask=seen, num_samples=num_samples, seed=seed)
    both = np.concatenate([known[0], x])
    if model.x_dim == 1:
        fig = _draw_curves(run, posterior, known, (x, y))
    elif not model.likelihood.labels and (lattice := Lattice.of(both, run.inputs, run.kind)) is not None:
        fig = _draw_maps(run, posterior, known, (x, y), lattice)
    else:
        fig = _draw_against(run, posterior.predict(x, batch_size=4096), y)
    fig.suptitle(plain(title, 60), fontsize=TITLE, color=INK)
    return fig


def _numpy(value: Any) -> FloatArray:
    found: FloatArray = value.detach().cpu().double().numpy()
    return found


def _level(run: Run, j: int, k: int) -> str:
    """Return label number k of output j: its name where it was a text, and the number that stands for it on the axis."""
    named = (run.recipe.get("labels") or {}).get(run.outputs[j].name, [])
    return f"{plain(named[k], 20)} ({k})" if k < len(named) else str(k)


def _draw_curves(run: Run, posterior: Any, known: Triple, target: tuple[FloatArray, FloatArray]) -> Figure:
    both = np.concatenate([known[0], target[0]])[:, 0]
    low, high = (float(both.min()), float(both.max())) if len(both) else (-1.0, 1.0)
    x = np.linspace(low, high if high > low else low + 1.0, CURVE)
    predictive = posterior.predict(x[:, None])
    labels, rows = run.model.likelihood.labels, min(run.model.y_dim, MOST_ROWS)
    fig = _figure(7.0, 3.0 * rows + 1.2)
    axes = fig.subplots(rows, 1, squeeze=False, sharex=True)[:, 0]
    mean = _numpy(predictive.mean)
    quantiles = None if labels else [_numpy(predictive.quantile(q)) for q in (0.025, 0.25, 0.75, 0.975)]
    draws = None if labels else _numpy(predictive.sample(6, noisy=False, seed=0))
    for j, ax in enumerate(axes):
        if quantiles is not None and draws is not None:
            ax.fill_between(x, quantiles[0][:, j], quantiles[3][:, j], color=BLUE, alpha=0.13, linewidth=0, label="95 % interval")
            ax.fill_between(x, quantiles[1][:, j], quantiles[2][:, j], color=BLUE, alpha=0.25, linewidth=0, label="50 % interval")
            lines = ax.plot(x, draws[:, :, j].T, color=SKY, linewidth=0.9, alpha=0.9)
            lines[0].set_label("sampled functions")
            ax.plot(x, mean[:, j], color=BLUE, linewidth=2.0, label="predicted mean")
        elif mean.shape[-1] == run.model.y_dim:
            ax.plot(x, mean[:, j], color=BLUE, linewidth=2.0, label=f"probability of {_level(run, j, 1)}")
        else:
            for k in range(mean.shape[-1]):
                ax.plot(x, mean[:, k], color=CYCLE[k % len(CYCLE)], linewidth=2.0, label=f"probability of {_level(run, j, k)}")
        ax.plot(target[0][:, 0], target[1][:, j], "o", color=ORANGE, markersize=3.5, alpha=0.8, label="held out", zorder=4)
        seen = known[2][:, j]
        style: dict[str, Any] = {"color": RED, "markersize": 6, "markeredgecolor": "white", "zorder": 5}
        ax.plot(known[0][seen, 0], known[1][seen, j], "o", label="points seen", **style)
        dress(ax, "", plain(run.inputs[0]) if j == rows - 1 else "", plain(run.outputs[j]))
    handles, names = axes[0].get_legend_handles_labels()
    _legend_below(fig, handles, names, columns=3)
    return fig


def _draw_maps(run: Run, posterior: Any, known: Triple, target: tuple[FloatArray, FloatArray], lattice: Lattice) -> Figure:
    """Draw truth, context, mean and standard deviation; two by two, or a row for each of several outputs."""
    x, y = target
    every = np.concatenate([known[0], x])
    truth = np.concatenate([np.where(known[2], known[1], np.nan), y])
    predictive = posterior.predict(every, batch_size=4096)
    mean, std = _numpy(predictive.mean), _numpy(predictive.std)
    seen = np.concatenate([truth[: len(known[0])], np.full(y.shape, np.nan)])
    colour = _is_colour(run.kind, run.model.y_dim)
    outputs: list[Any] = [slice(None)] if colour else list(range(min(run.model.y_dim, MOST_ROWS)))
    known_truth = bool(np.isfinite(y).any())
    shape = (2, 2) if len(outputs) == 1 else (len(outputs), 4)
    fig = _figure(7.0 if len(outputs) == 1 else 10.0, min(2.9 * _height(lattice), 3.6) * shape[0] + 0.9)
    axes = fig.subplots(*shape, squeeze=False).reshape(len(outputs), 4)
    for row, j in zip(axes, outputs, strict=True):
        options = (
            {}
            if colour
            else _map_options(run.kind, truth[:, j] if run.kind == "images" and known_truth else np.concatenate([truth[:, j], mean[:, j]]))
        )
        names = ("truth", f"seen: {len(known[0])} of {len(every)}", "predicted mean", "standard deviation")
        for ax, values, name in zip(row[:3], (truth, seen, mean), names, strict=False):
            if name != "truth" or known_truth:
                shown = lattice.draw(ax, every, values[:, j], name, **options)
            else:
                ax.set_axis_off()
        spread = std.mean(-1) if colour else std[:, j]
        low, high = float(spread.min()), float(spread.max()) or 1.0
        # From 0 where that leaves something to see.
        unsure = lattice.draw(row[3], every, spread, names[3], cmap="YlOrRd", vmin=low if 0.5 * high < low < high else 0.0, vmax=high)
        label = "mean of the channels" if colour else plain(run.outputs[j])
        if not colour:
            _side_bar(fig, shown, row[2] if len(outputs) > 1 else row[1], label)
        _side_bar(fig, unsure, row[3], label)
    if lattice.aspect != "equal":
        fig.supxlabel(plain(run.inputs[lattice.horizontal]), fontsize=LABEL, color=INK)
        fig.supylabel(plain(run.inputs[lattice.vertical]), fontsize=LABEL, color=INK)
    return fig


def _draw_against(run: Run, predictive: Any, y: FloatArray) -> Figure:
    """Draw predictions with intervals against what was observed, or in the order of the targets where nothing was."""
    if run.model.likelihood.labels:
        return _draw_probabilities(run, _numpy(predictive.mean), y)
    mean, low, high = _numpy(predictive.mean), _numpy(predictive.quantile(0.025)), _numpy(predictive.quantile(0.975))
    rows = min(run.model.y_dim, MOST_ROWS)
    fig = _figure(5.6, 4.2 * rows + 0.8)
    for j, ax in enumerate(fig.subplots(rows, 1, squeeze=False)[:, 0]):
        seen: BoolArray = np.isfinite(y[:, j])
        known = bool(seen.any())
        at = y[seen, j] if known else np.arange(1.0, len(mean) + 1)
        keep = seen if known else np.ones(len(mean), dtype=np.bool_)
        inside = (low[keep, j] <= at) & (at <= high[keep, j]) if known else np.ones(len(at), dtype=np.bool_)
        for flag, ink, name in ((inside, BLUE, "95 % interval"), (~inside, RED, "95 % interval that misses")):
            middle = mean[keep, j][flag]
            reach = np.abs(np.stack([middle - low[keep, j][flag], high[keep, j][flag] - middle]))
            if flag.any():
                ax.errorbar(at[flag], middle, yerr=reach, fmt="o", color=ink, markersize=4, elinewidth=1.0, alpha=0.75, label=name)
        if known:
            ends = [float(min(at.min(), low[keep, j].min())), float(max(at.max(), high[keep, j].max()))]
            ax.plot(ends, ends, "--", color=INK, linewidth=1.2, label="predicted = observed")
        dress(ax, "", f"observed {plain(run.outputs[j])}" if known else "row of the targets", f"predicted {plain(run.outputs[j])}")
        _legend(ax)
    return fig


def _draw_probabilities(run: Run, p: FloatArray, y: FloatArray) -> Figure:
    """Draw how often each label was predicted with which probability, and how often it came: reliability of class labels."""
    fig = _figure(5.6, 4.2)
    ax = fig.add_subplot()
    several = p.shape[-1] != y.shape[-1]
    said = p if several else p[:, :1]
    came = np.stack([y[:, 0] == k for k in range(p.shape[-1])], axis=-1) if several else y[:, :1] > 0.5
    seen = np.isfinite(y[:, 0])
    for k in range(said.shape[-1]):
        jitter = np.linspace(-0.02, 0.02, len(said))[seen] + came[seen, k]
        name = f"label {k}" if several else "label 1"
        ax.plot(said[seen, k], jitter, "o", color=CYCLE[k % len(CYCLE)], markersize=4, alpha=0.6, label=name)
    ax.set_yticks([0, 1], ["no", "yes"])
    dress(ax, "", "predicted probability", f"{plain(run.outputs[0])} was this label")
    _legend(ax)
    return fig


def _legend(ax: Axes) -> None:
    ax.legend(fontsize=TICK - 1, facecolor="white", edgecolor=GRID, labelcolor=INK)


def prior(run: Run, data: Collection, seed: int = 0) -> Figure:
    """Draw tasks that the learned prior makes up beside real ones: curves, maps, or the distribution of their outputs.

    Arguments:
        run: the model with the names of its columns.
        data: real tasks; the inputs of made-up ones are theirs.
        seed: of the draws and of the choice of tasks.
    """
    rng = np.random.default_rng(seed)
    picked = [int(i) for i in rng.permutation(len(data))[:6]]
    real = [data[i] for i in picked]
    made = []
    for k, (x, _, _) in enumerate(real):
        drawn = _numpy(run.model.prior_samples(x, 1, seed=seed + k, noisy=True))[0]
        made.append((x, drawn, np.ones(drawn.shape, dtype=np.bool_)))
    lattice = Lattice.of(real[0][0], run.inputs, run.kind) if run.model.x_dim > 1 and real else None
    if run.model.x_dim == 1 or (lattice is None or run.model.likelihood.labels):
        return _prior_curves(run, made, real) if run.model.x_dim == 1 else _prior_spread(run, data, rng, seed)
    colour = _is_colour(run.kind, run.model.y_dim)
    fig = _figure(7.0, 2 * (1.45 * _height(lattice) + 0.35) + 0.2)
    axes = fig.subplots(2, 4, squeeze=False)
    options = (
        {}
        if colour
        else _map_options(run.kind, np.concatenate([y[:, 0] for _, y, _ in (real if run.kind == "images" else [*real, *made])]))
    )
    for row, tasks, name in zip(axes, (made, real), ("made up", "real"), strict=True):
        for ax, (x, y, mask) in zip(row, tasks, strict=False):
            shown = lattice.draw(ax, x, np.where(mask, y, np.nan) if colour else np.where(mask[:, 0], y[:, 0], np.nan), name, **options)
            ax.set_xticks([])
            ax.set_yticks([])
        for ax in row[len(tasks) :]:
            ax.set_axis_off()
    if not colour:
        _side_bar(fig, shown, list(axes.ravel()), plain(run.outputs[0]))
    return fig


def _prior_curves(run: Run, made: Sequence[Triple], real: Sequence[Triple]) -> Figure:
    rows = min(run.model.y_dim, MOST_ROWS)
    fig = _figure(7.0, 2.6 * rows + 0.8)
    axes = fig.subplots(rows, 2, squeeze=False, sharex=True, sharey="row")
    for j, row in enumerate(axes):
        for ax, tasks, name in zip(row, (made, real), ("made up by the learned prior", "real tasks"), strict=True):
            for colour, (x, y, mask) in zip(CYCLE, tasks, strict=False):
                order = np.argsort(x[:, 0], kind="stable")
                order = order[mask[order, j]]
                style = "o-" if len(order) <= 80 else "-"
                ax.plot(x[order, 0], y[order, j], style, color=colour, markersize=2.5, linewidth=0.8)
            label = plain(run.outputs[j], 24) if ax is row[0] else ""
            dress(ax, name if j == 0 else "", plain(run.inputs[0], 24) if j == rows - 1 else "", label)
    return fig


def _prior_spread(run: Run, data: Collection, rng: np.random.Generator, seed: int) -> Figure:
    """Draw the outputs of made-up and of real tasks as histograms, at the same inputs."""
    x, y = _pooled(data, rng.permutation(len(data))[:60], rng)
    drawn = _numpy(run.model.prior_samples(x[:1000], 20, seed=seed, noisy=True)).reshape(-1, run.model.y_dim)
    rows = min(run.model.y_dim, MOST_ROWS)
    fig = _figure(6.0, 2.7 * rows + 0.8)
    for j, ax in enumerate(fig.subplots(rows, 1, squeeze=False)[:, 0]):
        real = y[np.isfinite(y[:, j]), j]
        ends = np.quantile(np.concatenate([real, np.quantile(drawn[:, j], [0.01, 0.99])]), [0.0, 1.0])
        bins = np.linspace(ends[0], ends[1] if ends[1] > ends[0] else ends[0] + 1.0, 40)
        share = 1.0 / max(len(real), 1)
        ax.hist(real, bins=bins, weights=np.full(len(real), share), color=GRID, edgecolor="white", label="real tasks")
        counts, _ = np.histogram(drawn[:, j], bins=bins)
        ax.stairs(counts / len(drawn), bins, color=BLUE, linewidth=2.0, label="made up by the learned prior")
        dress(ax, "", plain(run.outputs[j]), "share of points")
        _legend(ax)
    return fig
