"""Hamiltonian moves in the metric of the network's own sensitivities, for posteriors whose noise is far smaller than what weights can do.

Where noise sigma is small, a few directions of the weights, those that change f at the data, are narrower by sigma than all others, and
they turn with the weights: no fixed mass fits. Here each move first draws a reference z ~ N(eps, tau^2 I); given z the density of eps is
p(eps) p(y | eps)^b N(z; eps, tau^2 I), and Hamiltonian trajectories with the Gauss-Newton precision at z,

    Lambda = (1 + 1 / tau^2) I + b J(z)^T J(z) / sigma^2,        J = df / deps,

leave it exactly as it is, since z does not move. So steps are as long as f is straight, not as long as sigma is. Lambda is the identity
and a matrix of one row for each output seen, so momenta cost two products and a solve of that size. tau is what is adapted: the larger, the
farther a move leads, and the less the metric fits.

References:
    Auxiliary gradient-based sampling algorithms (Titsias and Papaspiliopoulos, 2018), for the reference.
    Riemann manifold Langevin and Hamiltonian Monte Carlo methods (Girolami and Calderhead, 2011), for the metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnnp.conjugate import condition
from bnnp.factors import JointFactor
from bnnp.inference.functional import Functional
from bnnp.likelihoods import noise_factor, noise_of
from bnnp.linalg import cho_solve, quiet_cholesky, solve_lower
from bnnp.priors import HeavyTailed
from bnnp.structures import LayerPrior, Network

__all__ = ["Metric", "check_metric", "move", "sensitivities"]

ValueAndGrad = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

QUARTER_TURN = 1.6
"""How long a trajectory is, in standard deviations: a quarter turn of an orbit leads to another place altogether."""

STEP = 1.3
"""Step of a trajectory, times dim^(-1/4): what energies of so many elements allow."""


def check_metric(target: object) -> Functional:
    """Return the target where it has a metric.

    Raises:
        TypeError: it is no functional.
        ValueError: noise that is not Gaussian and independent, or a prior whose layers depend on each other.
    """
    if not isinstance(target, Functional):
        raise TypeError(f"Expected a functional for curvature=True, whose f is known. Got {type(target).__name__}. Use curvature=False.")
    if any(isinstance(layer, Network | HeavyTailed) for layer in target.layers):
        raise ValueError(
            "Expected a prior whose layers are independent and Gaussian for curvature=True. Got one of a whole network or with heavy "
            "tails. Use curvature=False."
        )
    if noise_of(target.likelihood) is None or noise_factor(target.likelihood) is not None:
        raise ValueError(
            f"Expected independent Gaussian noise for curvature=True. Got {type(target.likelihood).__name__}. Use curvature=False."
        )
    return target


def sensitivities(target: Functional, eps: Tensor) -> Tensor:
    """Return J with J^T J the Gauss-Newton precision of the data, with shape (*S, T, N d_y, dim): df / deps over the noise.

    Points do not meet given the weights, so one backward pass for each output gives the derivatives by every layer's outputs at all points,
    delta; those by eps of unit u are delta_nu (a_n L_u). Rows of what was not observed are zero. Where the last layer is integrated out, f
    is that of its mean given eps, and what it can make up for counts as noise: J is R^{-1} J_hidden with R R^T = I + J_last J_last^T.

    Arguments:
        target: with a task axis.
        eps: with shape (*S, T, dim).
    """
    if not target.collapse:
        return _over_noise(target, target.weights(eps))
    given, (A, sites), weights = target.problem(eps)
    J = _over_noise(target, (*weights, given.weights(condition(given.core, A, sites).mean)))
    hidden, own = J[..., : target.dim], J[..., target.dim :]
    eye = torch.eye(J.shape[-2], dtype=J.dtype, device=J.device)
    return solve_lower(quiet_cholesky(eye + own @ own.mT), hidden)


def _over_noise(target: Functional, weights: Sequence[Tensor]) -> Tensor:
    """Return df / deps over the noise, of the eps of all layers, with shape (*S, T, N d_y, .)."""
    noise, architecture = noise_of(target.likelihood), target.source.architecture
    assert noise is not None
    H = target.scaled.x
    inputs, outputs = [], []
    with torch.enable_grad():
        for i, W in enumerate(weights):
            skip = architecture.skip(H, W.shape[-2])
            A = architecture.layer_input(H, i)
            linear = A @ W.mT
            linear = linear if linear.requires_grad else linear.detach().requires_grad_()
            H = linear if skip is None else linear + skip
            inputs.append(A.detach())
            outputs.append(linear)
        rows = []
        for o in range(H.shape[-1]):
            scaled = torch.where(target.scaled.observed, H / noise, torch.zeros_like(H))[..., o]
            deltas = torch.autograd.grad(scaled.sum(), outputs, retain_graph=True)
            parts = [_by_eps(layer, A, delta) for layer, A, delta in zip(target.layers, inputs, deltas, strict=True)]
            lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
            rows.append(torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], dim=-1))
    return torch.stack(rows, dim=-2).flatten(-3, -2).detach()


def _by_eps(layer: LayerPrior, A: Tensor, delta: Tensor) -> Tensor:
    """Return the derivatives by a layer's eps with shape (*S, T, N, size) from those by its outputs, (*S, T, N, d)."""
    given = layer.given()
    if given.mix is not None:
        delta = delta @ given.mix
    if isinstance(given.factor, JointFactor):
        return torch.einsum("...nu,...nuk->...nk", delta, given.factor.rows(A))
    return (delta.unsqueeze(-1) * given.factor.project(A)).flatten(-2)


