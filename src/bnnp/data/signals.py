"""Signals as tasks: a window of a recording, or the time around one heart beat, is one data set from time to what was measured.

Windows of one recording share a prior: what its waves look like. Recordings of several patients are groups, so that whole patients can be
held out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from math import ceil, floor
from typing import Any

import numpy as np

from bnnp.data.collection import Collection, Column, Triple
from bnnp.data.records import Record, open_records
from bnnp.data.sources import listed

__all__ = ["read_signals"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

IN_MEMORY = 200 * 2**20
"""Samples that together take up to this many bytes are read at once."""
VOLTS = {"V": 1.0, "mV": 1e-3, "uV": 1e-6, "µV": 1e-6, "nV": 1e-9}
AROUND = ("atr", 0.25, 0.45)
"""Annotations, and seconds before and after a beat, where nothing else is said."""


def read_signals(
    source: Any,
    *,
    leads: str | Sequence[str] | None = None,
    task: str | None = None,
    window: float | None = None,
    stride: float | None = None,
    rate: float | None = None,
    beats: tuple[str, float, float] | None = None,
    start: float | None = None,
    stop: float | None = None,
    centre: bool | None = None,
    lazy: bool | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Collection:
    """Read recorded signals as a collection of windows or beats.

    The input is the time in seconds since the start of the window, or since the beat. The outputs are the leads; samples that were not
    recorded are masked. Another rate is reached by a filter against aliasing and interpolation (polyphase).

    Arguments:
        source: path of a WFDB record, with or without ending; a folder, pattern or list of them; a pair (samples, rate) with samples of
            shape (n,) or (n, leads); or a mapping from names to such pairs. Only local files are opened.
        leads: by name, whatever the case; "MLII|II" takes the first of these that a record has. Default: the first that all have. For
            arrays, names for all their columns.
        task: "window", "beat" for the time around each annotated beat, or "record" for all of a record. Default: "window", or "beat" where
            `beats` is given.
        window: length of a window in seconds. Default: 2.
        stride: seconds from the start of a window to that of the next. Default: the length, so that windows do not overlap.
        rate: samples in a second. Default: those of each record.
        beats: ending of the file of annotations, and seconds before and after the beat. Default for task "beat": ("atr", 0.25, 0.45).
        start: leave out what comes before, in seconds from the start of the record; a negative number counts from its end.
        stop: leave out what comes after, in the same way.
        centre: take its median off each lead of each task, since the level of an ECG drifts and means nothing. Default: False.
        lazy: False reads all at once, True a window when it is asked for. Default: by the size.
        recipe: of a collection read before; this source is cut in the same way. Only `leads`, `start`, `stop` and `lazy` may be given
            beside it: other leads stand in for those of the recipe, and `start=0, stop=float("inf")` takes all of a record.

    Returns:
        The tasks in the order of time, record after record; the records are the groups.

    Raises:
        FileNotFoundError: a record, or a file that its header names, is not there.
        ValueError: a file is damaged or cut short, a record lacks a lead, or nothing is left.
        ImportError: wfdb is not installed.

    Example:
        >>> c = read_signals((np.sin(np.arange(1000) / 20), 100.0), window=2.0)
        >>> len(c), str(c.inputs[0]), c[3][0][:3].ravel().tolist()
        (5, 'time [s]', [0.0, 0.01, 0.02])
    """
    given = {"task": task, "window": window, "stride": stride, "rate": rate, "beats": beats, "centre": centre}
    wanted = [leads] if isinstance(leads, str) else None if leads is None else [str(lead) for lead in leads]
    said = [name for name, value in given.items() if value is not None]
    if recipe is not None and (said or recipe.get("kind") != "signal"):
        got = f"{', '.join(said)} beside it" if said else f"a recipe for {recipe.get('kind')!r}"
        raise ValueError(f"Expected the recipe of signals, with leads, start, stop and lazy at most. Got {got}.")
    records, mark = open_records(source, wanted or (None if recipe is None else recipe["names"]))
    notes = [note for record in records for note in record.notes]
    made = _recipe(records, wanted, given, notes) if recipe is None else dict(recipe)
    if recipe is not None and wanted is not None:
        if len(wanted) != len(made["leads"]):
            raise ValueError(f"Expected leads in the place of {listed(made['leads'])}. Got {len(wanted)}: {listed(wanted)}.")
        notes.append(f"{listed(wanted)} stand in for {listed(made['leads'])}.")
        made["leads"] = wanted
    made.update({name: _finite(value) for name, value in (("start", start), ("stop", stop)) if value is not None})
    slow = lazy if lazy is not None else 8 * sum(r.length * len(made["leads"]) for r in records) > IN_MEMORY
    parts = [_Part.of(record, made, slow, notes) for record in records]
    spans = [span for part in parts for span in part.spans(notes)]
    spans = _observed(spans, slow, notes)
    if not spans:
        raise ValueError(f"Expected at least one {made['task']} with samples. Got none. {' '.join(notes)}")
    overlap = max(map(_reach, ([span for span in spans if span.part is part] for part in parts)))
    names = [span.name for span in spans]
    return Collection(
        lambda i: spans[i].read(), [span.stop - span.start for span in spans], names, (Column("time", "s"),),
        tuple(Column(name, made["units"][name]) for name in made["names"]), made, tuple(notes), mark, True,
        [span.part.record.name for span in spans], slow, overlap,
    )  # fmt: skip


def _reach(spans: Sequence[_Span]) -> int:
    """Return how many spans after it a span shares samples with, at most; they come in the order of their starts."""
    starts = [span.start for span in spans]
    return max((bisect_left(starts, span.stop) - i - 1 for i, span in enumerate(spans)), default=0)


def _finite(seconds: float) -> float | None:
    return None if np.isinf(seconds) else float(seconds)


def _recipe(records: Sequence[Record], leads: list[str] | None, given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return how to cut, as it was said or by default."""
    said = given["task"]
    if isinstance(said, list | tuple) and len(said) == 1:  # the command and TOML give lists
        said = said[0]
    task = said or ("beat" if given["beats"] else "window")
    if task not in ("window", "beat", "record") or (given["beats"] and task != "beat"):
        raise ValueError(f"Expected task as 'window', 'beat' or 'record' (beats only with 'beat'). Got {said!r}.")
    if task == "window" and given["window"] is None:
        notes.append("Nothing was said about the window: 2 s were taken.")
    window, rate = float(2.0 if given["window"] is None else given["window"]), given["rate"]
    stride = float(window if given["stride"] is None else given["stride"])
    if not (window > 0 and stride > 0) or (rate is not None and not 0 < rate < np.inf):
        raise ValueError(f"Expected window, stride and rate above 0. Got window={given['window']}, stride={given['stride']}, rate={rate}.")
    if len(around := given["beats"] or AROUND) != 3 or not (around[1] + around[2] > 0):
        raise ValueError(f"Expected beats as (ending, seconds before, seconds after), as in {AROUND}. Got {given['beats']!r}.")
    extension, before, after = around
    if leads is None:
        common = [lead for lead in records[0].leads if all(_find(record, lead) is not None for record in records)]
        if not common:
            several = listed([f"{record.name} ({', '.join(record.leads)})" for record in records], 6)
            stand = "|".join(dict.fromkeys(record.leads[0] for record in records))
            raise ValueError(f"Expected a lead that all records have. Got {several}. Name what stands in, for instance leads='{stand}'.")
        leads = common[:1]
        if len(records[0].leads) > 1:
            notes.append(f"The output is {leads[0]}, the first of the leads {listed(common)}.")
    names = [lead.split("|")[0] for lead in leads]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"Expected different leads. Got {listed(leads)}.")
    rates = sorted({record.rate for record in records})
    if rate is None and len(rates) > 1:
        notes.append(f"Records differ in their rate ({listed([f'{r:g} Hz' for r in rates])}); rate= gives them one.")
    units = {lead: records[0].units[records[0].leads.index(_lead(records[0], lead))] for lead in leads}
    return {
        "kind": "signal", "task": task, "leads": leads, "names": names, "window": window, "stride": stride,
        "rate": None if rate is None else float(rate), "start": None, "stop": None, "centre": bool(given["centre"]),
        "beats": [str(extension), float(before), float(after)] if task == "beat" else None,
        "units": {"time": "s", **{name: units[lead] for name, lead in zip(names, leads, strict=True)}},
    }  # fmt: skip


