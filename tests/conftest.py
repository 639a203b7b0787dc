"""What all tests share."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure() -> None:
    """Side by side (pytest-xdist), each worker computes on its share of the cores; more threads would only wait."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws from torch is the same each time: one that fails in a hundred runs tells nobody anything."""
    torch.manual_seed(0)
