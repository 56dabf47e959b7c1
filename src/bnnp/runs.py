"""A run: a model together with what is known of the data it was learned from, in one folder.

`bnnp.load` reads the numbers of a model. A run knows the names and units of its columns too, how its source was cut into tasks, and which
of them were held out, so that a file that comes later is read in the same way and the same tasks are judged again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnnp.checkpoint import FORMAT_VERSION, load, write_atomically
from bnnp.data.collection import Collection, Column
from bnnp.networks import BNNP

__all__ = ["RECORD", "Run", "read_record", "write_record"]

RECORD = "run.json"


def write_record(folder: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write what a run knows beside its model, replacing an older record in one step."""
    text = json.dumps({"format": "bnnp-run", "version": FORMAT_VERSION, **record}, indent=1)
    write_atomically(Path(folder) / RECORD, text.encode())


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write_record` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, something else, or of a newer format.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        what = "a folder without it" if Path(folder).is_dir() else "no such folder"
        raise FileNotFoundError(f"Expected {path}, as `bnnp fit` writes it. Got {what}. Check the path, or run `bnnp fit` first.")
    try:
        record = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"Expected JSON in {path}. Got {error}. The file is damaged or not ours; take another copy.") from None
    if not isinstance(record, dict) or record.get("format") != "bnnp-run":
        raise ValueError(f"Expected {path} to have format 'bnnp-run'. Got something else: this is no run of this package.")
    if not isinstance(record.get("version"), int) or record["version"] > FORMAT_VERSION:
        raise ValueError(
            f"Expected format version {FORMAT_VERSION} or older in {path}. Got {record.get('version')}. Update the package to read it."
        )
    missing = sorted({"inputs", "outputs", "recipe", "data", "config", "division"} - record.keys())
    if missing:
        raise ValueError(f"Expected {', '.join(missing)} in {path}. Got none. The file is damaged; take another copy.")
    return record


@dataclass(frozen=True, eq=False)
class Run:
    """Hold a model and what is known of its data.

    Arguments:
        model: trained.
        inputs: names and units of the columns of x.
        outputs: names and units of the columns of y.
        recipe: how the source was cut into tasks and encoded; `recipe["kind"]` is "table", "grid", "signal", "images" or "arrays".
        data: where the source was ("path"), its "fingerprint", number of "tasks", "points" and ranges, as `Collection.describe` gives them.
        config: the settings of the fit.
        division: names of the tasks of "train", "validation" and "test", and "how" they were chosen.
        folder: where the run is; None where it is in memory only.

    Example:
        >>> run = Run.of(BNNP(1, 1, hidden=(4,)), inputs=["t"], outputs=["level"])
        >>> str(run.inputs[0]), run.kind
        ('t', 'arrays')
    """

    model: BNNP
    inputs: tuple[Column, ...]
    outputs: tuple[Column, ...]
    recipe: Mapping[str, Any] = field(default_factory=lambda: {"kind": "arrays"})
    data: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    division: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @staticmethod
    def of(model: BNNP, inputs: Any = None, outputs: Any = None, **others: Any) -> Run:
        """Return a run of a model alone, with names given or made up."""
        sides = ((inputs, "x", model.x_dim), (outputs, "y", model.y_dim))
        named = [
            tuple(Column(name + (str(j + 1) if n > 1 else "")) for j in range(n)) if given is None else given for given, name, n in sides
        ]
        x, y = (tuple(c if isinstance(c, Column) else Column(c) for c in side) for side in named)
        return Run(model, x, y, **others)

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> Run:
        """Read a run from its folder, or a model alone where only that is there.

        Raises:
            FileNotFoundError: there is neither, or the fit did not come to its end.
            ValueError: it is damaged, something else, or of a newer format.
        """
        path = Path(folder)
        if not (path / RECORD).is_file():
            return Run.of(load(path), folder=path)
        record = read_record(path)
        if record.get("status") != "done" or not (path / "model.json").is_file():
            raise FileNotFoundError(
                f"Expected a finished fit in {path}. Got one that was stopped, or whose model.json is gone. Go on with: bnnp resume {path}"
            )
        model = load(path)
        x, y = (tuple(Column(**column) for column in record[side]) for side in ("inputs", "outputs"))
        if (len(x), len(y)) != (model.x_dim, model.y_dim):
            raise ValueError(f"Expected {RECORD} and model.json of one fit in {path}. Got {len(x)} inputs for a model of {model.x_dim}.")
        return Run(model, x, y, record["recipe"], record["data"], record["config"], record["division"], path)

    @property
    def kind(self) -> str:
        """Return the kind of the source."""
        return str(self.recipe.get("kind", "arrays"))

    def part(self, name: str, collection: Collection) -> Collection:
        """Return the tasks of "train", "validation" or "test" among those of the same source read again.

        Raises:
            ValueError: the source has no such tasks: it is another one.
        """
        places = {task: i for i, task in enumerate(collection.names)}
        lost = [task for task in self.division[name] if task not in places]
        if lost:
            raise ValueError(
                f"Expected the tasks of the fit in this source. Got a source without {len(lost)} of them, the first {lost[0]!r}. "
                "All tasks of another source are new: take the whole of it."
            )
        return collection.subset([places[task] for task in self.division[name]])
