"""What Markov chains share: the leapfrog step, and the warm-up that finds a step size and a diagonal mass.

Everything is batched over chains and tasks, eps (C, T, dim). Step size and mass are a task's own and pooled over its chains: these see one
posterior, and together they learn its scales in a quarter of the time. A point where the density or its gradient is not finite has density
zero: no chain ever goes there, and one that starts there leaves as soon as it can.

References:
    The No-U-Turn sampler: adaptively setting path lengths in Hamiltonian Monte Carlo (Hoffman and Gelman, 2014), section 3.2.
    Stan reference manual, "HMC algorithm parameters": the schedule of the warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnnp.inference.target import Target

__all__ = [
    "BEYOND",
    "DualAveraging",
    "Moments",
    "Point",
    "accepted",
    "first_step",
    "gain",
    "kinetic",
    "leapfrog",
    "log_uniform",
    "momentum",
    "schedule",
    "value_and_grad",
]

BEYOND = 1000.0
"""An energy error from which a trajectory counts as divergent, as in Stan."""


@dataclass(frozen=True, eq=False)
class Point:
    """Hold where chains are: eps (C, T, dim), momentum, log-joint (C, T), gradient."""

    eps: Tensor
    momentum: Tensor
    value: Tensor
    gradient: Tensor

    def where(self, mask: Tensor, other: Point) -> Point:
        """Return this point in the lanes of a mask (C, T), the other elsewhere."""
        wide = mask.unsqueeze(-1)
        return Point(
            torch.where(wide, self.eps, other.eps),
            torch.where(wide, self.momentum, other.momentum),
            torch.where(mask, self.value, other.value),
            torch.where(wide, self.gradient, other.gradient),
        )


def value_and_grad(target: Target, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-joint, -inf where it cannot be computed, and its gradient, zero there."""
    value, gradient = target.value_and_grad(eps)
    finite = value.isfinite() & gradient.isfinite().all(-1)
    return torch.where(finite, value, -torch.inf), torch.where(finite.unsqueeze(-1), gradient, 0.0)


def kinetic(momentum: Tensor, inverse_mass: Tensor) -> Tensor:
    """Return 1/2 p^T M^{-1} p with shape (C, T)."""
    return 0.5 * (momentum.square() * inverse_mass).sum(-1)


def momentum(like: Tensor, inverse_mass: Tensor, generator: torch.Generator) -> Tensor:
    """Return p ~ N(0, M) with the shape of eps."""
    noise = torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
    return noise / inverse_mass.sqrt()


