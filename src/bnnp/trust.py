"""How far a posterior can be trusted, from the posterior itself: importance weights, evidence, and distance from meta-training.

Each particle has an importance weight w = p(data, W) / q(W), with the last layer integrated out. Were q exact, all weights would be equal
to the evidence. How unequal they are says how far q is from the posterior under the learned prior; it says nothing on whether that prior
fits the data. For that, the inputs are compared with those of meta-training, and the outputs with what the prior generates at the same
inputs. `sbc` asks the same of a model as a whole: does it recover what its own prior generates?
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnnp.calibration import ecdf_bands, uniformity
from bnnp.importance import effective_sample_size, log_mean_exp, psis
from bnnp.linalg import cholesky, compute_device, solve_lower, to_compute
from bnnp.networks import BNNP
from bnnp.posterior import Posterior
from bnnp.progress import ProgressLine
from bnnp.seeds import check_count, seeded
from bnnp.tasks import Context, check_inputs

__all__ = ["SBC", "Diagnosis", "diagnose", "sbc"]

PRIOR_DRAWS = 512  # half of them say what the prior predicts, the other half how far its own data lie from that
FAR, SURPRISING, HEAVY = 1.0, 0.01, 0.7
FEWEST_PARTICLES = 100  # with fewer, the shape of the tail of the weights is a guess


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Say how far a posterior can be trusted; every tensor has shape (T,), or none for a single task.

    Arguments:
        log_evidence: importance-weighted estimate of the log evidence of all points seen, log 1/S sum_s w_s, in the user's units.
        log_evidence_se: its standard error by the delta method; itself not to be trusted where `pareto_k` is above 0.7.
        elbo: the lower bound of the log evidence; NaN after resampling.
        gap: log_evidence - elbo: an estimate, too small rather than too large, of KL(q || posterior).
        effective_sample_size: of the importance weights, between 1 and S; copies that resampling made count once.
        pareto_k: shape of the tail of the importance weights: above 0.7 neither the evidence nor reweighted predictions can be trusted; NaN
            for fewer than 25 particles. With fewer than 100 particles it is a rough guess.
        distance_x: mean distance of the context's inputs from those of meta-training, in units of the distance that one in a hundred of
            them exceeded; NaN for an empty context, or a model that was not meta-trained.
        distance_y: distance of the context's outputs from what the prior predicts at these inputs, in units of the distance that one in
            twenty data sets of the prior itself exceeds.
        p_value_y: twice the share of data sets of the prior that lie at least as far out, or at least as near, whichever is smaller:
            data may also be less noisy than anything that was learned.
        sentence: what to make of it, one sentence for each task.
    """

    log_evidence: Tensor
    log_evidence_se: Tensor
    elbo: Tensor
    gap: Tensor
    effective_sample_size: Tensor
    pareto_k: Tensor
    distance_x: Tensor
    distance_y: Tensor
    p_value_y: Tensor
    sentence: str | tuple[str, ...]


@torch.no_grad()
def diagnose(posterior: Posterior, seed: int = 0) -> Diagnosis:
    """Say how far this posterior can be trusted, in numbers and in one sentence.

    Cost: no more than the evidence of the last layer, and 512 functions of the prior at no more than 256 of the context's points.

    Arguments:
        posterior: what to diagnose.
        seed: of the prior's functions.

    Returns:
        A `Diagnosis`.

    References:
        Pareto smoothed importance sampling (Vehtari, Simpson, Gelman, Yao and Gabry, 2024); Sampling and Bayes' inference in scientific
        modelling and robustness (Box, 1980), for the prior predictive check.

    Example:
        >>> posterior = BNNP(1, 1, hidden=()).condition([[0.0], [1.0]], [[0.1], [0.2]], num_samples=32)
        >>> d = posterior.diagnose()
        >>> bool((d.log_evidence - d.elbo).abs() < 1e-4), float(d.effective_sample_size)  # one layer: q is exact
        (True, 32.0)
    """
    weights = _of_ancestors(posterior)
    evidence, error = log_mean_exp(weights)
    elbo = torch.full_like(evidence, math.nan)
    if posterior.applied is None:
        elbo = posterior.particles.mean(posterior.bounds)
    k = psis(weights)[1]
    far = _distance_x(posterior)
    distance, p = _distance_y(posterior, seed)
    values = {
        "log_evidence": evidence,
        "log_evidence_se": error,
        "elbo": elbo,
        "gap": evidence - elbo,
        "effective_sample_size": effective_sample_size(weights),
        "pareto_k": k,
        "distance_x": far,
        "distance_y": distance,
        "p_value_y": p,
    }
    sentences = tuple(_sentence(posterior, t, {key: float(v[t]) for key, v in values.items()}) for t in range(posterior.num_tasks))
    return Diagnosis(**{key: posterior.per_task(v) for key, v in values.items()}, sentence=sentences[0] if posterior.single else sentences)


