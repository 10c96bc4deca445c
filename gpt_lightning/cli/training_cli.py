"""LightningCLI for our module, data and callbacks: settings are parsed and checked, nothing runs."""

import json
import logging
import os
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from gpt_lightning.cli.errors import explain_class
from gpt_lightning.cli.options import add_settings
from gpt_lightning.cli.parsing import parse
from gpt_lightning.cli.text_options import configs_first
from gpt_lightning.cli.trainer_values import check_trainer, explain_trainer
from gpt_lightning.cli.yaml_input import load_checked
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.pretrained.load import check_tokenizer, print_warnings, read_weights
from gpt_lightning.pretrained.weights import ModelWeights, read_checkpoint, with_head
from gpt_lightning.training.checkpoint_callback import CheckpointCallback, checkpointing
from gpt_lightning.training.checkpoint_io import LAST, PREVIOUS
from gpt_lightning.training.distributed import check_strategy
from gpt_lightning.training.evaluation import EvaluationCallback, evaluation_callbacks
from gpt_lightning.training.lightning_compat import use_fast_epoch_loop
from gpt_lightning.training.loggers import RunTensorBoardLogger, block_tensorflow
from gpt_lightning.training.loop_state import LoopState
from gpt_lightning.training.module import GPTLightningModule, reconcile_config
from gpt_lightning.training.progress_bar import RunProgressBar
from gpt_lightning.training.resume import checkpoint_to_resume
from gpt_lightning.training.run_files import MetricsCSV, SaveRunConfig
from gpt_lightning.training.run_lock import RunLock
from gpt_lightning.training.skip_step import SkipBadSteps
from gpt_lightning.training.stopping import GracefulStop, MaxTokens
from gpt_lightning.training.throughput import SpeedMonitor, Stopwatch

RUNS = Path("checkpoints")


def _quiet_lightning() -> None:
    """Hide Lightning's tips (not with --verbose), and warnings that a user of the command cannot act on."""
    verbose = logging.getLogger("gpt_lightning").isEnabledFor(logging.DEBUG)
    level = logging.INFO if verbose else logging.WARNING
    logging.getLogger("lightning.pytorch").setLevel(level)
    logging.getLogger("lightning.fabric").setLevel(level)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # evaluation.eval_freq decides when metrics are logged
    warnings.filterwarnings("ignore", message=r".*smaller than the logging interval")


