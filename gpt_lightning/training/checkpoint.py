"""A run's checkpoints: ``last`` and ``best`` in its folder, each there whole or not at all."""

import math
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.pretrained.formats import checkpoint_config, read_checkpoint
from gpt_lightning.pretrained.source import find_checkpoint
from gpt_lightning.training.module import agreed_architecture
from gpt_lightning.training.progress import total_steps


def checkpointing(
    folder: Path,
    every_n_train_steps: int | None = None,
    best: bool = True,
    asynchronous: bool = False,
) -> tuple["RunCheckpoints", "DurableCheckpointIO"]:
    """What is behind the settings ``checkpoint.*``.

    Args:
        folder: The run's.
        every_n_train_steps: Updates from one save of last.ckpt to the next; none: at each epoch's end.
        best: Whether best.ckpt, the one with the lowest val_loss, is kept too; costs a checkpoint's size
            in memory.
        asynchronous: Whether training goes on while a copy is written; costs a checkpoint's size in memory.
    """
    return RunCheckpoints(folder, every_n_train_steps, best), DurableCheckpointIO(asynchronous)


class DurableCheckpointIO(CheckpointIO):
    """Writes beside the target, syncs, renames, syncs the folder; reads tensors and primitives only.

    Args:
        asynchronous: Whether a copy of the checkpoint is written by a thread while training goes on. It
            costs the checkpoint's size in memory; each file still becomes visible only when it is whole
            and synced. One save is under way at a time, and an error of one is raised by the next.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self._writer = ThreadPoolExecutor(max_workers=1) if asynchronous else None
        self._under_way: Future[None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        self.finish()
        if self._writer is None:
            _write(checkpoint, Path(path))
        else:
            self._under_way = self._writer.submit(_write, _copy(checkpoint), Path(path))

    def finish(self) -> None:
        """Wait for the save that is under way; raises what went wrong with it."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def teardown(self) -> None:
        self.finish()

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _copy(checkpoint: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = tree_map_only(
        Tensor, lambda t: t.detach().to("cpu", copy=True), checkpoint
    )
    return copied


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # what a killed save leaves, the next one overwrites
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer hides a full disk in a RuntimeError
        raise OSError(
            f"{path}: cannot be written, the disk may be full; what was there before is whole, "
            "so make room and go on with --ckpt_path last"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)  # the rename is durable when the folder is
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunCheckpoints(Checkpoint):
    """``last.ckpt`` and ``best.ckpt``, the one with the lowest validation loss so far.

    Both are written at the same intervals and at the end. In between the best is a copy in memory, as a
    run that has just begun is at its best with every evaluation; a killed run finds it again when it is
    resumed. The ``last`` of Lightning's ``ModelCheckpoint`` is the last of its best, and may be steps old.

    Args:
        folder: The run's.
        every_n_train_steps: Updates from one save to the next; none: at the end of each epoch.
        best: Whether the best is kept too.
    """

    def __init__(
        self, folder: Path, every_n_train_steps: int | None = None, best: bool = True
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(
                f"checkpoint.every_n_train_steps: {every_n_train_steps} is too small; give 1 or more"
            )
        self.folder = folder
        self.every_n_train_steps = every_n_train_steps
        self.best = best
        self.best_val_loss: float | None = None
        self._best: dict[str, Any] | None = None  # not yet written
        self._seen_step = -1
        self._saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = self._saved_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Everything is saved from this hook: what Lightning saves in later ones says that the epoch is
        # over, also where max_steps cut it, and a resumed run would leave out the rest of it.
        step = trainer.global_step
        if step == self._seen_step:
            return
        self._seen_step = step
        val_loss = trainer.callback_metrics.get("val_loss")
        if self.best and val_loss is not None and self._is_lowest(float(val_loss)):
            self.best_val_loss = float(val_loss)
            self._best = None  # its memory is free before the next copy takes as much
            self._best = _copy(trainer._checkpoint_connector.dump_checkpoint())
        if self._is_due(trainer):
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:  # something else ended the run early
            self._save_last(trainer)

    def _is_lowest(self, val_loss: float) -> bool:
        if self.best_val_loss is None:
            return math.isfinite(val_loss)
        return val_loss < self.best_val_loss

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.should_stop or trainer.global_step == total_steps(trainer):
            return True
        if self.every_n_train_steps is None:
            return trainer.is_last_batch
        return trainer.global_step % self.every_n_train_steps == 0

    def _save_last(self, trainer: Trainer) -> None:
        self._saved_step = trainer.global_step
        if self._best is not None:
            trainer.strategy.save_checkpoint(self._best, self.folder / "best.ckpt")
            self._best = None
        trainer.save_checkpoint(self.folder / "last.ckpt")

    def state_dict(self) -> dict[str, Any]:
        return {"best_val_loss": self.best_val_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_val_loss = state_dict["best_val_loss"]


def checkpoint_to_resume(
    folder: Path, ckpt_path: str, named: Mapping[str, Any]
) -> tuple[Path, GPTConfig]:
    """The file that ``--ckpt_path`` names, ``last`` or ``best`` of the run or a path, and its architecture.

    Args:
        named: The keys of the architecture that the configuration names.

    Raises:
        ValueError: It cannot be resumed, or the model there is another than ``named`` says.
        OSError: There is none.
    """
    if ckpt_path in ("last", "best"):
        path = folder / f"{ckpt_path}.ckpt"
        if not path.is_file():
            raise FileNotFoundError(
                f"ckpt_path: the run has no {path} to go on from; leave --ckpt_path out to begin it"
            )
    else:
        path = find_checkpoint(ckpt_path)
        if (folder / "config.yaml").exists() and path.parent != folder.resolve():
            raise ValueError(
                f"ckpt_path: {path} is of another run than {folder}; name its run with --run NAME, "
                "or begin a new one with --init_from"
            )
    checkpoint = read_checkpoint(path)
    if not checkpoint.get("optimizer_states") or "loops" not in checkpoint:
        raise ValueError(
            f"ckpt_path: {path} has weights but no training state; give it as --init_from"
        )
    if not isinstance(checkpoint.get("tokens_seen"), int):
        raise ValueError(f"ckpt_path: {path} is of another LightningModule; give another")
    return path, agreed_architecture(f"ckpt_path: {path}", checkpoint_config(checkpoint), named)
