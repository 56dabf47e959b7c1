"""What a prediction has to beat: simple methods with the calls of a model, so that `bnnp.evaluate` judges them by the same code.

Each learns from the training tasks what it can, and is given the same context as the model. From none of the context used to all of it:
one distribution for all points, the level of the task, a regression over all tasks with a level for each, Gaussian processes.
"""

from __future__ import annotations

from typing import Any

from bnnp.data.collection import Collection
from bnnp.evaluation import Model
from bnnp.rivals.discrete import ClassFrequencies, CountRates
from bnnp.rivals.gaussian import GaussianPrediction, Marginal, PooledRegression, TaskMean
from bnnp.rivals.process import TaskGP

__all__ = [
    "ClassFrequencies",
    "CountRates",
    "GaussianPrediction",
    "Marginal",
    "PooledRegression",
    "TaskGP",
    "TaskMean",
    "default_rivals",
    "left_out",
]


def default_rivals(train: Collection, seed: int = 0, likelihood: Any = None) -> dict[str, Model]:
    """Fit the rivals that suit the outputs to training tasks; names are as a report shows them.

    Arguments:
        train: tasks to learn from; no test task may be among them.
        seed: of subsets and random features.
        likelihood: of the model, where outputs are class labels or counts; densities are compared with densities only.

    Example:
        >>> import numpy as np
        >>> tasks = [(np.linspace(0, 1, 9), np.sin(np.linspace(0, 3, 9)) + k) for k in range(6)]
        >>> list(default_rivals(Collection.of(tasks, ["x"], ["y"])))[:3]
        ['one Gaussian for all', 'mean of the task', 'pooled regression']
    """
    if likelihood is not None and likelihood.labels:
        classes = getattr(likelihood, "classes", None)
        return {
            "class frequencies": ClassFrequencies(train, classes, per_task=False),
            "class frequencies of the task": ClassFrequencies(train, classes, per_task=True),
        }
    if likelihood is not None and likelihood.discrete:
        return {"one count distribution for all": CountRates(train, per_task=False), "rate of the task": CountRates(train, per_task=True)}
    learned, regression = TaskGP(train, seed), PooledRegression(train, seed)
    return {
        "one Gaussian for all": Marginal(train),
        "mean of the task": TaskMean(train),
        "pooled regression": regression,
        "GP learned over tasks": learned,
        "GP fitted to the task": learned.fitted_to_the_task(),
        "GP about the regression": TaskGP(train, seed, regression),
    }


def left_out(likelihood: Any) -> str:
    """Return a sentence that says which rivals do not apply, "" where all do."""
    if likelihood.labels or likelihood.discrete:
        what = "class labels" if likelihood.labels else "counts"
        return (
            f"Outputs are {what}, whose probabilities cannot be compared with densities: regressions and Gaussian processes were left out."
        )
    return ""
