"""Train the same network under every prior, on the same data with the same budget, and score it on test tasks.

    OMP_NUM_THREADS=1 python -m experiments.prior_families.run --out runs/prior_families

Resumes where it was stopped: each (problem, width, prior, seed) is one file in the folder `scores`. Writes results.json, tables.md and a
picture into --out once all of them are there; with --partial, from what is there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import bnnp
from bnnp.checkpoint import write_atomically
from bnnp.evaluation import energy_distance, evaluate
from bnnp.linalg import NotPositiveDefiniteError
from bnnp.plots import save_figure
from bnnp.priors import PRIORS
from bnnp.training import TrainingError
from experiments.prior_families import pictures
from experiments.prior_families.problems import Problem, load
from experiments.prior_families.summary import FIXED, Record, rate_scores, rate_table, summarise, tables

Config = dict[str, Any]
WARM_STEPS, TIMED_STEPS, FEW_TASKS = 3, 30, 40


@dataclass(frozen=True)
class Cell:
    """Name one training run."""

    problem: str
    net: str
    prior: str
    seed: int
    rate: float | None = None  # another learning rate than that of the study

    @property
    def name(self) -> str:
        """Return the name of its files."""
        rate = "" if self.rate is None else f", rate {self.rate}"
        return f"{self.problem}, {self.net}, {self.prior}, {self.seed}{rate}".replace(" ", "_")


def read_config(file: Path | None = None) -> Config:
    """Return the settings of the study."""
    config: Config = json.loads((file or Path(__file__).parent / "config.json").read_text())
    return config


def cells(config: Config, problems: Sequence[str] | None = None, priors: Sequence[str] | None = None) -> Iterator[Cell]:
    """Yield what is to be run, one seed after the other, other learning rates last; priors that the package has not are left out."""
    everything = [
        Cell(problem, name, prior, seed)
        for seed in config["seeds"]
        for name, net in config["nets"].items()
        for problem in net["problems"]
        for prior in net["priors"]
    ]
    more = config["rates"]
    everything += [
        Cell(problem, more["net"], prior, seed, rate)
        for seed in more["seeds"]
        for problem in more["problems"]
        for rate in more["learning_rates"]
        for prior in config["nets"][more["net"]]["priors"]
        if prior != FIXED
    ]
    for cell in everything:
        known = config["priors"][cell.prior]["kind"] in PRIORS
        if known and (problems is None or cell.problem in problems) and (priors is None or cell.prior in priors):
            yield cell


def settings(config: Config, cell: Cell) -> dict[str, Any]:
    """Return all that the result of a cell depends on, but for the code."""
    shared = {key: config[key] for key in ("sizes", "training", "factor_dtype", "particles", "validations")}
    own = {"problem": config["problems"][cell.problem], "hidden": config["nets"][cell.net]["hidden"], "prior": config["priors"][cell.prior]}
    if cell.rate is not None:
        shared["training"] = {**shared["training"], "learning_rate": cell.rate}
    return {**shared, **own, "context": config["context"]["digits" if cell.problem == "digits" else "process"]}


def build(config: Config, cell: Cell) -> bnnp.BNNP:
    """Return the network of a cell before training."""
    problem, prior = config["problems"][cell.problem], config["priors"][cell.prior]
    start = {} if prior.get("learn_mean") is False else problem["start"]  # N(0, 1/p) is what it is
    noise, bound = problem["noise"]
    return bnnp.BNNP(
        2 if cell.problem == "digits" else 1,
        1,
        hidden=config["nets"][cell.net]["hidden"],
        prior=bnnp.Prior(**prior, **start),
        likelihood=bnnp.Gaussian(noise, max_noise_std=bound),
        activation=problem["activation"],
        shared_noise=True,
        factor_dtype=config["factor_dtype"],
        seed=cell.seed,
    )


def train(model: bnnp.BNNP, config: Config, cell: Cell, problem: Problem, folder: Path | None, **changes: Any) -> bnnp.TrainResult:
    """Train the network of a cell, going on where an earlier run in the folder was stopped."""
    found = settings(config, cell)
    steps = found["training"]["steps"]
    options = {
        **found["training"],
        "beta": found["problem"]["beta"],
        "context": tuple(found["context"]),
        "validate_every": max(1, steps // found["validations"]),
        "log_every": max(1, steps // found["validations"]),
        "checkpoint_every": max(1, steps // 4),
        "seed": cell.seed,
        "validation": problem.validation,
        "folder": folder,
        "resume": folder is not None,
        "progress": False,
    }
    return bnnp.meta_train(model, problem.train, **{**options, **changes})


def step_seconds(config: Config, cell: Cell, problem: Problem) -> float:
    """Return the processor time of one training step: what more steps take more."""
    few = replace(problem, train=problem.train[:FEW_TASKS])
    taken = []
    for steps in (1, WARM_STEPS, WARM_STEPS + TIMED_STEPS):  # the first call warms up
        start = time.process_time()
        train(build(config, cell), config, cell, few, None, steps=steps, validation=None, validate_every=steps)
        taken.append(time.process_time() - start)
    return (taken[2] - taken[1]) / TIMED_STEPS


def step_times(out: Path, config: Config, wanted: Sequence[Cell], again: bool = False) -> dict[str, float]:
    """Return the seconds of a step by problem, net and prior, from a file but for what is missing there, or all anew."""
    file = out / "times.json"
    found: dict[str, float] = {} if again or not file.exists() else json.loads(file.read_text())
    problem = cache(lambda name: load(name, config["sizes"]))
    for cell in wanted:
        name = f"{cell.problem}, {cell.net}, {cell.prior}"
        if name not in found:
            found[name] = step_seconds(config, cell, problem(cell.problem))
            write_atomically(file, json.dumps(found, indent=1).encode())
    return found


def prior_numbers(start: bnnp.BNNP, model: bnnp.BNNP) -> int:
    """Return how many numbers of the prior training has moved: what a structure leaves unused is not counted."""
    pairs = zip(start.layers, model.layers, strict=True)
    return sum(int((a != b).sum()) for p, q in pairs for a, b in zip(p.prior.parameters(), q.prior.parameters(), strict=True))


def measure(config: Config, cell: Cell, problem: Problem, folder: Path) -> Record:
    """Train and score one cell; a training that could not go on is a result too."""
    start, model = build(config, cell), build(config, cell)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        trained = train(model, config, cell, problem, folder)
    except (TrainingError, NotPositiveDefiniteError) as error:
        return {"failed": str(error)}
    # Other jobs on the machine lengthen the wall time, and the work is of one thread: the log's seconds are put right by this.
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    curve = [[row["step"], row["seconds"] * share, row["validation"]] for row in log if row["validation"] is not None]
    scores: dict[str, dict[str, list[float]]] = {}
    for condition, splits in problem.test.items():
        found = evaluate(model, splits, num_samples=config["particles"], seed=cell.seed, batch_size=10).per_task
        scores[condition] = {key: found[f"{key}_log_density"].tolist() for key in ("joint", "marginal")}
        scores[condition]["inside_80"] = found["coverage_0.8"].tolist()
    drawn = model.prior_samples(problem.grid, len(problem.functions[0]), seed=cell.seed, noisy=problem.noisy).flatten(1)
    return {
        "best_step": trained.best_step,
        "validation": trained.best_score,
        "skipped": trained.skipped,
        "seconds": trained.seconds * share,
        "numbers": prior_numbers(start, model),
        "noise_std": None if model.noise_std is None else model.noise_std.tolist(),
        "energy_distance": float(energy_distance(drawn.double(), problem.functions[0].double())),
        "curve": curve,
        "scores": scores,
    }


def collect(out: Path, config: Config, wanted: Sequence[Cell], run: bool = True) -> dict[Cell, Record]:
    """Return the records of cells from their files, and with `run` measure and write what is missing."""
    problem = cache(lambda name: load(name, config["sizes"]))
    found: dict[Cell, Record] = {}
    for cell in wanted:
        file, key = out / "scores" / f"{cell.name}.json", settings(config, cell)
        record: Record | None = json.loads(file.read_text()) if file.exists() else None
        if record is not None and record["settings"] != key:
            raise SystemExit(f"Expected {file} with the settings of config.json. Got others. Give another --out, or remove the file.")
        if record is None and run:
            start = time.perf_counter()
            record = {"cell": asdict(cell), "settings": key, **measure(config, cell, problem(cell.problem), out / "runs" / cell.name)}
            write_atomically(file, json.dumps(record).encode())
            said = f"failed: {record['failed']}" if "failed" in record else f"validation {record['validation']:.3f}"
            print(f"{cell.name}: {said}, {time.perf_counter() - start:.0f} s", flush=True)
        if record is not None:
            found[cell] = record
    return found


def references(out: Path, config: Config, problems: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the scores of the references, and the energy distance between two sets of true functions, from a file if it is there."""
    found: dict[str, dict[str, Any]] = {}
    for name in problems:
        file = out / "scores" / f"references,_{name.replace(' ', '_')}.json"
        if not file.exists():
            problem = load(name, config["sizes"])
            scores = {
                rival: {c: {k: v.tolist() for k, v in both.items()} for c, both in of.items()} for rival, of in problem.references.items()
            }
            first, second = (f.double() for f in problem.functions)
            whole = {"sizes": config["sizes"], "scores": scores, "energy_distance": float(energy_distance(first, second))}
            write_atomically(file, json.dumps(whole).encode())
        found[name] = json.loads(file.read_text())
        if found[name]["sizes"] != config["sizes"]:
            raise SystemExit(f"Expected {file} with the sizes of config.json. Got others. Give another --out, or remove the file.")
    return found


