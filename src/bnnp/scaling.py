"""The normaliser: what the network sees has mean zero and standard deviation one over the meta-training tasks.

It is fitted once, on the meta-training tasks, and lives in the model: inputs arrive and predictions leave in the user's
units. Before it is fitted it is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bnnp.tasks import Task

__all__ = ["Standardiser"]


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
        """Set shifts and scales to mean and standard deviation over all points of `tasks`.

        Raises:
            ValueError: a column has the same value at every point of every task.
        """
        x_shift, x_scale = self._moments([task.x for task in tasks], "x")
        y_shift, y_scale = self._moments([task.y for task in tasks], "y") if self.scale_y else (self.y_shift, self.y_scale)
        for buffer, value in zip(
            (self.x_shift, self.x_scale, self.y_shift, self.y_scale), (x_shift, x_scale, y_shift, y_scale), strict=True
        ):
            buffer.copy_(value)
        self.fitted.fill_(True)

    @staticmethod
    def _moments(columns: list[Tensor], name: str) -> tuple[Tensor, Tensor]:
        values = torch.cat(columns).double()
        shift, scale = values.mean(0), values.std(0, correction=0)
        constant = scale <= 1e-12 * values.abs().amax(0).clamp(min=1e-300)
        if bool(constant.any()):
            j = int(constant.nonzero()[0])
            raise ValueError(
                f"Expected every column of {name} to vary over the meta-training tasks. Got column {j} constant at "
                f"{float(values[0, j]):g} over {len(columns)} tasks. Leave it out: nothing can be learned from it."
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

    @property
    def log_volume(self) -> Tensor:
        """Return sum_j log scale_j: what a log-density per point loses when it goes back to the user's units."""
        return self.y_scale.double().log().sum()
