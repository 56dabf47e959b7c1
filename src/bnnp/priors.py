"""Priors over the weights of a network: which structure, which compound of structures, and what of it is learned.

Every prior is mean + L eps with eps standard normal, given the discrete component of a `Mixture` or the random scale of a `HeavyTailed`
layer. `Prior` says which one; `layer_priors` builds it; `NetworkPrior` looks at all layers as one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnnp.factors import Given
from bnnp.seeds import check_count
from bnnp.structures import Diagonal, LayerPrior, LowRank, MatrixNormal, Network, PerLayer, PerUnit, Shared
from bnnp.tails import log_scale

__all__ = ["PLAIN", "PRIORS", "HeavyTailed", "Mixture", "NetworkPrior", "Prior", "layer_priors"]

PLAIN: dict[str, type[LayerPrior]] = {"diagonal": Diagonal, "low_rank": LowRank, "per_unit": PerUnit, "shared": Shared}
"""Structures in which the units of a layer are independent: what compounds are made of."""


class Mixture(LayerPrior):
    """Hold K priors of one kind, of which a task has one: a discrete latent, the same for all layers.

    p(W) = sum_k pi_k p_k(W). Each component is conditioned as it is; its responsibility is pi_k times its evidence. The mixture pays where
    tasks are of separate kinds. At the start the components differ in their means.

    Arguments:
        first: the first layer's prior, which holds log pi for all; None for the first layer itself.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        scaled: bool = True,
        scale: float = 1.0,
        of: str = "shared",
        components: int = 3,
        first: Mixture | None = None,
        **options: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.d_in, self.d_out, self.p = d_in, d_out, d_in + 1
        self.components = nn.ModuleList(PLAIN[of](d_in, d_out, scaled, scale, **options) for _ in range(components))
        self.by_column = self.parts[0].by_column
        self._first = (first,)  # in a tuple, so that its parameters stay its own
        if first is None:
            self.logits = nn.Parameter(torch.zeros(components))
        self.register_buffer("learned", None)

    @property
    def parts(self) -> list[LayerPrior]:
        """Return the components."""
        return [part for part in self.components if isinstance(part, LayerPrior)]

    @property
    def rank(self) -> int:
        """Return the number of columns of each component's L."""
        return self.parts[0].rank

    @property
    def log_share(self) -> Tensor:
        """Return log pi with shape (K,)."""
        (first,) = self._first
        return (self if first is None else first).logits.log_softmax(0)

    @property
    def mean(self) -> Tensor:
        """Return the mean over components, with shape (d_out, p)."""
        return torch.einsum("k,kup->up", self.log_share.exp(), torch.stack([part.mean for part in self.parts]))

    def keep(self, learned: Tensor) -> None:
        """Learn the chosen weights (d_out, p) only."""
        super().keep(learned)
        for part in self.parts:
            part.keep(learned)

    def start(self, share: float, generator: torch.Generator) -> None:
        """Draw the components' means, with a tenth of the variance at least."""
        for part in self.parts:
            part.start(max(share, 0.1), generator)

    def given(self, before: Sequence[Tensor] = (), component: int = 0) -> Given:
        """Return a component."""
        return self.parts[component].given(before)

    def means(self) -> list[nn.Parameter]:
        """Return the parameters of the components' means."""
        return [part.relative_mean for part in self.parts]

    def scale_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the components' factors, and the logarithms of their shares."""
        own = [self.logits] if self._first[0] is None else []
        return [parameter for part in self.parts for parameter in part.scale_parameters()] + own

    def log_scales(self) -> list[nn.Parameter]:
        """Return those of the components."""
        return [parameter for part in self.parts for parameter in part.log_scales()]

    def covariance(self) -> Tensor:
        """Return the covariance of the mixture: that within the components and that between their means, with shape (d_out, p, p)."""
        share, mean = self.log_share.exp(), self.mean
        each = torch.stack([part.covariance() + _outer(part.mean - mean) for part in self.parts])
        return torch.einsum("k,kupq->upq", share, each)

    def divergence(self) -> Tensor:
        """Return sum_k pi_k KL(p_k || N(0, I / p)), an upper bound of the divergence of the mixture."""
        return (self.log_share.exp() * torch.stack([part.divergence() for part in self.parts])).sum()

    def log_volume(self) -> Tensor:
        """Return the mean over components."""
        return (self.log_share.exp() * torch.stack([part.log_volume() for part in self.parts])).sum()

    def dense(self) -> Tensor:
        """Refuse: a mixture has no one L."""
        raise TypeError("Expected a prior with one factor. Got a mixture: look at .parts, or at .covariance().")


