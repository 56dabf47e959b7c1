"""Choose how much of a prior is learned, by how well tasks are predicted that it has not learned from.

With few tasks a prior that is free to go anywhere learns them by heart. Two dials hold it back: the fraction of the weights whose prior
is learned, and the shrinkage of all of it towards the default N(0, I/p). `choose_prior` trains one model for each setting, from the same
start and for as many steps, and keeps the one that predicts held-out tasks best.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnnp.checkpoint import load, model_header, write_atomically
from bnnp.evaluation import evaluate, mean_and_se
from bnnp.linalg import NotPositiveDefiniteError
from bnnp.networks import BNNP
from bnnp.priors import Prior
from bnnp.progress import ProgressLine
from bnnp.seeds import check_count, seeded
from bnnp.settings import context_range
from bnnp.tasks import Task, as_tasks
from bnnp.training import TrainingError, meta_train

__all__ = ["Candidate", "Choice", "choose_prior"]

FEW_TASKS = 20
MOST_FOLDS = 5
SHARE_HELD_OUT = 0.2
OWN = ("validation", "folder", "resume", "shrinkage", "keep", "progress", "seed")

Build = Callable[[Prior], BNNP]
Split = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Candidate:
    """Name one way to learn a prior.

    Arguments:
        fraction: of the weights whose prior is learned, counted from the input side.
        shrinkage: tau, see `meta_train`.

    Example:
        >>> [Candidate(fraction=0.5).name, Candidate(shrinkage=0.1).name, Candidate().name]
        ['fraction 0.5', 'shrinkage 0.1', 'all learned']
    """

    fraction: float = 1.0
    shrinkage: float = 0.0

    @property
    def name(self) -> str:
        """Return the name, which is also that of its folder."""
        parts = [f"fraction {self.fraction:g}"] * (self.fraction < 1) + [f"shrinkage {self.shrinkage:g}"] * (self.shrinkage > 0)
        return "fixed" if self.fraction == 0 else ", ".join(parts) or "all learned"


@dataclass(frozen=True)
class Choice:
    """Report what was tried and what was chosen.

    Arguments:
        rows: one record for each candidate: "name", "fraction", "shrinkage"; "score", the mean over held-out tasks of the log predictive
            density of all target points together per point; "se", its standard error over these tasks; "behind" and "behind_se", how
            far it is behind the chosen one, task by task; "divergence" of the learned prior from the default in nats, mean over folds;
            "per_task", the scores; "seconds"; "failed", why there is no score, or None; "chosen".
        model: the model of the chosen candidate, trained on all tasks (those given as `validation` apart).
        folds: number of folds.
    """

    rows: list[dict[str, Any]]
    model: BNNP
    folds: int

    @property
    def best(self) -> dict[str, Any]:
        """Return the record of the chosen candidate."""
        return next(row for row in self.rows if row["chosen"])

    def table(self) -> str:
        """Return the records as text, one candidate per line, the chosen one with a star."""
        lines = [f"  {'candidate':<16} {'score':>9} {'se':>7} {'behind':>9} {'se':>7} {'divergence':>11} {'seconds':>8}"]
        for row in self.rows:
            mark = "*" if row["chosen"] else " "
            if row["failed"] is not None:
                lines.append(f"{mark} {row['name']:<16} failed: {row['failed']}")
                continue
            numbers = " ".join(f"{row[key]:>{width}.4f}" for key, width in (("score", 9), ("se", 7), ("behind", 9), ("behind_se", 7)))
            lines.append(f"{mark} {row['name']:<16} {numbers} {max(0.0, row['divergence']):>11.1f} {row['seconds']:>8.1f}")
        tasks = len(self.best["per_task"])
        how = f"{tasks} held-out tasks" + (f", {self.folds} folds" if self.folds > 1 else "")
        return "\n".join([*lines, f"(log density per target point on {how}; higher is better)"])

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model as plain Python, ready for JSON; what is not finite becomes None."""
        rows = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in self.rows]
        return {"rows": rows, "folds": self.folds}


