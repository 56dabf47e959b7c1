"""Variational inference with a Gaussian: q(eps) = N(m, L L^T), fitted to each task by stochastic gradient ascent of its bound.

Use it where one mode of the posterior will do, and as the baseline that it is in the literature: with independent weights ("mean_field")
or correlations within units, within layers, or everywhere ("full"). Under a Gaussian q a network cannot say "one of these functions", so
with little noise the bound is loose by tens of nats; the report's Pareto k tells. A functional that collapses the last layer helps all
structures. Cost of a step: `samples_per_step` gradients of the log-joint, and for a block of k elements k^2 for each (k^3 once for "path").

L = diag(s) U with U unit lower triangular in blocks, so that entries of U are correlations of sorts whatever the scale of an element.
Gradients of the bound are written by hand from gradients g of the log-joint at eps = m + L z, one of three unbiased estimators:

  "path"      g - grad log q at eps, q held fixed: without noise once q is the posterior;
  "analytic"  g without the prior's part, and the divergence from the prior in closed form;
  "local"     the same, but activations are drawn instead of weights, for each point afresh.

References:
    Auto-encoding variational Bayes (Kingma and Welling, 2014).
    Sticking the landing: simple, lower-variance gradient estimators for variational inference (Roeder, Wu and Duvenaud, 2017).
    Variational dropout and the local reparameterization trick (Kingma, Salimans and Welling, 2015).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from bnnp.factors import DiagonalFactor, JointFactor
from bnnp.inference.engine import Draws, Engine
from bnnp.inference.functional import Functional
from bnnp.inference.target import Target
from bnnp.inference.variational import REPORTED, Ascent, Schedule, bounds, chunked, copied, likeliest
from bnnp.linalg import cholesky, solve_lower_transposed
from bnnp.priors import HeavyTailed
from bnnp.seeds import check_count, seeded

__all__ = [
    "ESTIMATORS",
    "STRUCTURES",
    "Plan",
    "State",
    "build",
    "full",
    "init",
    "mean_field",
    "per_layer",
    "per_unit",
    "report",
    "sample",
    "update",
]

STRUCTURES = ("mean_field", "per_unit", "per_layer", "full")
ESTIMATORS = ("path", "analytic", "local")

Group = tuple[int, int, int]
"""Blocks of equal size that follow each other: where the first begins, how many, and of how many elements each."""

TRIED = 64
"""How many draws the mean may start at, and of how many draws the bound is made that decides between several starts."""
LEAST_SCALE = 1e-4
PACE = 0.75
"""By which power of the size of a block its correlations learn more slowly. At 0 a block of 500 diverges; 0.5 and 1 end alike."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Hold what a run is asked to do, and on what.

    Arguments:
        target: with a task axis.
        groups: the blocks of L of more than one element.
        schedule: of the learning rate.
        samples_per_step: draws of eps, or of activations, a step.
        estimator: of the gradient.
        batch_size: points a step, or None for all.
        scale: standard deviations at the start.
        start: draws of another posterior, or None.
    """

    target: Target
    groups: tuple[Group, ...]
    schedule: Schedule
    samples_per_step: int
    estimator: str
    batch_size: int | None
    scale: float
    start: Tensor | None


@dataclass(frozen=True, eq=False)
class State:
    """Hold q of each task on its way: parameters are m (T, D), log s (T, D), and for each group of blocks U - I (T, count, k, k)."""

    ascent: Ascent
    gradients: int
    generator: torch.Generator


def build(
    target: Target,
    *,
    structure: str = "mean_field",
    blocks: Sequence[int] | None = None,
    steps: int = 2000,
    samples_per_step: int = 8,
    learning_rate: float = 3e-2,
    final_learning_rate: float = 3e-4,
    averaged: float = 0.2,
    estimator: str | None = None,
    batch_size: int | None = None,
    scale: float = 0.1,
    start: Tensor | None = None,
) -> Engine:
    """Build variational inference with a Gaussian of one structure.

    Arguments:
        target: what is to be approximated.
        structure: "mean_field", "per_unit", "per_layer" or "full": which elements of eps may be correlated. Where a layer's prior couples
            its units, they are one block.
        blocks: sizes of consecutive blocks that add up to `target.dim`, in the place of a structure.
        steps: steps of Adam.
        samples_per_step: draws a step.
        learning_rate: of the first step.
        final_learning_rate: of the last; linear between.
        averaged: share of the steps, the last ones, whose parameters are averaged.
        estimator: of the gradient: "path", "analytic" or "local". The last needs a functional with independent units, the structure
            "mean_field" and all points. None takes "local" where it applies and costs no more than products with the weights, which it does
            under diagonal priors, and otherwise "path".
        batch_size: take so many points of each task a step.
        scale: standard deviations at the start, of a prior's 1. Draws as wide as the prior's carry no signal: keep it small.
        start: draws (n, T, dim) of another posterior: their moments are tried as start too.

    Raises:
        ValueError: a setting out of range, blocks that do not add up, or an estimator that does not apply.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"Expected structure as one of {', '.join(STRUCTURES)}. Got {structure!r}.")
    if estimator is not None and estimator not in ESTIMATORS:
        raise ValueError(f"Expected estimator as one of {', '.join(ESTIMATORS)}. Got {estimator!r}.")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"Expected scale as a positive number. Got {scale}.")
    if start is not None and (start.ndim != 3 or tuple(start.shape[1:]) != (target.num_tasks, target.dim) or len(start) < 2):
        raise ValueError(f"Expected start as two or more draws with shape (n, {target.num_tasks}, {target.dim}). Got {tuple(start.shape)}.")
    check_count(samples_per_step, "samples_per_step")
    if batch_size is not None:
        check_count(batch_size, "batch_size")
    sizes = _sizes(target, structure) if blocks is None else tuple(blocks)
    if any(size < 1 for size in sizes) or sum(sizes) != target.dim:
        raise ValueError(f"Expected sizes of blocks that add up to {target.dim}, all positive. Got {list(sizes)}, together {sum(sizes)}.")
    groups = _groups(sizes)
    wrong = _not_local(target, groups, batch_size)
    if estimator == "local" and wrong:
        raise ValueError(f"Expected a functional with independent weights and all points for estimator='local'. Got {wrong}. Use 'path'.")
    if estimator is None:
        estimator = "local" if not wrong and _is_diagonal(target) else "path"
    schedule = Schedule(steps, learning_rate, final_learning_rate, averaged)
    plan = Plan(target, groups, schedule, samples_per_step, estimator, batch_size, scale, start)
    return Engine(
        structure if blocks is None else "block_vi",
        target,
        steps,
        partial(init, plan=plan),
        partial(update, plan=plan),
        partial(sample, plan=plan),
        partial(report, plan=plan),
    )


