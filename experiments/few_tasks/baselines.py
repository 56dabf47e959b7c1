"""Gaussian processes whose few numbers are learned from all training tasks together: the rivals that need no network.

Their kernel is a constant (what tells one task's level from another's), a line, and a smooth part with a length for each column; the
numbers are those of highest marginal likelihood of the training tasks. With the constant alone it is the mean of the tasks, with the
spread between and within tasks estimated as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bnnp.data.synthetic import GaussianProcess, centred_draw
from bnnp.linalg import NotPositiveDefiniteError, cholesky, log_det, solve_lower

__all__ = ["LearnedGP", "fit"]

_FLOAT = torch.float64
MOST_POINTS = 300
NOISE_FLOOR = 0.03  # of the deviation of y: few points can be explained without any noise


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnedGP(GaussianProcess):
    """Be a Gaussian process with mean m and kernel a^2 + sum_j b_j^2 z_j z_j' + c^2 exp(-sum_j (z_j - z_j')^2 / (2 l_j^2)).

    Arguments:
        level: m.
        constant: a.
        slopes: b with shape (d_x,).
        smooth: c.
        lengths: l with shape (d_x,).
        centre: z = (x - centre) / unit.
        unit: of x.
    """

    level: Tensor
    constant: Tensor
    slopes: Tensor
    smooth: Tensor
    lengths: Tensor
    centre: Tensor
    unit: Tensor

    def mean(self, x: Tensor) -> Tensor:
        """Return m with shape (*T, N, 1)."""
        return self.level.expand(*x.shape[:-1], 1)

    def kernel(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return the kernel with shape (*T, N1, N2)."""
        a, b = ((x - self.centre) / self.unit for x in (x1, x2))
        line = (a * self.slopes.square()) @ b.mT
        a, b = a / self.lengths, b / self.lengths
        square = (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)
        return self.constant.square() + line + self.smooth.square() * torch.exp(-0.5 * square)

    def _draw(self, x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.mean(x) + centred_draw(self.kernel(x, x), count, generator, 1e-9), ()


def fit(tasks: list[tuple[Tensor, Tensor]], smooth: bool = True, steps: int = 60, seed: int = 0) -> LearnedGP:
    """Return the process of highest marginal likelihood of all tasks together.

    Arguments:
        tasks: pairs (x, y); of larger ones, 300 points at random are looked at.
        smooth: with line and smooth part; otherwise the constant alone.
        steps: of L-BFGS.
        seed: of the points that are looked at.
    """
    generator = torch.Generator().manual_seed(seed)
    few = [(x[i], y[i]) for x, y in tasks for i in [torch.randperm(len(x), generator=generator)[:MOST_POINTS]]]
    x, y = (torch.cat([task[i] for task in few]).to(_FLOAT) for i in (0, 1))
    unit, scale, dims = x.std(0), y.std(), x.shape[1]
    rest = {"centre": x.mean(0), "unit": unit}
    raw = {"level": y.mean() / scale, "constant": -1.0, "slopes": -1.0, "smooth": -0.5, "lengths": 0.0, "noise": -1.5}
    sizes = {"level": (), "constant": (), "slopes": (dims,), "smooth": (), "lengths": (dims,), "noise": ()}
    free = {k: torch.full(sizes[k], float(v), dtype=_FLOAT, requires_grad=True) for k, v in raw.items()}
    if not smooth:
        free = {k: v for k, v in free.items() if k in ("level", "constant", "noise")}

    def build() -> tuple[LearnedGP, Tensor]:
        zero, one = torch.zeros((), dtype=_FLOAT), torch.ones(dims, dtype=_FLOAT)
        parts = {"slopes": zero * one, "smooth": zero, "lengths": one}
        parts |= {k: v.exp() * (1 if k == "lengths" else scale) for k, v in free.items() if k not in ("level", "noise")}
        noise = scale * (free["noise"].exp() + NOISE_FLOOR)
        return LearnedGP(noise_std=float(noise.detach()), level=scale * free["level"], **parts, **rest), noise

    padded = _padded(few)

    def loss() -> Tensor:
        optimiser.zero_grad()
        gp, noise = build()
        try:
            value = -_marginal(gp, noise, *padded) / padded[2].sum()
        except NotPositiveDefiniteError:
            return torch.full((), torch.inf, dtype=_FLOAT)
        value.backward()
        return value

    optimiser = torch.optim.LBFGS(list(free.values()), lr=0.5, max_iter=steps, line_search_fn="strong_wolfe")
    optimiser.step(loss)
    with torch.no_grad():
        return build()[0]


def _padded(tasks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    most = max(len(x) for x, _ in tasks)
    pad = [[torch.cat([v.to(_FLOAT), v.new_zeros(most - len(v), v.shape[1]).to(_FLOAT)]) for v in task] for task in tasks]
    mask = torch.stack([(torch.arange(most) < len(x)).to(_FLOAT) for x, _ in tasks])
    return torch.stack([x for x, _ in pad]), torch.stack([y for _, y in pad]), mask


def _marginal(gp: LearnedGP, noise: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over tasks of log p(y), with the gradient of the noise."""
    m = mask.unsqueeze(-1)
    K = gp.kernel(x, x) * m * m.mT + torch.diag_embed(noise**2 * mask + (1 - mask))
    resid = (y - gp.level) * m
    R = cholesky(K)
    quadratic = solve_lower(R, resid).square().sum()
    return -0.5 * (quadratic + log_det(R).sum() + math.log(2 * math.pi) * mask.sum())