def choose_prior(
    build: Mapping[str, Any] | Build,
    tasks: Sequence[Any],
    *,
    prior: str | Prior | None = None,
    validation: Sequence[Any] | float | None = None,
    folds: int | Sequence[Sequence[int]] | None = None,
    fractions: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    shrinkages: Sequence[float] = (0.01, 0.03, 0.1, 0.3),
    splits: int = 5,
    score_samples: int = 64,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **training: Any,
) -> Choice:
    """Train one model for each fraction and each shrinkage, and return the one that predicts held-out tasks best.

    Fractions are tried without shrinkage, shrinkages with everything learned; fraction 0 is the fixed default prior, and what
    ever stronger shrinkage leads to. It costs a training for each candidate and fold.

    Arguments:
        build: a function from a `Prior` to an untrained model, the same one each time but for the prior; or the arguments of `BNNP`.
        tasks: list of pairs (x, y) to learn from.
        prior: of which fraction and shrinkage are varied; where not given, that among the arguments of `BNNP`, or its default.
        validation: tasks to compare on that are not learned from; or a proportion of `tasks` to hold out. Where neither this nor `folds`
            is given, a fifth is held out, or, of fewer than 20 tasks, each in turn (in five folds at most).
        folds: number of folds; or which tasks each fold holds out, as positions, for tasks that belong together.
        fractions: to try.
        shrinkages: to try.
        splits: random splits of each held-out task, in contexts of the sizes that training shows, and targets.
        score_samples: particles of the predictions that are scored.
        seed: of everything; all candidates have the same.
        folder: where runs and scores are kept; what is finished there is not done again, what is not goes on.
        progress: show a line of progress on standard error.
        training: further arguments of `meta_train`, such as steps; the parameters of the last step count.

    Returns:
        A `Choice`; its `model` is trained.

    Raises:
        ValueError: settings that do not fit, too few tasks for the folds, or a folder of another choice.
        TrainingError: no candidate could be trained.
    """
    base, maker = _maker(build, prior)
    candidates = _candidates(base, fractions, shrinkages)
    wrong = sorted(set(training) & set(OWN))
    if wrong:
        raise TypeError(f"Expected further arguments of meta_train, but for those that are set here. Got {', '.join(wrong)}.")
    model = maker(base)
    if not isinstance(model, BNNP):
        raise TypeError(f"Expected build to return a bnnp.BNNP. Got {type(model).__name__}.")
    train = as_tasks(tasks, model.x_dim, model.y_dim, model.dtype)
    if validation is not None and folds is not None:
        raise ValueError("Expected validation or folds. Got both: with tasks held out there is nothing to fold.")
    held_out: list[Task] = []
    if validation is None or isinstance(validation, float):
        cuts = _folds(len(train), validation, folds, operator.index(seed))
    else:
        held_out, cuts = as_tasks(validation, model.x_dim, model.y_dim, model.dtype, name="validation"), [[]]
    study = _Study(
        maker, base, train, cuts, held_out, context_range(training.get("context", (0.1, 0.6))), check_count(splits, "splits"),
        check_count(score_samples, "score_samples"), operator.index(seed), None if folder is None else Path(folder), training,
    )  # fmt: skip
    line = ProgressLine(len(candidates) * len(cuts) + (not held_out), progress)
    try:
        return study.run(candidates, line)
    finally:
        line.close()


def _maker(build: Mapping[str, Any] | Build, prior: str | Prior | None) -> tuple[Prior, Build]:
    named = dict(build) if isinstance(build, Mapping) else {}
    spec = prior if prior is not None else named.get("prior", Prior())
    base = Prior(spec) if isinstance(spec, str) else spec
    if not isinstance(base, Prior):
        raise TypeError(f"Expected prior as a name or a bnnp.Prior(...). Got {type(base).__name__}.")
    if callable(build):
        return base, build
    if not isinstance(build, Mapping):
        raise TypeError(f"Expected build as a function of a Prior, or as the arguments of BNNP. Got {type(build).__name__}.")
    return base, lambda spec: BNNP(**{**named, "prior": spec})


