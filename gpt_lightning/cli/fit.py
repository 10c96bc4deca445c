"""``fit`` and ``validate``: checks before Lightning starts, the run, and its result."""

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from gpt_lightning.cli.run_warnings import precision_warnings, run_warnings
from gpt_lightning.cli.training_cli import TrainingCLI, is_rank_zero
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.pretrained.load import find_checkpoint
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training.checkpoint_io import LAST, PREVIOUS
from gpt_lightning.training.distributed import init_elastic_process_group, terminate_ranks_on_error
from gpt_lightning.training.hardware import keep_freed_memory
from gpt_lightning.training.resume import reached_limit
from gpt_lightning.training.run_lock import RunLock

logger = logging.getLogger(__name__)


def fit(arguments: list[str]) -> int:
    """Train a model. The first of these that is given decides what the run starts from:

    1. ``--ckpt_path``: the same run resumes, with its weights, optimizer, data position and random numbers. With
       'auto' it resumes if it was started before, and starts otherwise.
    2. ``--init_from``: a new run with existing weights, and existing moments with ``--init_optimizer true``.
    3. Neither: a new run with random weights.
    With 1 and 2 the architecture is that of the weights, and a configuration that names another one is refused. All
    other settings come from the configuration.
    """
    with RunLock() as lock:
        return _fit(TrainingCLI("fit", arguments, fit.__doc__, lock), arguments)


def _fit(cli: TrainingCLI, arguments: list[str]) -> int:
    folder, config, ckpt_path = cli.folder, cli.config, cli.ckpt_path
    if cli.source is not None:
        cli.model.initialize_from(cli.source, with_optimizer=bool(config.init_optimizer))
    if ckpt_path is not None and _is_finished(cli, ckpt_path):
        return 0
    if is_rank_zero():
        if ckpt_path is None and not cli.auto_resume:
            _ensure_new_run(folder)
        if cli.checkpoints is not None:
            cli.checkpoints.check_disk_space(cli.model.config, str(cli.trainer.precision))
        setup_data_early(cli)
        _check_compiler(cli)
    init_elastic_process_group(cli.trainer)
    on_cpu = cli.trainer.strategy.root_device.type == "cpu"
    keeps = bool(config.keep_freed_memory) and on_cpu and keep_freed_memory()
    if is_rank_zero():
        for warning in run_warnings(
            config, cli.trainer, cli.model.config, arguments, keeps_freed_memory=keeps
        ):
            logger.warning(warning)
    try:
        with terminate_ranks_on_error(cli.trainer):
            cli.trainer.fit(
                cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path, weights_only=True
            )
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}") from error
    except SystemExit as error:
        if _is_interrupt(error):
            raise KeyboardInterrupt(f"{folder}: --ckpt_path last resumes it") from error
        if cli.trainer.is_global_zero:
            logger.info(f"{folder}: ended by sys.exit({error.code!r}), not by its settings")
        raise
    if not cli.trainer.is_global_zero:
        return 0  # only rank 0 logs the result
    if cli.preemption.received is not None:
        cli.preemption.requeue()
        logger.info(f"{folder}: stopped; --ckpt_path last resumes it")
    else:
        logger.info(f"{folder}: done; tensorboard --logdir {folder.parent} shows it")
    return cli.preemption.exit_code


def _is_interrupt(error: SystemExit) -> bool:
    """Return whether Lightning made this exit from Ctrl-C; a callback may call ``sys.exit(1)`` too."""
    return error.code == 1 and isinstance(error.__context__, KeyboardInterrupt)


def _is_finished(cli: TrainingCLI, checkpoint: Path) -> bool:
    """Return whether the run has reached its end before, and log it; nothing is written then."""
    trainer = cli.trainer
    reached = reached_limit(
        read_checkpoint(checkpoint), trainer.max_steps, trainer.max_epochs, cli.config.max_tokens
    )
    if reached is None:
        return False
    if is_rank_zero():
        limit, setting = reached
        option = setting if setting == "max_tokens" else f"trainer.{setting}"
        logger.info(
            f"{cli.folder}: already finished ({limit}); to train further, give a larger --{option}"
        )
    return True


