"""Learn a prior on sawtooth tasks and measure how far its functions are from true sawtooths.

    python -m experiments.sawtooth.run --activation sine --out runs/sawtooth-sine

Resumes where it was stopped. Writes results.json, functions.png and learning.png into the folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import bnnp
from bnnp import plots
from bnnp.checkpoint import write_atomically
from bnnp.data.synthetic import Sawtooth
from bnnp.demos.common import per_point
from bnnp.evaluation import energy_distance_test, evaluate

CONTEXTS = (3, 10, 30)


def settings(steps: int | None = None) -> dict[str, Any]:
    """Return the settings of the experiment, with another number of training steps where one is given."""
    config: dict[str, Any] = json.loads((Path(__file__).parent / "config.json").read_text())
    training = {**config["training"], "context": tuple(config["training"]["context"])}
    training["steps"] = steps or training["steps"]
    return {**config, "training": training}


def build(config: dict[str, Any], activation: str) -> bnnp.BNNP:
    """Build the untrained network."""
    return bnnp.BNNP(
        x_dim=1,
        y_dim=1,
        hidden=config["hidden"],
        prior=bnnp.Prior(**config["prior"]),
        shared_noise=True,
        activation=activation,
        likelihood=bnnp.Gaussian(**config["noise"]),
        factor_dtype="float32",
    )


def train(out: Path, activation: str, steps: int | None = None) -> tuple[bnnp.BNNP, bnnp.TrainResult]:
    """Train in a folder, going on where an earlier run in it was stopped."""
    config, process = settings(steps), Sawtooth()
    model = build(config, activation)
    tasks, validation = process.tasks(config["tasks"], seed=1), process.tasks(config["validation_tasks"], seed=2)
    return model, bnnp.meta_train(model, tasks, validation=validation, folder=out, resume=True, **config["training"])


def trained_model(out: Path, activation: str = "sine", steps: int | None = None) -> bnnp.BNNP:
    """Return the network trained in a folder: loaded where that has been done, otherwise after training or the rest of it.

    Raises:
        ValueError: the folder holds an unfinished run with other settings.
    """
    wanted = json.dumps({**settings(steps), "activation": activation}, indent=1)
    note = out / "trained" / "settings.json"
    if note.is_file() and note.read_text() == wanted:
        return bnnp.load(note.parent)
    model, _ = train(out, activation, steps)
    model.save(note.parent)
    write_atomically(note, wanted.encode())
    return model


def distances(config: dict[str, Any], functions: dict[str, torch.Tensor], grid: torch.Tensor) -> dict[str, Any]:
    """Return energy distances of function values on a grid from a held-out set of true functions, with permutation p-values."""
    process, g = Sawtooth(), torch.Generator().manual_seed(5)
    held_out, other = (process.sample(grid, config["functions"], g)[..., 0] for _ in range(2))
    found = {}
    for name, values in {"another true set": other, **functions}.items():
        value, p = energy_distance_test(values, held_out, g, num_permutations=100)
        found[name] = {"energy_distance": value, "p_value": p}
    return found


def scores(config: dict[str, Any], model: bnnp.BNNP) -> dict[str, Any]:
    """Return test scores of the model and of the oracle at several context sizes."""
    tasks = Sawtooth().tasks(config["test_tasks"], seed=7)
    found: dict[str, Any] = {}
    for n in CONTEXTS:
        cut = [(x[:n], y[:n], x[n:], y[n:]) for x, y in tasks]
        for name, what in (("model", model), ("oracle", Sawtooth())):
            found[f"{name}, {n} context points"] = evaluate(what, cut, num_samples=64, seed=0).to_dict()["summary"]
    return found


def picture(out: Path, grid: torch.Tensor, truth: torch.Tensor, before: torch.Tensor, after: torch.Tensor, model: bnnp.BNNP) -> None:
    """Draw true functions, prior samples before and after, and posteriors for a growing context."""
    x = grid[:, 0]
    panels: list[plots.Panel] = [
        {"title": "True sawtooths", "x": x, "samples": truth[:8]},
        {"title": "Prior samples before learning", "x": x, "samples": before[:8]},
        {"title": "Prior samples after learning", "x": x, "samples": after[:8]},
    ]
    task = Sawtooth().tasks(1, seed=9)[0]
    for n in (1, 3, 8):
        posterior = model.condition(task.x[:n], task.y[:n], num_samples=64)
        p = posterior.predict(grid)
        panels.append(
            {
                "title": f"Posterior, {n} point{'s' * (n > 1)} seen",
                "x": x,
                "xc": task.x[:n, 0],
                "yc": task.y[:n, 0],
                "mean": p.mean[:, 0],
                "lower": p.quantile(0.025)[:, 0],
                "upper": p.quantile(0.975)[:, 0],
                "truth": _truth(x, task.latents),
            }
        )
    plots.save_figure(plots.functions_1d(panels), out / "functions.png")


def _truth(x: torch.Tensor, latents: tuple[torch.Tensor, ...]) -> torch.Tensor:
    a, b = (float(v) for v in latents)
    return 1.33 * (torch.remainder(x, 0.75) - 0.375) + a * x / 3 + 0.25 * b


def main() -> None:
    """Run the experiment from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--activation", default="sine")
    parser.add_argument("--out", type=Path, default=Path("runs/sawtooth"))
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    config = settings(args.steps)
    model, result = train(args.out, args.activation, args.steps)
    process = Sawtooth()
    tasks = process.tasks(config["tasks"], seed=1)
    untrained = build(config, args.activation)
    untrained.fit_scaling([bnnp.Task(x, y) for x, y in tasks])
    grid = torch.linspace(-2, 2, 200).unsqueeze(-1)
    before, after = (m.prior_samples(grid, config["functions"], seed=3)[..., 0] for m in (untrained, model))
    report = {
        "activation": args.activation,
        "steps": config["training"]["steps"],
        "seconds": round(result.seconds, 1),
        "validation": result.best_score,
        "noise_std": [float(s) for s in model.noise_std] if model.noise_std is not None else None,
        "prior": distances(config, {"prior after learning": after, "prior before learning": before}, grid),
        "scores": scores(config, model),
    }
    write_atomically(args.out / "results.json", json.dumps(report, indent=1).encode())
    truth = process.sample(grid, 8, torch.Generator().manual_seed(6))[..., 0]
    picture(args.out, grid, truth, before, after, model)
    points = sum(len(x) for x, _ in tasks) / len(tasks)
    curve = plots.learning_curve(per_point(result.history, points), label="score per point (higher is better)")
    plots.save_figure(curve, args.out / "learning.png")
    print(json.dumps({key: report[key] for key in ("seconds", "validation", "prior")}, indent=1))
    print(f"Written to {args.out}")


if __name__ == "__main__":
    main()
