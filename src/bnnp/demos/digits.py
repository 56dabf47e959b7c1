"""The digits demo: learn what handwritten digits look like, then complete unseen ones from a few pixels.

One image is one task, from the place of a pixel to its grey value on a logit scale. Images are divided into training, validation and
test; every method sees the same pixels of the same test images and is scored by the joint density of all the others. Our own network is
trained in this process, the network under a fixed prior in a second one, side by side; both go on where they were stopped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bnnp import BNNP, Gaussian, Prior, TrainResult, plots
from bnnp.data.images import from_logit, images_to_tasks, load_digits, logit, pixel_grid, random_pixels, split_images
from bnnp.demos.baselines import Completion, ImageGP, MultivariateNormal64, PixelNormal
from bnnp.demos.common import (
    LEVELS,
    DemoResult,
    Scores,
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
from bnnp.tasks import as_tasks

__all__ = ["run"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

# The settings of the demo, chosen on validation images. Division, dequantisation and seen pixels are fixed, so that the numbers of
# different seeds (initial weights, batches, draws) compare.
STEPS = 1800
SIDE = 8
DATA_SEED = 0
PROPORTIONS = (0.10, 0.25, 0.50)
NETWORK: dict[str, Any] = {"hidden": (64, 64), "activation": "sine", "shared_noise": True}
LEARNED_PRIOR = Prior("shared", spread=0.8, input_scale=4.0)
FIXED_PRIOR = Prior("shared", learn_mean=False, learn_scale=False)  # N(0, 1/p)
NOISE_STD = 0.5  # where its learning starts, in standard deviations of y
GP_UNIT = 5.0  # the standard deviation of y is about five times that of grey values
TRAINING: dict[str, Any] = {
    "objective": "pp_avi",
    "batch_size": 20,
    "num_samples": 2,
    "learning_rate": 0.03,
    "final_learning_rate": 1e-4,
    "context": (0.05, 0.6),
}
NUM_VALIDATION = 100  # of the 180 validation images, while training
PARTICLES = 64
BATCH = 10  # images conditioned at once; with more, memory and not arithmetic takes the time

OURS, MVN, PIXEL, GP, FIXED = "this model", "multivariate normal", "per-pixel normal", "GP per image", "same net, fixed prior"
METHODS = (OURS, MVN, PIXEL, GP, FIXED)
BEATABLE = (PIXEL, GP, FIXED)
CONDITIONS = tuple(f"{100 * p:.0f} % seen" for p in PROPORTIONS)


@dataclass(frozen=True, eq=False)
class Images:
    """Hold the images on the logit scale, flat, with shape (n, 64), and the seen test pixels of each proportion."""

    train: FloatArray
    validation: FloatArray
    test: FloatArray
    seen: tuple[BoolArray, ...]


def run(
    out: str | Path = "demo-output/digits",
    steps: int = STEPS,
    seed: int = 0,
    progress: bool = True,
    fresh: bool = False,
    num_train: int | None = None,
    num_test: int | None = None,
) -> DemoResult:
    """Learn a prior over digits, complete test digits, compare with four rivals, and draw what was learned.

    Training goes on where an earlier call with the same folder, steps and seed was stopped.

    Arguments:
        out: folder for results.json, results.md, pictures, the model and the training runs.
        steps: of both trainings.
        seed: of initial weights, batches and draws; the images are divided in the same way whatever the seed.
        progress: tell on standard error what happens.
        fresh: throw away an earlier run with the same folder, steps and seed.
        num_train: fewer training images than there are.
        num_test: fewer test images than there are.

    Returns:
        Scores, tables, remarks and the paths of the pictures.

    Raises:
        ImportError: scikit-learn or matplotlib is missing.
        ValueError: steps that are not a positive number, or an old run with other settings.
    """
    require("sklearn", "matplotlib")
    start, out = time.perf_counter(), Path(out)
    folder = run_folder(out, steps, seed, fresh)
    images = load(num_train, num_test)
    say(progress, f"{len(images.train)} training, {len(images.validation)} validation and {len(images.test)} test images of 8 x 8 pixels.")
    reused = steps_done(folder / "learned") == steps and steps_done(folder / "fixed") == steps
    model = learned_model(seed)
    with Worker(rivals, str(folder), steps, seed, num_train or 0, num_test or 0) as worker:
        if not reused:
            say(progress, f"Learning the prior in {steps} steps; the same network under a fixed prior learns in a second process.")
        result = fit(model, images, folder / "learned", steps, seed, progress)
        model.save(out / "model")
        trained = time.perf_counter() - start
        say(progress, f"Completing {len(images.test)} test images from 10, 25 and 50 % of their pixels.")
        scored = {OURS: [complete(model, images.test, seen, seed) for seen in images.seen], **gaussian_rivals(images)}
        pictures = draw_model(model, result, images, scored[OURS], out, seed)
        if worker.running:
            say(progress, "Waiting for the second process: the network under the fixed prior, and one Gaussian process per image.")
        worker.wait()
    for method in (GP, FIXED):
        scored[method] = [read(folder / "rivals.npz", f"{method}/{name}", images.test) for name in CONDITIONS]
    scored = {method: scored[method] for method in METHODS}
    scores = {method: dict(zip(CONDITIONS, map(numbers, parts), strict=True)) for method, parts in scored.items()}
    pictures += draw_scores(scored, scores, len(images.test), out)
    seconds = {"training": round(trained, 1), "total": round(time.perf_counter() - start, 1)}
    settings = {"steps": steps, "seed": seed, "best_step": result.best_step, "reused_training": reused, "seconds": seconds}
    return report(out, images, scored, scores, pictures, settings)


def load(num_train: int | None = None, num_test: int | None = None) -> Images:
    """Load and divide the digits; the seen pixels of 10 % are among those of 25 %, and those among those of 50 %."""
    flat = logit(load_digits(seed=DATA_SEED).images).reshape(-1, SIDE * SIDE)
    parts = split_images(len(flat), seed=DATA_SEED)
    test = flat[parts.test][: num_test or None]
    seen = tuple(random_pixels(len(test), SIDE, SIDE, p, seed=DATA_SEED).reshape(test.shape) for p in PROPORTIONS)
    return Images(flat[parts.train][: num_train or None], flat[parts.validation], test, seen)


def learned_model(seed: int) -> BNNP:
    """Return our network before training."""
    return BNNP(2, 1, prior=LEARNED_PRIOR, likelihood=Gaussian(NOISE_STD), seed=seed, **NETWORK)


def fixed_model(seed: int) -> BNNP:
    """Return the same network under N(0, 1/p), of which only the inference networks and the noise are trained."""
    return BNNP(2, 1, prior=FIXED_PRIOR, likelihood=Gaussian(NOISE_STD), seed=seed, **NETWORK)


def fit(model: BNNP, images: Images, folder: Path, steps: int, seed: int, progress: bool) -> TrainResult:
    """Train a network on the training images, with the validation images to choose the best step."""
    tasks, validation = to_tasks(images.train), to_tasks(images.validation[:NUM_VALIDATION])
    return train(model, tasks, validation, steps, folder, progress, seed=seed, **TRAINING)


def to_tasks(flat: FloatArray) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Turn flat images into tasks."""
    return images_to_tasks(flat.reshape(-1, SIDE, SIDE))


