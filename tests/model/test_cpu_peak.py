"""The measured peak of a CPU."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from gpt_lightning.model import cpu_peak
from gpt_lightning.model.cpu_peak import measured_peak


@pytest.mark.parametrize(("each", "size"), [(1.0, 96), (1e-6, 300)])
def test_peak_is_measured_by_a_product_that_is_quick(
    monkeypatch: pytest.MonkeyPatch, each: float, size: int
) -> None:
    """A slow product is not followed by a larger one."""
    clock = itertools.count(step=each)
    monkeypatch.setattr(cpu_peak, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert measured_peak(torch.float32, 300) == pytest.approx(2 * size**3 / each)
