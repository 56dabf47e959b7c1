"""Grids in batches: every point once and at its place, missing ones left out, never more than a batch in memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bnnp
from bnnp.data import grid_batches

SHAPE = (7, 5, 3)
AXES = [np.arange(7) * 10, np.linspace(-1, 1, 5), np.array([0.5, 2.0, 1.0])]  # neither evenly spaced nor sorted


class Variable:
    """Be a variable of a file that gives slices and nothing else, and remember how large they were."""

    def __init__(self, values: Any) -> None:
        self.values, self.shape, self.sizes = values, values.shape, []

    def __getitem__(self, at: Any) -> Any:
        assert all(isinstance(part, slice) for part in (at if isinstance(at, tuple) else (at,)))
        block = self.values[at]
        self.sizes.append(block.size)
        return block


def field(missing: float = 0.0, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return values on the grid, a share of them missing."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=SHAPE)
    values[rng.random(SHAPE) < missing] = np.nan
    return values


def table(*fields: Any) -> tuple[Any, Any]:
    """Write grids out as a table of points, one by one."""
    rows = [
        ([AXES[d][i] for d, i in enumerate(at)], [f[at] for f in fields])
        for at in np.ndindex(*SHAPE)
        if not any(np.isnan(f[at]) for f in fields)
    ]
    x, y = zip(*rows, strict=True)
    return np.array(x), np.array(y)


def joined(batches: Any) -> tuple[Any, Any]:
    x, y = zip(*batches, strict=True)
    return np.concatenate(x), np.concatenate(y)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 14, 15, 16, 40, 104, 105, 1000])
@pytest.mark.parametrize("missing", [0.0, 0.6])
def test_batches_are_the_points_in_row_major_order(size: int, missing: float) -> None:
    values = field(missing)
    batches = grid_batches(values, AXES, size)
    for _ in range(2):  # each pass starts anew
        for found, want in zip(joined(batches), table(values), strict=True):
            np.testing.assert_array_equal(found, want)
    assert all(0 < len(x) == len(y) <= size for x, y in batches)


def test_a_batch_is_a_block_or_a_part_of_a_row_and_never_more() -> None:
    for size, sizes in ((32, [30, 30, 30, 15]), (8, [6, 6, 3] * 7), (2, [2, 1] * 35), (500, [105])):
        variable = Variable(field())
        assert [len(x) for x, _ in grid_batches(variable, AXES, size)] == sizes
        assert variable.sizes == sizes


def test_a_single_axis_is_a_series() -> None:
    x, y = joined(grid_batches([np.array([1, 2, 3]), np.array([4.0, np.nan, 6.0])], [[0.0, 0.5, 1.0]], 2))
    np.testing.assert_array_equal(x, [[0.0], [1.0]])
    np.testing.assert_array_equal(y, [[1.0, 4.0], [3.0, 6.0]])


def test_several_outputs_share_their_points_and_a_point_needs_all_of_them() -> None:
    fields = field(0.3), field(0.3, seed=1)
    for found, want in zip(joined(grid_batches(list(fields), AXES, 4)), table(*fields), strict=True):
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_masked_entries_are_missing_whatever_stands_under_the_mask(dtype: Any) -> None:
    raw, mask = (100 * field()).astype(dtype), field() > 0.5
    want = table(np.where(mask, np.nan, raw.astype(np.float64)))
    masked = np.ma.masked_array(raw, mask, fill_value=-9999)
    for found, expected in zip(joined(grid_batches(Variable(masked), AXES, 10)), want, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_tensors_are_grids_too() -> None:
    values = field(0.2)
    for found, want in zip(joined(grid_batches(torch.from_numpy(values), AXES, 10)), table(values), strict=True):
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("last_layer", ["exact", "amortised"])
@pytest.mark.parametrize("size", [4, 33])
def test_conditioning_on_batches_is_conditioning_on_all_points_at_once(last_layer: str, size: int, tmp_path: Path) -> None:
    """From memory maps that hold single precision, as files do."""
    model = bnnp.BNNP(3, 2, hidden=(6, 5), activation="tanh", last_layer=last_layer).double()
    maps = []
    for name in ("one", "two"):
        values = field(0.3, seed=len(maps)).astype(np.float32)
        values.tofile(tmp_path / name)
        maps.append(np.memmap(tmp_path / name, dtype=np.float32, mode="r", shape=SHAPE))
    whole = model.condition(*table(*maps), num_samples=4)
    streamed = model.condition(grid_batches(maps, AXES, size), num_samples=4)
    assert torch.equal(whole.counts, streamed.counts)
    xt = np.random.default_rng(3).normal(size=(6, 3))
    for ask in (lambda p: p.elbo, lambda p: p.predict(xt).mean, lambda p: p.predict(xt).std, lambda p: p.log_importance):
        torch.testing.assert_close(ask(streamed), ask(whole), rtol=1e-9, atol=1e-9)


def test_conditioning_reads_the_grid_once_a_layer_and_a_batch_at_a_time() -> None:
    variable = Variable(field(0.1))
    bnnp.BNNP(3, 1, hidden=(4, 4)).condition(grid_batches(variable, AXES, 16), num_samples=2)
    assert sum(variable.sizes) == 3 * variable.values.size
    assert max(variable.sizes) <= 16


def test_a_grid_without_any_value_is_refused_when_it_is_read() -> None:
    nothing = grid_batches(np.full(SHAPE, np.nan), AXES, 10)
    with pytest.raises(ValueError, match=r"at least one observed point. Got 105 points, all missing"):
        list(nothing)
    with pytest.raises(ValueError, match="all missing"):
        bnnp.BNNP(3, 1, hidden=(4,)).condition(nothing, num_samples=2)


@pytest.mark.parametrize(
    ("values", "coordinates", "error", "message"),
    [
        (field(), AXES[:2], ValueError, r"shape \(7, 5, 3\).*Got 2 coordinates with shapes \(7,\), \(5,\)"),
        (field(), AXES[::-1], ValueError, r"as long as it. Got 3 coordinates with shapes \(3,\), \(5,\), \(7,\)"),
        (field(), [*AXES[:2], np.zeros((3, 1))], ValueError, r"Got 3 coordinates with shapes \(7,\), \(5,\), \(3, 1\)"),
        (np.zeros(9), np.arange(9), ValueError, r"list of vectors.*Got 9 coordinates with shapes \(\), .* and 4 more"),
        (np.zeros(()), [], ValueError, r"values with shape \(\).*Got 0 coordinates"),
        (np.zeros((2, 0)), [[0, 1], []], ValueError, r"at least one point. Got shape \(2, 0\)"),
        ([field(), field()[:6]], AXES, ValueError, r"on one grid. Got shapes \(7, 5, 3\), \(6, 5, 3\)"),
        ([[1.0, 2.0]], [[0, 1]], TypeError, "values with a shape.*Got list"),
        ([], [[0, 1]], TypeError, "Got an empty list"),
        (np.zeros(2), [[0.0, np.nan]], ValueError, "finite coordinates. Got NaN or infinity in coordinate 0"),
        (np.zeros(1), [np.array(["2020-01-01"], dtype="M8[ns]")], TypeError, "coordinate 0 as numbers.*datetime64.*days since a start"),
        (np.zeros(1), [["north"]], TypeError, "coordinate 0 as numbers"),
    ],
)
def test_grids_that_do_not_fit_are_refused_in_words(values: Any, coordinates: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        grid_batches(values, coordinates, 10)


def test_a_size_that_is_no_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size as a positive integer. Got 0"):
        grid_batches(field(), AXES, 0)
