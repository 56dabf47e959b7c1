"""Two pictures: how far every method is from the posterior at every noise, and whether the estimates of the evidence agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bnnp.plots import BLUE, GREEN, GRID, INK, ORANGE, PURPLE, RED, SKY, dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS: dict[str, tuple[str, str, str]] = {
    "mean-field VI": (RED, "s", "-"),
    "per-unit VI": (RED, "^", "--"),
    "per-layer VI": (ORANGE, "s", "-"),
    "full VI": (ORANGE, "^", "--"),
    "full VI longer": (ORANGE, "P", ":"),
    "GIVI": (GREEN, "D", "-"),
    "BNNP, fitted": (BLUE, "o", "-"),
    "BNNP, meta-trained": (BLUE, "o", "--"),
    "mean-field VI, collapsed": (RED, "s", "-"),
    "full VI, collapsed": (RED, "^", "--"),
    "GIVI, collapsed": (GREEN, "D", "--"),
    "BNNP, fitted longer": (BLUE, "P", ":"),
    "BNNP, meta-trained longer": (BLUE, "*", "--"),
    "BNNP, importance-weighted": (SKY, "o", "-"),
    "BNNP, last layer drawn": (PURPLE, "v", "--"),
    "BNNP, amortised last layer": (ORANGE, "X", ":"),
    "prior, exact last layer": (INK, ".", ":"),
}
"""Colour, mark and line of each method."""
PLAIN = tuple(LOOKS)[:8]
BASE = "BNNP, fitted"
CLOSER = tuple(m for m in LOOKS if m not in (*PLAIN[:5], BASE))
FEWEST = 3
"""Estimates that were made at fewer noises have no panel of their own; they are in the tables."""
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
LINEAR = 0.1
"""Below so many nats the axis of divergences is linear: a difference of estimates may be negative."""


def divergences(table: Mapping[str, Any]) -> Figure:
    """Draw KL(q || posterior) against the noise, and how far the bounds of the closer methods lie from each other.

    Arguments:
        table: what `summary.summarise` returns.
    """
    from matplotlib.figure import Figure

    fig = Figure(figsize=(14, 6.8), layout="constrained", facecolor="white")
    left, right = fig.subplots(1, 2)
    _panel(left, table)
    _closer(right, table)
    fig.suptitle(
        "How far from the true posterior? Mean over four tasks, and seeds; bars: two standard errors. Data have noise 0.1.\n"
        "Grey: two standard errors of the evidence. A difference of bounds, on the right, does not depend on the evidence.",
        fontsize=12,
        color=INK,
    )
    return fig


def _shown(table: Mapping[str, Any]) -> list[str]:
    """Return the noises of which the evidence is known, as keys, in increasing order."""
    return [n for n in (f"{x:g}" for x in sorted(table["noises"])) if n in table["evidence"]]


def _noise_axis(ax: Axes, shown: list[str], linear: float, scale: float = 0.6) -> None:
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=linear, linscale=scale)
    ax.set_xlim(float(shown[0]) / 1.3, float(shown[-1]) * 1.3)
    ax.axhline(0.0, color=INK, linewidth=0.8)


def _closer(ax: Axes, table: Mapping[str, Any]) -> None:
    """Draw the bounds less that of `BASE`, without the methods that are so far off that they would hide the others."""
    shown, base = _shown(table), table["methods"].get(BASE, {})
    _noise_axis(ax, shown, LINEAR)
    for method in CLOSER:
        of = table["methods"].get(method, {})
        at = [n for n in shown if n in of and n in base]
        if at:
            colour, mark, line = LOOKS[method]
            y = [base[n]["mean"] - of[n]["mean"] for n in at]
            e = [2 * math.hypot(base[n]["bound_error"], of[n]["bound_error"]) for n in at]
            x = [float(n) for n in at]
            ax.errorbar(x, y, yerr=e, color=colour, marker=mark, linestyle=line, markersize=6, capsize=2, linewidth=1.6, label=method)
    dress(ax, f"Bound less that of {BASE} (higher is better)", "standard deviation of the likelihood's noise", "nats")
    ax.legend(fontsize=9.5, labelcolor=INK, framealpha=0.95, loc="upper right")


def _panel(ax: Axes, table: Mapping[str, Any]) -> None:
    """Draw the divergences of what the paper compares."""
    shown = _shown(table)
    references = [(table["evidence"][n]["estimates"], table["evidence"][n]["reference"]) for n in shown]
    errors = [of[name]["error"] for of, name in references]
    floor = [2 * sum(e**2 for e in row) ** 0.5 / len(row) for row in errors]
    _noise_axis(ax, shown, LINEAR)
    ax.fill_between([float(n) for n in shown], [-f for f in floor], floor, color=GRID, alpha=0.8, linewidth=0)
    for method in PLAIN:
        of = table["methods"].get(method, {})
        points = [(float(n), of[n]["mean"], 2 * of[n]["error"]) for n in shown if n in of]
        if points:
            colour, mark, line = LOOKS[method]
            x, y, e = zip(*points, strict=True)
            ax.errorbar(x, y, yerr=e, color=colour, marker=mark, linestyle=line, markersize=6, capsize=2, linewidth=1.6, label=method)
    dress(ax, "Log evidence less the bound (lower is better)", "standard deviation of the likelihood's noise", "KL(q || posterior), nats")
    ax.set_ylim(bottom=-LINEAR)
    ax.legend(fontsize=9.5, labelcolor=INK, framealpha=0.95)


def estimates(table: Mapping[str, Any]) -> Figure:
    """Draw how far the estimates of each task's evidence lie from the reference, against the noise: one panel each where there are several.

    Arguments:
        table: what `summary.summarise` returns.
    """
    from matplotlib.figure import Figure

    evidence, shown = table["evidence"], _shown(table)
    found = list(dict.fromkeys(m for n in shown for m in evidence[n]["against_reference"]))
    times = {m: sum(m in evidence[n]["against_reference"] for n in shown) for m in found}
    names = sorted((m for m in found if times[m] >= min(FEWEST, len(shown))), key=lambda m: -times[m])
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = -(-len(names) // columns)
    fig = Figure(figsize=(5.6 * columns, 3.7 * rows + 0.9), layout="constrained", facecolor="white")
    axes = fig.subplots(rows, columns, sharey=True, sharex=True, squeeze=False).ravel()
    for i, (ax, name) in enumerate(zip(axes, names, strict=False)):
        _differences(ax, evidence, shown, name)
        below = i + columns >= len(names)
        dress(ax, name, "standard deviation of the likelihood's noise" if below else "", "nats" if i % columns == 0 else "")
        ax.tick_params(labelbottom=below)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    tasks = max(len(of["spread"]) for n in shown for of in evidence[n]["against_reference"].values())
    for i in range(tasks):
        axes[0].plot([], [], "o", color=COLOURS[i % len(COLOURS)], markersize=6, label=f"task {i + 1}")
    axes[0].legend(fontsize=9.5, labelcolor=INK, framealpha=0.95)
    fig.suptitle(
        "Do the estimates of the log evidence agree? Each, task by task, less the reference:\n"
        "importance sampling from noise 0.1 on, tempering below. Bars: two standard errors of\n"
        "the difference. Filled: within three of them, or within 0.1 nats.",
        fontsize=12,
        color=INK,
    )
    return fig


def _differences(ax: Axes, evidence: Mapping[str, Any], shown: list[str], name: str) -> None:
    _noise_axis(ax, shown, 1.0, 1.4)
    for n in shown:
        of = evidence[n]["against_reference"].get(name)
        for i, (d, s) in enumerate(zip(*((of["less_reference"], of["spread"]) if of else ((), ())), strict=True)):
            x = float(n) * 1.09 ** (i - (len(of["spread"]) - 1) / 2)  # beside each other
            colour = COLOURS[i % len(COLOURS)]
            fill = colour if abs(d) < max(0.1, 3 * s) else "white"
            ax.errorbar(x, d, yerr=2 * s, fmt="o", color=colour, markerfacecolor=fill, markersize=6, capsize=2)
