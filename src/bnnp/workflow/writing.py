"""Answers as files: CSV, Parquet, netCDF or JSON, by the ending of the name; written whole or not at all."""

from __future__ import annotations

import io
import json
import math
import numbers
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnnp.checkpoint import write_atomically

__all__ = ["ENDINGS", "plain", "write_dataset", "write_table"]

ENDINGS = (".csv", ".parquet", ".nc", ".json")


def plain(table: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return columns as lists that JSON can hold; what is missing or not finite is None, and times are text."""
    return {name: [_plain(v) for v in _without_times(_kept(column)).tolist()] for name, column in table.items()}


def _without_times(values: Any) -> Any:
    """Return times as text, None where there is none."""
    if values.dtype.kind not in "mM":
        return values
    texts = np.datetime_as_string(values, unit="auto") if values.dtype.kind == "M" else values.astype(str)
    return np.where(np.isnat(values), None, texts.astype(object))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_ending(path: str | os.PathLike[str]) -> Path:
    """Return the path, if its ending says how to write it.

    Raises:
        ValueError: it does not.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(
            f"Expected a file that ends in {', '.join(ENDINGS)}. Got {path.name}. Name the file so that its ending says the format."
        )
    return path


def write_table(path: str | os.PathLike[str], table: Mapping[str, Any], units: Mapping[str, str] | None = None) -> None:
    """Write columns of equal length as CSV, Parquet, netCDF (one dimension, "row") or JSON.

    Raises:
        ValueError: the ending says no format.
        ImportError: a package that writes it is not installed.
        OSError: the disk is full, or the folder cannot be written to.
    """
    path = check_ending(path)
    ending = path.suffix.lower()
    if ending == ".json":
        write_atomically(path, json.dumps(plain(table), indent=1).encode())
    elif ending == ".nc":
        xarray = _package("xarray", "grid")
        columns = {}
        for name, new in _allowed(table).items():
            values = _texts(_kept(table[name]))
            said = {} if values.dtype.kind in "mM" else {"units": (units or {}).get(name, "")}  # of times xarray writes its own
            columns[new] = ("row", values, said | ({} if new == name else {"long_name": name}))
        write_dataset(path, xarray.Dataset(columns))
    else:
        pandas = _package("pandas", "table")
        frame = pandas.DataFrame({name: _kept(values) for name, values in table.items()})
        if ending == ".csv":
            write_atomically(path, frame.to_csv(index=False).encode())
        else:
            buffer = io.BytesIO()
            frame.to_parquet(buffer, index=False)
            write_atomically(path, buffer.getvalue())


def _kept(values: Any) -> Any:
    """Return a column as numbers, truth values, times, or text; of text and truth values what is missing is None, of numbers NaN."""
    values = np.asarray(values)
    if values.dtype.kind != "O":
        return values
    missing = np.array([v is None or type(v).__name__ in ("NAType", "NaTType") or v != v for v in values], dtype=bool)
    known = values[~missing]
    if all(isinstance(v, numbers.Real) and not isinstance(v, bool | np.bool_) for v in known):
        found = np.full(len(values), np.nan)
        found[~missing] = known
        return found
    texts = np.full(len(values), None, dtype=object)
    texts[~missing] = [v if isinstance(v, str) else str(v) for v in known]
    return texts


def _texts(values: Any) -> Any:
    """Return text without gaps, which netCDF has none for."""
    return np.array(["" if v is None else v for v in values], dtype=str) if values.dtype == object else values


def _allowed(names: Iterable[str]) -> dict[str, str]:
    """Return for each name one that netCDF can hold, no two of them equal."""
    found: dict[str, str] = {}
    for name in names:
        # A letter, a digit, an underscore or what is not ASCII at its start; further on no slash, no line end, no blank at its end.
        new = re.sub(r"[\x00-\x1f\x7f/]", "_", name).rstrip(" ") or "_"
        new = new if new[0].isalnum() or new[0] == "_" or ord(new[0]) > 127 else f"_{new}"
        while new in found.values():
            new += "_"
        found[name] = new
    return found


def write_dataset(path: str | os.PathLike[str], ds: Any) -> None:
    """Write an xarray data set as netCDF.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    _through_file(Path(path), lambda temporary: ds.to_netcdf(temporary, engine="netcdf4"))


def _through_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let a library write into a file of its own, and take over what it wrote in one step."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "data.nc"
        write(temporary)
        write_atomically(path, temporary.read_bytes())


def _package(name: str, extra: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f'Writing this format needs {name}. Run: pip install "bnnp[{extra}]".') from error
