"""What each column of a table is for: as the user says, or as a guess that is said, or a question with the columns laid out.

A single table is most often taken for a single data set, and the first question of a newcomer is how it becomes many. So where the task is
not named, nothing is guessed: the columns that could name it are listed, with how many tasks each would give.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnnp.data.codings import Cells
from bnnp.data.collection import FEW_TASKS
from bnnp.data.frames import Source

__all__ = ["ROW", "Roles", "check_names", "find_roles", "need_tasks", "tuple_of"]

GUESSED_LEVELS = 20
"""A text column is guessed to be an input where it has no more different values than this."""
LISTED = 30
ROW = "row"
"""The input of a series that comes with nothing to predict from: the number of the row, from the start of the window."""


@dataclass(frozen=True)
class Roles:
    """Hold the names of the columns by what they are for, and what was guessed."""

    task: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    order: str | None
    notes: tuple[str, ...] = ()

    @property
    def used(self) -> tuple[str, ...]:
        """Return the names of all columns that are used, each once."""
        return tuple(dict.fromkeys([*self.task, *self.inputs, *self.outputs, *([self.order] if self.order else [])]))


def tuple_of(value: Any, what: str) -> tuple[str, ...]:
    """Return one name or several as a tuple.

    Raises:
        TypeError: something that is no name.
        ValueError: no names, or one twice.
    """
    if value is None:
        return ()
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else value
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"Expected {what} as the name of a column, or a list of names. Got {value!r}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Expected {what} as different names of columns. Got {value!r}.")
    return names


def check_names(names: Sequence[str], source: Source) -> None:
    """Raise ValueError for the name of a column that is not there, with those that are."""
    for name in names:
        if name not in source.names:
            close = difflib.get_close_matches(name, source.names, 1, 0.6)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            some = _some([repr(own) for own in source.names])
            raise ValueError(f"Expected a column {name!r} in {source.where}. Got the columns {some}.{hint}")


def listing(cells: Mapping[str, Cells], source: Source) -> str:
    """Return the columns with kind, number of different values and share missing, one a line."""
    lines = ["The columns are:"]
    shown = list(cells.values())[:LISTED]
    width = max(len(cell.name) for cell in shown)
    for cell in shown:
        share = float(cell.missing.mean())
        gaps = f", {100 * share:.3g} % missing" if share else ""
        found, at = (str(part) for part in cell.problem[:2]) if cell.problem else ("", "")
        trouble = f" ({found.rpartition('Got ')[2]}{source.row(int(at))})" if at else ""
        lines.append(f"  {cell.name:<{width}}  {cell.kind:<8} {cell.distinct()} different{gaps}{trouble}")
    return "\n".join([*lines, *([f"  and {len(cells) - LISTED} more"] if len(cells) > LISTED else [])])


def command(source: Source, task: str, inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """Return the command that names the roles."""
    words = ["bnnp describe", _quoted(source.where), "--task", _quoted(task)]
    words += ["--inputs", *map(_quoted, inputs)] if inputs else []
    words += ["--outputs", *map(_quoted, outputs)] if outputs else []
    return " ".join(words)


def _quoted(word: str) -> str:
    return word if word and all(c.isalnum() or c in "_./-" for c in word) else "'" + word.replace("'", "'\\''") + "'"


def need_tasks(cells: Mapping[str, Cells], source: Source, inputs: Sequence[str], outputs: Sequence[str]) -> ValueError:
    """Return the error that says that one data set is not many, and how it becomes many."""
    numbers = [c.name for c in cells.values() if c.kind in ("number", "integer")]
    predicted = outputs or tuple(numbers[-1:])  # the last column of numbers is most often what is predicted
    found = []
    for place, cell in enumerate(cells.values()):
        rows = int((~cell.missing).sum())
        count = cell.distinct() if cell.kind in ("text", "integer", "date", "boolean") and cell.name not in predicted else 0
        if 2 <= count <= rows / 2:
            worse = (cell.name in inputs, count < FEW_TASKS, rows / count < 5, place)
            found.append((*worse, cell.name, count, rows / count))
    found.sort()
    times = [c.name for c in cells.values() if c.kind == "date"]
    series = f"cut it into windows, with window=50 and order={times[0]!r}" if times else "cut it into windows, with window=50 and order="
    series += "." if times else " the column of time."
    if found:
        how = "Name the column, or columns, that tell one task from another; these could:\n"
        how += "\n".join(f"  {name!r}: {count} tasks of about {size:.3g} points" for *_, name, count, size in found[:8])
        how += f"\nFor instance: {command(source, found[0][4], inputs, outputs)}"
        if found[0][1]:
            how += f"\nBut {found[0][5]} tasks are few to learn a prior from: name a finer column, or several together."
        how += f"\nOr, if the table is one long series, {series}"
    else:
        how = f"No column seems to name tasks. If the table is one long series, {series}"
    return ValueError(
        f"Expected many data sets (tasks), to learn what they have in common. Got one table, {source.where}, and no word on how it is cut. "
        f"{how}\n{listing(cells, source)}"
    )


def find_roles(cells: Mapping[str, Cells], source: Source, given: Roles, windows: bool) -> Roles:
    """Fill in what was not said.

    Arguments:
        cells: the columns.
        source: for messages.
        given: what was said; what was not is empty.
        windows: the table is cut in windows.

    Raises:
        ValueError: nothing fits.
    """
    notes: list[str] = []
    order = given.order
    if windows and order is None:
        free = [c.name for c in cells.values() if c.kind == "date" and c.name not in (*given.task, *given.outputs)]
        order = free[0] if len(free) == 1 else None
        notes.append(f"Rows were put in the order of {order!r}." if order else "Rows were taken to be in order of time as they stand.")
    outputs = given.outputs
    if not outputs:
        free = [c.name for c in cells.values() if c.name not in (*given.task, *given.inputs, order)]
        fits = [n for n in free if cells[n].kind in ("number", "integer") and cells[n].distinct() > 1]
        if not fits:
            raise ValueError(f"Expected outputs, columns to predict. Got none that could be one. {listing(cells, source)}")
        outputs = (fits[-1],)
        if len(fits) > 1:
            notes.append(f"Nothing was said about outputs: the last column of numbers, {fits[-1]!r}, was taken.")
        else:
            notes.append(f"Nothing was said about outputs: {fits[-1]!r} was taken.")
    inputs = given.inputs
    if not inputs and windows and order is not None:
        inputs = (order,)
        notes.append(f"Nothing was said about inputs: {order!r} was taken.")
    elif not inputs:
        inputs, left = _guess_inputs(cells, {*given.task, *outputs})
        if not inputs and windows and order is None and ROW not in cells:
            inputs, order = (ROW,), ROW
        if not inputs:
            raise ValueError(f"Expected inputs, columns to predict from. Got none that could be one. {listing(cells, source)}")
        taken = f"{_some([repr(name) for name in inputs])} {'was' if len(inputs) == 1 else 'were'} taken."
        notes.append(f"Nothing was said about inputs: {taken}" + (f" Left out: {left}." if left else ""))
    both = sorted({*outputs} & {*given.task, *inputs, *([order] if order else [])})
    if both:
        raise ValueError(f"Expected outputs that are not also inputs, task or order. Got {', '.join(map(repr, both))} as both.")
    return Roles(given.task, inputs, outputs, order, tuple(notes))


def _guess_inputs(cells: Mapping[str, Cells], taken: set[str]) -> tuple[tuple[str, ...], str]:
    """Return columns that vary and can become numbers, and those that were left out with the reason."""
    fits, left = [], []
    nameless = [name == f"column_{j + 1}" for j, name in enumerate(cells)]
    for cell, made_up in zip(cells.values(), nameless, strict=True):
        if cell.name in taken:
            continue
        count = cell.distinct()
        if made_up and not all(nameless) and cell.values is not None and (np.diff(cell.values) == 1).all():
            left.append(f"{cell.name!r} (numbers the rows)")
            continue
        if count < 2:
            left.append(f"{cell.name!r} (never varies)")
        elif cell.kind == "mixed" or np.mean(cell.missing) > 0.5:
            left.append(f"{cell.name!r} ({'of mixed kinds' if cell.kind == 'mixed' else 'mostly missing'})")
        elif cell.kind == "text" and count > min(GUESSED_LEVELS, (~cell.missing).sum() / 2):
            left.append(f"{cell.name!r} ({count} different texts)")
        else:
            fits.append(cell.name)
    return tuple(fits), _some(left)


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:LISTED]) + (f" and {len(words) - LISTED} more" if len(words) > LISTED else "")
