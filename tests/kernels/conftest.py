"""Fixtures of the tests of kernels."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def kernels_run() -> Iterator[None]:
    """Run kernels on a GPU if there is one, else in Triton's interpreter (see conftest.py).

    The test's tensors are created on the same device.
    """
    pytest.importorskip("triton", reason="Triton, of the extra 'test', is for Linux on x86-64")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield
