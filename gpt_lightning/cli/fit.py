"""``fit`` and ``validate``: LightningCLI over our module and our data."""

import json
import logging
import re
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from gpt_lightning.cli.parsing import parse
from gpt_lightning.cli.remarks import of_precision, remarks
from gpt_lightning.cli.settings import add_settings
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.pretrained.formats import Source, read_checkpoint, with_head
from gpt_lightning.pretrained.source import read_source
from gpt_lightning.training.allocator import keep_freed_memory
from gpt_lightning.training.bad_steps import BadSteps
from gpt_lightning.training.callbacks import LossEvaluation, evaluation_callbacks
from gpt_lightning.training.checkpoint import LAST, PREVIOUS
from gpt_lightning.training.counting import BatchCounts, MaxTokens
from gpt_lightning.training.elastic import connect_ranks
from gpt_lightning.training.epoch_loop import use_epoch_loop
from gpt_lightning.training.history import RunHistory
from gpt_lightning.training.module import GPTLightningModule, agreed_architecture
from gpt_lightning.training.preemption import Preemption
from gpt_lightning.training.progress import RunProgress
from gpt_lightning.training.resumed_from import checkpoint_to_resume
from gpt_lightning.training.saving import RunCheckpoints, checkpointing
from gpt_lightning.training.sharding import check_strategy
from gpt_lightning.training.throughput import Throughput, TrainingClock
from gpt_lightning.training.traces import ConfigOfRun, RunLogger, keep_tensorflow_out

RUNS = Path("checkpoints")


def _quiet_lightning() -> None:
    """Lightning's tips and the warnings that no user of this command can act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # what a profiler that was asked for has measured is no tip
    reports = logging.getLogger("lightning.pytorch.profilers")
    reports.setLevel(logging.INFO)
    reports.propagate = False
    reports.handlers = [logging.StreamHandler()]
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # evaluation.eval_freq decides when figures are logged
    warnings.filterwarnings("ignore", message=r".*smaller than the logging interval")


def fit(arguments: list[str]) -> int:
    """Train. Where old state comes from, first that applies:

    1. ``--ckpt_path``: the same run goes on, with its weights, optimizer, position and random numbers;
       with 'auto' where it has been begun, else it is begun.
    2. ``--init_from``: a new run with old weights, and old moments with ``--init_optimizer true``.
    3. Neither: a new run from the seed.
    In the first two the architecture is that of the old weights, and a configuration that names another
    is refused; for the rest the configuration wins.
    """
    cli = TrainingCLI("fit", arguments)
    folder, config, ckpt_path = cli.folder, cli.config, cli.ckpt_path
    if cli.source is not None:
        cli.model.start_from(cli.source, with_optimizer=bool(config.init_optimizer))
    if _is_rank_zero():
        if ckpt_path is None and not cli.begins_or_goes_on:
            _refuse_a_run_that_is_there(folder)
        if cli.checkpoints is not None:
            cli.checkpoints.check_room(cli.model.config)
        _check_data(cli)
        _check_compiler(cli)
    connect_ranks(cli.trainer)
    on_cpu = cli.trainer.strategy.root_device.type == "cpu"
    keeps = bool(config.keep_freed_memory) and on_cpu and keep_freed_memory()
    if _is_rank_zero():
        for remark in remarks(
            config, cli.trainer, cli.model.config, arguments, keeps_freed_memory=keeps
        ):
            print(f"gpt_lightning: {remark}", file=sys.stderr)
    try:
        cli.trainer.fit(
            cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path, weights_only=True
        )
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}") from error
    except SystemExit as error:
        if error.code != 1:
            raise
        # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt(f"{folder}: --ckpt_path last goes on") from error
    if not cli.trainer.is_global_zero:
        return 0  # of several processes one tells
    if cli.preemption.received is not None:
        cli.preemption.requeue()
        print(f"{folder}: stopped; --ckpt_path last goes on", file=sys.stderr)
    else:
        print(f"{folder}: done; tensorboard --logdir {folder.parent} shows it", file=sys.stderr)
    return cli.preemption.exit_code


def _is_rank_zero() -> bool:
    """Also before Lightning has set its processes up: the launcher's environment tells."""
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]


