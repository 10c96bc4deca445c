"""What watches a run: losses as the book prints them, samples of text, the record on disk."""

import logging
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from torch.optim import Optimizer

from gpt_lightning.data.dataloader import Batch, ResumableDataLoader, Rng
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.tokenizer import decode, encode_prompt
from gpt_lightning.data.unicode import for_stream
from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.sampling import entropy
from gpt_lightning.training.loggers import attempt, log_metrics
from gpt_lightning.training.metrics import TokenWeightedLoss
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.stopping import ends_run
from gpt_lightning.training.throughput import Stopwatch

logger = logging.getLogger(__name__)


def evaluation_callbacks(
    eval_freq: int = 5,
    eval_iter: int | None = 5,
    prompt: str | None = "Every effort moves you",
    max_new_tokens: int = 50,
    log_next_token: bool = False,
    rng: Rng = "step",
    clock: Stopwatch | None = None,
) -> list[Callback]:
    """The callbacks behind the settings ``evaluation.*``.

    Args:
        eval_freq: Updates from one evaluation to the next; the first is after the first update.
        eval_iter: Batches of each split an evaluation reads, on each device; with data.global_batch_size or
            _tokens, such batches over all; none: all windows.
        prompt: What the greedy sample after each epoch begins with; none: no samples.
        max_new_tokens: Length of that sample.
        log_next_token: Whether each evaluation logs how sharp the prompt's next-token distribution is.
        rng: 'step' leaves the run's random numbers alone, 'global' draws on them as the book does.
        clock: Stopped while they work.
    """
    losses = EvaluationCallback(eval_freq, eval_iter, rng, clock)
    if prompt is None:
        if log_next_token:
            raise ValueError("evaluation.log_next_token: needs evaluation.prompt; give some text")
        return [losses]
    evaluation = losses if log_next_token else None
    return [losses, SampleTextCallback(prompt, max_new_tokens, rng, evaluation, clock)]


def _random_numbers(rng: Rng) -> AbstractContextManager[None]:
    return nullcontext() if rng == "global" else isolate_rng()


def _uncompiled(module: GPTLightningModule) -> AbstractContextManager[object]:
    """For passes of other shapes, each of which would be compiled anew."""
    if not module.compile_blocks:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


class EvaluationCallback(Callback):
    """The book's ``evaluate_model``: every ``eval_freq`` updates the losses over some batches of each split.

    It is what ``fit`` validates with, in place of Lightning's validation loop. Prints the book's line, logs
    to the trainer's loggers under the tags ``TAGS``, and keeps the last figures as ``row``.

    With ``rng="step"`` each evaluation reads the same training windows and weighs every token alike.
    With ``rng="global"`` it reads a new pass over the shuffled windows and takes the mean of the
    batches' means, which are the book's figures.
    """

    TAGS = (
        "train_loss",
        "val_loss",
        "val_perplexity",
        "lr",
        "grad_norm",
        "tokens_seen",
        "tokens_per_second",
    )

    def __init__(
        self,
        eval_freq: int = 5,
        eval_iter: int | None = 5,
        rng: Rng = "step",
        clock: Stopwatch | None = None,
    ) -> None:
        if eval_freq < 1:
            raise ValueError(f"evaluation.eval_freq: {eval_freq} is too small; give 1 or more")
        if eval_iter is not None and eval_iter < 1:
            raise ValueError(f"evaluation.eval_iter: {eval_iter} is too small; give 1 or more")
        self.eval_freq = eval_freq
        self.eval_iter = eval_iter
        self.rng: Rng = rng
        self.clock = clock or Stopwatch()
        self.row: dict[str, float] = {}
        self._last_step = -1
        self._grad_norm = math.nan
        self._began = 0.0
        self._tokens = 0
        self._rate = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step - 1
        self._began, self._tokens = self.clock.seconds(), 0

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if trainer.global_step % self.eval_freq == 0:
            assert isinstance(pl_module, GPTLightningModule)
            self._grad_norm = float(pl_module.grad_norm())

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, GPTLightningModule)
        step = trainer.global_step - 1  # the book counts the first update as step 0
        due = step != self._last_step and step % self.eval_freq == 0
        self._last_step = step
        if due and pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self._tokens += batch[0].numel() * trainer.world_size
        if due:
            self._rate = self._tokens / (self.clock.seconds() - self._began)
            with self.clock.stopped(pl_module.device):
                self._evaluate(trainer, pl_module, step)
            self._began, self._tokens = self.clock.seconds(), 0

    def _evaluate(self, trainer: Trainer, module: GPTLightningModule, step: int) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TextDataModule), "EvaluationCallback needs a TextDataModule"
        with _random_numbers(self.rng), torch.no_grad():
            module.eval()
            train_loss = self._mean_loss(trainer, module, data.train_dataloader())
            val_loss = self._mean_loss(trainer, module, data.validation_windows())
            module.train()
        epoch = trainer.current_epoch + 1
        figures = [
            train_loss,
            val_loss,
            math.exp(min(val_loss, 700.0)),
            trainer.optimizers[0].param_groups[0]["lr"],
            self._grad_norm,
            module.tokens_seen,
            self._rate,
        ]
        self.row = {"step": step, "epoch": epoch, **dict(zip(self.TAGS, figures, strict=True))}
        losses = {"train_loss": train_loss, "val_loss": val_loss}
        trainer.callback_metrics.update((tag, torch.tensor(loss)) for tag, loss in losses.items())
        if trainer.is_global_zero:
            print(
                f"Ep {epoch} (Step {step:06d}): "
                f"Train loss {train_loss:.3f}, Val loss {val_loss:.3f}",
                flush=True,
            )
        log_metrics(trainer, {tag: self.row[tag] for tag in self.TAGS}, step)

    def _mean_loss(
        self, trainer: Trainer, module: GPTLightningModule, loader: ResumableDataLoader
    ) -> float:
        mean = TokenWeightedLoss().to(module.device)
        data = trainer.datamodule  # type: ignore[attr-defined]
        most = None if self.eval_iter is None else self.eval_iter * data.micro_batches
        for batch in islice(loader, most):
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            with trainer.precision_plugin.forward_context():
                loss = module.loss(batch)
            tokens = batch[1].numel()
            mean.update(loss, min(tokens, 1) if self.rng == "global" else tokens)
        return float(mean.compute()["loss"])


