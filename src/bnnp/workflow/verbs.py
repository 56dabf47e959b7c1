"""The verbs of the command line as functions of paths: what is read, where it comes from, and what is written."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnnp.config import Config
from bnnp.data.collection import Collection, Triple
from bnnp.data.opening import kind_of, only_file, read
from bnnp.data.sources import open_dataset
from bnnp.data.table import read_points
from bnnp.evaluation import Evaluation
from bnnp.export import predict_dataset
from bnnp.runs import RECORD, Run, read_record
from bnnp.workflow import answers, fitting
from bnnp.workflow.answers import QUANTILES, Answer, free
from bnnp.workflow.writing import check_ending, write_dataset, write_table

__all__ = ["Judged", "diagnose", "evaluate", "fit", "judged", "open_data", "predict", "resume", "sample"]

PathLike = str | os.PathLike[str]
NAMELESS = "points"
"""What the reader of points calls the one task of a table without a task column."""


def open_data(source: Any, config: Config | None = None, kind: str | None = None) -> Collection:
    """Read a source as `config` says."""
    return read(source, kind, **(config or Config()).section("data"))


def fit(
    source: Any,
    out: PathLike,
    config: Config | None = None,
    *,
    kind: str | None = None,
    fresh: bool = False,
    progress: bool = True,
    announce: Callable[[fitting.Fit], None] | None = None,
) -> Run:
    """Learn from a source of any kind and leave the model in a folder; see `bnnp.workflow.fitting.fit`.

    Arguments:
        source: path of a table, grid, signals or images, such an object in memory, or a `Collection`.
        out: the folder.
        config: settings, of how the source is cut too.
        kind: "table", "grid", "signal" or "images"; found out where not given.
        fresh: throw away a run that is in the folder.
        progress: show a line of progress on standard error.
        announce: called with the plan before training starts.

    Raises:
        ValueError: data or settings that do not fit.
        OSError: the folder cannot be written to, or the disk is full.
    """
    path = str(Path(only_file(source)).resolve()) if isinstance(source, str | os.PathLike) else None
    tasks = open_data(source, config, kind)
    return fitting.fit(tasks, out, config, path=path, fresh=fresh, progress=progress, announce=announce)


def fit_plan(source: Any, config: Config | None = None, *, kind: str | None = None) -> fitting.Fit:
    """Return what `fit` would do, without doing it."""
    return fitting.plan(open_data(source, config, kind), config, None if not isinstance(source, str | os.PathLike) else str(source))


def resume(folder: PathLike, source: Any = None, *, progress: bool = True) -> Run:
    """Go on with a fit that was stopped, to the result it would have had.

    Arguments:
        folder: of the fit.
        source: its data; where they were, if not given.
        progress: show a line of progress on standard error.

    Raises:
        FileNotFoundError: there is no fit, or its data are not where they were.
        ValueError: the data have changed.
    """
    return fitting.resume(folder, again(read_record(folder), source), progress=progress)


def again(record: Mapping[str, Any], source: Any = None) -> Collection:
    """Read the data of a fit again, from where they were or from elsewhere, cut as they were.

    Raises:
        FileNotFoundError: they are not there any more.
    """
    own = record["data"].get("path")
    path = own if source is None else source
    if path is None:
        raise FileNotFoundError("Expected the data of this fit, which were in memory and not in a file. Got none. Give them.")
    if source is None and not (Path(path).exists() or Path(f"{path}.hea").exists() or glob.glob(path)):
        raise FileNotFoundError(f"Expected the data of this fit at {path}. Got nothing there. Say where they are now.")
    return read(path, recipe=record["recipe"], **_said_of(record))


def _said_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was said of how a table is written: no part of its recipe, but needed to read the data of the fit again."""
    said = record.get("config", {}).get("data", {}) if record["recipe"].get("kind") == "table" else {}
    return {name: said[name] for name in ("delimiter", "encoding", "drop_missing_inputs") if name in said}


