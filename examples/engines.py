"""Learn a prior from 200 small data sets, then ask several inference engines for the posterior of new ones, and compare what they say.

Run: python examples/engines.py [folder]        (writes engines.json, scores.png and predictions.png there; a stopped run goes on)
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bnnp
from bnnp.comparison import Row
from bnnp.plots import save_figure

SEEN, NOISE = 6, 0.1
SETTINGS: dict[str, Any] = {"nuts": {"warmup": 300, "draws": 300}}
QUICK: dict[str, Any] = {"nuts": {"num_chains": 2, "warmup": 15, "draws": 15}, "mean_field": {"steps": 50}}
ROWS: list[str | Row] = [
    "amortised",
    Row("amortised, weighted", "amortised", settings={"importance": True, "num_particles": 1024}),
    "mean_field",
    "full_vi",
    "laplace",
    "ensemble",
    "smc",
    "nuts",
    Row("10 steps of HMC from the amortised", "hmc", warm_start=True, settings={"num_chains": 32, "warmup": 10, "draws": 10}),
    Row("nuts, prior not learned", "nuts", prior="diagonal"),
]
SHOWN = ("amortised", "ensemble", "nuts", "nuts, prior not learned")


def sinusoids(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Make data sets of 30 noisy points of a sinusoid, each with its own amplitude and phase."""
    g = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(count):
        x = 6 * torch.rand(30, 1, generator=g) - 3
        amplitude, phase = 0.5 + torch.rand(1, generator=g), 2 * math.pi * torch.rand(1, generator=g)
        tasks.append((x, amplitude * torch.sin(2 * x + phase) + NOISE * torch.randn(30, 1, generator=g)))
    return tasks


def main(steps: int = 600, tests: int = 8, quick: bool = False, folder: str | Path = "runs/engines") -> bnnp.Comparison:
    """Train, compare, save the numbers and two pictures."""
    folder = Path(folder)
    if (folder / "model").is_dir():
        model = bnnp.load(folder / "model")
    else:
        prior = bnnp.Prior("per_unit", spread=0.9, input_scale=3.0)
        model = bnnp.BNNP(x_dim=1, y_dim=1, hidden=(24,), prior=prior, activation="tanh")
        bnnp.meta_train(model, sinusoids(200, seed=1), steps=steps, learning_rate=1e-2)
        model.save(folder / "model")
    new = [(x[:SEEN], y[:SEEN], x[SEEN:], y[SEEN:]) for x, y in sinusoids(tests, seed=2)]
    rows = [row for row in ROWS if not quick or row in ("amortised", "mean_field", "nuts")]
    settings = QUICK if quick else SETTINGS
    found = bnnp.compare(model, new, rows, settings=settings, num_samples=256, reference="nuts", folder=folder / "rows", progress=not quick)
    print(found)
    found.save(folder / "engines.json")
    save_figure(found.plot_scores(), folder / "scores.png")
    shown = [row.name for row in found.rows if row.name in SHOWN and row.failed is None]
    print(f"picture: {save_figure(found.plot_predictions(shown), folder / 'predictions.png')}")
    return found


if __name__ == "__main__":
    main(folder=sys.argv[1] if len(sys.argv) > 1 else "runs/engines")
