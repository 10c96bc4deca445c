"""The checkpoint that a resumed run reads: the newest valid one, ``best.ckpt`` or a path."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.pretrained.source import find_checkpoint, read_weights
from gpt_lightning.pretrained.weights import EMA_STATE, read_checkpoint
from gpt_lightning.training.checkpoint_io import (
    BEST,
    LAST,
    PREVIOUS,
    corruption_reason,
    read_manifest,
)
from gpt_lightning.training.ema import EMA_UPDATES
from gpt_lightning.training.module import reconcile_config
from gpt_lightning.training.optimizer import OptimizerConfig

logger = logging.getLogger(__name__)

# keys in checkpoints from before 0.1.0, whose callbacks had other names
_EARLIER_CALLBACKS = frozenset({"RunCheckpoints", "BadSteps"})


def latest_valid_checkpoint(folder: Path) -> Path:
    """Return the newest valid checkpoint of a run: last.ckpt, or previous.ckpt with a warning if last.ckpt is damaged.

    Raises:
        ValueError: Every checkpoint is damaged.
        FileNotFoundError: There is no checkpoint.
    """
    entries = read_manifest(folder)
    damages: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.is_file():
            continue
        damage = corruption_reason(path, entries)
        if not damage:
            if damages:
                logger.warning(f"{'; '.join(damages)}; resuming from {path} instead")
            return path
        damages.append(f"{path} is damaged: {damage}")
    if damages:
        best = folder / BEST
        intact = best.is_file() and not corruption_reason(best, entries)
        remedy = "start again" + (f", or from {best} with --init_from" if intact else "")
        raise ValueError(f"ckpt_path: {'; '.join(damages)}; {remedy}")
    raise FileNotFoundError(
        f"ckpt_path: the run has no {folder / LAST} to resume from; give --ckpt_path auto to start it"
    )


def checkpoint_to_resume(
    folder: Path, ckpt_path: str, named: Mapping[str, Any], optimizer: OptimizerConfig
) -> tuple[Path, GPTConfig, Tokenizer]:
    """Return the file that ``--ckpt_path`` names (``last``, ``best`` or a path), its architecture and tokenizer.

    Args:
        named: Keys of the architecture that the configuration names.
        optimizer: The run's.

    Raises:
        ValueError: It cannot be resumed, or the model there is another than ``named`` says.
        OSError: There is none.
    """
    if ckpt_path == "last":
        path = latest_valid_checkpoint(folder)
    elif ckpt_path == "best":
        path = folder / BEST
        if not path.is_file():
            raise FileNotFoundError(f"ckpt_path: the run has no {path}; give last or a path")
    else:
        path = find_checkpoint(ckpt_path)
        if (folder / "config.yaml").exists() and path.parent != folder.resolve():
            raise ValueError(
                f"ckpt_path: {path} is of another run than {folder}; name its run with --run NAME, "
                "or start a new one with --init_from"
            )
    found = read_weights(str(path))  # checks names, shapes and sizes
    checkpoint = read_checkpoint(path)
    if not checkpoint.get("optimizer_states") or "loops" not in checkpoint:
        raise ValueError(
            f"ckpt_path: {path} has weights but no training state; give it as --init_from"
        )
    if not isinstance(checkpoint.get("tokens_seen"), int):
        raise ValueError(f"ckpt_path: {path} is of another LightningModule; give another")
    if {f"model.{name}" for name in found.state_dict} != checkpoint["state_dict"].keys():
        raise ValueError(
            f"ckpt_path: {path} has other names than a run's checkpoint; give it as --init_from"
        )
    _check_state(checkpoint, path)
    _check_optimizer(checkpoint, path, optimizer)
    if EMA_STATE in checkpoint:
        _check_average(checkpoint, path)
    architecture = reconcile_config(f"ckpt_path: {path}", found.config, named)
    return path, architecture, found.tokenizer


def _check_optimizer(checkpoint: Mapping[str, Any], path: Path, own: OptimizerConfig) -> None:
    """Check that the state of a checkpoint has the form of the run's optimizer, whose other settings may change."""
    settings = checkpoint.get("hyper_parameters") or {}
    stored = OptimizerConfig(
        optimizer=settings.get("optimizer", "adamw"),
        decay_matrices_only=settings.get("decay_matrices_only", own.decay_matrices_only),
    )
    for name, before, after in (
        ("optimizer", stored.name, own.name),
        ("decay_matrices_only", stored.decay_matrices_only, own.decay_matrices_only),
    ):
        if before != after:
            before, after = (
                str(value).lower() if value in (True, False) else value for value in (before, after)
            )
            raise ValueError(
                f"ckpt_path: {path} was trained with model.{name} {before}, and this run has {after}; give "
                f"--model.{name} {before}, or start a new run with --init_from {path}"
            )
    saved = stored.state_keys()
    if saved and (missing := own.state_keys() - saved):
        raise ValueError(
            f"ckpt_path: {path} has no {' and '.join(sorted(missing))} in its optimizer state, which this run's "
            f"model.optimizer.init_args need; give those it was trained with, or start a new run with --init_from {path}"
        )


