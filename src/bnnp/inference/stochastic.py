"""What chains driven by stochastic gradients share: the way up, a step size that is stable, batches, what is kept, and what is reported.

Gradients of a batch of b of N points are those of log p(eps) + (N / b) log p(y_batch | eps), which are unbiased; the factor is the
target's own affair (`Target.log_joint`). No step is ever rejected, so the step size decides the bias. It is set in units of the largest
curvature that is met at the end of the way up.

References:
    Bayesian learning via stochastic gradient Langevin dynamics (Welling and Teh, 2011).
    Cyclical stochastic gradient MCMC for Bayesian deep learning (Zhang, Li, Zhang, Chen and Wilson, 2020): steps along a cosine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnnp.inference.ascent import Ascent, ascend, begin, check_batch_size, cosine, gradient_at, stiffness
from bnnp.inference.diagnostics import mixing
from bnnp.inference.engine import Draws, picked
from bnnp.inference.target import Target
from bnnp.likelihoods.base import check_positive
from bnnp.seeds import check_count, seeded

__all__ = ["Chains", "Plan", "check_plan", "climbed", "drawn", "evaluated", "opened", "step_of", "summary"]

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Plan:
    """Hold the settings that engines share; see their `build`."""

    num_chains: int
    climb: int
    climb_rate: float
    warmup: int
    steps: int
    thin: int
    batch_size: int | None
    schedule: str
    boost: float

    @property
    def num_updates(self) -> int:
        """Return the number of updates of a whole run."""
        return self.climb + self.warmup + self.steps


@dataclass(frozen=True, eq=False)
class Chains:
    """Hold chains on their way.

    Arguments:
        ascent: the way up of each chain; its `eps`, with shape (C, T, dim), is where the chain is, later too.
        safe: the last points whose gradient was finite, with that shape.
        limit: the largest curvature at the end of the way up, with shape (T,), once known.
        centre: where the way up ended, with shape (C, T, dim).
        kept: draws kept so far, each with shape (C, T, dim).
        heat: sum of -(eps - centre) . gradient / dim over chains and kept steps, with shape (T,).
        lost: how often a chain left what can be computed, with shape (T,).
        step: number of updates made.
        gradients: gradients computed for each task.
        generator: of all randomness.
    """

    ascent: Ascent
    safe: Tensor
    limit: Tensor | None
    centre: Tensor
    kept: tuple[Tensor, ...]
    heat: Tensor
    lost: Tensor
    step: int
    gradients: int
    generator: torch.Generator


def check_plan(
    target: Target,
    *,
    num_chains: int,
    climb: int | None,
    climb_rate: float,
    warmup: int,
    steps: int,
    thin: int,
    batch_size: int | None,
    schedule: str,
    boost: float,
    start: Tensor | None,
) -> Plan:
    """Check the settings that engines share.

    Raises:
        ValueError: settings out of range.
    """
    if climb is None:
        climb = 0 if start is not None else 500
    for name, value in (("climb", climb), ("warmup", warmup)):
        if value != 0:
            check_count(value, name)
    if check_count(steps, "steps") // check_count(thin, "thin") < 4:
        raise ValueError(f"Expected steps of at least 4 times thin, for draws to compare. Got steps={steps}, thin={thin}.")
    if schedule not in SCHEDULES:
        raise ValueError(f"Expected schedule as one of {', '.join(SCHEDULES)}. Got {schedule!r}.")
    rate, size = check_positive(climb_rate, "climb_rate"), check_batch_size(target, batch_size)
    return Plan(check_count(num_chains, "num_chains"), climb, rate, warmup, steps, thin, size, schedule, boost)


def opened(target: Target, plan: Plan, start: Tensor | None, seed: int, name: str) -> Chains:
    """Return chains at their starts."""
    generator = seeded(seed, name)
    ascent = begin(target, plan.num_chains, start, generator)
    nothing = torch.zeros(target.num_tasks, dtype=target.dtype, device=target.device)
    return Chains(ascent, ascent.eps, None, ascent.eps, (), nothing, nothing, 0, 0, generator)


def climbed(target: Target, chains: Chains, plan: Plan) -> Chains:
    """Make one step of Adam on the way up."""
    gradient = gradient_at(target, chains.ascent.eps, plan.batch_size, chains.generator)
    ascent = ascend(chains.ascent, gradient, plan.climb_rate * cosine(chains.step, plan.climb))
    return replace(chains, ascent=ascent, safe=ascent.eps, step=chains.step + 1, gradients=chains.gradients + len(gradient))


def evaluated(target: Target, chains: Chains, plan: Plan) -> tuple[Chains, Tensor]:
    """Return the gradient where the chains are, and chains that have taken note of it.

    A chain whose gradient is not finite is put back to its last point that had one, with a gradient of zero: `safe` is where to go from.
    """
    eps, spent = chains.ascent.eps, plan.num_chains
    limit, centre = chains.limit, chains.centre
    if limit is None:
        centre = eps
        limit, cost = stiffness(target, eps, chains.generator)
        spent *= 1 + cost
    gradient = gradient_at(target, eps, plan.batch_size, chains.generator)
    fine = gradient.isfinite().all(-1)
    safe = torch.where(fine.unsqueeze(-1), eps, chains.safe)
    gradient = torch.where(fine.unsqueeze(-1), gradient, torch.zeros_like(gradient))
    kept, heat, walked = chains.kept, chains.heat, chains.step - plan.climb - plan.warmup
    if walked >= 0 and walked % plan.thin == plan.thin - 1:
        kept, heat = (*kept, safe), heat - ((safe - centre) * gradient).sum(-1).mean(0) / target.dim
    found = replace(
        chains,
        ascent=replace(chains.ascent, eps=safe),
        safe=safe,
        limit=limit,
        centre=centre,
        kept=kept,
        heat=heat,
        lost=chains.lost + (~fine).sum(0).to(chains.lost),
        step=chains.step + 1,
        gradients=chains.gradients + spent,
    )
    return found, gradient


def step_of(chains: Chains, plan: Plan) -> float:
    """Return by what the step size is multiplied now: 1, or with "cosine" from `boost` at the beginning of the warm-up to 1 at its end."""
    walked = chains.step - 1 - plan.climb
    if plan.schedule == "constant" or walked >= plan.warmup:
        return 1.0
    return 1.0 + (plan.boost - 1.0) * cosine(walked, plan.warmup)


def drawn(chains: Chains, n: int, seed: int, name: str) -> Draws:
    """Return n of the draws kept, spread evenly over all chains."""
    if not chains.kept:
        raise ValueError("Expected a state that has kept draws. Got one still on its way. Call update more often.")
    # Chain after chain, so that even thinning takes from every one.
    eps = torch.stack(chains.kept, dim=1).flatten(0, 1)
    return Draws(picked(eps, n, seeded(seed, name)))


def summary(target: Target, chains: Chains) -> dict[str, Tensor]:
    """Return how far the draws can be trusted, each with shape (T,).

    R-hat and effective sample sizes are the worst over what the target monitors; NaN after fewer than four draws. Chains share their
    batches, so with small ones R-hat flatters.
    "temperature" is the mean of -(eps - c) . gradient / dim, c any fixed point: 1 for draws of the posterior, by integration by parts.
    Above 1, steps too large or batches too small have heated the chain; far from 1 on either side, it has not mixed. "divergences" counts
    what left the range of numbers.
    """
    with torch.no_grad():
        watched = mixing([target.monitor(eps) for eps in chains.kept], chains.heat)
    return {**watched, "temperature": chains.heat / max(len(chains.kept), 1), "divergences": chains.lost}
