"""What the Markov chains of HMC, NUTS and MALA share: their state, warm-up, traces and report. A kernel only moves the chains.

Chains of all tasks advance together, in lockstep: one call of the target moves every one of them. After the warm-up step size and mass are
fixed, so that what follows is a Markov chain with the posterior as its stationary distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnnp.inference.adaptation import DualAveraging, Moments, Point, first_step, gain, kinetic, leapfrog, momentum, schedule, value_and_grad
from bnnp.inference.diagnostics import mixing
from bnnp.inference.engine import Draws, picked
from bnnp.inference.target import Target
from bnnp.seeds import check_count, seeded

__all__ = ["Settings", "State", "advance", "init", "report", "sample"]

TRIES = 50
"""How often a chain whose start has no density is given another."""


@dataclass(frozen=True)
class Settings:
    """Hold what all kernels are told.

    Arguments:
        name: of the engine.
        num_chains: chains of each task.
        warmup: updates that adapt and are not kept.
        draws: updates after these.
        target_accept: mean acceptance that the step size is adapted to.
        keep: draws of eps kept of each chain, at most, evenly thinned; R-hat and the like see all of them.
        adapt_mass: learn a diagonal mass.
        step_size: of all tasks, not adapted; None to find one for each.
    """

    name: str
    num_chains: int
    warmup: int
    draws: int
    target_accept: float
    keep: int
    adapt_mass: bool
    step_size: float | None

    def __post_init__(self) -> None:
        """Check."""
        for name in ("num_chains", "draws", "keep"):
            check_count(getattr(self, name), name)
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 0:
            raise ValueError(f"Expected warmup as an integer, at least 0. Got {self.warmup!r}.")
        if not 0.0 < self.target_accept < 1.0:
            raise ValueError(f"Expected target_accept between 0 and 1. Got {self.target_accept}.")
        if self.step_size is not None and not (0.0 < self.step_size < math.inf):
            raise ValueError(f"Expected step_size as a positive number, or None. Got {self.step_size}.")

    @property
    def updates(self) -> int:
        """Return the number of updates."""
        return self.warmup + self.draws

    @property
    def thinning(self) -> int:
        """Return of how many draws one is kept."""
        return math.ceil(self.draws / self.keep)


@dataclass(frozen=True, eq=False)
class State:
    """Hold C chains of each of T tasks.

    Arguments:
        eps: with shape (C, T, dim).
        value: log-joint (C, T).
        gradient: of it by eps.
        step: step sizes (T,) and their adaptation.
        moments: of the window that the mass is learned from.
        inverse_mass: with shape (T, dim).
        iteration: number of updates made.
        gradients: gradients computed for each task.
        accepted: sum of the mean acceptance (T,) after the warm-up.
        divergences: number of them (T,) after the warm-up.
        traces: monitored quantities and log-joint (C, T, q + 1) after each update that counts.
        kept: eps (C, T, dim) of those that are kept.
        generator: of all randomness.
    """

    eps: Tensor
    value: Tensor
    gradient: Tensor
    step: DualAveraging
    moments: Moments
    inverse_mass: Tensor
    iteration: int
    gradients: int
    accepted: Tensor
    divergences: Tensor
    traces: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    generator: torch.Generator

    def forked(self) -> State:
        """Return the same with a generator of its own, so that an update leaves the state that it was given as it was."""
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        return replace(self, generator=generator)

    @property
    def at(self) -> Point:
        """Return where the chains are, with a fresh momentum."""
        return Point(self.eps, momentum(self.eps, self.inverse_mass, self.generator), self.value, self.gradient)


def check_start(start: Tensor | None, target: Target) -> None:
    """Check draws to start from.

    Raises:
        ValueError: another shape than (n, T, dim).
    """
    want = (target.num_tasks, target.dim)
    if start is not None and (start.ndim != 3 or not len(start) or tuple(start.shape[1:]) != want):
        raise ValueError(f"Expected start as draws of eps with shape (n, {want[0]}, {want[1]}). Got {tuple(start.shape)}.")


def init(seed: int, *, target: Target, settings: Settings, start: Tensor | None) -> State:
    """Return chains at draws of the prior, or spread over the draws to start from, with a first step size."""
    g = seeded(seed, settings.name)
    C, T, D = settings.num_chains, target.num_tasks, target.dim
    if start is None:
        eps = torch.randn(C, T, D, generator=g, dtype=target.dtype).to(target.device)
    else:
        eps = start[(torch.arange(C) * max(len(start) // C, 1)) % len(start)].to(target.device, target.dtype)
    eps, value, gradient, tries = _somewhere(target, eps, g)
    inverse_mass = torch.ones_like(eps[0])
    zero = torch.zeros(T, dtype=target.dtype, device=target.device)
    if settings.step_size is not None:
        log_step, calls = torch.full_like(zero, math.log(settings.step_size)), 0
    else:
        log_step, calls = _first_step(target, eps, value, gradient, inverse_mass, g)
    return State(
        eps,
        value,
        gradient,
        DualAveraging.start(log_step),
        Moments.start(eps),
        inverse_mass,
        0,
        (tries + calls) * C,
        zero,
        torch.zeros_like(zero, dtype=torch.int64),
        (),
        (),
        g,
    )


def _somewhere(target: Target, eps: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return starts, their log-joints and gradients, and how many times these were computed; prior draws for those without a density.

    Raises:
        ValueError: there is none after many draws.
    """
    for i in range(TRIES):
        value, gradient = value_and_grad(target, eps)
        lost = value == -torch.inf
        if not bool(lost.any()):
            return eps, value, gradient, i + 1
        fresh = torch.randn(eps.shape, generator=g, dtype=eps.dtype).to(eps.device)
        eps = torch.where(lost.unsqueeze(-1), fresh, eps)
    tasks = lost.any(0).nonzero().flatten().tolist()
    raise ValueError(
        f"Expected a log-joint that is finite where chains start. Got none in {TRIES} draws of the prior, for tasks {tasks}. "
        "Look at these data, or use dtype=torch.float64."
    )


