"""The BNNP fitted to single tasks: inference networks that see one data set only, for several tasks and seeds at once.

A task's networks have parameters of their own, and the objective of a task depends on no other's, so one run of Adam on the sum is as many
separate runs: each parameter has its own gradient and its own moments. Only the noise of the likelihood is the same for all of a run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bnnp
from bnnp.layers import ACTIVATIONS, AmortisedLinear
from bnnp.networks import BNNP
from bnnp.objectives import avi, iw_avi, training_noise
from bnnp.particles import drawn_log_lik
from bnnp.seeds import seeded
from bnnp.tasks import Context, TaskBatch, collate
from experiments.posterior_quality.problem import PRIOR

__all__ = ["VARIANTS", "PerTask", "build", "fit", "fitted_model", "sampled_avi"]

Pair = tuple[Tensor, Tensor]
Objective = Callable[[BNNP, TaskBatch, int, torch.Generator], Tensor]


def sampled_avi(model: BNNP, batch: TaskBatch, num_samples: int, generator: torch.Generator) -> Tensor:
    """Return the bound of `avi` with the last layer drawn instead of integrated out: the same expectation, and more noise."""
    context, normal = model.scale(batch.context), training_noise(model, generator)
    particles = model.particles(context, num_samples, normal)
    assert particles.last is not None
    k = particles.last.mean.shape[-2:]
    last = particles.given.weights(particles.last.draw(normal((num_samples, context.num_tasks, *k))))
    weights = (*particles.weights, last)
    log_lik = drawn_log_lik(model.architecture, model.likelihood, weights, context, model.factor_dtype)
    return (log_lik - particles.kl).mean(0)


VARIANTS: dict[str, tuple[str, Objective]] = {
    "collapsed": ("exact", avi),
    "sampled": ("exact", sampled_avi),
    "amortised": ("amortised", avi),
    "importance": ("exact", iw_avi),
}
"""What the last layer is and what is maximised: the exact last layer integrated out, drawn, with inferred noise, importance-weighted."""


class PerTask(nn.Module):
    """Be one perceptron for each task, with parameters stacked along the tasks."""

    def __init__(self, nets: Sequence[nn.Sequential], activation: str) -> None:
        super().__init__()
        self.activation = activation
        columns = [[m for m in net if isinstance(m, nn.Linear)] for net in nets]
        levels = list(zip(*columns, strict=True))
        self.weights = nn.ParameterList([torch.stack([m.weight.detach() for m in level]) for level in levels])
        self.biases = nn.ParameterList([torch.stack([m.bias.detach() for m in level]).unsqueeze(-2) for level in levels])

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs (..., T, N, out) for inputs (..., T, N, q), of each task by its own network."""
        H = inputs
        for i, (W, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            H = (ACTIVATIONS[self.activation](H) if i else H) @ W.mT + b
        return H


def build(config: Mapping[str, Any], noise: float, seed: int, last_layer: str = "exact", **changes: Any) -> BNNP:
    """Return the network with its fixed prior and likelihood, and with inference networks to be learned."""
    options = {"net_hidden": config["net_hidden"], **config["nets"], **changes}
    start = options.pop("start_noise")
    likelihood = bnnp.Gaussian(noise, learn_noise=False)
    model = BNNP(1, 1, config["hidden"], PRIOR, likelihood, last_layer=last_layer, seed=seed, **options)
    model.scaling.fitted.fill_(True)  # the prior is one over networks between the data's own units
    with torch.no_grad():
        for layer in model.layers[:-1]:
            assert isinstance(layer, AmortisedLinear) and layer.net is not None
            last = layer.net[-1]
            last.bias[layer.d_out :] += 2.0 + math.log(start)  # pseudo-noise is exp(raw - 2): wide, so that training starts near the prior
    return model


def fitted_model(config: Mapping[str, Any], noise: float, seeds: Sequence[int], last_layer: str = "exact", **changes: Any) -> BNNP:
    """Return a network whose inference networks are others for each task: one for each of the seeds."""
    model = build(config, noise, seeds[0], last_layer, **changes).double()
    singles = [build(config, noise, seed, last_layer, **changes).double() for seed in seeds]
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, AmortisedLinear)
        if layer.net is not None:
            nets = [single.layers[i].net for single in singles]
            layer.net = PerTask([net for net in nets if isinstance(net, nn.Sequential)], model.architecture.activation)  # type: ignore[assignment]
    return model


def fit(model: BNNP, tasks: Sequence[Pair], objective: Objective, training: Mapping[str, Any], seed: int, log: Path | None = None) -> float:
    """Fit the inference networks to these tasks, each its own; return the seconds of processor time.

    Arguments:
        model: what `fitted_model` returns.
        tasks: pairs (x, y), as many as the model has networks for.
        objective: what is maximised, one value per task.
        training: steps, samples, and the first and the last learning rate.
        seed: of the draws.
        log: a file of JSON lines that progress is added to.
    """
    context = collate(tasks)
    batch = TaskBatch(context, Context.empty(context.num_tasks, 1, 1, context.x))
    steps, first, final = training["steps"], training["learning_rate"], training["final_learning_rate"]
    warm = int(training.get("warm", 0) * steps)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=first)
    generator, start = seeded(seed, "fit"), time.process_time()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = first + (final - first) * step / max(1, steps - 1)
        if step < warm:
            value = avi(model, batch, training["samples"], generator, beta=max(0.01, step / warm))
        else:
            value = objective(model, batch, training["samples"], generator)
        optimiser.zero_grad(set_to_none=True)
        (-value.sum()).backward()
        optimiser.step()
        if log is not None and (step % max(1, steps // 20) == 0 or step == steps - 1):
            with open(log, "a") as file:
                file.write(json.dumps({"step": step, "bounds": value.tolist(), "seconds": time.process_time() - start}) + "\n")
    return time.process_time() - start
