"""The linear maps L of whitened priors, w = mean + L eps: how features pass through them, and nothing else.

A `Factor` maps the standard normal numbers of each unit of a layer to its weights; what structure it has is its own affair. Its tensors
may have leading batch axes, where particles have factors of their own. A `JointFactor` maps one vector of numbers to the weights of all
units together; `JointFactor.rows` turns a layer with such a factor into a layer of one unit with as many points as there were points
times units, for which everything else holds unchanged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bnnp.linalg import to_compute

__all__ = ["DenseFactor", "DiagonalFactor", "Factor", "Given", "JointFactor", "LowRankFactor", "Sites"]


@dataclass(frozen=True, eq=False)
class Sites:
    """Hold the pseudo-observations of a layer, as residuals from the prior mean.

    Arguments:
        resid: y~ - A mean with shape (*S, *T, N, d).
        root_prec: square roots of the precisions with shape (*S, *T, N, d), or (..., 1) where the units share them; 0 = masked.
    """

    resid: Tensor
    root_prec: Tensor

    def columns(self, factor: Factor) -> tuple[int, int]:
        """Return the number of blocks U and of columns C of a layer with this factor."""
        d = self.resid.shape[-1]
        blocks = d if factor.blocks > 1 or self.root_prec.shape[-1] > 1 else 1
        return blocks, d // blocks

    def to(self, dtype: torch.dtype) -> Sites:
        """Move to the device and precision of the factorisations."""
        return Sites(to_compute(self.resid, dtype), to_compute(self.root_prec, dtype))


class Factor(ABC):
    """Be the map L in w = mean + L eps, for the U blocks of a layer (U = d_out, or 1 where the units share one factor)."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Return the number k of columns."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of the factor, each with shape (*B, U, p, ...)."""

    def rebuild(self, *tensors: Tensor) -> Self:
        """Return a factor of this structure on other tensors."""
        return type(self)(*tensors)

    @abstractmethod
    def project(self, A: Tensor) -> Tensor:
        """Return A L with shape (*B, N, U, k) for features A with shape (*B, N, p)."""

    @abstractmethod
    def apply(self, eps: Tensor) -> Tensor:
        """Return L eps with shape (..., d, p) for eps with shape (..., d, k)."""

    @abstractmethod
    def pull(self, v: Tensor) -> Tensor:
        """Return L^T v with shape (*B, U, k, C) for v with shape (*B, U, p, C)."""

    @abstractmethod
    def congruence(self, G: Tensor) -> Tensor:
        """Return L^T G L with shape (*B, U, k, k) for G with shape (*B, V, p, p), V = U or 1."""

    @property
    @abstractmethod
    def axis(self) -> int:
        """Return the axis of the blocks in the first tensor, counted from the end."""

    @property
    def blocks(self) -> int:
        """Return the number of blocks U."""
        return self.tensors[0].shape[self.axis]

    @property
    def batched(self) -> bool:
        """Return whether particles have factors of their own."""
        return self.tensors[0].ndim > -self.axis

    def slice(self, start: int, stop: int) -> Factor:
        """Return the factor of the blocks from `start` to `stop`; a shared factor is its own slice."""
        if self.blocks == 1:
            return self
        lead = self.tensors[0].ndim + self.axis
        return self.rebuild(*(t.narrow(lead, start, min(stop, t.shape[lead]) - start) for t in self.tensors))


@dataclass(frozen=True, eq=False)
class DiagonalFactor(Factor):
    """Be L = diag(s), with s of shape (*B, U, p)."""

    s: Tensor

    axis = -2

    @property
    def rank(self) -> int:
        """Return k = p."""
        return self.s.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return (s,)."""
        return (self.s,)

    def project(self, A: Tensor) -> Tensor:
        """Return A diag(s), at a cost of N k."""
        return A.unsqueeze(-2) * self.s.unsqueeze(-3)

    def apply(self, eps: Tensor) -> Tensor:
        """Return s * eps."""
        return self.s * eps

    def pull(self, v: Tensor) -> Tensor:
        """Return s * v."""
        return self.s.unsqueeze(-1) * v

    def congruence(self, G: Tensor) -> Tensor:
        """Return s G s."""
        return self.s.unsqueeze(-1) * G * self.s.unsqueeze(-2)


