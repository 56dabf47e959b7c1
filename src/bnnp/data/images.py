"""Images as tasks: one image is one data set, from the place of a pixel to its grey value.

A prior over functions that was learned from many images of a kind is a prior over images of that kind; a few seen
pixels are a context, and completing the image is prediction. This file turns arrays of images into such tasks, loads
the one set of real images that needs no download, and makes the choices (which image is for training, which pixel is
seen) that every compared method must share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Digits",
    "ImageSplit",
    "from_logit",
    "images_to_tasks",
    "load_digits",
    "logit",
    "pixel_grid",
    "random_pixels",
    "split_images",
]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

GREY_LEVELS = 17  # the integers 0, 1, ..., 16


@dataclass(frozen=True, eq=False)
class Digits:
    """Hold handwritten digits as grey images.

    Arguments:
        images: grey values in [0, 1], 0 is paper and 1 is ink, with shape (n, 8, 8).
        labels: the digit that was written, 0 to 9, with shape (n,).
    """

    images: FloatArray
    labels: IntArray


class ImageSplit(NamedTuple):
    """Hold the indices of the images for training, validation and test; no image is in two of them."""

    train: IntArray
    validation: IntArray
    test: IntArray


def pixel_grid(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the places of the pixels of an image in [-1, 1]^2, row by row.

    The first coordinate is the row (-1 at the top, 1 at the bottom), the second the column (-1 at the left, 1 at the
    right). Corner pixels sit at the corners of the square whatever the size, so a finer grid asks for the same image
    at a higher resolution.

    Arguments:
        height: number of rows, at least 2.
        width: number of columns, at least 2.
        dtype: of the result.

    Returns:
        Coordinates with shape (height * width, 2); pixel (i, j) is at position i * width + j.

    Raises:
        ValueError: if a side is shorter than 2 pixels.

    Example:
        >>> pixel_grid(2, 3).tolist()
        [[-1.0, -1.0], [-1.0, 0.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    if height < 2 or width < 2:
        raise ValueError(f"Expected an image of at least 2 x 2 pixels. Got height={height}, width={width}.")
    rows = torch.linspace(-1.0, 1.0, height, dtype=dtype)
    columns = torch.linspace(-1.0, 1.0, width, dtype=dtype)
    return torch.cartesian_prod(rows, columns)


def images_to_tasks(images: Tensor | FloatArray, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Turn every image into a data set from pixel coordinates to grey value.

    Arguments:
        images: grey images with shape (n, height, width).
        dtype: of the tensors returned.

    Returns:
        One pair (x, y) per image, x with shape (height * width, 2) as `pixel_grid` gives it (one tensor, shared by
        all pairs) and y with shape (height * width, 1).

    Raises:
        ValueError: if `images` has not three axes.

    Example:
        >>> x, y = images_to_tasks(np.zeros((5, 8, 8)))[0]
        >>> x.shape, y.shape
        (torch.Size([64, 2]), torch.Size([64, 1]))
    """
    values = torch.as_tensor(images)
    if values.ndim != 3:
        raise ValueError(
            f"Expected images with shape (n, height, width). Got shape {tuple(values.shape)}. For one image, pass image[None]."
        )
    x = pixel_grid(values.shape[1], values.shape[2], dtype=dtype)
    flat = values.to(dtype=dtype, copy=True).flatten(1).unsqueeze(-1)
    return [(x, y) for y in flat]


def load_digits(dequantise: bool = True, seed: int = 0) -> Digits:
    """Load the 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn; nothing is downloaded.

    The grey values are integers, level = 0, ..., 16, and a density on integers says nothing: a model that puts a
    spike on each integer gets a log-density as high as it likes. So noise that fills the gap between two levels is
    added,

        v = (level + u) / 17,   u ~ Uniform[0, 1),

    and the log-density of v has a meaning: its mean minus log 17 is, per pixel, at most the log-probability that the
    same model gives to the true level. Compare methods on one dequantised copy only (one seed).

    Arguments:
        dequantise: False gives the middle of each level, (level + 1/2) / 17: for looking, not for log-densities.
        seed: of the noise.

    Returns:
        Images with values in [0, 1) and labels, in the order of scikit-learn.

    Raises:
        ImportError: if scikit-learn is not installed.

    References:
        A note on the evaluation of generative models, Theis, van den Oord and Bethge, 2016, section 3.1.

    Example:
        >>> load_digits().images.shape
        (1797, 8, 8)
    """
    try:
        from sklearn.datasets import load_digits as load_levels
    except ImportError as error:
        raise ImportError('Loading the digits needs scikit-learn. Run: pip install "bnnp[data]".') from error
    source = load_levels()
    levels = np.asarray(source.images, dtype=np.float64)
    noise = np.random.default_rng(seed).random(levels.shape) if dequantise else np.full(levels.shape, 0.5)
    return Digits((levels + noise) / GREY_LEVELS, np.asarray(source.target, dtype=np.int64))


