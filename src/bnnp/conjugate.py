"""The whitened layer: a Gaussian prior mean + L eps met by pseudo-observations, solved in the space of eps.

With features A (N x p), precisions lambda and pseudo-observations y~ of one unit, let

    B = diag(lambda)^(1/2) A L    (N x k),        r = diag(lambda)^(1/2) (y~ - A mean).

Then q(eps) has covariance (I + B^T B)^{-1} and mean (I + B^T B)^{-1} B^T r. Two forms give the same q: weight space factorises
I + B^T B (k x k), function space I + B B^T (N x N); `condition` takes the smaller. A masked point has lambda = 0 exactly, so its row
of B and its r vanish. Nothing is inverted that is not I + (positive semi-definite), and no jitter enters.

With N >= k the sums over points are taken in the space of features first, G = sum_n lambda_n a_n a_n^T and c = sum_n lambda_n resid_n a_n,
and brought to eps once, B^T B = L^T G L and B^T r = L^T c: B is never formed, units that share their precisions share G, and the points
may come in any number of sets (`PointSum`).

Blocks and columns: a layer of d units is U blocks of C columns, U C = d. Where units have their own factor L or their own
precisions, U = d and C = 1; where they share both, U = 1 and C = d, and one factorisation serves the layer.

References:
    Global inducing point variational posteriors for Bayesian neural networks and deep Gaussian processes
    (Ober and Aitchison, 2021), section 3.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnnp.factors import Factor, Sites
from bnnp.linalg import cho_solve, cholesky, log_det, lower_inverse, solve_lower, solve_lower_transposed, to_compute

__all__ = ["Conditional", "PointSum", "SiteSum", "Sites", "computed", "condition", "cut", "point_sum", "site_sum", "to_columns", "whiten"]

GRAM_POINTS = 256
"""How many points are taken at once while Gram matrices with several precisions are summed: what they need stays in the cache."""


def to_columns(x: Tensor, blocks: int) -> Tensor:
    """Bring (*B, N, d) to (*B, U, N, C)."""
    return x.unflatten(-1, (blocks, -1)).movedim(-2, -3)


def _to_units(eps: Tensor) -> Tensor:
    """Bring (*B, U, k, C) to (*B, d, k)."""
    return eps.mT.flatten(-3, -2)


def whiten(factor: Factor, A: Tensor, root_prec: Tensor) -> Tensor:
    """Return B with shape (*B, U, N, k); U is the larger of the blocks of the factor and of the precisions."""
    scaled = factor.project(A) * root_prec.unsqueeze(-1)
    return scaled.movedim(-2, -3).contiguous()


def cut(x: Tensor, start: int, stop: int) -> Tensor:
    """Return the precisions of the units from `start` to `stop`; shared ones are their own slice."""
    return x if x.shape[-1] == 1 else x[..., start:stop]


def _split_block(x: Tensor, columns: int) -> Tensor:
    """Repeat one block for each of its columns; blocks of one column stay as they are."""
    return x if columns == 1 else x.expand(*x.shape[:-3], columns, -1, -1)


def _split_columns(x: Tensor) -> Tensor:
    """Bring (*B, 1, a, C) to (*B, C, a, 1); blocks of one column stay as they are."""
    return x if x.shape[-1] == 1 else x.movedim(-1, -3).squeeze(-2).unsqueeze(-1)


def _log_prec(root_prec: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Return sum log lambda and the number of observations, both over points and units, each with shape (*B)."""
    log, count = _log_prec_each(root_prec)
    times = d // root_prec.shape[-1]
    return times * log.sum(-1), times * count.sum(-1)