@dataclass(frozen=True, eq=False)
class DenseFactor(Factor):
    """Be any L of shape (*B, U, p, k)."""

    L: Tensor

    axis = -3

    @property
    def rank(self) -> int:
        """Return k."""
        return self.L.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return (L,)."""
        return (self.L,)

    def project(self, A: Tensor) -> Tensor:
        """Return A L for all blocks in one matrix product, at a cost of N k p a block."""
        if self.batched:
            return (A.unsqueeze(-3) @ self.L).movedim(-3, -2)
        U, p, k = self.L.shape
        joined = self.L.permute(1, 0, 2).reshape(p, U * k)
        return (A @ joined).unflatten(-1, (U, k))

    def apply(self, eps: Tensor) -> Tensor:
        """Return L eps, unit by unit."""
        if self.blocks == 1:
            return eps @ self.L.squeeze(-3).mT
        return torch.einsum("...upk,...uk->...up", self.L, eps)

    def pull(self, v: Tensor) -> Tensor:
        """Return L^T v."""
        return self.L.mT @ v

    def congruence(self, G: Tensor) -> Tensor:
        """Return L^T G L, at a cost of p^2 k a block."""
        return self.L.mT @ (G @ self.L)


@dataclass(frozen=True, eq=False)
class LowRankFactor(Factor):
    """Be L = [diag(s), V] with s of shape (*B, U, p) and V of shape (*B, U, p, r), so that L L^T = diag(s^2) + V V^T and k = p + r."""

    s: Tensor
    V: Tensor

    axis = -2

    @property
    def rank(self) -> int:
        """Return k = p + r."""
        return self.s.shape[-1] + self.V.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return (s, V)."""
        return (self.s, self.V)

    def project(self, A: Tensor) -> Tensor:
        """Return [A diag(s), A V], at a cost of N p r a block."""
        return torch.cat([DiagonalFactor(self.s).project(A), DenseFactor(self.V).project(A)], dim=-1)

    def apply(self, eps: Tensor) -> Tensor:
        """Return s * eps_1 + V eps_2."""
        p = self.s.shape[-1]
        return self.s * eps[..., :p] + DenseFactor(self.V).apply(eps[..., p:])

    def pull(self, v: Tensor) -> Tensor:
        """Return [s * v; V^T v]."""
        return torch.cat([self.s.unsqueeze(-1) * v, self.V.mT @ v], dim=-2)

    def congruence(self, G: Tensor) -> Tensor:
        """Return [[s G s, s G V], [V^T G s, V^T G V]], at a cost of p^2 r a block."""
        scaled = self.s.unsqueeze(-1) * G  # diag(s) G
        cross = scaled @ self.V
        top = torch.cat([scaled * self.s.unsqueeze(-2), cross], dim=-1)
        return torch.cat([top, torch.cat([cross.mT, self.V.mT @ G @ self.V], dim=-1)], dim=-2)


