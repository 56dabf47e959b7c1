"""The pictures of the study: scores against the number of tasks, scores along the two dials, and what five tasks teach."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import bnnp
from bnnp import plots
from bnnp.plots import BLUE, GREEN, INK, ORANGE, PURPLE, RED, SKY, TICK, dress, save_figure
from experiments.few_tasks.sources import PROCESSES
from experiments.few_tasks.summary import SCORES, family, mean_se

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["abalone", "dials", "draw", "lessons", "scores"]

NAMES = {
    "fixed": ("fixed prior", ORANGE, "s-"),
    "learned": ("all learned", SKY, "^-"),
    "fraction, chosen": ("learned in part (chosen)", GREEN, "D-"),
    "shrunk, chosen": ("shrunk (chosen)", RED, "o-"),
    "Gaussian process": ("Gaussian process", PURPLE, "v--"),
    "mean of tasks": ("mean of tasks", "#888888", "x--"),
}
LABELS = {
    "joint": "log density per target,\nall of a task together",
    "marginal": "log density per target,\neach alone",
    "rmse": "root mean square error",
}


def draw(report: dict[str, Any], out: Path) -> None:
    """Write the pictures of a report."""
    sources = [name for name in PROCESSES if name in report]
    save_figure(scores({name: report[name] for name in sources}), out / "scores.png")
    save_figure(dials({name: report[name] for name in sources}), out / "dials.png")
    if "abalone" in report:
        save_figure(abalone(report["abalone"]), out / "abalone.png")


def _sizes(groups: dict[str, Any]) -> dict[int, Any]:
    return {int(name.split()[0]): group for name, group in groups.items() if name != "oracle"}


def scores(report: dict[str, Any], title: str = "What can be learned from few tasks?") -> Figure:
    """Draw each method's test scores against the number of tasks, with standard errors over seeds."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(13.0, 3.9 * len(report) + 0.8), layout="constrained", facecolor="white")
    axes = fig.subplots(len(report), len(SCORES), squeeze=False)
    for row, (source, groups) in zip(axes, report.items(), strict=True):
        sized = _sizes(groups)
        for ax, score in zip(row, SCORES, strict=True):
            sign = -1 if score == "rmse" else 1
            best = groups["oracle"][score]
            poor = [mean_se(group["scores"]["mean of tasks"]["test"][score])[0] for group in sized.values()]
            edge = best - 1.35 * sign * max(sign * (best - p) for p in poor)
            ax.axhline(best, color=INK, linestyle=":", linewidth=1.8, label="exact posterior of the true process")
            for k, (method, (name, colour, style)) in enumerate(NAMES.items()):
                points = [(n, *mean_se(group["scores"][method]["test"][score])) for n, group in sized.items()]
                _curve(ax, points, edge, sign, name, colour, style, 3 + 10 * (k > 1))
            ends = sorted((edge - sign * 0.04 * abs(best - edge), best + sign * 0.06 * abs(best - edge)))
            ax.set_ylim(*ends)
            ax.set_xscale("log")
            ax.set_xticks(list(sized), [str(n) for n in sized])
            ax.xaxis.set_minor_locator(_none())
            better = "lower is better" if score == "rmse" else "higher is better"
            dress(ax, f"{source}: {better}", "number of tasks learned from", LABELS[score])
    _legend(fig, axes[0][0])
    fig.suptitle(title, fontsize=13, color=INK)
    return fig


def _curve(ax: Axes, points: list[tuple[int, float, float]], edge: float, sign: int, name: str, colour: str, style: str, rise: int) -> None:
    """Draw a method; values beyond the edge at the edge, each with its value, so many points above it."""
    x, y, e = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    beyond = sign * y < sign * edge
    ax.plot(x, np.where(beyond, edge, y), style, color=colour, linewidth=1.8, markersize=6, label=name, clip_on=False)
    ax.errorbar(x[~beyond], y[~beyond], e[~beyond], fmt="none", ecolor=colour, capsize=3)
    for place, value in zip(x[beyond], y[beyond], strict=True):
        ax.annotate(_short_number(value), (place, edge), xytext=(7, rise), textcoords="offset points", fontsize=TICK - 1, color=colour)


def _short_number(value: float) -> str:
    return (f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}").replace("-", "\N{MINUS SIGN}")


