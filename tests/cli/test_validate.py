"""``validate``: of which weights, on which text, with any batch size."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gpt_lightning import GPTLightningModule
from helpers import QUICKSTART, SMALL, Command, python


def test_validate_does_not_depend_on_the_batch_size(fit: Command, command: Command) -> None:
    fit("--trainer.max_steps=3", "--data.stride=160")
    config = "--config=checkpoints/quickstart/config.yaml"
    results = []
    for batch_size in (1, 7):
        result = command(
            "validate", config, "--init_from=checkpoints/quickstart", "--json",
            f"--data.batch_size={batch_size}",
        )  # fmt: skip
        assert result.code == 0, result.err
        results.append(json.loads(result.out))
    assert {"train_loss", "val_loss", "train_perplexity", "val_perplexity"} <= set(results[0])
    assert results[0]["val_tokens"] % 16 == 0
    for key, value in results[0].items():
        same = value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
        assert results[1][key] == same
    assert command("validate", config).code == 2
    result = command("validate", config, "--ckpt_path=best")
    lines = [line.split() for line in result.out.splitlines()]
    assert [line[0] for line in lines] == ["weights", "text", "training", "validation"]
    assert lines[0][1] == "checkpoints/quickstart/best.ckpt"
    result = command(
        "validate", config, "--ckpt_path=last", "--json", "--trainer.precision=bf16-true"
    )
    assert json.loads(result.out)["val_tokens"] == results[0]["val_tokens"]
    assert json.loads(result.out)["val_loss"] == pytest.approx(results[0]["val_loss"], rel=1e-2)


def test_validate_without_a_config_measures_the_runs_own_text(
    fit: Command, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "my.txt").write_text("A text of its own, line by line. " * 60, encoding="utf-8")
    fit("--trainer.max_steps=2", "--data.text=my.txt", "--data.stride=23", "--data.train_ratio=0.6")
    config = "--config=checkpoints/quickstart/config.yaml"
    expected = json.loads(command("validate", config, "--ckpt_path=last", "--json").out)
    assert (expected["text"], expected["stride"], expected["context_length"]) == ("my.txt", 23, 16)
    for source in (
        "--init_from=checkpoints/quickstart",
        "--init_from=checkpoints/quickstart/last.ckpt",
        "--ckpt_path=checkpoints/quickstart/last.ckpt",
    ):
        found = json.loads(command("validate", source, "--json").out)
        assert found == expected
    found = json.loads(command("validate", "--ckpt_path=last", "--run=quickstart", "--json").out)
    assert found == expected
    # given settings have priority
    other = json.loads(
        command("validate", "--ckpt_path=last", "--run=quickstart", "--json", "--data.text=sample",
                "--data.train_ratio=0.9").out
    )  # fmt: skip
    assert (other["text"], other["stride"]) == ("sample", 23)
    assert other["val_windows"] > expected["val_windows"]


def test_validate_measures_the_given_run(fit: Command, command: Command) -> None:
    fit("--trainer.max_steps=1", "--data.stride=160")
    fit("--run=new", "--data.stride=160", "--init_from=checkpoints/quickstart", "--trainer.max_steps=9", "--model.lr=0.1",
        "--model.warmup_steps=0")  # fmt: skip
    config = "--config=checkpoints/new/config.yaml"
    assert Path("checkpoints/new/config.yaml").read_text().startswith("# started with --init_from")

    def val_loss(*arguments: str) -> float:
        return float(json.loads(command("validate", config, "--json", *arguments).out)["val_loss"])

    last = val_loss("--ckpt_path=last")
    assert last == val_loss("--init_from=checkpoints/new")
    assert last != val_loss("--init_from=checkpoints/quickstart")


def test_interrupted_validation(command: Command, fit: Command) -> None:
    fit("--trainer.max_steps=1")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    config = QUICKSTART
    with mock.patch.object(GPTLightningModule, "validation_step", interrupt):
        result = command("validate", config, *SMALL, "--ckpt_path=last")
    assert result.code == 130
    assert result.err.splitlines()[-1] == "gpt_lightning: interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
def test_two_processes_validate_a_number_of_windows_that_does_not_divide(
    fit: Command, tmp_path: Path, batch_size: int
) -> None:
    """With 15 windows one rank has one batch less, or a shorter one; the losses equal those of one process."""
    fit("--trainer.max_steps=2")
    validate = ("-m", "gpt_lightning", "validate", "--config=checkpoints/quickstart/config.yaml",
                "--ckpt_path=last", "--json", f"--data.batch_size={batch_size}")  # fmt: skip
    two = python(*validate, "--trainer.devices=2", "--trainer.strategy=ddp", cwd=tmp_path, timeout=100)  # fmt: skip
    one = python(*validate, cwd=tmp_path, timeout=100)
    assert two.returncode == one.returncode == 0, two.stderr
    results = [json.loads(result.stdout) for result in (one, two)]
    assert results[0]["train_tokens"] == 15 * 16
    assert results[1] == pytest.approx(results[0], abs=1e-6)
