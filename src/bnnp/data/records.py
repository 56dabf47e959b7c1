"""Recorded signals: a WFDB record, or an array with its rate, as something of which a stretch can be read.

PhysioNet keeps ECG, blood pressure, breathing and EEG in WFDB records: a header (.hea), files of samples (.dat, .mat) and annotations.
Only local files are opened.
"""

from __future__ import annotations

import glob
import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnnp.data.sources import fingerprint, listed

__all__ = ["Record", "open_records"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]

BEATS = {
    1: "N", 2: "L", 3: "R", 4: "a", 5: "V", 6: "F", 7: "J", 8: "A", 9: "S", 10: "E", 11: "j", 12: "/", 13: "Q", 25: "B", 30: "?", 34: "e",
    35: "n", 38: "f", 41: "r",
}  # fmt: skip
"""Codes of annotations that mark a beat, with their symbols; the others mark rhythms, noise and parts of a beat."""
BYTES = {"8": 1.0, "16": 2.0, "24": 3.0, "32": 4.0, "61": 2.0, "80": 1.0, "160": 2.0, "212": 1.5, "310": 4 / 3, "311": 4 / 3}
"""Bytes of a sample in each format of fixed width."""


@dataclass(frozen=True, eq=False)
class Record:
    """Hold one recording of one or several leads.

    Arguments:
        name: of the record.
        rate: samples in a second.
        length: number of samples.
        leads: names of its leads.
        units: of each lead; "" where not known.
        path: of the header without its ending; None for an array.
        data: all samples with shape (length, leads), for an array.
        segments: for a record in segments, the first sample and the record of each; there is none in a gap.
        notes: what a person should know of it.
    """

    name: str
    rate: float
    length: int
    leads: tuple[str, ...]
    units: tuple[str, ...]
    path: Path | None = None
    data: FloatArray | None = None
    segments: tuple[tuple[int, Record], ...] = ()
    notes: tuple[str, ...] = ()

    def read(self, leads: Sequence[str], start: int = 0, stop: int | None = None) -> FloatArray:
        """Return samples from `start` to `stop` with shape (n, leads), in units of the record; NaN where none was recorded.

        Raises:
            ValueError: the file is damaged.
        """
        end = self.length if stop is None else stop
        at = [self.leads.index(lead) for lead in leads]
        if self.data is not None:
            return self.data[start:end, at]
        if end <= start or self.path is None:
            return np.zeros((0, len(at)))
        if self.segments:
            return self._join(leads, start, end)
        # wfdb gives channels in the order of the file, or of the list, by its version: so each is found by its place.
        wanted = sorted(set(at))
        found = _call(self.path, "rdrecord", str(self.path), sampfrom=start, sampto=end, channels=wanted)
        values = np.asarray(found.p_signal, dtype=np.float64)
        if values.shape != (end - start, len(wanted)):
            raise ValueError(
                f"Expected {end - start} samples of {len(wanted)} leads in {self.path}. Got shape {values.shape}: it is damaged."
            )
        return values[:, [wanted.index(i) for i in at]]

    def _join(self, leads: Sequence[str], start: int, stop: int) -> FloatArray:
        """Return a stretch of a record in segments, which need not all have the same leads."""
        values = np.full((stop - start, len(leads)), np.nan)
        for first, segment in self.segments:
            low, high = max(start, first), min(stop, first + segment.length)
            there = [j for j, lead in enumerate(leads) if lead in segment.leads]
            if low < high and there:
                values[low - start : high - start, there] = segment.read([leads[j] for j in there], low - first, high - first)
        return values

    def beats(self, extension: str) -> tuple[IntArray, list[str], int]:
        """Return the samples at which beats were annotated, their symbols, and the number of other annotations.

        Raises:
            FileNotFoundError: there is no file of annotations.
            ValueError: it is damaged, or the record is an array.
        """
        if self.path is None:
            raise ValueError(f"Expected a WFDB record with annotations. Got the array {self.name}. Give windows instead of beats.")
        file = self.path.with_name(f"{self.path.name}.{extension}")
        if not file.is_file():
            others = listed(sorted(p.name for p in file.parent.glob(f"{glob.escape(self.path.name)}.*")))
            raise FileNotFoundError(f"Expected annotations of beats in {file}. Got no such file. Files of this record: {others}.")
        samples, codes, rate = _annotations(file)
        at = [i for i, code in enumerate(codes) if code in BEATS]
        places = np.round(np.asarray(samples, dtype=np.float64)[at] * (self.rate / rate if rate else 1.0)).astype(np.int64)
        return places, [BEATS[codes[i]] for i in at], len(codes) - len(at)


