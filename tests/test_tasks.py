"""What the border refuses, and how ragged tasks are laid side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bnnp
from bnnp.scaling import Standardiser
from bnnp.tasks import Context, Task, as_tasks, collate, make_context, split


def pairs(sizes: list[int], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 2, generator=g, dtype=torch.float64),
            torch.randn(n, 1, generator=g, dtype=torch.float64),
        )
        for n in sizes
    ]


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5))
def test_collate_keeps_every_point_and_pads_with_zeros(sizes: list[int]) -> None:
    data = pairs(sizes)
    batch = collate(data)
    assert batch.counts.tolist() == sizes
    for i, (x, y) in enumerate(data):
        assert torch.equal(batch.x[i][batch.mask[i]], x)
        assert torch.equal(batch.y[i][batch.mask[i]], y)
    assert float((batch.x.abs().sum(-1) * ~batch.mask).sum()) == 0.0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 1000))
def test_split_is_a_partition(sizes: list[int], seed: int) -> None:
    data = pairs(sizes)
    g = torch.Generator().manual_seed(seed)
    take = torch.tensor([int(torch.randint(0, n + 1, (1,), generator=g)) for n in sizes])
    cut = split(collate(data), take, g)
    assert cut.context.counts.tolist() == take.tolist()
    for i, (x, y) in enumerate(data):
        both_x = torch.cat([cut.context.x[i][cut.context.mask[i]], cut.target.x[i][cut.target.mask[i]]])
        both_y = torch.cat([cut.context.y[i][cut.context.mask[i]], cut.target.y[i][cut.target.mask[i]]])
        assert torch.equal(both_x[both_x[:, 0].argsort()], x[x[:, 0].argsort()])
        assert torch.equal(both_y[both_x[:, 0].argsort()], y[x[:, 0].argsort()])


def test_split_visits_every_point_equally_often() -> None:
    batch = collate([(torch.arange(6.0).unsqueeze(-1), torch.zeros(6, 1))])
    g = torch.Generator().manual_seed(0)
    counts = torch.zeros(6)
    for _ in range(600):
        counts[split(batch, torch.tensor([2]), g).context.x.flatten().long()] += 1
    assert float((counts - 200).abs().max()) < 5 * (600 * (1 / 3) * (2 / 3)) ** 0.5


def test_split_refuses_a_context_larger_than_its_task() -> None:
    with pytest.raises(ValueError, match=r"at most 3 points, the size of task 1\. Got 4"):
        split(collate(pairs([5, 3])), torch.tensor([4, 4]), torch.Generator())


def test_masked_garbage_never_enters() -> None:
    x = np.array([[[0.0, 1.0], [np.nan, np.inf]]])
    y = np.array([[[1.0], [np.nan]]])
    context, single = make_context(x, y, np.array([[True, False]]), x_dim=2, y_dim=1)
    assert not single
    assert bool(context.x.isfinite().all()) and bool(context.y.isfinite().all())


def test_one_dimensional_arrays_are_one_column() -> None:
    context, single = make_context(np.zeros(3), np.zeros(3), x_dim=1, y_dim=1)
    assert single and context.x.shape == (1, 3, 1)


BAD_CONTEXTS = {
    "width of x": (np.zeros((4, 3)), np.zeros((4, 1)), None, ValueError, "xc with 2 columns.*Got shape \\(4, 3\\)"),
    "width of y": (np.zeros((4, 2)), np.zeros((4, 2)), None, ValueError, "yc with 1 columns"),
    "number of points": (np.zeros((4, 2)), np.zeros((3, 1)), None, ValueError, "4 inputs for 3 outputs"),
    "NaN": (np.array([[0.0, np.nan]]), np.zeros((1, 1)), None, ValueError, "finite numbers in xc. Got nan at index"),
    "infinity": (np.zeros((1, 2)), np.array([[np.inf]]), None, ValueError, "finite numbers in yc. Got inf"),
    "mask shape": (np.zeros((4, 2)), np.zeros((4, 1)), np.ones(3, bool), ValueError, "mask_c with shape \\(4,\\)"),
    "mask type": (np.zeros((4, 2)), np.zeros((4, 1)), np.ones(4), TypeError, "booleans"),
    "text": (np.array([["a", "b"]]), np.zeros((1, 1)), None, TypeError, "numbers"),
    "ragged list": ([[0.0, 1.0], [2.0]], [[0.0], [1.0]], None, TypeError, "same number of columns"),
    "four axes": (np.zeros((1, 1, 4, 2)), np.zeros((1, 1, 4, 1)), None, ValueError, "axes"),
}


@pytest.mark.parametrize("case", BAD_CONTEXTS)
def test_bad_contexts_get_one_clear_error(case: str) -> None:
    x, y, mask, kind, words = BAD_CONTEXTS[case]
    with pytest.raises(kind, match=words):
        bnnp.BNNP(2, 1, hidden=(3,)).condition(x, y, mask=mask, num_samples=2)


BAD_TASKS = {
    "one data set": ((torch.zeros(5, 2), torch.zeros(5, 1)), ValueError, "a single data set"),
    "one array": (torch.zeros(5, 2), TypeError, "one pair per data set"),
    "no pairs": ([torch.zeros(5, 2)] * 3, (TypeError, ValueError), r"tasks\[0\]"),
    "wrong width": ([(torch.zeros(5, 2), torch.zeros(5, 1)), (torch.zeros(5, 3), torch.zeros(5, 1))], ValueError, r"tasks\[1\]"),
    "one point": ([(torch.zeros(5, 2), torch.zeros(5, 1)), (torch.zeros(1, 2), torch.zeros(1, 1))], ValueError, "at least 2 points"),
    "NaN": ([(torch.zeros(5, 2), torch.full((5, 1), float("nan")))] * 2, ValueError, "finite"),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_bad_collections_get_one_clear_error(case: str) -> None:
    tasks, kind, words = BAD_TASKS[case]
    with pytest.raises(kind, match=words):
        as_tasks(tasks, 2, 1, torch.float64)


def test_scaling_standardises_and_comes_back() -> None:
    tasks = [Task(3.0 + 2.0 * x, -1.0 + 5.0 * y) for x, y in pairs([20, 30])]
    scaling = Standardiser(2, 1).double()
    scaling.fit(tasks)
    x, y = torch.cat([t.x for t in tasks]), torch.cat([t.y for t in tasks])
    torch.testing.assert_close(scaling.x(x).mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(scaling.x(x).std(0, correction=0), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(scaling.y_inverse(scaling.y(y)), y)


@pytest.mark.parametrize("column", ["x", "y"])
def test_constant_columns_are_refused(column: str) -> None:
    x, y = torch.randn(5, 2), torch.randn(5, 1)
    if column == "x":
        x[:, 1] = 7.0
    else:
        y[:] = 7.0
    with pytest.raises(ValueError, match=f"column of {column} to vary.*constant at 7"):
        Standardiser(2, 1).fit([Task(x, y), Task(x, y)])


def test_empty_context_has_no_points() -> None:
    assert Context.empty(2, 3, 1).x.shape == (2, 0, 3)


def test_any_numpy_memory_is_accepted() -> None:
    frozen = np.arange(6.0)
    frozen.flags.writeable = False
    model = bnnp.BNNP(1, 1, hidden=(np.int64(3),), seed=np.int64(0))  # type: ignore[arg-type]
    a = model.condition(frozen, frozen[::-1], num_samples=2, seed=np.int64(1)).elbo  # type: ignore[arg-type]
    b = model.condition(np.arange(6.0), np.arange(6.0)[::-1].copy(), num_samples=2, seed=1).elbo
    assert torch.equal(a, b)
    assert collate([(frozen, frozen), (frozen[:2], frozen[:2])]).counts.tolist() == [6, 2]


def test_widths_must_be_a_sequence() -> None:
    with pytest.raises(TypeError, match=r"sequence of widths such as \(64, 64\). Got 8"):
        bnnp.BNNP(1, 1, hidden=8)  # type: ignore[arg-type]


def test_pairs_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pair 0 with the same points\. Got 3 inputs for 2 outputs"):
        collate([(torch.ones(3, 1), torch.ones(2, 1)), (torch.ones(3, 1), torch.ones(3, 1))])
    with pytest.raises(ValueError, match="one context size for each of 2 tasks"):
        split(collate(pairs([3, 4])), torch.tensor([2]), torch.Generator())


def test_flat_arrays_are_data_sets_where_there_is_one_column() -> None:
    model = bnnp.BNNP(1, 1, hidden=(3,))
    flat = model.condition([np.arange(3.0), np.arange(5.0)], [np.ones(3), np.ones(5)], num_samples=2)
    assert flat.counts.tolist() == [3, 5]


def test_evaluate_takes_tasks() -> None:
    tasks = [Task(x.float(), y.float()) for x, y in pairs([6, 6])]
    assert bnnp.evaluate(bnnp.BNNP(2, 1, hidden=(3,)), tasks, context_fraction=0.5, num_samples=2).num_tasks == 2


@pytest.mark.parametrize("shape", [(0,), (0, 2)])
def test_masked_tasks_without_points_are_collated(shape: tuple[int, ...]) -> None:
    nothing = (torch.ones(0, 1), torch.ones(0, 2), torch.ones(shape, dtype=torch.bool))
    some = (torch.ones(3, 1), torch.ones(3, 2), torch.tensor([True, False, True]))
    assert collate([nothing, some]).mask.tolist() == [[False] * 3, [True, False, True]]