class TrainingCLI(LightningCLI):
    """Settings of a run, parsed and made into module, data module and trainer; it does not run them.

    Args:
        lock: Lock that rank 0 takes for the run's folder when its name is known, if the run writes files.
    """

    def __init__(
        self, verb: str, arguments: list[str], description: str | None, lock: RunLock | None = None
    ) -> None:
        _quiet_lightning()
        self.verb = verb
        self.lock = lock
        self.arguments = arguments
        self.ckpt_path: Path | None = None  # the checkpoint that fit resumes from
        self.auto_resume = False  # --ckpt_path auto
        self.preemption = GracefulStop()
        self.clock = Stopwatch()
        self.checkpoints: CheckpointCallback | None = None
        self.source: ModelWeights | None = (
            None  # weights that fit starts from, or that validate measures
        )
        super().__init__(
            GPTLightningModule,
            TextDataModule,
            args=arguments,
            run=False,
            auto_configure_optimizers=False,
            save_config_callback=None,
            load_from_checkpoint_support=False,  # the module saves its hyperparameters itself
            parser_kwargs={
                "prog": f"gpt_lightning {verb}",
                "description": description,
                "exit_on_error": False,
            },
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=123,
            help="Seed of the initial weights, the order of the windows and dropout.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_settings(parser, self.verb)

    def parse_arguments(self, parser: ArgumentParser, args: Any) -> None:
        self.arguments = configs_first(parser, args)
        self.config = parse(parser, self.arguments)
        if self.verb == "validate" and not self.config.config:
            self.arguments = [*self._data_of_run(), *self.arguments]
            self.config = parse(parser, self.arguments)
        check_trainer(self.config.trainer, trains=self.verb == "fit")
        if not 0 <= (seed := self.config.seed_everything) < 2**32:
            raise ValueError(f"seed_everything: {seed} is out of range; give 0 to {2**32 - 1}")

    def _data_of_run(self) -> list[str]:
        """Return the data settings of the run that the weights are from, as arguments; empty if they are not from a run."""
        source = Path(os.path.expanduser(self.source_name() or ""))
        path = (source if source.is_dir() else source.parent) / "config.yaml"
        if not self.source_name() or not path.is_file():
            return []
        recorded = load_checked(path.read_text(encoding="utf-8"), str(path))
        data = recorded.get("data") if isinstance(recorded, dict) else None
        if not isinstance(data, dict):
            raise ValueError(f"config: {path} has no data settings; give --config")
        if unknown := data.keys() - self.config.data.as_dict().keys():
            raise ValueError(
                f"config: {path} is from another version: data.{min(unknown)} is not a setting; "
                "give the text and its windows with --config"
            )
        given = {name for name in ("text", "mixture") if _is_given(f"data.{name}", self.arguments)}
        if given:  # another text, or several, in place of the run's
            data = {key: value for key, value in data.items() if key not in ("text", "mixture")}
        return [
            f"--data.{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in data.items()
            if value is not None and key not in ("seed", "rng")
        ]

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            if line := explain_class(str(error)):
                raise ValueError(line) from error
            raise

    def before_instantiate_classes(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.config.run):
            raise ValueError(
                f"run: {self.config.run} is not a folder's name; give letters, digits, '.', '_', '-'"
            )
        writes = self.verb == "fit" and not self.config.trainer.fast_dev_run
        if self.lock is not None and writes and is_rank_zero():
            self.lock.acquire(self.folder)
        self._adopt_architecture()

    def _adopt_architecture(self) -> None:
        """Take the architecture of existing weights; keys that the configuration names must agree."""
        config = self.config
        named: dict[str, Any] = {}
        if config.ckpt_path or config.init_from:
            # without defaults, except keys that others are linked to
            linked = [f"--rng={config.rng}", f"--seed_everything={config.seed_everything}"]
            given = self.parser.parse_args(linked + self.arguments, defaults=False).as_dict()
            named = given.get("model", {}).get("config") or {}
        if self.verb == "fit" and config.ckpt_path == "auto":
            self.auto_resume = True
            config.ckpt_path = "last" if self._was_started() else None
        if self.verb == "fit" and config.ckpt_path:
            self.ckpt_path, adopted = checkpoint_to_resume(self.folder, config.ckpt_path, named)
        elif source := self.source_name():
            self.source = read_weights(source, n_heads=named.get("n_heads"))
            check_tokenizer(self.source, source)
            if "tied_embeddings" in named:
                self.source = with_head(self.source, tied=named["tied_embeddings"])
            adopted = reconcile_config(
                f"init_from: {source}", self.source.config, named, self.source.assumed
            )
            if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                print_warnings(self.source)
        elif self.verb == "validate":
            raise ValueError("init_from: validate needs weights; give --init_from SOURCE")
        else:
            return
        config.model.config = Namespace(**asdict(adopted))

    def _was_started(self) -> bool:
        return any((self.folder / name).is_file() for name in (LAST, PREVIOUS))

    def source_name(self) -> str | None:
        """Return where the weights come from, as the user names it; ``None`` for random weights."""
        config = self.config
        if config.ckpt_path in ("last", "best"):
            return str(self.folder / config.ckpt_path)
        name: str | None = config.ckpt_path or config.init_from
        return name

    @property
    def folder(self) -> Path:
        """``checkpoints/RUN`` under ``trainer.default_root_dir``, or under the working directory."""
        root = Path(os.path.expanduser(self.config.trainer.default_root_dir or "."))
        return root / RUNS / str(self.config.run)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = {**self.config_init.trainer, **kwargs}
        callbacks: list[Callback] = _as_list(settings.pop("callbacks", None))
        if settings.get("reload_dataloaders_every_n_epochs"):
            raise ValueError(
                "trainer.reload_dataloaders_every_n_epochs: would restart the order of the windows each time; leave it out"
            )
        if settings.get("enable_progress_bar") is not False:
            callbacks.append(RunProgressBar())
        plugins = _as_list(settings.get("plugins"))
        saves = False
        if self.verb == "fit":
            writes_files = not settings.get("fast_dev_run")
            saves = writes_files and settings.get("enable_checkpointing") is not False
            config = self.config
            if config.max_tokens is not None:
                callbacks.append(MaxTokens(config.max_tokens))
                if settings.get("max_epochs") is None and settings.get("max_steps", -1) == -1:
                    settings["max_epochs"] = -1  # else Lightning ends after 1,000
            callbacks += [
                LoopState(),
                SpeedMonitor(self.clock, config.throughput.every_n_steps),
                SkipBadSteps(config.bad_steps, config.max_bad_steps, config.skip_spikes),
                *self._watchers(writes_files),
                self.preemption,
            ]
            losses = next(c for c in callbacks if isinstance(c, EvaluationCallback))
            checkpoints, checkpoint_io = checkpointing(
                self.folder, losses, self.clock, **self.config.checkpoint.as_dict()
            )
            if saves:
                self.checkpoints = checkpoints
                callbacks.append(checkpoints)
            plugins.append(checkpoint_io)
            if settings.get("limit_val_batches") is None:
                settings["limit_val_batches"] = (
                    0  # EvaluationCallback validates, not Lightning's loop
                )
        settings["callbacks"] = callbacks
        settings["logger"] = self._loggers(settings.get("logger"))
        settings["plugins"] = plugins
        settings["enable_checkpointing"] = saves
        settings["enable_model_summary"] = bool(settings.get("enable_model_summary"))
        try:
            trainer = Trainer(**settings)
        except (
            MisconfigurationException,
            ValueError,
            TypeError,
            RuntimeError,
            ModuleNotFoundError,
        ) as error:
            raise ValueError(explain_trainer(error)) from error
        if trainer.world_size == 1 and not is_rank_zero():
            raise ValueError(
                f"trainer.devices: the environment makes this process number {rank_zero_only.rank} of several "  # type: ignore[attr-defined]
                "(RANK, LOCAL_RANK or SLURM_PROCID), but the run has one device; give --trainer.devices, or unset "
                "the variable"
            )
        check_strategy(trainer.strategy)
        use_fast_epoch_loop(trainer)
        return trainer

    def _watchers(self, write_files: bool) -> list[Callback]:
        config = self.config
        evaluation = evaluation_callbacks(
            **config.evaluation.as_dict(), rng=config.rng, clock=self.clock
        )
        if not write_files:
            return evaluation
        losses = next(c for c in evaluation if isinstance(c, EvaluationCallback))
        return [
            *evaluation,
            SaveRunConfig(self.parser, config, self.folder),
            MetricsCSV(self.folder, losses, {"data": config.data.as_dict()}),
        ]

    def _loggers(self, chosen: Any) -> Any:
        if self.verb != "fit":
            return False
        if chosen is None or chosen is True:
            block_tensorflow()
            return RunTensorBoardLogger(
                save_dir=self.folder.parent,
                name=self.folder.name,
                version="",
                default_hp_metric=False,
                # remove what a resumed run will log again
                purge_step=read_checkpoint(self.ckpt_path)["global_step"] if self.ckpt_path else 0,
            )
        return chosen


def _is_given(option: str, arguments: list[str]) -> bool:
    """Return whether the command line names an option."""
    return any(argument.partition("=")[0] == f"--{option}" for argument in arguments)


def is_rank_zero() -> bool:
    """Return whether this is rank 0; before Lightning starts its processes, from the launcher's environment."""
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
