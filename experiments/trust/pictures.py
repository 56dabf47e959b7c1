"""Pictures of the study: regret against each diagnostic, areas as a table of colours, and single tasks with their sentence."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import bnnp
from bnnp.plots import BLUE, GREEN, GRID, INK, ORANGE, PURPLE, RED, SKY
from bnnp.trust import FAR, HEAVY, SURPRISING
from experiments.trust.kinds import Home, Kind, draw, kinds
from experiments.trust.summary import DIAGNOSTICS, SIGNS, Records, inside_of, pair, regret, values, warns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    "pareto_k": "Pareto k",
    "gap": "gap: log evidence − ELBO",
    "effective_sample_size": "effective sample size",
    "distance_x": "distance of inputs",
    "distance_y": "distance of outputs",
    "p_value_y": "p-value of outputs",
    "evidence_per_point": "log evidence per point (made here)",
    "sentence": "sentence warns",
}
SCALES = {
    "pareto_k": "symlog",
    "gap": "symlog",
    "effective_sample_size": "log",
    "distance_x": "log",
    "distance_y": "log",
    "p_value_y": "log",
    "evidence_per_point": "symlog",
}
EDGES = {"pareto_k": HEAVY, "distance_x": FAR, "p_value_y": SURPRISING}
STYLES = {
    "inside": ("#999999", "."),
    "inputs moved": (BLUE, "o"),
    "targets alone moved": (SKY, "v"),
    "noise": (ORANGE, "s"),
    "period": (GREEN, "^"),
    "lengthscale": (GREEN, "^"),
    "process": (INK, "x"),
    "context": ("#B8860B", "D"),
    "outputs": (PURPLE, "P"),
    "outliers": (RED, "*"),
}
SHOWN = ("inputs moved by 0.5 of the range", "noise x 0.25", "noise x 4", "process", "outliers 1 of the context")
CONTEXT_SHOWN = 20


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def scatter(records: Records, table: Mapping[str, Any], model: str) -> Figure:
    """Draw the regret of each task against each diagnostic, coloured by what was changed.

    Arguments:
        records: kind -> measurements.
        table: the tables of this model, as `summary.summarise` gives them.
        model: its name, for the title.
    """
    inside = inside_of(records)
    limit = table["collapse_above"]["joint"]
    fig = _figure(15.0, 8.6)
    axes = fig.subplots(2, 4, sharey=True).ravel()
    for ax, name in zip(axes, SIGNS, strict=False):
        found = {kind: values(record, name) for kind, record in records.items()}
        pooled = np.concatenate(list(found.values()))
        top = float(pooled[np.isfinite(pooled)].max(initial=0.0))
        for kind, record in records.items():
            colour, marker = STYLES[record["family"]]
            # An infinite Pareto k is drawn at the right edge.
            x = np.where(np.isposinf(found[kind]), top, found[kind])
            ax.scatter(
                x, regret(record, inside, "joint"), s=12, c=colour, marker=marker, linewidths=0.6, alpha=0.5, zorder=1 + (record is inside)
            )
        ax.set_xscale(SCALES[name], **({"linthresh": 1.0} if SCALES[name] == "symlog" else {}))
        if SCALES[name] == "symlog":
            ax.xaxis.get_major_locator().set_params(numticks=6)
        if name in EDGES:
            ax.axvline(EDGES[name], color=INK, linestyle=":", linewidth=1.3)
        ax.axhline(limit, color=INK, linestyle="--", linewidth=1.0)
        area = pair(table["pooled"]["joint"]["collapse"][name])
        ax.set_title(f"{NAMES[name]}\narea: {area}", fontsize=11, color=INK)
        ax.set_xlabel("low is alarming" if SIGNS[name] < 0 else "high is alarming", fontsize=10, color=INK)
        ax.grid(True, color=GRID, linewidth=0.6)
        ax.set_axisbelow(True)
    lowest = min(float(regret(record, inside, "joint").min()) for record in records.values())
    axes[0].set_yscale("symlog", linthresh=1.0)
    axes[0].set_ylim(bottom=lowest - 0.1)
    for ax in axes[::4]:
        ax.set_ylabel("regret, nats per target", fontsize=10, color=INK)
    _family_legend(axes[-1], list(dict.fromkeys(record["family"] for record in records.values())))
    title = f"The {model} model: what each task loses, against what its diagnostics say"
    note = (
        "area under the ROC curve for a regret above the dashed line, below which 95 % of inside tasks lie; dotted: limits in the sentence"
    )
    fig.suptitle(f"{title}\n({note})", fontsize=12, color=INK)
    return fig


def _family_legend(ax: Axes, families: list[str]) -> None:
    from matplotlib.lines import Line2D

    ax.set_axis_off()
    handles = [Line2D([], [], linestyle="", color=STYLES[f][0], marker=STYLES[f][1], markersize=8) for f in families]
    ax.legend(handles, families, loc="center", fontsize=12, frameon=False, title="what is changed", title_fontsize=12, labelcolor=INK)


def heat(report: Mapping[str, Any]) -> Figure:
    """Draw the areas for outside against inside: one block for each model, one row for each kind, one column for each diagnostic."""
    fig = _figure(17.0, 8.6)
    blocks = fig.subplots(1, len(report), squeeze=False)[0]
    for ax, (model, table) in zip(blocks, report.items(), strict=True):
        rows = {kind: row for kind, row in table["kinds"].items() if "auc" in row}
        areas = np.array([[row["auc"][name][0] for name in DIAGNOSTICS] for row in rows.values()])
        shown = ax.imshow(areas, cmap="PuOr_r", vmin=0.0, vmax=1.0, aspect="auto")
        for i, line in enumerate(areas):
            for j, value in enumerate(line):
                ink = "white" if abs(value - 0.5) > 0.33 else INK
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color=ink)
        labels = [f"{kind}  ({_short(row['regret']['joint'][0])})" for kind, row in rows.items()]
        ax.set_yticks(range(len(rows)), labels, fontsize=9, color=INK)
        ax.set_xticks(range(len(DIAGNOSTICS)), [NAMES[name] for name in DIAGNOSTICS], fontsize=9, color=INK, rotation=35, ha="right")
        ax.set_title(f"the {model} model (in brackets: mean regret, nats per target)", fontsize=11, color=INK)
        for spine in ax.spines.values():
            spine.set_visible(False)
    bar = fig.colorbar(shown, ax=blocks, shrink=0.6, pad=0.01)
    bar.set_label("0.5 tells nothing, 1 warns of every task, 0 warns of the wrong ones", fontsize=10, color=INK)
    fig.suptitle("Area under the ROC curve: is a task outside or inside what the model has learned?", fontsize=13, color=INK)
    return fig


def _short(value: float) -> str:
    """Return about two digits, never as a power of ten."""
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def examples(model: bnnp.BNNP, home: Home, config: Mapping[str, Any]) -> Figure:
    """Draw tasks of several kinds, what the model predicts, and the sentence that each gets."""
    found = kinds(home)
    picked = [found[0]] + [next(kind for kind in found if kind.name.startswith(name)) for name in SHOWN]
    fig = _figure(15.0, 9.4)
    for ax, kind in zip(fig.subplots(2, 3).ravel(), picked, strict=True):
        _example(ax, model, kind, config)
    handles, names = fig.axes[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=4, fontsize=10, frameon=False, labelcolor=INK)
    return fig


def _example(ax: Axes, model: bnnp.BNNP, kind: Kind, config: Mapping[str, Any]) -> None:
    low, high = kind.process.x_range
    grid = torch.linspace(low, high, 300).unsqueeze(-1)
    settings = {**config, "context": (CONTEXT_SHOWN, CONTEXT_SHOWN)}
    task = draw(kind, 1, config["seed"] + 1, settings, float(model.scaling.y_scale), grid)[0]
    posterior = model.condition(task.xc, task.yc, num_samples=config["num_samples"], seed=config["seed"])
    predictive = posterior.predict(grid)
    x = grid[:, 0]
    lower, upper = (predictive.quantile(q)[:, 0] for q in (0.025, 0.975))
    ax.fill_between(x, lower, upper, color=BLUE, alpha=0.18, linewidth=0, label="95 % interval")
    ax.plot(x, predictive.mean[:, 0], color=BLUE, linewidth=1.8, label="predicted mean")
    ax.plot(x, task.ft[:, 0], color=INK, linestyle="--", linewidth=1.3, label="truth")
    ax.plot(task.xc[:, 0], task.yc[:, 0], "o", color=RED, markersize=5, markeredgecolor="white", label="points seen", zorder=5)
    sentence = str(posterior.diagnose(seed=config["seed"]).sentence)
    ax.set_title(kind.name, fontsize=12, color=INK)
    ax.set_xlabel("\n".join(textwrap.wrap(sentence, 64, break_on_hyphens=False)), fontsize=9.5, color=RED if warns(sentence) else INK)
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
