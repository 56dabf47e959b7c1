"""Inference by any engine, under any prior: one whitened log-joint, and engines of one fixed shape that take it."""

from bnnp.inference import ensemble, sghmc, sgld, swag
from bnnp.inference.engine import Build, Draws, Engine, Inference, run
from bnnp.inference.functional import Functional, functional
from bnnp.inference.target import Target

__all__ = ["ENGINES", "Draws", "Engine", "Functional", "Inference", "Target", "functional", "run"]

ENGINES: dict[str, Build] = {
    "ensemble": ensemble.build,
    "sghmc": sghmc.build,
    "sgld": sgld.build,
    "swag": swag.build,
}
"""What `run` may be given, by name."""
