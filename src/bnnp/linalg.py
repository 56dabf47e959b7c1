"""Batched factorisations with one policy for failure.

Every Cholesky factor and triangular solve of the package is made here, so that precision, placement and the answer to a
failed factorisation are decided once. The matrices that arrive are I + (positive semi-definite), see the whitened layer
in `bnnp.conjugate`: they have no eigenvalue below one, so a failure means that the numbers that came in are not finite or
that the arithmetic is too coarse for them.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = [
    "NotPositiveDefiniteError",
    "NumericalWarning",
    "cho_solve",
    "cholesky",
    "compute_device",
    "eigh",
    "log_det",
    "lower_inverse",
    "quiet_cholesky",
    "solve_lower",
    "solve_lower_transposed",
    "to_compute",
]


class NotPositiveDefiniteError(RuntimeError):
    """Say that a matrix has no Cholesky factor, which of the batch it is, and what to do."""


class NumericalWarning(UserWarning):
    """Say that a result needed numerical help, and how much."""


def compute_device(device: torch.device) -> torch.device:
    """Return where factorisations run for tensors on `device`.

    Apple's MPS has neither float64 nor a batched Cholesky, so its small factorisations go to the CPU.

    Example:
        >>> compute_device(torch.device("mps"))
        device(type='cpu')
    """
    return torch.device("cpu") if device.type == "mps" else device


def to_compute(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Move a tensor to the device and precision of the factorisations."""
    device = compute_device(x.device)
    return x.to(dtype=dtype) if device == x.device else x.to(device=device).to(dtype=dtype)


def cholesky(M: Tensor) -> Tensor:
    """Factorise M = R R^T, R lower triangular.

    A failed factorisation is tried again with a jitter on the diagonal, relative to the mean diagonal entry of the matrix:
    100, 10^4, 10^6 units of rounding. The amount is reported as a `NumericalWarning`; after that it is an error.

    Arguments:
        M: symmetric positive definite matrices with shape (*B, k, k).

    Returns:
        The factors with shape (*B, k, k).

    Raises:
        NotPositiveDefiniteError: the entries are not finite, or the largest jitter did not help.

    Example:
        >>> cholesky(torch.tensor([[4.0, 2.0], [2.0, 2.0]]))
        tensor([[2., 0.],
                [1., 1.]])
    """
    R, info = torch.linalg.cholesky_ex(M)
    # A NaN anywhere in a matrix reaches the diagonal of its factor, so the diagonal tells for less than the whole would cost.
    if not bool((info > 0).any()) and bool(R.diagonal(dim1=-2, dim2=-1).sum().isfinite()):
        return R
    where = _first_failure(M, info)
    if not bool(M.isfinite().all()):
        raise NotPositiveDefiniteError(
            f"Expected finite matrices to factorise. Got NaN or infinite entries at batch index {where}. "
            "Look for a diverged parameter (learning rate) or for inputs far outside the range of training."
        )
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    unit = torch.finfo(M.dtype).eps * diagonal.mean(-1, keepdim=True)
    for factor in (1e2, 1e4, 1e6):
        jitter = torch.where((info > 0).unsqueeze(-1), factor * unit, torch.zeros_like(unit))
        R, again = torch.linalg.cholesky_ex(M + torch.diag_embed(jitter.expand_as(diagonal)))
        if not bool((again > 0).any()):
            warnings.warn(
                f"{int((info > 0).sum())} of {info.numel()} matrices needed a jitter of up to {float(jitter.detach().max()):.2e} on the "
                f"diagonal ({factor:.0e} units of rounding in {M.dtype}) to be factorised. Use float64 factorisations "
                "(factor_dtype) or a larger noise.",
                NumericalWarning,
                stacklevel=2,
            )
            return R
    raise NotPositiveDefiniteError(
        f"Expected positive definite matrices with shape (..., {M.shape[-1]}, {M.shape[-1]}) in {M.dtype}. "
        f"Got one at batch index {where} that no jitter up to 1e6 units of rounding repairs. Use float64 factorisations "
        "(factor_dtype), or check the scale of inputs and noise."
    )


def quiet_cholesky(M: Tensor) -> Tensor:
    """Factorise M = R R^T, with NaN for the matrices that have no factor: for samplers, which may ask anywhere and reject what fails.

    It looks at no value, so it works under `torch.func.vmap`.

    Example:
        >>> quiet_cholesky(torch.tensor([[[4.0]], [[-1.0]]])).flatten()
        tensor([2., nan])
    """
    R, info = torch.linalg.cholesky_ex(M)
    return torch.where((info > 0)[..., None, None], torch.full_like(R, torch.nan), R)


def _first_failure(M: Tensor, info: Tensor) -> tuple[int, ...]:
    bad = (info > 0) | ~M.isfinite().all(-1).all(-1)
    if not bool(bad.any()):
        return ()
    return tuple(int(i) for i in bad.nonzero()[0])


def solve_lower(R: Tensor, b: Tensor) -> Tensor:
    """Solve R x = b for lower triangular R, with shapes (*B, k, k) and (*B, k, m)."""
    return torch.linalg.solve_triangular(R, b, upper=False)


def solve_lower_transposed(R: Tensor, b: Tensor) -> Tensor:
    """Solve R^T x = b for lower triangular R, with shapes (*B, k, k) and (*B, k, m)."""
    return torch.linalg.solve_triangular(R.mT, b, upper=True)


def cho_solve(R: Tensor, b: Tensor) -> Tensor:
    """Solve R R^T x = b for lower triangular R, with shapes (*B, k, k) and (*B, k, m)."""
    return solve_lower_transposed(R, solve_lower(R, b))


def lower_inverse(R: Tensor) -> Tensor:
    """Return Q = R^{-1} for lower triangular R with shape (*B, k, k).

    The trace of M^{-1} is the sum of squares of Q, and its gradient needs all of Q: a triangular solve against I.
    """
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return torch.linalg.solve_triangular(R, eye.expand_as(R), upper=False)


def log_det(R: Tensor) -> Tensor:
    """Return log |R R^T| with shape (*B,) for lower triangular R with shape (*B, k, k)."""
    return 2.0 * R.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (*B, k), the largest first, and eigenvectors (*B, k, k) in columns, of symmetric matrices (*B, k, k)."""
    values, vectors = torch.linalg.eigh(M)
    return values.flip(-1), vectors.flip(-1)