def logit(values: FloatArray, margin: float = 0.01) -> FloatArray:
    """Map grey values from [0, 1] to the real line, where Gaussian noise and Gaussian models make sense.

        z = log(w / (1 - w)),   w = margin + (1 - 2 margin) v

    Arguments:
        values: grey values v in [0, 1], of any shape.
        margin: keeps black and white finite.

    Example:
        >>> logit(np.array([0.5]))
        array([0.])
    """
    w = margin + (1.0 - 2.0 * margin) * np.asarray(values, dtype=np.float64)
    return np.log(w / (1.0 - w))


def from_logit(values: FloatArray, margin: float = 0.01) -> FloatArray:
    """Undo `logit`; what lies beyond black or white is cut off there.

    Example:
        >>> from_logit(logit(np.array([0.25, 1.0])))
        array([0.25, 1.  ])
    """
    w = 0.5 * (1.0 + np.tanh(0.5 * np.asarray(values, dtype=np.float64)))
    return np.clip((w - margin) / (1.0 - 2.0 * margin), 0.0, 1.0)


def split_images(n: int, seed: int = 0, sizes: Sequence[float] | Sequence[int] = (0.7, 0.1, 0.2)) -> ImageSplit:
    """Divide n images at random into training, validation and test images.

    Arguments:
        n: number of images.
        seed: of the division.
        sizes: three fractions that add up to at most 1, or three whole numbers that add up to at most n. Images
            beyond the three are left out.

    Returns:
        Three arrays of indices without a common element.

    Raises:
        ValueError: if there are not three sizes, one is negative, they mix fractions and counts, or they ask for too
            many.

    Example:
        >>> [len(part) for part in split_images(100, seed=1, sizes=(60, 10, 20))]
        [60, 10, 20]
    """
    if len(sizes) != 3 or any(size < 0 for size in sizes):
        raise ValueError(f"Expected three sizes >= 0 (train, validation, test). Got {tuple(sizes)}.")
    if all(isinstance(size, int | np.integer) for size in sizes):
        counts = [int(size) for size in sizes]
    elif all(isinstance(size, float | np.floating) for size in sizes):
        # Edges, not lengths, are rounded: so three fractions that add up to 1 use every image.
        edges = [round(n * float(edge)) for edge in np.cumsum([0.0, *sizes])]
        counts = [high - low for low, high in pairwise(edges)]
    else:
        raise ValueError(f"Expected three fractions (floats) or three counts (integers). Got {tuple(sizes)}.")
    if sum(counts) > n:
        raise ValueError(f"Expected sizes that ask for at most n={n} images. Got {tuple(sizes)}, which is {sum(counts)}.")
    order = np.random.default_rng(seed).permutation(n).astype(np.int64)
    train, validation, test, _ = np.split(order, np.cumsum(counts))
    return ImageSplit(train, validation, test)


def random_pixels(num_images: int, height: int, width: int, proportion: float, seed: int = 0) -> BoolArray:
    """Choose at random the pixels that are seen, the same number in each image.

    One seed gives every method the same pixels. With one seed, the pixels of a smaller proportion are among those of
    a larger.

    Arguments:
        num_images: number of images.
        height: number of rows.
        width: number of columns.
        proportion: of pixels seen, in (0, 1); rounded to whole pixels, with at least one seen and one unseen.
        seed: of the choice.

    Returns:
        True where a pixel is seen, with shape (num_images, height, width).

    Raises:
        ValueError: if the proportion is not inside (0, 1), or there are fewer than two pixels.

    Example:
        >>> random_pixels(3, 8, 8, proportion=0.25).sum(axis=(1, 2)).tolist()
        [16, 16, 16]
    """
    pixels = height * width
    if not 0.0 < proportion < 1.0:
        raise ValueError(f"Expected a proportion of seen pixels inside (0, 1). Got {proportion}.")
    if pixels < 2:
        raise ValueError(f"Expected an image of at least two pixels. Got height={height}, width={width}.")
    count = min(max(round(proportion * pixels), 1), pixels - 1)
    rank = np.random.default_rng(seed).random((num_images, pixels)).argsort(axis=1).argsort(axis=1)
    return (rank < count).reshape(num_images, height, width)
