"""What meta-training is given: collections of tasks, in memory or in files, checked once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from bnnp.data.collection import Collection
from bnnp.data.lazy import LAZY_BYTES, LazyTasks
from bnnp.networks import BNNP
from bnnp.seeds import seeded
from bnnp.settings import Settings
from bnnp.tasks import Task, as_tasks

__all__ = ["check_contexts", "digest_of", "looked_at", "read_collections", "sizes_of"]


def digest_of(*collections: Sequence[Task]) -> str:
    """Return what tells these data from others; files that are read as training goes on answer for themselves."""
    digest = hashlib.sha256()
    for tasks in collections:
        if isinstance(tasks, LazyTasks):
            digest.update(tasks.collection.fingerprint.encode())
            continue
        for task in tasks:
            for part in (*task, *(() if task.seen is None else (task.seen,))):
                digest.update(str(tuple(part.shape)).encode() + part.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def sizes_of(tasks: Sequence[Task]) -> Sequence[int]:
    """Return the number of points of each task; of files, those without any output included."""
    return tasks.sizes if isinstance(tasks, LazyTasks) else [len(task) for task in tasks]


def looked_at(tasks: Sequence[Task]) -> Sequence[Task]:
    """Return the tasks that scales are fitted on: all, or a sample where they do not fit in memory."""
    return tasks.sample() if isinstance(tasks, LazyTasks) else tasks


def _read_tasks(model: BNNP, tasks: Any, name: str) -> Sequence[Task]:
    """Return checked tasks: in memory, or read as they are asked for where they are too many for that."""
    if not isinstance(tasks, Collection):
        return as_tasks(tasks, model.x_dim, model.y_dim, model.dtype, name=name)
    if (tasks.x_dim, tasks.y_dim) != (model.x_dim, model.y_dim):
        raise ValueError(
            f"Expected {name} with {model.x_dim} inputs and {model.y_dim} outputs, as the model has. Got {tasks.x_dim} and {tasks.y_dim}: "
            f"{', '.join(map(str, (*tasks.inputs, *tasks.outputs)))}."
        )
    large = tasks.nbytes > LAZY_BYTES
    return LazyTasks(tasks, model.dtype, name) if large else as_tasks(tasks, model.x_dim, model.y_dim, model.dtype, name=name)


def read_collections(model: BNNP, tasks: Any, validation: Any, seed: int) -> tuple[Sequence[Task], Sequence[Task]]:
    """Return checked training tasks and held-out tasks of what `meta_train` was given.

    Raises:
        ValueError: tasks that do not fit the model, or too few.
        TypeError: something that is no collection of tasks.
    """
    held_out: Sequence[Task] = []
    if isinstance(validation, float) and isinstance(tasks, Collection):
        order = _held_out(validation, len(tasks), seed)
        tasks, validation = tasks.subset(order[1]), tasks.subset(order[0])
    train = _read_tasks(model, tasks, "tasks")
    if isinstance(validation, float):
        first, rest = _held_out(validation, len(train), seed)
        train, held_out = [train[i] for i in rest], [train[i] for i in first]
    elif validation is not None and not isinstance(validation, Sequence):
        raise TypeError(f"Expected validation as held-out tasks, or as a proportion such as 0.1. Got {validation!r}.")
    elif validation is not None:
        held_out = _read_tasks(model, validation, "validation")
    if len(train) < 2:
        raise ValueError(
            f"Expected at least 2 tasks to learn a prior from. Got {len(train)}. A single data set has to be cut into tasks "
            "(subjects, days, windows), or conditioned on with the initial prior: model.condition(x, y)."
        )
    sample = (*looked_at(train), *looked_at(held_out))
    for task in sample:
        model.likelihood.check(task.y[task.observed])
    if not model.missing_outputs and any(task.seen is not None for task in sample):
        raise ValueError(
            "Expected all outputs of each point, or none. Got tasks in which single outputs are masked. Build the model with "
            "missing_outputs=True."
        )
    return train, held_out


def _held_out(share: float, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Choose tasks at random to hold out; return their numbers, and those of the rest."""
    held = round(share * count)
    if not 0 < held < count:
        raise ValueError(f"Expected validation as a proportion with tasks on both sides. Got {share} of {count} tasks.")
    order = torch.randperm(count, generator=seeded(seed, "held out")).tolist()
    return order[:held], order[held:]


def check_contexts(train: Sequence[Task], held_out: Sequence[Task], settings: Settings) -> None:
    """Check that every task has more points than the smallest context.

    Raises:
        ValueError: one has not.
    """
    low, most = settings.context[0], settings.max_points
    sizes = [size if most is None else min(size, most) for size in (*sizes_of(train), *sizes_of(held_out))]
    if isinstance(low, int):
        smallest = min(range(len(sizes)), key=sizes.__getitem__)
        if low >= sizes[smallest]:
            raise ValueError(
                f"Expected contexts smaller than every task. Got at least {low} context points, and a task (number {smallest}) of "
                f"{sizes[smallest]}. Lower the context range, leave out tasks that small, or raise max_points."
            )