@dataclass(frozen=True, eq=False)
class Metric:
    """Be Lambda = c I + B^T B, with B of shape (*S, T, n, dim) and c with shape (T,)."""

    B: Tensor
    c: Tensor
    root: Tensor

    @staticmethod
    def of(B: Tensor, c: Tensor) -> Metric:
        """Factorise c I + B B^T, of the size of the rows."""
        eye = torch.eye(B.shape[-2], dtype=B.dtype, device=B.device)
        return Metric(B, c, quiet_cholesky(c[..., None, None] * eye + B @ B.mT))

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return momenta of N(0, Lambda) with shape (*S, T, dim)."""
        lead, (n, D) = self.B.shape[:-2], self.B.shape[-2:]
        z, e = (torch.randn(*lead, m, generator=generator, dtype=torch.float64).to(self.B) for m in (D, n))
        return self.c.sqrt().unsqueeze(-1) * z + (self.B.mT @ e.unsqueeze(-1)).squeeze(-1)

    def solve(self, p: Tensor) -> Tensor:
        """Return Lambda^{-1} p."""
        inner = cho_solve(self.root, self.B @ p.unsqueeze(-1))
        return (p - (self.B.mT @ inner).squeeze(-1)) / self.c.unsqueeze(-1)


def move(
    target: Functional, path: ValueAndGrad, eps: Tensor, b: Tensor, tau: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return eps after one trajectory, the gain there, the probability of its acceptance, and how many gradients it took.

    Arguments:
        target: with a task axis.
        path: from eps and b to log density, gradient, and gain.
        eps: with shape (S, T, dim).
        b: inverse temperature with shape (T,).
        tau: spread of the reference with shape (T,).
        generator: of all that is random.
    """

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(eps)

    h = min(0.5, STEP * eps.shape[-1] ** -0.25)
    steps = math.ceil(QUARTER_TURN / h)
    jitter = 0.7 + 0.6 * torch.rand(eps.shape[:-1], generator=generator, dtype=torch.float64).to(eps)
    u = torch.rand(eps.shape[:-1], generator=generator, dtype=torch.float64).to(eps)
    z, prec, h = eps + tau.unsqueeze(-1) * noise(*eps.shape), tau.pow(-2), h * jitter.unsqueeze(-1)
    metric = Metric.of(b.sqrt()[..., None, None] * sensitivities(target, z), 1 + prec)

    def looked(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, slope, gain = path(at, b)
        away = at - z
        return value - 0.5 * prec * away.square().sum(-1), slope - prec.unsqueeze(-1) * away, gain

    p = metric.draw(generator)
    before, slope, gain = looked(eps)
    speed = metric.solve(p)
    energy = before - 0.5 * (p * speed).sum(-1)
    at = eps
    for _ in range(steps):
        p = p + 0.5 * h * slope
        at = at + h * metric.solve(p)
        after, slope, new_gain = looked(at)
        p = p + 0.5 * h * slope
    chance = (after - 0.5 * (p * metric.solve(p)).sum(-1) - energy).exp().nan_to_num(nan=0.0).clamp(max=1.0)
    chance = torch.where(new_gain.isfinite() & at.isfinite().all(-1), chance, torch.zeros_like(chance))
    take = u < chance
    return torch.where(take.unsqueeze(-1), at, eps), torch.where(take, new_gain, gain), chance, steps + 1
