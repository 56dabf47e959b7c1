"""A network replaced by its first-order expansion at one point of weights: what Laplace's approximation is exact for.

Curvature of Gauss-Newton forgets all but the first derivatives of the network, so a Gaussian with that precision is the posterior of the
expansion, and not of the network. Draws from it, put through the network itself, are known to underfit; put through the expansion they
predict well (Immer, Korzepa and Bauer, 2021).

References:
    Improving predictions of Bayesian neural nets via local linearization (Immer, Korzepa and Bauer, 2021), section 3.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from bnnp.inference.functional import Functional
from bnnp.layers import ACTIVATIONS
from bnnp.particles import Architecture

__all__ = ["LinearisedNetwork", "linearised"]


@dataclass(frozen=True, eq=False)
class LinearisedNetwork(Architecture):
    """Be f(x; W) = f(x; W0) + f'(x; W0) (W - W0), of each task at its own W0.

    Arguments:
        activation: of the network.
        residual: whether it has residual connections.
        at: W0 of all layers, each with shape (T, d_l, p_l).
    """

    at: tuple[Tensor, ...]

    def hidden(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """Return f with shape (*S, T, M, f_dim) for weights of all layers with shape (*S, T, d_l, p_l).

        Raises:
            ValueError: weights of other tasks, or not of all layers.
        """
        if [W.shape[-3:] for W in weights] != [W.shape for W in self.at]:
            raise ValueError(
                f"Expected weights of all layers and of the {len(self.at[0])} task(s) of the expansion. "
                f"Got {[tuple(W.shape) for W in weights]}."
            )
        H, dH = x, torch.zeros_like(x)
        for i, (at, W) in enumerate(zip(self.at, weights, strict=True)):
            # Behind the input a layer sees activations, whose derivative is taken element by element.
            dA = dH if i == 0 else dH * torch.func.vjp(ACTIVATIONS[self.activation], H)[1](torch.ones_like(H))[0]
            A, skip = self.layer_input(H, i), self.skip(H, W.shape[-2])
            dH = A @ (W - at).mT + dA @ at[..., :-1].mT + (0.0 if skip is None else dH)
            H = A @ at.mT + (0.0 if skip is None else skip)
        return H + dH


def linearised(functional: Functional, eps: Tensor) -> Functional:
    """Return the functional whose network is linear in the weights: expanded at weights(eps), of each task at its own.

    It has densities, draws, predictions and updates like any other. With Gaussian noise its posterior is a Gaussian. Under a heavy-tailed
    prior, weights are themselves not linear in eps, and so it is not.

    Arguments:
        functional: of all layers.
        eps: where to expand, with shape (T, dim), or (dim,) of one task.

    Raises:
        ValueError: another shape, or a functional without its last layer.

    Example:
        >>> from bnnp import BNNP, inference
        >>> F = inference.functional(BNNP(1, 1, hidden=(4,)), [[0.0], [1.0]], [[0.1], [0.2]])
        >>> linearised(F, torch.zeros(F.dim)).predict(torch.ones(3, F.dim), [[0.5]]).mean.shape
        torch.Size([1, 1])
    """
    want = (functional.dim,) if functional.single else (functional.num_tasks, functional.dim)
    if tuple(eps.shape) != want:
        raise ValueError(f"Expected eps with shape {want}, one point for each task. Got {tuple(eps.shape)}.")
    if functional.collapse:
        raise ValueError("Expected a functional that holds all layers. Got collapse=True: make it with collapse=False.")
    own = functional.source.architecture
    at = tuple(
        W.detach() for W in functional.batched.weights(eps.detach().to(functional.device, functional.dtype).reshape(-1, functional.dim))
    )
    source = dataclasses.replace(functional.source, architecture=LinearisedNetwork(own.activation, own.residual, at))
    return Functional(source, functional.layers, functional.context, single=functional.single)
