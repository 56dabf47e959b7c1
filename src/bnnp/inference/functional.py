"""A network under a prior, and data: one log-joint in whitened weights that any inference engine can take.

Every prior writes weights as w = mean + L eps. Flat eps, layer after layer and unit after unit, is standard normal a priori, whatever was
learned, so an engine needs no mass matrix for the prior, no bounds and no special cases. Everything is a pure function of eps with leading
axes of samples and tasks, differentiable, and works under `torch.func`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnnp.conjugate import condition, to_columns, whiten
from bnnp.factors import DenseFactor, DiagonalFactor, Factor, Given, JointFactor, Sites
from bnnp.importance import log_mean_exp
from bnnp.inference.rebound import rebound
from bnnp.inference.target import Target
from bnnp.likelihoods import Likelihood, noise_factor
from bnnp.linalg import cho_solve, cholesky, eigh, log_det, quiet_cholesky, solve_lower
from bnnp.networks import BNNP
from bnnp.particles import Architecture, Particles, own_noise
from bnnp.posterior import Posterior
from bnnp.predictive import Predictive
from bnnp.priors import HeavyTailed, Mixture, NetworkPrior, Prior, layer_priors
from bnnp.scaling import REFERENCE_SIZE, Reference, Standardiser
from bnnp.seeds import check_count, seeded
from bnnp.streaming import Reservoir
from bnnp.structures import LayerPrior, Network
from bnnp.tails import log_scale, normal_of_log_scale
from bnnp.tasks import Context, make_context

__all__ = ["Functional", "Source", "functional"]

ROUNDING = 1e-6
"""Of weights, as a share of the largest of a unit: what single precision leaves of sums of a hundred."""

PROBES = 5
"""At how many of a task's inputs functions are monitored."""


