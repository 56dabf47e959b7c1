"""Answers as files: CSV, Parquet, netCDF or JSON, by the ending of the name; written whole or not at all."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnnp.checkpoint import write_atomically

__all__ = ["ENDINGS", "plain", "write_dataset", "write_table"]

ENDINGS = (".csv", ".parquet", ".nc", ".json")


def plain(table: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return columns as lists that JSON can hold; what is not a number is None."""
    return {name: [None if isinstance(v, float) and not np.isfinite(v) else v for v in np.asarray(c).tolist()] for name, c in table.items()}


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
        columns = {name: ("row", _kept(values), {"units": (units or {}).get(name, "")}) for name, values in table.items()}
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
    values = np.asarray(values)
    return values.astype(str) if values.dtype == object else values


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
