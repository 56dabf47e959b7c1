"""One shape for every engine: build, then init, update, sample and report; see `bnnp.inference.running` for what goes through them.

An engine is a value of five functions over an immutable state, bound to its target and settings by `build` in the engine's own file. All of
them work on every task, and on all chains or samples of each, at once. What an engine gives is always the same: draws of eps, possibly
weighted, and numbers that say how far they can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnnp.inference.target import Target

__all__ = ["Build", "Draws", "Engine", "picked"]


@dataclass(frozen=True, eq=False)
class Draws:
    """Hold draws of eps.

    Arguments:
        eps: with shape (n, T, dim).
        log_weights: log importance weights with shape (n, T), not normalised; None where the draws are equally good.
    """

    eps: Tensor
    log_weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Engine:
    """Hold an engine bound to its target and settings.

    Arguments:
        name: what it is called in tables.
        target: what it works on, with a task axis.
        num_updates: how often `update` is to be called.
        init: from a seed to the first state.
        update: from a state to the next.
        sample: from a state, a number n and a seed to n draws.
        report: from a state to numbers with shape (T,): "rhat", "ess_bulk", "ess_tail", "acceptance", "divergences", "elbo",
            "log_evidence", "log_evidence_se", whichever the engine has.
        through: from a state to the functional through which its draws predict, where that is not the target.
    """

    name: str
    target: Target
    num_updates: int
    init: Callable[[int], Any]
    update: Callable[[Any], Any]
    sample: Callable[[Any, int, int], Draws]
    report: Callable[[Any], dict[str, Tensor]]
    through: Callable[[Any], Any] | None = None


Build = Callable[..., Engine]
"""What binds an engine to a target: `build(target, *, start=None, **settings)`."""


def picked(eps: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return n draws (n, T, dim) of kept ones (K, T, dim): spread evenly, in random order, and again from the first where K < n."""
    K = len(eps)
    at = (torch.arange(n) * K) // n if n <= K else torch.arange(n) % K
    return eps[at[torch.randperm(n, generator=generator)].to(eps.device)]
