"""The data sets of the study: training, validation and test tasks, the exact answer where there is one, and a simple rival.

Three are the package's own (sawtooth, steps, digits). Two are made to need a prior that is no single Gaussian: "two kinds", where a task is
either a sawtooth or a smooth function, and "scales", smooth functions whose amplitudes differ by powers of two. Both are mixtures of
Gaussian processes and have an exact oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnnp.data.images import pixel_grid
from bnnp.data.synthetic import GaussianProcess, Heaviside, Process, Sawtooth, SquaredExponentialGP
from bnnp.demos import digits
from bnnp.demos.sawtooth import tuned_gp

FloatArray = NDArray[np.float64]
Pair = tuple[Tensor, Tensor]
Split = tuple[Tensor, Tensor, Tensor, Tensor]
Scores = dict[str, dict[str, FloatArray]]  # condition -> "joint" or "marginal" -> one value for each test task

TRAIN_SEED, VALIDATION_SEED, TEST_SEED, FUNCTION_SEED = 0, 1, 2, 3
GRID_POINTS = 100


@dataclass(frozen=True)
class Family:
    """Describe a mixture of Gaussian processes: each task belongs to one member, which nobody is told.

    p(y_t | context) = sum_k p(k | context) p_k(y_t | context), p(k | context) in proportion to weight_k p_k(context).

    Arguments:
        members: with the same range of inputs.
        weights: how often each is drawn, adding up to 1.
    """

    members: tuple[GaussianProcess, ...]
    weights: tuple[float, ...]

    def _choose(self, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.multinomial(torch.tensor(self.weights), count, replacement=True, generator=generator)

    def tasks(self, count: int, seed: int, num_points: int | tuple[int, int]) -> list[Pair]:
        """Draw tasks; arguments as of `Process.tasks`."""
        member = self._choose(count, seed)
        drawn = [iter(m.tasks(int((member == k).sum()), seed + 1000 * k, num_points)) for k, m in enumerate(self.members)]
        return [next(drawn[k]) for k in member.tolist()]

    def sample(self, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw noise-free functions at the same inputs, with shape (count, N, 1)."""
        member = self._choose(count, int(torch.randint(2**62, (), generator=generator)))
        drawn = [iter(m.sample(x, int((member == k).sum()), generator)) for k, m in enumerate(self.members)]
        return torch.stack([next(drawn[k]) for k in member.tolist()])

    def log_prob(self, xc: Tensor, yc: Tensor, xt: Tensor, yt: Tensor) -> tuple[Tensor, Tensor]:
        """Return the exact log density of all targets together, with shape (*T,), and of each alone, with shape (*T, M)."""
        nothing = xc[..., :0, :], yc[..., :0, :]
        evidence = torch.stack([m.log_prob(*nothing, xc, yc) for m in self.members])
        prior = torch.tensor(self.weights, dtype=evidence.dtype).log().reshape(-1, *[1] * (evidence.ndim - 1))
        weight = (prior + evidence).log_softmax(0)
        joint = torch.stack([m.log_prob(xc, yc, xt, yt) for m in self.members])
        each = torch.stack([m.log_prob(xc, yc, xt, yt, joint=False) for m in self.members])
        return (weight + joint).logsumexp(0), (weight.unsqueeze(-1) + each).logsumexp(0)


@dataclass(frozen=True, eq=False)
class Problem:
    """Hold the data of one problem, and what references score on it.

    Arguments:
        x_dim: width of the inputs.
        train, validation: pairs (x, y).
        test: condition, such as "4 points" -> test tasks (xc, yc, xt, yt).
        references: name -> scores; "oracle" is the exact answer.
        grid: where functions of the prior are compared with true ones, with shape (M, x_dim).
        functions: two sets of true functions there, each with shape (n, M).
        noisy: whether these include noise.
    """

    x_dim: int
    train: list[Pair]
    validation: list[Pair]
    test: dict[str, list[Split]]
    references: dict[str, Scores]
    grid: Tensor
    functions: tuple[Tensor, Tensor]
    noisy: bool = False


