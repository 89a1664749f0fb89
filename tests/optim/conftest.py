"""Settings that all tests of the optimizers share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .helpers import OPTIMIZERS


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """One seed a test, and one thread: the tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=list(OPTIMIZERS))
def variant(request: pytest.FixtureRequest) -> str:
    """Each of the three optimizers, by name."""
    return str(request.param)
