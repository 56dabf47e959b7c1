"""Two pictures: how far every method is from the posterior at every noise, and whether the estimates of the evidence agree."""

from __future__ import annotations

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
    "GIVI": (GREEN, "D", "-"),
    "BNNP, fitted": (BLUE, "o", "-"),
    "BNNP, meta-trained": (BLUE, "o", "--"),
    "mean-field VI, collapsed": (PURPLE, "s", "-"),
    "full VI, collapsed": (PURPLE, "^", "--"),
    "GIVI, collapsed": (GREEN, "D", "--"),
    "BNNP, importance-weighted": (SKY, "o", "-"),
    "BNNP, last layer drawn": (SKY, "v", "--"),
    "BNNP, amortised last layer": (SKY, "x", ":"),
    "prior, exact last layer": (INK, ".", ":"),
}
"""Colour, mark and line of each method; those of the two panels are told apart by their names, not by colour alone."""
PLAIN = ("mean-field VI", "per-unit VI", "per-layer VI", "full VI", "GIVI", "BNNP, fitted", "BNNP, meta-trained")
LINEAR = 0.1
"""Below so many nats the axis of divergences is linear: a difference of estimates may be negative."""


def divergences(table: Mapping[str, Any]) -> Figure:
    """Draw KL(q || posterior) against the noise: what the paper compares, and what becomes of it with other last layers and objectives.

    Arguments:
        table: what `summary.summarise` returns.
    """
    from matplotlib.figure import Figure

    fig = Figure(figsize=(13.5, 6.6), layout="constrained", facecolor="white")
    left, right = fig.subplots(1, 2, sharey=True)
    others = [m for m in LOOKS if m not in PLAIN]
    _panel(left, table, PLAIN, "Approximate posteriors")
    _panel(right, table, ("GIVI", "BNNP, fitted", *others), "Other treatments of the last layer, other objectives")
    right.set_ylabel("")
    fig.suptitle(
        "How far from the true posterior? Log evidence less the bound, mean over tasks and seeds (lower is better).\n"
        "Bars: two standard errors; grey: two standard errors of the evidence, below which nothing can be told. Data have noise 0.1.",
        fontsize=12,
        color=INK,
    )
    return fig


def _panel(ax: Axes, table: Mapping[str, Any], methods: tuple[str, ...], title: str) -> None:
    shown = [n for n in (f"{x:g}" for x in sorted(table["noises"])) if n in table["evidence"]]
    references = [(table["evidence"][n]["estimates"], table["evidence"][n]["reference"]) for n in shown]
    errors = [of[name]["error"] for of, name in references]
    floor = [2 * sum(e**2 for e in row) ** 0.5 / len(row) for row in errors]
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=LINEAR, linscale=0.6)
    ax.fill_between([float(n) for n in shown], [-f for f in floor], floor, color=GRID, alpha=0.8, linewidth=0)
    ax.axhline(0.0, color=INK, linewidth=0.8)
    ax.axvline(0.1, color=GRID, linewidth=1.2)
    for method in methods:
        of = table["methods"].get(method, {})
        points = [(float(n), of[n]["mean"], 2 * of[n]["error"]) for n in shown if n in of]
        if points:
            colour, mark, line = LOOKS[method]
            x, y, e = zip(*points, strict=True)
            ax.errorbar(x, y, yerr=e, color=colour, marker=mark, linestyle=line, markersize=6, capsize=2, linewidth=1.6, label=method)
    dress(ax, title, "standard deviation of the likelihood's noise", "KL(q || posterior), nats")
    ax.set_ylim(bottom=-2 * LINEAR)
    ax.legend(fontsize=9.5, labelcolor=INK, framealpha=0.95)


def estimates(table: Mapping[str, Any]) -> Figure:
    """Draw how far the estimates of each task's evidence lie from the reference, against the noise: one panel for each estimate.

    Arguments:
        table: what `summary.summarise` returns.
    """
    from matplotlib.figure import Figure

    evidence = table["evidence"]
    shown = [n for n in (f"{x:g}" for x in sorted(table["noises"])) if n in evidence]
    names = list(dict.fromkeys(m for n in shown for m in evidence[n]["against_reference"]))
    fig = Figure(figsize=(max(6.0, 4.6 * len(names)), 4.9), layout="constrained", facecolor="white")
    axes = fig.subplots(1, max(1, len(names)), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, names, strict=False):
        _differences(ax, evidence, shown, name)
        dress(ax, name, "standard deviation of the likelihood's noise", "nats above the reference" if ax is axes[0] else "")
    fig.suptitle(
        "Do the estimates of the log evidence agree? Each, less the reference (tempering, at low noise with longer moves), for each task\n"
        "(bars: two standard errors of the difference; filled: within three, or within 0.1 nats)",
        fontsize=12,
        color=INK,
    )
    return fig


def _differences(ax: Axes, evidence: Mapping[str, Any], shown: list[str], name: str) -> None:
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=0.3, linscale=0.8)
    ax.axhline(0.0, color=INK, linewidth=0.8)
    colours = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
    for n in shown:
        of = evidence[n]["against_reference"].get(name)
        for i, (d, s) in enumerate(zip(*((of["less_reference"], of["spread"]) if of else ((), ())), strict=True)):
            x = float(n) * 1.09 ** (i - (len(of["spread"]) - 1) / 2)  # beside each other
            colour = colours[i % len(colours)]
            fill = colour if abs(d) < max(0.1, 3 * s) else "white"
            label = f"task {i + 1}" if n == shown[0] else None
            ax.errorbar(x, d, yerr=2 * s, fmt="o", color=colour, markerfacecolor=fill, markersize=6, capsize=2, label=label)
    ax.legend(fontsize=9.5, labelcolor=INK, framealpha=0.95)
