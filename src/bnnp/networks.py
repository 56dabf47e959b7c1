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
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnnp.chain import Chain
from bnnp.draws import Normal
from bnnp.layers import ACTIVATIONS, AmortisedLinear, mlp
from bnnp.likelihoods import LIKELIHOODS, Gaussian, Likelihood, noise_of
from bnnp.linalg import compute_device
from bnnp.particles import Architecture, Particles
from bnnp.posterior import Posterior
from bnnp.priors import NetworkPrior, Prior, layer_priors
from bnnp.progress import ProgressLine
from bnnp.scaling import REFERENCE_SIZE, Reference, Standardiser
from bnnp.seeds import check_count, seeded
from bnnp.streaming import Batches, Reservoir, Slices, Stream, is_stream
from bnnp.structures import LayerPrior
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
        likelihood: `Gaussian()` where not given; see `bnnp.likelihoods`.
        activation: "relu", "tanh", "silu", "gelu" or "sine".
        residual: add a layer's input to its output where the widths agree.
        last_layer: "exact": with a Gaussian likelihood the last layer is Bayesian linear regression with the likelihood's own
            noise; "amortised": its noise is inferred for each point, as in the paper. Other likelihoods take no notice.
        shared_noise: one pseudo-noise for each point, shared by the units of a layer. With the "shared" prior this leaves one
            factorisation per layer, task and sample.
        missing_outputs: contexts may have points of which some outputs were not observed: the inference networks are told which.
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
        missing_outputs: bool = False,
        net_hidden: Sequence[int] | None = None,
        feed_activations: bool = False,
        trunk: bool = False,
        temperature: bool = False,
        factor_dtype: str = "float64",
        seed: int = 0,
    ) -> None:
        super().__init__()
        x_dim, y_dim, hidden = check_count(x_dim, "x_dim"), check_count(y_dim, "y_dim"), _widths(hidden, "hidden")
        net_hidden = _widths(net_hidden, "net_hidden") if net_hidden is not None else (hidden or (64, 64))
        flags = _flags(residual=residual, shared_noise=shared_noise, missing_outputs=missing_outputs, trunk=trunk)
        flags |= _flags(feed_activations=feed_activations, temperature=temperature)
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
            "last_layer": last_layer,
            "net_hidden": list(net_hidden),
            "factor_dtype": factor_dtype,
            **flags,
        }
        self.x_dim, self.y_dim = x_dim, y_dim
        self.architecture = Architecture(activation, residual)
        self.factor_dtype = DTYPES[factor_dtype]
        self.likelihood, self.missing_outputs = likelihood, missing_outputs
        self.scaling = Standardiser(x_dim, y_dim, scale_y=likelihood.scale_y)
        self.reference = Reference(x_dim)
        self.last_layer = last_layer
        self._seen_by_nets = x_dim + likelihood.embed_dim(y_dim) + (y_dim if missing_outputs else 0)
        self.trunk = mlp((self._seen_by_nets, *net_hidden), activation) if trunk else None
        priors = layer_priors(widths, spec, seeded(seed, "prior"))
        self.layers = nn.ModuleList(self._layer(prior, i, i == len(priors) - 1) for i, prior in enumerate(priors))
        self._reset(seed)
        self.prior.learn(mean=spec.learn_mean, scale=spec.learn_scale)

    def _layer(self, prior: LayerPrior, index: int, last: bool) -> AmortisedLinear:
        """Build a layer with the inference network that it needs."""
        config, true_targets = self._config, last and self.likelihood.conjugate
        net_hidden = config["net_hidden"]
        width = net_hidden[-1] if config["trunk"] else self._seen_by_nets
        width += prior.d_in if config["feed_activations"] and index > 0 else 0
        net = None if true_targets and self.last_layer == "exact" else (width,) if config["trunk"] else (width, *net_hidden)
        return AmortisedLinear(prior, net, config["activation"], config["shared_noise"], true_targets, config["temperature"] and not last)

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
        self.likelihood.fit(torch.cat([task.y for task in tasks]), torch.cat([task.observed for task in tasks]))

    def scale(self, context: Context) -> Context:
        """Return a context in the network's units, padding at zero.

        Raises:
            ValueError: single outputs are missing, and the model was not built for that.
        """
        return self.scaling.context(context, self.missing_outputs)

    @property
    def chain(self) -> Chain:
        """Return the layers as a chain, which draws particles."""
        config, parts = self._config, (self._layers, self.architecture, self.likelihood, self.trunk)
        return Chain(*parts, config["feed_activations"], self.missing_outputs, self.prior.log_share, self.factor_dtype)

    def output_sites(self, context: Context, A: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the last layer's pseudo-observations of a scaled context; see `Chain.output_sites`."""
        return self.chain.output_sites(context, A)

    def particles(
        self, context: Context, num_samples: int, normal: Normal, canonical: bool = False, beyond: Tensor | None = None
    ) -> Particles:
        """Draw S particles from q(W | context) given a scaled context; see `Chain.particles`."""
        return self.chain.particles(context, num_samples, normal, canonical, beyond)

    def streamed_particles(self, stream: Stream, num_samples: int, normal: Normal, canonical: bool = False) -> Particles:
        """Draw the same particles from batches of points; see `Chain.streamed_particles`."""
        return self.chain.streamed_particles(stream, num_samples, normal, canonical)

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
        return self._posterior(
            particles, context.counts, self.scaling.volume(context), single=single, seed=seed, kept=(context,), sample=sample
        )

    def _posterior(self, particles: Particles, counts: Tensor, volume: Tensor, **rest: Any) -> Posterior:
        """Return the posterior, with `rest` its fields `single`, `seed`, `kept` and `sample`."""
        zero = torch.zeros(particles.drawn_kl.shape, dtype=self.factor_dtype, device=particles.drawn_kl.device)
        gained = zero if particles.share is None else particles.share.to(zero)
        return Posterior(particles, self, counts, **rest, gained=gained, past_evidence=zero[0], volume=volume.to(zero.device))

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


def _bound(likelihood: Likelihood | None, y_dim: int) -> Likelihood:
    """Return the likelihood with parameters for `y_dim` outputs."""
    likelihood = Gaussian() if likelihood is None else likelihood
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"Expected likelihood as one of bnnp's, such as bnnp.Gaussian(). Got {type(likelihood).__name__}.")
    return likelihood.bind(y_dim)


def _widths(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"Expected {name} as a sequence of widths such as (64, 64). Got {value!r}.")
    return tuple(check_count(width, f"{name} width") for width in value)


def _flags(**values: Any) -> dict[str, bool]:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"Expected {name} as True or False. Got {value!r}.")
    return values


def _choose(value: str, known: Any, name: str) -> None:
    if value not in known:
        raise ValueError(f"Expected {name} among {', '.join(sorted(known))}. Got {value!r}.")
