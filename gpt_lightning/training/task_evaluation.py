"""Evaluation during training by tasks, such as HellaSwag: accuracies and perplexities, printed and logged."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.evals.likelihood import (
    Likelihood,
    NotFiniteError,
    Request,
    log_likelihoods,
)
from gpt_lightning.evals.task_names import METRICS
from gpt_lightning.evals.tasks import Task, make_task, read_tasks
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.training.config import EvaluationConfig
from gpt_lightning.training.distributed import FSDP2Strategy
from gpt_lightning.training.evaluation import uncompiled
from gpt_lightning.training.loggers import StepPosition, publish_metrics
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.step_callback import StepEndCallback
from gpt_lightning.training.stopping import GracefulStop, default_signal_handlers, ends_run
from gpt_lightning.training.throughput import Stopwatch

logger = logging.getLogger(__name__)

BATCH_SIZE = 16  # texts that are computed together
_REQUESTS_PER_ROUND = 16  # of each rank; a signal is noticed after a round


def task_tags(config: EvaluationConfig) -> list[str]:
    """The metrics that a run logs of its tasks, such as ``eval/hellaswag_acc``."""
    return [f"eval/{name}_{metric}" for name in config.named_tasks for metric in METRICS[name]]


def build_tasks(config: EvaluationConfig, tokenizer: Tokenizer, context_length: int) -> list[Task]:
    """Read the tasks of a run.

    Raises:
        ValueError, OSError: A file is missing or damaged, or an ending is longer than the context; one line.
    """
    setting = "evaluation.tasks"
    tasks = []
    for name, examples in read_tasks(config.named_tasks, setting, config.task_limit).items():
        try:
            tasks.append(make_task(name, examples, tokenizer, context_length))
        except ValueError as error:
            raise ValueError(f"{setting}: {name}: {error}") from error
    return tasks


class TaskEvaluationCallback(StepEndCallback):
    """Callback that judges the model by tasks every ``task_freq`` steps, and at the end of the run.

    The metrics of the end are logged at the number of steps of the run, as no further step has this number. A run that
    is made longer removes them and logs those of its own end.

    The ranks share the examples. With FSDP2 each rank computes all of them, because the ranks must gather each
    block's weights equally often. A signal ends an evaluation without a result. Metrics are NaN if logits are not
    finite, as losses are; the run continues.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        task_freq: int,
        stop: GracefulStop,
        clock: Stopwatch | None = None,
    ) -> None:
        self.tasks = tasks
        self.task_freq = task_freq
        self.stop = stop
        self.clock = clock or Stopwatch()
        self._evaluated_steps = -1
        self._seconds = 0.0
        self._end: StepPosition | None = None

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        step = trainer.global_step - 1  # as in EvaluationCallback
        if ends_run(trainer):
            epochs = StepPosition.of(trainer, batch_idx).epochs
            self._end = StepPosition(trainer.global_step, epochs)
        if step and step % self.task_freq == 0:
            self._evaluate(trainer, pl_module, StepPosition.of(trainer, batch_idx))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # after the last save, so a signal may end the process
        is_done = trainer.global_step == self._evaluated_steps or self.stop.received is not None
        if self._end is not None and not is_done:
            with default_signal_handlers():
                self._evaluate(trainer, pl_module, self._end)

    def _evaluate(self, trainer: Trainer, module: LightningModule, position: StepPosition) -> None:
        assert isinstance(module, GPTLightningModule)
        started = time.perf_counter()
        results: list[dict[str, Any]] = []
        with (
            self.clock.stopped(module.device),
            isolate_rng(),
            trainer.precision_plugin.forward_context(),
            uncompiled(module),
        ):
            module.eval()
            for task in self.tasks:
                answers = self._answers(trainer, module, task)
                if answers is None:
                    break
                results.append(_numbers(task, answers))
            module.train()
        if len(results) < len(self.tasks):
            if trainer.is_global_zero:
                logger.info(f"step {position.step}: a signal ended the evaluation by tasks")
            return
        self._evaluated_steps = trainer.global_step
        self._print(position, results)
        if not self._seconds and trainer.is_global_zero:
            self._seconds = time.perf_counter() - started
            logger.info(f"evaluation.tasks: each evaluation takes about {self._seconds:.3g} s")
        metrics = {
            f"eval/{task.name}_{metric}": float(result[metric])
            for task, result in zip(self.tasks, results, strict=True)
            for metric in METRICS[task.name]
        }
        trainer.callback_metrics.update((tag, torch.tensor(x)) for tag, x in metrics.items())
        publish_metrics(trainer, module, metrics, position)

    def _answers(
        self, trainer: Trainer, module: GPTLightningModule, task: Task
    ) -> list[list[Likelihood]] | None:
        """Log-likelihoods of all requests, on all ranks; ``None``: a signal has ended the evaluation."""
        shares = not isinstance(trainer.strategy, FSDP2Strategy)
        ranks, rank = (trainer.world_size, trainer.global_rank) if shares else (1, 0)
        requests = task.requests

        def length(number: int) -> tuple[int, int]:
            return requests[number].longest, len(requests[number].context)

        numbers = sorted(range(len(requests)), key=length, reverse=True)
        per_round = _REQUESTS_PER_ROUND * ranks
        own: dict[int, list[Likelihood]] = {}
        for start in range(0, len(numbers), per_round):
            if self._is_stopped(trainer, module.device):
                return None
            part = numbers[start : start + per_round][rank::ranks]
            answers = _log_likelihoods(module.model, [requests[i] for i in part])
            own.update(zip(part, answers, strict=True))
        if ranks > 1:
            parts: list[dict[int, list[Likelihood]]] = [{} for _ in range(ranks)]
            torch.distributed.all_gather_object(parts, own)
            own = {number: answer for part in parts for number, answer in part.items()}
        return [own[number] for number in range(len(requests))]

    def _is_stopped(self, trainer: Trainer, device: torch.device) -> bool:
        """Whether any rank has got a signal."""
        if trainer.world_size == 1:
            return self.stop.is_requested
        flag = torch.full((), int(self.stop.is_requested), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    @rank_zero_only
    def _print(self, position: StepPosition, results: Sequence[Mapping[str, Any]]) -> None:
        """Print a line for each task, which begins as the losses' line."""
        for task, result in zip(self.tasks, results, strict=True):
            shown = ", ".join(_shown(result, metric) for metric in METRICS[task.name])
            print(
                f"Ep {math.ceil(position.epochs)} (Step {position.step:06d}): {task.name} {shown}",
                flush=True,
            )


def _log_likelihoods(model: GPTModel, requests: Sequence[Request]) -> list[list[Likelihood]]:
    """Log-likelihoods; all are NaN if a logit is not finite, so that no rank waits for one that has failed."""
    try:
        return log_likelihoods(model, requests, BATCH_SIZE)
    except NotFiniteError:
        unknown = Likelihood(math.nan, is_greedy=False)
        return [[unknown] * len(request.continuations) for request in requests]


def _numbers(task: Task, answers: Sequence[Sequence[Likelihood]]) -> dict[str, Any]:
    """The result of a task; NaN if a log-likelihood is."""
    if any(math.isnan(each.logprob) for answer in answers for each in answer):
        return dict.fromkeys(METRICS[task.name], math.nan)
    return task.numbers(answers)


def _shown(result: Mapping[str, Any], metric: str) -> str:
    """A number of a result, an accuracy with its standard error."""
    stderr = result.get(f"{metric}_stderr")
    return f"{metric} {result[metric]:,.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")
