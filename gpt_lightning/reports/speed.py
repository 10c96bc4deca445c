"""Bonus folder 10 of chapter 5: the training speed of the book's model, and of one improvement after the other.

Every row trains from the same weights on the same windows without dropout, so its losses must be those of the first
row up to the rounding of its number format.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.cpu_peak import measured_peak
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.loss import PAD_VOCABULARY_TO, chunked_cross_entropy, cross_entropy
from gpt_lightning.pretrained.book import to_book
from gpt_lightning.reports.book_model import BookGPT
from gpt_lightning.reports.separate_process import peak_memory, run_in_process
from gpt_lightning.reports.speed_results import SpeedRow
from gpt_lightning.table import Table

MAX_STEPS = 20

BATCH_FACTOR = 4

# largest difference of a loss from the first row's, in nats: rounding, which AdamW's first steps amplify
TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}

_SLOW_BFLOAT16 = 1.5  # so many times slower than float32, a CPU has no instructions for it


@dataclass(frozen=True)
class SpeedTask:
    """What every row trains.

    Attributes:
        config: Architecture, without dropout.
        windows: ``(N, T + 1)`` token ids, read in this order and from the start again.
        batch_size: Windows of an optimizer step.
        chunk_size: Tokens of a chunk of the loss.
        device: ``cpu`` or ``cuda``.
    """

    config: GPTConfig
    windows: NDArray[np.int64]
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    chunk_size: int
    device: str = "cpu"

    def batch(self, step: int, size: int) -> Tensor:
        """Return the windows of a step, ``(size, T + 1)``."""
        numbers = np.arange(step * size, (step + 1) * size) % len(self.windows)
        return torch.from_numpy(self.windows[numbers])


@dataclass(frozen=True)
class Setup:
    """How a row trains.

    Attributes:
        is_book: Whether it is the book's model.
        dtype: Name of autocast's dtype; ``None``: float32 without autocast.
        batch_factor: Windows of a step, as a multiple of the task's.
    """

    is_book: bool = False
    fused: bool = False
    dtype: str | None = None
    compiled: bool = False
    padded_vocabulary: bool = False
    chunked: bool = False
    batch_factor: int = 1


@dataclass(frozen=True)
class _Measured:
    losses: list[float]
    seconds_per_step: float
    peak_memory_bytes: int
    # of the first windows with the initial weights, for the row of the batch size
    first_losses: list[float]


def improvements(device: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, description and changed settings of each row after the first, in order."""
    dtype = _fast_dtype(device) or "bfloat16"
    yield (
        "our model",
        "one matrix for q, k and v; torch's attention, LayerNorm and GELU",
        {"is_book": False},
    )
    yield "fused AdamW", "one operation updates all weights", {"fused": True}
    yield dtype, "autocast: matrix products in 16 bits", {"dtype": dtype}
    yield "compiled", "torch.compile joins the operations of a block", {"compiled": True}
    yield (
        "padded vocabulary",
        f"the head's rows rounded up to a multiple of {PAD_VOCABULARY_TO}",
        {"padded_vocabulary": True},
    )
    yield "loss by chunks", "the logits are never all in memory", {"chunked": True}
    yield f"batch size x{BATCH_FACTOR}", "more windows a step", {"batch_factor": BATCH_FACTOR}


def measure_all(
    task: SpeedTask, seconds: float, on_row: Callable[[], None] = lambda: None
) -> Table[SpeedRow]:
    """Measure all rows, each in a separate process, so that its peak memory is known.

    Args:
        seconds: Time for all rows together. Rows that it does not reach are not measured.
        on_row: Called after each row.
    """
    end = time.monotonic() + seconds
    changes = list(improvements(task.device))
    first = _measure_apart(task, Setup(is_book=True), seconds / (len(changes) + 1))
    on_row()
    if isinstance(first, str):
        raise ValueError(
            f"report speed: the book's model cannot be trained here ({first}); give a smaller one"
        )
    tokens = task.batch_size * (task.windows.shape[1] - 1)
    rows = Table([
        SpeedRow(
            "the book's model", "chapter 4, AdamW as in chapter 5", None, True,
            tokens / first.seconds_per_step, first.seconds_per_step, 1.0, first.peak_memory_bytes,
            tuple(first.losses), 0.0, True,
        )
    ])  # fmt: skip
    kept, setup = rows[0], Setup(is_book=True)
    for i, (name, change, values) in enumerate(changes):
        candidate = replace(setup, **values)
        left = end - time.monotonic()
        reason = _unsupported_reason(task, candidate, values)
        if reason is None and left < 2 * first.seconds_per_step:
            reason = f"--minutes {seconds / 60:g} are too few for this row"
        found = reason or _measure_apart(task, candidate, left / (len(changes) - i))
        row = _row(task, name, change, candidate, found, first, kept)
        if i == 0 and isinstance(found, _Measured):
            row = replace(row, is_kept=True)  # the other changes are of this package's model
        rows.append(row)
        if row.is_kept:
            kept, setup = row, candidate
        on_row()
    return rows


