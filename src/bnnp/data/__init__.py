"""Where tasks come from: synthetic processes here, and readers of the user's own files beside them.

Every source of tasks ends in a list of pairs (x, y), which is what `bnnp.meta_train` and `bnnp.evaluation.evaluate` accept. A grid that is
larger than memory ends in batches of points, which is what `model.condition` accepts.
"""

from __future__ import annotations

from bnnp.data.batches import grid_batches
from bnnp.data.collection import Collection, Column, Description, Division, divide
from bnnp.data.grids import grid_dataset, grid_points, read_grid
from bnnp.data.image_files import read_images
from bnnp.data.opening import kind_of, read
from bnnp.data.pacoh import CauchyBumps, SinusoidLine
from bnnp.data.signals import read_signals
from bnnp.data.synthetic import Heaviside, KnownBNN, Process, Sawtooth, SquaredExponentialGP, SyntheticTask
from bnnp.data.table import read_points, read_table

__all__ = [
    "CauchyBumps",
    "Collection",
    "Column",
    "Description",
    "Division",
    "Heaviside",
    "KnownBNN",
    "Process",
    "Sawtooth",
    "SinusoidLine",
    "SquaredExponentialGP",
    "SyntheticTask",
    "divide",
    "grid_batches",
    "grid_dataset",
    "grid_points",
    "kind_of",
    "read",
    "read_grid",
    "read_images",
    "read_points",
    "read_signals",
    "read_table",
]