def _find(record: Record, lead: str) -> str | None:
    """Return the first lead of a record among names parted by |, exact ones first."""
    for name in lead.split("|"):
        if name in record.leads:
            return name
        if (same := [own for own in record.leads if own.lower() == name.strip().lower()])[:1]:
            return same[0]
    return None


def _lead(record: Record, lead: str) -> str:
    if (found := _find(record, lead)) is None:
        first = record.leads[0]
        raise ValueError(
            f"Expected the lead {lead} in record {record.name}. Got {listed(record.leads, 20)}. Name one of these, or one that stands in: "
            f"leads='{lead}|{first}'."
        )
    return found


@dataclass(frozen=True, eq=False)
class _Part:
    """Hold the part of a record that is cut, with its samples where they are in memory."""

    record: Record
    recipe: Mapping[str, Any]
    leads: tuple[str, ...]
    factors: FloatArray
    samples: FloatArray | None
    first: float
    last: float

    @staticmethod
    def of(record: Record, recipe: Mapping[str, Any], lazy: bool, notes: list[str]) -> _Part:
        """Choose leads, units and the part between start and stop."""
        leads = tuple(_lead(record, lead) for lead in recipe["leads"])
        factors = []
        for name, lead in zip(recipe["names"], leads, strict=True):
            if lead.lower() != name.lower():
                notes.append(f"{name} is {lead} in {record.name}.")
            unit, known = record.units[record.leads.index(lead)], recipe["units"][name]
            if unit and known and unit != known and not (unit in VOLTS and known in VOLTS):
                raise ValueError(f"Expected {name} in {known}, as in the first record or the recipe. Got {unit} in {record.name}.")
            if unit != known and unit in VOLTS and known in VOLTS:
                notes.append(f"{lead} of {record.name} is converted from {unit} to {known}.")
            factors.append(VOLTS[unit] / VOLTS[known] if unit in VOLTS and known in VOLTS else 1.0)
        length = record.length / record.rate
        edges = [
            default if recipe[key] is None else recipe[key] + (length if recipe[key] < 0 else 0.0)
            for key, default in (("start", 0.0), ("stop", length))
        ]
        first, last = max(edges[0], 0.0), min(edges[1], length)
        if not first < last:
            raise ValueError(
                f"Expected start before stop inside {record.name}, of {length:g} s. Got {recipe['start']} to {recipe['stop']}."
            )
        part = _Part(record, recipe, leads, np.asarray(factors), None, first, last)
        return part if lazy else replace(part, samples=part.take(0, part.length))

    @property
    def rate(self) -> float:
        """Return the samples in a second of what is made."""
        return self.recipe["rate"] or self.record.rate

    @property
    def length(self) -> int:
        """Return the number of samples of what is made."""
        up, down = _ratio(self.rate, self.record.rate)
        return (self.record.length - 1) * up // down + 1

    def take(self, start: int, stop: int) -> FloatArray:
        """Return samples at the wanted rate, from number `start` to `stop`, in the wanted unit."""
        if self.samples is not None:
            return self.samples[start:stop]
        up, down = _ratio(self.rate, self.record.rate)
        if up == down:
            return self.record.read(self.leads, start, stop) * self.factors
        return _resample(partial(self.record.read, self.leads), self.record.length, up, down, start, stop) * self.factors

    def spans(self, notes: list[str]) -> list[_Span]:
        """Return the windows or beats."""
        recipe, rate, name = self.recipe, self.rate, self.record.name
        low, high = (
            ceil(self.first * rate - 1e-6),
            floor(min(self.last * rate, (self.record.length - 1) / self.record.rate * rate + 1) + 1e-6),
        )
        if recipe["task"] == "record":
            return [_Span(self, low, high, low / rate, "")]
        if recipe["task"] == "window":
            n, step = round(recipe["window"] * rate), recipe["stride"] * rate
            if n < 2:
                raise ValueError(f"Expected windows of at least 2 samples. Got {recipe['window']:g} s at {rate:g} Hz.")
            count = max(0, floor((high - low - n) / step + 1e-6) + 1)
            if count == 0:
                notes.append(f"{name} is shorter than a window: {(high - low) / rate:g} s.")
            starts = [low + round(j * step) for j in range(count)]
            return [_Span(self, a, a + n, a / rate, "") for a in starts if a + n <= high]
        extension, before, after = recipe["beats"]
        samples, symbols, others = self.record.beats(extension)
        found = []
        for at, symbol in zip(samples / self.record.rate, symbols, strict=True):
            a = ceil((at - before) * rate - 1e-6)
            span = _Span(self, a, a + round((before + after) * rate), float(at), symbol)
            if self.first <= at < self.last:
                found.append(span if low <= a and span.stop <= high else None)
        if others:
            notes.append(f"Annotations of {name} that mark no beat are skipped: {others}.")
        if None in found:
            notes.append(f"Beats of {name} too close to an edge are left out: {found.count(None)}.")
        return [span for span in found if span is not None]


