"""Follow streams of 1,000 points with last-layer updates, with reweighted particles, and by conditioning afresh.

    python -m experiments.online.run --out runs/online --data ../shared/data

Trains what it needs into the folder, resumes where it was stopped, and writes results.json (numbers), curves.json (with what the
pictures show) and a picture for each source.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bnnp
from bnnp import plots
from bnnp.checkpoint import write_atomically
from bnnp.data.synthetic import Sawtooth
from bnnp.progress import ProgressLine
from experiments.online import era5, pictures
from experiments.online.streams import BLOCK, ORDERS, WAYS, Way, follow, in_order, oracle
from experiments.sawtooth import run as sawtooth

SOURCES = ("sawtooth", "era5", "era5-narrow")
REFERENCE = "every tenth"  # what the others are compared with


@dataclass(frozen=True)
class Source:
    """Hold a learned network and the streams to follow: pairs (x, y) of test tasks, in random order."""

    model: bnnp.BNNP
    streams: list[tuple[Tensor, Tensor]]


def map_settings(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of one of the networks on maps."""
    return config["era5"] if name == "era5" else {**config["era5"], **config[name]}


def load_source(name: str, out: Path, data: Path, config: dict[str, Any]) -> Source:
    """Train or load the network of a source, and draw its test streams."""
    count, points = config["tasks"][name], config["stream"]["context"] + config["stream"]["points"]
    if name == "sawtooth":
        model = sawtooth.trained_model(out / "sawtooth")
        streams = [(task.x, task.y) for task in Sawtooth().tasks(count, seed=11, num_points=points)]
    else:
        settings = map_settings(name, config)
        maps = era5.Maps(data, settings)
        model = era5.trained_model(out / name, maps, settings)
        streams = maps.streams(count, points, seed=11)
    model.factor_dtype = torch.float64  # streams are long, and trained in float32
    return Source(model, streams)


def jobs(config: dict[str, Any], name: str) -> Iterator[tuple[str, int, str, Way]]:
    """Yield order, number of the task, key and way of everything that is to be run for a source."""
    for task in range(config["tasks"][name]):
        for order in ORDERS:
            for key, way in WAYS.items():
                if not way.costly or task == 0:
                    yield order, task, key, way


def run_source(name: str, out: Path, data: Path, config: dict[str, Any], progress: bool = True) -> dict[str, Any]:
    """Run what is not yet there of a source, and return its summary for each order."""
    source = load_source(name, out, data, config)
    stream, todo = config["stream"], list(jobs(config, name))
    line = ProgressLine(len(todo), progress)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {order: {} for order in ORDERS}
    for done, (order, task, key, way) in enumerate(todo):
        path = out / "streams" / f"{name}-{order}-{task}-{key.replace(' ', '-')}.json"
        x, y = in_order(*source.streams[task], order)
        made_of = {**stream, "digest": digest(source.model, x, y)}
        # Timings are as they were when the file was written.
        if not (path.is_file() and (record := json.loads(path.read_text()))["made_of"] == made_of):
            line.show(done, f"{name}, {order}, task {task}, {key}")
            record = {"made_of": made_of, **follow(source.model, way, x, y, stream["context"], stream["particles"])}
            write_atomically(path, json.dumps(record).encode())
        found[order].setdefault(key, []).append(record)
    line.show(len(todo), name)
    line.close()
    return {
        order: {
            "ways": {key: summary(records, found[order]) for key, records in found[order].items()},
            "reference": reference(name, source, data, config, order),
            "hidden_kl": {str(n): hidden_kl(source, order, n, stream["particles"]) for n in sizes(stream)},
        }
        for order in ORDERS
    }


def digest(model: bnnp.BNNP, x: Tensor, y: Tensor) -> str:
    """Return what tells a model and a stream from others."""
    found = hashlib.sha256()
    for value in (*model.state_dict().values(), x, y):
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def sizes(stream: dict[str, int]) -> list[int]:
    """Return the numbers of points at which the posterior is looked at."""
    most = stream["context"] + stream["points"]
    return sorted({n for n in (10, 100) if n < most} | {most})


def hidden_kl(source: Source, order: str, n: int, particles: int) -> list[float]:
    """Return KL(q || p) of the hidden weights given the first n points of each task: what those points say about them."""
    found = []
    for x, y in (in_order(x, y, order) for x, y in source.streams):
        posterior = source.model.condition(x[:n], y[:n], num_samples=particles)
        found.append(float(posterior.particles.drawn_kl.mean()))
    return mean_and_error(found)


