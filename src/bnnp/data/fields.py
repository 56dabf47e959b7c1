"""How a grid is cut into tasks: which cells belong to which task, and what their inputs and outputs are.

The tasks are the product of axes: an axis runs over single indices of a dimension (each time a field), over blocks of it (each day), or
over patches along it. A task is a choice on each axis, and so a block of the grid: a slice or an index along each dimension.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np

from bnnp.data.collection import Column, Triple
from bnnp.data.sources import listed, readable

__all__ = ["Cut", "check_variable", "choose", "columns", "normal"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
Pick = int | slice

TIMES = {"time", "valid_time", "date", "datetime", "t"}
HOURS = {"min": 1 / 60, "h": 1.0, "D": 24.0}


# --- what to cut


def choose(ds: Any, notes: list[str], **given: Any) -> dict[str, Any]:
    """Return the recipe: what was said, and what follows from the data where nothing was; the notes say what was guessed.

    Raises:
        ValueError: a name that is not there, or a choice that the data leave open.
    """
    task, span = _task(given["task"])
    inputs, outputs = (_names(given[side]) for side in ("inputs", "outputs"))
    patch = {d: int(n) for d, n in (given["patch"] or {}).items()}
    clocks = [str(d) for d in ds.dims if _is_time(ds, d)]
    if outputs is None:
        outputs = [_output(ds, task, inputs or [], clocks)]
        notes.append(f"The output is {outputs[0]}, the only variable that can be.")
    for name in outputs:
        check_variable(ds, name, "an output")
    dims = [str(d) for d in ds[outputs[0]].dims]
    if task is None:
        windows = [d for d in patch if d in clocks]
        task = [] if windows else [d for d in dims if d in clocks]
        if len(task) != 1 and not windows:
            raise ValueError(
                f"Expected one dimension of time among those of {outputs[0]}. Got {_sizes(ds, dims)}. Say which dimension is the task, for "
                f"instance task={dims[0] if dims else 'time'!r} (--task), where each index is a field."
            )
        notes.extend(f"Each index of {d} is a task." for d in task)
    for d in [*task, *patch, *(given["stride"] or {}), *(given["every"] or {})]:
        if d not in dims:
            raise ValueError(f"Expected a dimension of {outputs[0]}: {_sizes(ds, dims)}. Got {d!r}.")
    if loose := [d for d in given["stride"] or {} if d not in patch]:
        raise ValueError(f"Expected a stride along dimensions of the patch ({listed(list(patch))}). Got one along {listed(loose)}.")
    single = [d for d in dims if ds.sizes[d] == 1 and d not in task and d not in patch and d not in (inputs or [])]
    dims = [d for d in dims if d not in single]
    notes.extend(f"The dimension {d} has one index and is left out." for d in single)
    if inputs is None:
        inputs = [d for d in dims if d not in task or span is not None]
    recipe: dict[str, Any] = {
        "kind": "grid", "task": task, "span": span, "dims": dims, "inputs": inputs, "outputs": outputs, "patch": patch,
        "stride": {d: int((given["stride"] or {}).get(d, n)) for d, n in patch.items()}, "relative": bool(given["relative"]),
        "every": {d: int(n) for d, n in (given["every"] or {}).items()}, "origins": {}, "units": {}, "longitudes": {},
    }  # fmt: skip
    _check(ds, recipe)
    for name in [*inputs, *outputs, *task]:
        values = _variable(ds, name)
        if _is_clock(values):
            recipe["origins"][name] = _origin(values.values)
        recipe["units"][name] = "h" if name in recipe["origins"] else _unit(values, name)
        if name in inputs and _is_longitude(values, name):
            seen = np.asarray(values.values, dtype=np.float64)
            recipe["longitudes"][name] = [float(np.nanmin(seen)), float(np.nanmax(seen))]
    notes.extend(_remarks(ds, recipe))
    return recipe


def _task(task: Any) -> tuple[list[str] | None, dict[str, float] | None]:
    """Read "time", ("time", "member"), "time:1D" or "time:24"."""
    if isinstance(task, str) and ":" in task:
        name, _, text = task.rpartition(":")
        match = re.fullmatch(r"(\d*)\s*(min|h|D|hour|day|week)s?|(\d+)", text.strip())
        number = int(match[1] or match[3] or 1) if match else 0
        if match is None or number < 1:
            raise ValueError(f"Expected a task like 'time:1D', 'time:6h', 'time:30min' or 'time:24' (steps). Got {task!r}.")
        unit = {"hour": "h", "day": "D", "week": "D"}.get(match[2], match[2])
        return [name], {"steps": number} if unit is None else {"hours": number * HOURS[unit] * (7 if match[2] == "week" else 1)}
    return _names(task), None


def _names(names: Any) -> list[str] | None:
    return None if names is None else [names] if isinstance(names, str) else [str(name) for name in names]


def _sizes(ds: Any, dims: Sequence[str]) -> str:
    return listed([f"{d} ({ds.sizes[d]})" for d in dims])


def _fields(ds: Any) -> list[str]:
    """Return the variables that hold numbers on a grid, without the bounds of cells."""
    bounds = {str(v.attrs[key]) for v in ds.variables.values() for key in ("bounds", "climatology") if key in v.attrs}
    bounds |= {str(v.encoding[key]) for v in ds.variables.values() for key in ("bounds", "climatology") if key in v.encoding}
    return [str(name) for name, v in ds.data_vars.items() if v.ndim and v.dtype.kind in "fiub" and str(name) not in bounds]


def _output(ds: Any, task: list[str] | None, inputs: Sequence[str], clocks: Sequence[str]) -> str:
    found = [name for name in _fields(ds) if name not in inputs]
    wanted = task if task is not None else clocks
    several = [name for name in found if (set(wanted) <= set(ds[name].dims) if task is not None else set(wanted) & set(ds[name].dims))]
    if len(several) == 1 or len(found) == 1:
        return (several if len(several) == 1 else found)[0]
    raise ValueError(
        f"Expected to be told which variables are the outputs (--outputs): {listed([f'{n} ({_sizes(ds, ds[n].dims)})' for n in found])}. "
        "Got more than one that can be." if found else f"Expected a variable with numbers. Got {listed(list(ds.variables))}."
    )  # fmt: skip


def check_variable(ds: Any, name: str, role: str) -> None:
    """Refuse a name that no variable has."""
    if name not in ds.variables:
        raise ValueError(f"Expected {role} among the variables {listed(_fields(ds))}. Got {name!r}.")


def _variable(ds: Any, name: str) -> Any:
    """Return a coordinate, a variable, a part of a time, or the numbers 0, 1, ... of a dimension without coordinate.

    Raises:
        ValueError: there is none of that name.
    """
    head, _, part = name.partition(".")
    if name in ds.variables or name in ds.dims:
        return ds[name]
    if part and head in ds.variables and _is_clock(ds[head]) and hasattr(ds[head].dt, part):
        return ds[name]
    parts = [f"{d}.hour, {d}.dayofyear" for d in ds.coords if _is_clock(ds[d])]
    there = listed([*map(str, ds.coords), *(d for d in map(str, ds.dims) if d not in ds.coords), *_fields(ds), *parts], 30)
    raise ValueError(f"Expected an input among the coordinates and variables {there}. Got {name!r}.")


def _is_clock(values: Any) -> bool:
    return values.dtype.kind == "M" or (values.dtype.kind == "O" and values.size > 0 and hasattr(values.values.flat[0], "calendar"))


def _is_time(ds: Any, d: Any) -> bool:
    if d not in ds.coords:
        return str(d).lower() in TIMES
    values = ds[d]
    said = values.attrs.get("axis") == "T" or values.attrs.get("standard_name") == "time"
    return _is_clock(values) or said or str(d).lower() in TIMES


def _is_longitude(values: Any, name: str) -> bool:
    east = values.attrs.get("units") in ("degrees_east", "degree_east", "degrees_E", "degree_E", "degreesE")
    return values.dtype.kind in "fi" and (east or values.attrs.get("standard_name") == "longitude" or name.lower() in ("lon", "longitude"))


def _unit(values: Any, name: str) -> str:
    unit = values.attrs.get("units", "") if "." not in name else {"hour": "h", "dayofyear": "d"}.get(name.split(".")[1], "")
    return "" if str(unit).strip() in ("1", "dimensionless") else str(unit)


def _origin(values: Any) -> str:
    """Return midnight of the day of the first time."""
    return str(np.datetime64(str(min(values.flat[:1]))[:10])) if values.dtype.kind == "O" else str(values.flat[0].astype("datetime64[D]"))


def columns(recipe: Mapping[str, Any]) -> tuple[tuple[Column, ...], tuple[Column, ...]]:
    """Return the columns of x and y."""
    x, y = (tuple(Column(name, recipe["units"].get(name, "")) for name in recipe[side]) for side in ("inputs", "outputs"))
    return x, y


def _check(ds: Any, recipe: Mapping[str, Any]) -> None:
    """Refuse a recipe that does not fit the data."""
    dims, inputs, outputs = recipe["dims"], recipe["inputs"], recipe["outputs"]
    if both := [name for name in inputs if name in outputs] or [d for d in recipe["task"] if d in recipe["patch"]]:
        raise ValueError(f"Expected each name in one role. Got {listed(both)} in two (input and output, or task and patch).")
    if not inputs or not outputs:
        raise ValueError(f"Expected at least one input and one output. Got inputs {inputs} and outputs {outputs}.")
    if repeated := [name for name, count in Counter([*inputs, *outputs]).items() if count > 1]:
        raise ValueError(f"Expected each input and output once. Got {listed(repeated)} more than once.")
    for name in outputs:
        own = [d for d in ds[name].dims if ds.sizes[d] > 1 or d in dims]
        if set(own) != set(dims):
            raise ValueError(f"Expected every output on the grid {', '.join(dims)}. Got {name} on {', '.join(map(str, own))}.")
        if ds[name].dtype.kind not in "fiub":
            raise ValueError(f"Expected numbers as the output {name}. Got {ds[name].dtype}.")
    covered = set(recipe["task"])
    for name in inputs:
        values = _variable(ds, name)
        if values.dtype.kind not in "fiubm" and not _is_clock(values):
            raise ValueError(f"Expected numbers or times as the input {name}. Got {values.dtype}. Leave it out, or make it the task.")
        if beyond := [str(d) for d in values.dims if d not in dims and ds.sizes[d] > 1]:
            raise ValueError(f"Expected the input {name} on the grid {', '.join(dims)}. Got the dimension {listed(beyond)} too.")
        covered |= {str(d) for d in values.dims}
    if free := [d for d in dims if d not in covered and ds.sizes[d] > 1]:
        raise ValueError(
            f"Expected each dimension to be a task or an input. Got {_sizes(ds, free)}: cells that differ in it alone would have the same "
            f"inputs. Add it to the inputs or tasks, or choose one index with xarray's ds.isel({free[0]}=0)."
        )
    for what in ("patch", "stride", "every"):
        for d, n in recipe[what].items():
            if n < 1:
                raise ValueError(f"Expected {what} as a positive number of cells. Got {n} along {d}.")


def _remarks(ds: Any, recipe: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a person should know of the inputs."""
    bare = [d for d in recipe["inputs"] if d in ds.dims and d not in ds.coords]
    for d in bare:
        yield f"{d} has no coordinate: its cells are numbered 0, 1, ..."
    flat = [str(name) for name, c in ds.coords.items() if c.ndim > 1 and set(bare) & set(c.dims) and c.dtype.kind == "f"]
    if flat:
        yield f"The coordinates {listed(flat)} are on these dimensions and can be inputs instead."
    for name, origin in recipe["origins"].items():
        if name in recipe["inputs"]:
            start = "the start of its task" if recipe["span"] and [name] == recipe["task"] else f"{origin} 00:00"
            yield f"{name} is in hours since {start}."
    for name, (low, high) in recipe["longitudes"].items():
        values = np.unique(np.asarray(ds[name].values, dtype=np.float64))
        step = float(np.median(np.diff(values))) if len(values) > 1 else 0.0
        if len(values) > 1 and np.diff(values).max() > 180:
            shifted = f"ds.assign_coords({name}=(ds[{name!r}] + 180) % 360 - 180).sortby({name!r})"
            yield (
                f"{name} jumps by {np.diff(values).max():g} degrees, and neighbours on both sides of the jump are far apart for the model. "
                f"Count from -180 to 180 before the fit, with xarray: {shifted}"
            )
        elif high - low + 1.5 * step >= 360:
            yield f"{name} goes round the globe: the model does not know that its two ends are neighbours."