@dataclass(frozen=True, eq=False)
class Judged:
    """Hold the tasks that a model is judged on, and those it learned from.

    Arguments:
        test: new to the model.
        train: what it learned from; None where that is not at hand.
        how: a sentence on where the test tasks come from.
    """

    test: Collection
    train: Collection | None
    how: str


def judged(run: Run, source: Any = None, learned_from: Any = None, **choices: Any) -> Judged:
    """Return the tasks to judge a model on: those held out of its own source, or those of another one that it has not seen.

    Arguments:
        run: the model.
        source: the data; those of the fit where not given.
        learned_from: where the data of the fit are now, if they were moved.
        choices: that a reader takes beside a recipe, such as `start`, `stop` and `leads` of signals.

    Raises:
        FileNotFoundError: there are no such data.
        ValueError: nothing was held out of them, or the model has seen all of them.
    """
    record = {"data": run.data, "recipe": run.recipe, "config": run.config}
    source = learned_from if source is None and not any(choices.values()) else source
    said = {name: value for name, value in choices.items() if value is not None}
    tasks = again(record, source) if not said else read(run.data.get("path") if source is None else source, recipe=run.recipe, **said)
    if tasks.fingerprint == run.data.get("fingerprint") and not said:
        if not run.division["test"]:
            raise ValueError(
                f"Expected tasks that were held out. Got a fit that learned from all {len(tasks)} tasks. Judge it on another file, or fit "
                "again with a share for the test (split.test)."
            )
        test = run.part("test", tasks)
        return Judged(test, run.part("train", tasks), f"{len(test)} tasks held out of the same data: {run.division['how']}")
    own: Collection | None = None
    try:
        own = again(record, learned_from)
        train = run.part("train", own)
    except (FileNotFoundError, ValueError):
        if learned_from is not None:
            raise
        train = None  # the model is judged all the same, without rivals that have to learn
    return _new_to(run, tasks, own, train)


def _new_to(run: Run, tasks: Collection, own: Collection | None, train: Collection | None) -> Judged:
    """Return the tasks of another source without those that the model has seen: a file that grew still holds what it was trained on.

    Raises:
        ValueError: it has seen all of them.
    """
    known = {*run.division["train"], *run.division["validation"]} if run.division else set()
    named = [i for i, name in enumerate(tasks.names) if name in known]
    places = {} if own is None else {name: i for i, name in enumerate(own.names)}
    seen = {i for i in named if own is not None and tasks.names[i] in places and _equal(tasks[i], own[places[tasks.names[i]]])}
    if len(seen) == len(tasks):
        raise ValueError(
            f"Expected tasks that the model has not seen. Got {len(tasks)}, all of which it learned from. Judge it on other data, or on "
            "those it did not learn from: leave the file out."
        )
    if seen:
        rest = tasks.subset([i for i in range(len(tasks)) if i not in seen])
        return Judged(rest, train, f"{len(rest)} tasks of another source, without {len(seen)} of it that the model learned from")
    doubt = f"{len(named)} of them with names of tasks that the model learned from: if they are the same, scores flatter"
    return Judged(tasks, train, f"{len(tasks)} tasks of another source, {doubt if named and not places else 'all of them new'}")


def _equal(a: Triple, b: Triple) -> bool:
    return all(one.shape == other.shape and np.array_equal(one, other, equal_nan=True) for one, other in zip(a[:2], b[:2], strict=True))


