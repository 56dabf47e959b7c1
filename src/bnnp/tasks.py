"""Data sets as the package sees them: padded, masked, checked once.

A task is one data set (x, y). Tasks of different sizes are laid side by side in tensors with axes tasks, points, units and a
mask that is True where a point was observed. Every shape and value check of user data is in this file; behind it nothing is
checked again. Masked entries are set to zero on entry, so whatever stood in the padding can reach neither value nor gradient.
Where a point has several outputs, some of them may be missing: `seen` says which were observed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Array", "Context", "Task", "TaskBatch", "as_tasks", "check_inputs", "collate", "make_context", "split"]

Array = Tensor | np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Context:
    """Hold T data sets of up to N points as padded tensors.

    Arguments:
        x: inputs with shape (T, N, d_x), zero where masked.
        y: outputs with shape (T, N, d_y), zero where masked.
        mask: True where any output of a point was observed, with shape (T, N).
        seen: True where an output was observed, with shape (T, N, d_y); None where all outputs of observed points were.

    Example:
        >>> Context.empty(num_tasks=3, x_dim=2, y_dim=1).counts
        tensor([0, 0, 0])
    """

    x: Tensor
    y: Tensor
    mask: Tensor
    seen: Tensor | None = None

    @staticmethod
    def empty(num_tasks: int, x_dim: int, y_dim: int, like: Tensor | None = None) -> Context:
        """Return `num_tasks` data sets without a point, on the device and in the dtype of `like`."""
        base = torch.zeros(()) if like is None else like
        mask = torch.zeros(num_tasks, 0, dtype=torch.bool, device=base.device)
        return Context(base.new_zeros(num_tasks, 0, x_dim), base.new_zeros(num_tasks, 0, y_dim), mask)

    @property
    def num_tasks(self) -> int:
        """Return the number of tasks T."""
        return self.x.shape[0]

    @property
    def counts(self) -> Tensor:
        """Return the number of observed points of each task, with shape (T,)."""
        return self.mask.sum(-1)

    @property
    def observed(self) -> Tensor:
        """Return True where an output was observed, with shape (T, N, d_y), or (T, N, 1) where that is the same for all outputs."""
        mask = self.mask.unsqueeze(-1)
        return mask if self.seen is None else mask & self.seen

    @property
    def values(self) -> Tensor:
        """Return the outputs that were observed, in one row."""
        return self.y[self.observed.expand_as(self.y)]

    def to(self, *args: Any, **kwargs: Any) -> Context:
        """Move inputs and outputs as `Tensor.to` does; the mask follows the device only."""
        x = self.x.to(*args, **kwargs)
        seen = None if self.seen is None else self.seen.to(x.device)
        return Context(x, self.y.to(*args, **kwargs), self.mask.to(x.device), seen)

    def rows(self, start: int, stop: int) -> Context:
        """Return the points from `start` to `stop` of every task."""
        seen = None if self.seen is None else self.seen[:, start:stop]
        return Context(self.x[:, start:stop], self.y[:, start:stop], self.mask[:, start:stop], seen)

    def join(self, other: Context) -> Context:
        """Return the tasks with the points of both, those of `self` first."""
        return Context(
            torch.cat([self.x, other.x], dim=1),
            torch.cat([self.y, other.y], dim=1),
            torch.cat([self.mask, other.mask], dim=1),
            None if self.seen is None and other.seen is None else torch.cat([self._full_seen(), other._full_seen()], dim=1),
        )

    def _full_seen(self) -> Tensor:
        return torch.ones_like(self.y, dtype=torch.bool) if self.seen is None else self.seen


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """Hold a batch of tasks cut in two: what is conditioned on, and what is predicted.

    Arguments:
        context: the points that the posterior sees.
        target: the points that it is asked about, for the same tasks in the same order.
    """

    context: Context
    target: Context

    def to(self, *args: Any, **kwargs: Any) -> TaskBatch:
        """Move both halves as `Tensor.to` does."""
        return TaskBatch(self.context.to(*args, **kwargs), self.target.to(*args, **kwargs))


@dataclass(frozen=True, eq=False)
class Task:
    """Hold one checked data set: x with shape (n, d_x) and y with shape (n, d_y), both on the CPU.

    `seen` is True where an output was observed, with shape (n, d_y), or None where all were.

    Example:
        >>> x, y = Task(torch.zeros(4, 2), torch.zeros(4, 1))
        >>> x.shape
        torch.Size([4, 2])
    """

    x: Tensor
    y: Tensor
    seen: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of points."""
        return self.x.shape[0]

    @property
    def observed(self) -> Tensor:
        """Return True where an output was observed, with shape (n, d_y)."""
        return torch.ones_like(self.y, dtype=torch.bool) if self.seen is None else self.seen

    def __iter__(self) -> Any:
        """Unpack as `x, y = task`."""
        return iter((self.x, self.y))


