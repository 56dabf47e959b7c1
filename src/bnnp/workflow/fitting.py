"""From data to a folder with a trained model: one call, which a kill does not hurt.

The folder first gets `run.json` (what was asked, how the data were cut, what is held out), then the checkpoints of training in `fit/`, and
at the end the model and the word "done" in `run.json`. At whatever moment the process dies, `resume` goes on to the same result.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnnp.checkpoint import sweep, write_atomically
from bnnp.config import Config
from bnnp.data.collection import Collection, Description, Division, divide
from bnnp.likelihoods import LIKELIHOODS, Categorical, Likelihood
from bnnp.networks import BNNP
from bnnp.priors import Prior
from bnnp.runs import RECORD, Run, read_record, write_record
from bnnp.sizes import candidates, choose_settings, choose_shares
from bnnp.training import TrainResult, check_run, meta_train

__all__ = ["Fit", "build_model", "fit", "plan", "resume"]

VALIDATION_TASKS = 48
"""Of more held-out tasks, so many choose the step; a look at all of them would take longer than the steps between two looks."""
TRAINING = ("objective", "steps", "batch_size", "num_samples", "learning_rate", "final_learning_rate", "max_points", "shrinkage", "seed")


@dataclass(frozen=True, eq=False)
class Fit:
    """Hold what a fit is about to do.

    Arguments:
        collection: all tasks.
        description: what they are.
        division: which of them are learned from.
        config: complete settings.
        reasons: why those that nobody set are what they are.
        path: where the source is; None for one in memory.
    """

    collection: Collection
    description: Description
    division: Division
    config: Config
    reasons: tuple[str, ...]
    path: str | None

    def part(self, name: str) -> Collection:
        """Return the tasks of "train", "validation" or "test"."""
        return self.collection.subset(getattr(self.division, name))

    def record(self, status: str) -> dict[str, Any]:
        """Return what is written down of it."""
        source = self.collection
        return {
            "status": status,
            "inputs": [asdict(column) for column in source.inputs],
            "outputs": [asdict(column) for column in source.outputs],
            "recipe": source.recipe,
            "data": {"path": self.path, "fingerprint": source.fingerprint, **self.description.to_dict()},
            "config": self.config.to_dict(),
            "reasons": list(self.reasons),
            "division": {
                **{name: [source.names[i] for i in getattr(self.division, name)] for name in ("train", "validation", "test")},
                "how": self.division.how,
            },
        }


def plan(collection: Collection, config: Config | None = None, path: str | None = None) -> Fit:
    """Return what `fit` would do with these tasks: the division, and every setting with its reason.

    Raises:
        ValueError: the tasks are too few, or a column of them never varies.
    """
    config = config or Config()
    description = collection.describe()
    if len(collection) < 2:
        raise ValueError(
            f"Expected at least 2 tasks to learn a prior from. Got {len(collection)}. {' '.join(description.advice)} "
            "Name another task column or dimension, or cut windows."
        )
    for side, rows in (("input", description.inputs), ("output", description.outputs)):
        for row in rows:
            if not row["min"] < row["max"]:
                raise ValueError(
                    f"Expected {side} {row['name']!r} to vary. Got {row['min']:g} at every point looked at. Leave it out: "
                    f"name the {side}s without it."
                )
    split = choose_shares(collection, config)
    division = divide(collection, split["validation"], split["test"], split["seed"])
    chosen = choose_settings(collection, len(division.train), config)
    return Fit(collection, description, division, chosen.config, chosen.reasons, path)


def build_model(x_dim: int, y_dim: int, config: Config) -> BNNP:
    """Return an untrained model of complete settings."""
    own = config.section("model")
    kind = LIKELIHOODS[own.pop("likelihood")]
    classes, dtype = own.pop("classes", None), own.pop("dtype", "float32")
    if kind is Categorical and classes is None:
        raise ValueError("Expected model.classes with a categorical likelihood. Got none. Set it to the number of labels.")
    likelihood: Likelihood = kind(classes) if kind is Categorical else kind()
    prior = Prior(own.pop("prior"), **{key: own.pop(key) for key in ("spread", "input_scale", "fraction") if key in own})
    model = BNNP(x_dim, y_dim, prior=prior, likelihood=likelihood, seed=config.get("training.seed", 0), **own)
    return model.double() if dtype == "float64" else model


def fit(
    source: Collection,
    out: str | os.PathLike[str],
    config: Config | None = None,
    *,
    path: str | None = None,
    fresh: bool = False,
    progress: bool = True,
    announce: Callable[[Fit], None] | None = None,
) -> Run:
    """Learn from the tasks of a collection and leave the model, with all that is needed to use it, in a folder.

    Arguments:
        source: all tasks; a part of them is held out, as `config` says.
        out: the folder.
        config: settings; what is absent is chosen from the data.
        path: where the source was read from, so that `resume` finds it.
        fresh: throw away a run that is in the folder.
        progress: show a line of progress on standard error.
        announce: called with the complete plan before training starts.

    Returns:
        The run, with the trained model.

    Raises:
        ValueError: data or settings that do not fit, or a folder that holds a run already.
        OSError: the folder cannot be written to, or the disk is full.
    """
    folder = Path(out)
    _check_room(folder, fresh)
    planned = plan(source, config, path)
    _check(planned)
    if announce is not None:
        announce(planned)
    _make_room(folder)
    write_record(folder, planned.record("training"))
    return _train(folder, planned.part("train"), planned.part("validation"), planned.config, progress)


def resume(folder: str | os.PathLike[str], source: Collection, *, progress: bool = True) -> Run:
    """Go on with a fit that was stopped, to the result it would have had.

    Arguments:
        folder: of the fit.
        source: the same tasks, read again.
        progress: show a line of progress on standard error.

    Raises:
        FileNotFoundError: there is no fit.
        ValueError: the record is damaged, or the tasks are others.
    """
    folder = Path(folder)
    record = read_record(folder)
    expected = record["data"]["fingerprint"]
    if source.fingerprint != expected:
        raise ValueError(
            f"Expected the data of the fit in {folder} (fingerprint {expected}, {record['data']['tasks']} tasks). Got others "
            f"(fingerprint {source.fingerprint}, {len(source)} tasks). The file has changed since: fit it again, in another folder."
        )
    config, places = Config(record["config"]), {name: i for i, name in enumerate(source.names)}
    train, validation = (source.subset([places[name] for name in record["division"][part]]) for part in ("train", "validation"))
    return _train(folder, train, validation, config, progress)


def _check(planned: Fit) -> None:
    """Refuse before anything is written, and an older run is thrown away, what could not be trained on."""
    settings, held_out = planned.config.section("training"), planned.part("validation")
    model = build_model(planned.collection.x_dim, planned.collection.y_dim, planned.config)
    own: dict[str, Any] = {name: settings.get(name) for name in ("objective", "shrinkage", "max_points", "seed")}
    check_run(model, planned.part("train"), held_out if len(held_out) else None, context=tuple(settings["context"]), **own)


def _check_room(folder: Path, fresh: bool) -> None:
    """Check that a run can go into the folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected a folder for the model. Got a file: {folder}. Name another with --out.")
    if (folder / RECORD).exists() and not fresh:
        raise ValueError(
            f"Expected a folder without a run. Got {folder}, which has one. Go on with it (bnnp resume {folder}), throw it away (--fresh), "
            "or name another folder."
        )
    if not (folder / RECORD).exists() and (folder / "model.json").exists():
        raise ValueError(f"Expected a folder without a model. Got {folder}, which has one of another origin. Name another folder.")


