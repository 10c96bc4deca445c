"""The training ladder of benchmarks/gpu.py: from the book's model in float32 up, a change a rung."""

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
from machine import seconds_a_call
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.model import loss
from gpt_lightning.model.flops import flops_per_token
from gpt_lightning.model.loss import PAD_VOCABULARY_TO
from gpt_lightning.training.optimizer import build_adamw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

STEPS = 20  # whose losses are compared
# how far from float32's losses, as a share of what these fall by in STEPS steps; by what multiplies
TOLERANCES = {"float32": 1e-3, "TF32": 1e-2, "bf16": 5e-2}


@dataclass(frozen=True)
class Rung:
    """One way to train.

    Attributes:
        batch: Windows an update.
        book: Whether it is the book's model (tests/book.py), whose attention is explicit, with its head tied.
        fused: Whether AdamW is one kernel, as in ``fit``.
        compiled: 'blocks' as with ``model.compile``, or all up to the loss.
        chunk: Tokens of a chunk of the loss, the vocabulary padded; none: torch's loss over all logits.
        kernel: Whether a chunk's loss is a kernel of ours where it can be, as in ``fit``.
        cudnn: Whether attention must be cuDNN's.
        lr: At which float32's losses do not jump in STEPS steps: there is no warm-up.
        seconds: Expected of the rung as a whole.
    """

    name: str
    batch: int
    seconds: float
    book: bool = False
    multiplies: str = "bf16"
    fused: bool = True
    compiled: str | None = None
    chunk: int | None = None
    kernel: bool = False
    cudnn: bool = False
    lr: float = 3e-4