def _ensure_new_run(folder: Path) -> None:
    if not (folder / "config.yaml").exists():
        return
    remedy = "resume it with --ckpt_path last"
    if not (folder / LAST).exists() and not (folder / PREVIOUS).exists():
        remedy = "it stopped before its first checkpoint, so --ckpt_path auto starts it again"
    raise ValueError(
        f"run: {folder} holds a run already; {remedy}, or give this run another name with --run NAME"
    )


def setup_data_early(cli: TrainingCLI, stage: str = "fit") -> None:
    """Read the text before anything is written; Lightning would create the loggers' files first."""
    cli.trainer.strategy.connect(cli.model)
    cli.datamodule.trainer = cli.trainer
    cli.datamodule.setup(stage)
    if cli.ckpt_path is not None:
        _check_position(cli.datamodule, read_checkpoint(cli.ckpt_path))


def _check_position(data: TextDataModule, checkpoint: dict[str, Any]) -> None:
    """Refuse data that differ from the checkpoint's before TensorBoard's files are changed."""
    recorded = checkpoint.get(type(data).__qualname__)
    if recorded is None:
        logger.warning(
            "ckpt_path: the checkpoint does not record its data (it was written by an earlier version), so the text is "
            "not verified"
        )
    else:
        data.load_state_dict(recorded)
    for position in checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", []):
        data.train_dataloader().load_state_dict(position)


def _check_compiler(cli: TrainingCLI) -> None:
    """Compile something small, to report a missing compiler in one line before the first step."""
    if not cli.config.model.compile:
        return
    try:
        torch.compile(lambda x: x * x)(torch.zeros(1, device=cli.trainer.strategy.root_device))
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.compile: {cause}; install what is missing, or leave it out"
        ) from error


def validate(arguments: list[str]) -> None:
    """Compute loss and perplexity of a model on both splits of a text; every token has the same weight.

    The weights are those of ``--ckpt_path`` (last, best or a path), else of ``--init_from SOURCE``.
    """
    cli = TrainingCLI("validate", arguments, validate.__doc__)
    assert cli.source is not None
    cli.model.initialize_from(cli.source)
    if is_rank_zero():
        setup_data_early(cli, "validate")
        _check_compiler(cli)
        for warning in precision_warnings(cli.trainer):
            logger.warning(warning)
    init_elastic_process_group(cli.trainer)
    try:
        with terminate_ranks_on_error(cli.trainer):
            cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    except SystemExit as error:
        if _is_interrupt(error):
            raise KeyboardInterrupt from error
        raise
    metrics = {key: value.item() for key, value in cli.trainer.callback_metrics.items()}
    if cli.trainer.is_global_zero:
        _print_validation(metrics, _describe_measurement(cli), as_json=bool(cli.config.json))


def _describe_measurement(cli: TrainingCLI) -> dict[str, Any]:
    """Describe the weights, the text and the windows that the losses belong to."""
    source = cli.source_name() or ""
    with suppress(FileNotFoundError):  # not one of our checkpoints
        source = os.path.relpath(find_checkpoint(source))
    return {"source": source, **cli.datamodule.described()}


def _print_validation(metrics: dict[str, float], about: dict[str, Any], *, as_json: bool) -> None:
    for split in ("train", "val"):
        metrics[f"{split}_tokens"] = int(metrics[f"{split}_tokens"])
    if as_json:
        print(json.dumps({**metrics, **about}))
        return
    text = ", ".join(about["text"]) if isinstance(about["text"], list) else about["text"]
    print(f"weights     {about['source']}")
    print(
        f"text        {text}, windows of {about['context_length']} tokens, one every {about['stride']}"
    )
    for split, name in (("train", "training"), ("val", "validation")):
        print(
            f"{name:<10}  loss {metrics[f'{split}_loss']:.6f}  "
            f"perplexity {metrics[f'{split}_perplexity']:.3f}  "
            f"bits/byte {metrics[f'{split}_bits_per_byte']:.4f}  "
            f"tokens {metrics[f'{split}_tokens']:,}  windows {about[f'{split}_windows']:,}"
        )