@dataclass(frozen=True, eq=False)
class JointFactor:
    """Be a map from one vector eps to the weights of all units: w_u = mean_u + L_u eps, with L of shape (*B, d, p, k)."""

    L: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return (L,)."""
        return (self.L,)

    def rebuild(self, *tensors: Tensor) -> JointFactor:
        """Return a joint factor on another L."""
        return JointFactor(*tensors)

    @property
    def batched(self) -> bool:
        """Return whether particles have factors of their own."""
        return self.L.ndim > 3

    @property
    def identity(self) -> DiagonalFactor:
        """Return the factor of the layer of one unit that `rows` leads to."""
        return DiagonalFactor(self.L.new_ones(1, self.L.shape[-1]))

    def rows(self, A: Tensor) -> Tensor:
        """Return the derivatives of the outputs by eps, a_n L_u, with shape (*B, N, d, k); cost N d p k."""
        return DenseFactor(self.L).project(A)

    def apply(self, eps: Tensor) -> Tensor:
        """Return L eps with shape (..., d, p) for eps with shape (..., 1, k)."""
        return torch.einsum("...upk,...k->...up", self.L, eps.squeeze(-2))

    @staticmethod
    def of(factor: Factor, d: int) -> JointFactor:
        """Return the same prior of d independent units as one block: L_u = [0 .. L_u .. 0]."""
        p = factor.tensors[0].shape[factor.axis + 1]
        first = factor.tensors[0]
        dense = factor.project(torch.eye(p, dtype=first.dtype, device=first.device)).movedim(-3, -2)  # (*B, U, p, k)
        dense = dense.expand(*dense.shape[:-3], d, -1, -1)
        eye = torch.eye(d, dtype=first.dtype, device=first.device)
        return JointFactor(torch.einsum("...upk,uv->...upvk", dense, eye).flatten(-2))


@dataclass(frozen=True, eq=False)
class Given:
    """Be the prior of one layer given what was drawn before it: W = mix (mean + scale L eps), eps standard normal.

    Arguments:
        mean: with shape (d, p), or (S, T, d, p) where it depends on the particle.
        factor: L of each unit, or of all units together.
        mix: a map (d, d) between units, that the pseudo-observations stand before; None where there is none.
        scale: a number for each particle that L is multiplied by, with shape (S, T); None where there is none.
    """

    mean: Tensor
    factor: Factor | JointFactor
    mix: Tensor | None = None
    scale: Tensor | None = None

    @property
    def d_out(self) -> int:
        """Return the number of units."""
        return self.mean.shape[-2]

    @property
    def core(self) -> Factor:
        """Return the factor of the problem that `problem` leads to."""
        return self.factor.identity if isinstance(self.factor, JointFactor) else self.factor

    @property
    def joint(self) -> bool:
        """Return whether the units share one vector eps."""
        return isinstance(self.factor, JointFactor)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that are there: the mean, those of the factor, mix and scale."""
        return (self.mean, *self.factor.tensors, *(t for t in (self.mix, self.scale) if t is not None))

    def rebuild(self, *tensors: Tensor) -> Given:
        """Return a prior of this structure on other tensors."""
        left = list(tensors[1 + len(self.factor.tensors) :])
        mix, scale = (left.pop(0) if t is not None else None for t in (self.mix, self.scale))
        return Given(tensors[0], self.factor.rebuild(*tensors[1 : 1 + len(self.factor.tensors)]), mix, scale)

    def computed(self, dtype: torch.dtype) -> Given:
        """Move to the device and precision of the factorisations."""
        return self.rebuild(*(to_compute(t, dtype) for t in self.tensors))

    def sites(self, A: Tensor, pseudo_y: Tensor, root_prec: Tensor) -> Sites:
        """Return pseudo-observations as residuals from the mean, with one set for each of the samples that A has."""
        root = root_prec if root_prec.ndim == A.ndim else root_prec.unsqueeze(0)
        return Sites(pseudo_y - A @ self.mean.mT, root.expand(*A.shape[:-2], *root.shape[-2:]))

    def features(self, A: Tensor) -> Tensor:
        """Return A with the particles' scales: what passes through L."""
        return A if self.scale is None else A * self.scale.to(A)[..., None, None]

    def rows(self, A: Tensor) -> Tensor:
        """Return the features of the problem: those of the points, or with one eps for all units, one row for each point and unit."""
        A = self.features(A)
        if not isinstance(self.factor, JointFactor):
            return A
        return JointFactor(to_compute(self.factor.L, A.dtype)).rows(A).flatten(-3, -2)

    def problem(self, A: Tensor, sites: Sites, rotate: Tensor | None = None) -> tuple[Tensor, Sites]:
        """Return features and pseudo-observations such that `core` and they are a layer of independent units.

        Arguments:
            A: features with shape (S, T, N, p).
            sites: pseudo-observations with shape (S, T, N, d).
            rotate: where the noise of the outputs of a point is correlated, a unit lower triangular matrix (..., d, d) that makes it
                independent; units must share one eps.
        """
        rows = self.rows(A)
        if not self.joint:
            return rows, sites
        d = self.d_out
        resid, root = sites.resid, sites.root_prec.expand(sites.resid.shape)
        if rotate is not None:
            rows = (rotate @ rows.unflatten(-2, (-1, d))).flatten(-3, -2)
            resid = (rotate @ resid.unsqueeze(-1)).squeeze(-1)
        return rows, Sites(resid.flatten(-2).unsqueeze(-1), root.flatten(-2).unsqueeze(-1))

    def weights(self, eps: Tensor) -> Tensor:
        """Return W (..., d, p) for eps with shape (..., d, k), or (..., 1, k), where the parameters are and in their precision."""
        drawn = self.factor.apply(eps.to(self.mean.dtype).to(self.mean.device))
        W = self.mean + (drawn if self.scale is None else self.scale.to(drawn)[..., None, None] * drawn)
        return W if self.mix is None else self.mix @ W

    def together(self) -> Given:
        """Return the same prior with one eps for all units and nothing between them and the observations."""
        factor = self.factor if isinstance(self.factor, JointFactor) else JointFactor.of(self.factor, self.d_out)
        if self.mix is None:
            return Given(self.mean, factor, None, self.scale)
        return Given(self.mix @ self.mean, JointFactor(torch.einsum("uv,...vpk->...upk", self.mix, factor.L)), None, self.scale)

    def picked(self, pick: Callable[[Tensor], Tensor]) -> Given:
        """Return the prior of picked particles, where `pick` picks of a tensor with shape (S, T, ...)."""
        mean = pick(self.mean) if self.mean.ndim == 4 else self.mean
        factor = self.factor.rebuild(*(pick(t) for t in self.factor.tensors)) if self.factor.batched else self.factor
        return Given(mean, factor, self.mix, None if self.scale is None else pick(self.scale))

    @staticmethod
    def stacked(parts: Sequence[Given], cat: Callable[[Sequence[Tensor]], Tensor], num_tasks: int) -> Given:
        """Return the prior of particles of several components, where `cat` joins tensors with shape (1, T, ...), one for each."""

        def batch(t: Tensor) -> Tensor:
            return t.expand(1, num_tasks, *t.shape)

        factors = [cat([batch(t) for t in pieces]) for pieces in zip(*(part.factor.tensors for part in parts), strict=True)]
        return Given(cat([batch(part.mean) for part in parts]), parts[0].factor.rebuild(*factors))