class HeavyTailed(LayerPrior):
    """Hold weights that are Gaussian given one random scale of the layer: Student-t together, W = mean + tau^(1/2) L eps.

    tau ~ InverseGamma(dof / 2, dof / 2 - 1), so E[tau] = 1 and the covariance is L L^T. The scale's posterior is computed for each particle
    from the evidence of the layer's pseudo-observations at 8 values of it, so conditioning costs nine times as much.
    """

    def __init__(
        self, d_in: int, d_out: int, scaled: bool = True, scale: float = 1.0, of: str = "shared", dof: float = 4.0, **options: Any
    ) -> None:
        nn.Module.__init__(self)
        self.d_in, self.d_out, self.p, self.dof = d_in, d_out, d_in + 1, dof
        self.base = PLAIN[of](d_in, d_out, scaled, scale, **options)
        self.by_column = self.base.by_column
        self.register_buffer("learned", None)

    @property
    def rank(self) -> int:
        """Return the number of columns of L."""
        return self.base.rank

    def keep(self, learned: Tensor) -> None:
        """Learn the chosen weights (d_out, p) only."""
        super().keep(learned)
        self.base.keep(learned)

    def start(self, share: float, generator: torch.Generator) -> None:
        """Start as the Gaussian prior does."""
        self.base.start(share, generator)

    def given(self, before: Sequence[Tensor] = (), component: int = 0) -> Given:
        """Return the prior at tau = 1."""
        return self.base.given(before)

    def means(self) -> list[nn.Parameter]:
        """Return the parameters of the mean."""
        return [self.base.relative_mean]

    def scale_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of L."""
        return self.base.scale_parameters()

    def log_scales(self) -> list[nn.Parameter]:
        """Return those of L."""
        return self.base.log_scales()

    def log_volume(self) -> Tensor:
        """Return that of the Gaussian at tau = 1."""
        return self.base.log_volume()

    def divergence(self) -> Tensor:
        """Return the divergence of the Gaussian at tau = 1."""
        return self.base.divergence()


def _outer(v: Tensor) -> Tensor:
    return v.unsqueeze(-1) * v.unsqueeze(-2)


PRIORS: dict[str, type[LayerPrior]] = {
    "diagonal": Diagonal,
    "per_unit": PerUnit,
    "shared": Shared,
    "low_rank": LowRank,
    "per_layer": PerLayer,
    "network": Network,
    "matrix_normal": MatrixNormal,
    "mixture": Mixture,
    "heavy_tailed": HeavyTailed,
}


@dataclass(frozen=True)
class Prior:
    """Say which prior a network has, and what of it is learned.

    Arguments:
        kind: "diagonal", "per_unit", "shared", "low_rank", "per_layer", "network", "matrix_normal", "mixture" or "heavy_tailed".
        scaled: start at covariance I / p (fan-in), otherwise at I.
        learn_mean: whether the means are learned.
        learn_scale: whether the factors L are learned.
        spread: share of the initial variance that lies between the means of the units, drawn at random, instead of around them.
            With 0, the definition of the method, all units of a layer start alike and learning has to tell them apart; a
            value near 1 starts from the same functions in distribution and learns faster.
        input_scale: the first layer's standard deviations start this many times larger, for functions that vary within a
            fraction of the range of the inputs.
        fraction: learn only this fraction of the weights, counted from the input side: whole layers, and a random choice of the weights of
            the layer at the boundary (of its inputs, where units share their factor). The others have mean 0 and the initial
            variance, whatever `spread` and the components of a mixture, and no correlations.
        rank: number r of directions of "low_rank".
        tied: the units of a layer share their factor, for "diagonal" and "low_rank" ("shared" is "per_unit" so tied); the means differ.
            With `shared_noise` this leaves one factorisation per layer, task and sample.
        of: kind of the components of "mixture", and of the Gaussian behind "heavy_tailed".
        components: number K of components of "mixture".
        dof: degrees of freedom of "heavy_tailed", above 2.

    Raises:
        ValueError: an unknown kind, or a number outside its range.

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
    fraction: float = 1.0
    rank: int = 4
    of: str = "shared"
    components: int = 3
    dof: float = 4.0
    tied: bool = False

    def __post_init__(self) -> None:
        for name in ("scaled", "learn_mean", "learn_scale", "tied"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Expected {name} as True or False. Got {getattr(self, name)!r}.")
        for name in ("spread", "input_scale", "fraction", "dof"):
            object.__setattr__(self, name, float(getattr(self, name)))
        for name, fits, range_ in (
            ("spread", 0.0 <= self.spread < 1.0, "in [0, 1)"),
            ("fraction", 0.0 <= self.fraction <= 1.0, "in [0, 1]"),
            ("input_scale", math.isfinite(self.input_scale) and self.input_scale > 0, "to be positive and finite"),
            ("dof", math.isfinite(self.dof) and self.dof > 2, "to be finite and above 2, so that the variance is finite"),
        ):
            if not fits:
                raise ValueError(f"Expected {name} {range_}. Got {getattr(self, name)}.")
        check_count(self.rank, "rank")
        if check_count(self.components, "components") < 2:
            raise ValueError(f"Expected at least 2 components. Got {self.components}. One component is the prior {self.of!r} itself.")
        for name, known in (("kind", PRIORS), ("of", PLAIN)):
            if getattr(self, name) not in known:
                word = "a prior" if name == "kind" else "of="
                raise ValueError(f"Expected {word} among {', '.join(sorted(known))}. Got {getattr(self, name)!r}.")
        if self.tied and self.structure not in ("diagonal", "low_rank"):
            raise ValueError(f"Expected tied=True with 'diagonal' or 'low_rank'. Got {self.structure!r}. A tied 'per_unit' is 'shared'.")

    @property
    def structure(self) -> str:
        """Return the structure of each layer, within a compound where there is one."""
        return self.of if self.kind in ("mixture", "heavy_tailed") else self.kind


def _own_options(spec: Prior) -> dict[str, Any]:
    options: dict[str, Any] = {"rank": spec.rank} if spec.structure == "low_rank" else {}
    return {**options, "tied": True} if spec.tied else options


def layer_priors(widths: Sequence[int], spec: Prior, generator: torch.Generator) -> list[LayerPrior]:
    """Return the priors of all layers of a network with widths d_0, ..., d_L, at their start.

    Arguments:
        widths: from the inputs to the outputs.
        spec: which prior.
        generator: of what is random in the start, and of the choice of weights in the boundary layer.
    """
    layers: list[LayerPrior] = []
    for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
        scale = spec.input_scale if i == 0 and len(widths) > 2 else 1.0
        kind, options = PRIORS[spec.kind], _own_options(spec)
        if kind is Network:
            options["before"] = tuple(layers)
        elif kind is Mixture:
            options |= {"of": spec.of, "components": spec.components, "first": layers[0] if layers else None}
        elif kind is HeavyTailed:
            options |= {"of": spec.of, "dof": spec.dof}
        layers.append(kind(d_in, d_out, spec.scaled, scale, **options))
    for layer in layers:
        layer.start(spec.spread, generator)
    if spec.fraction < 1.0:
        left = round(spec.fraction * sum(layer.d_out * layer.p for layer in layers))
        for layer in layers:
            d, p = layer.d_out, layer.p
            count = min(left, d * p)
            if layer.by_column:
                chosen = torch.zeros(p, dtype=torch.bool)
                chosen[torch.randperm(p, generator=generator)[: round(count / d)]] = True
                learned = chosen.expand(d, p).clone()
            else:
                learned = torch.zeros(d * p, dtype=torch.bool)
                learned[torch.randperm(d * p, generator=generator)[:count]] = True
            layer.keep(learned.reshape(d, p))
            left -= count
    return layers


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

    @property
    def components(self) -> int:
        """Return the number of components of a mixture, 1 for all others."""
        return len(self.layers[0].parts) if isinstance(self.layers[0], Mixture) else 1

    @property
    def log_share(self) -> Tensor:
        """Return the logarithms of the components' shares with shape (K,)."""
        first = self.layers[0]
        return first.log_share if isinstance(first, Mixture) else torch.zeros(1)

    def means(self) -> list[nn.Parameter]:
        """Return the parameters of the means, of layers in which something is learned."""
        return [parameter for layer in self.layers if layer.learnable for parameter in layer.means()]

    def scales(self) -> list[nn.Parameter]:
        """Return the parameters of the factors L, of layers in which something is learned."""
        return [parameter for layer in self.layers if layer.learnable for parameter in layer.scale_parameters()]

    def learn(self, mean: bool = True, scale: bool = True) -> None:
        """Say whether means and scales get gradients from now on; `learn(False, False)` freezes the prior.

        What `Prior(fraction=...)` does not learn stays as it is, whatever is said here.
        """
        for layer in self.layers:
            for parameter in layer.parameters():
                parameter.requires_grad_(False)
        for parameter in self.means():
            parameter.requires_grad_(mean)
        for parameter in self.scales():
            parameter.requires_grad_(scale)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return n draws of the weights of all layers, each with shape (n, d_l, p_l), in the network's units."""
        share, draws = self.log_share.exp(), []
        chosen = (
            torch.multinomial(share.cpu(), n, replacement=True, generator=generator) if len(share) > 1 else torch.zeros(n, dtype=torch.long)
        )
        eps: list[Tensor] = []
        for layer in self.layers:
            like, rows = next(layer.parameters()), 1 if layer.joint else layer.d_out
            z = torch.randn(n, 1, rows, layer.rank, generator=generator).to(like)
            given = [layer.given(eps, k) for k in range(len(share))]
            if isinstance(layer, HeavyTailed):
                root = (0.5 * log_scale(torch.randn(n, 1, generator=generator).to(like), layer.dof)).exp()
                given = [dataclasses.replace(given[0], scale=root)]
            each = torch.stack([one.weights(z).squeeze(1) for one in given])  # (K, n, d, p)
            draws.append(each[chosen.to(like.device), torch.arange(n, device=like.device)])
            eps.append(z)
        return tuple(draws)

    summary: ClassVar[Callable[[NetworkPrior], Any]]
    """Return a table of what the prior says; set by `bnnp.reading`, since the core knows no reports."""

    def divergence(self) -> Tensor:
        """Return KL(p || N(0, I / p)) of all weights (of a mixture, an upper bound), a scalar."""
        return torch.stack([layer.divergence() for layer in self.layers]).sum()