def normal(ds: Any, recipe: Mapping[str, Any]) -> Any:
    """Return the data set thinned, without dimensions of one index that the recipe does not know.

    Raises:
        ValueError: it does not fit the recipe.
    """
    shown = [name for name in recipe["outputs"] if name in ds.variables]
    used = [*shown, *(name for name in recipe["inputs"] if name in ds.variables)]
    for name in used:
        unit, known = _unit(ds[name], name), recipe["units"].get(name, "")
        if unit and known and unit != known and name not in recipe["origins"]:
            raise ValueError(f"Expected {name} in {known}, as in the recipe. Got {unit}. Convert it first.")
    for name, (low, high) in recipe["longitudes"].items():
        if name in ds.variables and ds[name].size:
            first, last = float(ds[name].min()), float(ds[name].max())
            if (low < 0 and last > 180) or (high > 180 and first < 0):
                raise ValueError(
                    f"Expected {name} as in the recipe, where it goes from {low:g} to {high:g}. Got {first:g} to {last:g}: longitudes are "
                    "counted from 0 to 360 in one and from -180 to 180 in the other. Convert one of them."
                )
    every = {d: slice(None, None, n) for d, n in recipe["every"].items() if d in ds.sizes}
    ds = ds.isel(every)
    over = {str(d) for name in used for d in ds[name].dims if d not in recipe["dims"]}
    if large := sorted(d for d in over if ds.sizes[d] > 1):
        raise ValueError(f"Expected the dimensions {', '.join(recipe['dims'])}. Got {_sizes(ds, large)} too. Choose one index of it.")
    ds = ds.isel(dict.fromkeys(over, 0))
    if lost := [d for d in recipe["dims"] if d not in ds.sizes and d not in recipe["task"] and d not in ds.coords]:
        raise ValueError(f"Expected the dimensions {', '.join(recipe['dims'])}. Got none called {listed(lost)}.")
    return ds


