"""SWAG: a Gaussian from the path of stochastic gradient descent around a mode.

From a mode, plain stochastic gradient steps at a constant rate wander about it. SWAG takes mean and variances of their iterates, and the
directions of the last few, for a Gaussian: covariance diag(variances) / 2 + D D^T / (2 (K - 1)).

What its spread is, and what not: where the log-joint is quadratic with precision P, and minibatches add noise of covariance C to its
gradient, iterates at rate h have the covariance S with S = (I - h P) S (I - h P) + h^2 C. It grows with the rate, falls with the size of
the batch, and is nil with all points. It is the posterior's P^{-1} only where C happens to be 2 P^{-1} / h or nearly so (Mandt, Hoffman and
Blei, 2017), so read it as a cheap spread in the right directions and not as a posterior standard deviation. The mean is that of the
posterior where that is Gaussian.

Cost: `climb` and `steps` gradients of a batch a member.

References:
    A simple baseline for Bayesian uncertainty in deep learning (Maddox, Garipov, Izmailov, Vetrov and Wilson, 2019), section 3.
    Stochastic gradient descent as approximate Bayesian inference (Mandt, Hoffman and Blei, 2017), section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bnnp.inference.ascent import (
    Ascent,
    ascend,
    begin,
    check_batch_size,
    check_share,
    check_start,
    cosine,
    gradient_at,
    normal,
    stiffness,
)
from bnnp.inference.engine import Draws, Engine
from bnnp.inference.target import Target
from bnnp.likelihoods.base import check_positive
from bnnp.seeds import check_count, seeded

__all__ = ["Settings", "State", "build", "init", "moments", "report", "sample", "update"]


@dataclass(frozen=True)
class Settings:
    """Hold the settings that `build` checked; see there."""

    members: int
    climb: int
    climb_rate: float
    steps: int
    every: int
    rank: int
    batch_size: int | None
    rate: float


@dataclass(frozen=True, eq=False)
class State:
    """Hold members on their way, and sums over the iterates collected.

    Arguments:
        ascent: the members' way up; its `eps` is where they are, later too.
        step_size: of the gradient steps with shape (T,), once known.
        total: sum of the iterates, with shape (M, T, dim).
        squares: sum of the squares of their distances from `centre`, with that shape.
        centre: where collecting began, so that squares lose no digits.
        count: number of iterates collected.
        last: the last of them, each with shape (M, T, dim).
        step: number of updates made.
        gradients: gradients computed for each task.
        generator: of all randomness.
    """

    ascent: Ascent
    step_size: Tensor | None
    total: Tensor
    squares: Tensor
    centre: Tensor
    count: int
    last: tuple[Tensor, ...]
    step: int
    gradients: int
    generator: torch.Generator


def build(
    target: Target,
    *,
    members: int = 1,
    climb: int = 1000,
    climb_rate: float = 0.05,
    steps: int = 1000,
    every: int = 10,
    rank: int = 20,
    batch_size: int | None = 8,
    rate: float = 0.5,
    start: Tensor | None = None,
) -> Engine:
    """Return the engine.

    Arguments:
        target: what to work on.
        members: number of modes, each with a Gaussian of its own; draws come from all of them alike.
        climb: steps of Adam on the way up.
        climb_rate: of Adam at first; it falls to zero along a cosine.
        steps: gradient steps at a constant rate behind it.
        every: an iterate is collected behind so many of them.
        rank: K, how many of the last iterates give directions.
        batch_size: points in a batch; None for all, with which nothing spreads.
        rate: of these steps, in units of 1 / the largest curvature at the mode; they are unstable from 2.
        start: draws of eps to start from, with shape (n, T, dim); draws of the prior where not given.

    Raises:
        ValueError: settings out of range.

    References:
        See the module.

    Example:
        >>> from bnnp import BNNP, inference
        >>> F = inference.functional(BNNP(1, 1, hidden=(4,)), [[0.0], [1.0]], [[0.1], [0.2]])
        >>> inference.run(F, build, climb=20, steps=20, batch_size=1, rank=2, num_samples=3).posterior.predict([[0.5]]).mean.shape
        torch.Size([1, 1])
    """
    settings = Settings(
        check_count(members, "members"),
        check_count(climb, "climb"),
        check_positive(climb_rate, "climb_rate"),
        check_count(steps, "steps"),
        check_count(every, "every"),
        check_count(rank, "rank"),
        check_batch_size(target, batch_size),
        check_share(rate, "rate", 2.0),
    )
    if rank < 2 or steps // every < rank:
        raise ValueError(f"Expected rank from 2 to steps // every = {steps // every}, the number of iterates collected. Got {rank}.")
    start = check_start(target, start)
    return Engine(
        "swag",
        target,
        climb + steps,
        partial(init, target=target, settings=settings, start=start),
        partial(update, target=target, settings=settings),
        sample,
        partial(report, target=target),
    )


def init(seed: int, *, target: Target, settings: Settings, start: Tensor | None) -> State:
    """Return members at their starts."""
    generator = seeded(seed, "swag")
    ascent = begin(target, settings.members, start, generator)
    nothing = torch.zeros_like(ascent.eps)
    return State(ascent, None, nothing, nothing, nothing, 0, (), 0, 0, generator)


def update(state: State, *, target: Target, settings: Settings) -> State:
    """Make one step: of Adam on the way up, of stochastic gradients at a constant rate behind it."""
    eps, members = state.ascent.eps, len(state.ascent.eps)
    if state.step < settings.climb:
        gradient = gradient_at(target, eps, settings.batch_size, state.generator)
        ascent = ascend(state.ascent, gradient, settings.climb_rate * cosine(state.step, settings.climb))
        return replace(state, ascent=ascent, step=state.step + 1, gradients=state.gradients + members)
    step_size, spent, centre = state.step_size, members, state.centre
    if step_size is None:
        # Along the way up the largest curvature is met only at its end.
        found, cost = stiffness(target, eps, state.generator)
        step_size, spent, centre = settings.rate / found, members * (1 + cost), eps
    gradient = gradient_at(target, eps, settings.batch_size, state.generator)
    fine = gradient.isfinite().all(-1, keepdim=True)
    # A member that has left what can be computed goes back to where it began.
    eps = torch.where(fine, eps + step_size.unsqueeze(-1) * gradient, centre)
    moved = replace(
        state,
        ascent=replace(state.ascent, eps=eps),
        step_size=step_size,
        centre=centre,
        step=state.step + 1,
        gradients=state.gradients + spent,
    )
    if (moved.step - settings.climb) % settings.every:
        return moved
    last = (*state.last, eps)[-settings.rank :]
    squares = state.squares + (eps - centre).square()
    return replace(moved, total=state.total + (eps - centre), squares=squares, count=state.count + 1, last=last)


def moments(state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Return the iterates' mean and variances (M, T, dim), and D (M, T, dim, K): the last iterates' distances from their mean.

    The covariance is diag(variances) / 2 + D D^T / (2 (K - 1)). The paper takes distances from the mean as it was at the time; with the
    mean of the same K iterates, D D^T / (K - 1) is their covariance.
    """
    if state.count < 2:
        raise ValueError(f"Expected a state that has collected two iterates or more. Got {state.count}. Call update more often.")
    shift = state.total / state.count
    variance = (state.squares - state.count * shift.square()).clamp(min=0) / (state.count - 1)
    last = torch.stack(state.last, -1)
    return state.centre + shift, variance, last - last.mean(-1, keepdim=True)


def sample(state: State, n: int, seed: int) -> Draws:
    """Return n draws of the Gaussians, from each member in turn."""
    generator = seeded(seed, "swag sample")
    mean, variance, D = moments(state)
    member = torch.arange(n) % len(mean)
    eps = mean[member] + (0.5 * variance[member]).sqrt() * normal(mean[member], generator)
    inner = normal(eps[..., :1].expand(*eps.shape[:-1], D.shape[-1]), generator) / math.sqrt(2 * (D.shape[-1] - 1))
    for m, own in enumerate(D):
        eps[m :: len(D)] += torch.einsum("tdk,ntk->ntd", own, inner[m :: len(D)])
    return Draws(eps)


def report(state: State, *, target: Target) -> dict[str, Tensor]:
    """Return the log-joint at the members' means, the best of them, and the rate of the gradient steps."""
    with torch.no_grad():
        reached = target.log_joint(moments(state)[0]).amax(0)
    size = torch.full_like(reached, math.nan) if state.step_size is None else state.step_size
    return {"log_joint": reached, "step_size": size}
