"""The commands that work on a person's own data; each is a thin wrapper around a function of `bnnp.workflow`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.markup import escape

from bnnp.checkpoint import write_atomically
from bnnp.config import Config, read_config
from bnnp.console import ask, give, numbers, quoted, settings_from, table, told
from bnnp.data.collection import Collection
from bnnp.explorer import explore as serve
from bnnp.plots import save_figure
from bnnp.plots_data import collection as picture_of
from bnnp.report import write_report
from bnnp.runs import Run
from bnnp.workflow import Answer, Fit, answers, verbs
from bnnp.workflow.writing import plain

__all__ = ["register"]

Data = Annotated[
    str, typer.Argument(help="Table (CSV, Parquet), grid (netCDF, zarr), signals (WFDB record or folder), or images (folder, IDX, .npy).")
]
Model = Annotated[Path, typer.Argument(help="Folder that `bnnp fit` made.")]
Kind = Annotated[str | None, typer.Option(help="table, grid, signal or images, where that is not clear from the file.")]
Task = Annotated[
    list[str] | None, typer.Option(help="Column(s) that name the tasks; of a grid a dimension; of signals window, beat or record.")
]
Inputs = Annotated[list[str] | None, typer.Option(help="Columns, dimensions or variables to predict from.")]
Outputs = Annotated[list[str] | None, typer.Option(help="Columns or variables to predict.")]
Order = Annotated[str | None, typer.Option(help="Column that orders the rows of a task.")]
Window = Annotated[
    str | None, typer.Option(help="Cut windows of this length: rows (50), units of --order (7.0), a time (7d), seconds of a signal.")
]
Stride = Annotated[str | None, typer.Option(help="From the start of one window to that of the next.")]
Leads = Annotated[list[str] | None, typer.Option(help="Leads of a signal.")]
Rate = Annotated[float | None, typer.Option(help="Bring a signal to this many samples in a second.")]
Names = Annotated[list[str] | None, typer.Option(help="Names of the columns of a file without a header.")]
File = Annotated[Path | None, typer.Option("--config", help="TOML file of settings; see `bnnp config`.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any setting, as section.key=value; see `bnnp config`.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Particles.")]
Seed = Annotated[int, typer.Option(help="Of contexts and draws.")]
Shares = Annotated[list[float] | None, typer.Option(help="How much of a task is seen, such as 0.1 0.3.")]
Start = Annotated[float | None, typer.Option(help="Of signals: seconds to leave out; below 0 counted from the end.")]
Stop = Annotated[float | None, typer.Option(help="Of signals: where to end, in the same way.")]


def _length(text: str | None) -> Any:
    """Return a length as it was meant: rows, units, or a time such as "24 h"."""
    for kind in (int, float):
        try:
            return None if text is None else kind(text)
        except ValueError:
            pass
    return text


def _settings(path: Path | None, said: list[str] | None, **flags: Any) -> Config:
    names = {"task", "inputs", "outputs", "order", "window", "stride", "leads", "rate", "names"}
    return settings_from(path, said, **{f"data__{k}" if k in names else k: v for k, v in flags.items()})


def describe(
    data: Data, kind: Kind = None, task: Task = None, inputs: Inputs = None, outputs: Outputs = None, order: Order = None,
    window: Window = None, stride: Stride = None, leads: Leads = None, rate: Rate = None, names: Names = None, config: File = None,
    said: Set = None, picture: Annotated[Path | None, typer.Option(help="Draw the data into this PNG file.")] = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Say what tasks a file gives: how many, of what sizes and ranges, and what was dropped and why."""
    with told(as_json):
        chosen = _settings(config, said, task=task, inputs=inputs, outputs=outputs, order=order, window=_length(window),
                           stride=_length(stride), leads=leads, rate=rate, names=names)  # fmt: skip
        tasks = verbs.open_data(data, chosen, kind)
        found = tasks.describe()
        if picture is not None:
            save_figure(picture_of(tasks), picture)
        give(as_json, {**found.to_dict(), "picture": None if picture is None else str(picture)}, lambda: _show_data(tasks, picture))


