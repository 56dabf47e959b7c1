"""Images as tasks: the grid, the pairs, the digits, and the choices that all methods share."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from bnnp.data.images import from_logit, images_to_tasks, load_digits, logit, pixel_grid, random_pixels, split_images


def test_pixel_grid_runs_row_by_row_from_corner_to_corner() -> None:
    grid = pixel_grid(5, 3, dtype=torch.float64)
    assert grid.shape == (15, 2) and grid.dtype == torch.float64
    for i in range(5):
        for j in range(3):
            expected = torch.tensor([-1.0 + 2.0 * i / 4, -1.0 + 2.0 * j / 2], dtype=torch.float64)
            torch.testing.assert_close(grid[3 * i + j], expected)


def test_pixel_grid_refuses_a_line() -> None:
    with pytest.raises(ValueError, match=r"at least 2 x 2.*height=1, width=8"):
        pixel_grid(1, 8)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_images_to_tasks_puts_each_grey_value_at_its_place(as_tensor: bool) -> None:
    images = np.random.default_rng(0).random((4, 3, 5))
    tasks = images_to_tasks(torch.from_numpy(images) if as_tensor else images, dtype=torch.float64)
    assert len(tasks) == 4
    for image, (x, y) in zip(images, tasks, strict=True):
        assert x.shape == (15, 2) and y.shape == (15, 1)
        rows = ((x[:, 0] + 1) / 2 * 2).round().long().numpy()
        columns = ((x[:, 1] + 1) / 2 * 4).round().long().numpy()
        np.testing.assert_array_equal(y[:, 0].numpy(), image[rows, columns])


def test_images_to_tasks_copies() -> None:
    images = np.zeros((1, 2, 2))
    _, y = images_to_tasks(images, dtype=torch.float64)[0]
    images[:] = 7.0
    assert float(y.abs().sum()) == 0.0


def test_images_to_tasks_refuses_one_image_without_its_axis() -> None:
    with pytest.raises(ValueError, match=r"\(n, height, width\).*\(8, 8\).*image\[None\]"):
        images_to_tasks(np.zeros((8, 8)))


def test_digits_keep_their_level_under_the_noise() -> None:
    noisy, middle = load_digits(seed=3), load_digits(dequantise=False)
    assert noisy.images.shape == (1797, 8, 8) and noisy.labels.shape == (1797,)
    assert set(noisy.labels.tolist()) == set(range(10))
    assert noisy.images.min() >= 0.0 and noisy.images.max() < 1.0
    levels = np.floor(noisy.images * 17)
    np.testing.assert_array_equal(levels, np.floor(middle.images * 17))
    assert set(np.unique(levels)) == set(range(17))
    noise = noisy.images * 17 - levels
    # 115,008 uniform values: mean 1/2 within five standard errors, variance 1/12.
    assert abs(noise.mean() - 0.5) < 5 / np.sqrt(12 * noise.size)
    assert noise.var() == pytest.approx(1 / 12, rel=0.02)


def test_digits_depend_on_the_seed_only() -> None:
    np.testing.assert_array_equal(load_digits(seed=1).images, load_digits(seed=1).images)
    assert not np.array_equal(load_digits(seed=1).images, load_digits(seed=2).images)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"bnnp\[data\]"):
        load_digits()


@pytest.mark.parametrize("sizes", [(0.7, 0.1, 0.2), (1200, 197, 400), (0.5, 0.0, 0.1), (10, 0, 3)])
def test_no_image_is_in_two_parts(sizes: tuple[float, float, float]) -> None:
    split = split_images(1797, seed=4, sizes=sizes)
    together = np.concatenate(split)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0 and together.max() < 1797
    for part, size in zip(split, sizes, strict=True):
        expected = size if isinstance(size, int) else 1797 * size
        assert abs(len(part) - expected) <= 1


def test_fractions_that_add_up_to_one_leave_nothing_out() -> None:
    for n in (7, 10, 101, 1797):
        assert sorted(np.concatenate(split_images(n)).tolist()) == list(range(n))


def test_split_depends_on_the_seed_only() -> None:
    for a, b in zip(split_images(50, seed=1), split_images(50, seed=1), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(split_images(50, seed=1).train, split_images(50, seed=2).train)


@pytest.mark.parametrize("sizes", [(0.7, 0.3), (0.9, 0.1, 0.1), (5, 5, 5), (-1, 2, 3), (0.5, 2, 3)])
def test_split_refuses_impossible_sizes(sizes: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        split_images(10, sizes=sizes)


@pytest.mark.parametrize(("proportion", "count"), [(0.1, 6), (0.25, 16), (0.5, 32), (0.001, 1), (0.999, 63)])
def test_every_image_shows_the_same_number_of_pixels(proportion: float, count: int) -> None:
    seen = random_pixels(20, 8, 8, proportion, seed=5)
    assert seen.shape == (20, 8, 8) and seen.dtype == np.bool_
    np.testing.assert_array_equal(seen.sum(axis=(1, 2)), count)
    np.testing.assert_array_equal(seen, random_pixels(20, 8, 8, proportion, seed=5))


def test_pixels_differ_between_images_and_seeds_and_grow_with_the_proportion() -> None:
    few, many = random_pixels(20, 8, 8, 0.1, seed=5), random_pixels(20, 8, 8, 0.5, seed=5)
    assert np.all(many[few])
    assert not np.array_equal(few[0], few[1])
    assert not np.array_equal(few, random_pixels(20, 8, 8, 0.1, seed=6))


def test_every_pixel_is_equally_likely_to_be_seen() -> None:
    share = random_pixels(4000, 4, 4, 0.25, seed=7).mean(axis=0)
    # Standard error sqrt(0.25 * 0.75 / 4000) = 0.0068; 16 pixels, five standard errors.
    assert np.abs(share - 0.25).max() < 0.035


@pytest.mark.parametrize("proportion", [0.0, 1.0, -0.1, 1.5])
def test_random_pixels_refuses_all_or_nothing(proportion: float) -> None:
    with pytest.raises(ValueError, match=r"inside \(0, 1\)"):
        random_pixels(1, 8, 8, proportion)


def test_logit_is_undone_and_orders_grey_values() -> None:
    v = np.linspace(0.0, 1.0, 101)
    z = logit(v)
    assert np.all(np.diff(z) > 0) and np.all(np.isfinite(z))
    np.testing.assert_allclose(from_logit(z), v, atol=1e-12)
    np.testing.assert_allclose(from_logit(np.array([-1e3, 1e3])), [0.0, 1.0])
