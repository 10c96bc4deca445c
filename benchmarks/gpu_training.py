"""Training variants of benchmarks/gpu.py: an ablation from the book's model in float32, with one change per variant."""

import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from machine import seconds_per_call
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.model import loss
from gpt_lightning.model.flops import flops_per_token
from gpt_lightning.model.loss import PAD_VOCABULARY_TO
from gpt_lightning.training.optimizer import build_adamw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

STEPS = 20  # number of steps whose losses are compared
# maximum deviation from the losses in float32, as a fraction of their decrease in STEPS steps; by matmul precision
TOLERANCES = {"float32": 1e-3, "TF32": 1e-2, "bf16": 5e-2}


@dataclass(frozen=True)
class TrainingVariant:
    """One variant of training.

    Attributes:
        batch: Windows per optimizer step.
        book: Whether to train the book's model (tests/book.py), with explicit attention and a tied head.
        matmul: Precision of matrix products: float32, TF32 or bf16.
        fused: Whether to use fused AdamW, as ``fit`` does.
        compiled: "blocks", as with ``model.compile``, or "model", everything up to the loss; ``None``: nothing.
        chunk: Tokens per chunk of the loss, with a padded vocabulary; ``None``: torch's loss over all logits.
        kernel: Whether to use the Triton kernel for the loss if it is supported, as ``fit`` does.
        cudnn: Whether to force cuDNN's attention.
        lr: Learning rate. The losses in float32 must fall smoothly, for there is no warm-up.
        seconds: Expected duration of the variant, in seconds.
    """

    name: str
    batch: int
    seconds: float
    book: bool = False
    matmul: str = "bf16"
    fused: bool = True
    compiled: str | None = None
    chunk: int | None = None
    kernel: bool = False
    cudnn: bool = False
    lr: float = 3e-4


