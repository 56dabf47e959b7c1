"""Learn a prior over the weights of a Bayesian neural network from many data sets; get the posterior of a new one in one pass.

A **prior** is a module that hands out weights as mean + L eps, with eps standard normal.
A **network** is a module whose call on a context returns a **Posterior**: an immutable value that can predict, be sampled,
and be *updated* to another Posterior.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bnnp import objectives
from bnnp.checkpoint import load, load_posterior, save
from bnnp.choice import Choice, choose_prior
from bnnp.comparison import Comparison, compare
from bnnp.evaluation import Evaluation, evaluate
from bnnp.likelihoods import (
    Bernoulli,
    Beta,
    Categorical,
    Gaussian,
    Heteroscedastic,
    Likelihood,
    MultivariateGaussian,
    NegativeBinomial,
    Poisson,
    StudentT,
)
from bnnp.linalg import NotPositiveDefiniteError, NumericalWarning
from bnnp.networks import BNNP
from bnnp.posterior import Posterior
from bnnp.predictive import Predictive
from bnnp.priors import Prior
from bnnp.reading import PriorSummary, layer_effects
from bnnp.tasks import Context, Task, TaskBatch, collate
from bnnp.training import TrainingError, TrainResult, meta_train
from bnnp.trust import SBC, Diagnosis, sbc

if TYPE_CHECKING:
    from bnnp.estimator import BNNPRegressor as BNNPRegressor

__version__ = "0.1.0"

__all__ = [
    "BNNP",
    "SBC",
    "Bernoulli",
    "Beta",
    "Categorical",
    "Choice",
    "Comparison",
    "Context",
    "Diagnosis",
    "Evaluation",
    "Gaussian",
    "Heteroscedastic",
    "Likelihood",
    "MultivariateGaussian",
    "NegativeBinomial",
    "NotPositiveDefiniteError",
    "NumericalWarning",
    "Poisson",
    "Posterior",
    "Predictive",
    "Prior",
    "PriorSummary",
    "StudentT",
    "Task",
    "TaskBatch",
    "TrainResult",
    "TrainingError",
    "choose_prior",
    "collate",
    "compare",
    "evaluate",
    "layer_effects",
    "load",
    "load_posterior",
    "meta_train",
    "objectives",
    "save",
    "sbc",
]


def __getattr__(name: str) -> Any:
    """Return what needs scikit-learn when it is first asked for, so that nobody else has to have it."""
    if name == "BNNPRegressor":
        return importlib.import_module("bnnp.estimator").BNNPRegressor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
