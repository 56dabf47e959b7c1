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
from bnnp.checkpoint import read_bundle, write_bundle
from bnnp.data.synthetic import SyntheticTask
from bnnp.importance import log_mean_exp, psis
from bnnp.inference import Draws, Functional, evidence, functional, run, smc
from bnnp.inference.amortised import Amortised
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
    log = place.parent / f"{place.name}.jsonl"
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
        **{**own["training"], **plan.get("training", {})},
    )
    return {**_bounds(config, model, scored_tasks(config)), "skipped": trained.skipped}


def _functional(config: Mapping[str, Any], noise: float, collapse: bool, times: int = 1) -> Functional:
    """Return the log-joint of the scored tasks, the whole list of them so many times over."""
    tasks = scored_tasks(config) * times
    return functional(build(config, noise, 0), [task.x for task in tasks], [task.y for task in tasks], collapse=collapse)


def engine(config: Mapping[str, Any], plan: Mapping[str, Any], noise: float, seed: int, place: Path) -> Record:
    """Fit a variational engine to each task, for all seeds at once: copies of a task are tasks of their own, with noise of their own."""
    seeds, T = plan.get("own_seeds", config["seeds"]), config["tasks"]
    F = _functional(config, noise, plan.get("collapse", False), len(seeds))
    found = run(F, plan["engine"], num_samples=1, seed=seeds[0], folder=place, **plan["settings"]).report
    names = {"value": "elbo", "error": "elbo_se", "weighted": "log_evidence", "weighted_error": "log_evidence_se", "pareto_k": "pareto_k"}
    return {key: _rows(found[name], T) for key, name in names.items()}


def tempered(config: Mapping[str, Any], plan: Mapping[str, Any], noise: float, seed: int, place: Path) -> Record:
    """Estimate the evidence by tempering from the prior, or from the amortised posterior; the particles are kept for bridges."""
    F, settings = _functional(config, noise, True), {**plan["settings"], **plan.get("at", {}).get(f"{noise:g}", {})}
    if plan.get("base") == "amortised":
        settings["proposal"] = _amortised(config, F, noise, place)
    # Not the engine's own `folder`: a proposal cannot be told from another by its settings.
    built = smc.build(F.batched, **settings)
    state, log = built.init(seed), place.parent / f"{place.name}.jsonl"
    log.unlink(missing_ok=True)
    for _ in range(built.num_updates):
        state = built.update(state)
        with open(log, "a") as file:
            file.write(json.dumps({"stage": state.stage, "inverse_temperature": state.inverse_temperature.tolist()}) + "\n")
        if bool((state.inverse_temperature >= 1).all()):
            break
    found, T = built.report(state), config["tasks"]
    draws = built.sample(state, plan["kept"], seed)
    distinct = found["ancestors"] * settings["num_populations"]
    log_weights = torch.zeros(draws.eps.shape[:2]) if draws.log_weights is None else draws.log_weights
    write_bundle(place, "draws", {"noise": noise}, {"eps": draws.eps, "log_weights": log_weights, "distinct": distinct})
    return {
        "value": _rows(found["log_evidence"], T),
        "error": _rows(found["log_evidence_se"], T),
        "bennett": _rows(found["log_evidence_bar"], T),
        "bennett_error": _rows(found["log_evidence_bar_se"], T),
        "stages": _rows(found["stages"], T),
        "ancestors": _rows(found["ancestors"], T),
    }


def _amortised(config: Mapping[str, Any], F: Functional, noise: float, place: Path) -> Amortised:
    """Return the posterior of the meta-trained network for this noise, which the cell before this one trained."""
    return Amortised(F, bnnp.load(_beside(place, f"BNNP_meta-trained_{noise:g}_0") / "last"))


def _beside(place: Path, name: str) -> Path:
    """Return the files of another cell."""
    found = place.parent / name
    if not found.exists():
        raise SystemExit(f"Expected the files of an earlier cell in {found}. Got none. Run that method at this noise first.")
    return found


def importance(config: Mapping[str, Any], plan: Mapping[str, Any], noise: float, seed: int, place: Path) -> Record:
    """Estimate the evidence by importance sampling from the amortised posterior."""
    F = _functional(config, noise, True)
    found = evidence.importance(F, _amortised(config, F, noise, place), plan["draws"], seed + 1)
    assert found.pareto_k is not None
    T = config["tasks"]
    return {
        "value": _rows(found.log_evidence, T),
        "error": _rows(found.standard_error, T),
        "pareto_k": _rows(found.pareto_k, T),
    }


def bridge(config: Mapping[str, Any], plan: Mapping[str, Any], noise: float, seed: int, place: Path) -> Record:
    """Estimate the evidence by a bridge between the amortised posterior and the particles that tempering from the prior has left."""
    F = _functional(config, noise, True)
    _, kept = read_bundle(_beside(place, f"{plan['draws_of'].replace(' ', '_')}_{noise:g}"), "draws")
    draws = Draws(kept["eps"], kept["log_weights"])
    found = evidence.bridge(F, draws, _amortised(config, F, noise, place), kept["distinct"], plan["draws"], seed + 2)
    T = config["tasks"]
    overlap = {} if found.overlap is None else {"overlap": _rows(found.overlap, T)}
    return {"value": _rows(found.log_evidence, T), "error": _rows(found.standard_error, T), **overlap}


METHODS: dict[str, Method] = {
    "bridge": bridge,
    "engine": engine,
    "fitted": fitted,
    "importance": importance,
    "meta": meta,
    "prior": prior,
    "tempered": tempered,
}
