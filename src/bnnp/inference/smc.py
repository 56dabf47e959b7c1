"""Sequential Monte Carlo from a base to the posterior by tempering: draws that no single chain would find, and the evidence.

Along the path q^(1 - b) (p(eps) p(y | eps))^b, b from 0 to 1, populations of particles are weighed, resampled, and moved by a few
Hamiltonian trajectories at every temperature. The base q is the prior, so that the path is p(eps) p(y | eps)^b, or a `Proposal`. The
product of the mean weights is an unbiased estimate of the evidence where what is adapted is fixed; with fixed temperatures and no
resampling this is annealed importance sampling (AIS).

When: for evidence; for posteriors of several modes; without any idea of where the posterior is. Cost: populations x particles x
temperatures x moves x leapfrog steps gradients for each task.

R populations share temperatures, step sizes and masses, which are adapted to all of them, and nothing else: their estimates scatter
as independent ones do, and that scatter is the standard error. A second estimate of the evidence, by Bennett's acceptance ratio between
neighbouring temperatures, uses the particles on both sides of each.

References:
    Sequential Monte Carlo samplers (Del Moral, Doucet and Jasra, 2006).
    Annealed importance sampling (Neal, 2001).
    Efficient estimation of free energy differences from Monte Carlo data (Bennett, 1976).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bnnp.importance import effective_sample_size, log_mean_exp
from bnnp.inference.amortised import weighted
from bnnp.inference.ascent import check_start
from bnnp.inference.curvature import QUARTER_TURN, check_metric, move
from bnnp.inference.engine import Draws, Engine
from bnnp.inference.proposals import Gaussian, Proposal
from bnnp.inference.target import Target
from bnnp.seeds import check_count, seeded

__all__ = ["Settings", "State", "build", "init", "report", "sample", "update"]

BISECTIONS = 60
ADAPTING = 2.0
"""How fast step sizes follow acceptance: a few trajectories must do, and the mean over all particles is no noisy guide."""

METRIC_LANES = 32
"""How many particles are moved at once in the metric of their sensitivities: what these need is to stay in the cache."""

FARTHEST_REFERENCE = 10.0


@dataclass(frozen=True)
class Settings:
    """Hold what `build` was told.

    Arguments:
        num_particles: P, in each population.
        num_populations: R.
        ess: effective share of particles that the next temperature leaves.
        temperatures: the inverse temperatures where they are fixed, from the first above 0 to 1.
        resample: whether particles are resampled at every temperature; without, weights grow along the path.
        num_moves: trajectories at every temperature.
        num_leapfrog: most steps of a trajectory.
        acceptance: what the step size is adapted to.
        curvature: whether particles move in the metric of their sensitivities.
        max_stages: most temperatures; the last one is 1 in any case.
    """

    num_particles: int
    num_populations: int
    ess: float
    temperatures: tuple[float, ...] | None
    resample: bool
    num_moves: int
    num_leapfrog: int
    acceptance: float
    curvature: bool
    max_stages: int


@dataclass(frozen=True, eq=False)
class State:
    """Hold R populations of P particles of T tasks at one temperature of each task.

    Arguments:
        eps: with shape (R, P, T, dim).
        gain: log p(eps) + log p(y | eps) - log q(eps) with shape (R, P, T).
        log_weights: of the particles, the mean of whose exponentials is 1 in each population, with shape (R, P, T).
        inverse_temperature: b with shape (T,).
        log_z: log of the product of mean weights with shape (R, T).
        log_z_bar: the same by Bennett's acceptance ratio; NaN where particles are not resampled.
        spread: sum over temperatures of the relative variances of the mean weights, with shape (R, T).
        step_size: with shape (T,).
        acceptance: of the last temperature's trajectories, with shape (T,).
        stages: temperatures that each task took, with shape (T,).
        ancestors: which particle of the base each goes back to, with shape (R, P, T).
        stage: number of temperatures so far.
        gradients: gradients so far, of all particles, for each task.
        generator: of all that is random.
    """

    eps: Tensor
    gain: Tensor
    log_weights: Tensor
    inverse_temperature: Tensor
    log_z: Tensor
    log_z_bar: Tensor
    spread: Tensor
    step_size: Tensor
    acceptance: Tensor
    stages: Tensor
    ancestors: Tensor
    stage: int
    gradients: int
    generator: torch.Generator


@dataclass(frozen=True, eq=False)
class _Path:
    """Be the path q^(1 - b) (p lik)^b; with q the prior where there is no proposal."""

    target: Target
    proposal: Proposal | None

    def parts(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Return log q(eps) and the gain, log p(eps) + log p(y | eps) - log q(eps)."""
        prior, likelihood = self.target.log_prior(eps), self.target.log_likelihood(eps)
        if self.proposal is None:
            return prior, likelihood
        base = self.proposal.log_density(eps)
        return base, prior + likelihood - base

    def value_and_grad(self, eps: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log density on the path, its gradient, and the gain."""
        with torch.enable_grad():
            at = eps.detach().requires_grad_()
            base, gain = self.parts(at)
            value = base + b * gain
            (gradient,) = torch.autograd.grad(value.sum(), at)
        return value.detach(), gradient, gain.detach()


def build(
    target: Target,
    *,
    num_particles: int = 128,
    num_populations: int = 4,
    ess: float = 0.7,
    temperatures: int | Sequence[float] | None = None,
    resample: bool = True,
    num_moves: int = 2,
    num_leapfrog: int = 10,
    acceptance: float = 0.75,
    step_size: float | None = None,
    curvature: bool = False,
    max_stages: int = 400,
    proposal: Proposal | None = None,
    start: Tensor | None = None,
) -> Engine:
    """Return the engine that tempers from a base to the posterior.

    Arguments:
        target: of any kind.
        num_particles: P, in each population.
        num_populations: R, whose scatter gives the standard error of the evidence.
        ess: effective share of particles that the next temperature leaves: closer to 1 takes more temperatures and errs less.
        temperatures: fixed inverse temperatures, increasing to 1, or their number, for b = (k / K)^4; chosen from the particles where None.
        resample: at every temperature; False with fixed temperatures is AIS.
        num_moves: trajectories at every temperature.
        num_leapfrog: most steps of each.
        acceptance: what the step size is adapted to.
        step_size: the first one; dim^(-1/4) where None.
        curvature: move in the metric of each particle's sensitivities, for noise far smaller than what the weights can do; for a
            functional with Gaussian noise. A trajectory then has its own number of steps, and the step size is the spread of
            its reference; see `bnnp.inference.curvature`.
        max_stages: most temperatures. The last one is 1 in any case: where it comes too early the report's errors tell.
        proposal: the base; the prior where None.
        start: draws (n, T, dim) of another posterior: then the base is a Gaussian with their means and variances, a half wider.

    Raises:
        ValueError: a setting out of range, a start of another shape, or both a proposal and a start.
    """
    if start is not None and proposal is not None:
        raise ValueError("Expected a proposal or a start, since each is a base of its own. Got both. Leave one out.")
    start = check_start(target, start)
    if start is not None:
        proposal = Gaussian.fitted(start, full=False, widened=1.5)
    for name, share in (("ess", ess), ("acceptance", acceptance)):
        if not 0.0 < share < 1.0:
            raise ValueError(f"Expected {name} between 0 and 1. Got {share}.")
    if step_size is not None and not (step_size > 0 and math.isfinite(step_size)):
        raise ValueError(f"Expected step_size to be positive and finite. Got {step_size}.")
    if not resample and temperatures is None:
        raise ValueError("Expected fixed temperatures for AIS, which does not resample. Got none. Give temperatures=100, for example.")
    if curvature:
        check_metric(target)
    ladder = _ladder(temperatures)
    settings = Settings(
        check_count(num_particles, "num_particles"),
        check_count(num_populations, "num_populations"),
        ess,
        ladder,
        resample,
        check_count(num_moves, "num_moves"),
        check_count(num_leapfrog, "num_leapfrog"),
        acceptance,
        curvature,
        check_count(max_stages, "max_stages") if ladder is None else len(ladder),
    )
    path = _Path(target, proposal)
    return Engine(
        name="smc" if resample else "ais",
        target=target,
        num_updates=settings.max_stages,
        init=partial(init, path, settings, step_size),
        update=partial(update, path, settings),
        sample=sample,
        report=report,
    )


def _ladder(temperatures: int | Sequence[float] | None) -> tuple[float, ...] | None:
    if temperatures is None:
        return None
    if isinstance(temperatures, int):
        count = check_count(temperatures, "temperatures")
        return tuple((k / count) ** 4 for k in range(1, count + 1))
    ladder = tuple(float(b) for b in temperatures)
    if not ladder or ladder[-1] != 1.0 or any(b <= a for a, b in zip((0.0, *ladder), ladder, strict=False)):
        raise ValueError(f"Expected inverse temperatures that increase from above 0 to 1. Got {ladder}.")
    return ladder


@torch.no_grad()
def init(path: _Path, settings: Settings, step_size: float | None, seed: int) -> State:
    """Return populations drawn from the base."""
    target, R, P = path.target, settings.num_populations, settings.num_particles
    generator, T, D = seeded(seed, "smc"), target.num_tasks, target.dim
    if path.proposal is None:
        eps = torch.randn(R, P, T, D, generator=generator, dtype=target.dtype).to(target.device)
    else:
        eps = path.proposal.draw(R * P, seed).reshape(R, P, T, D)
    gain = path.parts(eps)[1]
    zero, first = torch.zeros_like(gain), max(D, 1) ** -0.25 if step_size is None else step_size
    return State(
        eps=eps,
        gain=gain,
        log_weights=zero,
        inverse_temperature=torch.zeros_like(zero[0, 0]),
        log_z=torch.zeros_like(zero[:, 0]),
        log_z_bar=torch.full_like(zero[:, 0], 0.0 if settings.resample else math.nan),
        spread=torch.zeros_like(zero[:, 0]),
        step_size=torch.full_like(zero[0, 0], first),
        acceptance=torch.full_like(zero[0, 0], math.nan),
        stages=torch.zeros(T, dtype=torch.long, device=gain.device),
        ancestors=torch.arange(P, device=gain.device)[:, None].expand(R, P, T),
        stage=0,
        gradients=0,
        generator=generator,
    )


@torch.no_grad()
def update(path: _Path, settings: Settings, state: State) -> State:
    """Go to the next temperature of every task: weigh, resample, move. A state at the end stays as it is."""
    b = state.inverse_temperature
    if bool((b >= 1).all()):
        return state
    gain = state.gain.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    new = _next_temperature(settings, state, gain)
    step = new - b
    log_w = state.log_weights + _times(step, gain)
    P = log_w.shape[1]
    mean = log_w.logsumexp(1, keepdim=True) - math.log(P)
    before = state.log_weights.logsumexp(1) - math.log(P)  # zero but for rounding
    state = dataclasses.replace(
        state,
        gain=gain,
        log_weights=log_w - mean,
        log_z=state.log_z + mean.squeeze(1) - before,
        spread=state.spread + _relative_variance(state.log_weights, _times(step, gain)),
        inverse_temperature=new,
        step_size=state.step_size * torch.where(b > 0, (b / new).pow(0.25), torch.ones_like(b)),
        stages=state.stages + (b < 1),
        stage=state.stage + 1,
    )
    if settings.resample:
        state = _resampled(state)
    moved = _moved(path, settings, state)
    if settings.resample:
        ratio = _bennett(_times(step, gain), _times(step, moved.gain))
        moved = dataclasses.replace(moved, log_z_bar=state.log_z_bar + ratio)
    return moved


def _times(step: Tensor, gain: Tensor) -> Tensor:
    """Return step * gain, zero where there is no step, whatever the gain."""
    return torch.where(step > 0, step * gain, torch.zeros_like(gain))


def _next_temperature(settings: Settings, state: State, gain: Tensor) -> Tensor:
    b = state.inverse_temperature
    if state.stage + 1 >= settings.max_stages:
        return torch.ones_like(b)
    if settings.temperatures is not None:
        return torch.full_like(b, settings.temperatures[state.stage])

    def enough(step: Tensor) -> Tensor:
        share = 1 / (1 + gain.shape[1] * _relative_variance(state.log_weights, _times(step, gain)))
        return share.mean(0) >= settings.ess

    low, high = torch.zeros_like(b), 1 - b
    whole = enough(high)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        fits = enough(middle)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    # However the particles stand, the temperature moves.
    return torch.where(whole, torch.ones_like(b), b + torch.maximum(low, 1e-12 + 1e-9 * b)).clamp(max=1.0)


def _relative_variance(log_weights: Tensor, log_w: Tensor) -> Tensor:
    """Return the relative variance of the mean of w over P weighted particles, with shape (R, T): (P / conditional ESS - 1) / P."""
    P = log_w.shape[1]
    W = log_weights.log_softmax(1)
    first, second = (W + log_w).logsumexp(1), (W + 2 * log_w).logsumexp(1)
    return torch.where(first > -math.inf, (second - 2 * first).expm1() / P, torch.ones_like(first))


def _resampled(state: State) -> State:
    """Return the populations resampled, systematically, each with a uniform number of its own."""
    R, P, T = state.log_weights.shape
    share = state.log_weights.softmax(1).nan_to_num(1 / P).movedim(1, -1).cumsum(-1)  # (R, T, P)
    u = torch.rand(R, T, 1, generator=state.generator, dtype=torch.float64).to(share)
    at = (torch.arange(P, dtype=share.dtype, device=share.device) + u) / P
    index = torch.searchsorted((share / share[..., -1:]).contiguous(), at, right=True).clamp(max=P - 1).movedim(-1, 1)
    # A task that has no new weights keeps its particles as they are.
    flat = (state.log_weights == state.log_weights[:, :1]).all(1, keepdim=True)
    index = torch.where(flat, torch.arange(P, device=index.device)[:, None], index)
    return dataclasses.replace(
        state,
        eps=state.eps.gather(1, index.unsqueeze(-1).expand_as(state.eps)),
        gain=state.gain.gather(1, index),
        ancestors=state.ancestors.gather(1, index),
        log_weights=torch.zeros_like(state.log_weights),
    )


def _moved(path: _Path, settings: Settings, state: State) -> State:
    """Return the particles after trajectories at their temperature, and the adapted step size."""
    return _moved_in_metric(path, settings, state) if settings.curvature else _moved_by_variance(path, settings, state)


def _moved_in_metric(path: _Path, settings: Settings, state: State) -> State:
    """Move in the metric of each particle's sensitivities; the step size is the spread of the reference."""
    target, b, tau, accepted = check_metric(path.target), state.inverse_temperature, state.step_size, torch.zeros_like(state.step_size)
    eps, gain, count = state.eps.flatten(0, 1), state.gain, 0
    for _ in range(settings.num_moves):
        found = [move(target, path.value_and_grad, part, b, tau, state.generator) for part in eps.split(METRIC_LANES)]
        eps, gain = torch.cat([one[0] for one in found]), torch.cat([one[1] for one in found])
        chance = torch.cat([one[2] for one in found])
        tau = (tau * (ADAPTING * (chance.mean(0) - settings.acceptance)).exp()).clamp(max=FARTHEST_REFERENCE)
        count, accepted = count + found[0][3] * len(eps), accepted + chance.mean(0) / settings.num_moves
    eps, gain = eps.reshape(state.eps.shape), gain.reshape(state.gain.shape)
    return dataclasses.replace(state, eps=eps, gain=gain, step_size=tau, acceptance=accepted, gradients=state.gradients + count)


def _moved_by_variance(path: _Path, settings: Settings, state: State) -> State:
    """Move with masses from the variances of all particles."""
    b, step, eps = state.inverse_temperature, state.step_size, state.eps
    W = state.log_weights.softmax(1).unsqueeze(-1) / eps.shape[0]
    centre = (W * eps).sum((0, 1))
    lanes = eps.shape[0] * eps.shape[1]
    scale = (((W * (eps - centre).square()).sum((0, 1)) * lanes + 5.0) / (lanes + 5.0)).sqrt()
    value, gradient, gain = path.value_and_grad(eps, b)
    count, accepted = 1, torch.zeros_like(b)
    for _ in range(settings.num_moves):
        steps = min(settings.num_leapfrog, max(1, math.ceil(QUARTER_TURN / float(step.min()))))
        jitter = 0.7 + 0.6 * torch.rand(eps.shape[:-1], generator=state.generator, dtype=torch.float64).to(eps)
        p = torch.randn(eps.shape, generator=state.generator, dtype=torch.float64).to(eps)
        u = torch.rand(eps.shape[:-1], generator=state.generator, dtype=torch.float64).to(eps)
        h = (step * jitter).unsqueeze(-1)
        energy = value - 0.5 * p.square().sum(-1)
        at, slope, at_value, at_gain = eps, gradient, value, gain
        for _ in range(steps):
            p = p + 0.5 * h * scale * slope
            at = at + h * scale * p
            at_value, slope, at_gain = path.value_and_grad(at, b)
            p = p + 0.5 * h * scale * slope
        chance = (at_value - 0.5 * p.square().sum(-1) - energy).exp().nan_to_num(nan=0.0).clamp(max=1.0)
        chance = torch.where(at_gain.isfinite() & at.isfinite().all(-1), chance, torch.zeros_like(chance))
        take = u < chance
        value, gain = torch.where(take, at_value, value), torch.where(take, at_gain, gain)
        eps, gradient = torch.where(take.unsqueeze(-1), at, eps), torch.where(take.unsqueeze(-1), slope, gradient)
        rate = chance.mean((0, 1))
        step = step * (ADAPTING * (rate - settings.acceptance)).exp()
        count, accepted = count + steps, accepted + rate / settings.num_moves
    return dataclasses.replace(state, eps=eps, gain=gain, step_size=step, acceptance=accepted, gradients=state.gradients + count * lanes)


def _bennett(before: Tensor, after: Tensor) -> Tensor:
    """Return log of the ratio of normalisers from log w of particles on both sides, each (R, P, T): shape (R, T).

    The c that solves sum_0 s(u - c) = sum_1 s(c - u), s the logistic function.
    """
    both = torch.cat([before, after], dim=1)
    known = both.isfinite()
    low = torch.where(known, both, torch.full_like(both, math.inf)).amin(1)
    high = torch.where(known, both, torch.full_like(both, -math.inf)).amax(1)
    for _ in range(BISECTIONS):
        c = 0.5 * (low + high)
        more = (before - c.unsqueeze(1)).sigmoid().sum(1) > (c.unsqueeze(1) - after).sigmoid().sum(1)
        low, high = torch.where(more, c, low), torch.where(more, high, c)
    return 0.5 * (low + high)


def sample(state: State, n: int, seed: int) -> Draws:
    """Return the particles of all populations, weighted by their own weights and their population's evidence, or n drawn by these."""
    log_weights = (state.log_weights + state.log_z.unsqueeze(1)).flatten(0, 1)
    return weighted(state.eps.flatten(0, 1), log_weights, n, seeded(seed, "smc sample"))


def report(state: State) -> dict[str, Tensor]:
    """Return the evidence with its standard error, by both estimates, and how the populations fared."""
    R = len(state.log_z)
    log_evidence, between = log_mean_exp(state.log_z)
    within = (state.spread.mean(0) / R).sqrt()
    # Where one population has all the weight the first error stops at 1, however far apart their logarithms are.
    apart = state.log_z.std(0) / math.sqrt(R) if R > 1 else torch.zeros_like(within)
    population_ess = effective_sample_size(state.log_weights.movedim(1, 0)).mean(0)
    ordered = state.ancestors.sort(dim=1).values
    return {
        "log_evidence": log_evidence,
        "log_evidence_se": torch.fmax(torch.fmax(between, within), apart),
        "log_evidence_bar": state.log_z_bar.mean(0),
        "log_evidence_bar_se": state.log_z_bar.std(0) / math.sqrt(R) if R > 1 else torch.full_like(within, math.nan),
        "stages": state.stages.to(within),
        "inverse_temperature": state.inverse_temperature,
        "acceptance": state.acceptance,
        "step_size": state.step_size,
        "ess": population_ess * R,
        "ancestors": (1 + (ordered.diff(dim=1) != 0).sum(1)).to(within).amin(0),
    }
