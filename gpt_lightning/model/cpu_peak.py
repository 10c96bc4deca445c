"""FLOP/s of this machine's CPU, measured."""

import time

import torch


def measured_peak(dtype: torch.dtype, size: int = 1536, repeats: int = 3) -> float:
    """Measure the FLOP/s of square matrix products on the CPU; return the fastest of ``repeats``.

    Matrices grow up to ``size`` as long as a product takes less than half a second: a CPU without bfloat16
    instructions multiplies bfloat16 sixty times slower than float32.
    """
    n = min(96, size)
    while True:
        a = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(dtype)
        a @ a
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - start)
        if n == size or 8 * min(seconds) > 0.5:
            return 2 * n**3 / min(seconds)
        n = min(2 * n, size)