def _as_tensor(value: Any, name: str, dtype: torch.dtype | None) -> Tensor:
    if isinstance(value, Tensor):
        tensor = value.clone()  # what the caller does with his tensor afterwards must not reach us
    else:
        if isinstance(value, np.ma.MaskedArray):  # as netCDF readers give; its fill values are no data
            value = np.ma.filled(value.astype(np.result_type(value.dtype, np.float32)), np.nan)
        try:
            # A copy, since torch takes neither negative strides nor memory that cannot be written to.
            tensor = torch.from_numpy(np.array(value))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"Expected {name} as a tensor or array of numbers. Got {type(value).__name__}: {error}. "
                "Encode categories as numbers and give every point the same number of columns."
            ) from None
    if tensor.is_complex():
        raise TypeError(f"Expected real numbers in {name}. Got {tensor.dtype}.")
    if dtype is None:
        dtype = tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype()
    return tensor.to(dtype)


def _with_columns(tensor: Tensor, name: str, dim: int | None, axes: int) -> Tensor:
    """Give `tensor` its last axis of units and check its width; `axes` is the number of axes it should have."""
    if tensor.ndim == axes - 1 and dim in (None, 1):
        tensor = tensor.unsqueeze(-1)
    layout = "(points, columns)" if axes == 2 else "(tasks, points, columns)"
    if tensor.ndim != axes:
        raise ValueError(f"Expected {name} with {axes} axes, {layout}. Got shape {tuple(tensor.shape)}.")
    if dim is not None and tensor.shape[-1] != dim:
        raise ValueError(
            f"Expected {name} with {dim} columns, {layout}. Got shape {tuple(tensor.shape)}, "
            f"so {tensor.shape[-1]} columns. Check which axis holds the columns, and the x_dim and y_dim of the model."
        )
    return tensor


def _check_finite(tensor: Tensor, name: str, keep: Tensor | None = None, first_row: int | None = None) -> None:
    bad = ~tensor.isfinite()
    if keep is not None:
        bad = bad & keep
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        value = float(tensor[where])
        row = "" if first_row is None else f", row {first_row + where[-2]} of the whole context"
        raise ValueError(
            f"Expected finite numbers in {name}. Got {value} at index {where}{row}, {int(bad.sum())} such entries in all. "
            "Drop these points, or mask them (mask=False); of a point with several outputs single ones can be masked."
        )