def ablation(batch: int, length: int) -> list[TrainingVariant]:
    """Variants that each add one change to the one before; the last ones increase the batch and the chunks."""
    chunk = min(8192, batch * length // 2)
    float32 = TrainingVariant(
        "eager fp32 (the book's model)", batch, 16, True, "float32", fused=False
    )
    tf32 = replace(float32, name="TF32", matmul="TF32", seconds=11)
    bf16 = replace(tf32, name="bf16", matmul="bf16", seconds=11)
    sdpa = replace(bf16, name="SDPA (our model)", book=False, seconds=9)
    fused = replace(sdpa, name="fused AdamW", fused=True)
    compiled = replace(fused, name="compiled blocks", compiled="blocks", seconds=20)
    padded = replace(compiled, name="padded vocabulary", chunk=batch * length, seconds=10)
    chunked = replace(padded, name="loss by chunks", chunk=chunk)
    kernel = replace(chunked, name="one kernel a chunk", kernel=True)
    larger = [
        replace(kernel, name=f"batch {n * batch}", batch=n * batch, chunk=min(n, 4) // 2 * chunk, seconds=14)
        for n in (2, 4, 8)
    ]  # fmt: skip
    return [float32, tf32, bf16, sdpa, fused, compiled, padded, chunked, kernel, *larger]


def large_ablation(batch: int) -> list[TrainingVariant]:
    """Variants for a large model: float32 as reference, then all optimizations together, then larger batches."""
    float32 = TrainingVariant("eager fp32 (our model)", batch, 20, matmul="float32", lr=1e-4)
    optimized = TrainingVariant("bf16, compiled blocks, loss by chunks", 2 * batch, 20,
                       compiled="blocks", kernel=True, chunk=4096, lr=1e-4)  # fmt: skip
    return [
        float32,
        optimized,
        *(
            replace(optimized, name=f"batch {n * batch}", batch=n * batch, seconds=20)
            for n in (4, 8)
        ),
    ]


def batch_of(config: GPTConfig, rows: int, repeated: int, length: int) -> tuple[Tensor, Tensor]:
    """``rows`` random windows and their targets, repeated, so that a larger batch has the same loss."""
    ids = torch.randint(
        config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0)
    ).repeat(repeated, 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def book_model(ours: GPTModel) -> torch.nn.Module:
    """The book's model with the weights of ``ours`` and a tied head."""
    import book

    book_gpt = book.BookGPT({**vars(ours.config), "drop_rate": 0.0})
    weights = {}
    for name, tensor in ours.state_dict().items():
        if ".qkv." in name:
            for part, matrix in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                weights[name.replace("qkv", f"W_{part}")] = matrix
        elif "norm" in name:
            weights[name.replace("weight", "scale").replace("bias", "shift")] = tensor
        else:
            weights[name] = tensor
    missing = book_gpt.load_state_dict(weights, strict=False).missing_keys
    assert all(name.endswith((".mask", "out_head.weight")) for name in missing), missing
    book_gpt.out_head.weight = book_gpt.tok_emb.weight
    return book_gpt


def training_step(
    variant: TrainingVariant, config: GPTConfig, rows: int, length: int, device: torch.device
) -> Callable[[], Tensor]:
    """A function that runs one optimizer step on the same windows and returns the loss without synchronizing."""
    x, y = (t.to(device) for t in batch_of(config, rows, variant.batch // rows, length))
    torch.manual_seed(0)
    with torch.device(device):
        ours = GPTModel(config)
        model = book_model(ours) if variant.book else ours
    model.train()
    features = ours.features
    if variant.compiled == "blocks":
        for block in ours.trf_blocks:
            block.compile()
    elif variant.compiled is not None:
        features = torch.compile(ours.features, dynamic=False)
    optimizer = build_adamw(
        model,
        lr=variant.lr,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        decay_matrices_only=True,
        fused=variant.fused,
    )
    bf16 = variant.matmul == "bf16"
    kernel = loss._kernel if variant.kernel else lambda device: None

    def step() -> Tensor:
        with mock.patch.object(loss, "_kernel", kernel):
            return optimizer_step()

    def optimizer_step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if variant.book:
                mean = loss.cross_entropy(model(x), y)
            elif variant.chunk is None:
                mean = loss.cross_entropy(ours.head(features(x)), y)
            else:
                mean = loss.chunked_cross_entropy(
                    features(x),
                    ours.head_weight,
                    y,
                    variant.chunk,
                    pad_vocabulary=True,
                )
        mean.backward()
        optimizer.step()
        return mean.detach()

    if not variant.cudnn:
        return step

    def with_cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return step()

    return with_cudnn


def fit(
    config: GPTConfig,
    batch: int,
    length: int,
    device: torch.device,
    steps: int,
    peak: float | None,
) -> dict[str, Any]:
    """Speed of the ``fit`` command as it logs it, in ``throughput/tokens_per_second``.

    It includes the data loader, the check for bad steps, gradient clipping and the callbacks.
    """
    cuda = device.type == "cuda"
    settings = {
        **{f"model.config.{key}": value for key, value in vars(config).items() if value is not None},
        "model.compile": cuda, "model.loss_chunk_size": min(16384, batch * length // 2),
        "trainer.precision": "bf16-mixed", "trainer.accelerator": "gpu" if cuda else "cpu",
        "trainer.devices": 1, "trainer.max_steps": steps + 1, "trainer.max_epochs": -1,
        "trainer.gradient_clip_val": 1.0, "trainer.enable_checkpointing": False,
        "data.text": "sample", "data.train_ratio": 0.5, "data.context_length": length, "data.stride": 1,
        "data.batch_size": batch, "evaluation.eval_freq": 10**6, "evaluation.eval_iter": 1,
        "evaluation.prompt": "null", "throughput.every_n_steps": steps // 4,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [sys.executable, "-m", "gpt_lightning", "fit", *(f"--{k}={v}" for k, v in settings.items())],
            cwd=scratch, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
        events = EventAccumulator(f"{scratch}/checkpoints/run").Reload()
        rates = sorted(e.value for e in events.Scalars("throughput/tokens_per_second"))
        memory = max(e.value for e in events.Scalars("throughput/peak_memory_gb"))
    rate = statistics.median(rates)
    metrics = {
        "batch": batch,
        "tokens_per_second": [round(r, 1) for r in (rate, rates[0], rates[-1])],
        "memory_gb": round(memory, 3),
    }
    return metrics | (
        {"mfu": round(rate * flops_per_token(config, length) / peak, 4)} if peak else {}
    )


def measure(
    variant: TrainingVariant,
    config: GPTConfig,
    rows: int,
    length: int,
    device: torch.device,
    expected: list[float] | None,
    peaks: dict[str, float | None],
    seconds: float,
) -> dict[str, Any]:
    """Speed of a variant, measured after STEPS steps whose losses are compared with ``expected``.

    Args:
        rows: Different windows in a batch, the same for all variants that are compared.
        expected: Losses in float32; ``None``: this variant is the reference.
        peaks: Peak FLOP/s by the name of the reported fraction.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if variant.matmul == "float32" else "high")
    try:
        step = training_step(variant, config, rows, length, device)
        losses = torch.stack([step() for _ in range(STEPS)]).tolist()
        each = seconds_per_call(step, device, seconds)
    finally:
        torch.set_float32_matmul_precision(before)
    rates = sorted(variant.batch * length / one for one in each)
    rate = statistics.median(rates)
    padded = -(-config.vocab_size // PAD_VOCABULARY_TO) * PAD_VOCABULARY_TO
    flops = flops_per_token(config, length, vocab_size=padded)
    metrics = {
        "batch": variant.batch,
        "tokens_per_second": [round(r, 1) for r in (rate, rates[0], rates[-1])],
        "step_ms": round(1e3 * statistics.median(each), 3),
        **{name: round(rate * flops / peak, 4) for name, peak in peaks.items() if peak},
        "losses": losses,
    }
    if expected is not None:
        deviation = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        deviation /= max(expected[0] - expected[-1], 1e-9)
        metrics["deviation"] = deviation if math.isfinite(sum(losses)) else math.inf
        metrics["tolerance"] = TOLERANCES[variant.matmul]
    return metrics
