"""Delimited text of any kind (CSV, TSV, what instruments write) made uniform, or refused with the row where it breaks.

What people call a CSV file differs in encoding, delimiter, decimal sign, header and comments, and is damaged in as many ways. Here that is
found out from the bytes, before any library parses them: what comes out is UTF-8 with one record a line, all of the same number of fields.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MISSING", "NUMBER", "Text", "open_text", "read_bytes"]

MISSING = frozenset({"", "na", "n/a", "#n/a", "<na>", "nan", "nat", "null", "-", "?"})
"""What stands for a missing value, in lower case."""
NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", re.ASCII | re.IGNORECASE)
DATED = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([T ].*)?|\d{1,2}:\d{2}(:\d{2}.*)?", re.ASCII)
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
MAGIC = {
    b"PK\x03\x04": "a zip archive or an Excel workbook. Unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook. Save the sheet as CSV",
    b"BZh": "a file packed by bzip2. Unpack it",
    b"\xfd7zXZ\x00": "a file packed by xz. Unpack it",
    b"\x28\xb5\x2f\xfd": "a file packed by zstd. Unpack it",
    b"\x89HDF": "an HDF5 or netCDF file. Read it with `bnnp.data.read_grid`",
    b"CDF": "a netCDF file. Read it with `bnnp.data.read_grid`",
    b"\x89PNG": "an image. Read a folder of images with `bnnp.data.read_images`",
    b"%PDF": "a PDF. Export the table as CSV",
}
DELIMITERS = "\t;|, "
SAMPLE, SAMPLED = 1 << 16, 200
CHUNK = 1 << 22


@dataclass(frozen=True)
class Text:
    """Hold delimited text that has been looked through.

    Arguments:
        path: where it came from.
        names: of the fields.
        body: the records in UTF-8, without header and comments, one a line but for line ends inside quotes.
        delimiter: one character.
        decimal: the decimal sign, "." or ",".
        rows: number of records in the body.
        notes: what was assumed.
        whole: the text with header and comments, to find a row in.
        heads: number of records of `whole` that are no data.
        skipped: number of lines before `whole`.
    """

    path: Path
    names: tuple[str, ...]
    body: bytes
    delimiter: str
    decimal: str
    rows: int
    notes: tuple[str, ...]
    whole: bytes
    heads: int
    skipped: int

    def line(self, row: int) -> int:
        """Return in which line of the file, counted from 1, a record of the body starts."""
        for i, (line, _) in enumerate(_records(self.whole, self.delimiter)):
            if i == row + self.heads:
                return line + self.skipped
        return row + self.heads + self.skipped + 1


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file, unpacked where gzip packed them.

    Raises:
        FileNotFoundError: there is none.
        PermissionError: it may not be read.
        OSError: anything else that keeps it from being read.
        ValueError: a folder, or a packed file that is cut off or damaged.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"Expected a table at {path}. Got no such file. Check the path; nothing is downloaded.") from None
    except IsADirectoryError:
        raise ValueError(f"Expected a table, one file. Got the folder {path}. Give the path of a file in it.") from None
    except PermissionError:
        raise PermissionError(f"Expected to be allowed to read {path}. Got no permission. Change its permissions, or copy it.") from None
    except (OSError, ValueError) as error:
        raise OSError(f"Expected a table at {str(path)!r}. Got: {error}. Check the path.") from None
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"Expected a whole gzip file at {path}. Got a damaged one: {error}. Take another copy.") from None


def open_text(
    path: Path, raw: bytes, names: Sequence[str] | None, wanted: Sequence[str], delimiter: str | None, encoding: str | None
) -> Text:
    """Find out how a text is written, and check that every record has the same number of fields.

    Arguments:
        path: for messages.
        raw: its bytes.
        names: of the fields, where the file has no header or a poor one.
        wanted: names that a header must have; a first row that has them is one, whatever it looks like.
        delimiter: one character, or None to find out.
        encoding: of the text, or None to find out.

    Raises:
        ValueError: the text is empty, binary, in no known encoding, ragged, or has two columns of one name.
    """
    if delimiter is not None and (not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '"\n\r' or ord(delimiter) > 127):
        raise ValueError(f"Expected a delimiter of one plain character, such as ',' or a tab. Got {delimiter!r}.")
    notes: list[str] = []
    data = _decoded(path, raw, encoding, notes)
    data, skipped, remark = _without_comments(data)
    if not data.strip():
        raise ValueError(f"Expected a table in {path}, a header and rows. Got an empty file{' but for comments' if skipped else ''}.")
    delimiter = delimiter or _delimiter(data)
    if delimiter == " ":
        data = b"\n".join(b" ".join(line.split()) for line in data.split(b"\n")) if b"  " in data or b"\t" in data else data
        data = re.sub(rb"(?m)^ | $", b"", data)
    sample = [fields for _, fields in _some(data, delimiter)]
    if not sample:
        raise ValueError(f"Expected a table in {path}. Got no field that can be read: its first record is longer than {SAMPLE} characters.")
    first = [field.strip() for field in sample[0]]
    heads = 1 if {*wanted} <= {*first} and wanted else int(_is_header(first, sample[1:]))
    header: list[str] | None = first if heads else None
    body = _body(data, delimiter, heads)
    if not heads and remark is not None:
        above = [field.strip() for field in next(csv.reader([remark], delimiter=delimiter), [])]
        above = [field for field in above if field] if delimiter == " " else above
        if len(above) == len(first) and _is_header(above, sample):
            header = above
            notes.append("The names of the columns were taken from the last comment line.")
    text = Text(path, (), body, delimiter, ".", 0, (), data, heads, skipped)
    rows, fields = _check_shape(text, first)
    if heads and fields == len(first) + 1:
        header = ["", *first]
    decimal = _decimal(sample[heads:], delimiter)
    if decimal == ",":
        notes.append("Numbers were read with a decimal comma.")
    final = _names(path, header, names, fields, notes)
    if not rows:
        raise ValueError(f"Expected rows below the header of {path}. Got the header only: {', '.join(map(repr, final[:10]))}.")
    return Text(path, final, body, delimiter, decimal, rows, tuple(notes), data, heads, skipped)


def _decoded(path: Path, raw: bytes, encoding: str | None, notes: list[str]) -> bytes:
    """Return the text as UTF-8 with lines ended by a line feed."""
    kind = next((what for magic, what in MAGIC.items() if raw.startswith(magic)), None)
    if kind is not None:
        raise ValueError(f"Expected delimited text or Parquet in {path}. Got {kind}.")
    marks = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
    found = encoding or next((name for mark, name in marks if raw.startswith(mark)), None)
    if found is None and b"\0" in raw:
        raise ValueError(
            f"Expected delimited text or Parquet in {path}. Got a binary file, or text with NUL bytes (the first is byte "
            f"{raw.index(0) + 1}). If it is UTF-16 without a mark, give encoding='utf-16-le'."
        )
    if found is not None:
        try:
            with warnings.catch_warnings(action="ignore"):
                data = raw.decode(found).removeprefix("\ufeff").encode()
        except LookupError:
            raise ValueError(f"Expected an encoding that Python knows, such as 'utf-8' or 'cp1252'. Got {found!r}.") from None
        except UnicodeError as error:
            raise ValueError(f"Expected text in {found} in {path}. Got bytes that are not: {error}. Give another encoding.") from None
    else:
        data = _guessed(raw, notes)
    data = data.rstrip(b"\x1a")
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    start = data[:200].lstrip()
    if re.match(rb'(<!doctype|<html|<\?xml)|[\[{]\s*["{\[]', start, re.IGNORECASE):
        what = "a page in HTML or XML" if start.startswith(b"<") else "JSON"
        raise ValueError(f"Expected delimited text or Parquet in {path}. Got {what}. Save it as CSV.")
    odd = CONTROL.search(data)
    if odd:
        raise ValueError(
            f"Expected delimited text or Parquet in {path}. Got the control character {odd.group()!r} in line "
            f"{data.count(10, 0, odd.start()) + 1}: a binary or damaged file."
        )
    return data if data.endswith(b"\n") else data + b"\n"


def _guessed(raw: bytes, notes: list[str]) -> bytes:
    if not raw.isascii():
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError:
            try:
                data, name = raw.decode("cp1252"), "cp1252"
            except UnicodeDecodeError:
                data, name = raw.decode("latin-1"), "latin-1"
            notes.append(f"The text is not UTF-8 and was read as {name}; if letters look wrong, give its encoding.")
            return data.encode()
    return raw


def _without_comments(data: bytes) -> tuple[bytes, int, str | None]:
    """Cut blank lines and comments off the top; return the rest, how many lines they were, and the last comment."""
    start, lines, remark = 0, 0, None
    while start < len(data):
        end = data.index(b"\n", start)
        line = data[start:end].strip()
        if line and not line.startswith(b"#"):
            break
        remark = line.lstrip(b"# ").decode() if line else remark
        start, lines = end + 1, lines + 1
    return data[start:] if start else data, lines, remark


def _records(data: bytes, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line where it starts, fields) of each record that is not blank."""
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8", newline=""), delimiter=delimiter)
    start = 1
    for fields in reader:
        if len(fields) > 1 or (fields and fields[0].strip()):
            yield start, fields
        start = reader.line_num + 1


