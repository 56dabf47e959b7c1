"""Columns of a table as numbers: what kind a column is, how its values become numbers, and the same for a file that comes later.

A column is examined once (`examine` -> `Cells`), a coding is learned from it (`learn` -> `Coding`), and a coding turns the cells of any
table into numbers, or names the row that does not fit. A coding is plain data, so it is kept with the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bnnp.data.collection import Column
from bnnp.data.dates import Dates, parse_clock, parse_dates
from bnnp.data.text import MISSING, NUMBER

__all__ = ["MANY", "UNITS", "Cells", "Coding", "as_levels", "check_kind", "dates_as_text", "encode", "examine", "learn", "natural"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]
Row = Callable[[int], str]

MANY = 50
"""A text column with more different values than this is no category unless it is said to be one."""
MOST = 1000
"""And with more than this never."""
UNITS = {"d": 86_400_000_000, "h": 3_600_000_000, "s": 1_000_000}
"""Microseconds of a day, an hour and a second."""
SHORT = re.compile(r"\d{1,2}([-/.])\d{1,2}\1\d{2}( .*)?", re.ASCII)
FRACTION = re.compile(r"-?(0|[1-9]\d*)\.\d+", re.ASCII)
ODD = frozenset({"none", "--", "---", "."})
"""What stands for a missing value in a column of numbers, where it cannot be a level."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Hold the values of a column in the form that its kind asks for.

    Arguments:
        name: of the column.
        kind: "number", "integer", "boolean", "date", "clock" (a time of day), "text", or "mixed" where `problem` says what is wrong.
        missing: True where there is no value, with shape (rows,).
        values: numbers, NaN where missing; None for dates and text.
        dates: microseconds since 1970; None for other kinds.
        codes: number of the level of each row, -1 where missing; only of what came as text.
        levels: the different texts.
        day_first: how dates were read.
        problem: a sentence in parts, numbers of rows among them.
    """

    name: str
    kind: str
    missing: np.ndarray[Any, np.dtype[np.bool_]]
    values: FloatArray | None = None
    dates: Dates | None = None
    codes: IntArray | None = None
    levels: tuple[str, ...] = ()
    day_first: bool | None = None
    problem: tuple[str | int, ...] | None = None

    def distinct(self) -> int:
        """Return the number of different values."""
        if self.codes is not None:
            return len(self.levels)
        plain = self.dates if self.dates is not None else self.values
        return 0 if plain is None else len(np.unique(plain[~self.missing]))


@dataclass(frozen=True)
class Coding:
    """Say how a column becomes numbers.

    Arguments:
        column: its name in the source.
        kind: "number", "boolean", "date", "clock", "category" (one column of zeros and ones for each level) or "labels" (0 to K - 1).
        unit: of the numbers.
        origin: of dates: what is 0, as ISO text.
        levels: of a category or of labels.
        day_first: how dates such as 03/04/2020 are read.
    """

    column: str
    kind: str
    unit: str = ""
    origin: str = ""
    levels: tuple[str, ...] = ()
    day_first: bool | None = None

    @property
    def columns(self) -> tuple[Column, ...]:
        """Return the columns of numbers that come of it."""
        if self.kind == "category":
            return tuple(Column(f"{self.column}={level}") for level in self.levels)
        return (Column(self.column, self.unit),)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "levels": list(self.levels)}

    @staticmethod
    def from_dict(plain: Any) -> Coding:
        """Return what `to_dict` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            coding = Coding(**{**plain, "levels": tuple(plain["levels"])})
            fine = isinstance(coding.column, str) and coding.kind in ("number", "boolean", "date", "clock", "category", "labels")
            fine = fine and (coding.kind != "date" or (coding.unit in UNITS and not np.isnat(np.datetime64(coding.origin, "us"))))
        except (TypeError, KeyError, ValueError):
            fine = False
        if not fine:
            raise ValueError(f"Expected how a column is read, as the recipe of a table says it. Got {str(plain)[:200]}.")
        return coding


