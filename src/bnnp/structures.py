"""The structures of a layer's prior, each a mean and a map L with its own learned numbers.

A `LayerPrior` is the module that owns the learned numbers of one layer and hands out its prior, given what was drawn of the layers before
it, as a `Given`. Which structure a network has, and what of it is learned, is the matter of `bnnp.priors`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bnnp.factors import DenseFactor, DiagonalFactor, Factor, Given, JointFactor, LowRankFactor
from bnnp.linalg import cholesky, log_det

__all__ = ["Diagonal", "LayerPrior", "LowRank", "MatrixNormal", "Network", "PerLayer", "PerUnit", "Shared"]


class LayerPrior(nn.Module, ABC):
    """Hold the prior over the weights W (d_out, p) of one layer, bias in the last column.

    Arguments:
        d_in: number of inputs, without the bias.
        d_out: number of units.
        scaled: start at covariance I / p, the usual fan-in scaling; otherwise at I.
        scale: standard deviations start this many times larger.
    """

    by_column = False
    """Whether the units share their factor, so that what is learned of the layer in part is whole columns of W."""
    joint = False
    """Whether the units share one vector eps."""
    learned: Tensor | None

    def __init__(self, d_in: int, d_out: int, scaled: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.d_in, self.d_out, self.p = d_in, d_out, d_in + 1
        # Learned numbers are relative to this scale, so that one learning rate serves every width.
        self.unit = scale / math.sqrt(self.p) if scaled else scale
        self.relative_mean = nn.Parameter(torch.zeros(d_out, self.p))
        self.register_buffer("learned", None)

    @property
    def rank(self) -> int:
        """Return the number k of columns of L."""
        return self.p

    @property
    def mean(self) -> Tensor:
        """Return the prior mean with shape (d_out, p)."""
        return self.given().mean

    @property
    def learnable(self) -> bool:
        """Return whether anything of this layer is learned."""
        return self.learned is None or bool(self.learned.any())

    def keep(self, learned: Tensor) -> None:
        """Learn the chosen weights (d_out, p) only; the others have mean 0, the initial variance and no correlations."""
        self.register_buffer("learned", learned)

    def start(self, share: float, generator: torch.Generator) -> None:
        """Draw what is random at the start: means ~ N(0, share v), and covariance (1 - share) v around them, for the variance v."""
        if share > 0:
            drawn = torch.randn(self.relative_mean.shape, generator=generator, dtype=torch.float64)
            self.relative_mean.data.copy_(math.sqrt(share) * drawn)
            for parameter in self.log_scales():
                parameter.data.add_(0.5 * math.log(1.0 - share))

    @abstractmethod
    def given(self, before: Sequence[Tensor] = (), component: int = 0) -> Given:
        """Return the prior given the eps of earlier layers, each with shape (S, T, ., k), and a component of a mixture."""

    def means(self) -> list[nn.Parameter]:
        """Return the parameters of the mean."""
        return [self.relative_mean]

    @abstractmethod
    def scale_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of L, the logarithms of its diagonal first."""

    @abstractmethod
    def log_scales(self) -> list[nn.Parameter]:
        """Return the logarithms by which all of L is multiplied."""

    @abstractmethod
    def log_volume(self) -> Tensor:
        """Return log |L L^T| / 2 of all units together, of the covariance of W."""

    def dense(self) -> Tensor:
        """Return L of the whole layer written out, with shape (d_out, p, K): the weights of unit u are mean_u + L_u eps."""
        factor = self.given().together().factor
        assert isinstance(factor, JointFactor)
        return factor.L

    def covariance(self) -> Tensor:
        """Return the covariance of each unit's weights, with shape (d_out, p, p)."""
        L = self.dense()
        return L @ L.mT

    def divergence(self) -> Tensor:
        """Return KL(p || N(0, I / p)), from the prior that a network has without learning."""
        size = self.d_out * self.p
        return 0.5 * (self.p * (self._spread() + self.mean.square().sum()) - size - size * math.log(self.p)) - self.log_volume()

    def _spread(self) -> Tensor:
        """Return the variances of all weights added up, without writing L out."""
        factor = self.given().factor
        squares = torch.stack([t.square().sum() for t in factor.tensors]).sum()
        return squares * (self.d_out if isinstance(factor, Factor) and factor.blocks == 1 else 1)

    def _masked(self, value: Tensor) -> Tensor:
        """Return 0 for the weights that are not learned, of a parameter (d_out, p) or (1, p)."""
        return value if self.learned is None else value * self.learned[: value.shape[0]]

    def _pairs(self, value: Tensor) -> Tensor:
        """Return 0 for the pairs of weights not both of which are learned, of a parameter (U, p, p)."""
        if self.learned is None:
            return value
        mask = self.learned[: value.shape[0]]
        return value * (mask.unsqueeze(-1) & mask.unsqueeze(-2))


