"""Contexts of any size: points in batches, read as often as needed, of which only sums are kept.

A layer needs to know of a context what adds up over points. So a pass over the batches conditions one layer, the weights are drawn, and
the next pass computes its features from the inputs again: memory does not depend on the number of points, the data are read once a layer.

For training, the gradient of such a sum is either exact, with every batch computed again in the backward pass, or an unbiased estimate:
the sum enters with its full value and the gradient of one batch, drawn for each layer on its own, times the number of batches. (One draw
for all layers would be biased: products of gradients along the chain need independent draws.)
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnnp.seeds import check_count
from bnnp.tasks import Context, make_context

__all__ = ["Batches", "Reservoir", "Slices", "Stream", "is_stream"]

Part = Callable[[Context, tuple[Tensor, ...]], tuple[Tensor, ...]]


def is_stream(data: Any) -> bool:
    """Tell whether data that came without outputs are batches to be read: a function, or an iterable that is no array."""
    return callable(data) or (isinstance(data, Iterable) and not hasattr(data, "__array__") and not hasattr(data, "keys"))


class Slices:
    """Cut anything that can be sliced (arrays, memory maps, variables of netCDF, HDF5 and zarr files) into batches, lazily.

    Arguments:
        x: inputs with shape (N, d_x), or (T, N, d_x) of T tasks.
        y: outputs likewise.
        mask: True = observed, with shape (N,) or (T, N), or for each output, (N, d_y) or (T, N, d_y).
        size: points in a batch.

    Raises:
        ValueError: x, y and mask disagree in their number of points.

    Example:
        >>> [len(y) for x, y in Slices(torch.zeros(5, 1), torch.zeros(5, 1), size=2)]
        [2, 2, 1]
    """

    def __init__(self, x: Any, y: Any, mask: Any = None, *, size: int) -> None:
        mask = mask if mask is None or hasattr(mask, "shape") else np.asarray(mask)
        self.x, self.y, self.mask, self.size = x, y, mask, check_count(size, "context_batch_size")
        self.axis = 1 if len(x.shape) == 3 or len(y.shape) == 3 else 0
        sizes = {name: part.shape[self.axis] for name, part in (("x", x), ("y", y), ("mask", mask)) if part is not None}
        if len(set(sizes.values())) > 1:
            got = ", ".join(f"{n} points in {name}" for name, n in sizes.items())
            raise ValueError(f"Expected x, y and mask with the same points. Got {got}.")
        self.points = int(x.shape[self.axis])

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Yield batches (x, y), or (x, y, mask) where there is a mask; one empty batch where there is no point."""
        # Tables are cut by position, not by label.
        parts = [getattr(part, "iloc", part) for part in (self.x, self.y, self.mask) if part is not None]
        for i in range(0, max(self.points, 1), self.size):
            at = slice(i, i + self.size)
            yield tuple(part[at] if self.axis == 0 else part[:, at] for part in parts)