def _first_step(
    target: Target, eps: Tensor, value: Tensor, gradient: Tensor, inverse_mass: Tensor, g: torch.Generator
) -> tuple[Tensor, int]:
    """Return log step sizes (T,) that one leapfrog step takes well, and how many steps it took to find them."""
    here = Point(eps, momentum(eps, inverse_mass, g), value, gradient)
    before = kinetic(here.momentum, inverse_mass) - here.value

    def propose(step: Tensor) -> Tensor:
        there = leapfrog(target, here, step, inverse_mass)
        return gain(before, kinetic(there.momentum, inverse_mass) - there.value)

    return first_step(propose, value.new_zeros(len(inverse_mass)))


def advance(
    state: State,
    *,
    target: Target,
    settings: Settings,
    to: tuple[Tensor, Tensor, Tensor],
    acceptance: Tensor,
    divergent: Tensor,
    gradients: int,
) -> State:
    """Return the state after a kernel has moved the chains: adapted in the warm-up, recorded after it.

    Arguments:
        state: before.
        target: what the chains are for.
        settings: of the engine.
        to: eps, log-joint and gradient where the chains are now.
        acceptance: mean acceptance probability of the move (C, T), which the step size is adapted by.
        divergent: which chains (C, T) met an energy error beyond repair.
        gradients: calls of the target that the move took.
    """
    eps, value, gradient = to
    state = replace(
        state, eps=eps, value=value, gradient=gradient, iteration=state.iteration + 1, gradients=state.gradients + gradients * len(eps)
    )
    if state.iteration <= settings.warmup:
        return _adapted(state, target, settings, acceptance.mean(0))
    with torch.no_grad():
        trace = torch.cat([target.monitor(eps), value.unsqueeze(-1)], dim=-1)
    number = state.iteration - settings.warmup - 1
    return replace(
        state,
        accepted=state.accepted + acceptance.mean(0),
        divergences=state.divergences + divergent.sum(0),
        traces=(*state.traces, trace),
        kept=(*state.kept, eps) if number % settings.thinning == 0 else state.kept,
    )


def _adapted(state: State, target: Target, settings: Settings, acceptance: Tensor) -> State:
    """Return the state with step size, and at the end of a window the mass, adapted."""
    now = state.iteration
    if settings.step_size is None:
        state = replace(state, step=state.step.update(acceptance, settings.target_accept))
    first, ends = schedule(settings.warmup)
    if settings.adapt_mass and ends and first < now <= ends[-1]:
        state = replace(state, moments=state.moments.update(state.eps))
        if now in ends:
            inverse_mass = state.moments.inverse_mass()
            state = replace(state, inverse_mass=inverse_mass, moments=Moments.start(state.eps))
            if settings.step_size is None:
                log_step, calls = _first_step(target, state.eps, state.value, state.gradient, inverse_mass, state.generator)
                state = replace(state, step=DualAveraging.start(log_step), gradients=state.gradients + calls * len(state.eps))
    if now == settings.warmup and settings.step_size is None and state.step.count:
        state = replace(state, step=state.step.settle())
    return state


def sample(state: State, n: int, seed: int, *, settings: Settings) -> Draws:
    """Return n draws, thinned evenly from those kept of all chains.

    Raises:
        ValueError: no draw was made yet.
    """
    if not state.kept:
        raise ValueError(f"Expected chains that are past their warm-up. Got {state.iteration} of {settings.updates} updates: go on.")
    # Chain after chain, so that even thinning takes from every one.
    eps = torch.stack(state.kept, dim=1).flatten(0, 1)
    return Draws(picked(eps, n, seeded(seed, f"{settings.name} sample")))


def report(state: State) -> dict[str, Tensor]:
    """Return how far the draws can be trusted, each with shape (T,).

    R-hat and effective sample sizes are the worst over what the target monitors and the log-joint; NaN after fewer than four draws.
    """
    return {
        **mixing(state.traces, state.accepted),
        "acceptance": state.accepted / max(len(state.traces), 1),
        "divergences": state.divergences.to(state.value),
        "step_size": state.step.log_step.exp(),
    }
