"""Warnings about settings of a run."""

from unittest import mock

import pytest
import torch

from gpt_lightning import RunConfig
from gpt_lightning.model.gpt import TransformerBlock
from gpt_lightning.training import run, run_warnings
from gpt_lightning.training.schedule import Schedule
from helpers import Command


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], []),
        (["--keep_freed_memory=true"], ["keep_freed_memory"]),
        (["--keep_freed_memory=false"], []),
        (["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=2",
          "--trainer.num_sanity_val_steps=1"],
         ["trainer.val_check_interval", "trainer.check_val_every_n_epoch",
          "trainer.num_sanity_val_steps"]),
        (["--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"], []),
        (["--trainer.num_sanity_val_steps=0"], []),
        (["--model.lr=0.1", "--model.min_lr=0.01"], ["model.min_lr"]),
        (["--model.warmup_steps=0", "--model.lr=0.1", "--model.min_lr=0.01", "--model.decay_steps=1.0"], []),
        (["--model.warmup_steps=0", "--model.lr_schedule=wsd"], ["model.decay_fraction"]),
        (["--model.warmup_steps=0", "--model.lr_schedule=wsd", "--model.decay_fraction=1"], ["model.decay_fraction"]),
        (["--model.warmup_steps=0", "--model.lr_schedule=wsd", "--model.decay_steps=10"], []),
    ],
)  # fmt: skip
def test_settings_without_effect_are_reported(
    fit: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: list[str]
) -> None:
    """Once each. Freed memory cannot be kept, as without glibc."""
    monkeypatch.setattr(run, "keep_freed_memory", lambda: False)
    lines = fit("--trainer.max_steps=1", *arguments).err.splitlines()
    warnings = [line for line in lines if line.startswith("gpt_lightning: ")]
    assert [line.split(": ")[1] for line in warnings] == expected
    assert all("no effect" in line for line in warnings)


@pytest.mark.parametrize(("bf16", "expected"), [(1e9, "8 times slower"), (8e9, ""), (2e10, "")])
def test_slow_bfloat16_on_a_cpu_is_reported(
    fit: Command, monkeypatch: pytest.MonkeyPatch, bf16: float, expected: str
) -> None:
    rates = {torch.float32: 8e9, torch.bfloat16: bf16}
    monkeypatch.setattr(run_warnings, "measured_peak", lambda dtype, size: rates[dtype])
    result = fit("--trainer.max_steps=1", "--trainer.precision=bf16-mixed")
    assert expected in result.err
    assert ("trainer.precision" in result.err) == bool(expected)


@pytest.mark.parametrize("rng", ["step", "global"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_in_compiled_blocks_is_reported(
    fit: Command, monkeypatch: pytest.MonkeyPatch, rng: str, dropout: float
) -> None:
    compiled = mock.Mock()  # compiling takes long
    monkeypatch.setattr(TransformerBlock, "compile", compiled)
    monkeypatch.setattr(run, "_check_compiler", lambda built: None)
    err = fit("--trainer.max_steps=1", "--model.compile=true", "--model.config.drop_rate=0",
              f"--model.config.attn_drop_rate={dropout}", f"--rng={rng}").err  # fmt: skip
    assert ("model.compile: compiled blocks draw other random numbers" in err) == (dropout > 0)
    assert ("not the book's" in err) == (dropout > 0 and rng == "global")
    assert compiled.called


def test_unchunked_loss_on_a_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(keep_freed_memory=False)
    for kind, chunk, output in [("cuda", None, True), ("cuda", 8192, False), ("cpu", None, False)]:
        trainer = mock.Mock(precision="32-true", limit_val_batches=1)
        trainer.strategy.root_device = torch.device(kind)
        config.model = {"loss_chunk_size": chunk}
        found = run_warnings.run_warnings(
            config, trainer, mock.Mock(drop_rate=0), Schedule(1.0), keeps_freed_memory=False
        )
        assert any(line.startswith("model.loss_chunk_size: ") for line in found) == output


@pytest.mark.parametrize(("capability", "slow"), [((7, 5), True), ((8, 0), False)])
def test_slow_bfloat16_on_a_gpu_is_reported(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], slow: bool
) -> None:
    """With the compute capability of a T4."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for precision in ("bf16-mixed", "bf16-true", "16-mixed", "32-true"):
        trainer = mock.Mock(precision=precision)
        trainer.strategy.root_device = torch.device("cuda", 0)
        lines = list(run_warnings.device_warnings(trainer))
        assert len(lines) == (slow and "bf16" in precision)
        for line in lines:
            assert line.startswith("trainer.precision: this GPU (compute capability 7.5)")
            assert line.endswith(f"so {precision} is slow; give 16-mixed")