def _annotations(file: Path) -> tuple[list[int], list[int], float | None]:
    """Read a file of annotations: the sample and the code of each, and their rate where it is said.

    Two bytes hold a code and a number: most often the samples since the annotation before. wfdb's own reader does not come to an end on
    some damaged files.

    References:
        annot(5), WFDB Applications Guide, G. Moody: MIT format.
    """
    data = file.read_bytes()
    samples, codes, rate = list[int](), list[int](), None
    place = now = 0
    while True:
        if place + 2 > len(data):
            raise ValueError(f"Expected two zero bytes at the end of the annotations {file}. Got none: it is cut short. Take another copy.")
        code, number = data[place + 1] >> 2, data[place] + 256 * (data[place + 1] & 3)
        place += 2
        if code == number == 0:
            return samples, codes, rate
        if code == 59:  # a long gap: four bytes, of which the two high ones come first
            high, low = (int.from_bytes(data[place + k : place + k + 2], "little") for k in (0, 2))
            now += (high << 16 | low) - (1 << 32 if high >> 15 else 0)
            place += 4
        elif code == 63:  # text
            text = data[place : place + number].decode("latin-1")
            place += number + number % 2
            if text.startswith("## time resolution:"):
                rate = _positive(text.partition(":")[2])
                # This one is about the file, not the signal.
                samples, codes = samples[:-1], codes[:-1]
        elif code < 60:
            now += number
            if code:  # 0 moves on in time and marks nothing
                samples.append(now)
                codes.append(code)


def _positive(text: str) -> float | None:
    try:
        value = float(text.strip("\0 "))
    except ValueError:
        return None
    return value if 0 < value < np.inf else None


def open_records(source: Any, leads: Sequence[str] | None) -> tuple[list[Record], str]:
    """Open the records that a source names.

    Arguments:
        source: path of a record, with or without ending; folder or pattern of several; list of paths; pair (samples, rate); mapping from
            names to such pairs.
        leads: names of the leads of an array.

    Returns:
        The records, and their fingerprint.

    Raises:
        FileNotFoundError: there is no such record.
        ValueError: a file is damaged, or an array has the wrong shape.
        ImportError: wfdb is not installed.
    """
    if isinstance(source, tuple) and len(source) == 2 and not isinstance(source[0], str | os.PathLike):
        source = {"signal": source}
    if isinstance(source, Mapping):
        records = [_array(str(name), pair, leads) for name, pair in source.items()]
        digest = hashlib.sha256()
        for record in records:
            digest.update(f"{record.name} {record.rate} {record.leads} ".encode() + np.ascontiguousarray(record.data).tobytes())
        return records, digest.hexdigest()[:16]
    paths = _paths(source)
    base = Path(os.path.commonpath([path.parent for path in paths]))
    opened = [_open(path, path.relative_to(base).as_posix()) for path in paths]
    files = [file for _, own in opened for file in own]
    return [record for record, _ in opened], fingerprint(files)