def _some(data: bytes, delimiter: str) -> list[tuple[int, list[str]]]:
    """Return the first records of a text."""
    head = data[:SAMPLE]
    head = head if len(data) <= SAMPLE else head[: head.rfind(b"\n") + 1]
    found: list[tuple[int, list[str]]] = []
    try:
        for record in _records(head, delimiter):
            found.append(record)
            if len(found) > SAMPLED:
                break
    except csv.Error:
        pass  # what could be read says enough; the whole is checked later
    return found


def _delimiter(data: bytes) -> str:
    """Return the delimiter that gives most records the number of fields of the first; at equal merit in the order of `DELIMITERS`."""
    best, merit = ",", 0.0
    for delimiter in DELIMITERS:
        if delimiter == " ":
            head = data[:SAMPLE].split(b"\n")[: SAMPLED + 1]
            counts = [len(line.split()) for line in head if line.strip()]
        else:
            counts = [len(fields) for _, fields in _some(data, delimiter)]
        usual = max(counts, key=counts.count, default=0)
        share = counts.count(usual) / len(counts) if usual > 1 else 0.0
        if round(share, 1) > merit and (counts[0] > 1 or share > 0.8) and share > 0.5:
            best, merit = delimiter, round(share, 1)
    return best


def _is_header(first: Sequence[str], others: Sequence[Sequence[str]]) -> bool:
    """Say whether the first record names the columns: it has words where the column has none, or nothing but words."""
    data = False
    for j, field in enumerate(first):
        if field.lower() in MISSING:
            continue
        if _plain(field):
            data = True
            continue
        below = [row[j].strip() for row in others if j < len(row)]
        below = [value for value in below if value.lower() not in MISSING]
        if below and all(map(_plain, below)):
            return True
    return not data