def _candidates(base: Prior, fractions: Sequence[float], shrinkages: Sequence[float]) -> list[Candidate]:
    """Return all candidates, none of them twice: no shrinkage is everything learned."""
    found = [Candidate(fraction=float(f)) for f in sorted(fractions)] + [Candidate(shrinkage=float(t)) for t in sorted(shrinkages)]
    for candidate in found:
        dataclasses.replace(base, fraction=candidate.fraction)
        if not (math.isfinite(candidate.shrinkage) and candidate.shrinkage >= 0):
            raise ValueError(f"Expected shrinkages in nats, 0 or more, and finite. Got {candidate.shrinkage}.")
    if not found:
        raise ValueError("Expected fractions or shrinkages to try. Got none.")
    return list(dict.fromkeys(found))


def _folds(count: int, share: float | None, folds: int | Sequence[Sequence[int]] | None, seed: int) -> list[list[int]]:
    """Return the positions of the tasks that each fold holds out."""
    order = torch.randperm(count, generator=seeded(seed, "held out")).tolist()
    if folds is not None and not isinstance(folds, int):
        cuts = [sorted({operator.index(i) for i in fold}) for fold in folds]
        if not cuts or any(not fold or not 0 <= fold[0] <= fold[-1] < count for fold in cuts):
            raise ValueError(f"Expected folds as lists of positions between 0 and {count - 1}, none of them empty. Got {list(folds)}.")
    elif share is None and (folds is not None or count < FEW_TASKS):
        number = min(MOST_FOLDS, count) if folds is None else check_count(folds, "folds")
        if not 2 <= number <= count:
            raise ValueError(f"Expected 2 to {count} folds of {count} tasks. Got {number}.")
        cuts = [sorted(order[k::number]) for k in range(number)]
    else:
        held = round((SHARE_HELD_OUT if share is None else share) * count)
        if not 0 < held < count:
            raise ValueError(f"Expected validation as a proportion with tasks on both sides. Got {share} of {count} tasks.")
        cuts = [sorted(order[:held])]
    left = count - max(len(fold) for fold in cuts)
    if left < 2:
        raise ValueError(
            f"Expected at least 2 tasks to learn from in every fold. Got {left} of {count}. Use more and smaller folds, cut the tasks into "
            "more (and name those that belong together in folds=), or give validation= tasks."
        )
    return cuts


def random_splits(tasks: Sequence[Task], context: tuple[float, float] | tuple[int, int], count: int, seed: int) -> list[Split]:
    """Return `count` random splits of each task, one task after another, with contexts of sizes from a range of proportions or counts."""
    generator = seeded(seed, "choice")
    low, high = context
    found = []
    for task in tasks:
        x, y = task.x, task.y
        for _ in range(count):
            u = float(torch.rand((), generator=generator))
            n = low + math.floor(u * (high - low + 1)) if isinstance(low, int) else round((low + u * (high - low)) * len(x))
            order = torch.randperm(len(x), generator=generator)
            n = max(1, min(int(n), len(x) - 1))
            found.append((x[order[:n]], y[order[:n]], x[order[n:]], y[order[n:]]))
    return found


