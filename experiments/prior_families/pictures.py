"""The picture of the study: what every prior gains or loses against the shared one, problem by problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bnnp.plots import BLUE, GRID, INK, ORANGE
from experiments.prior_families.summary import BASE, FIXED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, ORANGE)


def scores(table: Mapping[str, Any]) -> Figure:
    """Draw the paired difference in joint log density to `BASE`, with two standard errors: one panel for each problem and net.

    Arguments:
        table: what `summary.summarise` returns.
    """
    from matplotlib.figure import Figure

    nets = list(dict.fromkeys(net for of in table.values() for net in of["nets"]))
    panels = [(problem, net) for net in nets for problem, of in table.items() if net in of["nets"]]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    fig = Figure(figsize=(4.6 * columns, 4.2 * rows + 0.8), layout="constrained", facecolor="white")
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for ax, (problem, net) in zip(axes, panels, strict=False):
        _panel(ax, table[problem]["nets"][net], f"{problem}, width {net}")
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    fig.suptitle(
        f'Joint log density per target, less that of "{BASE}" (right is better; bars: two standard errors over tasks;\n'
        "small marks: single seeds; in brackets: processor time of a training step)",
        fontsize=12,
        color=INK,
    )
    return fig


def _panel(ax: Axes, rows: Mapping[str, Any], title: str) -> None:
    """Draw one problem; the prior that is not learned is so far off that it would hide the others, so it is named below."""
    base = rows[BASE]
    shown = {prior: row for prior, row in rows.items() if "less_base" in row and prior not in (BASE, FIXED)}
    conditions = list(base["joint"])
    for i, (condition, colour) in enumerate(zip(conditions, COLOURS, strict=False)):
        shift = 0.18 * (2 * i - len(conditions) + 1)
        for at, row in enumerate(shown.values()):
            mean, error = row["less_base"][condition]
            label = condition if at == 0 else None
            ax.errorbar(mean, at + shift, xerr=2 * error, fmt="o", color=colour, markersize=6, capsize=3, label=label)
            single = [a - b for a, b in zip(row["seeds"][condition], base["seeds"][condition], strict=False)]
            ax.plot(single, [at + shift] * len(single), "|", color=colour, markersize=9, alpha=0.8)
    ax.axvline(0.0, color=INK, linewidth=1.0)
    ax.set_yticks(range(len(shown)), [f"{prior} ({row['step_ms']:.0f} ms)" for prior, row in shown.items()], fontsize=10, color=INK)
    ax.set_ylim(len(shown) - 0.4, -1.4)  # room for the legend
    ax.set_title(f"{title} ({BASE}: {base['step_ms']:.0f} ms)", fontsize=12, color=INK)
    ax.set_xlabel(_below(rows, base, conditions), fontsize=9, color=INK)
    ax.grid(True, axis="x", color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    if shown:
        ax.legend(fontsize=9, labelcolor=INK, loc="upper right", ncols=2, framealpha=0.9)


def _below(rows: Mapping[str, Any], base: Mapping[str, Any], conditions: list[str]) -> str:
    """Say what is not drawn: priors that failed, and the one that is not learned."""
    words = []
    if "less_base" in rows.get(FIXED, {}):
        words.append("not learned: " + ", ".join(f"{rows[FIXED]['less_base'][c][0]:+.2f}" for c in conditions))
    failed = [prior for prior, row in rows.items() if "joint" not in row]
    words += [f"failed: {', '.join(failed)}"] if failed else []
    words += [f"{BASE} itself: " + ", ".join(f"{base['joint'][c][0]:.2f}" for c in conditions)]
    return "\n".join(words)
