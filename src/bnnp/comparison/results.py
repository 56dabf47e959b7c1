"""What a comparison of inference engines found: rows, and the table and pictures made of them."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bnnp import plots_comparison
from bnnp.checkpoint import write_atomically
from bnnp.evaluation import _plain, mean_and_se
from bnnp.posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison", "Result"]

SMALLER_IS_BETTER = ("calibration_error", "crps", "rmse", "mae", "brier", "seconds", "gradients")
WORST: dict[str, Callable[[Sequence[float]], float]] = {"rhat": max, "ess_bulk": min, "ess_tail": min, "pareto_k": max, "divergences": sum}
"""How a diagnostic of many tasks becomes one number; the mean of those not named here."""

Cell = Callable[["Comparison", "Result"], str]
Spec = tuple[str, Cell]


@dataclass(frozen=True, eq=False)
class Result:
    """Hold what one row found on T tasks.

    Arguments:
        name: of the row.
        engine: name of the engine.
        prior: in words.
        warm_start: whether it started from the amortised posterior.
        collapsed: whether the last layer was integrated out.
        num_samples: number of draws that predicted.
        scores: name -> (mean over tasks, standard error over tasks), of `bnnp.evaluate`.
        per_task: score -> T values.
        diagnostics: name -> T values, such as "rhat", "ess_bulk", "divergences", "pareto_k", "elbo", "log_evidence".
        seconds: of all tasks, from the data to the posterior, a warm start included; predictions and scores not.
        gradients: gradients of the log-joint that were computed for each task.
        curves: predictions for pictures, where input and output have one dimension: of each task shown a dictionary of lists.
        failed: why there are no scores, or None.
        posterior: what was found; None in a comparison that was read from files.
    """

    name: str
    engine: str
    prior: str
    warm_start: bool
    collapsed: bool
    num_samples: int
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_task: dict[str, list[float]] = field(default_factory=dict)
    diagnostics: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = math.nan
    gradients: int = 0
    curves: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None
    posterior: Posterior | None = field(default=None, repr=False)

    @property
    def seconds_per_task(self) -> float:
        """Return the seconds of all tasks, divided by their number."""
        return self.seconds / max(1, len(next(iter(self.per_task.values()), [])))

    def diagnostic(self, name: str) -> float:
        """Return a diagnostic of all tasks: the worst, or where there is none such the mean; NaN where it was not measured."""
        known = [v for v in self.diagnostics.get(name, []) if not math.isnan(v)]
        return float(WORST.get(name, statistics.fmean)(known)) if known else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the posterior as plain Python, ready for JSON; NaN becomes None, infinity "inf"."""
        return _jsonable({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "posterior"})

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Result:
        """Return what `to_dict` wrote."""
        numbers = {key: {name: _numbers(values) for name, values in found[key].items()} for key in ("per_task", "diagnostics")}
        scores = {name: (_number(pair[0]), _number(pair[1])) for name, pair in found["scores"].items()}
        return cls(**{**found, **numbers, "scores": scores, "seconds": _number(found["seconds"])})