def rivals(folder: str, steps: int, seed: int, num_train: int, num_test: int) -> None:
    """Train and score the network under the fixed prior, and score the Gaussian processes: the work of the second process."""
    images, path = load(num_train or None, num_test or None), Path(folder) / "rivals.npz"
    model = fixed_model(seed)
    fit(model, images, Path(folder) / "fixed", steps, seed, progress=False)
    arrays: dict[str, Any] = {}
    for name, seen in zip(CONDITIONS, images.seen, strict=True):
        arrays |= flat_arrays(f"{FIXED}/{name}", complete(model, images.test, seen, seed))
        arrays |= flat_arrays(f"{GP}/{name}", ImageGP(SIDE, SIDE, unit=GP_UNIT).complete(images.test, seen))
    write_arrays(path, arrays)


def flat_arrays(prefix: str, scored: Completion) -> dict[str, Any]:
    """Name the arrays of one method at one proportion, for a file; the true images are known to the reader."""
    named = {field.name: getattr(scored, field.name) for field in fields(Completion) if field.name != "truth"}
    return {f"{prefix}/{key}": value for key, value in named.items()}


def read(path: Path, prefix: str, truth: FloatArray) -> Completion:
    """Read what `flat_arrays` named."""
    return Completion(truth=truth, **read_arrays(path, f"{prefix}/"))


def gaussian_rivals(images: Images) -> dict[str, list[Completion]]:
    """Score the rivals that are a Gaussian over the 64 pixels."""
    gaussian, pixel = MultivariateNormal64(images.train, images.validation), PixelNormal(images.train)
    return {
        MVN: [gaussian.complete(images.test, seen) for seen in images.seen],
        PIXEL: [pixel.complete(images.test, seen) for seen in images.seen],
    }


