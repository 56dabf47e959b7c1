"""The picture of the study: what each engine's predictions are worth, and what they cost, under both priors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bnnp.plots import BLUE, GREEN, GRID, INK, ORANGE, PURPLE, RED, SKY
from experiments.prior_transfer.summary import AS_IT_IS, INTEGRATED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, SKY, GREEN, ORANGE, RED, PURPLE, INK)
MARKS = "osD^vP*X<>hd"
PRIORS = {"learned": "learned prior", "fixed": "fixed prior, N(0, 1/p)"}


def score_against_seconds(table: Mapping[str, Any]) -> Figure:
    """Draw the joint log density per target against seconds per task, with standard errors over tasks: a row of panels for each prior.

    Arguments:
        table: what `summary.summarise` returns.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for priors in table.values() for rows in priors.values() for name in rows if name != "oracle"))
    style = {name: (COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]) for i, name in enumerate(names)}
    fig = Figure(figsize=(4.6 * len(table) + 2.8, 8.4), layout="constrained", facecolor="white")
    axes = fig.subplots(len(PRIORS), len(table), squeeze=False, sharex=True)
    for column, (process, priors) in enumerate(table.items()):
        best = priors.get("learned", {}).get("oracle")
        for row, (prior, title) in enumerate(PRIORS.items()):
            _panel(axes[row][column], priors.get(prior, {}), style, best, f"{process}: {title}")
    handles = {}
    for ax in axes.ravel():
        handles.update(dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True)))
    fig.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=10, labelcolor=INK, frameon=False)
    fig.suptitle(
        "Predictions of test tasks against the time of the processor (up and to the left is better; bars: one standard error over tasks;\n"
        "hollow: the same draws of the hidden layers with the last layer integrated out)",
        fontsize=13,
        color=INK,
    )
    return fig


def _panel(ax: Axes, rows: Mapping[str, Any], style: Mapping[str, tuple[str, str]], best: Mapping[str, Any] | None, title: str) -> None:
    """Draw one process under one prior; what is far below the rest is drawn at the lower edge, with its value."""
    shown = {name: row for name, row in rows.items() if "failed" not in row and name != "oracle"}
    means = sorted(row[AS_IT_IS]["joint"][0] for row in shown.values())
    if best is not None:
        ax.axhline(best[AS_IT_IS]["joint"][0], color=INK, linestyle=":", linewidth=1.6, label="exact posterior of the process")
    if means:
        # The exact posterior sets the scale only where engines come near it.
        near = best is not None and best[AS_IT_IS]["joint"][0] < means[-1] + 3.0
        top = max(means[-1], best[AS_IT_IS]["joint"][0] if best is not None and near else means[-1])
        middle = min(means[len(means) // 2], top - 0.3)
        edge = middle - 1.5 * (top - middle)
        for name, row in shown.items():
            _mark(ax, row, name, style[name], edge)
        ax.set_ylim(edge, top + 0.08 * (top - edge))
        if best is not None and not near:
            said = f"exact posterior of the process: {best[AS_IT_IS]['joint'][0]:.2f}"
            ax.annotate(said, (0.98, 0.97), xycoords="axes fraction", ha="right", va="top", fontsize=9, color=INK)
    ax.set_xscale("log")
    ax.set_title(title, fontsize=12, color=INK)
    ax.set_xlabel("seconds a task", fontsize=11, color=INK)
    ax.set_ylabel("joint log density per target", fontsize=11, color=INK)
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)


def _mark(ax: Axes, row: Mapping[str, Any], name: str, style: tuple[str, str], edge: float) -> None:
    """Draw one engine; hollow and joined to it by a line, the same draws of hidden layers with the last layer integrated out."""
    (colour, mark), seconds = style, row["seconds_per_task"]
    mean, error = row[AS_IT_IS]["joint"]
    at, inside = max(mean, edge), mean > edge
    free = row.get(INTEGRATED)
    if free is not None and free["joint"][0] > edge:
        ax.plot([seconds, seconds], [at, free["joint"][0]], color=colour, linewidth=0.8, alpha=0.6)
        ax.plot(seconds, free["joint"][0], mark, color=colour, markerfacecolor="white", markersize=7)
    ax.errorbar(seconds, at, yerr=error if inside else None, fmt=mark, color=colour, markersize=8, capsize=2, label=name, clip_on=inside)
    if not inside:
        ax.annotate(f"{mean:.1f}", (seconds, edge), xytext=(6, 6), textcoords="offset points", fontsize=8, color=colour)
