"""The whitened layer: a Gaussian prior mean + L eps met by pseudo-observations, solved in the space of eps.

With features A (N x p), precisions lambda and pseudo-observations y~ of one unit, let

    B = diag(lambda)^(1/2) A L    (N x k),        r = diag(lambda)^(1/2) (y~ - A mean).

Then q(eps) has covariance (I + B^T B)^{-1} and mean (I + B^T B)^{-1} B^T r. Two forms give the same q: weight space factorises
I + B^T B (k x k), function space I + B B^T (N x N); `condition` takes the smaller. A masked point has lambda = 0 exactly, so its row
of B and its r vanish. Nothing is inverted that is not I + (positive semi-definite), and no jitter enters.

Blocks and columns: a layer of d units is U blocks of C columns, U C = d. Where units have their own factor L or their own
precisions, U = d and C = 1; where they share both, U = 1 and C = d, and one factorisation serves the layer.

References:
    Global inducing point variational posteriors for Bayesian neural networks and deep Gaussian processes
    (Ober and Aitchison, 2021), section 3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnnp.linalg import cho_solve, cholesky, log_det, lower_inverse, solve_lower, solve_lower_transposed, to_compute
from bnnp.priors import Factor

__all__ = ["Conditional", "Normal", "SiteSum", "Sites", "computed", "condition", "draw_canonical", "draw_fused", "site_sum"]

CANONICAL_RANK = 512
"""Widest layer whose draws are made in weight space whatever the number of points; see `draw_canonical`."""

WIDE_COLUMNS = 8
"""From this many columns a block on, the fused gradient gathers its products; see `_gradient_of_wide`."""

CHUNK_BYTES = 6 * 2**20
"""How much one chunk of blocks may take in the fused draw: enough to keep the products busy, small enough for the cache."""

Normal = Callable[[tuple[int, ...]], Tensor]


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


def _to_columns(x: Tensor, blocks: int) -> Tensor:
    """Bring (*B, N, d) to (*B, U, N, C)."""
    return x.unflatten(-1, (blocks, -1)).movedim(-2, -3)


def _to_units(eps: Tensor) -> Tensor:
    """Bring (*B, U, k, C) to (*B, d, k)."""
    return eps.mT.flatten(-3, -2)


def _whiten(factor: Factor, A: Tensor, root_prec: Tensor) -> Tensor:
    """Return B with shape (*B, U, N, k); U is the larger of the blocks of the factor and of the precisions."""
    scaled = factor.project(A) * root_prec.unsqueeze(-1)
    return scaled.movedim(-2, -3).contiguous()


def _split_block(x: Tensor, columns: int) -> Tensor:
    """Repeat one block for each of its columns; blocks of one column stay as they are."""
    return x if columns == 1 else x.expand(*x.shape[:-3], columns, -1, -1)


def _split_columns(x: Tensor) -> Tensor:
    """Bring (*B, 1, a, C) to (*B, C, a, 1); blocks of one column stay as they are."""
    return x if x.shape[-1] == 1 else x.movedim(-1, -3).squeeze(-2).unsqueeze(-1)


def _log_prec(root_prec: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Return sum log lambda and the number of observations, both over points and units, each with shape (*B)."""
    seen = root_prec > 0
    log = 2.0 * torch.where(seen, root_prec, torch.ones_like(root_prec)).log()
    times = d // root_prec.shape[-1]
    return times * log.sum((-2, -1)), times * seen.sum((-2, -1)).to(log.dtype)


