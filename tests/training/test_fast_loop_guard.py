"""Any module trains as in Lightning's loop, and in it where the fast loop cannot run it."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from gpt_lightning.training import lightning_compat


class Small(LightningModule):
    """Linear model with a training step, to compare the loops."""

    returned: Any = "loss"
    skip_epoch_at: int | None = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.seen: list[Any] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == self.skip_epoch_at else None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch[0]).square().mean()
        if self.returned == "loss":
            return loss
        if self.returned == "dict":
            return {"loss": loss, "name": "kept"}
        return None if batch_idx % 2 else loss

    def on_before_backward(self, loss: Any) -> None:
        self.seen.append(("backward", loss.item()))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append("step")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        kept = {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in outputs.items()}
        self.seen.append((batch_idx, kept))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class ReturnsADict(Small):
    returned = "dict"


class ReturnsNone(Small):
    returned = None


class SkipsAnEpoch(Small):
    skip_epoch_at = 2


class StepsItself(Small):
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        self.seen.append("own step")
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class GoesBackItself(Small):
    def backward(self, loss: Any) -> None:
        self.seen.append("own backward")
        loss.backward()


class MovesBatches(Small):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2]


class StepsByHand(Small):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        self.optimizers().step()  # type: ignore[union-attr]
        return loss


class NeedsAClosure(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=2)


def trained_small(kind: type[Small], *, fast: bool, accumulate: int = 1) -> Small:
    module = kind()
    trainer = Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False,
                      accumulate_grad_batches=accumulate)  # fmt: skip
    if fast:
        lightning_compat.use_fast_epoch_loop(trainer)
    data = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=1)
    trainer.fit(module, loader)
    module.seen += [trainer.global_step, trainer.current_epoch]
    return module


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`", "ignore:The 'train_dataloader'",
                            "ignore:Consider setting `persistent_workers")  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "reason", "accumulate"),
    [
        *(
            (kind, None, n)
            for kind in (Small, ReturnsADict, ReturnsNone, SkipsAnEpoch)
            for n in (1, 2)
        ),
        (StepsItself, "StepsItself overrides optimizer_step", 2),
        (GoesBackItself, "GoesBackItself overrides backward", 2),
        (MovesBatches, "MovesBatches overrides on_before_batch_transfer", 2),
        (NeedsAClosure, "LBFGS needs a closure", 2),
        # Lightning refuses accumulation with manual optimization
        (StepsByHand, "the module uses manual optimization", 1),
    ],
)
def test_any_module_trains_as_in_lightnings_loop(
    kind: type[Small], reason: str | None, accumulate: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gpt_lightning")
    ours, lightnings = (
        trained_small(kind, fast=fast, accumulate=accumulate) for fast in (True, False)
    )
    assert ours.seen == lightnings.seen
    assert torch.equal(ours.layer.weight, lightnings.layer.weight)
    messages = [m for m in caplog.messages if "Lightning's own loop" in m]
    assert len(messages) == (reason is not None)  # once, for two epochs
    if reason is not None:
        assert messages[0].endswith(reason)


def test_untested_lightning_version_uses_its_own_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lightning_compat, "TESTED_VERSIONS", ("1.0",))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    lightning_compat.use_fast_epoch_loop(trainer)
    assert type(trainer.fit_loop.epoch_loop) is _TrainingEpochLoop
    assert "was not tested (only 1.0)" in caplog.text
