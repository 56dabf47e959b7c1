"""SGHMC: Langevin dynamics with momentum along gradients of batches, without a test of acceptance.

With momentum p and friction c, a step of size h is

    p <- p + h g,   eps <- eps + h p / 2,   p <- a p + sqrt(1 - a^2) z  with a = exp(-c h),   eps <- eps + h p / 2,

g an unbiased estimate of the gradient of log p(y, eps). Chen, Fox and Guestrin wrote the method with steps of Euler's; this order of the
same parts (Leimkuhler and Matthews) costs as much, and where the log-joint is quadratic its draws have the posterior's covariance at every
stable h, not only at small ones. What noise of batches adds remains, in proportion to h / c times its covariance: the report's
"temperature" shows it. Memory lasts about sqrt(curvature) / rate steps along the prior's own directions.

The library posteriors has Euler's form, in which a step of size h widens a direction of curvature P by a share of about h P / c, and this
one as `baoa`, for one chain of one problem. Here all chains of all tasks go at once, with a step size for each task: a step of 4 chains of
16 tasks takes the time of about six of theirs, in place of 64 (hidden widths (48, 48), 30 points, one core).

References:
    Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox and Guestrin, 2014), section 3.
    Rational construction of stochastic numerical methods for molecular sampling (Leimkuhler and Matthews, 2013), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bnnp.inference.ascent import check_share, check_start, normal
from bnnp.inference.engine import Draws, Engine
from bnnp.inference.stochastic import Chains, Plan, check_plan, climbed, drawn, evaluated, opened, step_of, summary
from bnnp.inference.target import Target
from bnnp.likelihoods.base import check_positive

__all__ = ["State", "build", "init", "report", "sample", "update"]


@dataclass(frozen=True, eq=False)
class State:
    """Hold chains on their way.

    Arguments:
        chains: where they are.
        momentum: with shape (C, T, dim).
    """

    chains: Chains
    momentum: Tensor

    @property
    def gradients(self) -> int:
        """Return the number of gradients computed for each task."""
        return self.chains.gradients


def build(
    target: Target,
    *,
    num_chains: int = 4,
    climb: int | None = None,
    climb_rate: float = 0.05,
    warmup: int = 1000,
    steps: int = 4000,
    thin: int = 10,
    batch_size: int | None = None,
    rate: float = 0.5,
    friction: float = 2.0,
    schedule: str = "constant",
    start: Tensor | None = None,
) -> Engine:
    """Return the engine.

    Arguments:
        target: what to work on.
        num_chains: number of chains of each task.
        climb: steps of Adam on the way up; None for 500, or 0 where a start is given.
        climb_rate: of Adam at first; it falls to zero along a cosine.
        warmup: steps whose draws are left out.
        steps: steps behind them.
        thin: one draw is kept of so many steps.
        batch_size: points in a batch; None for all.
        rate: h times the square root of the largest curvature; steps are unstable from 2.
        friction: c. At 2 the prior's own directions, of curvature 1, forget fastest; more is steadier with small batches.
        schedule: "constant", or "cosine", with which steps are twice as large at first, as far as stable, and fall to h during the warm-up.
        start: draws of eps to start from, with shape (n, T, dim); draws of the prior where not given.

    Raises:
        ValueError: settings out of range.

    References:
        See the module.

    Example:
        >>> from bnnp import BNNP, inference
        >>> F = inference.functional(BNNP(1, 1, hidden=(4,)), [[0.0], [1.0]], [[0.1], [0.2]])
        >>> inference.run(F, build, climb=20, warmup=10, steps=40, num_samples=3).posterior.predict([[0.5]]).mean.shape
        torch.Size([1, 1])
    """
    start = check_start(target, start)
    rate = check_share(rate, "rate", 2.0)
    plan = check_plan(
        target,
        num_chains=num_chains,
        climb=climb,
        climb_rate=climb_rate,
        warmup=warmup,
        steps=steps,
        thin=thin,
        batch_size=batch_size,
        schedule=schedule,
        boost=min(2.0, 1.8 / rate),
        start=start,
    )
    return Engine(
        "sghmc",
        target,
        plan.num_updates,
        partial(init, target=target, plan=plan, start=start),
        partial(update, target=target, plan=plan, rate=rate, friction=check_positive(friction, "friction")),
        sample,
        partial(report, target=target, rate=rate),
    )


def init(seed: int, *, target: Target, plan: Plan, start: Tensor | None) -> State:
    """Return chains at their starts, with momenta drawn."""
    chains = opened(target, plan, start, seed, "sghmc")
    return State(chains, normal(chains.safe, chains.generator))


def update(state: State, *, target: Target, plan: Plan, rate: float, friction: float) -> State:
    """Make one step: of Adam on the way up, of Langevin dynamics with momentum behind it."""
    if state.chains.step < plan.climb:
        return State(climbed(target, state.chains, plan), state.momentum)
    lost = state.chains.lost
    chains, gradient = evaluated(target, state.chains, plan)
    assert chains.limit is not None
    h = (step_of(chains, plan) * rate / chains.limit.sqrt()).unsqueeze(-1)
    momentum = state.momentum + h * gradient
    if bool((chains.lost > lost).any()):
        # A chain that was put back sets out afresh: with its old momentum it would leave again.
        stuck = (gradient == 0).all(-1, keepdim=True)
        momentum = torch.where(stuck, normal(momentum, chains.generator), momentum)
    keep = (-friction * h).exp()
    half = chains.safe + 0.5 * h * momentum
    momentum = keep * momentum + (1 - keep.square()).sqrt() * normal(momentum, chains.generator)
    return State(replace(chains, ascent=replace(chains.ascent, eps=half + 0.5 * h * momentum)), momentum)


def sample(state: State, n: int, seed: int) -> Draws:
    """Return n of the draws kept, spread evenly over all chains."""
    return drawn(state.chains, n, seed, "sghmc sample")


def report(state: State, *, target: Target, rate: float) -> dict[str, Tensor]:
    """Return the step size h, and how far the draws can be trusted; see `bnnp.inference.stochastic.summary`."""
    size = {} if state.chains.limit is None else {"step_size": rate / state.chains.limit.sqrt()}
    return {**summary(target, state.chains), **size}
