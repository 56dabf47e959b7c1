"""Grids as tasks: one field, patch or day of a netCDF file, a zarr folder or an xarray object is one data set.

A point of a task is a cell. Its inputs are coordinates and, where wanted, other variables on the same grid; its outputs are one or several
variables. Nothing is read until a task is asked for, unless all of it fits in memory easily. `bnnp.data.fields` holds the cutting itself.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnnp.data.collection import Collection
from bnnp.data.fields import Cut, check_variable, choose, columns, normal
from bnnp.data.sources import as_dataset, open_dataset, readable

__all__ = ["Field", "grid_dataset", "grid_points", "read_grid"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

IN_MEMORY = 200 * 2**20
"""Variables that together take up to this many bytes are read at once."""


def read_grid(
    source: Any,
    *,
    task: str | Sequence[str] | None = None,
    inputs: str | Sequence[str] | None = None,
    outputs: str | Sequence[str] | None = None,
    patch: Mapping[str, int] | None = None,
    stride: Mapping[str, int] | None = None,
    every: Mapping[str, int] | None = None,
    relative: bool | None = None,
    lazy: bool | None = None,
    recipe: Mapping[str, Any] | None = None,
    outputs_needed: bool = True,
) -> Collection:
    """Read a grid as a collection of tasks.

    Cells without an output are masked. Cells without an input are left out, and so are tasks without a cell or, where the data are in
    memory, without any output; the notes count them. Times among the inputs are hours since midnight of the first day; the origin is in
    the recipe.

    Arguments:
        source: path of a netCDF file or zarr folder, or an `xarray.Dataset` or `DataArray`. Or several of them, as a list or as a pattern
            such as "era5-*.nc": then the tasks are those of each, one after another, all read as the first.
        task: dimension, or dimensions, of which each index is a task: "time" makes each time a field. "time:1D" makes each day a task of
            all its times, with the time since its start as an input ("6h", "30min", "7D" work as well, and "time:24" takes 24 steps).
            Default: the dimension of time. () makes one task of everything.
        inputs: coordinates (dimensions, or coordinates on them), parts of a time such as "time.hour", and variables; a variable may lack
            dimensions of the output (orography has no time). Default: every dimension that is not a task.
        outputs: variables. Default: the only one that has the dimensions of the task.
        patch: cells of a patch along some dimensions; each patch is a task. What remains at the edges is left out.
        stride: cells from one patch to the next. Default: those of the patch, so that patches do not overlap.
        every: take every so manieth index along some dimensions, starting with the first.
        relative: give the coordinates of a patch relative to its centre. Default: False.
        lazy: False reads all at once, True a task when it is asked for. Default: by the size.
        recipe: of a collection read before; this source is read in the same way. Then only `lazy` and `outputs_needed` may be given.
        outputs_needed: False accepts a source without the outputs, of which one wants predictions.

    Returns:
        The tasks, with names from their times or other coordinates, and units from the attributes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no grid, is damaged, lacks what is named, or leaves open what a task is.
        ImportError: xarray, or what it reads this file with, is not installed.

    Example:
        >>> import xarray
        >>> ds = xarray.Dataset({"t": (("time", "lat"), np.ones((3, 4)))}, {"time": [0, 1, 2], "lat": [10.0, 20.0, 30.0, 40.0]})
        >>> read_grid(ds)[1][0].ravel().tolist()
        [10.0, 20.0, 30.0, 40.0]
    """
    given: dict[str, Any] = {
        "task": task,
        "inputs": inputs,
        "outputs": outputs,
        "patch": patch,
        "stride": stride,
        "every": every,
        "relative": relative,
    }
    if (several := _several(source)) is not None:
        first = read_grid(several[0], lazy=lazy, recipe=recipe, outputs_needed=outputs_needed, **given)
        rest = [read_grid(one, lazy=lazy, recipe=first.recipe, outputs_needed=outputs_needed) for one in several[1:]]
        return _joined([first, *rest], several)
    opened, mark = open_dataset(source)
    notes: list[str] = []
    if recipe is not None:
        said = [name for name, value in given.items() if value is not None]
        if said or recipe.get("kind") != "grid":
            got = f"{', '.join(said)} beside it" if said else f"a recipe for {recipe.get('kind')!r}"
            raise ValueError(f"Expected the recipe of a grid alone, or arguments without a recipe. Got {got}.")
    with readable(source if isinstance(source, str | os.PathLike) else "the data set"):
        recipe = choose(opened, notes, **given) if recipe is None else recipe
        for name in recipe["outputs"] if outputs_needed else ():
            check_variable(opened, name, "an output")
        ds = normal(opened, recipe)
        used = [ds[name] for name in {*recipe["inputs"], *recipe["outputs"]} if name in ds.variables]
        slow = lazy if lazy is not None else 8 * sum(variable.size for variable in used) > IN_MEMORY
        cut = Cut(ds, recipe, needed=outputs_needed, lazy=slow)
    if not slow and isinstance(source, str | os.PathLike):
        opened.close()
    x_columns, y_columns = columns(recipe)
    return Collection(
        cut.read, cut.sizes, cut.names, x_columns, y_columns, recipe, (*notes, *cut.notes), mark, cut.ordered, cut.groups, slow, cut.overlap
    )  # fmt: skip


def _several(source: Any) -> list[Any] | None:
    """Return the sources that a list or a pattern names; None for a single one."""
    if isinstance(source, list | tuple):
        if not source:
            raise ValueError("Expected at least one grid. Got an empty list.")
        return list(source)
    if isinstance(source, str | os.PathLike) and glob.has_magic(str(source)) and not os.path.exists(source):
        found = sorted(glob.glob(str(source), recursive=True))
        if not found:
            raise FileNotFoundError(f"Expected netCDF files or zarr folders that match {source}. Got none. Check the pattern.")
        return found
    return None


def _joined(parts: Sequence[Collection], sources: Sequence[Any]) -> Collection:
    """Return the tasks of several collections of one recipe, one after another."""
    places = [(part, i) for part in parts for i in range(len(part))]
    notes = [
        note if part is parts[0] else f"{source if isinstance(source, str | os.PathLike) else f'grid {number}'}: {note}"
        for number, (part, source) in enumerate(zip(parts, sources, strict=True))
        for note in part.notes
        if part is parts[0] or note not in parts[0].notes
    ]
    first = parts[0]
    groups = [group for part in parts for group in part.groups or ()] if all(part.groups is not None for part in parts) else None
    mark = hashlib.sha256(" ".join(part.fingerprint for part in parts).encode()).hexdigest()[:16]
    return Collection(
        lambda i: places[i][0].read(places[i][1]), [n for part in parts for n in part.sizes],
        [name for part in parts for name in part.names],
        first.inputs, first.outputs, first.recipe, tuple(notes), mark, first.ordered, groups, any(part.lazy for part in parts),
        max(part.overlap for part in parts),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Field:
    """Remember the grid of one field, so that values at its points can be put back in their places.

    Arguments:
        dims: names of its dimensions.
        shape: number of cells along each.
        coords: an `xarray.Dataset` with its coordinates and no variable.
        kept: True for the cells that became points, with shape (cells,), row by row.
        attributes: of each output.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    coords: Any
    kept: BoolArray
    attributes: Mapping[str, Mapping[str, Any]]


