"""Time and memory of one training step against the width of the network, for every prior.

Run `python -m benchmarks.width` on a machine that does nothing else; `--json FILE --resume` goes on where a run was stopped. The network
has two hidden layers of the same width; a step is the forward and backward pass of PP-AVI and an update by Adam, on 5 tasks of 50
context points and 20 targets with 8 samples. The inference networks have hidden widths (64, 64) throughout.

Every cell lives in a fresh process of its own, which may take so much address space and so much processor time; a prior's widths are
tried from the narrowest on and end at the first that fails. Where other work cannot be kept off the machine, `--cpu` shows processor
time (of all threads) instead of time on the clock: for one thread that comes near to what a quiet machine would show.

Memory is the largest resident size of the whole process, about 0.25 GiB of which is torch. Parameters are in float32; what is
factorised is in float64 or float32, as the row says. The naive twin (benchmarks/twin.py) is in float64 throughout, has one prior,
`per_unit`, and one noise for each point and unit.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.context import START_LIMIT, _end_with_parent, _forget_peak, _peak, points
from benchmarks.step import _resident
from benchmarks.twin import Twin

WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
QUICK_WIDTH = 128
TASKS, SAMPLES, CONTEXT, TARGETS = 5, 8, 50, 20
NET_HIDDEN = (64, 64)
FLOAT32_FROM = 512  # narrower networks are hardly faster in float32
LONG_STEP = 15.0  # a first step that takes longer is the reading
REPEATS, TURN_SECONDS = 3, 1.0
PATIENCE = 3.0  # times as long on the clock as on the processor before a cell is ended
OWN, SHARED = "own noise", "one noise a point"
TWIN = "naive twin"
# (width, seconds): what a step of the priors that are made for wide layers is to stay under.
GOALS = ((512, 1.0), (4096, 20.0))
MADE_FOR_WIDTH = ("shared", "diagonal, tied", "low_rank, tied")


@dataclass(frozen=True)
class Ladder:
    """Name one row of the table.

    Arguments:
        prior: a key of `variants()`, or `TWIN`.
        noise: `OWN`, one pseudo-noise for each point and unit, or `SHARED`.
        dtype: of the factorisations.
    """

    prior: str
    noise: str
    dtype: str


@dataclass(frozen=True)
class Limits:
    """Hold what one cell may take: bytes of address space above those after the imports, and seconds of each thread's processor time."""

    memory: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """Hold what was found: median seconds of a step on the clock and of the processor, peak bytes of the process, number of parameters.

    The status is "done", "memory" (more than it may take), "over" (time) or "failed".
    """

    status: str
    seconds: float = math.nan
    cpu: float = math.nan
    peak: float = math.nan
    parameters: int = 0
    runs: tuple[float, ...] = ()  # seconds of every step, the first included
    note: str = ""


Results = dict[tuple[Ladder, int], Result]


# --- inside the measuring process -----------------------------------------------------------------------------------


def data() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return the tasks (xc, yc, xt, yt) in float64."""
    tasks = []
    for start in range(0, TASKS * (CONTEXT + TARGETS), CONTEXT + TARGETS):
        x, y = (torch.from_numpy(part) for part in points(start, start + CONTEXT + TARGETS))
        tasks.append((x[:CONTEXT], y[:CONTEXT], x[CONTEXT:], y[CONTEXT:]))
    return tasks


def variants() -> dict[str, dict[str, Any]]:
    """Return the priors that are measured: all kinds of the package, and those whose units can share their factor once more like that."""
    from bnnp.priors import PRIORS  # not at the top, see our_step

    tied = {f"{kind}, tied": {"kind": kind, "tied": True} for kind in ("diagonal", "low_rank")}
    return {**{kind: {"kind": kind} for kind in PRIORS}, **tied}


def _optimised(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Callable[[], Tensor], int]:
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        value = loss()
        torch.autograd.backward(value)
        optimiser.step()
        return value.detach()

    return step, sum(p.numel() for p in model.parameters())


def our_step(ladder: Ladder, width: int) -> tuple[Callable[[], Tensor], int]:
    """Return a training step of ours, and the number of the model's parameters."""
    # Imported here: the twin's process never loads the package, so its memory stays its own.
    import bnnp
    from bnnp.tasks import TaskBatch, collate

    hidden, shared = (width, width), ladder.noise == SHARED
    prior = bnnp.Prior(**variants()[ladder.prior])
    model = bnnp.BNNP(1, 1, hidden, prior, shared_noise=shared, net_hidden=NET_HIDDEN, factor_dtype=ladder.dtype)
    parts = [[(task[i].to(model.dtype), task[i + 1].to(model.dtype)) for task in data()] for i in (0, 2)]
    batch = TaskBatch(*(collate(part, dtype=model.dtype) for part in parts))
    generator = torch.Generator().manual_seed(0)
    return _optimised(model, lambda: -bnnp.objectives.pp_avi(model, batch, num_samples=SAMPLES, generator=generator).mean())


