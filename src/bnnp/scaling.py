"""The normaliser: what the network sees has mean zero and standard deviation one over the meta-training tasks.

It is fitted once, on the meta-training tasks, and lives in the model: inputs arrive and predictions leave in the user's
units. Before it is fitted it is the identity. Beside it the model keeps a `Reference`: where the inputs of meta-training lay, so
that a posterior can tell whether it is asked about something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnnp.linalg import cholesky, solve_lower, to_compute
from bnnp.tasks import Context, Task

__all__ = ["Reference", "Standardiser"]

REFERENCE_SIZE = 256


class Standardiser(nn.Module):
    """Map x to (x - shift) / scale, column by column, and y likewise.

    Arguments:
        x_dim: number of input columns.
        y_dim: number of output columns.
        scale_y: whether outputs are standardised; False for labels and other outputs without units.

    Example:
        >>> scaling = Standardiser(1, 1)
        >>> scaling.fit([Task(torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [3.0]]))])
        >>> scaling.x(torch.tensor([[2.0]])), scaling.y_scale
        (tensor([[0.]]), tensor([1.]))
    """

    x_shift: Tensor
    x_scale: Tensor
    y_shift: Tensor
    y_scale: Tensor
    fitted: Tensor

    def __init__(self, x_dim: int, y_dim: int, scale_y: bool = True) -> None:
        super().__init__()
        self.scale_y = scale_y
        self.register_buffer("x_shift", torch.zeros(x_dim))
        self.register_buffer("x_scale", torch.ones(x_dim))
        self.register_buffer("y_shift", torch.zeros(y_dim))
        self.register_buffer("y_scale", torch.ones(y_dim))
        self.register_buffer("fitted", torch.tensor(False))

    def fit(self, tasks: Sequence[Task]) -> None:
        """Set shifts and scales to mean and standard deviation over all points of `tasks`, and over what was seen of their outputs.

        Raises:
            ValueError: a column has the same value at every point of every task.
        """
        x_shift, x_scale = self._moments([task.x for task in tasks], None, "x")
        y_shift, y_scale = self.y_shift, self.y_scale
        if self.scale_y:
            seen = [task.observed for task in tasks] if any(task.seen is not None for task in tasks) else None
            y_shift, y_scale = self._moments([task.y for task in tasks], seen, "y")
        for buffer, value in zip(
            (self.x_shift, self.x_scale, self.y_shift, self.y_scale), (x_shift, x_scale, y_shift, y_scale), strict=True
        ):
            buffer.copy_(value)
        self.fitted.fill_(True)

    @staticmethod
    def _moments(columns: list[Tensor], seen: list[Tensor] | None, name: str) -> tuple[Tensor, Tensor]:
        values = torch.cat(columns).double()
        if seen is None:
            shift, scale = values.mean(0), values.std(0, correction=0)
        else:
            keep = torch.cat(seen)
            count, values = keep.sum(0).clamp(min=1), torch.where(keep, values, torch.zeros_like(values))
            shift = values.sum(0) / count
            scale = (((values - shift).square() * keep).sum(0) / count).sqrt()
        constant = scale <= 1e-12 * values.abs().amax(0).clamp(min=1e-300)
        if bool(constant.any()):
            j = int(constant.nonzero()[0])
            raise ValueError(
                f"Expected every column of {name} to vary over the meta-training tasks. Got column {j} constant at "
                f"{float(shift[j]):g} over {len(columns)} tasks. Leave it out: nothing can be learned from it."
            )
        return shift, scale

    def x(self, x: Tensor) -> Tensor:
        """Return inputs in the network's units, with shape (..., d_x)."""
        return (x - self.x_shift) / self.x_scale

    def y(self, y: Tensor) -> Tensor:
        """Return outputs in the network's units, with shape (..., d_y)."""
        return (y - self.y_shift) / self.y_scale

    def y_inverse(self, y: Tensor) -> Tensor:
        """Return outputs in the user's units, with shape (..., d_y)."""
        return y * self.y_scale + self.y_shift

    def context(self, context: Context, missing_outputs: bool) -> Context:
        """Return a context in the network's units, zero where masked.

        Arguments:
            context: in the user's units.
            missing_outputs: single outputs may be missing; then `seen` is always there.

        Raises:
            ValueError: they may not, and are.
        """
        if context.seen is not None and not missing_outputs:
            raise ValueError(
                "Expected all outputs of each point, or none. Got points of which some outputs are masked. Build the model with "
                "missing_outputs=True, and train it on tasks (x, y, mask) with such gaps."
            )
        zero, observed = context.x.new_zeros(()), context.observed
        observed = observed.expand_as(context.y) if missing_outputs else observed
        x, y = torch.where(context.mask.unsqueeze(-1), self.x(context.x), zero), torch.where(observed, self.y(context.y), zero)
        return Context(x, y, context.mask, observed if missing_outputs else None)

    @property
    def log_volume(self) -> Tensor:
        """Return sum_j log scale_j: what a log-density per point loses when it goes back to the user's units."""
        return self.y_scale.double().log().sum()

    def volume(self, points: Context) -> Tensor:
        """Return what log-densities of these points lose on the way back to the user's units, with shape (T,)."""
        log_scale = to_compute(self.y_scale, torch.float64).log()
        return (points.observed.expand_as(points.y).sum(-2).to(log_scale.device) * log_scale).sum(-1)