@dataclass(frozen=True, eq=False)
class SiteSum:
    """Hold what conditioning needs to know of a set of points: sums over points, so sets add up in any order.

    Arguments:
        gram: B^T B with shape (*B, U, k, k).
        h: B^T r with shape (*B, U, k, C).
        rr: r^T r summed over blocks and columns, with shape (*B).
        log_prec: sum of log lambda over points and units, with shape (*B).
        count: number of observations, points times units, with shape (*B).
    """

    gram: Tensor
    h: Tensor
    rr: Tensor
    log_prec: Tensor
    count: Tensor

    def split(self) -> SiteSum:
        """Return the same sums with one block for each unit, for sets in which units do not share their precisions."""
        return dataclasses.replace(self, gram=_split_block(self.gram, self.h.shape[-1]), h=_split_columns(self.h))

    def __add__(self, other: SiteSum) -> SiteSum:
        """Return the sums over both sets of points."""
        if self.h.shape[-1] != other.h.shape[-1]:
            return self.split() + other.split()
        return SiteSum(
            self.gram + other.gram,
            self.h + other.h,
            self.rr + other.rr,
            self.log_prec + other.log_prec,
            self.count + other.count,
        )

    def condition(self, factor: Factor) -> Conditional:
        """Factorise M = I + B^T B once and return q(eps); cost k^3 / 3 a block."""
        eye = torch.eye(self.gram.shape[-1], dtype=self.gram.dtype, device=self.gram.device)
        R = cholesky(self.gram + eye)
        m = cho_solve(R, self.h)
        quad = self.rr - (self.h * m).sum((-3, -2, -1))
        return Conditional(factor, m, R, quad, self.log_prec, self.count, self, None, None)


def site_sum(factor: Factor, A: Tensor, sites: Sites) -> SiteSum:
    """Sum the points of one set: M - I = B^T B and h = B^T r.

    Arguments:
        factor: L of the layer's prior.
        A: features with shape (*B, N, p).
        sites: pseudo-observations of these points.
    """
    blocks, _ = sites.columns(factor)
    B = _whiten(factor, A, sites.root_prec)
    r = _to_columns(sites.resid * sites.root_prec, blocks)
    log_prec, count = _log_prec(sites.root_prec, sites.resid.shape[-1])
    return SiteSum(B.mT @ B, B.mT @ r, (r * r).sum((-3, -2, -1)), log_prec, count)