def reference(name: str, source: Source, data: Path, config: dict[str, Any], order: str) -> dict[str, Any]:
    """Return the oracle of a synthetic source; for the maps, each place's mean and variance over the training hours."""
    start, streams = config["stream"]["context"], [in_order(x, y, order) for x, y in source.streams]
    if name == "sawtooth":
        label, values = "exact oracle", [oracle(Sawtooth(), x, y, start) for x, y in streams]
    else:
        maps = era5.Maps(data, map_settings(name, config))
        label, values = "each place's past mean and variance", [maps.climatology(x[start:], y[start:]) for x, y in streams]
    return {"label": label, "mean_log_density": mean_and_error([float(np.mean(v)) for v in values]), "curve": curve(values)}


def mean_and_error(values: Sequence[float]) -> list[float]:
    """Return the mean over tasks and its standard error (0 for a single task)."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return [float(np.mean(values)), error]


def curve(values: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Return means over tasks, and their standard errors, of means over successive blocks of points."""
    table = np.asarray(values)
    blocks = table[:, : table.shape[1] // BLOCK * BLOCK].reshape(len(table), -1, BLOCK).mean(-1)
    error = blocks.std(0, ddof=1) / math.sqrt(len(blocks)) if len(blocks) > 1 else np.zeros(blocks.shape[1])
    return {"mean": [round(float(v), 5) for v in blocks.mean(0)], "error": [round(float(v), 5) for v in error]}


def summary(records: list[dict[str, Any]], all_records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return one way's scores, costs and curves; gaps are paired with the reference's, task by task."""
    pairs = list(zip(records, all_records[REFERENCE], strict=False))
    gaps = [np.asarray(r["log_prob"]) - np.asarray(best["log_prob"]) for r, best in pairs]
    half = len(records[0]["log_prob"]) // 2
    points = np.arange(len(records[0]["log_prob"]))
    return {
        "tasks": len(records),
        "mean_log_density": mean_and_error([float(np.mean(r["log_prob"])) for r in records]),
        "second_half": mean_and_error([float(np.mean(r["log_prob"][half:])) for r in records]),
        "gap": mean_and_error([float(g.mean()) for g in gaps]),
        "gap_second_half": mean_and_error([float(g[half:].mean()) for g in gaps]),
        "total_gap": mean_and_error([float(g.sum()) for g in gaps]),
        "milliseconds": 1e3 * float(np.mean([np.mean(r["seconds"]) for r in records])),
        "milliseconds_last_tenth": 1e3 * float(np.mean([np.mean(r["seconds"][-max(1, len(points) // 10) :]) for r in records])),
        "milliseconds_to_predict": 1e3 * float(np.mean([r["predict_seconds"] for r in records])),
        "afresh": float(np.mean([r["afresh"] for r in records])),
        "distinct_particles": mean_and_error([r["distinct"] for r in records]),
        "effective_sample_size": {
            "median": float(np.median([r["ess"] for r in records])),
            "last": mean_and_error([r["ess"][-1] for r in records]),
            "after": {str(n): float(np.mean([r["ess"][n - 1] for r in records])) for n in (10, 30, 100, 300, 1000) if n <= len(points)},
        },
        "curve": curve([r["log_prob"] for r in records]),
        "total_gap_curve": curve([np.cumsum(g).tolist() for g in gaps]),
        "ess_curve": curve([r["ess"] for r in records]),
    }


def without_curves(results: dict[str, Any]) -> dict[str, Any]:
    """Return results without their curves, however deep these are."""
    return {k: without_curves(v) if isinstance(v, dict) else v for k, v in results.items() if not k.endswith("curve")}


def main() -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/online"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder that holds era5/")
    parser.add_argument("--source", choices=SOURCES, action="append", help="one source; both where not given")
    args = parser.parse_args()
    config = json.loads((Path(__file__).parent / "config.json").read_text())
    path = args.out / "curves.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for name in args.source or SOURCES:
        try:
            results[name] = run_source(name, args.out, args.data, config)
        except FileNotFoundError as error:
            print(f"{name} is left out. {error}", file=sys.stderr)
            continue
        write_atomically(path, json.dumps(results).encode())
        write_atomically(args.out / "results.json", json.dumps(without_curves(results), indent=1).encode())
        plots.save_figure(pictures.study(results[name], name, config["stream"]), args.out / f"{name}.png")
        print(pictures.table(results[name], name))
    print(f"Written to {args.out}")


if __name__ == "__main__":
    main()
