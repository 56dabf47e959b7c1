"""What the variational engines share: the ascent of Adam as pure data, averages of late iterates, and bounds from log weights.

A state of an engine is plain tensors, so that it can be saved and resumed. Hence an optimiser whose memory is two more copies of the
parameters. All parameters have the tasks as first axis and Adam works element by element, so the tasks of a batch know nothing of each
other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnnp.importance import log_mean_exp, psis
from bnnp.inference.target import Target
from bnnp.seeds import check_count

__all__ = ["CHUNK", "REPORTED", "Ascent", "Schedule", "bounds", "chunked", "copied", "likeliest"]

BETA_1, BETA_2, TINY = 0.9, 0.999, 1e-8
REPORTED = 1000
"""How many fresh draws a reported bound is made of."""
CHUNK = 128
"""How many draws are taken through the network at once."""


@dataclass(frozen=True)
class Schedule:
    """Hold the learning rates of so many steps, falling on a line, and the share of the last steps whose parameters are averaged.

    Arguments:
        steps: how many steps there are.
        learning_rate: of the first step.
        final_learning_rate: of the last.
        averaged: share of the steps, the last ones, over which parameters are averaged; 0 takes the last parameters.

    Raises:
        ValueError: a number out of range.
    """

    steps: int
    learning_rate: float
    final_learning_rate: float
    averaged: float = 0.2

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_count(self.steps, "steps")
        for name in ("learning_rate", "final_learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"Expected {name} as a positive number. Got {value}.")
        if not 0 <= self.averaged < 1:
            raise ValueError(f"Expected averaged from 0 to below 1, the share of the last steps. Got {self.averaged}.")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        done = min(step / max(self.steps - 1, 1), 1.0)
        return self.learning_rate + done * (self.final_learning_rate - self.learning_rate)

    def averages(self, step: int) -> bool:
        """Tell whether the parameters after a step, counted from 0, count in the average."""
        return step >= self.steps - round(self.averaged * self.steps)


@dataclass(frozen=True, eq=False)
class Ascent:
    """Hold parameters on their way up: Adam's moments, the average of late iterates, and how often a task stood still.

    Arguments:
        parameters: each with shape (T, ...).
        first: running means of the gradients.
        second: running means of their squares.
        average: mean of the parameters of the late steps.
        step: steps made.
        averaged: steps in the average.
        made: steps that each task made, with shape (T,).
        skipped: steps of each task whose gradient was not finite, with shape (T,).
    """

    parameters: tuple[Tensor, ...]
    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    average: tuple[Tensor, ...]
    step: int
    averaged: int
    made: Tensor
    skipped: Tensor

    @staticmethod
    def start(parameters: Sequence[Tensor]) -> Ascent:
        """Return the state before the first step."""
        at, zeros = tuple(p.detach() for p in parameters), tuple(torch.zeros_like(p) for p in parameters)
        none = torch.zeros(len(at[0]), dtype=torch.long, device=at[0].device)
        return Ascent(at, zeros, zeros, at, 0, 0, none, none)

    @property
    def best(self) -> tuple[Tensor, ...]:
        """Return the averaged parameters, or the last ones where nothing was averaged."""
        return self.average if self.averaged else self.parameters

    def ascended(self, gradients: Sequence[Tensor], schedule: Schedule, paces: Sequence[float] | None = None) -> Ascent:
        """Return the state after a step along these gradients; a task with a gradient that is not finite stays where it is.

        Arguments:
            gradients: by the parameters, of what is to grow.
            schedule: of the learning rate.
            paces: what each parameter's learning rate is multiplied by; 1 where not given.
        """
        paces = (1.0,) * len(self.parameters) if paces is None else paces
        fine = torch.stack([g.flatten(1).isfinite().all(1) for g in gradients]).all(0)
        made, rate = self.made + fine, schedule.rate(self.step)
        corrections = [(1 - beta ** made.clamp(min=1).double()).to(self.parameters[0]) for beta in (BETA_1, BETA_2)]
        parameters, first, second = [], [], []
        for p, g, a, b, pace in zip(self.parameters, gradients, self.first, self.second, paces, strict=True):
            here = fine.reshape(-1, *[1] * (p.ndim - 1))
            c_1, c_2 = (c.reshape(here.shape) for c in corrections)
            new_a, new_b = torch.lerp(g, a, BETA_1), torch.lerp(g.square(), b, BETA_2)
            moved = torch.addcdiv(p, new_a, (new_b / c_2).sqrt_().add_(TINY).mul_(c_1 / (pace * rate)))
            if not bool(fine.all()):
                moved, new_a, new_b = torch.where(here, moved, p), torch.where(here, new_a, a), torch.where(here, new_b, b)
            parameters.append(moved)
            first.append(new_a)
            second.append(new_b)
        average, averaged = tuple(parameters), 0
        if schedule.averages(self.step):
            averaged = self.averaged + 1
            average = tuple(torch.lerp(old, new, 1 / averaged) for old, new in zip(self.average, parameters, strict=True))
        return Ascent(tuple(parameters), tuple(first), tuple(second), average, self.step + 1, averaged, made, self.skipped + ~fine)


def copied(generator: torch.Generator) -> torch.Generator:
    """Return a generator in the same state: a state of an engine that has been updated stays what it was."""
    copy = torch.Generator()
    copy.set_state(generator.get_state())
    return copy


def likeliest(target: Target, eps: Tensor) -> Tensor:
    """Return of each task the one of n draws (n, T, D), on the CPU, with the highest likelihood, with shape (T, D)."""
    with torch.no_grad():
        found = [target.log_likelihood(few.to(target.device)) for few in eps.split(CHUNK)]
    at = torch.cat(found).nan_to_num(nan=-math.inf).argmax(0).cpu()
    return eps[at, torch.arange(eps.shape[1])]


def chunked(n: int, draw: Callable[[int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return n draws, asked for in chunks that fit in memory, joined along the first axis."""
    found = [draw(min(CHUNK, n - i)) for i in range(0, n, CHUNK)]
    return tuple(torch.cat(pieces) for pieces in zip(*found, strict=True))


def bounds(log_weights: Tensor) -> dict[str, Tensor]:
    """Return what log weights log p(y, eps) - log q(eps) of draws from q say: the bound, the evidence, and how far to trust it.

    Draws whose density is not finite count as impossible: in the evidence with weight zero, in the bound as minus infinity.

    Arguments:
        log_weights: with shape (S, T).

    Returns:
        "elbo", "elbo_se", "log_evidence", "log_evidence_se" and "pareto_k", each with shape (T,).
    """
    log_weights = torch.where(log_weights.isfinite(), log_weights, -math.inf)
    evidence, error = log_mean_exp(log_weights)
    found = {"elbo": log_weights.mean(0), "elbo_se": log_weights.std(0) / math.sqrt(len(log_weights))}
    return found | {"log_evidence": evidence, "log_evidence_se": error, "pareto_k": psis(log_weights)[1]}
