"""Learn from 2 to 500 tasks with priors that are fixed, learned in part, learned, or shrunk; see who predicts best, and who is chosen.

    python -m experiments.few_tasks.run --out runs/few-tasks

Resumes where it was stopped: each training is one file in the folder `runs`. Writes results.json and pictures into --out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bnnp
from bnnp.checkpoint import write_atomically
from bnnp.evaluation import Model, evaluate
from bnnp.plots import save_figure
from bnnp.progress import ProgressLine
from experiments.few_tasks import pictures
from experiments.few_tasks.baselines import fit
from experiments.few_tasks.sources import PROCESSES, Collection, Split, abalone, file_of_abalones, process
from experiments.few_tasks.summary import summarise, text

SCORES = {"marginal": "marginal_log_density", "joint": "joint_log_density", "rmse": "rmse"}
FIXED, LEARNED = "fixed", "learned"

Record = dict[str, Any]


def settings() -> dict[str, Any]:
    """Return the settings of the study."""
    return json.loads((Path(__file__).parent / "config.json").read_text())


def candidates(config: dict[str, Any]) -> list[str]:
    """Return the names of all ways to learn a prior, from the stiffest to the freest within each family."""
    return [
        FIXED,
        *(f"fraction {f:g}" for f in config["fractions"]),
        LEARNED,
        *(f"shrinkage {tau:g}" for tau in config["shrinkages"]),
    ]


@dataclass(frozen=True)
class Job:
    """Name one training (of a fold, or of no fold: on all tasks), or one rival."""

    source: str
    group: str
    seed: int
    candidate: str
    fold: int | None

    @property
    def file(self) -> str:
        """Return the name of the job's file."""
        last = "all" if self.fold is None else f"fold {self.fold}"
        return f"{self.source}/{self.group}/seed {self.seed}/{self.candidate}, {last}.json"


def build(candidate: str, input_scale: float, x_dim: int, seed: int, config: dict[str, Any]) -> tuple[bnnp.BNNP, float]:
    """Return the untrained model of a candidate, and its shrinkage."""
    kind, _, number = candidate.partition(" ")
    value = float(number or 0)
    prior = bnnp.Prior(**config["prior"], input_scale=input_scale)
    if kind == FIXED:
        prior = bnnp.Prior(config["prior"]["kind"], learn_mean=False, learn_scale=False)
    elif kind == "fraction":
        prior = bnnp.Prior(**config["prior"], input_scale=input_scale, fraction=value)
    likelihood = bnnp.Gaussian(**config["noise"])
    model = bnnp.BNNP(x_dim, 1, prior=prior, likelihood=likelihood, seed=seed, **config["model"])
    return model, value if kind == "shrinkage" else 0.0


def scored(model: Model, splits: list[Split], config: dict[str, Any]) -> dict[str, list[float]]:
    """Return the scores of every split."""
    result = evaluate(model, splits, num_samples=config["num_samples"], batch_size=10)
    return {short: result.per_task[name].tolist() for short, name in SCORES.items()}


def trained(job: Job, collection: Collection, config: dict[str, Any]) -> Record:
    """Train the model of a job and return its scores: of the validation splits for a fold, of the test where it is the last."""
    tasks = collection.train(job.fold)
    x_dim = tasks[0][0].shape[1]
    model, tau = build(job.candidate, collection.input_scale, x_dim, job.seed, config)
    if len(tasks) == 1:  # the same task twice is the same average; the penalty counts it once
        tasks, tau = tasks * 2, 2 * tau
    training = {**config["training"], **({"steps": config["abalone"]["steps"]} if job.source == "abalone" else {})}
    options = {"context": collection.context, "shrinkage": tau, "seed": job.seed, "keep": "last", "progress": False, **training}
    result = bnnp.meta_train(model, tasks, **options)
    divergence, noise = result.history[-1]["divergence"], [float(s) for s in model.noise_std]
    record: Record = {"skipped": result.skipped, "divergence": divergence, "noise_std": noise}
    if job.fold is not None:
        record["validation"] = scored(model, collection.validation[job.fold], config)
    if job.fold is None or not collection.again:
        record["test"] = {name: scored(model, splits, config) for name, splits in collection.test.items()}
    return record