def _array(name: str, pair: Any, leads: Sequence[str] | None) -> Record:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"Expected a pair (samples, rate) for {name!r}. Got {type(pair).__name__}.")
    samples, rate = pair
    values = np.asarray(samples, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or not values.size:
        raise ValueError(f"Expected samples with shape (n,) or (n, leads). Got shape {values.shape} for {name!r}.")
    if not float(rate) > 0:
        raise ValueError(f"Expected the rate of {name!r} as a positive number of samples in a second. Got {rate}.")
    if np.isinf(values).any():
        raise ValueError(f"Expected finite samples, or NaN for those that are missing. Got infinite ones in {name!r}.")
    made = ["signal"] if values.shape[1] == 1 else [f"signal{j + 1}" for j in range(values.shape[1])]
    named = tuple(leads) if leads is not None and len(leads) == values.shape[1] else tuple(made)
    return Record(name, float(rate), len(values), named, ("",) * len(named), data=values)


def _paths(source: Any) -> list[Path]:
    """Return the paths of headers without their ending."""
    if isinstance(source, Sequence) and not isinstance(source, str | os.PathLike):
        if not source:
            raise ValueError("Expected at least one record. Got an empty list.")
        return [path for one in source for path in _paths(one)]
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"Expected the path of a WFDB record, a pair (samples, rate), or several of them. Got {type(source).__name__}.")
    path = Path(source)
    if path.is_dir():
        found = sorted(p.with_suffix("") for p in path.rglob("*.hea"))
        # The segments of a record have headers of their own, and are read through it.
        parts = {p.with_name(name) for p in found for name in _segments(p)}
        if not found:
            raise ValueError(f"Expected WFDB headers (.hea) in the folder {path}. Got none. Name a record, or another folder.")
        return [p for p in found if p not in parts]
    if glob.has_magic(str(path)) and not path.exists():
        found = sorted({_bare(Path(p)) for p in glob.glob(str(path), recursive=True)})
        found = [p for p in found if Path(f"{p}.hea").is_file()]
        if not found:
            raise FileNotFoundError(f"Expected WFDB records that match {path}. Got none with a header (.hea).")
        return found
    bare = _bare(path)
    if not Path(f"{bare}.hea").is_file():
        table = path.suffix.lower() in (".csv", ".tsv", ".txt", ".parquet")
        do = "For a table, use read_table with window= and an order column." if table else "Check the path."
        raise FileNotFoundError(f"Expected the WFDB header {bare}.hea. Got no such file. {do}")
    return [bare]


def _bare(path: Path) -> Path:
    known = path.suffix.lower() in (".hea", ".dat", ".mat", ".atr", ".xyz")
    return path.with_suffix("") if known and not Path(f"{path}.hea").is_file() else path


def _segments(path: Path) -> list[str]:
    """Return the names of the segments that a header lists; none for an ordinary record."""
    lines = [line.split() for line in Path(f"{path}.hea").read_bytes().decode("latin-1").splitlines() if line.strip()[:1] not in ("", "#")]
    return [line[0] for line in lines[1:]] if lines and "/" in lines[0][0] else []


def _call(path: Path, function: str, *args: Any, **kwargs: Any) -> Any:
    """Call wfdb; whatever it raises on a damaged file becomes one kind of error."""
    # Importing it warns of what pandas deprecates in it.
    with warnings.catch_warnings(action="ignore"):
        try:
            import wfdb
        except ImportError as error:
            raise ImportError('Reading WFDB records needs wfdb. Run: pip install "bnnp[signal]".') from error
        try:
            return getattr(wfdb, function)(*args, **kwargs)
        except FileNotFoundError as error:
            lost = Path(str(error.filename)) if error.filename else path
            raise FileNotFoundError(f"Expected {lost}, which the header of {path.name} names. Got no such file. Copy it beside.") from None
        except PermissionError:
            raise PermissionError(f"Expected to read {path}. Got no permission. Ask its owner, or copy it.") from None
        except MemoryError:
            raise
        except Exception as error:  # wfdb raises errors of many kinds on a damaged file
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"Expected a WFDB file that can be read in {path}. Got: {said}. It is damaged; take another copy.") from None


