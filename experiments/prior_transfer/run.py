"""Run every inference engine under a learned and under a fixed prior, on the same tasks at the same noise, and score the predictions.

    OMP_NUM_THREADS=1 python -m experiments.prior_transfer.run --out runs/prior_transfer
    OMP_NUM_THREADS=1 python -m experiments.prior_transfer.run --quick --out runs/prior_transfer_quick

Resumes where it was stopped: a learned prior is a folder in `models`, a choice of settings a file in `choices`, each (process, prior,
engine) a file in `scores`; `log.jsonl` has a line for each. Writes results.json, tables.md and pictures into --out; with --partial, from
what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import bnnp
from bnnp.checkpoint import write_atomically
from bnnp.evaluation import SplitTask, evaluate
from bnnp.linalg import NotPositiveDefiniteError
from bnnp.plots import save_figure
from experiments.prior_transfer import pictures
from experiments.prior_transfer.engines import Answering, Given, Row
from experiments.prior_transfer.problems import Config, learn, learning, process_of, read_config, splits
from experiments.prior_transfer.summary import summarise, tables

Record = dict[str, Any]
SCORES = {
    "joint": "joint_log_density",
    "marginal": "marginal_log_density",
    "crps": "crps",
    "rmse": "rmse",
    "mae": "mae",
    "inside_80": "coverage_0.8",
}
PRIORS = ("learned", "fixed")


@dataclass(frozen=True)
class Cell:
    """Name one engine under one prior on one process."""

    process: str
    prior: str
    row: str

    @property
    def name(self) -> str:
        """Return the name of its file."""
        return f"{self.process}, {self.prior}, {self.row}".replace(" ", "_")


def cells(config: Config, wanted: Sequence[str] | None = None, among: Sequence[str] | None = None) -> Iterator[Cell]:
    """Yield what is to be run, engine after engine."""
    for name, row in config["rows"].items():
        for prior in row.get("priors", PRIORS):
            for process, own in config["processes"].items():
                exists = row["kind"] != "oracle" or process_of(process, config).has_oracle
                exists = exists and prior in own.get("priors", PRIORS)
                if exists and (wanted is None or name in wanted) and (among is None or process in among):
                    yield Cell(process, prior, name)


def settled(row: Row, settings: Mapping[str, Any]) -> Row:
    """Return a row with some of its settings replaced."""
    own = {key: value for key, value in row.items() if key != "trials"}
    return {**own, "settings": {**row.get("settings", {}), **settings}}


def answer(cell: Cell, row: Row, model: bnnp.BNNP, tasks: list[SplitTask], config: Config) -> Record:
    """Run a row on tasks and score it; an engine that could not go on is a result too."""
    model_like = Answering(cell.process, model, row, cell.prior, config)
    options = {"num_samples": config["draws"], "seed": config["seed"], "batch_size": 1 if row["kind"] == "fit" else len(tasks)}
    start = time.perf_counter()
    try:
        found = {"as it is": evaluate(model_like, tasks, **options)}
        if model_like.integrated is not None:
            found["last layer integrated out"] = evaluate(Given(model_like.integrated), tasks, **options)
    except (NotPositiveDefiniteError, FloatingPointError, ValueError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return {
        "scores": {how: {short: e.per_task[name].tolist() for short, name in SCORES.items()} for how, e in found.items()},
        "seconds": model_like.seconds,
        "wall_seconds": time.perf_counter() - start,
        "gradients": model_like.gradients,
        "report": model_like.report,
    }


def choose(cell: Cell, out: Path, model: bnnp.BNNP, config: Config) -> dict[str, Any]:
    """Return the settings of a row that are best on tasks of their own, by the joint density; from a file where that was done."""
    row = config["rows"][cell.row]
    trials: list[dict[str, Any]] = row.get("trials", [])
    if not trials:
        return {}
    file = out / "choices" / f"{cell.name}.json"
    key = {"row": row, "learning": learning(cell.process, config), "tasks": config["sizes"]["settings"], "draws": config["draws"]}
    if not file.exists():
        tasks = splits(cell.process, config, "settings")
        tried = [answer(cell, settled(row, trial), model, tasks, config) for trial in trials]
        values = [_mean(record["scores"]["as it is"]["joint"]) if "scores" in record else -math.inf for record in tried]
        best = max(range(len(trials)), key=values.__getitem__)
        told = [{"settings": t, "joint": v if math.isfinite(v) else None} for t, v in zip(trials, values, strict=True)]
        write_atomically(file, json.dumps({"key": key, "tried": told, "chosen": trials[best]}, indent=1).encode())
    found = json.loads(file.read_text())
    if found["key"] != key:
        raise SystemExit(f"Expected {file} with the settings of config.json. Got others. Give another --out, or remove the file.")
    chosen: dict[str, Any] = found["chosen"]
    return chosen


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def measure(cell: Cell, out: Path, config: Config, model: bnnp.BNNP) -> Record:
    """Return the record of a cell: from its file, or after the choice of its settings and a run on the test tasks."""
    file, row = out / "scores" / f"{cell.name}.json", config["rows"][cell.row]
    key = {
        "row": row,
        "learning": learning(cell.process, config),
        "sizes": config["sizes"],
        "draws": config["draws"],
        "seed": config["seed"],
    }
    if file.exists():
        record: Record = json.loads(file.read_text())
        if record["settings"] != key:
            raise SystemExit(f"Expected {file} with the settings of config.json. Got others. Give another --out, or remove the file.")
        return record
    chosen = choose(cell, out, model, config)
    found = answer(cell, settled(row, chosen), model, splits(cell.process, config, "test"), config)
    record = {"cell": asdict(cell), "settings": key, "chosen": chosen, **found}
    write_atomically(file, json.dumps(record).encode())
    _log(out, {"cell": cell.name, **({"failed": found["failed"]} if "failed" in found else _short(found)), "chosen": chosen})
    return record


def _short(found: Record) -> dict[str, Any]:
    means = {how: {name: round(_mean(values), 4) for name, values in of.items()} for how, of in found["scores"].items()}
    worst = {name: round(max(values), 3) for name, values in found["report"].items() if values}
    return {"scores": means, "seconds": round(found["seconds"], 1), "gradients": found["gradients"], "largest": worst}


def _log(out: Path, line: dict[str, Any]) -> None:
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def collect(out: Path, config: Config, wanted: Sequence[Cell], run: bool = True) -> dict[Cell, Record]:
    """Return the records of cells; with `run`, do what is missing."""

    @cache
    def model(name: str) -> bnnp.BNNP:
        found = learn(name, config, out, progress=run)
        found.condition([[0.0], [1.0]], [[0.0], [1.0]], num_samples=4)  # the first pass of a process takes longer, and no engine is to pay
        return found

    records: dict[Cell, Record] = {}
    for cell in wanted:
        if run or (out / "scores" / f"{cell.name}.json").exists():
            records[cell] = measure(cell, out, config, model(cell.process))
    return records


def report(out: Path, config: Config, found: Mapping[Cell, Record]) -> str:
    """Write results.json, tables.md and the pictures, and return the tables."""
    summed = summarise({(c.process, c.prior, c.row): record for c, record in found.items()}, list(config["rows"]))
    table = {name: summed[name] for name in config["processes"] if name in summed}
    notes = {name: json.loads((out / "models" / name / "training.json").read_text()) for name in config["processes"] if name in table}
    whole = {"training": {name: {k: v for k, v in note.items() if k != "settings"} for name, note in notes.items()}, "processes": table}
    write_atomically(out / "results.json", (json.dumps(whole, indent=1) + "\n").encode())
    words = tables(table)
    write_atomically(out / "tables.md", words.encode())
    for score, file in (("joint", "score_against_seconds.png"), ("crps", "crps_against_seconds.png")):
        save_figure(pictures.score_against_seconds(table, score), out / file)
    return words


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/prior_transfer"))
    parser.add_argument("--config", type=Path, help="other settings than config.json")
    parser.add_argument("--quick", action="store_true", help="a study in miniature, of a few minutes: quick.json")
    parser.add_argument("--rows", nargs="+", help="only these engines")
    parser.add_argument("--processes", nargs="+", help="only these")
    parser.add_argument("--partial", action="store_true", help="run nothing; report what is there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = read_config(Path(__file__).parent / "quick.json" if args.quick else args.config)
    args.out.mkdir(parents=True, exist_ok=True)
    found = collect(args.out, config, list(cells(config, args.rows, args.processes)), run=not args.partial)
    print(report(args.out, config, found))
    print(f"Written to {args.out}")


if __name__ == "__main__":
    main()
