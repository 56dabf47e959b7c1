"""What the one-batch gradient costs and how noisy it is, beside the exact gradient in batches and the full one.

    python -m benchmarks.gradient

For one task of the sawtooth process with many points: root mean square of the error of the estimate over draws of batches, relative to the
norm of the full gradient (noise of the draws of weights is the same in all, so it is not in there), the norm of its mean error with what
chance would give, and seconds of a step.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch import Tensor

import bnnp
from bnnp.data.synthetic import Sawtooth
from bnnp.tasks import TaskBatch, collate


def gradient(model: bnnp.BNNP, batch: TaskBatch, seed: int, **options: Any) -> tuple[Tensor, float]:
    """Return the gradient of the objective, joined, and the seconds that it took."""
    start = time.perf_counter()
    model.zero_grad(set_to_none=True)
    value = bnnp.objectives.pp_avi(model, batch, 4, torch.Generator().manual_seed(seed), **options)
    torch.autograd.backward(value.sum())
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.flatten() for part in parts]), time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--hidden", type=int, nargs="+", default=[32, 32])
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(args.points + 200, 1, generator=generator, dtype=torch.float64) - 2
    y = Sawtooth().sample(x, 1, generator)[0]
    y = y + 0.05 * torch.randn(y.shape, generator=generator, dtype=y.dtype)
    batch = TaskBatch(collate([(x[:-200], y[:-200])]), collate([(x[-200:], y[-200:])]))
    prior = bnnp.Prior("shared", spread=0.9, input_scale=4.0)
    model = bnnp.BNNP(1, 1, hidden=args.hidden, prior=prior, shared_noise=True, activation="tanh").double()
    full, seconds = gradient(model, batch, 0)
    print(f"{args.points} points, hidden {args.hidden}, 4 samples")
    print(f"full gradient: norm {float(full.norm()):.3g}, {seconds:.2f} s")
    print(f"{'batches':>8} {'exact, s':>9} {'error':>9} {'one batch, s':>13} {'rms error':>10} {'mean error':>11} {'by chance':>10}")
    for count in (2, 5, 20, 100):
        size = math.ceil(args.points / count)
        exact, exact_seconds = gradient(model, batch, 0, context_batch_size=size)
        draws, took = [], 0.0
        for i in range(args.draws):
            # Other batches for the same draws of weights.
            chosen = torch.randint(count, (3,), generator=torch.Generator().manual_seed(i)).tolist()
            found, one = gradient(model, batch, 0, context_batch_size=size, gradient=chosen)
            draws.append(found - full)
            took += one / args.draws
        errors = torch.stack(draws) / full.norm()
        rms, mean = float(errors.square().sum(-1).mean().sqrt()), float(errors.mean(0).norm())
        off = float((exact - full).norm() / full.norm())
        row = (count, exact_seconds, off, took, rms, mean, rms / math.sqrt(args.draws))
        print("{:>8} {:>9.2f} {:>9.1e} {:>13.2f} {:>10.3g} {:>11.3g} {:>10.3g}".format(*row), flush=True)


if __name__ == "__main__":
    main()
