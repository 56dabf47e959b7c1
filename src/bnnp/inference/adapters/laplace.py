"""A functional as a module whose only parameter is eps, for the library laplace-torch.

laplace-torch has a prior N(0, 1 / prior_precision) on the parameters of a module; with eps as the parameter and prior_precision 1 that is
the functional's own, learned or not. Data and outputs are in the network's units: `functional.scaled`.

    net = Network(F, eps_at_the_mode)                     # such as the `mode` of bnnp.inference.laplace
    la = laplace.Laplace(net, "regression", subset_of_weights="all", hessian_structure="full", prior_precision=1.0,
                         sigma_noise=float(F.likelihood.noise_std))
    la.fit(DataLoader(TensorDataset(F.scaled.x[0], F.scaled.y[0]), batch_size=len(F.scaled.x[0])))
    f_mean, f_var = la(F.source.scaling.x(x))             # times y_scale of F.source.scaling, plus y_shift, for the user's units

Structures that look for layers (Kronecker factors, the last layer) do not apply to one flat parameter: `bnnp.inference.laplace` has full,
diagonal and last layer itself, for all tasks at once. laplace-torch is no dependency and is not run by the tests; the module is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnnp.inference.functional import Functional

__all__ = ["Network"]


class Network(nn.Module):
    """Be x -> f(x; weights(eps)) of one task, in the network's units, with eps as parameter.

    Arguments:
        functional: of one task and all layers.
        eps: where to start, with shape (dim,); zeros where not given.

    Raises:
        ValueError: several tasks, no last layer, or another shape.
    """

    def __init__(self, functional: Functional, eps: Tensor | None = None) -> None:
        super().__init__()
        if not functional.single or functional.collapse:
            raise ValueError(f"Expected the functional of one task, functional.task(i), with collapse=False. Got {functional!r}.")
        at = torch.zeros(functional.dim) if eps is None else eps.detach().clone()
        if tuple(at.shape) != (functional.dim,):
            raise ValueError(f"Expected eps with shape ({functional.dim},). Got {tuple(at.shape)}.")
        self.functional = functional
        self.eps = nn.Parameter(at.to(functional.device, functional.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return f with shape (M, f_dim) at x (M, d_x)."""
        return self.functional.outputs(self.eps, x)
