"""One amortised layer: a prior over its weights and an inference network that turns data into pseudo-observations.

The inference network sees one datum at a time, [x_n, y_n], and answers with what the layer's linear map should put out there,
and how surely. Because every datum is heard alone, the posterior is a sum over points: see `bnnp.conjugate`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnp.conjugate import SiteSum, condition
from bnnp.draws import CANONICAL_RANK, Normal, draw_canonical, draw_fused
from bnnp.factors import Factor, Given, Sites
from bnnp.priors import HeavyTailed
from bnnp.structures import LayerPrior
from bnnp.tails import cell_middles, draw_level, log_mass, log_scale

__all__ = ["ACTIVATIONS", "MAX_PRECISION", "AmortisedLinear", "LayerDraw", "ScaleDraw", "features", "mlp"]

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


START_KAPPA = -4.0
"""Where learning of a temperature starts: kappa = softplus(-4) = 0.018."""


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


@dataclass(frozen=True, eq=False)
class ScaleDraw:
    """Hold a draw of the scale of a heavy-tailed layer.

    Arguments:
        root: square roots of the scales with shape (S, T).
        kl: KL divergence with shape (Sa, T).
        ratio: log q - log p with shape (S, T).
        log_share: log probabilities of the cells with shape (Sa, T, Q).
    """

    root: Tensor
    kl: Tensor
    ratio: Tensor
    log_share: Tensor

    def of(self, given: Given) -> Given:
        """Return the layer's prior given the scale."""
        return dataclasses.replace(given, scale=self.root)


@dataclass(frozen=True, eq=False)
class LayerDraw:
    """Hold a draw of one layer.

    Arguments:
        weights: W with shape (S, T, d_out, p).
        eps: what they were made of, with shape (S, T, ., k).
        kl: KL divergence with shape (Sa, T), Sa = S or 1.
        ratio: log q - log p with shape (S, T), where the draw is canonical.
    """

    weights: Tensor
    eps: Tensor
    kl: Tensor
    ratio: Tensor | None

    @staticmethod
    def of(given: Given, eps: Tensor, kl: Tensor, ratio: Tensor | None, scale: ScaleDraw | None) -> LayerDraw:
        """Return the draw of weights made of eps, and of a scale before them."""
        if scale is not None:
            kl, ratio = kl + scale.kl, None if ratio is None else ratio + scale.ratio
        return LayerDraw(given.weights(eps), eps, kl, ratio)


