"""The forms in which weights lie on disk, each read into the same thing: a :class:`Source`."""

import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.model.config import GPTConfig

_MODULE_PREFIX = "model."  # GPTLightningModule holds the GPTModel as ``model``


@dataclass(frozen=True)
class Source:
    """Weights under :class:`GPTModel`'s names and, where the file has it, the optimizer's state.

    ``optimizer_state`` is what ``Optimizer.state_dict()`` returned, with ``param_names`` in its groups.
    """

    config: GPTConfig
    state_dict: dict[str, Tensor]
    optimizer_state: dict[str, Any] | None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, as a dict of tensors and primitives; the tensors are memory-mapped.

    Raises:
        ValueError: It is no checkpoint of ours, or a damaged one.
        OSError: It cannot be read.
    """
    not_ours = f"checkpoint: {path} is no checkpoint of gpt_lightning"
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{not_ours}, or damaged ({cause[:120]}); give another") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= set(
        checkpoint
    ):
        raise ValueError(f"{not_ours}: it has no state_dict with hyper_parameters; give another")
    return checkpoint


def checkpoint_config(checkpoint: dict[str, Any]) -> GPTConfig:
    """The architecture a checkpoint of ours was trained with."""
    stored = dict(checkpoint["hyper_parameters"]["config"])
    return GPTConfig(**{f.name: stored[f.name] for f in fields(GPTConfig) if f.name in stored})


def read_lightning(path: Path) -> Source:
    checkpoint = read_checkpoint(path)
    optimizers = checkpoint.get("optimizer_states") or [None]
    return Source(
        config=checkpoint_config(checkpoint),
        state_dict={
            name.removeprefix(_MODULE_PREFIX): tensor
            for name, tensor in checkpoint["state_dict"].items()
        },
        optimizer_state=optimizers[0],
    )
