"""The way up to a posterior's modes, of many members and tasks at once, and how steep it is there.

Laplace, SWAG, ensembles and chains driven by stochastic gradients all begin with it. Adam works on each element by itself, so members and
tasks never meet, and in whitened weights one rate serves every prior.

References:
    Adam: a method for stochastic optimization (Kingma and Ba, 2015), algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bnnp.inference.target import Target
from bnnp.likelihoods.base import check_positive
from bnnp.seeds import check_count

__all__ = ["Ascent", "ascend", "begin", "check_batch_size", "check_share", "check_start", "cosine", "gradient_at", "normal", "stiffness"]

ROUNDS = 12
"""How many rounds of the power method tell the stiffness, to a few per cent."""


@dataclass(frozen=True, eq=False)
class Ascent:
    """Hold where members are on their way up.

    Arguments:
        eps: with shape (M, T, dim).
        first: running means of the gradients.
        second: running means of their squares.
        step: number of steps made.
    """

    eps: Tensor
    first: Tensor
    second: Tensor
    step: int


def check_start(target: Target, start: Tensor | None) -> Tensor | None:
    """Check draws of eps to start from: finite, with shape (n, T, dim)."""
    want = (target.num_tasks, target.dim)
    if start is None:
        return None
    if start.ndim != 3 or not len(start) or tuple(start.shape[1:]) != want:
        raise ValueError(f"Expected start with shape (n, {want[0]}, {want[1]}): draws of eps of every task. Got {tuple(start.shape)}.")
    if not bool(start.isfinite().all()):
        raise ValueError("Expected finite draws to start from. Got NaN or infinite ones.")
    return start.detach().to(target.device, target.dtype)


def check_batch_size(target: Target, batch_size: int | None) -> int | None:
    """Check the number of points of a batch: positive, or None for all points."""
    if batch_size is None:
        return None
    if getattr(target, "collapse", False):
        raise ValueError("Expected batch_size=None with collapse=True, where points depend on each other. Got a batch size.")
    return check_count(batch_size, "batch_size")


def check_share(value: float, name: str, most: float) -> float:
    """Check a step as a share of what is stable: positive, and below `most`."""
    if check_positive(value, name) >= most:
        raise ValueError(f"Expected {name} below {most:g}, beyond which steps are unstable. Got {value}.")
    return float(value)


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers like a tensor, drawn on the generator's device."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def begin(target: Target, members: int, start: Tensor | None, generator: torch.Generator) -> Ascent:
    """Return members at draws of `start`, again from its first where it has fewer, or at draws of the prior where there is none."""
    empty = torch.empty(members, target.num_tasks, target.dim, dtype=target.dtype, device=target.device)
    eps = normal(empty, generator) if start is None else start[torch.arange(members) % len(start)]
    return Ascent(eps, torch.zeros_like(eps), torch.zeros_like(eps), 0)


def cosine(step: int, steps: int) -> float:
    """Return 1 at the first of so many steps, falling along half a cosine to 0 behind the last.

    Example:
        >>> [round(cosine(i, 4), 2) for i in range(5)]
        [1.0, 0.85, 0.5, 0.15, 0.0]
    """
    return 0.5 * (1.0 + math.cos(math.pi * min(step / steps, 1.0)))


def gradient_at(target: Target, eps: Tensor, batch_size: int | None, generator: torch.Generator) -> Tensor:
    """Return the gradient of the log-joint, or its unbiased estimate from a batch of points that all members share."""
    batch = None if batch_size is None else target.draw_batch(batch_size, generator)
    return target.value_and_grad(eps, batch)[1]


def ascend(ascent: Ascent, gradient: Tensor, rate: float) -> Ascent:
    """Make one step of Adam upwards; a member whose gradient is not finite stays where it is."""
    fine = gradient.isfinite().all(-1, keepdim=True)
    g = torch.where(fine, gradient, torch.zeros_like(gradient))
    # A memory of a hundred steps, not the usual thousand: gradients are of few points, and those at the start are far larger than later.
    step, (a, b) = ascent.step + 1, (0.9, 0.99)
    first, second = a * ascent.first + (1 - a) * g, b * ascent.second + (1 - b) * g.square()
    move = rate * (first / (1 - a**step)) / ((second / (1 - b**step)).sqrt() + 1e-10)
    return Ascent(torch.where(fine, ascent.eps + move, ascent.eps), first, second, step)


def stiffness(target: Target, eps: Tensor, generator: torch.Generator, rounds: int = ROUNDS) -> tuple[Tensor, int]:
    """Return the largest curvature of the log-joint at eps (M, T, dim) and the gradients that it took of each member.

    Steps of any gradient method are stable up to a number over it. By the power method, from differences of gradients: no second
    derivatives. In absolute value, the largest of the members, with shape (T,); at least 1, the prior's.
    """
    width = torch.finfo(eps.dtype).eps ** (1 / 3)
    along = normal(eps, generator)
    size = torch.ones_like(eps[..., :1])
    for _ in range(rounds):
        along = along / torch.linalg.vector_norm(along, dim=-1, keepdim=True).clamp(min=1e-30)
        change = target.value_and_grad(eps + width * along)[1] - target.value_and_grad(eps - width * along)[1]
        found = change / (2 * width)
        fine = found.isfinite().all(-1, keepdim=True)
        along = torch.where(fine, found, along)
        size = torch.where(fine, torch.linalg.vector_norm(along, dim=-1, keepdim=True), size)
    return size.squeeze(-1).amax(0).clamp(min=1.0), 2 * rounds
