"""A functional as the library posteriors takes it: `log_posterior(params, batch)` in units of one point, and a temperature.

posteriors 0.1 wants values that do not grow with N, so that one learning rate serves: with b of N points,

    log_posterior = (1 / b) sum_batch log p(y_n | eps) + (1 / N) log N(eps; 0, I) = log p(y, eps) / N on average,

and its samplers draw from exp(log_posterior / temperature): with temperature 1 / N from the posterior. The library's own guide to log
posteriors says the same; `temperature` gives the number. Any other draws from a posterior that is too wide or too narrow.

    log_posterior, T = log_posterior(F), temperature(F)
    transform = posteriors.sgmcmc.sghmc.build(log_posterior, lr=0.05, alpha=1.0, temperature=T)
    state = transform.init(torch.zeros(F.dim, dtype=F.dtype))
    state, _ = transform.update(state, F.draw_batch(8, generator))

This package has `sgld` and `sghmc` of its own because chains of many tasks go at once there, each task with a step size of its own; for
one task this adapter gives the library's whole collection.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bnnp.inference.functional import Functional

__all__ = ["log_posterior", "temperature"]


def _points(functional: Functional) -> int:
    if not functional.single:
        raise ValueError(f"Expected the functional of one task. Got one of {functional.num_tasks} tasks: take functional.task(i).")
    return max(int(functional.counts), 1)


def temperature(functional: Functional) -> float:
    """Return 1 / N, the temperature at which `log_posterior` stands for the posterior."""
    return 1.0 / _points(functional)


def log_posterior(functional: Functional) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """Return log p(y, eps) / N as a function of eps and a batch of point numbers (None for all), with the log-likelihood beside it.

    Eps has shape (dim,); with shape (C, dim) the value is the sum over C chains, whose gradients stay apart.
    """
    N = _points(functional)

    def log_posterior(params: Tensor, batch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        fit = functional.log_likelihood(params, batch)
        share = 1.0 / N if batch is None else 1.0 / functional.batch_counts(batch).clamp(min=1)
        return (functional.log_prior(params) / N + share * fit).sum(), fit.detach()

    return log_posterior