def twin_step(width: int) -> tuple[Callable[[], Tensor], int]:
    """Return a training step of the twin, and the number of its parameters."""
    twin, tasks = Twin(1, 1, (width, width), net_hidden=NET_HIDDEN), data()
    generator = torch.Generator().manual_seed(0)
    return _optimised(twin, lambda: twin.step(tasks, SAMPLES, generator))


def timed(step: Callable[[], object]) -> list[tuple[float, float]]:
    """Return the seconds of each step, on the clock and of the processor: the first alone where it is long, otherwise some more."""
    runs: list[tuple[float, float]] = []
    while not runs or (runs[0][1] < LONG_STEP and (len(runs) <= REPEATS or sum(cpu for _, cpu in runs[1:]) < TURN_SECONDS)):
        start = time.perf_counter(), time.process_time()
        step()
        runs.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return runs


def _confine(limits: Limits, threads: int) -> None:
    """Give this process so much more address space and processor time: what asks for more memory gets an error, for more time the end."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + int(limits.memory), resource.getrlimit(resource.RLIMIT_AS)[1]))
    seconds = math.ceil(time.process_time() + threads * limits.seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "bad_alloc" in str(error)


def _worker(connection: Any, ladder: Ladder, width: int, threads: int, limits: Limits) -> None:
    """Send a word when the imports are done, then the result."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if ladder.prior != TWIN:
        import bnnp  # noqa: F401  # before the peak is forgotten
    _forget_peak()
    connection.send(_resident())
    _confine(limits, threads)
    try:
        step, parameters = twin_step(width) if ladder.prior == TWIN else our_step(ladder, width)
        runs = timed(step)
    except (MemoryError, RuntimeError) as error:
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))  # to say so takes memory too
        full = _out_of_memory(error)
        connection.send(Result("memory" if full else "failed", peak=_peak(), note="" if full else f"{type(error).__name__}: {error}"[:300]))
        return
    wall, cpu = (statistics.median(kept) for kept in zip(*(runs[1:] or runs), strict=True))
    connection.send(Result("done", wall, cpu, _peak(), parameters, tuple(seconds for seconds, _ in runs)))


# --- the parent ------------------------------------------------------------------------------------------------------


def measure(ladder: Ladder, width: int, threads: int, limits: Limits) -> Result:
    """Measure one cell in a fresh process, which is ended when its time is over."""
    context = multiprocessing.get_context("spawn")
    connection, child = context.Pipe()
    process = context.Process(target=_worker, args=(child, ladder, width, threads, limits), daemon=True)
    process.start()
    child.close()
    try:
        if not connection.poll(START_LIMIT):
            return Result("failed", note=f"no start within {START_LIMIT:.0f} s")
        connection.recv()
        if not connection.poll(PATIENCE * limits.seconds):
            return Result("over")
        found: Result = connection.recv()
        return found
    except EOFError:
        process.join(5)
        if process.exitcode == -signal.SIGXCPU:
            return Result("over")
        return Result("failed", note=f"process ended with code {process.exitcode}")
    finally:
        process.terminate()
        process.join()


