"""Warnings about settings that have no effect, change the result unexpectedly, or make a run slow."""

from collections.abc import Iterator

import torch
from lightning.pytorch import Trainer

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.cpu_peak import measured_peak
from gpt_lightning.model.hardware import MPS_UNTRIED
from gpt_lightning.training.config import RunConfig
from gpt_lightning.training.schedule import Schedule

# settings of Lightning's own validation → their default values
_VALIDATION_DEFAULTS = {
    "val_check_interval": (None,),
    "check_val_every_n_epoch": (1,),
    "num_sanity_val_steps": (None, 0),
}


def run_warnings(
    config: RunConfig,
    trainer: Trainer,
    architecture: GPTConfig,
    schedule: Schedule,
    *,
    keeps_freed_memory: bool,
) -> Iterator[str]:
    """Warnings for a run that is about to start, one line each.

    Args:
        schedule: That of the run, without shares.
        keeps_freed_memory: Whether ``keep_freed_memory`` has an effect in this process.
    """
    if config.keep_freed_memory and not keeps_freed_memory:
        yield "keep_freed_memory: has no effect here; it needs a CPU run with glibc's malloc"
    if (
        config.model.get("compile")
        and max(architecture.drop_rate, architecture.attention_drop_rate) > 0
    ):
        book = ", so the losses are not the book's" if config.rng == "global" else ""
        yield f"model.compile: compiled blocks draw other random numbers for dropout than uncompiled ones{book}"
    if trainer.strategy.root_device.type == "cuda" and config.model.get("loss_chunk_size") is None:
        yield (
            "model.loss_chunk_size: without it the loss of all tokens is computed at once; 8192 (tokens) is faster on a "
            "GPU, with the same result up to rounding"
        )
    yield from schedule_warnings(schedule)
    if config.model.get("clip_from_step") is not None and not trainer.gradient_clip_val:
        yield "model.clip_from_step: has no effect without trainer.gradient_clip_val, the norm to clip to"
    yield from device_warnings(trainer)
    if trainer.limit_val_batches == 0:
        for name, defaults in _VALIDATION_DEFAULTS.items():
            if config.trainer.get(name, defaults[0]) not in defaults:
                yield (
                    f"trainer.{name}: has no effect, because evaluation.eval_freq sets when losses are computed; "
                    "give trainer.limit_val_batches if Lightning shall validate too"
                )


def schedule_warnings(schedule: Schedule) -> Iterator[str]:
    """Settings of the learning rate that change no step of the run."""
    if schedule.initial_lr is not None and not schedule.warmup_steps:
        yield "model.initial_lr: has no effect without model.warmup_steps"
    if schedule.lr_schedule == "constant" and schedule.min_lr:
        yield "model.min_lr: has no effect with a constant learning rate; give model.lr_schedule"
    if schedule.decay_fraction is not None:
        steps = schedule.decay_steps
        assert isinstance(steps, int)  # the schedule has no shares
        if steps - schedule.decay_start < 2:  # the first step of a decay has model.lr
            yield (
                f"model.decay_fraction: has no effect: {schedule.decay_fraction:g} of {steps} steps is less than "
                "2 steps, in which the learning rate could decay"
            )


def device_warnings(trainer: Trainer) -> Iterator[str]:
    """A warning if another precision is faster on this device, and one if the device was never tried."""
    device = trainer.strategy.root_device
    if device.type == "mps":
        yield MPS_UNTRIED
    if device.type == "cuda" and "bf16" in trainer.precision and torch.version.cuda is not None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            yield (
                f"trainer.precision: this GPU (compute capability {major}.{minor}) has no fast bfloat16, so "
                f"{trainer.precision} is slow; give 16-mixed"
            )
    if device.type == "cpu" and "bf16" in trainer.precision:
        size = 192  # takes 10 ms with the slow one
        rates = [measured_peak(dtype, size) for dtype in (torch.float32, torch.bfloat16)]
        if rates[0] > 1.5 * rates[1]:
            yield (
                f"trainer.precision: this CPU multiplies bfloat16 {rates[0] / rates[1]:.0f} times slower than "
                "float32; give 32-true"
            )
