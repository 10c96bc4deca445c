"""Files of a run beside its checkpoints: config.yaml, metrics.csv, loss.png."""

import csv
import io
import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from enum import Enum
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.evals.task_names import METRICS, TASK_NAMES
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.palette import SERIES
from gpt_lightning.storage.atomic import atomic_output, write_text
from gpt_lightning.training.config import LINKED, RunConfig
from gpt_lightning.training.evaluation import EvaluationCallback
from gpt_lightning.training.loggers import StepPosition, ignore_full_disk
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.step_callback import StepEndCallback
from gpt_lightning.training.stopping import ends_run
from gpt_lightning.training.train_metrics import TrainMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gpt_lightning.figure import Figure

logger = logging.getLogger(__name__)


class SaveRunConfig(Callback):
    """Callback that saves a new run's settings as config.yaml; a resumed run keeps the file it has.

    Args:
        config: Settings that name the folder, and the weights that the run starts from.
        settings: Result of :func:`recorded_settings`.
    """

    def __init__(self, config: RunConfig, settings: Mapping[str, Any]) -> None:
        self.path = config.folder / "config.yaml"
        self.text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
        self.header = ""
        if config.init_from:
            with_optimizer = " --init_optimizer true" if config.init_optimizer else ""
            source = _with_slashes(config.init_from)
            self.header = f"# started with --init_from {source}{with_optimizer}\n"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero or self.path.exists():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, self.header + self.text)