def natural(level: str) -> tuple[int, float, list[tuple[int, str]]]:
    """Return a key that sorts numbers by size, and texts with numbers in them as people do."""
    if NUMBER.fullmatch(level) and "," not in level:
        return (0, float(level), [])
    return (1, 0.0, [(int(part), "") if part.isdecimal() and part.isascii() else (-1, part) for part in re.split(r"([0-9]{1,18})", level)])


def examine(series: Any, name: str, decimal: str = ".", day_first: bool | None = None) -> Cells:
    """Find the kind of a column.

    Arguments:
        series: a pandas series.
        name: of the column.
        decimal: the decimal sign of numbers among text.
        day_first: how to read 03/04/2020; None to find out.
    """
    kind = series.dtype.kind if isinstance(series.dtype, np.dtype) else getattr(series.dtype, "kind", "O")
    if kind in "iufb" and not hasattr(series, "cat"):
        values = series.to_numpy(dtype=np.float64, na_value=np.nan)
        fine = values[~np.isnan(values)]
        whole = kind in "iu" or (kind == "f" and len(fine) > 0 and _whole(fine))
        codes, found = series.factorize() if kind in "iu" and len(fine) and abs(fine).max() >= 2**53 else (None, ())  # names, not sizes
        levels = tuple(str(int(level)) for level in found)
        return Cells(
            name, "boolean" if kind == "b" else "integer" if whole else "number", np.isnan(values), values, codes=codes, levels=levels
        )
    if kind == "m":
        micro = series.to_numpy(dtype="timedelta64[us]")
        values = np.where(np.isnat(micro), np.nan, micro.astype(np.int64) / UNITS["h"])
        return Cells(name, "clock", np.isnan(values), values)
    if kind == "M" and not hasattr(series, "cat"):
        if getattr(series.dt, "tz", None) is not None:
            series = series.dt.tz_convert("UTC").dt.tz_localize(None)
        dates = series.to_numpy(dtype="datetime64[us]")
        return Cells(name, "date", np.isnat(dates), dates=dates)
    return _examine_text(series, name, decimal, day_first)


def _examine_text(series: Any, name: str, decimal: str, day_first: bool | None) -> Cells:
    """Look at the different texts of a column only, and spread what they mean over its rows."""
    try:
        raw, found = series.factorize()
    except TypeError:
        odd = type(next(value for value in series if not isinstance(value, str))).__name__
        problem = (f"Expected text, numbers or dates in column {name!r}. Got {odd} in ", 0, ". Leave the column out, or take it apart.")
        return Cells(name, "mixed", np.zeros(len(series), np.bool_), problem=problem)
    codes, levels = _merged(np.asarray(raw, np.int64), [str(level).strip() for level in found])
    missing, counts = codes < 0, np.bincount(codes[codes >= 0], minlength=len(levels))
    text = Cells(name, "text", missing, codes=codes, levels=tuple(levels))
    if not levels:
        return Cells(name, "number", missing, np.full(len(codes), np.nan), codes=codes)
    numbers = np.array([_number(level, decimal) for level in levels])
    good = ~np.isnan(numbers)
    empty = np.array([level.lower() in ODD for level in levels])
    if good.any() and (good | empty).all():
        values = _spread(numbers, codes)
        kind = "integer" if _whole(numbers[good]) else "number"
        return Cells(name, kind, np.isnan(values), values, codes=codes, levels=text.levels)
    if {level.lower() for level in levels} <= {"true", "false"}:
        values = _spread(np.array([float(level.lower() == "true") for level in levels]), codes)
        return Cells(name, "boolean", missing, values, codes=codes, levels=text.levels)
    if 2 * good.sum() >= len(good) or 2 * counts[good].sum() >= counts.sum():
        return _mixed(text, ~(good | empty), "numbers, or nothing,")
    return _examine_dates(text, day_first)


