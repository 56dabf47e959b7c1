"""Learn from 200 small data sets what a function looks like, then predict new ones from five points each.

Run: python examples/quickstart.py [folder]        (writes quickstart.png there)
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

import bnnp
from bnnp.plots import Panel, functions_1d, save_figure

Task = tuple[Tensor, Tensor]
NOISE = 0.1


def sinusoids(count: int, seed: int) -> list[Task]:
    """Make data sets of 30 noisy points of a sinusoid, each with its own amplitude and phase."""
    g = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(count):
        x = 6 * torch.rand(30, 1, generator=g) - 3
        amplitude, phase = 0.5 + torch.rand(1, generator=g), 2 * math.pi * torch.rand(1, generator=g)
        tasks.append((x, amplitude * torch.sin(2 * x + phase) + NOISE * torch.randn(30, 1, generator=g)))
    return tasks


def panel(model: bnnp.BNNP, title: str, task: Task, seen: int) -> Panel:
    """Describe the prediction for one task from its first `seen` points."""
    x, y = task
    grid = torch.linspace(-3, 3, 121).unsqueeze(-1)
    predictive = model.condition(x[:seen], y[:seen]).predict(grid)
    return Panel(
        title=title,
        x=grid[:, 0].numpy(),
        xc=x[:seen, 0].numpy(),
        yc=y[:seen, 0].numpy(),
        mean=predictive.mean[:, 0].numpy(),
        lower=predictive.quantile(0.025)[:, 0].numpy(),
        upper=predictive.quantile(0.975)[:, 0].numpy(),
        samples=predictive.sample(10, noisy=False)[..., 0].numpy(),
    )


def main(steps: int = 400, folder: str | Path = "runs") -> bnnp.Evaluation:
    """Train, score on new tasks, save a picture."""
    tasks, new = sinusoids(200, seed=1), sinusoids(50, seed=2)
    # The two numbers only choose where learning starts; see docs/design.md.
    prior = bnnp.Prior("per_unit", spread=0.9, input_scale=3.0)
    model = bnnp.BNNP(x_dim=1, y_dim=1, hidden=(48,), prior=prior, activation="tanh")
    result = bnnp.meta_train(model, tasks, steps=steps, learning_rate=1e-2)

    scores = bnnp.evaluate(model, new, context_fraction=5 / 30)
    inside, error = scores.summary["coverage_0.95"]
    noise = float(model.noise_std)
    print(f"{len(tasks)} data sets, {steps} steps, {result.seconds:.1f} s")
    print(f"noise: learned {noise:.3f}, true {NOISE:.3f}")
    print(f"calibration: 95 % intervals hold {100 * inside:.1f} % (standard error {100 * error:.1f}) of the new values")

    panels = [panel(model, f"a new data set, {n} points seen", new[0], n) for n in (0, 2, 5)]
    path = save_figure(functions_1d(panels), Path(folder) / "quickstart.png")
    print(f"picture: {path}")
    return scores


if __name__ == "__main__":
    main(folder=sys.argv[1] if len(sys.argv) > 1 else "runs")
