"""The pictures of the study: windows completed from a few samples, and windows drawn from the learned prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

import bnnp
from bnnp.evaluation import Model
from bnnp.plots import BLUE, DPI, INK, ORANGE, RED, SKY, TICK, TITLE, dress
from experiments.common.study import Part
from experiments.ecg_windows.windows import Windows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draws", "windows"]

TIME, VOLTAGE = "time since the start of the window, s", "mV"


def windows(model: Model, gp: Model, part: Part, chosen: Sequence[int], particles: int) -> Figure:
    """Draw windows (down) under each condition (across): truth, what was seen, our band and the Gaussian process's.

    Arguments:
        model: ours.
        gp: a Gaussian process.
        part: the windows.
        chosen: which of them.
        particles: of our prediction.
    """
    fig = _figure(4.6 * len(part.splits), 2.9 * len(chosen) + 0.9)
    axes = fig.subplots(len(chosen), len(part.splits), squeeze=False, sharex=True, sharey="row")
    for column, (condition, splits) in enumerate(part.splits.items()):
        for row, i in enumerate(chosen):
            ax, (xc, yc, xt, yt) = axes[row, column], splits[i]
            x, order = torch.cat([xc, xt])[:, 0].sort()
            grid, truth = x.numpy(), torch.cat([yc, yt])[order, 0].numpy()
            for method, colour, name in ((gp, ORANGE, "Gaussian process"), (model, BLUE, "this model")):
                with torch.no_grad():
                    found = method.condition(xc[None], yc[None], num_samples=particles).predict(x[None, :, None])
                edges = [found.quantile(q).reshape(-1).double().numpy() for q in (0.05, 0.95)]  # type: ignore[attr-defined]
                ax.fill_between(grid, *edges, color=colour, alpha=0.22, linewidth=0, label=f"{name}, 90 %")
                ax.plot(grid, found.mean.reshape(-1).double().numpy(), color=colour, linewidth=1.6, label=f"{name}, mean")
            ax.plot(grid, truth, color=INK, linewidth=0.9, label="truth")
            ax.plot(xc[:, 0].numpy(), yc[:, 0].numpy(), "o", color=RED, markersize=3.5, markeredgewidth=0, label="samples seen", zorder=5)
            last = row == len(chosen) - 1
            dress(ax, condition if row == 0 else "", TIME if last else "", f"{part.names[i]}\n{VOLTAGE}" if column == 0 else "")
            # The truth sets the limits: a wide band must not flatten everything else.
            low, high = float(truth.min()), float(truth.max())
            if column == 0:
                ax.set_ylim(low - 0.5 * (high - low), high + 0.4 * (high - low))
    handles, names = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=6, fontsize=TICK, frameon=False)
    return fig


def draws(model: bnnp.BNNP, held: Windows, count: int, seed: int = 0) -> Figure:
    """Draw windows from the learned prior beside windows of the test."""
    drawn = model.prior_samples(held.x, count, seed=seed, noisy=True).reshape(count, -1).numpy()
    at = np.linspace(0, len(held.y["test"]) - 1, count).round().astype(int)
    real, time = held.y["test"][torch.from_numpy(at)].numpy(), held.x[:, 0].numpy()
    fig = _figure(3.4 * count, 5.2)
    axes = fig.subplots(2, count, squeeze=False, sharex=True, sharey=True)
    for j in range(count):
        axes[0, j].plot(time, real[j], color=INK, linewidth=1.1)
        axes[1, j].plot(time, drawn[j], color=SKY, linewidth=1.1)
        dress(axes[0, j], "windows of the last minutes" if j == 0 else "", "", VOLTAGE if j == 0 else "")
        dress(axes[1, j], "drawn from the learned prior" if j == 0 else "", TIME if j == 0 else "", VOLTAGE if j == 0 else "")
    fig.suptitle("Real windows, and windows drawn from the learned prior", fontsize=TITLE, color=INK)
    return fig


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
