"""Learn the prior of Bayesian linear regression: with hidden=() and Gaussian noise every number is exact.

Each data set is a line with its own slope and intercept, drawn from a distribution that nobody tells the model. Training
on the evidence ("avi" is the log evidence here, not a bound) finds that distribution.
Run: python examples/linear.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import bnnp

MEAN = torch.tensor([2.0, -1.0], dtype=torch.float64)  # of slope and intercept
FACTOR = torch.tensor([[0.5, 0.0], [0.6, 0.8]], dtype=torch.float64)  # covariance = FACTOR FACTOR^T
NOISE = 0.3


def lines(count: int, seed: int, points: int = 15) -> list[tuple[Tensor, Tensor]]:
    """Make data sets y = slope x + intercept + noise, with (slope, intercept) ~ N(MEAN, FACTOR FACTOR^T)."""
    g = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(count):
        slope, intercept = MEAN + FACTOR @ torch.randn(2, generator=g, dtype=torch.float64)
        x = 4 * torch.rand(points, 1, generator=g, dtype=torch.float64)
        tasks.append((x, slope * x + intercept + NOISE * torch.randn(points, 1, generator=g, dtype=torch.float64)))
    return tasks


def learned_prior(model: bnnp.BNNP) -> tuple[Tensor, Tensor]:
    """Return mean (2,) and covariance (2, 2) of slope and intercept in the user's units.

    The network is linear between standardised columns, so its weights (w, b) give slope = s_y w / s_x and
    intercept = m_y + s_y b - m_x slope: a linear map J of (w, b).
    """
    scaling, layer = model.scaling, model.prior.layers[0]
    ratio = float(scaling.y_scale / scaling.x_scale)
    J = torch.tensor([[ratio, 0.0], [-ratio * float(scaling.x_shift), float(scaling.y_scale)]], dtype=torch.float64)
    shift = torch.tensor([0.0, float(scaling.y_shift)], dtype=torch.float64)
    return (J @ layer.mean[0] + shift).detach(), (J @ layer.covariance()[0] @ J.T).detach()


def log_evidence(mean: Tensor, covariance: Tensor, noise: float, x: Tensor, y: Tensor) -> float:
    """Return log N(y; A mean, A covariance A^T + noise^2 I) by the textbook formula, A = [x, 1]."""
    A = torch.cat([x, torch.ones_like(x)], dim=-1)
    K = A @ covariance @ A.T + noise**2 * torch.eye(len(x), dtype=x.dtype)
    r = y[:, 0] - A @ mean
    return -0.5 * float(r @ torch.linalg.solve(K, r) + torch.logdet(K) + len(x) * math.log(2 * math.pi))


def main(steps: int = 400, num_tasks: int = 300) -> dict[str, float]:
    """Train, show the learned prior beside the true one, and check one posterior by hand."""
    model = bnnp.BNNP(x_dim=1, y_dim=1, hidden=(), prior="per_unit").double()
    bnnp.meta_train(model, lines(num_tasks, seed=0), objective="avi", steps=steps, batch_size=20, num_samples=1,
                    learning_rate=3e-2, context=(0.5, 0.9))  # fmt: skip
    mean, covariance = learned_prior(model)
    noise, true = float(model.noise_std), FACTOR @ FACTOR.T
    print("                     learned    true")
    for name, mine, theirs in (
        ("mean of slope", mean[0], MEAN[0]),
        ("mean of intercept", mean[1], MEAN[1]),
        ("variance of slope", covariance[0, 0], true[0, 0]),
        ("covariance", covariance[0, 1], true[0, 1]),
        ("variance of intercept", covariance[1, 1], true[1, 1]),
        ("noise", noise, NOISE),
    ):
        print(f"{name:21s} {float(mine):6.2f}  {float(theirs):6.2f}")

    x, y = lines(1, seed=1, points=3)[0]
    model_value, by_hand = float(model.condition(x, y).elbo), log_evidence(mean, covariance, noise, x, y)
    print(f"log evidence of three new points: elbo {model_value:.6f}, by the formula {by_hand:.6f}")
    return {"elbo": model_value, "by_hand": by_hand, "slope": float(mean[0]), "intercept": float(mean[1]), "noise": noise}


if __name__ == "__main__":
    main()