def mean_field(target: Target, **settings: Any) -> Engine:
    """Build variational inference with independent weights; see `build`."""
    return build(target, structure="mean_field", **settings)


def per_unit(target: Target, **settings: Any) -> Engine:
    """Build variational inference with correlations within each unit; see `build`."""
    return build(target, structure="per_unit", **settings)


def per_layer(target: Target, **settings: Any) -> Engine:
    """Build variational inference with correlations within each layer; see `build`."""
    return build(target, structure="per_layer", **settings)


def full(target: Target, **settings: Any) -> Engine:
    """Build variational inference with correlations between all weights; see `build`."""
    return build(target, structure="full", **settings)


def _sizes(target: Target, structure: str) -> tuple[int, ...]:
    """Return the sizes of the blocks of a structure, in the order of eps."""
    if structure == "mean_field":
        return (1,) * target.dim
    if structure == "full":
        return (target.dim,)
    if not isinstance(target, Functional):
        raise ValueError(f"Expected blocks= with structure={structure!r}: {type(target).__name__} does not know of units and layers.")
    sizes: list[int] = []
    for layer, (_, rows, k) in zip(target.layers, target.places, strict=True):
        sizes += [k] * rows if structure == "per_unit" else [rows * k] if rows else []
        sizes += [1] if isinstance(layer, HeavyTailed) else []
    return tuple(sizes)