@dataclass(frozen=True, eq=False)
class _Span:
    """Hold one task: samples from `start` to `stop` at the wanted rate, and the time in seconds from which it is counted."""

    part: _Part
    start: int
    stop: int
    zero: float
    symbol: str

    @property
    def name(self) -> str:
        """Return the record, the time, and the symbol of a beat."""
        at = f"{self.zero:.3f}".rstrip("0").rstrip(".")
        return " ".join(
            word for word in (self.part.record.name, "" if self.part.recipe["task"] == "record" else f"{at} s", self.symbol) if word
        )

    def read(self) -> Triple:
        """Return x, y and the mask."""
        y = self.part.take(self.start, self.stop)
        mask = ~np.isnan(y)
        if self.part.recipe["centre"] and mask.any():
            y = y - np.stack([np.median(column[seen]) if seen.any() else 0.0 for column, seen in zip(y.T, mask.T, strict=True)])
        x = np.arange(self.start, self.stop) / self.part.rate - self.zero
        return x[:, None].round(12), y, mask


def _observed(spans: list[_Span], lazy: bool, notes: list[str]) -> list[_Span]:
    """Leave out tasks without a sample, and count gaps and flat lines; where tasks are read one at a time, those are not looked for."""
    if lazy:
        return spans
    seen = [~np.isnan(span.part.take(span.start, span.stop)) for span in spans]
    heights = [_height(span.part.take(span.start, span.stop)) for span in spans]
    gaps, kept = sum(not mask.all() for mask in seen), [span for span, mask in zip(spans, seen, strict=True) if mask.any()]
    # After a filter a flat line is not exactly flat.
    flat = int((np.stack(heights) <= 1e-3 * np.median(np.stack(heights), axis=0)).any(axis=1).sum()) if heights else 0
    if gaps:
        notes.append(f"{gaps} of {len(spans)} tasks have gaps, which are masked.")
    if lost := len(spans) - len(kept):
        notes.append(f"{lost} of {len(spans)} tasks have no sample and are left out.")
    if flat:
        notes.append(f"{flat} of {len(spans)} tasks have a lead that does not change (a flat line); they are kept.")
    return kept


