"""Inference by any engine, under any prior: one whitened log-joint, and engines of one fixed shape that take it."""

from bnnp.inference import hmc, mala, nuts
from bnnp.inference.engine import Build, Draws, Engine, Inference, run
from bnnp.inference.functional import Functional, functional
from bnnp.inference.target import Target

ENGINES: dict[str, Build] = {
    "hmc": hmc.build,
    "mala": mala.build,
    "nuts": nuts.build,
}
"""Every engine by its name."""

__all__ = ["ENGINES", "Draws", "Engine", "Functional", "Inference", "Target", "functional", "run"]
