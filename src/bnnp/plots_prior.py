"""Pictures of a learned prior: its scales, its directions, its functions, and what each layer of it does.

Functions take a trained model and return a matplotlib `Figure`, in the manner of `bnnp.plots`, whose `save_figure` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from bnnp import reading
from bnnp.networks import BNNP
from bnnp.plots import BLUE, CYCLE, GRID, INK, LABEL, ORANGE, SKY, TICK, TITLE, FloatArray, _figure, _float, _legend_below, _signed, dress
from bnnp.reading import LayerEffect

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

__all__ = ["directions", "functions", "layer_effects", "scales"]

DEFAULT = "deviation without learning"


@torch.no_grad()
def scales(model: BNNP, title: str = "How wide is the learned prior, layer by layer?") -> Figure:
    """Draw the standard deviations and the means of each layer's weights against the default's deviation 1 / sqrt(p).

    Boxes hold the middle half of a layer's standard deviations, whiskers all of them; a dot is the root mean square of the means.

    Arguments:
        model: whose prior is drawn.
        title: above the picture.
    """
    layers = list(model.prior)
    fig = _figure(max(8.5, 1.8 * len(layers) + 2.5), 4.6)
    ax = fig.add_subplot()
    sds, means = [], []
    for layer in layers:
        cov = layer.p * layer.covariance().double()
        sds.append(_float(cov.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12).sqrt().flatten().cpu()))
        means.append(math.sqrt(layer.p) * float(layer.mean.double().square().mean().sqrt()))
    places = np.arange(len(layers), dtype=np.float64)
    ax.axhline(1.0, color=INK, linestyle="--", linewidth=1.2, label=DEFAULT)
    style: dict[str, Any] = {"color": INK, "linewidth": 1.2}
    ax.boxplot(
        sds, positions=places - 0.12, widths=0.22, whis=(0, 100), patch_artist=True, manage_ticks=False, medianprops=style,
        boxprops={"facecolor": SKY, "edgecolor": INK}, whiskerprops=style, capprops=style,
    )  # fmt: skip
    ax.bar(0, math.nan, color=SKY, edgecolor=INK, label="standard deviations of the weights")
    known = [i for i, mean in enumerate(means) if mean > 1e-6]
    ax.plot([i + 0.16 for i in known], [means[i] for i in known], "o", color=ORANGE, markersize=9, label="means (root mean square)")
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.4), max(high, 2.5))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xticks(places, [f"layer {i + 1}\n{layer.d_out} x {layer.p} weights" for i, layer in enumerate(layers)])
    ax.set_xlim(-0.6, len(layers) - 0.4)
    dress(ax, title, "", "in units of the default's deviation")
    ax.grid(False, axis="x")
    handles, labels = ax.get_legend_handles_labels()
    _legend_below(fig, handles, labels, columns=3)
    return fig


def directions(
    model: BNNP, columns: Sequence[str] | None = None, count: int = 4, title: str = "In which directions do weights vary?"
) -> Figure:
    """Draw the variances along each layer's directions, and the first layer's leading directions in terms of the inputs.

    Arguments:
        model: whose prior is drawn.
        columns: names of the input columns.
        count: how many directions of the first layer are drawn.
        title: above the picture.
    """
    found = reading.directions(model.prior)
    names = [f"x{j + 1}" for j in range(model.x_dim)] if columns is None else [str(name) for name in columns]
    if len(names) != model.x_dim:
        raise ValueError(f"Expected names of {model.x_dim} input columns. Got {len(names)}: {names}.")
    fig = _figure(11.0, 4.8)
    left, right = fig.subplots(1, 2, width_ratios=(1.25, 1.0))
    left.axhline(1.0, color=INK, linestyle="--", linewidth=1.2, label="default: 1 along every direction")
    for i, layer in enumerate(found):
        values, colour = _float(layer.values.clamp_min(1e-12)), CYCLE[i % len(CYCLE)]
        x = np.arange(1, len(values) + 1)
        left.plot(x, values, "o-", color=colour, markersize=4, linewidth=1.6, label=f"layer {i + 1}")
        between = np.where(_float(layer.between) > 1e-3, values * _float(layer.between), np.nan)  # less is rounding
        left.plot(x, between, ":", color=colour, linewidth=1.4)
    left.plot([], [], ":", color=INK, label="dotted: part between the units' means")
    left.set_yscale("log")
    shown = np.concatenate([_float(layer.values) for layer in found])
    left.set_ylim(max(min(0.3, float(shown.min()) / 2), float(shown.max()) * 1e-5), max(3.0, 2 * float(shown.max())))
    left.set_xlim(0.5, max(len(layer.values) for layer in found) + 0.5)
    left.xaxis.get_major_locator().set_params(integer=True)
    dress(left, "Variance along each direction", "direction, the widest first", "variance, in units of the default's 1 / p")
    first, some = found[0], min(count, len(names) + 1)
    loadings = _float(first.vectors[:, :some].T)
    picture = right.imshow(loadings, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    right.set_xticks(range(len(names) + 1), [*names, "bias"])
    rows = [f"{k + 1}  (variance {float(first.values[k]):.2g})" for k in range(some)]
    right.set_yticks(range(some), rows)
    dress(right, "Leading directions of layer 1", "input of a unit", "direction")
    right.grid(False)
    if loadings.size <= 40:
        for (row, column), value in np.ndenumerate(loadings):
            ink = "white" if abs(value) > 0.6 else INK
            right.text(column, row, _signed(value), ha="center", va="center", fontsize=TICK - 1, color=ink)
    else:
        _side_bar(fig, picture, right, "loading")
    handles, labels = left.get_legend_handles_labels()
    _legend_below(fig, handles, labels, columns=3)
    fig.suptitle(title, fontsize=TITLE, color=INK)
    return fig


def functions(
    model: BNNP,
    x_range: tuple[ArrayLike, ArrayLike] | None = None,
    n: int | None = None,
    seed: int = 0,
    title: str = "Functions drawn from the prior",
    xlabels: Sequence[str] | None = None,
    ylabel: str = "output y",
) -> Figure:
    """Draw functions of one input as lines, or of two inputs as maps on one colour scale.

    Arguments:
        model: whose prior is drawn from; of several outputs, the first is drawn.
        x_range: lower and upper end of each input; where not given, those of the inputs of meta-training.
        n: number of functions; 12 lines or 6 maps where not given.
        seed: of the draws.
        title: above the picture.
        xlabels: names of the inputs.
        ylabel: name of the output.

    Raises:
        ValueError: the model has more than two inputs.
    """
    names = _input_names(model, xlabels)
    grid, size = _grid(model, x_range)
    values = _sampled(model, grid, n or (12 if model.x_dim == 1 else 6), seed)
    if model.x_dim == 1:
        fig = _figure(6.5, 4.2)
        ax = fig.add_subplot()
        _lines(ax, grid, values)
        dress(ax, title, names[0], ylabel)
        return fig
    columns = min(3, len(values))
    rows = math.ceil(len(values) / columns)
    fig = _figure(3.2 * columns + 1.0, 3.0 * rows + 0.6)
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for i, ax in enumerate(axes):
        if i >= len(values):
            ax.set_axis_off()
            continue
        shown = _map(ax, grid, values[i], size, float(values.min()), float(values.max()))
        dress(ax, f"draw {i + 1}", names[0] if i + columns >= len(values) else "", names[1] if i % columns == 0 else "")
        ax.grid(False)
    _side_bar(fig, shown, axes, ylabel)
    fig.suptitle(title, fontsize=TITLE, color=INK)
    return fig


def layer_effects(
    model: BNNP,
    effects: Sequence[LayerEffect],
    x_range: tuple[ArrayLike, ArrayLike] | None = None,
    n: int = 12,
    seed: int = 0,
    title: str = "What does the learned prior of each layer do?",
    xlabels: Sequence[str] | None = None,
    ylabel: str = "output y",
) -> Figure:
    """Draw functions from the prior as it is, and with one layer's prior put back to the default; above, what that does to predictions.

    Arguments:
        model: the trained model.
        effects: of its layers, from `bnnp.layer_effects`.
        x_range: lower and upper end of each input; where not given, those of the inputs of meta-training.
        n: number of functions of one input; of two inputs, each panel is one map.
        seed: of the draws.
        title: above the picture.
        xlabels: names of the inputs.
        ylabel: name of the output.

    Raises:
        ValueError: the model has more than two inputs.
    """
    names = _input_names(model, xlabels)
    grid, size = _grid(model, x_range)
    panels = [("all layers as learned", model)]
    for e in effects:
        change = f"{e.change:+.2f} ± {e.se:.2f}".replace("-", "\N{MINUS SIGN}")
        panels.append((f"layer {e.layer} put back\npredictions: {change} nats per point", e.model))
    columns = min(len(panels), 3 if len(panels) in (3, 5, 6) else 2 if len(panels) in (2, 4) else 4)
    rows = math.ceil(len(panels) / columns)
    fig = _figure(4.2 * columns, 3.5 * rows + 0.4)
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for i, (ax, (name, of)) in enumerate(zip(axes, panels, strict=False)):
        values = _sampled(of, grid, n if model.x_dim == 1 else 1, seed)
        bottom, side = i + columns >= len(panels), i % columns == 0
        if model.x_dim == 1:
            _lines(ax, grid, values)
            dress(ax, name, names[0] if bottom else "", ylabel if side else "")
            continue
        shown = _map(ax, grid, values[0], size, float(values.min()), float(values.max()))
        dress(ax, name, names[0] if bottom else "", names[1] if side else "")
        ax.grid(False)
        _side_bar(fig, shown, ax, ylabel)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    fig.suptitle(title, fontsize=TITLE, color=INK)
    return fig


def _input_names(model: BNNP, given: Sequence[str] | None) -> list[str]:
    if model.x_dim > 2:
        raise ValueError(
            f"Expected a model of one or two inputs, whose functions can be drawn. Got {model.x_dim} inputs. "
            "Draw model.prior_samples(x, n) along a path of your own."
        )
    names = list(given or (["input x"] if model.x_dim == 1 else ["input x1", "input x2"]))
    if len(names) != model.x_dim:
        raise ValueError(f"Expected names of {model.x_dim} inputs. Got {len(names)}: {names}.")
    return names


def _grid(model: BNNP, x_range: tuple[ArrayLike, ArrayLike] | None) -> tuple[Tensor, int]:
    """Return a grid of inputs (M, d_x), the last column fastest, and its points along each side."""
    seen = model.reference.x_sample if model.reference.known else torch.tensor([[-2.0], [2.0]]).expand(2, model.x_dim)
    ends = (seen.amin(0), seen.amax(0)) if x_range is None else x_range
    low, high = (torch.as_tensor(end, dtype=torch.float64).cpu().expand(model.x_dim) for end in ends)
    size = 200 if model.x_dim == 1 else 40
    axes = [torch.linspace(float(a), float(b), size, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    return torch.cartesian_prod(*axes).reshape(-1, model.x_dim), size


def _sampled(model: BNNP, grid: Tensor, n: int, seed: int) -> FloatArray:
    """Return n functions from the prior with shape (n, M)."""
    return _float(model.prior_samples(grid, n, seed=seed)[..., 0].cpu())


def _lines(ax: Axes, grid: Tensor, values: FloatArray) -> None:
    """Draw functions of one input; the first in a strong colour, for one line is easier followed than twelve."""
    x = _float(grid[:, 0])
    ax.plot(x, values[1:].T, color=SKY, linewidth=1.0, alpha=0.8)
    ax.plot(x, values[0], color=BLUE, linewidth=2.0)


def _map(ax: Axes, grid: Tensor, values: FloatArray, size: int, low: float, high: float) -> ScalarMappable:
    """Draw a function of two inputs, the first along the horizontal axis."""
    (left, bottom), (right, top) = grid[0].tolist(), grid[-1].tolist()
    edges = (left, right, bottom, top)
    picture = values.reshape(size, size).T
    return ax.imshow(picture, origin="lower", extent=edges, aspect="auto", cmap="viridis", vmin=low, vmax=high)


def _side_bar(fig: Figure, shown: ScalarMappable, axes: Any, label: str) -> None:
    bar = fig.colorbar(shown, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(label, fontsize=LABEL, color=INK)
    bar.ax.tick_params(labelsize=TICK - 1, colors=INK)
    bar.outline.set_edgecolor(GRID)