def _height(y: FloatArray) -> FloatArray:
    """Return the largest less the smallest value of each lead; infinite where none was recorded."""
    low, high = (f(np.where(np.isnan(y), bound, y), axis=0) for f, bound in ((np.min, np.inf), (np.max, -np.inf)))
    return np.where(low <= high, high - low, np.inf)


@lru_cache(maxsize=32)
def _ratio(rate: float, own: float) -> tuple[int, int]:
    """Return the rate wanted over that of a record as a fraction of small numbers."""
    fraction = Fraction(rate).limit_denominator(10_000) / Fraction(own).limit_denominator(10_000)
    fraction = fraction.limit_denominator(2_000)
    if fraction <= 0:
        raise ValueError(f"Expected a rate not far from {own:g} Hz. Got {rate:g} Hz.")
    return fraction.numerator, fraction.denominator


def _scipy_signal() -> Any:
    try:
        from scipy import signal  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError('Another rate needs scipy. Run: pip install "bnnp[signal]".') from error
    return signal


@lru_cache(maxsize=8)
def _taps(largest: int) -> FloatArray:
    """Return the filter of `scipy.signal.resample_poly`, made here so that its reach is known."""
    taps: FloatArray = _scipy_signal().firwin(20 * largest + 1, 1.0 / largest, window=("kaiser", 5.0))
    return taps


def _resample(raw: Any, length: int, up: int, down: int, start: int, stop: int) -> FloatArray:
    """Return samples start..stop at up/down times the rate; only the stretch that the filter sees is read.

    Beyond its ends a record is taken to go on as it ended. Gaps are bridged by straight lines for the filter, and a sample next to one is
    missing.
    """
    largest = max(up, down)
    margin = ceil(10 * largest / up) + 1
    # The stretch starts at a multiple of `down`, where both rates have a sample.
    first = (floor(start * down / up) - margin) // down * down
    last = ceil(stop * down / up) + margin + 1
    block = raw(max(first, 0), min(last, length))
    missing = np.isnan(block)
    places = np.arange(len(block))
    for j in np.flatnonzero(missing.any(0) & ~missing.all(0)):
        seen = ~missing[:, j]
        block = block.copy() if j == np.flatnonzero(missing.any(0))[0] else block
        block[missing[:, j], j] = np.interp(places[missing[:, j]], places[seen], block[seen, j])
    edges = ((max(-first, 0), max(last - length, 0)), (0, 0))
    block, missing = np.pad(block, edges, mode="edge"), np.pad(missing, edges, mode="edge")
    offset = first // down * up
    made = _scipy_signal().resample_poly(np.where(np.isnan(block), 0.0, block), up, down, axis=0, window=_taps(largest))[
        start - offset : stop - offset
    ]
    at = np.arange(start, stop) * down / up - first
    gone = missing[np.floor(at + 1e-9).astype(int)] | missing[np.ceil(at - 1e-9).astype(int)]
    result: FloatArray = np.where(gone, np.nan, made)
    return result
