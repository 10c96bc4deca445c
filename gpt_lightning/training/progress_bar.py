"""Progress of a run: a bar with an ETA on a terminal and in a notebook, otherwise a plain line at intervals."""

import io
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from gpt_lightning.training.loggers import StepPosition
from gpt_lightning.training.run_length import epoch_shape
from gpt_lightning.training.step_callback import StepEndCallback
from gpt_lightning.training.stopping import MaxTokens

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_REDRAWS = 0.1
SECONDS_BETWEEN_NOTEBOOK_REDRAWS = 0.5  # each one is a message to the browser


class RunProgressBar(StepEndCallback, ProgressBar):
    """Progress bar over the run, not one per epoch, so that its ETA is the run's."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._output: NotebookOutput | None = None
        self._total: int | None = None
        self._began = 0.0
        self._first = 0
        self._last_line = 0.0
        self._shown = 0.0
        self._done = 0
        self._losses: dict[str, float] = {}

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        total, epoch = total_steps(trainer), epoch_shape(trainer)
        if trainer.is_global_zero:
            parameters = sum(p.numel() for p in pl_module.parameters())
            logger.info(
                f"{parameters:,} parameters on {pl_module.device}, {trainer.precision}; "
                f"step {trainer.global_step} of {'?' if total is None else total}"
                + (
                    ""
                    if epoch is None or total is None
                    else f" ({epoch.tokens_after(total) / epoch.tokens:.3g} epochs)"
                )
            )
        self._start("training", trainer.global_step, total)

    def on_metrics(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        metrics: Mapping[str, float],
        position: StepPosition,
    ) -> None:
        for name, tag in (("loss", "train/loss"), ("val_loss", "val_loss")):
            if tag in metrics:
                self._losses[name] = metrics[tag]

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        self._advance(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._start("validating", 0, int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "validate":
            done = sum(trainer.num_val_batches[:dataloader_idx]) + batch_idx + 1
            self._advance(int(done))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _start(self, what: str, done: int, total: int | None) -> None:
        self._total, self._first, self._done, self._losses = total, done, done, {}
        self._began = self._last_line = time.monotonic()
        # Messages are escaped on a terminal; the bar's own control characters are not.
        console = Console(file=getattr(sys.stderr, "unescaped", sys.stderr))
        # A dumb terminal (TERM=dumb) cannot redraw a line.
        quiet = not self._enabled or logging.getLogger("gpt_lightning").level > logging.INFO
        if quiet or not (console.is_jupyter or console.is_terminal) or console.is_dumb_terminal:
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),  # what the others leave
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            refresh_per_second=1 / SECONDS_BETWEEN_REDRAWS,
            expand=True,
            redirect_stdout=sys.stdout.isatty(),  # else results would leave stdout for the terminal
        )
        self._bar.add_task(what, total=total, completed=done, note="")
        if console.is_jupyter:  # rich's own redrawing there needs ipywidgets
            self._output = NotebookOutput(self._bar)
        else:
            self._bar.start()

    def _advance(self, done: int) -> None:
        if not self._enabled:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._done = done
            in_notebook = self._output is not None
            pause = SECONDS_BETWEEN_NOTEBOOK_REDRAWS if in_notebook else SECONDS_BETWEEN_REDRAWS
            if now - self._shown >= pause:
                self._shown = now
                self._show()
            return
        if now - self._last_line < SECONDS_BETWEEN_LINES or done == self._first:
            return
        self._last_line = now
        seconds = (now - self._began) / (done - self._first)
        of = "" if self._total is None else f"/{self._total}"
        eta = "" if self._total is None else f", eta {(self._total - done) * seconds:.0f} s"
        logger.info(f"step {done}{of}, {seconds:.2f} s a step{eta}")

    def _show(self) -> None:
        assert self._bar is not None
        note = " ".join(f"{name} {loss:.3f}" for name, loss in sorted(self._losses.items()))
        self._bar.update(self._bar.task_ids[0], completed=self._done, note=note)
        if self._output is not None:
            self._output.draw(self._bar)

    def _stop(self) -> None:
        if self._bar is not None:
            self._show()
            self._bar.stop()
            self._bar = self._output = None


class NotebookOutput:
    """An output of a notebook's cell that shows a bar and is replaced by each new drawing."""

    def __init__(self, bar: Progress) -> None:
        from IPython.display import display  # every notebook has it

        self._display = display(self._html(bar), display_id=True)

    def draw(self, bar: Progress) -> None:
        self._display.update(self._html(bar))

    def _html(self, bar: Progress) -> Any:
        from IPython.display import HTML

        console = Console(
            file=io.StringIO(), record=True, force_jupyter=False, force_terminal=True, width=120
        )
        console.print(bar.get_renderable())
        html = console.export_html(
            inline_styles=True, code_format='<pre style="white-space:pre">{code}</pre>'
        )
        return HTML(html)


def total_steps(trainer: Trainer) -> int | None:
    """Return the step that ends the run, by ``max_steps``, ``max_epochs`` or ``max_tokens``; ``None`` if none does."""
    epoch = epoch_shape(trainer)
    if epoch is None:
        return trainer.max_steps if trainer.max_steps >= 0 else None
    limits = [epoch.steps_of_run(trainer.max_steps, trainer.max_epochs)]
    limits += [c.last_step(trainer) for c in trainer.callbacks if isinstance(c, MaxTokens)]  # type: ignore[attr-defined]
    return min((step for step in limits if step is not None), default=None)