def _show_data(tasks: Collection, picture: Path | None) -> None:
    ask().print(str(tasks.describe()), markup=False)
    if picture is not None:
        ask().print(f"\nPicture: {picture}", markup=False)


def fit(
    data: Data, out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("model"), kind: Kind = None, task: Task = None,
    inputs: Inputs = None, outputs: Outputs = None, order: Order = None, window: Window = None, stride: Stride = None, leads: Leads = None,
    rate: Rate = None, names: Names = None, config: File = None, said: Set = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; chosen from the data where not given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, batches and draws.")] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Print what would be done, and write nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away a run that is in the folder.")] = False,
    as_json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Learn a prior from the tasks of a file. Stopped or killed, it goes on with `bnnp resume`."""
    torch.set_num_threads(1)  # many small factorisations are slower with two
    with told(as_json, folder=out):
        chosen = _settings(config, said, task=task, inputs=inputs, outputs=outputs, order=order, window=_length(window),
                           stride=_length(stride), leads=leads, rate=rate, names=names, training__steps=steps,
                           training__seed=seed)  # fmt: skip
        if only_plan:
            planned = verbs.fit_plan(data, chosen, kind=kind)
            give(as_json, planned.record("planned"), lambda: _show_plan(planned))
            return
        run = verbs.fit(data, out, chosen, kind=kind, fresh=fresh, progress=not quiet, announce=None if as_json else _show_plan)
        give(as_json, _told_of(run), lambda: _show_fit(run, data))


def _show_plan(planned: Fit) -> None:
    out = ask()
    out.print(str(planned.description), markup=False)
    parts = planned.division
    out.print(f"\n{len(parts.train)} tasks to learn from, {len(parts.validation)} to choose the step, {len(parts.test)} held out for the "
              f"report ({parts.how}).\n", markup=False)  # fmt: skip
    out.print("Settings that were chosen (see config.toml in the folder for all):", markup=False)
    for reason in planned.reasons:
        out.print(f"- {reason}", markup=False)
    out.print()


def _told_of(run: Run) -> dict[str, Any]:
    record = verbs.record_of(run.folder or "")
    return {"folder": str(run.folder), **{key: record.get(key) for key in ("status", "result", "data", "config", "reasons", "division")}}


def _show_fit(run: Run, data: str) -> None:
    result, out, folder = _told_of(run)["result"], ask(), quoted(run.folder)
    scored = "" if result["best_score"] is None else f", {result['best_score']:.4g} nats per held-out target"
    out.print(f"Learned in {result['seconds']:.0f} s; the step kept is {result['best_step']}{scored}.", markup=False)
    if result["skipped"]:
        out.print(f"! {result['skipped']} steps were left out because they were not finite.", markup=False)
    out.print("\nNext:", style="bold")
    for command in (
        f"bnnp report {folder} --out report.html",
        f"bnnp predict {folder} CONTEXT TARGETS --out predictions.csv",
        f"bnnp explore {folder}",
    ):
        out.print(f"  {command}", markup=False, soft_wrap=True)


def resume(model: Model, data: Annotated[str | None, typer.Argument(help="The data, if they are elsewhere now.")] = None,
           as_json: Json = False, quiet: Quiet = False) -> None:  # fmt: skip
    """Go on with a fit that was stopped or killed, to the result it would have had."""
    torch.set_num_threads(1)
    with told(as_json, folder=model):
        run = verbs.resume(model, data, progress=not quiet)
        give(as_json, _told_of(run), lambda: _show_fit(run, data or ""))


def evaluate(model: Model, data: Annotated[str | None, typer.Argument(help="New data; without it the tasks that were held out.")] = None,
             shares: Shares = None, start: Start = None, stop: Stop = None, leads: Leads = None, samples: Samples = 64, seed: Seed = 0,
             max_tasks: Annotated[int, typer.Option(min=1, help="Of more tasks, take so many at random.")] = 200,
             as_json: Json = False) -> None:  # fmt: skip
    """Score the model on tasks it has not seen."""
    with told(as_json):
        judged, found = verbs.evaluate(model, data, shares, num_samples=samples, seed=seed, max_tasks=max_tasks, start=start, stop=stop,
                                       leads=leads)  # fmt: skip

        def show() -> None:
            table(f"Scores on {judged.how}", *numbers(found))
            ask().print("Log densities in nats per target, higher is better; errors in the units of the data; ± standard error over tasks.")

        give(as_json, {"how": judged.how, "shares": {str(share): one.to_dict() for share, one in found.items()}}, show)


def predict(
    model: Model,
    context: Annotated[str, typer.Argument(help='What was observed: a table of points, a grid with gaps, an image; "none" for nothing.')],
    targets: Annotated[str | None, typer.Argument(help="Where to predict; without it, what is missing in the first file.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write: .csv, .parquet, .nc or .json.")] = None,
    quantiles: Annotated[list[float] | None, typer.Option(help="Levels between 0 and 1.")] = None,
    samples: Samples = 64, seed: Seed = 0, as_json: Json = False,
) -> None:  # fmt: skip
    """Predict with error bars: means, standard deviations and quantiles, in the units of the data."""
    with told(as_json):
        run, known = Run.open(model), None if context.lower() == "none" else context
        said = verbs.predict(run, known, targets, out, quantiles=quantiles or answers.QUANTILES, num_samples=samples, seed=seed)
        _give_answer(run, said, out, as_json)


def _give_answer(run: Run, said: Any, out: Path | None, as_json: bool) -> None:
    if isinstance(said, Answer):
        columns: dict[str, Any] = verbs.table_of(run, said)[0]  # as in a file: dates and categories as they stood in the table
        remarks = [f"{name}: {remark}" for name, remark in zip(said.targets.names, said.remarks, strict=True) if remark]
    else:
        columns = {str(name): column.to_numpy() for name, column in said.to_dataframe().reset_index().items()}
        remarks = []
    rows = len(next(iter(columns.values())))

    def show() -> None:
        if out is None:
            few = 20
            shown = [[_cell(values[i]) for values in columns.values()] for i in range(min(rows, few))]
            wide = {name: 3 + max(map(len, (name, *cells))) for name, *cells in zip(columns, *shown, strict=True)}
            left, fits = ask().width - 2, set[str]()
            for name in sorted(columns, key=lambda name: not name.endswith(("_mean", "_std"))):  # these before all others
                if wide[name] > left:
                    break
                left, fits = left - wide[name], fits | {name}
            at = [i for i, name in enumerate(columns) if name in fits] or [0]
            table("", [list(columns)[i] for i in at], [[row[i] for i in at] for row in shown])
            if len(at) < len(columns):
                rest = [name for i, name in enumerate(columns) if i not in at]
                ask().print(f"(not shown: {', '.join(rest)}; --out FILE writes all)", markup=False)
            if rows > few:
                ask().print(f"({rows - few} more rows; --out FILE writes all)", markup=False)
        else:
            ask().print(f"{rows} predictions in {out}", markup=False)
        for remark in remarks[:10]:
            ask().print(f"! {escape(remark)}")
        if len(remarks) > 10:
            ask().print(f"! and {len(remarks) - 10} tasks more", markup=False)

    where = None if out is None else str(out)
    give(as_json, {"rows": rows, "out": where, "remarks": remarks} | ({} if out else {"columns": plain(columns)}), show)


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float | np.floating) else str(value)


def sample(
    model: Model, targets: Annotated[str, typer.Argument(help="Points to draw at.")],
    context: Annotated[str | None, typer.Argument(help="What was observed; without it draws are from the prior.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write: .csv, .parquet, .nc or .json.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Number of functions.")] = 10,
    noisy: Annotated[bool, typer.Option("--noisy", help="Draw observations, not functions.")] = False,
    samples: Samples = 64, seed: Seed = 0, as_json: Json = False,
) -> None:  # fmt: skip
    """Draw functions, each coherent over all points of a task."""
    with told(as_json):
        run = Run.open(model)
        _give_answer(run, verbs.sample(run, targets, context, out, n=n, noisy=noisy, num_samples=samples, seed=seed), out, as_json)


def diagnose(model: Model, context: Annotated[str, typer.Argument(help="What was observed.")], samples: Samples = 256, seed: Seed = 0,
             as_json: Json = False) -> None:  # fmt: skip
    """Say for each task how far its posterior can be trusted."""
    with told(as_json):
        rows = verbs.diagnose(model, context, num_samples=samples, seed=seed)

        def show() -> None:
            cells = [[row["task"], str(row["points"]), _cell(row["effective_sample_size"] or 0.0), row["sentence"]] for row in rows]
            table("", ["task", "points", "effective samples", "how far to trust it"], cells)

        give(as_json, rows, show)


def report(
    model: Model, data: Annotated[str | None, typer.Argument(help="New data; without it the tasks that were held out.")] = None,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    train: Annotated[str | None, typer.Option(help="Where the data of the fit are now, if they were moved.")] = None,
    start: Start = None, stop: Stop = None, leads: Leads = None, samples: Samples = 64, seed: Seed = 0,
    as_json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Write one page on the model: its data, learning, scores beside simple rivals, calibration, best and worst tasks, warnings."""
    torch.set_num_threads(1)
    with told(as_json):
        run = Run.open(model)
        judged = verbs.judged(run, data, learned_from=train, start=start, stop=stop, leads=leads)
        if judged.train is None:
            raise FileNotFoundError(
                f"Expected the data that the model learned from, since simple rivals learn from them too. Got nothing at "
                f"{run.data.get('path')}. Say where they are now with --train."
            )
        progress = None if quiet else lambda text: typer.echo(text, err=True)
        found = write_report(run, judged.train, judged.test, out, seed=seed, num_samples=samples, progress=progress)
        give(as_json, found.to_dict(), lambda: ask().print(f"Report: {out}", markup=False))


