"""What the machine can do: the rate of the operations that a step is made of, measured where and when the step is.

A ratio against a slow twin says how bad the twin was. These ceilings say how far the package is from what the processor
gives: one large product, many small products, many small Cholesky factors. `step_flops` counts the arithmetic a step
cannot avoid, so that time times ceiling can be set beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["SIZES", "measure", "step_flops"]

SIZES = (50, 101, 251)


def _best(work: Callable[[], Tensor], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _rate(flops_each: float, make: Callable[[int], Callable[[], Tensor]], seconds: float, most: int) -> float:
    """Return GFLOP/s of a batched operation, its batch chosen so that one call takes about `seconds`."""
    probe = max(1, most // 20)
    took = _best(make(probe), 2)
    count = max(1, min(most, int(probe * seconds / max(took, 1e-6))))
    return flops_each * count / _best(make(count), 3) / 1e9


def _batched_product(n: int) -> Callable[[int], Callable[[], Tensor]]:
    def make(count: int) -> Callable[[], Tensor]:
        a = torch.rand(count, n, n, dtype=torch.float64)
        return lambda: torch.bmm(a, a)

    return make


def _batched_cholesky(n: int) -> Callable[[int], Callable[[], Tensor]]:
    def make(count: int) -> Callable[[], Tensor]:
        a = torch.rand(count, n, n, dtype=torch.float64)
        M = a @ a.mT + torch.eye(n, dtype=torch.float64)
        return lambda: torch.linalg.cholesky_ex(M)[0]

    return make


def measure(seconds: float = 1.0) -> dict[str, float]:
    """Return GFLOP/s in float64 with the threads torch has now.

    A product of two n x n matrices counts 2 n^3, a Cholesky factor n^3 / 3. Each is the best of three calls.

    Arguments:
        seconds: about how long one call may take.

    Returns:
        "matmul", and "matmul n" and "cholesky n" for n in `SIZES`.

    Example:
        >>> sorted(measure(seconds=0.001))[:2]
        ['cholesky 101', 'cholesky 251']
    """
    n = 1500 if seconds >= 0.1 else 300
    a = torch.rand(n, n, dtype=torch.float64)
    rates = {"matmul": 2.0 * n**3 / _best(lambda: a @ a, 3) / 1e9}
    for size in SIZES:
        # At most 512 MiB a tensor, so that the ceiling is the processor's and not the page allocator's.
        most = max(1, 2**29 // (8 * size * size))
        rates[f"matmul {size}"] = _rate(2.0 * size**3, _batched_product(size), seconds, most)
        rates[f"cholesky {size}"] = _rate(size**3 / 3.0, _batched_cholesky(size), seconds, most)
    return rates


def step_flops(widths: Sequence[int], num_context: Sequence[int], num_target: Sequence[int], num_samples: int, shared: bool) -> float:
    """Count the floating-point operations of the dominant terms of one training step.

    For every block (a unit, or a whole layer when factor and noise are shared by its units): B = A L, 2 N p^2; the
    Gram matrix in the smaller of weight and function space, n^2 m with n = min(N, p), m = max(N, p); its Cholesky
    factor and the inverse for the trace, n^3 / 3 each. For every unit: applying L to its sample, 2 p^2; the
    activations, 2 (N + M) p.
    Forward and backward together count as three times the forward: each product has two gradients of its own size.

    The first layer's posterior is counted once for all samples. The inference networks are counted once a task.

    Arguments:
        widths: d_0, ..., d_L.
        num_context: N of each task.
        num_target: M of each task.
        num_samples: S.
        shared: one factor and one noise for all units of a layer.

    Example:
        >>> step_flops([1, 1], [2], [1], 1, shared=False)
        172.0
    """
    hidden = list(widths[1:-1])
    total = 0.0
    for N, M in zip(num_context, num_target, strict=True):
        for i, (d_in, d) in enumerate(pairwise(widths)):
            p = d_in + 1
            n, m = min(N, p), max(N, p)
            block = 2.0 * N * p * p + n * n * m + 2.0 * n**3 / 3.0
            blocks = (1 if i == 0 else num_samples) * (1 if shared else d)
            unit = 2.0 * p * p + 2.0 * (N + M) * p
            total += blocks * block + num_samples * d * unit
            outputs = d if i == len(widths) - 2 else 2 * d
            net = [widths[0] + widths[-1], *hidden, outputs]
            total += sum(2.0 * N * a * b for a, b in pairwise(net))
    return 3.0 * total
