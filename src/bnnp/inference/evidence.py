"""Estimates of the evidence log p(y) of each task, each with an error, by roads that share little: so that they can be held together.

    importance:  mean of p(y, eps) / q(eps) over draws of q; right where q covers the posterior, and its Pareto k says whether it does.
    tempered:    product of mean weights along a path of temperatures, from the prior or a proposal; see `bnnp.inference.smc`.
    annealed:    the same with fixed temperatures and without resampling.
    bridge:      E_q[p a] / E_p[q a] with the best a, from draws of both; needs overlap, not cover.

A `Proposal` is anything with `draw` and `log_density`: the amortised posterior (`Amortised`), a `Gaussian` fitted to draws, a variational
posterior. Where several agree there is reason to believe them; `agree` says by how many standard errors they differ. All are of log p(y) in
nats, in the user's units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnnp.importance import log_mean_exp, psis
from bnnp.inference import smc
from bnnp.inference.engine import Draws
from bnnp.inference.functional import Functional
from bnnp.inference.proposals import Gaussian, Proposal
from bnnp.inference.target import Target
from bnnp.seeds import check_count, seeded

__all__ = ["Evidence", "agree", "annealed", "bridge", "importance", "tempered"]

LANES = 256
"""How many draws are looked at at once."""

ROUNDS = 1000


@dataclass(frozen=True, eq=False)
class Evidence:
    """Hold an estimate of log p(y) of each task.

    Arguments:
        log_evidence: with shape (T,).
        standard_error: with shape (T,); not to be believed where the other numbers say that the estimate is not to be trusted.
        method: how it was made.
        pareto_k: shape of the weights' tail with shape (T,), for importance sampling: above 0.7 the estimate is too small by an unknown
            amount.
        overlap: for bridge sampling, how much of one distribution the other covers, between 0 and 1, with shape (T,): below 0.05 the
            estimate rests on few draws.
        log_bennett: for tempering with resampling, the second estimate, by Bennett's ratio, with shape (T,).
    """

    log_evidence: Tensor
    standard_error: Tensor
    method: str
    pareto_k: Tensor | None = None
    overlap: Tensor | None = None
    log_bennett: Tensor | None = None

    @property
    def trusted(self) -> Tensor:
        """Return where nothing speaks against the estimate, with shape (T,): its error below 1, k below 0.7, overlap above 0.05."""
        good = self.standard_error.isfinite() & (self.standard_error < 1.0)
        if self.pareto_k is not None:
            good = good & (self.pareto_k < 0.7)
        return good if self.overlap is None else good & (self.overlap > 0.05)


def _batched(target: Target) -> Target:
    return target.batched if isinstance(target, Functional) else target


@torch.no_grad()
def _ratio(target: Target, proposal: Proposal, eps: Tensor) -> Tensor:
    """Return log p(y, eps) - log q(eps) with shape (n, T), -inf where it cannot be computed."""
    parts = [target.log_joint(e) - proposal.log_density(e) for e in eps.split(LANES)]
    return torch.cat(parts).nan_to_num(nan=-math.inf, neginf=-math.inf)


def importance(target: Target, proposal: Proposal, n: int = 2000, seed: int = 0) -> Evidence:
    """Estimate log p(y) = log E_q[p(y, eps) / q(eps)].

    Arguments:
        target: of any kind.
        proposal: q.
        n: number of draws.
        seed: of the draws.

    References:
        Pareto smoothed importance sampling (Vehtari, Simpson, Gelman, Yao and Gabry, 2024).
    """
    target = _batched(target)
    log_weights = _ratio(target, proposal, proposal.draw(check_count(n, "n"), seed))
    log_evidence, error = log_mean_exp(log_weights)
    return Evidence(log_evidence, error, "importance", pareto_k=psis(log_weights)[1])


def tempered(target: Target, proposal: Proposal | None = None, seed: int = 0, **settings: Any) -> Evidence:
    """Estimate log p(y) by sequential Monte Carlo from the prior, or from a proposal.

    Arguments:
        target: of any kind.
        proposal: the base; the prior where None.
        seed: of everything random.
        settings: of `bnnp.inference.smc.build`.

    References:
        Sequential Monte Carlo samplers (Del Moral, Doucet and Jasra, 2006).
    """
    engine = smc.build(_batched(target), proposal=proposal, **settings)
    state = engine.init(seed)
    for _ in range(engine.num_updates):
        state = engine.update(state)
    found = engine.report(state)
    bennett = found["log_evidence_bar"] if engine.name == "smc" else None
    return Evidence(found["log_evidence"], found["log_evidence_se"], engine.name, log_bennett=bennett)


def annealed(
    target: Target, proposal: Proposal | None = None, temperatures: int | Sequence[float] = 100, seed: int = 0, **settings: Any
) -> Evidence:
    """Estimate log p(y) by annealed importance sampling: fixed temperatures, no resampling. Arguments as for `tempered`.

    References:
        Annealed importance sampling (Neal, 2001).
    """
    return tempered(target, proposal, seed, temperatures=temperatures, resample=False, **settings)


def bridge(
    target: Target,
    draws: Draws | Tensor,
    proposal: Proposal | None = None,
    effective: Tensor | float | None = None,
    n: int | None = None,
    seed: int = 0,
) -> Evidence:
    """Estimate log p(y) from draws of the posterior and of a proposal, by the best bridge between them.

    r = E_q[p / (s1 p + s2 r q)] / E_p[q / (s1 p + s2 r q)] has the evidence as its fixed point, s1 and s2 the shares of effective draws.
    Without a proposal a Gaussian is fitted to half of the draws and the bridge is made with the other half. The squared error is that of
    two independent means, of the posterior's draws by their effective number.

    Arguments:
        target: of any kind.
        draws: of the posterior with shape (n, T, dim), of any engine; weighted ones are drawn from first.
        proposal: q; independent of the draws.
        effective: how many independent draws they are worth, with shape (T,), such as `report["ess_bulk"]`; all where None.
        n: number of draws of the proposal; as many as of the posterior where None.
        seed: of the proposal's draws.

    Raises:
        ValueError: fewer than four draws, or draws of another shape.

    References:
        Simulating ratios of normalizing constants via a simple identity (Meng and Wong, 1996).
        Estimating mixture and Markov switching models (Fruehwirth-Schnatter, 2004), for the error.
    """
    target = _batched(target)
    eps = _equal(draws, seed)
    if eps.ndim != 3 or len(eps) < 4 or eps.shape[1:] != (target.num_tasks, target.dim):
        raise ValueError(
            f"Expected at least four draws with shape (n, {target.num_tasks}, {target.dim}). Got shape {tuple(eps.shape)}. "
            "Use the draws of a run: run(...).draws."
        )
    kept = torch.full((target.num_tasks,), float(len(eps))) if effective is None else torch.as_tensor(effective).expand(target.num_tasks)
    kept = kept.to(eps).clamp(min=1.0, max=float(len(eps)))
    if proposal is None:
        half = len(eps) // 2
        proposal, eps, kept = Gaussian.fitted(eps[:half]), eps[half:], kept * (len(eps) - half) / len(eps)
    count = len(eps) if n is None else check_count(n, "n")
    at_p, at_q = _ratio(target, proposal, eps), _ratio(target, proposal, proposal.draw(count, seed))
    return _bridged(at_p, at_q, kept)


def _equal(draws: Draws | Tensor, seed: int) -> Tensor:
    """Return draws that count equally, in an order that halves them at random."""
    eps = draws if isinstance(draws, Tensor) else draws.eps
    if isinstance(draws, Draws) and draws.log_weights is not None:
        u = torch.rand(draws.log_weights.shape, generator=seeded(seed, "bridge draws"), dtype=torch.float64).to(eps)
        edges = draws.log_weights.softmax(0).mT.cumsum(-1).contiguous()
        index = torch.searchsorted(edges, (u * edges[:, -1]).mT.contiguous()).clamp(max=len(eps) - 1).mT
        return eps.gather(0, index.unsqueeze(-1).expand_as(eps))
    return eps


def _bridged(at_p: Tensor, at_q: Tensor, effective: Tensor) -> Evidence:
    """Return the fixed point of the bridge from log p(y, eps) - log q(eps) at draws of both, (n1, T) and (n2, T)."""
    log_s1, log_s2 = (effective / (effective + len(at_q))).log(), (len(at_q) / (effective + len(at_q))).log()

    def sides(r: Tensor) -> tuple[Tensor, Tensor]:
        """With l = p / q: log of l / (s1 l + s2 r) at draws of q, and of 1 / (s1 l + s2 r) at draws of p."""
        return -torch.logaddexp(log_s1.expand_as(at_q), log_s2 + r - at_q), -torch.logaddexp(log_s1 + at_p, (log_s2 + r).expand_as(at_p))

    r = at_p.median(0).values
    for _ in range(ROUNDS):
        top, bottom = sides(r)
        new = log_mean_exp(top)[0] - log_mean_exp(bottom)[0]
        done, r = bool(((new - r).abs() < 1e-10 * (1 + new.abs())).all()), new
        if done:
            break
    top, bottom = sides(r)
    squared = _relative(top) / len(at_q) + _relative(bottom) / effective
    # The mean of p / (s1 p + s2 q) over q: 1 where both are the same, 0 where they do not meet.
    return Evidence(r, squared.sqrt(), "bridge", overlap=log_mean_exp(top)[0].exp())


def _relative(log_values: Tensor) -> Tensor:
    """Return var / mean^2 of exponentials with shape (n, T)."""
    return log_mean_exp(log_values)[1].square() * len(log_values)


def agree(estimates: Sequence[Evidence]) -> Tensor:
    """Return the largest difference between two estimates, in standard errors of their difference, with shape (T,): a handful means no.

    Raises:
        ValueError: fewer than two estimates.
    """
    if len(estimates) < 2:
        raise ValueError(f"Expected at least two estimates to hold together. Got {len(estimates)}.")
    worst = torch.zeros_like(estimates[0].log_evidence)
    for i, a in enumerate(estimates):
        for b in estimates[i + 1 :]:
            error = (a.standard_error.square() + b.standard_error.square()).sqrt().clamp(min=1e-12)
            worst = torch.maximum(worst, (a.log_evidence - b.log_evidence).abs() / error)
    return worst
