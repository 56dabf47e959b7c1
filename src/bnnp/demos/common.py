"""What the demos share: a second process, resumable training, paired comparisons, and the tables and files they end with.

A demo is a function `run(out, steps, seed, progress)` that returns a `DemoResult` and leaves results.json, results.md, pictures and the
trained model in a folder. Nothing global is set in the caller's process; a worker process sets its own number of threads.
"""

from __future__ import annotations

import _thread
import importlib
import importlib.util
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from bnnp import BNNP, TrainResult, meta_train
from bnnp.checkpoint import write_atomically

__all__ = [
    "DemoResult",
    "Scores",
    "Table",
    "Worker",
    "comparison",
    "difference_table",
    "joint_table",
    "mean_and_error",
    "other_table",
    "per_point",
    "plain_comparison",
    "plain_scores",
    "read_arrays",
    "require",
    "run_folder",
    "say",
    "serve",
    "steps_done",
    "train",
    "verdict",
    "write_arrays",
]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
# method -> condition, such as "10 % seen" -> score -> one value per task. "coverage" holds one row of shares per level.
Scores: TypeAlias = Mapping[str, Mapping[str, Mapping[str, FloatArray]]]

LEVELS = (0.5, 0.8, 0.95)
BOOTSTRAP = """
import json, sys
job = json.loads(sys.stdin.readline())
sys.path[:] = job["path"]
from bnnp.demos.common import serve
serve(job)
"""
STOP_AGAIN_SECONDS = 8.0
STOP_SECONDS = 60.0  # a worker that is told to stop writes a checkpoint first


@dataclass(frozen=True)
class Table:
    """Hold a table of text.

    Arguments:
        title: what it shows, with units.
        header: names of the columns, the first of which names the rows.
        rows: cells, each row as long as the header.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Return the table as Markdown, its title above it."""
        lines = [self.header, ("---", *("---:" for _ in self.header[1:])), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in lines)


@dataclass(frozen=True, eq=False)
class DemoResult:
    """Hold what a demo found and where it left it.

    Arguments:
        out: the folder.
        results: everything as plain Python, ready for JSON.
        tables: for people.
        remarks: sentences that say what the numbers mean.
        pictures: file and what it shows.
    """

    out: Path
    results: dict[str, Any]
    tables: tuple[Table, ...]
    remarks: tuple[str, ...]
    pictures: tuple[tuple[Path, str], ...]

    def markdown(self) -> str:
        """Return tables, remarks and pictures as a Markdown page."""
        parts = [f"# Results of the demo: {self.results['dataset']}", *(table.markdown() for table in self.tables)]
        parts += ["\n".join(f"- {remark}" for remark in self.remarks)]
        parts += [f"![{what}]({path.relative_to(self.out).as_posix()})\n\n{what}" for path, what in self.pictures]
        return "\n\n".join(parts) + "\n"

    def write(self) -> None:
        """Write results.json and results.md, each whole or not at all."""
        write_atomically(self.out / "results.json", (json.dumps(self.results, indent=1, allow_nan=False) + "\n").encode())
        write_atomically(self.out / "results.md", self.markdown().encode())


def say(shown: bool, text: str) -> None:
    """Tell the user what happens now, on standard error, where that is wanted."""
    if shown:
        print(text, file=sys.stderr, flush=True)


def require(*packages: str) -> None:
    """Check before the long work that optional packages are there.

    Raises:
        ImportError: one is not installed.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'The demo needs {", ".join(missing)}. Run: pip install "bnnp[demo]".')


def run_folder(out: Path, steps: int, seed: int, fresh: bool) -> Path:
    """Return the folder of the training runs with these settings, emptied if a fresh start is wanted."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"Expected steps as a positive integer. Got {steps!r}.")
    folder = out / "runs" / f"steps-{steps}-seed-{seed}"
    if fresh and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def steps_done(folder: Path) -> int:
    """Return how many steps the checkpoint in a folder has behind it, 0 where there is none."""
    path = folder / "state" / "training.json"
    return int(json.loads(path.read_text())["state"]["step"]) if path.exists() else 0


