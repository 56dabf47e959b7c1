"""Hourly maps of 2 m temperature as tasks: each hour is a function of longitude and latitude, learned from the first days, tested on the last."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.common.gaussian import nearest
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
    def past(self) -> Tensor:
        """Return the training maps with shape (hours, P)."""
        return self.y[self.hours["train"].start : self.hours["train"].stop]

    def climate(self, x: Tensor) -> Tensor:
        """Return the mean over the training hours at the place nearest to each x (*T, N, 2), with shape (*T, N, 1)."""
        return self.past.double().mean(0)[nearest(x, self.x.double())].unsqueeze(-1)

    def subsets(self, part: str, count: int, points: int, seed: int, every: int = 1) -> list[tuple[Tensor, Tensor]]:
        """Return `count` tasks of each hour (of each `every`-th) of a part, each with its own random places, as pairs (n, 2) and (n, 1)."""
        generator, tasks = torch.Generator().manual_seed(seed), []
        for hour in list(self.hours[part])[::every] * count:
            places = torch.randperm(len(self.x), generator=generator)[:points]
            tasks.append((self.x[places], self.y[hour, places].unsqueeze(-1)))
        return tasks

    def part(self, name: str, seed: int) -> Part:
        """Return maps of a part of which shares of the cells are seen at random and all others are targets."""
        hours, generator, splits = list(self.hours[name])[:: self.config["every"]], torch.Generator().manual_seed(seed), {}
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
    import xarray

    path = data / config["file"]
    if not path.is_file():
        raise FileNotFoundError(f"Expected the ERA5 sample {path}. Got no such file. Give the folder that holds it with --data.")
    with xarray.open_dataset(path) as source:
        values = source[config["variable"]].transpose("time", "latitude", "longitude")
        latitude, longitude = (np.asarray(source[name].values, dtype=np.float32) for name in ("latitude", "longitude"))
        times = tuple(str(time)[:13] for time in source["time"].values)
        y = torch.from_numpy(np.asarray(values.values, dtype=np.float32))
    x = torch.from_numpy(np.stack(np.meshgrid(longitude, latitude), -1).reshape(-1, 2))  # row by row, as the maps are stored
    return Fields(x, y.flatten(1), times, (len(latitude), len(longitude)), config)
