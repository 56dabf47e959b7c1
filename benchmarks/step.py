"""One training step and one prediction: the package against the naive twin and against the machine's ceiling.

Run `python -m benchmarks.step` on a machine that does nothing else: two processes of two threads each on two cores slow
one another many times over. Absolute times drift by tens of per cent from hour to hour, so every number that counts is
a ratio of one run, in which the two sides take turns. Each side of each cell lives in a fresh process of its own, so
that its peak memory is its own: the largest resident size minus the size after the imports.

A twin that does not fit in memory is measured smaller (one task, and if need be two small numbers of samples with a
straight line through them); the table then says so.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import ceilings
from benchmarks.twin import Style, TaskTensors, Twin

CONTEXT = (50, 40, 45, 55, 60)  # the first is the task that a twin on one task takes
TARGET = (20, 15, 18, 22, 25)
SAMPLES, PREDICT_SAMPLES, PREDICT_CONTEXT, PREDICT_TARGET = 8, 100, 50, 250
TURN_SECONDS = 0.5
TIME_LIMIT = 600.0
HIDDEN = ((50, 50), (100, 100, 100), (250, 250, 250))
VARIANTS: dict[str, dict[str, Any]] = {
    "per_unit": {"prior": "per_unit", "shared_noise": False},
    "shared": {"prior": "shared", "shared_noise": True},
}
TARGETS = {
    "per_unit": dict(zip(HIDDEN, (2, 6, 8), strict=True)),
    "shared": dict(zip(HIDDEN, (25, 100, 100), strict=True)),
}
MEMORY_TARGET = 0.5
# Copies of the samples x units x p x p matrices that the twin holds at its peak (measured): a guard, not a result.
LIVE_COPIES = {"step": {"published": 10.0, "lean": 7.5}, "predict": {"published": 8.0, "lean": 8.0}}
ROOM = 0.7  # share of the free memory that the twin may be expected to take
ONE_TASK_WIDTH = 200  # from here on the twin's step runs on one task: five would take many minutes

Mode = Literal["step", "predict"]


@dataclass(frozen=True)
class Job:
    """What one process measures again and again."""

    side: str  # "twin", or a key of VARIANTS
    mode: Mode
    hidden: tuple[int, ...]
    tasks: int
    samples: int
    threads: int
    style: Style


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes of one job, or why there are none."""

    seconds: float = float("nan")
    peak: float = float("nan")  # bytes above `base`
    base: float = float("nan")  # bytes after the imports
    note: str = ""
    runs: tuple[float, ...] = ()  # seconds of every repeat, the first (warm-up) included


# --- inside the measuring process -----------------------------------------------------------------------------------


def _data(tasks: int) -> list[TaskTensors]:
    generator = torch.Generator().manual_seed(0)

    def points(n: int) -> tuple[Tensor, Tensor]:
        x = 4.0 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 2.0
        return x, torch.sin(3.0 * x) + 0.05 * torch.randn(n, 1, generator=generator, dtype=torch.float64)

    return [(*points(n), *points(m)) for n, m in zip(CONTEXT[:tasks], TARGET[:tasks], strict=True)]


def _prediction_data() -> tuple[Tensor, Tensor, Tensor]:
    xc, yc, _, _ = _data(1)[0]
    return (
        xc[:PREDICT_CONTEXT],
        yc[:PREDICT_CONTEXT],
        torch.linspace(-2, 2, PREDICT_TARGET, dtype=torch.float64)[:, None],
    )


def _twin_work(job: Job) -> Callable[[], object]:
    twin = Twin(1, 1, job.hidden, style=job.style)
    data, (xc, yc, xt) = _data(job.tasks), _prediction_data()
    generator = torch.Generator().manual_seed(0)

    def step() -> object:
        twin.zero_grad(set_to_none=True)
        loss = twin.step(data, job.samples, generator)
        torch.autograd.backward(loss)
        return loss

    def predict() -> object:
        return twin.predict(xc, yc, xt, job.samples, generator).mean(0)

    return step if job.mode == "step" else predict