def _groups(sizes: tuple[int, ...]) -> tuple[Group, ...]:
    """Join equal neighbours; blocks of one element have nothing to correlate with."""
    groups, at = [], 0
    for size, run in groupby(sizes):
        count = len(list(run))
        groups += [(at, count, size)] if size > 1 else []
        at += count * size
    return tuple(groups)


def _not_local(target: Target, groups: tuple[Group, ...], batch_size: int | None) -> str:
    """Say why activations cannot be drawn in the place of weights: what is not independent given the layer before; nothing if they can."""
    if not isinstance(target, Functional):
        return f"a {type(target).__name__}, which has no activations"
    if target.collapse:
        return "a functional that collapses its last layer, which couples points"
    kinds = sorted({type(layer).__name__ for layer in target.layers if layer.joint or isinstance(layer, HeavyTailed)})
    if kinds:
        return f"layers with {', '.join(kinds)} priors"
    return "blocks of correlated weights" if groups else "" if batch_size is None else "a batch of points"


def _is_diagonal(target: Target) -> bool:
    """Tell whether the weights themselves are independent: otherwise variances of activations are quadratic forms, 25 times as dear."""
    return isinstance(target, Functional) and all(isinstance(layer.given().factor, DiagonalFactor) for layer in target.layers)


# --- q -------------------------------------------------------------------------------------------------------------------


def _blocks(x: Tensor, group: Group) -> Tensor:
    """Return the elements of a group's blocks of (S, T, D) as (T, count, k, S)."""
    at, count, k = group
    return x[..., at : at + count * k].unflatten(-1, (count, k)).movedim(0, -1)


def _put(x: Tensor, group: Group, value: Tensor) -> None:
    at, count, k = group
    x[..., at : at + count * k] = value.movedim(-1, 0).flatten(-2)


def _from_mean(parameters: Sequence[Tensor], z: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """Return L z with shape (S, T, D)."""
    drawn = z.clone()
    for R, group in zip(parameters[2:], groups, strict=True):
        own = _blocks(z, group)
        _put(drawn, group, own + R @ own)
    return parameters[1].exp() * drawn


def _inverse_transposed(parameters: Sequence[Tensor], z: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """Return L^{-T} z, which is - grad log q at m + L z."""
    solved = z.clone()
    for R, group in zip(parameters[2:], groups, strict=True):
        U = R + torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
        _put(solved, group, solve_lower_transposed(U, _blocks(z, group)))
    return solved * (-parameters[1]).exp()


def _log_q(parameters: Sequence[Tensor], z: Tensor) -> Tensor:
    """Return log q(m + L z) with shape (S, T)."""
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi)) - parameters[1].sum(-1)


def _divergence_gradient(parameters: Sequence[Tensor], groups: tuple[Group, ...]) -> list[Tensor]:
    """Return the gradient of KL(q || N(0, I)) = (|m|^2 + |L|^2 - D) / 2 - sum log s."""
    m, log_s, *mixes = parameters
    variance = (2 * log_s).exp()
    squares = torch.ones_like(log_s)
    found = [m, squares]
    for R, (at, count, k) in zip(mixes, groups, strict=True):
        own = slice(at, at + count * k)
        squares[:, own] += R.square().sum(-1).flatten(1)
        found.append(variance[:, own].unflatten(-1, (count, k)).unsqueeze(-1) * R)
    found[1] = variance * squares - 1
    return found


