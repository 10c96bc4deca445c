"""What a run's settings do that is easily missed: nothing at all, another result, or a slow run."""

from collections.abc import Iterator

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.hardware import measured_peak

# settings of Lightning's own validation, with the values of those who do not ask for it
_VALIDATION = {
    "val_check_interval": (None,),
    "check_val_every_n_epoch": (1,),
    "num_sanity_val_steps": (None, 0),
}


def remarks(
    config: Namespace,
    trainer: Trainer,
    architecture: GPTConfig,
    arguments: list[str],
    *,
    keeps_freed_memory: bool,
) -> Iterator[str]:
    """One line each, for a run that is about to begin.

    Args:
        arguments: The command line, where alone a default that was asked for differs from one that was not.
        keeps_freed_memory: Whether it does.
    """
    asked = any(argument.startswith("--keep_freed_memory") for argument in arguments)
    if config.keep_freed_memory and asked and not keeps_freed_memory:
        yield "keep_freed_memory: has no effect but on a CPU with glibc's malloc"
    if config.model.compile and max(architecture.drop_rate, architecture.attention_drop_rate) > 0:
        book = ", so the losses are not the book's" if config.rng == "global" else ""
        yield f"model.compile: compiled blocks draw other numbers for dropout than plain ones{book}"
    if trainer.strategy.root_device.type == "cuda" and config.model.loss_chunk_size is None:
        yield (
            "model.loss_chunk_size: without it the loss is computed whole, with the vocabulary as it is; 8192 (tokens) is "
            "the faster on a GPU, with the same result to rounding"
        )
    yield from precision_warnings(trainer)
    if trainer.limit_val_batches == 0:
        for name, unasked in _VALIDATION.items():
            if config.trainer[name] not in unasked:
                yield (
                    f"trainer.{name}: has no effect, evaluation.eval_freq says when losses are computed; "
                    "with trainer.limit_val_batches Lightning validates too"
                )
    if config.trainer.log_every_n_steps is not None and not config.trainer.callbacks:
        yield (
            "trainer.log_every_n_steps: has no effect, evaluation.eval_freq and throughput.every_n_steps say when "
            "figures are logged"
        )


def precision_warnings(trainer: Trainer) -> Iterator[str]:
    """One line where another one is the faster."""
    if trainer.strategy.root_device.type == "cpu" and "bf16" in trainer.precision:
        size = 192  # 10 ms of the slow one
        rates = [measured_peak(dtype, size) for dtype in (torch.float32, torch.bfloat16)]
        if rates[0] > 1.5 * rates[1]:
            yield (
                f"trainer.precision: this CPU multiplies bfloat16 {rates[0] / rates[1]:.0f} times slower than "
                "float32; 32-true is the faster here"
            )
