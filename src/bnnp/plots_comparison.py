"""Pictures of a comparison of inference engines: a score against seconds, and predictions on the same tasks side by side.

Functions take plain numbers and return a matplotlib `Figure`, in the manner of `bnnp.plots`, whose `save_figure` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bnnp.plots import CYCLE, INK, LABEL, TICK, TITLE, FloatArray, _draw_panel, _figure, _float, _legend_below, _signed, dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["predictions", "scores"]

MARKERS = "osD^vPX<>ph*"
FAR = 4.0
"""Scores this many times farther from the best than the median is are drawn at the edge, with their value."""
PLACES = [
    *((9, 0), (-9, 0), (0, 10), (0, -10), (9, 11), (9, -11), (-9, 11), (-9, -11)),
    *((0, 22), (0, -22), (14, 22), (14, -22), (-14, 22), (-14, -22), (25, 35), (25, -35), (-25, 35), (-25, -35)),
]
"""Where a name may stand beside its marker, in points, from the best place to the worst."""


def scores(
    points: Sequence[Mapping[str, Any]],
    label: str = "joint log density per target point\n(higher is better)",
    seconds: str = "seconds",
    title: str | None = None,
    bars: str = "bars: standard errors",
    lower_is_better: bool = False,
) -> Figure:
    """Draw a score against seconds on a logarithmic axis, one marker and name for each engine, bars of one standard error.

    Arguments:
        points: dictionaries with "name", "seconds", "mean" and "se", the standard error or NaN.
        label: of the vertical axis.
        seconds: of the horizontal axis.
        title: above the picture.
        bars: what the bars are, below the picture.
        lower_is_better: of the score.

    Returns:
        The figure; a score far behind the others is drawn at the edge, with its value.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("Expected at least one engine with a score. Got none.")
    fig = _figure(8.2, 5.2)
    ax = fig.add_subplot()
    means, errors = _float([p["mean"] for p in points]), np.nan_to_num(_float([p["se"] for p in points]))
    times = np.maximum(_float([p["seconds"] for p in points]), 1e-4)
    sign = -1.0 if lower_is_better else 1.0
    shown = sign * np.maximum(sign * means, _floor(sign * means))
    for i, (point, x, y, mean, se) in enumerate(zip(points, times, shown, means, errors, strict=True)):
        colour = CYCLE[i % len(CYCLE)]
        inside = y == mean
        ax.errorbar(
            x, y, se if inside and se > 0 else None, fmt=MARKERS[i % len(MARKERS)], color=colour, ecolor=colour, markersize=8,
            capsize=3, markeredgecolor="white", label=point["name"],
        )  # fmt: skip
    _seconds_axis(ax, times)
    ax.margins(y=0.14)
    dress(ax, "", f"{seconds} (logarithmic)\n{bars}", label)
    fig.suptitle("What an engine's seconds buy" if title is None else title, fontsize=TITLE, color=INK)
    names = [p["name"] if y == m else f"{p['name']}, far off: {_signed(m)}" for p, y, m in zip(points, shown, means, strict=True)]
    _names_beside(fig, ax, names, times, shown, np.where(shown == means, errors, 0.0))
    return fig


def _floor(values: FloatArray) -> float:
    """Return what a score is drawn at that is far below the others."""
    top = float(values.max())
    reach = top - float(np.median(values))
    return min((float(v) for v in values if reach <= 0 or top - v <= FAR * reach), default=top) - 0.3 * reach


def _seconds_axis(ax: Axes, times: FloatArray) -> None:
    """Make the horizontal axis logarithmic, at least a decade long, with plain numbers."""
    stretch = max(2.0, math.sqrt(10.0 * times.min() / times.max()))
    ax.set_xscale("log")
    ax.set_xlim(times.min() / stretch, times.max() * stretch)
    few = times.max() * stretch**2 < 30.0 * times.min()
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if few and f"{value:e}"[0] in "25" else "")