@dataclass(frozen=True, eq=False)
class Comparison:
    """Hold the rows of a comparison; printed, it is a table.

    Arguments:
        rows: in the order they were asked for.
        reference: name of the row that others are compared with, task by task.
        num_tasks: number of tasks T.
    """

    rows: list[Result]
    reference: str
    num_tasks: int

    def __getitem__(self, name: str) -> Result:
        """Return the row of a name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"Expected one of {', '.join(row.name for row in self.rows)}. Got {name!r}.")

    def best(self, score: str = "joint_log_density") -> Result:
        """Return the row with the best mean of a score; of "seconds" or "gradients" the smallest.

        Raises:
            ValueError: no row has this score.
        """
        known = [(self._value(row, score), row) for row in self.rows if row.failed is None]
        known = [(value, row) for value, row in known if math.isfinite(value)]
        if not known:
            raise self._no_score(score, ["seconds", "gradients"])
        return (min if score in SMALLER_IS_BETTER else max)(known, key=operator.itemgetter(0))[1]

    def _no_score(self, score: str, more: Sequence[str]) -> ValueError:
        names = sorted({*(name for row in self.rows for name in row.scores), *more})
        return ValueError(f"Expected a score that some row has: {', '.join(names)}. Got {score!r}.")

    @staticmethod
    def _value(row: Result, score: str) -> float:
        return float(getattr(row, score)) if score in ("seconds", "gradients") else row.scores.get(score, (math.nan, math.nan))[0]

    def difference(self, name: str, score: str = "joint_log_density", reference: str | None = None) -> tuple[float, float]:
        """Return the mean over tasks of a row's score less that of the reference, and its standard error, paired by task."""
        mine, other = (self[n].per_task.get(score) for n in (name, self.reference if reference is None else reference))
        if mine is None or other is None:
            return math.nan, math.nan
        return mean_and_se(torch.tensor(mine, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64))

    def table(self) -> str:
        """Return the rows as text, with what one has to know of them below."""
        return "\n".join([*self._block(SCORES), "", *self._block(COSTS), *self._failures(), *(f"({note})" for note in self._notes())])

    def _block(self, specs: Sequence[Spec]) -> list[str]:
        """Return some of the columns of the rows that have scores, as lines."""
        rows = [row for row in self.rows if row.failed is None]
        names = ["row", *(row.name for row in rows)]
        columns = [[name.ljust(max(map(len, names))) for name in names]]
        columns += [column for column in (_column(self, rows, *spec) for spec in specs) if column is not None]
        return [line.rstrip() for line in map("  ".join, zip(*columns, strict=True))]

    def _failures(self) -> list[str]:
        return [f"{row.name} failed: {row.failed}" for row in self.rows if row.failed is not None]

    __str__ = table

    def _notes(self) -> list[str]:
        done = [row for row in self.rows if row.failed is None]
        notes = [
            f"{self.num_tasks} tasks; in brackets standard errors over tasks. log p: log density per target point, higher is better; "
            "joint: of all targets of a task together"
        ]
        if len(done) > 1 and any(row.name == self.reference for row in done):
            notes.append(f"behind: joint log density of {self.reference} less that of the row, task by task")
        for word, rows in _grouped([("integrated out" if row.collapsed else "drawn", row) for row in done]).items():
            sizes = _grouped([(row.num_samples, row) for row in rows])
            parts = [f"{_names(some, done)} ({S} draws)" for S, some in sizes.items()]
            notes.append(f"last layer {word}: {'; '.join(parts)}")
        if any(not row.collapsed for row in done):
            notes.append(
                "where the last layer is drawn, the joint density is that of a mixture of a few sharp networks: a poor estimate, too low"
            )
        if any({"rhat", "ess_bulk", "pareto_k"} & set(row.diagnostics) for row in done):
            notes.append("R-hat, ESS, Pareto k: worst task, median over tasks. Trust R-hat below 1.01, k below 0.7")
        if any(row.warm_start for row in done):
            notes.append(f"started from the amortised posterior: {_names([row for row in done if row.warm_start], done)}")
        priors = _grouped([(row.prior, row) for row in done])
        if len(priors) > 1:
            notes.append("prior " + "; ".join(f"{word}: {_names(rows, done)}" for word, rows in priors.items()))
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the posteriors as plain Python, ready for JSON; NaN becomes None, infinity "inf"."""
        return {"reference": self.reference, "num_tasks": self.num_tasks, "rows": [row.to_dict() for row in self.rows]}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_dict` to a JSON file; return its path."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1).encode())
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            found = json.loads(Path(path).read_text("utf-8"))
            return cls([Result.from_dict(row) for row in found["rows"]], found["reference"], found["num_tasks"])
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"Expected a comparison that was saved in {path}. Got {type(error).__name__}: {error}.") from None

    def plot_scores(self, score: str = "joint_log_density", per_task: bool = False, title: str | None = None) -> Figure:
        """Draw a score against seconds, one marker for each row; see `plots_comparison.scores`.

        Bars are standard errors of the difference to the reference, task by task, where the score has a value for each task.

        Arguments:
            score: which one.
            per_task: seconds of all tasks divided by their number, in place of those of all tasks together.
            title: above the picture.

        Raises:
            ValueError: no row has this score.
        """
        rows = [row for row in self.rows if math.isfinite(row.scores.get(score, (math.nan, math.nan))[0])]
        if not rows:
            raise self._no_score(score, [])
        paired = any(row.name == self.reference for row in rows) and all(score in row.per_task for row in rows)
        points = [
            {
                "name": row.name,
                "seconds": row.seconds_per_task if per_task else row.seconds,
                "mean": row.scores[score][0],
                "se": self.difference(row.name, score)[1] if paired else row.scores[score][1],
            }
            for row in rows
        ]
        better = "lower" if score in SMALLER_IS_BETTER else "higher"
        label = LABELS.get(score, score.replace("_", " ")) + f"\n({better} is better)"
        seconds = "seconds for each task" if per_task else f"seconds for all {self.num_tasks} tasks"
        bars = f"of the difference to {self.reference}, task by task" if paired else "over tasks"
        return plots_comparison.scores(points, label, seconds, title, f"bars: standard errors {bars}", better == "lower")

    def plot_predictions(
        self,
        names: Sequence[str] | None = None,
        truth: Sequence[Any] | None = None,
        score: str = "joint_log_density",
        title: str | None = None,
    ) -> Figure:
        """Draw predictions on the same tasks side by side, for inputs and outputs of one dimension; see `plots_comparison.predictions`.

        Arguments:
            names: of the rows to draw; all where not given.
            truth: for each task shown the function that made it, a pair (x, y) of arrays, or None.
            score: written above each panel.
            title: above the picture.

        Raises:
            ValueError: there are no predictions to draw.
        """
        rows = [self[name] for name in names] if names is not None else self.rows
        columns = {row.name: [{**c, "note": _note(row, c["task"], score)} for c in row.curves] for row in rows if row.curves}
        if not columns:
            raise ValueError(
                "Expected rows with predictions of tasks of one input and one output, and compare(..., shown=) above 0. Got none to draw."
            )
        return plots_comparison.predictions(columns, truth, title)


LABELS = {"joint_log_density": "joint log density per target point", "marginal_log_density": "marginal log density per target point"}


def _note(row: Result, task: int, score: str) -> str:
    label = LABELS.get(score, score.replace("_", " ")).split(" per ")[0]
    return f"{label} {row.per_task[score][task]:.2f}".replace("-", "\N{MINUS SIGN}") if score in row.per_task else ""


# --- the table -------------------------------------------------------------------------------------------------------


def _score(name: str) -> Cell:
    def cell(_: Comparison, row: Result) -> str:
        mean, se = row.scores.get(name, (math.nan, math.nan))
        return "" if math.isnan(mean) else f"{mean:.3f}" + ("" if math.isnan(se) else f" ({se:.3f})")

    return cell


def _behind(table: Comparison, row: Result) -> str:
    mean, se = table.difference(row.name)
    return "" if math.isnan(mean) or row.name == table.reference else f"{-mean + 0.0:.3f}" + ("" if math.isnan(se) else f" ({se:.3f})")


def _diagnostic(name: str, digits: int, median: bool = True) -> Cell:
    def cell(_: Comparison, row: Result) -> str:
        known = [v for v in row.diagnostics.get(name, []) if not math.isnan(v)]
        if not known:
            return ""
        return f"{row.diagnostic(name):.{digits}f}" + (f", {statistics.median(known):.{digits}f}" if median else "")

    return cell


SCORES: list[Spec] = [
    ("joint log p", _score("joint_log_density")),
    ("behind", _behind),
    ("marginal log p", _score("marginal_log_density")),
    ("CRPS", _score("crps")),
    ("Brier", _score("brier")),
    ("accuracy", _score("accuracy")),
    ("calibration", _score("calibration_error")),
    ("RMSE", _score("rmse")),
]
COSTS: list[Spec] = [
    ("seconds", lambda _, row: f"{row.seconds:.3g}"),
    ("per task", lambda _, row: f"{row.seconds_per_task:.2g}"),
    ("gradients", lambda _, row: str(row.gradients)),
    ("R-hat", _diagnostic("rhat", 3)),
    ("ESS", _diagnostic("ess_bulk", 0)),
    ("divergences", _diagnostic("divergences", 0, median=False)),
    ("Pareto k", _diagnostic("pareto_k", 2)),
    ("ELBO", _diagnostic("elbo", 2, median=False)),
    ("evidence", _diagnostic("log_evidence", 2, median=False)),
]


def _column(table: Comparison, rows: Sequence[Result], header: str, cell: Cell) -> list[str] | None:
    """Return the cells of a column, all as wide; None where none says anything."""
    cells = [cell(table, row) for row in rows]
    width = max(map(len, (header, *cells)))
    return [part.rjust(width) for part in (header, *cells)] if any(cells) else None


def _names(some: Sequence[Result], rows: Sequence[Result]) -> str:
    """Return the names of some of the rows, or those left out where these are fewer."""
    rest = [row.name for row in rows if row not in some]
    if len(rest) < min(3, len(some)):
        return "all rows" if not rest else f"all but {' and '.join(rest)}"
    return ", ".join(row.name for row in some)


def _grouped(pairs: Sequence[tuple[Any, Result]]) -> dict[Any, list[Result]]:
    found: dict[Any, list[Result]] = {}
    for key, row in pairs:
        found.setdefault(key, []).append(row)
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    if isinstance(value, float) and math.isinf(value):
        return str(value)  # an infinite R-hat is known, and bad
    return _plain(value) if isinstance(value, float) else value


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _numbers(values: Sequence[float | str | None]) -> list[float]:
    return [_number(value) for value in values]
