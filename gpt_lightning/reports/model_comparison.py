"""Exercise 5.6: comparison of models of different sizes on the same prompt and the same text."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import Any

import psutil
import torch

from gpt_lightning.data.dataloader import ResumableDataLoader
from gpt_lightning.data.dataset import WindowDataset
from gpt_lightning.data.token_cache import find_tokenizer, read_splits
from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.evals.likelihood import perplexity
from gpt_lightning.evals.task_names import TaskName
from gpt_lightning.evals.tasks import make_task, read_tasks
from gpt_lightning.generation.engine import stream_ids
from gpt_lightning.generation.sampling import SamplingParams, make_generator
from gpt_lightning.generation.text import generate_texts
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.loss import cross_entropy
from gpt_lightning.model.quantize import QUANTIZED_DTYPES
from gpt_lightning.pretrained.load import build_for_decoding
from gpt_lightning.pretrained.source import (
    check_tokenizer,
    print_warnings,
    read_weights,
    weight_files,
)
from gpt_lightning.pretrained.weights import ModelWeights, stored_dtype
from gpt_lightning.reports.comparison_results import ModelMeasurement
from gpt_lightning.reports.separate_process import ProcessKilledError, peak_memory, run_in_process
from gpt_lightning.reports.text_metrics import distinct_n, seq_rep_n
from gpt_lightning.table import Table

# the time to the first token is the median of at least so many passes, and of at least so many seconds
_MIN_FIRST_TOKEN_PASSES = 5

_MIN_FIRST_TOKEN_SECONDS = 1.0

_TASK_BATCH_SIZE = 16  # texts of a task that are computed together

_LOADING_FACTOR = 1.15  # peak memory of loading over the size of the weights


@dataclass(frozen=True)
class ComparisonTask:
    """The task of every model.

    Attributes:
        text: The text whose losses are measured, see :func:`read_splits`. ``None``: no losses.
        context_length: Tokens in a window of the text. Windows do not overlap.
        dtype: Of the weights, by its torch name. ``None``: as stored.
        max_memory: Bytes that a model may need. ``None``: the free memory of the device.
        tasks: Tasks such as HellaSwag, and the file of each. ``None``: the downloaded file.
        task_limit: First examples of each task. ``None``: all.
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
    tasks: dict[TaskName, str | None] = field(default_factory=dict)
    task_limit: int | None = None


def measure_all(
    sources: Sequence[str], task: ComparisonTask, on_model: Callable[[], None] = lambda: None
) -> Table[ModelMeasurement]:
    """Measure the models one after the other, each in a separate process, so that its peak memory is known.

    Args:
        on_model: Called after each model.

    Raises:
        ValueError, OSError: As :func:`measure`, for the first source that cannot be read.
    """
    # find a missing source or text before the first measurement, not after it
    for source in sources:
        weight_files(source)
    if task.text is not None:
        read_splits(task.text, task.train_ratio, find_tokenizer(None, [task.text]))
    read_tasks(task.tasks, "tasks", task.task_limit)
    measurements: Table[ModelMeasurement] = Table()
    for source in sources:
        try:
            measurements.append(run_in_process(measure, source, task))
        except ProcessKilledError as error:
            weights = read_weights(source, n_heads=task.n_heads)
            measurements.append(replace(_not_measured(source, weights, task), skipped=str(error)))
        on_model()
    return measurements


def measure(source: str, task: ComparisonTask) -> ModelMeasurement:
    """Measure one model in this process.

    Raises:
        ValueError, OSError: ``source`` or the text cannot be read, or the model does not fit the task.
    """
    dtype = getattr(torch, task.dtype) if task.dtype else None
    weights = read_weights(source, n_heads=task.n_heads)
    check_tokenizer(weights, source)
    print_warnings(weights)
    dtype = dtype or stored_dtype(weights)
    measurement = _not_measured(source, weights, task)
    itemsize = 4 if dtype in QUANTIZED_DTYPES else dtype.itemsize  # they are made of float32
    needed = int(_LOADING_FACTOR * sum(
        t.numel() * itemsize for t in weights.state_dict.values()
    ))  # fmt: skip
    if weights.config.tied_embeddings:  # decoding needs a copy of the head in another layout
        embedding = weights.state_dict["tok_emb.weight"]
        needed += embedding.numel() * itemsize
    if task.text is not None:  # the logits and their log-softmax
        needed += 8 * task.batch_size * task.context_length * weights.config.vocab_size
    if needed > (free := _free_memory(task)):
        cause = f"needs about {needed / 1e9:.2g} GB, {free / 1e9:.2g} GB are available"
        return replace(measurement, skipped=cause)
    start = time.perf_counter()
    tokenizer = weights.tokenizer
    model = build_for_decoding(weights, device=task.device, dtype=dtype)
    seconds_to_load = time.perf_counter() - start
    first_token, rate = _speed(model, tokenizer, task)
    generator = make_generator(task.seed, task.device)
    samples = generate_texts(
        model,
        [task.prompt],
        task.max_new_tokens,
        task.sampling,
        num_samples=task.num_samples,
        tokenizer=tokenizer,
        eos_id=tokenizer.end_of_text_id,
        generator=generator,
    )
    prompt_tokens = len(tokenizer.encode_prompt(task.prompt))
    new_ids = [sample.token_ids[prompt_tokens:] for sample in samples]
    train_loss, val_loss = None, None
    if task.text is not None:
        train_loss, val_loss = _losses(model, tokenizer, task.text, task)
    return replace(
        measurement,
        seconds_to_load=seconds_to_load,
        seconds_to_first_token=first_token,
        tokens_per_second=rate,
        peak_memory_bytes=peak_memory(task.device),
        samples=tuple(sample.text for sample in samples),
        distinct_1=distinct_n(new_ids, 1),
        distinct_2=distinct_n(new_ids, 2),
        seq_rep_4=seq_rep_n(new_ids, 4),
        tasks=_evaluate_tasks(model, tokenizer, source, task),
        train_loss=train_loss,
        val_loss=val_loss,
        train_perplexity=None if train_loss is None else perplexity(train_loss),
        val_perplexity=None if val_loss is None else perplexity(val_loss),
    )


