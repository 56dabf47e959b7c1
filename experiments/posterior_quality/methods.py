"""What is measured: bounds of approximate posteriors, and estimates of the evidence that they are held against.

A method takes (config, plan, noise, seed, place of its files) and returns a record: "value" with its "error", Monte Carlo standard errors,
each as one row of tasks for each seed; and whatever else tells how far the value can be trusted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bnnp
from bnnp.data.synthetic import SyntheticTask
from bnnp.importance import log_mean_exp, psis
from bnnp.networks import BNNP
from experiments.posterior_quality.fitted import VARIANTS, build, fit, fitted_model
from experiments.posterior_quality.problem import scored_tasks, training_tasks

__all__ = ["METHODS", "Method", "Record"]

Record = dict[str, Any]
Method = Callable[[Mapping[str, Any], Mapping[str, Any], float, int, Path], Record]


def _rows(values: Tensor, tasks: int) -> list[list[float]]:
    """Return numbers of all seeds and tasks, seeds first, as one row for each seed."""
    rows: list[list[float]] = values.detach().double().reshape(-1, tasks).tolist()
    return rows


def _bounds(config: Mapping[str, Any], model: BNNP, tasks: list[SyntheticTask]) -> Record:
    """Return the bound of a posterior with the last layer as the model has it, and what importance weights make of its draws."""
    x, y = [task.x for task in tasks], [task.y for task in tasks]
    posterior = model.double().condition(x, y, num_samples=config["particles"], seed=config["task_seed"])
    each, weights, T = posterior.bounds, posterior.log_importance, config["tasks"]
    evidence, error = log_mean_exp(weights)
    return {
        "value": _rows(each.mean(0), T),
        "error": _rows(each.std(0) / len(each) ** 0.5, T),
        "weighted": _rows(evidence, T),
        "weighted_error": _rows(error, T),
        "pareto_k": _rows(psis(weights)[1], T),
    }


def fitted(config: Mapping[str, Any], plan: Mapping[str, Any], noise: float, seed: int, place: Path) -> Record:
    """Fit inference networks to each task, for all seeds at once."""
    tasks, seeds = scored_tasks(config), config["seeds"]
    last_layer, objective = VARIANTS[plan["variant"]]
    model = fitted_model(config, noise, [s for s in seeds for _ in tasks], last_layer)
    log = place.with_suffix(".jsonl")
    log.unlink(missing_ok=True)
    fit(model, tasks * len(seeds), objective, {**config["fit"], **plan.get("fit", {})}, seeds[0], log)
    return _bounds(config, model, tasks * len(seeds))


def prior(config: Mapping[str, Any], plan: Mapping[str, Any], noise: float, seed: int, place: Path) -> Record:
    """Infer nothing but the last layer: hidden weights as the prior has them."""
    model, tasks = build(config, noise, seed), scored_tasks(config)
    with torch.no_grad():
        for layer in model.layers[:-1]:
            layer.net[-1].bias[layer.d_out :] = 40.0  # type: ignore[index, operator, union-attr]
            layer.net[-1].weight[layer.d_out :] = 0.0  # type: ignore[index, operator, union-attr]
    return _bounds(config, model, tasks)


@cache
def _training(key: str) -> list[SyntheticTask]:
    """Return the tasks of meta-training, drawn once for all noises."""
    return training_tasks(json.loads(key))


def meta(config: Mapping[str, Any], plan: Mapping[str, Any], noise: float, seed: int, place: Path) -> Record:
    """Train inference networks on many tasks with this noise in the likelihood, and ask them about the scored ones."""
    own = config["meta"]
    model = build(config, noise, seed)
    trained = bnnp.meta_train(
        model,
        _training(json.dumps({key: config[key] for key in ("hidden", "data", "meta")})),
        validation=None,
        objective=own["objective"],
        context=tuple(own["context"]),
        keep="last",
        seed=seed,
        folder=place,
        resume=True,
        checkpoint_every=250,
        log_every=50,
        progress=False,
        **own["training"],
    )
    return {**_bounds(config, model, scored_tasks(config)), "skipped": trained.skipped}


METHODS: dict[str, Method] = {"fitted": fitted, "prior": prior, "meta": meta}
