"""Tasks that are read from their source when training asks for them, and checked then."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bnnp.data.collection import Collection
from bnnp.tasks import Task, as_tasks

__all__ = ["LAZY_BYTES", "LazyTasks"]

LAZY_BYTES = 2**28
"""Collections that would take more memory than this are read while training goes on."""
SAMPLE_BYTES = 2**26


class LazyTasks(Sequence[Task]):
    """Give the tasks of a collection as `Task`, each read and checked at every visit.

    Arguments:
        collection: in the user's units.
        dtype: precision of the result.
        name: what the collection is called in error messages.

    Example:
        >>> tasks = LazyTasks(Collection.of([(np.zeros((3, 1)), np.ones(3))], ["t"], ["y"]), torch.float32)
        >>> len(tasks), len(tasks[0])
        (1, 3)
    """

    def __init__(self, collection: Collection, dtype: torch.dtype, name: str = "tasks") -> None:
        self.collection, self.dtype, self.name = collection, dtype, name

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self.collection)

    def __getitem__(self, index: Any) -> Any:
        """Return one task, or for a slice a list; a task without observed points has length 0."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = operator.index(index)
        source = self.collection
        try:
            (task,) = as_tasks([source[i]], source.x_dim, source.y_dim, self.dtype, name="", least=0)
        except (TypeError, ValueError) as error:
            where = f"{self.name}[{i}] ({source.names[i]})"
            raise type(error)(f"{where}: {str(error).removeprefix('[0]: ')}") from None
        return task

    def __iter__(self) -> Iterator[Task]:
        """Yield the tasks one after another."""
        return (self[i] for i in range(len(self)))

    @property
    def sizes(self) -> Sequence[int]:
        """Return the number of points of each task, those without any output included."""
        return self.collection.sizes

    def sample(self) -> list[Task]:
        """Return tasks evenly spaced over the collection, as many as a moderate memory takes, those without points left out."""
        least = min(len(self), 2)
        count = max(least, min(len(self), int(len(self) * SAMPLE_BYTES / max(self.collection.nbytes, 1))))
        found = [self[int(i)] for i in np.linspace(0, len(self) - 1, count).round()]
        return [task for task in found if len(task) > 0]
