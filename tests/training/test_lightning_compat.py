"""The fast loop equals Lightning's: hooks in the same order, counts, metrics, state and bits."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins import Precision

from gpt_lightning import GPTConfig
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training import build, lightning_compat
from gpt_lightning.training.module import GPTLightningModule
from helpers import (
    ENVIRONMENT,
    ROOT,
    SMALL_QUICKSTART,
    TINY_MODEL,
    Command,
    python,
)
from runs import (
    LAST,
    same_bits,
)

RECORDED = [f"--allow_import={__name__}", f"--trainer.callbacks+={__name__}.Record",
            "--trainer.log_every_n_steps=1", *TINY_MODEL]  # fmt: skip


class Record(Callback):
    """Callback that records what each hook of a step sees."""

    seen: list[Any] = []  # noqa: RUF012

    def __init__(self, logs: bool = True) -> None:
        self.logs = logs
        if not logs:
            self.on_before_zero_grad = None  # type: ignore[assignment]

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        module.configure_model()
        if self.logs:  # log within the forward pass too
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
        metrics = {**trainer.logged_metrics, **trainer.callback_metrics}
        self._note("epoch_end", trainer, module, {k: float(v) for k, v in sorted(metrics.items())})

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        metrics = {k: float(v) for k, v in sorted(trainer.callback_metrics.items())}
        self._note("validated", trainer, module, metrics)

    @staticmethod
    def _gradients(module: Any) -> list[float | None]:
        return [None if p.grad is None else float(p.grad.sum()) for p in module.parameters()]


def _kept(seen: list[Any]) -> list[Any]:
    """What a hook saw, without what no checkpoint holds: Lightning's means over an epoch, old gradients."""
    if seen[0] in ("epoch_end", "validated", "zero_grad"):
        return seen[:-1]
    if seen[0] == "end":
        return [*seen[:-1], seen[-1].get("own_step")]
    return seen


class StopsOnce(Callback):
    """As EarlyStopping does, with Lightning's first validation."""

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        trainer.should_stop = trainer.max_steps == 4 and not trainer.sanity_checking


@pytest.mark.parametrize(
    "settings",
    [
        [],
        # epochs end within an accumulation
        ["--trainer.accumulate_grad_batches=3", "--trainer.gradient_clip_val=0.5"],
        pytest.param(
            ["--trainer.precision=bf16-mixed", "--model.config.drop_rate=0.2"],
            marks=pytest.mark.slow,
        ),
        ["--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"],
        ["--data.num_workers=1", "--trainer.limit_train_batches=4", "--rng=global"],
        ["--trainer.callbacks.logs=false", "--data.batch_size=1"],
        pytest.param(
            [
                "--trainer.callbacks+=GradientAccumulationScheduler",
                "--trainer.callbacks.scheduling={0: 2, 1: 3}",
            ],
            marks=pytest.mark.slow,
        ),
        # saved by later hooks than ours; Lightning's validation follows the resume
        [
            "--trainer.limit_val_batches=2",
            "--trainer.val_check_interval=2",
            "--data.train_ratio=0.3",
            "--checkpoint.every_n_train_steps=1000",
            f"--trainer.callbacks+={__name__}.StopsOnce",
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
def test_fast_loop_equals_lightnings_loop(
    settings: list[str], fit: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three runs: our loop, Lightning's loop, and our loop stopped after 4 steps and resumed."""
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


def test_run_with_scheduled_accumulation_resumes_with_the_next_epoch(
    fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of steps of an epoch is not known when it starts."""
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


def test_fast_step_is_used_unless_there_is_a_profiler(
    fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_other_precision_plugin_uses_lightnings_step(
    fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(lightning_compat.FastTrainingEpochLoop, "_step")
    fit("--trainer.max_steps=2", f"--allow_import={__name__}",
        f"--trainer.plugins={__name__}.OwnPrecision")  # fmt: skip


class LightningsLoop(Callback):
    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        trainer.fit_loop.epoch_loop.__class__ = _TrainingEpochLoop


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_fast_loop_of_two_processes_equals_lightnings_loop(tmp_path: Path, strategy: str) -> None:
    states = []
    for name in ("own", "lightnings"):
        loop = [] if name == "own" else [f"--trainer.callbacks+={__name__}.LightningsLoop"]
        result = python(
            "-m", "gpt_lightning", "fit", *SMALL_QUICKSTART,
            f"--config={ROOT}/configs/{strategy}.yaml", "--trainer.devices=2", "--trainer.accelerator=cpu",
            "--trainer.precision=32-true", "--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=0.5",
            "--trainer.max_steps=5", "--trainer.max_epochs=-1", "--model.config.drop_rate=0.1", f"--run={name}",
            f"--allow_import={__name__}", *loop, cwd=tmp_path,
            env=ENVIRONMENT)  # fmt: skip
        assert result.returncode == 0, result.stderr
        states.append(read_checkpoint(tmp_path / f"checkpoints/{name}/last.ckpt"))
    own, lightnings = states
    assert same_bits(own["state_dict"], lightnings["state_dict"])
    assert same_bits(own["optimizer_states"], lightnings["optimizer_states"])
    assert own["loops"] == lightnings["loops"]


def test_overridden_hooks_are_called() -> None:
    """Hooks of a callback's class, of its base class, and set on the object."""

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
