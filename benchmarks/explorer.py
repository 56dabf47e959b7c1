"""How long a change in the explorer takes, as the server sees it: `python -m benchmarks.explorer`.

A change is made, the posterior found, and band, mean and curves read off on a grid of 200 inputs, as for a page. Adding is an online
update, or conditions afresh where too few particles would count; moving and removing condition afresh. With one thread, processor time is
what a free core would take: on a machine that does other work, look at that.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import bnnp
from bnnp.explorer.session import Session
from bnnp.explorer.subject import Subject
from bnnp.explorer.wire import plain
from bnnp.runs import Run

__all__ = ["main", "measure"]

SIZES = (5, 20, 100, 1000)
LIMIT = 0.1


def _session(prior: str, tied: bool, samples: int, dtype: str) -> Session:
    model = bnnp.BNNP(1, 1, hidden=(64, 64), prior=prior, activation="tanh", shared_noise=tied, factor_dtype=dtype)
    session = Session(Subject(Run.of(model)), samples)
    return session


def _fill(session: Session, n: int) -> None:
    session.apply("clear", {})
    x = np.random.default_rng(n).uniform(-2, 2, (n, 1))
    session.apply("paint", {"x": x.tolist(), "y": np.sin(2 * x).tolist()})


def _times(change: Callable[[int], None], session: Session, repeats: int, n: int) -> list[tuple[float, float]]:
    """Return seconds and processor seconds of a change and of its answer, as it goes out, each from the same number of points."""
    found = []
    for k in range(repeats + 1):
        _fill(session, n)
        session.posterior()
        start = time.perf_counter(), time.process_time()
        change(k)
        json.dumps(session.answer())
        found.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return found[1:]


def measure(session: Session, n: int, repeats: int, only: tuple[str, ...] = ("add", "move", "remove")) -> dict[str, list[float]]:
    """Return median and 95 % quantile of the seconds, and the same of processor seconds, of add, move and remove at n points."""

    def add(k: int) -> None:
        session.apply("add", {"x": [0.01 * k], "y": [float(np.sin(0.02 * k))]})

    def move(k: int) -> None:
        session.apply("move", {"index": 0, "x": [0.01 * k], "y": [0.5]})

    def remove(k: int) -> None:
        session.apply("remove", {"indices": [k % n]})

    changes, found = {"add": add, "move": move, "remove": remove}, {}
    for name in only:
        both = np.array(_times(changes[name], session, repeats, n))
        found[name] = [float(f) for column in both.T for f in (np.median(column), np.quantile(column, 0.95))]
    return found


def _largest(session: Session, repeats: int) -> int:
    """Return about the largest number of points at which moving one takes less processor time than the limit."""
    low, high = 0, 0
    for n in (2**k for k in range(2, 13)):
        if measure(session, n, repeats, ("move",))["move"][2] > LIMIT:
            high = n
            break
        low = n
    while high - low > max(2, low // 10):
        middle = (low + high) // 2
        low, high = (middle, high) if measure(session, middle, repeats, ("move",))["move"][2] <= LIMIT else (low, middle)
    return low


def main(arguments: list[str] | None = None) -> int:
    """Print the tables and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--largest", action="store_true", help="also find the largest number of points below 100 ms")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"hidden (64, 64), {options.samples} samples, {options.threads} thread(s)")
    print(f"ms: median (95 %) of {options.repeats}, wall | processor")
    rows: list[tuple[str, str, bool, str]] = [
        ("what `bnnp fit` makes: matrix_normal, one noise per point, float32", "matrix_normal", True, "float32"),
        ("shared, one noise per point", "shared", True, "float64"),
        ("the same in float32", "shared", True, "float32"),
        ("diagonal, one noise per point", "diagonal", True, "float64"),
        ("per_unit", "per_unit", False, "float64"),
    ]
    for name, prior, tied, dtype in rows:
        session = _session(prior, tied, options.samples, dtype)
        print(f"\n{name}\n{'points':>7}  {'add':>25}  {'move':>25}  {'remove':>25}")
        for n in SIZES:
            found = measure(session, n, options.repeats if n < 1000 else max(3, options.repeats // 4))
            ms = [[1e3 * v for v in row] for row in found.values()]
            cells = "  ".join(f"{a:>5.0f} ({b:>4.0f}) | {c:>4.0f} ({d:>4.0f})" for a, b, c, d in ms)
            print(f"{n:>7}  {cells}", flush=True)
        if options.largest:
            print(f"moving one takes under {1e3 * LIMIT:.0f} ms of a processor up to about {_largest(session, 5)} points", flush=True)
        print(f"while dragged, at {SIZES[-1]} points: {_preview(session)}", flush=True)
    return 0


def _preview(session: Session) -> Any:
    """Say how a drag is answered where conditioning in full takes long."""
    _fill(session, SIZES[-1])
    session.posterior()
    session.apply("move", {"index": 0, "x": [0.0], "y": [0.5], "gesture": "g"})
    start = time.perf_counter()
    answer = session.answer(preview=True)
    return f"{answer['particles']} particles in {plain(1e3 * (time.perf_counter() - start), 3)} ms"


if __name__ == "__main__":
    sys.exit(main())
