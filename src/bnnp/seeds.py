"""Seeds and counts: where random numbers come from, and the checks that every entry shares."""

from __future__ import annotations

import hashlib
import operator

import torch

__all__ = ["check_count", "seeded"]


def seeded(seed: int, stream: str) -> torch.Generator:
    """Return a CPU generator for one use of a seed, so that the same seed gives the same draw on every device.

    Uses have streams of their own: with one stream, draws of the last layer would repeat those of the first.

    Raises:
        TypeError: the seed is not an integer.
    """
    try:
        digest = hashlib.sha256(f"{operator.index(seed)}/{stream}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    except TypeError:
        raise TypeError(f"Expected seed as an integer. Got {type(seed).__name__}.") from None


def check_count(value: int, name: str) -> int:
    """Check a number of draws or steps: a positive integer."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"Expected {name} as a positive integer. Got {value!r}.")
    return number
