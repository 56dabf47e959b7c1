"""The amortised posterior as an engine, and as a proposal for the engines and estimates that need one.

The network's own q(eps | data) is a chain of Gaussians, layer after layer, so it can be drawn from in one pass and its density is known. As
an engine it costs no gradient at all, and says how far it can be trusted: with log w = log p(y, eps) - log q(eps) of its draws,

    elbo = mean log w,        log evidence = log mean exp log w,

and the Pareto k of the weights. As a `Proposal` it serves importance sampling, bridge sampling and annealing, which are exact for any q.

References:
    Amortising inference and meta-learning priors in neural networks (Rochussen and Fortuin, 2026), arXiv 2602.08782.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bnnp.importance import effective_sample_size, log_mean_exp, psis, systematic
from bnnp.inference.engine import Draws, Engine, picked
from bnnp.inference.functional import Functional
from bnnp.inference.target import Target
from bnnp.networks import BNNP
from bnnp.particles import own_noise
from bnnp.priors import Mixture
from bnnp.seeds import check_count, seeded
from bnnp.structures import LayerPrior, Network

__all__ = ["Amortised", "State", "build", "init", "report", "sample", "update", "weighted"]

LANES = 64
"""How many particles are drawn at once."""

FARTHEST = 1e3
"""Beyond this size of an element of eps the density of a proposal counts as zero; its factorisations need not go there."""


class Amortised:
    """Be the amortised posterior of a model as a distribution of eps: a `Proposal` for a target with the model's prior.

    The target may have another likelihood than the model: q is then worse, and weights with its density are right all the same.

    Arguments:
        target: with a task axis; with `collapse`, q is that of the hidden layers.
        model: whose inference networks make q; later training does not reach it.

    Raises:
        TypeError: a target that is no functional, or a model that is no BNNP.
        ValueError: a target with another prior or scaling than the model's, a prior that is not Gaussian in eps.
    """

    def __init__(self, target: Functional, model: BNNP) -> None:
        if not isinstance(target, Functional):
            raise TypeError(f"Expected a functional, which holds data and prior. Got {type(target).__name__}.")
        if not isinstance(model, BNNP):
            raise TypeError(f"Expected model as a bnnp.BNNP. Got {type(model).__name__}.")
        self.target = target.batched
        own = copy.deepcopy(model).to(target.device, target.dtype).requires_grad_(False)
        self._check(own)
        self._model = own
        self._chain = dataclasses.replace(own.chain, dtype=target.dtype)
        self._num_layers = target.num_drawn
        self._shapes = [(1 if layer.joint else layer.d_out, layer.rank) for layer in target.layers[: target.num_drawn]]

    def _check(self, own: BNNP) -> None:
        priors, layers = list(own.prior), self.target.layers
        if any(isinstance(layer, Mixture) for layer in priors):
            raise ValueError(
                "Expected a model whose q is one chain of Gaussians. Got a prior with components. "
                "Use model.condition, whose posterior is of all."
            )
        same = len(priors) == len(layers) and all(_same_prior(a, b) for a, b in zip(priors, layers, strict=True))
        scalings = own.scaling.state_dict(), self.target.source.scaling.state_dict()
        if not same or any(not torch.allclose(a.double(), b.double()) for a, b in zip(*(s.values() for s in scalings), strict=True)):
            raise ValueError(
                "Expected a target with the prior and scaling of the model, since the model's posterior belongs to them. Got another prior "
                "(or a model that was trained after the target was made). Make the target with functional(model, x, y), without prior=."
            )

    @property
    def same_likelihood(self) -> bool:
        """Return whether the target has the likelihood of the model."""
        own, other = self._model.likelihood, self.target.likelihood
        if type(own) is not type(other):
            return False
        if own.conjugate:
            seen = self.target.scaled.observed
            return all(
                (a is None and b is None) or (a is not None and b is not None and torch.allclose(a, b))
                for a, b in zip(own_noise(own, seen), own_noise(other, seen), strict=True)
            )
        a, b = own.state_dict(), other.state_dict()
        return own.config().keys() == other.config().keys() and all(torch.allclose(a[key], b[key]) for key in a)

    @torch.no_grad()
    def drawn(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return n draws (n, T, dim), and log q - log p of them with shape (n, T)."""

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=self.target.dtype).to(self.target.device)

        eps, ratio = self._chain.draw_eps(self.target.scaled, n, normal, self._num_layers)
        if not eps:
            return ratio.new_zeros(n, self.target.num_tasks, 0), ratio.expand(n, -1)
        return torch.cat([z.flatten(-2) for z in eps], dim=-1), ratio

    def draw(self, n: int, seed: int) -> Tensor:
        """Return n draws with shape (n, T, dim)."""
        generator, left = seeded(seed, "amortised proposal"), check_count(n, "n")
        return torch.cat([self.drawn(min(LANES, left - i), generator)[0] for i in range(0, left, LANES)])

    def log_density(self, eps: Tensor) -> Tensor:
        """Return log q(eps) with shape (*S, T); -inf where eps is not finite or beyond 1000."""
        flat = eps.reshape(-1, *eps.shape[-2:])
        bad = ~(flat.abs() < FARTHEST).all(-1)
        flat = torch.where(bad.unsqueeze(-1), torch.zeros_like(flat), flat)
        parts, at = [], 0
        for rows, k in self._shapes:
            parts.append(flat[..., at : at + rows * k].unflatten(-1, (rows, k)))
            at += rows * k
        found = self.target.log_prior(flat) + self._chain.log_ratio(self.target.scaled, parts)
        return found.masked_fill(bad, -math.inf).reshape(eps.shape[:-1])


