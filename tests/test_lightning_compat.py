"""The loop's straight step is Lightning's: hooks in the same order, counts, figures, state and bits."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL, Command, python
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins import Precision
from test_durability import same_bits

from gpt_lightning import GPTConfig
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training import build, lightning_compat
from gpt_lightning.training.module import GPTLightningModule

LAST = Path("checkpoints/quickstart/last.ckpt")
RECORDED = ["--allow_import=test_lightning_compat", "--trainer.callbacks+=test_lightning_compat.Record",
            "--trainer.log_every_n_steps=1"]  # fmt: skip


class Record(Callback):
    """What each hook of a step sees."""

    seen: list[Any] = []  # noqa: RUF012

    def __init__(self, logs: bool = True) -> None:
        self.logs = logs
        if not logs:
            self.on_before_zero_grad = None  # type: ignore[assignment]

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        module.configure_model()
        if self.logs:  # from within the forward pass too
            module.model.register_forward_hook(
                lambda model, args, out: (
                    module.log("largest", out.max()) if module.training else None
                )
            )

    def _note(self, hook: str, trainer: Any, module: Any, *what: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        counts = vars(loop.batch_progress.current), vars(loop.batch_progress.total)
        updates = loop.automatic_optimization.optim_progress.optimizer
        self.seen.append([hook, module._current_fx_name, trainer.global_step, trainer.is_last_batch,
                          *(dict(c) for c in counts), str(updates), *what])  # fmt: skip

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._note("start", trainer, module, [part.tolist() for part in batch], batch_idx)

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self._note("zero_grad", trainer, module, type(optimizer), self._gradients(module))

    def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
        self._note("backward", trainer, module, loss.item())

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self._note("after_backward", trainer, module, self._gradients(module))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self._note("step", trainer, module, type(optimizer), self._gradients(module))

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.logs:
            module.log("own", outputs["loss"], on_step=True, on_epoch=True)
        self._note("end", trainer, module, {k: float(v) for k, v in outputs.items()}, batch_idx,
                   {k: float(v) for k, v in sorted(trainer.logged_metrics.items()) if "own" in k})  # fmt: skip

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        figures = {**trainer.logged_metrics, **trainer.callback_metrics}
        self._note("epoch_end", trainer, module, {k: float(v) for k, v in sorted(figures.items())})

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        figures = {k: float(v) for k, v in sorted(trainer.callback_metrics.items())}
        self._note("validated", trainer, module, figures)

    @staticmethod
    def _gradients(module: Any) -> list[float | None]:
        return [None if p.grad is None else float(p.grad.sum()) for p in module.parameters()]


class StopsOnce(Callback):
    """As EarlyStopping does, with Lightning's first validation."""

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        trainer.should_stop = trainer.max_steps == 4 and not trainer.sanity_checking