def _refuse_a_run_that_is_there(folder: Path) -> None:
    if not (folder / "config.yaml").exists():
        return
    go_on = "go on with it by --ckpt_path last"
    if not (folder / LAST).exists() and not (folder / PREVIOUS).exists():
        go_on = "it was stopped before its first checkpoint, so --ckpt_path auto begins it anew"
    raise ValueError(
        f"run: {folder} holds a run already; {go_on}, or give this one another name by --run NAME"
    )


def _check_data(cli: "TrainingCLI", stage: str = "fit") -> None:
    """Read the text before anything is written: Lightning makes the loggers' files first."""
    cli.trainer.strategy.connect(cli.model)
    cli.datamodule.trainer = cli.trainer
    cli.datamodule.setup(stage)


def _check_compiler(cli: "TrainingCLI") -> None:
    """Have it compile something small: what it lacks, it would else say in the first step, in forty lines."""
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
    """Loss and perplexity of a model on both splits of a text, every token weighing the same.

    The weights are those of ``--ckpt_path`` (last, best or a path), else of ``--init_from SOURCE``.
    """
    cli = TrainingCLI("validate", arguments)
    assert cli.source is not None
    cli.model.start_from(cli.source)
    if _is_rank_zero():
        _check_data(cli, "validate")
        _check_compiler(cli)
        for remark in of_precision(cli.trainer):
            print(f"gpt_lightning: {remark}", file=sys.stderr)
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    metrics = {key: value.item() for key, value in cli.trainer.callback_metrics.items()}
    if cli.trainer.is_global_zero:
        _print_validation(metrics, as_json=bool(cli.config.json))


def _print_validation(metrics: dict[str, float], *, as_json: bool) -> None:
    for split in ("train", "val"):
        metrics[f"{split}_tokens"] = int(metrics[f"{split}_tokens"])
    if as_json:
        print(json.dumps(metrics))
        return
    for split, name in (("train", "training"), ("val", "validation")):
        print(
            f"{name:<10}  loss {metrics[f'{split}_loss']:.6f}  "
            f"perplexity {metrics[f'{split}_perplexity']:.3f}  "
            f"bits/byte {metrics[f'{split}_bits_per_byte']:.4f}  "
            f"tokens {metrics[f'{split}_tokens']:,}"
        )


