"""SGLD: Langevin steps along gradients of batches, without a test of acceptance.

A step of size h goes to eps + h g + sqrt(2 h) z, g an unbiased estimate of the gradient of log p(y, eps). Where that is quadratic with
precision P, and batches give g a noise of covariance C, draws have the covariance S with S = (I - h P) S (I - h P) + 2 h I + h^2 C: with
all points (P - h P^2 / 2)^{-1}, too wide by a share of h P / 2 in each direction. So the bias is set by `rate`, h times the largest
curvature; and along the prior's own directions, of curvature 1, memory lasts curvature / rate steps. With little noise in the data that is
long: look at R-hat, and prefer `sghmc`, whose memory is the square root of that, with no such bias.

The library posteriors has the same update for one chain of one problem. Here all chains of all tasks go at once, with a step size for each
task: a step of 4 chains of 16 tasks takes the time of about six of theirs, in place of 64 (hidden widths (48, 48), 30 points, one core).

References:
    Bayesian learning via stochastic gradient Langevin dynamics (Welling and Teh, 2011), equation 4; h here is half of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from bnnp.inference.ascent import check_share, check_start, normal
from bnnp.inference.engine import Draws, Engine
from bnnp.inference.stochastic import Chains, Plan, check_plan, climbed, drawn, evaluated, opened, step_of, summary
from bnnp.inference.target import Target

__all__ = ["State", "build", "init", "report", "sample", "update"]


@dataclass(frozen=True, eq=False)
class State:
    """Hold chains on their way."""

    chains: Chains

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
    rate: float = 0.1,
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
        rate: h times the largest curvature; steps are unstable from 2.
        schedule: "constant", or "cosine", with which steps are four times as large at first, as far as stable, and fall to h during the
            warm-up.
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
        boost=min(4.0, 1.8 / rate),
        start=start,
    )
    return Engine(
        "sgld",
        target,
        plan.num_updates,
        partial(init, target=target, plan=plan, start=start),
        partial(update, target=target, plan=plan, rate=rate),
        sample,
        partial(report, target=target, rate=rate),
    )


def init(seed: int, *, target: Target, plan: Plan, start: Tensor | None) -> State:
    """Return chains at their starts."""
    return State(opened(target, plan, start, seed, "sgld"))


def update(state: State, *, target: Target, plan: Plan, rate: float) -> State:
    """Make one step: of Adam on the way up, of Langevin dynamics behind it."""
    if state.chains.step < plan.climb:
        return State(climbed(target, state.chains, plan))
    chains, gradient = evaluated(target, state.chains, plan)
    assert chains.limit is not None
    h = (step_of(chains, plan) * rate / chains.limit).unsqueeze(-1)
    eps = chains.safe + h * gradient + (2 * h).sqrt() * normal(gradient, chains.generator)
    return State(replace(chains, ascent=replace(chains.ascent, eps=eps)))


def sample(state: State, n: int, seed: int) -> Draws:
    """Return n of the draws kept, spread evenly over all chains."""
    return drawn(state.chains, n, seed, "sgld sample")


def report(state: State, *, target: Target, rate: float) -> dict[str, Tensor]:
    """Return the step size h, and how far the draws can be trusted; see `bnnp.inference.stochastic.summary`."""
    size = {} if state.chains.limit is None else {"step_size": rate / state.chains.limit}
    return {**summary(target, state.chains), **size}