def recorded_settings(
    config: RunConfig, architecture: GPTConfig, trainer: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the settings of a run as config.yaml has them: with defaults, and with the architecture of its weights.

    Settings that start or resume a run are left out. So are Python objects among ``config.trainer``; ``trainer`` has
    the settings that describe them.
    """
    settings = {
        key: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for key, value in vars(config).items()
        if key not in ("ckpt_path", "init_from", "init_optimizer")
    }
    for name, kind in (("model", GPTLightningModule), ("data", TextDataModule)):
        defaults = {
            key: parameter.default
            for key, parameter in signature(kind).parameters.items()
            if key not in LINKED and parameter.default is not Parameter.empty
        }
        settings[name] = {**defaults, **settings[name]}
    model = {key: value for key, value in settings["model"].items() if key != "config"}
    settings["model"] = {"config": asdict(architecture), **model}
    settings["trainer"] = config.trainer if trainer is None else trainer
    plain: dict[str, Any] = _plain(settings)
    for group, name in (
        ("data", "text"),
        ("data", "mixture"),
        ("data", "tokenizer"),
        ("trainer", "default_root_dir"),
    ):
        if plain[group].get(name) is not None:
            plain[group][name] = _with_slashes(plain[group][name])
    tasks = plain["evaluation"]["tasks"] or {}
    tasks.update((name, _with_slashes(file)) for name, file in tasks.items() if file is not None)
    return plain


def _with_slashes(paths: Any) -> Any:
    """Return a path, or the keys of a mapping, with ``/`` as every system reads it."""
    if isinstance(paths, Mapping):
        return {_with_slashes(path): value for path, value in paths.items()}
    return paths.replace(os.sep, "/")


_NOT_PLAIN = object()  # what YAML cannot have


def _plain(value: Any) -> Any:
    """Return a value as YAML has it; entries of a mapping that are other Python objects are left out."""
    if isinstance(value, Mapping):
        items = ((key, _plain(inner)) for key, inner in value.items())
        return {key: inner for key, inner in items if inner is not _NOT_PLAIN}
    if isinstance(value, list | tuple):
        values = [_plain(inner) for inner in value]
        return _NOT_PLAIN if _NOT_PLAIN in values else values
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return _with_slashes(os.fspath(value))
    return value if value is None or isinstance(value, str | int | float) else _NOT_PLAIN


Row = dict[str, float]
COUNTS = ("step", "epoch", "tokens_seen")
COLUMNS = ("step", "epoch", "seen_epochs", *EvaluationCallback.TAGS, *TrainMetrics.TAGS)
# of averaged weights and of tasks; a file has those of its run only
OPTIONAL_COLUMNS = (
    EvaluationCallback.EMA_TAG,
    *(f"eval/{task}_{metric}" for task in TASK_NAMES for metric in METRICS[task]),
)


class MetricsCSV(StepEndCallback):
    """Callback that appends each evaluation to ``metrics.csv``, and draws the book's plot at the end.

    A resumed run keeps the rows before the step it resumes at, and writes the later ones again.

    Args:
        folder: Folder of the run.
        hparams: Settings to show in TensorBoard in addition to the module's, by group.
        optional_tags: Those of ``OPTIONAL_COLUMNS`` that the run has.
    """

    def __init__(
        self,
        folder: Path,
        hparams: dict[str, Any] | None = None,
        optional_tags: Collection[str] = (),
    ) -> None:
        self.path = folder / "metrics.csv"
        self.figure_path = folder / "loss.png"
        self.hparams = hparams or {}
        self.optional_tags = optional_tags
        self.rows: list[Row] = []
        self._finished_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        if self.path.exists():
            self.rows = [row for row in read_rows(self.path) if row["step"] < trainer.global_step]
        write_rows(self.path, self.rows, self._columns)

    @property
    def _columns(self) -> list[str]:
        """Those of the run's metrics, and of metrics that it had before it was resumed."""
        had = {tag for row in self.rows for tag in row}
        optional = [tag for tag in OPTIONAL_COLUMNS if tag in self.optional_tags or tag in had]
        return [*COLUMNS, *optional]

    def on_metrics(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        metrics: Mapping[str, float],
        position: StepPosition,
    ) -> None:
        if trainer.is_global_zero:
            epochs = {"epoch": math.ceil(position.epochs), "seen_epochs": position.epochs}
            self.rows.append({"step": position.step, **epochs, **metrics})
            ignore_full_disk(self._append)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        # before the last checkpoint is saved: a run that is killed after it is complete
        if trainer.is_global_zero and ends_run(trainer):
            self._finish(trainer, pl_module)

    def _append(self) -> None:
        if not self.path.exists():
            logger.warning(
                f"{self.path} is gone (moved or removed by another program); it is written again, "
                f"with all {len(self.rows)} rows"
            )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_rows(self.path, self.rows, self._columns)
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(self.rows[-1])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._finish(trainer, pl_module)

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        if self.rows and self._finished_step != trainer.global_step:
            self._finished_step = trainer.global_step
            ignore_full_disk(lambda: self._draw(trainer, module))

    def _draw(self, trainer: Trainer, module: LightningModule) -> None:
        from matplotlib.image import imsave

        evaluations = _evaluations(self.rows)
        if not evaluations:
            return
        pixels = figure_to_array(loss_figure(evaluations))
        imsave(self.figure_path, pixels)
        # TensorBoard's table of hyperparameters shows these
        results = {f"result/{tag}": evaluations[-1][tag] for tag in ("train_loss", "val_loss")}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # A run that is extended removes this step from TensorBoard, because it ends later.
                step = trainer.global_step
                logger.experiment.add_image("losses", pixels, step, dataformats="HWC")
                hparams = _encodable(_flat({**module.hparams, **self.hparams}))
                logger.log_hyperparams(hparams, results, step)


def read_rows(path: Path) -> list[Row]:
    """Return the complete rows, without empty cells; a run that was killed while it wrote may leave half a row."""
    text = path.read_text(encoding="utf-8", errors="replace")
    complete = text[: text.rfind("\n") + 1]
    rows = []
    for row in csv.DictReader(io.StringIO(complete, newline="")):
        values = {key: row[key] for key in (*COLUMNS, *OPTIONAL_COLUMNS) if row.get(key)}
        if None not in row.values() and "step" in values:
            with suppress(ValueError):
                rows.append({k: (int if k in COUNTS else float)(v) for k, v in values.items()})
    return rows


def write_rows(path: Path, rows: list[Row], columns: Sequence[str] = COLUMNS) -> None:
    with (
        atomic_output(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _evaluations(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "val_loss" in row]


def loss_figure(rows: list[Row]) -> "Figure":
    """Plot both losses of all evaluations over epochs, with tokens seen on a second axis, like the book.

    Args:
        rows: What :func:`read_rows` reads from a run's ``metrics.csv``.

    Raises:
        ValueError: No row has losses of an evaluation.
    """
    from matplotlib.ticker import EngFormatter

    from gpt_lightning.figure import Figure

    rows = _evaluations(rows)
    if not rows:
        raise ValueError("metrics.csv: has no losses of an evaluation; train the run further")
    epochs = [row["seen_epochs"] for row in rows]
    marker = "o" if len(rows) == 1 else ""  # a line of one point is not visible
    figure = Figure(figsize=(6, 4), dpi=150)
    # a computed layout would draw it twice
    axes = figure.subplots(gridspec_kw={"left": 0.145, "right": 0.97, "bottom": 0.13, "top": 0.86})
    for tag, style, color, label in [
        ("train_loss", "-", SERIES[0], "Training loss"),
        ("val_loss", "--", SERIES[1], "Validation loss"),
        ("val_loss_ema", ":", SERIES[2], "Validation loss of averaged weights"),
    ]:
        if not any(tag in row for row in rows):
            continue
        losses = [row.get(tag, math.nan) for row in rows]
        axes.plot(epochs, losses, style, marker=marker, color=color, linewidth=2, label=label)
    axes.set_xlabel("Epochs")
    axes.set_ylabel("Loss (nats per token)")
    _ticks_from_0(axes, integer=max(epochs) >= 2)
    axes.legend(loc="upper right")
    tokens_axis = axes.twiny()  # a second x-axis; the invisible plot gives it its scale
    tokens_axis.plot(
        [row["tokens_seen"] for row in rows], [row["val_loss"] for row in rows], alpha=0
    )
    tokens_axis.set_xlabel("Tokens seen")
    _ticks_from_0(tokens_axis, integer=True)
    tokens_axis.xaxis.set_major_formatter(EngFormatter())
    return figure


def _ticks_from_0(axes: "Axes", *, integer: bool) -> None:
    """Start the x-axis at 0, with few labels that do not overlap, at whole numbers if ``integer``."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=integer))


def figure_to_array(figure: "Figure") -> NDArray[np.uint8]:
    """Draw a figure once, for the file and for TensorBoard; return its pixels ``(H, W, 4)``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def _flat(hparams: dict[str, Any]) -> dict[str, Any]:
    """``{"config": {"emb_dim": 768}}`` → ``{"config/emb_dim": 768}``, as TensorBoard shows it."""
    flat: dict[str, Any] = {}
    for key, value in hparams.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{inner}": v for inner, v in value.items()}
        else:
            flat[key] = value
    return flat


def _encodable(value: Any) -> Any:
    """Escape bytes that are not UTF-8, as in names of files: TensorBoard takes UTF-8 only."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_encodable(key): _encodable(inner) for key, inner in value.items()}
    return value
