"""The rivals of a study whose tasks all have the same places: cells of a map, samples of a window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bnnp.evaluation import Model, evaluate
from experiments.common.gaussian import FittedGP, Kernel, PlacesNormal, Smooth, learn, nearest
from experiments.common.meanfield import FittedNetwork, train
from experiments.common.study import Config, Part, Rival, recipe

__all__ = ["Past", "standard"]

Made = tuple[Model, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Past:
    """Hold the training tasks at the places that all tasks share.

    Arguments:
        x: places with shape (P, d_x).
        y: values of the training tasks with shape (T, P).
    """

    x: Tensor
    y: Tensor

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over the training tasks at the place nearest to each x (*T, N, d_x), with shape (*T, N, 1)."""
        return self.y.double().mean(0)[nearest(x, self.x.double())].unsqueeze(-1)

    def some(self, tasks: int, points: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Return some tasks, evenly apart, each at its own random places, as pairs (n, d_x) and (n, 1)."""
        generator, found = torch.Generator().manual_seed(seed), []
        for i in range(0, len(self.y), max(1, len(self.y) // tasks)):
            at = torch.randperm(len(self.x), generator=generator)[:points]
            found.append((self.x[at], self.y[i, at].double().unsqueeze(-1)))
        return found


def standard(past: Past, validation: Callable[[], Part], config: Config, task: str, place: str, anomaly: bool) -> dict[str, Rival]:
    """Return the rivals by name.

    Arguments:
        past: the training tasks.
        validation: gives the tasks that choose the shrinkage of the normal over places.
        config: settings of the study.
        task: word for a task.
        place: word for a place.
        anomaly: also fit Gaussian processes to what differs from the mean of each place.
    """
    size, seed = config["rivals"], config["seed"]
    shape, steps, floor = size["kernel"], size["gp_steps"], size["noise_floor"] * float(past.y.std())

    @cache
    def kernel(around: Callable[[Tensor], Tensor] | None) -> Kernel:
        tasks = past.some(size["gp_tasks"], size["gp_points"], seed=5)
        return learn([(x, y if around is None else y - around(x)) for x, y in tasks], shape, steps=steps)

    def learned(around: Callable[[Tensor], Tensor] | None) -> Made:
        return Smooth.of(kernel(around), around), kernel(around).numbers

    def adapted() -> Made:
        return FittedGP(shape, None, steps, towards=kernel(None)), {}

    def places() -> Made:
        scores = {}
        for a in size["shrinkages"]:
            gaussian = PlacesNormal.of(past.x, past.y, a)
            each = [evaluate(gaussian, splits, batch_size=1) for splits in validation().splits.values()]
            scores[a] = sum(found.summary["joint_log_density"][0] for found in each) / len(each)
        best = max(scores, key=lambda a: scores[a])
        return PlacesNormal.of(past.x, past.y, best), {"shrinkage": best, "validation": {str(a): v for a, v in scores.items()}}

    def blind() -> Made:
        x = past.x.expand(len(past.y), -1, -1).reshape(1, -1, past.x.shape[1])
        return train(recipe(config, **config["mean_field"]["blind"]), x, past.y.reshape(1, -1, 1), seed=seed), {}

    def alone() -> Made:
        scaling = (past.x.mean(0), past.x.std(0), past.y.mean().reshape(1), past.y.std().reshape(1))
        return FittedNetwork(recipe(config, **config["mean_field"]["alone"]), scaling), {}

    found = {}
    for word, around in {"GP": None, **({"anomaly GP": past.mean} if anomaly else {})}.items():
        found[f"{word}, fitted to each {task}"] = Rival(partial(_pair, FittedGP(shape, around, steps, floor)), 1)
        found[f"{word}, learned from training {task}s"] = Rival(partial(learned, around), 1)
        if around is None:
            found[f"{word}, learned and then adapted"] = Rival(adapted, 1)
    return {
        **found,
        f"normal over the {place}s": Rival(places, 1),
        f"each {place}'s past mean and variance": Rival(lambda: (PlacesNormal.of(past.x, past.y, 1.0), {}), 1),
        f"mean-field network, all training {task}s": Rival(blind, of_network=True),
        f"mean-field network, each {task} alone": Rival(alone, 16, of_network=True),
    }


def _pair(model: Model) -> Made:
    return model, {}