class TrainingCLI(LightningCLI):
    """The settings of a run, parsed and made into module, data and trainer; it runs nothing itself."""

    def __init__(self, verb: str, arguments: list[str], description: str | None = None) -> None:
        _quiet_lightning()
        self.verb = verb
        self.arguments = arguments
        self.ckpt_path: Path | None = None  # what fit goes on from
        self.begins_or_goes_on = False  # --ckpt_path auto
        self.preemption = Preemption()
        self.clock = TrainingClock()
        self.checkpoints: RunCheckpoints | None = None
        self.source: Source | None = None  # what it begins with, or validate looks at
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
                "description": description or (fit if verb == "fit" else validate).__doc__,
                "exit_on_error": False,
            },
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=123,
            help="What initial weights, the order of the windows and dropout depend on.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_settings(parser, self.verb)

    def parse_arguments(self, parser: ArgumentParser, args: Any) -> None:
        self.config = parse(parser, args)

    def before_instantiate_classes(self) -> None:
        defaults = self.parser.get_defaults(skip_validation=True).as_dict()
        for group in ("model", "data", "trainer", "evaluation", "checkpoint", "throughput"):
            given = self.config[group] or {}
            if any(key not in given for key in defaults[group]):
                raise ValueError(f"{group}: is null; give its settings, or leave it out")
        if not re.fullmatch(r"\w[\w.-]*", self.config.run):
            raise ValueError(
                f"run: {self.config.run} is no folder's name; give letters, digits, '.', '_', '-'"
            )
        self._adopt_architecture()

    def _adopt_architecture(self) -> None:
        """With old weights the architecture is theirs; what the configuration names must agree."""
        config = self.config
        named: dict[str, Any] = {}
        if config.ckpt_path or config.init_from:
            # without defaults; what is linked to other keys has to be there all the same
            linked = [f"--rng={config.rng}", f"--seed_everything={config.seed_everything}"]
            given = self.parser.parse_args(linked + self.arguments, defaults=False).as_dict()
            named = given.get("model", {}).get("config") or {}
        if self.verb == "fit" and config.ckpt_path == "auto":
            self.begins_or_goes_on = True
            config.ckpt_path = "last" if self._has_begun() else None
        if self.verb == "fit" and config.ckpt_path:
            self.ckpt_path, adopted = checkpoint_to_resume(self.folder, config.ckpt_path, named)
        elif source := self._source_name():
            self.source = read_source(source, n_heads=named.get("n_heads"))
            if "tied_embeddings" in named:
                self.source = with_head(self.source, tied=named["tied_embeddings"])
            adopted = agreed_architecture(
                f"init_from: {source}", self.source.config, named, self.source.assumed
            )
        elif self.verb == "validate":
            raise ValueError("init_from: validate needs weights; give --init_from SOURCE")
        else:
            return
        config.model.config = Namespace(**asdict(adopted))

    def _has_begun(self) -> bool:
        return any((self.folder / name).is_file() for name in (LAST, PREVIOUS))

    def _source_name(self) -> str | None:
        config = self.config
        if config.ckpt_path in ("last", "best"):
            return str(self.folder / config.ckpt_path)
        name: str | None = config.ckpt_path or config.init_from
        return name

    @property
    def folder(self) -> Path:
        """``checkpoints/RUN`` under ``trainer.default_root_dir``, or under the working directory."""
        root = Path(self.config.trainer.default_root_dir or ".")
        return root / RUNS / str(self.config.run)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = {**self.config_init.trainer, **kwargs}
        callbacks: list[Callback] = _as_list(settings.pop("callbacks", None))
        if settings.get("reload_dataloaders_every_n_epochs"):
            raise ValueError(
                "trainer.reload_dataloaders_every_n_epochs: would begin the windows' order anew each time; leave it out"
            )
        if settings.get("enable_progress_bar") is not False:
            callbacks.append(RunProgress())
        plugins = _as_list(settings.get("plugins"))
        saves = False
        if self.verb == "fit":
            leaves_traces = not settings.get("fast_dev_run")
            saves = leaves_traces and settings.get("enable_checkpointing") is not False
            config = self.config
            if config.max_tokens is not None:
                callbacks.append(MaxTokens(config.max_tokens))
                if settings.get("max_epochs") is None and settings.get("max_steps", -1) == -1:
                    settings["max_epochs"] = -1  # else Lightning ends after 1,000
            callbacks += [
                BatchCounts(),
                Throughput(self.clock, config.throughput.every_n_steps),
                BadSteps(config.bad_steps, config.max_bad_steps, config.skip_spikes),
                *self._watchers(leaves_traces),
                self.preemption,
            ]
            losses = next(c for c in callbacks if isinstance(c, LossEvaluation))
            checkpoints, checkpoint_io = checkpointing(
                self.folder, losses, self.clock, **self.config.checkpoint.as_dict()
            )
            if saves:
                self.checkpoints = checkpoints
                callbacks.append(checkpoints)
            plugins.append(checkpoint_io)
            if settings.get("limit_val_batches") is None:
                settings["limit_val_batches"] = 0  # LossEvaluation validates, not Lightning's loop
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
            raise ValueError(f"trainer: {error}") from error
        check_strategy(trainer.strategy)
        use_epoch_loop(trainer)
        return trainer

    def _watchers(self, leave_traces: bool) -> list[Callback]:
        config = self.config
        evaluation = evaluation_callbacks(
            **config.evaluation.as_dict(), rng=config.rng, clock=self.clock
        )
        if not leave_traces:
            return evaluation
        losses = next(c for c in evaluation if isinstance(c, LossEvaluation))
        return [
            *evaluation,
            ConfigOfRun(self.parser, config, self.folder),
            RunHistory(self.folder, losses, {"data": config.data.as_dict()}),
        ]

    def _loggers(self, chosen: Any) -> Any:
        if self.verb != "fit":
            return False
        if chosen is None or chosen is True:
            keep_tensorflow_out()
            return RunLogger(
                save_dir=self.folder.parent,
                name=self.folder.name,
                version="",
                default_hp_metric=False,
                # what a resumed run will log again is taken off the page
                purge_step=self.ckpt_path and read_checkpoint(self.ckpt_path)["global_step"],
            )
        return chosen


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
