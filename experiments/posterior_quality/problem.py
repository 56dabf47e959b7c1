"""The tasks: data sets of known networks, of which the prior is the one that every method holds fixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import bnnp
from bnnp.data.synthetic import KnownBNN, SyntheticTask

__all__ = ["process", "scored_tasks", "training_tasks", "validation_tasks"]

Config = Mapping[str, Any]
PRIOR = bnnp.Prior("shared", learn_mean=False, learn_scale=False)
"""N(0, 1/p) of every weight, as `diagonal` is before learning; units that share a factor are factorised together, which costs less."""


def process(config: Config) -> KnownBNN:
    """Return the process that data are drawn from."""
    data = config["data"]
    return KnownBNN(hidden=tuple(config["hidden"]), x_range=tuple(data["x_range"]), noise_std=data["noise_std"], dtype=torch.float64)


def scored_tasks(config: Config) -> list[SyntheticTask]:
    """Return the tasks that are scored: the first ones of a seed, whatever they look like."""
    return process(config).tasks(config["tasks"], config["task_seed"], tuple(config["data"]["points"]))


def validation_tasks(config: Config) -> list[SyntheticTask]:
    """Return the tasks on which settings were chosen."""
    return process(config).tasks(config["validation_tasks"], config["validation_seed"], tuple(config["data"]["points"]))


def training_tasks(config: Config) -> list[SyntheticTask]:
    """Return the tasks of meta-training."""
    meta = config["meta"]
    return process(config).tasks(meta["tasks"], meta["task_seed"], tuple(meta["points"]))