def grid_points(ds: Any, recipe: Mapping[str, Any]) -> tuple[FloatArray, FloatArray, BoolArray, Field]:
    """Return the points of one field, whole and in full resolution, as a model that was trained with this recipe expects them.

    Arguments:
        ds: an `xarray.Dataset` or `DataArray` with one field: dimensions of the task are absent or of size 1. Outputs that it lacks, and
            cells of them that are NaN, are not observed.
        recipe: of the collection that the model was trained on.

    Returns:
        x with shape (n, d_x), y and mask with shape (n, d_y), and the grid, for `grid_dataset`.

    Raises:
        ValueError: there is more than one field, or an input is missing.

    Example:
        >>> import xarray
        >>> ds = xarray.Dataset({"t": (("time", "lat"), [[1.0, np.nan]])}, {"time": [0], "lat": [10.0, 20.0]})
        >>> x, y, mask, field = grid_points(ds, read_grid(ds).recipe)
        >>> grid_dataset(field, {"t_mean": x[:, 0]}).t_mean.values.tolist()
        [10.0, 20.0]
    """
    ds = as_dataset(ds)
    single = {d: 0 for d in recipe["task"] if ds.sizes.get(d) == 1 and not (recipe["span"] and d == recipe["task"][0])}
    whole = {**recipe, "every": {}, "patch": {}, "stride": {}}
    if whole["relative"]:
        # A whole field is one patch.
        whole["patch"] = {d: ds.sizes[d] for d in recipe["patch"] if d in ds.sizes}
    cut = Cut(normal(ds.isel(single), whole), whole, needed=False, lazy=False, whole=True)
    if len(cut.sizes) != 1:
        raise ValueError(
            f"Expected one field. Got {len(cut.sizes)} along {', '.join(recipe['task']) or 'the grid'}. Choose one, for instance with "
            f"ds.isel({(recipe['task'] or ['time'])[0]}=0), or one day of it."
        )
    x, y, mask, kept = cut.cells(0)
    dims, shape = cut.grid(0)
    here = {name: c for name, c in ds.isel(single).coords.items() if set(c.dims) <= set(dims)}
    attributes = {name: dict(ds[name].attrs) if name in ds else {"units": recipe["units"].get(name, "")} for name in recipe["outputs"]}
    return x[kept], y[kept], mask[kept], Field(dims, shape, ds.isel(single)[[]].assign_coords(here)[list(here)], kept, attributes)


def grid_dataset(field: Field, values: Mapping[str, Any]) -> Any:
    """Put values at the points of a field back on its grid.

    Arguments:
        field: as `grid_points` gives it.
        values: for each variable to make, an array with shape (n,), or (S, n) for one that gets the dimension "sample". A name that is
            that of an output, or starts with it and "_", takes over its attributes.

    Returns:
        An `xarray.Dataset`; cells that were no points are NaN.

    Raises:
        ValueError: an array of another length.
    """
    result = field.coords.copy()
    for name, array in values.items():
        flat = np.asarray(array, dtype=np.float64)
        if flat.ndim not in (1, 2) or flat.shape[-1] != field.kept.sum():
            raise ValueError(f"Expected {name} with shape (n,) or (S, n), n = {int(field.kept.sum())} points. Got shape {flat.shape}.")
        full = np.full((*flat.shape[:-1], field.kept.size), np.nan)
        full[..., field.kept] = flat
        dims = (*(("sample",) if flat.ndim == 2 else ()), *field.dims)
        of = max((o for o in field.attributes if name == o or name.startswith(f"{o}_")), key=len, default="")
        attributes = {key: value for key, value in field.attributes.get(of, {}).items() if key in ("units", "long_name", "standard_name")}
        if name != of and "long_name" in attributes:
            attributes = {**attributes, "long_name": f"{attributes['long_name']}, {name[len(of) + 1 :]}"}
        if name != of:
            attributes.pop("standard_name", None)
        result[name] = (dims, full.reshape(*flat.shape[:-1], *field.shape), attributes)
    return result
