"""Laplace's approximation: a Gaussian at the mode, with the curvature there.

In whitened weights the precision at a mode is M = I + J^T Lambda J: J the Jacobian of the outputs at the observed points, Lambda the
negative Hessian of their log-density in the outputs (Gauss-Newton; 1 / noise^2 for Gaussian noise, p (1 - p) for labels). With
B = Lambda^{1/2} J that is the whitened layer of `bnnp.conjugate`, and is solved as such: in weight space, or, where there are fewer outputs
than weights, in the space of functions, so that wide networks with few points are cheap. Lambda of a likelihood that is not log-concave
may have negative eigenvalues, which are set to zero.

When: one mode matters and its width is wanted for the price of finding it. The Gaussian belongs to the network's first-order expansion at
the mode (`bnnp.inference.linearised`), through which draws predict by default: draws put through the network itself underfit. Structures:
"full"; "diagonal", M without what is off its diagonal; "last_layer", with the layers before it held at the mode, so that all spread is the
last one's.

Cost: `steps` gradients a member on the way up; N Jacobians of one point; one factorisation of the smaller of M and I + B B^T. The way up
ends with `newton` steps of Gauss and Newton where the structure is full, since an error e of the mode costs the evidence e^T M e / 2. With
relu a mode often lies on a kink, where the gradient does not vanish and no curvature is right: the report's "decrement" tells.

References:
    A practical Bayesian framework for backpropagation networks (MacKay, 1992), section 3: the evidence.
    Laplace redux: effortless Bayesian deep learning (Daxberger et al., 2021).
    Improving predictions of Bayesian neural nets via local linearization (Immer, Korzepa and Bauer, 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from bnnp.conjugate import Conditional, condition, site_sum
from bnnp.factors import DiagonalFactor, Sites
from bnnp.inference.ascent import Ascent, ascend, begin, check_start, cosine, gradient_at, normal
from bnnp.inference.engine import Draws, Engine
from bnnp.inference.functional import Functional
from bnnp.inference.linearised import linearised as expansion
from bnnp.inference.target import Target
from bnnp.likelihoods.base import check_positive
from bnnp.linalg import cho_solve, eigh, log_det
from bnnp.priors import HeavyTailed
from bnnp.seeds import check_count, seeded
from bnnp.structures import LayerPrior

__all__ = ["STRUCTURES", "State", "build", "build_diagonal", "build_last_layer", "init", "report", "sample", "update"]

STRUCTURES = ("full", "diagonal", "last_layer")

CHUNK = 2**24
"""How many numbers of a Jacobian are made at once."""

LENGTHS = 12
"""How many lengths of a step of Gauss and Newton are tried at once, each half of the one before."""


@dataclass(frozen=True, eq=False)
class State:
    """Hold members on their way up, then the mode and its curvature.

    Arguments:
        ascent: the members.
        mode: the best of them, with shape (T, dim), once at the top.
        curvature: the Gaussian around the mode, of the last D elements of eps, where it is dense.
        precision: the diagonal of M with shape (T, dim), where nothing else is kept.
        gradients: gradients computed for each task; a Jacobian counts as one for each output.
        generator: of all randomness.
    """

    ascent: Ascent
    mode: Tensor | None
    curvature: Conditional | None
    precision: Tensor | None
    gradients: int
    generator: torch.Generator


def build(
    target: Target,
    *,
    structure: str = "full",
    linearised: bool = True,
    members: int = 4,
    steps: int = 1500,
    learning_rate: float = 0.05,
    newton: int = 5,
    start: Tensor | None = None,
) -> Engine:
    """Return the engine.

    Arguments:
        target: a `Functional` of all layers.
        structure: "full", "diagonal" or "last_layer".
        linearised: predict through the network's expansion at the mode, as the Gaussian is meant; else through the network.
        members: how often to climb; the best mode is taken.
        steps: of Adam.
        learning_rate: of Adam at first; it falls to zero along a cosine.
        newton: steps of Gauss and Newton from there, where the structure is full.
        start: draws of eps to start from, with shape (n, T, dim); draws of the prior where not given.

    Raises:
        ValueError: settings out of range, or a functional without its last layer.
        TypeError: the target is no network.

    References:
        See the module.

    Example:
        >>> from bnnp import BNNP, inference
        >>> F = inference.functional(BNNP(1, 1, hidden=(4,)), [[0.0], [1.0]], [[0.1], [0.2]])
        >>> inference.run(F, build, steps=20, num_samples=3).posterior.predict([[0.5]]).mean.shape
        torch.Size([1, 1])
    """
    if not isinstance(target, Functional):
        raise TypeError(f"Expected a functional, whose outputs have a Jacobian. Got {type(target).__name__}.")
    if target.collapse:
        raise ValueError("Expected a functional that holds all layers. Got collapse=True: make it with collapse=False.")
    if structure not in STRUCTURES:
        raise ValueError(f"Expected structure as one of {', '.join(STRUCTURES)}. Got {structure!r}.")
    if newton != 0:
        check_count(newton, "newton")
    check_count(steps, "steps")
    check_positive(learning_rate, "learning_rate")
    polish = newton if structure == "full" else 0
    start = check_start(target, start)
    first = target.dim - _size(target.layers[-1]) if structure == "last_layer" else 0
    return Engine(
        "laplace" if structure == "full" else f"laplace_{structure}",
        target,
        steps + 1 + polish,
        partial(init, target=target, members=check_count(members, "members"), start=start),
        partial(update, target=target, structure=structure, first=first, steps=steps, learning_rate=learning_rate),
        sample,
        partial(report, target=target),
        partial(_through, target=target) if linearised else None,
    )


def build_diagonal(target: Target, **settings: Any) -> Engine:
    """Return the engine with structure "diagonal"; see `build`."""
    return build(target, structure="diagonal", **settings)


def build_last_layer(target: Target, **settings: Any) -> Engine:
    """Return the engine with structure "last_layer"; see `build`."""
    return build(target, structure="last_layer", **settings)


def _size(layer: LayerPrior) -> int:
    """Return the number of elements of eps that a layer has."""
    return (1 if layer.joint else layer.d_out) * layer.rank + isinstance(layer, HeavyTailed)


def init(seed: int, *, target: Functional, members: int, start: Tensor | None) -> State:
    """Return members at their starts."""
    generator = seeded(seed, "laplace")
    return State(begin(target, members, start, generator), None, None, None, 0, generator)


def update(state: State, *, target: Functional, structure: str, first: int, steps: int, learning_rate: float) -> State:
    """Make one step of Adam; behind the last one take the best mode and its curvature; then one step of Gauss and Newton."""
    eps = state.ascent.eps
    if state.ascent.step < steps:
        gradient = gradient_at(target, eps, None, state.generator)
        ascent = ascend(state.ascent, gradient, learning_rate * cosine(state.ascent.step, steps))
        return replace(state, ascent=ascent, gradients=state.gradients + len(eps))
    spent = target.source.likelihood.f_dim(target.source.y_dim)
    if state.mode is None:
        with torch.no_grad():
            value = target.log_joint(eps).nan_to_num(nan=-math.inf)
        mode = eps.gather(0, value.argmax(0)[None, :, None].expand(1, -1, target.dim)).squeeze(0)
    else:
        assert state.curvature is not None
        mode = _gauss_newton(target, state.mode, state.curvature)
        spent += 1 + LENGTHS
    found = _diagonal(target, mode) if structure == "diagonal" else _dense(target, mode, first)
    curvature, precision = (found, None) if isinstance(found, Conditional) else (None, found)
    return replace(state, mode=mode, curvature=curvature, precision=precision, gradients=state.gradients + spent)


def _root_precision(target: Functional, f: Tensor) -> Tensor:
    """Return R (T, N, f_dim, f_dim) with R R^T = Lambda, the negative Hessian of log p(y | f) in f, without its negative part."""
    points = target.scaled
    with torch.enable_grad():
        at = f.detach().requires_grad_()
        total = target.likelihood.log_prob(at, points.y, points.observed).sum()
        (slope,) = torch.autograd.grad(total, at, create_graph=True)
        each = [slope[..., k].sum() for k in range(f.shape[-1])]
        rows = [torch.autograd.grad(s, at, retain_graph=True)[0] if s.requires_grad else torch.zeros_like(at) for s in each]
    Lambda = -torch.stack(rows, -1).detach()
    values, vectors = eigh(0.5 * (Lambda + Lambda.mT))
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)


def _rows(target: Functional, eps: Tensor, first: int) -> Iterator[Tensor]:
    """Yield B = R^T J by the elements of eps from `first`, of some points after the others, with shape (T, n f_dim, D)."""
    x, moving = target.scaled.x, eps[:, first:]
    with torch.no_grad():
        root = _root_precision(target, target.outputs(eps))
    T, D, F = *moving.shape, root.shape[-1]
    # One output of all tasks at once: a task's outputs depend on its own eps only.
    basis = torch.eye(F, dtype=eps.dtype, device=eps.device).unsqueeze(1).expand(F, T, F)

    def jacobian(at: Tensor) -> Tensor:
        """Return the Jacobian (F, T, D) at one point of each task, (T, d_x)."""

        def outputs(part: Tensor) -> Tensor:
            return target.outputs(torch.cat([eps[:, :first], part], -1), at.unsqueeze(-2)).squeeze(-2)

        pull = vjp(outputs, moving)[1]
        found: Tensor = vmap(lambda v: pull(v)[0])(basis)
        return found

    size = max(1, CHUNK // max(T * D * F, 1))
    for i in range(0, x.shape[1], size):
        J = vmap(jacobian, in_dims=1)(x[:, i : i + size])  # (n, F, T, D)
        yield torch.einsum("tnfr,nftd->tnrd", root[:, i : i + size], J).flatten(1, 2)


def _dense(target: Functional, eps: Tensor, first: int) -> Conditional:
    """Return N(0, M^{-1}) of the elements of eps from `first`, in the smaller of its two spaces."""
    T, D = len(eps), target.dim - first
    unit = DiagonalFactor(torch.ones(1, D, dtype=eps.dtype, device=eps.device))

    def sites(B: Tensor) -> Sites:
        return Sites(torch.zeros_like(B[..., :1]), torch.ones_like(B[..., :1]))

    outputs = target.scaled.x.shape[1] * target.source.likelihood.f_dim(target.source.y_dim)
    if outputs < D:
        B = torch.cat([eps.new_zeros(T, 0, D), *_rows(target, eps, first)], dim=1)
        return condition(unit, B, sites(B))
    parts = [site_sum(unit, B, sites(B)) for B in _rows(target, eps, first)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole.condition(unit)


def _diagonal(target: Functional, eps: Tensor) -> Tensor:
    """Return the diagonal of M with shape (T, dim)."""
    found = torch.ones_like(eps)
    for B in _rows(target, eps, 0):
        found = found + B.square().sum(-2)
    return found


def _solved(q: Conditional, v: Tensor) -> Tensor:
    """Return M^{-1} v for v (T, D)."""
    if q.B is None:
        return cho_solve(q.root.squeeze(-3), v.unsqueeze(-1)).squeeze(-1)
    B = q.B.squeeze(-3)
    inner = cho_solve(q.root.squeeze(-3), B @ v.unsqueeze(-1))
    return v - (B.mT @ inner).squeeze(-1)


def _gauss_newton(target: Functional, eps: Tensor, q: Conditional) -> Tensor:
    """Return the best point along a step of Gauss and Newton: of many lengths, and none, that with the largest log-joint."""
    step = _solved(q, target.value_and_grad(eps)[1])
    lengths = torch.cat([torch.zeros(1), 0.5 ** torch.arange(LENGTHS)]).to(eps)[:, None, None]
    tried = eps + lengths * step
    with torch.no_grad():
        value = target.log_joint(tried).nan_to_num(nan=-math.inf)
    return tried.gather(0, value.argmax(0)[None, :, None].expand(1, -1, eps.shape[-1])).squeeze(0)


def _mode(state: State) -> Tensor:
    if state.mode is None:
        raise ValueError("Expected a state at the mode. Got one still on its way up. Call update more often.")
    return state.mode


def _through(state: State, *, target: Functional) -> Functional:
    """Return the expansion at the mode."""
    return expansion(target, _mode(state))


def sample(state: State, n: int, seed: int) -> Draws:
    """Return n draws of the Gaussian."""
    mode = _mode(state)
    z = normal(mode.expand(n, *mode.shape), seeded(seed, "laplace sample"))
    if state.precision is not None:
        return Draws(mode + z / state.precision.sqrt())
    assert state.curvature is not None
    D = state.curvature.m.shape[-2]
    off = state.curvature.draw(z[..., -D:].unsqueeze(-2)).squeeze(-2)
    return Draws(torch.cat([mode[:, :-D].expand(n, -1, -1), mode[:, -D:] + off], dim=-1))


def report(state: State, *, target: Functional) -> dict[str, Tensor]:
    """Return the log-joint at the mode, and what else there is.

    "log_evidence" is log p(y, mode) + dim log(2 pi) / 2 - log |M| / 2, where the structure is full or diagonal. "decrement" is
    g^T M^{-1} g / 2, how much of it is missing because the mode was not quite reached, in nats, where the structure is full.
    """
    mode = _mode(state)
    value, gradient = target.value_and_grad(mode)
    found = {"log_joint": value}
    constant = 0.5 * target.dim * math.log(2 * math.pi)
    if state.precision is not None:
        found["log_evidence"] = value + constant - 0.5 * state.precision.log().sum(-1)
    elif state.curvature is not None and state.curvature.m.shape[-2] == target.dim:
        found["log_evidence"] = value + constant - 0.5 * log_det(state.curvature.root).sum(-1)
        found["decrement"] = 0.5 * (gradient * _solved(state.curvature, gradient)).sum(-1)
    return found