def train(
    model: BNNP, tasks: Sequence[Any], validation: Sequence[Any], steps: int, folder: Path, progress: bool, **settings: Any
) -> TrainResult:
    """Train, or go on with, the run in a folder; a finished run is only loaded. Arguments as of `bnnp.meta_train`."""
    done = steps_done(folder)
    if done:
        say(progress, f"Using the training run in {folder}: {done} of {steps} steps are done.")
    try:
        return meta_train(
            model,
            tasks,
            validation=validation,
            steps=steps,
            folder=folder,
            resume=True,
            progress=progress,
            validate_every=max(1, steps // 8),
            log_every=max(1, steps // 100),
            checkpoint_every=max(1, steps // 8),
            **settings,
        )
    except ValueError as error:
        if done:
            raise ValueError(f"{error} Or throw the old run away: --fresh (in Python: fresh=True).") from None
        raise


def per_point(history: Sequence[Mapping[str, Any]], points: float) -> list[dict[str, Any]]:
    """Return the records of a training with the objective, a sum over the points of a task, divided by their number."""
    return [{**record, "objective": None if record["objective"] is None else record["objective"] / points} for record in history]


class Worker:
    """Run a function of the package in a second process with one thread, until it returns or the block is left.

    A plain child, not `multiprocessing`: that would import the caller's script again. Its standard input stays open as long as this
    process lives; when it closes, for whatever reason, the worker saves its state and ends.

    Arguments:
        function: a function at the top of a module.
        arguments: strings and numbers.
    """

    def __init__(self, function: Callable[..., None], *arguments: str | int) -> None:
        self._errors = tempfile.TemporaryFile()
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", BOOTSTRAP],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env={**os.environ, **threads},
            start_new_session=True,  # Ctrl-C reaches us alone; the worker is stopped once, by its closed input
        )
        job = {"path": sys.path, "module": function.__module__, "name": function.__qualname__, "arguments": arguments}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()

    def __enter__(self) -> Worker:
        """Return the worker."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the worker if it still runs."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    @property
    def running(self) -> bool:
        """Return whether the function has not yet returned."""
        return self._process.poll() is None

    def wait(self) -> None:
        """Wait until the function has returned.

        Raises:
            RuntimeError: it failed.
        """
        code = self._process.wait()
        if code:
            self._errors.seek(0)
            tail = self._errors.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"The second process, which trains and scores the rivals, failed with code {code}.\n{tail}")


def serve(job: dict[str, Any]) -> None:
    """Run one job; the start of a worker process, and of no use elsewhere."""
    torch.set_num_threads(1)
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        getattr(importlib.import_module(job["module"]), job["name"])(*job["arguments"])
    except KeyboardInterrupt:
        sys.exit(130)


def _follow_parent() -> None:
    """Interrupt this process as Ctrl-C would when its standard input closes."""
    # Not through sys.stdin: a thread that holds its lock when the process ends is a fatal error.
    os.read(0, 1)
    while True:
        _thread.interrupt_main()
        # An interrupt is lost where it falls into a destructor or a callback, so one that had no effect is sent again.
        time.sleep(STOP_AGAIN_SECONDS)


def write_arrays(path: Path, arrays: Mapping[str, FloatArray]) -> None:
    """Write named arrays into one file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def read_arrays(path: Path, prefix: str) -> dict[str, Any]:
    """Return the arrays whose names begin with a prefix, without it."""
    with np.load(path) as file:
        return {name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)}


def mean_and_error(values: FloatArray) -> tuple[float, float]:
    """Return the mean over tasks and its standard error (0 for a single task: nothing is known)."""
    spread = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), spread


def verdict(mean: float, error: float) -> str:
    """Say in words what a paired difference, ours minus the rival's, means: two standard errors count."""
    size = f"{abs(mean):.3f} ± {error:.3f}"
    if abs(mean) <= 2.0 * error:
        return f"no clear difference ({mean:+.3f} ± {error:.3f})"
    return f"{'better' if mean > 0 else 'worse'} by {size}"


def comparison(scores: Scores, ours: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Return rival -> condition -> mean and standard error of the paired difference in joint log-density, ours minus the rival's."""
    rivals = [method for method in scores if method != ours]
    return {
        rival: {name: mean_and_error(scores[ours][name]["joint"] - values["joint"]) for name, values in scores[rival].items()}
        for rival in rivals
    }


def joint_table(scores: Scores, unit: str) -> Table:
    """Return the table of joint log-densities; with more than three conditions, these are the rows."""
    title = f"Log-density of all targets of a task together, per {unit} (higher is better)"
    conditions = tuple(next(iter(scores.values())))
    cells = {(m, c): "{:.3f} ± {:.3f}".format(*mean_and_error(of[c]["joint"])) for m, of in scores.items() for c in conditions}
    if len(conditions) <= 3:
        return Table(title, ("method", *conditions), tuple((m, *(cells[m, c] for c in conditions)) for m in scores))
    return Table(title, ("seen", *scores), tuple((c, *(cells[m, c] for m in scores)) for c in conditions))


def difference_table(scores: Scores, ours: str) -> Table:
    """Return the table of paired differences in joint log-density."""
    rows = [
        (rival if i == 0 else "", name, verdict(*difference))
        for rival, of in comparison(scores, ours).items()
        for i, (name, difference) in enumerate(of.items())
    ]
    return Table("Compared task by task, same unit", ("rival", "seen", f"{ours} is"), tuple(rows))


def other_table(scores: Scores, unit: str) -> Table:
    """Return the other scores, and the share of true values inside central intervals."""
    nominal = " / ".join(f"{100 * level:.0f}" for level in LEVELS)
    header = ("seen", "method", "density, each alone", "CRPS", "RMSE", f"inside {nominal} %")
    rows = []
    for name in next(iter(scores.values())):
        for i, (method, of) in enumerate(scores.items()):
            means = (f"{of[name][key].mean():.3f}" for key in ("marginal", "crps", "rmse"))
            inside = " / ".join(f"{100 * share:.0f}" for share in of[name]["coverage"].mean(0))
            rows.append((name if i == 0 else "", method, *means, inside))
    title = f"Other scores per {unit} (log-density: higher is better; CRPS, RMSE: lower; intervals: as stated)"
    return Table(title, header, tuple(rows))


def plain_scores(scores: Scores) -> dict[str, Any]:
    """Return means and standard errors as plain Python."""
    return {method: {name: _plain_condition(values) for name, values in of.items()} for method, of in scores.items()}


def plain_comparison(scores: Scores, ours: str) -> dict[str, Any]:
    """Return the paired differences as plain Python."""
    compared = comparison(scores, ours)
    return {
        rival: {name: {"mean": mean, "se": error, "verdict": verdict(mean, error)} for name, (mean, error) in of.items()}
        for rival, of in compared.items()
    }


def _plain_condition(values: Mapping[str, FloatArray]) -> dict[str, Any]:
    named = {key: dict(zip(("mean", "se"), mean_and_error(v), strict=True)) for key, v in values.items() if key != "coverage"}
    shares = values["coverage"].mean(0)
    return {**named, "coverage": {f"{level:g}": float(share) for level, share in zip(LEVELS, shares, strict=True)}}