class AmortisedLinear(nn.Module):
    """Hold the prior over W (d_out, d_in + 1) and the inference network g with (y~, raw) = g([x_n, y_n]).

    The pseudo-noise has log sigma = raw - 2 and the precision is 1 / (sigma^2 + 1e-6), so it is bounded by 1e6. With a temperature,
    precisions are multiplied by (1 + N)^(-kappa) for contexts of N points, kappa > 0 learned.

    Arguments:
        prior: of its weights.
        net: widths of the inference network from its input to its last hidden layer, or None for a layer without one.
        activation: of the inference network.
        shared_noise: one pseudo-noise for each point, shared by the units; otherwise one for each point and unit.
        true_targets: the pseudo-observations are the data's own y, and only the noise is inferred.
        temperature: whether there is a temperature.
    """

    def __init__(
        self,
        prior: LayerPrior,
        net: Sequence[int] | None,
        activation: str = "relu",
        shared_noise: bool = False,
        true_targets: bool = False,
        temperature: bool = False,
    ) -> None:
        super().__init__()
        self.prior, self.d_out, self.true_targets, self.shared_noise = prior, prior.d_out, true_targets, shared_noise
        outputs = (0 if true_targets else self.d_out) + (1 if shared_noise else self.d_out)
        self.net = None if net is None else mlp((*net, outputs), activation)
        self.raw_kappa = nn.Parameter(torch.tensor(START_KAPPA)) if temperature else None

    def pseudo_observations(self, inputs: Tensor, y: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return y~ with shape (..., N, d_out) and the square roots of the precisions, 0 where nothing was observed.

        Arguments:
            inputs: of the inference network, with shape (..., N, q).
            y: outputs with shape (*T, N, d_y), in the network's units, for a layer whose pseudo-observations they are.
            seen: True = observed, with shape (*T, N, 1), or (*T, N, d_y) for such a layer.
        """
        if self.net is None:
            raise ValueError("Expected a layer with an inference network. Got one without: its noise is the likelihood's own.")
        out = self.net(inputs)
        start = 0 if self.true_targets else self.d_out
        pseudo_y = y if self.true_targets else out[..., :start]
        # log(sigma^2 + 1e-6), with a gradient that stays finite however far raw strays.
        log_variance = torch.logaddexp(2.0 * (out[..., start:] - 2.0), out.new_tensor(-math.log(MAX_PRECISION)))
        return pseudo_y, seen * (-0.5 * log_variance).exp()

    def log_temperature(self, counts: Tensor) -> Tensor | None:
        """Return log of what precisions are multiplied by in contexts of so many points, with shape (T,), or None."""
        return None if self.raw_kappa is None else -F.softplus(self.raw_kappa) * torch.log1p(counts.to(self.raw_kappa))

    def in_weight_space(self, num_points: int, once: bool, canonical: bool) -> bool:
        """Tell whether a draw given so many points is made in weight space, where it is a function of sums over points.

        Arguments:
            num_points: N, padding included.
            once: one conditional serves all samples, as in the first layer.
            canonical: draws are those of `draw_canonical`; otherwise the fast ones of training.
        """
        rank, rows = self.prior.rank, num_points * (self.d_out if self.prior.joint else 1)
        # Where one small factorisation serves all samples, a draw from it is cheaper than noise for every point.
        return rows >= rank or rank <= (CANONICAL_RANK if canonical else SMALL_RANK if once else 0)

    def draw(
        self, given: Given, A: Tensor, sites: Sites, num_samples: int, normal: Normal, canonical: bool, dtype: torch.dtype
    ) -> LayerDraw:
        """Draw W from its posterior.

        Arguments:
            given: the prior given the layers before.
            A: features of its problem with shape (Sa, T, N, p), Sa = S, or 1 where they do not depend on the sample.
            sites: pseudo-observations of its problem.
            num_samples: S.
            normal: source of standard normal numbers.
            canonical: draw as `draw_canonical` does; otherwise as `draw_fused`.
            dtype: precision of the factorisations.
        """
        core = given.computed(dtype).core
        scale = self.draw_scale(lambda root: condition(core, A * root, sites).log_z, num_samples, normal)
        if scale is not None:
            given, A = scale.of(given), A * scale.root[..., None, None]
        factor = given.core
        small = A.shape[0] == 1 and self.in_weight_space(0, True, False)
        if canonical or small or (sites.root_prec.shape[-1] > 1 and A.shape[-2] >= MANY_POINTS * factor.rank):
            eps, kl, ratio = draw_canonical(factor, A, sites, num_samples, normal, dtype)
            return LayerDraw.of(given, eps, kl, ratio, scale)
        eps, kl = draw_fused(factor, A, sites, num_samples, normal, dtype)
        return LayerDraw.of(given, eps, kl, None, scale)

    def draw_scale(self, log_z: Callable[[float], Tensor], num_samples: int, normal: Normal) -> ScaleDraw | None:
        """Draw the scale of a heavy-tailed layer for each sample, given the layer's evidence at any scale; None for other priors.

        Arguments:
            log_z: from the square root of a scale to the log evidence with shape (Sa, T).
            num_samples: S.
            normal: source of standard normal numbers.
        """
        if not isinstance(self.prior, HeavyTailed):
            return None
        roots = [float((0.5 * log_scale(z, self.prior.dof)).exp()) for z in cell_middles()]
        evidence = torch.stack([log_z(root) for root in roots], dim=-1)
        mass = log_mass(evidence)
        share = (evidence + mass).log_softmax(-1)
        u = torch.special.ndtr(normal((num_samples, evidence.shape[-2])).to(share))
        z, ratio = draw_level(share, u)
        kl = (share.exp() * (share - mass)).sum(-1)
        return ScaleDraw((0.5 * log_scale(z, self.prior.dof)).exp(), kl, ratio, share)

    def draw_scales(self, core: Factor, both: Sequence[SiteSum], num_samples: int, normal: Normal) -> tuple[ScaleDraw | None, Tensor]:
        """Draw the scale given two sets of points, with the divergence of its posterior from that given the first set.

        Arguments:
            core: L.
            both: the sums over the first and the second set.
            num_samples: S.
            normal: source of standard normal numbers.
        """
        old, new = both
        roots: list[Tensor] = []

        def noted(root: float) -> Tensor:
            roots.append(old.scaled(root).condition(core).log_z)
            return (old + new).scaled(root).condition(core).log_z

        scale = self.draw_scale(noted, num_samples, normal)
        if scale is None:
            return None, torch.zeros(())
        earlier = torch.stack(roots, dim=-1)
        before = (earlier + log_mass(earlier)).log_softmax(-1)
        return scale, (scale.log_share.exp() * (scale.log_share - before)).sum(-1)
