"""Checkpoints that a run keeps at intervals: their names, which of them stay, kills, resume."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from forked_runs import Runs, Stop
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.storage.checksum import sha256_of
from gpt_lightning.training.checkpoint_io import corruption_reason, read_manifest, step_checkpoints
from gpt_lightning.training.run_files import read_rows
from gpt_lightning.training.verify_resume import compare_checkpoints
from helpers import SMALL_QUICKSTART, Command, assert_refused, plan_as_json
from runs import BARE, RUN

EVERY_STEP = "--trainer.log_every_n_steps=1"
ENDLESS = "--trainer.max_epochs=-1"
EVERY = "--checkpoint.keep_every_n_train_steps"
LIMIT = "--checkpoint.max_to_keep"
DROPOUT = "--model.config.drop_rate=0.1"


def kept(folder: Path = RUN) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def assert_intact(folder: Path = RUN) -> None:
    """All checkpoints are what the manifest recorded, and those of steps are of their step."""
    entries = read_manifest(folder)
    assert entries
    files = list(folder.glob("*.ckpt"))
    assert files
    assert [corruption_reason(path, entries) for path in files] == [""] * len(files)
    for step, path in step_checkpoints(folder).items():
        assert read_checkpoint(path)["global_step"] == step
        assert any(e["file"] == path.name and e["sha256"] == sha256_of(path) for e in entries)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_the_newest_checkpoints_are_kept(fit: Command, asynchronous: str) -> None:
    fit(*BARE, ENDLESS, "--trainer.max_steps=20", f"{EVERY}=2", f"{LIMIT}=3",
        "--evaluation.eval_freq=8", "--checkpoint.save_best=true",
        f"--checkpoint.async_save={asynchronous}")  # fmt: skip
    assert kept() == ["step-000016.ckpt", "step-000018.ckpt", "step-000020.ckpt"]
    assert_intact()
    assert (RUN / "last.ckpt").samefile(RUN / "step-000020.ckpt")  # no second copy on the disk
    assert len(json.loads((RUN / "manifest.json").read_text())["checkpoints"]) <= 8


def test_without_a_limit_all_are_kept_and_recorded(fit: Command) -> None:
    arguments = [*BARE, ENDLESS, f"{EVERY}=2"]
    fit(*arguments, "--trainer.max_steps=20")
    fit(*arguments, "--trainer.max_steps=23", "--ckpt_path=last")
    assert kept() == [f"step-{step:06d}.ckpt" for step in range(2, 23, 2)]
    assert_intact()


def test_a_kept_checkpoint_resumes_to_the_same_bits(fit: Command, command: Command) -> None:
    arguments = [
        *BARE,
        DROPOUT,
        EVERY_STEP,
        ENDLESS,
        "--trainer.max_steps=16",
        f"{EVERY}=3",
        f"{LIMIT}=3",
    ]
    fit(*arguments)
    assert kept() == ["step-000009.ckpt", "step-000012.ckpt", "step-000015.ckpt"]
    shutil.copytree(RUN, "straight")
    fit(*arguments, "--ckpt_path=checkpoints/quickstart/step-000009")
    for name in ("last.ckpt", *kept()):
        compared = compare_checkpoints(Path("straight", name), RUN / name)
        assert not [part.difference for part in compared if part.difference]
    rows = [[(row["step"], row["lr"], row["train/loss"]) for row in read_rows(f / "metrics.csv")
             if "lr" in row] for f in (Path("straight"), RUN)]  # fmt: skip
    assert rows[0] == rows[1]
    assert kept() == kept(Path("straight"))
    assert_intact()

    path = RUN / "step-000009.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # other names of the file keep its content
    path.write_bytes(content)
    result = command(
        "fit", *SMALL_QUICKSTART, *arguments, "--ckpt_path=checkpoints/quickstart/step-000009.ckpt"
    )
    assert_refused(result, "step-000009.ckpt", "is damaged")


def test_checkpoints_that_an_earlier_resume_leaves_behind_go_first(fit: Command) -> None:
    arguments = [*BARE, ENDLESS, f"{EVERY}=2"]
    fit(*arguments, "--trainer.max_steps=10")
    fit(
        *arguments,
        f"{LIMIT}=3",
        "--trainer.max_steps=5",
        "--ckpt_path=checkpoints/quickstart/step-000002",
    )
    assert kept() == ["step-000002.ckpt", "step-000004.ckpt", "step-000010.ckpt"]
    assert_intact()
    fit(*arguments, f"{LIMIT}=3", "--trainer.max_steps=7", "--ckpt_path=last")
    assert kept() == ["step-000002.ckpt", "step-000004.ckpt", "step-000006.ckpt"]
    assert_intact()


def test_the_best_checkpoint_of_steps_that_are_left_out_is_not_called_the_best(
    fit: Command,
) -> None:
    arguments = [*BARE, ENDLESS, "--checkpoint.save_best=true", f"{EVERY}=5", "--model.lr=1e-3"]
    fit(*arguments, "--trainer.max_steps=10", "--evaluation.eval_freq=3")
    later = read_checkpoint(RUN / "best.ckpt")["global_step"]
    assert later > 5
    from_step = "--ckpt_path=checkpoints/quickstart/step-000005"
    result = fit(*arguments, "--trainer.max_steps=6", "--evaluation.eval_freq=100", from_step)
    assert (
        f"best.ckpt: is of step {later - 1}, and the run continues from step 5; it st" in result.err
    )
    assert read_checkpoint(RUN / "best.ckpt")["global_step"] == later
    assert "the lowest at an evaluation" not in result.err
    result = fit(*arguments, "--trainer.max_steps=10", "--evaluation.eval_freq=3", from_step)
    assert read_checkpoint(RUN / "best.ckpt")["global_step"] == later
    assert f"best.ckpt: step {later - 1}," in result.err


@pytest.fixture(scope="module")
def straight(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not killed."""
    folder = tmp_path_factory.mktemp("straight")
    assert runs.run(folder, KILLED) == 0
    return folder / "checkpoints/r"