@dataclass(frozen=True, eq=False)
class Conditional:
    """Be q(eps) of one layer: Gaussian with prior N(0, I), in either of its two forms.

    In weight space `sums` is there and `root` is R with R R^T = I + B^T B; in function space `B` and `r` are there and `root` is C with
    C C^T = I + B B^T.

    Arguments:
        factor: L of the layer's prior.
        m: mean of eps with shape (*B, U, k, C).
        root: R with shape (*B, U, k, k), or C with shape (*B, U, N, N).
        quad: r^T (I + B B^T)^{-1} r summed over blocks and columns, with shape (*B).
        log_prec: sum of log lambda with shape (*B).
        count: number of observations with shape (*B).
        sums: the sums over points, in weight space.
        B: B with shape (*B, U, N, k), in function space.
        r: r with shape (*B, U, N, C), in function space.
    """

    factor: Factor
    m: Tensor
    root: Tensor
    quad: Tensor
    log_prec: Tensor
    count: Tensor
    sums: SiteSum | None
    B: Tensor | None
    r: Tensor | None

    @property
    def mean(self) -> Tensor:
        """Return the mean of eps with shape (*B, d, k)."""
        return _to_units(self.m)

    @property
    def covariance(self) -> Tensor:
        """Return the covariance of eps of each block, with shape (*B, U, k, k); for inspection, not used in the algebra."""
        k = self.m.shape[-2]
        eye = torch.eye(k, dtype=self.m.dtype, device=self.m.device)
        if self.B is None:
            half = solve_lower(self.root, eye.expand(*self.root.shape[:-2], k, k))
            return half.mT @ half
        half = solve_lower(self.root, self.B)
        return eye - half.mT @ half

    @property
    def log_det(self) -> Tensor:
        """Return log |I + B^T B| = log |I + B B^T| summed over units, with shape (*B)."""
        return self.m.shape[-1] * log_det(self.root).sum(-1)

    @property
    def trace(self) -> Tensor:
        """Return the trace of the covariance of eps, summed over units, with shape (*B)."""
        inner = self._inverse_root.square().sum((-3, -2, -1))
        if self.B is not None:
            inner = inner + (self.B.shape[-1] - self.B.shape[-2]) * self.B.shape[-3]
        return self.m.shape[-1] * inner

    @property
    def kl(self) -> Tensor:
        """Return KL(q || p) = (||m||^2 + tr Sigma - k + log|M|) / 2 summed over units, with shape (*B)."""
        k = self.m.shape[-2] * self.m.shape[-3] * self.m.shape[-1]
        return 0.5 * (self.m.square().sum((-3, -2, -1)) + self.trace - k + self.log_det)

    @property
    def log_z(self) -> Tensor:
        """Return log Z = log N(y~; A mean, A L L^T A^T + diag(1 / lambda)) summed over units, with shape (*B)."""
        return 0.5 * (self.log_prec - self.count * math.log(2 * math.pi) - self.log_det - self.quad)

    @property
    def _inverse_root(self) -> Tensor:
        """Return R^{-1} (or C^{-1}): the trace needs it, and once there it turns the solves for variances into products."""
        if self.root.requires_grad and not torch.is_grad_enabled():
            return lower_inverse(self.root)  # not kept: it has no graph, and may be asked for again with one
        if "inverse" not in self.__dict__:
            self.__dict__["inverse"] = lower_inverse(self.root)
        inverse: Tensor = self.__dict__["inverse"]
        return inverse

    def _projected(self, A: Tensor) -> Tensor:
        """Return A L laid out as (*B, U, M, k), one block for each unit unless the units share q's covariance."""
        return self.factor.project(A).movedim(-2, -3).expand(*self.m.shape[:-3], self.m.shape[-3], -1, -1)

    def _half(self, P: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return V, and P or None, such that A w has covariance V^T V, or P P^T - V^T V."""
        if self.B is None:
            return self._inverse_root @ P.mT, None
        return self._inverse_root @ (self.B @ P.mT), P

    def variance(self, A: Tensor) -> Tensor:
        """Return the variances of A w with shape (*B, M, d) for features A with shape (*B, M, p)."""
        V, P = self._half(self._projected(A))
        v = V.square().sum(-2)
        v = v if P is None else P.square().sum(-1) - v
        return v.movedim(-2, -1).repeat_interleave(self.m.shape[-1], dim=-1)

    def joint_covariance(self, A: Tensor) -> Tensor:
        """Return the covariances of A w over points, with shape (*B, d, M, M)."""
        V, P = self._half(self._projected(A))
        K = V.mT @ V if P is None else P @ P.mT - V.mT @ V
        return K.repeat_interleave(self.m.shape[-1], dim=-3)

    def draw(self, z: Tensor) -> Tensor:
        """Return draws of eps with shape (*S, *B, d, k) for standard normal z of that shape.

        Weight space: m + R^{-T} z. Function space: m + z - B^T C^{-T} (C + I)^{-1} B z, a square root of the same covariance.
        """
        lead, (blocks, k, C) = z.shape[: z.ndim - self.m.ndim + 1], self.m.shape[-3:]
        columns = z.reshape(lead.numel(), *self.m.shape[:-3], blocks, C, k)
        joined = columns.movedim(0, -2).flatten(-3, -2).mT  # (*B, U, k, C draws): one solve serves every draw
        if self.B is None:
            e = solve_lower_transposed(self.root, joined)
        else:
            eye = torch.eye(self.root.shape[-1], dtype=z.dtype, device=z.device)
            inner = solve_lower(self.root + eye, self.B @ joined)
            e = joined - self.B.mT @ solve_lower_transposed(self.root, inner)
        e = e.mT.unflatten(-2, (C, -1)).movedim(-2, 0)
        return (e + self.m.mT).reshape(z.shape)

    def update(self, A: Tensor, sites: Sites) -> Conditional:
        """Return q(eps) given these points too: sums add up, so the order in which points arrive does not matter.

        The ratio of evidences of the new points given the old is `exp(new.log_z - old.log_z)`.

        Arguments:
            A: features of the new points with shape (*B, M, p).
            sites: their pseudo-observations.
        """
        if self.sums is not None:
            return (self.sums + site_sum(self.factor, A, sites)).condition(self.factor)
        assert self.B is not None and self.r is not None
        old_B, old_r = self.B, self.r
        new_B, new_r = _whiten(self.factor, A, sites.root_prec), _to_columns(sites.resid * sites.root_prec, sites.columns(self.factor)[0])
        if old_r.shape[-1] != new_r.shape[-1]:
            old_B, old_r = _split_block(old_B, old_r.shape[-1]), _split_columns(old_r)
            new_B, new_r = _split_block(new_B, new_r.shape[-1]), _split_columns(new_r)
        log_prec, count = _log_prec(sites.root_prec, sites.resid.shape[-1])
        B, r = torch.cat([old_B, new_B], dim=-2), torch.cat([old_r, new_r], dim=-2)
        return _from_whitened(self.factor, B, r, self.log_prec + log_prec, self.count + count)

    def expected_log_lik(self, A: Tensor, sites: Sites) -> Tensor:
        """Return E_q[sum_n log N(y~_n; a_n w, 1 / lambda_n)] summed over units, with shape (*B)."""
        fit = A @ self.factor.apply(self.mean).mT
        error = ((sites.resid - fit).square() + self.variance(A)) * sites.root_prec.square()
        log_prec, count = _log_prec(sites.root_prec, sites.resid.shape[-1])
        return 0.5 * (log_prec - count * math.log(2 * math.pi) - error.sum((-2, -1)))


def condition(factor: Factor, A: Tensor, sites: Sites, space: str | None = None) -> Conditional:
    """Condition one layer on its pseudo-observations.

    Cost a block: N k p for B (N k if L is diagonal) + min(N, k)^2 max(N, k) + min(N, k)^3 / 3.

    Arguments:
        factor: L of the layer's prior.
        A: features with shape (*B, N, p).
        sites: pseudo-observations of these points.
        space: "weight", "function", or None for the cheaper one.

    Returns:
        q(eps) for the batch *B.

    Example:
        >>> from bnnp.priors import DiagonalFactor
        >>> q = condition(DiagonalFactor(torch.ones(1, 1)), torch.ones(1, 1), Sites(torch.ones(1, 1), torch.ones(1, 1)))
        >>> q.mean, q.covariance
        (tensor([[0.5000]]), tensor([[[0.5000]]]))
    """
    if space is None:
        space = "weight" if A.shape[-2] >= factor.rank else "function"
    if space == "weight":
        return site_sum(factor, A, sites).condition(factor)
    blocks, _ = sites.columns(factor)
    B = _whiten(factor, A, sites.root_prec)
    r = _to_columns(sites.resid * sites.root_prec, blocks)
    log_prec, count = _log_prec(sites.root_prec, sites.resid.shape[-1])
    return _from_whitened(factor, B, r, log_prec, count, space)


def _from_whitened(factor: Factor, B: Tensor, r: Tensor, log_prec: Tensor, count: Tensor, space: str | None = None) -> Conditional:
    if space is None and B.shape[-2] >= B.shape[-1]:
        return SiteSum(B.mT @ B, B.mT @ r, (r * r).sum((-3, -2, -1)), log_prec, count).condition(factor)
    C = cholesky(B @ B.mT + torch.eye(B.shape[-2], dtype=B.dtype, device=B.device))
    a = cho_solve(C, r)
    return Conditional(factor, B.mT @ a, C, (r * a).sum((-3, -2, -1)), log_prec, count, None, B, r)


def _chunks(blocks: int, batch: int, N: int, k: int) -> list[tuple[int, int]]:
    size = max(1, int(CHUNK_BYTES / (8 * max(batch * N * k, 1))))
    return [(i, min(i + size, blocks)) for i in range(0, blocks, size)]


def _cut(x: Tensor, start: int, stop: int) -> Tensor:
    return x if x.shape[-1] == 1 else x[..., start:stop]


def draw_canonical(factor: Factor, A: Tensor, sites: Sites, num_samples: int, normal: Normal, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw eps from q with noise that belongs to the weights, not to the points.

    eps = m + R^{-T} z, z of k numbers a unit: the draw is the same function of the data whatever the order, the padding
    and the batching of the points, for any number of them. It needs the weight-space factor: cost k^3 / 3 a block, whatever N.
    Layers of more than `CANONICAL_RANK` columns with fewer points take `draw_fused`, for which this holds in distribution only.

    Arguments:
        factor: L of the layer's prior.
        A: features with shape (Sa, T, N, p), Sa = S or 1.
        sites: pseudo-observations of these points.
        num_samples: S.
        normal: source of standard normal numbers of a given shape (S, T, d, k), in the precision of the factorisations.
        dtype: precision of the factorisations.

    Returns:
        eps with shape (S, T, d, k) and the KL divergence with shape (Sa, T).
    """
    if factor.rank > CANONICAL_RANK and A.shape[-2] < factor.rank:
        return draw_fused(factor, A, sites, num_samples, normal, dtype)
    factor, A, sites = computed(factor, A, sites, dtype)
    T, d, k = A.shape[1], sites.resid.shape[-1], factor.rank
    z = normal((num_samples, T, d, k))
    if A.shape[-2] == 0:
        return z, A.new_zeros(A.shape[:2])
    if sites.columns(factor)[0] == 1:
        return _draw_once(factor, A, sites, z)
    eps, kl = [], torch.zeros(A.shape[:2], dtype=A.dtype, device=A.device)
    for i, j in _chunks(d, 4 * A.shape[0] * T, max(A.shape[-2], k), k):
        part = Sites(sites.resid[..., i:j], _cut(sites.root_prec, i, j))
        drawn, part_kl = _draw_once(factor.slice(i, j), A, part, z[..., i:j, :])
        eps.append(drawn)
        kl = kl + part_kl
    return torch.cat(eps, dim=-2), kl


def _draw_once(factor: Factor, A: Tensor, sites: Sites, z: Tensor) -> tuple[Tensor, Tensor]:
    """Draw m + R^{-T} z, once for each of S conditionals or S times from one, with the KL divergence from the cheaper space.

    The factor R does not depend on the order of the points (up to rounding), as a square root in function space would.
    """
    q = site_sum(factor, A, sites).condition(factor)
    kl = q.kl if A.shape[-2] >= factor.rank else condition(factor, A, sites, "function").kl
    return (q.draw(z.unsqueeze(1)).squeeze(1) if q.m.shape[0] == 1 else q.draw(z)), kl


def computed(factor: Factor, A: Tensor, sites: Sites, dtype: torch.dtype) -> tuple[Factor, Tensor, Sites]:
    """Move a layer's problem to the device and precision of the factorisations."""
    factor = factor.rebuild(*(to_compute(t, dtype) for t in factor.tensors))
    return factor, to_compute(A, dtype), Sites(to_compute(sites.resid, dtype), to_compute(sites.root_prec, dtype))


def draw_fused(factor: Factor, A: Tensor, sites: Sites, num_samples: int, normal: Normal, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw eps from q and give its KL divergence, with a backward pass written by hand.

    eps = eps_0 + B^T G^{-1} (r - B eps_0 - z') with eps_0 and z' standard normal (Matheron), which equals M^{-1} (B^T (r - z') + eps_0):
    both spaces give the same draw, and its gradient needs solves only. Blocks are taken in chunks that stay in the cache;
    B is made again in the backward pass, so memory is min(N, k)^2 a block.

    Arguments:
        factor: L of the layer's prior.
        A: features with shape (Sa, T, N, p), Sa = S or 1: with 1 there is one factorisation for all S draws.
        sites: pseudo-observations of these points.
        num_samples: S.
        normal: source of standard normal numbers of a given shape, in the precision of the factorisations.
        dtype: precision of the factorisations.

    Returns:
        eps with shape (S, T, d, k) and the KL divergence with shape (Sa, T).
    """
    factor, A, sites = computed(factor, A, sites, dtype)
    Sa, T, N, _ = A.shape
    S, d, k = num_samples, sites.resid.shape[-1], factor.rank
    eps_0, z = normal((S, T, d, k)), normal((S, T, N, d))
    if N == 0:
        return eps_0, A.new_zeros(Sa, T)
    blocks, _ = sites.columns(factor)
    resid = (sites.resid * sites.root_prec).expand(Sa, T, N, d)
    r = _to_columns(resid, blocks).contiguous()
    rz = _columns_of_draws(resid - z, Sa, blocks)
    e0 = _columns_of_draws(eps_0.mT, Sa, blocks)
    if blocks == 1:  # one small B for all units: kept for the backward pass instead of made again
        B = _whiten(factor, A, sites.root_prec).expand(Sa, T, 1, N, k)
        eps, kl = _FusedDraw.apply(None, B, None, r, rz, e0)  # type: ignore[no-untyped-call]
    else:
        eps, kl = _FusedDraw.apply(factor, A, sites.root_prec, r, rz, e0, *factor.tensors)  # type: ignore[no-untyped-call]
    out = eps.unflatten(-1, (-1, S // Sa)).permute(5, 0, 1, 2, 4, 3)  # (S/Sa, Sa, T, U, C, k)
    return out.reshape(S, T, d, k), kl


def _columns_of_draws(x: Tensor, Sa: int, blocks: int) -> Tensor:
    """Bring (S, T, N, d) to (Sa, T, U, N, C S/Sa): draws from one conditional are columns of one solve."""
    S, T, N, d = x.shape
    parts = x.reshape(S // Sa, Sa, T, N, blocks, d // blocks)
    return parts.permute(1, 2, 4, 3, 5, 0).reshape(Sa, T, blocks, N, -1)


class _FusedDraw(torch.autograd.Function):
    """Compute (eps, KL) from B = diag(root_prec) A L, in chunks of blocks; without a factor, B itself comes in the place of A."""

    @staticmethod
    def forward(
        ctx: Any, factor: Factor | None, A: Tensor, root: Tensor | None, r: Tensor, rz: Tensor, e0: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        Sa, T, N = r.shape[0], r.shape[1], r.shape[3]
        k, blocks = e0.shape[-2], r.shape[2]
        ctx.weight = k <= N
        ctx.chunks = _chunks(blocks, Sa * T, N, max(k, N))
        ctx.factor = factor
        eps, m = torch.empty_like(e0), r.new_empty(Sa, T, blocks, k, r.shape[-1])
        kl, inverses = r.new_zeros(Sa, T), []
        for i, j in ctx.chunks:
            B = A if factor is None or root is None else _whiten(factor.slice(i, j), A, _cut(root, i, j))
            at = (slice(None), slice(None), slice(i, j))
            Q, half_log_det = _inverse_root(B, ctx.weight)
            m[at] = _apply(B, Q, B.mT @ r[at], r[at], ctx.weight)
            eps[at] = _apply_draw(B, Q, rz[at], e0[at], ctx.weight)
            trace = Q.square().sum((-2, -1)) + (0 if ctx.weight else k - N)
            C = r.shape[-1]
            kl += 0.5 * (m[at].square().sum((-2, -1)) + C * (trace - k + 2 * half_log_det)).sum(-1)
            inverses.append(Q)
        ctx.save_for_backward(A, root, r, rz, eps, m, *tensors, *inverses)
        ctx.num_tensors = len(tensors)
        return eps, kl

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        g_eps, g_kl = grads
        A, root, r, rz, eps, m, *rest = ctx.saved_tensors
        tensors, inverses = rest[: ctx.num_tensors], rest[ctx.num_tensors :]
        factor = None if ctx.factor is None else ctx.factor.rebuild(*(t.detach() for t in tensors))
        g = g_kl[:, :, None, None, None]
        g_r, g_rz = torch.empty_like(r), torch.empty_like(rz)
        g_A, g_root = torch.zeros_like(A), None if root is None else torch.zeros_like(root)
        g_tensors = [torch.zeros_like(t) for t in tensors]
        for (i, j), Q in zip(ctx.chunks, inverses, strict=True):
            at = (slice(None), slice(None), slice(i, j))
            leaves, B_leaf = ([], A) if factor is None else _whiten_again(factor.slice(i, j), A, _cut(root, i, j))
            B = B_leaf.detach()
            inner = Q.mT @ Q  # Sigma in weight space, G^{-1} in function space
            c = _solve(B, inner, g_eps[at], ctx.weight)
            e = _solve(B, inner, g * m[at], ctx.weight)
            Bc, Be = B @ c, B @ e
            D = inner - inner @ inner
            D = D.mul_(g * r.shape[-1])
            pairs = (eps[at], c, m[at], e)
            if ctx.weight and r.shape[-1] >= WIDE_COLUMNS:
                g_B = _gradient_of_wide(B, D, *pairs, r[at], rz[at])
            else:
                lefts = torch.cat([-Bc, rz[at] - B @ eps[at], -Be, r[at] - B @ m[at]], dim=-1)
                g_B = (B @ D if ctx.weight else D @ B) + lefts @ torch.cat(pairs, dim=-1).mT
            g_r[at], g_rz[at] = Be, Bc
            if g_root is None:
                g_A = g_B
                continue
            found = torch.autograd.grad(B_leaf, leaves, g_B)
            g_A += found[0]
            _cut(g_root, i, j).add_(found[1])
            for total, piece in zip(g_tensors, found[2:], strict=True):
                (total if total.shape[0] == 1 else total[i:j]).add_(piece)
        return (None, g_A, g_root, g_r, g_rz, None, *g_tensors)


def _whiten_again(part: Factor, A: Tensor, root: Tensor) -> tuple[list[Tensor], Tensor]:
    """Make B of one chunk again, with a graph that leads to A, to the precisions and to the factor."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (A, root, *part.tensors)]
        return leaves, _whiten(part.rebuild(*leaves[2:]), leaves[0], leaves[1])


def _gradient_of_wide(B: Tensor, D: Tensor, eps: Tensor, c: Tensor, m: Tensor, e: Tensor, r: Tensor, rz: Tensor) -> Tensor:
    """Return B D - B c eps^T + (rz - B eps) c^T - B e m^T + (r - B m) e^T, gathered so that B is multiplied once.

    For many columns: with X = c eps^T + e m^T it is B (D - X - X^T) + rz c^T + r e^T.
    """
    X = (c @ eps.mT).flatten(0, 2).baddbmm_(e.flatten(0, 2), m.flatten(0, 2).mT).view_as(D)
    g_B = B @ (D - X - X.mT)
    g_B.flatten(0, 2).baddbmm_(rz.flatten(0, 2), c.flatten(0, 2).mT).baddbmm_(r.flatten(0, 2), e.flatten(0, 2).mT)
    return g_B


def _inverse_root(B: Tensor, weight: bool) -> tuple[Tensor, Tensor]:
    """Return Q = R^{-1} with R R^T = I + B^T B (or I + B B^T), and log |R|."""
    M = B.mT @ B if weight else B @ B.mT
    M.diagonal(dim1=-2, dim2=-1).add_(1.0)
    R = cholesky(M)
    return lower_inverse(R), R.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _apply(B: Tensor, Q: Tensor, h: Tensor, r: Tensor, weight: bool) -> Tensor:
    """Return (I + B^T B)^{-1} B^T r, given h = B^T r."""
    return Q.mT @ (Q @ h) if weight else B.mT @ (Q.mT @ (Q @ r))


def _apply_draw(B: Tensor, Q: Tensor, rz: Tensor, e0: Tensor, weight: bool) -> Tensor:
    """Return the draw M^{-1} (B^T rz + e0) = e0 + B^T G^{-1} (rz - B e0)."""
    if weight:
        return Q.mT @ (Q @ (B.mT @ rz + e0))
    return e0 + B.mT @ (Q.mT @ (Q @ (rz - B @ e0)))


def _solve(B: Tensor, inner: Tensor, v: Tensor, weight: bool) -> Tensor:
    """Return (I + B^T B)^{-1} v from Sigma, or from G^{-1} by Woodbury's identity."""
    return inner @ v if weight else v - B.mT @ (inner @ (B @ v))
