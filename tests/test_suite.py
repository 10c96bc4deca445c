"""The test suite itself."""

import os

import pytest
import torch


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="is for pytest-xdist")
def test_process_of_xdist_has_the_threads_of_one_core() -> None:
    """With more, the processes wait for each other's threads, and take twice as long."""
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
