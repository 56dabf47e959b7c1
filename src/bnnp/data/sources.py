"""Where data come from: files told apart by their content, and an xarray data set from whatever holds a grid.

A model remembers which source it was learned from. The same file copied elsewhere is the same source; a file of the same name and another
content is another.
"""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

__all__ = ["as_dataset", "fingerprint", "listed", "open_dataset", "readable"]

WHOLE = 256 * 2**20
"""Files up to this size are digested whole; of larger ones, so much in evenly spaced blocks."""
BLOCK = 2**20


def fingerprint(paths: Sequence[Path], root: Path | None = None) -> str:
    """Return a digest of the content of files, which does not depend on where they are.

    Arguments:
        paths: of the files, in an order that does not depend on the machine.
        root: folder that holds them; then their places below it count as content too.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    share = max(WHOLE // max(len(paths), 1), BLOCK)
    for path in paths:
        place = path.relative_to(root).as_posix() if root is not None else ""
        size = path.stat().st_size
        digest.update(f"{place} {size} ".encode())
        blocks = -(-size // BLOCK)
        wanted = range(blocks) if size <= share else sorted({round(i) for i in np.linspace(0, blocks - 1, share // BLOCK)})
        with path.open("rb") as file:
            for block in wanted:
                file.seek(block * BLOCK)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def listed(names: Sequence[Any], limit: int = 12) -> str:
    """Return names for an error message, the first few of many."""
    shown = ", ".join(str(name) for name in names[:limit])
    return (shown + (f" and {len(names) - limit} more" if len(names) > limit else "")) or "none"


def open_dataset(source: Any) -> tuple[Any, str]:
    """Open a netCDF file, a zarr folder or an xarray object; variables are read when they are asked for.

    Arguments:
        source: path, `xarray.Dataset` or `xarray.DataArray`.

    Returns:
        An xarray data set, and its fingerprint.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ImportError: a package that reads it is not installed.
        ValueError: it is something else, or damaged.
        TypeError: the source is neither a path nor an xarray object.
    """
    try:
        import xarray
    except ImportError as error:
        raise ImportError('Reading grids needs xarray. Run: pip install "bnnp[grid]".') from error
    if isinstance(source, xarray.DataArray | xarray.Dataset):
        ds = as_dataset(source)
        return ds, _digest(ds)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"Expected the path of a netCDF file or zarr folder, or an xarray object. Got {type(source).__name__}.")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"Expected a netCDF file or zarr folder {path}. Got no such file. Check the path.")
    engine = _engine(path)
    ds = _read(xarray, path, engine)
    if not ds.data_vars:
        ds.close()
        raise ValueError(
            f"Expected variables in {path}. Got none in its root group. If they are in another, open that with "
            "xarray.open_dataset(path, group=...) and pass what it returns."
        )
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return ds, fingerprint(files, path if path.is_dir() else None)


def as_dataset(source: Any) -> Any:
    """Return an `xarray.Dataset` as it is, and a `DataArray` as one of a single variable.

    Raises:
        TypeError: it is neither.
    """
    if hasattr(source, "data_vars"):
        return source
    if not hasattr(source, "to_dataset"):
        raise TypeError(f"Expected an xarray Dataset or DataArray. Got {type(source).__name__}.")
    return source.to_dataset(name=source.name if source.name is not None else "value")


def _engine(path: Path) -> str:
    """Say what a file is by its first bytes, whatever its name."""
    if path.is_dir():
        if any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zmetadata")):
            return "zarr"
        raise ValueError(
            f"Expected a zarr folder or a netCDF file. Got the folder {path} without zarr.json or .zgroup. Name one file of it."
        )
    with path.open("rb") as file:
        head = file.read(8)
    if head[:3] == b"CDF" and len(head) == 8:
        _check_classic(path)
        return "classic"
    if head == b"\x89HDF\r\n\x1a\n":
        return "hdf"
    what = {b"": "an empty file", b"GRIB": "GRIB; convert it to netCDF first", b"\x1f\x8b": "a gzip file; unpack it first"}
    found = next((said for mark, said in what.items() if (head.startswith(mark) if mark else not head)), "something else")
    raise ValueError(f"Expected netCDF, with CDF or HDF in its first bytes, in {path}. Got {found}. Take another file.")


def _check_classic(path: Path) -> None:
    """Refuse a file of the classic netCDF format that is shorter than its header says: the library would read zeros there.

    References:
        NetCDF Classic Format Specification, Unidata: header, dim_list, att_list and var_list.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            need = _Classic(file).end()
    except PermissionError:
        raise _damaged(path, PermissionError()) from None
    except (OSError, struct.error, IndexError, KeyError, ValueError, OverflowError, MemoryError) as error:
        raise _damaged(path, ValueError(f"a header that ends or goes wrong ({type(error).__name__})")) from None
    if size < need:
        raise _damaged(path, ValueError(f"{size} bytes where the header says {need}"))


