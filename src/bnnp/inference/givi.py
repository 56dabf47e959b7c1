"""Global inducing points: each layer conditioned on pseudo-observations of its own, at inputs that go through the layers before it.

Use it where a Gaussian over all weights is too poor: q(W^l | W^{<l}) follows whatever the earlier layers drew, so that hidden units may be
exchanged and the function stays. M inducing inputs U and, for each layer, M pseudo-outputs with their precisions are fitted to each task by
gradient ascent of the bound

    E[log p(y | W)] - sum_l KL(q(W^l | W^{<l}) || p(W^l)),        q(W^l | W^{<l}) ~ p(W^l) prod_m N(v^l_m; W^l a^l_m, 1 / lambda^l_m),

with a^l_m the features of inducing input m behind the earlier layers as drawn. It is the amortised posterior of `bnnp.chain` with free
pseudo-observations at free inputs in the place of inference networks at the data. With a functional that collapses its last layer, that
layer is conditioned on the data themselves. Cost of a step for each sample and unit: M^2 p + M^3 / 3 (units that share a prior share it).

References:
    Global inducing point variational posteriors for Bayesian neural networks and deep Gaussian processes (Ober and Aitchison, 2021).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bnnp.draws import draw_canonical, draw_fused
from bnnp.factors import Factor, Sites
from bnnp.inference.engine import Draws, Engine
from bnnp.inference.functional import Functional
from bnnp.inference.target import Target
from bnnp.inference.variational import REPORTED, Ascent, Schedule, bounds, chunked, copied, likeliest
from bnnp.likelihoods import noise_of
from bnnp.priors import HeavyTailed
from bnnp.seeds import check_count, seeded

__all__ = ["Plan", "State", "build", "init", "report", "sample", "update"]

START_NOISE = 1.0
"""Standard deviation of the pseudo-observations of hidden layers at the start."""
TRIED = 256
"""Of how many draws the likeliest is the one whose activations are the first pseudo-observations."""
APART = 0.05
"""How far inducing inputs stand from each other at the start, where there are more of them than different inputs, in deviations."""

Drawer = Callable[[Factor, Tensor, Sites], tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Plan:
    """Hold what a run is asked to do, and on what.

    Arguments:
        target: with a task axis.
        schedule: of the learning rate.
        samples_per_step: draws of the weights a step.
        num_inducing: M.
        train_inputs: whether the inducing inputs move.
        alike: of each drawn layer, whether its units have the same prior up to their means, so that one factorisation serves them.
        start: draws of another posterior, or None.
    """

    target: Functional
    schedule: Schedule
    samples_per_step: int
    num_inducing: int
    train_inputs: bool
    alike: tuple[bool, ...]
    start: Tensor | None


@dataclass(frozen=True, eq=False)
class State:
    """Hold q of each task on its way: parameters are U (T, M, d_x), and for each layer V (T, M, d) and log lambda / 2 (T, M, 1)."""

    ascent: Ascent
    gradients: int
    generator: torch.Generator


def build(
    target: Target,
    *,
    num_inducing: int = 10,
    train_inputs: bool = True,
    steps: int = 2000,
    samples_per_step: int = 8,
    learning_rate: float = 5e-2,
    final_learning_rate: float = 5e-4,
    averaged: float = 0.2,
    start: Tensor | None = None,
) -> Engine:
    """Build global inducing point variational inference.

    Arguments:
        target: a `Functional`.
        num_inducing: number M of inducing inputs, which start at inputs of the task that lie apart.
        train_inputs: move them; otherwise they stay there.
        steps: steps of Adam.
        samples_per_step: draws a step.
        learning_rate: of the first step.
        final_learning_rate: of the last; linear between.
        averaged: share of the steps, the last ones, whose parameters are averaged.
        start: draws (n, T, dim) of another posterior: the activations of the likeliest are the first pseudo-observations. Without, it is
            the likeliest of 256 draws of the prior.

    Raises:
        TypeError: a target that is no functional.
        ValueError: a setting out of range, a heavy-tailed prior, or no layer to draw.
    """
    if not isinstance(target, Functional):
        raise TypeError(f"Expected a functional: inducing points go through the layers of a network. Got {type(target).__name__}.")
    for name, value in (("num_inducing", num_inducing), ("samples_per_step", samples_per_step)):
        check_count(value, name)
    if any(isinstance(layer, HeavyTailed) for layer in target.layers):
        raise ValueError(
            "Expected layers that are Gaussian, given those before. Got a heavy-tailed prior, whose random scale is no matter of inducing "
            "points. Use mean_field or nuts."
        )
    if not target.num_drawn:
        raise ValueError(
            "Expected a layer to draw. Got a network of one layer, which collapse=True integrates out: nothing is left to infer."
        )
    if start is not None and (start.ndim != 3 or tuple(start.shape[1:]) != (target.num_tasks, target.dim)):
        raise ValueError(f"Expected start as draws with shape (n, {target.num_tasks}, {target.dim}). Got {tuple(start.shape)}.")
    network = target.batched
    alike = tuple(not layer.joint and _alike(layer.given().core) for layer in network.layers[: network.num_drawn])
    schedule = Schedule(steps, learning_rate, final_learning_rate, averaged)
    plan = Plan(network, schedule, samples_per_step, num_inducing, train_inputs, alike, start)
    functions = partial(init, plan=plan), partial(update, plan=plan), partial(sample, plan=plan), partial(report, plan=plan)
    return Engine("givi", network, steps, *functions)


def _alike(factor: Factor) -> bool:
    """Tell whether all blocks of a factor are the same."""
    first = factor.slice(0, 1)
    return all(bool((t == one).all()) for t, one in zip(factor.tensors, first.tensors, strict=True))


# --- q -------------------------------------------------------------------------------------------------------------------


def _chain(parameters: tuple[Tensor, ...], plan: Plan, draw: Drawer) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Draw eps (S, T, dim) layer by layer; return it and what the draws give besides, such as divergences."""
    F, found, drawn = plan.target, [], []
    parts: list[Tensor] = []
    H = parameters[0].unsqueeze(0)
    for i in range(F.num_drawn):
        given = F.layers[i].given(parts)
        A = F.source.architecture.layer_input(H, i)
        V, log_root = parameters[1 + 2 * i : 3 + 2 * i]
        A_rows, sites = given.problem(A, given.sites(A, V, log_root.exp()))
        core = given.core.slice(0, 1) if plan.alike[i] else given.core
        eps, *rest = draw(core, A_rows, sites)
        parts.append(eps)
        found.append(eps.flatten(-2))
        drawn.append(tuple(rest))
        skip = F.source.architecture.skip(H, given.d_out)
        H = A @ given.weights(eps).mT
        H = H if skip is None else H + skip
    return torch.cat(found, dim=-1), drawn


