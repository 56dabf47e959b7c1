"""The instances that every law runs over: add a prior here and all laws hold it to account."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bnnp
from bnnp.factors import Sites
from bnnp.priors import PLAIN, PRIORS
from bnnp.structures import LayerPrior


@dataclass(frozen=True)
class Layer:
    """One layer's problem: a prior with random parameters, features and pseudo-observations of S samples and T tasks."""

    prior: LayerPrior
    A: Tensor
    y: Tensor
    root_prec: Tensor

    @property
    def sites(self) -> Sites:
        """Residuals from the prior mean."""
        return Sites(self.y - self.A @ self.prior.mean.mT, self.root_prec.expand(*self.A.shape[:-2], *self.root_prec.shape[-2:]))

    @property
    def factors(self) -> list[Tensor]:
        """Dense L (p, k) of each unit."""
        return unit_factors(self.prior)

    @property
    def prec(self) -> Tensor:
        """Precisions (T, N, d) of each unit."""
        return self.root_prec.square().expand(*self.y.shape)


# Every prior, with one noise for each point and unit, or one for each point.
INSTANCES = [(kind, shared) for kind in PLAIN for shared in (False, True)]


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def unit_factors(prior: LayerPrior) -> list[Tensor]:
    """Dense L (p, k) of each unit of a layer whose units are independent."""
    factor = prior.given().core
    L = factor.project(torch.eye(prior.p, dtype=torch.float64)).transpose(0, 1)
    return list(L.expand(prior.d_out, -1, -1))


def random_prior(kind: str, d_in: int, d: int, generator: torch.Generator) -> LayerPrior:
    """Build a prior with no parameter at its start."""
    prior = PLAIN[kind](d_in, d).double()
    for parameter in prior.parameters():
        parameter.data += 0.5 * randn(*parameter.shape, generator=generator)
    return prior


def random_layer(kind: str, shared_noise: bool, seed: int, counts: tuple[int, ...], N: int, S: int = 2, d: int = 3, p: int = 4) -> Layer:
    """Build a layer; task t has its first `counts[t]` of N points observed."""
    g = torch.Generator().manual_seed(seed)
    T = len(counts)
    A = torch.cat([randn(S, T, N, p - 1, generator=g), torch.ones(S, T, N, 1, dtype=torch.float64)], dim=-1)
    root = (0.7 * randn(T, N, 1 if shared_noise else d, generator=g)).exp()
    root = root * (torch.arange(N) < torch.tensor(counts).unsqueeze(-1)).unsqueeze(-1)
    prior = random_prior(kind, p - 1, d, g)
    return Layer(prior, A.requires_grad_(), randn(T, N, d, generator=g).requires_grad_(), root.requires_grad_())


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-6)) if want.numel() else 0.0


@dataclass(frozen=True)
class Combination:
    """One network: a prior, a last layer, an amortiser."""

    kind: str
    last: str
    shared_noise: bool
    options: tuple[tuple[str, bool], ...] = ()
    fraction: float = 1.0

    def __str__(self) -> str:
        """Name the test."""
        names = [self.kind, self.last, *(["one noise"] if self.shared_noise else []), *(name for name, _ in self.options)]
        return "-".join([*names, *([f"{self.fraction:g} learned"] if self.fraction < 1 else [])])

    def build(self, seed: int = 0, **settings: Any) -> bnnp.BNNP:
        """A float64 network with no parameter at its start, and a scaling that is not the identity."""
        sizes: dict[str, Any] = {"x_dim": 2, "y_dim": 2, "hidden": (3, 4), "activation": "tanh", **settings}
        prior = bnnp.Prior(self.kind, fraction=self.fraction, rank=2, components=2)
        likelihood = bnnp.Bernoulli() if self.last == "drawn" else bnnp.Gaussian()
        last = "exact" if self.last == "drawn" else self.last
        model = bnnp.BNNP(
            prior=prior, likelihood=likelihood, last_layer=last, shared_noise=self.shared_noise, **dict(self.options), **sizes
        ).double()
        g = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.3 * randn(*parameter.shape, generator=g)
        y = torch.rand(50, sizes["y_dim"], generator=g, dtype=torch.float64)
        x = 2 + 3 * randn(50, sizes["x_dim"], generator=g)
        model.fit_scaling([bnnp.Task(x, y.round() if self.last == "drawn" else 5 - 2 * y)])
        return model

    def tasks(self, sizes: tuple[int, ...], seed: int = 1) -> list[tuple[Tensor, Tensor]]:
        """Data sets that fit the likelihood."""
        g = torch.Generator().manual_seed(seed)
        found = [(2 + 3 * randn(n, 2, generator=g), 4 + randn(n, 2, generator=g)) for n in sizes]
        return [(x, (y > 4).double()) for x, y in found] if self.last == "drawn" else found


LASTS = ("exact", "amortised", "drawn")
VARIANTS: tuple[tuple[tuple[str, bool], ...], ...] = (
    (("feed_activations", True),),
    (("trunk", True),),
    (("temperature", True),),
    (("feed_activations", True), ("trunk", True), ("temperature", True)),
)


def combinations() -> Iterator[Combination]:
    """Every prior with every last layer, every amortiser variant with every third prior, every prior learned in part."""
    kinds = list(PRIORS)
    for i, kind in enumerate(kinds):
        for j, last in enumerate(LASTS):
            yield Combination(kind, last, shared_noise=(i + j) % 2 == 0)
        yield Combination(kind, LASTS[i % 3], shared_noise=i % 2 == 1, fraction=0.55)
    for v, options in enumerate(VARIANTS):
        for i, kind in enumerate(kinds):
            if (i + v) % 3 == 0:
                yield Combination(kind, LASTS[(i // 3 + v) % 3], shared_noise=(i + v) % 2 == 0, options=options)


COMBINATIONS = list(combinations())