class SampleTextCallback(Callback):
    """A greedy continuation of ``prompt`` after each epoch, printed and in TensorBoard.

    With ``evaluation``, each time that one has a new row, also the prompt's next-token distribution at
    temperature 1: its entropy (nats), exp of that (tokens), and the likeliest token's probability.
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
        evaluation: EvaluationCallback | None = None,
        clock: Stopwatch | None = None,
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
        self.evaluation = evaluation
        self.clock = clock or Stopwatch()
        self._last_row: dict[str, float] = {}
        self._sampled_step = -1

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        row = self.evaluation.row if self.evaluation else self._last_row
        if row is not self._last_row and row:
            self._last_row = row
            self._log_next_token(trainer, pl_module, int(row["step"]))
        # here and not in on_train_epoch_end, so that a checkpoint of the epoch's last batch means that it was shown
        if trainer.is_last_batch:
            self._sample(trainer, pl_module, trainer.global_step - 1)
        elif ends_run(trainer):
            self._sample_of_cut_epoch(trainer, pl_module)

    def _log_next_token(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        assert isinstance(module, GPTLightningModule)
        module.eval()
        with (
            self.clock.stopped(module.device),
            _random_numbers(self.rng),
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
            _uncompiled(module),
        ):
            ids = encode_prompt(self.prompt)[-module.config.context_length :]
            features = module.model.features(torch.tensor([ids], device=module.device))
            p = module.model.head(features[:, -1]).float().softmax(dim=-1)[0]
            nats, largest = float(entropy(p)), float(p.max())
        module.train()
        figures = dict(zip(self.TAGS, (nats, math.exp(nats), largest), strict=True))
        log_metrics(trainer, figures, step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GPTLightningModule)
        self._sampled_step = trainer.global_step
        tokens, context_length = len(encode_prompt(self.prompt)), pl_module.config.context_length
        if tokens > context_length and trainer.is_global_zero:
            logger.info(
                f"evaluation.prompt: {tokens} tokens, the model reads {context_length}; "
                f"the first {tokens - context_length} are not read"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._sampled_step:  # stopped by a signal, say
            self._sample_of_cut_epoch(trainer, pl_module)

    def _sample_of_cut_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        # at a step that a resumed run removes from TensorBoard: a run that is not cut has no text here
        self._sample(trainer, module, trainer.global_step)

    def _sample(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        assert isinstance(module, GPTLightningModule)
        self._sampled_step = trainer.global_step
        idx = torch.tensor([encode_prompt(self.prompt)], device=module.device)
        with (
            self.clock.stopped(module.device),
            _random_numbers(self.rng),
            trainer.precision_plugin.forward_context(),
            _uncompiled(module),
        ):
            ids = generate(module.model, idx, self.max_new_tokens)
        self._show(trainer, decode(ids[0].tolist()), step)

    @rank_zero_only
    def _show(self, trainer: Trainer, text: str, step: int) -> None:
        print(for_stream(text.replace("\n", " "), sys.stdout), flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                attempt(partial(logger.experiment.add_text, "sample", text, step))
