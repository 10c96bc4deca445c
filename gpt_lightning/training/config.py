"""Settings of a run as dataclasses: the same names in Python, in YAML and on the command line."""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch import Trainer

from gpt_lightning.data.dataloader import Rng
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.evals.task_names import GivenTasks, TaskName, named_tasks
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.suggestions import nearest
from gpt_lightning.training.module import GPTLightningModule

OnBadStep = Literal["stop", "skip"]
OnFailure = Literal["continue", "stop"]

# arguments of the module and of the data module that settings of the run set
LINKED = {"seed": "seed_everything", "rng": "rng"}

RUNS = Path("checkpoints")


@dataclass(kw_only=True)
class EvaluationConfig:
    """Settings ``evaluation.*``: the losses during training, the sample text after each epoch, and tasks.

    Args:
        eval_freq: Optimizer steps between two evaluations; the first one follows the first step.
        eval_iter: Batches of each split per evaluation; each device reads so many. With data.global_batch_size or
            data.global_batch_tokens, global batches. null = all windows.
        prompt: Text that the greedy sample after each epoch continues; null = no samples.
        max_new_tokens: Tokens of that sample.
        log_next_token: Log the entropy of the prompt's next-token distribution with each evaluation.
        tasks: Tasks that judge the model: hellaswag, lambada, wikitext; one, a list such as [hellaswag, lambada], or a
            mapping with files such as {hellaswag: FILE}. Without a file, the one of the command download. null = none.
        task_freq: Optimizer steps between two evaluations by tasks; the last one is at the end of the run.
        task_limit: First examples of each task that are used; of wikitext, pages. null = all.
    """

    eval_freq: int = 5
    eval_iter: int | None = 5
    prompt: str | None = "Every effort moves you"
    max_new_tokens: int = 50
    log_next_token: bool = False
    tasks: GivenTasks | None = None
    task_freq: int = 500
    task_limit: int | None = 200

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Check the settings of tasks, and give them one form; others are checked by the callbacks.

        Raises:
            ValueError: A setting cannot be used; the message is one line.
        """
        for name in ("task_freq", "task_limit"):
            value = getattr(self, name)
            if (value is not None or name == "task_freq") and value < 1:
                raise ValueError(f"evaluation.{name}: {value} is too small; give 1 or more")
        if self.tasks is not None:
            self.tasks = {str(name): file for name, file in self.named_tasks.items()}

    @property
    def named_tasks(self) -> dict[TaskName, str | None]:
        """Each task and its file; ``None``: the downloaded one."""
        return named_tasks(self.tasks, "evaluation.tasks")


@dataclass(kw_only=True)
class CheckpointConfig:
    """Settings ``checkpoint.*``: which checkpoints a run saves, and when.

    Args:
        every_n_train_steps: Optimizer steps between saves of last.ckpt; null = at the end of each epoch.
        save_best: Also keep best.ckpt, the checkpoint with the lowest val_loss. Each evaluation that is the best so
            far saves a checkpoint; with a large model, evaluate less often (evaluation.eval_freq).
        keep_every_n_train_steps: Optimizer steps between checkpoints that are kept as step-000500.ckpt and so on;
            null = none.
        max_to_keep: Number of these checkpoints; the oldest one is removed when a newer one is on the disk. null = all.
        keep_previous: Keep the last.ckpt before as previous.ckpt, in case the newest one is damaged.
        async_save: Continue training while a copy is written; needs memory for one checkpoint.
        on_failure: After a failed save, for example on a full disk: 'continue' and try again at the next
            interval, or 'stop'. The checkpoint before stays intact in both cases.
    """

    every_n_train_steps: int | None = None
    save_best: bool = True
    keep_every_n_train_steps: int | None = None
    max_to_keep: int | None = None
    keep_previous: bool = True
    async_save: bool = False
    on_failure: OnFailure = "continue"

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Check what the callback does not check.

        Raises:
            ValueError: A setting cannot be used; the message is one line.
        """
        check_choice("checkpoint.on_failure", self.on_failure, OnFailure)
        for name in ("keep_every_n_train_steps", "max_to_keep"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(
                    f"checkpoint.{name}: {value} is too small; give 1 or more, or leave it out"
                )
        if self.max_to_keep is not None and self.keep_every_n_train_steps is None:
            raise ValueError(
                f"checkpoint.max_to_keep: {self.max_to_keep} has no effect without "
                "checkpoint.keep_every_n_train_steps; give both, or leave it out"
            )


@dataclass(kw_only=True)
class ThroughputConfig:
    """Settings ``throughput.*``: the log of the training speed.

    Args:
        every_n_steps: Optimizer steps between two log entries of tokens per second, MFU and memory.
    """

    every_n_steps: int = 50


@dataclass(kw_only=True)
class RunConfig:
    """Settings of a run.

    Args:
        run: Name of the run; its files are in checkpoints/NAME. GROUP/NAME puts them in checkpoints/GROUP/NAME.
        seed_everything: Seed of the initial weights, the order of the windows and dropout.
        rng: Source of random numbers: step = computed from seed and step; global = torch's global generator, as in
            the book.
        ckpt_path: Resume the run: last, best, auto or a path; auto = last if it exists, else a new run.
        init_from: Initial weights: a run, a file or gpt2-124M; also a folder of Hugging Face or OpenAI.
        init_optimizer: true = also load the optimizer's state from --init_from.
        max_tokens: Training tokens after which the run ends, unless trainer.max_epochs or trainer.max_steps ends it
            earlier; null = no limit.
        keep_freed_memory: true = on a CPU, the process keeps the memory that a step frees for the next step: steps
            take a quarter less time and up to 40 percent more memory; null = true where it has an effect.
        bad_steps: Action after a loss or gradient that is not finite: stop = end the run before the optimizer step;
            skip = leave the optimizer step out.
        max_bad_steps: Number of skipped optimizer steps in a row after which the run stops.
        skip_spikes: true = also skip an optimizer step whose loss or gradient norm is 6 standard deviations above
            those of the last 128 steps.
        evaluation: Losses during training and sample texts.
        checkpoint: Which checkpoints are saved, and when.
        throughput: Log of the training speed.
        model: Arguments of :class:`gpt_lightning.GPTLightningModule`. ``config`` is a ``GPTConfig``, or a dict of
            its keys; keys that are left out come from the weights that the run starts from, else from the defaults.
        data: Arguments of :class:`gpt_lightning.TextDataModule`.
        trainer: Arguments of ``lightning.pytorch.Trainer``.

    Raises:
        ValueError: A setting cannot be used; the message is one line.
    """

    run: str = "run"
    seed_everything: int = 123
    rng: Rng = "step"
    ckpt_path: str | None = None
    init_from: str | None = None
    init_optimizer: bool = False
    max_tokens: int | None = None
    keep_freed_memory: bool | None = None
    bad_steps: OnBadStep = "stop"
    max_bad_steps: int = 10
    skip_spikes: bool = False
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    throughput: ThroughputConfig = field(default_factory=ThroughputConfig)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in _GROUPS.items():
            if isinstance(value := getattr(self, name), dict):
                setattr(self, name, _group(name, kind, value))
        if self.ckpt_path is not None:
            self.ckpt_path = os.fspath(self.ckpt_path)
        if self.init_from is not None:
            self.init_from = os.fspath(self.init_from)
        self.check()

    def check(self) -> None:
        """Check what module, data module, trainer and callbacks do not check.

        Raises:
            ValueError: A setting cannot be used; the message is one line.
        """
        if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", self.run):
            raise ValueError(
                f"run: {self.run} is not a folder's name; give letters, digits, '.', '_', '-'"
            )
        if any(_NO_WINDOWS_NAME.fullmatch(name) for name in self.run.split("/")):
            raise ValueError(f"run: {self.run} cannot be a folder's name on Windows; give another")
        if not 0 <= self.seed_everything < 2**32:
            raise ValueError(
                f"seed_everything: {self.seed_everything} is out of range; give 0 to {2**32 - 1}"
            )
        self.evaluation.check()  # settings may have changed since they were made
        self.checkpoint.check()
        check_choice("rng", self.rng, Rng)
        check_choice("bad_steps", self.bad_steps, OnBadStep)
        for name in ("model", "data"):
            for key in getattr(self, name).keys() & LINKED:
                raise ValueError(f"{name}.{key}: is set by {LINKED[key]}; leave it out")
        check_names("model", self.model, GPTLightningModule)
        check_names("model.config", self.given_architecture, GPTConfig)
        check_names("data", self.data, TextDataModule)
        check_names("trainer", self.trainer, Trainer)

    @property
    def folder(self) -> Path:
        """``checkpoints/RUN`` under ``trainer.default_root_dir``, or under the working directory."""
        root = os.path.expanduser(self.trainer.get("default_root_dir") or ".")
        return Path(root) / RUNS / self.run

    @property
    def texts(self) -> list[str]:
        """What ``data.text`` or ``data.mixture`` names."""
        mixture = self.data.get("mixture")
        return list(mixture) if mixture else [self.data.get("text", "verdict")]

    @property
    def source(self) -> str | None:
        """Existing weights that ``ckpt_path`` or ``init_from`` names; ``None`` if neither is given."""
        if self.ckpt_path in ("last", "best"):
            return str(self.folder / self.ckpt_path)
        return self.ckpt_path or self.init_from

    @property
    def given_architecture(self) -> dict[str, Any]:
        """Keys of ``model.config`` that are given."""
        given = self.model.get("config") or {}
        return asdict(given) if isinstance(given, GPTConfig) else dict(given)


# names of devices, also with an extension, and names that end with a dot
_NO_WINDOWS_NAME = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.", re.IGNORECASE | re.DOTALL
)

_GROUPS = {
    "evaluation": EvaluationConfig,
    "checkpoint": CheckpointConfig,
    "throughput": ThroughputConfig,
}


def _group(name: str, kind: type, values: dict[str, Any]) -> Any:
    """Make the settings of a group from a dict."""
    check_names(name, values, kind)
    return kind(**values)


def check_names(group: str, given: Iterable[str], kind: Callable[..., Any]) -> None:
    """Check that the names of settings are arguments of a class.

    Raises:
        ValueError: One is not; the message has the nearest name.
    """
    known = signature(kind).parameters.keys()
    for name in given:
        if name not in known:
            near = nearest(name, known)
            remedy = f"did you mean {near}?" if near else f"see {kind.__name__}"
            raise ValueError(f"{group}.{name}: is not a setting; {remedy}")


def check_choice(setting: str, value: object, choices: Any) -> None:
    """Check that a value is one of the choices of a ``Literal``.

    Raises:
        ValueError: It is not.
    """
    if value not in get_args(choices):
        raise ValueError(f"{setting}: {value} is unknown; give {' or '.join(get_args(choices))}")
