"""Measure how close posteriors come to the true one: the gap between bound and evidence, for every engine and every noise.

    OMP_NUM_THREADS=1 python -m experiments.posterior_quality.run --out runs/posterior_quality

Resumes where it was stopped: each (method, noise, seed) is one file in the folder `cells`. Writes results.json, tables.md and two pictures
into --out from what is there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bnnp.checkpoint import write_atomically
from bnnp.plots import save_figure
from experiments.posterior_quality import pictures
from experiments.posterior_quality.methods import METHODS, Record
from experiments.posterior_quality.summary import summarise, tables

Config = dict[str, Any]
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Cell:
    """Name one measurement of all tasks; without a seed it holds those of all seeds, which are run at once."""

    method: str
    noise: float
    seed: int | None

    @property
    def name(self) -> str:
        """Return the name of its files."""
        seed = "" if self.seed is None else f"_{self.seed}"
        return f"{self.method.replace(' ', '_').replace(',', '')}_{self.noise:g}{seed}"


def read_config(file: Path | None = None) -> Config:
    """Return the settings of the study."""
    config: Config = json.loads((file or HERE / "config.json").read_text())
    return config


def cells(config: Config, methods: Sequence[str] | None = None, noises: Sequence[float] | None = None) -> Iterator[Cell]:
    """Yield what is to be measured, all of one noise first, in the order of the methods: later ones need the files of earlier ones."""
    for noise in config["noises"]:
        for method, plan in config["methods"].items():
            chosen = (methods is None or method in methods) and (noises is None or noise in noises)
            if chosen and noise in plan.get("noises", config["noises"]):
                yield from (Cell(method, noise, seed) for seed in plan.get("seeds", [None]))


def settings(config: Config, cell: Cell) -> Config:
    """Return all that the result of a cell depends on, but for the code."""
    unused = ("methods", "noises", "reference", "reference_at", "validation_seed", "validation_tasks")
    shared = {key: value for key, value in config.items() if key not in unused}
    return {**shared, "plan": {k: v for k, v in config["methods"][cell.method].items() if k not in ("noises", "seeds")}}


def collect(out: Path, config: Config, wanted: Sequence[Cell], run: bool = True) -> dict[Cell, Record]:
    """Return the records of cells from their files, and with `run` measure and write what is missing."""
    found: dict[Cell, Record] = {}
    for cell in wanted:
        file, key = out / "cells" / f"{cell.name}.json", settings(config, cell)
        record: Record | None = json.loads(file.read_text()) if file.exists() else None
        if record is not None and record["settings"] != key:
            raise SystemExit(f"Expected {file} with the settings of config.json. Got others. Give another --out, or remove the file.")
        if record is None and run:
            wall, cpu = time.perf_counter(), time.process_time()
            plan = config["methods"][cell.method]
            measured = METHODS[plan["kind"]](config, plan, cell.noise, cell.seed or 0, out / "runs" / cell.name)
            seconds = {"seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
            record = {"cell": asdict(cell), "settings": key, **measured, **seconds}
            write_atomically(file, json.dumps(record).encode())
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps({"cell": cell.name, "value": record["value"], **seconds}) + "\n")
            print(f"{cell.name}: {[round(v, 2) for row in record['value'] for v in row]}, {seconds['seconds']:.0f} s", flush=True)
        if record is not None:
            found[cell] = record
    return found


def report(out: Path, config: Config, found: dict[Cell, Record]) -> str:
    """Write results.json, tables.md and the pictures, and return the tables."""
    records = {(c.method, c.noise, c.seed): record for c, record in found.items()}
    table = summarise(records, config)
    write_atomically(out / "results.json", (json.dumps(table, indent=1) + "\n").encode())
    words = tables(table)
    write_atomically(out / "tables.md", words.encode())
    save_figure(pictures.divergences(table), out / "divergences.png")
    save_figure(pictures.estimates(table), out / "evidence.png")
    return words


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/posterior_quality"))
    parser.add_argument("--config", type=Path, help="other settings than config.json")
    parser.add_argument("--quick", action="store_true", help="the settings of quick.json: minutes, and other numbers")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--noises", nargs="+", type=float, help="only these")
    parser.add_argument("--no-report", action="store_true", help="measure only")
    parser.add_argument("--partial", action="store_true", help="measure nothing; report what is there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = read_config(HERE / "quick.json" if args.quick and args.config is None else args.config)
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    found = collect(args.out, config, list(cells(config, args.methods, args.noises)), run=not args.partial)
    if not args.no_report:
        print(report(args.out, config, found))
        print(f"Written to {args.out}")


if __name__ == "__main__":
    main()