def _pulled(parameters: Sequence[Tensor], g: Tensor, z: Tensor, off: Tensor, groups: tuple[Group, ...]) -> list[Tensor]:
    """Return gradients by the parameters, averaged over samples, of what has gradients g at eps = m + off, off = L z."""
    found = [g.mean(0), (g * off).mean(0)]
    scaled = g * parameters[1].exp() / len(g)
    return found + [(_blocks(scaled, group) @ _blocks(z, group).mT).tril_(-1) for group in groups]


def _gradients(parameters: tuple[Tensor, ...], z: Tensor, batch: Tensor | None, plan: Plan) -> list[Tensor]:
    """Return the gradient of the bound by the parameters from weights drawn with noise z (S, T, D)."""
    off = _from_mean(parameters, z, plan.groups)
    eps = parameters[0] + off
    _, g = plan.target.value_and_grad(eps, batch)
    if plan.estimator == "path":
        return _pulled(parameters, g + _inverse_transposed(parameters, z, plan.groups), z, off, plan.groups)
    found = _pulled(parameters, g + eps, z, off, plan.groups)
    return [a - b for a, b in zip(found, _divergence_gradient(parameters, plan.groups), strict=True)]


def _local_gradients(parameters: tuple[Tensor, ...], generator: torch.Generator, plan: Plan) -> list[Tensor]:
    """Return the gradient of the bound by the parameters from activations drawn afresh for each point.

    With a layer's prior mean + L eps, a unit's activation at features a is Gaussian given a, of mean (mean + L m)^T a and variance
    |diag(s) L^T a|^2: as much as the likelihood of one point knows of the weights.
    """
    F = plan.target
    assert isinstance(F, Functional)
    with torch.enable_grad():
        at = [p.detach().requires_grad_() for p in parameters]
        H = F.scaled.x.expand(plan.samples_per_step, *F.scaled.x.shape)
        for i, (layer, (offset, rows, k)) in enumerate(zip(F.layers, F.places, strict=True)):
            given, own = layer.given(), slice(offset, offset + rows * k)
            assert not isinstance(given.factor, JointFactor)
            m, variance = at[0][:, own].unflatten(-1, (rows, k)), (2 * at[1][:, own]).exp().unflatten(-1, (rows, k))
            A = F.source.architecture.layer_input(H, i)
            mean = A @ (given.mean + given.factor.apply(m)).mT
            if isinstance(given.factor, DiagonalFactor):
                spread = A.square() @ (given.factor.s.square() * variance).mT
            else:
                spread = (given.factor.project(A).square() * variance.unsqueeze(-3)).sum(-1)
            noise = torch.randn(mean.shape, generator=generator, dtype=F.dtype).to(mean.device)
            f = mean + spread.sqrt() * noise
            f = f if given.mix is None else f @ given.mix.mT
            skip = F.source.architecture.skip(H, layer.d_out)
            H = f if skip is None else f + skip
        points = F.scaled
        value = F.likelihood.log_prob(H, points.y, points.observed).sum() / plan.samples_per_step
        found = torch.autograd.grad(value, at)
    return [a - b for a, b in zip(found, _divergence_gradient(parameters, plan.groups), strict=True)]


# --- the engine ----------------------------------------------------------------------------------------------------------