def _make_room(folder: Path) -> None:
    """Make the folder; throw away what an earlier run left there, and nothing else."""
    if (folder / RECORD).exists():
        for own in (folder / "fit", folder / "trials"):
            shutil.rmtree(own, ignore_errors=True)
        # The record goes last: a folder with a model and no record is not ours to throw away.
        for own in [folder / "model.json", folder / "config.toml", *folder.glob("model-*.safetensors"), folder / RECORD]:
            own.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def _train(folder: Path, train: Collection, validation: Collection, config: Config, progress: bool) -> Run:
    sweep(folder, r"(run\.json|config\.toml)")
    config = _tried(folder, train, validation, config, progress)
    write_atomically(folder / "config.toml", config.toml(str(train.recipe.get("kind", "arrays"))).encode())
    model = build_model(train.x_dim, train.y_dim, config)
    result = _learn(folder / "fit", model, train, validation, config, progress)
    model.save(folder)
    result_of = {"best_step": result.best_step, "best_score": result.best_score, "skipped": result.skipped, "seconds": result.seconds}
    write_record(folder, {**read_record(folder), "status": "done", "result": result_of})
    return Run.open(folder)


def _learn(
    folder: Path, model: BNNP, train: Collection, validation: Collection, config: Config, progress: bool, looks: int = 20
) -> TrainResult:
    settings = config.section("training")
    few = (
        np.unique(np.linspace(0, len(validation) - 1, VALIDATION_TASKS).round().astype(int)) if len(validation) > VALIDATION_TASKS else None
    )
    validation = validation if few is None else validation.subset(few.tolist())
    return meta_train(
        model,
        train,
        validation=validation if len(validation) else None,
        validate_every=max(1, settings["steps"] // looks),
        context=tuple(settings["context"]),
        folder=folder,
        checkpoint_every=settings["checkpoint_every"],
        resume=True,
        progress=progress,
        **{key: settings[key] for key in TRAINING if key in settings},
    )


def _tried(folder: Path, train: Collection, validation: Collection, config: Config, progress: bool) -> Config:
    """Return the settings with the best of a few networks, each trained briefly; written down, so that it is done once."""
    steps, record = config.get("training.trial_steps", 0), read_record(folder)
    if not steps or not len(validation) or "trials" in record:
        return config
    trials, networks = [], candidates(config.get("model.input_scale"))
    for i, candidate in enumerate(networks):
        network, rate = {k: v for k, v in candidate.items() if k != "learning_rate"}, candidate["learning_rate"]
        whole = Config({"model": network, "training": {"learning_rate": rate}}).over(config)
        if progress:
            print(f"Trial {i + 1} of {len(networks)}: {candidate['activation']}, learning rate {rate:g}", file=sys.stderr)
        short = whole.replace(training__steps=steps, training__checkpoint_every=steps)
        result = _learn(folder / "trials" / str(i), build_model(train.x_dim, train.y_dim, short), train, validation, short, progress, 1)
        trials.append({**candidate, "score": result.best_score, "seconds": result.seconds})
    best = max(range(len(trials)), key=lambda i: -math.inf if trials[i]["score"] is None else trials[i]["score"])
    chosen = {k: v for k, v in networks[best].items() if k != "learning_rate"}
    config = Config({"model": chosen, "training": {"learning_rate": networks[best]["learning_rate"]}}).over(config)
    reason = f"{trials[best]['activation']} network: the best of {len(trials)} after {steps} steps, on the validation tasks"
    write_record(folder, {**record, "config": config.to_dict(), "trials": trials, "reasons": [*record["reasons"], reason]})
    return config
