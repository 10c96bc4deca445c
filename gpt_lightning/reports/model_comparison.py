"""Exercise 5.6: models of different sizes side by side, on the same prompt and the same text."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from statistics import median
from typing import TYPE_CHECKING

import psutil
import torch

from gpt_lightning.data.dataloader import ResumableDataLoader
from gpt_lightning.data.dataset import WindowDataset
from gpt_lightning.data.token_cache import read_splits
from gpt_lightning.data.tokenizer import encode_prompt
from gpt_lightning.generation.engine import stream_ids
from gpt_lightning.generation.sampling import SamplingParams, make_generator
from gpt_lightning.generation.text import generate_texts
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.loss import cross_entropy
from gpt_lightning.model.packed_linear import pack_weights
from gpt_lightning.palette import SERIES
from gpt_lightning.pretrained.load import (
    build_model,
    check_tokenizer,
    print_warnings,
    read_weights,
    weight_files,
)
from gpt_lightning.pretrained.weights import ModelWeights, stored_dtype
from gpt_lightning.reports.sampling import add_caption, in_any_font

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# passes whose median is the time to the first token: so many at least, and more of them until a second is over
_MIN_FIRST_TOKEN_PASSES = 5
_MIN_FIRST_TOKEN_SECONDS = 1.0
_ROOM = 1.15  # what loading needs at most, times the weights' own bytes


@dataclass(frozen=True)
class ComparisonTask:
    """What every model is asked to do.

    Attributes:
        text: What the losses are of, see :func:`read_splits`; none: no losses.
        context_length: Tokens in a window of the text, one after the other without overlap.
        dtype: Of the weights, as torch names it; none: as they are stored.
        max_memory: Bytes that a model may take; none: what is free on the device.
    """

    prompt: str
    sampling: SamplingParams
    num_samples: int
    max_new_tokens: int
    seed: int
    text: str | None = None
    train_ratio: float = 0.9
    context_length: int = 256
    batch_size: int = 2
    device: str = "cpu"
    dtype: str | None = None
    n_heads: int | None = None
    max_memory: int | None = None


@dataclass(frozen=True)
class ModelMeasurement:
    """One model. Losses in nats a token; the time to the first token is that of reading the prompt.

    Attributes:
        peak_memory_bytes: The process's largest resident set, Python and torch (some 0.3 GB) included;
            on a GPU what torch had allocated there.
        skipped: Why there are no figures; none: there are.
    """

    source: str
    file_bytes: int
    parameters: int
    skipped: str | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    train_perplexity: float | None = None
    val_perplexity: float | None = None
    seconds_to_load: float | None = None
    seconds_to_first_token: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    samples: tuple[str, ...] = ()


def measure_all(
    sources: Sequence[str], task: ComparisonTask, on_model: Callable[[], None] = lambda: None
) -> list[ModelMeasurement]:
    """Each model in a process of its own, so that its memory is its own, one after the other.

    Raises:
        ValueError, OSError: As :func:`measure`, for the first that cannot be read.
    """
    for source in sources:
        weight_files(source)  # one that is not there is no reason to lose the others' figures
    if task.text is not None:
        read_splits(task.text, task.train_ratio)
    measured = []
    for source in sources:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            try:
                measured.append(process.submit(measure, source, task).result())
            except BrokenProcessPool:
                found = read_weights(source, n_heads=task.n_heads)
                cause = "its process was killed, most likely for want of memory"
                measured.append(replace(_description(source, _parameters(found)), skipped=cause))
        on_model()
    return measured


def measure(source: str, task: ComparisonTask) -> ModelMeasurement:
    """One model, in this process.

    Raises:
        ValueError, OSError: ``source`` or the text cannot be read, or the model not do the task.
    """
    dtype = getattr(torch, task.dtype) if task.dtype else None
    found = read_weights(source, n_heads=task.n_heads)
    check_tokenizer(found, source)
    print_warnings(found)
    dtype = dtype or stored_dtype(found)
    described = _description(source, _parameters(found))
    needed = int(_ROOM * sum(
        t.numel() * dtype.itemsize for t in found.state_dict.values()
    ))  # fmt: skip
    if found.config.tied_embeddings:  # decoding reads the head in an order of its own
        embedding = found.state_dict["tok_emb.weight"]
        needed += embedding.numel() * dtype.itemsize
    if task.text is not None:  # logits, their logarithms
        needed += 8 * task.batch_size * task.context_length * found.config.vocab_size
    if needed > (free := _free_memory(task)):
        why = f"needs about {needed / 1e9:.2g} GB, {free / 1e9:.2g} GB may be taken"
        return replace(described, skipped=why)
    began = time.perf_counter()
    model = build_model(found, device=task.device, dtype=dtype)
    pack_weights(model)
    loaded = time.perf_counter() - began
    first, rate = _speed(model, task)
    generator = make_generator(task.seed, task.device)
    samples = generate_texts(
        model,
        [task.prompt],
        task.max_new_tokens,
        task.sampling,
        num_samples=task.num_samples,
        generator=generator,
    )
    train_loss, val_loss = (None, None) if task.text is None else _losses(model, task.text, task)
    return replace(
        described,
        seconds_to_load=loaded,
        seconds_to_first_token=first,
        tokens_per_second=rate,
        peak_memory_bytes=_peak_memory(task.device),
        samples=tuple(sample.text for sample in samples),
        train_loss=train_loss,
        val_loss=val_loss,
        train_perplexity=None if train_loss is None else math.exp(train_loss),
        val_perplexity=None if val_loss is None else math.exp(val_loss),
    )


def _description(source: str, parameters: int) -> ModelMeasurement:
    return ModelMeasurement(
        source, sum(path.stat().st_size for path in weight_files(source)), parameters
    )


def _parameters(found: ModelWeights) -> int:
    return sum(tensor.numel() for tensor in found.state_dict.values())


def _free_memory(task: ComparisonTask) -> int:
    if torch.device(task.device).type == "cuda":
        free = int(torch.cuda.mem_get_info(task.device)[0])
    else:
        free = int(psutil.virtual_memory().available)
    return free if task.max_memory is None else min(free, task.max_memory)


def _peak_memory(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _speed(model: GPTModel, task: ComparisonTask) -> tuple[float, float | None]:
    """Median seconds to the first token, and tokens per second by the median step (``None`` for a single token).

    The first passes of a process are slow, for they load kernels and read the weights from disk; a median
    leaves out what another process takes now and then.
    """
    _token_times(model, task, 2)  # a warm-up
    first: list[float] = []
    while len(first) < _MIN_FIRST_TOKEN_PASSES or sum(first) < _MIN_FIRST_TOKEN_SECONDS:
        first += _token_times(model, task, 1)
    steps = _token_times(model, task, task.max_new_tokens)[1:]
    return median(first), 1 / median(steps) if steps else None


def _token_times(model: GPTModel, task: ComparisonTask, new_tokens: int) -> list[float]:
    """Seconds from each token of one text to the next; the first is that of reading the prompt."""
    generator = make_generator(task.seed, task.device)
    times = [time.perf_counter()]
    for step in stream_ids(
        model,
        [encode_prompt(task.prompt)],
        new_tokens,
        task.sampling,
        eos_id=None,
        generator=generator,
    ):
        step.tolist()  # waits for a GPU
        times.append(time.perf_counter())
    return [after - before for before, after in pairwise(times)]


@torch.inference_mode()
def _losses(model: GPTModel, text: str, task: ComparisonTask) -> tuple[float, float]:
    """Mean loss of all tokens of the training and of the validation split."""
    length = min(task.context_length, model.config.context_length)
    train, val = (
        _loss(model, WindowDataset(parts, length, length), task)
        for parts in read_splits(text, task.train_ratio)
    )
    return train, val


def _loss(model: GPTModel, windows: WindowDataset, task: ComparisonTask) -> float:
    if not len(windows):
        raise ValueError(
            f"text: a split of {task.text} has {windows.tokens} tokens, one window needs {windows.length + 1}; "
            "give more text, or a smaller context_length"
        )
    total, count = 0.0, 0
    for batch in ResumableDataLoader(windows, task.batch_size, shuffle=False, drop_last=False):
        inputs, targets = (part.to(task.device) for part in batch)
        loss = cross_entropy(model(inputs).float(), targets)
        total += float(loss) * targets.numel()
        count += targets.numel()
    return total / count


def as_dict(measured: Sequence[ModelMeasurement]) -> dict[str, list[dict[str, object]]]:
    return {"models": [asdict(model) for model in measured]}


def comparison_figure(measured: Sequence[ModelMeasurement], caption: str) -> "Figure":
    """Loss, speed, time to the first token and memory of the models that were not skipped."""
    from matplotlib.figure import Figure

    shown = [model for model in measured if model.skipped is None]
    width = max(5.0, 1.1 * len(shown) + 1.5)
    drawing = Figure(figsize=(2 * width, 8), layout="constrained")
    (loss, memory), (speed, first) = drawing.subplots(2, 2)
    names = short_names([model.source for model in shown])
    _bars(loss, names, "Loss (nats per token)", {
        "training": [model.train_loss for model in shown],
        "validation": [model.val_loss for model in shown],
    })  # fmt: skip
    _bars(memory, names, "Peak memory, and file (GB)", {
        "peak memory": [(model.peak_memory_bytes or 0) / 1e9 for model in shown],
        "file": [model.file_bytes / 1e9 for model in shown],
    })  # fmt: skip
    _bars(speed, names, "Tokens per second (median)",
          {"": [model.tokens_per_second for model in shown]})  # fmt: skip
    _bars(first, names, "Time to the first token (ms, median)",
          {"": [1e3 * (model.seconds_to_first_token or 0.0) for model in shown]})  # fmt: skip
    add_caption(drawing, caption)
    return drawing


def _bars(
    axes: "Axes", names: list[str], title: str, series: dict[str, list[float | None]]
) -> None:
    axes.set_title(title, fontsize=12, pad=26 if len(series) > 1 else 8)
    if all(value is None for values in series.values() for value in values):
        axes.set_axis_off()
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, fontsize=10)
        return
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        places = [place + (i - (len(series) - 1) / 2) * width for place in range(len(names))]
        bars = axes.bar(
            places, [value or 0.0 for value in values], 0.94 * width, color=SERIES[i], label=label
        )
        labels = ["–" if value is None else plain_number(value) for value in values]
        axes.bar_label(bars, labels, padding=2, fontsize=9)
    axes.set_xticks(
        range(len(names)), [in_any_font(name) for name in names], fontsize=10, rotation=20,
        ha="right", rotation_mode="anchor", parse_math=False,
    )  # fmt: skip
    axes.margins(y=0.12)
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter("{x:,.10g}")
    if len(series) > 1:  # above the bars, between them and the title
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=10, frameon=False
        )


def plain_number(value: float) -> str:
    """Three digits or all before the point, never an exponent: ``1,020``, ``17.9``, ``0.585``, ``0.0042``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def short_names(sources: Sequence[str]) -> list[str]:
    """The last parts of each path, as many as tell it from the others."""
    paths = [source.rstrip("/").split("/") for source in sources]
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        parts = 1
        while parts < len(path) and any(other[-parts:] == path[-parts:] for other in others):
            parts += 1
        names.append("/".join(path[-parts:]))
    return names
