"""A functional as a model, or as a potential, of Pyro: its samplers and guides then work under any prior, a learned one included.

Needs `pip install "bnnp[pyro]"`. Pyro draws from torch's global generator and keeps its parameters in a global store: nothing here touches
either. One chain of one task at a time; `bnnp.inference.nuts` runs all of them together.

References:
    Pyro: deep universal probabilistic programming (Bingham et al., 2019).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnnp.inference.functional import Functional
from bnnp.seeds import seeded

__all__ = ["potential", "pyro_model"]


def pyro_model(functional: Functional) -> Callable[[], Tensor]:
    """Return a Pyro model of one task: eps ~ N(0, I), and the log-likelihood as a factor.

    For every algorithm of Pyro, such as `pyro.infer.MCMC(pyro.infer.NUTS(model), ...)` or `pyro.infer.SVI` with an autoguide. Draws of its
    site "eps" go into `functional.predict`.

    Raises:
        ValueError: the functional has a task axis.
    """
    with warnings.catch_warnings(action="ignore"):
        import pyro
        import pyro.distributions

    _check(functional)
    zero = torch.zeros(functional.dim, dtype=functional.dtype, device=functional.device)

    # Pyro's distributions have no types.
    standard: Any = pyro.distributions.Normal(zero, torch.ones_like(zero))

    def model() -> Tensor:
        eps: Tensor = pyro.sample("eps", standard.to_event(1))
        pyro.factor("log_likelihood", functional.log_likelihood(eps))
        return eps

    return model


def potential(
    functional: Functional, start: Tensor | None = None, seed: int = 0
) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Tensor]]:
    """Return (initial_params, potential_fn) of one task for `pyro.infer.NUTS(potential_fn=...)`: less overhead than a model.

    Arguments:
        functional: of one task.
        start: where the chains begin, with shape (dim,), or (chains, dim) for several; a draw of the prior where not given.
        seed: of that draw.

    Raises:
        ValueError: the functional has a task axis.
    """
    _check(functional)
    if start is None:
        start = torch.randn(functional.dim, generator=seeded(seed, "pyro"), dtype=functional.dtype)
    return {"eps": start.to(functional.device, functional.dtype)}, lambda params: -functional.log_joint(params["eps"])


def _check(functional: Functional) -> None:
    if not functional.single:
        raise ValueError(f"Expected one task without a task axis. Got {functional.num_tasks}. Use functional.task(i) for each.")
