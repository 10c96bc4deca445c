"""Resume with damaged or missing files: the previous checkpoint, or one line that says why not."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.storage.checksum import MANIFEST
from gpt_lightning.training.resume import latest_valid_checkpoint
from helpers import (
    SMALL_QUICKSTART,
    Command,
)
from runs import (
    RUN,
    same_bits,
    small_checkpoint,
)


def test_run_that_failed_before_its_first_checkpoint_starts_with_auto(
    command: Command, fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*SMALL_QUICKSTART, "--trainer.max_steps=1")
    result = command("fit", *arguments, "--allow_import=callbacks",
                   "--trainer.callbacks+=callbacks.HoldsAPath")  # fmt: skip
    assert result.code == 2
    result = command("fit", *arguments)
    assert "--ckpt_path auto starts it again" in result.err
    assert "--ckpt_path auto to start it" in command("fit", *arguments, "--ckpt_path=last").err
    fit("--trainer.max_steps=1", "--ckpt_path=auto")
    fit("--trainer.max_steps=2", "--ckpt_path=auto")
    assert read_checkpoint(latest_valid_checkpoint(RUN))["global_step"] == 2


def test_leftovers_of_a_killed_save_are_removed(fit: Command) -> None:
    fit("--trainer.max_steps=1")
    for name in (".last.ckpt.tmp", ".best.ckpt.tmp", ".previous.ckpt.tmp", ".manifest.json.tmp"):
        (RUN / name).write_bytes(b"half of it")
    fit("--trainer.max_steps=2", "--ckpt_path=last")
    assert not list(RUN.glob(".*"))


def test_previous_checkpoint_is_used_if_the_last_is_damaged(fit: Command) -> None:
    fit("--trainer.max_steps=6", "--checkpoint.every_n_train_steps=2", "--run=whole")
    fit("--trainer.max_steps=4", "--checkpoint.every_n_train_steps=2")
    manifest = json.loads((RUN / MANIFEST).read_text())["checkpoints"]
    assert {entry["file"]: entry["step"] for entry in manifest}["last.ckpt"] == 4
    assert {"bytes", "sha256", "step", "saved", "versions", "config_sha256"} <= manifest[0].keys()
    content = bytearray((RUN / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 4
    (RUN / "last.ckpt").write_bytes(content)
    result = fit("--trainer.max_steps=6", "--checkpoint.every_n_train_steps=2", "--ckpt_path=last")
    output = [line for line in result.err.splitlines() if "is damaged" in line]
    assert len(output) == 1
    assert "its SHA-256 is not what manifest.json recorded" in output[0]
    assert "resuming from checkpoints/quickstart/previous.ckpt instead" in output[0]
    for name in ("last.ckpt", "previous.ckpt"):
        ours, whole = read_checkpoint(RUN / name), read_checkpoint(RUN.parent / "whole" / name)
        assert same_bits(ours["state_dict"], whole["state_dict"])
        assert same_bits(ours["optimizer_states"], whole["optimizer_states"])


def test_damaged_manifest_is_reported_and_not_used(fit: Command) -> None:
    fit("--trainer.max_steps=1")
    (RUN / MANIFEST).write_text('{"checkpoints": [{"file": 3}]}')
    result = fit("--trainer.max_steps=2", "--ckpt_path=last")
    assert "manifest.json: is damaged" in result.err
    assert read_checkpoint(latest_valid_checkpoint(RUN))["global_step"] == 2


def test_damaged_manifest_is_rebuilt(fit: Command) -> None:
    fit(
        "--trainer.max_steps=4",
        "--checkpoint.every_n_train_steps=2",
        "--checkpoint.save_best=false",
    )
    (RUN / MANIFEST).write_text("[" * 200_000)
    fit("--trainer.max_steps=5", "--checkpoint.save_best=false", "--ckpt_path=last")
    (RUN / "last.ckpt").write_bytes(b"x")
    assert latest_valid_checkpoint(RUN).name == "previous.ckpt"


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["state_dict"].popitem(),
        lambda c: c["state_dict"].update({"model.final_norm.bias": torch.ones(3)}),
        lambda c: c.update(state_dict=None),
        lambda c: c.update(loops={}),
        lambda c: c.update(loops=3),
        lambda c: c.update(optimizer_states=[{}]),
        lambda c: c.update(callbacks=[1]),
        lambda c: c.pop("global_step"),
        lambda c: c.update(global_step="a"),
        lambda c: c.pop("pytorch-lightning_version"),
        lambda c: c["hyper_parameters"]["config"].update(emb_dim=2 * 10**9),
        lambda c: c["hyper_parameters"]["config"].update(vocab_size=10**9),
        lambda c: c["hyper_parameters"]["config"].update(n_layers=10**6),
    ],
)
def test_checkpoint_that_contradicts_itself_is_refused(
    command: Command, change: Callable[[Any], None]
) -> None:
    checkpoint = small_checkpoint(1)
    change(checkpoint)
    torch.save(checkpoint, "x.ckpt")
    Path("mine.yaml").write_text("data:\n  text: sample\n")
    result = command("fit", "--config=mine.yaml", "--ckpt_path=x.ckpt", "--trainer.accelerator=cpu")
    assert result.code == 2, result.err
    assert result.error.count("\n") == 1, result.err
    assert "x.ckpt" in result.err
    assert sorted(os.listdir()) == ["mine.yaml", "x.ckpt"]