def log_uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return log u, u uniform on (0, 1), one for each chain and task."""
    return torch.rand(like.shape, generator=generator, dtype=like.dtype).to(like.device).log()


def leapfrog(target: Target, at: Point, step: Tensor, inverse_mass: Tensor) -> Point:
    """Take one leapfrog step: half a kick, a drift, half a kick. It is reversible and keeps volume.

    Arguments:
        target: what gives the force.
        at: where the chains are.
        step: step sizes that broadcast to (C, T); negative ones go back.
        inverse_mass: with shape (T, dim).
    """
    wide = step.unsqueeze(-1)
    half = at.momentum + 0.5 * wide * at.gradient
    eps = at.eps + wide * inverse_mass * half
    value, gradient = value_and_grad(target, eps)
    return Point(eps, half + 0.5 * wide * gradient, value, gradient)


def gain(before: Tensor, after: Tensor) -> Tensor:
    """Return the log-density gained between two energies; -inf where the second is not finite, large where only the first is."""
    return (before - after).nan_to_num(nan=-torch.inf, posinf=BEYOND, neginf=-torch.inf)


def accepted(gained: Tensor, generator: torch.Generator) -> Tensor:
    """Return which lanes (C, T) accept, with probability min(1, exp(gained))."""
    return log_uniform(gained, generator) < gained


@dataclass(frozen=True, eq=False)
class DualAveraging:
    """Adapt log step sizes (T,) so that the mean acceptance becomes the target: Hoffman and Gelman's dual averaging.

    Arguments:
        log_step: what is tried now.
        log_average: what is kept in the end.
        error: mean shortfall of acceptance.
        centre: what log_step is drawn to: larger than it, since large steps are cheap.
        count: number of updates.
    """

    log_step: Tensor
    log_average: Tensor
    error: Tensor
    centre: Tensor
    count: int

    @classmethod
    def start(cls, log_step: Tensor) -> DualAveraging:
        """Return the state that begins at a step size."""
        return cls(log_step, log_step, torch.zeros_like(log_step), log_step + math.log(10.0), 0)

    def update(self, acceptance: Tensor, target: float) -> DualAveraging:
        """Return the state after an update whose mean acceptance (T,) is known: gamma 0.05, t0 10, kappa 0.75."""
        t = self.count + 1
        share = 1.0 / (t + 10.0)
        error = (1.0 - share) * self.error + share * (target - acceptance)
        log_step = self.centre - error * math.sqrt(t) / 0.05
        weight = t**-0.75
        return replace(self, log_step=log_step, log_average=weight * log_step + (1.0 - weight) * self.log_average, error=error, count=t)

    def settle(self) -> DualAveraging:
        """Return the state with the averaged step size, for the draws that count."""
        return replace(self, log_step=self.log_average)


@dataclass(frozen=True, eq=False)
class Moments:
    """Accumulate mean and squared deviations (T, dim) over draws and chains: Welford, in the batched form of Chan."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def start(cls, like: Tensor) -> Moments:
        """Return none yet, of eps (C, T, dim)."""
        zero = torch.zeros_like(like[0])
        return cls(0, zero, zero)

    def update(self, eps: Tensor) -> Moments:
        """Return the moments with those of all chains."""
        C, both = len(eps), self.count + len(eps)
        mean = eps.mean(0)
        shift = mean - self.mean
        squares = self.squares + (eps - mean).square().sum(0) + shift.square() * (self.count * C / both)
        return Moments(both, self.mean + shift * (C / both), squares)

    def inverse_mass(self) -> Tensor:
        """Return the variances, drawn a little to a small number as in Stan, so that few draws give no zero."""
        n = self.count
        return (self.squares / max(n - 1, 1)) * (n / (n + 5.0)) + 1e-3 * (5.0 / (n + 5.0))


def schedule(warmup: int) -> tuple[int, tuple[int, ...]]:
    """Return when the mass begins to be learned, and the numbers of updates after which it is renewed.

    As in Stan: first the chains find the mass of the posterior, then windows each twice as long as the one before, then the step size
    settles. A warm-up of fewer than 20 updates adapts the step size only.

    Example:
        >>> schedule(1000)
        (75, (100, 150, 250, 450, 950))
    """
    if warmup < 20:
        return warmup, ()
    first, window, last = (75, 25, 50) if warmup >= 150 else (int(0.15 * warmup), warmup, int(0.1 * warmup))
    end, ends, at = warmup - last, [], first
    while at < end:
        # A window that would leave less than its successor's length behind it takes the rest as well.
        at = end if at + 3 * window > end else at + window
        window *= 2
        ends.append(at)
    return first, tuple(ends)


def first_step(propose: Callable[[Tensor], Tensor], like: Tensor, wanted: float = 0.8, most: int = 40) -> tuple[Tensor, int]:
    """Return log step sizes (T,) at which one step is about as often accepted as wanted, and how many steps it took.

    Doubles or halves each task's step until the chains' mean acceptance crosses `wanted`.

    Arguments:
        propose: from step sizes (T,) to log acceptance ratios (C, T).
        like: a tensor (T,) to take precision and device from.
        wanted: mean acceptance.
        most: number of doublings.
    """
    log_step = torch.full_like(like, math.log(0.1))
    direction, going = torch.zeros_like(like), torch.ones_like(like, dtype=torch.bool)
    for i in range(most):
        above = propose(log_step.exp()).clamp(max=0).exp().mean(0) > wanted
        way = torch.where(above, 1.0, -1.0).to(like)
        going = going & ((way == direction) if i else going)
        direction = way if i == 0 else direction
        if not bool(going.any()):
            return log_step, i + 1
        log_step = log_step + torch.where(going, direction * math.log(2.0), 0.0)
    return log_step, most
