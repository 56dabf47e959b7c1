"""One door for all sources: what a file is, and which reader takes it."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnnp.data.collection import Collection
from bnnp.data.grids import read_grid
from bnnp.data.image_files import read_images
from bnnp.data.signals import read_signals
from bnnp.data.table import read_table

__all__ = ["KINDS", "kind_of", "read"]

KINDS: dict[str, Callable[..., Collection]] = {"table": read_table, "grid": read_grid, "signal": read_signals, "images": read_images}
GRIDS = {".nc", ".nc4", ".cdf", ".h5", ".hdf5", ".zarr"}
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
MAGIC = {b"CDF": "grid", b"\x89HDF": "grid", b"\x89PNG": "images", b"\xff\xd8\xff": "images", b"\x93NUMPY": "images", b"PAR1": "table"}


def kind_of(source: Any) -> str:
    """Return the kind of a source: "table", "grid", "signal" or "images".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a folder of something else.
        TypeError: it is no source of data.
    """
    if isinstance(source, str | os.PathLike):
        return _of_path(Path(source))
    if hasattr(source, "data_vars") or (hasattr(source, "dims") and hasattr(source, "coords")):
        return "grid"
    if hasattr(source, "columns"):
        return "table"
    if isinstance(source, np.ndarray):
        return "images"
    if isinstance(source, list) and source and all(isinstance(part, str | os.PathLike) for part in source):
        return kind_of(source[0])
    if isinstance(source, list | tuple | Mapping):
        return "signal"
    raise TypeError(f"Expected a path, a data frame, an xarray object, or arrays. Got {type(source).__name__}.")


def _of_path(path: Path) -> str:
    if path.suffix.lower() == ".hea" or Path(f"{path}.hea").exists() or (path.suffix and path.with_suffix(".hea").exists()):
        return "signal"
    if path.is_dir():
        return _of_folder(path)
    if not path.exists():
        matches = sorted(glob.glob(str(path)))
        if matches:
            return kind_of(matches[0])
        near = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        beside = f"Beside it are: {', '.join(near)}." if near else f"There is no folder {path.parent} either."
        raise FileNotFoundError(f"Expected a file or folder of data at {path}. Got nothing there. {beside}")
    ending = path.suffixes[-2].lower() if path.suffix.lower() == ".gz" and len(path.suffixes) > 1 else path.suffix.lower()
    if ending in GRIDS:
        return "grid"
    if ending in PICTURES | {".npy", ".npz"} or "-idx" in path.name or ".idx" in path.name:
        return "images"
    with path.open("rb") as file:
        head = file.read(8)
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), "table")


def _of_folder(path: Path) -> str:
    inside = [p.name for p in path.iterdir()]
    if path.suffix == ".zarr" or {".zgroup", ".zmetadata", "zarr.json"} & set(inside):
        return "grid"
    if any(name.lower().endswith(".hea") for name in inside):
        return "signal"
    if any(Path(file).suffix.lower() in PICTURES for _, _, files in os.walk(path) for file in files):
        return "images"
    few = ", ".join(sorted(inside)[:8]) or "nothing"
    raise ValueError(f"Expected a folder of pictures, of WFDB records (.hea), or a zarr store. Got {path} with {few}. Name one file of it.")


def only_file(source: Any) -> Any:
    """Return the one file of data in a folder that holds nothing else but pages to read and labels; other sources as they are."""
    if not isinstance(source, str | os.PathLike) or not Path(source).is_dir():
        return source
    inside = [p for p in sorted(Path(source).iterdir()) if not p.name.startswith(".")]
    data = [
        p for p in inside if p.suffix.lower() not in {".md", ".rst", ".html", ".pdf"} and "idx1" not in p.name and "LICENSE" not in p.name
    ]
    plain = [p for p in data if p.is_file() and p.suffix.lower() not in PICTURES | {".hea"}]
    return plain[0] if len(plain) == len(data) == 1 else source


def read(source: Any, kind: str | None = None, *, recipe: Mapping[str, Any] | None = None, **choices: Any) -> Collection:
    """Read a source of any kind as a collection of tasks.

    Arguments:
        source: path of a table (CSV, Parquet), a grid (netCDF, zarr), signals (WFDB), images (folder, IDX, NumPy), or such an object in
            memory; a collection is returned as it is.
        kind: "table", "grid", "signal" or "images"; by content and name where not given.
        recipe: of a collection read before; this source is then cut and encoded in the same way.
        choices: for the reader of this kind: see `read_table`, `read_grid`, `read_signals` and `read_images`. None is not said.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, something else, or a choice does not fit; the message says what to do.
        ImportError: a package that reads it is not installed.

    Example:
        >>> len(read(np.zeros((3, 8, 8))))
        3
    """
    if isinstance(source, Collection):
        return source
    if kind is not None and kind not in KINDS:
        raise ValueError(f"Expected kind among {', '.join(KINDS)}. Got {kind!r}.")
    source = only_file(source)
    kind = str(recipe["kind"]) if recipe is not None else kind or kind_of(source)
    said = {name: value for name, value in choices.items() if value is not None}
    known = set(KINDS[kind].__kwdefaults__ or {})
    wrong = sorted(said.keys() - known)
    if wrong:
        fits = ", ".join(sorted(known - {"recipe", "lazy", "outputs_needed"}))
        raise ValueError(
            f"Expected choices that a source of kind {kind!r} has: {fits}. Got {', '.join(wrong)}. Leave out what does not fit."
        )
    return KINDS[kind](source, recipe=recipe, **said)
