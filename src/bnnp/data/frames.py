"""One view of tables from everywhere: text, Parquet, frames of pandas, polars and others, as named pandas series.

What a reader of tables needs to know of a source is small: the names of its columns, the columns asked for, and in which row of the file a
value stands. pandas and pyarrow are imported where they are used, since the rest of the package does without.
"""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bnnp.data.text import MISSING, Text, open_text, read_bytes

__all__ = ["Source", "open_source"]

SPELLINGS = sorted({form for word in MISSING for form in (word, word.upper(), word.capitalize())} | {"NaN", "NaT", "N/a"})
"""What pandas is told to read as missing; what it does not know is found later, in the column that it spoils."""


@dataclass(frozen=True)
class Source:
    """Hold a table that has been opened.

    Arguments:
        where: what to call it in a message.
        names: of its columns.
        rows: their number.
        load: gives the columns of these names as series; those of the second list as text, such as it stands in the file.
        row: says where row number i, from 0, is found by its user.
        notes: what was assumed.
        decimal: the decimal sign.
    """

    where: str
    names: tuple[str, ...]
    rows: int
    load: Callable[[Sequence[str], Sequence[str]], Mapping[str, Any]]
    row: Callable[[int], str]
    notes: tuple[str, ...] = ()
    decimal: str = "."


def _pandas() -> ModuleType:
    try:
        import pandas
    except ImportError:
        raise ImportError("Expected pandas, to read tables. Got none installed. Install it with: pip install 'bnnp[table]'") from None
    return pandas


def open_source(source: Any, names: Sequence[str] | None, wanted: Sequence[str], delimiter: str | None, encoding: str | None) -> Source:
    """Open a file or a frame.

    Arguments:
        source: a path, or a frame.
        names: of the columns, in the place of the source's own.
        wanted: names that the table must have.
        delimiter: of text; None to find out.
        encoding: of text; None to find out.

    Raises:
        ImportError: pandas or pyarrow is missing.
        TypeError: what is no path and no frame.
        ValueError: a file that cannot be read, or columns that share a name.
        OSError: a file that is not there or not to be read.
    """
    pd = _pandas()
    if not isinstance(source, str | os.PathLike):
        return _of_frame(pd, source, names)
    path = Path(source)
    raw = read_bytes(path)
    if raw[:4] == b"PAR1":
        return _of_parquet(pd, path, raw, names)
    text = open_text(path, raw, names, wanted, delimiter, encoding)
    return Source(
        str(path), text.names, text.rows, lambda some, as_text: _parse(pd, text, some, as_text), lambda i: f"row {text.line(i)}",
        text.notes, text.decimal,
    )  # fmt: skip


def _parse(pd: ModuleType, text: Text, some: Sequence[str], as_text: Sequence[str]) -> Mapping[str, Any]:
    place = {name: j for j, name in enumerate(text.names)}
    exact = {"float_precision": "round_trip"} if pd.__version__ < "3" else {}  # newer ones are exact of themselves
    try:
        with warnings.catch_warnings(action="ignore"):
            frame = pd.read_csv(
                io.BytesIO(text.body), sep=text.delimiter, header=None, names=range(len(place)), usecols=sorted(place[n] for n in some),
                dtype={place[name]: str for name in as_text}, na_values=SPELLINGS, keep_default_na=False, encoding="utf-8",
                decimal=text.decimal, skip_blank_lines=False, skipinitialspace=True, index_col=False, low_memory=False, **exact,
            )  # fmt: skip
    except (ValueError, OverflowError, pd.errors.ParserError) as error:
        raise ValueError(f"Expected delimited text in {text.path}. Got what pandas cannot parse: {str(error).strip()}.") from None
    if len(frame) != text.rows:
        raise ValueError(
            f"Expected {text.rows} rows in {text.path}, as its line ends say. Got {len(frame)}: its quotes are not closed. Mend the file."
        )
    return {name: frame[place[name]] for name in some}


def _of_parquet(pd: ModuleType, path: Path, raw: bytes, names: Sequence[str] | None) -> Source:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError("Expected pyarrow, to read Parquet. Got none installed. Install it with: pip install 'bnnp[table]'") from None
    try:
        file = pq.ParquetFile(pa.BufferReader(raw))
        own, rows = [str(name) for name in file.schema_arrow.names], int(file.metadata.num_rows)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"Expected a whole Parquet file at {path}. Got a damaged one: {_first(error)} Take another copy.") from None
    final = _renamed(str(path), own, names)
    place = dict(zip(final, own, strict=True))
    if not rows or not final:
        raise ValueError(
            f"Expected rows in {path}. Got a Parquet file with {rows} rows and the columns {', '.join(map(repr, final[:10]))}."
        )

    def load(some: Sequence[str], as_text: Sequence[str]) -> Mapping[str, Any]:
        try:
            table = file.read(columns=[place[name] for name in some])
            series = [table.column(place[name]).to_pandas() for name in some]
        except (pa.ArrowException, ValueError, OSError, KeyError) as error:
            raise ValueError(f"Expected a whole Parquet file at {path}. Got a damaged one: {_first(error)} Take another copy.") from None
        return dict(zip(some, series, strict=True))

    return Source(str(path), final, rows, load, lambda i: f"row {i + 1}")


def _first(error: Exception) -> str:
    """Return the first line of a message, as a sentence."""
    return str(error).strip().split("\n")[0].rstrip(".") + "."


def _of_frame(pd: ModuleType, frame: Any, names: Sequence[str] | None) -> Source:
    if hasattr(frame, "collect_schema") and hasattr(frame, "collect"):  # a lazy frame
        frame = frame.collect()
    if not (hasattr(frame, "columns") and hasattr(frame, "__getitem__") and hasattr(frame, "__len__")):
        raise TypeError(f"Expected the path of a table, or a frame of pandas or polars. Got {type(frame).__name__}.")
    if isinstance(frame, pd.DataFrame) and any(level is not None and level not in frame.columns for level in frame.index.names):
        frame = frame.reset_index()
    own = list(frame.columns)
    final = _renamed("the frame", [str(name) for name in own], names)
    place = dict(zip(final, own, strict=True))
    rows = len(frame)
    if not rows or not final:
        raise ValueError(f"Expected rows in the frame. Got {rows} rows and the columns {', '.join(map(repr, final[:10]))}.")

    def load(some: Sequence[str], as_text: Sequence[str]) -> Mapping[str, Any]:
        found = {}
        for name in some:
            column = frame[place[name]]
            if hasattr(column, "to_pandas"):
                column = column.to_pandas()
            if not isinstance(column, pd.Series):
                column = pd.Series(np.asarray(column))
            found[name] = column.reset_index(drop=True)
        return found

    unused = isinstance(frame, pd.DataFrame) and frame.index.dtype.kind not in "iu"
    notes = ("The index of the frame was not used; give it a name to use it.",) if unused else ()
    return Source("the frame", final, rows, load, lambda i: f"row {i + 1}", notes)


def _renamed(where: str, own: Sequence[str], names: Sequence[str] | None) -> tuple[str, ...]:
    if names is not None and len(names) != len(own):
        raise ValueError(f"Expected {len(own)} names, one for each column of {where}. Got {len(names)}.")
    final = tuple(str(name) for name in (own if names is None else names))
    twice = sorted(name for name, count in Counter(final).items() if count > 1)
    if twice:
        raise ValueError(f"Expected columns of different names in {where}. Got {', '.join(map(repr, twice))} more than once. Rename them.")
    return final
