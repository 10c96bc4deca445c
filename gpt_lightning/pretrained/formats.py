"""The forms in which weights lie on disk, each read into the same thing: a :class:`Source`."""

import pickle
from dataclasses import dataclass
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
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{path}: is no checkpoint of gpt_lightning, or is damaged; give another"
        ) from error
    hyper_parameters = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(hyper_parameters, dict) or not isinstance(
        hyper_parameters.get("config"), dict
    ):
        raise ValueError(
            f"{path}: is no checkpoint of gpt_lightning: it names no model; give another"
        )
    return checkpoint


def checkpoint_config(checkpoint: dict[str, Any]) -> GPTConfig:
    """The architecture a checkpoint of ours was trained with; ``ValueError`` where it is none."""
    stored = checkpoint["hyper_parameters"]["config"]
    try:
        return GPTConfig(**stored)
    except TypeError as error:
        raise ValueError(f"checkpoint: its architecture is no GPTConfig ({error})") from error


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