def _our_work(job: Job) -> Callable[[], object]:
    # Imported here: the twin's process never loads the package, so its memory and settings stay its own.
    import bnnp
    from bnnp.tasks import TaskBatch, collate

    model = bnnp.BNNP(x_dim=1, y_dim=1, hidden=job.hidden, last_layer="amortised", **VARIANTS[job.side]).double()
    data, (xc, yc, xt) = _data(job.tasks), _prediction_data()
    context, target = ([(task[i], task[i + 1]) for task in data] for i in (0, 2))
    batch = TaskBatch(collate(context, dtype=torch.float64), collate(target, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)

    def step() -> object:
        model.zero_grad(set_to_none=True)
        loss = -bnnp.objectives.pp_avi(model, batch, num_samples=job.samples, generator=generator).mean()
        torch.autograd.backward(loss)
        return loss

    def predict() -> object:
        with torch.no_grad():
            return model.condition(xc, yc, num_samples=job.samples, seed=0).predict(xt).mean

    return step if job.mode == "step" else predict


def _resident() -> float:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return float(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return _largest_resident()


def _largest_resident() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def _worker(connection: Connection, job: Job) -> None:
    """Answer each message with the cost of one repeat, the mean over a turn of at least `TURN_SECONDS`.

    Steps of a training run back to back; a single short one, taken after another process had the machine for a second, measures cold
    caches instead.
    """
    torch.set_num_threads(job.threads)
    if job.side != "twin":
        import bnnp  # noqa: F401  # before the base is taken, see _our_work
    base = _resident()
    work = _twin_work(job) if job.side == "twin" else _our_work(job)
    while connection.recv():
        start, done, seconds = time.perf_counter(), 0, 0.0
        while seconds < TURN_SECONDS:
            work()
            done, seconds = done + 1, time.perf_counter() - start
        connection.send(Cost(seconds / done, _largest_resident() - base, base))


def _ceiling_worker(connection: Connection, threads: int, seconds: float) -> None:
    torch.set_num_threads(threads)
    connection.send(ceilings.measure(seconds))


# --- the parent ------------------------------------------------------------------------------------------------------


class _Runner:
    """One process that measures one job, with a limit on the time of a repeat."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, child = context.Pipe()
        self.process = context.Process(target=_worker, args=(child, job), daemon=True)
        self.process.start()
        child.close()
        self.costs: list[Cost] = []
        self.failure = ""

    def once(self) -> None:
        if self.failure:
            return
        try:
            self.connection.send(True)
            if self.connection.poll(TIME_LIMIT):
                self.costs.append(self.connection.recv())
                return
            self.failure = f"over {TIME_LIMIT:.0f} s"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(5)
            self.failure = f"process ended with code {self.process.exitcode}"
        self.process.terminate()

    def close(self) -> Cost:
        if self.process.is_alive():
            try:
                self.connection.send(False)
            except BrokenPipeError:
                self.process.terminate()
            self.process.join(10)
        if not self.costs:
            return Cost(note=self.failure)
        kept = self.costs[1:] or self.costs  # the first repeat also warms up
        runs = tuple(c.seconds for c in self.costs)
        last = self.costs[-1]
        return Cost(statistics.median(c.seconds for c in kept), last.peak, last.base, self.failure, runs)


def measure_interleaved(jobs: Sequence[Job], repeats: int, budget: float) -> list[Cost]:
    """Let the jobs take turns until `repeats` rounds after the first, or `budget` seconds, are over."""
    runners = [_Runner(job) for job in jobs]
    start = time.perf_counter()
    for done in range(repeats + 1):
        if done and time.perf_counter() - start > budget:
            break
        for runner in runners:
            runner.once()
    return [runner.close() for runner in runners]


def _available_memory() -> float:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return float(fields["MemAvailable"].split()[0]) * 1024.0
    return 8.0 * 2**30


def twin_jobs(whole: Job) -> tuple[list[Job], str]:
    """Choose what of the twin's job is run, given the memory there is, and say it in words."""
    layers = [8.0 * d * (q + 1) ** 2 for q, d in pairwise(whole.hidden)]
    # A step keeps every layer for the backward pass; a prediction frees a layer before the next.
    each = LIVE_COPIES[whole.mode][whole.style] * (sum(layers) if whole.mode == "step" else max(layers, default=0.0))
    room = ROOM * _available_memory()
    small = whole.tasks == 1 or max(whole.hidden) < ONE_TASK_WIDTH
    if small and each * whole.samples * whole.tasks <= room:
        return [whole], ""
    one = replace(whole, tasks=1)
    times = f", time x {whole.tasks}" if whole.tasks > 1 else ""
    if each * whole.samples <= room:
        return [one], f"twin on one task{times}, its memory as it is"
    few = [replace(one, samples=s) for s in (1, 3)]
    return few, f"twin on one task with 1 and 3 samples, line drawn to {whole.samples}{times}"


def combine(whole: Job, jobs: Sequence[Job], costs: Sequence[Cost], note: str) -> Cost:
    """Return the cost of the twin's whole job from what was run of it."""
    failed = "; ".join(c.note for c in costs if c.note)
    if any(math.isnan(c.seconds) for c in costs):
        return Cost(note=failed or note)
    last = costs[-1]
    seconds, peak = last.seconds, last.peak
    if len(jobs) == 2:
        along = (whole.samples - jobs[0].samples) / (jobs[1].samples - jobs[0].samples)
        seconds = costs[0].seconds + along * (last.seconds - costs[0].seconds)
        peak = costs[0].peak + along * (last.peak - costs[0].peak)
    words = "; ".join(filter(None, (note, failed)))
    return Cost(seconds * whole.tasks / jobs[-1].tasks, peak, last.base, words, last.runs)


def run_cell(mode: Mode, hidden: tuple[int, ...], variants: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one mode at one width for every variant and the twin, and return one row for each variant."""
    tasks, samples = (len(CONTEXT), SAMPLES) if mode == "step" else (1, PREDICT_SAMPLES)
    whole = Job("twin", mode, hidden, tasks, samples, args.threads, args.twin)
    few, note = twin_jobs(whole)
    ours = [replace(whole, side=variant) for variant in variants]
    costs = measure_interleaved([*ours, *few], args.repeats, args.budget)
    twin = combine(whole, few, costs[len(ours) :], note)
    rows = []
    for variant, cost in zip([*variants] or ["-"], costs[: len(ours)] or [Cost()], strict=True):
        rows.append(
            {
                "mode": mode,
                "hidden": hidden,
                "variant": variant,
                "ours": asdict(cost),
                "twin": asdict(twin),
                "ratio": twin.seconds / cost.seconds,
                "target": TARGETS[variant].get(hidden) if mode == "step" and variant in TARGETS else None,
                "memory_ratio": cost.peak / twin.peak,
            }
        )
    return rows


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None or math.isnan(value) else pattern.format(value)


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of times, memory and targets as text."""
    times = ("what", "hidden", "variant", "ours ms", "twin ms", "ratio", "target")
    lines: list[tuple[str, ...]] = [(*times, "ours MB", "twin MB", "memory", "target", "base MB", "twin's")]
    notes: list[str] = []
    for row in rows:
        ours, twin = row["ours"], row["twin"]
        mark = ""
        for side in (ours, twin):
            if side["note"]:
                notes += [] if side["note"] in notes else [side["note"]]
                mark += f"[{notes.index(side['note']) + 1}]"
        lines.append(
            (
                row["mode"] + mark,
                "x".join(map(str, row["hidden"])),
                row["variant"],
                _number(1e3 * ours["seconds"], "{:.1f}"),
                _number(1e3 * twin["seconds"], "{:.0f}"),
                _number(row["ratio"], "{:.1f}"),
                _number(row["target"], ">= {}"),
                _number(ours["peak"] / 2**20, "{:.0f}"),
                _number(twin["peak"] / 2**20, "{:.0f}"),
                _number(row["memory_ratio"], "{:.2f}"),
                f"<= {MEMORY_TARGET}",
                _number(ours["base"] / 2**20, "{:.0f}"),
                _number(twin["base"] / 2**20, "{:.0f}"),
            )
        )
    return "\n".join([_align(lines), *(f"[{i + 1}] {note}" for i, note in enumerate(notes))])


def _align(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def measure_ceilings(threads: int, seconds: float) -> dict[str, float]:
    """Measure the machine in a fresh process."""
    context = multiprocessing.get_context("spawn")
    connection, child = context.Pipe()
    process = context.Process(target=_ceiling_worker, args=(child, threads, seconds), daemon=True)
    process.start()
    child.close()
    try:
        rates: dict[str, float] = connection.recv()
    finally:
        process.join(10)
    return rates


def add_floor(rows: Sequence[dict[str, Any]], matmul: float) -> str:
    """Set the arithmetic floor of our step, flops / ceiling of a large product, beside its time."""
    lines = [("step", "variant", "GFLOP", "floor ms", "ours ms", "ratio")]
    for row in rows:
        if row["mode"] == "step" and row["variant"] in VARIANTS:
            shared = row["variant"] == "shared"
            flops = ceilings.step_flops([1, *row["hidden"], 1], CONTEXT, TARGET, SAMPLES, shared)
            row["floor_seconds"] = flops / (1e9 * matmul)
            floor, ours = 1e3 * row["floor_seconds"], 1e3 * row["ours"]["seconds"]
            name = "x".join(map(str, row["hidden"]))
            ratio = _number(ours / floor, "{:.1f}")
            lines.append((name, row["variant"], f"{flops / 1e9:.2f}", f"{floor:.1f}", _number(ours, "{:.1f}"), ratio))
    return _align(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the smallest width, three rounds, short ceilings")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side (default 2)")
    parser.add_argument("--twin", choices=("published", "lean"), default="published", help="see benchmarks/twin.py")
    parser.add_argument("--twin-only", action="store_true", help="leave our side out")
    parser.add_argument("--hidden", action="append", help="only this width, as 50,50; may be given again")
    parser.add_argument("--mode", choices=("step", "predict"), help="only this one")
    parser.add_argument("--repeats", type=int, default=5, help="rounds after the first (default 5)")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds after which a cell starts no new round")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats, args.budget, args.hidden = 3, 15.0, args.hidden or ["50,50"]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write the numbers to a file if asked."""
    args = _arguments(argv)
    hiddens = [tuple(int(d) for d in h.split(",")) for h in args.hidden] if args.hidden else list(HIDDEN)
    modes: list[Mode] = [args.mode] if args.mode else ["step", "predict"]
    variants = [] if args.twin_only else list(VARIANTS)
    print(
        f"float64, {args.threads} threads, torch {torch.__version__}, {platform.machine()}; twin: {args.twin}; "
        f"load before the start {os.getloadavg()[0]:.2f}.\n"
        f"Step: forward and backward, {len(CONTEXT)} tasks, {SAMPLES} samples. "
        f"Prediction: one task, {PREDICT_SAMPLES} samples, {PREDICT_TARGET} targets.\n"
        "MB: peak above the size after the imports (base MB).",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    for hidden in hiddens:
        for mode in modes:
            rows += run_cell(mode, hidden, variants, args)
            print(format_rows(rows[-max(1, len(variants)) :]), flush=True)
    rates = measure_ceilings(args.threads, 0.05 if args.quick else 1.0)
    print("\n" + format_rows(rows))
    print("\nCeilings, GFLOP/s: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))
    if variants:
        print("\nArithmetic floor (dominant flops at the rate of a large product)\n" + add_floor(rows, rates["matmul"]))
    if args.json is not None:
        settings = {
            "threads": args.threads,
            "twin": args.twin,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        args.json.write_text(json.dumps({"settings": settings, "rows": rows, "ceilings": rates}, indent=1))


if __name__ == "__main__":
    main()