def _log_prec_each(root_prec: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum log lambda and the number of observations over points, each with shape (*B, V)."""
    seen = root_prec > 0
    log = 2.0 * torch.where(seen, root_prec, torch.ones_like(root_prec)).log()
    return log.sum(-2), seen.sum(-2).to(log.dtype)


class _WeightedGram(torch.autograd.Function):
    """Compute G_v = sum_n w_nv a_n a_n^T, with shape (*B, V, p, p), keeping nothing but A and w.

    Products of pairs of features are made for a chunk of points, each pair once, and summed over points in one matrix product for all v.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(A, w)
        V, (N, p), count = w.shape[-1], A.shape[-2:], math.prod(A.shape[:-2])
        starts = list(itertools.accumulate(range(p, 0, -1), initial=0))
        packed = A.new_zeros(count, V, starts[-1])
        pairs = A.new_empty(min(N, GRAM_POINTS), starts[-1])
        for total, a, v in zip(packed, A.reshape(count, N, p), w.reshape(count, N, V), strict=True):
            for i in range(0, N, GRAM_POINTS):
                part = a[i : i + GRAM_POINTS]
                rows = pairs[: len(part)]
                for k in range(p):
                    torch.mul(part[:, k:], part[:, k : k + 1], out=rows[:, starts[k] : starts[k + 1]])
                total.addmm_(v[i : i + GRAM_POINTS].mT, rows)
        upper = torch.triu_indices(p, p, device=A.device)
        G = A.new_empty(*packed.shape[:-1], p, p)
        G[..., upper[0], upper[1]] = packed
        G[..., upper[1], upper[0]] = packed
        return G.reshape(*A.shape[:-2], V, p, p)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        (A, w), (g,) = ctx.saved_tensors, grads
        V, (N, p), count = w.shape[-1], A.shape[-2:], math.prod(A.shape[:-2])
        g_A, g_w = torch.empty_like(A, memory_format=torch.contiguous_format), torch.empty_like(w, memory_format=torch.contiguous_format)
        D = (g + g.mT).movedim(-3, -2).reshape(count, p, V * p)
        parts = D, A.reshape(count, N, p), w.reshape(count, N, V), g_A.view(count, N, p), g_w.view(count, N, V)
        for d, a, v, to_a, to_w in zip(*parts, strict=True):
            for i in range(0, N, GRAM_POINTS):
                at = slice(i, i + GRAM_POINTS)
                P = (a[at] @ d).unflatten(-1, (V, p))  # (n, V, p)
                to_a[at] = (v[at].unsqueeze(-2) @ P).squeeze(-2)
                to_w[at] = 0.5 * (P @ a[at].unsqueeze(-1)).squeeze(-1)
        return g_A, g_w


@dataclass(frozen=True, eq=False)
class PointSum:
    """Hold the sums over a set of points in the space of features; sets add up, in any order.

    V is the number of different precisions, d or 1.

    Arguments:
        G: sum_n lambda_n a_n a_n^T with shape (*B, V, p, p).
        c: sum_n lambda_n resid_n a_n with shape (*B, p, d).
        rr: sum_n lambda_n resid_n^2 with shape (*B, d).
        log_prec: sum_n log lambda_n with shape (*B, V).
        count: number of observations with shape (*B, V).
    """

    G: Tensor
    c: Tensor
    rr: Tensor
    log_prec: Tensor
    count: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the sums as a tuple."""
        return (self.G, self.c, self.rr, self.log_prec, self.count)

    def slice(self, start: int, stop: int) -> PointSum:
        """Return the sums of the units from `start` to `stop`."""
        if self.G.shape[-3] == 1:
            return PointSum(self.G, self.c[..., start:stop], self.rr[..., start:stop], self.log_prec, self.count)
        whole = self.G[..., start:stop, :, :], self.c[..., start:stop], self.rr[..., start:stop]
        return PointSum(*whole, self.log_prec[..., start:stop], self.count[..., start:stop])

    def tempered(self, log_share: Tensor) -> PointSum:
        """Return the sums with all precisions multiplied by exp(log_share), with shape (*B)."""
        t = log_share.exp()
        scaled = self.G * t[..., None, None, None], self.c * t[..., None, None], self.rr * t[..., None]
        return PointSum(*scaled, self.log_prec + self.count * log_share[..., None], self.count)

    def scaled(self, root: Tensor) -> PointSum:
        """Return the sums with all features multiplied by numbers with shape (*B)."""
        G, c = self.G * root.square()[..., None, None, None], self.c * root[..., None, None]
        return PointSum(G, c, *(t.expand(*root.shape, t.shape[-1]) for t in (self.rr, self.log_prec, self.count)))

    def whiten(self, factor: Factor) -> SiteSum:
        """Return the sums in the space of eps: B^T B = L^T G L and B^T r = L^T c; cost 2 p^2 k a block."""
        V, d = self.G.shape[-3], self.c.shape[-1]
        one_block = factor.blocks == 1 and V == 1
        h = factor.pull(self.c.unsqueeze(-3) if one_block else self.c.mT.unsqueeze(-1))
        log_prec, count = (d // V * x.sum(-1) for x in (self.log_prec, self.count))
        return SiteSum(factor.congruence(self.G), h, self.rr.sum(-1), log_prec, count)


def point_sum(A: Tensor, sites: Sites) -> PointSum:
    """Sum a set of points in the space of features; cost N p^2 for each of V precisions.

    Arguments:
        A: features with shape (*B, N, p).
        sites: pseudo-observations of these points.
    """
    w = sites.root_prec.square()
    G = (A.mT @ (A * w)).unsqueeze(-3) if w.shape[-1] == 1 else _WeightedGram.apply(A, w.expand(*A.shape[:-1], -1))  # type: ignore[no-untyped-call]
    weighted = w * sites.resid
    return PointSum(G, A.mT @ weighted, (weighted * sites.resid).sum(-2), *_log_prec_each(sites.root_prec))


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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the sums as a tuple."""
        return (self.gram, self.h, self.rr, self.log_prec, self.count)

    def scaled(self, root: Tensor | float) -> SiteSum:
        """Return the sums with all features multiplied by a number."""
        return dataclasses.replace(self, gram=self.gram * root**2, h=self.h * root)

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
    if A.shape[-2] >= A.shape[-1]:
        return point_sum(A, sites).whiten(factor)
    return _sum_of_rows(*_rows(factor, A, sites))


def _rows(factor: Factor, A: Tensor, sites: Sites) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return B, r, sum log lambda and the number of observations."""
    r = to_columns(sites.resid * sites.root_prec, sites.columns(factor)[0])
    return whiten(factor, A, sites.root_prec), r, *_log_prec(sites.root_prec, sites.resid.shape[-1])


def _sum_of_rows(B: Tensor, r: Tensor, log_prec: Tensor, count: Tensor) -> SiteSum:
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

    def group_covariance(self, A: Tensor, size: int) -> Tensor:
        """Return the covariances of A w within groups of `size` consecutive rows of A, for a layer of one unit.

        Returns:
            With shape (*B, M / size, size, size) for features A with shape (*B, M, p).
        """
        V, P = self._half(self._projected(A))
        M = A.shape[-2] // size
        grouped = V.squeeze(-3).mT.unflatten(-2, (M, size))  # (*B, M / size, size, .)
        if P is None:
            return grouped @ grouped.mT
        prior = P.squeeze(-3).unflatten(-2, (M, size))
        return prior @ prior.mT - grouped @ grouped.mT

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

    def log_ratio(self, eps: Tensor) -> Tensor:
        """Return log q(eps) - log p(eps) = (log|M| - (eps - m)^T M (eps - m) + ||eps||^2) / 2 summed over units.

        Arguments:
            eps: weights with shape (*S, *B, d, k).

        Returns:
            With shape (*S, *B).
        """
        from_mean = (eps - self.mean).unflatten(-2, (self.m.shape[-3], -1)).mT  # (*S, *B, U, k, C)
        if self.B is None:
            quad = (self.root.mT @ from_mean).square().sum((-3, -2, -1))
        else:
            quad = (self.B @ from_mean).square().sum((-3, -2, -1)) + from_mean.square().sum((-3, -2, -1))
        return 0.5 * (self.log_det - quad + eps.square().sum((-2, -1)))

    def update(self, A: Tensor, sites: Sites) -> Conditional:
        """Return q(eps) given these points too: sums add up, so the order in which points arrive does not matter.

        The ratio of evidences of the new points given the old is `exp(new.log_z - old.log_z)`.

        Arguments:
            A: features of the new points with shape (*B, M, p).
            sites: their pseudo-observations.
        """
        if self.B is None or self.r is None or self.B.shape[-2] + A.shape[-2] >= self.factor.rank:
            return self.extended(site_sum(self.factor, A, sites))  # never a matrix of more rows than weights
        old_B, old_r = self.B, self.r
        new_B, new_r, log_prec, count = _rows(self.factor, A, sites)
        if old_r.shape[-1] != new_r.shape[-1]:
            old_B, old_r = _split_block(old_B, old_r.shape[-1]), _split_columns(old_r)
            new_B, new_r = _split_block(new_B, new_r.shape[-1]), _split_columns(new_r)
        B, r = torch.cat([old_B, new_B], dim=-2), torch.cat([old_r, new_r], dim=-2)
        return _from_rows(self.factor, B, r, self.log_prec + log_prec, self.count + count)

    def extended(self, more: SiteSum) -> Conditional:
        """Return q(eps) given the points of these sums too, in weight space."""
        seen = self.sums
        if seen is None:
            assert self.B is not None and self.r is not None
            seen = _sum_of_rows(self.B, self.r, self.log_prec, self.count)
        return (seen + more).condition(self.factor)

    def expected_log_lik(self, A: Tensor, sites: Sites) -> Tensor:
        """Return E_q[sum_n log N(y~_n; a_n w, 1 / lambda_n)] summed over units, with shape (*B)."""
        fit = A @ self.factor.apply(self.mean).mT
        error = ((sites.resid - fit).square() + self.variance(A)) * sites.root_prec.square()
        log_prec, count = _log_prec(sites.root_prec, sites.resid.shape[-1])
        return 0.5 * (log_prec - count * math.log(2 * math.pi) - error.sum((-2, -1)))

    def expected_log_lik_of(self, sums: SiteSum) -> Tensor:
        """Return the same from the sums over the points: the squared error is rr - 2 h m + m^T gram m + tr(gram Sigma)."""
        if sums.h.shape[-1] != self.m.shape[-1]:
            sums = sums.split()
        m = self.m if sums.h.shape[-1] == self.m.shape[-1] else _split_columns(self.m)
        error = sums.rr - 2 * (sums.h * m).sum((-3, -2, -1)) + (m * (sums.gram @ m)).sum((-3, -2, -1))
        if self.B is None:
            Q = self._inverse_root  # Sigma = Q^T Q
            spread = ((Q @ sums.gram) * Q).sum((-2, -1))
        else:
            V = self._inverse_root @ self.B  # Sigma = I - V^T V
            spread = sums.gram.diagonal(dim1=-2, dim2=-1).sum(-1) - ((V @ sums.gram) * V).sum((-2, -1))
        times = self.m.shape[-1] * self.m.shape[-3] // spread.shape[-1]
        return 0.5 * (sums.log_prec - sums.count * math.log(2 * math.pi) - error - times * spread.sum(-1))


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
        >>> from bnnp.factors import DiagonalFactor
        >>> q = condition(DiagonalFactor(torch.ones(1, 1)), torch.ones(1, 1), Sites(torch.ones(1, 1), torch.ones(1, 1)))
        >>> q.mean, q.covariance
        (tensor([[0.5000]]), tensor([[[0.5000]]]))
    """
    if space is None:
        space = "weight" if A.shape[-2] >= factor.rank else "function"
    if space == "weight":
        return site_sum(factor, A, sites).condition(factor)
    return _from_rows(factor, *_rows(factor, A, sites))


def _from_rows(factor: Factor, B: Tensor, r: Tensor, log_prec: Tensor, count: Tensor) -> Conditional:
    C = cholesky(B @ B.mT + torch.eye(B.shape[-2], dtype=B.dtype, device=B.device))
    a = cho_solve(C, r)
    return Conditional(factor, B.mT @ a, C, (r * a).sum((-3, -2, -1)), log_prec, count, None, B, r)


def computed(factor: Factor, A: Tensor, sites: Sites, dtype: torch.dtype) -> tuple[Factor, Tensor, Sites]:
    """Move a layer's problem to the device and precision of the factorisations."""
    factor = factor.rebuild(*(to_compute(t, dtype) for t in factor.tensors))
    return factor, to_compute(A, dtype), sites.to(dtype)