KILLED = ["fit", *SMALL_QUICKSTART, *BARE, DROPOUT, "--run=r", ENDLESS, "--trainer.max_steps=8",
          f"{EVERY}=2", f"{LIMIT}=2"]  # fmt: skip


@pytest.mark.parametrize(
    ("point", "left"),
    [
        pytest.param("save:written", [2, 4], marks=pytest.mark.slow),
        pytest.param("save:manifest", [2, 4], marks=pytest.mark.slow),
        ("save:replaced", [2, 4]),
        ("save:named", [2, 4, 6]),
    ],
)
def test_a_kill_at_any_moment_leaves_valid_files(
    runs: Runs, straight: Path, tmp_path: Path, point: str, left: list[int]
) -> None:
    """The oldest one stays until the new one has its name; a resumed run gives it the name that a kill prevented."""
    assert runs.run(tmp_path, KILLED, Stop(signal.SIGKILL, point, 6)) == -signal.SIGKILL
    folder = tmp_path / "checkpoints/r"
    assert sorted(step_checkpoints(folder)) == left
    assert_intact(folder)
    assert runs.run(tmp_path, [*KILLED, "--ckpt_path=auto"]) == 0
    assert kept(folder) == kept(straight) == ["step-000006.ckpt", "step-000008.ckpt"]
    assert_intact(folder)
    for name in kept(folder):
        compared = compare_checkpoints(straight / name, folder / name)
        assert not [part.difference for part in compared if part.difference]
    assert not list(folder.glob(".*.tmp"))


def test_plan_counts_them(command: Command) -> None:
    arguments = [*SMALL_QUICKSTART, ENDLESS, "--trainer.max_steps=20"]
    without = plan_as_json(command, *arguments)
    for settings, count in (([], 6), ([f"{LIMIT}=4"], 4)):
        plan = plan_as_json(command, *arguments, f"{EVERY}=3", *settings)
        assert plan["disk"] == without["disk"] + count * plan["checkpoint"]


def test_the_disk_must_have_space_for_all_of_them(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_as_json(command, *SMALL_QUICKSTART)
    usage = shutil.disk_usage(".")
    free = usage._replace(free=round(8.5 * plan["checkpoint"]))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    arguments = ["fit", *SMALL_QUICKSTART, ENDLESS, "--trainer.max_steps=20", f"{EVERY}=2"]
    result = command(*arguments)  # ten, last, previous, best, and the one that is written
    assert_refused(result, "for 14 files of", "a smaller --checkpoint.max_to_keep")
    assert not RUN.exists()
    assert command(*arguments, f"{LIMIT}=4", "--trainer.max_steps=1").code == 0
