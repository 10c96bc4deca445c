"""``GPTModel`` as a LightningModule: training step, optimizer, gradient clipping, validation, state of a run."""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt_lightning.data.dataloader import Batch, Rng
from gpt_lightning.data.tokenizer import GPT2, Tokenizer
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.loss import chunked_cross_entropy, cross_entropy
from gpt_lightning.pretrained.weights import EMA_STATE, ModelWeights, pop_weights, tokenizer_state
from gpt_lightning.training.distributed import check_strategy, is_rank_zero, shard_model
from gpt_lightning.training.grad_norm import global_grad_norm
from gpt_lightning.training.metrics import TokenWeightedLoss
from gpt_lightning.training.muon import AdjustLR
from gpt_lightning.training.optimizer import OptimizerConfig
from gpt_lightning.training.optimizer_state import check_moments, load_optimizer_moments
from gpt_lightning.training.rng import get_rng_state, seed_micro_batch, set_rng_state
from gpt_lightning.training.run_length import Progress, epoch_shape, run_steps
from gpt_lightning.training.schedule import DecayType, LRSchedule, Schedule, Steps

logger = logging.getLogger(__name__)

# splits in the order of TextDataModule.val_dataloader
SPLITS = ("val", "train")


class GPTLightningModule(LightningModule):
    """LightningModule that trains a :class:`GPTModel` with next-token cross-entropy and AdamW or another optimizer.

    ``configure_model`` seeds the generator and makes the weights, so that they do not depend on earlier random
    numbers. The learning rate of each step is a function of the step, see :class:`Schedule`; a resumed run uses the
    settings that it is resumed with.

    Args:
        config: Architecture; a dict in checkpoints.
        lr: Learning rate after the warmup.
        optimizer: adamw; muon = Muon for the matrices of the blocks and AdamW for the rest; or a class of torch.optim,
            such as torch.optim.SGD or {class_path: torch.optim.SGD, init_args: {momentum: 0.9}}.
        muon_lr: Learning rate of Muon's matrices, which follows the same schedule as lr; null = lr.
        muon_momentum: Decay rate of Muon's momentum; null = 0.95.
        muon_adjust_lr: Factor of muon_lr by a matrix's shape: original = √(max(1, rows / columns));
            match_rms_adamw = 0.2·√(max(rows, columns)), with which Muon needs about the learning rate of AdamW;
            null = match_rms_adamw.
        weight_decay: Decoupled weight decay of AdamW and Muon; other optimizers have their own kind.
        betas: Decay rates of AdamW's two moments.
        decay_matrices_only: Apply no weight decay to biases and norms; the book decays all parameters.
        warmup_steps: Steps over which the learning rate rises linearly to lr; a float such as 0.2 is a share of the
            run, rounded down.
        lr_schedule: Learning rate after the warmup: constant, cosine, linear, wsd (warmup-stable-decay) or
            inverse_sqrt; null = cosine where decay_steps is given, else constant.
        decay_steps: Step at which the decay from lr reaches min_lr; null = the end of the run, if lr_schedule decays.
            A float is a share of the run: 1.0 = its end.
        decay_fraction: With wsd, the decay takes this share of the steps before decay_steps, the last ones;
            null = 0.2.
        decay_type: With wsd, the shape of the decay: linear, 1-sqrt or cosine; null = linear.
        min_lr: Learning rate at the end of the decay; with inverse_sqrt the lowest one.
        initial_lr: Learning rate of the first step of the warmup, whose end has lr, as in appendix D of the book;
            null = lr / warmup_steps.
        clip_from_step: First step (from 0) whose gradients trainer.gradient_clip_val clips; a float is a share of the
            run; null = all steps are clipped.
        loss_chunk_size: Tokens whose logits are computed per chunk; null = all tokens of a batch at once. Saves two to three times
            the memory of a batch's logits; faster on a GPU.
        activation_checkpointing: Save memory for a third more work; the backward pass computes the activations of a
            block again.
        compile: Compile the blocks, which takes up to a minute when training starts; steps are then faster on a
            GPU, and 6 to 10 percent faster on a CPU.
        seed: Seed of initial weights and dropout.
        ema_decay: Decay of an exponential moving average of the weights, such as 0.999, which is evaluated and saved
            beside them; null = no average.
        rng: Source of random numbers: 'step' or 'global', see gpt_lightning/training/rng.py. With 'global' the norm
            for clipping is the one of ``torch.nn.utils.clip_grad_norm_``, as in the book.

    Attributes:
        schedule: Learning rate and clipping as the settings have them, with shares of the run.
        run_schedule: The same with numbers of steps, once training has started.
        max_tokens: Tokens after which the run ends, if these end it: shares of the run need its length.
        tokenizer: The tokenizer of its texts, GPT-2's unless it is set; checkpoints hold it.
    """

    model: GPTModel
    max_tokens: int | None = None

    def __init__(
        self,
        config: GPTConfig,
        lr: float = 4e-4,
        optimizer: str | dict[str, Any] = "adamw",
        muon_lr: float | None = None,
        muon_momentum: float | None = None,
        muon_adjust_lr: AdjustLR | None = None,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        decay_matrices_only: bool = False,
        warmup_steps: Steps = 0,
        lr_schedule: LRSchedule | None = None,
        decay_steps: Steps | None = None,
        decay_fraction: float | None = None,
        decay_type: DecayType | None = None,
        min_lr: float = 0.0,
        initial_lr: float | None = None,
        clip_from_step: Steps | None = None,
        loss_chunk_size: int | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002 — torch's word
        seed: int = 123,
        rng: Rng = "step",
        ema_decay: float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(config, dict):
            config = GPTConfig.from_dict(config)
        schedule = Schedule(
            lr,
            min_lr,
            initial_lr,
            warmup_steps,
            decay_steps,
            clip_from_step,
            lr_schedule,
            decay_fraction,
            decay_type,
        )
        self.optimizer_config = OptimizerConfig(
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            betas=(betas[0], betas[1]),
            decay_matrices_only=decay_matrices_only,
            muon_lr=muon_lr,
            muon_momentum=muon_momentum,
            muon_adjust_lr=muon_adjust_lr,
        )
        if loss_chunk_size is not None and loss_chunk_size < 1:
            raise ValueError(
                f"model.loss_chunk_size: {loss_chunk_size} is too small; give 1 or more"
            )
        if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
            raise ValueError(
                f"model.ema_decay: {ema_decay} is not in [0, 1); give e.g. 0.999, or null for no average"
            )
        self.ema_decay = ema_decay
        self.loss_chunk_size = loss_chunk_size
        self.activation_checkpointing = activation_checkpointing
        self.compile_blocks = compile
        self.config = config
        self.schedule = self.run_schedule = schedule
        self.seed = seed
        self.rng: Rng = rng
        # only a dict can be loaded with weights_only=True by every loader
        self.save_hyperparameters(
            {
                "config": asdict(config),
                **asdict(schedule),
                **asdict(self.optimizer_config),
                "betas": list(betas),
                "seed": seed,
                "rng": rng,
                "ema_decay": ema_decay,
            }
        )
        self.tokenizer: Tokenizer = GPT2
        self.tokens_seen = 0
        self.validation = nn.ModuleDict({f"{split}_loss": TokenWeightedLoss() for split in SPLITS})
        self._run_steps: int | None = None  # of this run, or of the run that it resumes
        self._grad_norm: list[Tensor] = []  # of the current step, once it was computed
        self._start: ModelWeights | None = None
        self._start_with_moments = False
        self._random_numbers: dict[str, Tensor] | None = None

    def initialize_from(self, source: ModelWeights, *, with_optimizer: bool = False) -> None:
        """Start the run from existing weights, and from existing optimizer moments with ``with_optimizer``.

        Raises:
            ValueError: ``source`` has another architecture, no optimizer state, or that of another optimizer.
        """
        reconcile_config("init_from", source.config, asdict(self.config), source.assumed)
        if with_optimizer:
            if source.optimizer_state is None:
                raise ValueError(
                    "init_optimizer: the source has no optimizer state; leave --init_optimizer out"
                )
            dims = {name: weight.dim() for name, weight in source.state_dict.items()}
            check_moments(self.optimizer_config, source.optimizer_state, dims)
        self._start = source
        self._start_with_moments = with_optimizer

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        torch.manual_seed(self.seed)
        if self._start is None:
            with torch.device("cpu"):  # a seed gives the same weights on any number of any devices
                self.model = GPTModel(self.config)
        else:  # no random numbers: exercise 5.4 seeds after loading
            with torch.device("meta"):
                self.model = GPTModel(self.config)
            precise = torch.float64 if self.trainer.precision == "64-true" else torch.float32
            weights = pop_weights(self._start, precise)
            if self.trainer.training:  # training changes the weights in place
                self.model.to_empty(device="cpu")
            self.model.load_state_dict(weights, assign=not self.trainer.training)
        self.model.activation_checkpointing = self.activation_checkpointing
        if self.compile_blocks:
            for block in self.model.trf_blocks:
                block.compile()  # in place, so that names in checkpoints stay the same
        if self.device_mesh is not None:
            check_strategy(self.trainer.strategy)
            shard_model(self.model, self.device_mesh["data_parallel"], self.trainer.precision)
        self._random_numbers = get_rng_state()

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer_config.build(self.model, precision=str(self.trainer.precision))

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids ``(B, T)`` → logits ``(B, T, V)``."""
        return self.model(idx)

    def loss(self, batch: Batch) -> Tensor:
        """Return a batch's mean loss in nats per token; equal up to rounding with and without chunks."""
        inputs, targets, *rest = batch
        documents = rest[0] if rest else None
        if self.loss_chunk_size is None:
            return cross_entropy(self.model(inputs, documents=documents), targets)
        return chunked_cross_entropy(
            self.model.features(inputs, documents=documents),
            self.model.head_weight,
            targets,
            self.loss_chunk_size,
            pad_vocabulary=self.device.type == "cuda",
        )

    def on_train_start(self) -> None:
        self._resolve_schedule()
        if self._start is not None and self._start_with_moments:
            assert self._start.optimizer_state is not None
            load_optimizer_moments(self._optimizer(), self._start.optimizer_state)
        self._start = None
        # A resumed optimizer has the settings of its checkpoint; those of this run win.
        for group, own in zip(
            self._optimizer().param_groups, self.configure_optimizers().param_groups, strict=True
        ):
            group.update({key: value for key, value in own.items() if "param" not in key})
            for parameter in group["params"]:
                state = self._optimizer().state.get(parameter, {})
                if (
                    own.get("fused") and "step" in state
                ):  # an optimizer that is not fused counts steps on the host
                    state["step"] = state["step"].to(parameter.device, torch.float32)
        if self.rng == "global" and self._random_numbers is not None:
            set_rng_state(self._random_numbers)  # undo random numbers that were drawn since

    def _resolve_schedule(self) -> None:
        """Turn shares of the run into numbers of steps; log it if a resumed run has another length than before."""
        trainer = self.trainer
        before = self._run_steps
        done = Progress(trainer.global_step, self.tokens_seen)
        self._run_steps = run_steps(epoch_shape(trainer), trainer, self.max_tokens, done)
        self.run_schedule = self.schedule.resolve(self._run_steps)
        if before is None or self._run_steps is None or not trainer.is_global_zero:
            return
        if changes := self.schedule.changes(before, self._run_steps):
            decay = self.schedule.moved_decay(before, self._run_steps)
            in_decay = (
                f"; the decay had started at step {decay}, so this is not the run that has {self._run_steps} steps "
                "from the start"
                if decay is not None and decay < trainer.global_step
                else ""
            )
            logger.warning(
                f"the run has {self._run_steps} steps now, and had {before}; from step {trainer.global_step} on: "
                f"{', '.join(changes)}{in_decay}"
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.rng == "step":
            trainer = self.trainer
            micro_batch = batch_idx % trainer.accumulate_grad_batches
            seed_micro_batch(self.seed, trainer.global_step, micro_batch, trainer.global_rank)

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the current step, of all parameters that have one."""
        groups = self.trainer.optimizers[0].param_groups
        return [grad for g in groups for p in g["params"] if (grad := p.grad) is not None]

    def grad_norm(self) -> Tensor:
        """Return the gradient norm of the current step over all parameters, before clipping; computed once a step."""
        if not self._grad_norm:
            by_blocks = self.rng != "global"
            self._grad_norm.append(global_grad_norm(self.gradients(), by_blocks=by_blocks))
        return self._grad_norm[0]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._grad_norm.clear()
        trainer = self.trainer
        self.tokens_seen += batch[0].numel() * trainer.world_size
        loss = self.loss(batch)
        # Lightning divides by accumulate_grad_batches; the last step of an epoch may have fewer micro-batches.
        batches, per_step = trainer.num_training_batches, trainer.accumulate_grad_batches
        fewer = 0 if batches == math.inf else int(batches) % per_step
        return loss * (per_step / fewer) if fewer and batch_idx >= batches - fewer else loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip like Lightning, but also with mixed precision and a fused AdamW, which Lightning refuses."""
        if not gradient_clip_val or gradient_clip_val < 0:  # as in Lightning
            return
        if not self.run_schedule.clips(self.trainer.global_step):
            return
        if not self.gradients():  # a bad step has none
            return
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        else:
            nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, self.grad_norm())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        rate = self.run_schedule.learning_rate(self.trainer.global_step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        targets = batch[1]
        text_bytes = self.tokenizer.byte_lengths.to(targets.device)[targets].sum()
        self._mean(SPLITS[dataloader_idx]).update(self.loss(batch), targets.numel(), text_bytes)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of :class:`TokenWeightedLoss` for each split."""
        for split, _ in zip(SPLITS, self.trainer.num_val_batches, strict=False):
            mean = self._mean(split)
            if not mean.update_called:  # this rank had no batch; the other ranks wait for it
                mean.update(torch.zeros((), device=self.device), 0)
            for name, value in mean.compute().items():
                self.log(f"{split}_{name}", value, sync_dist=True)
            mean.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint |= tokenizer_state(self.tokenizer)
        if self.schedule.has_shares:
            checkpoint["run_steps"] = self._run_steps
        if self.rng == "global":
            checkpoint["random_numbers"] = get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen = checkpoint["tokens_seen"]
        self._run_steps = checkpoint.get("run_steps")
        random_numbers = checkpoint.get("random_numbers")
        if random_numbers is not None:  # copies, because the checkpoint is mapped
            random_numbers = {name: state.clone() for name, state in random_numbers.items()}
        self._random_numbers = random_numbers
        if self.ema_decay is None and EMA_STATE in checkpoint and is_rank_zero():
            logger.info(
                "model.ema_decay: is not given, so the checkpoint's average of the weights is dropped"
            )

    def _mean(self, split: str) -> TokenWeightedLoss:
        mean = self.validation[f"{split}_loss"]
        assert isinstance(mean, TokenWeightedLoss)
        return mean

    def _optimizer(self) -> Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        return optimizer


def reconcile_config(
    what: str, stored: GPTConfig, named: Mapping[str, Any], assumed: Collection[str] = ()
) -> GPTConfig:
    """Return the architecture of existing weights, with the keys that may change taken from ``named``.

    Raises:
        ValueError: A key of ``named`` contradicts ``stored``; one line with both values.
    """
    if differences := stored.differences(named, assumed):
        pairs = ", ".join(
            f"model.config.{key} is {theirs} there and {ours} here"
            for key, (theirs, ours) in differences.items()
        )
        raise ValueError(f"{what}: another architecture: {pairs}; give the same values")
    return replace(stored, **named)