class Diagonal(LayerPrior):
    """Hold independent weights: L = diag(s), learned as mean and log s (the paper's weightwise prior).

    With `tied`, the units of a layer share s: then conditioning costs what it costs with the `shared` prior, or less.

    Example:
        >>> Diagonal(3, 2).covariance()[0].diagonal().detach()
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def __init__(self, d_in: int, d_out: int, scaled: bool = True, scale: float = 1.0, tied: bool = False) -> None:
        super().__init__(d_in, d_out, scaled, scale)
        self.by_column = tied
        self.log_scale = nn.Parameter(torch.zeros(1 if tied else d_out, self.p))

    def given(self, before: Sequence[Tensor] = (), component: int = 0) -> Given:
        """Return mean and diag(s)."""
        return Given(self.unit * self._masked(self.relative_mean), DiagonalFactor(self.unit * self._masked(self.log_scale).exp()))

    def scale_parameters(self) -> list[nn.Parameter]:
        """Return log s."""
        return [self.log_scale]

    def log_scales(self) -> list[nn.Parameter]:
        """Return log s."""
        return [self.log_scale]

    def log_volume(self) -> Tensor:
        """Return the sum of log s of all units."""
        times = self.d_out // self.log_scale.shape[0]
        return times * (self._masked(self.log_scale).sum() + self.log_scale.numel() * math.log(self.unit))


class _Triangular(LayerPrior):
    """Hold lower triangular factors, learned as log diagonal and strict lower triangle."""

    def __init__(self, d_in: int, d_out: int, scaled: bool, scale: float, blocks: int) -> None:
        super().__init__(d_in, d_out, scaled, scale)
        self.log_diagonal = nn.Parameter(torch.zeros(blocks, self.p))
        self.strict_lower = nn.Parameter(torch.zeros(blocks, self.p, self.p))

    def given(self, before: Sequence[Tensor] = (), component: int = 0) -> Given:
        """Return mean and lower triangular factors."""
        L = self._pairs(self.strict_lower.tril(-1)) + torch.diag_embed(self._masked(self.log_diagonal).exp())
        return Given(self.unit * self._masked(self.relative_mean), DenseFactor(self.unit * L))

    def scale_parameters(self) -> list[nn.Parameter]:
        """Return the log diagonal and the strict lower triangle."""
        return [self.log_diagonal, self.strict_lower]

    def log_scales(self) -> list[nn.Parameter]:
        """Return the log diagonal."""
        return [self.log_diagonal]

    def log_volume(self) -> Tensor:
        """Return the sum of the log diagonals of all units."""
        times = self.d_out // self.log_diagonal.shape[0]
        return times * (self._masked(self.log_diagonal).sum() + self.log_diagonal.numel() * math.log(self.unit))


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
        >>> Shared(3, 2).given().core.blocks
        1
    """

    by_column = True

    def __init__(self, d_in: int, d_out: int, scaled: bool = True, scale: float = 1.0) -> None:
        super().__init__(d_in, d_out, scaled, scale, blocks=1)


