"""What is explored: a model, the names and ranges of its columns, what its likelihood allows, and the tasks at hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnnp.data.collection import Collection
from bnnp.explorer.lattice import Lattice
from bnnp.explorer.wire import Array, plain
from bnnp.likelihoods import Beta, Categorical, Gaussian, MultivariateGaussian
from bnnp.runs import Run

__all__ = ["Subject"]

MOST_NAMES = 50
"""How many names of tasks a search returns."""
INSIDE = 1e-3
"""How near to 0 and 1 shares may come."""


class Subject:
    """Hold what all pages of one explorer share.

    Arguments:
        run: the model, and names and units of its columns.
        data: tasks to load, with as many inputs and outputs as the model has.

    Raises:
        ValueError: tasks of another number of columns.
    """

    def __init__(self, run: Run, data: Collection | None = None) -> None:
        model = run.model
        if data is not None and (data.x_dim, data.y_dim) != (model.x_dim, model.y_dim):
            raise ValueError(
                f"Expected tasks with {model.x_dim} inputs and {model.y_dim} outputs, as the model has. Got {data.x_dim} and {data.y_dim}. "
                "Read them with the recipe of the run."
            )
        self.run, self.model, self.data = run, model, data
        self.x_dim, self.y_dim, self.gaps = model.x_dim, model.y_dim, model.missing_outputs
        self.middle: Array = model.scaling.x_shift.double().cpu().numpy()
        self.spread: Array = model.scaling.x_scale.double().cpu().numpy()
        self.low, self.high = self._ranges()
        self.usual_y = self.legal(model.scaling.y_shift.double().cpu().numpy()[None], alone=True)[0]
        self.lattice = self._lattice()
        self.map_first = self.lattice is not None and (run.kind in ("images", "grid") or self.lattice.source == "data")

    @property
    def count(self) -> int:
        """Return the number of tasks that can be loaded."""
        return 0 if self.data is None else len(self.data)

    def _ranges(self) -> tuple[Array, Array]:
        """Return where inputs of meta-training lay, a little wider; a guess where the model was not trained."""
        reference = self.model.reference
        if not reference.known:
            return self.middle - 3 * self.spread, self.middle + 3 * self.spread
        x = reference.x_sample.double().cpu().numpy()
        low, high = x.min(0), x.max(0)
        room = 0.03 * np.maximum(high - low, 1e-6 * self.spread)
        return low - room, high + room

    def _lattice(self) -> Lattice | None:
        if self.x_dim != 2:
            return None
        inputs, kind, found = self.run.inputs, self.run.kind, None
        if self.data is not None and len(self.data):
            found = Lattice.of_points(np.asarray(self.data[0][0]), inputs, kind)
        return found or Lattice.of_image(self.run.recipe, inputs) or Lattice.of_range(self.low, self.high, inputs, kind)

    def legal(self, y: Array, alone: bool = False) -> Array:
        """Return outputs (n, d_y) moved to the nearest value that the likelihood can make.

        Arguments:
            y: outputs, NaN where not observed.
            alone: they are no points yet, so anything may be missing.

        Raises:
            ValueError: an output is missing and the model cannot do without, or all of a point are.
        """
        likelihood, missing = self.model.likelihood, np.isnan(y)
        if not alone and missing.any() and not self.gaps:
            raise ValueError("Expected all outputs of each point. Got a point without some: this model was not built for missing outputs.")
        if not alone and missing.all(-1).any():
            raise ValueError("Expected at least one output of each point. Got a point without any.")
        low, high = likelihood.support
        if isinstance(likelihood, Beta):
            low, high = low + INSIDE, high - INSIDE
        found: Array = np.clip(y, low, high)
        return np.round(found) if likelihood.discrete else found

    def task(self, index: int) -> tuple[Array, Array, str]:
        """Return inputs and outputs of a task of the data, NaN where not observed, points without any output left out; and its name.

        Raises:
            ValueError: outputs that the likelihood cannot have made, or some that are missing where the model needs all.
        """
        assert self.data is not None
        x, y, mask = self.data[index]
        y = np.where(mask, y, np.nan)
        keep = np.isfinite(y).any(-1) if self.gaps else np.isfinite(y).all(-1)
        return x[keep], self.legal(y[keep]), str(self.data.names[index])

    def names(self, search: str) -> dict[str, Any]:
        """Return tasks whose names hold a text, in any case, and how many there are."""
        if self.data is None:
            return {"tasks": [], "found": 0, "count": 0}
        wanted = search.strip().lower()
        found = [i for i, name in enumerate(self.data.names) if wanted in str(name).lower()]
        rows = [{"task": i, "name": str(self.data.names[i]), "size": int(self.data.sizes[i])} for i in found[:MOST_NAMES]]
        return {"tasks": rows, "found": len(found), "count": len(self.data)}

    def to_dict(self) -> dict[str, Any]:
        """Return what a page has to know."""
        likelihood, scaling = self.model.likelihood, self.model.scaling
        noise = self.model.noise_std
        adjustable = isinstance(likelihood, Gaussian | MultivariateGaussian)
        centre, width = (t.double().cpu().numpy() for t in (scaling.y_shift, scaling.y_scale))
        return {
            "inputs": [
                {"name": c.name, "unit": c.unit, "low": plain(self.low[j]), "high": plain(self.high[j]),
                 "middle": plain(self.middle[j]), "spread": plain(self.spread[j])}
                for j, c in enumerate(self.run.inputs)
            ],
            "outputs": [
                {"name": c.name, "unit": c.unit, "middle": plain(centre[j]), "spread": plain(width[j])}
                for j, c in enumerate(self.run.outputs)
            ],
            "likelihood": {
                "kind": type(likelihood).__name__,
                "discrete": likelihood.discrete,
                "labels": likelihood.labels,
                "classes": likelihood.classes if isinstance(likelihood, Categorical) else 2 if likelihood.labels else 0,
                "support": [plain(v) for v in likelihood.support],
                "noise": plain(noise.double().cpu().numpy()) if adjustable and noise is not None else None,
            },
            "kind": self.run.kind,
            "gaps": self.gaps,
            "trained": self.model.reference.known,
            "tasks": self.count,
            "lattice": None if self.lattice is None else self.lattice.to_dict(),
            "map_first": self.map_first,
        }  # fmt: skip