def dials(
    report: dict[str, Any],
    title: str = "Two dials: how much is learned, and how strongly all of it is shrunk (what is worse than the frame is drawn on its edge)",
) -> Figure:
    """Draw test and held-out scores along the fractions and along the shrinkages, for each number of tasks."""
    from matplotlib.figure import Figure

    sizes = list(_sizes(next(iter(report.values()))))
    fig = Figure(figsize=(2.7 * len(sizes) + 0.8, 2.7 * 2 * len(report) + 0.8), layout="constrained", facecolor="white")
    axes = fig.subplots(2 * len(report), len(sizes), squeeze=False)
    for i, (source, groups) in enumerate(report.items()):
        for j, (size, group) in enumerate(_sizes(groups).items()):
            for k, kind in enumerate(("fraction", "shrunk")):
                ax = axes[2 * i + k][j]
                names = [name for name in group["validation"] if kind in family(name)]
                if kind == "shrunk":  # from free to fixed
                    names = ["learned", *(n for n in names if n.startswith("shrinkage")), "fixed"]
                test = [mean_se(group["scores"][name]["test"]["joint"]) for name in names]
                held = [mean_se(group["validation"][name]) for name in names]
                top, low = max(m for m, _ in test), groups["oracle"]["joint"]
                edge = top - 1.6 * max(0.3, low - top, top - test[names.index("fixed")][0])
                for values, name, colour in ((test, "test", RED), (held, "held-out tasks", BLUE)):
                    shown = [max(m, edge) if math.isfinite(m) else edge for m, _ in values]
                    errors = [e if m > edge else 0.0 for m, e in values]
                    ax.errorbar(range(len(names)), shown, errors, fmt="o-", color=colour, capsize=2, markersize=4, label=name)
                ax.axhline(groups["oracle"]["joint"], color=INK, linestyle=":", linewidth=1.5, label="exact posterior")
                ends = {"fixed": "0" if kind == "fraction" else "\N{INFINITY}", "learned": "1" if kind == "fraction" else "0"}
                ax.set_xticks(
                    range(len(names)),
                    [ends.get(n, n.split()[-1]).removeprefix("0").replace("\N{INFINITY}", "\N{INFINITY}") or "0" for n in names],
                )
                dress(
                    ax,
                    f"{source}, {size} tasks",
                    "fraction learned" if kind == "fraction" else "shrinkage",
                    "" if j else "log density per target",
                )
                ax.set_ylim(edge - 0.04 * (low - edge), low + 0.08 * (low - edge))
    _legend(fig, axes[0][0])
    fig.suptitle(title, fontsize=13, color=INK)
    return fig


def abalone(groups: dict[str, Any], title: str = "Abalones: learned from males and females, tested on infants") -> Figure:
    """Draw test scores for each size of the context; one panel for each way to cut the tasks."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(5.6 * len(groups) + 0.6, 8.2), layout="constrained", facecolor="white")
    axes = fig.subplots(2, len(groups), squeeze=False, sharex=True, sharey="row")
    for row, score in zip(axes, ("joint", "rmse"), strict=True):
        for ax, (variant, group) in zip(row, groups.items(), strict=True):
            for k, (method, (name, colour, style)) in enumerate(NAMES.items()):
                if method == "mean of tasks":
                    continue  # so far off that the others could not be told apart
                tests = group["scores"][method]
                found = [mean_se(tests[test][score]) for test in tests]
                x = [float(test.split()[0]) * (1 + 0.02 * (k - 2)) for test in tests]
                ax.errorbar(x, [m for m, _ in found], [e for _, e in found], fmt=style, color=colour, capsize=3, label=name)
            ax.set_xscale("log")
            seen = [int(test.split()[0]) for test in group["scores"]["fixed"]]
            ax.set_xticks(seen, [str(n) for n in seen])
            ax.xaxis.set_minor_locator(_none())
            first = variant == next(iter(groups))
            words = {"whole": "two tasks: the whole sexes", "size bins": "twenty tasks: each sex in ten bins of length"}
            label = (LABELS[score] if score != "rmse" else "root mean square error, rings") if first else ""
            dress(ax, words[variant] if score == "joint" else "", "infants seen", label)
    _legend(fig, axes[0][0])
    fig.suptitle(title, fontsize=13, color=INK)
    return fig


def lessons(models: dict[str, bnnp.BNNP], seed: int = 0) -> Figure:
    """Draw functions from priors, and posteriors given five points of a new sinusoid."""
    process = PROCESSES["sinusoid"]
    grid = torch.linspace(-5, 5, 200).unsqueeze(-1)
    x, y = process.tasks(1, 77 + seed, 5)[0]
    true = process.sample(grid, 8, torch.Generator().manual_seed(0))[..., 0]
    exact = process.condition(x, y).predict(grid)  # type: ignore[attr-defined]
    top: list[plots.Panel] = [{"title": "true functions", "x": grid[:, 0], "samples": true}]
    bottom: list[plots.Panel] = [_posterior("exact posterior", grid, x, y, exact)]
    for name, model in models.items():
        top.append({"title": f"{name}: prior", "x": grid[:, 0], "samples": model.prior_samples(grid, 8, seed=1)[..., 0]})
        bottom.append(_posterior(f"{name}: 5 points seen", grid, x, y, model.condition(x, y, num_samples=128).predict(grid)))
    fig = plots.functions_1d([*top, *bottom], columns=len(top))
    for ax in fig.axes:
        ax.set_ylim(-1, 11)  # the same everywhere: the priors differ in their spread
    return fig


def _posterior(title: str, grid: torch.Tensor, x: torch.Tensor, y: torch.Tensor, predictive: Any) -> plots.Panel:
    return {
        "title": title,
        "x": grid[:, 0],
        "xc": x[:, 0],
        "yc": y[:, 0],
        "mean": predictive.mean[:, 0],
        "lower": predictive.quantile(0.025)[:, 0],
        "upper": predictive.quantile(0.975)[:, 0],
    }


def _none() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _legend(fig: Figure, ax: Axes) -> None:
    handles, names = ax.get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=4, fontsize=TICK, frameon=False, labelcolor=INK)
