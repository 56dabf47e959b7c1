"""The three processes, their tasks, and the learning of a prior for each."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import bnnp
from bnnp.checkpoint import write_atomically
from bnnp.data.synthetic import Heaviside, Process, Sawtooth, SquaredExponentialGP, SyntheticTask
from bnnp.evaluation import SplitTask, split_tasks

Config = dict[str, Any]
SEEDS = {"train": 1, "validation": 2, "test": 3, "settings": 4}
"""Of the tasks that a prior is learned from, its checkpoint chosen by, engines compared on, and engines' settings chosen on."""
TESTED = (-4.0, 4.0)
"""Where the inputs of the tasks lie that engines see, but for the sawtooth: a fifth less than where the prior was learned."""
LEARNED = Path(__file__).parent / "models"
"""The networks of config.json, so that engines can be run without learning the priors anew; remove the folder to do so."""


def read_config(file: Path | None = None) -> Config:
    """Return the settings of the study."""
    config: Config = json.loads((file or Path(__file__).parent / "config.json").read_text())
    return config


def processes(noise: float) -> dict[str, Process]:
    """Return the processes, all with the same noise; those with an exact answer are their own oracle."""
    wide = (-5.0, 5.0)
    return {
        "sawtooth": Sawtooth(noise_std=noise),
        "heaviside": Heaviside(x_range=wide, noise_std=noise),
        "smooth": SquaredExponentialGP(lengthscale=0.5, x_range=wide, noise_std=noise),
    }


def process_of(name: str, config: Config) -> Process:
    """Return the process of an entry of the settings, which may have the name of another with a prior that was learned otherwise."""
    return processes(config["noise"])[config["processes"][name].get("of", name)]


def training_tasks(name: str, config: Config, part: str) -> list[SyntheticTask]:
    """Return the tasks of a process that its prior is learned from ("train"), or its checkpoint is chosen by ("validation")."""
    return process_of(name, config).tasks(config["sizes"][part], seed=SEEDS[part])


def splits(name: str, config: Config, part: str) -> list[SplitTask]:
    """Return tasks (xc, yc, xt, yt) that engines see: "test", or "settings" for the choice of their settings."""
    process = process_of(name, config)
    if not isinstance(process, Sawtooth):
        process = dataclasses.replace(process, x_range=TESTED)
    sizes, seed = config["sizes"], SEEDS[part]
    return split_tasks(process.tasks(sizes[part], seed=seed, num_points=sizes["points"]), tuple(config["context"]), seed=seed)


def build(name: str, config: Config) -> bnnp.BNNP:
    """Return the network of a process before training; its noise is the true one and is not learned."""
    own = config["processes"][name]
    return bnnp.BNNP(
        1,
        1,
        prior=bnnp.Prior(config["learned_prior"], **own["start"]),
        likelihood=bnnp.Gaussian(config["noise"], learn_noise=False),
        activation=own["activation"],
        seed=config["seed"],
        **config["network"],
    )


def learning(name: str, config: Config) -> dict[str, Any]:
    """Return all that a learned prior depends on, but for the code."""
    shared = {key: config[key] for key in ("noise", "network", "learned_prior", "seed")}
    sizes = {part: config["sizes"][part] for part in ("train", "validation")}
    return {**shared, "sizes": sizes, "process": config["processes"][name], "training": config["training"]}


def learn(name: str, config: Config, out: Path, progress: bool = False) -> bnnp.BNNP:
    """Return the trained network of a process: loaded where it is, out of `LEARNED` if need be, otherwise after training or the rest of it.

    Raises:
        SystemExit: the folder holds a network that was trained with other settings.
    """
    folder, key = out / "models" / name, learning(name, config)
    note = folder / "training.json"
    if note.is_file():
        if json.loads(note.read_text())["settings"] != key:
            raise SystemExit(f"Expected {folder} with the settings of config.json. Got others. Give another --out, or remove the folder.")
        return bnnp.load(folder)
    kept = LEARNED / name
    if (kept / "training.json").is_file() and json.loads((kept / "training.json").read_text())["settings"] == key:
        shutil.copytree(kept, folder)
        return bnnp.load(folder)
    model = build(name, config)
    options = {**config["training"], **config["processes"][name]["training"]}
    steps = options["steps"]
    found = bnnp.meta_train(
        model,
        training_tasks(name, config, "train"),
        validation=training_tasks(name, config, "validation"),
        **{**options, "context": tuple(options["context"])},
        validate_every=max(1, steps // 40),
        log_every=max(1, steps // 40),
        checkpoint_every=max(1, steps // 10),
        seed=config["seed"],
        folder=out / "training" / name,
        resume=True,
        progress=progress,
    )
    model.save(folder)
    told = {"seconds": found.seconds, "validation": found.best_score, "best_step": found.best_step, "skipped": found.skipped}
    write_atomically(note, json.dumps({"settings": key, **told}, indent=1).encode())
    return model