def _examine_dates(text: Cells, day_first: bool | None) -> Cells:
    assert text.codes is not None
    dates, first, clash = parse_dates(text.levels, day_first)
    if clash:
        one, other = (int(np.argmax(text.codes == level)) for level in clash)
        here, there = (repr(text.levels[level]) for level in clash)
        what = f"Expected dates in column {text.name!r} whose day and month can be told apart. Got {here} in "
        more: tuple[str | int, ...] = () if one == other else (f" and {there} in ", other)
        return replace(text, kind="mixed", problem=(what, one, *more, ". Write them as 2020-04-03, or give day_first=True or False."))
    good = ~np.isnat(dates)
    if all(SHORT.fullmatch(level) for level in text.levels):
        return _mixed(text, np.ones(len(good), np.bool_), "dates with all four digits of the year")
    if good.all():
        spread = np.where(text.missing, np.datetime64("NaT", "us"), dates[text.codes])
        return replace(text, kind="date", dates=spread, day_first=first)
    if 2 * good.sum() >= len(good):
        return _mixed(text, ~good, "dates, or nothing,")
    hours = np.array([parse_clock(level) for level in text.levels])
    return text if np.isnan(hours).any() else replace(text, kind="clock", values=_spread(hours, text.codes))


def _mixed(text: Cells, bad: Any, what: str) -> Cells:
    """Say in which row a column stops being what most of it is."""
    assert text.codes is not None
    at = np.flatnonzero((text.codes >= 0) & bad[text.codes])
    more = f", and as much in {len(at) - 1} more rows" if len(at) > 1 else ""
    got = f"Expected {what} in column {text.name!r}. Got {text.levels[text.codes[at[0]]]!r} in "
    advice = "Mend it, leave it empty, or name the column in `categories`."
    return replace(text, kind="mixed", problem=(got, int(at[0]), f"{more}. {advice}"))


def _merged(codes: IntArray, levels: list[str]) -> tuple[IntArray, list[str]]:
    """Join levels that differ in blanks at their ends only, and drop those that stand for missing values."""
    number: dict[str, int] = {}
    place = np.array([-1 if level.lower() in MISSING else number.setdefault(level, len(number)) for level in levels] + [-1], np.int64)
    return place[codes], list(number)  # code -1 takes the last place


def _number(level: str, decimal: str) -> float:
    if not NUMBER.fullmatch(level) or ("," in level and decimal != ","):
        return float("nan")
    return float(level.replace(",", "."))


def _whole(numbers: FloatArray) -> bool:
    return bool((numbers == np.round(numbers)).all() and (abs(numbers) < 2**53).all())


def _spread(values: FloatArray, codes: IntArray) -> FloatArray:
    return np.where(codes < 0, np.nan, values[codes])


def as_levels(cells: Cells) -> tuple[IntArray, list[str]]:
    """Return a column as numbers of levels (-1 where missing) and the levels, equal for equal values whatever the source is."""
    if cells.codes is not None:
        codes, levels = cells.codes, [_canonical(level) for level in cells.levels]
    else:
        plain = cells.dates if cells.dates is not None else cells.values
        assert plain is not None
        found, codes = np.unique(plain, return_inverse=True)
        codes = np.where(cells.missing, -1, codes)
        levels = dates_as_text(found) if cells.dates is not None else [_canonical(repr(float(v))) for v in found]
        if cells.kind == "boolean":
            levels = [{"0": "False", "1": "True"}.get(level, level) for level in levels]
    return _merged(codes, levels)


def _canonical(level: str) -> str:
    """Return a number as Python writes it, without .0 at its end; leave 007 as it is."""
    if not FRACTION.fullmatch(level) and not (NUMBER.fullmatch(level) and "e" in level.lower() and "," not in level):
        return level
    return repr(float(level)).removesuffix(".0")


def dates_as_text(dates: Any) -> list[str]:
    """Return dates in ISO form, without the time of the day where that is midnight for all."""
    text = [str(date).replace("T", " ") for date in dates]
    midnight = all(level.endswith(" 00:00:00.000000") for level in text if level != "NaT")
    return [level[:10] if midnight else level.removesuffix(".000000") for level in text]


def check_kind(cells: Cells, row: Row, category: bool = False) -> None:
    """Raise ValueError for a column of mixed kinds, with the row; not where its texts are to be taken as they are."""
    if cells.problem is not None and not (category and cells.codes is not None):
        raise ValueError("".join(part if isinstance(part, str) else row(part) for part in cells.problem))


