"""Faster or smaller settings of the module train the same weights; accumulation is a mean."""

from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from gpt_lightning.model import gpt
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training import module
from helpers import SMALL_QUICKSTART, Command, python
from runs import BARE, last_checkpoint


@pytest.mark.slow
def test_run_in_float64_with_chunked_loss_equals_the_run_without(fit: Command) -> None:
    settings = ["--trainer.precision=64-true", "--trainer.max_steps=5", "--trainer.gradient_clip_val=0.5",
                "--evaluation.eval_freq=1"]  # fmt: skip
    fit("--run=whole", *settings)
    fit("--run=chunks", *settings, "--model.loss_chunk_size=7")
    whole, chunks = (
        read_checkpoint(Path(f"checkpoints/{run}/last.ckpt")) for run in ("whole", "chunks")
    )
    for name, tensor in whole["state_dict"].items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(chunks["state_dict"][name], tensor, atol=1e-12, rtol=1e-9)
    # another run starts with exactly these weights
    fit(
        "--run=again",
        *settings,
        "--init_from=checkpoints/whole",
        "--model.lr=0",
        "--model.warmup_steps=0",
    )
    again = read_checkpoint(Path("checkpoints/again/last.ckpt"))["state_dict"]
    assert all(torch.equal(again[name], tensor) for name, tensor in whole["state_dict"].items())


@pytest.mark.parametrize("chunk", [[], ["--model.loss_chunk_size=10"]])
def test_run_in_float64_keeps_float64_weights(fit: Command, chunk: list[str]) -> None:
    fit("--trainer.max_steps=2", "--trainer.precision=64-true", "--trainer.gradient_clip_val=1",
        *chunk)  # fmt: skip
    weights = read_checkpoint(Path("checkpoints/quickstart/last.ckpt"))["state_dict"].values()
    assert all(weight.dtype == torch.float64 for weight in weights)


def trained(fit: Command, name: str, *arguments: str) -> list[torch.Tensor]:
    fit(f"--run={name}", "--trainer.max_steps=20", "--trainer.max_epochs=-1", *arguments)
    checkpoint = read_checkpoint(Path("checkpoints") / name / "last.ckpt")
    return [tensor.clone() for tensor in checkpoint["state_dict"].values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "module", "function", "exact"),
    [
        (["--model.loss_chunk_size=10"], module, "chunked_cross_entropy", False),
        (["--model.activation_checkpointing=true"], gpt, "checkpoint", True),
    ],
)
def test_twenty_steps_with_the_setting_equal_those_without(
    fit: Command,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    module: ModuleType,
    function: str,
    exact: bool,
) -> None:
    """The setting calls ``function``, which the run without it never calls."""
    settings = ["--model.config.drop_rate=0.1", "--model.warmup_steps=0", "--model.lr=0.0001"]
    called = mock.Mock(side_effect=getattr(module, function))
    monkeypatch.setattr(module, function, called)
    plain = trained(fit, "plain", *settings)
    assert not called.called
    other = trained(fit, "other", *settings, *arguments)
    assert called.call_count >= 20
    for ours, theirs in zip(other, plain, strict=True):
        if exact:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_compiled_blocks_train_as_uncompiled_ones(fit: Command, tmp_path: Path) -> None:
    """Without dropout, for which compiled code draws other random numbers. In a subprocess, because
    torch's compiler gives warnings, which are errors here."""
    settings = ["--model.config.drop_rate=0", "--model.warmup_steps=0", "--model.lr=0.0001"]
    plain = trained(fit, "plain", *settings)
    result = python("-m", "gpt_lightning", "fit", *SMALL_QUICKSTART,
                  "--run=compiled", "--trainer.max_steps=20", "--trainer.max_epochs=-1", *settings,
                  "--model.compile=true", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    compiled = read_checkpoint(Path("checkpoints/compiled/last.ckpt"))["state_dict"]
    for ours, theirs in zip(compiled.values(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


class Record(Callback):
    """Callback that records of each step: number, loss, windows, and the error of the gradient of their mean loss."""

    updates: ClassVar[list[tuple[int, float, list[int], float]]] = []

    def __init__(self) -> None:
        self.updates.clear()
        self.loss: float = 0.0
        self.windows: list[int] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.windows += trainer.train_dataloader.handed_out.tolist()

    def on_before_backward(self, trainer: Any, module: Any, loss: torch.Tensor) -> None:
        self.loss += float(loss.detach())

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        drawn = trainer.datamodule._windows["training"].read(np.array(self.windows))
        ids = torch.from_numpy(drawn)
        parameters = list(module.parameters())
        with torch.enable_grad():
            loss = module.loss((ids[:, :-1], ids[:, 1:]))
            grads = torch.autograd.grad(loss, parameters)
        pairs = zip(grads, parameters, strict=True)
        error = max(float((grad - p.grad).abs().max() / grad.abs().max()) for grad, p in pairs)
        self.updates.append((trainer.global_step, self.loss, self.windows, error))
        self.loss, self.windows = 0.0, []


RECORD = (f"--allow_import={__name__}", f"--trainer.callbacks+={__name__}.Record")


@pytest.mark.slow
def test_steps_are_the_same_with_any_micro_batch(fit: Command) -> None:
    """A run stopped within an epoch may resume with other micro-batches."""

    def run(name: str, batch_size: int, *arguments: str) -> list[Any]:
        fit(*BARE, *RECORD, "--data.global_batch_size=4", "--trainer.max_epochs=2",
            f"--run={name}", f"--data.batch_size={batch_size}", *arguments)  # fmt: skip
        return list(Record.updates)

    whole = run("whole", 4)
    others = [run("small", 1)]
    for name, before, after in [("finer", 4, 2), ("coarser", 1, 4)]:
        others.append(run(name, before, "--trainer.max_steps=4"))
        others[-1] += run(name, after, "--ckpt_path=last")
    assert [step for step, *_ in whole] == list(range(6))  # 15 windows an epoch
    for other in others:
        assert [(u[0], u[2]) for u in other] == [(u[0], u[2]) for u in whole]
        assert [u[1] for u in other] == pytest.approx([u[1] for u in whole], abs=1e-5)
    assert all(error < 1e-4 for updates in (whole, *others) for *_, error in updates)
    for name, value in last_checkpoint("whole")["state_dict"].items():
        for run_name in ("small", "finer", "coarser"):
            other_value = last_checkpoint(run_name)["state_dict"][name]
            torch.testing.assert_close(other_value, value, atol=1e-3, rtol=0)
    for run_name in ("whole", "small", "finer", "coarser"):
        assert last_checkpoint(run_name)["tokens_seen"] == 6 * 4 * 16


def test_last_partial_accumulation_is_a_mean(fit: Command) -> None:
    """Without a global batch: of 7 batches of 2 windows, 4 are a step and 3 remain."""
    fit(*BARE, *RECORD, "--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=4",
        "--trainer.enable_checkpointing=false")  # fmt: skip
    assert [len(windows) for _, _, windows, _ in Record.updates] == [8, 6, 8, 6]
    assert all(error < 1e-4 for *_, error in Record.updates)
    assert all(10.0 < loss < 12.0 for _, loss, _, _ in Record.updates)  # ln V is 10.8