class LowRank(LayerPrior):
    """Hold covariances diag(s^2) + V V^T of each unit, L = [diag(s), V] with V (p, r): a few directions and independent rest.

    V = diag(s) R is learned through R, so that a step changes directions in proportion to the weights' deviations. At the start rows of R
    have length 0.1 in random directions, since without any its gradient vanishes; the variances are exact, correlations up to 0.01.
    With `tied`, the units of a layer share s and V.

    Example:
        >>> LowRank(3, 2, rank=2).rank
        6
    """

    def __init__(self, d_in: int, d_out: int, scaled: bool = True, scale: float = 1.0, rank: int = 4, tied: bool = False) -> None:
        super().__init__(d_in, d_out, scaled, scale)
        self.by_column, blocks = tied, 1 if tied else d_out
        self.log_scale = nn.Parameter(torch.zeros(blocks, self.p))
        self.directions = nn.Parameter(torch.zeros(blocks, self.p, rank))

    @property
    def rank(self) -> int:
        """Return k = p + r."""
        return self.p + self.directions.shape[-1]

    def start(self, share: float, generator: torch.Generator) -> None:
        """Draw the directions, and the means as for every prior."""
        drawn = torch.randn(self.directions.shape, generator=generator, dtype=torch.float64)
        self.directions.data.copy_(0.1 * nn.functional.normalize(drawn, dim=-1))
        self.log_scale.data.fill_(-0.5 * math.log(1 + 0.1**2))
        super().start(share, generator)

    def given(self, before: Sequence[Tensor] = (), component: int = 0) -> Given:
        """Return mean and [diag(s), V]."""
        R: Tensor = self.directions
        R = R if self.learned is None else R * self.learned[: R.shape[0]].unsqueeze(-1)
        s = self.unit * self._masked(self.log_scale).exp()
        return Given(self.unit * self._masked(self.relative_mean), LowRankFactor(s, s.unsqueeze(-1) * R))

    def scale_parameters(self) -> list[nn.Parameter]:
        """Return log s and R."""
        return [self.log_scale, self.directions]

    def log_scales(self) -> list[nn.Parameter]:
        """Return log s."""
        return [self.log_scale]

    def log_volume(self) -> Tensor:
        """Return log |diag(s^2) + V V^T| / 2 = sum log s + log |I_r + V^T diag(s^-2) V| / 2 of all units."""
        s, V = self.given().factor.tensors
        scaled = V / s.unsqueeze(-1)
        inner = scaled.mT @ scaled + torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
        return self.d_out // s.shape[0] * (s.log().sum() + 0.5 * log_det(cholesky(inner)).sum())


class PerLayer(LayerPrior):
    """Hold one full covariance over all weights of a layer, unit after unit (the paper's layerwise prior).

    Cost of conditioning: (d p)^3 / 3, or (N d)^3 / 3 with fewer points, per task and sample; d p (d p + 1) / 2 parameters.

    Example:
        >>> PerLayer(3, 2).dense().shape
        torch.Size([2, 4, 8])
    """

    joint = True

    def __init__(self, d_in: int, d_out: int, scaled: bool = True, scale: float = 1.0) -> None:
        super().__init__(d_in, d_out, scaled, scale)
        size = d_out * self.p
        self.log_diagonal = nn.Parameter(torch.zeros(size))
        self.strict_lower = nn.Parameter(torch.zeros(size, size))

    @property
    def rank(self) -> int:
        """Return k = d p."""
        return self.d_out * self.p

    def _factor(self) -> Tensor:
        lower: Tensor = self.strict_lower.tril(-1)
        log: Tensor = self.log_diagonal
        if self.learned is not None:
            mask = self.learned.flatten()
            lower, log = lower * (mask.unsqueeze(-1) & mask), log * mask
        return self.unit * (lower + log.exp().diag())

    def given(self, before: Sequence[Tensor] = (), component: int = 0) -> Given:
        """Return mean and the lower triangular factor of all weights."""
        L = self._factor().unflatten(0, (self.d_out, self.p))
        return Given(self.unit * self._masked(self.relative_mean), JointFactor(L))

    def scale_parameters(self) -> list[nn.Parameter]:
        """Return the log diagonal and the strict lower triangle."""
        return [self.log_diagonal, self.strict_lower]

    def log_scales(self) -> list[nn.Parameter]:
        """Return the log diagonal."""
        return [self.log_diagonal]

    def log_volume(self) -> Tensor:
        """Return the sum of the log diagonal."""
        return self._factor().diagonal().log().sum()


