"""Inference by any engine, under any prior: one whitened log-joint, and engines of one fixed shape that take it."""

from bnnp.inference.engine import Build, Draws, Engine
from bnnp.inference.functional import Functional, functional
from bnnp.inference.linearised import linearised
from bnnp.inference.running import ENGINES, Inference, run
from bnnp.inference.target import Target

__all__ = ["ENGINES", "Build", "Draws", "Engine", "Functional", "Inference", "Target", "functional", "linearised", "run"]