class _Classic:
    """Walk through the header of a classic netCDF file as far as it says how long the file has to be."""

    SIZES: ClassVar[dict[int, int]] = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 6: 8, 7: 1, 8: 2, 9: 4, 10: 8, 11: 8}

    def __init__(self, file: Any) -> None:
        self.file, self.version = file, file.read(4)[3]
        if self.version not in (1, 2, 5):
            raise ValueError(self.version)

    def number(self, code: str) -> int:
        """Read one number: "i" of 4 bytes, "q" of 8, "n" of the width that counts have in this version."""
        code = {"n": "q" if self.version == 5 else "I", "o": "I" if self.version == 1 else "q"}.get(code, code)
        (value,) = struct.unpack(f">{code}", self.file.read(struct.calcsize(f">{code}")))
        if value < 0:
            raise ValueError(value)
        return int(value)

    def skip(self, size: int) -> None:
        """Pass over so many bytes, filled up to a multiple of 4."""
        self.file.seek(-(-size // 4) * 4, os.SEEK_CUR)

    def attributes(self) -> None:
        """Pass over a list of attributes."""
        self.number("I")
        for _ in range(self.number("n")):
            self.skip(self.number("n"))
            kind = self.number("I")
            self.skip(self.number("n") * self.SIZES[kind])

    def end(self) -> int:
        """Return the number of bytes up to the last value."""
        records = self.number("n")
        self.number("I")
        lengths = []
        for _ in range(self.number("n")):
            self.skip(self.number("n"))
            lengths.append(self.number("n"))
        self.attributes()
        self.number("I")
        fixed, rows = [0], []
        for _ in range(self.number("n")):
            self.skip(self.number("n"))
            shape = [lengths[self.number("n")] for _ in range(self.number("n"))]
            self.attributes()
            each = self.SIZES[self.number("I")]
            self.number("n")
            begin = self.number("o")
            if shape and shape[0] == 0:
                rows.append((begin, each * prod(shape[1:])))
            else:
                fixed.append(begin + each * prod(shape))
        if not rows or records in (0, 2**32 - 1, 2**63 - 1):
            return max(fixed)
        row = rows[0][1] if len(rows) == 1 else sum(-(-size // 4) * 4 for _, size in rows)
        return max(*fixed, *(begin + (records - 1) * row + size for begin, size in rows))


def _read(xarray: Any, path: Path, engine: str) -> Any:
    """Open a file with the packages that are there; times that cannot be decoded stay numbers."""
    engines = {"zarr": ["zarr"], "classic": ["netcdf4", "scipy"], "hdf": ["netcdf4", "h5netcdf"]}[engine]
    found = [name for name in engines if name in xarray.backends.list_engines()]
    if not found:
        package = {"zarr": "zarr"}.get(engine, "netCDF4")
        raise ImportError(f'Reading {path} needs {package}. Run: pip install "bnnp[grid]".')
    kept: dict[str, Any] = {"engine": found[0], "cache": False, "decode_timedelta": False, "chunks": None}
    # What xarray or a backend warns of (metadata that is not consolidated, a calendar) changes no number that is read.
    with warnings.catch_warnings(action="ignore"), readable(path):
        try:
            return xarray.open_dataset(path, **kept)
        except ValueError as error:
            if "decode" not in str(error):
                raise
        return xarray.open_dataset(path, decode_times=False, **kept)


@contextmanager
def readable(what: Any) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into one kind of error; our own pass as they are.

    Arguments:
        what: the file, or the variable of it that is read.
    """
    try:
        yield
    except (MemoryError, ImportError, FileNotFoundError):
        raise
    except Exception as error:
        # xarray and its backends raise errors of many kinds.
        raise (error if str(error).startswith("Expected") else _damaged(what, error)) from None


def _damaged(what: Any, error: Exception) -> Exception:
    if isinstance(error, PermissionError):
        return PermissionError(f"Expected to read {what}. Got no permission. Ask its owner, or copy it.")
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"Expected to read {what}. Got: {said}. The file is damaged or cut short; take another copy.")


def _digest(ds: Any) -> str:
    """Return a fingerprint of an xarray data set: names, shapes, coordinates, and values of up to a million evenly spaced cells."""
    digest = hashlib.sha256()
    for name in sorted(map(str, ds.variables)):
        variable = ds.variables[name]
        digest.update(f"{name} {variable.dims} {variable.shape} {variable.dtype}".encode())
        if variable.ndim:
            step = max(1, -(-variable.size // 1_000_000) // max(1, variable[0].size))
            part = np.asarray(variable[:: max(step, 1)].values)
            digest.update(part.tobytes() if part.dtype.kind != "O" else str(part.ravel().tolist()).encode())
        else:
            digest.update(str(variable.values).encode())
    return digest.hexdigest()[:16]