def complete(model: BNNP, images: FloatArray, seen: BoolArray, seed: int) -> Completion:
    """Complete images with a network.

    Arguments:
        model: trained.
        images: with shape (m, 64).
        seen: True where a pixel is seen, with shape (m, 64), the same number in each image.
        seed: of the particles.

    Returns:
        Predictions and scores of the unseen pixels.
    """
    count, grid = int(seen[0].sum()), pixel_grid(SIDE, SIDE).numpy()
    order = np.argsort(~seen, axis=1, kind="stable")  # seen pixels first
    x, y = grid[order], np.take_along_axis(images, order, axis=1)[..., None]
    names = ("mean", "std", "pit", "crps", "each")
    values = {name: np.full(images.shape, np.nan) for name in names}
    joint = np.zeros(len(images))
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        predictive = model.condition(x[part, :count], y[part, :count], num_samples=PARTICLES, seed=seed).predict(x[part, count:])
        yt = y[part, count:]
        joint[part] = predictive.log_prob(yt, joint=True).numpy()
        found = (predictive.mean, predictive.std, predictive.cdf(yt), predictive.crps(yt), predictive.log_prob(yt).unsqueeze(-1))
        for name, tensor in zip(names, found, strict=True):
            np.put_along_axis(values[name][part], order[part, count:], tensor.squeeze(-1).double().numpy(), axis=1)
    unseen = images.shape[1] - count
    return Completion(
        truth=images,
        unseen=~seen,
        mean=np.where(seen, images, values["mean"]),
        std=np.where(seen, 0.0, values["std"]),
        joint=joint / unseen,
        marginal=np.nanmean(values["each"], axis=1),
        pit=values["pit"],
        crps=values["crps"],
    )


def numbers(scored: Completion) -> dict[str, FloatArray]:
    """Return the scores of each image."""
    c = scored
    inside = [np.nanmean(np.where(c.unseen, np.abs(c.pit - 0.5) <= 0.5 * level, np.nan), axis=1) for level in LEVELS]
    return {
        "joint": c.joint,
        "marginal": c.marginal,
        "crps": c.crps_per_image(),
        "rmse": c.rmse_per_image(),
        "coverage": np.stack(inside, axis=1),
    }