@pytest.mark.parametrize(
    "settings",
    [
        [],
        # epochs end within an update
        ["--trainer.accumulate_grad_batches=3", "--trainer.gradient_clip_val=0.5"],
        ["--trainer.precision=bf16-mixed", "--model.config.drop_rate=0.2"],
        ["--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"],
        ["--data.num_workers=1", "--trainer.limit_train_batches=4", "--rng=global"],
        ["--trainer.callbacks.logs=false", "--data.batch_size=1"],
        [
            "--trainer.callbacks+=GradientAccumulationScheduler",
            "--trainer.callbacks.scheduling={0: 2, 1: 3}",
        ],
        # saved in later hooks than ours, and resumed with Lightning's validation due
        [
            "--trainer.limit_val_batches=2",
            "--trainer.val_check_interval=2",
            "--data.train_ratio=0.3",
            "--checkpoint.every_n_train_steps=1000",
            "--trainer.callbacks+=test_lightning_compat.StopsOnce",
        ],
    ],
    ids=[
        "plain",
        "accumulated",
        "bf16",
        "validated",
        "limited",
        "nothing logged",
        "scheduled",
        "stopped",
    ],
)
def test_a_step_is_lightnings(
    settings: list[str], fit: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With ours and with Lightning's loop without a stop; and with ours stopped after 4 updates and resumed."""
    runs = {}
    for name in ("own", "lightnings", "resumed"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setattr(Record, "seen", [])
        arguments = [*RECORDED, "--trainer.max_epochs=-1", "--evaluation.eval_freq=3", *settings]
        with monkeypatch.context() as patched:
            if name == "lightnings":
                patched.setattr(build, "use_fast_epoch_loop", lambda trainer: None)
            if name == "resumed":
                fit(*arguments, "--trainer.max_steps=4")
                monkeypatch.setattr(Record, "seen", [])
                arguments.append("--ckpt_path=last")
            out = fit(*arguments, "--trainer.max_steps=9").out
        runs[name] = (Record.seen, out, read_checkpoint(LAST))
    seen, out, state = runs["own"]
    assert len(seen) > 40
    for one, other in zip(seen, runs["lightnings"][0], strict=True):
        assert one == other
    assert out == runs["lightnings"][1]
    for _, _, other in (runs["lightnings"], runs["resumed"]):
        assert same_bits(state["state_dict"], other["state_dict"])
        assert same_bits(state["optimizer_states"], other["optimizer_states"])
        assert state["loops"] == other["loops"]
    after = runs["resumed"][0]
    assert len(after) > 20
    for one, other in zip(seen[-len(after) :], after, strict=True):
        assert _kept(one) == _kept(other)


def _kept(seen: list[Any]) -> list[Any]:
    """What a hook saw, but for what no checkpoint has: Lightning's means over an epoch, and old gradients."""
    if seen[0] in ("epoch_end", "validated", "zero_grad"):
        return seen[:-1]
    if seen[0] == "end":
        return [*seen[:-1], seen[-1].get("own_step")]
    return seen


def test_a_run_whose_updates_a_callback_sizes_goes_on_with_the_next_epoch(
    fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many updates an epoch has is not known as it begins."""
    settings = [*RECORDED, "--checkpoint.every_n_train_steps=1000",
                "--trainer.callbacks+=GradientAccumulationScheduler",
                "--trainer.callbacks.scheduling={0: 2}"]  # fmt: skip
    batches = []
    for runs in ([3], [1, 3]):
        monkeypatch.setattr(Record, "seen", [])
        for epochs in runs:
            more = ["--ckpt_path=last"] if epochs != runs[0] else []
            fit(*settings, *more, f"--run=of-{len(runs)}", f"--trainer.max_epochs={epochs}")
        batches.append([what[7] for what in Record.seen if what[0] == "start"])
    whole, resumed = batches
    assert len(whole) > 3
    assert whole == resumed


def test_it_is_the_straight_step_that_runs(fit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    real = lightning_compat.FastTrainingEpochLoop._step

    def count(self: Any, batch: Any, batch_idx: int) -> Any:
        counted.append(batch_idx)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(lightning_compat.FastTrainingEpochLoop, "_step", count)
    fit("--trainer.max_steps=4", "--checkpoint.every_n_train_steps=1")
    assert counted == [0, 1, 2, 3]
    fit("--trainer.max_steps=6", "--ckpt_path=last")
    assert counted[4:] == [4, 5]
    fit("--trainer.max_steps=2", "--trainer.profiler=simple", "--run=profiled")
    assert len(counted) == 6


class OwnPrecision(Precision):
    """May do more in a step, as one whose optimizer_step is its own."""


def test_anothers_precision_has_lightnings_step(
    fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(lightning_compat.FastTrainingEpochLoop, "_step")
    fit("--trainer.max_steps=2", "--allow_import=test_lightning_compat",
        "--trainer.plugins=test_lightning_compat.OwnPrecision")  # fmt: skip


class LightningsLoop(Callback):
    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        trainer.fit_loop.epoch_loop.__class__ = _TrainingEpochLoop


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_step_of_two_processes_is_lightnings(tmp_path: Path, strategy: str) -> None:
    states = []
    for name in ("own", "lightnings"):
        loop = (
            [] if name == "own" else ["--trainer.callbacks+=test_lightning_compat.LightningsLoop"]
        )
        done = python(
            "-m", "gpt_lightning", "fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL,
            f"--config={ROOT}/configs/{strategy}.yaml", "--trainer.devices=2", "--trainer.accelerator=cpu",
            "--trainer.precision=32-true", "--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=0.5",
            "--trainer.max_steps=5", "--trainer.max_epochs=-1", "--model.config.drop_rate=0.1", f"--run={name}",
            "--allow_import=test_lightning_compat", *loop, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert done.returncode == 0, done.stderr
        states.append(read_checkpoint(tmp_path / f"checkpoints/{name}/last.ckpt"))
    own, lightnings = states
    assert same_bits(own["state_dict"], lightnings["state_dict"])
    assert same_bits(own["optimizer_states"], lightnings["optimizer_states"])
    assert own["loops"] == lightnings["loops"]


def test_hooks_that_are_called() -> None:
    """A callback's own, an inherited one, and one that was set on the object."""

    class Watcher(Callback):
        def on_after_backward(self, *arguments: Any) -> None:
            pass

    class Heir(Watcher):
        def on_train_batch_end(self, *arguments: Any) -> None:
            pass

    by_hand = LambdaCallback(on_train_batch_end=lambda *arguments: None)
    module = GPTLightningModule(GPTConfig(emb_dim=8, n_heads=1, n_layers=1))
    trainer: Any = None
    found = {
        hook: len(lightning_compat._calls(hook, [Watcher(), Heir(), by_hand], trainer, module))
        for hook in lightning_compat._HOOKS
    }
    assert found == {
        "on_train_batch_start": 1,  # the module's, which seeds
        "on_before_zero_grad": 0,
        "on_before_backward": 0,
        "on_after_backward": 2,
        "on_before_optimizer_step": 1,  # the module's, which sets the learning rate
        "on_train_batch_end": 2,
    }


class Small(LightningModule):
    """A linear model with a training step, to compare the loops with."""

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


def test_another_lightning_trains_in_its_own_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lightning_compat, "TESTED_VERSIONS", ("1.0",))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    lightning_compat.use_fast_epoch_loop(trainer)
    assert type(trainer.fit_loop.epoch_loop) is _TrainingEpochLoop
    assert "was not tested (only 1.0)" in caplog.text
