"""``fit``: its switches, its configuration, and what it refuses before the first step."""

import json
import os
from enum import StrEnum
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from helpers import (
    QUICKSTART,
    SMALL_QUICKSTART,
    Command,
    python,
)
from runs import (
    losses,
    same_weights,
)


def test_saved_configuration_repeats_the_run(fit: Command, command: Command) -> None:
    fit("--trainer.max_steps=3")
    result = command("fit", "--config=checkpoints/quickstart/config.yaml", "--run=again")
    assert result.code == 0, result.err
    assert same_weights("checkpoints/quickstart/last.ckpt", "checkpoints/again/last.ckpt")


def test_run_without_logger_and_progress_bar(fit: Command) -> None:
    fit("--trainer.max_steps=1", "--trainer.logger=false", "--trainer.enable_progress_bar=false")
    assert not list(Path("checkpoints/quickstart").glob("events*"))


def test_fast_dev_run_writes_nothing(fit: Command) -> None:
    assert fit("--trainer.fast_dev_run=2").out.startswith("Ep 1 (Step 000000)")
    assert not Path("checkpoints").exists()


def test_run_without_checkpoints(fit: Command) -> None:
    fit("--trainer.max_steps=2", "--trainer.enable_checkpointing=false")
    assert not list(Path("checkpoints/quickstart").glob("*.ckpt"))


class Kind(StrEnum):
    SLOW = "slow"
    FAST = "fast"


class OfAKind(Callback):
    def __init__(self, kind: Kind = Kind.FAST, by_name: str = Kind.FAST) -> None:
        assert kind == Kind.FAST


def test_default_that_is_an_enum_is_saved_in_the_configuration(fit: Command) -> None:
    """Timer's interval is an enum where a string is expected; the saved configuration starts another run."""
    fit("--trainer.max_steps=1", "--trainer.callbacks+=lightning.pytorch.callbacks.Timer",
        "--trainer.callbacks.duration=00:00:05:00", f"--allow_import={__name__}",
        f"--trainer.callbacks+={__name__}.OfAKind")  # fmt: skip
    config = Path("checkpoints/quickstart/config.yaml")
    text = config.read_text(encoding="utf-8")
    assert all(line in text for line in ("interval: step\n", "kind: FAST\n", "by_name: fast\n"))
    fit(f"--config={config}", "--run=again", "--trainer.max_steps=1", f"--allow_import={__name__}")


@pytest.mark.slow
def test_compiling_without_a_compiler_is_refused(tmp_path: Path) -> None:
    result = python("-m", "gpt_lightning", "fit", *SMALL_QUICKSTART,
                  "--model.compile=true", cwd=tmp_path, env={**os.environ, "CXX": "/nonexistent/g++"})  # fmt: skip
    assert result.returncode == 2
    first, line = result.stderr.splitlines()
    assert first.startswith("fit: new run quickstart, ")
    assert line.startswith("gpt_lightning: error: model.compile: ")
    assert "/nonexistent/g++" in line
    assert not (tmp_path / "checkpoints").exists()


def test_precision_without_its_package_is_refused(command: Command) -> None:
    result = command(
        "fit",
        *SMALL_QUICKSTART,
        "--trainer.precision=transformer-engine",
    )
    assert result.code == 2
    assert result.error.startswith("gpt_lightning: error: trainer: ")
    assert result.error.count("\n") == 1


@pytest.mark.slow
def test_overfit_batches_repeats_the_same_windows(fit: Command) -> None:
    fit("--trainer.overfit_batches=1", "--model.config.emb_dim=16", "--trainer.max_epochs=60", "--model.config.drop_rate=0",
        "--model.lr=0.02", "--evaluation.eval_freq=59", "--evaluation.prompt=null",
        "--trainer.callbacks+=gpt_lightning.training.verify_resume.WindowRecorder",
        "--trainer.callbacks.folder=.")  # fmt: skip
    seen = [json.loads(line)[2] for line in Path("windows-0.jsonl").read_text().splitlines()]
    assert seen == [[0, 1]] * 60
    first, last = (float(row[2]) for row in losses("quickstart"))
    assert last < 0.1 < 5 < first


def test_limit_without_a_complete_step_is_refused(command: Command) -> None:
    result = command("fit", *SMALL_QUICKSTART, "--data.global_batch_size=4",
                   "--trainer.limit_train_batches=0.01", "--trainer.max_steps=1")  # fmt: skip
    assert (result.code, result.error.count("\n")) == (2, 1)
    assert "trainer.limit_train_batches: 0.01 leaves none of the" in result.err


def test_store_without_validation_is_refused_alone_but_not_in_a_mixture(
    fit: Command, command: Command, tmp_path: Path
) -> None:
    """The error names the remedy."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"{i} one two three " * 20}) for i in range(20)))
    assert command("prepare", str(rows), "--out=store", "--val_ratio=0").code == 0
    fit("--trainer.max_steps=1", '--data.mixture={"store": 0.5, "sample": 0.5}')
    result = command("fit", QUICKSTART, "--data.text=store", "--run=alone")
    assert result.code == 2
    assert "prepare it again with more in that split (--val_ratio)" in result.err.splitlines()[-1]
    result = command(
        "fit",
        QUICKSTART,
        '--data.mixture={"store": 1}',
        "--run=alone",
    )
    assert result.code == 2
    assert "none of its stores has a validation split" in result.err.splitlines()[-1]


def test_profiler_measures(fit: Command) -> None:
    result = fit("--trainer.max_steps=2", "--trainer.profiler=simple")
    assert result.err.count("[Callback]SkipBadSteps.on_before_optimizer_step") == 1
