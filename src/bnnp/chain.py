"""The chain of layers: each is conditioned given the weights that were drawn before it.

q(W | context) = prod_l q(W^l | W^{<l}, context): layer by layer, features come from the weights sampled so far and the layer is
conditioned on its pseudo-observations. The first layer's posterior does not depend on any sample and is computed once. `particles` has all
points in memory; `streamed_particles` reads them in batches; `paired_particles` goes along one chain with two sets of points. Everything
here is in the network's units.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from bnnp.conjugate import Conditional, PointSum, SiteSum, condition, point_sum, site_sum
from bnnp.draws import CANONICAL_RANK, Normal, draw_from_sums
from bnnp.factors import Factor, Given, Sites
from bnnp.layers import ACTIVATIONS, AmortisedLinear, LayerDraw, ScaleDraw
from bnnp.likelihoods import Likelihood, noise_factor
from bnnp.linalg import to_compute
from bnnp.particles import Architecture, Particles, drawn_log_lik, joined, own_noise
from bnnp.priors import HeavyTailed
from bnnp.streaming import Stream
from bnnp.tasks import Context
from bnnp.wide import WIDE_BYTES, WIDE_RANK, propagate

__all__ = ["Chain", "learned"]


@dataclass(frozen=True, eq=False)
class Chain:
    """Hold what the layers of a network are, and draw particles from their posterior.

    Arguments:
        layers: from the input side.
        architecture: how activations pass from layer to layer.
        likelihood: from f to y.
        trunk: what the inference networks of all layers have in common, or None.
        feed_activations: whether inference networks see their layer's features too.
        missing_outputs: whether they see which outputs were observed.
        log_share: log shares of the components of the prior with shape (K,).
        dtype: precision of the factorisations.
    """

    layers: list[AmortisedLinear]
    architecture: Architecture
    likelihood: Likelihood
    trunk: nn.Module | None
    feed_activations: bool
    missing_outputs: bool
    log_share: Tensor
    dtype: torch.dtype

    def _seen_by_nets(self, context: Context) -> Tensor:
        """Return what the inference networks see of each point, with shape (T, N, q)."""
        embedded = self.likelihood.embed(context.y)
        if self.missing_outputs:
            seen = context.observed.expand_as(context.y).to(embedded.dtype)
            embedded = torch.cat([embedded * seen, seen], dim=-1)
        inputs = torch.cat([context.x, embedded], dim=-1)
        if self.trunk is None:
            return inputs
        return ACTIVATIONS[self.architecture.activation](self.trunk(inputs))

    def output_sites(self, context: Context, A: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the last layer's pseudo-observations, the square roots of their precisions, and what correlated noise is rotated with.

        Arguments:
            context: in the network's units.
            A: the last layer's features there, with shape (S, T, N, p).
        """
        return self.pseudo(len(self.layers) - 1, context, A)

    def pseudo(self, index: int, context: Context, A: Tensor, own: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a layer's pseudo-observations, the roots of their precisions, and what correlated noise is made independent with."""
        layer = self.layers[index]
        if own or layer.net is None:
            return context.y, *own_noise(self.likelihood, context.observed)
        inputs = self._seen_by_nets(context)
        if self.feed_activations and index > 0:
            inputs = torch.cat([inputs.expand(*A.shape[:-1], -1), A[..., :-1]], dim=-1)
        seen = context.observed if layer.true_targets else context.mask.unsqueeze(-1)
        return *layer.pseudo_observations(inputs, context.y, seen), None

    def problem(self, index: int, H: Tensor, context: Context, given: Given, own: bool = False) -> tuple[Tensor, Sites]:
        """Return a layer's features and pseudo-observations, in the precision of the factorisations, given activations H before it.

        With `own`, those of the last layer are the data themselves with the likelihood's own noise. The temperature is not in them.
        """
        layer = self.layers[index]
        A = self.architecture.layer_input(H, index)
        pseudo_y, root, rotate = self.pseudo(index, context, A, own)
        # Where the data are the pseudo-observations, a residual connection is taken off them.
        skip = self.architecture.skip(H, layer.d_out) if layer.true_targets else None
        sites = given.sites(A, pseudo_y if skip is None else pseudo_y - skip, root).to(self.dtype)
        rotate = None if rotate is None else to_compute(rotate, self.dtype)
        return given.problem(to_compute(A, self.dtype), sites, rotate)

    def _given(self, index: int, drawn: _Drawn) -> Given:
        """Return a layer's prior given what was drawn before it."""
        layer = self.layers[index]
        given = layer.prior.given(drawn.eps, drawn.component)
        # Observations of y itself see mixed units, and noise that is correlated couples them: then the units share one eps.
        correlated = layer.d_out > 1 and noise_factor(self.likelihood) is not None
        return given.together() if layer.true_targets and (correlated or given.mix is not None) else given

    def _tempered(self, index: int, sites: Sites, counts: Tensor) -> Sites:
        log_share = self.layers[index].log_temperature(counts)
        if log_share is None:
            return sites
        return Sites(sites.resid, sites.root_prec * (0.5 * log_share).exp().to(sites.root_prec)[:, None, None])

    def particles(
        self, context: Context, num_samples: int, normal: Normal, canonical: bool = False, beyond: Tensor | None = None
    ) -> Particles:
        """Draw S particles from q(W | context), in the network's units; differentiable.

        Arguments:
            context: T tasks in the network's units.
            num_samples: S.
            normal: source of standard normal numbers in the precision of the factorisations.
            canonical: draw hidden weights as `draws.draw_canonical` does; otherwise with the fast `draws.draw_fused`.
            beyond: the only inputs (T, M, d_x) the particles will be asked about. Where it is given, the weights of layers so wide that all
                draws of them would not fit are not kept.
        """
        if len(self.log_share) == 1:
            return self._chain(context, _Drawn(num_samples), normal, canonical, beyond)
        parts = [self._chain(context, drawn, normal, canonical, beyond) for drawn in self._of_components(num_samples)]
        if not self.likelihood.conjugate:
            parts = [dataclasses.replace(p, log_lik=self._log_lik(context, p.weights)) for p in parts]
        return joined(parts, self.log_share)

    def _of_components(self, num_samples: int) -> list[_Drawn]:
        """Share the samples out among the components of a mixture."""
        K = len(self.log_share)
        if num_samples < K:
            raise ValueError(f"Expected num_samples of at least {K}, one for each component of the prior. Got {num_samples}.")
        return [_Drawn(num_samples // K + (k < num_samples % K), k) for k in range(K)]

    def _log_lik(self, points: Context, weights: tuple[Tensor, ...]) -> Tensor:
        return drawn_log_lik(self.architecture, self.likelihood, weights, points, self.dtype)

    def log_ratio(self, context: Context, eps: Sequence[Tensor]) -> Tensor:
        """Return log q(eps | context) - log p(eps) of given eps, with shape (S, T); differentiable.

        The sum over layers of (log|M| - (eps - m)^T M (eps - m) + ||eps||^2) / 2, each layer conditioned given the eps before it. Cost:
        that of drawing as many particles.

        Arguments:
            context: T tasks in the network's units.
            eps: of the first layers, of the hidden ones or of all, each with shape (S, T, d_l, k_l), or (S, T, 1, k_l) where the units of a
                layer share one eps.

        Raises:
            ValueError: a prior with discrete components or random scales, whose q is not a Gaussian in eps.
        """
        return self._followed(context, len(eps), lambda index, q: eps[index], canonical=False)[1]

    def draw_eps(self, context: Context, num_samples: int, normal: Normal, num_layers: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Draw eps of the first layers from q(eps | context); return them, and log q - log p with shape (S, T).

        Arguments:
            context: T tasks in the network's units.
            num_samples: S.
            normal: source of standard normal numbers in the precision of the factorisations.
            num_layers: of how many layers.

        Raises:
            ValueError: as for `log_ratio`.
        """

        def pick(index: int, q: Conditional) -> Tensor:
            z = normal((num_samples, *q.mean.shape[1:]))
            return q.draw(z.unsqueeze(1)).squeeze(1) if q.mean.shape[0] == 1 else q.draw(z)

        return self._followed(context, num_layers, pick, canonical=True)

    def _followed(
        self, context: Context, num_layers: int, pick: Callable[[int, Conditional], Tensor], canonical: bool
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Go along the chain with the eps that `pick` gives for each layer's conditional; return these, and log q - log p."""
        if len(self.log_share) > 1 or any(isinstance(layer.prior, HeavyTailed) for layer in self.layers):
            raise ValueError(
                "Expected a prior whose q is Gaussian in eps, layer by layer. Got one with components or random scales. Condition the "
                "model and use the posterior's log_importance, which knows them."
            )
        drawn, H, found = _Drawn(1), context.x.unsqueeze(0), []
        total = torch.zeros((1, context.num_tasks), dtype=self.dtype, device=to_compute(context.x, self.dtype).device)
        for i in range(num_layers):
            given = self._given(i, drawn)
            A, sites = self.problem(i, H, context, given)
            core = given.computed(self.dtype).core
            space = "weight" if canonical and core.rank <= CANONICAL_RANK else None
            q = condition(core, A, self._tempered(i, sites, context.counts), space)
            eps = pick(i, q)
            flat = eps.flatten(-2).unsqueeze(-2) if given.joint else eps
            total = total + q.log_ratio(flat)
            joint = self.layers[i].prior.joint or not given.joint
            found.append(flat if joint else flat.unflatten(-1, (given.d_out, -1)).squeeze(-3))
            drawn.eps.append(found[-1])
            H = self._next(i, H, given.weights(flat))
        return tuple(found), total

    def _is_wide(self, layer: AmortisedLinear, context: Context, beyond: Tensor, num_samples: int) -> bool:
        """Tell whether the draws of a layer need not be kept, and all together are too large, or would cost more than doing without."""
        rank, N = layer.prior.rank, context.x.shape[1]
        if layer.prior.joint or rank <= N:
            return False
        size = num_samples * context.num_tasks * layer.d_out * rank * torch.finfo(self.dtype).bits // 8
        one_problem = layer.shared_noise and layer.prior.by_column
        return size > WIDE_BYTES or (one_problem and rank >= max(WIDE_RANK, 2 * (N + beyond.shape[1])))

    def _carried(self, context: Context, beyond: Tensor, drawn: _Drawn, normal: Normal) -> tuple[Tensor, Tensor]:
        """Take context and further points through the hidden layers; return the last activations at both."""
        N, H = context.x.shape[1], torch.cat([context.x, beyond], dim=1).unsqueeze(0)
        for i, layer in enumerate(self.layers[:-1]):
            given = self._given(i, drawn)
            A, sites = self.problem(i, H[:, :, :N], context, given)
            sites = self._tempered(i, sites, context.counts)
            if not self._is_wide(layer, context, beyond, drawn.num_samples):
                H = self._next(i, H, drawn.take(layer.draw(given, A, sites, drawn.num_samples, normal, False, self.dtype)))
                continue
            core = given.computed(self.dtype).core
            scale = layer.draw_scale(partial(_evidence, core, A, sites), drawn.num_samples, normal)
            given, _ = drawn.scaled(given, A, scale)
            skip = self.architecture.skip(H, layer.d_out)
            out, kl = propagate(given, self.architecture.layer_input(H, i), sites, drawn.num_samples, normal, self.dtype)
            drawn.pass_by(kl)
            H = out if skip is None else out + skip
        return H[:, :, :N], H[:, :, N:]

    def _chain(self, context: Context, drawn: _Drawn, normal: Normal, canonical: bool, beyond: Tensor | None = None) -> Particles:
        """Draw the particles of one component, layer by layer."""
        H, hidden = context.x.unsqueeze(0), len(self.layers) - 1
        if beyond is not None and not canonical and self.likelihood.conjugate:
            if any(self._is_wide(layer, context, beyond, drawn.num_samples) for layer in self.layers[:-1]):
                H, at_beyond = self._carried(context, beyond, drawn, normal)
                drawn.known_at = (beyond, at_beyond)
        for i in range(hidden if drawn.known_at is not None else 0, hidden):
            given = self._given(i, drawn)
            A, sites = self.problem(i, H, context, given)
            sites = self._tempered(i, sites, context.counts)
            H = self._next(i, H, drawn.take(self.layers[i].draw(given, A, sites, drawn.num_samples, normal, canonical, self.dtype)))
        given = self._given(hidden, drawn)
        if not self.likelihood.conjugate:
            return self._drawn_last(drawn, given, *self.problem(hidden, H, context, given), normal, canonical)
        H = H.expand(drawn.num_samples, *H.shape[1:])
        A, sites = self.problem(hidden, H, context, given)
        core, output = given.computed(self.dtype).core, self.layers[-1]
        scale = output.draw_scale(lambda root: condition(core, A * root, sites).log_z, drawn.num_samples, normal)
        given, A = drawn.scaled(given, A, scale)
        last = condition(core, A, sites, "weight" if canonical and core.rank <= CANONICAL_RANK else None)
        if output.net is None:
            return self._with_last(drawn, given, last, None)
        own = self.problem(hidden, H, context, given, own=True)
        return self._with_last(drawn, given, last, site_sum(core, *own) if canonical else own)

    def streamed_particles(self, stream: Stream, num_samples: int, normal: Normal, canonical: bool = False) -> Particles:
        """Draw the particles that `particles` draws, from batches of points: memory independent of their number.

        It reads the data once for each layer (and once more where the last layer is drawn). Arguments as for `particles`.
        """
        if len(self.log_share) == 1:
            return self._streamed_chain(stream, _Drawn(num_samples), normal, canonical)
        parts = [self._streamed_chain(stream, drawn, normal, canonical) for drawn in self._of_components(num_samples)]
        return joined(parts, self.log_share)

    def _streamed_chain(self, stream: Stream, drawn: _Drawn, normal: Normal, canonical: bool) -> Particles:
        hidden = len(self.layers) - 1
        for i in range(hidden):
            layer, given = self.layers[i], self._given(i, drawn)
            if self._sums_serve(stream, i, canonical):
                drawn.take(self._draw_of_sums(stream, i, drawn, given, normal))
            else:
                A, sites = self._gathered(stream, i, drawn, given)
                drawn.take(layer.draw(given, A, sites, drawn.num_samples, normal, canonical, self.dtype))
        given = self._given(hidden, drawn)
        if not self.likelihood.conjugate:
            return self._streamed_drawn_last(stream, drawn, given, normal, canonical)
        core, output = given.computed(self.dtype).core, self.layers[-1]
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
        layer, core = self.layers[index], given.computed(self.dtype).core
        sums = self._streamed_sums(stream, index, drawn, given)[0]
        white = cache(lambda: sums.whiten(core))  # once for all scales, and never where there is none
        scale = layer.draw_scale(lambda root: white().scaled(root).condition(core).log_z, drawn.num_samples, normal)
        if scale is not None:
            given, sums = scale.of(given), drawn.expand(sums).scaled(scale.root)
        return LayerDraw.of(given, *draw_from_sums(core, sums, drawn.num_samples, normal), scale)

    def _sums_serve(self, stream: Stream, index: int, canonical: bool) -> bool:
        """Tell whether the draws of a layer are functions of sums over points; otherwise there are few points, and they are gathered."""
        layer = self.layers[index]
        return layer.in_weight_space(0, index == 0, canonical) or layer.in_weight_space(stream.shape[1], index == 0, canonical)

    def _next(self, index: int, H: Tensor, W: Tensor) -> Tensor:
        """Return the activations behind a layer."""
        skip = self.architecture.skip(H, self.layers[index].d_out)
        H = self.architecture.layer_input(H, index) @ W.mT
        return H if skip is None else H + skip

    def _with_last(self, drawn: _Drawn, given: Given, last: Conditional, seen: SiteSum | tuple[Tensor, Sites] | None) -> Particles:
        kl = drawn.kl.to(last.quad).expand(last.quad.shape)
        ratio = drawn.ratio if drawn.ratio is not None or drawn.weights else torch.zeros_like(kl)
        weights = tuple(drawn.weights) if drawn.known_at is None else ()
        at = drawn.known_at
        return Particles(self.architecture, weights, kl, given, self.likelihood, last, self.dtype, ratio, seen, known_at=at)

    def _drawn_last(self, drawn: _Drawn, given: Given, A: Tensor, sites: Sites, normal: Normal, canonical: bool) -> Particles:
        """Draw the last layer too, where the likelihood has no closed form."""
        output, redraw, core = self.layers[-1], None, given.computed(self.dtype).core
        if canonical:
            A, sites = drawn.spread(A, sites)
            scale = output.draw_scale(lambda root: condition(core, A * root, sites).log_z, drawn.num_samples, normal)
            given, A = drawn.scaled(given, A, scale)
            last = condition(core, A, sites, "weight" if core.rank <= CANONICAL_RANK else None)
            redraw = self._redrawn(drawn, given, last, normal)
        else:
            found = output.draw(given, A, sites, drawn.num_samples, normal, canonical, self.dtype)
            drawn.take(found)
        return self._all_drawn(drawn, given, redraw)

    def _all_drawn(self, drawn: _Drawn, given: Given, redraw: tuple[Conditional, Tensor] | None) -> Particles:
        weights, dtype = tuple(drawn.weights), self.dtype
        return Particles(self.architecture, weights, drawn.kl, given, self.likelihood, None, dtype, drawn.ratio, None, redraw)

    def _redrawn(self, drawn: _Drawn, given: Given, last: Conditional, normal: Normal) -> tuple[Conditional, Tensor]:
        z = normal((drawn.num_samples, *last.mean.shape[1:]))
        eps = last.draw(z)
        drawn.take(LayerDraw(given.weights(eps), eps, last.kl, last.log_ratio(eps)))
        return last, z

    def _streamed_drawn_last(self, stream: Stream, drawn: _Drawn, given: Given, normal: Normal, canonical: bool) -> Particles:
        index, output = len(self.layers) - 1, self.layers[-1]
        if not self._sums_serve(stream, index, canonical):
            particles = self._drawn_last(drawn, given, *self._gathered(stream, index, drawn, given), normal, canonical)
        else:
            core, sums = given.computed(self.dtype).core, drawn.expand(self._streamed_sums(stream, index, drawn, given)[0])
            white = cache(lambda: sums.whiten(core))
            scale = output.draw_scale(lambda root: white().scaled(root).condition(core).log_z, drawn.num_samples, normal)
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
            return tuple(t for own in ((False, True) if both else (False,)) for t in of(*self.problem(index, H, points, prior, own)))

        return part, (*drawn.weights, *given.tensors)

    def _streamed_sums(self, stream: Stream, index: int, drawn: _Drawn, given: Given, both: bool = False) -> list[PointSum]:
        """Return a layer's sums over the points of a stream, given the weights before it; see `_part`."""
        part, tensors = self._part(index, drawn, given, lambda A, sites: point_sum(A, sites).tensors, both)
        found = stream.sum(part, tensors, learned(self.layers[index], *([] if self.trunk is None else [self.trunk]), self.likelihood))
        sums = [PointSum(*found[i : i + 5]) for i in range(0, len(found), 5)]
        log_share = self.layers[index].log_temperature(stream.counts)
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
        if len(self.log_share) > 1 or any(layer.raw_kappa is not None for layer in self.layers):
            raise ValueError(
                "Expected a prior without components, and no temperature, with npvi: it follows one chain of layers and adds points to it. "
                "Got a model with one. Use objective='pp_avi'."
            )
        drawn, last, kl = _Drawn(num_samples), None, None
        for i, layer in enumerate(self.layers):
            given = self._given(i, drawn)
            core = given.computed(self.dtype).core
            both = [drawn.expand(self._streamed_sums(s, i, drawn, given)[0]).whiten(core) for s in (context, target)]
            scale, before_scale = layer.draw_scales(core, both, num_samples, normal)
            if scale is not None:
                given, both = scale.of(given), [one.scaled(scale.root[..., None, None, None]) for one in both]
                kl = before_scale if kl is None else kl + before_scale
            old, new = both
            before, q = old.condition(core), (old + new).condition(core)
            part = q.expected_log_lik_of(new) - (q.log_z - before.log_z)
            kl = part if kl is None else kl + part
            if i == len(self.layers) - 1 and self.likelihood.conjugate:
                last = q
                break
            eps = q.draw(normal(tuple(q.mean.shape)))
            drawn.take(LayerDraw(given.weights(eps), eps, torch.full_like(part, math.nan), None))
        assert kl is not None
        nothing = torch.full_like(kl, math.nan)  # the divergence from the prior is not computed here
        weights = tuple(drawn.weights)
        return Particles(self.architecture, weights, nothing, given, self.likelihood, last, self.dtype), kl


def _evidence(core: Factor, A: Tensor, sites: Sites, root: float) -> Tensor:
    return condition(core, A * root, sites).log_z


class _Drawn:
    """Gather what the draws of the layers give, for one component of the prior."""

    def __init__(self, num_samples: int, component: int = 0) -> None:
        self.num_samples, self.component = num_samples, component
        self.weights: list[Tensor] = []
        self.eps: list[Tensor] = []
        self.kl: Tensor = torch.zeros(())
        self.ratio: Tensor | None = None
        self.known = True
        self.known_at: tuple[Tensor, Tensor] | None = None

    def pass_by(self, kl: Tensor) -> None:
        """Take up the divergence of a layer whose weights are not kept."""
        self._add(kl.expand(self.num_samples, *kl.shape[1:]), None)

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
