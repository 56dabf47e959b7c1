"""Inference by any engine, under any prior: one whitened log-joint, and engines of one fixed shape that take it."""

from functools import partial

from bnnp.inference import amortised, ensemble, gaussian_vi, hmc, mala, nuts, sghmc, sgld, smc, swag
from bnnp.inference.engine import Build, Draws, Engine, Inference, run
from bnnp.inference.functional import Functional, functional
from bnnp.inference.target import Target

ENGINES: dict[str, Build] = {
    "amortised": amortised.build,
    "ensemble": ensemble.build,
    "full_vi": partial(gaussian_vi.build, structure="full"),
    "hmc": hmc.build,
    "mala": mala.build,
    "mean_field": gaussian_vi.build,
    "nuts": nuts.build,
    "per_layer_vi": partial(gaussian_vi.build, structure="per_layer"),
    "per_unit_vi": partial(gaussian_vi.build, structure="per_unit"),
    "sghmc": sghmc.build,
    "sgld": sgld.build,
    "smc": smc.build,
    "swag": swag.build,
}
"""Every engine by its name."""

__all__ = ["ENGINES", "Build", "Draws", "Engine", "Functional", "Inference", "Target", "functional", "run"]
