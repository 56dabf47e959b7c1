"""Tasks inside and outside the distribution that a model has learned, each with the score of whoever knows the truth.

A kind of task is the home process with one thing changed by a stated amount. The targets come from the changed process too, and are
always clean: outliers are put into the context alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bnnp.data.synthetic import GaussianProcess, Heaviside, Process, Sawtooth, SquaredExponentialGP

Home: TypeAlias = Sawtooth | SquaredExponentialGP
OUTLIER = 5.0  # in standard deviations of y over the tasks of the home process
AMPLITUDE = 1.33 * 0.75  # from foot to top of a tooth of `Sawtooth`


@dataclass(frozen=True, kw_only=True)
class OtherSawtooth(Sawtooth):
    """Draw sawtooths of another period, with teeth as high as those of `Sawtooth`, plus the same random line.

    Example:
        >>> x = torch.tensor([[0.3], [1.0]])
        >>> torch.allclose(OtherSawtooth(period=0.75).mean(x), Sawtooth().mean(x))
        True
    """

    period: float = 0.75

    def mean(self, x: Tensor) -> Tensor:
        """Return the sawtooth with shape (*T, N, 1)."""
        return AMPLITUDE * (torch.remainder(x / self.period, 1.0) - 0.5)


@dataclass(frozen=True)
class Kind:
    """Describe one kind of task.

    Arguments:
        family: what is changed; "inside" for nothing.
        strength: by how much, in words.
        process: that makes function, noise and context inputs.
        target_process: its `x_range` is that of the targets; None for that of the context.
        scale: factor on all outputs, noise included.
        outliers: context points that get a gross error.
        context_factor: factor on the number of context points.
    """

    family: str
    strength: str
    process: Process
    target_process: Process | None = None
    scale: float = 1.0
    outliers: int = 0
    context_factor: int = 1

    @property
    def name(self) -> str:
        """Return family and strength."""
        return f"{self.family} {self.strength}".strip()


@dataclass(frozen=True)
class ScoredTask:
    """Hold one task with its targets and what the true process says of them.

    Arguments:
        xc, yc: the context, each with shape (N, 1).
        xt, yt: the targets, each with shape (M, 1).
        ft: the targets without noise.
        oracle_joint: log density per target of all targets together under the true process given the clean context; NaN without oracle.
        oracle_marginal: mean log density of single targets, likewise.
    """

    xc: Tensor
    yc: Tensor
    xt: Tensor
    yt: Tensor
    ft: Tensor
    oracle_joint: float
    oracle_marginal: float


def kinds(home: Home) -> list[Kind]:
    """Return all kinds of tasks for a model whose tasks came from `home`; the first is the inside."""
    low, high = home.x_range
    width = high - low
    noise = home.noise_std

    def moved(share: float) -> Process:
        return replace(home, x_range=(low + share * width, high + share * width))

    found = [Kind("inside", "", home)]
    found += [Kind("inputs moved", f"by {share:g} of the range", moved(share)) for share in (0.5, 1, 2, 4)]
    found += [Kind("targets alone moved", "by 1 of the range", home, target_process=moved(1))]
    found += [Kind("noise", f"x {factor:g}", replace(home, noise_std=factor * noise)) for factor in (0.25, 2, 4, 8)]
    if isinstance(home, Sawtooth):
        found += [
            Kind("period", f"{p:g} for 0.75", OtherSawtooth(noise_std=noise, x_range=home.x_range, period=p)) for p in (0.5, 0.7, 1, 1.5)
        ]
        found += [Kind("process", "smooth (SE-GP)", SquaredExponentialGP(lengthscale=0.5, noise_std=noise, x_range=home.x_range))]
    else:
        found += [Kind("lengthscale", f"{v:g} for {home.lengthscale:g}", replace(home, lengthscale=v)) for v in (0.125, 0.25, 1, 2)]
        found += [Kind("process", "sawtooth", Sawtooth(noise_std=noise, x_range=home.x_range))]
    found += [Kind("process", "steps (Heaviside)", Heaviside(noise_std=noise, x_range=home.x_range))]
    found += [Kind("context", "x 10", home, context_factor=10)]
    found += [Kind("outputs", f"x {factor:g}", home, scale=factor) for factor in (2, 4)]
    found += [Kind("outliers", f"{count} of the context", home, outliers=count) for count in (1, 3)]
    return found


def draw(kind: Kind, count: int, seed: int, config: dict[str, Any], spread: float, xt: Tensor | None = None) -> list[ScoredTask]:
    """Draw tasks of one kind.

    Arguments:
        kind: what to draw.
        count: how many.
        seed: of everything drawn.
        config: with the range `context` of context sizes (both ends included) and `num_targets`.
        spread: standard deviation of y over the tasks of the home process, the unit of outliers.
        xt: target inputs with shape (M, 1) for all tasks; drawn for each where not given.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = config["context"]
    sizes = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    tasks = []
    for n in sizes:
        inputs = _uniform((kind.target_process or kind.process).x_range, config["num_targets"], generator) if xt is None else xt
        tasks.append(_one(kind, n * kind.context_factor, inputs, generator, spread))
    return tasks


def _one(kind: Kind, n: int, xt: Tensor, generator: torch.Generator, spread: float) -> ScoredTask:
    process = kind.process
    # In float32, as a model sees them: y then belongs to exactly the x that is handed out, also beside a jump.
    x = torch.cat([_uniform(process.x_range, n, generator), xt])
    f = process.sample(x, 1, generator)[0]
    y = f + process.noise_std * torch.randn(f.shape, generator=generator)
    xc, yc, yt = x[:n], y[:n], y[n:]
    clean = torch.arange(n) >= kind.outliers  # inputs are in random order, so the first are as good as any
    joint, marginal = _oracle(process, xc[clean], yc[clean], xt, yt)
    sign = torch.where(torch.rand(n, 1, generator=generator) < 0.5, -1.0, 1.0)
    seen = torch.where(clean.unsqueeze(-1), yc, yc + sign * OUTLIER * spread)
    loss = math.log(kind.scale)
    return ScoredTask(xc, kind.scale * seen, xt, kind.scale * yt, kind.scale * f[n:], joint - loss, marginal - loss)


def _uniform(x_range: tuple[float, float], n: int, generator: torch.Generator) -> Tensor:
    low, high = x_range
    return low + (high - low) * torch.rand(n, 1, generator=generator)


def _oracle(process: Process, xc: Tensor, yc: Tensor, xt: Tensor, yt: Tensor) -> tuple[float, float]:
    """Return the true process's log density per target, of all together and of each alone; NaN where it has no closed form."""
    if not isinstance(process, GaussianProcess):
        return math.nan, math.nan
    predictive = process.condition(xc, yc).predict(xt)
    return float(predictive.log_prob(yt, joint=True)) / len(xt), float(predictive.log_prob(yt).mean())
