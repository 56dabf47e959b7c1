"""Learn from windows of one electrocardiogram, complete later ones and those of other patients, and compare with what else one would try.

    OMP_NUM_THREADS=1 python -m experiments.ecg_windows.run --data ../shared/data --out runs/ecg_windows

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
from experiments.ecg_windows import pictures
from experiments.ecg_windows.windows import Windows, read

__all__ = ["main", "rivals", "settings", "study"]


def settings(quick: bool = False) -> Config:
    """Return the settings of config.json; with `quick` those of a run of seconds."""
    return read_settings(Path(__file__).parent / "config.json", quick)


def study(out: Path, data: Path, config: Config) -> tuple[Study, Windows]:
    """Return the study and its windows."""
    windows = read(data, config["data"])
    validation = windows.tasks("validation", config["data"]["every"]["validation"])
    parts = {name: windows.part(name, seed=3) for name in windows.y if name not in ("train", "validation")}
    return Study(out, config, windows.tasks("train"), validation, parts), windows


def rivals(windows: Windows, config: Config) -> dict[str, Rival]:
    """Return the rivals by name."""
    return standard(windows.past, partial(windows.part, "validation", seed=4), config, "window", "time", anomaly=False)


def report(done: Study, windows: Windows, results: Mapping[str, Any]) -> None:
    """Draw the pictures."""
    model, _ = done.trained()
    gp = Smooth.of(Kernel.of(results["numbers"]["GP, learned from training windows"]))
    for name, part in done.parts.items():
        count = done.config["pictures"]["windows"]
        chosen = list(range(0, len(part.names), max(1, len(part.names) // count)))[:count]
        shown = pictures.windows(model, gp, part, chosen, done.config["particles"])
        save_figure(shown, done.out / f"{name}.png")
    save_figure(pictures.draws(model, windows, 4, seed=done.config["seed"]), done.out / "prior.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the records in ecg/")
    parser.add_argument("--out", type=Path, default=Path("runs/ecg_windows"))
    parser.add_argument("--minutes", type=float, help="train for so long at most, with fewer steps if need be")
    parser.add_argument("--rivals", action="store_true", help="score the rivals only, and train nothing of ours")
    parser.add_argument("--quick", action="store_true", help="a run of seconds, to see that everything works")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        done, windows = study(args.out, args.data, settings(args.quick))
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    if args.rivals:
        done.against(rivals(windows, done.config))
        return
    report(done, windows, done.run(rivals(windows, done.config), args.minutes))
    print((args.out / "tables.md").read_text())


if __name__ == "__main__":
    main()
