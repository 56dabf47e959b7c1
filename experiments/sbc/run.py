"""Calibrate by simulation: the exact case, and models that were meta-trained, each under its own learned prior.

    python -m experiments.sbc.run --out runs/sbc

Each case is one file and is not run again. Writes results.json, table.txt and one picture for each case into --out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bnnp
from bnnp import plots
from bnnp.checkpoint import write_atomically
from experiments.sawtooth.run import trained_model
from experiments.trust.models import gp_model

CONFIG = Path(__file__).parents[1] / "trust" / "config.json"


def linear(_: argparse.Namespace) -> bnnp.BNNP:
    """Return a model of one layer, whose posterior is exact."""
    return bnnp.BNNP(1, 1, hidden=(), prior="per_unit").double()


def sawtooth(args: argparse.Namespace) -> bnnp.BNNP:
    """Return the model that has learned sawtooths."""
    return trained_model(args.sawtooth).double()


def gp(args: argparse.Namespace) -> bnnp.BNNP:
    """Return the model that has learned a squared-exponential Gaussian process."""
    return gp_model(args.gp, json.loads(CONFIG.read_text())["gp"]).double()


CASES: dict[str, tuple[Callable[[argparse.Namespace], bnnp.BNNP], str]] = {
    "exact": (linear, "One layer, exact posterior"),
    "sawtooth": (sawtooth, "Model that has learned sawtooths, data from its own prior"),
    "gp": (gp, "Model that has learned a Gaussian process, data from its own prior"),
}


def measure(model: bnnp.BNNP, points: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return ranks, p-values, mean and spread of the ranks, and the time it took."""
    model.factor_dtype = torch.float64
    start = time.perf_counter()
    known = model.reference.known
    inputs = None if known else lambda g: 4 * torch.rand(points, 1, generator=g) - 2
    size = {"repetitions": args.repetitions, "num_samples": args.num_samples, "batch_size": 10}
    result = bnnp.sbc(model, x=inputs, num_points=points, seed=points, progress=True, **size)
    u = {name: (ranks.double() + 0.5) / (result.num_ranks + 1) for name, ranks in result.ranks.items()}
    return {
        "points": points,
        "num_ranks": result.num_ranks,
        "ranks": {name: ranks.tolist() for name, ranks in result.ranks.items()},
        "p_values": result.p_values,
        "mean": {name: float(v.mean()) for name, v in u.items()},
        "spread": {name: float(v.std() * 12**0.5) for name, v in u.items()},
        "bands": [band.tolist() for band in result.bands],
        "table": result.table(),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Run the experiment from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/sbc"))
    parser.add_argument("--sawtooth", type=Path, default=Path("runs/trust-sawtooth"))
    parser.add_argument("--gp", type=Path, default=Path("runs/trust-gp"))
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--num-samples", type=int, default=99)
    parser.add_argument("--points", type=int, nargs="+", default=[5, 30])
    args = parser.parse_args()
    text = []
    for name, (build, title) in CASES.items():
        for points in args.points:
            file = args.out / f"{name}-{points}.json"
            if not file.exists():
                write_atomically(file, json.dumps(measure(build(args), points, args)).encode())
            found = json.loads(file.read_text())
            heading = f"{title}, {points} points"
            picture = plots.rank_ecdf(found["ranks"], found["num_ranks"], tuple(found["bands"]), found["p_values"], heading)
            plots.save_figure(picture, args.out / f"{name}-{points}.png")
            text.append(f"{heading} ({found['seconds']:.0f} s)\n{found['table']}\n")
            print(text[-1], flush=True)
    write_atomically(args.out / "table.txt", "\n".join(text).encode())


if __name__ == "__main__":
    main()
