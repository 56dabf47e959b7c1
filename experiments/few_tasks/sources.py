"""Where the tasks of the study come from: two processes with an exact answer, and abalones by sex.

A `Source` says which tasks there are to learn from, on which splits a choice is made, and on which splits everything is scored at last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnnp.data import CauchyBumps, Process, SinusoidLine

__all__ = ["PROCESSES", "Collection", "Split", "abalone", "file_of_abalones", "process"]

PROCESSES: dict[str, Process] = {"sinusoid": SinusoidLine(), "cauchy": CauchyBumps()}
TEST_SEED = 900_001

Task = tuple[Tensor, Tensor]
Split = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Collection:
    """Hold one collection of tasks to learn from, and how to choose and to score with it.

    Arguments:
        tasks: pairs (x, y).
        folds: held-out tasks of each fold, as positions in `tasks`.
        validation: for each fold, splits of the held-out tasks on which candidates are compared.
        test: named lists of splits on which everything is scored.
        context: how many context points training shows.
        input_scale: of the prior.
        again: whether the candidates learn from all tasks once more after the choice; otherwise the models of the (single) fold stay.
    """

    tasks: list[Task]
    folds: list[list[int]]
    validation: list[list[Split]]
    test: dict[str, list[Split]]
    context: tuple[int, int]
    input_scale: float
    again: bool

    def train(self, fold: int | None) -> list[Task]:
        """Return what a model of a fold learns from; of no fold, all tasks."""
        out = set() if fold is None else set(self.folds[fold])
        return [task for i, task in enumerate(self.tasks) if i not in out]


def cut(x: Tensor, y: Tensor, context: int, generator: torch.Generator, targets: int | None = None) -> Split:
    """Return a random split of a task, with so many context points and at most so many targets."""
    order = torch.randperm(len(x), generator=generator)
    c, t = order[:context], order[context : None if targets is None else context + targets]
    return x[c], y[c], x[t], y[t]


def random_cuts(tasks: list[Task], count: int, context: tuple[int, int], seed: int, targets: int | None = None) -> list[Split]:
    """Return `count` random splits of each task, with context sizes from a range, ends included."""
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for x, y in tasks:
        for _ in range(count):
            n = int(torch.randint(context[0], context[1] + 1, (), generator=generator))
            splits.append(cut(x, y, min(n, len(x) - 1), generator, targets))
    return splits


def process(name: str, size: int, seed: int, config: dict[str, Any]) -> Collection:
    """Return a collection of `size` tasks of a process; seeds share no task, and the test tasks are those of all."""
    own, source = config["sources"][name], PROCESSES[name]
    # The first tasks of a longer list, so that more tasks of a seed are the fewer ones and others.
    tasks: list[Task] = [(x, y) for x, y in source.tasks(max(config["sizes"]), seed, own["points"])][:size]
    key = str(size)
    if key in config["folds"]:
        count = config["folds"][key]
        folds = [list(range(k, size, count)) for k in range(count)]
    else:
        folds = [list(range(config["held_out"][key]))]
    context = (own["context"][0], own["context"][1])
    validation = [random_cuts([tasks[i] for i in fold], config["splits"], context, 1000 + k) for k, fold in enumerate(folds)]
    n = own["test_context"]
    test = source.context_target_tasks(config["test_tasks"], TEST_SEED, (n, n + 1), config["targets"])
    return Collection(tasks, folds, validation, {"test": list(test)}, context, own["input_scale"], size < config["learn_again_below"])


def file_of_abalones(data: Path) -> Path:
    """Return where the table of abalones is, or would be."""
    return data / "abalone" / "abalone.data"


def _read_abalones(path: Path) -> dict[str, Task]:
    rows = [line.split(",") for line in path.read_text().splitlines() if line.strip()]
    table = {sex: torch.tensor([[float(v) for v in row[1:]] for row in rows if row[0] == sex]) for sex in "MFI"}
    return {sex: (values[:, :-1], values[:, -1:]) for sex, values in table.items()}


def _parts(task: Task, count: int) -> list[Task]:
    """Return parts of a task of about the same size, by length, which is the first column; the whole task as one part."""
    x, y = task
    order = x[:, 0].argsort(stable=True)
    return [(x[part], y[part]) for part in order.tensor_split(count)]


def abalone(data: Path, variant: str, seed: int, config: dict[str, Any]) -> Collection:
    """Return males and females, cut into parts as the variant says, to learn from; infants are the test.

    A fold holds out one sex. Candidates are compared on splits of that whole sex, the same ones for all variants.
    """
    own, animals = config["abalone"], _read_abalones(file_of_abalones(data))
    count = own["variants"][variant]
    parts = [_parts(animals[sex], count) for sex in "MF"]
    context = (own["context"][0], own["context"][1])
    validation = [
        random_cuts([animals[sex]], own["validation_splits"], context, 100 * seed + k, config["targets"]) for k, sex in enumerate("MF")
    ]
    splits = torch.Generator().manual_seed(TEST_SEED)
    test = {
        f"{n} seen": [cut(*animals["I"], n, splits, config["targets"]) for _ in range(own["test_splits"])] for n in own["test_contexts"]
    }
    folds = [list(range(count)), list(range(count, 2 * count))]
    return Collection(parts[0] + parts[1], folds, validation, test, context, own["input_scale"], True)