def _open(path: Path, name: str) -> tuple[Record, list[Path]]:
    """Read the header of a record and check that its files are there in full."""
    header = Path(f"{path}.hea")
    if not header.stat().st_size:
        raise ValueError(f"Expected a WFDB header in {header}. Got an empty file. Take another copy.")
    top = _call(header, "rdheader", str(path))
    if hasattr(top, "seg_name"):
        return _open_segments(path, name, top)
    files = [header, *_files(path, top)]
    leads, units = [str(n) for n in top.sig_name or []], [str(u or "") for u in top.units or []]
    if not leads:
        raise ValueError(f"Expected signals in the record {path}. Got a header without any.")
    notes: list[str] = []
    if again := sorted({n for n in leads if leads.count(n) > 1}):
        leads = [n if leads.index(n) == i else f"{n}#{leads[:i].count(n) + 1}" for i, n in enumerate(leads)]
        notes.append(f"{name} has several leads called {listed(again)}; later ones got a number.")
    fast = [n for n, k in zip(leads, top.samps_per_frame or [], strict=False) if k and k > 1]
    if fast:
        notes.append(f"{name} has more than one sample in a frame of {listed(fast)}; they are averaged to {float(top.fs):g} Hz.")
    length, data = top.sig_len, None
    if length is None:
        # The header need not say how long a record is; then wfdb reads all of it or nothing.
        data = np.asarray(_call(path, "rdrecord", str(path)).p_signal, dtype=np.float64)
        length = len(data)
    if not top.fs or not length or length < 0:
        raise ValueError(f"Expected a rate and samples in the record {path}. Got a rate of {top.fs} and {length} samples.")
    return Record(name, float(top.fs), int(length), tuple(leads), tuple(units), path, data, notes=tuple(notes)), files


def _open_segments(path: Path, name: str, top: Any) -> tuple[Record, list[Path]]:
    """Read the header of a record in segments, and those of its segments."""
    begins = np.cumsum([0, *top.seg_len]).tolist()
    files, parts = [Path(f"{path}.hea")], []
    units: dict[str, str] = {}
    for begin, length, own in zip(begins, top.seg_len, top.seg_name, strict=False):
        # ~ is a gap; a segment of length 0 lists the leads only.
        if own == "~" or not length:
            continue
        if not Path(f"{path.parent / own}.hea").is_file():
            raise FileNotFoundError(f"Expected {path.parent / own}.hea, a segment of {path.name}. Got no such file. Copy it beside.")
        if _segments(path.parent / own):
            raise ValueError(f"Expected the segment {own} of {path} to be an ordinary record. Got one with segments. It is damaged.")
        part, more = _open(path.parent / own, own)
        if (
            part.rate != top.fs
            or part.length != length
            or any(units.setdefault(n, u) != u for n, u in zip(part.leads, part.units, strict=True))
        ):
            raise ValueError(f"Expected one rate and unit, and {length} samples, in the segment {own} of {path}. Got other ones.")
        parts.append((int(begin), part))
        files += more
    if not parts:
        raise ValueError(f"Expected samples in the record {path}. Got gaps only.")
    notes = tuple(dict.fromkeys(note for _, part in parts for note in part.notes))
    return Record(name, float(top.fs), int(begins[-1]), tuple(units), tuple(units.values()), path, None, tuple(parts), notes), files


def _files(path: Path, head: Any) -> list[Path]:
    """Return the files of samples of a record; refuse one that is not there or cut short."""
    # For each file the bytes before the samples, and those of each frame.
    found: dict[Path, tuple[int, float]] = {}
    for i, name in enumerate(head.file_name or []):
        if name == "~":
            continue
        file = path.parent / name
        if not file.is_file():
            raise FileNotFoundError(f"Expected {file}, which the header {path.name}.hea names. Got no such file. Copy it beside.")
        before, share = found.get(file, (int(head.byte_offset[i] or 0), 0.0))
        found[file] = (before, share + BYTES.get(str(head.fmt[i]), 0.0) * (head.samps_per_frame[i] or 1))
    for file, (before, share) in found.items():
        need, size = before + int(share * (head.sig_len or 0)), file.stat().st_size
        if share and size < need:
            raise ValueError(f"Expected {need} bytes in {file}, as its header says. Got {size}: it is cut short. Take another copy.")
    return sorted(found)
