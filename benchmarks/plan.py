"""Compare `plan` with real runs: python benchmarks/plan.py [--gpu] [--tiny]

First the table of docs/planning.md is printed: GPT-2's four sizes on 1, 8 and 64 GPUs. With --table that is all. Then
`fit` runs on the CPU with three configurations, three times each, in separate processes. For each configuration the
median of the peak resident sets is compared with what `plan` predicts for the same command. With --gpu `fit` runs on
the GPU instead, once with each of five configurations, and the peak of `torch.cuda.max_memory_allocated` is compared.
The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from machine import at_most, description

from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.model.hardware import MEMORY, PEAKS
from gpt_lightning.planning.plan import Plan, RunSpec, Strategy, plan
from gpt_lightning.planning.step_parts import StepShape

ROOT = Path(__file__).parent.parent
GPU = "H100"
TOKENS = 10_000_000_000
WINDOWS, LENGTH, BATCH_SIZE = 512, 1024, 8  # 524,288 tokens per step
# maximum deviation as a fraction of the measured memory; smaller on a GPU, where only tensors are counted
TOLERANCE, TOLERANCE_ON_GPU = 0.20, 0.10
REPEATS = 3  # on a CPU, because malloc keeps a different amount of memory in each run

# settings of all three configurations: 3 steps of a model with 29 million parameters
COMMON = [
    f"--config={ROOT}/configs/quickstart.yaml",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=-1",
    "--trainer.max_steps=3",
    "--trainer.enable_progress_bar=false",
    "--model.config.context_length=256",
    "--model.config.emb_dim=256",
    "--model.config.n_heads=4",
    "--model.config.n_layers=4",
    "--model.config.drop_rate=0",
    "--data.train_ratio=0.5",
    "--data.stride=8",
    "--data.batch_size=4",
    "--evaluation.eval_freq=2",
    "--evaluation.eval_iter=1",
    "--evaluation.max_new_tokens=5",
]
TINY = [
    "--model.config.emb_dim=64",
    "--model.config.context_length=32",
    "--model.config.n_layers=2",
]
RUNS = {
    "float32": ["--checkpoint.save_best=false"],
    # small windows, because a CPU without instructions for bfloat16 multiplies it sixty times slower than float32
    "bf16-mixed, batch 1": [
        "--trainer.precision=bf16-mixed",
        "--model.config.context_length=128",
        "--data.batch_size=1",
    ],
    "float32, 2 micro-batches, loss by chunks, activation checkpointing": [
        "--checkpoint.save_best=false",
        "--trainer.accumulate_grad_batches=2",
        "--model.loss_chunk_size=256",
        "--model.activation_checkpointing=true",
    ],
}

# settings of all configurations on a GPU: GPT-2 124M, windows of 1,024
ON_GPU = [
    f"--config={ROOT}/configs/quickstart.yaml",
    "--trainer.accelerator=gpu",
    "--trainer.devices=1",
    "--trainer.max_epochs=-1",
    "--trainer.max_steps=3",
    "--trainer.enable_progress_bar=false",
    "--checkpoint.save_best=false",
    "--model.config.context_length=1024",
    "--model.config.emb_dim=768",
    "--model.config.n_heads=12",
    "--model.config.n_layers=12",
    "--model.config.drop_rate=0",
    "--model.config.tied_embeddings=true",
    "--data.train_ratio=0.5",
    "--data.stride=1",
    "--evaluation.eval_freq=2",
    "--evaluation.eval_iter=1",
    "--evaluation.max_new_tokens=5",
]
GPU_RUNS = {
    "float32, batch 4": ["--data.batch_size=4"],
    "bf16-mixed, batch 16": ["--data.batch_size=16", "--trainer.precision=bf16-mixed"],
    "bf16-mixed, batch 16, loss by chunks": [
        "--data.batch_size=16",
        "--trainer.precision=bf16-mixed",
        "--model.loss_chunk_size=2048",
    ],
    "bf16-mixed, batch 16, loss by chunks, activations computed again": [
        "--data.batch_size=16",
        "--trainer.precision=bf16-mixed",
        "--model.loss_chunk_size=2048",
        "--model.activation_checkpointing=true",
    ],
    "float32, head not tied, dropout, 2 micro-batches of 4": [
        "--data.batch_size=4",
        "--trainer.accumulate_grad_batches=2",
        "--model.config.tied_embeddings=false",
        "--model.config.drop_rate=0.1",
    ],
}

# runs the given command and prints the peak resident set of the process; getrusage would include the peak of the
# parent process
CHILD = """
import sys
from gpt_lightning.cli.main import main
code = main(sys.argv[1:])
with open("/proc/self/status") as file:
    peak = next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