def _row(
    task: SpeedTask,
    name: str,
    change: str,
    setup: Setup,
    found: _Measured | str,
    first: _Measured,
    kept: SpeedRow,
) -> SpeedRow:
    if isinstance(found, str):
        return SpeedRow(name, change, reason=found)
    tokens = task.batch_size * setup.batch_factor * (task.windows.shape[1] - 1)
    rate = tokens / found.seconds_per_step
    if setup.batch_factor > 1:  # a step reads the windows of several steps of the first row
        pairs = [(found.losses[0], sum(first.first_losses) / len(first.first_losses))]
    else:
        pairs = list(zip(found.losses, first.losses, strict=False))
    difference = max(abs(ours - theirs) for ours, theirs in pairs)
    assert kept.tokens_per_second is not None
    first_rate = task.batch_size * (task.windows.shape[1] - 1) / first.seconds_per_step
    return SpeedRow(
        name,
        change,
        None,
        rate > kept.tokens_per_second,
        rate,
        found.seconds_per_step,
        rate / first_rate,
        found.peak_memory_bytes,
        tuple(found.losses),
        difference,
        difference <= TOLERANCES[setup.dtype or "float32"],
    )


@cache
def _fast_dtype(device: str) -> str | None:
    """The 16-bit format that a device computes fast; ``None``: none."""
    if device == "cpu":
        size = 192  # takes 10 ms with the slow one
        rates = [measured_peak(dtype, size) for dtype in (torch.float32, torch.bfloat16)]
        return "bfloat16" if rates[0] < _SLOW_BFLOAT16 * rates[1] else None
    return "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"


def _unsupported_reason(task: SpeedTask, setup: Setup, changes: dict[str, Any]) -> str | None:
    if "dtype" in changes and _fast_dtype(task.device) is None:
        return "this CPU multiplies bfloat16 slower than float32"
    if "padded_vocabulary" in changes and task.config.vocab_size % PAD_VOCABULARY_TO == 0:
        return f"{task.config.vocab_size} is a multiple of {PAD_VOCABULARY_TO} already"
    return None


def _measure_apart(task: SpeedTask, setup: Setup, seconds: float) -> _Measured | str:
    """The measurements of a row in a new process, or why there are none."""
    try:
        measured: _Measured = run_in_process(measure, task, setup, seconds)
        return measured
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        return (" ".join(str(error).split()) or type(error).__name__)[:200]


def measure(task: SpeedTask, setup: Setup, seconds: float) -> _Measured:
    """Train in this process: a first step that is not timed, then steps for ``seconds``, at least one.

    The first step compiles, allocates, and makes the optimizer's state.
    """
    start = time.monotonic()
    device = torch.device(task.device)
    model = _model(task, setup).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=task.lr, weight_decay=task.weight_decay, fused=setup.fused or None
    )
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=setup.dtype == "float16")
    size = task.batch_size * setup.batch_factor
    first_losses = []
    if setup.is_book:
        with torch.no_grad():
            for step in range(BATCH_FACTOR):
                first_losses.append(
                    _loss(model, task.batch(step, size).to(device), task, setup).item()
                )
    losses: list[float] = []
    times: list[float] = []
    while len(times) < MAX_STEPS and (len(times) < 2 or time.monotonic() - start < seconds):
        windows = task.batch(len(times), size).to(device)
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = _loss(model, windows, task, setup)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return _Measured(losses, median(times[1:]), peak_memory(task.device), first_losses)


def _model(task: SpeedTask, setup: Setup) -> nn.Module:
    torch.manual_seed(task.seed)
    ours = GPTModel(task.config)
    if not setup.is_book:
        if setup.compiled:
            for block in ours.trf_blocks:
                block.compile()
        return ours
    book = BookGPT(asdict(task.config))
    state = {**ours.state_dict(), "out_head.weight": ours.head_weight}
    book.load_state_dict(to_book(state, replace(task.config, tied_embeddings=False)), strict=False)
    if task.config.tied_embeddings:
        book.out_head.weight = book.tok_emb.weight
    return book


def _loss(model: nn.Module, windows: Tensor, task: SpeedTask, setup: Setup) -> Tensor:
    """Mean loss of windows ``(B, T + 1)``."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    dtype = None if setup.dtype is None else getattr(torch, setup.dtype)
    with nullcontext() if dtype is None else torch.autocast(inputs.device.type, dtype=dtype):
        if not isinstance(model, GPTModel) or not (setup.chunked or setup.padded_vocabulary):
            return cross_entropy(model(inputs), targets)
        features, weight = model.features(inputs), model.head_weight
        if setup.chunked:
            return chunked_cross_entropy(
                features, weight, targets, task.chunk_size, pad_vocabulary=setup.padded_vocabulary
            )
        padded = F.pad(weight, (0, 0, 0, -len(weight) % PAD_VOCABULARY_TO))
        return cross_entropy(F.linear(features, padded)[..., : len(weight)], targets)