class Batches:
    """Read batches (x, y) or (x, y, mask) again and again, checked, and the same in every pass.

    Arguments:
        source: an iterable that starts anew each time, or a function that returns an iterator.
        x_dim: expected d_x.
        y_dim: expected d_y.
        dtype: precision of the model.
        device: where the model is.
        check: raises where outputs cannot have come from the likelihood.

    Raises:
        TypeError: something that can be read only once.
    """

    def __init__(
        self, source: Any, x_dim: int, y_dim: int, dtype: torch.dtype, device: torch.device, check: Callable[[Tensor], None]
    ) -> None:
        if not callable(source) and iter(source) is source:
            raise TypeError(
                f"Expected batches that can be read several times, once for each layer. Got {type(source).__name__}, which is used up "
                "after one pass. Pass the function that makes it (without calling it), or an object whose __iter__ starts anew."
            )
        self.source, self.check = source, check
        self.dims = {"x_dim": x_dim, "y_dim": y_dim, "dtype": dtype, "device": device}
        self.single = True
        self._seen: array[int] | None = None
        self._tasks = 0

    def __iter__(self) -> Iterator[Context]:
        """Yield the batches of one pass as contexts in the user's units.

        Raises:
            ValueError: no batch, a batch that does not fit, or data other than in the first pass.
            TypeError: something that is not a batch.
        """
        seen, first_row = array("L"), 0
        source = self.source() if callable(self.source) else self.source
        if not isinstance(source, Iterable):
            raise TypeError(f"Expected the function to return batches (x, y), or to yield them. Got {type(source).__name__}.")
        for number, batch in enumerate(source):
            if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
                raise TypeError(f"batch {number}: Expected a pair (x, y), or (x, y, mask). Got {_described(batch)}.")
            x, y, mask = (*batch, None)[:3]
            try:
                context, single = make_context(x, y, mask, **self.dims, first_row=first_row)  # type: ignore[arg-type]
                self.check(context.values)
            except (TypeError, ValueError) as error:
                raise type(error)(f"batch {number} (counted from 0, starting at row {first_row}): {error}") from None
            if number == 0 and self._seen is None:
                self.single, self._tasks = single, context.num_tasks
            if (single, context.num_tasks) != (self.single, self._tasks):
                want = "one task, without a task axis" if self.single else f"{self._tasks} task(s), (tasks, points, columns)"
                got = tuple(context.x.shape)[single:]
                raise ValueError(f"batch {number}: Expected points of {want}, as in the first batch. Got x with shape {got}.")
            seen.append(_fingerprint(context))
            if self._seen is not None and (number >= len(self._seen) or seen[-1] != self._seen[number]):
                raise ValueError(_changed(f"other data in batch {number}"))
            first_row += context.x.shape[1]
            yield context
        if not seen:
            if self._seen is None:
                raise ValueError("Expected at least one batch (x, y). Got none. An empty context is a pair of arrays of 0 rows.")
            raise ValueError(_changed("nothing"))
        if self._seen is not None and len(seen) < len(self._seen):
            raise ValueError(_changed(f"{len(seen)} batches instead of {len(self._seen)}"))
        self._seen = seen


def _described(batch: Any) -> str:
    return f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__


def _changed(what: str) -> str:
    return (
        "Expected the same batches, in the same order, in every pass: conditioning reads the data once for each layer. "
        f"Got {what} in a later pass. Turn off shuffling and random augmentation, and give a function or object that starts anew."
    )


def _fingerprint(context: Context) -> int:
    digest = 0
    for part in (context.x, context.y, context.observed):
        digest = zlib.crc32(part.detach().cpu().contiguous().numpy().tobytes(), digest)
    return zlib.crc32(str(tuple(context.x.shape)).encode(), digest)


@dataclass(frozen=True, eq=False)
class Reservoir:
    """Keep a random sample of the points that pass by, of a size that does not depend on their number.

    Every point gets a random key, and those with the smallest keys stay: samples of parts are samples of the whole.

    Arguments:
        points: the sample, with shape (T, n, ...).
        key: of each of them, with shape (T, n); 2 where masked.
    """

    points: Context
    key: Tensor

    @staticmethod
    def of(points: Context, size: int, generator: torch.Generator) -> Reservoir:
        """Return a sample of these points, of at most `size` for each task."""
        key = torch.rand(points.mask.shape, generator=generator).to(points.x.device).masked_fill(~points.mask, 2.0)
        return Reservoir(points, key)._cut(size)

    def joined(self, points: Context, size: int, generator: torch.Generator) -> Reservoir:
        """Return a sample of what was sampled before and of these points."""
        more = Reservoir.of(points, size, generator)
        return Reservoir(self.points.join(more.points), torch.cat([self.key, more.key], dim=1))._cut(size)

    def _cut(self, size: int) -> Reservoir:
        if self.key.shape[1] <= size:
            return self
        key, at = self.key.sort(dim=1)
        key, at = key[:, :size], at[:, :size].unsqueeze(-1)
        x, y = (part.gather(1, at.expand(-1, -1, part.shape[-1])) for part in (self.points.x, self.points.y))
        seen = None if self.points.seen is None else self.points.seen.gather(1, at.expand(-1, -1, y.shape[-1]))
        return Reservoir(Context(x, y, key < 1.5, seen), key)