# --- cutting it


def _floats(values: Any, origin: str | None) -> FloatArray:
    """Return numbers; times as hours since midnight of the day of the origin."""
    array = np.asarray(values)
    if array.dtype.kind == "O" and array.size and origin is not None:
        first = array.flat[0]
        start = type(first)(*map(int, origin.split("-")))
        return np.array([(t - start).total_seconds() / 3600 for t in array.ravel()], dtype=np.float64).reshape(array.shape)
    if array.dtype.kind == "M":
        hours: FloatArray = (array - np.datetime64(origin)) / np.timedelta64(1, "h")
        return hours
    if array.dtype.kind == "m":
        hours = array / np.timedelta64(1, "h")
        return hours
    return array.astype(np.float64)


@dataclass(frozen=True, eq=False)
class _Variable:
    """Hold one variable: an array, or an xarray variable that reads from its file what is asked for."""

    name: str
    dims: tuple[str, ...]
    data: Any
    origin: str | None

    def take(self, picks: Mapping[str, Pick], points: Sequence[str]) -> FloatArray:
        """Return a block with one axis for each dimension of the points, of length 1 where the variable lacks it."""
        key = tuple(picks.get(d, slice(None)) for d in self.dims)
        with readable(self.name):
            values = _floats(self.data[key] if isinstance(self.data, np.ndarray) else self.data[key].values, self.origin)
        left = [d for d in self.dims if not isinstance(picks.get(d), int)]
        values = values.transpose([left.index(d) for d in points if d in left])
        return values.reshape([values.shape[[e for e in points if e in left].index(d)] if d in left else 1 for d in points])