def explore(
    model: Model, data: Annotated[str | None, typer.Argument(help="Data to load tasks from; those of the fit without it.")] = None,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
    samples: Samples = 64,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Open a page on this machine where one clicks data in and watches the posterior move."""
    torch.set_num_threads(1)
    with told(as_json, "Closed."):
        run = Run.open(model)
        tasks: Collection | None = None
        try:
            tasks = verbs.judged(run, data).test
        except (ValueError, FileNotFoundError) as error:
            if data is not None:
                raise
            typer.echo(f"No tasks to load: {error}", err=True)
        announce = (lambda words: typer.echo(json.dumps({"said": str(words)}))) if as_json else typer.echo
        serve(run, data=tasks, port=port, open_browser=browser, samples=samples, announce=announce)


def config(
    file: Annotated[Path | None, typer.Argument(help="A file of settings to check.")] = None,
    kind: Kind = None,
    out: Annotated[Path | None, typer.Option(help="Write them to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Print all settings with what they mean, or check a file of them: every mistake with its line and key."""
    with told(as_json):
        found = Config() if file is None else read_config(file)
        text = found.toml(kind)
        if out is not None:
            write_atomically(out, text.encode())
        said = text if file is None and out is None else "Nothing is wrong with it." if out is None else f"Written to {out}."
        give(as_json, found.to_dict(), lambda: typer.echo(said, nl=not said.endswith("\n")))


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (describe, fit, resume, evaluate, predict, sample, diagnose, report, explore, config):
        app.command()(command)
