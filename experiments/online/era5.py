"""Hourly maps of 2 m temperature as tasks: each hour is a function of latitude and longitude that is seen at some places.

The learned prior comes from the earlier days, the streams from the last ones, with a day between them for validation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bnnp
from bnnp.checkpoint import write_atomically
from experiments.online.hdf5 import read_array

__all__ = ["Maps", "trained_model"]

HOURS = 24


class Maps:
    """Hold the hourly maps, cut by day into training, validation and test hours.

    Arguments:
        data: the folder with the data.
        config: settings of the source, as in config.json.

    Raises:
        FileNotFoundError: the file is not there.
    """

    def __init__(self, data: Path, config: dict[str, Any]) -> None:
        path = data / config["file"]
        if not path.is_file():
            raise FileNotFoundError(
                f"Expected the ERA5 sample {path}. Got no such file. Give the folder that holds it with --data, or run --source sawtooth."
            )
        latitude, longitude = (torch.tensor(read_array(path, name), dtype=torch.float32) for name in ("latitude", "longitude"))
        fields = torch.tensor(read_array(path, "t2m"), dtype=torch.float32)
        self.x = torch.cartesian_prod(latitude, longitude)  # row by row from the first latitude on, as the fields are stored
        self.y = fields.flatten(1).unsqueeze(-1)
        test, validation = config["test_days"] * HOURS, config["validation_days"] * HOURS
        hours = torch.arange(len(self.y))
        if len(hours) <= test + validation:
            raise ValueError(f"Expected more than {test + validation} hours, to train on those before. Got {len(hours)} in {path}.")
        self.train, self.validation, self.test = hours[: -test - validation], hours[-test - validation : -test], hours[-test:]

    def subsets(self, hours: Tensor, count: int, points: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Return `count` tasks of each hour, each with its own random places, as pairs (n, 2) and (n, 1)."""
        generator = torch.Generator().manual_seed(seed)
        tasks = []
        for hour in hours.repeat(count).tolist():
            places = torch.randperm(len(self.x), generator=generator)[:points]
            tasks.append((self.x[places], self.y[hour, places]))
        return tasks

    def streams(self, count: int, points: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Return `count` test hours from the first to the last, evenly apart, each at its own random places in random order."""
        apart = torch.arange(count) * (len(self.test) - 1) // max(count - 1, 1)
        return self.subsets(self.test[apart], 1, points, seed)

    def climatology(self, x: Tensor, y: Tensor) -> list[float]:
        """Return log N(y_n; m, v) with mean and variance of the place of x_n over the training hours."""
        index = (x.unsqueeze(1) - self.x).square().sum(-1).argmin(1)
        past = self.y[self.train][:, index, 0].double()
        place = torch.distributions.Normal(past.mean(0), past.std(0))
        densities: list[float] = place.log_prob(y.squeeze(-1).double()).tolist()
        return densities


def build(config: dict[str, Any]) -> bnnp.BNNP:
    """Build the untrained network."""
    return bnnp.BNNP(
        x_dim=2,
        y_dim=1,
        hidden=config["hidden"],
        prior=bnnp.Prior(**config["prior"]),
        shared_noise=True,
        activation=config["activation"],
        likelihood=bnnp.Gaussian(**config["noise"]),
        factor_dtype="float32",
    )


def trained_model(out: Path, maps: Maps, config: dict[str, Any]) -> bnnp.BNNP:
    """Return the network trained in a folder: loaded where that has been done, otherwise after training or the rest of it."""
    wanted, note = json.dumps(config, indent=1), out / "trained" / "settings.json"
    if note.is_file() and note.read_text() == wanted:
        return bnnp.load(note.parent)
    model = build(config)
    tasks = maps.subsets(maps.train, config["subsets"], config["points"], seed=1)
    validation = maps.subsets(maps.validation, 2, config["points"], seed=2)
    training = {**config["training"], "context": tuple(config["training"]["context"])}
    bnnp.meta_train(model, tasks, validation=validation, folder=out, resume=True, **training)
    model.save(note.parent)
    write_atomically(note, wanted.encode())
    return model