@dataclass(eq=False)
class Source:
    """Be what a posterior asks of the model that made it, where no inference network did."""

    scaling: Standardiser
    likelihood: Likelihood
    reference: Reference
    x_dim: int
    y_dim: int
    dtype: torch.dtype
    device: torch.device
    prior: NetworkPrior
    architecture: Architecture
    missing_outputs: bool

    def scale(self, context: Context) -> Context:
        """Return a context in the network's units."""
        return self.scaling.context(context, self.missing_outputs)

    def output_sites(self, context: Context, A: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return observations of y with the likelihood's own noise."""
        return context.y, *own_noise(self.likelihood, context.observed)

    def forward(self, context: Context, num_samples: int = 64, seed: int = 0, single: bool = False) -> Posterior:
        """Refuse: there is no pass that conditions afresh."""
        raise TypeError(
            "Expected a posterior of model.condition to refresh. Got draws of another inference engine, for which there is no one pass. "
            "Run the engine again on all points."
        )


class Functional(Target):
    """Be the joint density of data and whitened weights of T tasks: log p(y, eps) = log N(eps; 0, I) + log p(y | w(eps)).

    Make one with `functional`. Eps has shape (*S, T, dim), or (*S, dim) for one task that came without a task axis; densities are those of
    y in the user's units. With `collapse` the last layer is integrated out and eps holds what is before it.

    Arguments:
        source: scaling, likelihood and the rest of the network.
        layers: the layers' priors, frozen, in the precision of eps.
        context: the data in the user's units, padded, with a task axis.
        collapse: whether the last layer is integrated out.
        single: whether one task came without a task axis.
    """

    def __init__(
        self, source: Source, layers: Sequence[LayerPrior], context: Context, collapse: bool = False, single: bool = False
    ) -> None:
        self.source, self.layers, self.context = source, tuple(layers), context
        self.collapse, self.single = collapse, single
        self._scaled = source.scale(context)
        self._volume = source.scaling.volume(context).to(source.device, source.dtype)
        # Of each layer: where its eps begins, its rows, its columns. Behind the eps of a heavy-tailed layer stands the number of its scale.
        self._places: list[tuple[int, int, int]] = []
        self._dim = 0
        for i, layer in enumerate(self.layers):
            rows, k = (1 if layer.joint else layer.d_out, layer.rank) if i < self.num_drawn else (0, 0)
            self._places.append((self._dim, rows, k))
            self._dim += rows * k + isinstance(layer, HeavyTailed)
        with torch.no_grad():
            self._fixed = [None if isinstance(layer, Network) else self._whole(i, layer.given()) for i, layer in enumerate(self.layers)]
        self._noise = own_noise(source.likelihood, self._scaled.observed) if collapse else None
        every = torch.linspace(0, max(self._scaled.x.shape[1] - 1, 0), PROBES).round().long()
        self._probes = self._scaled.x[:, every] if self._scaled.x.shape[1] else self._scaled.x.new_zeros(len(context.x), 1, source.x_dim)

    def __repr__(self) -> str:
        """Name it."""
        return f"Functional(dim={self.dim}, tasks={self.num_tasks}, collapse={self.collapse})"

    @property
    def places(self) -> tuple[tuple[int, int, int], ...]:
        """Return where each layer's eps begins, its rows and its columns; the number of a heavy-tailed layer's scale stands behind them."""
        return tuple(self._places)

    @property
    def num_drawn(self) -> int:
        """Return the number of layers whose weights eps holds."""
        return len(self.layers) - self.collapse

    @property
    def dim(self) -> int:
        """Return the number of elements of eps."""
        return self._dim

    @property
    def num_tasks(self) -> int:
        """Return the number of tasks T."""
        return self.context.num_tasks

    @property
    def counts(self) -> Tensor:
        """Return the number of observed points of each task, with shape (T,), or a scalar for a single task."""
        return self.context.counts.squeeze(-1) if self.single else self.context.counts

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of eps."""
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        """Return where eps is."""
        return self.source.device

    @property
    def likelihood(self) -> Likelihood:
        """Return the likelihood: from f to y, in the network's units."""
        return self.source.likelihood

    @property
    def scaled(self) -> Context:
        """Return the data in the network's units, with a task axis."""
        return self._scaled

    @property
    def batched(self) -> Functional:
        """Return the same with a task axis: what engines work on."""
        return Functional(self.source, self.layers, self.context, self.collapse) if self.single else self

    def task(self, index: int) -> Functional:
        """Return one of the tasks on its own, counted from 0.

        Raises:
            ValueError: there is no such task.
        """
        if not 0 <= index < self.num_tasks:
            raise ValueError(f"Expected the number of a task from 0 to {self.num_tasks - 1}. Got {index}.")
        c, at = self.context, slice(index, index + 1)
        one = Context(c.x[at], c.y[at], c.mask[at], None if c.seen is None else c.seen[at])
        return Functional(self.source, self.layers, one, self.collapse, single=True)

    def on(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Functional:
        """Return the same network on other data of the same kind, unchecked, so that it may be called under `torch.func.vmap`.

        Arguments:
            x: inputs with shape (n, d_x), or (T, N, d_x), in the user's units.
            y: outputs likewise.
            mask: True = observed, with shape (n,) or (T, N).
        """
        single = x.ndim == 2
        mask = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        x, y, mask = (t.unsqueeze(0) if single else t for t in (x, y, mask))
        return Functional(self.source, self.layers, Context(x, y, mask), self.collapse, single)

    # --- weights -------------------------------------------------------------------------------------------------

    def _in(self, eps: Tensor) -> Tensor:
        """Return eps with a task axis; one of another size, such as that of a functional with all layers, would be read in part."""
        if eps.shape[-1:] != (self.dim,):
            raise ValueError(f"Expected eps with {self.dim} elements along its last axis, as {self!r} has. Got shape {tuple(eps.shape)}.")
        return eps.unsqueeze(-2) if self.single else eps

    def _out(self, value: Tensor) -> Tensor:
        return value.squeeze(-1) if self.single else value

    def _whole(self, index: int, given: Given) -> Given:
        """Return a layer's prior, of all units together where observations of y see mixed units or correlated noise."""
        if not self.collapse or index < len(self.layers) - 1:
            return given
        correlated = self.layers[index].d_out > 1 and noise_factor(self.likelihood) is not None
        return given.together() if correlated or given.mix is not None else given

    def _given(self, index: int, eps: Tensor, before: Sequence[Tensor]) -> Given:
        """Return a layer's prior given the eps before it, and its scale where that is a part of eps."""
        layer, fixed = self.layers[index], self._fixed[index]
        given = self._whole(index, layer.given(before)) if fixed is None else fixed
        if not isinstance(layer, HeavyTailed):
            return given
        at, rows, k = self._places[index]
        return dataclasses.replace(given, scale=(0.5 * log_scale(eps[..., at + rows * k], layer.dof)).exp())

    def _drawn(self, eps: Tensor) -> tuple[tuple[Tensor, ...], Given]:
        """Return the weights of the layers in eps, and the prior of the last layer of the network given these."""
        parts: list[Tensor] = []
        weights: list[Tensor] = []
        given = None
        for i, (at, rows, k) in enumerate(self._places):
            given = self._given(i, eps, parts)
            if i < self.num_drawn:
                parts.append(eps[..., at : at + rows * k].unflatten(-1, (rows, k)))
                weights.append(given.weights(parts[-1]))
        assert given is not None
        return tuple(weights), given

    def weights(self, eps: Tensor) -> tuple[Tensor, ...]:
        """Return the weights of the layers in eps, each with shape (*S, T, d_l, p_l), bias last, in the network's units."""
        drawn, _ = self._drawn(self._in(eps))
        return tuple(W.squeeze(-3) for W in drawn) if self.single else drawn

    def eps(self, weights: Sequence[Tensor]) -> Tensor:
        """Return eps (*S, T, dim) with `weights(eps)` equal to these weights: its inverse.

        Where eps has more elements than there are weights (`low_rank`), the one most probable a priori; the scale of a heavy-tailed layer
        is its posterior mean given the weights.

        Arguments:
            weights: of the layers in eps, each with shape (*S, T, d_l, p_l); a collapsed last layer may be there and is left out.

        Raises:
            ValueError: weights of fewer layers.
        """
        if len(weights) < self.num_drawn:
            raise ValueError(f"Expected weights of {self.num_drawn} layers. Got {len(weights)}.")
        found: list[Tensor] = []
        parts: list[Tensor] = []
        axis = -3
        for i, W in zip(range(self.num_drawn), weights, strict=False):
            W = (W.unsqueeze(axis) if self.single else W).to(self.device, self.dtype)
            layer, fixed = self.layers[i], self._fixed[i]
            given = layer.given(parts) if fixed is None else fixed
            z = _whitened(given, W)
            if isinstance(layer, HeavyTailed):
                size, half = z.shape[-1] * z.shape[-2], layer.dof / 2
                log_tau = ((half - 1 + 0.5 * z.square().sum((-2, -1))) / (half + size / 2 - 1)).log()
                level = normal_of_log_scale(log_tau, layer.dof)
                z = z * (-0.5 * log_scale(level, layer.dof)).exp()[..., None, None]
            parts.append(z)
            found.append(z.flatten(-2))
            found += [level.unsqueeze(-1)] if isinstance(layer, HeavyTailed) else []
        last = self.layers[-1]
        if self.collapse and isinstance(last, HeavyTailed):
            found.append(
                torch.zeros_like(found[-1][..., :1]) if found else torch.zeros(self.num_tasks, 1, dtype=self.dtype, device=self.device)
            )
        eps = torch.cat(found, dim=-1)
        return eps.squeeze(-2) if self.single else eps

    # --- densities -----------------------------------------------------------------------------------------------

    def outputs(self, eps: Tensor, x: Tensor | None = None) -> Tensor:
        """Return f with shape (*S, T, M, f_dim) at x (T, M, d_x), or (M, d_x) of one task, both in the network's units.

        Arguments:
            eps: with shape (*S, T, dim).
            x: inputs; those of the data where not given.
        """
        if self.collapse:
            raise ValueError("Expected a functional that holds all layers. Got one without the last, which is integrated out: use predict.")
        at = self._scaled.x if x is None else x.unsqueeze(0) if self.single else x
        f = self.source.architecture.hidden(at, self._drawn(self._in(eps))[0])
        return f.squeeze(-3) if self.single else f

    def log_prior(self, eps: Tensor) -> Tensor:
        """Return log N(eps; 0, I) with shape (*S, T)."""
        return super().log_prior(eps)

    def log_likelihood(self, eps: Tensor, batch: Tensor | None = None) -> Tensor:
        """Return log p(y | eps) with shape (*S, T), summed over points, in the user's units.

        Arguments:
            eps: with shape (*S, T, dim).
            batch: numbers of points with shape (T, b), or (b,) of one task: then the sum over these only.

        Raises:
            ValueError: a batch where the last layer is integrated out: that couples the points.
        """
        eps = self._in(eps)
        if self.collapse:
            if batch is not None:
                raise ValueError(
                    "Expected all points at once. Got a batch: with collapse=True points depend on each other. Use collapse=False."
                )
            return self._out(self._log_evidence(*self.problem(eps)[:2]) - self._volume)
        points, volume = self._scaled, self._volume
        if batch is not None:
            points = self._picked(self._scaled, batch)
            volume = self.source.scaling.volume(points).to(volume)
        f = self.source.architecture.hidden(points.x, self._drawn(eps)[0])
        each = self.likelihood.log_prob(f, points.y, points.observed).sum(-1)
        return self._out(each - volume)

    def _picked(self, points: Context, batch: Tensor) -> Context:
        at = batch.reshape(1, -1, 1) if self.single else batch.unsqueeze(-1)
        x, y = (t.gather(1, at.expand(len(t), -1, t.shape[-1])) for t in (points.x, points.y))
        seen = None if points.seen is None else points.seen.gather(1, at.expand(len(y), -1, y.shape[-1]))
        return Context(x, y, points.mask.gather(1, at.squeeze(-1).expand(len(x), -1)), seen)

    def batch_counts(self, batch: Tensor) -> Tensor:
        """Return how many of the points of a batch were observed, with shape (T,)."""
        return self._out(self._picked(self._scaled, batch).counts)

    def draw_batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Return numbers of `size` points of each task, drawn without replacement from those observed, with shape (T, size) or (size,)."""
        key = torch.rand(self.context.mask.shape, generator=generator).to(self.device).masked_fill(~self.context.mask, 2.0)
        batch = key.argsort(-1)[:, : check_count(size, "size")]
        return batch.squeeze(0) if self.single else batch

    def problem(self, eps: Tensor) -> tuple[Given, tuple[Tensor, Sites], tuple[Tensor, ...]]:
        """Return the last layer's prior and problem given the layers before it, and their weights."""
        assert self._noise is not None
        weights, given = self._drawn(eps)
        root, rotate = self._noise
        H = self.source.architecture.hidden(self._scaled.x, weights)
        H = H.expand(*eps.shape[:-1], *H.shape[-2:])
        A, y = self.source.architecture.layer_input(H, len(weights)), self._scaled.y
        skip = self.source.architecture.skip(H, given.d_out)
        return given, given.problem(A, given.sites(A, y if skip is None else y - skip, root), rotate), weights

    @staticmethod
    def _log_evidence(given: Given, problem: tuple[Tensor, Sites]) -> Tensor:
        """Return log N(y; A mean, A L L^T A^T + noise), NaN where it cannot be computed: a sampler may ask anywhere."""
        core, (A, sites) = given.core, problem
        blocks, columns = sites.columns(core)
        B, r = whiten(core, A, sites.root_prec), to_columns(sites.resid * sites.root_prec, blocks)
        N, k = B.shape[-2:]
        eye = torch.eye(min(N, k), dtype=B.dtype, device=B.device)
        if N < k:
            R = quiet_cholesky(eye + B @ B.mT)
            quad = solve_lower(R, r).square().sum((-3, -2, -1))
        else:
            R = quiet_cholesky(eye + B.mT @ B)
            quad = r.square().sum((-3, -2, -1)) - solve_lower(R, B.mT @ r).square().sum((-3, -2, -1))
        seen, times = sites.root_prec > 0, sites.resid.shape[-1] // sites.root_prec.shape[-1]
        log_prec = 2.0 * torch.where(seen, sites.root_prec, torch.ones_like(sites.root_prec)).log().sum((-2, -1))
        count = seen.sum((-2, -1)).to(log_prec)
        return 0.5 * (times * (log_prec - count * math.log(2 * math.pi)) - columns * log_det(R).sum(-1) - quad)

    # --- draws ---------------------------------------------------------------------------------------------------

    def monitor(self, eps: Tensor) -> Tensor:
        """Return what tells whether chains have mixed, with shape (*S, T, q): f at five inputs and |eps|^2."""
        eps = self._in(eps)
        weights, given = self._drawn(eps)
        if self.collapse:
            given, (A, sites), _ = self.problem(eps)
            last = condition(given.core, A, sites)
            H = self.source.architecture.hidden(self._probes, weights)
            at = self.source.architecture.layer_input(H.expand(*eps.shape[:-1], *H.shape[-2:]), len(weights))
            f = at @ given.weights(last.mean).mT
            skip = self.source.architecture.skip(H, given.d_out)
            f = f if skip is None else f + skip
        else:
            f = self.source.architecture.hidden(self._probes, weights)
        found = torch.cat([f.flatten(-2), eps.square().sum(-1, keepdim=True)], dim=-1)
        return found.squeeze(-2) if self.single else found

    @torch.no_grad()
    def posterior(self, eps: Tensor, log_weights: Tensor | None = None) -> Posterior:
        """Return draws of eps as a posterior that predicts, is sampled and takes updates as every other.

        Its `update` weighs the draws by how well they predict new points. It has no `elbo`: the draws are of no known q.

        Arguments:
            eps: S draws with shape (S, T, dim), or (S, dim) of one task; all finite.
            log_weights: of the draws, with shape (S, T) or (S,); equal where not given. One of -inf takes a draw out.

        Raises:
            ValueError: another shape, draws that are not finite, or weights that are no numbers or all zero.
        """
        want = (self.dim,) if self.single else (self.num_tasks, self.dim)
        if eps.ndim != len(want) + 1 or tuple(eps.shape[1:]) != want or not len(eps):
            raise ValueError(f"Expected draws of eps with shape (samples, {', '.join(map(str, want))}). Got {tuple(eps.shape)}.")
        if not bool(eps.isfinite().all()):
            raise ValueError("Expected finite draws of eps. Got NaN or infinite ones. Look at the engine's report for divergences.")
        eps = self._in(eps.to(self.device, self.dtype))
        S, T = eps.shape[:2]
        nothing = torch.full((S, T), math.nan, dtype=self.dtype, device=self.device)
        if self.collapse:
            given, (A, sites), weights = self.problem(eps)
            last, log_lik = condition(given.core, A, sites), None
        else:
            weights, given = self._drawn(eps)
            last, log_lik = None, self.batched.log_likelihood(eps) + self._volume
        parts = self.source.architecture, weights, nothing, given, self.likelihood, last, self.dtype
        gained = torch.zeros_like(nothing)
        if log_weights is not None:
            gained = self._weighed(log_weights, S).to(nothing)
            gained = gained - log_mean_exp(gained)[0]
        sample = Reservoir.of(self.context, REFERENCE_SIZE, seeded(0, "sample"))
        return Posterior(
            Particles(*parts, log_lik=log_lik),
            self.source,
            self.context.counts,
            self.single,
            0,
            (self.context,) if self.collapse else None,
            sample,
            gained,
            torch.zeros_like(nothing[0]),
            volume=self._volume,
        )

    def _weighed(self, log_weights: Tensor, S: int) -> Tensor:
        want = (S,) if self.single else (S, self.num_tasks)
        if tuple(log_weights.shape) != want:
            raise ValueError(f"Expected log_weights with shape {want}, one for each draw. Got {tuple(log_weights.shape)}.")
        if not bool((log_weights < math.inf).all()) or not bool(log_weights.isfinite().any(0).all()):
            raise ValueError("Expected log_weights below infinity, and some of each task finite. Got NaN, infinity, or -inf of all draws.")
        return log_weights.unsqueeze(-1) if self.single else log_weights

    def predict(self, eps: Tensor, x: Any, log_weights: Tensor | None = None) -> Predictive:
        """Return the predictive distribution at x, in the user's units, of draws of eps; see `posterior`."""
        return self.posterior(eps, log_weights).predict(x)

    def start(self, posterior: Posterior, n: int, seed: int = 0) -> Tensor:
        """Return eps of n draws of a posterior of the same tasks, with shape (n, T, dim) or (n, dim): where an engine may start.

        Raises:
            ValueError: a posterior of other tasks or of another network.
        """
        if posterior.num_tasks != self.num_tasks:
            raise ValueError(f"Expected a posterior of {self.num_tasks} task(s), as the functional has. Got one of {posterior.num_tasks}.")
        weights = posterior.draws(check_count(n, "n"), seeded(seed, "start"))
        want = [(layer.d_out, layer.p) for layer in self.layers]
        if [tuple(W.shape[-2:]) for W in weights] != want:
            raise ValueError(f"Expected weights with shapes {want}. Got {[tuple(W.shape[-2:]) for W in weights]}: another network.")
        found = self.batched.eps(weights)
        return found.squeeze(-2) if self.single else found


def _whitened(given: Given, W: Tensor) -> Tensor:
    """Return z (..., rows, k) with given.weights(z) = W, at scale 1; the smallest where there are many."""
    resid = (W if given.mix is None else solve_lower(given.mix, W)) - given.mean
    factor = given.factor
    if isinstance(factor, JointFactor):
        return solve_lower(factor.L.flatten(0, 1), resid.flatten(-2).unsqueeze(-1)).mT
    if isinstance(factor, DiagonalFactor):
        return resid / factor.s
    if isinstance(factor, DenseFactor):
        return _solved(factor, resid)
    dense = _dense(factor)
    v = cho_solve(cholesky(dense @ dense.mT), resid.unsqueeze(-1)).squeeze(-1)
    return torch.einsum("...upk,...up->...uk", dense, v)


def _solved(factor: DenseFactor, resid: Tensor) -> Tensor:
    """Return L^{-1} resid of each unit, L lower triangular; of all that give resid to rounding the smallest, where L is nearly singular.

    A learned prior may leave some directions no width. There L^{-1} makes rounding errors of weights, which may have come in single
    precision, as large as one likes, and nothing is known of eps but that it is N(0, 1).
    """
    if factor.blocks == 1:
        exact = solve_lower(factor.L.squeeze(-3), resid.mT).mT
    else:
        exact = solve_lower(factor.L, resid.unsqueeze(-1)).squeeze(-1)
    # L^T (L L^T + width^2 I)^{-1} resid, with a width for each resid: one decomposition of L serves all.
    L, r = factor.L.double(), resid.double()
    width = ROUNDING * torch.maximum(L.abs().amax((-2, -1)).unsqueeze(-1), r.abs().amax(-1, keepdim=True))
    values, vectors = eigh(L @ L.mT)
    along = _by_unit(r, vectors) / (values.clamp(min=0.0) + width.square())
    small = _by_unit(along, vectors.mT @ L).to(exact)
    rough = exact.square().sum(-1, keepdim=True) > 4 * small.square().sum(-1, keepdim=True) + exact.shape[-1]
    return torch.where(rough, small, exact)


def _by_unit(v: Tensor, M: Tensor) -> Tensor:
    """Return v_u^T M_u with shape (..., d, k) for v (..., d, p) and M (U, p, k), U = d or 1."""
    return v @ M.squeeze(-3) if M.shape[-3] == 1 else torch.einsum("...up,upk->...uk", v, M)


def _dense(factor: Factor) -> Tensor:
    """Return L of each unit, or of all, with shape (U, p, k)."""
    p = factor.tensors[0].shape[-1]
    return factor.project(torch.eye(p).to(factor.tensors[0])).movedim(-2, -3)


def functional(
    model: BNNP,
    x: Any,
    y: Any,
    mask: Any = None,
    *,
    prior: str | Prior | BNNP | NetworkPrior | None = None,
    likelihood: Likelihood | None = None,
    collapse: bool = False,
    component: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Functional:
    """Return the joint density of data and the whitened weights of a model's network, for any inference engine.

    log p(y, eps) = log N(eps; 0, I) + sum_n log p(y_n | f(x_n; mean + L eps)), with the model's learned prior or another.

    Arguments:
        model: gives architecture, scaling, likelihood, and the prior where no other is given. Its inference networks are not used.
        x: inputs with shape (n, d_x) of one task, or (T, N, d_x) of many, in the user's units, or a list of arrays.
        y: outputs likewise.
        mask: True = observed.
        prior: None for the model's own; a name or a `Prior` for that prior as it starts, not learned ("diagonal" is N(0, 1/p)); or another
            model, or its `prior`, to take that one.
        likelihood: another one than the model's own, such as `Gaussian(0.05, learn_noise=False)`, with a noise that is given: none is
            learned here.
        collapse: integrate the last layer out exactly, for Gaussian likelihoods: eps is smaller and its posterior far easier.
        component: which component of a prior that is a mixture; the evidence of the components and their shares give the whole.
        dtype: precision of eps and of everything computed.

    Returns:
        A `Functional` that no longer depends on the model.

    Raises:
        ValueError: shapes that do not fit, a prior of another network, a likelihood with parameters to learn, a mixture without a
            component, or `collapse` without a closed form.

    Example:
        >>> F = functional(BNNP(1, 1, hidden=(8,)), [[0.0], [1.0]], [[0.1], [0.2]])
        >>> F.dim, F.log_joint(torch.zeros(3, F.dim, dtype=F.dtype)).shape
        (25, torch.Size([3]))
    """
    if not isinstance(model, BNNP):
        raise TypeError(f"Expected model as a bnnp.BNNP. Got {type(model).__name__}.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Expected dtype as torch.float64 or torch.float32. Got {dtype}.")
    own = copy.deepcopy(model).to(dtype).requires_grad_(False)
    bound = own.likelihood if likelihood is None or likelihood is model.likelihood else rebound(likelihood, own, dtype)
    layers = _layers(own, prior, bound, component, dtype)
    if not isinstance(collapse, bool):
        raise TypeError(f"Expected collapse as True or False. Got {collapse!r}.")
    if collapse and not bound.conjugate:
        raise ValueError(
            f"Expected a Gaussian likelihood for collapse=True. Got {type(bound).__name__}, with which the last layer has no closed form. "
            "Use collapse=False."
        )
    context, single = make_context(x, y, mask, x_dim=own.x_dim, y_dim=own.y_dim, dtype=dtype, device=own.device)
    bound.check(context.values)
    source = Source(
        own.scaling,
        bound,
        own.reference,
        own.x_dim,
        own.y_dim,
        dtype,
        own.device,
        NetworkPrior(layers),
        own.architecture,
        own.missing_outputs,
    )
    return Functional(source, layers, context, collapse, single)


def _layers(
    model: BNNP, prior: str | Prior | BNNP | NetworkPrior | None, likelihood: Likelihood, component: int | None, dtype: torch.dtype
) -> list[LayerPrior]:
    """Return the layers' priors, of the component where there are several."""
    own = list(model.prior)
    if isinstance(prior, str | Prior):
        widths = (model.x_dim, *(layer.d_out for layer in own))
        layers = layer_priors(widths, Prior(prior) if isinstance(prior, str) else prior, seeded(0, "prior"))
    elif prior is None:
        layers = own
    elif isinstance(prior, BNNP | NetworkPrior):
        layers = list(prior.prior if isinstance(prior, BNNP) else prior)
    else:
        raise TypeError(f"Expected prior as None, a name, a bnnp.Prior, a model or its prior. Got {type(prior).__name__}.")
    shapes = [[(layer.d_out, layer.p) for layer in some] for some in (own, layers)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"Expected a prior of weights with shapes {shapes[0]}, as the model has. Got {shapes[1]}.")
    # Copied together: layers of a network-wide prior know those before them.
    layers = [layer.to(model.device, dtype).requires_grad_(False) for layer in copy.deepcopy(layers)]
    first = layers[0]
    if isinstance(first, Mixture):
        K = len(first.parts)
        if component is None or not 0 <= component < K:
            raise ValueError(
                f"Expected component= from 0 to {K - 1}, since the prior is a mixture and eps belongs to one component. Got {component}. "
                "The evidence of the components, weighted by model.prior.log_share, gives that of the mixture."
            )
        return [layer.parts[component] for layer in layers if isinstance(layer, Mixture)]
    if component is not None:
        raise ValueError(f"Expected no component: the prior is no mixture. Got component={component}.")
    return layers