def evaluate(
    model: Run | PathLike,
    source: Any = None,
    shares: Sequence[float] | None = None,
    *,
    num_samples: int = 64,
    seed: int = 0,
    max_tasks: int = 200,
    **choices: Any,
) -> tuple[Judged, dict[float, Evaluation]]:
    """Score a model on the tasks held out of its data, or on all tasks of another source.

    Arguments:
        model: a run or its folder.
        source: the data; those of the fit where not given.
        shares: how much of a task is context; by the kind of data where not given.
        num_samples: particles.
        seed: of contexts and draws.
        max_tasks: of more tasks, so many are taken at random.
        choices: that a reader takes beside a recipe.

    Returns:
        The tasks, and an `Evaluation` for each share.
    """
    run = _open(model)
    found = judged(run, source, **choices)
    if len(found.test) > max_tasks:
        at = np.sort(np.random.default_rng(seed).permutation(len(found.test))[:max_tasks])
        found = Judged(found.test.subset(at.tolist()), found.train, f"{max_tasks} of the {found.how}")
    return found, answers.evaluate(run, found.test, shares, num_samples=num_samples, seed=seed)


def _open(model: Run | PathLike) -> Run:
    return model if isinstance(model, Run) else Run.open(model)


def points(run: Run, source: Any, outputs: bool) -> Collection:
    """Read what a model is conditioned on or asked about: a table of points, or a source of the model's own kind.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(source, Collection):
        return source
    source = only_file(source)
    kind = kind_of(source)
    if kind == "table":
        return read_points(source, run.recipe, outputs, columns=(run.inputs, run.outputs))
    if kind != run.kind:
        raise ValueError(
            f"Expected a table of points with the columns {', '.join(c.name for c in run.inputs)}, or a source of kind {run.kind!r} as the "
            f"model learned from. Got one of kind {kind!r}: {source}."
        )
    needed: dict[str, Any] = {"outputs_needed": outputs} if kind == "grid" else {}
    return read(source, recipe=run.recipe, **needed)


def predict(
    model: Run | PathLike,
    context: Any,
    targets: Any = None,
    out: PathLike | None = None,
    *,
    quantiles: Sequence[float] = QUANTILES,
    num_samples: int = 64,
    seed: int = 0,
) -> Any:
    """Predict from what was observed, and write the predictions to a file.

    Arguments:
        model: a run or its folder.
        context: what was observed: a table of points with the model's columns, a source of the kind that the model learned from, or None
            for nothing. Tasks are told apart by the task column.
        targets: where to predict, in the same forms; where not given, the rows of `context` of which an output is missing, or of a grid
            or image all of it.
        out: file to write, .csv, .parquet, .nc or .json; nothing is written without it.
        quantiles: levels between 0 and 1.
        num_samples: particles.
        seed: of the draws.

    Returns:
        An `Answer`; of a grid predicted as a grid, an `xarray.Dataset`.

    Raises:
        ValueError: files or columns that do not fit the model.
        OSError: the file cannot be written.
    """
    run = _open(model)
    path, quantiles = None if out is None else check_ending(out), answers.check_levels(quantiles)
    if context is None and targets is None:
        raise ValueError("Expected observed data, or points to predict at. Got neither. Name a file for one of them.")
    if run.kind == "grid" and _is_grid(context) and (targets is None or _is_grid(targets)):
        ds = predict_dataset(run, open_dataset(only_file(context))[0], None if targets is None else open_dataset(only_file(targets))[0],
                             quantiles=tuple(quantiles), num_samples=num_samples, seed=seed)  # fmt: skip
        if path is not None and path.suffix.lower() == ".nc":
            write_dataset(path, ds)
        elif path is not None:
            write_table(path, {name: column.to_numpy() for name, column in ds.to_dataframe().reset_index().items()})
        return ds
    known, asked = _both(run, context, targets)
    answer = answers.predict(run, known, asked, quantiles=quantiles, num_samples=num_samples, seed=seed)
    if path is not None:
        write_table(path, *table_of(run, answer))
    return answer


def _is_grid(source: Any) -> bool:
    return source is not None and not isinstance(source, Collection) and kind_of(only_file(source)) == "grid"


def _both(run: Run, context: Any, targets: Any) -> tuple[Collection | None, Collection]:
    """Return what was observed and where to predict, as tasks of the same names."""
    known = None if context is None else points(run, context, True)
    if targets is None:
        assert known is not None
        if not isinstance(context, Collection) and kind_of(only_file(context)) != "table":
            return known, known
        rows = [np.flatnonzero(~mask.all(1)) for _, _, mask in known]
        if not any(len(at) for at in rows):
            raise ValueError("Expected points to predict at: a second file, or rows of the first with missing outputs. Got neither.")
        return known, _rows(known, rows)
    asked = points(run, targets, False)
    # One task here and one there are the same, unless two tables say by their task columns that they are not.
    nameless = known is not None and (NAMELESS in (known.names[0], asked.names[0]) or known.rows is None or asked.rows is None)
    if known is not None and nameless and len(known) == 1 == len(asked) and known.names[0] != asked.names[0]:
        asked = Collection.of(
            [asked[0]], run.inputs, run.outputs, names=list(known.names), recipe=asked.recipe, rows=asked.rows, table=asked.table
        )
    return known, asked


def _rows(tasks: Collection, rows: Sequence[Any]) -> Collection:
    """Return some of the points of each task; tasks of which none are taken are left out."""
    chosen = [i for i, at in enumerate(rows) if len(at)]
    starts = np.concatenate([[0], np.cumsum(tasks.sizes)])
    own = None if tasks.rows is None else np.concatenate([np.asarray(tasks.rows)[starts[i] + rows[i]] for i in chosen])
    parts = [tuple(part[rows[i]] for part in tasks[i]) for i in chosen]
    names = [tasks.names[i] for i in chosen]
    return Collection.of(parts, tasks.inputs, tasks.outputs, names=names, recipe=tasks.recipe, rows=own, table=tasks.table)


def table_of(run: Run, answer: Answer) -> tuple[dict[str, Any], dict[str, str]]:
    """Return an answer as columns, and their units: those of the table asked about, as they stand there, then what was said."""
    units = {column.name: column.unit for column in run.inputs} | dict(answer.units)
    rows, table, said = answer.targets.rows, answer.targets.table, dict(answer.columns)
    if rows is None or table is None:
        return answer.flat(), units
    own = table()
    if "distance" in own and "distance" in said:
        said[free("distance", [*own, *said])] = said.pop("distance")
    filled = {*said, *(column.name for column in run.outputs)}  # columns to be filled give way to what fills them
    kept = {name: np.asarray(values)[rows] for name, values in own.items() if name not in filled}
    return kept | {name: np.concatenate(parts) for name, parts in said.items()}, units


def sample(
    model: Run | PathLike,
    targets: Any,
    context: Any = None,
    out: PathLike | None = None,
    *,
    n: int = 10,
    noisy: bool = False,
    num_samples: int = 64,
    seed: int = 0,
) -> Answer:
    """Draw functions at given points: from the posterior given a context, or from the prior.

    Arguments:
        model: a run or its folder.
        targets: where to draw, as for `predict`.
        context: what was observed; None for draws from the prior.
        out: file to write; nothing is written without it.
        n: number of functions.
        noisy: draw observations instead of functions.
        num_samples: particles.
        seed: of the draws.
    """
    run = _open(model)
    path = None if out is None else check_ending(out)
    known, asked = _both(run, context, targets)
    answer = answers.sample(run, known, asked, n, noisy=noisy, num_samples=num_samples, seed=seed)
    if path is not None:
        write_table(path, *table_of(run, answer))
    return answer


def diagnose(model: Run | PathLike, context: Any, *, num_samples: int = 256, seed: int = 0) -> list[dict[str, Any]]:
    """Say for each task of a context how far its posterior can be trusted.

    Arguments:
        model: a run or its folder.
        context: what was observed, as for `predict`.
        num_samples: particles.
        seed: of the draws.
    """
    run = _open(model)
    return answers.diagnose(run, points(run, context, True), num_samples=num_samples, seed=seed)


def record_of(folder: PathLike) -> dict[str, Any]:
    """Return what is written down of a fit, finished or not; nothing where it is a model alone."""
    return read_record(folder) if (Path(folder) / RECORD).exists() else {}
