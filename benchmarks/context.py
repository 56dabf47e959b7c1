"""Memory and time against the size of one context: all at once, in batches, and the naive twin.

Run `python -m benchmarks.context` on a machine that does nothing else; `--json FILE --resume` goes on where a run was
stopped. One task with N points is conditioned on, and one training step is taken with N context points and 100 targets,
for N from 10^2 to 10^6. Every cell lives in a fresh process of its own, so that its peak memory is its own: the largest
resident size above the size after the imports. The points are a formula of their number, so that arrays, a file and a
generator hold the same ones and none of them has to be whole in memory.

A pass that would not fit is not run; the table then says how much it would need.

Resident size holds more than what is in use: glibc keeps freed blocks below 32 MB and fits new ones in badly, by an amount
that differs from run to run by a half. `--steady` has it give blocks from 1 MiB on back at once: memory then repeats
within a few per cent, at up to twice the time. So take times from a run without it, memory from a run with it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.step import ROOM, TURN_SECONDS, VARIANTS, _align, _available_memory, _largest_resident, _resident
from benchmarks.twin import Twin

SIZES = (10**2, 10**3, 10**4, 10**5, 10**6)
HIDDEN = (64, 64)
SAMPLES, TARGETS = 16, 100
REFERENCE_SIZE, SLOPE_FROM = 10**3, 10**4
M_MMAP_THRESHOLD = -3  # its number in glibc's malloc.h
START_LIMIT = 300.0  # seconds for a process to come up and import
# Peak bytes for each context point when all of them are taken at once (measured): a guard, not a result.
BYTES_PER_POINT = {
    "condition": {"per_unit": 6.0e4, "shared": 4.0e4},
    "step": {"per_unit": 1.5e5, "shared": 1.5e5},
}
# Peak bytes of the twin, c + b N + a N^2 as (c, b, a): its dense N x N noise precisions are the last part (measured).
TWIN_BYTES = {
    "condition": {"published": (9.0e7, 1.75e6, 8.5e3), "lean": (9.0e7, 1.07e6, 8.7e3)},
    "step": {"published": (2.9e8, 2.8e6, 2.55e4), "lean": (4.2e8, 0.0, 1.86e4)},
}

Points = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Cell:
    """Name one measurement.

    Arguments:
        what: "condition" or "step".
        prior: a key of `VARIANTS`; for the twin, which has one prior only, its style.
        how: "full", "batched", "file" (a memory-mapped one, read in batches), "generator" (makes a batch when asked) or "twin".
        size: number of context points N.
    """

    what: str
    prior: str
    how: str
    size: int


@dataclass(frozen=True)
class Settings:
    """Hold what is the same in all cells of a run."""

    batch: int
    threads: int
    steady: bool = False


@dataclass(frozen=True)
class Result:
    """Hold what was found: seconds of one repeat, peak bytes above `base`, bytes after the imports.

    The status is "done", "over" (the time limit; `peak` is then that until the end), "failed" or "not run" (`needs` bytes).
    """

    status: str
    seconds: float = math.nan
    peak: float = math.nan
    base: float = math.nan
    limit: float = math.nan
    needs: float = math.nan
    note: str = ""


# --- inside the measuring process -----------------------------------------------------------------------------------


def points(start: int, stop: int) -> Points:
    """Return points number `start` to `stop` (not included) of the one data set of this benchmark, both with shape (n, 1)."""
    n = np.arange(start, stop, dtype=np.float64)[:, None]
    x = 4.0 * (n * 0.6180339887498949 % 1.0) - 2.0
    return x, np.sin(3.0 * x) + 0.2 * (n * 0.4142135623730951 % 1.0 - 0.5)


def batches(size: int, batch: int) -> Iterator[Points]:
    """Yield the data set in batches that are made when asked for."""
    for start in range(0, size, batch):
        yield points(start, min(start + batch, size))


def write_points(path: Path, size: int, batch: int) -> None:
    """Write the data set to a file, one row [x, y] for each point, batch by batch."""
    with path.open("wb") as file:
        for x, y in batches(size, batch):
            np.concatenate([x, y], axis=1).tofile(file)


def our_work(cell: Cell, batch: int, path: Path) -> Callable[[], object]:
    """Return what one repeat of a cell of ours does; the file of points is at `path` where the cell reads one."""
    # Imported here: the twin's process never loads the package, so its memory and settings stay its own.
    import bnnp
    from bnnp import networks
    from bnnp.tasks import TaskBatch, collate

    networks.CONTEXT_BYTES = 2**62  # "full" is all points at once, which the package itself would not do with so many
    model = bnnp.BNNP(x_dim=1, y_dim=1, hidden=HIDDEN, last_layer="amortised", **VARIANTS[cell.prior]).double()
    in_batches: dict[str, Any] = {} if cell.how == "full" else {"context_batch_size": batch}
    if cell.what == "step":
        task = TaskBatch(*(collate([points(*ends)]) for ends in ((0, cell.size), (cell.size, cell.size + TARGETS))))
        generator = torch.Generator().manual_seed(0)

        def step() -> object:
            model.zero_grad(set_to_none=True)
            loss = -bnnp.objectives.pp_avi(model, task, num_samples=SAMPLES, generator=generator, **in_batches).mean()
            torch.autograd.backward(loss)
            return loss

        return step
    if cell.how == "generator":
        return lambda: model.condition(lambda: batches(cell.size, batch), num_samples=SAMPLES)
    if cell.how == "file":
        rows = np.memmap(path, dtype=np.float64, mode="r", shape=(cell.size, 2))
        return lambda: model.condition(rows[:, :1], rows[:, 1:], num_samples=SAMPLES, **in_batches)
    xc, yc = points(0, cell.size)
    return lambda: model.condition(xc, yc, num_samples=SAMPLES, **in_batches)


def twin_work(cell: Cell) -> Callable[[], object]:
    """Return what one repeat of the twin does; its conditioning ends with a prediction at one point, it has no other way."""
    twin = Twin(1, 1, HIDDEN, style="lean" if cell.prior == "lean" else "published")
    xc, yc, xt, yt = (torch.from_numpy(v) for ends in ((0, cell.size), (cell.size, cell.size + TARGETS)) for v in points(*ends))
    generator = torch.Generator().manual_seed(0)

    def step() -> object:
        twin.zero_grad(set_to_none=True)
        loss = twin.step([(xc, yc, xt, yt)], SAMPLES, generator)
        torch.autograd.backward(loss)
        return loss

    return step if cell.what == "step" else lambda: twin.predict(xc, yc, xt[:1], SAMPLES, generator)


def _peak(process: str = "self") -> float:
    """Return the largest resident size of a process so far.

    Not from `getrusage` where there is a choice: on Linux a new process inherits its parent's peak there.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
        return 1024.0 * float(status.split("VmHWM:", 1)[1].split()[0])
    except (OSError, IndexError):
        return _largest_resident() if process == "self" else math.nan