def _same_prior(a: LayerPrior, b: LayerPrior) -> bool:
    if type(a) is not type(b) or (a.d_out, a.p, a.rank) != (b.d_out, b.p, b.rank):
        return False
    of_a, of_b = a.given().tensors, b.given().tensors
    if isinstance(a, Network):
        of_a, of_b = (*of_a, a.dense()), (*of_b, b.dense())
    return all(s.shape == t.shape and torch.allclose(s, t) for s, t in zip(of_a, of_b, strict=True))


@dataclass(frozen=True, eq=False)
class State:
    """Hold the particles drawn so far.

    Arguments:
        eps: with shape (n, T, dim).
        log_weights: log p(y, eps) - log q(eps) with shape (n, T).
        gradients: none.
        generator: of the next particles.
    """

    eps: Tensor
    log_weights: Tensor
    gradients: int
    generator: torch.Generator


def build(target: Target, *, model: BNNP, num_particles: int = 256, importance: bool = False, start: Tensor | None = None) -> Engine:
    """Return the engine that draws from the amortised posterior of a model.

    Arguments:
        target: a functional with the model's prior and likelihood, collapsed or not.
        model: whose inference networks make the posterior.
        num_particles: how many draws are made and judged.
        importance: weigh the draws by their importance, smoothed (PSIS), or draw by it where other than `num_particles` are asked for.
        start: not for this engine, which starts from nothing.

    Raises:
        TypeError: a target that is no functional.
        ValueError: a target with another prior or likelihood than the model's, or a start.
    """
    if start is not None:
        raise ValueError("Expected no start: the amortised posterior is drawn from in one pass. Got one. Leave out start and warm_start.")
    if not isinstance(target, Functional):
        raise TypeError(f"Expected a functional, which holds data and prior. Got {type(target).__name__}. Use another engine.")
    proposal = Amortised(target, model)
    if not proposal.same_likelihood:
        raise ValueError(
            "Expected a target with the likelihood of the model: its posterior is that of its own noise. Got another. "
            "Use Amortised(target, model) as a proposal for smc or evidence, which are exact for any."
        )
    updates = -(-check_count(num_particles, "num_particles") // LANES)
    return Engine(
        name="amortised",
        target=proposal.target,
        num_updates=updates,
        init=partial(init, proposal),
        update=partial(update, proposal, num_particles),
        sample=partial(sample, importance),
        report=report,
    )


def init(proposal: Amortised, seed: int) -> State:
    """Return the state without any particle."""
    target = proposal.target
    nothing = torch.zeros(0, target.num_tasks, target.dim, dtype=target.dtype, device=target.device)
    return State(nothing, nothing.sum(-1), 0, seeded(seed, "amortised"))


@torch.no_grad()
def update(proposal: Amortised, num_particles: int, state: State) -> State:
    """Draw and weigh the next particles."""
    n = min(LANES, num_particles - len(state.eps))
    if n <= 0:
        return state
    eps, ratio = proposal.drawn(n, state.generator)
    # What cannot be computed has no density.
    log_weights = (proposal.target.log_likelihood(eps) - ratio).nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    return dataclasses.replace(state, eps=torch.cat([state.eps, eps]), log_weights=torch.cat([state.log_weights, log_weights]))


def sample(importance: bool, state: State, n: int, seed: int) -> Draws:
    """Return n draws: of q, or of the posterior by importance."""
    generator = seeded(seed, "amortised sample")
    if not importance:
        return Draws(picked(state.eps, n, generator))
    return weighted(state.eps, psis(state.log_weights)[0], n, generator)


def weighted(eps: Tensor, log_weights: Tensor, n: int, generator: torch.Generator) -> Draws:
    """Return weighted draws (K, T, dim) as they are where n = K, and otherwise n equal ones, drawn by their weights."""
    if n == len(eps):
        return Draws(eps, log_weights)
    index = systematic(log_weights.nan_to_num(nan=-math.inf).cpu(), n, generator)[torch.randperm(n, generator=generator)]
    return Draws(eps.gather(0, index.to(eps.device).unsqueeze(-1).expand(-1, -1, eps.shape[-1])))


def report(state: State) -> dict[str, Tensor]:
    """Return the bound, the evidence by importance sampling, and how far the weights can be trusted."""
    w = state.log_weights
    log_evidence, error = log_mean_exp(w)
    return {
        "elbo": w.mean(0),
        "elbo_se": w.std(0) / math.sqrt(len(w)),
        "log_evidence": log_evidence,
        "log_evidence_se": error,
        "pareto_k": psis(w)[1],
        "ess": effective_sample_size(w),
    }