def _of_ancestors(posterior: Posterior) -> Tensor:
    """Return the log importance weights of the draws from q with shape (S, T): copies count as what they go back to."""
    weights, at = posterior.log_importance, posterior.ancestors
    if at is None:
        return weights
    top = weights.amax(0)
    return torch.zeros_like(weights).scatter_add(0, at.to(weights.device), (weights - top).exp()).log() + top


def _distance_x(posterior: Posterior) -> Tensor:
    """Return the mean distance of the sample's inputs with shape (T,)."""
    points, reference = posterior.sample.points, posterior.model.reference
    distance = to_compute(reference.distance(posterior.scaling.x(points.x)), torch.float64)
    mask = points.mask.to(distance.device)
    return torch.where(mask, distance, torch.zeros_like(distance)).sum(-1) / mask.sum(-1)


def _distance_y(posterior: Posterior, seed: int) -> tuple[Tensor, Tensor]:
    """Return the distance of the outputs from the prior's prediction and its two-sided p-value, each with shape (T,).

    Half of the functions give mean and covariance at the points, noise included (or, for class labels, the probability of each), from
    which the distance of the outputs is that of Mahalanobis (or the log-loss); the data sets of the other half give its distribution. The
    square root is taken.
    """
    model: Any = posterior.model
    points, half = posterior.sample.points, PRIOR_DRAWS // 2
    draws = tuple(W.unsqueeze(1) for W in model.prior.sample(PRIOR_DRAWS, seeded(seed, "prior functions")))
    generator, found = seeded(seed, "prior data"), []
    for t in range(posterior.num_tasks):
        keep = points.mask[t]
        x, y = posterior.scaling.x(points.x[t][keep]), posterior.scaling.y(points.y[t][keep])
        if len(x) == 0:
            found.append((math.nan, math.nan))
            continue
        f = to_compute(posterior.particles.architecture.hidden(x.unsqueeze(0), draws), torch.float64)[:, 0]
        data = to_compute(model.likelihood.sample(f[half:].unsqueeze(1).to(x), generator), f.dtype)[:, 0]
        both = torch.cat([to_compute(y, f.dtype).unsqueeze(0), data])
        seen = points.observed[t][keep].to(both.device).expand_as(both[0])
        squared = (_log_loss if model.likelihood.labels else _mahalanobis)(f[:half], both, seen, model.likelihood)
        own = squared[1:]
        edge = own.sort().values[math.ceil(0.95 * half) - 1].clamp(min=1e-12)
        above, below = int((own >= squared[0]).sum()), int((own <= squared[0]).sum())
        found.append((float((squared[0] / edge).clamp(min=0).sqrt()), min(1.0, 2 * (1 + min(above, below)) / (1 + half))))
    columns = torch.tensor(found, dtype=torch.float64, device=compute_device(points.x.device))
    return columns[:, 0], columns[:, 1]


def _mahalanobis(f: Tensor, y: Tensor, seen: Tensor, likelihood: Any) -> Tensor:
    """Return squared distances (n,) of data y (n, M, d) from the means given functions f (m, M, ...), summed over outputs."""
    total = torch.zeros(len(y), dtype=y.dtype, device=y.device)
    given, noise = likelihood.mean(f), likelihood.variance(f).mean(0)
    for j in range(y.shape[-1]):
        at = seen[:, j]
        mean = given[:, at, j].mean(0)
        centred = given[:, at, j] - mean
        root = cholesky(centred.mT @ centred / (len(f) - 1) + torch.diag(noise[at, j]))
        total += solve_lower(root, (y[:, at, j] - mean).mT).square().sum(0)
    return total


def _log_loss(f: Tensor, y: Tensor, seen: Tensor, likelihood: Any) -> Tensor:
    """Return -log p of labels y (n, M, d) under the mean probabilities of functions f (m, M, ...), with shape (n,)."""
    p = likelihood.mean(f).mean(0).clamp(1e-12, 1 - 1e-12)
    return -likelihood.log_prob(likelihood.f_of(p), y, seen).sum(-1)