class Network(PerLayer):
    """Hold one full covariance over all weights of a network, layer after layer (the paper's networkwise prior).

    Given the eps of earlier layers a layer has mean mean_l + L_{l,<l} eps^{<l} and factor L_ll, so nothing is inverted.

    Arguments:
        before: the priors of earlier layers.
    """

    def __init__(self, d_in: int, d_out: int, scaled: bool = True, scale: float = 1.0, before: Sequence[LayerPrior] = ()) -> None:
        super().__init__(d_in, d_out, scaled, scale)
        self.cross = nn.Parameter(torch.zeros(d_out * self.p, sum(layer.rank for layer in before)))
        self._before = tuple(before)  # a tuple, so that their parameters stay theirs

    def _cross(self) -> Tensor:
        """Return L_{l,<l} with shape (d, p, K)."""
        masks = [layer.learned for layer in self._before]
        cross: Tensor = self.cross
        if self.learned is not None and cross.numel():
            earlier = torch.cat([mask.flatten() for mask in masks if mask is not None])
            cross = cross * (self.learned.flatten().unsqueeze(-1) & earlier)
        return self.unit * cross.unflatten(0, (self.d_out, self.p))

    def given(self, before: Sequence[Tensor] = (), component: int = 0) -> Given:
        """Return the mean given earlier eps, and L_ll."""
        own = super().given()
        if not before:
            return own
        eps = torch.cat([e.squeeze(-2) for e in before], dim=-1).to(own.mean)
        return Given(own.mean + torch.einsum("upk,...k->...up", self._cross(), eps), own.factor)

    def scale_parameters(self) -> list[nn.Parameter]:
        """Return the log diagonal, the strict lower triangle, and L_{l,<l}."""
        return [*super().scale_parameters(), *([self.cross] if self.cross.numel() else [])]

    def _spread(self) -> Tensor:
        return super()._spread() + self._cross().square().sum()

    def dense(self) -> Tensor:
        """Return [L_{l,<l}, L_ll] with shape (d_out, p, K)."""
        return torch.cat([self._cross(), super().dense()], dim=-1)


class MatrixNormal(LayerPrior):
    """Hold W = L_out (mean' + E L_in^T), E standard normal: covariance L_out L_out^T between units, L_in L_in^T between inputs.

    The pseudo-observations of a hidden layer are those of the whitened units L_out^{-1} W, which are independent and share L_in: with one
    noise per point conditioning costs what it costs with the `shared` prior. Where the observations are the data themselves and there
    are several outputs, these are conditioned together, as with `per_layer`.

    References:
        Structured and efficient variational deep learning with matrix Gaussian posteriors (Louizos and Welling, 2016), section 3.

    Example:
        >>> MatrixNormal(3, 2).dense().shape
        torch.Size([2, 4, 8])
    """

    by_column = True

    def __init__(self, d_in: int, d_out: int, scaled: bool = True, scale: float = 1.0) -> None:
        super().__init__(d_in, d_out, scaled, scale)
        self.log_diagonal = nn.Parameter(torch.zeros(1, self.p))
        self.strict_lower = nn.Parameter(torch.zeros(1, self.p, self.p))
        self.log_output = nn.Parameter(torch.zeros(d_out))
        self.lower_output = nn.Parameter(torch.zeros(d_out, d_out))

    @property
    def _mix(self) -> Tensor:
        whole = self.learned is None or bool(self.learned.all())  # in part it stays at its start, or it would move what is not learned
        lower, log = (self.lower_output.tril(-1), self.log_output) if whole else (0 * self.lower_output, 0 * self.log_output)
        return lower + log.exp().diag()

    def given(self, before: Sequence[Tensor] = (), component: int = 0) -> Given:
        """Return the mean and factor of the whitened units, and L_out."""
        L = self._pairs(self.strict_lower.tril(-1)) + torch.diag_embed(self._masked(self.log_diagonal).exp())
        return Given(self.unit * self._masked(self.relative_mean), DenseFactor(self.unit * L), self._mix)

    @property
    def mean(self) -> Tensor:
        """Return L_out mean' with shape (d_out, p)."""
        return self._mix @ self.given().mean

    def scale_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of L_in and L_out."""
        return [self.log_diagonal, self.strict_lower, self.log_output, self.lower_output]

    def log_scales(self) -> list[nn.Parameter]:
        """Return the log diagonal of L_in."""
        return [self.log_diagonal]

    def _spread(self) -> Tensor:
        return self.given().factor.tensors[0].square().sum() * self._mix.square().sum()

    def log_volume(self) -> Tensor:
        """Return d log |L_in| + p log |L_out|."""
        given = self.given()
        assert given.mix is not None
        inner = given.factor.tensors[0].diagonal(dim1=-2, dim2=-1)
        return self.d_out * inner.log().sum() + self.p * given.mix.diagonal().log().sum()