@dataclass(frozen=True)
class _Study:
    """Hold everything that all candidates share."""

    make: Build
    base: Prior
    tasks: list[Task]
    cuts: list[list[int]]
    validation: list[Task]
    context: tuple[float, float] | tuple[int, int]
    splits: int
    score_samples: int
    seed: int
    folder: Path | None
    training: dict[str, Any]

    def run(self, candidates: list[Candidate], line: ProgressLine) -> Choice:
        """Train and score every candidate, and train the best one on everything."""
        rows: list[dict[str, Any]] = []
        models: dict[Candidate, BNNP] = {}
        best = -math.inf
        for i, candidate in enumerate(candidates):
            scores: list[float] = []
            row: dict[str, Any] = {"name": candidate.name, **dataclasses.asdict(candidate), "failed": None}
            divergence, seconds = 0.0, 0.0
            try:
                for k in range(len(self.cuts)):
                    fold = f", fold {k + 1} of {len(self.cuts)}" if len(self.cuts) > 1 else ""
                    line.show(i * len(self.cuts) + k, candidate.name + fold + (f", best so far {best:.3f}" if rows else ""))
                    found, models[candidate] = self.fold(candidate, k)
                    scores += found["scores"]
                    divergence, seconds = divergence + found["divergence"] / len(self.cuts), seconds + found["seconds"]
            except (TrainingError, NotPositiveDefiniteError) as error:
                row["failed"], scores = str(error).split(". ")[0], []
            mean, se = mean_and_se(torch.tensor(scores, dtype=torch.float64)) if scores else (math.nan, math.nan)
            rows.append({**row, "score": mean, "se": se, "divergence": divergence, "per_task": scores, "seconds": seconds})
            if mean > best:
                best, models = mean, {candidate: models[candidate]}
            else:
                models.pop(candidate, None)
        if not models:
            raise TrainingError(f"Expected a candidate that can be trained. Got none: {rows[0]['failed']}. See meta_train.")
        chosen = next(iter(models))
        if not self.validation:
            line.show(len(candidates) * len(self.cuts), f"{chosen.name} on all tasks")
            models[chosen] = self.train(chosen, self.tasks, "chosen")[0]
        line.show(line.steps, f"chosen: {chosen.name}")
        return Choice(_compared(rows, candidates.index(chosen)), models[chosen], len(self.cuts))

    def fold(self, candidate: Candidate, k: int) -> tuple[dict[str, Any], BNNP]:
        """Return the scores of a candidate on the tasks that a fold holds out, and its model."""
        out = set(self.cuts[k])
        train = [task for i, task in enumerate(self.tasks) if i not in out]
        held_out = self.validation or [self.tasks[i] for i in self.cuts[k]]
        model, found = self.train(candidate, train, f"{candidate.name}/fold {k + 1}" if len(self.cuts) > 1 else candidate.name, held_out)
        return found, model

    def train(self, candidate: Candidate, tasks: list[Task], name: str, held_out: Sequence[Task] = ()) -> tuple[BNNP, dict[str, Any]]:
        """Train a candidate, or take the finished run from the folder; return its model and the scores on held-out tasks."""
        model = self.make(dataclasses.replace(self.base, fraction=candidate.fraction))
        folder = None if self.folder is None else self.folder / name
        splits = random_splits(held_out, self.context, self.splits, self.seed)
        key = _key(
            model, candidate, [*tasks, *held_out], {**self.training, "splits": self.splits, "samples": self.score_samples}, self.seed
        )
        file = None if folder is None else folder / "score.json"
        if file is not None and folder is not None and file.is_file():
            found = json.loads(file.read_text())
            if found["key"] != key:
                raise ValueError(
                    f"Expected the run in {folder} to be of these tasks, model and settings. Got another. Use another folder for another "
                    "choice."
                )
            return load(folder / "last").to(model.device), found
        options = {**self.training, "shrinkage": candidate.shrinkage, "seed": self.seed, "folder": folder, "resume": folder is not None}
        result = meta_train(model, tasks, keep="last", progress=False, **options)
        found = {"key": key, "divergence": result.history[-1]["divergence"], "seconds": result.seconds}
        found["divergence"] = math.nan if found["divergence"] is None else found["divergence"]
        if held_out:
            scores = evaluate(model, splits, num_samples=self.score_samples, seed=self.seed).per_task["joint_log_density"]
            found["scores"] = scores.reshape(len(held_out), self.splits).mean(1).tolist()
        if file is not None:
            write_atomically(file, json.dumps(found).encode())
        return model, found


def _key(model: BNNP, candidate: Candidate, tasks: Sequence[Task], training: dict[str, Any], seed: int) -> str:
    """Return what tells one run from another."""
    digest = hashlib.sha256(json.dumps([model_header(model), dataclasses.astuple(candidate), training, seed], default=str).encode())
    for tensor in [*model.state_dict().values(), *(part for task in tasks for part in task)]:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _compared(rows: list[dict[str, Any]], best: int) -> list[dict[str, Any]]:
    """Return the records with how far each is behind the best, task by task."""
    mine = torch.tensor(rows[best]["per_task"], dtype=torch.float64)
    done = []
    for i, row in enumerate(rows):
        behind = (math.nan, math.nan)
        if row["failed"] is None:
            behind = (0.0, 0.0) if i == best else mean_and_se(mine - torch.tensor(row["per_task"], dtype=torch.float64))
        done.append({**row, "behind": behind[0], "behind_se": behind[1], "chosen": i == best})
    return done
