"""Is it any good? Test tasks cut into context and targets, scores beside those of rivals, verdicts and warnings in plain words."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bnnp.data.collection import FEW_TASKS, Collection, Triple
from bnnp.evaluation import Evaluation, Model, evaluate, mean_and_se
from bnnp.linalg import NotPositiveDefiniteError
from bnnp.networks import BNNP
from bnnp.plots_data import usable
from bnnp.report.page import uncertain

__all__ = [
    "OWN",
    "SHARES",
    "Case",
    "Finding",
    "Judged",
    "Verdict",
    "affordable",
    "cases",
    "compare",
    "findings",
    "judge",
    "shares_of",
    "still_rising",
]

OWN = "this model"
SHARES = {"grid": (0.025, 0.1, 0.25), "images": (0.05, 0.2, 0.5)}
USUAL = (0.1, 0.3, 0.5)
LEVELS = (0.5, 0.8, 0.95)
MOST_CONTEXT, MOST_TARGETS = 2000, 200
BATCH = 8
BUDGET, FEWEST = 3e10, 20  # multiplications for each size of context; tasks that are judged whatever they cost
ONE_FACTOR = ("shared", "matrix_normal")
FEW_TESTS = 10
OFF = 0.05
"""A share of covered points this far from its level, and by two standard errors, is worth a warning."""
OUTSIDE = 0.01
REPEATED = 0.1
"""A value that so many points share is no draw from a density."""
HEAVY = 1 / 3
SKIPPED = 0.01


@dataclass(frozen=True, eq=False)
class Case:
    """Hold a test task cut in two.

    Arguments:
        index: of the task.
        name: of the task.
        points: how many could have been used.
        context: what the model is told, (x, y, mask).
        target: what it has to predict, likewise.
    """

    index: int
    name: str
    points: int
    context: Triple
    target: Triple

    @property
    def thinned(self) -> bool:
        """Return whether points were left out."""
        return len(self.context[0]) + len(self.target[0]) < self.points

    @property
    def split(self) -> tuple[Any, ...]:
        """Return it as `bnnp.evaluate` takes it."""
        return (*self.context, *self.target)


@dataclass(frozen=True, eq=False)
class Judged:
    """Hold the scores of all methods at one size of context.

    Arguments:
        share: of the points that is context.
        cases: what was judged.
        scores: for each method; the model first.
        notes: which rivals were left out, and why.
    """

    share: float
    cases: tuple[Case, ...]
    scores: Mapping[str, Evaluation]
    notes: tuple[str, ...]

    @property
    def words(self) -> str:
        """Return the share for people."""
        return f"{100 * self.share:g} % seen"


@dataclass(frozen=True)
class Verdict:
    """Compare the model with the best rival, task by task.

    Arguments:
        share: of the points that is context.
        score: "joint_log_density" or "marginal_log_density".
        rival: the best of them by this score, on these test tasks.
        difference: mean over tasks of the model's score less the rival's, in nats for each target point.
        se: its standard error.
        word: "ahead", "level", "behind", or "unknown" where a single task says nothing.
        sentence: the same in words.
    """

    share: float
    score: str
    rival: str
    difference: float
    se: float
    word: str
    sentence: str


@dataclass(frozen=True)
class Finding:
    """Warn of something, and advise.

    Arguments:
        key: what it is about.
        warning: what was found, with numbers.
        advice: what to do about it.
    """

    key: str
    warning: str
    advice: str


def shares_of(kind: str) -> tuple[float, ...]:
    """Return how much of a task is context when a model is judged."""
    return SHARES.get(kind, USUAL)


def affordable(model: BNNP, points: float, num_samples: int) -> int:
    """Return how many test tasks can be judged in about a minute at each size of context, at least 20.

    The cost of a posterior is that of its factorisations: one for each block of weights with a factor or a noise of its own.

    Arguments:
        model: the model.
        points: of a context.
        num_samples: particles.
    """
    config, cost = model.config, 0.0
    widths = (model.x_dim, *config["hidden"], model.y_dim)
    kind = config["prior"]["kind"]
    for i in range(1, len(widths)):
        p, units = widths[i - 1] + 1, widths[i]
        together = kind in ("per_layer", "network")
        one = together or (config["shared_noise"] and (kind in ONE_FACTOR or config["prior"].get("tied", False)))
        k = p * units if together else p
        rows = points * units if together else points
        cost += (1 if one else units) * min(rows, k) ** 2 * max(rows, k) * (num_samples if i > 1 else 1)
    return max(FEWEST, int(BUDGET / max(cost, 1.0)))


def cases(test: Collection, picked: Sequence[int], share: float, least: int, model: BNNP, seed: int) -> list[Case]:
    """Cut tasks at random into context and targets; a larger share of the same seed contains a smaller one.

    Arguments:
        test: tasks.
        picked: numbers of those that are cut; those with fewer than two usable points are left out.
        share: of the points that is context.
        least: as many points are context in any case, unless no target were left.
        model: which says what points it can be given.
        seed: of the cuts.
    """
    found = []
    for i in picked:
        x, y, mask = usable(test[int(i)], model)
        if len(x) < 2:
            continue
        order = np.random.default_rng([seed, int(i)]).permutation(len(x))
        n = min(max(round(share * len(x)), least), len(x) - 1)
        # Targets from the end: those of the largest context are, as far as they go, those of every other.
        one, other = order[:n][:MOST_CONTEXT], order[n:][-MOST_TARGETS:]
        found.append(Case(int(i), test.names[i], len(x), (x[one], y[one], mask[one]), (x[other], y[other], mask[other])))
    return found


def judge(model: BNNP, rivals: Mapping[str, Model], cut: Sequence[Case], share: float, num_samples: int, seed: int) -> Judged:
    """Score the model and its rivals on the same cuts. A rival that breaks down is left out, with a note."""
    splits = [case.split for case in cut]
    scores = {OWN: evaluate(model, splits, num_samples=num_samples, seed=seed, batch_size=BATCH, levels=LEVELS)}
    notes = []
    for name, rival in rivals.items():
        try:
            # Jitter that a rival needed is no concern of the reader's.
            with warnings.catch_warnings(action="ignore"):
                scores[name] = evaluate(rival, splits, seed=seed, batch_size=BATCH, levels=LEVELS)
        except NotPositiveDefiniteError:
            notes.append(f"The rival “{name}” was left out: its covariance could not be factorised.")
    return Judged(share, tuple(cut), scores, tuple(notes))


def compare(judged: Judged, score: str = "joint_log_density") -> Verdict | None:
    """Compare the model with the rival whose mean score is the best; None where there is no rival."""
    rivals = {name: found.per_task[score] for name, found in judged.scores.items() if name != OWN}
    rivals = {name: values for name, values in rivals.items() if bool(values.isfinite().all())}
    if not rivals:
        return None
    best = max(rivals, key=lambda name: float(rivals[name].mean()))
    own = judged.scores[OWN].per_task[score]
    difference, se = mean_and_se(own - rivals[best])
    word = "level"
    if not math.isfinite(difference):
        word = "behind"
    elif not math.isfinite(se):
        word = "unknown"
    elif abs(difference) > 2.0 * se:
        word = "ahead" if difference > 0 else "behind"
    return Verdict(judged.share, score, best, difference, se, word, _sentence(judged, score, best, difference, se, word))


def _sentence(judged: Judged, score: str, best: str, difference: float, se: float, word: str) -> str:
    seen = f"With {100 * judged.share:g} % of the points seen"
    what = "all targets of a task together" if score == "joint_log_density" else "targets one by one"
    if word == "unknown":
        return f"{seen}: one test task cannot tell this model from the best rival ({best})."
    if not math.isfinite(difference):
        return f"{seen}, this model is behind the best rival ({best}): the log density of {what} is not finite."
    by = f"{uncertain(abs(difference), se)} nats per target point"
    if word == "level":
        return f"{seen}, this model is level with the best rival ({best}) in the log density of {what}: the difference is {by}."
    place = "ahead of" if word == "ahead" else "behind"
    return f"{seen}, this model is {place} the best rival ({best}) in the log density of {what}, by {by}."


def findings(
    model: BNNP,
    train: Collection,
    test: Collection,
    judged: Sequence[Judged],
    verdicts: Sequence[Verdict],
    records: Sequence[Mapping[str, Any]],
    pareto_k: torch.Tensor | None,
) -> list[Finding]:
    """Return all that speaks against the model or against the test, the gravest first."""
    found = [*_leaks(train, test), *_behind(verdicts), *_miscalibrated(judged), *_outside(train, test), *_repeated(model, train)]
    if len(train) < FEW_TASKS:
        found.append(
            Finding(
                "few tasks",
                f"The prior was learned from {len(train)} tasks, which are few: it may not hold for a new one.",
                "Cut the data into more tasks (another task column, windows), or learn only a part of the prior and let held-out tasks "
                "choose how much (bnnp.choose_prior).",
            )
        )
    count = len(judged[0].cases) if judged else 0
    if count < FEW_TESTS:
        found.append(
            Finding(
                "few test tasks",
                f"There {'is 1 test task' if count == 1 else f'are {count} test tasks'}: scores and their standard errors say little.",
                "Hold out more tasks, or collect more.",
            )
        )
    found += _training(records)
    if pareto_k is not None and len(pareto_k):
        heavy = int(((pareto_k > 0.7) | pareto_k.isnan()).sum())
        if heavy > HEAVY * len(pareto_k):
            found.append(
                Finding(
                    "importance weights",
                    f"On {heavy} of {len(pareto_k)} test tasks the importance weights are too unequal to say how close the posterior is to "
                    "that of the learned prior (Pareto k above 0.7).",
                    "Judge predictions by the scores here, do not reweight them or use the evidence; the objective iw_avi trains for it.",
                )
            )
    if not model.reference.known:
        found.append(Finding("not trained", "The model was not trained: this is what its untrained prior does.", "Train it: bnnp fit."))
    return found


def _leaks(train: Collection, test: Collection) -> Iterator[Finding]:
    """Find test tasks that were learned from, and test tasks of groups that were learned from."""
    places = {name: i for i, name in enumerate(train.names)}
    both = [i for i, name in enumerate(test.names) if name in places][:50]
    same = sum(
        all(np.array_equal(a, b, equal_nan=True) for a, b in zip(test[i][:2], train[places[test.names[i]]][:2], strict=True)) for i in both
    )
    if same:
        yield Finding(
            "test tasks were learned from",
            f"{same} of the test tasks are training tasks too: the scores are better than they would be on new tasks.",
            "Give tasks that the model has not seen.",
        )
    if train.groups is not None and test.groups is not None:
        known = set(train.groups)
        shared = sum(group in known for group in test.groups)
        if shared:
            yield Finding(
                "groups",
                f"{shared} of {len(test)} test tasks belong to groups (such as the same record or patient) that training tasks belong to: "
                "the scores say nothing about new groups.",
                "To learn how good predictions are for a new group, evaluate on data of groups that were not in training.",
            )


def _behind(verdicts: Sequence[Verdict]) -> Iterator[Finding]:
    lost = [v for v in verdicts if v.word == "behind" and v.score == "joint_log_density"]
    if lost:
        worst = min(lost, key=lambda v: v.difference if math.isfinite(v.difference) else -math.inf)
        yield Finding(
            "behind a rival",
            f"The model predicts worse than a simple rival ({' or '.join(dict.fromkeys(v.rival for v in lost))}) with "
            f"{_together([f'{100 * v.share:g}' for v in lost])} % of the points seen.",
            f"Train for longer, with a wider network or another prior; as long as it stays behind, “{worst.rival}” is the better choice "
            "for these data (it is in bnnp.rivals).",
        )


def _together(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _miscalibrated(judged: Sequence[Judged]) -> Iterator[Finding]:
    """Find intervals that hold too few or too many points, the worst at each side."""
    off: dict[bool, list[tuple[float, str]]] = {True: [], False: []}
    for found in judged:
        for level in LEVELS:
            mean, se = found.scores[OWN].summary.get(f"coverage_{level:g}", (math.nan, math.nan))
            distance = abs(mean - level)
            # Where all tasks hold all points their scatter is 0, which few points may well be: chance alone sets a floor.
            points = sum(int(np.count_nonzero(case.target[2])) for case in found.cases)
            chance = math.sqrt(level * (1.0 - level) / max(points, 1))
            if distance > OFF and not distance <= 2.0 * max(se, chance):
                held = f"{100 * mean:.0f} ± {100 * se:.0f} %" if math.isfinite(se) else f"{100 * mean:.0f} %"
                off[mean < level].append((distance, f"intervals of {100 * level:g} % hold {held} of the points ({found.words})"))
    if off[True]:
        yield Finding(
            "too sure",
            f"Predictions are too sure: {max(off[True])[1]}.",
            "Train for longer, with contexts as large as those of use; try a likelihood with heavier tails or changing noise (studentt, "
            "heteroscedastic), or more particles.",
        )
    if off[False]:
        yield Finding(
            "too cautious",
            f"Predictions are too cautious: {max(off[False])[1]}.",
            "Train for longer; where noise differs from place to place, try the likelihood heteroscedastic.",
        )


def _outside(train: Collection, test: Collection) -> Iterator[Finding]:
    """Find inputs of test tasks outside the range of the training tasks."""
    known, asked = train.describe(), [test[int(i)][0] for i in np.unique(np.linspace(0, len(test) - 1, min(len(test), 100)).round())]
    x = np.concatenate(asked) if asked else np.zeros((0, train.x_dim))
    for j, row in enumerate(known.inputs):
        pad = 1e-9 * max(abs(row["min"]), abs(row["max"]), 1e-300)
        out = (x[:, j] < row["min"] - pad) | (x[:, j] > row["max"] + pad)
        if len(x) and out.mean() > OUTSIDE:
            unit = f" {row['unit']}" if row["unit"] else ""
            yield Finding(
                "outside the training range",
                f"{100 * out.mean():.0f} % of the points of the test tasks have a {row['name']} outside the {row['min']:.4g} to "
                f"{row['max']:.4g}{unit} of the training tasks.",
                "Predictions there rest on the prior alone. Train on tasks that cover the range of use.",
            )


def _repeated(model: BNNP, train: Collection) -> Iterator[Finding]:
    """Find outputs of which one value comes again and again, where the model states densities."""
    if model.likelihood.discrete:
        return
    tasks = [train[int(i)] for i in np.unique(np.linspace(0, len(train) - 1, min(len(train), 50)).round())]
    for j, column in enumerate(train.outputs):
        values, counts = np.unique(np.concatenate([y[mask[:, j], j] for _, y, mask in tasks]), return_counts=True)
        if len(values) and counts.sum() >= 50 and counts.max() > REPEATED * counts.sum():
            yield Finding(
                "repeated values",
                f"{100 * counts.max() / counts.sum():.0f} % of the values of {column.name} are exactly {values[counts.argmax()]:.6g}: log "
                "densities then reward a spike there, and mean little.",
                "Compare RMSE and CRPS; or choose a likelihood for such outputs (counts, labels), or read images with dequantise.",
            )


def _training(records: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    if not records:
        return
    if still_rising(records):
        yield Finding(
            "still learning",
            "The score on validation tasks was still rising when training ended.",
            "Train for more steps: fit again with twice as many.",
        )
    steps, skipped = int(records[-1]["step"]), int(records[-1].get("skipped") or 0)
    if skipped > max(1, SKIPPED * steps):
        yield Finding(
            "skipped steps",
            f"{skipped} of {steps} steps were left out because loss or gradient was not finite.",
            "Lower the learning rate, bound the noise, or look for extreme values in the data.",
        )


def still_rising(records: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the last fifth of the validation scores lies above the fifth before by more than their scatter.

    Arguments:
        records: of a log, with "step" and "validation"; fewer than ten scores say nothing.
    """
    scores = np.array([float(r["validation"]) for r in records if r.get("validation") is not None])
    scores = scores[np.isfinite(scores)]
    part = len(scores) // 5
    if part < 2:
        return False
    late, before = scores[-part:], scores[-2 * part : -part]
    scatter = math.sqrt((late.var(ddof=1) + before.var(ddof=1)) / part)
    return bool(late.mean() - before.mean() > max(0.02, 2.0 * scatter))
