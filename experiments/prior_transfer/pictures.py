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


LABELS = {"joint": "joint log density per target", "crps": "CRPS"}
TITLES = {
    "joint": "Joint log density of test tasks against the time of the processor: up and to the left is better (logarithmic far below 0)",
    "crps": "CRPS of test tasks against the time of the processor: down and to the left is better",
}


def score_against_seconds(table: Mapping[str, Any], score: str = "joint") -> Figure:
    """Draw a score against seconds per task, with standard errors over tasks: a row of panels for each prior, one scale for all.

    Arguments:
        table: what `summary.summarise` returns.
        score: "joint" or "crps".
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for priors in table.values() for rows in priors.values() for name in rows if name != "oracle"))
    style = {name: (COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]) for i, name in enumerate(names)}
    fig = Figure(figsize=(4.6 * len(table) + 2.8, 9.0), layout="constrained", facecolor="white")
    axes = fig.subplots(len(PRIORS), len(table), squeeze=False, sharex=True, sharey=True)
    for column, (process, priors) in enumerate(table.items()):
        best = priors.get("learned", {}).get("oracle")
        for row, (prior, title) in enumerate(PRIORS.items()):
            _panel(axes[row][column], priors.get(prior), style, best, f"{process}: {title}", score)
    handles = {}
    for ax in axes.ravel():
        handles.update(dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True)))
    fig.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=10, labelcolor=INK, frameon=False)
    hollow = "bars: one standard error over tasks; hollow: the same draws of the hidden layers with the last layer integrated out"
    fig.suptitle(f"{TITLES[score]}\n({hollow})", fontsize=13, color=INK)
    return fig


def _panel(
    ax: Axes,
    rows: Mapping[str, Any] | None,
    style: Mapping[str, tuple[str, str]],
    best: Mapping[str, Any] | None,
    title: str,
    score: str,
) -> None:
    """Draw one process under one prior."""
    if rows is None:
        ax.set_axis_off()
        return
    if best is not None:
        ax.axhline(best[AS_IT_IS][score][0], color=INK, linestyle=":", linewidth=1.6, label="exact posterior of the process")
    for name, row in rows.items():
        if "failed" not in row and name != "oracle":
            _mark(ax, row, name, style[name], score)
    if score == "joint":
        ax.set_yscale("symlog", linthresh=2.0, linscale=1.5)
        ax.set_yticks([-1000, -100, -10, -1, 0, 1], ["-1000", "-100", "-10", "-1", "0", "1"])
        ax.set_ylim(-5000, 2.5)
    else:
        ax.set_yscale("log")
    ax.set_xscale("log")
    ax.set_title(title, fontsize=12, color=INK)
    ax.set_xlabel("seconds a task", fontsize=11, color=INK)
    ax.set_ylabel(LABELS[score], fontsize=11, color=INK)
    ax.tick_params(labelleft=True, labelbottom=True)
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)


def _mark(ax: Axes, row: Mapping[str, Any], name: str, style: tuple[str, str], score: str) -> None:
    """Draw one engine; hollow and joined to it by a line, the same draws of hidden layers with the last layer integrated out."""
    (colour, mark), seconds = style, row["seconds_per_task"]
    mean, error = row[AS_IT_IS][score]
    free = row.get(INTEGRATED)
    if free is not None:
        ax.plot([seconds, seconds], [mean, free[score][0]], color=colour, linewidth=0.8, alpha=0.6)
        ax.plot(seconds, free[score][0], mark, color=colour, markerfacecolor="white", markersize=7)
    ax.errorbar(seconds, mean, yerr=error, fmt=mark, color=colour, markersize=8, capsize=2, label=name)