def ladders(priors: Sequence[str], noises: Sequence[str], dtypes: Sequence[str], twin: bool) -> list[Ladder]:
    """Return the rows of the table."""
    rows = [Ladder(prior, noise, dtype) for prior in priors for noise in noises for dtype in dtypes]
    return rows + ([Ladder(TWIN, OWN, "float64")] if twin else [])


def widths_of(ladder: Ladder, widths: Sequence[int]) -> list[int]:
    """Return the widths that a row is tried at, the narrowest first."""
    narrowest = FLOAT32_FROM if ladder.dtype == "float32" and max(widths) >= FLOAT32_FROM else 0
    return [width for width in sorted(set(widths)) if width >= narrowest]


def climb(
    rows: Sequence[Ladder], widths: Sequence[int], threads: int, limits: Limits, known: Mapping[tuple[Ladder, int], Result]
) -> Iterator[tuple[Ladder, int, Result]]:
    """Yield the results of each row up to the first width that fails; what is known is not measured again."""
    for ladder in rows:
        for width in widths_of(ladder, widths):
            result = known.get((ladder, width)) or measure(ladder, width, threads, limits)
            yield ladder, width, result
            if result.status != "done":
                break


# --- words and files --------------------------------------------------------------------------------------------------


def _seconds(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def words(result: Result | None, limits: Limits, clock: str) -> str:
    """Return one cell of the table: seconds and GiB, or why there are none; the clock is "seconds" or "cpu"."""
    if result is None:
        return ""
    if result.status == "done":
        return f"{_seconds(getattr(result, clock))} s, {result.peak / 2**30:.1f}"
    return {"memory": f"> {limits.memory / 2**30:g} GiB", "over": f"> {limits.seconds:g} s"}.get(result.status, "failed")


def format_table(results: Mapping[tuple[Ladder, int], Result], limits: Limits, clock: str) -> str:
    """Return the table as Markdown: one row for each prior, noise and precision, one column for each width."""
    widths = sorted({width for _, width in results})
    lines = [["prior", "noise", "factorised in", *map(str, widths)], ["---"] * (3 + len(widths))]
    for ladder in dict.fromkeys(ladder for ladder, _ in results):
        name = ladder.prior if ladder.prior == TWIN else f"`{ladder.prior}`"
        lines.append([name, ladder.noise, ladder.dtype, *(words(results.get((ladder, width)), limits, clock) for width in widths)])
    notes = [f"{ladder.prior}, {ladder.noise}, {ladder.dtype}, {width}: {r.note}" for (ladder, width), r in results.items() if r.note]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ([""] if notes else []) + notes)


def format_goals(results: Mapping[tuple[Ladder, int], Result], clock: str) -> str:
    """Say whether the priors that are made for wide layers keep their goals, in the faster precision."""
    lines = []
    for width, seconds in GOALS:
        for prior in MADE_FOR_WIDTH:
            own = {ladder: r for (ladder, w), r in results.items() if (ladder.prior, ladder.noise, w) == (prior, SHARED, width)}
            done = {ladder.dtype: getattr(r, clock) for ladder, r in own.items() if r.status == "done"}
            rows = [ladder for ladder, _ in results if (ladder.prior, ladder.noise) == (prior, SHARED)]
            if rows and any(width <= w for _, w in results):
                dtype = min(done, key=lambda d: done[d], default="")
                found = f"{_seconds(done[dtype])} s in {dtype}" if done else "not reached"
                verdict = "yes" if done and done[dtype] < seconds else "no"
                lines.append(f"`{prior}`, {SHARED}, width {width:,} under {seconds:g} s: {verdict} ({found})")
    return "\n".join(lines)


def line_of(header: Mapping[str, Any], ladder: Ladder, width: int, result: Result) -> str:
    """Return one cell as a line of JSON; numbers that are not there are null."""
    row = {**header, **asdict(ladder), "width": width, **asdict(result)}
    return json.dumps({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}) + "\n"


