"""Learn from hourly maps of temperature, complete maps of later days from a few cells, and compare with what else one would try.

    OMP_NUM_THREADS=1 python -m experiments.era5_fields.run --data ../shared/data --out runs/era5_fields

Goes on where it was stopped. Writes results.json, tables.md and pictures into --out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bnnp.evaluation import Model, evaluate
from bnnp.plots import save_figure
from experiments.common.gaussian import FittedGP, PlacesNormal, Smooth, learn
from experiments.common.meanfield import FittedNetwork, train
from experiments.common.study import Config, Rival, Study, recipe
from experiments.era5_fields import pictures
from experiments.era5_fields.fields import Fields, read

__all__ = ["main", "rivals", "settings", "study"]

Made = tuple[Model, dict[str, Any]]


def settings(quick: bool = False) -> Config:
    """Return the settings of config.json; with `quick` those of a run of seconds."""
    config: Config = json.loads((Path(__file__).parent / "config.json").read_text())
    small = config.pop("quick")
    return {key: {**value, **small.get(key, {})} if isinstance(value, dict) else small.get(key, value) for key, value in config.items()} if quick else config


def study(out: Path, data: Path, config: Config) -> tuple[Study, Fields]:
    """Return the study and its maps."""
    fields = read(data, config["data"])
    size = config["data"]
    train_tasks = fields.subsets("train", size["subsets"], size["points"], seed=1)
    validation = fields.subsets("validation", 1, size["points"], seed=2, every=size["every"])
    return Study(out, config, train_tasks, validation, {"test": fields.part("test", seed=3)}), fields


def rivals(fields: Fields, config: Config) -> dict[str, Rival]:
    """Return the rivals by name."""
    size = config["rivals"]
    shape = size["kernel"]

    def places() -> Made:
        held = fields.part("validation", seed=4).splits
        scores = {}
        for a in size["shrinkages"]:
            gaussian = PlacesNormal.of(fields.x, fields.past, a)
            scores[a] = sum(evaluate(gaussian, splits, batch_size=1).summary["joint_log_density"][0] for splits in held.values())
        best = max(scores, key=lambda a: scores[a])
        return PlacesNormal.of(fields.x, fields.past, best), {"shrinkage": best, "validation": scores}

    def learned(anomaly: bool) -> Made:
        tasks = fields.subsets("train", 1, size["gp_points"], seed=5, every=max(1, len(fields.past) // size["gp_fields"]))
        tasks = [(x, y.double() - fields.climate(x)) for x, y in tasks] if anomaly else tasks
        kernel = learn(tasks, shape, steps=size["gp_steps"])
        return Smooth.of(kernel, fields.climate if anomaly else None), kernel.numbers

    def blind() -> Made:
        x = fields.x.expand(len(fields.past), -1, -1).reshape(1, -1, 2)
        return train(recipe(config, **size["blind"]), x, fields.past.reshape(1, -1, 1), seed=config["seed"]), {}

    def alone() -> Made:
        scaling = (fields.x.mean(0), fields.x.std(0), fields.past.mean().reshape(1), fields.past.std().reshape(1))
        return FittedNetwork(recipe(config, **size["alone"]), scaling), {}

    return {
        "GP, fitted to each field": Rival(lambda: (FittedGP(shape, steps=size["gp_steps"]), {}), 1),
        "GP, learned from training fields": Rival(partial(learned, False), 1),
        "anomaly GP, fitted to each field": Rival(lambda: (FittedGP(shape, fields.climate, size["gp_steps"]), {}), 1),
        "anomaly GP, learned from training fields": Rival(partial(learned, True), 1),
        "normal over the cells": Rival(places, 1),
        "each cell's past mean and variance": Rival(lambda: (PlacesNormal.of(fields.x, fields.past, 1.0), {}), 1),
        "mean-field network, all training fields": Rival(blind),
        "mean-field network, each field alone": Rival(alone),
    }


def report(done: Study, fields: Fields, found: Mapping[str, Rival], hours: Sequence[int] = (0, -1)) -> None:
    """Draw the pictures."""
    model, _ = done.trained()
    gp, _ = found["GP, learned from training fields"].make()
    anomaly, _ = found["anomaly GP, learned from training fields"].make()
    others = {"GP": gp, "anomaly GP": anomaly}
    part = done.parts["test"]
    condition = list(part.splits)[min(1, len(part.splits) - 1)]
    for i in hours:
        shown = pictures.maps(model, others, part.splits[condition][i], fields, f"{part.names[i]}:00, {condition}", done.config["particles"])
        save_figure(shown, done.out / ("maps.png" if i == hours[0] else "maps-last.png"))
    save_figure(pictures.draws(model, fields, 4, seed=done.config["seed"]), done.out / "prior.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with era5/*.nc")
    parser.add_argument("--out", type=Path, default=Path("runs/era5_fields"))
    parser.add_argument("--minutes", type=float, help="train for so long at most, with fewer steps if need be")
    parser.add_argument("--quick", action="store_true", help="a run of seconds, to see that everything works")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        done, fields = study(args.out, args.data, settings(args.quick))
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    found = rivals(fields, done.config)
    done.run(found, args.minutes)
    report(done, fields, found)
    print((args.out / "tables.md").read_text())


if __name__ == "__main__":
    main()