def learn(cells: Cells, keep: Any, row: Row, output: bool = False, category: bool = False, unit: str = "") -> Coding:
    """Learn how a column becomes numbers.

    Arguments:
        cells: of the column.
        keep: numbers of the rows that matter.
        row: says where a row is found.
        output: it is predicted, so that text becomes one column of labels.
        category: treat it as a category, whatever its values look like.
        unit: in which it is measured, if known.

    Raises:
        ValueError: a column that is neither one thing nor another, or text with too many different values.
    """
    name = cells.name
    check_kind(cells, row, category)
    if cells.kind == "text" or category:
        codes, found = as_levels(cells)
        levels = sorted((found[code] for code in np.unique(codes[keep]) if code >= 0), key=natural)
        most = MOST if category else MANY
        if len(levels) > most:
            advice = "Leave it out, group its values" + (", or name it in `categories`." if not category and len(levels) <= MOST else ".")
            raise ValueError(
                f"Expected numbers, dates or at most {most} different texts in column {name!r}. Got {len(levels)} different texts, such as "
                f"{levels[0]!r} in {row(int(np.argmax(codes == found.index(levels[0]))))}. {advice}"
            )
        return Coding(name, "labels" if output else "category", unit, levels=tuple(levels))
    if cells.dates is None:
        return Coding(name, {"integer": "number"}.get(cells.kind, cells.kind), unit or ("h" if cells.kind == "clock" else ""))
    seen = cells.dates[keep]
    seen = seen[~np.isnat(seen)]
    first, last = (seen.min(), seen.max()) if len(seen) else (np.datetime64(0, "us"),) * 2
    span = int((last - first).astype(np.int64))
    measure = "d" if span > 3 * UNITS["d"] else "h" if span > 3 * UNITS["h"] else "s"
    return Coding(name, "date", measure, str(first), day_first=cells.day_first)


def encode(cells: Cells, coding: Coding, row: Row, given: bool = False) -> FloatArray:
    """Return a column as numbers, NaN where missing; a category as the numbers of its levels.

    Arguments:
        cells: of the column.
        coding: what was learned of it, here or in another table.
        row: says where a row is found.
        given: numbers in the place of dates are taken as what the dates would become.

    Raises:
        ValueError: a value that the coding does not know, or that is infinite; the message names its row.
    """
    if coding.kind in ("category", "labels"):
        codes, levels = as_levels(cells)
        known = {level: i for i, level in enumerate(coding.levels)}
        place = np.array([known.get(level, -2) for level in levels] + [-1], np.float64)[codes]
        strange = np.flatnonzero(place == -2)
        if len(strange):
            few = ", ".join(map(repr, coding.levels[:20])) + (f" and {len(coding.levels) - 20} more" if len(coding.levels) > 20 else "")
            raise ValueError(
                f"Expected one of {few} in column {cells.name!r}. Got {levels[codes[strange[0]]]!r} in {row(int(strange[0]))}: "
                "nothing was learned about it."
            )
        return np.where(place < 0, np.nan, place)
    check_kind(cells, row)
    if cells.missing.all():
        return np.full(len(cells.missing), np.nan)
    if coding.kind == "date" and cells.dates is not None:
        micro = (cells.dates - np.datetime64(coding.origin, "us")).astype(np.int64) / UNITS[coding.unit]
        return np.where(cells.missing, np.nan, micro)
    fits = cells.values is not None and (coding.kind != "date" or given)
    if not fits or cells.values is None:
        expected = {"date": "dates", "clock": "times of the day", "boolean": "True or False"}.get(coding.kind, "numbers")
        at = int(np.argmin(cells.missing))
        got = repr(cells.levels[cells.codes[at]]) if cells.codes is not None else f"a {cells.kind}"
        raise ValueError(f"Expected {expected} in column {cells.name!r}, as where the columns were learned. Got {got} in {row(at)}.")
    infinite = np.flatnonzero(np.isinf(cells.values))
    if len(infinite):
        raise ValueError(
            f"Expected finite numbers in column {cells.name!r}. Got {cells.values[infinite[0]]} in {row(int(infinite[0]))}. "
            "Mend it, or leave it empty."
        )
    return cells.values
