"""Deep ensembles: several networks, each at a mode of its own.

When: the plain answer where a posterior has several modes and its width in each matters less. Plain members have no width at all: their
spread is that of the modes, no posterior standard deviation, and nil where they all find one function, which a network with N(0, I) on its
eps often has (ten of hidden widths (20, 20) with 20 points agreed to three digits where HMC had a spread of 0.05). `anchored=True` gives
the spread its meaning: each member has a draw of the prior in place of the prior's mean, and targets perturbed by a draw of the noise. Its
modes are then draws of the posterior where the network is linear, exactly, and approximately where it is not (0.05 in that example).

Cost: `steps` gradients a member.

References:
    Simple and scalable predictive uncertainty estimation using deep ensembles (Lakshminarayanan, Pritzel and Blundell, 2017).
    Uncertainty in neural networks: approximately Bayesian ensembling (Pearce, Leibfried and Brintrup, 2020), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bnnp.inference.ascent import Ascent, ascend, begin, check_batch_size, check_start, cosine, gradient_at, normal
from bnnp.inference.engine import Draws, Engine, picked
from bnnp.inference.functional import Functional
from bnnp.inference.target import Target
from bnnp.likelihoods.base import check_positive
from bnnp.seeds import check_count, seeded

__all__ = ["State", "build", "init", "report", "sample", "update"]


@dataclass(frozen=True, eq=False)
class State:
    """Hold an ensemble on its way.

    Arguments:
        ascent: the members.
        anchors: of each member, a draw of the prior with shape (M, T, dim), where anchored.
        targets: of each member, outputs with noise on top, in the network's units with shape (M, T, N, d_y), where anchored.
        gradients: gradients computed for each task.
        generator: of all randomness.
    """

    ascent: Ascent
    anchors: Tensor | None
    targets: Tensor | None
    gradients: int
    generator: torch.Generator


def build(
    target: Target,
    *,
    members: int = 10,
    steps: int = 1500,
    learning_rate: float = 0.05,
    batch_size: int | None = None,
    anchored: bool = False,
    start: Tensor | None = None,
) -> Engine:
    """Return the engine.

    Arguments:
        target: what to work on; a `Functional` where anchored.
        members: number of networks.
        steps: of Adam.
        learning_rate: of Adam at first; it falls to zero along a cosine.
        batch_size: points in a batch; None for all.
        anchored: perturb prior and targets of each member, for Gaussian likelihoods.
        start: draws of eps to start from, with shape (n, T, dim); draws of the prior where not given.

    Raises:
        ValueError: settings out of range, or `anchored` without Gaussian noise.
        TypeError: `anchored` where the target is no network.

    References:
        See the module.

    Example:
        >>> from bnnp import BNNP, inference
        >>> F = inference.functional(BNNP(1, 1, hidden=(4,)), [[0.0], [1.0]], [[0.1], [0.2]])
        >>> inference.run(F, build, members=3, steps=20, num_samples=3).posterior.predict([[0.5]]).mean.shape
        torch.Size([1, 1])
    """
    if anchored:
        if not isinstance(target, Functional):
            raise TypeError(f"Expected a functional for anchored=True, which perturbs its data. Got {type(target).__name__}.")
        if not target.likelihood.conjugate or target.collapse or batch_size is not None:
            raise ValueError(
                "Expected a Gaussian likelihood, collapse=False and batch_size=None for anchored=True. "
                f"Got {type(target.likelihood).__name__}, collapse={target.collapse}, batch_size={batch_size}."
            )
    start = check_start(target, start)
    check_count(members, "members")
    check_count(steps, "steps")
    check_positive(learning_rate, "learning_rate")
    size = check_batch_size(target, batch_size)
    return Engine(
        "ensemble",
        target,
        steps,
        partial(init, target=target, members=members, anchored=anchored, start=start),
        partial(update, target=target, batch_size=size, steps=steps, learning_rate=learning_rate),
        partial(sample, target=target),
        partial(report, target=target),
    )


def init(seed: int, *, target: Target, members: int, anchored: bool, start: Tensor | None) -> State:
    """Return members at their starts, with anchors and targets of their own where asked for."""
    generator = seeded(seed, "ensemble")
    ascent = begin(target, members, start, generator)
    if not anchored:
        return State(ascent, None, None, 0, generator)
    assert isinstance(target, Functional)
    y = target.scaled.y
    # A likelihood gives all tasks the same noise; as draws of one task each has its own.
    each = y.expand(members, *y.shape).flatten(0, 1).unsqueeze(1)
    targets = target.likelihood.sample(each, generator).reshape(members, *y.shape)
    return State(ascent, normal(ascent.eps, generator), targets, 0, generator)


def _anchored_gradient(target: Functional, eps: Tensor, anchors: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of log N(eps; anchor, I) + log p(targets | eps)."""
    with torch.enable_grad():
        at = eps.detach().requires_grad_()
        fit = target.likelihood.log_prob(target.outputs(at), targets, target.scaled.observed).sum()
        (gradient,) = torch.autograd.grad(fit, at)
    return gradient - (eps - anchors)


def update(state: State, *, target: Target, batch_size: int | None, steps: int, learning_rate: float) -> State:
    """Make one step of Adam."""
    eps = state.ascent.eps
    if state.anchors is None or state.targets is None:
        gradient = gradient_at(target, eps, batch_size, state.generator)
    else:
        assert isinstance(target, Functional)
        gradient = _anchored_gradient(target, eps, state.anchors, state.targets)
    ascent = ascend(state.ascent, gradient, learning_rate * cosine(state.ascent.step, steps))
    return replace(state, ascent=ascent, gradients=state.gradients + len(eps))


def sample(state: State, n: int, seed: int, *, target: Target) -> Draws:
    """Return n draws: each member as often as the others, but for one."""
    return Draws(picked(state.ascent.eps, n, seeded(seed, "ensemble sample")))


def report(state: State, *, target: Target) -> dict[str, Tensor]:
    """Return the log-joint that the best and the worst member reached."""
    with torch.no_grad():
        reached = target.log_joint(state.ascent.eps)
    return {"log_joint": reached.amax(0), "log_joint_worst": reached.amin(0)}
