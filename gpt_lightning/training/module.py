"""``GPTModel`` under Lightning: the step, the optimizer, and what a run must remember."""

import math
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, Metric, SumMetric

from gpt_lightning.data.windows import Batch, Rng
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel, cross_entropy
from gpt_lightning.pretrained.formats import Source
from gpt_lightning.training.optim import build_adamw, learning_rate, load_moments
from gpt_lightning.training.reproducible import seed_micro_batch

# what TextDataModule.val_dataloader gives to trainer.validate, in its order
SPLITS = ("val", "train")


class GPTLightningModule(LightningModule):
    """Trains a :class:`GPTModel` by next-token cross-entropy with AdamW.

    The weights are made in ``configure_model``, seeded there, so that they do not depend on what ran
    before. The learning rate is set before each update as a function of the step; a resumed run follows
    the configuration it is resumed with.

    Args:
        config: The architecture (or its dict, which is how checkpoints hold it).
        lr: Learning rate after the warmup.
        weight_decay: AdamW's decoupled weight decay.
        betas: AdamW's decay rates of the moments.
        decay_matrices_only: Whether biases and norms are left without decay. The book decays all.
        warmup_steps: Updates over which the rate rises linearly to lr.
        decay_steps: The update at which a cosine from lr reaches min_lr; none: the rate is constant.
        min_lr: Where the cosine ends.
        seed: What initial weights and dropout depend on.
        rng: 'step' or 'global', see gpt_lightning/training/reproducible.py.
    """

    model: GPTModel

    def __init__(
        self,
        config: GPTConfig,
        lr: float = 4e-4,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        decay_matrices_only: bool = False,
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        min_lr: float = 0.0,
        seed: int = 123,
        rng: Rng = "step",
    ) -> None:
        super().__init__()
        if isinstance(config, dict):
            config = GPTConfig(**config)
        for name, value in [("lr", lr), ("weight_decay", weight_decay), ("min_lr", min_lr)]:
            if not 0.0 <= value < math.inf:
                raise ValueError(f"model.{name}: {value} is out of range; give 0 or more")
        self.config = config
        self.lr = lr
        self.weight_decay = weight_decay
        self.betas = betas
        self.decay_matrices_only = decay_matrices_only
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps
        self.min_lr = min_lr
        self.seed = seed
        self.rng: Rng = rng
        # a dict is the one form of a configuration that opens with weights_only=True on every path
        self.save_hyperparameters({"config": asdict(config), "lr": lr, "weight_decay": weight_decay,
                                   "betas": list(betas), "decay_matrices_only": decay_matrices_only,
                                   "warmup_steps": warmup_steps, "decay_steps": decay_steps,
                                   "min_lr": min_lr, "seed": seed, "rng": rng})  # fmt: skip
        self.tokens_seen = 0
        self.validation = nn.ModuleDict(
            {f"{split}_loss": MeanMetric() for split in SPLITS}
            | {f"{split}_tokens": SumMetric() for split in SPLITS}
        )
        self._start: Source | None = None
        self._start_with_moments = False
        self._rng_state: Tensor | None = None

    def start_from(self, source: Source, *, with_optimizer: bool = False) -> None:
        """Begin the run with old weights, and old moments if asked, in place of fresh ones.

        Raises:
            ValueError: ``source`` has another architecture, or no optimizer state to begin with.
        """
        if differences := source.config.differences(self.config):
            raise ValueError(describe_differences("init_from", differences))
        if with_optimizer and source.optimizer_state is None:
            raise ValueError(
                "init_optimizer: the source has no optimizer state; leave --init_optimizer out"
            )
        self._start = source
        self._start_with_moments = with_optimizer

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        torch.manual_seed(self.seed)
        self.model = GPTModel(self.config)
        if self._start is not None:
            self.model.load_state_dict(self._start.state_dict)
            torch.manual_seed(self.seed)  # as exercise 5.4 does after loading
        self._rng_state = torch.get_rng_state()

    def configure_optimizers(self) -> Optimizer:
        return build_adamw(
            self.model,
            lr=self.lr,
            weight_decay=self.weight_decay,
            betas=self.betas,
            decay_matrices_only=self.decay_matrices_only,
        )

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids ``(B, T)`` → logits ``(B, T, V)``."""
        return self.model(idx)

    def loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        return cross_entropy(self.model(inputs), targets)

    def on_train_start(self) -> None:
        if self._start is not None and self._start_with_moments:
            assert self._start.optimizer_state is not None
            load_moments(self._optimizer(), self._start.optimizer_state)
        self._start = None
        # a resumed optimizer comes back with its old settings; the configuration wins
        for group, own in zip(
            self._optimizer().param_groups, self.configure_optimizers().param_groups, strict=True
        ):
            group.update(weight_decay=own["weight_decay"], betas=own["betas"])
        if self.rng == "global" and self._rng_state is not None:
            torch.set_rng_state(self._rng_state)  # whatever drew since, the run goes on from here

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.rng == "step":
            micro_batch = batch_idx % self.trainer.accumulate_grad_batches
            seed_micro_batch(
                self.seed, self.trainer.global_step, micro_batch, self.trainer.global_rank
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.tokens_seen += batch[0].numel() * self.trainer.world_size
        return self.loss(batch)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        rate = learning_rate(
            self.trainer.global_step,
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            min_lr=self.min_lr,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        split = SPLITS[dataloader_idx]
        count = batch[1].numel()
        self._metric(f"{split}_loss").update(self.loss(batch).float(), weight=count)
        self._metric(f"{split}_tokens").update(count)

    def on_validation_epoch_end(self) -> None:
        """Log loss (nats a token, every token weighing the same), perplexity and tokens of each split."""
        for split in SPLITS:
            mean, tokens = self._metric(f"{split}_loss"), self._metric(f"{split}_tokens")
            if not mean.update_called:
                continue
            loss = mean.compute()
            self.log(f"{split}_loss", loss)
            self.log(f"{split}_perplexity", loss.exp())
            self.log(f"{split}_tokens", tokens.compute())
            mean.reset()
            tokens.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_seen"] = self.tokens_seen
        if self.rng == "global":
            checkpoint["rng_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen = checkpoint["tokens_seen"]
        self._rng_state = checkpoint.get("rng_state")

    def _metric(self, name: str) -> Metric:
        metric = self.validation[name]
        assert isinstance(metric, Metric)
        return metric

    def _optimizer(self) -> Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        return optimizer


def describe_differences(what: str, differences: dict[str, tuple[Any, Any]]) -> str:
    """One line on an architecture that does not fit: each key with the file's and the config's value."""
    pairs = ", ".join(
        f"model.config.{key} is {theirs} there and {ours} here"
        for key, (theirs, ours) in differences.items()
    )
    return f"{what}: another architecture: {pairs}; give the same values"
