"""Evaluation during training: losses and sample texts, printed and logged.

``TAGS`` are their TensorBoard tags; those of training itself are in ``train_metrics.py``.
"""

import logging
import math
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng

from gpt_lightning.data.dataloader import Batch, ResumableDataLoader, Rng
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.unicode import for_stream
from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.sampling import entropy
from gpt_lightning.training.ema import WeightEMA
from gpt_lightning.training.loggers import (
    StepPosition,
    ignore_full_disk,
    log_metrics,
    publish_metrics,
)
from gpt_lightning.training.metrics import TokenWeightedLoss
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.step_callback import StepEndCallback
from gpt_lightning.training.stopping import default_signal_handlers, ends_run
from gpt_lightning.training.throughput import Stopwatch

logger = logging.getLogger(__name__)


def _random_numbers(rng: Rng) -> AbstractContextManager[None]:
    return nullcontext() if rng == "global" else isolate_rng()


def uncompiled(module: GPTLightningModule) -> AbstractContextManager[object]:
    """Run without compilation: each new shape of the input would be compiled again."""
    if not module.compile_blocks:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


class EvaluationCallback(StepEndCallback):
    """The book's ``evaluate_model``: every ``eval_freq`` steps, the losses over some batches of each split.

    ``fit`` validates with it, and not with Lightning's validation loop. It prints the book's line, logs ``TAGS``
    to the trainer's loggers, and gives the metrics to the other callbacks
    (:class:`gpt_lightning.training.loggers.MetricsListener`).

    With ``rng="step"`` each evaluation reads the same training windows, and every token has the same weight.
    With ``rng="global"`` it reads the windows in a new random order and takes the mean of the batches' means,
    which gives the book's numbers.

    The weights at the end of the run are evaluated too, for the summary and ``FitResult.metrics``.

    With ``ema``, the validation loss of the averaged weights is a further metric, ``EMA_TAG``.

    Attributes:
        evaluated_steps: Steps of the weights that were evaluated last; ``None`` before the first evaluation.
    """

    TAGS = ("train_loss", "val_loss", "val_perplexity", "tokens_seen")
    EMA_TAG = "val_loss_ema"

    def __init__(
        self,
        eval_freq: int = 5,
        eval_iter: int | None = 5,
        rng: Rng = "step",
        clock: Stopwatch | None = None,
        ema: WeightEMA | None = None,
    ) -> None:
        if eval_freq < 1:
            raise ValueError(f"evaluation.eval_freq: {eval_freq} is too small; give 1 or more")
        if eval_iter is not None and eval_iter < 1:
            raise ValueError(f"evaluation.eval_iter: {eval_iter} is too small; give 1 or more")
        self.eval_freq = eval_freq
        self.eval_iter = eval_iter
        self.rng: Rng = rng
        self.clock = clock or Stopwatch()
        self.ema = ema
        self.evaluated_steps: int | None = None
        self._is_last_step = False

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        assert isinstance(pl_module, GPTLightningModule)
        self._is_last_step = ends_run(trainer)
        step = trainer.global_step - 1  # the book counts the first step as step 0
        if step % self.eval_freq:
            return
        with self.clock.stopped(pl_module.device), _random_numbers(self.rng):
            losses = self._losses(trainer, pl_module)
        self._print(trainer, step, losses)
        metrics = {
            **losses,
            "val_perplexity": math.exp(min(losses["val_loss"], 700.0)),
            "tokens_seen": pl_module.tokens_seen,
        }
        publish_metrics(trainer, pl_module, metrics, StepPosition.of(trainer, batch_idx))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After the last save, so a signal may end the process. The losses are neither printed nor logged: the same run
        # with more steps has no evaluation here.
        if self._is_last_step and trainer.global_step != self.evaluated_steps:
            assert isinstance(pl_module, GPTLightningModule)
            with default_signal_handlers(), isolate_rng():
                self._losses(trainer, pl_module)

    def _losses(self, trainer: Trainer, module: GPTLightningModule) -> dict[str, float]:
        """Compute the losses, and set them in the trainer's ``callback_metrics``."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TextDataModule), "EvaluationCallback needs a TextDataModule"
        with torch.no_grad():
            module.eval()
            train_loss = self._mean_loss(trainer, module, data.train_dataloader())
            val_loss = self._mean_loss(trainer, module, data.validation_windows())
            losses = {"train_loss": train_loss, "val_loss": val_loss}
            if self.ema is not None:
                with self.ema.in_use(module), isolate_rng():
                    losses[self.EMA_TAG] = self._mean_loss(
                        trainer, module, data.validation_windows()
                    )
            module.train()
        trainer.callback_metrics.update((tag, torch.tensor(loss)) for tag, loss in losses.items())
        self.evaluated_steps = trainer.global_step
        return losses

    @rank_zero_only
    def _print(self, trainer: Trainer, step: int, losses: Mapping[str, float]) -> None:
        """Print the book's line."""
        ema = f", EMA val loss {losses[self.EMA_TAG]:.3f}" if self.EMA_TAG in losses else ""
        print(
            f"Ep {trainer.current_epoch + 1} (Step {step:06d}): "
            f"Train loss {losses['train_loss']:.3f}, Val loss {losses['val_loss']:.3f}{ema}",
            flush=True,
        )

    def _mean_loss(
        self, trainer: Trainer, module: GPTLightningModule, loader: ResumableDataLoader
    ) -> float:
        mean = TokenWeightedLoss().to(module.device)
        data = trainer.datamodule  # type: ignore[attr-defined]
        max_batches = None if self.eval_iter is None else self.eval_iter * data.micro_batches
        for batch in islice(loader, max_batches):
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            with trainer.precision_plugin.forward_context():
                loss = module.loss(batch)
            tokens = batch[1].numel()
            mean.update(loss, min(tokens, 1) if self.rng == "global" else tokens)
        return float(mean.compute()["loss"])


