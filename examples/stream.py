"""Follow a tide gauge through a day: a posterior that is updated with every reading, watched, renewed, saved and taken up again.

Run: python examples/stream.py [folder]        (writes stream.png and the saved stream there)
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import bnnp
from bnnp.plots import save_figure

PARTICLES, NOISE = 64, 0.05
Record = dict[str, list[float]]


def gauges(count: int, seed: int, readings: int = 48) -> list[tuple[Tensor, Tensor]]:
    """Make days of water levels in metres, one gauge each, read at random hours; each gauge has its own height, range and phase."""
    g = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(count):
        hour = 24 * torch.rand(readings, 1, generator=g).sort(dim=0).values
        height, reach, phase = torch.randn(1, generator=g), 0.5 + torch.rand(1, generator=g), 2 * math.pi * torch.rand(1, generator=g)
        level = 0.3 * height + reach * torch.sin(2 * math.pi * hour / 12.4 + phase)
        tasks.append((hour, level + NOISE * torch.randn(readings, 1, generator=g)))
    return tasks


def follow(posterior: bnnp.Posterior, x: Tensor, y: Tensor, folder: Path, record: Record) -> bnnp.Posterior:
    """Predict each reading before it arrives, then tell the posterior of it; save it so that the stream can go on after a crash."""
    for i in range(len(x)):
        hour, level = x[i : i + 1], y[i : i + 1]
        ahead = posterior.predict(hour)
        posterior = posterior.update(hour, level)
        effective = float(posterior.effective_sample_size)
        renewed = effective < PARTICLES / 2  # too few particles speak: draw new ones, given all that was read
        if renewed:
            posterior = posterior.refresh()
        posterior.save(folder)  # the older one is replaced in one step
        found = (float(hour), float(level), float(ahead.quantile(0.025)), float(ahead.quantile(0.975)), float(ahead.log_prob(level)))
        for key, value in zip(record, (*found, effective, float(renewed)), strict=True):
            record[key].append(value)
    return posterior


def picture(r: Record) -> Figure:
    """Draw readings with the intervals that were predicted before, above the number of particles that count."""
    fig = Figure(figsize=(8, 6), layout="constrained")
    above, below = fig.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    middle = [(low + high) / 2 for low, high in zip(r["low"], r["high"], strict=True)]
    half = [(high - low) / 2 for low, high in zip(r["low"], r["high"], strict=True)]
    above.errorbar(r["hour"], middle, half, fmt="none", color="#0072B2", alpha=0.6, label="95 % interval, predicted before the reading")
    above.plot(r["hour"], r["level"], "o", color="#D55E00", markersize=4, label="reading")
    above.set(ylabel="water level (m)", title="Each reading, and what was predicted just before it")
    below.plot(r["hour"], r["effective"], ".-", color="#0072B2", label="after the reading")
    below.axhline(PARTICLES / 2, color="#222222", linestyle="--", linewidth=1, label="below half of them: condition afresh")
    again = [(hour, e) for hour, e, new in zip(r["hour"], r["effective"], r["renewed"], strict=True) if new]
    below.plot(*zip(*again, strict=True) if again else ([], []), "v", color="#D55E00", markersize=9, label="conditioned afresh here")
    below.set(xlabel="hour", ylabel="effective number\nof particles", ylim=(0, PARTICLES * 1.05))
    for ax in (above, below):
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08 if ax is above else -0.3), ncols=3, frameon=False, fontsize=9)
    return fig


def main(steps: int = 500, folder: str | Path = "runs") -> Record:
    """Train on days of other gauges, follow a new one, stop in the middle of the day, go on from the file."""
    folder = Path(folder)
    model = bnnp.BNNP(1, 1, hidden=(48,), prior=bnnp.Prior("per_unit", spread=0.9, input_scale=3.0), activation="tanh")
    bnnp.meta_train(model, gauges(200, seed=1), steps=steps, learning_rate=1e-2, context=(1, 47))
    model.save(folder / "gauge")
    x, y = gauges(1, seed=2)[0]
    record: Record = {key: [] for key in ("hour", "level", "low", "high", "log_prob", "effective", "renewed")}
    nothing = torch.zeros(0, 1)
    follow(model.condition(nothing, nothing, num_samples=PARTICLES), x[:24], y[:24], folder / "gauge", record)
    # Here the process may end. Another one needs the folder only.
    posterior = bnnp.load_posterior(folder / "gauge", bnnp.load(folder / "gauge"))
    follow(posterior, x[24:], y[24:], folder / "gauge", record)
    inside = sum(low <= level <= high for level, low, high in zip(record["level"], record["low"], record["high"], strict=True))
    print(f"{inside} of {len(x)} readings were in the 95 % interval predicted before them")
    print(f"conditioned afresh {sum(record['renewed']):.0f} times; mean log density of a reading {sum(record['log_prob']) / len(x):.2f}")
    print(f"picture: {save_figure(picture(record), folder / 'stream.png')}")
    return record


if __name__ == "__main__":
    main(folder=sys.argv[1] if len(sys.argv) > 1 else "runs")
