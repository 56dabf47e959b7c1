"""Inference by any engine, under any prior: one whitened log-joint, and engines of one fixed shape that take it."""

from bnnp.inference.engine import Draws, Engine, Inference, run
from bnnp.inference.functional import Functional, functional
from bnnp.inference.target import Target

__all__ = ["Draws", "Engine", "Functional", "Inference", "Target", "functional", "run"]