def ladder(batch: int, length: int) -> list[Rung]:
    """Each adds one thing to the one before; the batch grows last, and the chunks with it."""
    chunk = min(8192, batch * length // 2)
    float32 = Rung("eager fp32 (the book's model)", batch, 16, True, "float32", fused=False)
    tf32 = replace(float32, name="TF32", multiplies="TF32", seconds=11)
    bf16 = replace(tf32, name="bf16", multiplies="bf16", seconds=11)
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


def large_ladder(batch: int) -> list[Rung]:
    """For a model that needs the room: float32 for its losses, then all at once, then larger batches."""
    float32 = Rung("eager fp32 (our model)", batch, 20, multiplies="float32", lr=1e-4)
    all_at_once = Rung("bf16, compiled blocks, loss by chunks", 2 * batch, 20,
                       compiled="blocks", kernel=True, chunk=4096, lr=1e-4)  # fmt: skip
    return [
        float32,
        all_at_once,
        *(
            replace(all_at_once, name=f"batch {n * batch}", batch=n * batch, seconds=20)
            for n in (4, 8)
        ),
    ]


def batch_of(config: GPTConfig, rows: int, repeated: int, length: int) -> tuple[Tensor, Tensor]:
    """Random windows and their targets, ``rows`` different ones, over and over: a larger batch has the same loss."""
    ids = torch.randint(
        config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0)
    ).repeat(repeated, 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def book_model(ours: GPTModel) -> torch.nn.Module:
    """The book's model with the weights of ours, its head tied."""
    import book

    theirs = book.BookGPT({**vars(ours.config), "drop_rate": 0.0})
    weights = {}
    for name, tensor in ours.state_dict().items():
        if ".qkv." in name:
            for letter, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                weights[name.replace("qkv", f"W_{letter}")] = third
        elif "norm" in name:
            weights[name.replace("weight", "scale").replace("bias", "shift")] = tensor
        else:
            weights[name] = tensor
    missing = theirs.load_state_dict(weights, strict=False).missing_keys
    assert all(name.endswith((".mask", "out_head.weight")) for name in missing), missing
    theirs.out_head.weight = theirs.tok_emb.weight
    return theirs


def training_step(
    rung: Rung, config: GPTConfig, rows: int, length: int, device: torch.device
) -> Callable[[], Tensor]:
    """An update on the same windows again; its loss, for which nothing waits."""
    x, y = (t.to(device) for t in batch_of(config, rows, rung.batch // rows, length))
    torch.manual_seed(0)
    with torch.device(device):
        ours = GPTModel(config)
        model = book_model(ours) if rung.book else ours
    model.train()
    features = ours.features
    if rung.compiled == "blocks":
        for block in ours.trf_blocks:
            block.compile()
    elif rung.compiled is not None:
        features = torch.compile(ours.features, dynamic=False)
    optimizer = build_adamw(
        model,
        lr=rung.lr,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        decay_matrices_only=True,
        fused=rung.fused,
    )
    bf16 = rung.multiplies == "bf16"
    kernel = loss._kernel if rung.kernel else lambda device: None

    def step() -> Tensor:
        with mock.patch.object(loss, "_kernel", kernel):
            return update()

    def update() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if rung.book:
                mean = loss.cross_entropy(model(x), y)
            elif rung.chunk is None:
                mean = loss.cross_entropy(ours.head(features(x)), y)
            else:
                mean = loss.chunked_cross_entropy(
                    features(x),
                    ours.head_weight,
                    y,
                    rung.chunk,
                    pad_vocabulary=True,
                )
        mean.backward()
        optimizer.step()
        return mean.detach()

    if not rung.cudnn:
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
    updates: int,
    peak: float | None,
) -> dict[str, Any]:
    """What the ``fit`` command does a second, by its own ``throughput/tokens_per_second``: with the loader, the
    watch over bad steps, clipping and the callbacks, on windows of the sample story."""
    cuda = device.type == "cuda"
    settings = {
        **{f"model.config.{key}": value for key, value in vars(config).items() if value is not None},
        "model.compile": cuda, "model.loss_chunk_size": min(16384, batch * length // 2),
        "trainer.precision": "bf16-mixed", "trainer.accelerator": "gpu" if cuda else "cpu",
        "trainer.devices": 1, "trainer.max_steps": updates + 1, "trainer.max_epochs": -1,
        "trainer.gradient_clip_val": 1.0, "trainer.enable_checkpointing": False,
        "data.text": "sample", "data.train_ratio": 0.5, "data.context_length": length, "data.stride": 1,
        "data.batch_size": batch, "evaluation.eval_freq": 10**6, "evaluation.eval_iter": 1,
        "evaluation.prompt": "null", "throughput.every_n_steps": updates // 4,
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
    shown = {
        "batch": batch,
        "tokens_per_second": [round(r, 1) for r in (rate, rates[0], rates[-1])],
        "memory_gb": round(memory, 3),
    }
    return shown | (
        {"mfu": round(rate * flops_per_token(config, length) / peak, 4)} if peak else {}
    )


def measure(
    rung: Rung,
    config: GPTConfig,
    rows: int,
    length: int,
    device: torch.device,
    expected: list[float] | None,
    peaks: dict[str, float | None],
    seconds: float,
) -> dict[str, Any]:
    """What a rung does a second, after STEPS steps whose losses are held against ``expected``.

    Args:
        rows: Different windows of a batch, the same for all rungs that are compared.
        expected: Float32's losses; none: these are they.
        peaks: FLOP/s by the name of the share that is reported.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if rung.multiplies == "float32" else "high")
    try:
        step = training_step(rung, config, rows, length, device)
        losses = torch.stack([step() for _ in range(STEPS)]).tolist()
        each = seconds_a_call(step, device, seconds)
    finally:
        torch.set_float32_matmul_precision(before)
    rates = sorted(rung.batch * length / one for one in each)
    rate = statistics.median(rates)
    padded = -(-config.vocab_size // PAD_VOCABULARY_TO) * PAD_VOCABULARY_TO
    flops = flops_per_token(config, length, vocab_size=padded)
    found = {
        "batch": rung.batch,
        "tokens_per_second": [round(r, 1) for r in (rate, rates[0], rates[-1])],
        "step_ms": round(1e3 * statistics.median(each), 3),
        **{share: round(rate * flops / peak, 4) for share, peak in peaks.items() if peak},
        "losses": losses,
    }
    if expected is not None:
        off = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        off /= max(expected[0] - expected[-1], 1e-9)
        found["deviation"] = off if math.isfinite(sum(losses)) else math.inf
        found["tolerance"] = TOLERANCES[rung.multiplies]
    return found