class Stream:
    """Sum over batches of points, with one of two gradients, or none.

    Arguments:
        read: yields the batches of one pass, in the network's units.
        gradient: "exact"; "one_batch" for the estimate; or the numbers of the batches to be taken, one for each sum (modulo their
            number), in the place of random ones.
        generator: source of the random numbers of batches.
        watch: called with the number of the pass after each batch.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[Context]],
        gradient: str | Sequence[int] = "exact",
        generator: torch.Generator | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> None:
        if isinstance(gradient, str) and gradient not in ("exact", "one_batch"):
            raise ValueError(f"Expected gradient as 'exact' or 'one_batch'. Got {gradient!r}.")
        self._source, self.gradient, self.generator, self.watch = read, gradient, generator, watch
        self.passes = self.sums = 0
        self._shape: tuple[int, int] | None = None
        self._counts: Tensor | None = None

    def _read(self) -> Iterator[Context]:
        batches, points, counts = 0, 0, None
        for batch in self._source():
            batches, points = batches + 1, points + batch.x.shape[1]
            counts = batch.counts if counts is None else counts + batch.counts
            yield batch
            if self.watch is not None:
                self.watch(self.passes)
        self.passes += 1
        self._shape, self._counts = (batches, points), counts

    @property
    def shape(self) -> tuple[int, int]:
        """Return the numbers of batches and of points, padding included; reads the data once where they are not known yet."""
        if self._shape is None:
            for _ in self._read():
                pass
        assert self._shape is not None
        return self._shape

    @property
    def counts(self) -> Tensor:
        """Return the number of observed points of each task, with shape (T,)."""
        assert self.shape is not None and self._counts is not None
        return self._counts

    def sum(self, part: Part, weights: tuple[Tensor, ...], parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the sum over batches of part(batch, weights), term by term.

        Arguments:
            part: what is summed; it may also depend on `parameters`, which it knows.
            weights: drawn weights that it depends on.
            parameters: leaves that it depends on.
        """
        if not torch.is_grad_enabled():
            return self._total(part, weights)
        if self.gradient == "exact":
            return _ExactSum.apply(self, part, len(weights), *weights, *parameters)  # type: ignore[no-untyped-call]
        count = self.shape[0]
        if isinstance(self.gradient, str):
            device = "cpu" if self.generator is None else self.generator.device
            chosen = int(torch.randint(count, (), generator=self.generator, device=device))
        else:
            chosen = self.gradient[self.sums] % count
        self.sums += 1
        with torch.no_grad():
            total = self._total(part, weights)
        picked = next(batch for i, batch in enumerate(self._source()) if i == chosen)
        return tuple(whole + count * (one - one.detach()) for whole, one in zip(total, part(picked, weights), strict=True))

    def _total(self, part: Part, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        total: tuple[Tensor, ...] | None = None
        for batch in self._read():
            found = part(batch, weights)
            total = found if total is None else tuple(a + b for a, b in zip(total, found, strict=True))
        assert total is not None
        return total

    def gather(self, part: Part, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return part(batch, weights) of all batches, joined along the points (the axis before the last)."""
        found = [part(batch, weights) for batch in self._read()]
        return tuple(torch.cat(pieces, dim=-2) for pieces in zip(*found, strict=True))


class _ExactSum(torch.autograd.Function):
    """Sum over batches without keeping any of them: the backward pass computes each again."""

    @staticmethod
    def forward(ctx: Any, stream: Stream, part: Part, num_weights: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.stream, ctx.part, ctx.num_weights = stream, part, num_weights
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # what is not used gets no gradient, instead of zeros
        return stream._total(part, tensors[:num_weights])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        weights = tuple(t.detach().requires_grad_() for t in tensors[: ctx.num_weights])
        wanted = [*weights, *tensors[ctx.num_weights :]]
        totals: list[Tensor | None] = [None] * len(wanted)
        with torch.enable_grad():
            for batch in ctx.stream._source():
                terms = [(v, g) for v, g in zip(ctx.part(batch, weights), grads, strict=True) if v.requires_grad and g is not None]
                if not terms:
                    break
                outputs, cotangents = zip(*terms, strict=True)
                found = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
                totals = [old if g is None else g if old is None else old + g for old, g in zip(totals, found, strict=True)]
        return (None, None, None, *totals)