def check_inputs(x: Any, dim: int, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Check inputs alone: finite, with `dim` columns; return shape (n, dim) or (T, n, dim).

    Raises:
        ValueError: the shape does not fit or an entry is not finite.
        TypeError: it is not an array of numbers.
    """
    tensor = _as_tensor(x, name, dtype).to(device)
    tensor = _with_columns(tensor, name, dim, 3 if tensor.ndim == 3 else 2)
    _check_finite(tensor, name)
    return tensor


def _check_mask(mask: Any, shape: tuple[int, ...], y_dim: int, name: str) -> Tensor:
    tensor = mask if isinstance(mask, Tensor) else torch.as_tensor(np.asarray(mask))
    if tensor.dtype != torch.bool:
        raise TypeError(f"Expected {name} as booleans, True where a point was observed. Got {tensor.dtype}.")
    if tuple(tensor.shape) not in (shape, (*shape, y_dim)):
        raise ValueError(
            f"Expected {name} with shape {shape}, one entry per point, or {(*shape, y_dim)}, one per output of each point. "
            f"Got shape {tuple(tensor.shape)}. A mask has the axes (tasks, points), or (tasks, points, outputs)."
        )
    return tensor


def make_context(
    x: Any,
    y: Any,
    mask: Any = None,
    *,
    x_dim: int,
    y_dim: int,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    name: str = "c",
    first_row: int | None = None,
) -> tuple[Context, bool]:
    """Check one data set (n, d), a batch (T, N, d), or a list of T data sets of any sizes, and return it as a `Context`.

    Arguments:
        x: inputs with shape (n, d_x) or (T, N, d_x); (n,) is taken as one column. Or a list of T arrays with shape (n_t, d_x).
        y: outputs likewise.
        mask: booleans with shape (n,) or (T, N), True = observed; or (n, d_y) or (T, N, d_y), True = this output was observed. Everything
            is observed where it is not given.
        x_dim: expected d_x.
        y_dim: expected d_y.
        dtype: precision of the result; that of x where it is not given.
        device: where the result is; that of x where it is not given.
        name: suffix in error messages, "c" for context and "t" for target.
        first_row: where these points are one batch of many: the number of its first row among all, for error messages.

    Returns:
        The context, and whether one data set came without a task axis.

    Raises:
        ValueError: shapes that do not fit, or an observed entry that is not finite.
        TypeError: something that is not an array of numbers, or a mask that is not boolean.

    Example:
        >>> context, single = make_context(np.zeros((5, 2)), np.zeros(5), x_dim=2, y_dim=1)
        >>> context.x.shape, single
        (torch.Size([1, 5, 2]), True)
    """
    if _is_list_of_arrays(x, x_dim):
        return _ragged(x, y, mask, x_dim, y_dim, dtype, device, name), False
    xs, ys = _as_tensor(x, f"x{name}", dtype), _as_tensor(y, f"y{name}", dtype)
    device = xs.device if device is None else device
    xs, ys = xs.to(device), ys.to(device)
    single = xs.ndim < 3 and not (xs.ndim == 2 and ys.ndim == 3)
    axes = 2 if single else 3
    xs, ys = _with_columns(xs, f"x{name}", x_dim, axes), _with_columns(ys, f"y{name}", y_dim, axes)
    if xs.shape[:-1] != ys.shape[:-1]:
        raise ValueError(
            f"Expected x{name} and y{name} with the same points. Got shapes {tuple(xs.shape)} and {tuple(ys.shape)}: "
            f"{xs.shape[-2]} inputs for {ys.shape[-2]} outputs."
        )
    given = None if mask is None else _check_mask(mask, tuple(xs.shape[:-1]), ys.shape[-1], f"mask_{name}").to(device)
    keep = given if given is None or given.ndim == xs.ndim else given.unsqueeze(-1)
    point = None if keep is None else keep.any(-1, keepdim=True)
    _check_finite(xs, f"x{name}", point, first_row)
    _check_finite(ys, f"y{name}", keep, first_row)
    if keep is None or point is None:
        mask, seen = torch.ones(xs.shape[:-1], dtype=torch.bool, device=device), None
    else:
        zero = xs.new_zeros(())
        xs, ys, mask = torch.where(point, xs, zero), torch.where(keep, ys, zero), point.squeeze(-1)
        seen = keep if bool((point & ~keep).any()) else None
    context = Context(xs, ys, mask, seen)
    return (_with_task_axis(context) if single else context), single


def _with_task_axis(points: Context) -> Context:
    seen = None if points.seen is None else points.seen.unsqueeze(0)
    return Context(points.x.unsqueeze(0), points.y.unsqueeze(0), points.mask.unsqueeze(0), seen)


def _is_list_of_arrays(x: Any, x_dim: int) -> bool:
    """Tell data sets from points: arrays (n, d), or (n,) where there is one column."""
    if not isinstance(x, list | tuple) or not x or not all(isinstance(part, Tensor | np.ndarray) for part in x):
        return False
    flat = x_dim == 1 and all(part.ndim == 1 for part in x) and any(len(part) != 1 for part in x)
    return flat or all(part.ndim == 2 for part in x)


def _ragged(
    x: Any, y: Any, mask: Any, x_dim: int, y_dim: int, dtype: torch.dtype | None, device: torch.device | None, name: str
) -> Context:
    if mask is not None:
        raise ValueError("Expected no mask with a list of data sets, which have their own sizes. Got one: give padded arrays instead.")
    if not isinstance(y, list | tuple) or len(y) != len(x):
        got = f"{len(y)} entries" if isinstance(y, list | tuple) else type(y).__name__
        raise ValueError(f"Expected y{name} as a list of {len(x)} arrays, one for each in x{name}. Got {got}.")
    parts = []
    for i, (one_x, one_y) in enumerate(zip(x, y, strict=True)):
        try:
            part, _ = make_context(one_x, one_y, x_dim=x_dim, y_dim=y_dim, dtype=dtype, device=device, name=name)
        except (TypeError, ValueError) as error:
            raise type(error)(f"data set {i}: {error}") from None
        parts.append((part.x[0], part.y[0]))
    return collate(parts)


def as_tasks(tasks: Any, x_dim: int, y_dim: int, dtype: torch.dtype, name: str = "tasks", least: int = 2) -> list[Task]:
    """Check a collection of data sets and return them as a list of `Task`.

    Arguments:
        tasks: a sequence of pairs (x, y), each with shapes (n, d_x) and (n, d_y), of any sizes; or triples (x, y, mask) with a boolean
            mask (n,) or (n, d_y), True = observed. Points of which nothing was observed are left out.
        x_dim: expected d_x.
        y_dim: expected d_y.
        dtype: precision of the result.
        name: what the collection is called in error messages.
        least: the smallest number of points a task may have.

    Raises:
        ValueError: fewer than two tasks where many are expected, a task that does not fit, one that is too small.
        TypeError: it is not a sequence of pairs.

    Example:
        >>> [len(task) for task in as_tasks([(np.zeros((3, 1)), np.zeros(3))], 1, 1, torch.float32)]
        [3]
    """
    if isinstance(tasks, Tensor | np.ndarray) or not isinstance(tasks, Sequence):
        raise TypeError(
            f"Expected {name} as a list of pairs (x, y), one pair per data set. Got {type(tasks).__name__}. A single table "
            "holds many tasks where it has many subjects, days or windows: cut it into one pair for each."
        )
    if len(tasks) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in tasks):
        raise ValueError(
            f"Expected {name} as a list of pairs (x, y), one pair per data set. Got one pair of arrays, so a single data "
            "set: a prior is learned from many. Cut the data into tasks (subjects, days, windows) and pass [(x1, y1), (x2, y2), ...]."
        )
    checked = []
    for i, task in enumerate(tasks):
        try:
            x, y, mask = (task.x, task.y, task.seen) if isinstance(task, Task) else (*task, None)[: max(3, len(task))]
        except (TypeError, ValueError):
            raise TypeError(f"Expected {name}[{i}] as a pair (x, y), or (x, y, mask). Got {type(task).__name__}.") from None
        try:
            context, _ = make_context(x, y, mask, x_dim=x_dim, y_dim=y_dim, dtype=torch.float64, device=torch.device("cpu"), name="")
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}[{i}]: {error}") from None
        if context.num_tasks != 1:
            raise ValueError(f"{name}[{i}]: Expected one data set, x with shape (n, {x_dim}). Got shape {tuple(context.x.shape)}.")
        count = int(context.counts)
        if count < least:
            raise ValueError(
                f"{name}[{i}]: Expected at least {least} points, one for the context and one for the target. "
                f"Got {count}. Leave such tasks out of meta-training; they can be conditioned on afterwards."
            )
        at = context.mask[0]
        checked.append(Task(context.x[0, at], context.y[0, at], None if context.seen is None else context.seen[0, at]))
    _check_resolution([task.x for task in checked], f"x of {name}", dtype)
    _check_resolution([task.y for task in checked], f"y of {name}", dtype)
    return [Task(task.x.to(dtype), task.y.to(dtype), task.seen) for task in checked]


def _check_resolution(columns: list[Tensor], name: str, dtype: torch.dtype) -> None:
    """Refuse columns whose variation is lost in the rounding of `dtype`: large offsets, such as seconds since 1970."""
    if dtype == torch.float64 or not columns:
        return
    values = torch.cat(columns)
    lost, spread = (values - values.to(dtype).double()).abs().amax(0), values.std(0, correction=0)
    bad = (lost > 0.01 * spread) & (spread > 0)
    if bool(bad.any()):
        j = int(bad.nonzero()[0])
        raise ValueError(
            f"Expected columns of {name} whose variation {dtype} can hold. Got column {j} around {float(values[:, j].mean()):g} with a "
            f"standard deviation of {float(spread[j]):g}. Subtract an offset, or use float64: model.double()."
        )


def collate(pairs: Sequence[Any], dtype: torch.dtype | None = None, device: torch.device | None = None) -> Context:
    """Lay checked pairs (x, y) of any sizes side by side, padded to the longest.

    Arguments:
        pairs: pairs of tensors with shapes (n, d_x) and (n, d_y); n may differ and may be 0 or 1. Or triples with a boolean mask (n,) or
            (n, d_y), True = observed.
        dtype: precision of the result; that of the first x where it is not given.
        device: where the result is; that of the first x where it is not given.

    Returns:
        A `Context` with shape (T, max n, ...).

    Example:
        >>> pairs = [(torch.ones(2, 1), torch.ones(2, 1)), (torch.ones(0, 1), torch.ones(0, 1))]
        >>> collate(pairs).mask
        tensor([[ True,  True],
                [False, False]])
    """
    if len(pairs) == 0:
        raise ValueError("Expected at least one pair (x, y) to collate. Got none.")
    triples = [(pair.x, pair.y, pair.seen) if isinstance(pair, Task) else (*pair, None)[:3] for pair in pairs]
    xs, ys = (
        [_with_columns(_as_tensor(part, "each x and y", None), "each x and y", None, 2) for part in side]
        for side in tuple(zip(*triples, strict=True))[:2]
    )
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if x.shape[0] != y.shape[0]:
            raise ValueError(f"Expected x and y of pair {i} with the same points. Got {x.shape[0]} inputs for {y.shape[0]} outputs.")
    counts = torch.tensor([x.shape[0] for x in xs])
    mask = torch.arange(int(counts.max())) < counts.unsqueeze(-1)
    x = torch.nn.utils.rnn.pad_sequence(xs, batch_first=True)
    y = torch.nn.utils.rnn.pad_sequence(ys, batch_first=True)
    context = Context(x, y, mask.to(x.device))
    if any(given is not None for _, _, given in triples):
        given = [torch.ones(len(y), dtype=torch.bool) if g is None else g for y, (_, _, g) in zip(ys, triples, strict=True)]
        masks = [_check_mask(g, (len(y),), y.shape[1], "each mask") for y, g in zip(ys, given, strict=True)]
        whole = [(m if m.ndim == 2 else m.unsqueeze(-1)).to(x.device).expand(y.shape) for m, y in zip(masks, ys, strict=True)]
        seen = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
        context, _ = make_context(x, y, seen, x_dim=x.shape[-1], y_dim=y.shape[-1], name="")
    return context.to(device=device or x.device, dtype=dtype or x.dtype)


def split(batch: Context, num_context: Tensor, generator: torch.Generator) -> TaskBatch:
    """Cut each task at random in two disjoint halves.

    Arguments:
        batch: T tasks of up to N points.
        num_context: how many points of each go into the context, with shape (T,).
        generator: source of the random choice.

    Raises:
        ValueError: a context larger than its task.

    Example:
        >>> tasks = collate([(torch.rand(5, 1), torch.rand(5, 1))])
        >>> split(tasks, torch.tensor([2]), torch.Generator()).target.counts
        tensor([3])
    """
    if num_context.shape != batch.counts.shape:
        raise ValueError(f"Expected one context size for each of {batch.num_tasks} tasks. Got shape {tuple(num_context.shape)}.")
    counts = batch.counts.to(num_context.device)
    if bool((num_context > counts).any()) or bool((num_context < 0).any()):
        i = int(((num_context > counts) | (num_context < 0)).nonzero()[0])
        raise ValueError(
            f"Expected a context of at most {int(counts[i])} points, the size of task {i}. Got {int(num_context[i])}. "
            "Lower the context range."
        )
    score = torch.rand(batch.mask.shape, generator=generator, device=generator.device).to(batch.x.device)
    order = score.masked_fill(~batch.mask, 2.0).argsort(dim=-1)
    take = num_context.to(batch.x.device)
    widest, rest = int(take.max()), int((counts.to(take.device) - take).max())
    position = torch.arange(batch.x.shape[1], device=batch.x.device)
    first = order[:, :widest]
    last = (order.gather(1, (position + take.unsqueeze(-1)).clamp(max=max(batch.x.shape[1] - 1, 0))))[:, :rest]
    mask_c = position[:widest] < take.unsqueeze(-1)
    mask_t = position[:rest] < (batch.counts - take).unsqueeze(-1)
    return TaskBatch(_gather(batch, first, mask_c), _gather(batch, last, mask_t))


def _gather(batch: Context, index: Tensor, mask: Tensor) -> Context:
    keep, at = mask.unsqueeze(-1), index.unsqueeze(-1)
    x = torch.where(keep, batch.x.gather(1, at.expand(-1, -1, batch.x.shape[-1])), batch.x.new_zeros(()))
    y = torch.where(keep, batch.y.gather(1, at.expand(-1, -1, batch.y.shape[-1])), batch.y.new_zeros(()))
    seen = None if batch.seen is None else batch.seen.gather(1, at.expand(-1, -1, batch.y.shape[-1])) & keep
    return Context(x, y, mask, seen)