def load(path: Path, header: Mapping[str, Any]) -> Results:
    """Read what earlier runs with the same header wrote into a file of lines.

    Raises:
        ValueError: it is another file.
    """
    found: Results = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            ladder, width = Ladder(*(row[k] for k in Ladder.__dataclass_fields__)), int(row["width"])
            values = {k: math.nan if row[k] is None else row[k] for k in Result.__dataclass_fields__}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Expected {path} as an earlier run wrote it. Got {error!r} in line {number}. Give another file.") from None
        if all(row.get(key) == value for key, value in header.items()):
            found[ladder, width] = Result(**{**values, "runs": tuple(values["runs"])})
    return found


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.width", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"widths up to {QUICK_WIDTH}")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="of both hidden layers (default 16 ... 4096)")
    parser.add_argument("--priors", nargs="+", help="default: all that the package has")
    parser.add_argument("--noise", nargs="+", choices=("own", "shared"), default=["own", "shared"], help="default both")
    parser.add_argument("--dtypes", nargs="+", choices=("float64", "float32"), default=["float64", "float32"], help="default both")
    parser.add_argument("--no-twin", action="store_true", help="leave the naive twin out")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (default 1)")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of address space above the imports (default 8)")
    parser.add_argument("--limit", type=float, default=90.0, help="processor seconds after which a cell is given up (default 90)")
    parser.add_argument("--cpu", action="store_true", help="show processor time")
    parser.add_argument("--json", type=Path, help="append every cell to this file, as a line of JSON")
    parser.add_argument("--resume", action="store_true", help="keep what the file of --json already holds")
    args = parser.parse_args(argv)
    if args.quick:
        args.widths = [width for width in args.widths if width <= QUICK_WIDTH] or [min(args.widths)]
    if args.resume and args.json is None:
        parser.error("Expected --json FILE with --resume. Got none. Name the file of the run that is to go on.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and append the numbers to a file if asked."""
    args = _arguments(argv)
    known_names = tuple(variants())
    priors = args.priors or list(known_names)
    if wrong := [prior for prior in priors if prior not in known_names]:
        sys.exit(f"Expected priors among {', '.join(known_names)}. Got {', '.join(wrong)}.")
    limits = Limits(args.memory * 2**30, args.limit)
    header = {"memory_limit": limits.memory, "seconds_limit": limits.seconds, "threads": args.threads, "torch": torch.__version__}
    known, clock = Results(), "cpu" if args.cpu else "seconds"
    if args.resume and args.json.exists():
        try:
            known = load(args.json, header)
        except ValueError as error:
            raise SystemExit(str(error)) from None
    print(
        f"{args.threads} thread{'s' * (args.threads > 1)}, torch {torch.__version__}, {platform.machine()}; "
        f"load before the start {os.getloadavg()[0]:.2f}.\nOne training step (forward, backward, Adam) of PP-AVI: {TASKS} tasks, {CONTEXT} "
        f"context points, {TARGETS} targets, {SAMPLES} samples;\n{'processor' if args.cpu else 'clock'} seconds, and GiB of the whole "
        "process at its peak (about 0.25 are torch).",
        flush=True,
    )
    rows = ladders(priors, [{"own": OWN, "shared": SHARED}[n] for n in args.noise], args.dtypes, not args.no_twin)
    results: Results = {}
    for ladder, width, result in climb(rows, args.widths, args.threads, limits, known):
        results[ladder, width] = result
        again = "known: " if (ladder, width) in known else ""
        print(f"{ladder.prior}, {ladder.noise}, {ladder.dtype}, width {width}: {again}{words(result, limits, clock)}", flush=True)
        if args.json is not None and not again:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            with args.json.open("a") as file:
                file.write(line_of(header, ladder, width, result))
    print("\n" + format_table(results, limits, clock))
    if goals := format_goals(results, clock):
        print("\n" + goals)


if __name__ == "__main__":
    main()