def _bound(parameters: tuple[Tensor, ...], generator: torch.Generator, plan: Plan) -> Tensor:
    """Return an unbiased estimate of the bound of each task with shape (T,), differentiable."""

    def draw(factor: Factor, A: Tensor, sites: Sites) -> tuple[Tensor, ...]:
        return draw_fused(factor, A, sites, plan.samples_per_step, partial(_normal, generator, plan), plan.target.dtype)

    eps, drawn = _chain(parameters, plan, draw)
    divergence = torch.stack([kl.expand(plan.samples_per_step, -1).mean(0) for (kl,) in drawn]).sum(0)
    return plan.target.log_likelihood(eps).mean(0) - divergence


def _exact_draws(parameters: tuple[Tensor, ...], n: int, generator: torch.Generator, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return draws of eps (n, T, dim) and log q(eps) - log p(eps) with shape (n, T)."""

    def draw(factor: Factor, A: Tensor, sites: Sites) -> tuple[Tensor, ...]:
        return draw_canonical(factor, A, sites, n, partial(_normal, generator, plan), plan.target.dtype)

    with torch.no_grad():
        eps, drawn = _chain(parameters, plan, draw)
        return eps, torch.stack([ratio for _, ratio in drawn]).sum(0)


def _normal(generator: torch.Generator, plan: Plan, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=plan.target.dtype).to(plan.target.device)


# --- the engine ----------------------------------------------------------------------------------------------------------


def init(seed: int, *, plan: Plan) -> State:
    """Start at inputs of the task, with the activations there of the likeliest of many draws.

    A last layer with Gaussian noise starts at the outputs of the data, as sure of them as the likelihood is.
    """
    F, generator = plan.target, seeded(seed, "givi init")
    U, nearest = _spread(F, plan.num_inducing, generator)
    drawn = (
        torch.randn(TRIED, F.num_tasks, F.dim, generator=generator, dtype=F.dtype) if plan.start is None else plan.start.cpu().to(F.dtype)
    )
    eps = likeliest(F, drawn).to(F.device)
    parameters, H, parts = [U], U, list[Tensor]()
    for i, (at, rows, k) in enumerate(F.places[: F.num_drawn]):
        given = F.layers[i].given(parts)
        parts.append(eps[None, :, at : at + rows * k].unflatten(-1, (rows, k)))
        A = F.source.architecture.layer_input(H, i)
        V = A @ dataclasses.replace(given, mix=None).weights(parts[-1])[0].mT
        root = torch.full_like(V[..., :1], -math.log(START_NOISE))
        skip = F.source.architecture.skip(H, given.d_out)
        noise = noise_of(F.likelihood) if i == len(F.layers) - 1 else None
        if noise is not None and given.mix is None:
            y = F.scaled.y.gather(1, nearest.unsqueeze(-1).expand(-1, -1, F.scaled.y.shape[-1]))
            V, root = y if skip is None else y - skip, torch.full_like(root, -float(noise.log().mean()))
        parameters += [V, root]
        H = A @ given.weights(parts[-1])[0].mT
        H = H if skip is None else H + skip
    return State(Ascent.start(parameters), 0, seeded(seed, "givi steps"))


def _spread(F: Functional, M: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return M inputs (T, M, d_x) of each task that lie apart, each the farthest from those before it, and their numbers (T, M)."""
    x, mask = F.scaled.x, F.scaled.mask
    if not x.shape[1]:
        raise ValueError("Expected tasks with points, where inducing inputs start. Got none. The posterior is the prior.")
    count = mask.sum(1).clamp(min=1)[:, None]
    centre = (x * mask.unsqueeze(-1)).sum(1) / count
    deviation = (((x - centre[:, None]) * mask.unsqueeze(-1)).square().sum(1) / count).sqrt()
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    z = (x - centre[:, None]) / deviation[:, None]
    distance, picked = z.square().sum(-1).masked_fill(~mask, -1.0), []
    every = torch.arange(len(x), device=x.device)
    for m in range(M):
        picked.append(distance.argmax(1))
        from_it = (z - z[every, picked[-1]].unsqueeze(1)).square().sum(-1)
        distance = torch.minimum(distance, from_it) if m else from_it.masked_fill(~mask, -1.0)
    at = torch.stack(picked, dim=1)
    U = x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    again = torch.stack([(at[:, :m] == at[:, m : m + 1]).any(1) for m in range(M)], dim=1)
    apart = APART * deviation.unsqueeze(1) * torch.randn(U.shape, generator=generator, dtype=U.dtype).to(U.device)
    return torch.where(again.unsqueeze(-1), U + apart, U), at


def update(state: State, *, plan: Plan) -> State:
    """Make one step; it costs `samples_per_step` gradients of each task."""
    generator = copied(state.generator)
    with torch.enable_grad():
        at = tuple(p.detach().requires_grad_() for p in state.ascent.parameters)
        gradients = torch.autograd.grad(_bound(at, generator, plan).sum(), at)
    paces = (1.0 if plan.train_inputs else 0.0, *(1.0,) * (len(at) - 1))
    return State(state.ascent.ascended(gradients, plan.schedule, paces), state.gradients + plan.samples_per_step, generator)


def sample(state: State, n: int, seed: int, *, plan: Plan) -> Draws:
    """Draw eps from q."""
    generator = seeded(seed, "givi draws")
    (eps,) = chunked(n, lambda few: _exact_draws(state.ascent.best, few, generator, plan)[:1])
    return Draws(eps)


def report(state: State, *, plan: Plan) -> dict[str, Tensor]:
    """Return the bound of 1,000 fresh draws, the evidence they give as importance samples with its Pareto k, and steps not made."""
    generator = seeded(0, "givi report")

    def draw(n: int) -> tuple[Tensor, ...]:
        eps, ratio = _exact_draws(state.ascent.best, n, generator, plan)
        with torch.no_grad():
            return (plan.target.log_likelihood(eps) - ratio,)

    return bounds(*chunked(REPORTED, draw)) | {"skipped": state.ascent.skipped}