def _sentence(posterior: Posterior, t: int, d: dict[str, float]) -> str:
    """Put the diagnosis of one task into words, the gravest first."""
    count, most = int(posterior.counts[t]), int(posterior.model.reference.most_context)
    if count == 0:
        return "There are no data yet: predictions are those of the prior."
    warnings = []
    if d["distance_x"] > FAR:
        warnings.append(f"the inputs lie outside those of meta-training (distance {d['distance_x']:.1f}, where 1 is already rare)")
    if d["p_value_y"] < SURPRISING:
        warnings.append(f"the outputs are unlike what the learned prior generates at these inputs (p = {d['p_value_y']:.3f})")
    if most and count > 2 * most:
        warnings.append(f"there are {count} points, and meta-training showed at most {most}: the posterior may be too sure")
    k, S = d["pareto_k"], posterior.num_samples
    heavy = k > HEAVY or (math.isnan(k) and S >= 25)
    if warnings:
        return f"Do not trust it: {'; '.join(warnings)}."
    familiar = "inputs and outputs are like those of meta-training"
    if not posterior.model.reference.known or math.isnan(d["distance_x"] + d["p_value_y"]):
        familiar = "the model was not meta-trained, so nothing can be said of how familiar the data are"
    if heavy:
        return f"Take care: {familiar}, but its importance weights are too unequal to tell how good it is (Pareto k = {k:.2f})."
    if S < FEWEST_PARTICLES:
        return f"Take care: {familiar}, but {S} particles are too few to tell how good it is; condition with 100 or more, better 256."
    if "nothing can be said" in familiar:
        return f"Take care: {familiar}; it agrees with its importance weights (Pareto k = {k:.2f})."
    return f"Nothing speaks against it: {familiar}, and it agrees with its importance weights (Pareto k = {k:.2f})."


@dataclass(frozen=True, eq=False)
class SBC:
    """Hold the ranks of simulation-based calibration.

    Arguments:
        ranks: name of a quantity -> rank of its true value among the draws in each repetition, integers from 0 to `num_ranks`, shape (R,).
        num_ranks: number of draws L in each repetition.
        p_values: name -> p-value of the ranks being uniform.
        bands: lower and upper simultaneous 95 % band of the distribution function of the ranks, for `plots.rank_ecdf`.
    """

    ranks: dict[str, Tensor]
    num_ranks: int
    p_values: dict[str, float]
    bands: tuple[Any, Any]

    def table(self) -> str:
        """Return names, mean ranks (0.5 is right), their spread (1 is right; above: too narrow), and p-values, as text."""
        width = max(len(name) for name in self.ranks)
        lines = [f"{'quantity':<{width}}  {'mean':>6}  {'spread':>6}  {'p':>6}"]
        for name, ranks in self.ranks.items():
            u = (ranks.double() + 0.5) / (self.num_ranks + 1)
            lines.append(f"{name:<{width}}  {float(u.mean()):>6.3f}  {float(u.std() * math.sqrt(12)):>6.3f}  {self.p_values[name]:>6.3f}")
        return "\n".join([*lines, f"({len(next(iter(self.ranks.values())))} repetitions, {self.num_ranks} draws)"])


