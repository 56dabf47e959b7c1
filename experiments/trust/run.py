"""Score two models inside and outside what they have learned, and see which diagnostic of a posterior warns where scores collapse.

    python -m experiments.trust.run --out runs/trust

Resumes where it was stopped: each (model, kind of task) is one file in the folder `tasks`. Writes results.json and pictures into --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bnnp
from bnnp.checkpoint import write_atomically
from bnnp.data.synthetic import Sawtooth, SquaredExponentialGP
from bnnp.plots import save_figure
from bnnp.progress import ProgressLine
from experiments.trust import pictures
from experiments.trust.kinds import Home, Kind, ScoredTask, draw, kinds
from experiments.trust.models import trained_models
from experiments.trust.summary import FIELDS, check_table, summarise, text

Record = dict[str, Any]


def homes(config: dict[str, Any]) -> dict[str, Home]:
    """Return the process that each model has learned."""
    return {"sawtooth": Sawtooth(), "gp": SquaredExponentialGP(**config["gp"]["process"])}


def measure(model: bnnp.BNNP, tasks: Sequence[ScoredTask], num_samples: int, batch_size: int, seed: int) -> Record:
    """Return scores and diagnostics of tasks, one list entry for each.

    Arguments:
        model: that conditions on each context.
        tasks: with the oracle's scores.
        num_samples: particles.
        batch_size: tasks conditioned at once.
        seed: batch number i conditions with seed + i.
    """
    found: Record = {name: [] for name in ("joint", "marginal", "oracle_joint", "oracle_marginal", "points", "sentence", *FIELDS)}
    for i, start in enumerate(range(0, len(tasks), batch_size)):
        batch = tasks[start : start + batch_size]
        posterior = model.condition([t.xc for t in batch], [t.yc for t in batch], num_samples=num_samples, seed=seed + i)
        xt, yt = torch.stack([t.xt for t in batch]), torch.stack([t.yt for t in batch])
        predictive = posterior.predict(xt)
        found["joint"] += (predictive.log_prob(yt, joint=True) / yt.shape[1]).tolist()
        found["marginal"] += predictive.log_prob(yt).mean(-1).tolist()
        found["oracle_joint"] += [t.oracle_joint for t in batch]
        found["oracle_marginal"] += [t.oracle_marginal for t in batch]
        found["points"] += [len(t.xc) for t in batch]
        diagnosis = posterior.diagnose(seed=seed + i)
        for name in FIELDS:
            found[name] += getattr(diagnosis, name).tolist()
        found["sentence"] += list(diagnosis.sentence)
    return found


def digest(model: bnnp.BNNP, config: dict[str, Any]) -> str:
    """Return a short name for everything that a file of measurements depends on, but for the package's own code."""
    state = hashlib.sha256(json.dumps({k: config[k] for k in ("num_targets", "context", "batch_size", "seed")}).encode())
    for key, value in sorted(model.state_dict().items()):
        state.update(key.encode() + value.detach().cpu().numpy().tobytes())
    return state.hexdigest()[:16]


def measured(file: Path, key: str, model: bnnp.BNNP, tasks: Sequence[ScoredTask], num_samples: int, config: dict[str, Any]) -> Record:
    """Return the measurements of tasks from their file, or measure and write it."""
    if file.exists():
        old: Record = json.loads(file.read_text())
        if old["key"] == key and len(old["joint"]) == len(tasks):
            return old
    start = time.process_time()
    record = measure(model, tasks, num_samples, config["batch_size"], config["seed"])
    record |= {"key": key, "cpu_seconds": time.process_time() - start}
    # What is not finite is no proper JSON, but Python's reader takes back what its writer wrote.
    write_atomically(file, json.dumps(record).encode())
    return record


def collect(
    out: Path, models: dict[str, bnnp.BNNP], config: dict[str, Any], progress: bool = True
) -> dict[str, dict[str, dict[str, Record]]]:
    """Measure all kinds with the study's number of particles, and the first tasks of each with other numbers.

    Returns:
        model -> number of particles, or "all" for the study's own -> kind -> record.
    """
    numbers = (config["num_samples"], *config["check_samples"])
    jobs = [(S, name, kind) for S in numbers for name in models for kind in kinds(homes(config)[name])]
    line = ProgressLine(len(jobs), progress)
    found: dict[str, dict[str, dict[str, Record]]] = {name: {} for name in models}
    for done, (S, name, kind) in enumerate(jobs):
        line.show(done, f"{name}, {kind.name}, {S} particles")
        which = "inside" if kind.family == "inside" else "outside"
        tasks = draw(kind, config[f"{which}_tasks"], _seed(config, kind), config, float(models[name].scaling.y_scale))
        few = config[f"check_{which}_tasks"]
        is_main = S == config["num_samples"]
        key, file = digest(models[name], config), out / "tasks" / f"{name}, {kind.name}, {S} particles.json"
        record = {"family": kind.family, **measured(file, key, models[name], tasks if is_main else tasks[:few], S, config)}
        if is_main:
            found[name].setdefault("all", {})[kind.name] = record
            record = {field: v[:few] if isinstance(v, list) else v for field, v in record.items()}
        found[name].setdefault(str(S), {})[kind.name] = record
    line.show(len(jobs), "done")
    line.close()
    return found


def _seed(config: dict[str, Any], kind: Kind) -> int:
    """Return a seed that depends on the kind's name and on nothing else: kinds have tasks of their own, whatever else is run."""
    return int(hashlib.sha256(f"{config['seed']}/{kind.name}".encode()).hexdigest()[:8], 16)


def plain(value: Any) -> Any:
    """Return nested numbers rounded to six digits, for JSON; what is not finite becomes None."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def main() -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/trust"))
    parser.add_argument("--gp", type=Path, default=Path("runs/trust-gp"), help="folder of the model of the Gaussian process")
    parser.add_argument("--sawtooth", type=Path, default=Path("runs/online/sawtooth"), help="folder of the sawtooth model")
    args = parser.parse_args()
    config = json.loads((Path(__file__).parent / "config.json").read_text())
    models = trained_models(args.gp, args.sawtooth, config)
    found = collect(args.out, models, config)
    minutes = (
        sum(record["cpu_seconds"] for by_number in found.values() for n, r in by_number.items() if n != "all" for record in r.values()) / 60
    )
    report = {name: summarise(by_number["all"]) for name, by_number in found.items()}
    particles = {name: check_table({S: r for S, r in by_number.items() if S != "all"}) for name, by_number in found.items()}
    write_atomically(
        args.out / "results.json", json.dumps(plain({"cpu_minutes": minutes, "models": report, "particles": particles}), indent=1).encode()
    )
    for name, by_number in found.items():
        save_figure(pictures.scatter(by_number["all"], report[name], name), args.out / f"regret-{name}.png")
    save_figure(pictures.heat(report), args.out / "auc.png")
    for name, home in homes(config).items():
        save_figure(pictures.examples(models[name], home, config), args.out / f"examples-{name}.png")
    print(text(report))
    print(f"Written to {args.out}")


if __name__ == "__main__":
    main()
