"""The two models of the study: each is trained where it is absent, gone on with where it was stopped, and loaded where it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import bnnp
from bnnp.checkpoint import write_atomically
from bnnp.data.synthetic import SquaredExponentialGP
from experiments.sawtooth import run as sawtooth

DONE = "done.txt"


def gp_model(folder: Path, config: dict[str, Any]) -> bnnp.BNNP:
    """Return the model that has learned a squared-exponential Gaussian process, trained into `folder`."""
    if (folder / DONE).exists():
        return bnnp.load(folder / "best")
    process = SquaredExponentialGP(**config["process"])
    model = bnnp.BNNP(1, 1, prior=bnnp.Prior(**config["prior"]), likelihood=bnnp.Gaussian(**config["noise"]), **config["model"])
    training = {**config["training"], "context": tuple(config["training"]["context"])}
    tasks, validation = process.tasks(config["tasks"], seed=1), process.tasks(config["validation_tasks"], seed=2)
    result = bnnp.meta_train(model, tasks, validation=validation, folder=folder, resume=True, **training)
    write_atomically(folder / DONE, f"{result.seconds:.0f} s, best step {result.best_step}, score {result.best_score}\n".encode())
    return model


def trained_models(gp_folder: Path, sawtooth_folder: Path, config: dict[str, Any]) -> dict[str, bnnp.BNNP]:
    """Return both models, with factorisations in float64: importance weights are sums of large terms that cancel."""
    models = {"sawtooth": sawtooth.trained_model(sawtooth_folder), "gp": gp_model(gp_folder, config["gp"])}
    for model in models.values():
        model.factor_dtype = torch.float64
    return models