@torch.no_grad()
def sbc(
    model: BNNP,
    x: Any = None,
    num_points: int = 20,
    repetitions: int = 400,
    num_samples: int = 99,
    seed: int = 0,
    batch_size: int = 20,
    progress: bool = False,
) -> SBC:
    """Calibrate a model by simulation under its own learned prior: are true values uniformly ranked among posterior draws?

    In each repetition weights are drawn from the prior and data from the weights; the model is conditioned on the data, and the true value
    of some quantities is ranked among their values in the posterior's draws. Were the posterior exact, ranks would be uniform. The
    quantities are the function at three inputs, the squared norm of each layer's weights, a fixed linear functional of them, and the
    log-likelihood of the data.

    Arguments:
        model: the model.
        x: inputs (n, d_x) at which data are made in every repetition, in the user's units; or a function that takes a generator and
            returns them; inputs of meta-training at random where not given.
        num_points: how many, where they are taken at random.
        repetitions: R.
        num_samples: draws L of each posterior, each from a particle of its own.
        seed: of everything that is drawn.
        batch_size: repetitions that are conditioned at once.
        progress: show a line of progress on standard error.

    Returns:
        An `SBC`.

    Raises:
        ValueError: inputs are neither given nor known from meta-training.

    References:
        Validating Bayesian inference algorithms with simulation-based calibration (Talts, Betancourt, Simpson, Vehtari and Gelman, 2018).

    Example:
        >>> result = sbc(BNNP(1, 1, hidden=()), x=[[0.0], [1.0]], repetitions=20, num_samples=9)
        >>> sorted(result.ranks)[:3]
        ['f at input 1', 'f at input 2', 'layer 1, projection']
    """
    R, L = check_count(repetitions, "repetitions"), check_count(num_samples, "num_samples")
    generator, line = seeded(seed, "sbc"), ProgressLine(R, progress)
    draw_x = _inputs_of(model, x, check_count(num_points, "num_points"))
    tests = model.scaling.x(draw_x(generator)[:3])
    directions = [torch.randn(p.mean.shape, generator=generator).to(model.device, model.dtype) for p in model.prior]
    ranks: dict[str, list[Tensor]] = {}
    for start in range(0, R, check_count(batch_size, "batch_size")):
        T = min(batch_size, R - start)
        true = model.prior.sample(T, generator)
        X = torch.stack([model.scaling.x(draw_x(generator)) for _ in range(T)])
        f = model.architecture.hidden(X, true)
        y = torch.stack([model.likelihood.sample(f[t][None, None], generator)[0, 0] for t in range(T)])
        data = Context(X, y, torch.ones(X.shape[:2], dtype=torch.bool, device=X.device))
        for name, (value, draws) in _quantities(model, data, true, _posterior_draws(model, data, L, generator), tests, directions).items():
            ties = torch.rand(draws.shape, generator=generator).to(draws.device) < 0.5
            ranks.setdefault(name, []).append(((draws < value) | ((draws == value) & ties)).sum(0).cpu())
        line.show(start + T, "calibrating")
    line.close()
    joined = {name: torch.cat(parts) for name, parts in ranks.items()}
    p = uniformity(torch.stack(list(joined.values()), dim=-1), L)
    return SBC(joined, L, {name: float(v) for name, v in zip(joined, p, strict=True)}, ecdf_bands(R, L))


def _inputs_of(model: BNNP, x: Any, num_points: int) -> Callable[[torch.Generator], Tensor]:
    if x is None:
        if not model.reference.known:
            raise ValueError("Expected inputs x, since the model was not meta-trained and knows none. Got none. Pass an array (n, d_x).")
        known = model.reference.x_sample
        return lambda generator: known[torch.randint(len(known), (num_points,), generator=generator).to(known.device)]
    if callable(x):
        return lambda generator: check_inputs(x(generator), model.x_dim, "x", model.dtype, model.device)
    fixed = check_inputs(x, model.x_dim, "x", model.dtype, model.device)
    return lambda generator: fixed


def _posterior_draws(model: BNNP, data: Context, L: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return weights of L draws of each of T posteriors, with noise of their own for every task: repetitions must not share any."""
    device = compute_device(model.device)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=model.factor_dtype).to(device)

    K = model.prior.components
    particles = model.particles(data, L * K, normal, canonical=True)
    if particles.share is not None:
        # There are L particles of each component, the i-th of component k at i K + k: every draw has one of its own.
        share = particles.share[:K].exp().mT.cpu()
        chosen = torch.multinomial(share, L, replacement=True, generator=generator).mT
        particles = particles.picked((torch.arange(0, L * K, K).unsqueeze(-1) + chosen).to(device))
    if particles.last is None:
        return particles.weights
    eps = particles.last.draw(normal(tuple(particles.last.mean.shape)))
    return (*particles.weights, particles.given.weights(eps))


def _quantities(
    model: BNNP, data: Context, true: tuple[Tensor, ...], draws: tuple[Tensor, ...], tests: Tensor, directions: list[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return name -> (true value (T,), values of the draws (L, T))."""

    def of(weights: tuple[Tensor, ...]) -> dict[str, Tensor]:
        f = model.architecture.hidden(tests.unsqueeze(0), weights)[..., 0]
        found = {f"f at input {j + 1}": f[..., j] for j in range(f.shape[-1])}
        for i, (W, v) in enumerate(zip(weights, directions, strict=True)):
            found[f"layer {i + 1}, squared norm"] = W.square().sum((-2, -1))
            found[f"layer {i + 1}, projection"] = (W * v).sum((-2, -1))
        at_data = model.architecture.hidden(data.x, weights)
        found["log-likelihood"] = model.likelihood.log_prob(at_data, data.y.expand(*at_data.shape[:-1], -1)).sum(-1)
        return found

    value, drawn = of(true), of(draws)
    return {name: (value[name], drawn[name]) for name in value}


Posterior.diagnose = diagnose
