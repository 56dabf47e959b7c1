"""Windows of an electrocardiogram as tasks: each is a function of time, learned from the first minutes of one patient.

It is tested on that patient's last minutes and on other patients, of whom nothing was learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnnp.data import read_signals
from experiments.common.rivals import Past
from experiments.common.study import Part, split

__all__ = ["Windows", "read"]


@dataclass(frozen=True, eq=False)
class Windows:
    """Hold the windows of all parts; all have the same times.

    Arguments:
        x: seconds since the start of a window with shape (P, 1).
        y: millivolts less the record's median, for each part, with shape (T, P).
        starts: when the windows of each part start, in seconds.
        config: the settings under "data".
    """

    x: Tensor
    y: dict[str, Tensor]
    starts: dict[str, list[float]]
    config: dict[str, Any]

    @property
    def past(self) -> Past:
        """Return the training windows."""
        return Past(self.x, self.y["train"])

    def tasks(self, part: str, every: int = 1) -> list[tuple[Tensor, Tensor]]:
        """Return the windows of a part (every so manieth) as pairs (P, 1) and (P, 1)."""
        return [(self.x, y.unsqueeze(-1)) for y in self.y[part][::every]]

    def part(self, name: str, seed: int) -> Part:
        """Return windows of a part of which shares are seen at random, and windows of which the first share is seen, the rest to come."""
        chosen = list(range(len(self.y[name])))[:: self.config["every"].get(name, 1)]
        generator, splits, P = torch.Generator().manual_seed(seed), {}, len(self.x)
        for share in self.config["seen"]:
            masks = [torch.randperm(P, generator=generator) < round(share * P) for _ in chosen]
            splits[f"{100 * share:g} % seen"] = [
                split(self.x, self.y[name][i].unsqueeze(-1), m) for i, m in zip(chosen, masks, strict=True)
            ]
        for share in self.config["first"]:
            mask = torch.arange(P) < round(share * P)
            splits[f"first {100 * share:g} % seen"] = [split(self.x, self.y[name][i].unsqueeze(-1), mask) for i in chosen]
        starts = [self.starts[name][i] for i in chosen]
        return Part(splits, [f"{name}, {start:g} s" for start in starts], [f"{name}, minute {int(start // 60)}" for start in starts])


def read(data: Path, config: dict[str, Any]) -> Windows:
    """Read the records.

    Arguments:
        data: the folder with the data.
        config: the settings under "data".

    Raises:
        FileNotFoundError: a record is not there.
    """
    test, held = config["test_seconds"], config["test_seconds"] + config["validation_seconds"]
    cuts = {"train": {"stop": -held}, "validation": {"start": -held, "stop": -test}, "test": {"start": -test}}
    own, others = config["record"], config["others"]
    sources = {**{part: (own, cut) for part, cut in cuts.items()}, **{Path(name).name: (name, {}) for name in others}}
    x, y, starts = torch.zeros(0, 1), {}, {}
    for part, (name, cut) in sources.items():
        if not (data / name).with_suffix(".hea").is_file():
            raise FileNotFoundError(f"Expected the WFDB record {data / name}. Got no such file. Give the folder that holds it with --data.")
        whole = {"leads": config["lead"], "window": config["window"], "rate": config["rate"], "lazy": False}
        level = torch.cat([torch.from_numpy(y) for _, y, _ in read_signals(data / name, **whole)]).nanmedian()
        windows = read_signals(data / name, **whole, stride=config["stride"] if part == "train" else config["window"], **cut)
        full = [i for i, (_, _, mask) in enumerate(windows) if mask.all()]
        x = torch.from_numpy(windows[full[0]][0]).float()
        # The level of an electrode means nothing: one number for each record, the same for all methods.
        y[part] = torch.stack([torch.from_numpy(windows[i][1][:, 0]) - level for i in full]).float()
        starts[part] = [float(windows.names[i].split()[-2]) for i in full]
    return Windows(x, y, starts, config)