def processes() -> dict[str, Process | Family]:
    """Return the processes of functions of one input."""
    smooth = SquaredExponentialGP(lengthscale=0.6, variance=0.25, noise_std=0.05)
    amplitudes = tuple(0.25 * 2.0**k for k in range(6))
    sizes = tuple(SquaredExponentialGP(lengthscale=0.6, variance=a**2, noise_std=0.05) for a in amplitudes)
    odds = [2.0**-k for k in range(len(sizes))]
    return {
        "sawtooth": Family((Sawtooth(),), (1.0,)),
        "steps": Heaviside(noise_std=0.05),
        "two kinds": Family((Sawtooth(), smooth), (0.5, 0.5)),
        "scales": Family(sizes, tuple(o / sum(odds) for o in odds)),
    }


def load(name: str, sizes: dict[str, Any]) -> Problem:
    """Draw or load a problem.

    Arguments:
        name: "digits", or a key of `processes`.
        sizes: numbers of tasks, points and functions, as in config.json.
    """
    return load_digits(sizes) if name == "digits" else load_process(processes()[name], sizes)


def load_process(process: Process | Family, sizes: dict[str, Any]) -> Problem:
    """Draw the problem of a process; the smooth rival is fitted to training tasks."""
    low, high = sizes["points"]
    train, validation = (
        process.tasks(sizes[key], seed, (low, high)) for key, seed in (("train", TRAIN_SEED), ("validation", VALIDATION_SEED))
    )
    contexts, M = sizes["contexts"], sizes["targets"]
    whole = process.tasks(sizes["test"], TEST_SEED, max(contexts) + M)
    test = {f"{n} points": [(x[:n], y[:n], x[-M:], y[-M:]) for x, y in whole] for n in contexts}
    smooth = tuned_gp(train, num_points=low)  # type: ignore[arg-type]  # pairs are all it needs
    exact = Family((smooth,), (1.0,))
    references = {"smooth GP": {condition: exact_scores(exact, splits) for condition, splits in test.items()}}
    if isinstance(process, Family):
        references["oracle"] = {condition: exact_scores(process, splits) for condition, splits in test.items()}
    ends = process.members[0].x_range if isinstance(process, Family) else process.x_range
    grid = torch.linspace(*ends, GRID_POINTS).unsqueeze(-1)
    generator = torch.Generator().manual_seed(FUNCTION_SEED)
    first, second = (process.sample(grid, sizes["functions"], generator).flatten(1) for _ in range(2))
    return Problem(1, train, validation, test, references, grid, (first, second))


def exact_scores(process: Family, splits: Sequence[Split]) -> dict[str, FloatArray]:
    """Return the scores per target of a process that knows itself."""
    xc, yc, xt, yt = (torch.stack(part) for part in zip(*splits, strict=True))
    joint, each = process.log_prob(xc, yc, xt, yt)
    return {"joint": (joint / yt.shape[1]).numpy(), "marginal": each.mean(-1).numpy()}


def load_digits(sizes: dict[str, Any]) -> Problem:
    """Return the digits of the demo, fewer for the test, with its two Gaussian rivals."""
    images = digits.load(num_test=sizes["test"])
    rivals = digits.gaussian_rivals(images)
    grid, kept = pixel_grid(digits.SIDE, digits.SIDE), dict(zip(digits.CONDITIONS, images.seen, strict=True))
    test: dict[str, list[Split]] = {}
    references: dict[str, Scores] = {rival: {} for rival in rivals}
    for i, (condition, seen) in enumerate(kept.items()):
        if condition not in sizes["seen"]:
            continue
        pairs = zip(digits.to_tasks(images.test), torch.from_numpy(seen), strict=True)
        test[condition] = [(x[s], y[s], x[~s], y[~s]) for (x, y), s in pairs]
        for rival, scored in rivals.items():
            references[rival][condition] = {"joint": scored[i].joint, "marginal": scored[i].marginal}
    half = len(images.validation) // 2
    functions = torch.from_numpy(images.validation[:half]), torch.from_numpy(images.validation[half : 2 * half])
    validation = digits.to_tasks(images.validation[: sizes["validation"]])
    return Problem(2, digits.to_tasks(images.train), validation, test, references, grid, functions, noisy=True)
