"""Priors over weights, each as mean + L eps with eps standard normal.

A `Factor` is the linear map L of one layer; it knows how features pass through it, and nothing else needs to know its
structure. A `LayerPrior` is the module that owns the learned numbers and hands out a mean and a `Factor`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = [
    "PRIORS",
    "DenseFactor",
    "Diagonal",
    "DiagonalFactor",
    "Factor",
    "LayerPrior",
    "NetworkPrior",
    "PerUnit",
    "Prior",
    "Shared",
]


class Factor(ABC):
    """Be the map L in w = mean + L eps, for the U blocks of a layer (U = d_out, or 1 where the units share one factor)."""

    rank: int

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of the factor, each with the blocks first."""

    @abstractmethod
    def rebuild(self, *tensors: Tensor) -> Factor:
        """Return a factor of this structure on other tensors."""

    @abstractmethod
    def project(self, A: Tensor) -> Tensor:
        """Return A L with shape (*B, N, U, k) for features A with shape (*B, N, p)."""

    @abstractmethod
    def apply(self, eps: Tensor) -> Tensor:
        """Return L eps with shape (..., d, p) for eps with shape (..., d, k)."""

    @abstractmethod
    def pull(self, v: Tensor) -> Tensor:
        """Return L^T v with shape (*B, U, k, C) for v with shape (*B, U, p, C)."""

    @abstractmethod
    def congruence(self, G: Tensor) -> Tensor:
        """Return L^T G L with shape (*B, U, k, k) for G with shape (*B, V, p, p), V = U or 1."""

    @property
    def blocks(self) -> int:
        """Return the number of blocks U."""
        return self.tensors[0].shape[0]

    def slice(self, start: int, stop: int) -> Factor:
        """Return the factor of the blocks from `start` to `stop`; a shared factor is its own slice."""
        return self if self.blocks == 1 else self.rebuild(*(t[start:stop] for t in self.tensors))


@dataclass(frozen=True, eq=False)
class DiagonalFactor(Factor):
    """Be L = diag(s), with s of shape (U, p)."""

    s: Tensor

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Return k = p."""
        return self.s.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return (s,)."""
        return (self.s,)

    def rebuild(self, *tensors: Tensor) -> DiagonalFactor:
        """Return a diagonal factor on other scales."""
        return DiagonalFactor(*tensors)

    def project(self, A: Tensor) -> Tensor:
        """Return A diag(s), at a cost of N k."""
        return A.unsqueeze(-2) * self.s

    def apply(self, eps: Tensor) -> Tensor:
        """Return s * eps."""
        return self.s * eps

    def pull(self, v: Tensor) -> Tensor:
        """Return s * v."""
        return self.s.unsqueeze(-1) * v

    def congruence(self, G: Tensor) -> Tensor:
        """Return s G s."""
        return self.s.unsqueeze(-1) * G * self.s.unsqueeze(-2)


@dataclass(frozen=True, eq=False)
class DenseFactor(Factor):
    """Be any L of shape (U, p, k)."""

    L: Tensor

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Return k."""
        return self.L.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return (L,)."""
        return (self.L,)

    def rebuild(self, *tensors: Tensor) -> DenseFactor:
        """Return a dense factor on another L."""
        return DenseFactor(*tensors)

    def project(self, A: Tensor) -> Tensor:
        """Return A L for all blocks in one matrix product, at a cost of N k p a block."""
        U, p, k = self.L.shape
        joined = self.L.permute(1, 0, 2).reshape(p, U * k)
        return (A @ joined).unflatten(-1, (U, k))

    def apply(self, eps: Tensor) -> Tensor:
        """Return L eps, unit by unit."""
        if self.L.shape[0] == 1:
            return eps @ self.L[0].mT
        return torch.einsum("upk,...uk->...up", self.L, eps)

    def pull(self, v: Tensor) -> Tensor:
        """Return L^T v."""
        return self.L.mT @ v

    def congruence(self, G: Tensor) -> Tensor:
        """Return L^T G L, at a cost of p^2 k a block."""
        return self.L.mT @ (G @ self.L)


