"""A map: the cells of a regular grid of two inputs, found in the data, known of images, or laid over the range of the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnnp.data.collection import Column
from bnnp.explorer.wire import EXACT, Array, plain

__all__ = ["MOST_CELLS", "Lattice"]

MOST_CELLS = 4096
"""A finer grid is thinned: each change predicts all cells."""


@dataclass(frozen=True, eq=False)
class Lattice:
    """Hold the cells of a map, row by row from the top as they are drawn.

    Arguments:
        across: which input runs from left to right.
        columns: its values from left to right.
        rows: values of the other input from top to bottom.
        source: "data", "image" or "range": where it comes from.
        thinned: every so many rows and columns of the source were kept.

    Example:
        >>> Lattice(1, np.array([0.0, 1.0]), np.array([5.0, 6.0, 7.0]), "data").cells[:3].tolist()
        [[5.0, 0.0], [5.0, 1.0], [6.0, 0.0]]
    """

    across: int
    columns: Array
    rows: Array
    source: str
    thinned: int = 1

    @property
    def cells(self) -> Array:
        """Return the inputs of the cells with shape (rows * columns, 2)."""
        down, across = np.meshgrid(self.rows, self.columns, indexing="ij")
        pair = (across, down) if self.across == 0 else (down, across)
        return np.stack([part.ravel() for part in pair], axis=-1)

    def to_dict(self) -> dict[str, Any]:
        """Return it for the page."""
        return {
            "across": self.across,
            "columns": plain(self.columns, EXACT),
            "rows": plain(self.rows, EXACT),
            "source": self.source,
            "thinned": self.thinned,
        }

    @staticmethod
    def of_points(x: Array, inputs: Sequence[Column], kind: str) -> Lattice | None:
        """Return the lattice that points (n, 2) lie on, or None where they lie on none, or hardly fill it."""
        if len(x) < 4:
            return None
        values = [np.unique(x[:, j]) for j in range(2)]
        sizes = [len(v) for v in values]
        if min(sizes) < 2 or len(x) < 0.5 * sizes[0] * sizes[1]:
            return None
        return Lattice._laid(values[0], values[1], inputs, kind, "data")

    @staticmethod
    def of_image(recipe: Mapping[str, Any], inputs: Sequence[Column]) -> Lattice | None:
        """Return the pixels of an image of the size that a recipe names, between -1 and 1, or None."""
        shape = recipe.get("shape")
        if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(isinstance(n, int) and n >= 2 for n in shape):
            return None
        return Lattice._laid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), inputs, "images", "image")

    @staticmethod
    def of_range(low: Array, high: Array, inputs: Sequence[Column], kind: str, side: int = 28) -> Lattice:
        """Return cells laid over a range of both inputs."""
        return Lattice._laid(np.linspace(low[0], high[0], side), np.linspace(low[1], high[1], side), inputs, kind, "range")

    @staticmethod
    def _laid(first: Array, second: Array, inputs: Sequence[Column], kind: str, source: str) -> Lattice:
        step = 1
        while -(-len(first) // step) * -(-len(second) // step) > MOST_CELLS:
            step += 1
        first, second = first[::step], second[::step]
        names = [column.name.lower() for column in inputs]
        if kind == "images":  # row from the top, then column
            return Lattice(1, second, first, source, step)
        if names[0].startswith(("lat", "north", "row", "y")) and not names[1].startswith(("lat", "north", "row", "y")):
            return Lattice(1, second, first if names[0].startswith("row") else first[::-1], source, step)
        return Lattice(0, first, second[::-1], source, step)
