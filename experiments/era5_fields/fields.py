"""Hourly maps of 2 m temperature as tasks: each hour is a function of longitude and latitude.

Learned from the first days, chosen by the next, tested on the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnnp.data import read_grid
from experiments.common.rivals import Past
from experiments.common.study import Part, split

__all__ = ["Fields", "read"]


@dataclass(frozen=True, eq=False)
class Fields:
    """Hold the maps and how they are cut.

    Arguments:
        x: places (longitude, latitude) with shape (P, 2).
        y: temperature in K with shape (hours, P).
        times: of the maps, such as "2019-03-01T00".
        shape: latitudes and longitudes.
        config: the settings under "data".
    """

    x: Tensor
    y: Tensor
    times: tuple[str, ...]
    shape: tuple[int, int]
    config: dict[str, Any]

    @cached_property
    def hours(self) -> dict[str, range]:
        """Return the hours of training, of validation and of the test, in this order in time."""
        days = [time[:10] for time in self.times]
        each = list(dict.fromkeys(days))
        held = [self.config["validation_days"], self.config["test_days"]]
        if len(each) < sum(held) + 2:
            raise ValueError(f"Expected at least {sum(held) + 2} days, to train on the first of them. Got {len(each)}.")
        first = {"validation": days.index(each[-sum(held)]), "test": days.index(each[-held[1]])}
        return {
            "train": range(first["validation"]),
            "validation": range(first["validation"], first["test"]),
            "test": range(first["test"], len(days)),
        }

    @property
    def past(self) -> Past:
        """Return the training maps."""
        return Past(self.x, self.y[self.hours["train"].start : self.hours["train"].stop])

    def subsets(self, part: str, count: int, points: int, seed: int, every: int = 1) -> list[tuple[Tensor, Tensor]]:
        """Return `count` tasks of each hour (of each `every`-th) of a part, each with its own random places, as pairs (n, 2) and (n, 1)."""
        generator, tasks = torch.Generator().manual_seed(seed), []
        for hour in list(self.hours[part])[::every] * count:
            places = torch.randperm(len(self.x), generator=generator)[:points]
            tasks.append((self.x[places], self.y[hour, places].unsqueeze(-1)))
        return tasks

    def part(self, name: str, seed: int) -> Part:
        """Return maps of a part of which shares of the cells are seen at random and all others are targets."""
        every = self.config["validation_every" if name == "validation" else "every"]
        hours, generator, splits = list(self.hours[name])[::every], torch.Generator().manual_seed(seed), {}
        for share in self.config["seen"]:
            masks = [torch.randperm(len(self.x), generator=generator) < round(share * len(self.x)) for _ in hours]
            splits[f"{100 * share:g} % seen"] = [split(self.x, self.y[h].unsqueeze(-1), m) for h, m in zip(hours, masks, strict=True)]
        return Part(splits, [self.times[h] for h in hours], [self.times[h][:10] for h in hours])


def read(data: Path, config: dict[str, Any]) -> Fields:
    """Read the maps from a netCDF file.

    Arguments:
        data: the folder with the data.
        config: the settings under "data".

    Raises:
        FileNotFoundError: the file is not there.
    """
    path = data / config["file"]
    if not path.is_file():
        raise FileNotFoundError(f"Expected the ERA5 sample {path}. Got no such file. Give the folder that holds it with --data.")
    maps = read_grid(path, task="time", inputs=["longitude", "latitude"], outputs=config["variable"], lazy=False)
    x = torch.from_numpy(maps[0][0]).float()
    y = torch.stack([torch.from_numpy(map_[1][:, 0]) for map_ in maps]).float()
    shape = (len(x[:, 1].unique()), len(x[:, 0].unique()))
    return Fields(x, y, tuple(name[:13] for name in maps.names), shape, config)