class LayerPrior(nn.Module, ABC):
    """Hold the prior over the weights W (d_out, p) of one layer: rows mean_u + L_u eps_u, bias in the last column.

    Arguments:
        d_in: number of inputs, without the bias.
        d_out: number of units.
        scaled: start at covariance I / p, the usual fan-in scaling; otherwise at I.
        scale: standard deviations start this many times larger.
    """

    def __init__(self, d_in: int, d_out: int, scaled: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.d_in, self.d_out, self.p = d_in, d_out, d_in + 1
        # Learned numbers are relative to this scale, so that one learning rate serves every width.
        self.unit = scale / math.sqrt(self.p) if scaled else scale
        self.relative_mean = nn.Parameter(torch.zeros(d_out, self.p))

    @property
    def rank(self) -> int:
        """Return the number k of columns of L."""
        return self.p

    @property
    def mean(self) -> Tensor:
        """Return the prior mean with shape (d_out, p)."""
        return self.unit * self.relative_mean

    def spread(self, share: float, generator: torch.Generator) -> None:
        """Move a share of the initial variance from around the means into them: mean ~ N(0, share v), covariance (1 - share) v."""
        drawn = torch.randn(self.relative_mean.shape, generator=generator, dtype=torch.float64)
        self.relative_mean.data.copy_(math.sqrt(share) * drawn)
        self.scale_parameters()[0].data.fill_(0.5 * math.log(1.0 - share))

    @abstractmethod
    def factor(self) -> Factor:
        """Return L."""

    @abstractmethod
    def scale_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of L, the logarithms of its diagonal first."""

    def dense_factor(self) -> Tensor:
        """Return L written out, with shape (d_out, p, k)."""
        factor = self.factor()
        eye = torch.eye(self.p, dtype=self.relative_mean.dtype, device=self.relative_mean.device)
        return factor.project(eye).transpose(0, 1).expand(self.d_out, -1, -1)

    def covariance(self) -> Tensor:
        """Return L L^T of each unit, with shape (d_out, p, p)."""
        L = self.dense_factor()
        return L @ L.mT

    def divergence(self) -> Tensor:
        """Return KL(p || N(0, I/p)) in nats, in float64; the default is N(0, I/p) whatever the prior started from."""
        # In units of the default's deviation 1 / sqrt(p). L is triangular: its diagonal tells the determinant, however singular.
        mean, L = (math.sqrt(self.p) * t.double() for t in (self.mean, self.dense_factor()))
        log_det = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum()
        return 0.5 * (mean.square().sum() + L.square().sum() - mean.numel() - log_det)

    def rsample(self, eps: Tensor) -> Tensor:
        """Return weights mean + L eps with shape (..., d_out, p) for eps with shape (..., d_out, k)."""
        return self.mean + self.factor().apply(eps)


class Diagonal(LayerPrior):
    """Hold independent weights: L = diag(s), learned as mean and log s (the paper's weightwise prior).

    Example:
        >>> Diagonal(3, 2).covariance()[0].diagonal().detach()
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def __init__(self, d_in: int, d_out: int, scaled: bool = True, scale: float = 1.0) -> None:
        super().__init__(d_in, d_out, scaled, scale)
        self.log_scale = nn.Parameter(torch.zeros(d_out, self.p))

    def factor(self) -> DiagonalFactor:
        """Return diag(s)."""
        return DiagonalFactor(self.unit * self.log_scale.exp())

    def scale_parameters(self) -> list[nn.Parameter]:
        """Return log s."""
        return [self.log_scale]


class _Triangular(LayerPrior):
    """Hold lower triangular factors, learned as log diagonal and strict lower triangle."""

    def __init__(self, d_in: int, d_out: int, scaled: bool, scale: float, blocks: int) -> None:
        super().__init__(d_in, d_out, scaled, scale)
        self.log_diagonal = nn.Parameter(torch.zeros(blocks, self.p))
        self.strict_lower = nn.Parameter(torch.zeros(blocks, self.p, self.p))

    def factor(self) -> DenseFactor:
        """Return the lower triangular factors."""
        return DenseFactor(self.unit * (self.strict_lower.tril(-1) + torch.diag_embed(self.log_diagonal.exp())))

    def scale_parameters(self) -> list[nn.Parameter]:
        """Return the log diagonal and the strict lower triangle."""
        return [self.log_diagonal, self.strict_lower]


class PerUnit(_Triangular):
    """Hold one full covariance for each unit (the paper's unitwise prior, its default).

    Cost of conditioning: one factorisation per unit, task and sample.

    Example:
        >>> PerUnit(3, 2).covariance().shape
        torch.Size([2, 4, 4])
    """

    def __init__(self, d_in: int, d_out: int, scaled: bool = True, scale: float = 1.0) -> None:
        super().__init__(d_in, d_out, scaled, scale, blocks=d_out)


class Shared(_Triangular):
    """Hold one full covariance for each layer, the same for all its units; the means differ.

    With one noise per point (`shared_noise=True`) conditioning needs one factorisation per task and sample, not one per unit.

    Example:
        >>> Shared(3, 2).factor().blocks
        1
    """

    def __init__(self, d_in: int, d_out: int, scaled: bool = True, scale: float = 1.0) -> None:
        super().__init__(d_in, d_out, scaled, scale, blocks=1)


PRIORS: dict[str, type[LayerPrior]] = {"diagonal": Diagonal, "per_unit": PerUnit, "shared": Shared}


@dataclass(frozen=True)
class Prior:
    """Say which prior a network has, and what of it is learned.

    Arguments:
        kind: "diagonal", "per_unit" or "shared".
        scaled: start at covariance I / p (fan-in), otherwise at I.
        learn_mean: whether the means are learned.
        learn_scale: whether the factors L are learned.
        spread: share of the initial variance that lies between the means of the units, drawn at random, instead of around them.
            With 0, the definition of the method, all units of a layer start alike and learning has to tell them apart; a
            value near 1 starts from the same functions in distribution and learns faster.
        input_scale: the first layer's standard deviations start this many times larger, for functions that vary within a
            fraction of the range of the inputs.

    Raises:
        ValueError: an unknown kind, a spread outside [0, 1), or an input_scale that is not positive.

    Example:
        >>> Prior("diagonal", learn_mean=False).learn_mean
        False
    """

    kind: str = "per_unit"
    scaled: bool = True
    learn_mean: bool = True
    learn_scale: bool = True
    spread: float = 0.0
    input_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("scaled", "learn_mean", "learn_scale"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Expected {name} as True or False. Got {getattr(self, name)!r}.")
        for name in ("spread", "input_scale"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not 0.0 <= self.spread < 1.0:
            raise ValueError(f"Expected spread in [0, 1). Got {self.spread}.")
        if not (math.isfinite(self.input_scale) and self.input_scale > 0):
            raise ValueError(f"Expected input_scale to be positive and finite. Got {self.input_scale}.")
        if self.kind not in PRIORS:
            raise ValueError(f"Expected a prior among {', '.join(sorted(PRIORS))}. Got {self.kind!r}.")


class NetworkPrior:
    """Look at the priors of all layers of a network as one, and decide what of them is learned.

    Arguments:
        layers: the layers' priors, from the input side.
    """

    def __init__(self, layers: Sequence[LayerPrior]) -> None:
        self.layers = tuple(layers)

    def __iter__(self) -> Iterator[LayerPrior]:
        """Iterate over the layers' priors."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    def means(self) -> list[nn.Parameter]:
        """Return the parameters of the means."""
        return [layer.relative_mean for layer in self.layers]

    def scales(self) -> list[nn.Parameter]:
        """Return the parameters of the factors L."""
        return [parameter for layer in self.layers for parameter in layer.scale_parameters()]

    summary: ClassVar[Callable[[NetworkPrior], Any]]
    """Return a table of what the prior says; set by `bnnp.reading`, since the core knows no reports."""

    def divergence(self) -> Tensor:
        """Return KL(p_Psi || N(0, I/p)) in nats, in float64; differentiable. See `LayerPrior.divergence`."""
        return torch.stack([layer.divergence() for layer in self.layers]).sum()

    def learn(self, mean: bool = True, scale: bool = True) -> None:
        """Say whether means and scales get gradients from now on; `learn(False, False)` freezes the prior."""
        for parameter in self.means():
            parameter.requires_grad_(mean)
        for parameter in self.scales():
            parameter.requires_grad_(scale)
