"""Settings chosen from the data where a person said nothing, each with its reason.

The rules are few and plain: they are starts, and what was chosen is printed and written down, so that it can be changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnnp.config import Config
from bnnp.data.collection import Collection
from bnnp.data.lazy import LAZY_BYTES

__all__ = ["Chosen", "candidates", "choose_settings", "choose_shares", "roughness"]

LOOKED_AT = 100
"""Of a collection that does not fit in memory so many tasks are looked at."""
MAX_POINTS = 200
"""More points of a task than this are not seen in one step."""
ROUGH = 15.0
"""An input scale above which outputs change many times within the range of the inputs."""
ALL_NOISE = 0.9
"""Neighbours that differ by more than this share of the variance say nothing of how quickly outputs vary."""
SECONDS = 200.0
"""How long the steps of a fit may take on one core, roughly."""


@dataclass(frozen=True)
class Chosen:
    """Hold complete settings and why they are what they are.

    Arguments:
        config: what was said, and for the rest what was chosen.
        reasons: one sentence for each group of chosen settings.
    """

    config: Config
    reasons: tuple[str, ...]


def choose_settings(collection: Collection, num_train: int, config: Config) -> Chosen:
    """Return settings for learning from a collection: those of `config`, completed.

    Arguments:
        collection: the tasks.
        num_train: how many of them are learned from.
        config: what a person said.
    """
    # A gap or a number that is no count is often in one task only: all are looked at where they fit in memory.
    count = len(collection) if collection.nbytes <= LAZY_BYTES else min(len(collection), LOOKED_AT)
    look = [collection[int(i)] for i in np.linspace(0, len(collection) - 1, count).round()]
    points = float(np.median(collection.sizes))
    reasons: list[str] = []
    model, why = _network(collection, look, num_train * points, config)
    reasons += why
    most = config.get("training.max_points") or (MAX_POINTS if max(collection.sizes) > MAX_POINTS else None)
    seen = min(points, most or math.inf)
    if most is not None and config.get("training.max_points") is None:
        reasons.append(f"max_points = {most}: tasks have up to {max(collection.sizes)} points, and a step need not see them all")
    low = float(np.clip(2 / seen, 0.02, 0.1))
    training: dict[str, Any] = {"context": [round(low, 3), 0.6], "learning_rate": 0.01, "final_learning_rate": 1e-4, "batch_size": 8}
    training |= {"num_samples": 2, "objective": "pp_avi", "seed": 0} | ({} if most is None else {"max_points": most})
    shrinkage = next((value for count, value in ((10, 0.1), (40, 0.03), (100, 0.01)) if num_train <= count), 0.0)
    training["shrinkage"] = shrinkage
    if shrinkage > 0 and config.get("training.shrinkage") is None:
        reasons.append(f"shrinkage = {shrinkage:g}: with {num_train} tasks to learn from, the prior is held back towards N(0, I/p)")
    whole = config.over(Config({"model": model, "training": training}))
    steps = _steps(whole, collection, seen)
    if config.get("training.steps") is None:
        reasons.append(f"steps = {steps}: a few minutes on two cores")
    steps = config.get("training.steps") or steps
    rest = Config({"training": {"steps": steps, "checkpoint_every": max(1, steps // 20)}, "split": choose_shares(collection, config)})
    free = not any(config.get(name) for name in ("model.activation", "model.input_scale", "training.learning_rate"))
    # Of data this rough a tanh network learns little, but learns it first: a short trial would mislead.
    free = free and whole.get("model.input_scale") <= ROUGH
    trial = steps // 6 if free and steps >= 1000 and config.over(rest).get("split.validation") > 0 else 0
    if trial and config.get("training.trial_steps") is None:
        reasons.append(f"trial_steps = {trial}: a sine and a tanh network are tried, and the one better on validation tasks is trained")
    rest = Config({"training": {"trial_steps": trial}}).over(rest)
    return Chosen(whole.over(rest), tuple(reasons))


def candidates(input_scale: float) -> tuple[dict[str, Any], ...]:
    """Return networks that a fit tries briefly before it trains one: none of them is best on all data."""
    return (
        {"activation": "sine", "input_scale": input_scale, "learning_rate": 0.01},
        {"activation": "tanh", "input_scale": max(3.0, round(input_scale / 2, 1)), "learning_rate": 0.01},
    )


def roughness(tasks: Sequence[Any], seed: int = 0) -> float | None:
    """Return how quickly outputs vary with inputs: the input scale at which functions of the prior vary as quickly as the data.

    From the variogram within tasks: the distance h, in standardised inputs, at which half the mean squared difference (y - y')^2 / 2 has
    come half way from what it is at the shortest distances to the variance. Features sin(s w . x) with w ~ N(0, I / p) have correlation 1/2
    at the distance 1.18 sqrt(p) / s; data have finer structure too, so s is taken half as large again.

    Arguments:
        tasks: triples (x, y, mask).
        seed: of the pairs that are looked at.

    Returns:
        The scale, between 1 and 60; None where there are too few points to tell, or where neighbours differ as much as any two points.
    """
    generator = np.random.default_rng(seed)
    whole = np.concatenate([x for x, _, _ in tasks])
    spread = whole.std(0)
    spread[spread == 0] = 1.0
    distances, squares = [], []
    for x, y, mask in tasks:
        seen = mask[:, 0]
        z, v = x[seen] / spread, y[seen, 0]
        if len(v) < 4 or v.std() == 0:
            continue
        i, j = generator.integers(0, len(v), (2, 2000))
        near = np.argsort(z[:, 0])  # neighbours along the first input too: pairs at random are rarely close
        i, j = np.concatenate([i, near[:-1]]), np.concatenate([j, near[1:]])
        apart = np.linalg.norm(z[i] - z[j], axis=1)
        distances.append(apart[i != j])
        squares.append(((v[i] - v[j]) ** 2 / 2 / v.var())[i != j])
    if not distances or sum(map(len, distances)) < 500:
        return None
    d, g = np.concatenate(distances), np.concatenate(squares)
    order = np.argsort(d)
    bins = np.array_split(order, 60)
    at, level = np.array([d[b].mean() for b in bins]), _rising(np.array([g[b].mean() for b in bins]))
    if level[0] > ALL_NOISE:
        return None
    half = level[0] + 0.5 * max(1.0 - level[0], 0.0)
    reached = np.flatnonzero(level >= half)
    h = at[reached[0]] if len(reached) else at[-1]
    return float(np.clip(1.5 * 1.18 * math.sqrt(whole.shape[1] + 1) / max(h, 1e-9), 1.0, 60.0))


def _rising(values: Any) -> Any:
    """Return the rising sequence nearest to values, by pooling neighbours that fall: noise alone then reaches no height early."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((m * a + n * b) / (m + n), m + n)]
    return np.repeat([value for value, _ in pools], [count for _, count in pools])


def choose_shares(collection: Collection, config: Config) -> dict[str, Any]:
    """Return how much is held out, as `config` says or else by their number: less where there is little."""
    count = len(collection)
    share = 0.15 if count >= 20 else 0.2
    test = share if count >= 4 else 0.34 if count == 3 else 0.0  # of three tasks, one
    return {"validation": share if count >= 5 else 0.0, "test": test, "seed": 0} | config.section("split")


def _network(collection: Collection, look: list[Any], total: float, config: Config) -> tuple[dict[str, Any], list[str]]:
    reasons: list[str] = []
    hidden = [32, 32] if total < 1000 else [64, 64] if total < 20_000 else [64, 128]
    rough = roughness([look[int(i)] for i in np.linspace(0, len(look) - 1, min(len(look), LOOKED_AT)).round()])
    scale = 3.0 if rough is None else float(f"{rough:.2g}")
    model: dict[str, Any] = {
        "hidden": hidden,
        "prior": "matrix_normal",
        "net_hidden": [32, 32],
        "spread": 0.95,
        "input_scale": scale,
        "activation": "sine" if collection.x_dim <= 2 or scale > ROUGH else "tanh",
        "shared_noise": True,
        "factor_dtype": "float32",
    }
    if config.get("model.hidden") is None:
        reasons.append(f"hidden = {hidden}: there are about {total:.0f} points to learn from")
    if config.get("model.input_scale") is None:
        reasons.append(f"input_scale = {scale:g}: from the distance over which outputs change half their variance")
    mask = np.concatenate([mask for _, _, mask in look])
    if collection.y_dim > 1 and bool((mask.any(1) & ~mask.all(1)).any()):
        model["missing_outputs"] = True
        reasons.append("missing_outputs = true: some points have a part of their outputs only")
    likelihood, why = _likelihood(collection, look)
    model["likelihood"] = likelihood
    if config.get("model.likelihood", likelihood) == "gaussian":
        model["noise_std"] = 0.3
    if likelihood == "categorical":
        model["classes"] = len(next(iter(collection.recipe["labels"].values())))
    if config.get("model.likelihood") is None:
        reasons.append(f'likelihood = "{likelihood}": {why}')
    if _fine(look) and config.get("model.dtype") is None:
        model["dtype"] = "float64"
        reasons.append('dtype = "float64": a column varies little around a large number')
    return model, reasons


def _likelihood(collection: Collection, look: list[Any]) -> tuple[str, str]:
    labels = collection.recipe.get("labels") or {}
    if labels:
        levels = len(next(iter(labels.values())))
        return ("bernoulli", "two labels") if levels == 2 else ("categorical", f"{levels} labels")
    values = np.concatenate([y[mask] for _, y, mask in look])
    if len(values) and bool(((values == 0) | (values == 1)).all()):
        return "bernoulli", "outputs are 0 and 1"
    counts = len(values) > 0 and bool((values >= 0).all()) and bool((values == values.round()).all())
    if counts and collection.y_dim == 1 and np.median(values) < 10 and len(np.unique(values)) > 2:
        # Whole numbers that scatter less than counts do (ages, ratings) are better taken as numbers.
        if values.mean() < 3 or values.var() > 1.5 * values.mean():
            return "negativebinomial", 'outputs are small whole numbers; "gaussian" if they are no counts'
    return "gaussian", "outputs are numbers"


def _fine(look: list[Any]) -> bool:
    """Tell whether a column varies so little around a large number that single precision would lose it."""
    for side in (0, 1):
        values = np.concatenate([task[side] for task in look])
        spread, size = np.nanstd(values, axis=0), np.nanmax(np.abs(values), axis=0, initial=0.0)
        if bool(((spread > 0) & (size > 1e4 * spread)).any()):
            return True
    return False


def _steps(config: Config, collection: Collection, seen: float) -> int:
    """Return a number of steps that takes a few minutes.

    What a step costs was measured at (64, 64), eight tasks and two particles: so much whatever happens, and so much for each point.
    """
    wide = max(max(config.get("model.hidden"), default=1) / 64, 1.0) ** 0.5
    load = config.get("training.batch_size") * config.get("training.num_samples") / 16
    step = 0.013 + 3e-4 * seen * wide * load * collection.y_dim**0.5
    return int(np.clip(round(SECONDS / step, -2), 1000, 4000))