@dataclass(frozen=True, eq=False)
class _Axis:
    """Hold the choices along one dimension: what to take, how it is called, and what is taken off the coordinate there."""

    dim: str
    picks: list[Pick]
    labels: list[str]
    shifts: FloatArray
    reach: int = 0


class Cut:
    """Hold a grid cut into tasks, each read when it is asked for.

    Arguments:
        ds: as `normal` gives it.
        recipe: as `choose` gives it.
        needed: tasks without any output are left out where that can be seen at once.
        lazy: read a task when it is asked for.
        whole: it is one field of which every cell counts.

    Raises:
        ValueError: the grid does not fit the recipe.
    """

    def __init__(self, ds: Any, recipe: Mapping[str, Any], needed: bool, lazy: bool, whole: bool = False) -> None:
        self.ds, self.recipe, self.lazy, self.notes = ds, recipe, lazy, list[str]()
        self.dims = tuple(d for d in recipe["dims"] if d in ds.sizes)
        self.inputs = [self._load(name) for name in recipe["inputs"]]
        self.outputs = [self._load(name) if name in ds.variables else None for name in recipe["outputs"]]
        absent = [d for d in recipe["task"] if d not in ds.sizes]
        if absent and not whole:
            self.notes.append(f"There is no dimension {listed(absent)}: all of it is one task.")
        tasks = [self._tasks(d) for d in recipe["task"] if d in ds.sizes]
        patches = [self._patches(d, n) for d, n in recipe["patch"].items() if d in ds.sizes]
        self.axes = [*tasks, *sorted(patches, key=lambda axis: not _is_time(ds, axis.dim))]
        self.lengths = tuple(len(axis.picks) for axis in self.axes)
        self.ordered = any(_is_time(ds, axis.dim) for axis in self.axes)
        self.overlap = sum(axis.reach * prod(self.lengths[i + 1 :]) for i, axis in enumerate(self.axes))
        self.places = list(range(prod(self.lengths)))
        self._count(needed and not whole)
        self.names = self._name()
        over = [i for i, axis in enumerate(tasks) if not _is_time(ds, axis.dim)] if self.ordered and len(tasks) > 1 else []
        where = [np.unravel_index(place, self.lengths) for place in self.places] if over else []
        self.groups = [", ".join(self.axes[i].labels[int(at[i])] for i in over) for at in where] if over else None

    def read(self, index: int) -> Triple:
        """Return a task: x, y and the mask."""
        x, y, mask, kept = self.cells(index)
        if not np.isfinite(y[mask]).all():
            raise ValueError(f"Expected finite outputs. Got infinite ones in the task {self.names[index]!r}. Mark what is missing as NaN.")
        return (x, y, mask) if kept.all() else (x[kept], y[kept], mask[kept])

    def cells(self, index: int) -> tuple[FloatArray, FloatArray, BoolArray, BoolArray]:
        """Return x, y and the mask of all cells of a task, and which cells have all inputs."""
        picks, shifts = self._picks(self.places[index])
        points, shape = self._shape(picks)
        x = self._inputs(picks, shifts, points, shape)
        y = np.full((len(x), len(self.outputs)), np.nan)
        for j, variable in enumerate(self.outputs):
            if variable is not None:
                y[:, j] = np.broadcast_to(variable.take(picks, points), shape).ravel()
        kept: BoolArray = np.asarray(np.isfinite(x).all(axis=1))
        return x, y, ~np.isnan(y), kept

    def grid(self, index: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the dimensions of a task and its number of cells along each."""
        return self._shape(self._picks(self.places[index])[0])

    def _inputs(
        self, picks: Mapping[str, Pick], shifts: Mapping[str, float], points: tuple[str, ...], shape: tuple[int, ...]
    ) -> FloatArray:
        x = np.empty((prod(shape), len(self.inputs)))
        for j, variable in enumerate(self.inputs):
            x[:, j] = np.broadcast_to(variable.take(picks, points), shape).ravel() - shifts.get(variable.name, 0.0)
        return x

    def _picks(self, place: int) -> tuple[dict[str, Pick], dict[str, float]]:
        at = [int(i) for i in np.unravel_index(place, self.lengths)] if self.axes else []
        chosen = {axis.dim: axis.picks[i] for axis, i in zip(self.axes, at, strict=True)}
        return chosen, {axis.dim: float(axis.shifts[i]) for axis, i in zip(self.axes, at, strict=True)}

    def _shape(self, picks: Mapping[str, Pick]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        points = tuple(d for d in self.dims if not isinstance(picks.get(d), int))
        return points, tuple(len(range(self.ds.sizes[d])[p]) if isinstance(p := picks.get(d), slice) else self.ds.sizes[d] for d in points)

    def _load(self, name: str) -> _Variable:
        values = _variable(self.ds, name)
        variable = values.variable
        small = not self.lazy or set(variable.dims) <= {name}
        with readable(name):
            data = variable.values if small else variable
        return _Variable(name, tuple(map(str, variable.dims)), data, self.recipe["origins"].get(name) if _is_clock(values) else None)

    def _coordinate(self, d: str) -> FloatArray | None:
        if d not in self.ds.coords or (self.ds[d].dtype.kind not in "fiubm" and not _is_clock(self.ds[d])):
            return None
        values = self.ds[d]
        return _floats(values.values, (self.recipe["origins"].get(d) or _origin(values.values)) if _is_clock(values) else None)

    def _tasks(self, d: str) -> _Axis:
        """Return the axis of a dimension of which each index, or each block of a span, is a task."""
        n, labels, span = self.ds.sizes[d], _labels(self.ds, d), self.recipe["span"]
        if span is None:
            return _Axis(d, list(range(n)), labels, np.zeros(n))
        hours = self._coordinate(d)
        if "steps" in span:
            starts = np.arange(0, n, span["steps"])
            shifts = (np.arange(n, dtype=np.float64) if hours is None else hours)[starts]
        elif hours is None or not _is_clock(self.ds[d]):
            raise ValueError(f"Expected times along {d}, to cut them in spans. Got numbers. Say how many steps, as in '{d}:24'.")
        elif not (np.diff(hours) >= 0).all():
            raise ValueError(f"Expected times in order along {d}. Got a time before the one that precedes it. Sort with ds.sortby({d!r}).")
        else:
            block = np.floor(hours / span["hours"] + 1e-9)
            starts = np.flatnonzero(np.diff(block, prepend=np.nan) != 0)
            shifts = block[starts] * span["hours"]
        ends = [*starts[1:].tolist(), n]
        sizes = np.diff([*starts.tolist(), n])
        if n and (odd := int((sizes != sizes.max()).sum())):
            self.notes.append(f"{odd} of {len(sizes)} blocks of {d} have fewer than {sizes.max()} steps.")
        days = span.get("hours", 1) % 24 == 0
        picks: list[Pick] = [slice(int(a), b) for a, b in zip(starts, ends, strict=True)]
        return _Axis(d, picks, [labels[a][: labels[a].index("T") if days and "T" in labels[a] else None] for a in starts], shifts)

    def _patches(self, d: str, size: int) -> _Axis:
        n, stride = self.ds.sizes[d], self.recipe["stride"].get(d, size)
        if size > n:
            raise ValueError(f"Expected patches of at most {n} cells along {d}. Got {size}.")
        starts = range(0, n - size + 1, stride)
        if lost := n - (starts[-1] + size) + max(0, stride - size) * (len(starts) - 1):
            self.notes.append(f"{lost} of {n} cells along {d} are in no patch.")
        labels, hours = _labels(self.ds, d, short=True), self._coordinate(d)
        values = np.arange(n, dtype=np.float64) if hours is None else hours
        centres = [(values[a : a + size].min() + values[a : a + size].max()) / 2 if self.recipe["relative"] else 0.0 for a in starts]
        named = [f"{d} {labels[a]} to {labels[a + size - 1]}" for a in starts]
        return _Axis(d, [slice(a, a + size) for a in starts], named, np.asarray(centres), ceil(size / stride) - 1)

    def _count(self, needed: bool) -> None:
        """Find the number of points of each task; look into the values only where cells or tasks may have to be left out."""
        self.sizes = [prod(self._shape(self._picks(place)[0])[1]) for place in self.places]
        cells, holes = sum(self.sizes), [v for v in self.inputs if not _is_whole(v)]
        if holes:
            for i, place in enumerate(self.places):
                picks, shifts = self._picks(place)
                self.sizes[i] = int(np.isfinite(self._inputs(picks, shifts, *self._shape(picks))).all(1).sum())
            if lost := cells - sum(self.sizes):
                self.notes.append(f"{lost} of {cells} cells lack an input ({', '.join(v.name for v in holes)}) and are left out.")
        bare = [size == 0 for size in self.sizes]
        if needed and self.lazy:
            self.notes.append("The data are read a task at a time, so tasks without any output were not looked for.")
            self.notes.extend(self._chunks())
        elif needed and not all(v is not None and _is_whole(v) for v in self.outputs):
            bare = [size == 0 or not self.read_mask(i).any() for i, size in enumerate(self.sizes)]
        if any(bare):
            self.notes.append(f"{sum(bare)} of {len(bare)} tasks have no cell with inputs and an output, and are left out.")
            self.sizes = [size for size, out in zip(self.sizes, bare, strict=True) if not out]
            self.places = [place for place, out in zip(self.places, bare, strict=True) if not out]

    def read_mask(self, index: int) -> BoolArray:
        """Return which outputs of a task were observed at cells with all inputs."""
        _, _, mask, kept = self.cells(index)
        return mask[kept]

    def _name(self) -> list[str]:
        """Return a name for each task."""
        where = [np.unravel_index(place, self.lengths) if self.axes else () for place in self.places]
        return [" ".join(axis.labels[int(i)] for axis, i in zip(self.axes, at, strict=True)) or "all" for at in where]

    def _chunks(self) -> Iterator[str]:
        """Yield a remark on each variable that is stored in chunks much larger than a task."""
        for name in {*self.recipe["outputs"], *self.recipe["inputs"]} & set(map(str, self.ds.variables)):
            chunk = self.ds[name].encoding.get("chunksizes") or self.ds[name].encoding.get("chunks")
            if chunk and prod(chunk) > 4 * max(self.sizes, default=0):
                yield f"{name} is stored in chunks of {' x '.join(map(str, chunk))}, so each task costs the reading of a whole chunk."


def _is_whole(variable: _Variable) -> bool:
    """Say whether it is known that a variable has no gaps."""
    if not isinstance(variable.data, np.ndarray):
        return bool(variable.data.dtype.kind in "iub")
    kind = variable.data.dtype.kind
    return kind in "iub" or (kind in "fMm" and not np.isnan(variable.data).any()) or kind == "O"


def _labels(ds: Any, d: str, short: bool = False) -> list[str]:
    """Return names of the indices of a dimension: times as ISO writes them, and other values with the name of the dimension."""
    n = ds.sizes[d]
    if d not in ds.coords:
        return [str(i) if short else f"{d} {i}" for i in range(n)]
    values = ds[d].values
    if values.dtype.kind == "M":
        unit: Any = next((u for u in ("m", "s") if n and (values == values.astype(f"datetime64[{u}]")).all()), "ms")
        return [str(text) for text in np.datetime_as_string(values, unit=unit)]
    if _is_clock(ds[d]):
        return [t.isoformat() for t in values]
    texts = [f"{v:.10g}" if values.dtype.kind == "f" else str(v) for v in values.tolist()]
    return texts if short or values.dtype.kind not in "fiu" else [f"{d} {text}" for text in texts]
