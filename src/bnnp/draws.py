"""Draws of a layer's weights from q, each with its KL divergence.

In weight space a draw is m + R^{-T} z, with noise z that belongs to the weights: the same function of the data whatever the order, the
padding, the batching and the streaming of the points. In function space, with fewer points than weights, it is Matheron's
eps_0 + B^T (C C^T)^{-1} (r - B eps_0 - z'), which factorises C C^T = I + B B^T only.

`draw_fused`, for training, has a backward pass written by hand. `draw_canonical`, for posteriors that people look at, stays in weight
space for any number of points. `draw_from_sums` starts from sums over points that were taken before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnnp.conjugate import Conditional, PointSum, computed, condition, cut, point_sum, to_columns, whiten
from bnnp.factors import Factor, Sites
from bnnp.linalg import cholesky, lower_inverse

__all__ = ["CANONICAL_RANK", "Normal", "draw_canonical", "draw_from_sums", "draw_fused"]

CANONICAL_RANK = 512
"""Widest layer whose draws are made in weight space whatever the number of points; see `draw_canonical`."""

CHUNK_BYTES = 6 * 2**20
"""How much one chunk of blocks may take in the fused draw: enough to keep the products busy, small enough for the cache."""

SUM_BYTES = 128 * 2**20
"""How much sums over points may take at once where units have their own precisions."""

Normal = Callable[[tuple[int, ...]], Tensor]


def _chunks(blocks: int, batch: int, N: int, k: int) -> list[tuple[int, int]]:
    size = max(1, int(CHUNK_BYTES / (8 * max(batch * N * k, 1))))
    return [(i, min(i + size, blocks)) for i in range(0, blocks, size)]


def draw_canonical(
    factor: Factor, A: Tensor, sites: Sites, num_samples: int, normal: Normal, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw eps = m + R^{-T} z from q with noise that belongs to the weights, not to the points.

    It needs the weight-space factor: cost k^3 / 3 a block, whatever N. Layers of more than `CANONICAL_RANK` columns with fewer points
    take a square root of the covariance in function space: then a draw depends on the order of the points, its distribution does not.

    Arguments:
        factor: L of the layer's prior.
        A: features with shape (Sa, T, N, p), Sa = S or 1.
        sites: pseudo-observations of these points.
        num_samples: S.
        normal: source of standard normal numbers of a given shape (S, T, d, k), in the precision of the factorisations.
        dtype: precision of the factorisations.

    Returns:
        eps with shape (S, T, d, k), the KL divergence with shape (Sa, T), and log q(eps) - log p(eps) with shape (S, T).
    """
    factor, A, sites = computed(factor, A, sites, dtype)
    (Sa, T, N, p), d, k = A.shape, sites.resid.shape[-1], factor.rank
    z = normal((num_samples, T, d, k))
    if N == 0:
        return z, A.new_zeros(Sa, T), A.new_zeros(num_samples, T)
    if k > CANONICAL_RANK and k > N:
        found = [
            _draw(condition(factor.slice(i, j), A, Sites(sites.resid[..., i:j], cut(sites.root_prec, i, j)), "function"), z[..., i:j, :])
            for i, j in _pieces(factor, sites, 4 * Sa * T, N)
        ]
        return _joined(found)
    if p > N:  # here the divergence is cheaper in function space
        found = []
        for i, j in _pieces(factor, sites, 4 * Sa * T, k):
            part, sub = Sites(sites.resid[..., i:j], cut(sites.root_prec, i, j)), factor.slice(i, j)
            kl = condition(sub, A, part, "function").kl if k > N else None
            found.append(_draw(condition(sub, A, part, "weight"), z[..., i:j, :], kl))
        return _joined(found)
    # The sums over points of as many units as fit: of all where they share their precisions.
    size = d if sites.root_prec.shape[-1] == 1 else max(1, int(SUM_BYTES / (8 * Sa * T * p * p)))
    found = []
    for i in range(0, d, size):
        part = Sites(sites.resid[..., i : i + size], cut(sites.root_prec, i, i + size))
        found += _draws_of_sums(factor.slice(i, i + size), point_sum(A, part), z[..., i : i + size, :])
    return _joined(found)