def _names_beside(fig: Figure, ax: Axes, names: Sequence[str], x: FloatArray, y: FloatArray, errors: FloatArray) -> None:
    """Write each name beside its marker, where it covers no marker, bar or other name."""
    fig.draw_without_rendering()  # the layout settles where the axes stand
    scale = fig.dpi / 72.0
    at = ax.transData.transform(np.column_stack([x, y]))
    bars = ax.transData.transform(np.column_stack([x, y + errors]))[:, 1] - at[:, 1]
    taken = [(px - 6 * scale, py - max(b, 6 * scale), px + 6 * scale, py + max(b, 6 * scale)) for (px, py), b in zip(at, bars, strict=True)]
    frame = ax.get_window_extent()
    for i in sorted(range(len(names)), key=lambda i: -at[i, 1]):
        best: tuple[float, tuple[float, float], tuple[float, float, float, float]] | None = None
        width, height = 0.58 * TICK * scale * len(names[i]), 1.25 * TICK * scale
        for right, up in PLACES:
            left = float(at[i, 0] + right * scale - (0.0 if right > 0 else width if right < 0 else width / 2))
            low = float(at[i, 1] + up * scale - (height / 2 if right and not up else 0.0 if up > 0 else height))
            box = (left, low, left + width, low + height)
            beyond = max(0.0, frame.x0 - left) + max(0.0, box[2] - frame.x1) + max(0.0, frame.y0 - low) + max(0.0, box[3] - frame.y1)
            cost = sum(_overlap(box, other) for other in taken) + 1e3 * beyond
            if best is None or cost < best[0]:
                best = cost, (right, up), box
        assert best is not None
        dx, dy = best[1]
        taken.append(best[2])
        ha = "left" if dx > 0 else "right" if dx < 0 else "center"
        va = "center" if dx and not dy else "bottom" if dy > 0 else "top"
        leader = {"arrowstyle": "-", "color": CYCLE[i % len(CYCLE)], "linewidth": 1.0, "shrinkA": 0.0, "shrinkB": 4.0}
        ax.annotate(
            names[i], (x[i], y[i]), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=TICK, color=INK, arrowprops=leader
        )  # fmt: skip


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def predictions(
    columns: Mapping[str, Sequence[Mapping[str, Any]]],
    truth: Sequence[Any] | None = None,
    title: str | None = None,
    interval: str = "90 %",
) -> Figure:
    """Draw tasks in rows and engines in columns: points seen and unseen, truth, mean, band, a few sampled functions.

    Arguments:
        columns: engine -> for each task a dictionary with "x", "mean", "lower", "upper", "samples", "xc", "yc", "xt", "yt" and a "note"
            for the title of its panel.
        truth: for each task a pair (x, y) of arrays, or None.
        title: above the picture.
        interval: name of the band between "lower" and "upper".

    Returns:
        The figure.
    """
    tasks = max(len(panels) for panels in columns.values())
    fig = _figure(2.5 * len(columns) + 0.8, 2.1 * tasks + 1.2)
    axes = fig.subplots(tasks, len(columns), squeeze=False, sharex=True, sharey="row")
    entries: dict[str, Any] = {}
    for j, (name, panels) in enumerate(columns.items()):
        for i, ax in enumerate(axes[:, j]):
            if i >= len(panels):
                ax.set_axis_off()
                continue
            panel: Any = panels[i]
            ax.plot(panel["xt"], panel["yt"], "o", markersize=3, color="white", markeredgecolor="#888888", label="points not seen")
            _draw_panel(ax, panel, interval)
            if truth is not None and i < len(truth) and truth[i] is not None:
                x, y = (_float(part).ravel() for part in truth[i])
                order = np.argsort(x)
                ax.plot(x[order], y[order], color=INK, linestyle="--", linewidth=1.3, label="truth")
            head = f"{name}\n" if i == 0 else ""
            dress(ax, head + panel.get("note", ""), "input x" if i == tasks - 1 else "", f"task {i + 1}" if j == 0 else "")
            ax.set_title(ax.get_title(), fontsize=TICK, color=INK)
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                entries.setdefault(label, handle)
    for row, panels in zip(axes, zip(*_padded(columns, tasks), strict=True), strict=True):
        row[0].set_ylim(*_limits([p for p in panels if p]))
    _legend_below(fig, list(entries.values()), list(entries), columns=6 if len(columns) > 2 else 3 if len(columns) > 1 else 1)
    fig.suptitle("The same tasks, engine by engine" if title is None else title, fontsize=LABEL + 1, color=INK)
    return fig


def _padded(columns: Mapping[str, Sequence[Mapping[str, Any]]], tasks: int) -> list[list[Mapping[str, Any]]]:
    return [[*panels, *({} for _ in range(tasks - len(panels)))] for panels in columns.values()]


def _limits(panels: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return limits of y that show the data of a task and most of the bands, one wild engine's apart."""
    data = np.concatenate([_float(p[key]) for p in panels for key in ("yc", "yt")])
    low = min(float(data.min()), float(np.quantile([_float(p["lower"]).min() for p in panels], 0.25)))
    high = max(float(data.max()), float(np.quantile([_float(p["upper"]).max() for p in panels], 0.75)))
    span = max(float(np.ptp(data)), 1e-9)
    low, high = max(low, float(data.min()) - 1.5 * span), min(high, float(data.max()) + 1.5 * span)
    pad = 0.06 * (high - low) if math.isfinite(high - low) else 1.0
    return low - pad, high + pad
