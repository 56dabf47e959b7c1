"""Inference by any engine, under any prior: one whitened log-joint, and engines of one fixed shape that take it."""

from bnnp.inference.engine import Build, Draws, Engine, Inference, run
from bnnp.inference.functional import Functional, functional
from bnnp.inference.target import Target

ENGINES: dict[str, Build] = {}
"""The engines by name: what `build` of each file makes."""

__all__ = ["ENGINES", "Draws", "Engine", "Functional", "Inference", "Target", "functional", "run"]
