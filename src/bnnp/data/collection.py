"""A collection: many tasks cut from one source, with the names of their columns, read one at a time.

Every reader of files (`bnnp.data.read_table`, `read_grid`, `read_signals`, `read_images`) returns one. It is a sequence of triples
(x, y, mask), so `bnnp.meta_train` and `bnnp.evaluate` take it as it is; and it remembers how it was cut (`recipe`), so that a file that
comes later is cut and encoded in the same way.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

__all__ = ["Collection", "Column", "Description", "Division", "divide"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
Triple = tuple[FloatArray, FloatArray, BoolArray]

FEW_TASKS = 20
"""Fewer tasks than this are few to learn a prior from; the tool says so."""
SAMPLED = 200
"""How many tasks a description of a large collection looks into."""


@dataclass(frozen=True)
class Column:
    """Name one column of x or y as the model sees it.

    Arguments:
        name: what it is called, for instance "temperature", or "site=north" for one of several columns that encode a category.
        unit: in which it is measured; "" where that is not known.
    """

    name: str
    unit: str = ""

    def __str__(self) -> str:
        """Return the name with the unit in brackets."""
        return f"{self.name} [{self.unit}]" if self.unit else self.name


@dataclass(frozen=True)
class Description:
    """Say what a collection holds.

    Arguments:
        kind: of the source: "table", "grid", "signal", "images" or "arrays".
        tasks: number of tasks.
        points: smallest, median and largest number of points of a task.
        inputs: for each input its name, unit, smallest, mean and largest value.
        outputs: the same for each output, and the share that is missing.
        sampled: number of tasks that were read for the ranges; all of them where it equals `tasks`.
        notes: what was dropped, encoded or assumed, one sentence each.
        advice: what the reader should know before learning from it, one sentence each.
    """

    kind: str
    tasks: int
    points: tuple[int, float, int]
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    sampled: int
    notes: tuple[str, ...]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain numbers, strings and lists."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def __str__(self) -> str:
        """Return a table for a terminal."""
        low, middle, high = self.points
        sizes = f"{low}" if low == high else f"{low} to {high} (median {middle:g})"
        lines = [f"{self.kind}: {self.tasks} task{'' if self.tasks == 1 else 's'} of {sizes} points"]
        named = [("input", row) for row in self.inputs] + [("output", row) for row in self.outputs]
        width = max(len(str(Column(row["name"], row["unit"]))) for _, row in named)
        for side, row in named:
            name = str(Column(row["name"], row["unit"]))
            gaps = f", {100 * row['missing']:.3g} % missing" if row.get("missing") else ""
            lines.append(f"  {side:<6} {name:<{width}}  {row['min']:.6g} to {row['max']:.6g}, mean {row['mean']:.6g}{gaps}")
        if self.sampled < self.tasks:
            lines.append(f"  (ranges of {self.sampled} tasks, evenly spaced)")
        return "\n".join([*lines, *(f"- {note}" for note in self.notes), *(f"! {line}" for line in self.advice)])


@dataclass(frozen=True, eq=False)
class Collection(Sequence[Triple]):
    """Hold many tasks of one source, each read when it is asked for: `collection[i]` is (x, y, mask).

    x has shape (n, d_x) and y (n, d_y), in the units of the source, float64; the mask has shape (n, d_y) and is True where an output was
    observed. What was not observed is NaN in y. Inputs are always there.

    Arguments:
        read: gives task number i.
        sizes: number of points of each task, those without any output included.
        names: of the tasks, for people; where two are equal, later ones get a number.
        inputs: the columns of x.
        outputs: the columns of y.
        recipe: how the source was cut and encoded, as plain numbers, strings and lists; `recipe["kind"]` says by which reader.
        notes: what was dropped, encoded or assumed, one sentence each.
        fingerprint: tells one source from another.
        ordered: neighbouring tasks resemble one another (hours, windows of a series), so what is held out has to be a block.
        groups: what each task belongs to where there is something above tasks (the patient of a window); None where not.
        lazy: reading a task costs a look into a file.
        overlap: a task shares points with so many of those after it (windows with a stride shorter than their length).
        rows: of a table of points, the row of each point, one task after another; None where points are no rows.
        table: gives the columns of that table as they stand there, names of tasks as text.

    Example:
        >>> c = Collection.of([(np.zeros((3, 1)), np.ones(3)), (np.ones((2, 1)), np.ones(2))], inputs=["t"], outputs=["level"])
        >>> len(c), c[1][0].shape, c.names[1]
        (2, (2, 1), '1')
    """

    read: Callable[[int], Triple]
    sizes: Sequence[int]
    names: Sequence[str]
    inputs: tuple[Column, ...]
    outputs: tuple[Column, ...]
    recipe: Mapping[str, Any] = field(default_factory=lambda: {"kind": "arrays"})
    notes: tuple[str, ...] = ()
    fingerprint: str = ""
    ordered: bool = False
    groups: Sequence[str] | None = None
    lazy: bool = False
    overlap: int = 0
    rows: Any = None
    table: Callable[[], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            count: dict[str, int] = {}
            taken, names = set(self.names), []
            for name in self.names:
                new, number = name, count.get(name, 1)
                while name in count and new in taken:  # of "a", "a" and "a (2)" the number 2 is taken
                    number += 1
                    new = f"{name} ({number})"
                count[name] = number
                taken.add(new)
                names.append(new)
            object.__setattr__(self, "names", names)

    @staticmethod
    def of(tasks: Sequence[Any], inputs: Sequence[str | Column], outputs: Sequence[str | Column], **others: Any) -> Collection:
        """Return tasks in memory as a collection: pairs (x, y) or triples (x, y, mask) of arrays."""
        x_columns, y_columns = (tuple(c if isinstance(c, Column) else Column(c) for c in side) for side in (inputs, outputs))
        checked = [_triple(task, len(x_columns), len(y_columns), i) for i, task in enumerate(tasks)]
        others.setdefault("names", [str(i) for i in range(len(checked))])
        others.setdefault("fingerprint", _digest(checked))
        return Collection(checked.__getitem__, [len(x) for x, _, _ in checked], inputs=x_columns, outputs=y_columns, **others)

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self.sizes)

    def __getitem__(self, index: Any) -> Any:
        """Return a task as (x, y, mask), or for a slice a collection."""
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"Expected a task number from 0 to {len(self) - 1}. Got {i}.")
        return self.read(i % len(self))

    def __iter__(self) -> Iterator[Triple]:
        """Yield the tasks, each read when its turn comes."""
        return (self.read(i) for i in range(len(self)))

    @property
    def x_dim(self) -> int:
        """Return d_x."""
        return len(self.inputs)

    @property
    def y_dim(self) -> int:
        """Return d_y."""
        return len(self.outputs)

    @property
    def nbytes(self) -> int:
        """Return how much memory all tasks would take as float64."""
        return 8 * sum(self.sizes) * (self.x_dim + self.y_dim)

    def subset(self, index: Sequence[int]) -> Collection:
        """Return some of the tasks, in the order given."""
        at, read = [int(i) for i in index], self.read
        picked = None if self.groups is None else [self.groups[i] for i in at]
        mark = hashlib.sha256(f"{self.fingerprint} {at}".encode()).hexdigest()[:16]
        return Collection(
            lambda i: read(at[i]), [self.sizes[i] for i in at], [self.names[i] for i in at], self.inputs, self.outputs, self.recipe,
            self.notes, mark, self.ordered, picked, self.lazy, self.overlap,
        )  # fmt: skip

    def find(self, name: str) -> int:
        """Return the number of the task of this name.

        Raises:
            ValueError: there is none.
        """
        if name in self.names:
            return list(self.names).index(name)
        few = ", ".join(map(repr, self.names[:5])) + (f" and {len(self) - 5} more" if len(self) > 5 else "")
        raise ValueError(f"Expected the name of a task: {few}. Got {name!r}.")

    def describe(self) -> Description:
        """Return numbers and sentences that say what is in the collection; a large one is sampled."""
        count = min(len(self), SAMPLED)
        tasks = [self.read(int(i)) for i in np.linspace(0, len(self) - 1, count).round()] if count else []
        x = np.concatenate([x for x, _, _ in tasks]) if tasks else np.zeros((0, self.x_dim))
        y = np.concatenate([np.where(mask, y, np.nan) for _, y, mask in tasks]) if tasks else np.zeros((0, self.y_dim))
        sizes = np.asarray(self.sizes if len(self) else [0])
        return Description(
            kind=str(self.recipe.get("kind", "arrays")),
            tasks=len(self),
            points=(int(sizes.min()), float(np.median(sizes)), int(sizes.max())),
            inputs=tuple(_row(column, x[:, j]) for j, column in enumerate(self.inputs)),
            outputs=tuple({**_row(column, y[:, j]), "missing": _share(np.isnan(y[:, j]))} for j, column in enumerate(self.outputs)),
            sampled=count,
            notes=self.notes,
            advice=tuple(_advice(self, y)),
        )


def _triple(task: Any, x_dim: int, y_dim: int, index: int) -> Triple:
    x, y, *rest = task
    x, y = (np.asarray(part, dtype=np.float64) for part in (x, y))
    x, y = (part[:, None] if part.ndim == 1 else part for part in (x, y))
    if x.shape != (len(x), x_dim) or y.shape != (len(x), y_dim):
        raise ValueError(f"Expected task {index} with x (n, {x_dim}) and y (n, {y_dim}). Got shapes {x.shape} and {y.shape}.")
    mask = np.asarray(rest[0], dtype=np.bool_) if rest and rest[0] is not None else np.ones(len(x), dtype=np.bool_)
    mask = np.broadcast_to(mask[:, None] if mask.ndim == 1 else mask, y.shape) & ~np.isnan(y)
    return x, np.where(mask, y, np.nan), mask


def _digest(tasks: Sequence[Triple]) -> str:
    digest = hashlib.sha256()
    for x, y, _ in tasks:
        digest.update(str(x.shape).encode() + np.ascontiguousarray(x).tobytes() + np.ascontiguousarray(y).tobytes())
    return digest.hexdigest()[:16]


def _row(column: Column, values: FloatArray) -> dict[str, Any]:
    seen = values[~np.isnan(values)]
    low, mean, high = (float(f(seen)) if len(seen) else float("nan") for f in (np.min, np.mean, np.max))
    if abs(mean) < 1e-12 * max(abs(low), abs(high)):
        mean = 0.0  # rounding errors of a sum that is 0, such as the places of pixels
    return {"name": column.name, "unit": column.unit, "min": low, "mean": mean, "max": high}


def _share(flags: BoolArray) -> float:
    return float(flags.mean()) if len(flags) else 0.0


def _advice(collection: Collection, y: FloatArray) -> Iterator[str]:
    """Yield what a person should know before learning from the collection."""
    count, small = len(collection), sum(size < 5 for size in collection.sizes)
    if count < 2:
        yield f"There {'is 1 task' if count else 'are no tasks'}: a prior is learned from many. Cut the data by subject, day or window."
    elif count < FEW_TASKS:
        yield (
            f"{count} tasks are few: a prior learned from them may not hold for a new one. Cut the data into more (another task column, "
            "windows), or learn only a part of the prior and compare with a method that needs no prior (see the page on few tasks)."
        )
    if small:
        yield f"{small} of {count} tasks have fewer than 5 points; little can be learned from those."
    if count and np.isnan(y).all(0).any():
        yield "An output was never observed in the tasks looked at."


@dataclass(frozen=True)
class Division:
    """Say which tasks are learned from, which choose among models, and which judge: numbers of tasks.

    Arguments:
        train: learned from.
        validation: these choose the step that is kept.
        test: never used in fitting.
        how: a sentence that says how they were chosen.
    """

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]
    how: str


def divide(collection: Collection, validation: float = 0.15, test: float = 0.15, seed: int = 0) -> Division:
    """Divide tasks into training, validation and test tasks such that what is held out is as new as a new task will be.

    Whole groups are held out where there are ten or more; otherwise the last tasks of an ordered collection (of each group), without those
    that share points with a part before; otherwise tasks at random.

    Arguments:
        collection: of at least 2 tasks.
        validation: share of the tasks (or groups) held out to choose a model; 0 for none.
        test: share held out to judge it; 0 for none.
        seed: of the random choice.

    Raises:
        ValueError: shares that leave nothing to learn from.

    Example:
        >>> tasks = Collection.of([(np.zeros((3, 1)), np.ones(3))] * 10, inputs=["t"], outputs=["y"], ordered=True)
        >>> divide(tasks, 0.1, 0.2).test
        (8, 9)
    """
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise ValueError(f"Expected shares of validation and test tasks, together below 1. Got {validation} and {test}.")
    groups = collection.groups
    parts: list[list[int]] = [[], [], []]
    labels = sorted(set(groups)) if groups is not None else []
    if groups is not None and len(labels) >= 10:
        order = np.random.default_rng(seed).permutation(len(labels))
        cut = _cut([labels[i] for i in order], validation, test)
        place = {label: k for k, part in enumerate(cut) for label in part}
        for i, group in enumerate(groups):
            parts[place[group]].append(i)
        how = f"whole groups at random (seed {seed}): {', '.join(f'{len(part)}' for part in cut)} groups"
    elif collection.ordered:
        for label in labels or [""]:
            own = [i for i in range(len(collection)) if groups is None or groups[i] == label]
            for part, more in zip(parts, _apart(_cut(own, validation, test), collection.overlap), strict=True):
                part.extend(more)
        how = "the last tasks" + (" of each group" if len(labels) > 1 else "") + ", since neighbours resemble one another"
    else:
        order = np.random.default_rng(seed).permutation(len(collection))
        parts = _cut(order.tolist(), validation, test)
        how = f"at random (seed {seed})"
    train, held, judged = (tuple(sorted(int(i) for i in part)) for part in parts)
    if len(train) < 2:
        raise ValueError(
            f"Expected at least 2 tasks to learn from. Got {len(train)} of {len(collection)} after holding out {validation:g} for "
            f"validation and {test:g} for the test. Cut the data into more tasks, or hold out less."
        )
    return Division(train, held, judged, how)


def _cut(items: Sequence[Any], validation: float, test: float) -> list[list[Any]]:
    """Cut a row of things in three; every share above 0 gets at least one where there are five or more things."""
    n = len(items)
    least = 1 if n >= 5 else 0
    counts = [max(least, round(share * n)) if share > 0 else 0 for share in (validation, test)]
    start = n - sum(counts)
    return [list(items[:start]), list(items[start : start + counts[0]]), list(items[start + counts[0] :])]


def _apart(parts: list[list[int]], overlap: int) -> list[list[int]]:
    """Drop from the end of a part what shares points with the part that follows."""
    if overlap == 0:
        return parts
    train, held, judged = parts
    shorter = [part[: max(0, len(part) - overlap)] for part in (train, held)]  # a negative end would count from the other one
    return [shorter[0] if held or judged else train, shorter[1] if judged else held, judged]
