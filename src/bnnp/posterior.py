"""The posterior as a value: particles of weights with their importance, told of more data, asked for predictions.

A `Posterior` never changes. `update` returns another one whose last layer has seen more points and whose particles are weighted by how
well each predicted them: a particle filter with the last layer integrated out (Rao-Blackwellised). The hidden weights stay as they were
drawn given the first context; `refresh` draws them again given everything.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bnnp.importance import effective_sample_size, log_mean_exp, normalise, psis, systematic
from bnnp.likelihoods import Likelihood
from bnnp.linalg import to_compute
from bnnp.particles import Particles, drawn_log_lik
from bnnp.predictive import GaussianPredictive, Predictive, SampledPredictive
from bnnp.scaling import REFERENCE_SIZE, Reference, Standardiser
from bnnp.seeds import check_count, seeded
from bnnp.streaming import Reservoir
from bnnp.tasks import Context, check_inputs, make_context

__all__ = ["Network", "Posterior"]

PREDICT_BYTES = 2**29
"""How much the widest layer's activations may take where a prediction's batch size is not given."""


class Network(Protocol):
    """What a posterior asks of the model that made it."""

    scaling: Standardiser
    likelihood: Likelihood
    reference: Reference
    x_dim: int
    y_dim: int

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of the features."""
        ...

    @property
    def device(self) -> torch.device:
        """Return where the model is."""
        ...

    def scale(self, context: Context) -> Context:
        """Return a context in the network's units."""
        ...

    def output_sites(self, context: Context, A: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the last layer's pseudo-observations and their precisions."""
        ...

    def forward(self, context: Context, num_samples: int = 64, seed: int = 0, single: bool = False) -> Posterior:
        """Return the posterior given a context."""
        ...


@dataclass(frozen=True, eq=False)
class Posterior:
    """Be the posterior over the weights of T tasks: an immutable value that predicts, is sampled, and is updated to another.

    Arguments:
        particles: the draws, in the network's units.
        model: the model that made it.
        counts: number of points seen, with shape (T,).
        single: one task came without a task axis, so results have none.
        seed: of the particles.
        kept: the points seen, in the user's units, in the order of their arrival; None where they were streamed.
        sample: at most 256 of the points seen, in the user's units.
        gained: log weights gained by updates since the last resampling, with shape (S, T).
        applied: log weights that resampling has used up, with shape (S, T); None before any.
        past_evidence: log evidence of the updates before the last resampling, with shape (T,).
        ancestors: number of the draw from q that each particle goes back to, with shape (S, T); None before any resampling.
        volume: what log-densities of the points seen lose on the way to the user's units, with shape (T,); worked out from `counts`
            where it is None.
    """

    particles: Particles
    model: Network
    counts: Tensor
    single: bool
    seed: int
    kept: tuple[Context, ...] | None
    sample: Reservoir
    gained: Tensor
    past_evidence: Tensor
    applied: Tensor | None = None
    ancestors: Tensor | None = None
    volume: Tensor | None = None

    save: ClassVar[Callable[..., None]]
    """Save the posterior in a folder; set by `bnnp.checkpoint`, since the core knows no files."""
    diagnose: ClassVar[Callable[..., Any]]
    """Say how far the posterior can be trusted; set by `bnnp.trust`."""

    def frozen(self) -> Posterior:
        """Return the same posterior on a copy of the model, which training may change."""
        model: Any = copy.deepcopy(self.model)
        model.requires_grad_(False)
        own = self.particles
        given = own.given.rebuild(*(t.detach().clone() for t in own.given.tensors))
        particles = dataclasses.replace(own, given=given, likelihood=model.likelihood)
        return dataclasses.replace(self, particles=particles, model=model)

    @property
    def scaling(self) -> Standardiser:
        """Return the normaliser: from the user's units to the network's and back."""
        return self.model.scaling

    @property
    def likelihood(self) -> Likelihood:
        """Return the likelihood: from f to y."""
        return self.model.likelihood

    @property
    def reference(self) -> Reference:
        """Return where the inputs of meta-training lay."""
        return self.model.reference

    @property
    def y_dim(self) -> int:
        """Return d_y."""
        return self.model.y_dim

    @property
    def num_tasks(self) -> int:
        """Return the number of tasks T."""
        return self.counts.shape[0]

    @property
    def num_samples(self) -> int:
        """Return the number of particles S."""
        return self.particles.num_samples

    # --- predictions ---------------------------------------------------------------------------------------------

    def _inputs(self, xt: Any, name: str = "xt") -> Tensor:
        d_x, T = self.model.x_dim, self.num_tasks
        x = check_inputs(xt, d_x, name, self.model.dtype, self.model.device)
        if x.ndim == 3 and (self.single or x.shape[0] != T):
            raise ValueError(
                f"Expected {name} with shape (points, {d_x})"
                + ("" if self.single else f" or ({T}, points, {d_x}), one row of points for each task")
                + f". Got shape {tuple(x.shape)}. The posterior was conditioned on {T} task(s)."
            )
        return x.expand(T, *x.shape[-2:])

    @torch.no_grad()
    def predict(self, xt: Any, batch_size: int | None = None, reweight: bool = False) -> Predictive:
        """Return the predictive distribution at xt with shape (M, d_x), the same for every task, or (T, M, d_x).

        Cost: one pass of the S networks over the points, and S M p^2 for the last layer's variances.

        Arguments:
            xt: inputs, in the user's units.
            batch_size: run the networks over this many points at a time, so that memory does not grow with samples x points x width;
                each question to the predictive then costs a pass of its own. Where not given, all points at once if they take less
                than half a GiB.
            reweight: weight the particles by their importance p(context, W) / q(W), Pareto-smoothed, and not only by what updates have
                told of them. Better where `diagnose().pareto_k` is below 0.7, worse above.

        Raises:
            ValueError: a wrong width, another number of tasks, or inputs that are not finite.
        """
        x = self._inputs(xt)
        widest = max(W.shape[-1] for W in (*self.particles.weights, self.particles.given.mean))
        fits = max(1, PREDICT_BYTES // (8 * self.num_samples * self.num_tasks * widest))
        size = fits if batch_size is None else check_count(batch_size, "batch_size")
        log_weights = psis(self.log_importance)[0] if reweight else normalise(self.gained).log()
        kind = GaussianPredictive if self.particles.last is not None else SampledPredictive
        return kind(self, x, log_weights.to(self.gained), size)

    def draws(self, n: int, generator: torch.Generator, log_weights: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return n draws of all layers, each with shape (n, T, d_l, p_l), in the network's units.

        With equal weights draw i has the hidden weights of particle i mod S; otherwise particles are drawn by systematic resampling.
        """
        log_weights = self.gained if log_weights is None else log_weights
        particles, z = self.particles, None
        S, device = particles.num_samples, particles.drawn_kl.device
        if particles.last is not None:
            d, k = particles.last.mean.shape[-2:]
            z = torch.randn(-(-n // S), S, 1, d, k, generator=generator, dtype=particles.dtype).to(device).flatten(0, 1)[:n]
        index = (torch.arange(n, device=device) % S).unsqueeze(-1)
        unequal = (log_weights != log_weights[:1]).any(0)
        if bool(unequal.any()):
            # With random numbers of its own, so that tasks of equal weights do not notice; and in an order that is not sorted by
            # particle, so that the first few draws show more than one.
            own = torch.Generator().manual_seed(generator.initial_seed() ^ 1)
            order = torch.randperm(n, generator=own).to(device)
            drawn = systematic(log_weights.cpu(), n, own).to(device)[order]
            index = torch.where(unequal.to(device), drawn, index)
        particles = particles.picked(index.expand(n, self.num_tasks))
        if particles.last is None or z is None:
            return particles.weights
        eps = particles.last.draw(z.expand(n, self.num_tasks, *z.shape[2:]))
        return (*particles.weights, particles.given.weights(eps))

    @torch.no_grad()
    def sample_weights(self, n: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Return n draws of the weights of each layer with shape (n, T, d_l, p_l), bias last.

        Weights are those of the network between scaled inputs and outputs. With equal weights draw i takes its hidden layers from
        particle i mod S: condition with `num_samples` of at least n for n different ones.
        """
        draws = self.draws(check_count(n, "n"), seeded(seed, "posterior"))
        return tuple(W.squeeze(1) for W in draws) if self.single else draws

    @torch.no_grad()
    def sample_functions(self, n: int, seed: int = 0) -> list[Callable[[Any], Tensor]]:
        """Return n functions drawn from the posterior, noise-free, each the same function at every call.

        Each maps inputs (M, d_x), or (T, M, d_x), to the expectation of y, (T, M, d_y), in the user's units; for class labels to logits,
        (T, M, K) with K classes.
        """
        draws = self.draws(check_count(n, "n"), seeded(seed, "posterior"))
        return [self._function(tuple(W[i] for W in draws)) for i in range(n)]

    def _function(self, weights: tuple[Tensor, ...]) -> Callable[[Any], Tensor]:
        def function(x: Any) -> Tensor:
            with torch.no_grad():
                H = self.particles.architecture.hidden(self.scaling.x(self._inputs(x, "x")), weights)
                y = self.scaling.y_inverse(H if self.likelihood.labels else self.likelihood.mean(H))
            return y.squeeze(0) if self.single else y

        return function

    # --- evidence ------------------------------------------------------------------------------------------------

    def per_task(self, value: Tensor) -> Tensor:
        """Give the user one of our float64 results with shape (T,): his dtype, his device, a scalar for a single task."""
        value = value.to(self.model.dtype).to(self.model.device)
        return value.squeeze(-1) if self.single else value

    def _seen_volume(self) -> Tensor:
        """Return what log-densities of the points seen lose on the way back to the user's units."""
        volume = self.counts.to(self.scaling.y_scale.device) * self.scaling.log_volume if self.volume is None else self.volume
        return to_compute(volume, self.gained.dtype).to(self.gained.device)

    def _log_lik(self, particles: Particles, points: Context) -> Tensor:
        """Return log p(points | f) of drawn networks with shape (S, T); points in the network's units."""
        return drawn_log_lik(particles.architecture, self.likelihood, particles.weights, points, particles.dtype)

    def _scored(self) -> Particles:
        """Return the particles with the likelihood of what they have seen, where they do not carry it."""
        particles = self.particles
        if particles.last is not None or particles.log_lik is not None:
            return particles
        if self.kept is None:
            raise ValueError(
                "Expected the points that were seen, since an update draws the last layer of this likelihood again. Got a posterior that "
                "was streamed and does not keep them. Condition it again on all points."
            )
        return dataclasses.replace(particles, log_lik=self._log_lik_of_kept(particles))

    def _log_lik_of_kept(self, particles: Particles) -> Tensor:
        parts = (self._log_lik(particles, self.model.scale(points)) for points in self.kept or ())
        return sum(parts, torch.zeros_like(particles.drawn_kl))

    @property
    def kl(self) -> Tensor:
        """Return KL(q || p) of each task with shape (T,): closed form in each layer, Monte Carlo over the layers before it."""
        self._check_known_q()
        return self.per_task(self.particles.mean(self.particles.kl))

    def _check_known_q(self) -> None:
        if bool(self.particles.drawn_kl.isnan().any()):
            raise ValueError(
                "Expected draws of model.condition, whose density q is known. Got draws of another inference engine. Its report says how "
                "far they can be trusted, and bnnp.inference.evidence estimates the evidence from them."
            )

    @property
    def elbo(self) -> Tensor:
        """Return E_q[log p(y | f(x))] - KL(q || p) of all points seen, with shape (T,): a lower bound of their log evidence.

        Raises:
            ValueError: the particles were resampled, so they are no longer draws from q.
        """
        return self.per_task(self.particles.mean(self.bounds))

    @property
    def bounds(self) -> Tensor:
        """Return what each particle says of `elbo`, with shape (S, T), in the precision of the factorisations."""
        self._check_known_q()
        if self.applied is not None:
            raise ValueError("Expected draws from q for the bound. Got resampled particles. Use diagnose().log_evidence, or refresh().")
        return self._scored().elbo() - self._seen_volume()

    @property
    def log_importance(self) -> Tensor:
        """Return log p(points seen, W) - log q(W) of each particle in the user's units, with shape (S, T), the last layer integrated out.

        What resampling has used up is taken off, so the mean of the exponentials is the evidence of all points seen.
        """
        self._check_known_q()
        weights = self._scored().log_weights - self._seen_volume()
        return weights if self.applied is None else weights - self.applied

    @property
    def log_evidence(self) -> Tensor:
        """Return the log evidence of the points that came by `update`, given the context, with shape (T,), in the user's units.

        With the exact last layer it is the sum of the log predictive densities of what arrived. With the amortised one it is that of
        the same hidden weights under an exact last layer, as everywhere where evidence is spoken of; with class labels it is estimated
        from the importance of the particles.
        """
        return self.per_task(self.past_evidence + log_mean_exp(self.gained)[0])

    @property
    def effective_sample_size(self) -> Tensor:
        """Return the effective number of particles, (sum w)^2 / sum w^2 of the weights gained by updates, with shape (T,)."""
        return self.per_task(effective_sample_size(self.gained))

    @property
    def weights(self) -> Tensor:
        """Return the particles' weights with shape (S, T), summing to one: before any update equal, but with a prior of components."""
        weights = normalise(self.gained).to(self.model.dtype).to(self.model.device)
        return weights.squeeze(-1) if self.single else weights

    # --- more data -----------------------------------------------------------------------------------------------

    def _points(self, x: Any, y: Any, mask: Any) -> Context:
        model = self.model
        points, single = make_context(x, y, mask, x_dim=model.x_dim, y_dim=model.y_dim, dtype=model.dtype, device=model.device, name="")
        if single != self.single or points.num_tasks != self.num_tasks:
            many = f"{self.num_tasks} tasks, x with shape (tasks, points, columns)"
            want = "one task, x with shape (points, columns)" if self.single else many
            raise ValueError(f"Expected points of {want}, as the posterior has. Got x with shape {tuple(points.x.shape)[single:]}.")
        self.likelihood.check(points.values)
        return points

    @torch.no_grad()
    def update(self, x: Any, y: Any, mask: Any = None, reweight: bool = True) -> Posterior:
        """Return the posterior that has seen these points too; this one stays as it is.

        The last layer is conditioned on them, exactly where it is exact; each particle gains log p(y | x, particle), its predictive
        evidence. The hidden weights are not drawn again: watch `effective_sample_size`, and `refresh` when it is small. Cost p^3 / 3 a
        particle, whatever has been seen before (with class labels: and a pass over all points seen, where they are kept).

        Arguments:
            x: inputs of the new points with shape (n, d_x) of one task, or (T, n, d_x) of many, in the user's units.
            y: outputs likewise.
            mask: True = observed, with shape (n,) or (T, n), or for each output.
            reweight: let the particles gain weight; False is the paper's update, in which all stay equal.

        Raises:
            ValueError: shapes that do not fit, or observed entries that are not finite.

        References:
            Rao-Blackwellised particle filtering for dynamic Bayesian networks (Doucet et al., 2000).
        """
        points = self._points(x, y, mask)
        scaled = self.model.scale(points)
        if self.particles.last is not None:
            particles, gain = self.particles.told(scaled, self.model.output_sites)
        else:
            particles, gain = self._told_drawn(scaled, reweight)
        volume = to_compute(self.scaling.volume(points), self.gained.dtype)
        gain = gain - volume
        past = self.past_evidence
        if not reweight:  # what arrived still has a predictive density, under the weights as they are
            past = past + (normalise(self.gained).log() + gain).logsumexp(0)
        return dataclasses.replace(
            self,
            particles=particles,
            counts=self.counts + points.counts,
            volume=self._seen_volume() + volume,
            kept=None if self.kept is None else (*self.kept, points),
            sample=self.sample.joined(points, REFERENCE_SIZE, seeded(self.seed, f"sample {self.counts.tolist()}")),
            gained=self.gained + gain if reweight else self.gained,
            past_evidence=past,
        )

    def _told_drawn(self, points: Context, reweight: bool) -> tuple[Particles, Tensor]:
        """Return the particles that know these points, and what they gain, where the last layer was drawn.

        It is drawn again, with the same noise. What a particle gains by that is the growth of its importance weight, in which the density
        of the new draw counts: its likelihood of the new points alone would count them twice. That needs the likelihood of all points
        seen. Where they were streamed, weighted particles stay as they are and gain their likelihood of the new points.
        """
        if reweight and self.kept is None:
            before = self._scored()
            gain = self._log_lik(before, points)
            assert before.log_lik is not None
            return dataclasses.replace(before, log_lik=before.log_lik + gain), gain
        told, _ = self.particles.told(points, self.model.output_sites)
        if self.kept is None:
            return told, self._log_lik(self.particles, points)
        log_lik = self._log_lik_of_kept(told) + self._log_lik(told, points)
        told = dataclasses.replace(told, log_lik=log_lik)
        return told, told.log_weights - self._scored().log_weights if reweight else self._log_lik(self.particles, points)

    @torch.no_grad()
    def resample(self, seed: int = 0) -> Posterior:
        """Return the posterior with particles drawn in proportion to their weights, all of which are equal afterwards.

        Systematic resampling: particle s is kept floor(S w_s) or ceil(S w_s) times. It does not make new hidden weights: `refresh` does.
        """
        index = systematic(self.gained.cpu(), self.num_samples, seeded(seed, "resample")).to(self.gained.device)
        evidence = log_mean_exp(self.gained)[0]
        used = self.gained - evidence if self.applied is None else self.applied + self.gained - evidence
        return dataclasses.replace(
            self,
            particles=dataclasses.replace(self.particles.picked(index), share=None),
            gained=torch.zeros_like(self.gained),
            past_evidence=self.past_evidence + evidence,
            applied=used.gather(0, index),
            ancestors=index if self.ancestors is None else self.ancestors.gather(0, index),
        )

    @torch.no_grad()
    def refresh(self, x: Any = None, y: Any = None, mask: Any = None, num_samples: int | None = None, seed: int | None = None) -> Posterior:
        """Return the posterior conditioned afresh on all points seen, and on these: hidden weights included.

        Its `log_evidence` starts at zero again. With `num_samples` and `seed` not given, those of this posterior.

        Raises:
            ValueError: the points seen were streamed and are not kept.
        """
        if self.kept is None:
            raise ValueError(
                "Expected the points seen so far, to condition on them afresh. Got a posterior of a streamed context, which does not keep "
                "them. Use model.condition with the stream and the new points."
            )
        kept = self.kept if x is None else (*self.kept, self._points(x, y, mask))
        context = kept[0]
        for more in kept[1:]:
            context = context.join(more)
        count = self.num_samples if num_samples is None else num_samples
        return self.model.forward(context, count, self.seed if seed is None else seed, self.single)