def report(out: Path, config: Config, found: dict[Cell, Record], times: dict[str, float]) -> str:
    """Write results.json, tables.md and the picture, and return the tables."""
    main = {cell: record for cell, record in found.items() if cell.rate is None}
    records = {
        (c.problem, c.net, c.prior, c.seed): {**record, "step_seconds": times[f"{c.problem}, {c.net}, {c.prior}"]}
        for c, record in main.items()
    }
    table = summarise(records, references(out, config, list(dict.fromkeys(cell.problem for cell in main))))
    usual = config["training"]["learning_rate"]
    same = [replace(cell, rate=None) for cell in found if cell.rate is not None]
    rates = {(c.problem, c.prior, c.seed, c.rate or usual): r for c, r in found.items() if c.rate is not None or c in same}
    minutes = sum(record.get("seconds", 0.0) for record in found.values()) / 60
    whole = {"training_minutes": minutes, "problems": table, "learning_rates": rate_scores(rates)}
    write_atomically(out / "results.json", (json.dumps(whole, indent=1) + "\n").encode())
    words = tables(table) + rate_table(whole["learning_rates"]) + f"\nTraining took {minutes:.0f} minutes of processor time.\n"
    write_atomically(out / "tables.md", words.encode())
    save_figure(pictures.scores(table), out / "scores.png")
    return words


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/prior_families"))
    parser.add_argument("--config", type=Path, help="other settings than config.json")
    parser.add_argument("--problems", nargs="+", help="only these")
    parser.add_argument("--priors", nargs="+", help="only these")
    parser.add_argument("--partial", action="store_true", help="train nothing; report what is there")
    parser.add_argument("--retime", action="store_true", help="measure the time of a step anew, for a machine that is quiet now")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = read_config(args.config)
    found = collect(args.out, config, list(cells(config, args.problems, args.priors)), run=not args.partial)
    times = step_times(args.out, config, [cell for cell in found if cell.rate is None], args.retime)
    print(report(args.out, config, found, times))
    print(f"Written to {args.out}")


if __name__ == "__main__":
    main()
