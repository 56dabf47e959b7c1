"""Inference by any engine, under any prior: one whitened log-joint, and engines of one fixed shape that take it."""

from functools import partial

from bnnp.inference import gaussian_vi
from bnnp.inference.engine import Build, Draws, Engine, Inference, run
from bnnp.inference.functional import Functional, functional
from bnnp.inference.target import Target

__all__ = ["ENGINES", "Draws", "Engine", "Functional", "Inference", "Target", "functional", "run"]

ENGINES: dict[str, Build] = {
    "mean_field": gaussian_vi.build,
    "per_unit_vi": partial(gaussian_vi.build, structure="per_unit"),
    "per_layer_vi": partial(gaussian_vi.build, structure="per_layer"),
    "full_vi": partial(gaussian_vi.build, structure="full"),
}
"""The engines by name, as `run` and comparisons take them."""
