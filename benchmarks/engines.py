"""What an effective draw costs with the package's samplers and with Pyro's NUTS, on the same tasks in one run.

    python -m benchmarks.engines

A network with a fixed prior and T tasks of data drawn from it. Ours move all chains of all tasks together; Pyro's moves one chain of one
task, task after task. Seconds are of the processor. The effective sample size is the smallest over f at five inputs, |eps|^2 and the
log-joint, by the same estimate for all; short chains on purpose, so that the run takes minutes. Needs `pip install "bnnp[pyro]"`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

import bnnp
from bnnp.inference import Functional, functional, run
from bnnp.inference.adapters.pyro import potential
from bnnp.inference.diagnostics import ess_bulk


def problem(hidden: tuple[int, ...], tasks: int, points: int, noise: float) -> Functional:
    """Return the log-joint of tasks whose functions are draws of the prior."""
    g = torch.Generator().manual_seed(0)
    likelihood = bnnp.Gaussian(noise, learn_noise=False)
    model = bnnp.BNNP(1, 1, hidden=hidden, prior="diagonal", likelihood=likelihood, activation="tanh").double()
    x = 4 * torch.rand(tasks, points, 1, generator=g, dtype=torch.float64) - 2
    f = functional(model, x, torch.zeros_like(x)).outputs(torch.randn(1, tasks, size(model), generator=g, dtype=torch.float64))[0]
    return functional(model, x, f + noise * torch.randn(f.shape, generator=g, dtype=torch.float64))


def size(model: bnnp.BNNP) -> int:
    """Return the number of weights."""
    return sum(layer.d_out * layer.p for layer in model.prior)


def ours(F: Functional, name: str, draws: int) -> tuple[float, Tensor]:
    """Return the seconds of an engine and the effective number of draws of each task."""
    start = time.process_time()
    found = run(F, name, num_samples=4 * draws, num_chains=4, warmup=draws, draws=draws)
    return time.process_time() - start, found.report["ess_bulk"]


def theirs(F: Functional, draws: int) -> tuple[float, Tensor]:
    """Return the seconds of Pyro's NUTS, one chain for each task, and the effective number of draws."""
    from pyro.infer import MCMC, NUTS

    seconds, found = 0.0, []
    with torch.random.fork_rng(devices=[]):  # Pyro draws from the global generator
        torch.manual_seed(0)
        for i in range(F.num_tasks):
            one = F.task(i)
            first, energy = potential(one, seed=i)
            kernel: Any = NUTS(potential_fn=energy)
            start = time.process_time()
            chain = MCMC(kernel, num_samples=draws, warmup_steps=draws, initial_params=first, disable_progbar=True)
            chain.run()
            seconds += time.process_time() - start
            eps = chain.get_samples()["eps"]
            watched = torch.cat([one.monitor(eps), one.log_joint(eps).unsqueeze(-1)], dim=-1).unsqueeze(1)
            found.append(ess_bulk(watched).min())
    return seconds, torch.stack(found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--hidden", type=int, nargs="+", default=[6])
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--noise", type=float, default=0.4)
    parser.add_argument("--draws", type=int, default=60, help="of each chain, after as many of warm-up")
    args = parser.parse_args()
    torch.set_num_threads(1)
    F = problem(tuple(args.hidden), args.tasks, args.points, args.noise)
    print(f"{args.tasks} tasks of {args.points} points, hidden {args.hidden}, {F.dim} weights, {args.draws} draws a chain")
    print(f"{'sampler':>22} {'seconds':>8} {'effective draws, median':>24} {'ms each':>8} {'to our NUTS':>12}")
    base = None
    for name in ("nuts", "hmc", "Pyro's NUTS"):
        seconds, effective = theirs(F, args.draws) if name.startswith("Pyro") else ours(F, name, args.draws)
        each = 1e3 * seconds / float(effective.sum())
        base = each if base is None else base
        print(f"{name:>22} {seconds:8.1f} {float(effective.median()):24.0f} {each:8.2f} {each / base:12.2f}", flush=True)


if __name__ == "__main__":
    main()