def _check_average(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Check that a moving average fits the weights; raise a ``ValueError`` if it is damaged."""
    shapes, averaged = (
        {name: tensor.shape for name, tensor in checkpoint[key].items()}
        for key in ("state_dict", EMA_STATE)
    )
    updates = checkpoint.get(EMA_UPDATES)
    if averaged != shapes or type(updates) is not int or updates < 0:
        raise ValueError(f"ckpt_path: {path} is damaged: its {EMA_STATE} does not fit its weights")


def reached_limit(
    checkpoint: Mapping[str, Any], max_steps: int, max_epochs: int | None, max_tokens: int | None
) -> tuple[str, str] | None:
    """Return which limit a run has reached, in words, and its setting; ``None`` if the run continues.

    Args:
        max_steps, max_epochs, max_tokens: The limits of the run that is to resume; -1 or None is no limit.
    """
    loop = checkpoint["loops"]["fit_loop"]
    loaders = loop["state_dict"].get("combined_loader", [])
    batches = loop["epoch_loop.batch_progress"]
    # the data loader's count is the right one, see loop_state.py
    started = loaders[0]["epoch"] + 1 if loaders else loop["epoch_progress"]["current"]["started"]
    epochs = started - (not batches["is_last_batch"])
    for name, done, limit in (
        ("max_steps", checkpoint["global_step"], max_steps),
        ("max_epochs", epochs, max_epochs),
        ("max_tokens", checkpoint["tokens_seen"], max_tokens),
    ):
        if limit is not None and 0 <= limit <= done:
            unit = name.removeprefix("max_").removesuffix("s")
            return f"{unit} {done:,} of {limit:,}", name
    return None


def _check_state(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Check what Lightning assumes about a training state; raise a ``ValueError`` if it is damaged."""
    kinds = {
        "epoch": int, "global_step": int, "pytorch-lightning_version": str, "loops": dict,
        "callbacks": dict, "optimizer_states": list, "lr_schedulers": list,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(checkpoint.get(key), kind):
            raise ValueError(f"ckpt_path: {path} is damaged: its {key} is not a {kind.__name__}")
    if not _EARLIER_CALLBACKS.isdisjoint(checkpoint["callbacks"]):
        raise ValueError(
            f"ckpt_path: {path} was written before version 0.1.0 and cannot be resumed; continue from its weights "
            f"in a new run with --init_from {path} --init_optimizer true"
        )
    parts = [checkpoint["loops"].get("fit_loop"), *checkpoint["optimizer_states"]]
    if not all(isinstance(part, dict) for part in parts) or not all(
        isinstance(state.get("state"), dict) and isinstance(state.get("param_groups"), list)
        for state in checkpoint["optimizer_states"]
    ):
        raise ValueError(f"ckpt_path: {path} is damaged: its loops or optimizer have no state")