def rival(job: Job, collection: Collection, config: dict[str, Any]) -> Record:
    """Return the test scores of a rival: the oracle, or what is fitted to all tasks."""
    model: Any = PROCESSES[job.source] if job.candidate == "oracle" else fit(collection.tasks, smooth=job.candidate == "Gaussian process")
    return {"test": {name: scored(model, splits, config) for name, splits in collection.test.items()}}


def jobs(config: dict[str, Any], data: Path) -> Iterator[tuple[Job, Callable[[], Collection]]]:
    """Yield all jobs, cheap and decisive ones first, with the makers of their collections."""
    names = candidates(config)
    rivals = ["mean of tasks", "Gaussian process"]
    for seed in config["seeds"]:
        for size in config["sizes"]:
            for source in config["sources"]:
                own = [name for name in names if name in config["large"].get(str(size), names)]

                def make(source: str = source, size: int = size, seed: int = seed) -> Collection:
                    return process(source, size, seed, config)

                folds: list[int | None] = list(range(config["folds"].get(str(size), 1)))
                last: list[int | None] = [None] if size < config["learn_again_below"] else []
                for candidate in own:
                    for fold in [*folds, *last]:
                        yield Job(source, f"{size} tasks", seed, candidate, fold), make
                for name in [*rivals, "oracle"]:
                    if name != "oracle" or (seed == config["seeds"][0] and size == config["sizes"][0]):
                        yield Job(source, f"{size} tasks", seed, name, None), make
        if file_of_abalones(data).is_file():
            for variant in config["abalone"]["variants"]:

                def cut(variant: str = variant, seed: int = seed) -> Collection:
                    return abalone(data, variant, seed, config)

                for candidate in config["abalone"]["candidates"]:
                    for fold in (0, 1, None):
                        yield Job("abalone", variant, seed, candidate, fold), cut
                for name in rivals:
                    yield Job("abalone", variant, seed, name, None), cut


def collect(out: Path, config: dict[str, Any], data: Path, only: str = "", progress: bool = True) -> dict[Job, Record]:
    """Do all jobs that have not been done, and return the records of all."""
    todo = [(job, make) for job, make in jobs(config, data) if only in job.file]
    line = ProgressLine(len(todo), progress)
    found: dict[Job, Record] = {}
    for done, (job, make) in enumerate(todo):
        file = out / "runs" / job.file
        if file.is_file():
            found[job] = json.loads(file.read_text())
            continue
        line.show(done, job.file.removesuffix(".json"))
        start, collection = time.process_time(), make()
        is_rival = job.candidate in ("mean of tasks", "Gaussian process", "oracle")
        record = (rival if is_rival else trained)(job, collection, config)
        found[job] = {**record, "cpu_seconds": time.process_time() - start}
        write_atomically(file, json.dumps(found[job]).encode())
    line.show(len(todo), "done")
    line.close()
    return found


def rounded(value: Any) -> Any:
    """Return nested numbers with five digits, for files that people look into; what is not finite becomes None."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def lessons(out: Path, config: dict[str, Any]) -> dict[str, bnnp.BNNP]:
    """Return models of a few candidates that learned from the same 20 sinusoids, trained into a folder where they are not there."""
    models, collection = {}, process("sinusoid", 20, config["seeds"][0], config)
    for candidate in (FIXED, "fraction 0.5", LEARNED, "shrinkage 0.03"):
        folder = out / "lessons" / candidate
        if not (folder / "model.json").is_file():
            model, tau = build(candidate, collection.input_scale, 1, config["seeds"][0], config)
            options = {"context": collection.context, "shrinkage": tau, "seed": config["seeds"][0], **config["training"]}
            bnnp.meta_train(model, collection.tasks, keep="last", progress=False, **options)
            model.save(folder)
        models[candidate] = bnnp.load(folder)
    return models


def main() -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/few-tasks"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder that holds abalone/abalone.data")
    parser.add_argument("--only", default="", help="jobs whose file name has this text in it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = settings()
    found = collect(args.out, config, args.data, args.only)
    if args.only:
        return
    report = summarise(found, config)
    write_atomically(args.out / "results.json", json.dumps(rounded(report), indent=1).encode())
    pictures.draw(report, args.out)
    save_figure(pictures.lessons(lessons(args.out, config)), args.out / "lessons.png")
    print(text(report))
    print(f"Written to {args.out}")


if __name__ == "__main__":
    main()