def _plain(field: str) -> bool:
    return bool(NUMBER.fullmatch(field) or DATED.fullmatch(field)) or field.lower() in ("true", "false")


def _decimal(sample: Sequence[Sequence[str]], delimiter: str) -> str:
    if delimiter == ",":
        return "."
    fields = [field.strip() for row in sample for field in row]
    commas = sum(bool(re.fullmatch(r"[+-]?\d*,\d+([eE][+-]?\d+)?", field)) for field in fields)
    points = sum(bool(re.fullmatch(r"[+-]?\d*\.\d+([eE][+-]?\d+)?", field)) for field in fields)
    return "," if commas > points else "."


def _body(data: bytes, delimiter: str, heads: int) -> bytes:
    """Return the records alone: without the header, and without blank lines."""
    start = 0
    if heads:
        reader = csv.reader(io.TextIOWrapper(io.BytesIO(data[: 16 * SAMPLE]), "utf-8", errors="replace", newline=""), delimiter=delimiter)
        next(reader, None)
        for _ in range(reader.line_num):
            start = data.find(b"\n", start) + 1
    body = data[start:]
    blank = rb"(?m)^ *\n" if delimiter == "\t" else rb"(?m)^[ \t]*\n"
    return re.sub(blank, b"", body) if re.match(blank, body) or re.search(rb"\n[ \t]*\n", body) else body


