"""Checks of ``trainer.*`` values that Lightning itself reports unclearly, in many lines, or not at all."""

import re
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace

from gpt_lightning.suggestions import suggest

_MIN_VALUES = {
    "max_epochs": -1,
    "min_epochs": 0,
    "max_steps": -1,
    "min_steps": 0,
    "num_nodes": 1,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
    "log_every_n_steps": 0,
    "gradient_clip_val": 0,
}
_BATCH_LIMITS = (
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "overfit_batches",
)
_CHOICES = {
    "accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "strategy": (
        "auto",
        "ddp",
        "ddp_find_unused_parameters_true",
        "ddp_find_unused_parameters_false",
    ),
    "gradient_clip_algorithm": ("norm", "value"),
    "profiler": ("simple", "advanced", "pytorch"),
}
_DDP_FLAGS = (
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "broadcast_buffers",
)


def check_trainer(trainer: Namespace | Mapping[str, Any], *, trains: bool = False) -> None:
    """Refuse values of ``trainer.*`` that are out of range or not one of the choices.

    Args:
        trains: Whether to refuse a run without a single optimizer step too.

    Raises:
        ValueError: A value is wrong.
    """
    for name in ("max_epochs", "max_steps", "limit_train_batches") if trains else ():
        if trainer.get(name) == 0:
            raise ValueError(
                f"trainer.{name}: {trainer[name]} trains nothing; give more, or leave it out"
            )
    for name, minimum in _MIN_VALUES.items():
        value = trainer.get(name)
        if value is not None and value < minimum:
            raise ValueError(f"trainer.{name}: {value} is too small; give {minimum} or more")
    for name in _BATCH_LIMITS:
        value = trainer.get(name)
        if value is not None and (value < 0 or (isinstance(value, float) and value > 1)):
            raise ValueError(
                f"trainer.{name}: {value} is neither a fraction nor a number of batches; give for example 0.5 or 10"
            )
    for name, choices in _CHOICES.items():
        value = trainer.get(name)
        if isinstance(value, str) and value not in choices:
            raise ValueError(f"trainer.{name}: {value} is unknown; {_suggest_choice(name, value)}")
    _check_devices(trainer.get("devices"))
    _check_ddp(trainer.get("strategy"))
    for name in ("max_time", "val_check_interval"):
        value = trainer.get(name)
        if isinstance(value, str) and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value):
            raise ValueError(
                f"trainer.{name}: {value} is not a duration; give days:hours:minutes:seconds, "
                "such as 00:01:30:00"
            )


def _check_ddp(strategy: Any) -> None:
    """Check the flags that DDPStrategy passes to torch without a check."""
    given = strategy.get("init_args", {}) if isinstance(strategy, Namespace) else {}
    kwargs = strategy.get("dict_kwargs", {}) if isinstance(strategy, Namespace) else {}
    for name in _DDP_FLAGS:
        value = kwargs.get(name, given.get(name))
        if value is not None and not isinstance(value, bool):
            raise ValueError(
                f"trainer.strategy.{name}: {value} is not true or false; give one of them"
            )


def _suggest_choice(setting: str, value: str) -> str:
    if setting == "strategy" and re.search(
        "fsdp|shard|model_?parallel|zero|deepspeed", value, re.I
    ):
        return "to shard the model, give --config configs/fsdp.yaml"
    if setting == "strategy" and "." in value:
        return "give a class as trainer.strategy.class_path in a YAML file"
    return suggest(value, _CHOICES[setting])


def _check_devices(devices: Any) -> None:
    parts = devices.strip().strip(",").split(",") if isinstance(devices, str) else devices
    if parts is None or parts in (["auto"], ["-1"], -1):
        return
    if isinstance(devices, list) or (isinstance(parts, list) and "," in devices):
        numbers = [str(part).strip() for part in parts]
        if not numbers or not all(n.isdigit() for n in numbers) or len({*numbers}) < len(numbers):
            raise ValueError(
                f"trainer.devices: {devices} is not a list of different devices; give for example [0, 1]"
            )
    elif not str(parts[0] if isinstance(parts, list) else parts).isdigit() or int(devices) < 1:
        raise ValueError(
            f"trainer.devices: {devices} is not a number of devices; give 1 or more, or auto"
        )
