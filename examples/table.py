"""Turn a long table of visits into one data set per patient, with gaps, and predict the visits to come.

The table has one row per visit: patient, day, dose, measurement; some measurements are missing (NaN).
Run: python examples/table.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import bnnp

Array = np.ndarray[Any, np.dtype[np.float64]]
Task = tuple[Array, Array]


def make_table(patients: int, seed: int) -> Array:
    """Make rows (patient, day, dose, measurement): an own level, an own response to the dose that decays, noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(patients):
        days = np.sort(rng.uniform(0, 30, rng.integers(8, 15)))
        level, response, rate = rng.normal(60, 8), rng.normal(12, 4), rng.uniform(0.05, 0.15)
        dose = rng.choice([1.0, 2.0, 3.0])
        measured = level - response * dose * np.exp(-rate * days) + rng.normal(0, 1.5, days.shape)
        measured[rng.random(days.shape) < 0.15] = np.nan
        rows.append(np.column_stack([np.full(days.shape, i), days, np.full(days.shape, dose), measured]))
    return np.concatenate(rows)


def to_tasks(table: Array) -> list[Task]:
    """Cut the table into one pair per patient, x = (day, dose) and y = measurement, missing ones still there."""
    return [(rows[:, 1:3], rows[:, 3:]) for i in np.unique(table[:, 0]) for rows in [table[table[:, 0] == i]]]


def without_missing(task: Task) -> Task:
    """Drop visits without a measurement: a point that nobody measured says nothing."""
    seen = ~np.isnan(task[1][:, 0])
    return task[0][seen], task[1][seen]


def pad(tasks: list[Task]) -> tuple[Tensor, Tensor, Tensor]:
    """Lay patients side by side: x (T, N, 2), y (T, N, 1) and a mask (T, N), True where there is a measurement."""
    longest = max(len(x) for x, _ in tasks)
    x, y = np.full((len(tasks), longest, 2), np.nan), np.full((len(tasks), longest, 1), np.nan)
    for i, (xi, yi) in enumerate(tasks):
        x[i, : len(xi)], y[i, : len(yi)] = xi, yi
    # Whatever stands where the mask is False, NaN included, is never looked at.
    return torch.as_tensor(x), torch.as_tensor(y), torch.as_tensor(~np.isnan(y[..., 0]))


def main(steps: int = 400, shown: int = 5) -> tuple[float, float]:
    """Train on 150 patients; predict the later visits of 50 new ones from their first three rows."""
    train = [without_missing(task) for task in to_tasks(make_table(150, seed=0))]
    new = to_tasks(make_table(50, seed=1))
    prior = bnnp.Prior("per_unit", spread=0.9)
    model = bnnp.BNNP(x_dim=2, y_dim=1, hidden=(24,), prior=prior, activation="tanh")
    bnnp.meta_train(model, train, validation=0.2, steps=steps, learning_rate=1e-2)

    xc, yc, mask_c = pad([(x[:3], y[:3]) for x, y in new])
    xt, yt, mask_t = pad([(x[3:], y[3:]) for x, y in new])
    # Predictions need finite inputs everywhere; the mask says afterwards which of them count.
    xt = torch.nan_to_num(xt)
    predictive = model.condition(xc, yc, mask=mask_c).predict(xt)
    low, high = predictive.quantile(0.025), predictive.quantile(0.975)
    inside = ((low <= yt) & (yt <= high))[mask_t].double().mean()
    error = (predictive.mean - yt)[mask_t].square().mean().sqrt()

    print("the last visit:  patient  visits seen   day  predicted +- std  measured")
    for i in range(shown):
        j = int(mask_t[i].nonzero()[-1])
        mean, std = float(predictive.mean[i, j, 0]), float(predictive.std[i, j, 0])
        print(f"{i:24d}  {int(mask_c[i].sum()):11d}  {xt[i, j, 0]:4.1f}  {mean:9.1f} +- {std:4.1f}  {yt[i, j, 0]:8.1f}")
    print(f"{len(new)} new patients: error {float(error):.2f} (noise 1.50), 95 % intervals hold {100 * float(inside):.1f} %")
    return float(error), float(inside)


if __name__ == "__main__":
    main()
