"""Heavy tails: a Student t, for data with outliers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions import StudentT as TorchStudentT

from bnnp.likelihoods.base import Likelihood, check_positive
from bnnp.likelihoods.special import betainc

__all__ = ["StudentT"]


class StudentT(Likelihood):
    """Observe y = f + scale t, t a Student t of `dof` > 2 degrees of freedom, one scale and one dof for each output.

    A point far out pulls at f with a force that falls with its distance, where a Gaussian's grows. A scale that is fixed is in the units
    of y; one that is learned starts in units of the standard deviation of y over the meta-training tasks. With dof > 2 the variance
    exists: scale^2 dof / (dof - 2). Summarise predictions by their median, `quantile(0.5)`.

    Arguments:
        dof: the degrees of freedom, or where learning starts.
        scale: the scale, or where learning starts.
        learn_dof: whether the degrees of freedom are learned, within dof > 2.
        learn_scale: whether the scale is learned.

    Raises:
        ValueError: a scale that is not positive, or dof not above 2.

    Example:
        >>> StudentT(dof=4.0, scale=0.5).bind(1).variance(torch.zeros(1, 1)).detach()
        tensor([[0.5000]])
    """

    def __init__(self, dof: float = 4.0, scale: float = 0.1, learn_dof: bool = True, learn_scale: bool = True) -> None:
        super().__init__()
        self._config = {
            "dof": check_positive(dof, "dof", least=2.0),
            "scale": check_positive(scale, "scale"),
            "learn_dof": bool(learn_dof),
            "learn_scale": bool(learn_scale),
        }
        raw = math.log(math.expm1(min(dof - 2.0, 30.0))) if dof < 32 else dof - 2.0
        self.raw_dof = nn.Parameter(torch.full((1,), raw), requires_grad=bool(learn_dof))
        self.raw_scale = nn.Parameter(torch.full((1,), float(scale)).log(), requires_grad=bool(learn_scale))

    def bind(self, y_dim: int) -> StudentT:
        """Return a copy with scale and dof for each of `y_dim` outputs."""
        other = copy.deepcopy(self)
        for name, old in tuple(other.named_parameters()):
            setattr(other, name, nn.Parameter(old.detach().expand(y_dim).clone(), requires_grad=old.requires_grad))
        return other

    def rescale(self, y_scale: Tensor) -> None:
        """Express a fixed scale, given in the user's units, in the network's."""
        if not self._config["learn_scale"]:
            with torch.no_grad():
                self.raw_scale.copy_((self._config["scale"] / y_scale).log())

    @property
    def dof(self) -> Tensor:
        """Return the degrees of freedom with shape (d_y,)."""
        return 2.0 + nn.functional.softplus(self.raw_dof)

    @property
    def scale(self) -> Tensor:
        """Return the scale in the network's units, with shape (d_y,)."""
        return self.raw_scale.exp()

    def _standard(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return |y - f| / (scale sqrt(dof)), and dof."""
        dof = self.dof.to(f.dtype)
        return (y - f).abs() / (self.scale.to(f.dtype) * dof.sqrt()), dof

    def log_prob_each(self, f: Tensor, y: Tensor) -> Tensor:
        """Return log t(y; dof, f, scale) of each output."""
        z, dof = self._standard(f, y)
        far = z > 1e4  # there log(1 + z^2) is 2 log z to all digits, and z^2 might overflow
        near = torch.where(far, torch.zeros_like(z), z).square().log1p()
        log = torch.where(far, 2 * z.clamp(min=1e4).log(), near)
        constant = torch.lgamma(0.5 * (dof + 1)) - torch.lgamma(0.5 * dof) - 0.5 * (math.pi * dof).log() - self.raw_scale.to(f.dtype)
        return constant - 0.5 * (dof + 1) * log

    def mean(self, f: Tensor) -> Tensor:
        """Return f."""
        return f

    def variance(self, f: Tensor) -> Tensor:
        """Return scale^2 dof / (dof - 2)."""
        dof = self.dof.to(f.dtype)
        return (self.scale.to(f.dtype).square() * dof / (dof - 2)).expand_as(f)

    def cdf(self, f: Tensor, y: Tensor) -> Tensor:
        """Return P(Y <= y), half of I_x(dof / 2, 1 / 2) in the lower tail, x = 1 / (1 + z^2 / dof)."""
        z, dof = self._standard(f, y)
        z, dof = torch.broadcast_tensors(z, dof)
        root = torch.hypot(z, torch.ones_like(z))
        tail = 0.5 * betainc(0.5 * dof, torch.full_like(dof, 0.5), root.reciprocal().square(), (z / root).square())
        return torch.where(y > f, 1 - tail, tail)

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Return draws with the shape (n, T, M, d_y) of f, by Bailey's polar method (1994): t = sqrt(dof (u^{-2/dof} - 1)) cos(2 pi v)."""
        u, v = (self._uniform(f, generator, f.shape[-1]) for _ in range(2))
        dof = self.dof.to(f.dtype)
        t = (dof * torch.expm1(-2 / dof * u.log())).sqrt() * (2 * math.pi * v).cos()
        return f + self.scale.to(f.dtype) * t

    def torch_distribution(self, f: Tensor, scale: Tensor, shift: Tensor) -> tuple[Callable[..., Distribution], dict[str, Tensor]]:
        """Return `StudentT` and its arguments."""
        own = (self.scale.to(f.dtype) * scale).expand_as(f)
        return TorchStudentT, {"df": self.dof.to(f.dtype).expand_as(f), "loc": f * scale + shift, "scale": own}

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return dict(self._config)
