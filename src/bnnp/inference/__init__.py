"""Inference by any engine, under any prior: one whitened log-joint, and engines of one fixed shape that take it."""

from bnnp.inference import ensemble, hmc, laplace, mala, nuts, sghmc, sgld, swag
from bnnp.inference.engine import Build, Draws, Engine, Inference, run
from bnnp.inference.functional import Functional, functional
from bnnp.inference.linearised import linearised
from bnnp.inference.target import Target

ENGINES: dict[str, Build] = {
    "ensemble": ensemble.build,
    "hmc": hmc.build,
    "laplace": laplace.build,
    "laplace_diagonal": laplace.build_diagonal,
    "laplace_last_layer": laplace.build_last_layer,
    "mala": mala.build,
    "nuts": nuts.build,
    "sghmc": sghmc.build,
    "sgld": sgld.build,
    "swag": swag.build,
}
"""Every engine by its name."""

__all__ = ["ENGINES", "Draws", "Engine", "Functional", "Inference", "Target", "functional", "linearised", "run"]
