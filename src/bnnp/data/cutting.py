"""Rows of a table cut into tasks: those of one name together, in order of time, or windows of a long series.

All of it works on arrays of row numbers; no row is looked at by itself, so millions of them take seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnnp.data.codings import Cells, Coding, as_levels, natural

__all__ = ["Groups", "Windows", "cut_windows", "group_rows", "length_of", "unlike"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]

OVERLAPS = 1000
"""So many windows at most hold one point."""
SECONDS = {
    "s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "d": 86400, "day": 86400, "w": 604800, "week": 604800,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Groups:
    """Hold which rows belong together.

    Arguments:
        rows: numbers of the rows, one group after the other.
        starts: where in `rows` each group begins, and in the last place where the last one ends.
        names: of the groups.
        above: the name of what each group belongs to, where several columns name it: those before the last; else its own.
    """

    rows: IntArray
    starts: IntArray
    names: list[str]
    above: list[str]

    @property
    def sizes(self) -> IntArray:
        """Return the number of rows of each."""
        return np.diff(self.starts)

    def pick(self, which: Any) -> Groups:
        """Return the groups for which `which` is True."""
        sizes = self.sizes
        starts = np.concatenate([[0], np.cumsum(sizes[which])]).astype(np.int64)
        chosen = np.flatnonzero(which)
        return Groups(self.rows[np.repeat(which, sizes)], starts, [self.names[i] for i in chosen], [self.above[i] for i in chosen])


def group_rows(columns: Sequence[Cells], keep: IntArray, order: FloatArray | None = None, first_seen: bool = False) -> Groups:
    """Bring the rows of each group together.

    Arguments:
        columns: those whose values name the groups; none for one group of all.
        keep: numbers of the rows to take, rising; no value of `columns` may be missing in them.
        order: of all rows, by which those of a group are sorted; None for the order of the table.
        first_seen: sort groups by their first row, and not by name.
    """
    combined = np.zeros(len(keep), np.int64)
    parts: list[tuple[IntArray, list[str]]] = []
    for cells in columns:
        codes, levels = as_levels(cells)
        if cells.dates is not None:
            when = np.zeros(len(levels), np.int64)
            when[codes[keep]] = cells.dates[keep].astype(np.int64)
            sorting = np.argsort(when, kind="stable")
        else:
            sorting = np.array(sorted(range(len(levels)), key=lambda i: natural(levels[i])), np.int64)
        rank = np.argsort(sorting)[codes[keep]]
        parts.append((rank, [levels[i] for i in sorting]))
        combined = np.unique(combined, return_inverse=True)[1] * len(levels) + rank
    found, first, group = np.unique(combined, return_index=True, return_inverse=True)
    if first_seen:
        sorting = np.argsort(first)
        group, first = np.argsort(sorting)[group], first[sorting]
    named = [[levels[i] for i in rank[first]] for rank, levels in parts]
    names = unlike([" / ".join(name) for name in zip(*named, strict=True)]) if named else [""] * len(found)
    above = [" / ".join(name) for name in zip(*named[:-1], strict=True)] if len(named) > 1 else names
    sorting = np.lexsort((group,) if order is None else (order[keep], group))
    starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=len(found)))]).astype(np.int64)
    return Groups(keep[sorting], starts, names, above)


def unlike(names: Sequence[str]) -> list[str]:
    """Return names no two of which are equal, a number put behind those that were."""
    seen: dict[str, int] = {}
    taken, found = set(names), []
    for name in names:
        seen[name] = count = seen.get(name, 0) + 1
        new = name
        while count > 1 and new in taken:
            new, count = f"{name} ({count})", count + 1
        taken.add(new)
        found.append(new)
    return found


def length_of(value: Any, order: Coding | None, what: str) -> tuple[float, bool]:
    """Return the length of a window and whether it counts rows.

    Arguments:
        value: rows, if whole; else in units of the order column; as text also with a unit of time, such as "24 h".
        order: how the column of time becomes numbers.
        what: the name of the argument.

    Raises:
        ValueError: nothing of this kind, or not above 0.
    """
    match = re.fullmatch(r" *([0-9]*\.?[0-9]+) *([a-z]*) *", value, re.ASCII) if isinstance(value, str) else None
    number: Any = None
    if match and not match[2]:
        number = float(match[1]) if "." in match[1] else int(match[1])
    elif match and order is not None and order.kind in ("date", "clock"):
        seconds = SECONDS.get(match[2]) or SECONDS.get(match[2].removesuffix("s"))
        number = float(match[1]) * seconds / SECONDS[order.unit] if seconds else None
    elif isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        number = int(value) if isinstance(value, int | np.integer) else float(value)
    if number is None or not 0 < number < math.inf:
        time = "" if order is not None and order.kind in ("date", "clock") else " (which needs an order column of dates)"
        raise ValueError(
            f"Expected {what} above 0: rows (50), units of the order column (2.5), or a time such as '24 h'{time}. Got {value!r}."
        )
    if isinstance(number, float) and order is None:
        raise ValueError(
            f"Expected {what} in rows, a whole number, where no order column is given. Got {value!r}. Give order, or a whole number."
        )
    return float(number), isinstance(number, int)


@dataclass(frozen=True, eq=False)
class Windows:
    """Hold windows of series.

    Arguments:
        starts: where in the rows of the groups each begins.
        stops: where it ends.
        series: number of the group that each is of.
        origins: time at which each starts; its row within the series where there is no time.
        unused: number of rows in no window.
        small: number of windows with fewer than 2 points, which are left out; empty ones included.
        sparse: number of windows with fewer than half the points expected, or points spread over more than twice the time expected.
    """

    starts: IntArray
    stops: IntArray
    series: IntArray
    origins: FloatArray
    unused: int
    small: int
    sparse: int


def cut_windows(groups: Groups, time: FloatArray | None, window: float, stride: float, in_rows: bool) -> Windows:
    """Cut each series in windows.

    Arguments:
        groups: the series.
        time: of each row in `groups.rows`, rising within a series; None for the number of the row.
        window: length.
        stride: from the start of one to the start of the next.
        in_rows: both count rows, and not time.

    Raises:
        ValueError: so short a stride that a point falls in more than 1,000 windows.
    """
    if window / stride > OVERLAPS:
        raise ValueError(f"Expected at most {OVERLAPS} windows over one point. Got window {window:g} with stride {stride:g}. Lengthen it.")
    if time is not None:
        with np.errstate(over="ignore"):
            span = float(np.ptp(time)) if len(time) else 0.0
            many = not math.isfinite(span) or not span / stride < 2**53
        if many:
            raise ValueError(f"Expected times that fit the stride {stride:g}. Got times over a range of {span:g}. Lengthen it.")
    sizes, total = groups.sizes, len(groups.rows)
    series = np.repeat(np.arange(len(sizes)), sizes)
    first = groups.starts[:-1]
    gaps = np.diff(time)[series[1:] == series[:-1]] if time is not None else np.ones(1)
    positive = gaps[gaps > 0]
    step = float(np.median(positive)) if len(positive) else 0.0
    small = 0
    if in_rows:
        length, hop = int(window), int(stride)
        counts = np.maximum((sizes - length) // hop + 1, 0)
        of = np.repeat(np.arange(len(sizes)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = first[of] + within * hop
        stops = starts + length
        origins = within * float(hop) if time is None else time[starts] if len(starts) else np.zeros(0)
        spans = time[stops - 1] - time[starts] if time is not None and len(starts) else np.zeros(len(starts))
        sparse = int((spans > 2 * length * step).sum()) if step else 0
    else:
        assert time is not None
        starts, stops, of, origins, small = _by_time(time, first, sizes, series, window, stride, step)
        sparse = int((2 * (stops - starts) < window / step).sum()) if step else 0
    marks = np.zeros(total + 1, np.int64)
    np.add.at(marks, starts, 1)
    np.add.at(marks, stops, -1)
    return Windows(starts, stops, of, origins, int((marks.cumsum()[:-1] == 0).sum()), small, sparse)


def _by_time(
    time: FloatArray, first: IntArray, sizes: IntArray, series: IntArray, window: float, stride: float, step: float
) -> tuple[IntArray, IntArray, IntArray, FloatArray, int]:
    """Return the windows that hold points; those between, however many, cost nothing."""
    begin = time[first]
    last = time[first + sizes - 1]
    possible = np.floor((last + step - begin - window) / stride * (1 + 1e-12) + 1e-9)  # number of the last whole window of each series
    since = np.floor((time - begin[series]) / stride)
    pairs = []
    for back in range(math.ceil(window / stride)):
        number = since - back
        fits = (number >= 0) & (number <= possible[series])
        pair = np.stack([series[fits].astype(np.float64), number[fits]])
        pairs.append(pair[:, np.diff(pair, axis=1, prepend=-1).any(0)])  # points of one window follow one another
    of, number = np.unique(np.concatenate(pairs, axis=1), axis=1)
    of = of.astype(np.int64)
    origins = begin[of] + number * stride
    starts, stops = np.zeros(len(of), np.int64), np.zeros(len(of), np.int64)
    edges = np.searchsorted(of, np.arange(len(sizes) + 1))
    for i in np.flatnonzero(np.diff(edges)):  # a look-up per series
        part, own = slice(edges[i], edges[i + 1]), time[first[i] : first[i] + sizes[i]]
        starts[part] = first[i] + np.searchsorted(own, origins[part], side="left")
        stops[part] = first[i] + np.searchsorted(own, origins[part] + window, side="left")
    whole = stops - starts >= 2
    empty = int(np.maximum(possible + 1, 0).sum()) - int(whole.sum())
    return starts[whole], stops[whole], of[whole], origins[whole], empty