def draw_from_sums(factor: Factor, sums: PointSum, num_samples: int, normal: Normal) -> tuple[Tensor, Tensor, Tensor]:
    """Draw as `draw_canonical` does, from sums over points with batch (Sa, T), in the precision of the sums."""
    factor = factor.rebuild(*(t.to(sums.c) for t in factor.tensors))
    z = normal((num_samples, sums.rr.shape[1], sums.c.shape[-1], factor.rank))
    return _joined(_draws_of_sums(factor, sums, z))


def _draws_of_sums(factor: Factor, sums: PointSum, z: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    found = []
    for i, j in _pieces(factor, sums, 4 * math.prod(sums.rr.shape[:2]), factor.rank):
        sub = factor.slice(i, j)
        found.append(_draw(sums.slice(i, j).whiten(sub).condition(sub), z[..., i:j, :]))
    return found


def _pieces(factor: Factor, of: Sites | PointSum, batch: int, N: int) -> list[tuple[int, int]]:
    """Return the ranges of units that are taken at once: all of them where they share one factorisation."""
    V, d = (of.root_prec.shape[-1], of.resid.shape[-1]) if isinstance(of, Sites) else (of.G.shape[-3], of.c.shape[-1])
    return [(0, d)] if factor.blocks == 1 and V == 1 else _chunks(d, batch, N, factor.rank)


def _draw(q: Conditional, z: Tensor, kl: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Draw once for each of S conditionals, or S times from one; with KL(q || p) and log q - log p."""
    once = q.m.shape[0] == 1
    z = z.unsqueeze(1) if once else z
    eps = q.draw(z)
    # In weight space R^T (eps - m) = z, which spares a product.
    ratio = 0.5 * (q.log_det - z.square().sum((-2, -1)) + eps.square().sum((-2, -1))) if q.B is None else q.log_ratio(eps)
    return (eps.squeeze(1), q.kl if kl is None else kl, ratio.squeeze(1)) if once else (eps, q.kl if kl is None else kl, ratio)


def _joined(found: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    eps, kl, ratio = zip(*found, strict=True)
    return torch.cat(eps, dim=-2), torch.stack(kl).sum(0), torch.stack(ratio).sum(0)


def draw_fused(factor: Factor, A: Tensor, sites: Sites, num_samples: int, normal: Normal, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw eps from q and give its KL divergence, with a backward pass written by hand.

    With N >= k the draw is m + R^{-T} z, the same as `draw_canonical` gives for the same noise; with N < k it is Matheron's. Blocks are
    taken in chunks that stay in the cache; B is made again in the backward pass, so memory is min(N, k)^2 a block.

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
    z = normal((S, T, d, k))
    if N == 0:
        return z, A.new_zeros(Sa, T)
    blocks, _ = sites.columns(factor)
    resid = (sites.resid * sites.root_prec).expand(Sa, T, N, d)
    r = to_columns(resid, blocks).contiguous()
    noise: tuple[Tensor, ...]
    if k > N:
        noise = _columns_of_draws(resid - normal((S, T, N, d)), Sa, blocks), _columns_of_draws(z.mT, Sa, blocks)
    else:
        noise = (_columns_of_draws(z.mT, Sa, blocks),)
    fused: Any = _FunctionDraw if k > N else _WeightDraw
    if blocks == 1:  # one small B for all units: kept for the backward pass instead of made again
        B = whiten(factor, A, sites.root_prec).expand(Sa, T, 1, N, k)
        eps, kl = fused.apply(None, B, None, r, *noise)
    else:
        eps, kl = fused.apply(factor, A, sites.root_prec, r, *noise, *factor.tensors)
    out = eps.unflatten(-1, (-1, S // Sa)).permute(5, 0, 1, 2, 4, 3)  # (S/Sa, Sa, T, U, C, k)
    return out.reshape(S, T, d, k), kl


def _columns_of_draws(x: Tensor, Sa: int, blocks: int) -> Tensor:
    """Bring (S, T, N, d) to (Sa, T, U, N, C S/Sa): draws from one conditional are columns of one solve."""
    S, T, N, d = x.shape
    parts = x.reshape(S // Sa, Sa, T, N, blocks, d // blocks)
    return parts.permute(1, 2, 4, 3, 5, 0).reshape(Sa, T, blocks, N, -1)


class _Chunked:
    """Go through the blocks of a layer in chunks, forwards and backwards; without a factor, B itself comes in the place of A."""

    def __init__(self, factor: Factor | None, A: Tensor, root: Tensor | None, chunks: list[tuple[int, int]]) -> None:
        self.factor, self.A, self.root, self.chunks = factor, A, root, chunks

    def B(self, i: int, j: int) -> Tensor:
        """Return B of the blocks from i to j."""
        if self.factor is None or self.root is None:
            return self.A
        return whiten(self.factor.slice(i, j), self.A, cut(self.root, i, j))

    def start(self) -> None:
        """Make room for the gradients."""
        self.g_A = torch.zeros_like(self.A)
        self.g_root = None if self.root is None else torch.zeros_like(self.root)
        self.g_tensors = [] if self.factor is None else [torch.zeros_like(t) for t in self.factor.tensors]

    def B_again(self, i: int, j: int) -> Tensor:
        """Make B of one chunk again, with a graph that leads to A, to the precisions and to the factor."""
        if self.factor is None or self.root is None:
            return self.A
        part, root = self.factor.slice(i, j), cut(self.root, i, j)
        with torch.enable_grad():
            self.leaves = [t.detach().requires_grad_() for t in (self.A, root, *part.tensors)]
            self.leaf = whiten(part.rebuild(*self.leaves[2:]), self.leaves[0], self.leaves[1])
        return self.leaf.detach()

    def add(self, i: int, j: int, g_B: Tensor) -> None:
        """Take the gradient of B of one chunk back to what it was made of."""
        if self.g_root is None:
            self.g_A = g_B
            return
        found = torch.autograd.grad(self.leaf, self.leaves, g_B)
        self.g_A += found[0]
        cut(self.g_root, i, j).add_(found[1])
        for total, piece in zip(self.g_tensors, found[2:], strict=True):
            (total if total.shape[0] == 1 else total[i:j]).add_(piece)


class _WeightDraw(torch.autograd.Function):
    """Compute (eps, KL) in weight space: eps = m + R^{-T} z with R R^T = M = I + B^T B."""

    @staticmethod
    def forward(
        ctx: Any, factor: Factor | None, A: Tensor, root: Tensor | None, r: Tensor, z: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        (Sa, T, blocks, N, C), k = r.shape, z.shape[-2]
        ctx.factor, ctx.chunks = factor, _chunks(blocks, Sa * T, N, max(k, N))
        walk = _Chunked(factor, A, root, ctx.chunks)
        eps, m, kl, inverses = torch.empty_like(z), r.new_empty(Sa, T, blocks, k, C), r.new_zeros(Sa, T), []
        for i, j in ctx.chunks:
            at, B = (slice(None), slice(None), slice(i, j)), walk.B(i, j)
            Q, half_log_det = _inverse_root(B.mT @ B)
            m[at] = Q.mT @ (Q @ (B.mT @ r[at]))
            eps[at] = m[at].repeat_interleave(z.shape[-1] // C, dim=-1) + Q.mT @ z[at]
            kl += 0.5 * (m[at].square().sum((-2, -1)) + C * (Q.square().sum((-2, -1)) - k + 2 * half_log_det)).sum(-1)
            inverses.append(Q)
        ctx.save_for_backward(A, root, r, z, m, *inverses, *tensors)
        return eps, kl

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        A, root, r, z, m, *rest = ctx.saved_tensors
        inverses, tensors = rest[: len(ctx.chunks)], rest[len(ctx.chunks) :]
        walk = _Chunked(None if ctx.factor is None else ctx.factor.rebuild(*tensors), A, root, ctx.chunks)
        walk.start()
        g, C, g_r = grads[1][:, :, None, None, None], r.shape[-1], torch.empty_like(r)
        for (i, j), Q in zip(ctx.chunks, inverses, strict=True):
            at = (slice(None), slice(None), slice(i, j))
            B, g_eps = walk.B_again(i, j), grads[0][at]
            e = Q.mT @ (Q @ (g * m[at] + g_eps.unflatten(-1, (C, -1)).sum(-1)))
            # From dR^{-1} = -Phi(R^{-1} dM R^{-T}) R^{-1}, where Phi keeps the lower triangle and half of the diagonal.
            X = (z[at] @ (Q @ g_eps).mT).tril_()
            K = Q @ Q.mT
            K.mul_(-g * C).sub_(X).sub_(X.mT)
            K.diagonal(dim1=-2, dim2=-1).add_((g * C).squeeze(-1)).add_(X.diagonal(dim1=-2, dim2=-1))
            D = Q.mT @ (K @ Q)  # what M gets, twice
            em = e @ m[at].mT
            walk.add(i, j, B @ D.sub_(em).sub_(em.mT) + r[at] @ e.mT)
            g_r[at] = B @ e
        return (None, walk.g_A, walk.g_root, g_r, None, *walk.g_tensors)


class _FunctionDraw(torch.autograd.Function):
    """Compute (eps, KL) in function space: eps = e0 + B^T (C C^T)^{-1} (rz - B e0) with rz = r - z' and C C^T = I + B B^T."""

    @staticmethod
    def forward(
        ctx: Any, factor: Factor | None, A: Tensor, root: Tensor | None, r: Tensor, rz: Tensor, e0: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        (Sa, T, blocks, N, C), k = r.shape, e0.shape[-2]
        ctx.factor, ctx.chunks = factor, _chunks(blocks, Sa * T, N, k)
        walk = _Chunked(factor, A, root, ctx.chunks)
        eps, m, kl, inverses = torch.empty_like(e0), r.new_empty(Sa, T, blocks, k, C), r.new_zeros(Sa, T), []
        for i, j in ctx.chunks:
            at, B = (slice(None), slice(None), slice(i, j)), walk.B(i, j)
            Q, half_log_det = _inverse_root(B @ B.mT)
            m[at] = B.mT @ (Q.mT @ (Q @ r[at]))
            eps[at] = e0[at] + B.mT @ (Q.mT @ (Q @ (rz[at] - B @ e0[at])))
            trace = Q.square().sum((-2, -1)) + k - N
            kl += 0.5 * (m[at].square().sum((-2, -1)) + C * (trace - k + 2 * half_log_det)).sum(-1)
            inverses.append(Q)
        ctx.save_for_backward(A, root, r, rz, eps, m, *inverses, *tensors)
        return eps, kl

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        A, root, r, rz, eps, m, *rest = ctx.saved_tensors
        inverses, tensors = rest[: len(ctx.chunks)], rest[len(ctx.chunks) :]
        walk = _Chunked(None if ctx.factor is None else ctx.factor.rebuild(*tensors), A, root, ctx.chunks)
        walk.start()
        g, C, g_r, g_rz = grads[1][:, :, None, None, None], r.shape[-1], torch.empty_like(r), torch.empty_like(rz)
        for (i, j), Q in zip(ctx.chunks, inverses, strict=True):
            at = (slice(None), slice(None), slice(i, j))
            B, inner = walk.B_again(i, j), Q.mT @ Q  # (C C^T)^{-1}
            c, e = (v - B.mT @ (inner @ (B @ v)) for v in (grads[0][at], g * m[at]))
            Bc, Be = B @ c, B @ e
            D = (inner - inner @ inner).mul_(g * C)
            lefts = torch.cat([-Bc, rz[at] - B @ eps[at], -Be, r[at] - B @ m[at]], dim=-1)
            walk.add(i, j, D @ B + lefts @ torch.cat([eps[at], c, m[at], e], dim=-1).mT)
            g_r[at], g_rz[at] = Be, Bc
        return (None, walk.g_A, walk.g_root, g_r, g_rz, None, *walk.g_tensors)


def _inverse_root(M: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q = R^{-1} with R R^T = I + M, and log |R|; M is overwritten."""
    M.diagonal(dim1=-2, dim2=-1).add_(1.0)
    R = cholesky(M)
    return lower_inverse(R), R.diagonal(dim1=-2, dim2=-1).log().sum(-1)