def _forget_peak() -> None:
    """Let the peak start from the present size, so that what the imports needed for a moment is not counted."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # another system: the peak then includes the imports


def _allocator() -> Any:
    """Return the C library if its allocator can be told when to give memory back, or None."""
    library = ctypes.CDLL(None) if os.name == "posix" else None
    return library if hasattr(library, "mallopt") else None


def _timed(work: Callable[[], object]) -> float:
    """Return the seconds of one repeat: the first one where it is long, otherwise the mean of a turn after it."""
    start = time.perf_counter()
    work()
    first = time.perf_counter() - start
    if first > 4 * TURN_SECONDS:
        return first
    start, done, seconds = time.perf_counter(), 0, 0.0
    while seconds < TURN_SECONDS:
        work()
        done, seconds = done + 1, time.perf_counter() - start
    return seconds / done


def _end_with_parent() -> None:
    """Wait for the parent to end, then end too: who stops a run must not leave an hour of work behind in the background."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _worker(connection: Any, cell: Cell, settings: Settings, path: Path) -> None:
    """Send the size after the imports, then seconds and peak."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(settings.threads)
    if settings.steady and _allocator().mallopt(M_MMAP_THRESHOLD, 2**20) != 1:
        raise RuntimeError("Expected an allocator that takes a threshold. Got a refusal. Leave --steady out.")
    if cell.how != "twin":
        import bnnp  # noqa: F401  # before the base is taken, see our_work
    _forget_peak()
    base = _resident()
    connection.send(base)
    work = twin_work(cell) if cell.how == "twin" else our_work(cell, settings.batch, path)
    seconds = _timed(work)
    connection.send((seconds, _peak() - base))


# --- the parent ------------------------------------------------------------------------------------------------------


def measure(cell: Cell, settings: Settings, limit: float) -> Result:
    """Measure one cell in a fresh process, which is ended after `limit` seconds of work."""
    context = multiprocessing.get_context("spawn")
    connection, child = context.Pipe()
    base = math.nan
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "points"
        if cell.how == "file":
            write_points(path, cell.size, settings.batch)
        process = context.Process(target=_worker, args=(child, cell, settings, path), daemon=True)
        process.start()
        child.close()
        try:
            if not connection.poll(START_LIMIT):
                return Result("failed", note=f"no start within {START_LIMIT:.0f} s")
            base = connection.recv()
            if not connection.poll(limit):
                return Result("over", peak=_peak(str(process.pid)) - base, base=base, limit=limit)
            seconds, peak = connection.recv()
            return Result("done", seconds, peak, base, limit)
        except EOFError:
            process.join(5)
            return Result("failed", base=base, limit=limit, note=f"process ended with code {process.exitcode}")
        finally:
            process.terminate()
            process.join()


def needed_bytes(cell: Cell, known: Mapping[Cell, Result]) -> float:
    """Return the bytes that a cell is expected to need, 0 for those whose memory does not grow with N.

    For a full pass: the line through the two largest that were measured, or `BYTES_PER_POINT`.
    """
    if cell.how == "twin":
        constant, linear, square = TWIN_BYTES[cell.what][cell.prior]
        return constant + linear * cell.size + square * cell.size**2
    if cell.how != "full":
        return 0.0
    done = sorted((c.size, r.peak) for c, r in known.items() if replace(c, size=cell.size) == cell and r.status == "done")
    if len(done) < 2:
        return BYTES_PER_POINT[cell.what][cell.prior] * cell.size
    (n0, m0), (n1, m1) = done[-2:]
    return m1 + (m1 - m0) / (n1 - n0) * (cell.size - n1)


def cells_of(sizes: Sequence[int], priors: Sequence[str], whats: Sequence[str], twin: str | None) -> list[Cell]:
    """Return what is to be measured, small sizes first: the guard learns from them."""
    cells = []
    for size in sorted(set(sizes)):
        for what in whats:
            for prior in priors:
                hows = ["batched", "full"] + (["file", "generator"] if what == "condition" and size == max(sizes) else [])
                cells += [Cell(what, prior, how, size) for how in hows]
            cells += [] if twin is None else [Cell(what, twin, "twin", size)]
    return cells


def is_kept(result: Result | None, limit: float) -> bool:
    """Say whether a result of an earlier run stands: it was measured, or ran out of at least as much time."""
    return result is not None and (result.status == "done" or (result.status == "over" and result.limit >= limit))


def run(
    cells: Sequence[Cell],
    settings: Settings,
    limit: float,
    known: Mapping[Cell, Result],
    keep: Callable[[Mapping[Cell, Result]], None],
) -> dict[Cell, Result]:
    """Measure what is not known yet, say so line by line, and call `keep` after every cell."""
    results = dict(known)
    for cell in cells:
        name = f"{cell.what} {cell.prior} N = {cell.size:,} {cell.how}"
        if is_kept(results.get(cell), limit):
            print(f"{name}: known", flush=True)
            continue
        needs = needed_bytes(cell, results)
        if needs > ROOM * _available_memory():
            results[cell] = Result("not run", needs=needs)
        else:
            results[cell] = measure(cell, settings, limit)
        seconds, above, whole = words(results[cell])
        print(f"{name}: " + (f"{seconds} s, {above} MB, in all {whole} MB" if whole else f"{seconds} {above}"), flush=True)
        keep(results)
    return results


# --- words and files --------------------------------------------------------------------------------------------------


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _gib(value: float) -> str:
    return f"{value / 2**30:,.0f}" if value >= 10 * 2**30 else f"{value / 2**30:.1f}"


def words(result: Result | None) -> tuple[str, str, str]:
    """Return seconds, MB above the imports, and MB of the whole process, in words."""
    if result is None:
        return "-", "-", "-"
    if result.status == "not run":
        return "not run:", f"needs about {_gib(result.needs)} GiB", ""
    if result.status == "failed":
        return "failed:", result.note, ""
    more = ">= " if result.status == "over" else ""
    above, whole = (f"{more}{v / 2**20:,.0f}" for v in (result.peak, result.peak + result.base))
    return f"over {result.limit:.0f}" if more else _seconds(result.seconds), above, whole


def format_table(results: Mapping[Cell, Result]) -> str:
    """Return all that is known as text: a line for each size, and for each way of reading a file or a generator."""
    heads = ("what", "prior", "N", "from", "full s", "MB", "total", "batched s", "MB", "total", "twin s", "MB", "total")
    lines: list[tuple[str, ...]] = [heads]
    for what in dict.fromkeys(c.what for c in results):
        for prior in dict.fromkeys(c.prior for c in results if c.how != "twin"):
            for size in sorted({c.size for c in results}):
                full, batched, file, generator = (
                    results.get(Cell(what, prior, how, size)) for how in ("full", "batched", "file", "generator")
                )
                twin = next((r for c, r in results.items() if (c.what, c.how, c.size) == (what, "twin", size)), None)
                if full is not None or batched is not None:
                    lines.append((what, prior, f"{size:,}", "arrays", *words(full), *words(batched), *words(twin)))
                for name, result in (("file", file), ("generator", generator)):
                    if result is not None:
                        lines.append((what, prior, f"{size:,}", name, "", "", "", *words(result), "", "", ""))
    return _align(lines)


def summarise(results: Mapping[Cell, Result]) -> dict[str, dict[str, float]]:
    """Return the figures that say whether batches do what they are for, for each kind of batched cell.

    "memory": peak above the imports at the largest N over that from arrays at 10^3; "memory_of_many": over that at 10^4, for a
    context of one batch has no sums to add up; "slope": that of log seconds against log N, least squares from N = 10^4 on. Where
    10^3 or 10^4 was left out, the smallest N above it takes its place; where there are too few cells, the figure is missing.
    """
    found: dict[str, dict[str, float]] = {"memory": {}, "memory_of_many": {}, "slope": {}}
    done = {c: r for c, r in results.items() if r.status == "done" and c.how in ("batched", "file", "generator")}
    for what, prior, how in dict.fromkeys((c.what, c.prior, c.how) for c in done):
        name = f"{what} {prior}" + ("" if how == "batched" else f" from a {how}")
        own = sorted(((c.size, r) for c, r in done.items() if (c.what, c.prior, c.how) == (what, prior, how)), key=itemgetter(0))
        arrays = sorted((c.size, r.peak) for c, r in done.items() if (c.what, c.prior, c.how) == (what, prior, "batched"))
        for key, least in (("memory", REFERENCE_SIZE), ("memory_of_many", SLOPE_FROM)):
            size, peak = next(((n, m) for n, m in arrays if n >= least), (own[-1][0], 0.0))
            if size < own[-1][0]:
                found[key][name] = own[-1][1].peak / peak
        logs = [(math.log(n), math.log(r.seconds)) for n, r in own if n >= SLOPE_FROM]
        if len(logs) > 1:
            found["slope"][name] = float(np.polyfit([n for n, _ in logs], [t for _, t in logs], 1)[0])
    return found


def format_summary(results: Mapping[Cell, Result]) -> str:
    """Return `summarise` as two lines."""
    found = summarise(results)
    many = {name: f" ({value:.2f})" for name, value in found["memory_of_many"].items()}
    memory = "; ".join(f"{name} {value:.2f}{many.get(name, '')}" for name, value in found["memory"].items()) or "-"
    slope = "; ".join(f"{name} {value:.2f}" for name, value in found["slope"].items()) or "-"
    return (
        f"Memory of batches at the largest N over that at N = {REFERENCE_SIZE:,}, in brackets at N = {SLOPE_FROM:,} "
        f"(flat if near 1): {memory}\n"
        f"Slope of log seconds of batches against log N from N = {SLOPE_FROM:,} on (linear if near 1): {slope}"
    )


def _header(settings: Settings) -> dict[str, Any]:
    fixed = {"hidden": list(HIDDEN), "samples": SAMPLES, "targets": TARGETS}
    return {**asdict(settings), **fixed, "torch": torch.__version__, "machine": platform.machine()}


def save(path: Path, settings: Settings, results: Mapping[Cell, Result]) -> None:
    """Write all results to a JSON file, whole or not at all; numbers that are not there are null."""
    from bnnp.checkpoint import write_atomically  # not at the top, see our_work

    rows = [{**asdict(cell), **asdict(result)} for cell, result in results.items()]
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    whole = {"settings": _header(settings), "cells": plain, "summary": summarise(results)}
    write_atomically(path, json.dumps(whole, indent=1).encode())


def load(path: Path, settings: Settings) -> dict[Cell, Result]:
    """Read what `save` wrote.

    Raises:
        ValueError: it is another file, or was measured with other settings.
    """
    try:
        whole = json.loads(path.read_text())
        header: dict[str, Any] = whole["settings"]
        rows: list[dict[str, Any]] = whole["cells"]
        names = tuple(Cell.__dataclass_fields__)
        cells = [Cell(**{k: row.pop(k) for k in names}) for row in rows]
        for row in rows:
            row.update({k: math.nan for k, v in row.items() if v is None})
        results = [Result(**row) for row in rows]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"Expected {path} as an earlier run wrote it. Got {error!r}. Give another file, or leave --resume out.") from None
    other = {k: header.get(k) for k, v in _header(settings).items() if header.get(k) != v}
    if other:
        raise ValueError(f"Expected {path} with the settings of this run. Got {other} there. Give these, or another file.")
    return dict(zip(cells, results, strict=True))


def _size(word: str) -> int:
    try:
        value = float(word)
        if value >= 1 and value == int(value):
            return int(value)
    except (OverflowError, ValueError):
        pass
    raise argparse.ArgumentTypeError(f"Expected a positive whole number, such as 1000 or 1e3. Got {word!r}.")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=_size, nargs="+", default=list(SIZES), help="numbers of context points (default 1e2 ... 1e6)")
    parser.add_argument("--priors", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), help="default both")
    parser.add_argument("--what", nargs="+", choices=("condition", "step"), default=["condition", "step"], help="default both")
    parser.add_argument("--batch", type=_size, default=1000, help="context points in a batch (default 1,000)")
    parser.add_argument("--threads", type=_size, default=2, help="threads of each process (default 2)")
    parser.add_argument("--twin", choices=("published", "lean", "none"), default="published", help="see benchmarks/twin.py, or none")
    parser.add_argument("--steady", action="store_true", help="freed blocks go back at once: memory repeats, times are longer")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which a cell is given up (default 900)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file, after every cell")
    parser.add_argument("--resume", action="store_true", help="keep what the file of --json already holds")
    args = parser.parse_args(argv)
    if args.resume and args.json is None:
        parser.error("Expected --json FILE with --resume. Got none. Name the file of the run that is to go on.")
    if args.steady and _allocator() is None:
        parser.error("Expected glibc with --steady. Got another C library. Leave it out.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and the two lines, and write the numbers to a file if asked."""
    args = _arguments(argv)
    settings = Settings(args.batch, args.threads, args.steady)
    known: dict[Cell, Result] = {}
    if args.resume and args.json.exists():
        try:
            known = load(args.json, settings)
        except ValueError as error:
            raise SystemExit(str(error)) from None
    print(
        f"float64, {args.threads} threads, torch {torch.__version__}, {platform.machine()}; batches of {args.batch:,}; twin: {args.twin}; "
        f"{'freed memory given back at once; ' if args.steady else ''}load before the start {os.getloadavg()[0]:.2f}.\n"
        f"One task, hidden {HIDDEN}, {SAMPLES} samples. Step: forward and backward, {TARGETS} targets. MB: peak above the size after "
        "the imports;\ntotal: of the whole process. The twin has one prior, shown beside both of ours.",
        flush=True,
    )

    def keep(results: Mapping[Cell, Result]) -> None:
        if args.json is not None:
            save(args.json, settings, results)

    cells = cells_of(args.sizes, args.priors, args.what, None if args.twin == "none" else args.twin)
    results = run(cells, settings, args.limit, known, keep)
    keep(results)
    asked = {cell: results[cell] for cell in cells}
    print("\n" + format_table(asked) + "\n\n" + format_summary(asked))


if __name__ == "__main__":
    main()
