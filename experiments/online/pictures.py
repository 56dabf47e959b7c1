"""Pictures and tables of the study: scores, effective sample size, and what each way costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bnnp.plots import DPI, GREEN, INK, ORANGE, PURPLE, RED, SKY, TICK, TITLE, dress
from experiments.online.streams import BLOCK, EVERY, WAYS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["study", "table"]

COLOURS = {
    "last layer": RED,
    "reweighted": ORANGE,
    "resampled": PURPLE,
    "when few": SKY,
    "when grown": GREEN,
    "every tenth": "#888888",
    "every point": INK,
}
WINDOW = 5  # values of a curve, each of several points, in a running mean
NAMES = {"random": "points in random order", "increasing": "points in increasing order of x"}


def table(results: dict[str, Any], title: str) -> str:
    """Return the numbers of one source as a Markdown table, with standard errors over tasks; cells with / are of the two orders."""
    orders = list(results.values())
    header = ["way", *(f"density, {order}" for order in results), *(f"gap, {order}" for order in results)]
    header += ["ESS at the end", "different particles", "times afresh", "ms per point"]
    rows = [f"**{title}**", "", "| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for key in orders[0]["ways"]:
        there = [result["ways"].get(key) for result in orders]
        cells = [_with_error(s, "mean_log_density", 3) for s in there] + [_with_error(s, "gap", 4) for s in there]
        known = [s for s in there if s]
        cells.append(" / ".join(f"{s['effective_sample_size']['last'][0]:.1f}" for s in known))
        cells.append(" / ".join(f"{s['distinct_particles'][0]:.1f}" for s in known))
        cells.append(" / ".join(f"{s['afresh']:.0f}" for s in known))
        cells.append(" / ".join(f"{s['milliseconds']:.1f}" for s in known))
        rows.append("| " + " | ".join([WAYS[key].label, *cells]) + " |")
    best = [_with_error({"tasks": 2, **result["reference"]}, "mean_log_density", 3) for result in orders]
    rows.append("| " + " | ".join([orders[0]["reference"]["label"], *best, *[""] * 6]) + " |")
    return "\n".join(rows) + "\n"


def _with_error(s: dict[str, Any] | None, key: str, digits: int) -> str:
    if s is None:
        return ""
    mean, error = s[key]
    return f"{mean:.{digits}f}" + (" (one task)" if s["tasks"] == 1 else f" ± {error:.{digits}f}")


def study(results: dict[str, Any], name: str, stream: dict[str, int]) -> Figure:
    """Draw scores, gaps and effective sample sizes against the number of points, one column for each order, and the costs.

    Arguments:
        results: summaries of one source, by order.
        name: of the source.
        stream: settings of the streams.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    fig = Figure(figsize=(12.5, 13.0), dpi=DPI, layout="constrained", facecolor="white")
    axes = fig.subplots(4, 2, sharex=False)
    for column, (order, result) in enumerate(results.items()):
        scores, gaps, sizes, costs = axes[:, column]
        ways = {key: s for key, s in result["ways"].items() if s["tasks"] > 1 or len(result["ways"]) == 1}
        ways = ways or result["ways"]
        _scores(scores, ways, result["reference"], stream["context"])
        dress(scores, NAMES[order], "", "log density of the\nnext point, running mean")
        for key, s in ways.items():
            _line(gaps, s["total_gap_curve"], key, stream["context"], 1)
            _line(sizes, s["ess_curve"], key, stream["context"], 1)
        dress(gaps, "", "", f"nats gained so far on\nafresh at every {EVERY}th point")
        sizes.set_yscale("log", base=2)
        sizes.set_ylim(0.9, 1.3 * stream["particles"])
        sizes.set_yticks([1, 4, 16, 64], ["1", "4", "16", "64"])
        dress(sizes, "", "points seen", f"effective sample size\n(of {stream['particles']} particles)")
        _costs(costs, result["ways"])
    named = {name: handle for ax in (axes[0, 0], axes[3, 0]) for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(list(named.values()), list(named), loc="outside lower center", ncols=2, fontsize=TICK, frameon=False, labelcolor=INK)
    words = {
        "sawtooth": "sawtooth functions",
        "era5": "maps of hourly temperature",
        "era5-narrow": "maps of hourly temperature, last hidden layer of 8 units",
    }
    fig.suptitle(f"Following one task point by point: {words[name]}", fontsize=TITLE, color=INK)
    return fig


def _scores(ax: Axes, ways: dict[str, Any], reference: dict[str, Any], start: int) -> None:
    """Draw running means of the log density, and the reference as a dashed line."""
    drawn = []
    for key, s in ways.items():
        # Their bands are as wide as one another and hide the lines: what differs is in the row below.
        drawn.append(_line(ax, s["curve"], key, start, WINDOW, band=False))
    drawn.append(_line(ax, reference["curve"], reference["label"], start, WINDOW, dashed=True))
    values = np.concatenate(drawn)
    # A few points far out would press all other lines together.
    low, high = float(np.quantile(values, 0.02)), float(values.max())
    ax.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))


def _line(
    ax: Axes, curve: dict[str, list[float]], key: str, start: int, window: int, dashed: bool = False, band: bool = True
) -> np.ndarray[Any, Any]:
    """Draw a curve with its band of one standard error, after a running mean, and return what was drawn."""
    mean, error = np.asarray(curve["mean"]), np.asarray(curve["error"])
    window = min(window, len(mean))
    kernel = np.ones(window) / window
    centre = np.convolve(start + BLOCK * (np.arange(len(mean)) + 0.5), kernel, "valid")
    drawn = np.convolve(mean, kernel, "valid")
    reach = np.sqrt(np.convolve(error**2, kernel, "valid") / window)
    colour = INK if dashed else COLOURS[key]
    # What the others are compared with lies behind them and is broader: where a line agrees with it, both are seen.
    broad = key == "every tenth"
    style: dict[str, Any] = {
        "color": colour,
        "linewidth": 4.5 if broad else 1.6,
        "linestyle": "--" if dashed else "-",
        "zorder": 1.5 if broad else 2.0,
    }
    ax.plot(centre, drawn, alpha=0.45 if broad else 1.0, label=key if dashed else WAYS[key].label, **style)
    if band:
        ax.fill_between(centre, drawn - reach, drawn + reach, color=colour, alpha=0.12, linewidth=0)
    return drawn


def _costs(ax: Axes, ways: dict[str, Any]) -> None:
    """Draw the score against the time for one point."""
    for key, s in ways.items():
        mean, error = s["gap"]
        ax.errorbar(s["milliseconds"], mean, yerr=error, fmt="o", color=COLOURS[key], markersize=7, capsize=3, ecolor=COLOURS[key])
        if s["tasks"] == 1:
            ax.plot([], [], "o", color=COLOURS[key], label=f"{WAYS[key].label} (one task)")
    ax.set_xscale("log")
    ax.set_xlim(0.5, 300.0)
    ax.set_xticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
    ax.minorticks_off()
    ax.axhline(0.0, color=INK, linewidth=0.8)
    dress(ax, "", "milliseconds to take in a point (mean)", f"nats per point gained on\nafresh at every {EVERY}th point")
