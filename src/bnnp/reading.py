"""Read a learned prior: what it says of the weights, layer by layer, and what of it matters for functions and predictions.

Everything is said relative to the prior that a network has without learning, N(0, I/p) with p inputs of a unit, bias included. The summary
asks a layer's prior for its mean, its covariance and its divergence only, so it works for every kind.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnnp.evaluation import Evaluation, evaluate, mean_and_se
from bnnp.linalg import eigh
from bnnp.networks import BNNP
from bnnp.priors import NetworkPrior
from bnnp.structures import LayerPrior

__all__ = ["Directions", "LayerEffect", "PriorSummary", "directions", "layer_effects", "summary", "with_default_layer"]


@dataclass(frozen=True)
class PriorSummary:
    """Hold what a prior says of the weights, one record for each layer; prints as a table.

    Arguments:
        rows: "layer", from 1; "shape", (units, p); "learned", the fraction of the weights whose prior is learned; "mean", root mean square
            of the means; "sd_min", "sd_median", "sd_max" of the standard deviations (these four in units of the default's 1 / sqrt(p),
            so that the default has 0, 1, 1, 1); "effective_rank" of a unit's covariance, exp of the entropy of its normalised
            eigenvalues, mean over units, at most p; "divergence" from the default in nats; "share" of the sum.
    """

    rows: list[dict[str, Any]]

    @property
    def divergence(self) -> float:
        """Return the divergence of all layers, in nats."""
        return float(sum(row["divergence"] for row in self.rows))

    def __str__(self) -> str:
        columns = ("mean", "sd min", "median", "max")
        lines = ["layer  units x p  learned  " + "  ".join(f"{c:>6}" for c in columns) + "  effective rank  divergence   share"]
        for row in self.rows:
            d, p = row["shape"]
            numbers = "  ".join(f"{row[key]:>6.2f}" for key in ("mean", "sd_min", "sd_median", "sd_max"))
            rank = f"{row['effective_rank']:.1f} of {p}"
            lines.append(
                f"{row['layer']:>5}  {f'{d} x {p}':>9}  {100 * row['learned']:>5.0f} %  {numbers}  {rank:>14}  {row['divergence']:>10.1f}"
                f"  {100 * row['share']:>4.0f} %"
            )
        return "\n".join([*lines, f"(means and deviations in units of 1 / sqrt(p); {self.divergence:.1f} nats from N(0, I / p) in all)"])


@torch.no_grad()
def summary(prior: NetworkPrior) -> PriorSummary:
    """Return what a prior says of the weights, layer by layer, as `model.prior.summary()`.

    Example:
        >>> round(BNNP(1, 1, hidden=(4,)).prior.summary().rows[0]["sd_median"], 3)
        1.0
    """
    rows: list[dict[str, Any]] = []
    for i, layer in enumerate(prior):
        mean, cov = math.sqrt(layer.p) * layer.mean.double(), layer.p * layer.covariance().double()
        sd = cov.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        # What is not learned now, and what was never to be.
        chosen = getattr(layer, "learned", None)
        learned = 1.0 if chosen is None else float(chosen.double().mean())
        frozen = not any(parameter.requires_grad for parameter in layer.parameters())
        rows.append(
            {
                "layer": i + 1,
                "shape": (layer.d_out, layer.p),
                "learned": 0.0 if frozen else learned,
                "mean": float(mean.square().mean().sqrt()),
                "sd_min": float(sd.min()),
                "sd_median": float(sd.median()),
                "sd_max": float(sd.max()),
                "effective_rank": float(effective_rank(cov).mean()),
                "divergence": max(0.0, float(layer.divergence())),  # rounding may leave it just below
            }
        )
    total = sum(row["divergence"] for row in rows)
    return PriorSummary([{**row, "share": row["divergence"] / total if total > 0 else math.nan} for row in rows])


def effective_rank(cov: Tensor) -> Tensor:
    """Return exp(-sum_j q_j log q_j), q the eigenvalues of cov (*B, p, p) over their sum, with shape (*B)."""
    values = eigh(cov)[0].clamp_min(0)
    q = values / values.sum(-1, keepdim=True)
    return torch.special.entr(q).sum(-1).exp()


@dataclass(frozen=True)
class Directions:
    """Hold the directions in which the weights of a layer vary most.

    Arguments:
        values: variance along each direction in units of the default's 1 / p, the largest first, with shape (p,).
        vectors: unit vectors in columns with shape (p, p), bias last; the largest entry of each is positive.
        between: share of each variance that lies between the means of the units, with shape (p,).
    """

    values: Tensor
    vectors: Tensor
    between: Tensor


@torch.no_grad()
def directions(prior: NetworkPrior) -> list[Directions]:
    """Return for each layer the eigenvectors of 1/d sum_u (Sigma_u + mu_u mu_u^T), what a weight vector of the layer varies by.

    The default has variance 1 along every direction.
    """
    found = []
    for layer in prior:
        mean, cov = math.sqrt(layer.p) * layer.mean.double(), layer.p * layer.covariance().double()
        between = mean.mT @ mean / layer.d_out
        values, vectors = eigh(cov.mean(0) + between)
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
        along = torch.einsum("pk,pq,qk->k", vectors, between, vectors)
        found.append(Directions(values, vectors, along / values.clamp_min(1e-300)))
    return found


def with_default_layer(model: BNNP, index: int) -> BNNP:
    """Return a copy of a model in which one layer's prior is the default N(0, I/p), and everything else is as it was.

    The inference networks have not been trained for such a prior: the copy is for looking at, not for use.

    Arguments:
        model: a trained model.
        index: of the layer, from 0 at the input side.

    Raises:
        ValueError: there is no such layer.
    """
    other = copy.deepcopy(model)
    layers = list(other.prior)
    if not 0 <= index < len(layers):
        raise ValueError(f"Expected index of a layer between 0 and {len(layers) - 1}. Got {index}.")
    for i, layer in enumerate(layers):
        if i == index or layer.learned is None:
            # Where layers are correlated, each asks which weights of the others are learned.
            layer.keep(torch.full((layer.d_out, layer.p), i != index, device=layer.mean.device))
    for part in layers[index].modules():
        if isinstance(part, LayerPrior):
            part.unit = 1.0 / math.sqrt(part.p)
    return other


@dataclass(frozen=True)
class LayerEffect:
    """Report what the learned prior of one layer does for predictions.

    Arguments:
        layer: its number, from 1.
        change: of the log predictive density per target point when this layer's prior is put back to the default; mean over tasks.
        se: standard error of `change`, task by task.
        change_rmse: of the root mean square error.
        model: the model with the layer's prior put back.
    """

    layer: int
    change: float
    se: float
    change_rmse: float
    model: BNNP


def layer_effects(
    model: BNNP,
    tasks: Sequence[Any],
    context_fraction: float | tuple[float, float] | None = (0.1, 0.6),
    num_samples: int = 64,
    seed: int = 0,
) -> list[LayerEffect]:
    """Put each layer's prior back to the default in turn, keeping the others, and see how predictions of held-out tasks change.

    Arguments:
        model: a trained model.
        tasks: pairs (x, y); or (xc, yc, xt, yt), with `context_fraction` None.
        context_fraction: share of context points, or its range.
        num_samples: particles of each prediction.
        seed: of splits and particles, the same for all.
    """

    def scores(of: BNNP) -> Evaluation:
        return evaluate(of, tasks, num_samples=num_samples, seed=seed, context_fraction=context_fraction)

    before, found = scores(model).per_task, []
    for index in range(len(model.prior)):
        other = with_default_layer(model, index)
        after = scores(other).per_task
        change, se = mean_and_se(after["joint_log_density"] - before["joint_log_density"])
        rmse = float((after["rmse"] - before["rmse"]).mean())
        found.append(LayerEffect(index + 1, change, se, rmse, other))
    return found


# The core knows nothing of reports, so the method that users expect is added here.
NetworkPrior.summary = summary