def _not_measured(source: str, weights: ModelWeights, task: ComparisonTask) -> ModelMeasurement:
    """The sizes of a model, without measurements."""
    file_bytes = sum(path.stat().st_size for path in weight_files(source))
    parameters = sum(t.numel() for t in weights.state_dict.values())
    return ModelMeasurement(source, file_bytes, parameters, tasks=dict.fromkeys(task.tasks))


def _free_memory(task: ComparisonTask) -> int:
    """The bytes that a model may need."""
    if torch.device(task.device).type == "cuda":
        free = int(torch.cuda.mem_get_info(task.device)[0])
    else:
        free = int(psutil.virtual_memory().available)
    return free if task.max_memory is None else min(free, task.max_memory)


def _speed(
    model: GPTModel, tokenizer: Tokenizer, task: ComparisonTask
) -> tuple[float, float | None]:
    """Median seconds to the first token, and tokens per second of the median step (``None`` for one token).

    The first passes of a process are slow, because they load kernels and read the weights from disk. A median
    is not changed by interruptions from other processes.
    """
    _token_times(model, tokenizer, task, 2)  # warm-up
    first_tokens: list[float] = []
    while (
        len(first_tokens) < _MIN_FIRST_TOKEN_PASSES or sum(first_tokens) < _MIN_FIRST_TOKEN_SECONDS
    ):
        first_tokens += _token_times(model, tokenizer, task, 1)
    steps = _token_times(model, tokenizer, task, task.max_new_tokens)[1:]
    return median(first_tokens), 1 / median(steps) if steps else None


def _token_times(
    model: GPTModel, tokenizer: Tokenizer, task: ComparisonTask, new_tokens: int
) -> list[float]:
    """Seconds for each new token of one text. The first includes reading the prompt."""
    generator = make_generator(task.seed, task.device)
    times = [time.perf_counter()]
    for step in stream_ids(
        model,
        [tokenizer.encode_prompt(task.prompt)],
        new_tokens,
        task.sampling,
        eos_id=None,
        generator=generator,
    ):
        step.tolist()  # waits until a GPU is done
        times.append(time.perf_counter())
    return [after - before for before, after in pairwise(times)]


@torch.inference_mode()
def _losses(
    model: GPTModel, tokenizer: Tokenizer, text: str, task: ComparisonTask
) -> tuple[float, float]:
    """Mean loss over all tokens of the training and of the validation split."""
    length = min(task.context_length, model.config.context_length)
    train, val = (
        _loss(model, WindowDataset(tokens, length, length), task)
        for tokens in read_splits(text, task.train_ratio, tokenizer)
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
        inputs, targets = (tensor.to(task.device) for tensor in batch)
        loss = cross_entropy(model(inputs).float(), targets)
        total += float(loss) * targets.numel()
        count += targets.numel()
    return total / count


def _evaluate_tasks(
    model: GPTModel, tokenizer: Tokenizer, source: str, task: ComparisonTask
) -> dict[TaskName, dict[str, Any] | None]:
    """The result of each task, without its name."""
    results: dict[TaskName, dict[str, Any] | None] = {}
    for name, examples in read_tasks(task.tasks, "tasks", task.task_limit).items():
        try:
            made = make_task(name, examples, tokenizer, model.config.context_length)
        except ValueError as error:
            raise ValueError(f"tasks: {name} for {source}: {error}") from error
        result = made.evaluate(model, _TASK_BATCH_SIZE)
        results[name] = {key: value for key, value in result.items() if key != "task"}
    return results
