"""The Bayesian Neural Network Process: a network whose call on a context returns a posterior.

q(W | context) = prod_l q(W^l | W^{<l}, context): layer by layer, features come from the weights sampled so far and the layer is
conditioned on its pseudo-observations. The first layer's posterior does not depend on any sample and is computed once.

References:
    Amortising inference and meta-learning priors in neural networks (Rochussen and Fortuin, 2026), arXiv 2602.08782.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnnp.conjugate import CANONICAL_RANK, Conditional, Normal, Sites, computed, condition
from bnnp.layers import ACTIVATIONS, AmortisedLinear
from bnnp.likelihoods import LIKELIHOODS, Gaussian, Likelihood
from bnnp.linalg import compute_device
from bnnp.posterior import Architecture, Particles, Posterior, check_count, noise_of, seeded
from bnnp.priors import NetworkPrior, Prior
from bnnp.scaling import Reference, Standardiser
from bnnp.tasks import Context, Task, check_inputs, make_context

__all__ = ["BNNP"]

DTYPES = {"float64": torch.float64, "float32": torch.float32}


class BNNP(nn.Module):
    """Learn a prior over the weights of a network, and give the posterior of a new data set in one forward pass.

    W ~ p(W), learned from many tasks; y_n ~ p(y | f_W(x_n)); q(W | context) by conditioning each layer on pseudo-observations.

    Arguments:
        x_dim: number of input columns d_x.
        y_dim: number of output columns d_y.
        hidden: widths of the hidden layers; () is a linear model.
        prior: "diagonal", "per_unit", "shared", or a `Prior` that also says what is learned.
        likelihood: `Gaussian()` or `Bernoulli()`.
        activation: "relu", "tanh", "silu", "gelu" or "sine".
        residual: add a layer's input to its output where the widths agree.
        last_layer: "exact": with a Gaussian likelihood the last layer is Bayesian linear regression with the likelihood's own
            noise; "amortised": its noise is inferred for each point, as in the paper. Other likelihoods take no notice.
        shared_noise: one pseudo-noise for each point, shared by the units of a layer. With the "shared" prior this leaves one
            factorisation per layer, task and sample.
        net_hidden: hidden widths of the inference networks; those of the network where not given.
        factor_dtype: precision of the factorisations, "float64" or "float32".
        seed: of the initial inference networks.

    Raises:
        ValueError: a width, or a name that is not known.

    Example:
        >>> model = BNNP(x_dim=1, y_dim=1, hidden=(8,))
        >>> model.condition([[0.0]], [[1.0]], num_samples=4).predict([[0.0], [1.0]]).mean.shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden: Sequence[int] = (64, 64),
        prior: str | Prior = "per_unit",
        likelihood: Likelihood | None = None,
        activation: str = "relu",
        residual: bool = False,
        last_layer: str = "exact",
        shared_noise: bool = False,
        net_hidden: Sequence[int] | None = None,
        factor_dtype: str = "float64",
        seed: int = 0,
    ) -> None:
        super().__init__()
        widths = (check_count(x_dim, "x_dim"), *_widths(hidden, "hidden"), check_count(y_dim, "y_dim"))
        net_hidden = _widths(net_hidden, "net_hidden") if net_hidden is not None else (widths[1:-1] or (64, 64))
        residual, shared_noise = _flag(residual, "residual"), _flag(shared_noise, "shared_noise")
        _choose(activation, ACTIVATIONS, "activation")
        _choose(last_layer, ("exact", "amortised"), "last_layer")
        _choose(factor_dtype, DTYPES, "factor_dtype")
        likelihood = Gaussian() if likelihood is None else likelihood
        if not isinstance(likelihood, Likelihood):
            raise TypeError(f"Expected likelihood as bnnp.Gaussian(...) or bnnp.Bernoulli(). Got {type(likelihood).__name__}.")
        spec = Prior(prior) if isinstance(prior, str) else prior
        if not isinstance(spec, Prior):
            raise TypeError(f"Expected prior as a name or a bnnp.Prior(...). Got {type(prior).__name__}.")
        self._config: dict[str, Any] = {
            "x_dim": widths[0],
            "y_dim": widths[-1],
            "hidden": list(widths[1:-1]),
            "prior": dataclasses.asdict(spec),
            "likelihood": {"kind": type(likelihood).__name__.lower(), **likelihood.config()},
            "activation": activation,
            "residual": residual,
            "last_layer": last_layer,
            "shared_noise": shared_noise,
            "net_hidden": list(net_hidden),
            "factor_dtype": factor_dtype,
        }
        self.x_dim, self.y_dim = x_dim, y_dim
        self.architecture = Architecture(activation, residual)
        self.factor_dtype = DTYPES[factor_dtype]
        self.likelihood = likelihood.bind(y_dim)
        self.scaling = Standardiser(x_dim, y_dim, scale_y=not likelihood.discrete)
        self.reference = Reference(x_dim)
        self.last_layer = last_layer
        layers = []
        for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
            true_targets = i == len(widths) - 2 and likelihood.conjugate
            net = None if true_targets and last_layer == "exact" else (x_dim + y_dim, *net_hidden)
            scale = spec.input_scale if i == 0 and hidden else 1.0
            layers.append(AmortisedLinear(d_in, d_out, spec, net, activation, shared_noise, true_targets, scale))
        self.layers = nn.ModuleList(layers)
        self._reset(seed, spec.spread)
        self.prior.learn(mean=spec.learn_mean, scale=spec.learn_scale)

    def _reset(self, seed: int, spread: float) -> None:
        """Draw the inference networks' weights, U(-1/sqrt(d_in), 1/sqrt(d_in)), and what is random in the prior's start."""
        generator = seeded(seed, "start")
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                for parameter in (module.weight, module.bias):
                    drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.data.copy_(bound * (2 * drawn - 1))
        for layer in self.prior:
            if spread > 0:
                layer.spread(spread, generator)

    save: ClassVar[Callable[[BNNP, str | os.PathLike[str]], None]]
    """Save the model in a folder; set by `bnnp.checkpoint`, since the core knows no files."""

    @property
    def config(self) -> dict[str, Any]:
        """Return what the model is built from, as plain numbers and strings."""
        config = copy.deepcopy(self._config)
        config["prior"]["learn_mean"] = any(p.requires_grad for p in self.prior.means())
        config["prior"]["learn_scale"] = any(p.requires_grad for p in self.prior.scales())
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BNNP:
        """Build a model from `config`."""
        config = copy.deepcopy(config)
        likelihood = config.pop("likelihood")
        kind = likelihood.pop("kind")
        return cls(prior=Prior(**config.pop("prior")), likelihood=LIKELIHOODS[kind](**likelihood), **config)

    @property
    def prior(self) -> NetworkPrior:
        """Return the priors of all layers."""
        return NetworkPrior([layer.prior for layer in self._layers])

    @property
    def _layers(self) -> list[AmortisedLinear]:
        return [layer for layer in self.layers if isinstance(layer, AmortisedLinear)]

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of the features."""
        return self.scaling.x_scale.dtype

    @property
    def device(self) -> torch.device:
        """Return where the model is."""
        return self.scaling.x_scale.device

    @property
    def noise_std(self) -> Tensor | None:
        """Return the noise of a Gaussian likelihood in the units of y, with shape (d_y,); None for other likelihoods."""
        noise = noise_of(self.likelihood)
        return None if noise is None else (noise * self.scaling.y_scale).detach()

    def fit_scaling(self, tasks: Sequence[Task]) -> None:
        """Fit the normaliser on the meta-training tasks; a fixed noise keeps its size in the units of y."""
        self.scaling.fit(tasks)
        self.reference.fit(tasks, self.scaling.x)
        self.likelihood.rescale(self.scaling.y_scale)

    def scale(self, context: Context) -> Context:
        """Return a context in the network's units, padding at zero."""
        keep, zero = context.mask.unsqueeze(-1), context.x.new_zeros(())
        x, y = self.scaling.x(context.x), self.scaling.y(context.y)
        return Context(torch.where(keep, x, zero), torch.where(keep, y, zero), context.mask)

    def _sites(self, layer: AmortisedLinear, context: Context) -> tuple[Tensor, Tensor]:
        if layer.net is not None:
            return layer.pseudo_observations(context.x, context.y, context.mask)
        noise = noise_of(self.likelihood)
        assert noise is not None
        return context.y, context.mask.unsqueeze(-1) / noise

    def particles(self, context: Context, num_samples: int, normal: Normal, canonical: bool = False) -> Particles:
        """Draw S particles from q(W | context), in the network's units; differentiable.

        Arguments:
            context: T tasks in the network's units.
            num_samples: S.
            normal: source of standard normal numbers in the precision of the factorisations.
            canonical: draw hidden weights as `conjugate.draw_canonical` does; otherwise with the fast `draw_fused`.
        """
        H = context.x.unsqueeze(0)
        kl = torch.zeros(num_samples, context.num_tasks, dtype=self.factor_dtype, device=compute_device(H.device))
        weights: list[Tensor] = []
        *hidden, output = self._layers
        for i, layer in enumerate(hidden if self.likelihood.conjugate else self._layers):
            A = self.architecture.layer_input(H, i)
            pseudo_y, root = self._sites(layer, context)
            W, kl_l = layer.draw(A, pseudo_y, root, num_samples, normal, canonical, self.factor_dtype)
            kl = kl + kl_l
            weights.append(W)
            skip = self.architecture.skip(H, layer.d_out)
            H = A @ W.mT
            H = H if skip is None else H + skip
        noise = noise_of(self.likelihood)
        if not self.likelihood.conjugate:
            return Particles(self.architecture, tuple(weights), kl, output, None, noise, self.factor_dtype)
        H = H.expand(num_samples, *H.shape[1:])
        at_context = (self.architecture.layer_input(H, len(hidden)), self.architecture.skip(H, output.d_out))
        last = self._condition_last(at_context, context, canonical)
        exact = output.net is None
        return Particles(self.architecture, tuple(weights), kl, output, last, noise, self.factor_dtype, at_context, exact)

    def _condition_last(self, features: tuple[Tensor, Tensor | None], context: Context, canonical: bool) -> Conditional:
        output, (A, skip) = self._layers[-1], features
        pseudo_y, root = self._sites(output, context)
        sites = output.sites(A, pseudo_y if skip is None else pseudo_y - skip, root)
        factor, A, sites = computed(output.prior.factor(), A, sites, self.factor_dtype)
        return condition(factor, A, sites, "weight" if canonical and factor.rank <= CANONICAL_RANK else None)

    def paired_particles(self, context: Context, target: Context, num_samples: int, normal: Normal) -> tuple[Particles, Tensor]:
        """Draw S particles from q(W | context + target), with KL(q(. | context + target) || q(. | context)) along the same chain.

        Arguments:
            context: T tasks in the network's units.
            target: further points of the same tasks.
            num_samples: S.
            normal: source of standard normal numbers.

        Returns:
            The particles, whose last layer has seen context and target, and the KL divergence with shape (S, T).
        """
        both, n = context.join(target), context.x.shape[1]
        H = both.x.unsqueeze(0).expand(num_samples, *both.x.shape)
        kl = torch.zeros(num_samples, both.num_tasks, dtype=self.factor_dtype, device=compute_device(H.device))
        weights: list[Tensor] = []
        last = None
        for i, layer in enumerate(self._layers):
            A, skip = self.architecture.layer_input(H, i), self.architecture.skip(H, layer.d_out)
            pseudo_y, root = self._sites(layer, both)
            final = i == len(self._layers) - 1 and self.likelihood.conjugate
            sites = layer.sites(A, pseudo_y - skip if final and skip is not None else pseudo_y, root)
            factor, A_c, sites = computed(layer.prior.factor(), A, sites, self.factor_dtype)
            old = condition(factor, A_c[..., :n, :], Sites(sites.resid[..., :n, :], sites.root_prec[..., :n, :]), "weight")
            new_sites = Sites(sites.resid[..., n:, :], sites.root_prec[..., n:, :])
            q = old.update(A_c[..., n:, :], new_sites)
            kl = kl + q.expected_log_lik(A_c[..., n:, :], new_sites) - (q.log_z - old.log_z)
            if final:
                last = q
                break
            W = layer.weights(q.draw(normal(tuple(q.mean.shape))), layer.prior.factor())
            weights.append(W)
            H = A @ W.mT
            H = H if skip is None else H + skip
        noise = noise_of(self.likelihood)
        hidden_kl = torch.full_like(kl, math.nan)  # the divergence from the prior is not computed here
        return Particles(self.architecture, tuple(weights), hidden_kl, self._layers[-1], last, noise, self.factor_dtype), kl

    def forward(self, context: Context, num_samples: int = 64, seed: int = 0, single: bool = False) -> Posterior:
        """Return the posterior given a checked context in the user's units; differentiable, see `condition` for data.

        All tasks get the same noise, so a task's posterior does not depend on what else is in the batch.
        """
        if not isinstance(context, Context):
            raise TypeError(
                f"Expected a bnnp.Context, such as bnnp.collate gives. Got {type(context).__name__}. For data: model.condition(x, y)."
            )
        generator, device = seeded(seed, "particles"), compute_device(self.device)

        def normal(shape: tuple[int, ...]) -> Tensor:
            z = torch.randn((shape[0], 1, *shape[2:]), generator=generator, dtype=self.factor_dtype)
            return z.to(device).expand(shape)

        particles = self.particles(self.scale(context), check_count(num_samples, "num_samples"), normal, canonical=True)
        return Posterior(particles, context, self.scaling, self.likelihood, single)

    @torch.no_grad()
    def condition(self, xc: Any, yc: Any, mask: Any = None, num_samples: int = 64, seed: int = 0) -> Posterior:
        """Return the posterior over the weights given a context, in one forward pass.

        The same seed gives the same draw whatever the order and the padding of the points and the other tasks of the batch (in layers
        of more than 512 inputs with fewer points: the same distribution).

        Arguments:
            xc: inputs with shape (n, d_x) of one task, or (T, N, d_x) of many, in the user's units; n may be 0. Or a list of T
                arrays with shape (n_t, d_x).
            yc: outputs likewise, (n, d_y) or (T, N, d_y), or a list.
            mask: True = observed, with shape (n,) or (T, N); for tasks of different sizes.
            num_samples: number of particles S.
            seed: of the particles.

        Returns:
            A `Posterior` that no longer depends on the model.

        Raises:
            ValueError: shapes that do not fit, observed entries that are not finite, or outputs the likelihood cannot have made.

        Example:
            >>> posterior = BNNP(1, 1, hidden=(8,)).condition(torch.zeros(0, 1), torch.zeros(0, 1), num_samples=4)
            >>> posterior.elbo
            tensor(0.)
        """
        context, single = make_context(xc, yc, mask, x_dim=self.x_dim, y_dim=self.y_dim, dtype=self.dtype, device=self.device)
        self.likelihood.check(context.y)
        return self.forward(context, num_samples, seed, single).frozen()

    def prior_samples(self, xt: Any, n: int, seed: int = 0, noisy: bool = False) -> Tensor:
        """Return n functions drawn from the prior at xt (M, d_x), with shape (n, M, d_y), in the user's units.

        Arguments:
            xt: inputs.
            n: number of functions.
            seed: of the draws.
            noisy: add the likelihood's noise.
        """
        x = check_inputs(xt, self.x_dim, "xt", self.dtype, self.device)
        if x.ndim != 2:
            raise ValueError(f"Expected xt with shape (points, {self.x_dim}). Got shape {tuple(x.shape)}.")
        empty = torch.zeros(0, self.x_dim), torch.zeros(0, self.y_dim)
        return self.condition(*empty, num_samples=n, seed=seed).predict(x).sample(n, noisy=noisy, seed=seed)


def _widths(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"Expected {name} as a sequence of widths such as (64, 64). Got {value!r}.")
    return tuple(check_count(width, f"{name} width") for width in value)


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"Expected {name} as True or False. Got {value!r}.")
    return value


def _choose(value: str, known: Any, name: str) -> None:
    if value not in known:
        raise ValueError(f"Expected {name} among {', '.join(sorted(known))}. Got {value!r}.")
