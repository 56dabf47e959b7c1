"""Tables as tasks: the rows of one patient, plant or day are a task; or the windows of a long series are.

A table is read in four steps, each in a module of its own: bytes to a checked text (`text`), any source to columns (`frames`), columns to
numbers (`codings`), rows to tasks (`cutting`). What was decided on the way is kept as a recipe, so that a file that comes later is read in
the same way, on the same clock and with the same categories.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bnnp.data.codings import UNITS, Cells, Coding, check_kind, dates_as_text, encode, examine, learn
from bnnp.data.collection import Collection, Column, Triple
from bnnp.data.cutting import Groups, cut_windows, group_rows, length_of, unlike
from bnnp.data.frames import Source, open_source
from bnnp.data.roles import ROW, Roles, check_names, find_roles, need_tasks, tuple_of

__all__ = ["read_points", "read_table"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Plan:
    """Say how a table is cut and encoded: the recipe.

    Arguments:
        task: columns whose values name the tasks, or the series that are cut in windows.
        inputs: codings of the inputs.
        outputs: codings of the outputs.
        order: coding of the column of time.
        window: length of a window; None for none.
        stride: from one window to the next.
        in_rows: both count rows, and not units of the column of time.
        since_start: the column of time is an input, and counts from the start of the window.
        dropped: columns of numbers that never varied, and are left out.
        categories: columns that are categories because it was said.
        names: given to the columns of the file.
    """

    task: tuple[str, ...]
    inputs: tuple[Coding, ...]
    outputs: tuple[Coding, ...]
    order: Coding | None = None
    window: float | None = None
    stride: float | None = None
    in_rows: bool = True
    since_start: bool = False
    dropped: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    names: tuple[str, ...] | None = None

    @property
    def roles(self) -> Roles:
        """Return the columns by what they are for."""
        inputs, outputs = (tuple(coding.column for coding in side) for side in (self.inputs, self.outputs))
        return Roles(self.task, inputs, outputs, self.order.column if self.order else None)

    @property
    def shifted(self) -> int | None:
        """Return which input is time since the start of a window."""
        return self.roles.inputs.index(self.order.column) if self.since_start and self.order else None

    @property
    def columns(self) -> tuple[Column, ...]:
        """Return the columns of x."""
        return tuple(column for coding in self.inputs for column in coding.columns if column.name not in self.dropped)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "kind": "table",
            "task": list(self.task),
            "inputs": [coding.to_dict() for coding in self.inputs],
            "outputs": [coding.to_dict() for coding in self.outputs],
            "order": self.order.to_dict() if self.order else None,
            "window": self.window,
            "stride": self.stride,
            "in_rows": self.in_rows,
            "since_start": self.since_start,
            "dropped": list(self.dropped),
            "categories": list(self.categories),
            "names": list(self.names) if self.names else None,
            "labels": {coding.column: list(coding.levels) for coding in self.outputs if coding.kind == "labels"},
        }

    @staticmethod
    def from_dict(recipe: Any) -> Plan:
        """Return what `to_dict` wrote.

        Raises:
            ValueError: it is something else.
        """
        if not isinstance(recipe, Mapping) or recipe.get("kind") != "table":
            kind = recipe.get("kind") if isinstance(recipe, Mapping) else type(recipe).__name__
            raise ValueError(f"Expected the recipe of a table. Got one of kind {kind!r}. Read the source with the reader of its kind.")
        try:
            return Plan(
                tuple(recipe["task"]),
                tuple(Coding.from_dict(coding) for coding in recipe["inputs"]),
                tuple(Coding.from_dict(coding) for coding in recipe["outputs"]),
                Coding.from_dict(recipe["order"]) if recipe["order"] else None,
                recipe["window"],
                recipe["stride"],
                bool(recipe["in_rows"]),
                bool(recipe["since_start"]),
                tuple(recipe["dropped"]),
                tuple(recipe["categories"]),
                tuple(recipe["names"]) if recipe["names"] else None,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"Expected a whole recipe of a table. Got one that is damaged: {error}.") from None


def read_table(
    source: Any,
    *,
    task: str | Sequence[str] | None = None,
    inputs: str | Sequence[str] | None = None,
    outputs: str | Sequence[str] | None = None,
    order: str | None = None,
    window: float | str | None = None,
    stride: float | str | None = None,
    units: Mapping[str, str] | None = None,
    categories: str | Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    day_first: bool | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    outputs_needed: bool = True,
    drop_missing_inputs: bool = False,
) -> Collection:
    """Cut a table into tasks.

    Numbers stay as they are, true and false become 1 and 0. Dates become days (hours or seconds where they span little) since the first
    one, times of the day hours. Text becomes one column of zeros and ones for each level as an input, and labels 0 to K - 1 as an output.
    An output that is missing (empty, NA, n/a, nan, null, -, ?) is masked; a missing input is refused, and so is an infinite number.
    What was not said is guessed where that is safe; `notes` of the collection say what was guessed, encoded and left out.

    Arguments:
        source: path of delimited text (also packed by gzip) or of a Parquet file, or a frame of pandas or polars.
        task: column, or columns, whose values name the tasks. With `window`: the series to cut.
        inputs: columns of x; None for all that are left and can be.
        outputs: columns of y; None for the last column of numbers.
        order: column by which the rows of a task are sorted.
        window: length of the windows in which each series is cut: rows, if a whole number; units of `order`, if not (7.0); or with dates as
            order a time ("24 h"). Where `order` is an input it becomes the time since the start of the window.
        stride: from the start of a window to that of the next; None for `window`.
        units: of columns, for people.
        categories: columns to treat as categories though their values are numbers.
        names: of the columns of a file without a header.
        day_first: whether 03/04/2020 is in April; None to find out from the other dates of the column.
        delimiter: of text; None to find out.
        encoding: of text; None to find out.
        recipe: of an earlier collection, to read this table in the same way; instead of all that says how to cut.
        outputs_needed: leave out points without any output.
        drop_missing_inputs: leave out points with a missing input.

    Returns:
        The tasks, sorted by name (by date where that is their name). Columns that never vary are left out of x.

    Raises:
        ValueError: a file that is no whole table; columns that are not there or not of one kind; a missing input or task, an infinite
            value, with its row as in the file; no task of two points; or no word on what the tasks are, with what could name them.
        TypeError: a source that is no table.
        OSError: a file that is not there or not to be read.
        ImportError: pandas or pyarrow is missing.

    Example:
        >>> import pandas
        >>> tasks = read_table(pandas.DataFrame({"plant": list("aabb"), "day": [1, 2, 1, 2], "height": [3.0, 4, 2, 5]}), task="plant")
        >>> tasks.names, tasks[1][1].ravel().tolist(), str(tasks.inputs[0])
        (['a', 'b'], [2.0, 5.0], 'day')
    """
    if recipe is not None:
        said = {"task": task, "inputs": inputs, "outputs": outputs, "order": order, "window": window, "stride": stride, "units": units}
        extra = [name for name, value in {**said, "categories": categories}.items() if value is not None]
        if extra:
            raise ValueError(f"Expected a recipe, or how to cut the table. Got both a recipe and {', '.join(extra)}. Leave one out.")
        plan = Plan.from_dict(recipe)
        table = _Table.open(source, names, plan.roles.used, (*plan.task, *plan.categories), delimiter, encoding, plan)
        table.examine(plan.roles.used, day_first, plan)
        return _cut(table, plan, plan.roles, outputs_needed, drop_missing_inputs)
    given = Roles(tuple_of(task, "task"), tuple_of(inputs, "inputs"), tuple_of(outputs, "outputs"), order)
    said_categories = tuple_of(categories, "categories")
    if order is not None and not isinstance(order, str):
        raise TypeError(f"Expected order as the name of a column. Got {order!r}.")
    if stride is not None and window is None:
        raise ValueError(f"Expected a window with the stride. Got stride={stride!r} and no window. Give both.")
    wanted = tuple(dict.fromkeys([*given.used, *said_categories, *(units or ())]))
    table = _Table.open(source, names, wanted, (*given.task, *said_categories), delimiter, encoding)
    cut = bool(given.task) or window is not None
    whole = not (given.inputs and given.outputs and cut and (window is None or order))
    table.examine(table.source.names if whole else given.used, day_first)
    if not cut:
        raise need_tasks(table.cells, table.source, given.inputs, given.outputs)
    roles = find_roles(table.cells, table.source, given, window is not None)
    table.notes.extend(roles.notes)
    table.examine([name for name in roles.used if name not in table.cells], day_first)
    timing = learn(table.cells[roles.order], np.arange(table.source.rows), table.source.row) if roles.order else None
    if timing is not None and timing.kind == "category":
        raise ValueError(f"Expected numbers or dates in {roles.order!r}, by which rows are sorted. Got text. Name another column.")
    plan = Plan(roles.task, (), (), timing, categories=said_categories, names=tuple(names) if names else None)
    if window is not None:
        length, in_rows = length_of(window, timing, "window")
        hop, hop_in_rows = length_of(stride if stride is not None else window, timing, "stride")
        if in_rows != hop_in_rows:
            raise ValueError(f"Expected window and stride both in rows or both in units of the order. Got {window!r} and {stride!r}.")
        plan = replace(plan, window=length, stride=hop, in_rows=in_rows, since_start=roles.order in roles.inputs)
    return _cut(table, plan, roles, outputs_needed, drop_missing_inputs, units or {})


@dataclass(eq=False)
class _Table:
    """Hold an opened source, its columns once examined, and what there is to say."""

    source: Source
    cells: dict[str, Cells]
    notes: list[str]
    as_text: tuple[str, ...]

    @staticmethod
    def open(
        source: Any, names: Any, wanted: Sequence[str], as_text: Sequence[str], delimiter: Any, encoding: Any, plan: Plan | None = None
    ) -> _Table:
        if names is not None and (isinstance(names, str) or not all(isinstance(name, str) for name in names)):
            raise TypeError(f"Expected names as a list of text. Got {names!r}.")
        opened = open_source(source, names, wanted if names is None else (), delimiter, encoding)
        if plan is not None and plan.names and not {*wanted} <= {*opened.names}:  # the later file has no header either
            opened = open_source(source, plan.names, (), delimiter, encoding)
        check_names([name for name in wanted if name != ROW or plan is None or plan.window is None], opened)
        return _Table(opened, {}, list(opened.notes), tuple(as_text))

    def examine(self, columns: Sequence[str], day_first: bool | None, plan: Plan | None = None) -> None:
        """Load columns and find their kinds."""
        known = (
            {} if plan is None else {c.column: c.day_first for c in (*plan.inputs, *plan.outputs, *([plan.order] if plan.order else []))}
        )
        if ROW in columns and ROW not in self.source.names:
            numbers = np.arange(self.source.rows, dtype=np.float64)
            self.cells[ROW] = Cells(ROW, "integer", np.isnan(numbers), numbers)
        own = [name for name in columns if name in self.source.names]
        for name, series in self.source.load(own, [name for name in self.as_text if name in own]).items() if own else ():
            self.cells[name] = examine(series, name, self.source.decimal, known.get(name) if day_first is None else day_first)


def _rows(at: IntArray, table: _Table) -> str:
    """Return the first of some rows, and how many there are."""
    few = ", ".join(table.source.row(int(i)).removeprefix("row ") for i in at[:3])
    return f"row{'s' if len(at) > 1 else ''} {few}" + (f" and {len(at) - 3} more" if len(at) > 3 else "")


def _select(table: _Table, roles: Roles, outputs_needed: bool, drop_missing_inputs: bool) -> IntArray:
    """Return the rows that become points."""
    cells, notes = table.cells, table.notes
    missing = {name: cells[name].missing for name in roles.used}
    blank = np.logical_and.reduce(list(missing.values()))
    keep = ~blank
    if blank.any():
        notes.append(_left_out(blank.sum(), "empty row"))
    for name in roles.task:
        nameless = np.flatnonzero(keep & missing[name])
        if len(nameless):
            raise ValueError(
                f"Expected the name of a task in column {name!r} of every row. Got none in {_rows(nameless, table)}. Fill it in, or delete "
                "the row. (Empty, NA, n/a, nan, null, - and ? stand for a missing value.)"
            )
    if outputs_needed:
        unseen = keep & np.logical_and.reduce([missing[name] for name in roles.outputs])
        if unseen.any():
            notes.append(_left_out(unseen.sum(), "point", " without any output"))
        keep &= ~unseen
    for name in dict.fromkeys([*roles.inputs, *([roles.order] if roles.order else [])]):
        gaps = np.flatnonzero(keep & missing[name])
        if len(gaps) and not drop_missing_inputs:
            raise ValueError(
                f"Expected a value of the input {name!r} in every row. Got none in {_rows(gaps, table)}. Fill it in, leave the column out, "
                "or leave those rows out with drop_missing_inputs=True (--set data.drop_missing_inputs=true)."
            )
        if len(gaps):
            notes.append(_left_out(len(gaps), "point", f" without {name!r}"))
        keep[gaps] = False
    return np.flatnonzero(keep)


def _left_out(number: Any, what: str, which: str = "", some: str = "") -> str:
    return f"{int(number):,} {what}{'' if number == 1 else 's'}{which} {'was' if number == 1 else 'were'} left out{some}."


@dataclass(frozen=True, eq=False)
class _Spans:
    """Hold where in the sorted rows each task lies, its name, what it belongs to, and the time that is its zero."""

    starts: IntArray
    stops: IntArray
    names: list[str]
    above: list[str] | None
    zeros: FloatArray | None = None
    ordered: bool = False
    overlap: int = 0


def _cut(
    table: _Table, plan: Plan, roles: Roles, outputs_needed: bool, drop_missing_inputs: bool, units: Mapping[str, str] | None = None
) -> Collection:
    """Select rows, bring them in order, cut them, and encode them; learn the codings where the plan has none."""
    row, cells = table.source.row, table.cells
    for name in (*roles.inputs, *roles.outputs):
        check_kind(cells[name], row, name in plan.categories or any(c.column == name and c.levels for c in plan.inputs))
    keep = _select(table, roles, outputs_needed, drop_missing_inputs)
    time = encode(cells[plan.order.column], plan.order, row) if plan.order else None
    groups = group_rows([cells[name] for name in roles.task], keep, time)
    found = len(groups.names)
    if plan.window is None:
        spans, groups = _as_groups(table, groups, roles)
    else:
        spans = _as_windows(table, groups, plan, time)
    if not len(spans.starts):
        what = "windows" if plan.window is not None else "tasks"
        raise ValueError(
            f"Expected {what} of at least 2 points in {table.source.where}. Got none of {len(keep)} points in {found} "
            f"group{'' if found == 1 else 's'}. "
            + ("Name a column that many rows share as the task." if plan.window is None else "Give a shorter window.")
        )
    if units is not None:
        plan = _learn(table, plan, roles, units, np.sort(_covered(groups, spans)))
    columns = [encode(cells[coding.column], coding, row)[groups.rows] for coding in plan.inputs]
    y = np.stack([encode(cells[coding.column], coding, row)[groups.rows] for coding in plan.outputs], axis=1)
    if units is not None:
        plan = _without_constant(table, plan, columns, y, spans)
    return _collection(plan, columns, y, spans, tuple(table.notes))


def _as_groups(table: _Table, groups: Groups, roles: Roles) -> tuple[_Spans, Groups]:
    large = groups.sizes >= 2
    if not large.all():
        lost = [repr(name) for name, fine in zip(groups.names, large, strict=True) if not fine]
        few = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        table.notes.append(_left_out(len(lost), "task", " with fewer than 2 points", f": {few}"))
        groups = groups.pick(large)
    ordered = bool(roles.task) and table.cells[roles.task[-1]].kind == "date"
    if ordered:
        table.notes.append(f"Tasks are in the order of {roles.task[-1]!r}; those that are near in time are taken to be alike.")
    above = groups.above if len(roles.task) > 1 else None
    return _Spans(groups.starts[:-1], groups.starts[1:], groups.names, above, ordered=ordered), groups


def _as_windows(table: _Table, groups: Groups, plan: Plan, time: FloatArray | None) -> _Spans:
    assert plan.window is not None and plan.stride is not None
    cut = cut_windows(groups, None if time is None else time[groups.rows], plan.window, plan.stride, plan.in_rows)
    by = "rows" if plan.in_rows or plan.order is None else plan.order.unit or f"units of {plan.order.column!r}"
    said = [f"Cut in windows of {plan.window:g} {by}, one every {plan.stride:g} {by}."]
    if cut.unused:
        said.append(_left_out(cut.unused, "point", " at the ends of series, or too few for a window,"))
    if cut.small:
        said.append(_left_out(cut.small, "window", " with fewer than 2 points"))
    if cut.sparse:
        said.append(f"There are gaps: windows with fewer than half the points for their time, {cut.sparse:,} of {len(cut.starts):,}.")
    if plan.since_start and plan.order:
        said.append(f"{plan.order.column!r} is the time since the start of its window.")
    table.notes.extend(said)
    labels = _times(cut.origins, plan.order) if time is not None else [f"row {int(i) + 1}" for i in cut.origins]
    names = [f"{groups.names[i]} from {label}" if groups.names[i] else f"from {label}" for i, label in zip(cut.series, labels, strict=True)]
    above = [groups.names[i] for i in cut.series] if plan.task else None
    overlap = int(np.ceil(plan.window / plan.stride)) - 1
    zeros = cut.origins if plan.since_start else None
    return _Spans(cut.starts, cut.stops, unlike(names), above, zeros, True, overlap)


def _times(origins: FloatArray, order: Coding | None) -> list[str]:
    """Return times as text, dates as such."""
    if order is None or order.kind != "date":
        return [f"{value:.12g}" for value in origins]
    micro = np.round(origins * UNITS[order.unit]).astype(np.int64) + np.datetime64(order.origin, "us").astype(np.int64)
    texts = dates_as_text(micro.view("datetime64[us]"))
    return [text.removesuffix(":00") for text in texts] if all(len(text) == 19 and text.endswith(":00") for text in texts) else texts


def _covered(groups: Groups, spans: _Spans) -> IntArray:
    """Return the rows that are in some task."""
    marks = np.zeros(len(groups.rows) + 1, np.int64)
    np.add.at(marks, spans.starts, 1)
    np.add.at(marks, spans.stops, -1)
    return groups.rows[marks.cumsum()[:-1] > 0]


def _learn(table: _Table, plan: Plan, roles: Roles, units: Mapping[str, str], rows: IntArray) -> Plan:
    """Learn the codings of inputs and outputs from the rows that are in tasks."""

    def coding(name: str, output: bool) -> Coding:
        if plan.order is not None and name == plan.order.column:
            return plan.order  # one clock for both
        return learn(table.cells[name], rows, table.source.row, output, name in plan.categories, str(units.get(name, "")))

    strange = [name for name in units if name not in roles.used]
    if strange:
        raise ValueError(f"Expected units of inputs and outputs. Got one of {strange[0]!r}, which is neither. Leave it out.")
    inputs, outputs = tuple(coding(name, False) for name in roles.inputs), tuple(coding(name, True) for name in roles.outputs)
    labels = [c for c in outputs if c.kind == "labels"]
    if labels and len(outputs) > 1:
        raise ValueError(
            f"Expected labels as the only output, or numbers. Got text in {labels[0].column!r} beside other outputs. Take one."
        )
    for c in dict.fromkeys([*inputs, *outputs]):
        if c.kind == "date":
            table.notes.append(f"{c.column!r} became the time in {c.unit} since {dates_as_text([np.datetime64(c.origin)])[0]}.")
        elif c.kind == "clock":
            table.notes.append(f"{c.column!r} became hours.")
        elif c.kind == "boolean":
            table.notes.append(f"In {c.column!r}, true became 1 and false 0.")
        elif c.kind == "category":
            table.notes.append(f"{c.column!r} became a column of zeros and ones for each of its {len(c.levels)} levels.")
        elif c.kind == "labels":
            table.notes.append(f"{c.column!r} became labels: {', '.join(f'{i} = {level}' for i, level in enumerate(c.levels))}.")
    return replace(plan, inputs=inputs, outputs=outputs)


def _without_constant(table: _Table, plan: Plan, columns: Sequence[FloatArray], y: FloatArray, spans: _Spans) -> Plan:
    """Leave out columns of x that never vary, and refuse such outputs."""
    inside = np.zeros(len(y) + 1, np.int64)
    np.add.at(inside, spans.starts, 1)
    np.add.at(inside, spans.stops, -1)
    covered = inside.cumsum()[:-1] > 0
    dropped = []
    for j, (coding, column) in enumerate(zip(plan.inputs, columns, strict=True)):
        own = column[covered]
        if coding.kind == "category":
            dropped += [c.name for i, c in enumerate(coding.columns) if ((own == i) == (own[0] == i)).all()]
        elif j != plan.shifted and own.min() == own.max():
            dropped.append(coding.column)
    if dropped:
        table.notes.append(f"Left out of the inputs, since they never vary: {', '.join(map(repr, dropped))}.")
    plan = replace(plan, dropped=tuple(dropped))
    if not plan.columns:
        raise ValueError(f"Expected inputs that vary. Got {', '.join(map(repr, dropped))}, the same in every row. Name others.")
    for coding, values in zip(plan.outputs, y[covered].T, strict=True):
        seen = values[~np.isnan(values)]
        if not len(seen) or seen.min() == seen.max():
            got = f"the value {seen[0]:g} in every row" if len(seen) else "no value at all"
            raise ValueError(f"Expected outputs that vary. Got {coding.column!r} with {got}. Leave it out.")
    return plan


def _collection(plan: Plan, columns: Sequence[FloatArray], y: FloatArray, spans: _Spans, notes: tuple[str, ...]) -> Collection:
    """Return the tasks; each is put together from the sorted columns when it is asked for."""
    shifted, zeros = plan.shifted, spans.zeros
    starts, stops = spans.starts.tolist(), spans.stops.tolist()
    d_x = len(plan.columns)
    picks = [[i for i, column in enumerate(coding.columns) if column.name not in plan.dropped] for coding in plan.inputs]

    def read(i: int) -> Triple:
        rows = slice(starts[i], stops[i])
        x, at = np.empty((stops[i] - starts[i], d_x)), 0
        for j, (coding, values, pick) in enumerate(zip(plan.inputs, columns, picks, strict=True)):
            own = values[rows]
            if coding.kind == "category":
                x[:, at : at + len(pick)] = own[:, None] == np.array(pick, np.float64)
            elif pick:
                x[:, at] = own - zeros[i] if zeros is not None and j == shifted else own
            at += len(pick)
        part = y[rows].copy()
        return x, part, ~np.isnan(part)

    digest = hashlib.sha256(json.dumps([plan.to_dict(), spans.names]).encode())
    for part in (spans.starts, spans.stops, *columns, y):
        digest.update(np.ascontiguousarray(part).tobytes())
    return Collection(
        read, (spans.stops - spans.starts).tolist(), spans.names, plan.columns,
        tuple(column for coding in plan.outputs for column in coding.columns), plan.to_dict(), notes, digest.hexdigest()[:16],
        spans.ordered, spans.above, False, spans.overlap,
    )  # fmt: skip


def read_points(
    source: Any,
    recipe: Mapping[str, Any],
    outputs: bool = True,
    *,
    columns: tuple[Sequence[str | Column], Sequence[str | Column]] | None = None,
    task: str | Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
) -> Collection:
    """Read a table of points for a model: what it is conditioned on, or where it predicts.

    Nothing is cut in windows and nothing is left out: every row is a point, in the order of the table within its task, and tasks come in
    the order of their first rows. Where the model was learned from windows, time is taken as given: since the start of the window.

    Arguments:
        source: as for `read_table`.
        recipe: of the model's data, from any reader.
        outputs: the table must have the outputs; if not, they are read where they are there, and missing where not.
        columns: names of the model's inputs and outputs, (run.inputs, run.outputs); needed for a recipe that is not of a table.
        task: column that names the tasks; None for those of the recipe where they are there, and otherwise one task.
        names: of the columns of a file without a header.
        delimiter: of text; None to find out.
        encoding: of text; None to find out.

    Raises:
        ValueError: a column that is not there, a missing input, a value that the recipe does not know, or what `read_table` raises.

    Example:
        >>> import pandas
        >>> points = read_points(pandas.DataFrame({"x": [0.0, 1.0]}), {"kind": "grid"}, False, columns=(["x"], ["y"]))
        >>> len(points), points[0][0].tolist(), points[0][1].tolist()
        (1, [[0.0], [1.0]], [[nan], [nan]])
    """
    if isinstance(recipe, Mapping) and recipe.get("kind") == "table":
        plan = Plan.from_dict(recipe)
    elif columns is None:
        raise ValueError("Expected the names of the model's inputs and outputs with a recipe that is not of a table. Got none.")
    else:
        x, y = ([c if isinstance(c, Column) else Column(c) for c in side] for side in columns)
        plan = Plan((), tuple(Coding(c.name, "number", c.unit) for c in x), tuple(Coding(c.name, "number", c.unit) for c in y))
    if plan.shifted is not None:  # the start of a window is not a date any more
        plain = replace(plan.inputs[plan.shifted], kind="number")
        plan = replace(plan, inputs=tuple(plain if j == plan.shifted else c for j, c in enumerate(plan.inputs)))
    groups_by = tuple_of(task, "task")
    active = [c for c in plan.inputs if any(column.name not in plan.dropped for column in c.columns)]
    asked = [*groups_by, *(c.column for c in active if c.kind != "category"), *(c.column for c in plan.outputs if outputs)]
    table = _Table.open(source, names, asked, (), delimiter, encoding, plan)
    opened = table.source
    if not groups_by and plan.task and {*plan.task} <= {*opened.names}:
        groups_by = plan.task
    inputs = tuple(part for c in active for part in _as_given(c, plan, opened))
    found = tuple(c for c in plan.outputs if c.column in opened.names)
    roles = Roles(groups_by, tuple(c.column for c in inputs), tuple(c.column for c in found), None)
    table.as_text = (*groups_by, *(c.column for c in plan.inputs if c.kind == "category"))
    table.examine(roles.used, None, plan)
    keep = _select(table, replace(roles, outputs=roles.outputs or roles.inputs), False, False)
    groups = group_rows([table.cells[name] for name in roles.task], keep, first_seen=True)
    rows = opened.row
    xs = [encode(table.cells[c.column], c, rows, given=True)[groups.rows] for c in inputs]
    values = np.full((len(groups.rows), len(plan.outputs)), np.nan)
    for j, c in enumerate(plan.outputs):
        if c in found:
            values[:, j] = encode(table.cells[c.column], c, rows, given=True)[groups.rows]
    spans = _Spans(groups.starts[:-1], groups.starts[1:], groups.names if roles.task else ["points"], None)
    final = _collection(replace(plan, inputs=inputs, since_start=False), xs, values, spans, tuple(table.notes))
    return replace(final, recipe=recipe, rows=groups.rows, table=lambda: opened.load(opened.names, groups_by))


def _as_given(coding: Coding, plan: Plan, source: Source) -> tuple[Coding, ...]:
    """Return how an input is read: from its own column, or a category from columns such as "site=north"."""
    if coding.kind != "category" or coding.column in source.names:
        check_names([coding.column], source)
        return (coding,)
    parts = [column.name for column in coding.columns if column.name not in plan.dropped]
    if not {*parts} <= {*source.names}:
        check_names([coding.column], source)
    return tuple(Coding(name, "number") for name in parts)
