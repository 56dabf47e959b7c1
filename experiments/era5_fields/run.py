"""Learn from hourly maps of temperature, complete maps of later days from a few cells, and compare with what else one would try.

    OMP_NUM_THREADS=1 python -m experiments.era5_fields.run --data ../shared/data --out runs/era5_fields

Goes on where it was stopped. Writes results.json, tables.md and pictures into --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bnnp.plots import save_figure
from experiments.common.gaussian import Kernel, Smooth
from experiments.common.rivals import standard
from experiments.common.study import Config, Rival, Study, read_settings
from experiments.era5_fields import pictures
from experiments.era5_fields.fields import Fields, read

__all__ = ["main", "rivals", "settings", "study"]


def settings(quick: bool = False) -> Config:
    """Return the settings of config.json; with `quick` those of a run of seconds."""
    return read_settings(Path(__file__).parent / "config.json", quick)


def study(out: Path, data: Path, config: Config) -> tuple[Study, Fields]:
    """Return the study and its maps."""
    fields = read(data, config["data"])
    size = config["data"]
    train_tasks = fields.subsets("train", size["subsets"], size["points"], seed=1)
    validation = fields.subsets("validation", 1, size["points"], seed=2, every=size["validation_every"])
    return Study(out, config, train_tasks, validation, {"test": fields.part("test", seed=3)}), fields


def rivals(fields: Fields, config: Config) -> dict[str, Rival]:
    """Return the rivals by name."""
    return standard(fields.past, partial(fields.part, "validation", seed=4), config, "field", "cell", anomaly=True)


def report(done: Study, fields: Fields, results: Mapping[str, Any], hours: Sequence[int] = (0, -1)) -> None:
    """Draw the pictures."""
    model, _ = done.trained()
    means = {"GP": None, "anomaly GP": fields.past.mean}
    others = {name: Smooth.of(Kernel.of(results["numbers"][f"{name}, learned from training fields"]), m) for name, m in means.items()}
    part = done.parts["test"]
    condition = list(part.splits)[min(1, len(part.splits) - 1)]
    for i in hours:
        title = f"{part.names[i]}:00, {condition} (grey: not seen; at errors and deviations: seen)"
        shown = pictures.maps(model, others, part.splits[condition][i], fields, title, done.config["particles"])
        save_figure(shown, done.out / ("maps.png" if i == hours[0] else "maps-last.png"))
    save_figure(pictures.draws(model, fields, 4, seed=done.config["seed"]), done.out / "prior.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with era5/*.nc")
    parser.add_argument("--out", type=Path, default=Path("runs/era5_fields"))
    parser.add_argument("--minutes", type=float, help="train for so long at most, with fewer steps if need be")
    parser.add_argument("--rivals", action="store_true", help="score the rivals only, and train nothing of ours")
    parser.add_argument("--quick", action="store_true", help="a run of seconds, to see that everything works")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        done, fields = study(args.out, args.data, settings(args.quick))
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    if args.rivals:
        done.against(rivals(fields, done.config))
        return
    report(done, fields, done.run(rivals(fields, done.config), args.minutes))
    print((args.out / "tables.md").read_text())


if __name__ == "__main__":
    main()
