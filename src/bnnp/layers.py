"""One amortised layer: a prior over its weights and an inference network that turns data into pseudo-observations.

The inference network sees one datum at a time, [x_n, y_n], and answers with what the layer's linear map should put out there,
and how surely. Because every datum is heard alone, the posterior is a sum over points: see `bnnp.conjugate`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnp.conjugate import Sites
from bnnp.draws import CANONICAL_RANK, Normal, draw_canonical, draw_fused
from bnnp.priors import PRIORS, Factor, LayerPrior, Prior

__all__ = ["ACTIVATIONS", "MAX_PRECISION", "AmortisedLinear", "features", "mlp"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "sine": torch.sin,
}

SMALL_RANK = 32

MANY_POINTS = 8
"""From this many points for each weight of a unit on, sums over points for all units at once beat passes over the points for each unit."""

MAX_PRECISION = 1e6
"""Upper bound of a pseudo-observation's precision, in the network's units."""


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)


def mlp(widths: Sequence[int], activation: str) -> nn.Sequential:
    """Build a multi-layer perceptron of the given widths, with no activation after the last layer.

    Its weights are not set: torch would draw them from the global generator. Who builds it draws them from one of his own.

    Example:
        >>> mlp((2, 8, 1), "tanh")(torch.zeros(3, 2)).shape
        torch.Size([3, 1])
    """
    parts: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
        parts += [_Activation(activation)] * (i > 0) + [nn.utils.skip_init(nn.Linear, d_in, d_out)]
    return nn.Sequential(*parts)


def features(H: Tensor) -> Tensor:
    """Return A = [H, 1] with shape (..., d + 1): the bias is the last column."""
    return F.pad(H, (0, 1), value=1.0)


class AmortisedLinear(nn.Module):
    """Hold the prior over W (d_out, d_in + 1) and the inference network g with (y~, raw) = g([x_n, y_n]).

    The pseudo-noise has log sigma = raw - 2 and the precision is 1 / (sigma^2 + 1e-6), so it is bounded by 1e6.

    Arguments:
        d_in: number of inputs, without the bias.
        d_out: number of units.
        prior: which prior.
        net: widths of the inference network from its input to its last hidden layer, or None for a layer without one.
        activation: of the inference network.
        shared_noise: one pseudo-noise for each point, shared by the units; otherwise one for each point and unit.
        true_targets: the pseudo-observations are the data's own y, and only the noise is inferred.
        scale: how many times larger the prior's standard deviations start.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        prior: Prior,
        net: Sequence[int] | None,
        activation: str = "relu",
        shared_noise: bool = False,
        true_targets: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.d_in, self.d_out, self.true_targets = d_in, d_out, true_targets
        self.prior: LayerPrior = PRIORS[prior.kind](d_in, d_out, prior.scaled, scale)
        outputs = (0 if true_targets else d_out) + (1 if shared_noise else d_out)
        self.net = None if net is None else mlp((*net, outputs), activation)

    def pseudo_observations(self, x: Tensor, y: Tensor, mask: Tensor, embedded: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y~ with shape (*T, N, d_out) and the square roots of the precisions, 0 where masked.

        Arguments:
            x: inputs with shape (*T, N, d_x), in the network's units.
            y: outputs with shape (*T, N, d_y), in the network's units.
            mask: True = observed, with shape (*T, N), or (*T, N, d_out) for each pseudo-observation.
            embedded: what the inference network sees of the outputs, where that is not y.
        """
        if self.net is None:
            raise ValueError("Expected a layer with an inference network. Got one without: its noise is the likelihood's own.")
        out = self.net(torch.cat([x, y if embedded is None else embedded], dim=-1))
        start = 0 if self.true_targets else self.d_out
        pseudo_y = y if self.true_targets else out[..., :start]
        # log(sigma^2 + 1e-6), with a gradient that stays finite however far raw strays.
        log_variance = torch.logaddexp(2.0 * (out[..., start:] - 2.0), out.new_tensor(-math.log(MAX_PRECISION)))
        return pseudo_y, (mask if mask.ndim == x.ndim else mask.unsqueeze(-1)) * (-0.5 * log_variance).exp()

    def in_weight_space(self, num_points: int, once: bool, canonical: bool) -> bool:
        """Tell whether a draw given so many points is made in weight space, where it is a function of sums over points.

        Arguments:
            num_points: N, padding included.
            once: one conditional serves all samples, as in the first layer.
            canonical: draws are those of `draw_canonical`; otherwise the fast ones of training.
        """
        rank = self.prior.rank
        # Where one small factorisation serves all samples, a draw from it is cheaper than noise for every point.
        return num_points >= rank or rank <= (CANONICAL_RANK if canonical else SMALL_RANK if once else 0)

    def draw(
        self, A: Tensor, sites: Sites, num_samples: int, normal: Normal, canonical: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw W from its posterior given features A.

        Arguments:
            A: features with shape (Sa, T, N, p), Sa = S, or 1 where they do not depend on the sample.
            sites: pseudo-observations as residuals from the prior mean.
            num_samples: S.
            normal: source of standard normal numbers.
            canonical: draw as `draw_canonical` does; otherwise as `draw_fused`.
            dtype: precision of the factorisations.

        Returns:
            W with shape (S, T, d_out, p), the KL divergence with shape (Sa, T), and log q - log p with shape (S, T) where canonical.
        """
        factor = self.prior.factor()
        small = A.shape[0] == 1 and self.in_weight_space(0, True, False)
        if canonical or small or (sites.root_prec.shape[-1] > 1 and A.shape[-2] >= MANY_POINTS * factor.rank):
            eps, kl, ratio = draw_canonical(factor, A, sites, num_samples, normal, dtype)
            return self.weights(eps, factor), kl, ratio
        eps, kl = draw_fused(factor, A, sites, num_samples, normal, dtype)
        return self.weights(eps, factor), kl, None

    def sites(self, A: Tensor, pseudo_y: Tensor, root_prec: Tensor) -> Sites:
        """Return the pseudo-observations as residuals from the prior mean."""
        return Sites(pseudo_y - A @ self.prior.mean.mT, root_prec.expand(*A.shape[:1], *root_prec.shape))

    def weights(self, eps: Tensor, factor: Factor | None = None) -> Tensor:
        """Return W = mean + L eps with shape (..., d_out, p), where the parameters are and in their precision."""
        mean = self.prior.mean
        return mean + (factor or self.prior.factor()).apply(eps.to(mean.dtype).to(mean.device))