class Reference(nn.Module):
    """Remember where the inputs of meta-training lay: their correlation, how far out they reached, and a sample of them.

    The distance of an input is that of Mahalanobis, ||C^{-1} z|| with z the standardised input and C C^T the correlation matrix, in
    units of its 99 % quantile over the points of meta-training: above 1 lies what the model has hardly seen.

    Arguments:
        x_dim: number of input columns.

    Example:
        >>> reference = Reference(1)
        >>> reference.fit([Task(torch.linspace(0, 4, 5).unsqueeze(-1), torch.zeros(5, 1))], lambda x: x - 2)
        >>> reference.distance(torch.tensor([[0.0], [2.0], [6.0]]))
        tensor([0.0000, 1.0000, 3.0000])
    """

    x_sample: Tensor
    x_factor: Tensor
    x_far: Tensor
    most_context: Tensor

    def __init__(self, x_dim: int) -> None:
        super().__init__()
        self.register_buffer("x_sample", torch.zeros(REFERENCE_SIZE, x_dim))
        self.register_buffer("x_factor", torch.eye(x_dim))
        self.register_buffer("x_far", torch.tensor(math.nan))
        self.register_buffer("most_context", torch.tensor(0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load what is there: files from before this module was there say nothing of it."""
        for name, buffer in self.named_buffers():
            state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def known(self) -> bool:
        """Return whether the model was meta-trained."""
        return not bool(self.x_far.isnan())

    def fit(self, tasks: Sequence[Task], scale: Callable[[Tensor], Tensor]) -> None:
        """Note the inputs of the meta-training tasks.

        Arguments:
            tasks: in the user's units.
            scale: from the user's units to the network's.
        """
        x = torch.cat([task.x for task in tasks])
        pick = torch.randint(len(x), (REFERENCE_SIZE,), generator=torch.Generator().manual_seed(0))
        z = to_compute(scale(x.to(self.x_sample)), torch.float64)
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        # A little of the identity: one-hot and repeated columns leave the correlation matrix singular.
        factor = cholesky((z.mT @ z) / len(z) + 1e-3 * eye)
        self.x_sample.copy_(x[pick])
        self.x_factor.copy_(factor)
        distance = self._raw(z, factor)
        self.x_far.copy_(distance.kthvalue(max(1, round(0.99 * len(z)))).values)

    def note_context(self, points: int) -> None:
        """Note how large a context meta-training shows."""
        self.most_context.fill_(max(points, int(self.most_context)))

    @staticmethod
    def _raw(z: Tensor, factor: Tensor) -> Tensor:
        return solve_lower(factor, z.flatten(0, -2).mT).square().sum(0).sqrt().reshape(z.shape[:-1])

    def distance(self, z: Tensor) -> Tensor:
        """Return the distance of standardised inputs (..., d_x), with shape (...); NaN before meta-training."""
        distance = self._raw(to_compute(z, torch.float64), to_compute(self.x_factor, torch.float64))
        return distance.to(z.dtype).to(z.device) / self.x_far
