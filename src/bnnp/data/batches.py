"""Gridded data as batches of points: fields over longitude and latitude, images, volumes, of any size.

A point of a grid is its coordinates, and what was measured there is its output. Written out as a table of points, a field takes k + 1
numbers a point where the file has one, and rarely fits in memory. Here the table is written a batch at a time, from whatever can be sliced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from bnnp.seeds import check_count

__all__ = ["GridBatches", "grid_batches"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
Pair = tuple[FloatArray, FloatArray]


def grid_batches(values: Any, coordinates: Sequence[Any], size: int) -> GridBatches:
    """Return batches of the points of a grid, for `model.condition`; nothing is read yet.

    Points come in row-major order, the last coordinate fastest. A missing value (NaN, or an entry that a masked array masks) is left out,
    and so is a point of which any output is missing. A batch is a block along the first axis, or a part of a row of it where a row has more
    than `size` points; no more than `size` points are in memory. Where a file is stored in chunks, blocks that hold whole chunks read fast.

    Arguments:
        values: anything with `.shape` (n_1, ..., n_k) that gives slices: an array, a memory map, a variable of a netCDF, HDF5 or zarr file,
            an xarray DataArray. Or a list of d_y of them with one shape, one for each output.
        coordinates: k vectors of n_1, ..., n_k numbers, one for each axis.
        size: the largest number of points in a batch.

    Returns:
        An object that yields pairs (x, y) with shapes (n, k) and (n, d_y) in float64, the same in every pass.

    Raises:
        ValueError: coordinates that do not fit the shape or are not finite, variables that differ in shape, or a grid without points; when
            it is read, a grid of which every value is missing.
        TypeError: values that have no shape, or coordinates that are not numbers.

    Example:
        >>> batches = grid_batches(np.array([[1.0, np.nan, 3.0], [4.0, 5.0, 6.0]]), [[10, 20], [0.1, 0.2, 0.3]], size=3)
        >>> [(x.tolist(), y.ravel().tolist()) for x, y in batches][0]
        ([[10.0, 0.1], [10.0, 0.3]], [1.0, 3.0])
    """
    variables = tuple(values) if isinstance(values, list | tuple) else (values,)
    if not variables or not all(hasattr(v, "shape") for v in variables):
        got = "an empty list" if not variables else next(type(v).__name__ for v in variables if not hasattr(v, "shape"))
        raise TypeError(f"Expected values with a shape, such as an array or a variable of a file, or a list of them. Got {got}.")
    shapes = [tuple(int(n) for n in v.shape) for v in variables]
    if len(set(shapes)) > 1:
        raise ValueError(f"Expected variables on one grid. Got shapes {', '.join(map(str, shapes))}. Pass each in batches of its own.")
    return GridBatches(variables, _axes(coordinates, shapes[0]), check_count(size, "size"))


def _axes(coordinates: Any, shape: tuple[int, ...]) -> tuple[FloatArray, ...]:
    """Check the coordinates of a grid."""
    axes = [np.asarray(c) for c in coordinates]
    for i, axis in enumerate(axes):
        if axis.dtype.kind not in "iufb":
            what = "Turn times into numbers, such as days since a start." if axis.dtype.kind in "mMO" else "Give numbers."
            raise TypeError(f"Expected coordinate {i} as numbers. Got an array of {axis.dtype}. {what}")
    sizes = tuple(axis.shape for axis in axes)
    if not shape or sizes != tuple((n,) for n in shape):
        got = ", ".join(map(str, sizes[:5])) + (f" and {len(sizes) - 5} more" if len(sizes) > 5 else "")
        raise ValueError(
            f"Expected a list of vectors, one for each axis of values with shape {shape} and as long as it. "
            f"Got {len(sizes)} coordinates with shapes {got or 'of nothing'}."
        )
    if prod(shape) == 0:
        raise ValueError(f"Expected a grid with at least one point. Got shape {shape}.")
    for i, axis in enumerate(axes):
        if not np.isfinite(axis).all():
            raise ValueError(f"Expected finite coordinates. Got NaN or infinity in coordinate {i}. Cut values and coordinates there.")
    return tuple(axis.astype(np.float64) for axis in axes)


@dataclass(frozen=True, eq=False)
class GridBatches:
    """Hold a grid that is read in batches, from the start at each pass; made by `grid_batches`.

    Arguments:
        variables: one for each output.
        axes: coordinates of each axis.
        size: the largest number of points in a batch.
    """

    variables: tuple[Any, ...]
    axes: tuple[FloatArray, ...]
    size: int

    def _blocks(self) -> Iterator[tuple[slice, ...]]:
        """Yield slices of the leading axes, the others being whole: every point once, in row-major order, at most `size` at a time."""
        shape = [len(axis) for axis in self.axes]
        cut, inner = len(shape) - 1, 1
        while cut > 0 and inner * shape[cut] <= self.size:
            inner *= shape[cut]
            cut -= 1
        step = self.size // inner
        for lead in np.ndindex(*shape[:cut]):
            for i in range(0, shape[cut], step):
                yield *(slice(n, n + 1) for n in lead), slice(i, min(i + step, shape[cut]))

    def _read(self, variable: Any, at: tuple[slice, ...]) -> tuple[FloatArray, BoolArray]:
        """Return the values of a block and where they are observed, in row-major order."""
        # A single slice is not a tuple of one: there are objects that take no tuples.
        block = variable[at if len(at) > 1 else at[0]]
        if isinstance(block, np.ma.MaskedArray):
            # What stands under a mask need not be a number, nor become one without a warning.
            block, masked = block.filled(0), np.ma.getmaskarray(block).ravel()
        else:
            masked = np.zeros(1, dtype=np.bool_)
        found = np.asarray(block, dtype=np.float64).ravel()
        return found, ~(masked | np.isnan(found))

    def __iter__(self) -> Iterator[Pair]:
        """Yield the batches of one pass.

        Raises:
            ValueError: every value is missing.
        """
        empty = True
        for at in self._blocks():
            columns, observed = zip(*(self._read(variable, at) for variable in self.variables), strict=True)
            keep = np.logical_and.reduce(observed)
            if keep.any():
                empty = False
                vectors = [axis[cut] for axis, cut in zip(self.axes, at, strict=False)] + list(self.axes[len(at) :])
                grid = np.meshgrid(*vectors, indexing="ij")
                yield np.stack([c.ravel()[keep] for c in grid], axis=-1), np.stack([c[keep] for c in columns], axis=-1)
        if empty:
            count = prod(len(axis) for axis in self.axes)
            raise ValueError(f"Expected at least one observed point. Got {count} points, all missing. Look at the file's missing value.")
