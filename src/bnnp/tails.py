"""Heavy tails by a random scale: numbers that are inverse-gamma given a standard normal one, and their posterior on a grid.

A weight that is Gaussian given a scale tau ~ InverseGamma(dof / 2, dof / 2 - 1) is Student-t with `dof` degrees of freedom; E[tau] = 1,
so its variance is that of the Gaussian. The scale is written tau = F^{-1}(v) with v uniform on (0, 1). An evidence known at the middles of
eight cells of v turns the uniform prior into a density that is constant on each of them.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = ["cell_middles", "draw_level", "log_mass", "log_scale", "normal_of_log_scale"]

_REACH, _KNOTS = 5.0, 401
_BISECTIONS = 200
EDGES = (-1.5, -0.5, 0.25, 1.0, 1.75, 2.5, 3.25)
"""Edges between the eight cells, as standard normal numbers: closer where scales are large, which is what heavy tails are for."""


@functools.lru_cache(maxsize=32)
def _table(dof: float) -> Tensor:
    """Return log tau at standard normal numbers z from -5 to 5, v = Phi(z), by bisection of the gamma distribution function of 1 / tau."""
    z = torch.linspace(-_REACH, _REACH, _KNOTS, dtype=torch.float64)
    shape = torch.tensor(dof / 2, dtype=torch.float64)
    upper = torch.special.ndtr(-z)  # P(1 / tau < 1 / tau_v) = 1 - v
    low, high = torch.full_like(z, -60.0), torch.full_like(z, math.log(dof) + 10.0)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        below = torch.special.gammainc(shape, middle.exp()) < upper
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return math.log(dof / 2 - 1) - 0.5 * (low + high)


def log_scale(z: Tensor, dof: float) -> Tensor:
    """Return log tau for standard normal z: interpolated linearly between 401 exact values, and beyond +-5 extended with the last slope.

    Example:
        >>> log_scale(torch.tensor([0.0, 3.0]), dof=4.0)  # the median, and one in 741
        tensor([-0.5178,  2.9397])
    """
    table = _table(dof).to(z)
    at = (z + _REACH) * ((_KNOTS - 1) / (2 * _REACH))
    low = at.detach().floor().clamp(0, _KNOTS - 2).long()
    return table[low] + (at - low) * (table[low + 1] - table[low])


def normal_of_log_scale(log_tau: Tensor, dof: float) -> Tensor:
    """Return the standard normal z with `log_scale(z, dof)` equal to these numbers: its inverse.

    Example:
        >>> normal_of_log_scale(log_scale(torch.tensor([-6.0, 0.5]), dof=4.0), dof=4.0)
        tensor([-6.0000,  0.5000])
    """
    table = _table(dof).to(log_tau)
    low = (torch.searchsorted(table, log_tau.detach().contiguous()) - 1).clamp(0, _KNOTS - 2)
    inside = (log_tau - table[low]) / (table[low + 1] - table[low])
    return (low + inside) * (2 * _REACH / (_KNOTS - 1)) - _REACH


def cell_middles() -> Tensor:
    """Return the standard normal numbers at the middles of the cells, half of a cell's probability on each side."""
    levels = torch.special.ndtr(_edges())
    return torch.special.ndtri(0.5 * (levels[1:] + levels[:-1]))


def _edges() -> Tensor:
    return torch.tensor([-math.inf, *EDGES, math.inf], dtype=torch.float64)


def log_mass(like: Tensor) -> Tensor:
    """Return the log probabilities of the cells under the prior, with shape (Q,)."""
    levels = torch.special.ndtr(_edges())
    return (levels[1:] - levels[:-1]).log().to(like)


def draw_level(log_share: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw v by the inverse of the distribution function of a density that is constant on each cell, differentiably in their shares.

    Arguments:
        log_share: logarithms of the cells' probabilities with shape (..., Q).
        u: uniform numbers with shape (*S, ...).

    Returns:
        The standard normal number of v, and log q(v) - log p(v), share over prior mass of its cell, both with the shape of u.
    """
    Q, levels = log_share.shape[-1], torch.special.ndtr(_edges()).to(log_share)
    share = log_share.exp()
    edge = share.cumsum(-1)
    edge = edge / edge[..., -1:].detach()
    cell = (u.unsqueeze(-1) > edge.detach()).sum(-1).clamp(max=Q - 1)
    own, right, ratio = (
        t.expand(*u.shape, Q).gather(-1, cell.unsqueeze(-1)).squeeze(-1) for t in (share, edge, log_share - log_mass(log_share))
    )
    # A cell's own share is at least the distance from u to its edge; rounding must not lead out of the cell.
    inside = (1.0 - (right - u) / own.clamp(min=torch.finfo(u.dtype).tiny)).clamp(0.0, 1.0)
    v = levels[cell] + inside * (levels[cell + 1] - levels[cell])
    return torch.special.ndtri(v.clamp(1e-7, 1 - 1e-7)), ratio
