"""What the tests of the kernels share."""

import pytest
import torch


@pytest.fixture(scope="module")
def poison():
    """Memory comes filled with NaN and the largest integers, so that an element which nothing
    writes shows. Of a module, for Hypothesis runs many examples in one test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