def draw_model(model: BNNP, result: TrainResult, images: Images, ours: list[Completion], out: Path, seed: int) -> list[tuple[Path, str]]:
    """Draw what the model learned and how it completes digits."""
    shape, grid, count = (-1, SIDE, SIDE), pixel_grid(SIDE, SIDE), 12
    before = fixed_model(seed)
    before.fit_scaling(as_tasks(to_tasks(images.train), 2, 1, before.dtype))
    first, learned = (from_logit(m.prior_samples(grid, count, seed=seed).numpy()).reshape(shape) for m in (before, model))
    shown = np.tile(np.arange(min(2, len(images.test))), len(PROPORTIONS))
    at = np.repeat(np.arange(len(PROPORTIONS)), len(shown) // len(PROPORTIONS))
    order = np.lexsort((at, shown))
    rows = [(ours[at[i]], shown[i], CONDITIONS[at[i]]) for i in order]
    truth, unseen = np.stack([c.truth[i] for c, i, _ in rows]), np.stack([c.unseen[i] for c, i, _ in rows])
    drawn = np.stack([draws(model, z, ~mask, seed, 200, noisy=True) for z, mask in zip(truth, unseen, strict=True)])
    whole, mean, std = (a.reshape(shape) for a in (from_logit(truth), drawn.mean(1), drawn.std(1)))
    figures = {
        "learning_curve.png": (
            plots.learning_curve(
                per_point(result.history, SIDE**2), title="Learning the prior from many digits", label="score per pixel (higher is better)"
            ),
            "Learning: the objective on training batches, and the score on images held out",
        ),
        "prior.png": (
            plots.prior_images(first, learned, from_logit(images.train[:count]).reshape(shape)),
            "Images drawn from the prior before and after learning, and real ones",
        ),
        "completions.png": (
            plots.completions(whole, ~unseen.reshape(shape), mean, std, "Completing unseen digits", [name for *_, name in rows]),
            "Test digits completed from 10, 25 and 50 % of their pixels: mean and uncertainty",
        ),
        "guesses.png": (
            plots.coherent_completions(*guesses(model, images, seed), "One unseen digit: whole images that agree with the pixels seen"),
            "Several coherent completions of one test digit, from 10, 25 and 50 % of its pixels",
        ),
    }
    return [(plots.save_figure(figure, out / name), what) for name, (figure, what) in figures.items()]


def draws(model: BNNP, image: FloatArray, seen: BoolArray, seed: int, count: int, noisy: bool = False) -> FloatArray:
    """Return whole images (count, 64) in grey values, drawn given the seen pixels, with these put back."""
    grid = pixel_grid(SIDE, SIDE)
    posterior = model.condition(grid[torch.from_numpy(seen)], image[seen, None], num_samples=PARTICLES, seed=seed)
    samples = posterior.predict(grid).sample(count, noisy=noisy, seed=seed).squeeze(-1).double().numpy()
    return np.where(seen, from_logit(image), from_logit(samples))


def guesses(model: BNNP, images: Images, seed: int, count: int = 6) -> tuple[FloatArray, BoolArray, FloatArray]:
    """Return the first test image, its seen pixels at each proportion, and whole images drawn given these."""
    truth, seen = images.test[0], np.stack([mask[0] for mask in images.seen])
    drawn = np.stack([draws(model, truth, mask, seed, count) for mask in seen], axis=1)
    repeated = np.broadcast_to(from_logit(truth), seen.shape)
    return repeated.reshape(-1, SIDE, SIDE), seen.reshape(-1, SIDE, SIDE), drawn.reshape(count, -1, SIDE, SIDE)


def draw_scores(scored: dict[str, list[Completion]], scores: Scores, independent: int, out: Path) -> list[tuple[Path, str]]:
    """Draw calibration and scores of all methods."""
    pits = {method: np.concatenate([s.pooled_pit() for s in parts]) for method, parts in scored.items()}
    bars = {method: {name: tuple(plain["joint"].values()) for name, plain in of.items()} for method, of in plain_scores(scores).items()}
    figures = {
        "calibration.png": (plots.calibration(pits, LEVELS, independent), "How often the truth lies where each method says"),
        "scores.png": (plots.scores_bar(bars), "Joint log-density per unseen pixel of all methods"),
    }
    return [(plots.save_figure(figure, out / name), what) for name, (figure, what) in figures.items()]


def report(
    out: Path,
    images: Images,
    scored: dict[str, list[Completion]],
    scores: Scores,
    pictures: list[tuple[Path, str]],
    settings: dict[str, Any],
) -> DemoResult:
    """Write the results in numbers and in words."""
    compared, unit = comparison(scores, OURS), "unseen pixel"
    ahead = {rival: all(mean > 2.0 * error for mean, error in compared[rival].values()) for rival in compared}
    results = {
        "dataset": "digits",
        "ours": OURS,
        "unit": "log-density per unseen pixel of z = logit(0.01 + 0.98 v), v = (level + u) / 17 dequantised grey; joint over an image",
        **settings,
        "images": {"train": len(images.train), "validation": len(images.validation), "test": len(images.test)},
        "scores": plain_scores(scores),
        "difference": plain_comparison(scores, OURS),
        "better_by_two_standard_errors_everywhere": ahead,
        "pictures": [path.name for path, _ in pictures],
    }
    tables = (
        joint_table(scores, unit),
        difference_table(scores, OURS),
        other_table(scores, unit),
    )
    result = DemoResult(out, results, tables, remarks(results, len(images.test)), tuple(pictures))
    result.write()
    return result


def remarks(results: dict[str, Any], num_test: int) -> tuple[str, ...]:
    """Say what the tables mean, and where we stand, good or bad."""
    ahead, difference = results["better_by_two_standard_errors_everywhere"], results["difference"]
    behind = [rival for rival in BEATABLE if not ahead[rival]]
    hard = "; ".join(f"{name}: {d['verdict']}" for name, d in difference[MVN].items())
    return (
        "Units: grey values dequantised, v = (level + u) / 17, then z = log(w / (1 - w)) with w = 0.01 + 0.98 v, the same for all methods: "
        f"on that scale the rival normals fit best too (chosen on validation images). ± is the standard error over {num_test} test images.",
        "Better than the per-pixel normal, the GP and the fixed prior at every proportion by more than two standard errors: "
        + ("yes." if not behind else f"no, not than {', '.join(behind)}."),
        f"The hard rival is the multivariate normal, which knows these 64 places by heart. Against it this model is, at {hard}.",
        "The multivariate normal cannot be asked about places between the pixels. This model can; how well is not measured here.",
    )
