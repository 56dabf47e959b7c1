"""What a trained model says of data: predictions, draws, diagnoses and scores, as plain tables of numbers with names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bnnp.data.collection import Collection, Column
from bnnp.evaluation import Evaluation
from bnnp.evaluation import evaluate as score
from bnnp.export import level_name
from bnnp.likelihoods import Categorical
from bnnp.posterior import Posterior
from bnnp.predictive import Predictive
from bnnp.report.judging import shares_of
from bnnp.runs import Run
from bnnp.tasks import collate

__all__ = ["QUANTILES", "Answer", "diagnose", "evaluate", "predict", "sample"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BATCH = 16


@dataclass(frozen=True, eq=False)
class Answer:
    """Hold what was said of each point of some tasks.

    Arguments:
        targets: the tasks that were asked about.
        columns: for each column its values at the points of each task.
        remarks: for each task, how many of its points lie beyond those of training, as a sentence; empty where none do.
        units: of the columns that have one.
    """

    targets: Collection
    columns: Mapping[str, tuple[Any, ...]]
    remarks: tuple[str, ...]
    units: Mapping[str, str] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """Return one array for each column, the tasks one after another: task, inputs, and what was said."""
        targets = self.targets
        task = free("task", [*self.columns, *(column.name for column in targets.inputs)])
        x = np.concatenate([x for x, _, _ in targets]) if len(targets) else np.zeros((0, targets.x_dim))
        table: dict[str, Any] = {task: np.repeat(np.asarray(targets.names, dtype=object), [len(x) for x, _, _ in targets])}
        table |= {column.name: x[:, j] for j, column in enumerate(targets.inputs)}
        return table | {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in self.columns.items()}


def free(name: str, taken: Iterable[str]) -> str:
    """Return the name of a new column, with underscores behind it where the data have a column of this name."""
    taken = set(taken)
    while name in taken:
        name += "_"
    return name


def posteriors(
    run: Run, contexts: Collection | None, targets: Collection, num_samples: int, seed: int
) -> Iterator[tuple[Posterior, list[FloatArray], list[int]]]:
    """Yield posteriors of a few tasks at a time, with the inputs asked about and the numbers of the tasks; no context is the prior.

    Raises:
        ValueError: a task among the targets has no context of its name.
    """
    known = {} if contexts is None else {name: i for i, name in enumerate(contexts.names)}
    lost = [name for name in targets.names if contexts is not None and name not in known]
    if lost:
        few = ", ".join(map(repr, contexts.names[:5])) if contexts is not None else ""
        raise ValueError(
            f"Expected a context for each task of the targets. Got none for {lost[0]!r}"
            + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
            + f"; there are contexts for {few or 'none'}. Give the tasks the same names in both."
        )
    nothing = (np.zeros((0, run.model.x_dim)), np.zeros((0, run.model.y_dim)), np.zeros((0, run.model.y_dim), dtype=bool))
    for start in range(0, len(targets), BATCH):
        at = list(range(start, min(start + BATCH, len(targets))))
        seen = [nothing if contexts is None else contexts[known[targets.names[i]]] for i in at]
        triples = [tuple(torch.from_numpy(np.array(part)) for part in task) for task in seen]  # readers may share what they give
        batch = collate([(x, torch.where(mask, y, torch.zeros_like(y)), mask) for x, y, mask in triples])
        mask = batch.observed.expand_as(batch.y) if run.model.y_dim > 1 else batch.mask
        yield run.model.condition(batch.x, batch.y, mask=mask, num_samples=num_samples, seed=seed), [targets[i][0] for i in at], at


def _padded(xs: Sequence[FloatArray]) -> torch.Tensor:
    """Return inputs of several tasks side by side; shorter ones are filled up with their last point, whose answers are thrown away."""
    most = max(len(x) for x in xs)
    filled = [np.concatenate([x, np.repeat(x[-1:] if len(x) else np.zeros((1, x.shape[1])), most - len(x), axis=0)]) for x in xs]
    return torch.from_numpy(np.stack(filled))


def check_levels(quantiles: Sequence[float]) -> list[float]:
    """Return levels of quantiles.

    Raises:
        ValueError: one is not between 0 and 1.
    """
    levels = [float(q) for q in quantiles]
    if not all(0 < q < 1 for q in levels):
        raise ValueError(f"Expected quantiles between 0 and 1. Got {', '.join(f'{q:g}' for q in levels)}.")
    return levels


def predict(
    run: Run,
    contexts: Collection | None,
    targets: Collection,
    *,
    quantiles: Sequence[float] = QUANTILES,
    num_samples: int = 64,
    seed: int = 0,
) -> Answer:
    """Predict the outputs at the points of some tasks.

    For each output there are the mean, the standard deviation (noise included, and without it) and quantiles; for class labels the most
    probable label and the probability of each.

    Arguments:
        run: the model, with the names of its columns.
        contexts: what was observed of the tasks, under the same names; None for nothing.
        targets: where to predict.
        quantiles: levels between 0 and 1.
        num_samples: particles.
        seed: of the draws.

    Raises:
        ValueError: a task without a context, or levels that are none.
    """
    levels = check_levels(quantiles)
    columns: dict[str, list[Any]] = {}
    distances: list[FloatArray] = []
    for posterior, xs, _ in posteriors(run, contexts, targets, num_samples, seed):
        predictive = posterior.predict(_padded(xs))
        for name, values in _said(run, predictive, levels).items():
            columns.setdefault(name, []).extend(np.asarray(row)[: len(x)] for row, x in zip(values, xs, strict=True))
        far = predictive.distance_x.cpu().double().numpy()
        distances.extend(row[: len(x)] for row, x in zip(far, xs, strict=True))
    names = {name: free(name, [column.name for column in targets.inputs]) for name in columns}
    named = {names[name]: tuple(parts) for name, parts in columns.items()}
    if not np.isnan(np.concatenate([np.zeros(0), *distances])).all():  # a model that was not trained on anything knows no distance
        named[free("distance", [*named, *(column.name for column in targets.inputs)])] = tuple(distances)
    units = {names[name]: c.unit for c in run.outputs for name in _names_of(run, c, levels) if c.unit and name in names}
    return Answer(targets, named, tuple(map(_far, distances)), units)


def _names_of(run: Run, column: Column, levels: Sequence[float]) -> list[str]:
    """Return the names of what is said of an output in its own unit."""
    kinds = [] if run.model.likelihood.labels else ["mean", "std", "std_epistemic", *map(level_name, levels)]
    return [f"{column.name}_{kind}" for kind in kinds]


def _said(run: Run, predictive: Predictive, levels: Sequence[float]) -> dict[str, Any]:
    """Return what is said of each output, each with shape (T, M)."""
    if run.model.likelihood.labels:
        return _labels(run, predictive)
    moments = [predictive.mean, predictive.std, predictive.epistemic_std, *map(predictive.quantile, levels)]
    values = [value.cpu().double().numpy() for value in moments]
    return {name: v[..., j] for j, c in enumerate(run.outputs) for name, v in zip(_names_of(run, c, levels), values, strict=True)}


def _labels(run: Run, predictive: Predictive) -> dict[str, Any]:
    """Return for each output of labels the most probable one, and the probability of each."""
    said: dict[str, Any] = {}
    for column, p in zip(run.outputs, _of_each(run, predictive.probs.cpu().double().numpy()), strict=True):
        names = _levels(run, column)
        said[column.name] = np.asarray(names, dtype=object)[p.argmax(-1)]
        said |= {f"{column.name}_p_{name}": p[..., k] for k, name in enumerate(names)}
    return said


def _of_each(run: Run, p: FloatArray) -> list[FloatArray]:
    """Return the probabilities of the labels of each output, with shape (..., K)."""
    if isinstance(run.model.likelihood, Categorical):
        return [p]
    return [np.stack([1 - p[..., j], p[..., j]], -1) for j in range(p.shape[-1])]


def _levels(run: Run, column: Column) -> list[str]:
    likelihood = run.model.likelihood
    known = (run.recipe.get("labels") or {}).get(column.name)
    return [str(name) for name in known or range(likelihood.classes if isinstance(likelihood, Categorical) else 2)]


def _drawn(run: Run, drawn: FloatArray, noisy: bool) -> dict[str, tuple[str, Any]]:
    """Return for each column of draws (n, T, M, d) its unit, and its values with shape (T, M); of labels, draws are of probabilities."""
    found: dict[str, tuple[str, Any]] = {}
    for i, draw in enumerate(drawn):
        labels = run.model.likelihood.labels
        of_each = _of_each(run, draw) if labels and not noisy else [draw[..., j] for j in range(draw.shape[-1])]
        for column, values in zip(run.outputs, of_each, strict=True):
            name = f"{column.name}_sample{i + 1}"
            if labels and not noisy:
                found |= {f"{name}_p_{level}": ("", values[..., k]) for k, level in enumerate(_levels(run, column))}
            elif labels:
                found[name] = ("", np.asarray(_levels(run, column), dtype=object)[values.astype(int)])
            else:
                found[name] = (column.unit, values)
    return found


def _far(distance: FloatArray) -> str:
    beyond = int((distance > 1).sum())
    if not beyond or math.isnan(float(np.max(distance, initial=0.0))):
        return ""
    return f"{beyond} of {len(distance)} points lie further out than 99 % of those the model was trained on; do not rely on it there."


def sample(
    run: Run, contexts: Collection | None, targets: Collection, n: int = 10, *, noisy: bool = False, num_samples: int = 64, seed: int = 0
) -> Answer:
    """Draw functions at the points of some tasks, each coherent over the points; without contexts, from the prior.

    Arguments:
        run: the model.
        contexts: what was observed; None for draws from the prior.
        targets: where to draw.
        n: number of functions.
        noisy: draw observations instead of functions; of labels, labels instead of their probabilities.
        num_samples: particles.
        seed: of the draws.
    """
    columns: dict[str, list[Any]] = {}
    units: dict[str, str] = {}
    inputs = [column.name for column in targets.inputs]
    for posterior, xs, at in posteriors(run, contexts, targets, max(num_samples, n), seed):
        drawn = posterior.predict(_padded(xs)).sample(n, noisy=noisy, seed=seed + at[0]).cpu().double().numpy()
        for said, (unit, values) in _drawn(run, drawn, noisy).items():
            name = free(said, inputs)
            units[name] = unit
            columns.setdefault(name, []).extend(row[: len(x)] for row, x in zip(values, xs, strict=True))
    return Answer(targets, {name: tuple(parts) for name, parts in columns.items()}, ("",) * len(targets), units)


def diagnose(run: Run, contexts: Collection, *, num_samples: int = 256, seed: int = 0) -> list[dict[str, Any]]:
    """Say for each task how far its posterior can be trusted: the numbers of `Posterior.diagnose`, and a sentence."""
    found = []
    for posterior, _, at in posteriors(run, contexts, contexts, num_samples, seed):
        told: Any = posterior.diagnose(seed=seed)
        names = ("log_evidence", "effective_sample_size", "pareto_k", "distance_x", "distance_y", "p_value_y")
        numbers = {name: getattr(told, name).cpu().double().tolist() for name in names}
        for k, i in enumerate(at):
            row = {name: value[k] if math.isfinite(value[k]) else None for name, value in numbers.items()}
            points = int(contexts[i][2].any(1).sum())
            found.append({"task": contexts.names[i], "points": points, **row, "sentence": told.sentence[k]})
    return found


def evaluate(
    run: Run, tasks: Collection, shares: Sequence[float] | None = None, *, num_samples: int = 64, seed: int = 0
) -> dict[float, Evaluation]:
    """Score predictions of the rest of each task from a random part of it.

    Arguments:
        run: the model.
        tasks: new to it.
        shares: how much of a task is context; by the kind of data where not given.
        num_samples: particles.
        seed: of the parts and the draws.

    Returns:
        An `Evaluation` for each share.
    """
    shares = shares_of(run.kind) if shares is None else shares
    whole = [(x[keep], y[keep], mask[keep]) for x, y, mask in tasks for keep in [mask.any(1)]]
    usable = [task for task in whole if len(task[0]) >= 2]
    if not usable:
        raise ValueError(f"Expected tasks with at least 2 observed points to judge the model on. Got {len(whole)} tasks without.")
    pairs = [(x, y) if mask.all() else (x, y, mask) for x, y, mask in usable]
    return {share: score(run.model, pairs, num_samples=num_samples, seed=seed, context_fraction=share) for share in shares}
