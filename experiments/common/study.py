"""One study of real data: train the model once, score it and its rivals on the same splits, and put the scores into tables.

Each piece is a file in the output folder, written when it is done, so a study that was stopped goes on where it was. `log.jsonl` has one
line for each piece: what, when, and how many seconds of which clock.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bnnp
from bnnp.checkpoint import write_atomically
from bnnp.evaluation import Model, evaluate, mean_and_se
from experiments.common.meanfield import Recipe

__all__ = ["OURS", "SCORES", "Part", "Rival", "Study", "markdown", "read_settings", "recipe", "split"]

OURS = "this model"
SCORES = {
    "joint_log_density": "joint",
    "marginal_log_density": "marginal",
    "rmse": "rmse",
    "crps": "crps",
    "coverage_0.5": "inside 50 %",
    "coverage_0.8": "inside 80 %",
    "coverage_0.95": "inside 95 %",
}
HEAD = (
    "Mean ± standard error over tasks, in brackets over the means of blocks (days of hours, minutes of windows): "
    "tasks of a block are alike."
)
Config = dict[str, Any]
Split = tuple[Tensor, Tensor, Tensor, Tensor]
PILOT_STEPS, MOST_TRUST = 20, 8
KEYS, NETWORK_KEYS = ("data", "particles", "rivals", "seed"), ("mean_field", "network")
"""Settings that the scores of a rival depend on, and of one that is a network."""


@dataclass(frozen=True)
class Part:
    """Hold the tasks of one part of the data, split into context and targets.

    Arguments:
        splits: for each condition, such as "10 % seen", the tasks (xc, yc, xt, yt).
        names: of the tasks.
        blocks: what each task belongs to above that (the day of an hour): tasks of one block move together.
    """

    splits: Mapping[str, Sequence[Split]]
    names: Sequence[str]
    blocks: Sequence[str]


@dataclass(frozen=True)
class Rival:
    """Say how a rival is made, and how many tasks it takes at once.

    Arguments:
        make: returns it, trained where training tasks teach it anything, with numbers worth keeping.
        batch: tasks conditioned at once.
        of_network: it has the size of our network, so its scores hold for that network only.
    """

    make: Callable[[], tuple[Model, dict[str, Any]]]
    batch: int = 8
    of_network: bool = False


@dataclass(frozen=True)
class Study:
    """Hold a study: settings, tasks, and a folder.

    Arguments:
        out: folder.
        config: settings, as in config.json.
        train: tasks (x, y).
        validation: tasks (x, y) that choose the step of training that is kept.
        parts: what is scored, "test" first.
    """

    out: Path
    config: Config
    train: Sequence[tuple[Tensor, Tensor]]
    validation: Sequence[tuple[Tensor, Tensor]]
    parts: Mapping[str, Part]

    def log(self, what: str, start: tuple[float, float], **more: Any) -> dict[str, float]:
        """Add a line to the log and return the seconds since the start, by the wall and of this process."""
        spent = {"seconds": time.perf_counter() - start[0], "processor_seconds": time.process_time() - start[1]}
        self.out.mkdir(parents=True, exist_ok=True)
        line = {"what": what, "when": datetime.now(UTC).isoformat(timespec="seconds"), **{k: round(v, 2) for k, v in spent.items()}, **more}
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{what}: {spent['seconds']:.0f} s", flush=True)
        return spent

    def build(self) -> bnnp.BNNP:
        """Return the network before training."""
        net = dict(self.config["network"])
        prior, noise = bnnp.Prior(**net.pop("prior")), bnnp.Gaussian(**net.pop("noise"))
        return bnnp.BNNP(self.train[0][0].shape[1], 1, prior=prior, likelihood=noise, seed=self.config["seed"], **net)

    def steps(self, minutes: float | None) -> int:
        """Return how many steps are taken: those of the settings, or fewer so that they take so many minutes; kept in a file."""
        most, file = int(self.config["training"]["steps"]), self.out / "steps.json"
        if file.is_file():
            return int(json.loads(file.read_text())["steps"])
        taken = most
        if minutes is not None:
            start = time.perf_counter()
            bnnp.meta_train(self.build(), self.train, progress=False, **{**self._training(), "steps": min(PILOT_STEPS, most)})
            one = (time.perf_counter() - start) / min(PILOT_STEPS, most)
            taken = max(1, min(most, int(60 * minutes / one)))
        write_atomically(file, json.dumps({"steps": taken, "minutes": minutes}).encode())
        return taken

    def _training(self) -> dict[str, Any]:
        return {**self.config["training"], "context": tuple(self.config["training"]["context"]), "seed": self.config["seed"]}

    def trained(self, minutes: float | None = None, progress: bool = True) -> tuple[bnnp.BNNP, dict[str, Any]]:
        """Return the trained model and how training went, from the folder where it has been done, or after training or the rest of it."""
        wanted = {key: self.config[key] for key in ("network", "training", "data", "seed")}
        note = self.out / "model" / "settings.json"
        found = json.loads(note.read_text()) if note.is_file() else None
        if found is not None:
            _same(found["settings"], wanted, note)
            return bnnp.load(note.parent), found["training"]
        model, steps, start = self.build(), self.steps(minutes), (time.perf_counter(), time.process_time())
        result = bnnp.meta_train(
            model,
            self.train,
            validation=self.validation,
            folder=self.out / "training",
            resume=True,
            progress=progress,
            **{**self._training(), "steps": steps},
        )
        spent = self.log("training", start, steps=steps, best_step=result.best_step)
        # What was spent before a stop is in the seconds of the run; the share of the processor is that of the last piece.
        share = min(1.0, spent["processor_seconds"] / spent["seconds"])
        went = {
            "steps": steps,
            "best_step": result.best_step,
            "validation": result.best_score,
            "skipped": result.skipped,
            "seconds": result.seconds,
            "processor_seconds": result.seconds * share,
            "noise_std": float(model.noise_std.item()) if model.noise_std is not None else None,
        }
        model.save(note.parent)
        write_atomically(note, json.dumps({"settings": wanted, "training": went}, indent=1).encode())
        return model, went

    def record(self, name: str, make: Callable[[], dict[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
        """Return a piece from its file, or make and write it; `keys` are the settings that it depends on."""
        file = self.out / "scores" / f"{name.replace(' ', '_').replace(',', '').replace('/', '-')}.json"
        wanted = {key: self.config[key] for key in keys}
        if file.is_file():
            whole: dict[str, Any] = json.loads(file.read_text())
            _same(whole.pop("settings"), wanted, file)
            return whole
        start = (time.perf_counter(), time.process_time())
        made = make()
        made["spent"] = self.log(name, start)
        write_atomically(file, json.dumps({**made, "settings": wanted}).encode())
        return made

    def scores(self, model: Model, rival: Rival) -> dict[str, Any]:
        """Return the scores of every task of every part under every condition."""
        found: dict[str, Any] = {}
        for part, held in self.parts.items():
            for condition, splits in held.splits.items():
                each = evaluate(model, splits, num_samples=self.config["particles"], seed=self.config["seed"], batch_size=rival.batch)
                found.setdefault(part, {})[condition] = {short: each.per_task[name].tolist() for name, short in SCORES.items()}
        return found

    def trust(self, model: bnnp.BNNP, particles: int = 128) -> dict[str, Any]:
        """Return what the model itself says of contexts (8 of a condition, evenly apart): sentences, and the numbers behind them."""
        found: dict[str, Any] = {}
        for part, held in self.parts.items():
            for condition, splits in held.splits.items():
                some = splits[:: math.ceil(len(splits) / MOST_TRUST)]
                said = [model.condition(xc, yc, num_samples=particles, seed=self.config["seed"]).diagnose() for xc, yc, _, _ in some]
                numbers = {
                    k: [float(getattr(d, k)) for d in said] for k in ("p_value_y", "distance_y", "pareto_k", "effective_sample_size")
                }
                found.setdefault(part, {})[condition] = {"sentences": [str(d.sentence) for d in said], **numbers}
        return found

    def run(self, rivals: Mapping[str, Rival], minutes: float | None = None, progress: bool = True) -> dict[str, Any]:
        """Train, score everything, and return and write the results."""
        model, went = self.trained(minutes, progress)
        own = ("data", "network", "particles", "seed", "training")
        records = {OURS: self.record(OURS, lambda: {"scores": self.scores(model, Rival(lambda: (model, {}), 4))}, own)}
        records |= self.against(rivals)
        said = self.record("trust", lambda: {"trust": self.trust(model)}, own)["trust"]
        whole = {
            "config": self.config,
            "training": went,
            "parts": {part: {"tasks": list(held.names), "blocks": list(held.blocks)} for part, held in self.parts.items()},
            "summary": {part: self._summary(part, records) for part in self.parts},
            "trust": {part: {c: _said(one) for c, one in of.items()} for part, of in said.items()},
            "numbers": {name: record["numbers"] for name, record in records.items() if record.get("numbers")},
            "seconds": {name: record["spent"]["processor_seconds"] for name, record in records.items()},
        }
        write_atomically(self.out / "results.json", (json.dumps(_plain(whole), indent=1) + "\n").encode())
        write_atomically(self.out / "tables.md", markdown(whole).encode())
        return whole

    def against(self, rivals: Mapping[str, Rival]) -> dict[str, dict[str, Any]]:
        """Return the records of the rivals; they need no training of ours."""
        found = {}
        for name, rival in rivals.items():
            keys = KEYS + (NETWORK_KEYS if rival.of_network else ())
            found[name] = self.record(name, partial(self._of, rival), keys)
        return found

    def _of(self, rival: Rival) -> dict[str, Any]:
        model, numbers = rival.make()
        return {"scores": self.scores(model, rival), "numbers": numbers}

    def _summary(self, part: str, records: Mapping[str, Any]) -> dict[str, Any]:
        """Return for each condition and method: mean, standard error over tasks, and over the means of blocks; and the lead over ours."""
        blocks, found = list(self.parts[part].blocks), {}
        for condition in self.parts[part].splits:
            ours = records[OURS]["scores"][part][condition]
            for method, record in records.items():
                own = record["scores"].get(part, {}).get(condition)
                if own is None:
                    continue
                row = {score: _statistics(values, blocks) for score, values in own.items()}
                for score in ("joint", "marginal", "rmse", "crps"):
                    row[f"{score} less ours"] = _statistics([a - b for a, b in zip(own[score], ours[score], strict=True)], blocks)
                found.setdefault(condition, {})[method] = row
        return found


def read_settings(file: Path, quick: bool = False) -> Config:
    """Return the settings of a file; with `quick` with those under "quick" in their place, for a run of seconds."""
    config: Config = json.loads(file.read_text())
    small = config.pop("quick")
    return {k: {**v, **small.get(k, {})} if isinstance(v, dict) else small.get(k, v) for k, v in config.items()} if quick else config


def split(x: Tensor, y: Tensor, seen: Tensor) -> Split:
    """Return (xc, yc, xt, yt) of a task of which the points `seen`, a mask (N,), are the context."""
    return x[seen], y[seen], x[~seen], y[~seen]


def recipe(config: Config, **changes: Any) -> Recipe:
    """Return the mean-field network of the size of the network of the settings."""
    net = config["network"]
    shape = {"hidden": tuple(net["hidden"]), "activation": net["activation"], "input_scale": net["prior"].get("input_scale", 1.0)}
    return Recipe(**shape, **changes)


def _statistics(values: Sequence[float], blocks: Sequence[str]) -> dict[str, float]:
    each = torch.tensor(values, dtype=torch.float64)
    mean, se = mean_and_se(each)
    of = [each[[b == name for b in blocks]].mean() for name in dict.fromkeys(blocks)]
    return {"mean": mean, "se": se, "block_se": mean_and_se(torch.stack(of))[1]}


def _said(one: Mapping[str, Any]) -> dict[str, Any]:
    """Sum up sentences by how they begin, with the median of the numbers behind them."""
    starts = [sentence.split(":")[0].split(",")[0] for sentence in one["sentences"]]
    middle = {k: float(torch.tensor(v).nanmedian()) for k, v in one.items() if k != "sentences"}
    return {"sentences": {s: starts.count(s) for s in dict.fromkeys(starts)}, "example": one["sentences"][0], "median": middle}


def _same(found: Any, wanted: Any, file: Path) -> None:
    if json.loads(json.dumps(wanted)) != found:
        raise SystemExit(f"Expected {file} with the settings of this run. Got others. Give another --out, or remove the folder.")


def _plain(value: Any) -> Any:
    """Put None for what is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(whole: Mapping[str, Any]) -> str:
    """Return the tables of all parts: one for each score, methods down, conditions across."""
    lines = [HEAD, ""]
    for part, conditions in whole["summary"].items():
        for score in ("joint", "marginal", "rmse", "crps", "inside 80 %"):
            methods = list(dict.fromkeys(method for of in conditions.values() for method in of))
            lines += [f"**{part}, {score}**", "", f"| method | {' | '.join(conditions)} |", f"|---|{'---|' * len(conditions)}"]
            for method in methods:
                cells = [_cell(of.get(method), score) for of in conditions.values()]
                lines.append(f"| {method} | {' | '.join(cells)} |")
            lines.append("")
    for part, of in whole["trust"].items():
        for condition, one in of.items():
            counts = ", ".join(f"{n} times '{s}'" for s, n in one["sentences"].items())
            lines.append(f"- {part}, {condition}: {counts}. The first: {one['example']}")
    return "\n".join([*lines, ""])


def _cell(row: Mapping[str, Any] | None, score: str) -> str:
    if row is None:
        return ""
    if score.startswith("inside"):
        return f"{100 * row[score]['mean']:.0f} %"
    blocks = row[score]["block_se"]
    return f"{row[score]['mean']:.3f} ± {row[score]['se']:.3f}" + ("" if math.isnan(blocks) else f" ({blocks:.3f})")
