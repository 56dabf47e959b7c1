"""Dates as people write them, turned into one clock, or refused where a day could be a month.

A library that guesses the order of day and month row by row reads 03/04/2020 as March and 13/04/2020 as April in one column. Here the order
is decided for the whole column, from dates that can be read in one way only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np

__all__ = ["Dates", "parse_clock", "parse_dates"]

Int64Array = np.ndarray[Any, np.dtype[np.int64]]
Dates = np.ndarray[Any, np.dtype[np.datetime64]]

TIME = (
    r"(?:(?:T| +|, *)(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?:[.,](?P<fraction>\d{1,9}))?)?"
    r" *(?P<half>[ap]m)? *(?P<zone>Z|UTC|[+-]\d{2}:?\d{2})?)?"
)
FORMS = {
    form: re.compile(pattern + TIME, re.ASCII | re.IGNORECASE)
    for form, pattern in {
        "iso": r"(?P<year>\d{4})(?P<sep>[-/.])(?P<month>\d{1,2})(?:(?P=sep)(?P<day>\d{1,2}))?",
        "numbers": r"(?P<first>\d{1,2})(?P<sep>[-/.])(?P<next>\d{1,2})(?P=sep)(?P<year>\d{4})",
        "day": r"(?P<day>\d{1,2})[-. ]+(?P<name>[a-z]{3,9})[-., ]+(?P<year>\d{4})",
        "month": r"(?P<name>[a-z]{3,9})[. ]+(?P<day>\d{1,2})(?:,| ) *(?P<year>\d{4})",
    }.items()
}
MONTHS = "january february march april may june july august september october november december".split()
EPOCH = datetime(1970, 1, 1)
CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}(?:\.\d+)?))?", re.ASCII)
FAST = 1000
NOT = np.iinfo(np.int64).min


def parse_dates(levels: Sequence[str], day_first: bool | None = None) -> tuple[Dates, bool | None, tuple[int, ...]]:
    """Return dates in microseconds, NaT for what is none, and how day and month were told apart.

    Arguments:
        levels: different texts.
        day_first: how to read 03/04/2020; None to find out from the dates that can be read in one way.

    Returns:
        The dates; whether the day stands first (None where nothing shows it); and two numbers of levels that cannot be told or contradict
        one another (empty where all is well, twice the same where there is one only).
    """
    fast = _fast(levels)
    if fast is not None:
        return fast, day_first, ()
    matches = [next(((form, m) for form, p in FORMS.items() if (m := p.fullmatch(level))), None) for level in levels]
    found = [(i, match[1]) for i, match in enumerate(matches) if match and match[0] == "numbers"]
    asked = {i: (int(m["first"]), int(m["next"]), m["sep"]) for i, m in found}
    if asked and day_first is None:
        days = next((i for i, (first, then, sep) in asked.items() if first > 12 >= then), None)
        months = next((i for i, (first, then, sep) in asked.items() if then > 12 >= first), None)
        if days is not None and months is not None:
            return np.full(len(levels), NOT).view("datetime64[us]"), None, (days, months)
        if days is None and months is None and any(first != then and sep != "." for first, then, sep in asked.values()):
            unclear = [i for i, (first, then, _) in asked.items() if first != then]
            return np.full(len(levels), NOT).view("datetime64[us]"), None, (unclear[0], unclear[min(1, len(unclear) - 1)])
        day_first = months is None
    stamps = [NOT if match is None else _stamp(*match, bool(day_first)) for match in matches]
    return np.array(stamps, np.int64).view("datetime64[us]"), day_first if asked else None, ()


def _fast(levels: Sequence[str]) -> Dates | None:
    """Return many dates of the plainest form at once, or None where they have another form."""
    if len(levels) < FAST:
        return None
    width = len(levels[0])
    if width not in (10, 16, 19) or any(len(level) != width for level in levels):
        return None
    whole = np.array(levels, dtype=f"U{width}")
    letters = whole.view(np.uint32).reshape(len(levels), width)
    digits = np.all((letters >= 48) & (letters <= 57), axis=0)
    shape = "".join("0" if digits[j] else chr(int(letters[0, j])) for j in range(width))
    same = bool(np.all(digits | np.all(letters == letters[0], axis=0)))
    if not same or shape.replace("T", " ") != "0000-00-00 00:00:00"[:width]:
        return None
    try:
        return whole.astype("datetime64[us]")
    except ValueError:  # the 30th of February
        return None


def _stamp(form: str, match: re.Match[str], day_first: bool) -> int:
    """Return microseconds since 1970 in universal time; a time without a zone is taken as it is."""
    part = match.groupdict()
    if form == "numbers":
        day, month = (int(part["first"]), int(part["next"])) if day_first else (int(part["next"]), int(part["first"]))
    elif form == "iso":
        day, month = int(part["day"] or 1), int(part["month"])
        if part["day"] is None and (part["sep"] != "-" or part["hour"]):
            return NOT
    else:
        found = [i for i, name in enumerate(MONTHS, 1) if name.startswith(part["name"].lower())]
        if len(found) != 1:
            return NOT
        day, month = int(part["day"]), found[0]
    hour = int(part["hour"] or 0)
    if part["half"]:
        if not 1 <= hour <= 12:
            return NOT
        hour = hour % 12 + 12 * (part["half"].lower() == "pm")
    late, hour = divmod(hour, 24) if hour == 24 and not int(part["minute"] or 0) + int(part["second"] or 0) else (0, hour)
    try:
        when = datetime(int(part["year"]), month, day, hour, int(part["minute"] or 0), int(part["second"] or 0))
    except ValueError:
        return NOT
    micro = (when - EPOCH) // timedelta(microseconds=1) + late * 86_400_000_000 + int((part["fraction"] or "0").ljust(6, "0")[:6])
    zone = part["zone"]
    if zone and zone[0] in "+-":
        away = int(zone[1:3]) * 60 + int(zone[-2:])
        micro -= (1 if zone[0] == "+" else -1) * away * 60_000_000
    return micro


def parse_clock(level: str) -> float:
    """Return hours since midnight of a text like 14:30 or 14:30:05, NaN for anything else."""
    match = CLOCK.fullmatch(level)
    if match is None or int(match[1]) > 24 or int(match[2]) > 59:
        return float("nan")
    return int(match[1]) + int(match[2]) / 60 + float(match[3] or 0) / 3600
