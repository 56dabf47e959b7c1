"""The settings of meta-training, checked once."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

from bnnp.objectives import OBJECTIVES
from bnnp.seeds import check_count

__all__ = ["Settings", "context_range"]


@dataclass(frozen=True)
class Settings:
    """Hold the settings of a run; a resumed run must have the same."""

    objective: str
    beta: float
    steps: int
    batch_size: int
    num_samples: int
    learning_rate: float
    final_learning_rate: float
    context: tuple[float, float] | tuple[int, int]
    prior_mean_from_step: int
    prior_scale_from_step: int
    clip_norm: float | None
    per_point: bool
    seed: int
    validate_every: int
    log_every: int
    context_batch_size: int | None = None
    target_batch_size: int | None = None
    gradient: str = "exact"
    shrinkage: float = 0.0
    max_points: int | None = None
    data: str = ""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"Expected objective among {', '.join(sorted(OBJECTIVES))}. Got {self.objective!r}.")
        for name in ("steps", "batch_size", "num_samples", "validate_every", "log_every"):
            check_count(getattr(self, name), name)
        for name in ("learning_rate", "final_learning_rate", "beta", "clip_norm"):
            value = getattr(self, name)
            if name == "clip_norm" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
                raise ValueError(f"Expected {name} to be positive and finite. Got {value!r}.")
        tau = self.shrinkage
        if isinstance(tau, bool) or not isinstance(tau, int | float) or not (math.isfinite(tau) and tau >= 0):
            raise ValueError(f"Expected shrinkage in nats, 0 or more, and finite. Got {tau!r}.")
        for name in ("prior_mean_from_step", "prior_scale_from_step"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"Expected {name} as a step, 0 or later. Got {value!r}.")
        for name in ("context_batch_size", "target_batch_size"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name)
        if self.max_points is not None and check_count(self.max_points, "max_points") < 2:
            raise ValueError("Expected max_points of at least 2, one for the context and one for the target. Got 1.")
        if self.gradient not in ("exact", "one_batch"):
            raise ValueError(f"Expected gradient as 'exact' or 'one_batch'. Got {self.gradient!r}.")
        if self.gradient == "one_batch" and self.context_batch_size is None and self.target_batch_size is None:
            raise ValueError("Expected context_batch_size or target_batch_size with gradient='one_batch'. Got none: there are no batches.")
        low, high = self.context
        counts = isinstance(low, int) and isinstance(high, int)
        if not (0 < low <= high) or (not counts and not high < 1):
            raise ValueError(
                "Expected context as a range of proportions such as (0.1, 0.6), each between 0 and 1, or of counts such as "
                f"(3, 30), low to high. Got {self.context!r}."
            )

    def most_context(self, points: int) -> int:
        """Return the largest context that a task of so many points can have."""
        high, points = self.context[1], points if self.max_points is None else min(points, self.max_points)
        return min(high if isinstance(high, int) else round(high * points), points - 1)

    @property
    def options(self) -> dict[str, Any]:
        """Return what the objective is called with, beside model, tasks, samples and generator."""
        beta = {"beta": self.beta} if self.objective in ("avi", "pp_avi") else {}
        return {**beta, **self.sizes, "gradient": self.gradient}

    @property
    def sizes(self) -> dict[str, Any]:
        """Return the sizes of batches of points."""
        return {"context_batch_size": self.context_batch_size, "target_batch_size": self.target_batch_size}

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: linear from the first to the last."""
        done = step / max(self.steps - 1, 1)
        return self.learning_rate + done * (self.final_learning_rate - self.learning_rate)


def context_range(context: Any) -> tuple[float, float] | tuple[int, int]:
    """Return a range of proportions or of counts.

    Raises:
        ValueError: it is something else.
    """
    try:
        low, high = context
        return (operator.index(low), operator.index(high)) if hasattr(low, "__index__") else (float(low), float(high))
    except (TypeError, ValueError):
        raise ValueError(f"Expected context as a range (low, high) of proportions or of counts. Got {context!r}.") from None