def init(seed: int, *, plan: Plan) -> State:
    """Start at the most likely of a few draws of the prior, with small deviations, or from draws of another posterior.

    With the mean at zero all hidden units would be the same. Of several starts each task takes the one with the highest bound.
    """
    T, D, generator = plan.target.num_tasks, plan.target.dim, seeded(seed, "gaussian_vi init")
    normal = partial(torch.randn, generator=generator, dtype=plan.target.dtype)
    few = torch.full((T, D), math.log(plan.scale), dtype=plan.target.dtype)
    mixes = [torch.zeros(T, count, k, k, dtype=plan.target.dtype) for _, count, k in plan.groups]
    drawn = normal((TRIED, T, D))
    starts = [[likeliest(plan.target, drawn), few, *mixes]]
    if plan.start is not None:
        given = plan.start.to("cpu", plan.target.dtype)
        centre, wide = _moments(given, plan.groups), few.minimum(given.std(0).clamp(min=LEAST_SCALE).log())
        starts += [centre, [centre[0], wide, *mixes], [likeliest(plan.target, given), wide, *mixes]]
    starts = [[t.to(plan.target.device) for t in one] for one in starts]
    best = starts[0]
    if len(starts) > 1:
        z = normal((TRIED, T, D)).to(plan.target.device)
        found = torch.stack([_log_weights(one, z, plan).mean(0).nan_to_num(nan=-math.inf) for one in starts]).argmax(0)
        best = [torch.stack(parts)[found, torch.arange(T, device=found.device)] for parts in zip(*starts, strict=True)]
    return State(Ascent.start(best), 0, seeded(seed, "gaussian_vi steps"))


def _moments(eps: Tensor, groups: tuple[Group, ...]) -> list[Tensor]:
    """Return parameters with the mean and, within blocks, the covariance of n draws, drawn towards independence where n is small."""
    mean, std = eps.mean(0), eps.std(0).clamp(min=LEAST_SCALE)
    found, log_s = [mean, std.log()], std.log()
    for group in groups:
        at, count, k = group
        z = _blocks((eps - mean) / std, group)
        n = z.shape[-1]
        correlation = z @ z.mT / (n - 1) * (n / (n + k)) + torch.eye(k, dtype=z.dtype) * (k / (n + k))
        L = cholesky(correlation)
        diagonal = L.diagonal(dim1=-2, dim2=-1)
        log_s[:, at : at + count * k] += diagonal.log().flatten(1)
        found.append((L / diagonal.unsqueeze(-1)).tril(-1))
    return found


def update(state: State, *, plan: Plan) -> State:
    """Make one step; it costs `samples_per_step` gradients of each task."""
    at, generator = state.ascent.parameters, copied(state.generator)
    if plan.estimator == "local":
        gradients = _local_gradients(at, generator, plan)
    else:
        batch = None if plan.batch_size is None else plan.target.draw_batch(plan.batch_size, generator)
        z = torch.randn(plan.samples_per_step, *at[0].shape, generator=generator, dtype=at[0].dtype).to(at[0].device)
        gradients = _gradients(at, z, batch, plan)
    # A row of U moves by the sum of its elements: the longer it is, the less may each.
    paces = (1.0, 1.0, *(k**-PACE for _, _, k in plan.groups))
    return State(state.ascent.ascended(gradients, plan.schedule, paces), state.gradients + plan.samples_per_step, generator)


def _log_weights(parameters: Sequence[Tensor], z: Tensor, plan: Plan) -> Tensor:
    """Return log p(y, eps) - log q(eps) of the draws with noise z."""
    with torch.no_grad():
        return plan.target.log_joint(parameters[0] + _from_mean(parameters, z, plan.groups)) - _log_q(parameters, z)


def sample(state: State, n: int, seed: int, *, plan: Plan) -> Draws:
    """Draw eps from q."""
    at = state.ascent.best
    z = torch.randn(n, *at[0].shape, generator=seeded(seed, "gaussian_vi draws"), dtype=at[0].dtype).to(at[0].device)
    return Draws(at[0] + _from_mean(at, z, plan.groups))


def report(state: State, *, plan: Plan) -> dict[str, Tensor]:
    """Return the bound of 1,000 fresh draws, the evidence they give as importance samples with its Pareto k, and steps not made."""
    at, generator = state.ascent.best, seeded(0, "gaussian_vi report")

    def draw(n: int) -> tuple[Tensor, ...]:
        z = torch.randn(n, *at[0].shape, generator=generator, dtype=at[0].dtype).to(at[0].device)
        return (_log_weights(at, z, plan),)

    return bounds(*chunked(REPORTED, draw)) | {"skipped": state.ascent.skipped}