def _check_shape(text: Text, first: Sequence[str]) -> tuple[int, int]:
    """Return the number of records and of fields in each, all the same.

    Delimiters are counted per line over the bytes, quotes taken into account, which takes a fraction of what parsing takes. Where the
    counts differ, the records are read one by one to name the row, or to find that it was quoted in an unusual way.
    """
    counts = _counts(text.body, text.delimiter)
    expected = len(first)
    if text.heads and len(counts) and expected > 1 and (counts == expected + 1).all():
        return len(counts), expected + 1  # rows with names that the header has no name for, as R writes them
    if (counts == expected).all():
        return len(counts), expected
    rows = -text.heads
    try:
        for line, fields in _records(text.whole, text.delimiter):
            if len(fields) != expected:
                raise ValueError(
                    f"Expected {expected} fields in every row of {text.path}, as in its first (delimiter {text.delimiter!r}). Got "
                    f"{len(fields)} in row {line + text.skipped}. Mend that row (the file may be cut off there), or give the delimiter."
                )
            rows += 1
    except csv.Error as error:
        raise ValueError(f"Expected delimited text in {text.path}. Got what cannot be read near row {rows + 1}: {error}.") from None
    return rows, expected


def _counts(body: bytes, delimiter: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the number of fields of each record, from the bytes."""
    whole, quoted = np.frombuffer(body, np.uint8), b'"' in body
    totals, seen, quotes = [np.zeros(1, np.int64)], 0, 0
    for start in range(0, len(whole), CHUNK):
        part = whole[start : start + CHUNK]
        field, line = part == ord(delimiter), part == 10
        if quoted:
            parity = (part == 34).cumsum() + quotes
            outside, quotes = parity % 2 == 0, int(parity[-1])
            field, line = field & outside, line & outside
        ends = np.flatnonzero(field)
        totals.append(seen + np.searchsorted(ends, np.flatnonzero(line)))
        seen += len(ends)
    counts: np.ndarray[Any, np.dtype[np.int64]] = np.concatenate(totals)
    return counts[1:] - counts[:-1] + 1


def _names(path: Path, header: list[str] | None, names: Sequence[str] | None, fields: int, notes: list[str]) -> tuple[str, ...]:
    if names is not None and not (header is not None and {*names} == {*header}):
        if len(names) != fields:
            raise ValueError(f"Expected {fields} names, one for each column of {path}. Got {len(names)}.")
        if header is not None:
            notes.append("The names in the first row of the file were replaced by those given.")
        header = [str(name) for name in names]
    elif header is None:
        what = "column_1" if fields == 1 else f"column_1 to column_{fields}"
        notes.append(f"The first row looks like data, so the file has no names of columns; they are called {what}.")
        header = [""] * fields
    final = tuple(name or f"column_{j + 1}" for j, name in enumerate(header))
    twice = sorted(name for name, count in Counter(final).items() if count > 1)
    if twice:
        raise ValueError(
            f"Expected columns of different names in {path}. Got {', '.join(map(repr, twice))} more than once. Rename them in the file."
        )
    return final
