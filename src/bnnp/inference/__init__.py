"""Inference by any engine, under any prior: one whitened log-joint, and engines of one fixed shape that take it."""

from functools import partial

from bnnp.inference import gaussian_vi, hmc, mala, nuts
from bnnp.inference.engine import Build, Draws, Engine, Inference, run
from bnnp.inference.functional import Functional, functional
from bnnp.inference.target import Target

ENGINES: dict[str, Build] = {
    "hmc": hmc.build,
    "mala": mala.build,
    "nuts": nuts.build,
    "mean_field": gaussian_vi.build,
    "per_unit_vi": partial(gaussian_vi.build, structure="per_unit"),
    "per_layer_vi": partial(gaussian_vi.build, structure="per_layer"),
    "full_vi": partial(gaussian_vi.build, structure="full"),
}
"""Every engine by its name."""

__all__ = ["ENGINES", "Draws", "Engine", "Functional", "Inference", "Target", "functional", "run"]
