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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnnp.conjugate import Conditional, PointSum, SiteSum, condition, point_sum, site_sum
from bnnp.draws import CANONICAL_RANK, Normal, draw_from_sums
from bnnp.factors import Given, Sites
from bnnp.layers import ACTIVATIONS, AmortisedLinear, LayerDraw, ScaleDraw, mlp
from bnnp.likelihoods import LIKELIHOODS, Gaussian, Likelihood, noise_factor, noise_of
from bnnp.linalg import compute_device, to_compute
from bnnp.particles import Architecture, Particles, drawn_log_lik, joined, own_noise
from bnnp.posterior import Posterior
from bnnp.priors import NetworkPrior, Prior, layer_priors
from bnnp.progress import ProgressLine
from bnnp.scaling import REFERENCE_SIZE, Reference, Standardiser
from bnnp.seeds import check_count, seeded
from bnnp.streaming import Batches, Reservoir, Slices, Stream, is_stream
from bnnp.tasks import Context, Task, check_inputs, make_context

__all__ = ["BNNP"]

CONTEXT_BYTES = 2**29
"""How much the widest layer's features of a context may take before it is conditioned on in parts; the posterior is the same."""

DTYPES = {"float64": torch.float64, "float32": torch.float32}


class BNNP(nn.Module):
    """Learn a prior over the weights of a network, and give the posterior of a new data set in one forward pass.

    W ~ p(W), learned from many tasks; y_n ~ p(y | f_W(x_n)); q(W | context) by conditioning each layer on pseudo-observations.

    Arguments:
        x_dim: number of input columns d_x.
        y_dim: number of output columns d_y.
        hidden: widths of the hidden layers; () is a linear model.
        prior: name of a prior, such as "per_unit" or "shared", or a `Prior` that also says what is learned.
        likelihood: `Gaussian()` or `Bernoulli()`.
        activation: "relu", "tanh", "silu", "gelu" or "sine".
        residual: add a layer's input to its output where the widths agree.
        last_layer: "exact": with a Gaussian likelihood the last layer is Bayesian linear regression with the likelihood's own
            noise; "amortised": its noise is inferred for each point, as in the paper. Other likelihoods take no notice.
        shared_noise: one pseudo-noise for each point, shared by the units of a layer. With the "shared" prior this leaves one
            factorisation per layer, task and sample.
        net_hidden: hidden widths of the inference networks; those of the network where not given.
        feed_activations: inference networks also see what their layer sees of each point, not only the point itself.
        trunk: one inference network for all layers, with a linear head for each, instead of one for each layer.
        temperature: learn for each hidden layer how much less a point counts in large contexts: precisions times (1 + N)^(-kappa). A guard
            against over-confidence with more points than in training.
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
        feed_activations: bool = False,
        trunk: bool = False,
        temperature: bool = False,
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
            "feed_activations": _flag(feed_activations, "feed_activations"),
            "trunk": _flag(trunk, "trunk"),
            "temperature": _flag(temperature, "temperature"),
            "factor_dtype": factor_dtype,
        }
        self.x_dim, self.y_dim = x_dim, y_dim
        self.architecture = Architecture(activation, residual)
        self.factor_dtype = DTYPES[factor_dtype]
        self.likelihood = likelihood.bind(y_dim)
        self.scaling = Standardiser(x_dim, y_dim, scale_y=not likelihood.discrete)
        self.reference = Reference(x_dim)
        self.last_layer = last_layer
        inputs = x_dim + y_dim
        self.trunk = mlp((inputs, *net_hidden), activation) if trunk else None
        priors = layer_priors(widths, spec, seeded(seed, "prior"))
        layers = []
        for i, prior_of in enumerate(priors):
            true_targets = i == len(priors) - 1 and likelihood.conjugate
            width = (net_hidden[-1] if trunk else inputs) + (prior_of.d_in if feed_activations and i > 0 else 0)
            net = None if true_targets and last_layer == "exact" else (width,) if trunk else (width, *net_hidden)
            tempered = temperature and i < len(priors) - 1
            layers.append(AmortisedLinear(prior_of, net, activation, shared_noise, true_targets, tempered))
        self.layers = nn.ModuleList(layers)
        self._reset(seed)
        self.prior.learn(mean=spec.learn_mean, scale=spec.learn_scale)

    def _reset(self, seed: int) -> None:
        """Draw the inference networks' weights, U(-1/sqrt(d_in), 1/sqrt(d_in))."""
        generator = seeded(seed, "start")
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                for parameter in (module.weight, module.bias):
                    drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.data.copy_(bound * (2 * drawn - 1))

    save: ClassVar[Callable[[BNNP, str | os.PathLike[str]], None]]
    """Save the model in a folder; set by `bnnp.checkpoint`, since the core knows no files."""

    @property
    def config(self) -> dict[str, Any]:
        """Return what the model is built from, as plain numbers and strings."""
        config = copy.deepcopy(self._config)
        for key, parameters in (("learn_mean", self.prior.means()), ("learn_scale", self.prior.scales())):
            if parameters:
                config["prior"][key] = any(p.requires_grad for p in parameters)
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

    def _seen_by_nets(self, context: Context) -> Tensor:
        """Return what the inference networks see of each point, with shape (T, N, q)."""
        inputs = torch.cat([context.x, context.y], dim=-1)
        if self.trunk is None:
            return inputs
        return ACTIVATIONS[self.architecture.activation](self.trunk(inputs))

    def output_sites(self, context: Context, A: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the last layer's pseudo-observations, the square roots of their precisions, and what correlated noise is rotated with.

        Arguments:
            context: in the network's units.
            A: the last layer's features there, with shape (S, T, N, p).
        """
        return self._pseudo(len(self._layers) - 1, context, A)

    def _pseudo(self, index: int, context: Context, A: Tensor, own: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a layer's pseudo-observations, the roots of their precisions, and what correlated noise is made independent with."""
        layer = self._layers[index]
        if own or layer.net is None:
            return context.y, *own_noise(self.likelihood, context.mask)
        inputs = self._seen_by_nets(context)
        if self._config["feed_activations"] and index > 0:
            inputs = torch.cat([inputs.expand(*A.shape[:-1], -1), A[..., :-1]], dim=-1)
        return *layer.pseudo_observations(inputs, context.y, context.mask.unsqueeze(-1)), None

    def _problem(self, index: int, H: Tensor, context: Context, given: Given, own: bool = False) -> tuple[Tensor, Sites]:
        """Return a layer's features and pseudo-observations, in the precision of the factorisations, given activations H before it.

        With `own`, those of the last layer are the data themselves with the likelihood's own noise. The temperature is not in them.
        """
        layer = self._layers[index]
        A = self.architecture.layer_input(H, index)
        pseudo_y, root, rotate = self._pseudo(index, context, A, own)
        # Where the data are the pseudo-observations, a residual connection is taken off them.
        skip = self.architecture.skip(H, layer.d_out) if layer.true_targets else None
        sites = given.sites(A, pseudo_y if skip is None else pseudo_y - skip, root).to(self.factor_dtype)
        rotate = None if rotate is None else to_compute(rotate, self.factor_dtype)
        return given.problem(to_compute(A, self.factor_dtype), sites, rotate)

    def _given(self, index: int, drawn: _Drawn) -> Given:
        """Return a layer's prior given what was drawn before it."""
        layer = self._layers[index]
        given = layer.prior.given(drawn.eps, drawn.component)
        # Observations of y itself see all outputs of a unit's mixing, and correlated noise couples them: then they share one eps.
        coupled = layer.true_targets and layer.d_out > 1 and (given.mix is not None or noise_factor(self.likelihood) is not None)
        return given.together() if coupled or (layer.true_targets and given.mix is not None) else given

    def _tempered(self, index: int, sites: Sites, counts: Tensor) -> Sites:
        log_share = self._layers[index].log_temperature(counts)
        if log_share is None:
            return sites
        return Sites(sites.resid, sites.root_prec * (0.5 * log_share).exp().to(sites.root_prec)[:, None, None])

    def particles(self, context: Context, num_samples: int, normal: Normal, canonical: bool = False) -> Particles:
        """Draw S particles from q(W | context), in the network's units; differentiable.

        Arguments:
            context: T tasks in the network's units.
            num_samples: S.
            normal: source of standard normal numbers in the precision of the factorisations.
            canonical: draw hidden weights as `draws.draw_canonical` does; otherwise with the fast `draws.draw_fused`.
        """
        if self.prior.components == 1:
            return self._chain(context, _Drawn(num_samples), normal, canonical)
        parts = [self._chain(context, drawn, normal, canonical) for drawn in self._of_components(num_samples)]
        if not self.likelihood.conjugate:
            parts = [dataclasses.replace(p, log_lik=self._log_lik(context, p.weights)) for p in parts]
        return joined(parts, self.prior.log_share)

    def _of_components(self, num_samples: int) -> list[_Drawn]:
        """Share the samples out among the components of a mixture."""
        K = self.prior.components
        if num_samples < K:
            raise ValueError(f"Expected num_samples of at least {K}, one for each component of the prior. Got {num_samples}.")
        return [_Drawn(num_samples // K + (k < num_samples % K), k) for k in range(K)]

    def _log_lik(self, points: Context, weights: tuple[Tensor, ...]) -> Tensor:
        return drawn_log_lik(self.architecture, self.likelihood, weights, points, self.factor_dtype)

    def _chain(self, context: Context, drawn: _Drawn, normal: Normal, canonical: bool) -> Particles:
        """Draw the particles of one component, layer by layer."""
        H, hidden = context.x.unsqueeze(0), len(self._layers) - 1
        for i in range(hidden):
            given = self._given(i, drawn)
            A, sites = self._problem(i, H, context, given)
            sites = self._tempered(i, sites, context.counts)
            H = self._next(i, H, drawn.take(self._layers[i].draw(given, A, sites, drawn.num_samples, normal, canonical, self.factor_dtype)))
        given = self._given(hidden, drawn)
        if not self.likelihood.conjugate:
            return self._drawn_last(drawn, given, *self._problem(hidden, H, context, given), normal, canonical)
        H = H.expand(drawn.num_samples, *H.shape[1:])
        A, sites = self._problem(hidden, H, context, given)
        core, output = given.computed(self.factor_dtype).core, self._layers[-1]
        scale = output.draw_scale(lambda root: condition(core, A * root, sites).log_z, drawn.num_samples, normal)
        given, A = drawn.scaled(given, A, scale)
        last = condition(core, A, sites, "weight" if canonical and core.rank <= CANONICAL_RANK else None)
        if output.net is None:
            return self._with_last(drawn, given, last, None)
        own = self._problem(hidden, H, context, given, own=True)
        return self._with_last(drawn, given, last, site_sum(core, *own) if canonical else own)

    def streamed_particles(self, stream: Stream, num_samples: int, normal: Normal, canonical: bool = False) -> Particles:
        """Draw the particles that `particles` draws, from batches of points: memory independent of their number.

        It reads the data once for each layer (and once more where the last layer is drawn). Arguments as for `particles`.
        """
        if self.prior.components == 1:
            return self._streamed_chain(stream, _Drawn(num_samples), normal, canonical)
        parts = [self._streamed_chain(stream, drawn, normal, canonical) for drawn in self._of_components(num_samples)]
        return joined(parts, self.prior.log_share)

    def _streamed_chain(self, stream: Stream, drawn: _Drawn, normal: Normal, canonical: bool) -> Particles:
        hidden = len(self._layers) - 1
        for i in range(hidden):
            layer, given = self._layers[i], self._given(i, drawn)
            if self._sums_serve(stream, i, canonical):
                drawn.take(self._draw_of_sums(stream, i, drawn, given, normal))
            else:
                A, sites = self._gathered(stream, i, drawn, given)
                drawn.take(layer.draw(given, A, sites, drawn.num_samples, normal, canonical, self.factor_dtype))
        given = self._given(hidden, drawn)
        if not self.likelihood.conjugate:
            return self._streamed_drawn_last(stream, drawn, given, normal, canonical)
        core, output = given.computed(self.factor_dtype).core, self._layers[-1]
        found = self._streamed_sums(stream, hidden, drawn, given, both=output.net is not None)
        seen = [drawn.expand(one).whiten(core) for one in found]
        scale = output.draw_scale(lambda root: seen[0].scaled(root).condition(core).log_z, drawn.num_samples, normal)
        if scale is not None:
            given = scale.of(given)
            seen = [drawn.expand(one).scaled(scale.root).whiten(core) for one in found]
            drawn.take_scale(scale)
        if canonical and not self._sums_serve(stream, hidden, canonical):
            A, sites = self._gathered(stream, hidden, drawn, given)
            last = condition(core, *drawn.spread(A, sites))
        else:
            last = seen[0].condition(core)
        return self._with_last(drawn, given, last, None if output.net is None else seen[1])

    def _draw_of_sums(self, stream: Stream, index: int, drawn: _Drawn, given: Given, normal: Normal) -> LayerDraw:
        layer, core = self._layers[index], given.computed(self.factor_dtype).core
        sums = self._streamed_sums(stream, index, drawn, given)[0]
        scale = layer.draw_scale(lambda root: sums.whiten(core).scaled(root).condition(core).log_z, drawn.num_samples, normal)
        if scale is not None:
            given, sums = scale.of(given), drawn.expand(sums).scaled(scale.root)
        return LayerDraw.of(given, *draw_from_sums(core, sums, drawn.num_samples, normal), scale)

    def _sums_serve(self, stream: Stream, index: int, canonical: bool) -> bool:
        """Tell whether the draws of a layer are functions of sums over points; otherwise there are few points, and they are gathered."""
        layer = self._layers[index]
        return layer.in_weight_space(0, index == 0, canonical) or layer.in_weight_space(stream.shape[1], index == 0, canonical)

    def _next(self, index: int, H: Tensor, W: Tensor) -> Tensor:
        """Return the activations behind a layer."""
        skip = self.architecture.skip(H, self._layers[index].d_out)
        H = self.architecture.layer_input(H, index) @ W.mT
        return H if skip is None else H + skip

    def _with_last(self, drawn: _Drawn, given: Given, last: Conditional, seen: SiteSum | tuple[Tensor, Sites] | None) -> Particles:
        kl = drawn.kl.to(last.quad).expand(last.quad.shape)
        ratio = drawn.ratio if drawn.ratio is not None or drawn.weights else torch.zeros_like(kl)
        weights = tuple(drawn.weights)
        return Particles(self.architecture, weights, kl, given, self.likelihood, last, self.factor_dtype, ratio, seen)

    def _drawn_last(self, drawn: _Drawn, given: Given, A: Tensor, sites: Sites, normal: Normal, canonical: bool) -> Particles:
        """Draw the last layer too, where the likelihood has no closed form."""
        output, redraw, core = self._layers[-1], None, given.computed(self.factor_dtype).core
        if canonical:
            A, sites = drawn.spread(A, sites)
            scale = output.draw_scale(lambda root: condition(core, A * root, sites).log_z, drawn.num_samples, normal)
            given, A = drawn.scaled(given, A, scale)
            last = condition(core, A, sites, "weight" if core.rank <= CANONICAL_RANK else None)
            redraw = self._redrawn(drawn, given, last, normal)
        else:
            found = output.draw(given, A, sites, drawn.num_samples, normal, canonical, self.factor_dtype)
            drawn.take(found)
        return self._all_drawn(drawn, given, redraw)

    def _all_drawn(self, drawn: _Drawn, given: Given, redraw: tuple[Conditional, Tensor] | None) -> Particles:
        weights, dtype = tuple(drawn.weights), self.factor_dtype
        return Particles(self.architecture, weights, drawn.kl, given, self.likelihood, None, dtype, drawn.ratio, None, redraw)

    def _redrawn(self, drawn: _Drawn, given: Given, last: Conditional, normal: Normal) -> tuple[Conditional, Tensor]:
        z = normal((drawn.num_samples, *last.mean.shape[1:]))
        eps = last.draw(z)
        drawn.take(LayerDraw(given.weights(eps), eps, last.kl, last.log_ratio(eps)))
        return last, z

    def _streamed_drawn_last(self, stream: Stream, drawn: _Drawn, given: Given, normal: Normal, canonical: bool) -> Particles:
        index, output = len(self._layers) - 1, self._layers[-1]
        if not self._sums_serve(stream, index, canonical):
            particles = self._drawn_last(drawn, given, *self._gathered(stream, index, drawn, given), normal, canonical)
        else:
            core, sums = given.computed(self.factor_dtype).core, drawn.expand(self._streamed_sums(stream, index, drawn, given)[0])
            scale = output.draw_scale(lambda root: sums.whiten(core).scaled(root).condition(core).log_z, drawn.num_samples, normal)
            if scale is not None:
                given, sums = scale.of(given), sums.scaled(scale.root)
                drawn.take_scale(scale)
            redraw = self._redrawn(drawn, given, sums.whiten(core).condition(core), normal)
            particles = self._all_drawn(drawn, given, redraw)

        def log_lik(points: Context, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (self._log_lik(points, weights),)

        return dataclasses.replace(particles, log_lik=stream.sum(log_lik, particles.weights, learned(self.likelihood))[0])

    def _part(
        self, index: int, drawn: _Drawn, given: Given, of: Callable[[Tensor, Sites], tuple[Tensor, ...]], both: bool = False
    ) -> tuple[Callable[[Context, tuple[Tensor, ...]], tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """Return what a pass over a stream computes of a layer's problem in each batch, and the tensors that it depends on.

        With `both`, for the last layer, it is computed a second time: of the data with the likelihood's own noise.
        """
        before = len(drawn.weights)

        def part(points: Context, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            H = self.architecture.hidden(points.x.unsqueeze(0), tensors[:before])
            prior = given.rebuild(*tensors[before:])
            return tuple(t for own in ((False, True) if both else (False,)) for t in of(*self._problem(index, H, points, prior, own)))

        return part, (*drawn.weights, *given.tensors)

    def _streamed_sums(self, stream: Stream, index: int, drawn: _Drawn, given: Given, both: bool = False) -> list[PointSum]:
        """Return a layer's sums over the points of a stream, given the weights before it; see `_part`."""
        part, tensors = self._part(index, drawn, given, lambda A, sites: point_sum(A, sites).tensors, both)
        found = stream.sum(part, tensors, learned(self._layers[index], *([] if self.trunk is None else [self.trunk]), self.likelihood))
        sums = [PointSum(*found[i : i + 5]) for i in range(0, len(found), 5)]
        log_share = self._layers[index].log_temperature(stream.counts)
        return sums if log_share is None else [one.tempered(log_share.to(one.rr)) for one in sums]

    def _gathered(self, stream: Stream, index: int, drawn: _Drawn, given: Given) -> tuple[Tensor, Sites]:
        """Return the problem of a layer with all points, where there are fewer than weights."""
        part, tensors = self._part(index, drawn, given, lambda A, sites: (A, sites.resid, sites.root_prec))
        A, resid, root = stream.gather(part, tensors)
        return A, self._tempered(index, Sites(resid, root), stream.counts)

    def paired_particles(self, context: Stream, target: Stream, num_samples: int, normal: Normal) -> tuple[Particles, Tensor]:
        """Draw S particles from q(W | context + target), with KL(q(. | context + target) || q(. | context)) along the same chain.

        Arguments:
            context: T tasks in the network's units, in one batch or several.
            target: further points of the same tasks.
            num_samples: S.
            normal: source of standard normal numbers.

        Returns:
            The particles, whose last layer has seen context and target, and the KL divergence with shape (S, T).

        Raises:
            ValueError: a prior with a discrete component, or precisions that depend on the number of points.
        """
        if self.prior.components > 1 or self._config["temperature"]:
            raise ValueError(
                "Expected a prior without components, and no temperature, with npvi: it follows one chain of layers and adds points to it. "
                "Got a model with one. Use objective='pp_avi'."
            )
        drawn, last, kl = _Drawn(num_samples), None, None
        for i, layer in enumerate(self._layers):
            given = self._given(i, drawn)
            core = given.computed(self.factor_dtype).core
            both = [drawn.expand(self._streamed_sums(s, i, drawn, given)[0]).whiten(core) for s in (context, target)]
            scale, before_scale = layer.draw_scales(core, both, num_samples, normal)
            if scale is not None:
                given, both = scale.of(given), [one.scaled(scale.root[..., None, None, None]) for one in both]
                kl = before_scale if kl is None else kl + before_scale
            old, new = both
            before, q = old.condition(core), (old + new).condition(core)
            part = q.expected_log_lik_of(new) - (q.log_z - before.log_z)
            kl = part if kl is None else kl + part
            if i == len(self._layers) - 1 and self.likelihood.conjugate:
                last = q
                break
            eps = q.draw(normal(tuple(q.mean.shape)))
            drawn.take(LayerDraw(given.weights(eps), eps, torch.full_like(part, math.nan), None))
        assert kl is not None
        nothing = torch.full_like(kl, math.nan)  # the divergence from the prior is not computed here
        weights = tuple(drawn.weights)
        return Particles(self.architecture, weights, nothing, given, self.likelihood, last, self.factor_dtype), kl

    def _normal(self, seed: int) -> Normal:
        """Return noise for a posterior, the same for all tasks."""
        generator, device = seeded(seed, "particles"), compute_device(self.device)

        def normal(shape: tuple[int, ...]) -> Tensor:
            z = torch.randn((shape[0], 1, *shape[2:]), generator=generator, dtype=self.factor_dtype)
            return z.to(device).expand(shape)

        return normal

    def forward(self, context: Context, num_samples: int = 64, seed: int = 0, single: bool = False) -> Posterior:
        """Return the posterior given a checked context in the user's units; differentiable, see `condition` for data.

        All tasks get the same noise, so a task's posterior does not depend on what else is in the batch.
        """
        if not isinstance(context, Context):
            raise TypeError(
                f"Expected a bnnp.Context, such as bnnp.collate gives. Got {type(context).__name__}. For data: model.condition(x, y)."
            )
        S, scaled, normal = check_count(num_samples, "num_samples"), self.scale(context), self._normal(seed)
        widest = max(layer.prior.rank for layer in self._layers)
        size = max(1, CONTEXT_BYTES // (8 * S * max(context.num_tasks, 1) * widest))
        if context.x.shape[1] > size and not torch.is_grad_enabled():
            parts = [scaled.rows(i, i + size) for i in range(0, context.x.shape[1], size)]
            particles = self.streamed_particles(Stream(lambda: parts), S, normal, canonical=True)
        else:
            particles = self.particles(scaled, S, normal, canonical=True)
        sample = Reservoir.of(context, REFERENCE_SIZE, seeded(seed, "sample"))
        return self._posterior(particles, context.counts, single, seed, (context,), sample)

    def _posterior(
        self, particles: Particles, counts: Tensor, single: bool, seed: int, kept: tuple[Context, ...] | None, sample: Reservoir
    ) -> Posterior:
        zero = torch.zeros(particles.drawn_kl.shape, dtype=self.factor_dtype, device=particles.drawn_kl.device)
        gained = zero if particles.share is None else particles.share.to(zero)
        return Posterior(particles, self, counts, single, seed, kept, sample, gained, zero[0])

    @torch.no_grad()
    def condition(
        self,
        xc: Any,
        yc: Any = None,
        mask: Any = None,
        num_samples: int = 64,
        seed: int = 0,
        context_batch_size: int | None = None,
        progress: bool = False,
    ) -> Posterior:
        """Return the posterior over the weights given a context, in one forward pass.

        The same seed gives the same draw whatever the order, the padding and the batches of the points and the other tasks (in layers
        of more than 512 inputs with fewer points: the same distribution, and the same draw for the same order).

        A context that does not fit in memory is read in batches, once for each layer, with memory that does not depend on its size; the
        posterior is the same, and does not keep the points.

        Arguments:
            xc: inputs with shape (n, d_x) of one task, or (T, N, d_x) of many, in the user's units; n may be 0. Or a list of T
                arrays with shape (n_t, d_x). Or batches of points instead of xc and yc: an iterable of pairs (x, y), or triples
                (x, y, mask), that starts anew each time, or a function that returns an iterator of them.
            yc: outputs likewise, (n, d_y) or (T, N, d_y), or a list.
            mask: True = observed, with shape (n,) or (T, N); for tasks of different sizes.
            num_samples: number of particles S.
            seed: of the particles.
            context_batch_size: read the points in batches of this many; xc and yc may then be anything that can be sliced, such as memory
                maps and variables of netCDF, HDF5 and zarr files. Where not given, points are in memory, and large contexts are still
                worked through in parts.
            progress: show a line of progress on standard error while batches are read.

        Returns:
            A `Posterior` that no longer depends on the model.

        Raises:
            ValueError: shapes that do not fit, observed entries that are not finite, outputs the likelihood cannot have made, or batches
                that change from pass to pass.
            TypeError: batches that can be read only once.

        Example:
            >>> posterior = BNNP(1, 1, hidden=(8,)).condition(torch.zeros(0, 1), torch.zeros(0, 1), num_samples=4)
            >>> posterior.elbo
            tensor(0.)
        """
        stream = yc is None and is_stream(xc)
        if yc is None and not stream:
            raise TypeError(f"Expected xc and yc, or batches of pairs (x, y). Got {type(xc).__name__} and no yc.")
        if context_batch_size is None and not stream:
            context, single = make_context(xc, yc, mask, x_dim=self.x_dim, y_dim=self.y_dim, dtype=self.dtype, device=self.device)
            self.likelihood.check(context.y)
            return self.forward(context, num_samples, seed, single).frozen()
        if stream and (context_batch_size is not None or mask is not None):
            raise ValueError(
                "Expected batches, or arrays with context_batch_size and mask. Got both: batches have their own sizes and masks."
            )
        source = xc if stream else self._slices(xc, yc, mask, context_batch_size)
        batches = Batches(source, self.x_dim, self.y_dim, self.dtype, self.device, self.likelihood.check)
        return self._condition_stream(batches, check_count(num_samples, "num_samples"), seed, progress).frozen()

    def _slices(self, xc: Any, yc: Any, mask: Any, size: int | None) -> Slices:
        if not hasattr(xc, "shape") or not hasattr(yc, "shape"):  # lists, of numbers or of data sets
            context, single = make_context(xc, yc, mask, x_dim=self.x_dim, y_dim=self.y_dim, dtype=self.dtype, device=self.device)
            xc, yc, mask = (part[0] if single else part for part in (context.x, context.y, context.mask))
        return Slices(xc, yc, mask, size=check_count(size or 0, "context_batch_size"))

    def _condition_stream(self, batches: Batches, num_samples: int, seed: int, progress: bool) -> Posterior:
        generator, counts = seeded(seed, "sample"), torch.zeros(1, dtype=torch.long, device=self.device)
        sample: Reservoir | None = None
        passes = len(self._layers) + (0 if self.likelihood.conjugate else 1)
        line = ProgressLine(passes, progress)
        first = True

        def read() -> Iterator[Context]:
            nonlocal first, counts, sample
            for batch in batches:
                if first:
                    new = None if sample is None else sample.joined(batch, REFERENCE_SIZE, generator)
                    sample = Reservoir.of(batch, REFERENCE_SIZE, generator) if new is None else new
                    counts = counts + batch.counts
                yield self.scale(batch)
            first = False

        done = itertools.count(1)
        stream = Stream(read, watch=lambda at: line.show(at, f"pass {at + 1} of {passes}, {next(done)} batches read"))
        try:
            particles = self.streamed_particles(stream, num_samples, self._normal(seed), canonical=True)
        finally:
            line.close()
        assert sample is not None
        return self._posterior(particles, counts, batches.single, seed, None, sample)

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


class _Drawn:
    """Gather what the draws of the layers give, for one component of the prior."""

    def __init__(self, num_samples: int, component: int = 0) -> None:
        self.num_samples, self.component = num_samples, component
        self.weights: list[Tensor] = []
        self.eps: list[Tensor] = []
        self.kl: Tensor = torch.zeros(())
        self.ratio: Tensor | None = None
        self.known = True

    def take(self, found: LayerDraw) -> Tensor:
        """Take up the weights of a layer, their KL divergence and log q - log p; return the weights."""
        self._add(found.kl.expand(found.weights.shape[:2]), found.ratio)
        self.weights.append(found.weights)
        self.eps.append(found.eps)
        return found.weights

    def take_scale(self, scale: ScaleDraw) -> None:
        """Take up the divergence of a layer's scale, whose weights are not drawn."""
        self._add(scale.kl.expand(scale.root.shape), scale.ratio)

    def _add(self, kl: Tensor, ratio: Tensor | None) -> None:
        self.kl = self.kl.to(kl) + kl
        self.known = self.known and ratio is not None
        self.ratio = None if ratio is None or not self.known else ratio if self.ratio is None else self.ratio + ratio

    def scaled(self, given: Given, A: Tensor, scale: ScaleDraw | None) -> tuple[Given, Tensor]:
        """Return a layer's prior and the features of its problem with a scale, which is taken up."""
        if scale is None:
            return given, A
        self.take_scale(scale)
        return scale.of(given), A * scale.root[..., None, None]

    def spread(self, A: Tensor, sites: Sites) -> tuple[Tensor, Sites]:
        """Return features and pseudo-observations of the first layer, which do not depend on the sample, once for each sample."""
        A, resid, root = (t.expand(self.num_samples, *t.shape[1:]) for t in (A, sites.resid, sites.root_prec))
        return A, Sites(resid, root)

    def expand(self, sums: PointSum) -> PointSum:
        """Return the sums of the first layer, which do not depend on the sample, once for each sample."""
        return PointSum(*(t.expand(self.num_samples, *t.shape[1:]) for t in sums.tensors))


def learned(*modules: nn.Module) -> list[Tensor]:
    """Return the parameters of these modules that are learned."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


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
