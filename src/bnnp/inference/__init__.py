"""Inference by any engine, under any prior: one whitened log-joint, and engines of one fixed shape that take it."""

from bnnp.inference import gaussian_vi, givi, hmc, mala, nuts
from bnnp.inference.engine import Build, Draws, Engine, Inference, run
from bnnp.inference.functional import Functional, functional
from bnnp.inference.target import Target

ENGINES: dict[str, Build] = {
    "hmc": hmc.build,
    "mala": mala.build,
    "nuts": nuts.build,
    "mean_field": gaussian_vi.mean_field,
    "per_unit_vi": gaussian_vi.per_unit,
    "per_layer_vi": gaussian_vi.per_layer,
    "full_vi": gaussian_vi.full,
    "givi": givi.build,
}
"""Every engine by its name."""

__all__ = ["ENGINES", "Draws", "Engine", "Functional", "Inference", "Target", "functional", "run"]