class SampleTextCallback(Callback):
    """Callback that prints a greedy continuation of ``prompt`` after each epoch, and logs it to TensorBoard.

    With ``log_next_token``, it also logs the prompt's next-token distribution at temperature 1 after each evaluation:
    its entropy (nats), exp(entropy) (tokens), and the largest probability.
    """

    TAGS = (
        "next_token/entropy",
        "next_token/effective_vocabulary",
        "next_token/largest_probability",
    )

    def __init__(
        self,
        prompt: str,
        max_new_tokens: int = 50,
        rng: Rng = "step",
        clock: Stopwatch | None = None,
        *,
        log_next_token: bool = False,
    ) -> None:
        if not prompt:
            raise ValueError("evaluation.prompt: is empty; give some text, or null for no samples")
        if max_new_tokens < 1:
            raise ValueError(
                f"evaluation.max_new_tokens: {max_new_tokens} is too small; give 1 or more"
            )
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.rng: Rng = rng
        self.clock = clock or Stopwatch()
        self.log_next_token = log_next_token
        self._sampled_step = -1

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        # Not in on_train_epoch_end: the checkpoint of an epoch's last batch is saved after its sample was printed.
        if trainer.is_last_batch:
            self._sample(trainer, pl_module, trainer.global_step - 1)
        elif ends_run(trainer):
            self._sample_of_cut_epoch(trainer, pl_module)

    def on_metrics(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        metrics: Mapping[str, float],
        position: StepPosition,
    ) -> None:
        if self.log_next_token and "val_loss" in metrics:
            self._log_next_token(trainer, pl_module, position.step)

    def _log_next_token(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        assert isinstance(module, GPTLightningModule)
        module.eval()
        with (
            self.clock.stopped(module.device),
            _random_numbers(self.rng),
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
            uncompiled(module),
        ):
            ids = module.tokenizer.encode_prompt(self.prompt)[-module.config.context_length :]
            features = module.model.features(torch.tensor([ids], device=module.device))
            p = module.model.head(features[:, -1]).float().softmax(dim=-1)[0]
            nats, largest = float(entropy(p)), float(p.max())
        module.train()
        metrics = dict(zip(self.TAGS, (nats, math.exp(nats), largest), strict=True))
        log_metrics(trainer, metrics, step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GPTLightningModule)
        self._sampled_step = trainer.global_step
        tokens = len(pl_module.tokenizer.encode_prompt(self.prompt))
        context_length = pl_module.config.context_length
        if tokens > context_length and trainer.is_global_zero:
            logger.info(
                f"evaluation.prompt: {tokens} tokens, the model reads {context_length}; "
                f"the first {tokens - context_length} are not read"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._sampled_step:  # stopped by a signal, for example
            self._sample_of_cut_epoch(trainer, pl_module)

    def _sample_of_cut_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        # A resumed run removes this step from TensorBoard, as an uninterrupted run has no sample here.
        self._sample(trainer, module, trainer.global_step)

    def _sample(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        assert isinstance(module, GPTLightningModule)
        self._sampled_step = trainer.global_step
        idx = torch.tensor([module.tokenizer.encode_prompt(self.prompt)], device=module.device)
        with (
            self.clock.stopped(module.device),
            _random_numbers(self.rng),
            trainer.precision_plugin.forward_context(),
            uncompiled(module),
        ):
            ids = generate(module.model, idx, self.max_new_tokens)
        self._show(trainer, module.tokenizer.decode(ids[0].tolist()), step)

    @rank_zero_only
    def _show(self, trainer: Trainer, text: str, step: int) -> None:
        print(for_stream(text.replace("\n", " "), sys.stdout), flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                ignore_full_disk(partial(logger.experiment.add_text, "sample", text, step))
