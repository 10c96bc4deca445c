"""Compile our Triton kernels as decoding and the loss launch them, for a GPU that need not be present.

test_decode.py runs this in a separate process, where the kernels are not interpreted. It prints JSON: the name of each
kernel, and the bytes of stack memory that a thread uses for spilled registers.

Usage: compile_kernels.py CAPABILITY SIZE ROWS, such as 90 gpt2-124M 1
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from gpt_lightning import GPTModel
from gpt_lightning.generation import fused_decode
from gpt_lightning.kernels import cross_entropy
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.model.kv_cache import KVCache

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
compiled: list[tuple[str, Any]] = []


class FakeDriver:
    """The part of a GPU driver that Triton calls before a launch."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: Any, grid: Any) -> Any:
    def compile_kernel(*arguments: Any, **settings: Any) -> None:
        compiled.append(
            (kernel.__name__, kernel.run(*arguments, grid=grid, warmup=True, **settings))
        )

    return compile_kernel


def stack_bytes(kernel: Any) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)  # fmt: skip
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


def main() -> None:
    capability, size, rows = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    triton.runtime.driver.set_active(FakeDriver(capability))
    JITFunction.__getitem__ = compile_only
    fused_decode.supports_pdl = lambda device: capability >= 90
    config = GPT2_SIZES[size]
    with torch.device("meta"):
        model = GPTModel(config).to(torch.bfloat16)
        for length in (256, 1024):
            cache = KVCache.allocate(config, rows, length, dtype=torch.bfloat16)
            cache.position = torch.zeros(1, dtype=torch.int64)
            ids = torch.zeros(rows, dtype=torch.int64)
            history = torch.zeros(rows, length, dtype=torch.bfloat16)
            padding = ids if length == 1024 else None
            fused_decode.FusedDecodeForward(model, cache, ids, padding, history, history.long())()
        logits = torch.zeros(rows, -(-config.vocab_size // 64) * 64, dtype=torch.bfloat16)
        cross_entropy.loss_and_gradient_(logits, ids, config.vocab_size, 0.5)
    unique = {id(kernel): (name, kernel) for name, kernel in compiled}
    print(json.dumps([(name, stack_bytes(kernel)) for name, kernel in unique.values()]))


if __name__ == "__main__":
    main()
