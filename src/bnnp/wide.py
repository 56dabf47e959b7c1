"""Layers too wide for their drawn weights to be kept: what goes through them is computed without keeping the weights.

For training a drawn layer is needed at the points of context and target only. With W = mean + L eps and Matheron's rule
eps = eps_0 + B^T (I + B B^T)^{-1} (r - z' - B eps_0), its outputs at all points are

    A mean^T + F + P B^T (I + B B^T)^{-1} (r - z' - B eps_0),    P = A L,    F = P eps_0,    B eps_0 = diag(lambda)^(1/2) F at the context.

Where units share L and their precisions, the only thing as large as the weights is the noise eps_0, which is made again, chunk by chunk, in
the backward pass. Elsewhere the weights of a chunk of units are drawn, used, and drawn again in the backward pass.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bnnp.draws import Normal, draw_fused
from bnnp.factors import Given, Sites
from bnnp.linalg import cho_solve, cholesky, log_det, lower_inverse, to_compute

__all__ = ["WIDE_BYTES", "WIDE_RANK", "propagate"]

WIDE_BYTES = 2**28
"""How much the drawn weights of a layer may take in training before they are no longer kept."""

WIDE_RANK = 128
"""From this many weights of a unit on, layers of one factorisation cost less without their weights, given few points."""

CHUNK_BYTES = 2**26
"""How much the noise of a chunk of units may take."""


def propagate(given: Given, A: Tensor, sites: Sites, num_samples: int, normal: Normal, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the outputs of a layer drawn from its posterior, at context and further points, and its KL divergence.

    Arguments:
        given: the layer's prior, of independent units.
        A: features with shape (Sa, T, N + M, p) of the N points of the context and of M others, Sa = S or 1.
        sites: pseudo-observations of the context, as residuals from the mean, in the precision of the factorisations.
        num_samples: S.
        normal: source of standard normal numbers.
        dtype: precision of the factorisations.

    Returns:
        Outputs with shape (S, T, N + M, d), and the divergence with shape (Sa, T).
    """
    seed = zlib.crc32(normal((4,)).cpu().numpy().tobytes())
    shared = given.core.blocks == 1 and sites.root_prec.shape[-1] == 1
    H, kl = (_by_functions if shared else _by_chunks)(given, A, sites, num_samples, normal, dtype, seed)
    return (H if given.mix is None else H @ given.mix.mT), kl


def _noise(seed: int, number: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    generator = torch.Generator(device=like.device).manual_seed((seed + 7919 * number) % 2**63)
    return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)


def _units_at_once(num_samples: int, num_tasks: int, rank: int) -> int:
    return max(1, CHUNK_BYTES // (8 * num_samples * max(num_tasks, 1) * rank))


class _PriorFunctions(torch.autograd.Function):
    """Compute F = P eps_0 with shape (S, T, N, d) for P with shape (Sa, T, N, k), keeping P only."""

    @staticmethod
    def forward(ctx: Any, P: Tensor, num_samples: int, units: int, seed: int) -> Tensor:
        ctx.save_for_backward(P)
        ctx.rest = num_samples, units, seed
        T, N, k = P.shape[1:]
        F = P.new_empty(num_samples, T, N, units)
        size = _units_at_once(num_samples, T, k)
        for i in range(0, units, size):
            z = _noise(seed, i, (num_samples, T, min(size, units - i), k), P)
            F[..., i : i + size] = P @ z.mT
        return F

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (P,), (num_samples, units, seed), (g,) = ctx.saved_tensors, ctx.rest, grads
        T, k = P.shape[1], P.shape[-1]
        total, size = P.new_zeros(num_samples, *P.shape[1:]), _units_at_once(num_samples, T, k)
        for i in range(0, units, size):
            z = _noise(seed, i, (num_samples, T, min(size, units - i), k), P)
            total += g[..., i : i + size] @ z
        return (total if P.shape[0] == num_samples else total.sum(0, keepdim=True)), None, None, None


def _by_functions(
    given: Given, A: Tensor, sites: Sites, num_samples: int, normal: Normal, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    """Propagate where units share L and their precisions."""
    T, N, d = sites.resid.shape[1:]
    P = given.computed(dtype).core.project(to_compute(given.features(A), dtype)).squeeze(-2)
    F: Tensor = _PriorFunctions.apply(P, num_samples, d, seed)  # type: ignore[no-untyped-call]
    root, own = sites.root_prec, P[:, :, :N]
    B = root * own
    gram = B @ B.mT
    C = cholesky(gram + torch.eye(N, dtype=dtype, device=P.device))
    r = root * sites.resid
    w = cho_solve(C, r)
    excess = lower_inverse(C).square().sum((-2, -1)) - N  # tr Sigma - k
    kl = 0.5 * ((w * (gram @ w)).sum((-2, -1)) + d * (excess + log_det(C)))
    v = cho_solve(C.expand(num_samples, *C.shape[1:]), r - normal((num_samples, T, N, d)) - root * F[:, :, :N])
    H = F + (P @ B.mT) @ v
    return A @ given.mean.mT + H.to(A.dtype).to(A.device), kl


def _by_chunks(
    given: Given, A: Tensor, sites: Sites, num_samples: int, normal: Normal, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    """Propagate with the weights of a chunk of units at a time."""
    T, N, d = sites.resid.shape[1:]
    core, size = given.core, _units_at_once(num_samples, T, given.core.rank)
    seen, everywhere = given.features(A[:, :, :N]), given.features(A)

    def chunk(i: int, mean: Tensor, seen: Tensor, A: Tensor, everywhere: Tensor, resid: Tensor, root: Tensor, *tensors: Tensor) -> Any:
        calls = iter(range(2))

        def own(shape: tuple[int, ...]) -> Tensor:
            return _noise(seed, 2 * i + next(calls), shape, resid)

        part = core.rebuild(*tensors)
        eps, kl = draw_fused(part, seen, Sites(resid, root), num_samples, own, dtype)
        drawn = part.apply(eps.to(A.dtype).to(A.device))
        return A @ mean.mT + everywhere @ drawn.mT, kl

    found = []
    for i in range(0, d, size):
        at = slice(i, min(i + size, d))
        root = sites.root_prec if sites.root_prec.shape[-1] == 1 else sites.root_prec[..., at]
        tensors = core.slice(at.start, at.stop).tensors
        whole = given.mean[..., at, :], seen, A, everywhere, sites.resid[..., at], root, *tensors
        found.append(checkpoint(chunk, i, *whole, use_reentrant=False, preserve_rng_state=False))
    return torch.cat([H for H, _ in found], dim=-1), torch.stack([kl for _, kl in found]).sum(0)