print(peak)
sys.exit(code)
"""
CHILD_ON_GPU = """
import sys
from gpt_lightning.cli.main import main
code = main(sys.argv[1:])
import torch
print(torch.cuda.max_memory_allocated())
sys.exit(code)
"""


STRATEGIES: list[tuple[int, Strategy]] = [
    (1, "single"), (8, "ddp"), (8, "fsdp"), (64, "ddp"), (64, "fsdp"),
]  # fmt: skip


def planned(size: str, devices: int, strategy: Strategy) -> Plan:
    """The plan of ``configs/pretrain-124M.yaml`` with another size, without a chunked loss, on GPUs with 80 GB."""
    step = StepShape(
        replace(GPT2_SIZES[size], drop_rate=0.0),
        BATCH_SIZE,
        LENGTH,
        precision="bf16-mixed",
        device="cuda",
    )
    micro_batches = WINDOWS // (BATCH_SIZE * devices)
    spec = RunSpec(step, devices, strategy, micro_batches, global_batch_is_given=True)
    return plan(spec, tokens=TOKENS, peak_flops=PEAKS[GPU], device_memory=int(MEMORY[GPU]))


# column of the table → the parts of the plan's memory that it shows
COLUMNS = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "AdamW": ("optimizer",),
    "bf16 copies": ("weights in autocast's precision",),
    "in transit": ("gathered shards", "DDP's buckets", "backward pass"),
    "activations": ("activations",),
    "loss": ("logits and loss",),
}


def table(
    sizes: Sequence[str] = tuple(GPT2_SIZES),
    strategies: Sequence[tuple[int, Strategy]] = STRATEGIES,
) -> str:
    """The table in Markdown, in GB of 10⁹ bytes."""
    header = ["size", "devices", "strategy", *COLUMNS, "total", "hours"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    names = {"single": "", "ddp": "DDP", "fsdp": "FSDP2"}
    for size, (devices, strategy) in product(sizes, strategies):
        result = planned(size, devices, strategy)
        memory = dict(result.memory)
        columns = [sum(memory.pop(name, 0) for name in parts) for parts in COLUMNS.values()]
        assert not memory, f"no column shows {memory}"
        numbers = [f"{column / 1e9:.2f}" for column in (*columns, result.total)]
        assert result.hours is not None
        fits = "" if result.fits else " (too much)"
        lines.append(
            f"| {size.removeprefix('gpt2-')} | {devices} | {names[strategy]} | "
            f"{' | '.join(numbers)}{fits} | {result.hours:,.1f} |"
        )
    return "\n".join(lines)


def compare(settings: Sequence[str], *, on_gpu: bool = False) -> dict[str, Any]:
    """Compare the bytes that ``plan`` predicts with those that ``fit`` uses, for the same settings.

    On a CPU the result is the median of REPEATS runs.
    """
    child, gpu = (CHILD_ON_GPU, [f"--gpu={GPU}"]) if on_gpu else (CHILD, [])
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        output = _output(["-m", "gpt_lightning", "plan", *settings, *gpu, "--json"], folder)
    predicted = json.loads(output)
    for _ in range(1 if on_gpu else REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(int(_output(["-c", child, "fit", *settings], folder).splitlines()[-1]))
    measured = median(runs)
    return {
        "counted": predicted["total"],
        "measured": measured,
        "runs": runs,
        "off": predicted["total"] / measured - 1,
        "memory": predicted["memory"],
    }


def _output(command: list[str], folder: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=folder
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    parser.add_argument("--gpu", action="store_true", help="run on a CUDA GPU")
    parser.add_argument(
        "--tiny", action="store_true", help="use toy models, to test that the benchmark runs"
    )
    options = parser.parse_args()
    if not options.gpu:
        print(table())
    if options.table:
        return
    results = {}
    common, runs = (ON_GPU, GPU_RUNS) if options.gpu else (COMMON, RUNS)
    tolerance = TOLERANCE_ON_GPU if options.gpu else TOLERANCE
    for name, settings in runs.items():
        result = results[name] = compare(
            [*common, *settings, *(TINY if options.tiny else [])], on_gpu=options.gpu
        )
        print(
            f"{name}: {result['counted'] / 1e9:.2f} GB predicted, {result['measured'] / 1e9:.2f} GB measured, "
            f"{result['off']:+.1%}",
            flush=True,
        )
    targets = [
        at_most(f"{name}: deviation", abs(result["off"]), tolerance)
        for name, result in results.items()
    ]
    print(json.dumps({"machine": description("lightning"), "runs": results, "targets": targets}))


if __name__ == "__main__":
    main()
