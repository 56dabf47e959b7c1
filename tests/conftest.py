"""What every test shares: one thread, no display, explicit randomness, the same examples in every run."""

from __future__ import annotations

import os

# Read when matplotlib is first imported, which may be by any test.
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import pytest
import torch

# Two threads on small batched factorisations cost more than they bring, and far more where test workers share cores.
torch.set_num_threads(1)

hypothesis.settings.register_profile("bnnp", deadline=None, derandomize=True)
hypothesis.settings.load_profile("bnnp")


@pytest.fixture
def generator() -> torch.Generator:
    """Return a fresh generator with seed 0."""
    return torch.Generator().manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
