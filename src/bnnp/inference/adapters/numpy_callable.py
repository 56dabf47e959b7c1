"""A functional as a function of a NumPy vector with its gradient: for SciPy, BlackJAX, NumPyro, and anything else outside torch.

    fun = value_and_grad(F)
    scipy.optimize.minimize(lambda e: [-part for part in fun(e)], numpy.zeros(F.dim), jac=True)

From JAX, call it through `jax.pure_callback` and give the gradient by `jax.custom_vjp`; NumPyro takes the result as `potential_fn`, with
its sign turned, and BlackJAX as `logdensity_fn`. Eps is standard normal a priori, so zeros are a start and 1 is a mass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnnp.inference.functional import Functional

__all__ = ["value_and_grad"]


def value_and_grad(functional: Functional) -> Callable[[Any], tuple[Any, NDArray[np.float64]]]:
    """Return a function from eps to log p(y, eps) and its gradient, both of float64.

    It takes an array with shape (dim,) and returns a float, or takes (C, dim) and returns (C,); gradients are like eps. Where the density
    cannot be computed it is -inf, with a gradient of zeros, which samplers reject.

    Raises:
        ValueError: a functional of several tasks.
    """
    if not functional.single:
        raise ValueError(f"Expected the functional of one task. Got one of {functional.num_tasks} tasks: take functional.task(i).")

    def fun(eps: Any) -> tuple[Any, NDArray[np.float64]]:
        # A copy, since what calls it may write into its vector afterwards, or have it read-only.
        at = torch.tensor(np.asarray(eps, dtype=np.float64)).to(functional.device, functional.dtype)
        value, gradient = functional.value_and_grad(at)
        fine = value.isfinite() & gradient.isfinite().all(-1)
        value = torch.where(fine, value, -torch.inf).double().cpu()
        slope = torch.where(fine.unsqueeze(-1), gradient, 0.0).double().cpu().numpy()
        return (value.item() if value.ndim == 0 else value.numpy()), slope

    return fun
