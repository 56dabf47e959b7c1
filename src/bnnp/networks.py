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

from bnnp.conjugate import Conditional, PointSum, Sites, SiteSum, condition, point_sum, site_sum
from bnnp.draws import CANONICAL_RANK, Normal, draw_from_sums
from bnnp.layers import ACTIVATIONS, AmortisedLinear
from bnnp.likelihoods import LIKELIHOODS, Gaussian, Likelihood, MultivariateGaussian, noise_of
from bnnp.linalg import compute_device, to_compute
from bnnp.particles import Architecture, Particles, drawn_log_lik
from bnnp.posterior import Posterior
from bnnp.priors import Factor, NetworkPrior, Prior
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
        prior: "diagonal", "per_unit", "shared", or a `Prior` that also says what is learned.
        likelihood: `Gaussian()` where not given; see `bnnp.likelihoods`.
        activation: "relu", "tanh", "silu", "gelu" or "sine".
        residual: add a layer's input to its output where the widths agree.
        last_layer: "exact": with a Gaussian likelihood the last layer is Bayesian linear regression with the likelihood's own
            noise; "amortised": its noise is inferred for each point, as in the paper. Other likelihoods take no notice.
        shared_noise: one pseudo-noise for each point, shared by the units of a layer. With the "shared" prior this leaves one
            factorisation per layer, task and sample.
        missing_outputs: contexts may have points of which some outputs were not observed: the inference networks are told which.
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
        missing_outputs: bool = False,
        net_hidden: Sequence[int] | None = None,
        factor_dtype: str = "float64",
        seed: int = 0,
    ) -> None:
        super().__init__()
        x_dim, y_dim, hidden = check_count(x_dim, "x_dim"), check_count(y_dim, "y_dim"), _widths(hidden, "hidden")
        net_hidden = _widths(net_hidden, "net_hidden") if net_hidden is not None else (hidden or (64, 64))
        missing_outputs = _flag(missing_outputs, "missing_outputs")
        residual, shared_noise = _flag(residual, "residual"), _flag(shared_noise, "shared_noise")
        _choose(activation, ACTIVATIONS, "activation")
        _choose(last_layer, ("exact", "amortised"), "last_layer")
        _choose(factor_dtype, DTYPES, "factor_dtype")
        likelihood = _bound(likelihood, y_dim)
        widths = (x_dim, *hidden, likelihood.f_dim(y_dim))
        spec = Prior(prior) if isinstance(prior, str) else prior
        if not isinstance(spec, Prior):
            raise TypeError(f"Expected prior as a name or a bnnp.Prior(...). Got {type(prior).__name__}.")
        self._config: dict[str, Any] = {
            "x_dim": x_dim,
            "y_dim": y_dim,
            "hidden": list(hidden),
            "prior": dataclasses.asdict(spec),
            "likelihood": {"kind": type(likelihood).__name__.lower(), **likelihood.config()},
            "activation": activation,
            "residual": residual,
            "last_layer": last_layer,
            "shared_noise": shared_noise,
            "missing_outputs": missing_outputs,
            "net_hidden": list(net_hidden),
            "factor_dtype": factor_dtype,
        }
        self.x_dim, self.y_dim = x_dim, y_dim
        self.architecture = Architecture(activation, residual)
        self.factor_dtype = DTYPES[factor_dtype]
        self.likelihood, self.missing_outputs = likelihood, missing_outputs
        self.scaling = Standardiser(x_dim, y_dim, scale_y=likelihood.scale_y)
        self.reference = Reference(x_dim)
        self.last_layer = last_layer
        seen_by_nets = x_dim + likelihood.embed_dim(y_dim) + (y_dim if missing_outputs else 0)
        layers = []
        for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
            true_targets = i == len(widths) - 2 and likelihood.conjugate
            net = None if true_targets and last_layer == "exact" else (seen_by_nets, *net_hidden)
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
        self.likelihood.fit(torch.cat([task.y for task in tasks]), torch.cat([task.observed for task in tasks]))

    def scale(self, context: Context) -> Context:
        """Return a context in the network's units, padding at zero.

        Raises:
            ValueError: single outputs are missing, and the model was not built for that.
        """
        return self.scaling.context(context, self.missing_outputs)

    def _sites(self, layer: AmortisedLinear, context: Context) -> tuple[Tensor, Tensor]:
        if layer.net is None:
            return context.y, self._own_root(context)
        embedded = self.likelihood.embed(context.y)
        if self.missing_outputs:
            seen = context.observed.expand_as(context.y).to(embedded.dtype)
            embedded = torch.cat([embedded * seen, seen], dim=-1)
        return layer.pseudo_observations(context.x, context.y, context.observed if layer.true_targets else context.mask, embedded)

    def _own_root(self, context: Context) -> Tensor:
        """Return the square roots of the precisions of observations with the likelihood's own noise."""
        noise = noise_of(self.likelihood)
        assert noise is not None
        return context.observed / noise

    def output_sites(self, context: Context) -> tuple[Tensor, Tensor]:
        """Return the last layer's pseudo-observations of a context in the network's units, and the square roots of their precisions."""
        return self._sites(self._layers[-1], context)

    def _layer_sites(self, index: int, H: Tensor, context: Context, own_noise: bool = False) -> tuple[Tensor, Sites]:
        """Return a layer's features and pseudo-observations, in the precision of the factorisations, given activations H before it.

        With `own_noise`, those of the last layer are the data themselves with the likelihood's own noise.
        """
        layer = self._layers[index]
        A = self.architecture.layer_input(H, index)
        pseudo_y, root = (context.y, self._own_root(context)) if own_noise else self._sites(layer, context)
        # Where the data are the pseudo-observations, a residual connection is taken off them.
        skip = self.architecture.skip(H, layer.d_out) if layer.true_targets else None
        sites = layer.sites(A, pseudo_y if skip is None else pseudo_y - skip, root)
        A, resid, root = (to_compute(t, self.factor_dtype) for t in (A, sites.resid, sites.root_prec))
        return A, Sites(resid, root)

    def particles(self, context: Context, num_samples: int, normal: Normal, canonical: bool = False) -> Particles:
        """Draw S particles from q(W | context), in the network's units; differentiable.

        Arguments:
            context: T tasks in the network's units.
            num_samples: S.
            normal: source of standard normal numbers in the precision of the factorisations.
            canonical: draw hidden weights as `draws.draw_canonical` does; otherwise with the fast `draws.draw_fused`.
        """
        H = context.x.unsqueeze(0)
        drawn = _Drawn(num_samples)
        hidden = len(self._layers) - 1
        for i in range(hidden):
            found = self._layers[i].draw(*self._layer_sites(i, H, context), num_samples, normal, canonical, self.factor_dtype)
            H = self._next(i, H, drawn.take(found))
        if not self.likelihood.conjugate:
            return self._drawn_last(drawn, *self._layer_sites(hidden, H, context), normal, canonical)
        H = H.expand(num_samples, *H.shape[1:])
        A, sites = self._layer_sites(hidden, H, context)
        factor, space = self._output_factor(), "weight" if canonical and self._layers[-1].prior.rank <= CANONICAL_RANK else None
        last = condition(factor, A, sites, space)
        if self._layers[-1].net is None:
            return self._with_last(drawn, last, None)
        own = self._layer_sites(hidden, H, context, own_noise=True)
        return self._with_last(drawn, last, site_sum(factor, *own) if canonical else own)

    def streamed_particles(self, stream: Stream, num_samples: int, normal: Normal, canonical: bool = False) -> Particles:
        """Draw the particles that `particles` draws, from batches of points: memory independent of their number.

        It reads the data once for each layer (and once more where the last layer is drawn). Arguments as for `particles`.
        """
        drawn, hidden = _Drawn(num_samples), len(self._layers) - 1
        for i in range(hidden):
            layer = self._layers[i]
            if self._sums_serve(stream, i, canonical):
                sums = self._streamed_sums(stream, i, drawn.weights)[0]
                factor = layer.prior.factor()
                eps, kl, ratio = draw_from_sums(factor, sums, num_samples, normal)
                drawn.take((layer.weights(eps, factor), kl, ratio))
            else:
                A, sites = self._gathered(stream, i, drawn.weights)
                drawn.take(layer.draw(A, sites, num_samples, normal, canonical, self.factor_dtype))
        output = self._layers[-1]
        if not self.likelihood.conjugate:
            return self._streamed_drawn_last(stream, drawn, normal, canonical)
        factor = self._output_factor()
        both = self._streamed_sums(stream, hidden, drawn.weights, both=output.net is not None)
        seen = [drawn.expand(one).whiten(factor) for one in both]
        if canonical and not self._sums_serve(stream, hidden, canonical):
            A, sites = self._gathered(stream, hidden, drawn.weights)
            last = condition(factor, *drawn.spread(A, sites))
        else:
            last = seen[0].condition(factor)
        return self._with_last(drawn, last, None if output.net is None else seen[1])

    def _sums_serve(self, stream: Stream, index: int, canonical: bool) -> bool:
        """Tell whether the draws of a layer are functions of sums over points; otherwise there are few points, and they are gathered."""
        layer = self._layers[index]
        return layer.in_weight_space(0, index == 0, canonical) or layer.in_weight_space(stream.shape[1], index == 0, canonical)

    def _next(self, index: int, H: Tensor, W: Tensor) -> Tensor:
        """Return the activations behind a layer."""
        skip = self.architecture.skip(H, self._layers[index].d_out)
        H = self.architecture.layer_input(H, index) @ W.mT
        return H if skip is None else H + skip

    def _output_factor(self) -> Factor:
        factor = self._layers[-1].prior.factor()
        return factor.rebuild(*(to_compute(t, self.factor_dtype) for t in factor.tensors))

    def _with_last(self, drawn: _Drawn, last: Conditional, seen: SiteSum | tuple[Tensor, Sites] | None) -> Particles:
        noise, ratio = noise_of(self.likelihood), drawn.ratio
        kl = drawn.kl if drawn.weights else torch.zeros_like(last.quad)
        ratio = torch.zeros_like(kl) if ratio is None and not drawn.weights else ratio
        return Particles(self.architecture, tuple(drawn.weights), kl, self._layers[-1], last, noise, self.factor_dtype, ratio, seen)

    def _drawn_last(self, drawn: _Drawn, A: Tensor, sites: Sites, normal: Normal, canonical: bool) -> Particles:
        """Draw the last layer too, where the likelihood has no closed form."""
        output, redraw = self._layers[-1], None
        if canonical:
            A, sites = drawn.spread(A, sites)
            space = "weight" if output.prior.rank <= CANONICAL_RANK else None
            redraw = self._redrawn(drawn, condition(self._output_factor(), A, sites, space), normal)
        else:
            drawn.take(output.draw(A, sites, drawn.num_samples, normal, canonical, self.factor_dtype))
        weights, dtype = tuple(drawn.weights), self.factor_dtype
        return Particles(self.architecture, weights, drawn.kl, output, None, None, dtype, drawn.ratio, None, redraw)

    def _redrawn(self, drawn: _Drawn, last: Conditional, normal: Normal) -> tuple[Conditional, Tensor]:
        z = normal((drawn.num_samples, *last.mean.shape[1:]))
        eps = last.draw(z)
        drawn.take((self._layers[-1].weights(eps), last.kl, last.log_ratio(eps)))
        return last, z

    def _streamed_drawn_last(self, stream: Stream, drawn: _Drawn, normal: Normal, canonical: bool) -> Particles:
        index, output = len(self._layers) - 1, self._layers[-1]
        if not self._sums_serve(stream, index, canonical):
            particles = self._drawn_last(drawn, *self._gathered(stream, index, drawn.weights), normal, canonical)
        else:
            factor, sums = self._output_factor(), self._streamed_sums(stream, index, drawn.weights)[0]
            redraw = self._redrawn(drawn, drawn.expand(sums).whiten(factor).condition(factor), normal)
            weights, dtype = tuple(drawn.weights), self.factor_dtype
            particles = Particles(self.architecture, weights, drawn.kl, output, None, None, dtype, drawn.ratio, None, redraw)

        def log_lik(points: Context, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (drawn_log_lik(self.architecture, self.likelihood, weights, points, self.factor_dtype),)

        return dataclasses.replace(particles, log_lik=stream.sum(log_lik, particles.weights, learned(self.likelihood))[0])

    def _streamed_sums(self, stream: Stream, index: int, weights: Sequence[Tensor], both: bool = False) -> list[PointSum]:
        """Return a layer's sums over the points of a stream, given the weights before it.

        With `both`, for the last layer, there is a second sum of the same pass: of the data with the likelihood's own noise.
        """

        def part(points: Context, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            H = self.architecture.hidden(points.x.unsqueeze(0), weights)
            sums = [point_sum(*self._layer_sites(index, H, points, own)) for own in ((False, True) if both else (False,))]
            return tuple(tensor for one in sums for tensor in one.tensors)

        found = stream.sum(part, tuple(weights), learned(self._layers[index], self.likelihood))
        return [PointSum(*found[i : i + 5]) for i in range(0, len(found), 5)]

    def _gathered(self, stream: Stream, index: int, weights: Sequence[Tensor]) -> tuple[Tensor, Sites]:
        """Return a layer's features and pseudo-observations of all points, where there are fewer than weights."""

        def part(points: Context, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            A, sites = self._layer_sites(index, self.architecture.hidden(points.x.unsqueeze(0), weights), points)
            return A, sites.resid, sites.root_prec

        A, resid, root = stream.gather(part, tuple(weights))
        return A, Sites(resid, root)

    def paired_particles(self, context: Stream, target: Stream, num_samples: int, normal: Normal) -> tuple[Particles, Tensor]:
        """Draw S particles from q(W | context + target), with KL(q(. | context + target) || q(. | context)) along the same chain.

        Arguments:
            context: T tasks in the network's units, in one batch or several.
            target: further points of the same tasks.
            num_samples: S.
            normal: source of standard normal numbers.

        Returns:
            The particles, whose last layer has seen context and target, and the KL divergence with shape (S, T).
        """
        drawn, last, kl = _Drawn(num_samples), None, None
        for i, layer in enumerate(self._layers):
            factor = layer.prior.factor()
            exact = factor.rebuild(*(to_compute(t, self.factor_dtype) for t in factor.tensors))
            old, new = (drawn.expand(self._streamed_sums(s, i, drawn.weights)[0]).whiten(exact) for s in (context, target))
            before, q = old.condition(exact), (old + new).condition(exact)
            part = q.expected_log_lik_of(new) - (q.log_z - before.log_z)
            kl = part if kl is None else kl + part
            if i == len(self._layers) - 1 and self.likelihood.conjugate:
                last = q
                break
            drawn.weights.append(layer.weights(q.draw(normal(tuple(q.mean.shape))), factor))
        assert kl is not None
        nothing = torch.full_like(kl, math.nan)  # the divergence from the prior is not computed here
        noise, weights = noise_of(self.likelihood), tuple(drawn.weights)
        return Particles(self.architecture, weights, nothing, self._layers[-1], last, noise, self.factor_dtype), kl

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
        widest = max(layer.prior.p for layer in self._layers)
        size = max(1, CONTEXT_BYTES // (8 * S * max(context.num_tasks, 1) * widest))
        if context.x.shape[1] > size and not torch.is_grad_enabled():
            parts = [scaled.rows(i, i + size) for i in range(0, context.x.shape[1], size)]
            particles = self.streamed_particles(Stream(lambda: parts), S, normal, canonical=True)
        else:
            particles = self.particles(scaled, S, normal, canonical=True)
        sample = Reservoir.of(context, REFERENCE_SIZE, seeded(seed, "sample"))
        return self._posterior(
            particles, context.counts, self.scaling.volume(context), single=single, seed=seed, kept=(context,), sample=sample
        )

    def _posterior(self, particles: Particles, counts: Tensor, volume: Tensor, **rest: Any) -> Posterior:
        """Return the posterior, with `rest` its fields `single`, `seed`, `kept` and `sample`."""
        zero = torch.zeros(particles.drawn_kl.shape, dtype=self.factor_dtype, device=particles.drawn_kl.device)
        return Posterior(particles, self, counts, **rest, gained=zero, past_evidence=zero[0], volume=volume.to(zero.device))

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
            mask: True = observed, with shape (n,) or (T, N); for tasks of different sizes. Or for each output, (n, d_y) or (T, N, d_y),
                with `missing_outputs`.
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
            self.likelihood.check(context.values)
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
            given = context.mask if context.seen is None else context.observed
            xc, yc, mask = (part[0] if single else part for part in (context.x, context.y, given))
        return Slices(xc, yc, mask, size=check_count(size or 0, "context_batch_size"))

    def _condition_stream(self, batches: Batches, num_samples: int, seed: int, progress: bool) -> Posterior:
        generator, counts = seeded(seed, "sample"), torch.zeros(1, dtype=torch.long, device=self.device)
        sample: Reservoir | None = None
        volume = torch.zeros(1, dtype=torch.float64, device=compute_device(self.device))
        passes = len(self._layers) + (0 if self.likelihood.conjugate else 1)
        line = ProgressLine(passes, progress)
        first = True

        def read() -> Iterator[Context]:
            nonlocal first, counts, sample, volume
            for batch in batches:
                if first:
                    new = None if sample is None else sample.joined(batch, REFERENCE_SIZE, generator)
                    sample = Reservoir.of(batch, REFERENCE_SIZE, generator) if new is None else new
                    counts, volume = counts + batch.counts, volume + self.scaling.volume(batch)
                yield self.scale(batch)
            first = False

        done = itertools.count(1)
        stream = Stream(read, watch=lambda at: line.show(at, f"pass {at + 1} of {passes}, {next(done)} batches read"))
        try:
            particles = self.streamed_particles(stream, num_samples, self._normal(seed), canonical=True)
        finally:
            line.close()
        assert sample is not None
        return self._posterior(particles, counts, volume, single=batches.single, seed=seed, kept=None, sample=sample)

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
    """Gather what the draws of the layers give."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.weights: list[Tensor] = []
        self.kl: Tensor = torch.zeros(())
        self.ratio: Tensor | None = None

    def take(self, found: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        """Take up the weights of a layer, their KL divergence and log q - log p; return the weights."""
        W, kl, ratio = found
        kl = kl.expand(W.shape[:2])
        first = not self.weights
        self.kl = kl if first else self.kl + kl
        if first or ratio is None:
            self.ratio = ratio
        elif self.ratio is not None:  # known for all layers or for none
            self.ratio = self.ratio + ratio
        self.weights.append(W)
        return W

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


def _bound(likelihood: Likelihood | None, y_dim: int) -> Likelihood:
    """Return the likelihood with parameters for `y_dim` outputs."""
    likelihood = Gaussian() if likelihood is None else likelihood
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"Expected likelihood as one of bnnp's, such as bnnp.Gaussian(). Got {type(likelihood).__name__}.")
    if isinstance(likelihood, MultivariateGaussian):
        raise ValueError("Expected a likelihood that the last layer can take. Got MultivariateGaussian, which BNNP does not know yet.")
    return likelihood.bind(y_dim)


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
