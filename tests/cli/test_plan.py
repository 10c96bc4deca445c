"""``plan``: what it prints, writes and refuses."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gpt_lightning.pretrained.weights import read_checkpoint
from helpers import (
    PRETRAIN,
    QUICKSTART,
    ROOT,
    SMALL_QUICKSTART,
    Command,
    plan_as_json,
    python,
)


def test_plan_prints_the_number_of_epochs(command: Command) -> None:
    few = command("plan", *SMALL_QUICKSTART, "--trainer.max_epochs=12").out
    assert "epochs           12 of 7 steps each\n" in few
    many = command(
        "plan", *SMALL_QUICKSTART, "--trainer.max_steps=7756", "--trainer.max_epochs=-1"
    ).out
    assert "epochs           1,108 of 7 steps each; so many passes usually overfit\n" in many


def test_plan_prints_its_result_and_writes_nothing(command: Command) -> None:
    result = command("plan", *SMALL_QUICKSTART, "--trainer.max_steps=10")
    assert (result.code, result.err) == (0, "")
    for part in ("parameters", "MFLOP per token", "Python and libraries", "activations", "fits"):
        assert part in result.out
    assert os.listdir() == []
    found = plan_as_json(command, *SMALL_QUICKSTART, "--trainer.max_steps=10", "--peak_tflops=0.1")
    assert os.listdir() == []
    assert found["total"] == sum(found["memory"].values())
    assert found["tokens_per_step"] == 2 * 16
    assert (found["tokens"], found["steps"]) == (320, 10)
    assert found["hours"] == pytest.approx(320 * found["flops_per_token"] / (0.1e12 * 0.4) / 3600)


def everything_under(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_epochs_of_a_long_text_or_a_store_are_counted_without_writing(command: Command) -> None:
    """From the text, from the tokens that fit cached, and from a manifest."""
    text = Path("long.txt")
    text.write_text("The quick brown fox is 9 years old.\n" * 32_000, encoding="utf-8")
    settings = [*SMALL_QUICKSTART, "--trainer.max_epochs=1", "--data.stride=20000"]
    before = everything_under(Path())
    found = plan_as_json(command, *settings, "--data.text=long.txt")
    assert everything_under(Path()) == before
    assert command("fit", *settings, "--data.text=long.txt").code == 0
    assert Path("cache/tokens").is_dir()
    steps = read_checkpoint(Path("checkpoints/quickstart/last.ckpt"))["global_step"]
    assert (
        command("prepare", "long.txt", "--out=store", "--split=ratio", "--val_ratio=0.9").code == 0
    )
    before = everything_under(Path())
    assert plan_as_json(command, *settings, "--data.text=long.txt")["steps"] == steps
    stored = plan_as_json(command, *settings, "--data.text=store")
    assert everything_under(Path()) == before
    assert (found["steps"], stored["steps"]) == (steps, steps)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("no.txt", b"caf\xe9", "no.txt is not UTF-8"),
        ("store/manifest.json", b'{"format": "gpt_lightning token store 1"}', "is damaged"),
        ("other.txt", b"there", "nowhere.txt does not exist"),
    ],
)
def test_plan_of_an_unreadable_text_prints_the_rest(
    command: Command, name: str, content: bytes, says: str
) -> None:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    text = "nowhere.txt" if name == "other.txt" else name.split("/")[0]
    settings = [*SMALL_QUICKSTART, "--trainer.max_epochs=1", f"--data.text={text}"]
    found = plan_as_json(command, *settings)
    assert (found["steps"], found["total"] > 0) == (None, True)
    assert says in found["notes"]["text"]
    result = command("plan", *settings)
    assert (result.code, result.err) == (0, "")
    assert [line for line in result.out.splitlines() if line.startswith("text ") and says in line]


def test_settings_that_plan_does_not_count_are_named(command: Command) -> None:
    settings = [*SMALL_QUICKSTART, "--trainer.max_steps=1", "--keep_freed_memory=false"]
    assert plan_as_json(command, *settings)["notes"] == {}
    settings += ["--data.document_mask=true", "--model.compile=true"]
    notes = plan_as_json(command, *settings)["notes"]
    assert set(notes) == {"document_mask", "compile"}
    lines = command("plan", *settings).out.splitlines()
    for name, line in notes.items():
        assert any(each.startswith(name) and each.endswith(line) for each in lines)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_plan_of_a_model_of_6_gigabytes_needs_less_than_one(
    plan_benchmark: ModuleType, tmp_path: Path
) -> None:
    result = python(
        "-c", plan_benchmark.CHILD, "plan", f"--config={ROOT}/configs/gpt2.yaml",
        "--init_from=gpt2-1558M", "--gpu=H100", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found, peak = result.stdout.splitlines()
    assert json.loads(found)["memory"]["weights"] > 6e9
    assert int(peak) < 1e9
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--devices=0"], "devices: 0 is out of range"),
        (["--train_tokens=-5"], "train_tokens: -5 is out of range"),
        (["--peak_tflops=0"], "peak_tflops: 0.0 is out of range"),
        (["--device_memory_gb=.inf"], "device_memory_gb: inf is not a finite number"),
        (["--mfu=2"], "mfu: 2.0 is not a share"),
        (["--device_memory_gb=none"], "device_memory_gb"),
        (["--gpu=H1000"], "did you mean H100?"),
        (["--trainer.strategy=deepspeed"], "to shard the model, give --config configs/fsdp.yaml"),
        (["--trainer.precision=transformer-engine"], "trainer.precision: plan does not know"),
        (["--trainer.accelerator=tpu"], "trainer.accelerator: tpu is unknown"),
        (["--data.context_length=4096"], "data.context_length: 4096 is more than the model's"),
        (["--model.loss_chunk_size=0"], "model.loss_chunk_size: 0 is too small"),
        (["--model.config.n_heads=3"], "is not divisible by n_heads 3"),
        (["--mdoel.lr=1"], "did you mean model.lr?"),
        (["--init_from=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    command: Command, arguments: list[str], says: str
) -> None:
    result = command("plan", QUICKSTART, *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("gpt_lightning: error: ")
    assert result.err.count("\n") == 1
    assert says in result.err
    assert os.listdir() == []


def test_fit_and_plan_name_the_same_nearest_batch(command: Command) -> None:
    settings = [*SMALL_QUICKSTART]
    for batch, nearest in (("size=5", "6"), ("tokens=100", "96"), ("tokens=80", "96")):
        arguments = [*settings, f"--data.global_batch_{batch}"]
        errors = command("fit", *arguments).error, command("plan", *arguments).error
        assert errors[0].rstrip().endswith(nearest)
        assert errors[1] == errors[0]


def test_fit_and_plan_refuse_accumulation_that_contradicts_the_global_batch(
    command: Command,
) -> None:
    arguments = [*SMALL_QUICKSTART, "--data.global_batch_size=4",
                 "--trainer.accumulate_grad_batches=3"]  # fmt: skip
    errors = command("fit", *arguments).error, command("plan", *arguments).error
    assert errors[0].startswith(
        "gpt_lightning: error: trainer.accumulate_grad_batches: 3 contradicts"
    )
    assert errors[1] == errors[0]


def test_nearest_batch_has_at_most_all_windows(command: Command) -> None:
    arguments = [*SMALL_QUICKSTART, "--data.stride=130", "--data.global_batch_size=5"]
    assert (
        plan_as_json(command, *arguments[:-1], "--trainer.max_epochs=1", "--data.batch_size=1")[
            "steps"
        ]
        == 5
    )
    assert command("fit", *arguments).err.rstrip().endswith("the nearest that can is 4")


def test_batch_that_does_not_divide_the_global_batch_is_refused(command: Command) -> None:
    result = command("plan", f"--config={PRETRAIN}", "--gpu=H100", "--data.batch_size=24")
    assert result.code == 2
    assert (
        "data.global_batch_tokens: 524288 cannot be split over 1 device(s) with a batch_size of 24; "
        "the nearest that can is 516096" in result.err
    )
