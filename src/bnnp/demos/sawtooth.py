"""The sawtooth demo: the same in one dimension, where the truth is known.

Every task is a few noisy points of a fixed sawtooth plus a random line. The sawtooth is never seen whole: it has to be found in the
prior. Because the process is Gaussian it has an exact oracle, so we know how well any method could do, and the learned prior can be
compared with the true distribution of functions.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnnp import BNNP, Gaussian, Prior, TrainResult, plots
from bnnp.data.synthetic import Sawtooth, SquaredExponentialGP, SyntheticTask
from bnnp.demos.common import (
    LEVELS,
    DemoResult,
    Scores,
    Table,
    Worker,
    comparison,
    difference_table,
    joint_table,
    other_table,
    per_point,
    plain_comparison,
    plain_scores,
    read_arrays,
    require,
    run_folder,
    say,
    steps_done,
    train,
    write_arrays,
)
from bnnp.evaluation import Model, energy_distance, evaluate
from bnnp.tasks import as_tasks

__all__ = ["run"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

# The settings of the demo. The tasks do not depend on the seed of the run, so that the numbers of different seeds compare.
STEPS = 2000
PROCESS = Sawtooth()
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 10000, 100, 200
TRAIN_SEED, VALIDATION_SEED, TEST_SEED, TRUTH_SEEDS = 0, 1, 2, (3, 4)
POINTS = (40, 100)  # of a training task, the end excluded
NETWORK: dict[str, Any] = {"hidden": (64, 64), "activation": "sine", "shared_noise": True}
LEARNED_PRIOR = Prior("shared", spread=0.95, input_scale=8.0)
FIXED_PRIOR = Prior("shared", learn_mean=False, learn_scale=False)  # N(0, 1/p)
NOISE_STD, MAX_NOISE_STD = 0.1, 0.3
TRAINING: dict[str, Any] = {
    "objective": "pp_avi",
    "batch_size": 20,
    "num_samples": 2,
    "learning_rate": 0.02,
    "final_learning_rate": 1e-4,
    "context": (1, 30),
}
CONTEXTS = (1, 2, 4, 8, 30)
SHOWN = (1, 2, 4, 8)
NUM_TARGETS = 50
PARTICLES = 64
BATCH = 10  # tasks conditioned at once; with more, memory and not arithmetic takes the time
GRID_POINTS = 201
NUM_FUNCTIONS = 500  # on each side of an energy distance
# Where the smoothness of the rival is searched.
LENGTHSCALES = tuple(np.geomspace(0.05, 3.0, 10).tolist())
AMPLITUDES = tuple(np.geomspace(0.2, 2.0, 6).tolist())
NOISES = tuple(np.geomspace(0.05, 0.4, 6).tolist())

OURS, ORACLE, GP, FIXED = "this model", "exact oracle", "tuned smooth GP", "same net, fixed prior"
METHODS = (OURS, ORACLE, GP, FIXED)
CONDITIONS = tuple(f"{n} point{'s' if n > 1 else ''}" for n in CONTEXTS)
SCORES = {"joint": "joint_log_density", "marginal": "marginal_log_density", "crps": "crps", "rmse": "rmse"}


def run(
    out: str | Path = "demo-output/sawtooth",
    steps: int = STEPS,
    seed: int = 0,
    progress: bool = True,
    fresh: bool = False,
    num_train: int = NUM_TRAIN,
    num_test: int = NUM_TEST,
) -> DemoResult:
    """Learn a prior over sawtooth functions, predict new ones from a few points, compare with rivals and the exact answer.

    Training goes on where an earlier call with the same folder, steps and seed was stopped.

    Arguments:
        out: folder for results.json, results.md, pictures, the model and the training runs.
        steps: of both trainings.
        seed: of initial weights, batches and draws; the tasks are the same whatever the seed.
        progress: tell on standard error what happens.
        fresh: throw away an earlier run with the same folder, steps and seed.
        num_train: number of training tasks.
        num_test: number of test tasks, at least 2.

    Returns:
        Scores, tables, remarks and the paths of the pictures.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: steps that are not a positive number, or an old run with other settings.
    """
    require("matplotlib")
    start, out = time.perf_counter(), Path(out)
    folder = run_folder(out, steps, seed, fresh)
    reused = steps_done(folder / "learned") == steps and steps_done(folder / "fixed") == steps
    test, model = test_tasks(num_test), learned_model(seed)
    with Worker(rivals, str(folder), steps, seed, num_train, num_test) as worker:
        say(progress, f"{num_train} training tasks of {POINTS[0]} to {POINTS[1] - 1} points; {num_test} test tasks.")
        if not reused:
            say(progress, f"Learning the prior in {steps} steps; the same network under a fixed prior learns in a second process.")
        result = fit(model, num_train, folder / "learned", steps, seed, progress)
        model.save(out / "model")
        trained = time.perf_counter() - start
        say(progress, f"Predicting test tasks from {', '.join(map(str, CONTEXTS))} points.")
        smooth = tuned_gp(PROCESS.tasks(num_train, TRAIN_SEED, POINTS))
        arrays: dict[str, dict[str, FloatArray]] = {OURS: score(model, test, seed)}
        arrays |= {ORACLE: score(PROCESS, test, seed), GP: score(smooth, test, seed)}
        before = fixed_model(seed)
        before.fit_scaling(as_tasks(PROCESS.tasks(num_train, TRAIN_SEED, POINTS), 1, 1, before.dtype))
        distances = prior_distances(before, model, seed)
        pictures = draw_model(before, model, result, test[0], out, seed)
        if worker.running:
            say(progress, "Waiting for the second process: the network under the fixed prior.")
        worker.wait()
    arrays[FIXED] = read_arrays(folder / "rivals.npz", "")
    scores = {method: {name: numbers(arrays[method], name) for name in CONDITIONS} for method in METHODS}
    pictures += draw_scores({method: arrays[method]["pit"] for method in METHODS}, scores, num_test, out)
    seconds = {"training": round(trained, 1), "total": round(time.perf_counter() - start, 1)}
    settings = {"steps": steps, "seed": seed, "best_step": result.best_step, "reused_training": reused, "seconds": seconds}
    settings |= {"tasks": {"train": num_train, "validation": NUM_VALIDATION, "test": num_test}}
    settings |= {"smooth_gp": {"lengthscale": smooth.lengthscale, "amplitude": math.sqrt(smooth.variance), "noise_std": smooth.noise_std}}
    return report(out, scores, distances, pictures, settings)


def learned_model(seed: int) -> BNNP:
    """Return our network before training."""
    return BNNP(1, 1, prior=LEARNED_PRIOR, likelihood=Gaussian(NOISE_STD, max_noise_std=MAX_NOISE_STD), seed=seed, **NETWORK)


def fixed_model(seed: int) -> BNNP:
    """Return the same network under N(0, 1/p), of which only the inference networks and the noise are trained."""
    return BNNP(1, 1, prior=FIXED_PRIOR, likelihood=Gaussian(NOISE_STD, max_noise_std=MAX_NOISE_STD), seed=seed, **NETWORK)


def fit(model: BNNP, num_train: int, folder: Path, steps: int, seed: int, progress: bool) -> TrainResult:
    """Train a network on the training tasks, with the validation tasks to choose the best step."""
    tasks, validation = PROCESS.tasks(num_train, TRAIN_SEED, POINTS), PROCESS.tasks(NUM_VALIDATION, VALIDATION_SEED, POINTS)
    return train(model, tasks, validation, steps, folder, progress, seed=seed, **TRAINING)


def rivals(folder: str, steps: int, seed: int, num_train: int, num_test: int) -> None:
    """Train and score the network under the fixed prior: the work of the second process."""
    model = fixed_model(seed)
    fit(model, num_train, Path(folder) / "fixed", steps, seed, progress=False)
    write_arrays(Path(folder) / "rivals.npz", score(model, test_tasks(num_test), seed))


def test_tasks(num_test: int) -> list[SyntheticTask]:
    """Draw the test tasks, with the points of the largest context first and the targets behind."""
    return PROCESS.tasks(num_test, TEST_SEED, max(CONTEXTS) + NUM_TARGETS)


def tuned_gp(tasks: list[SyntheticTask], num_tasks: int = 64, num_points: int = POINTS[0]) -> SquaredExponentialGP:
    """Return the centred Gaussian process with SE kernel under which some training tasks are likeliest, by search on a grid."""
    x = torch.stack([task.x[:num_points] for task in tasks[:num_tasks]])
    y = torch.stack([task.y[:num_points] for task in tasks[:num_tasks]])
    candidates = [
        SquaredExponentialGP(lengthscale=lengthscale, variance=amplitude**2, noise_std=noise)
        for lengthscale in LENGTHSCALES
        for amplitude in AMPLITUDES
        for noise in NOISES
    ]
    return max(candidates, key=lambda gp: float(gp.log_prob(x[:, :0], y[:, :0], x, y).sum()))


def score(model: Model, test: list[SyntheticTask], seed: int) -> dict[str, FloatArray]:
    """Return scores of each task for each size of context, named "4 points/joint", and all PIT values together as "pit"."""
    arrays: dict[str, FloatArray] = {}
    pits = []
    for n, name in zip(CONTEXTS, CONDITIONS, strict=True):
        splits = [(x[:n], y[:n], x[-NUM_TARGETS:], y[-NUM_TARGETS:]) for x, y in test]
        found = evaluate(model, splits, num_samples=PARTICLES, seed=seed, batch_size=BATCH, levels=LEVELS)
        arrays |= {f"{name}/{short}": found.per_task[long].numpy() for short, long in SCORES.items()}
        arrays[f"{name}/coverage"] = np.stack([found.per_task[f"coverage_{level:g}"].numpy() for level in LEVELS], axis=1)
        assert found.pit is not None
        pits.append(found.pit.numpy())
    return {**arrays, "pit": np.concatenate(pits)}


def numbers(arrays: dict[str, FloatArray], condition: str) -> dict[str, FloatArray]:
    """Return the scores at one size of context."""
    return {key: arrays[f"{condition}/{key}"] for key in (*SCORES, "coverage")}


def grid() -> Tensor:
    """Return the inputs where functions are compared and drawn, with shape (M, 1)."""
    return torch.linspace(*PROCESS.x_range, GRID_POINTS).unsqueeze(-1)


def prior_distances(before: BNNP, after: BNNP, seed: int) -> dict[str, float]:
    """Return energy distances between function values on the grid: of the priors to true functions, and of two sets of these."""
    true, again = (PROCESS.sample(grid(), NUM_FUNCTIONS, torch.Generator().manual_seed(s)).flatten(1) for s in TRUTH_SEEDS)
    sets = {"before learning": before, "after learning": after}
    drawn = {name: model.prior_samples(grid(), NUM_FUNCTIONS, seed=seed).flatten(1) for name, model in sets.items()}
    drawn["a second set of true functions"] = again
    return {name: float(energy_distance(functions.double(), true.double())) for name, functions in drawn.items()}


def draw_model(before: BNNP, after: BNNP, result: TrainResult, task: SyntheticTask, out: Path, seed: int) -> list[tuple[Path, str]]:
    """Draw the course of learning, the prior before and after beside true functions, and posteriors of one test task."""
    x, count = grid(), 12
    true = PROCESS.sample(x, count, torch.Generator().manual_seed(TRUTH_SEEDS[0]))
    sets = {"true functions": true}
    sets |= {
        "prior before learning": before.prior_samples(x, count, seed=seed),
        "prior after learning": after.prior_samples(x, count, seed=seed),
    }
    priors: list[plots.Panel] = [
        {"title": name, "x": x.flatten().numpy(), "samples": functions.squeeze(-1).numpy()} for name, functions in sets.items()
    ]
    figures = {
        "learning_curve.png": (
            plots.learning_curve(
                per_point(result.history, sum(POINTS) / 2),
                title="Learning the prior from many tasks",
                label="score per point (higher is better)",
            ),
            "Learning: the objective on training batches, and the score on tasks held out",
        ),
        "prior.png": (plots.functions_1d(priors), "Functions drawn from the prior before and after learning, beside true ones"),
        "posterior.png": (
            plots.functions_1d([posterior_panel(after, task, n, seed) for n in SHOWN], columns=2),
            "One test task seen at 1, 2, 4 and 8 points: sampled functions and 95 % interval of an observation",
        ),
    }
    return [(plots.save_figure(figure, out / name), what) for name, (figure, what) in figures.items()]


def posterior_panel(model: BNNP, task: SyntheticTask, n: int, seed: int) -> plots.Panel:
    """Return what the model says after the first n points of a task, beside the true function."""
    x, (a, b) = grid(), task.latents
    posterior = model.condition(task.x[:n], task.y[:n], num_samples=PARTICLES, seed=seed)
    predictive = posterior.predict(x)
    truth = PROCESS.mean(x) + a * x / 3.0 + 0.25 * b
    return {
        "title": f"{n} point{'s' if n > 1 else ''} seen",
        "x": x.flatten().numpy(),
        "samples": predictive.sample(8, noisy=False, seed=seed).squeeze(-1).numpy(),
        "xc": task.x[:n].flatten().numpy(),
        "yc": task.y[:n].flatten().numpy(),
        "mean": predictive.mean.flatten().numpy(),
        "lower": predictive.quantile(0.025).flatten().numpy(),
        "upper": predictive.quantile(0.975).flatten().numpy(),
        "truth": truth.flatten().numpy(),
    }


def draw_scores(pits: dict[str, FloatArray], scores: Scores, independent: int, out: Path) -> list[tuple[Path, str]]:
    """Draw calibration and scores of all methods."""
    bars = {method: {name: tuple(plain["joint"].values()) for name, plain in of.items()} for method, of in plain_scores(scores).items()}
    label = "log-density per target point (higher is better)"
    figures = {
        "calibration.png": (plots.calibration(pits, LEVELS, independent), "How often the truth lies where each method says"),
        "scores.png": (
            plots.scores_bar(bars, label, "How well are new points predicted?", zero=None),
            "Joint log-density per target point of all methods",
        ),
    }
    return [(plots.save_figure(figure, out / name), what) for name, (figure, what) in figures.items()]


def report(
    out: Path, scores: Scores, distances: dict[str, float], pictures: list[tuple[Path, str]], settings: dict[str, Any]
) -> DemoResult:
    """Write the results in numbers and in words."""
    compared = comparison(scores, OURS)
    ahead = {rival: all(mean > 2.0 * error for mean, error in compared[rival].values()) for rival in compared}
    results = {
        "dataset": "sawtooth",
        "ours": OURS,
        "unit": "log-density per target point, joint over the 50 targets of a task",
        **settings,
        "scores": plain_scores(scores),
        "difference": plain_comparison(scores, OURS),
        "better_by_two_standard_errors_everywhere": ahead,
        "energy_distance_to_true_functions": distances,
        "pictures": [path.name for path, _ in pictures],
    }
    rows = tuple((name, f"{value:.4f}") for name, value in distances.items())
    tables = (
        joint_table(scores, "target point"),
        difference_table(scores, OURS),
        other_table(scores, "target point"),
        Table("Energy distance of prior functions to true ones (0: same distribution)", ("functions", "distance"), rows),
    )
    result = DemoResult(out, results, tables, remarks(results), tuple(pictures))
    result.write()
    return result


def remarks(results: dict[str, Any]) -> tuple[str, ...]:
    """Say what the tables mean, and where we stand, good or bad."""
    ahead, oracle = results["better_by_two_standard_errors_everywhere"], results["difference"][ORACLE]
    behind = [rival for rival in (GP, FIXED) if not ahead[rival]]
    gaps = ", ".join(f"{d['mean']:+.3f} at {name}" for name, d in oracle.items())
    gp, distances = results["smooth_gp"], results["energy_distance_to_true_functions"]
    before, after, same = distances.values()
    return (
        f"Columns: number of points seen. Every task has {NUM_TARGETS} target points; ± is the standard error over "
        f"{results['tasks']['test']} test tasks.",
        "Better than the smooth GP and the fixed prior at every size of context by more than two standard errors: "
        + ("yes." if not behind else f"no, not than {', '.join(behind)}."),
        f"The oracle knows the process and computes the exact answer, so no method is better on average. We are at {gaps}.",
        f"The smooth GP has the lengthscale ({gp['lengthscale']:.2f}), amplitude ({gp['amplitude']:.2f}) and noise "
        f"({gp['noise_std']:.2f}) that are likeliest on training tasks.",
        f"The learned prior is {'closer to' if after < before else 'further from'} the true functions than the untrained one: "
        f"energy distance {after:.4f} after learning, {before:.4f} before; two sets of {NUM_FUNCTIONS} true functions are at "
        f"{same:.4f} (the estimate is unbiased, so it may be below 0).",
    )
