"""Checkpoints that a crash, a full disk or a flipped bit cannot take away."""

import json
import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import Command, python
from lightning.pytorch import Callback
from safetensors.torch import save_file

from gpt_lightning.data import token_cache, tokenizer
from gpt_lightning.pretrained.load import read_weights
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.storage.checksum import MANIFEST, write_manifest
from gpt_lightning.training.checkpoint_io import (
    AtomicCheckpointIO,
    check_content,
    corruption_reason,
    read_manifest,
)
from gpt_lightning.training.resume import checkpoint_to_resume, latest_valid_checkpoint
from gpt_lightning.training.verify_resume import compare_checkpoints

RUN = Path("checkpoints/quickstart")


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return bool(a == b)


def small_checkpoint(step: int) -> dict[str, Any]:
    """All that a checkpoint of ours has, with few numbers in it."""
    torch.manual_seed(step)
    config = {"vocab_size": 40, "context_length": 4, "emb_dim": 8, "n_heads": 2, "n_layers": 1,
              "drop_rate": 0.0, "qkv_bias": False, "tied_embeddings": False}  # fmt: skip
    from gpt_lightning import GPTConfig, GPTModel

    weights = {f"model.{n}": t for n, t in GPTModel(GPTConfig(**config)).state_dict().items()}
    moments = {i: {"exp_avg": torch.randn_like(t)} for i, t in enumerate(weights.values())}
    return {
        "state_dict": weights,
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"config": config},
        "global_step": step,
        "tokens_seen": 4 * step,
        "epoch": 0,
        "pytorch-lightning_version": "2.6.6",
        "loops": {"fit_loop": {}},
        "callbacks": {},
        "lr_schedulers": [],
    }


# --- a crash at every point of a save -------------------------------------------------------------

_CRASHES = """
import os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_durability import same_bits, small_checkpoint
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training import checkpoint_io as module
from gpt_lightning.training.resume import latest_valid_checkpoint

folder = Path(sys.argv[1])
old, new = small_checkpoint(1), small_checkpoint(2)
best = {"also_named": "best.ckpt"}

def dying_at(point):
    passed = []
    def pass_by(name):
        passed.append(name)
        if len(passed) == point:
            print(name, flush=True)
            os._exit(137)
    def around(holder, name):
        real = getattr(holder, name)
        def wrapped(*arguments):
            pass_by(f"before {name}")
            result = real(*arguments)
            pass_by(f"after {name}")
            return result
        setattr(holder, name, wrapped)
    for name in ("fsync", "replace", "link"):
        around(module.os, name)
    real_write = module._HashingFile.write
    def write(self, data):
        half = bytes(data)[: len(data) // 2]
        if len(data) > 500:
            self._file.write(half)
            pass_by("half-way through a write")
            self._file.seek(-len(half), 1)
        return real_write(self, data)
    module._HashingFile.write = write

point = 0
while True:
    point += 1
    run = folder / str(point)
    io = module.AtomicCheckpointIO()
    for step, options in ((0, best), (1, None)):
        io.save_checkpoint(small_checkpoint(step), run / "last.ckpt", options)
    child = os.fork()
    if not child:
        dying_at(point)
        io.save_checkpoint(new, run / "last.ckpt", best)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = latest_valid_checkpoint(run)
    state = read_checkpoint(found)
    whole = same_bits(state, old) or same_bits(state, new)
    assert whole and found.name == "last.ckpt", (point, found)
    assert not code or same_bits(read_checkpoint(run / "last.ckpt"), state)
    # best.ckpt is never ahead of last.ckpt
    kept = read_checkpoint(run / "best.ckpt")
    assert same_bits(kept, small_checkpoint(0)) or same_bits(kept, state), point
    assert code or same_bits(kept, new)
    # the next save goes on from whatever was left, and leaves nothing over
    module.remove_leftovers(run)
    later = module.AtomicCheckpointIO()
    later.load_checkpoint(found)
    later.save_checkpoint(small_checkpoint(3), run / "last.ckpt")
    assert same_bits(read_checkpoint(latest_valid_checkpoint(run)), small_checkpoint(3))
    assert same_bits(read_checkpoint(run / "previous.ckpt"), state)
    assert same_bits(read_checkpoint(run / "best.ckpt"), kept)
    for name in ("previous.ckpt", "best.ckpt"):
        assert module.corruption_reason(run / name, module.read_manifest(run)) == ""
    names = {"last.ckpt", "previous.ckpt", "best.ckpt", "manifest.json"}
    assert {p.name for p in run.iterdir()} == names
    if code == 0:
        break
    assert code == 137
print(point - 1, "points")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_crash_at_any_point_of_a_save(tmp_path: Path) -> None:
    done = python("-c", _CRASHES, str(tmp_path), str(Path(__file__).parent))
    assert done.returncode == 0, done.stderr
    *points, count = done.stdout.splitlines()
    assert int(count.split()[0]) == len(points) >= 20
    for name in ("half-way through a write", "before fsync", "after fsync", "before replace",
                 "after replace", "before link", "after link"):  # fmt: skip
        assert name in points


def test_order_is_write_sync_record_rename_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def name_of(what: Any) -> str:
        """Of a path, or of what an open file's number stands for."""
        if not isinstance(what, int):
            return Path(what).name
        there = (tmp_path, *tmp_path.iterdir())
        return next(p.name for p in there if os.path.samestat(p.stat(), os.fstat(what)))

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def noted(what: Any, *rest: Any) -> Any:
            order.append(f"{name} {name_of(what)}")
            return real(what, *rest)

        return noted

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noting(name, getattr(os, name)))
    AtomicCheckpointIO().save_checkpoint(small_checkpoint(1), tmp_path / "last.ckpt")
    assert order[:6] == [
        "fsync .last.ckpt.tmp", "fsync .manifest.json.tmp", "replace .manifest.json.tmp",
        f"fsync {tmp_path.name}", "replace .last.ckpt.tmp", f"fsync {tmp_path.name}",
    ]  # fmt: skip


# --- a full disk ----------------------------------------------------------------------------------

_FILLING = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_durability import same_bits, small_checkpoint
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training.checkpoint_io import AtomicCheckpointIO
from gpt_lightning.training.resume import latest_valid_checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = Path(sys.argv[1])
io = AtomicCheckpointIO(async_save=sys.argv[3] == "asynchronous")
io.save_checkpoint(small_checkpoint(1), run / "last.ckpt")
io.finish()
size = (run / "last.ckpt").stat().st_size
for point in range(30):
    resource.setrlimit(resource.RLIMIT_FSIZE, (point * size // 30, resource.RLIM_INFINITY))
    io.save_checkpoint(small_checkpoint(2), run / "last.ckpt")
    io.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    failure = io.failures.pop("last.ckpt", None)
    assert "last.ckpt: cannot be written" in str(failure), (point, failure)
    assert same_bits(read_checkpoint(latest_valid_checkpoint(run)), small_checkpoint(1)), point
    assert {p.name for p in run.iterdir()} == {"last.ckpt", "manifest.json"}, point
io.save_checkpoint(small_checkpoint(2), run / "last.ckpt")
io.finish()
assert not io.failures
assert same_bits(read_checkpoint(latest_valid_checkpoint(run)), small_checkpoint(2))
"""


@pytest.mark.parametrize("way", ["at once", "asynchronous"])
def test_a_disk_full_at_thirty_points(tmp_path: Path, way: str) -> None:
    done = python("-c", _FILLING, str(tmp_path), str(Path(__file__).parent), way)
    assert done.returncode == 0, done.stderr


class FullDisk(Callback):
    """The second save fails, as on a full disk."""

    failing_save = 2

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        io = trainer.strategy.checkpoint_io
        real, saves = io._write, []

        def write(checkpoint: Any, path: Path) -> None:
            saves.append(path)
            if len(saves) == self.failing_save:
                raise OSError(28, "No space left on device")
            real(checkpoint, path)

        io._write = write


FULL_DISK = ("--allow_import=test_durability", "--trainer.callbacks+=test_durability.FullDisk",
             "--checkpoint.save_best=false", "--checkpoint.every_n_train_steps=1")  # fmt: skip


class StopAfterTwoEpochs(Callback):
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 1


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_the_last_save_is_tried_again_at_the_end(fit: Command, asynchronous: str) -> None:
    """The second epoch's save fails, and the run is ended there by something that has no step."""
    arguments = [a for a in FULL_DISK if "every_n" not in a]
    fit("--trainer.max_epochs=9", f"--checkpoint.async_save={asynchronous}", *arguments,
        "--trainer.callbacks+=test_durability.StopAfterTwoEpochs")  # fmt: skip
    assert read_checkpoint(latest_valid_checkpoint(RUN))["global_step"] == 14


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_checkpoint_that_was_not_saved_is_not_the_best(
    fit: Command, asynchronous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All losses are the same, so that the first one is the lowest; its save fails."""
    monkeypatch.setattr(FullDisk, "failing_save", 1)
    fit("--trainer.max_steps=4", *FULL_DISK, "--checkpoint.save_best=true", "--model.lr=0",
        f"--checkpoint.async_save={asynchronous}", "--evaluation.eval_freq=1")  # fmt: skip
    assert read_checkpoint(RUN / "best.ckpt")["global_step"] == 2
    assert read_checkpoint(RUN / "last.ckpt")["global_step"] == 4


@pytest.mark.parametrize("has_links", [True, False])
def test_best_stays_when_last_is_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    def link(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", link)
    io, last, best = AtomicCheckpointIO(), tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    io.save_checkpoint(small_checkpoint(1), last, {"also_named": "best.ckpt"})
    assert best.samefile(last) == has_links
    for step in (2, 3, 4):
        io.save_checkpoint(small_checkpoint(step), last)
        assert same_bits(read_checkpoint(best), small_checkpoint(1))
        assert same_bits(read_checkpoint(last), small_checkpoint(step))
        assert corruption_reason(best, read_manifest(tmp_path)) == ""
    assert not io.failures
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("before", ["no best.ckpt", "an older best.ckpt"])
def test_a_run_killed_before_best_got_its_name_gives_it_when_resumed(
    fit: Command, before: str
) -> None:
    """Evaluations follow steps 1 and 3, and the second one is better."""
    arguments = ["--evaluation.eval_freq=2", "--checkpoint.every_n_train_steps=100"]
    fit("--trainer.max_steps=1", *arguments)
    older = (RUN / "best.ckpt").read_bytes()
    fit("--trainer.max_steps=3", *arguments, "--ckpt_path=last")
    assert (RUN / "best.ckpt").samefile(RUN / "last.ckpt")
    (RUN / "best.ckpt").unlink()
    if before == "an older best.ckpt":
        (RUN / "best.ckpt").write_bytes(older)
    fit("--trainer.max_steps=4", *arguments, "--ckpt_path=last")
    assert read_checkpoint(RUN / "best.ckpt")["global_step"] == 3
    assert corruption_reason(RUN / "best.ckpt", read_manifest(RUN)) == ""
    assert read_checkpoint(RUN / "last.ckpt")["global_step"] == 4


def test_figures_that_cannot_be_written_do_not_stop_a_run(
    fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    from gpt_lightning.training import loggers, run_files

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loggers, "_logged_causes", set())
    for name in ("add_scalar", "add_text", "add_figure", "flush", "close"):
        monkeypatch.setattr(SummaryWriter, name, full)
    monkeypatch.setattr(run_files.MetricsCSV, "_append", full)
    done = fit("--trainer.max_steps=3", "--evaluation.eval_freq=1")
    assert done.err.count("metrics cannot be written (No space left on device)") == 1
    assert read_checkpoint(latest_valid_checkpoint(RUN))["global_step"] == 3


def test_a_torn_line_of_metrics_is_left_out(fit: Command) -> None:
    fit("--trainer.max_steps=4", "--evaluation.eval_freq=1")
    table = RUN / "metrics.csv"
    whole = table.read_text().splitlines()
    table.write_text("\n".join(whole)[:-40] + "\n20,1")
    fit("--trainer.max_steps=6", "--evaluation.eval_freq=1", "--ckpt_path=last")
    steps = [line.split(",")[0] for line in table.read_text().splitlines()]
    assert steps == ["step", "0", "1", "2", "4", "5"]


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_training_goes_on_after_a_full_disk(fit: Command, asynchronous: str) -> None:
    done = fit("--trainer.max_steps=4", f"--checkpoint.async_save={asynchronous}", *FULL_DISK)
    lines = [line for line in done.err.splitlines() if "No space left" in line]
    assert len(lines) == 1
    assert "last.ckpt: cannot be written" in lines[0]
    assert "training continues" in lines[0]
    assert read_checkpoint(latest_valid_checkpoint(RUN))["global_step"] == 4


def test_or_it_stops(command: Command, fit: Command) -> None:
    from conftest import ROOT, SMALL

    done = command("fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL, *FULL_DISK,
                   "--trainer.max_steps=4", "--checkpoint.on_failure=stop")  # fmt: skip
    assert done.code == 2
    assert "No space left on device" in done.err.splitlines()[-1]
    assert read_checkpoint(latest_valid_checkpoint(RUN))["global_step"] == 1
    fit("--trainer.max_steps=4", "--ckpt_path=last")


class Moves(Callback):
    """Takes files of the run away after its second step, as a user or another program may."""

    names: ClassVar[list[str]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            for name in self.names:
                (RUN / name).rename(f"taken-{name}")


@pytest.mark.parametrize(
    "names",
    [["last.ckpt"], ["last.ckpt", "previous.ckpt", "best.ckpt"], ["manifest.json", "last.ckpt"]],
)
def test_files_that_are_taken_away_are_saved_again_at_once(
    fit: Command, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    monkeypatch.setattr(Moves, "names", names)
    done = fit("--trainer.max_steps=3", "--checkpoint.every_n_train_steps=1", "--evaluation.eval_freq=1",
               "--allow_import=test_durability", "--trainer.callbacks+=test_durability.Moves")  # fmt: skip
    assert f"{RUN / 'last.ckpt'} is gone" in done.err
    assert "cannot be written" not in done.err
    assert read_checkpoint(latest_valid_checkpoint(RUN))["global_step"] == 3
    fit("--trainer.max_steps=5", "--ckpt_path=last")


def test_a_save_that_fails_says_only_what_is_true(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    (tmp_path / "run").write_text("a file where the folder should be")
    io.save_checkpoint(small_checkpoint(1), tmp_path / "run" / "last.ckpt")
    assert str(io.failures["last.ckpt"]).endswith("; there is no such file")


def test_metrics_that_are_taken_away_are_written_again(
    fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Moves, "names", ["metrics.csv"])
    done = fit("--trainer.max_steps=4", "--evaluation.eval_freq=1",
               "--allow_import=test_durability", "--trainer.callbacks+=test_durability.Moves")  # fmt: skip
    assert done.err.count("metrics.csv is gone") == 1
    steps = [line.split(",")[0] for line in (RUN / "metrics.csv").read_text().splitlines()]
    assert steps == ["step", "0", "1", "2", "3"]
    fit("--trainer.max_steps=5", "--evaluation.eval_freq=1", "--ckpt_path=last")
    steps = [line.split(",")[0] for line in (RUN / "metrics.csv").read_text().splitlines()]
    assert steps == ["step", "0", "1", "2", "3", "4"]


@pytest.mark.parametrize(("precision", "size"), [("bf16-true", 2), ("32-true", 4), ("64-true", 8)])
def test_room_is_counted_in_the_runs_precision(
    fit: Command, command: Command, monkeypatch: pytest.MonkeyPatch, precision: str, size: int
) -> None:
    from conftest import ROOT, SMALL

    fit("--run=real", "--trainer.max_steps=1", f"--trainer.precision={precision}")
    real = Path("checkpoints/real/last.ckpt").stat().st_size
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * real * 98 // 100))
    arguments = ["fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL, "--trainer.max_steps=1",
                 f"--trainer.precision={precision}"]  # fmt: skip
    done = command(*arguments)
    assert done.code == 2
    assert f"for 4 files of {real / 1e9:.2f} GB" in done.err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * real * 102 // 100))
    assert command(*arguments).code == 0


def test_no_room_is_said_before_the_first_step(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conftest import ROOT, SMALL

    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=30_000_000))
    done = command("fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL,
                   "--trainer.max_steps=1")  # fmt: skip
    assert done.code == 2
    assert "needs 0.08 GB for 4 files of 0.02 GB, 0.03 GB are free" in done.err.splitlines()[-1]
    assert not RUN.exists()


def test_a_run_that_was_refused_begins_with_auto(
    command: Command, fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conftest import ROOT, SMALL

    arguments = (f"--config={ROOT}/configs/quickstart.yaml", *SMALL, "--trainer.max_steps=1")
    done = command("fit", *arguments, "--allow_import=test_durability",
                   "--trainer.callbacks+=test_durability.Unloadable")  # fmt: skip
    assert done.code == 2
    done = command("fit", *arguments)
    assert "--ckpt_path auto starts it again" in done.err
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


# --- damage ---------------------------------------------------------------------------------------


def test_the_one_before_is_used_where_the_newest_is_damaged(fit: Command) -> None:
    fit("--trainer.max_steps=6", "--checkpoint.every_n_train_steps=2", "--run=whole")
    fit("--trainer.max_steps=4", "--checkpoint.every_n_train_steps=2")
    manifest = json.loads((RUN / MANIFEST).read_text())["checkpoints"]
    assert {entry["file"]: entry["step"] for entry in manifest}["last.ckpt"] == 4
    assert {"bytes", "sha256", "step", "saved", "versions", "config_sha256"} <= manifest[0].keys()
    content = bytearray((RUN / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 4
    (RUN / "last.ckpt").write_bytes(content)
    done = fit("--trainer.max_steps=6", "--checkpoint.every_n_train_steps=2", "--ckpt_path=last")
    said = [line for line in done.err.splitlines() if "is damaged" in line]
    assert len(said) == 1
    assert "its SHA-256 is not what manifest.json recorded" in said[0]
    assert "resuming from checkpoints/quickstart/previous.ckpt instead" in said[0]
    for name in ("last.ckpt", "previous.ckpt"):
        ours, whole = read_checkpoint(RUN / name), read_checkpoint(RUN.parent / "whole" / name)
        assert same_bits(ours["state_dict"], whole["state_dict"])
        assert same_bits(ours["optimizer_states"], whole["optimizer_states"])


def test_a_damaged_manifest_is_said_and_not_gone_by(fit: Command) -> None:
    fit("--trainer.max_steps=1")
    (RUN / MANIFEST).write_text('{"checkpoints": [{"file": 3}]}')
    done = fit("--trainer.max_steps=2", "--ckpt_path=last")
    assert "manifest.json: is damaged" in done.err
    assert read_checkpoint(latest_valid_checkpoint(RUN))["global_step"] == 2


def test_what_was_there_before_a_damaged_manifest_is_known_after(fit: Command) -> None:
    fit(
        "--trainer.max_steps=4",
        "--checkpoint.every_n_train_steps=2",
        "--checkpoint.save_best=false",
    )
    (RUN / MANIFEST).write_text("[" * 200_000)
    fit("--trainer.max_steps=5", "--checkpoint.save_best=false", "--ckpt_path=last")
    (RUN / "last.ckpt").write_bytes(b"x")
    assert latest_valid_checkpoint(RUN).name == "previous.ckpt"


def test_manifest_of_an_earlier_version_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It had no kind and no checksum over itself."""
    AtomicCheckpointIO().save_checkpoint(small_checkpoint(1), tmp_path / "last.ckpt")
    entries = read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"checkpoints": entries}, indent=1) + "\n")
    assert read_manifest(tmp_path) == entries
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:-1])
    assert "manifest.json recorded" in corruption_reason(tmp_path / "last.ckpt", entries)
    assert not caplog.records


def test_the_manifest_does_not_grow(tmp_path: Path) -> None:
    for name in ("best.ckpt", "last.ckpt", "last.ckpt"):
        AtomicCheckpointIO().save_checkpoint(small_checkpoint(1), tmp_path / name)
    for _ in range(3):  # best and previous are there, and not read
        io = AtomicCheckpointIO()
        io.load_checkpoint(tmp_path / "last.ckpt")
        for step in range(2, 12):
            io.save_checkpoint(small_checkpoint(step), tmp_path / "last.ckpt")
            assert len(read_manifest(tmp_path) or []) <= 9
        for name in ("best.ckpt", "last.ckpt", "previous.ckpt"):
            assert corruption_reason(tmp_path / name, read_manifest(tmp_path)) == ""


def test_resumed_from_an_epochs_end_all_counters_are_the_same(fit: Command) -> None:
    fit("--trainer.max_epochs=3", "--run=straight")
    fit("--trainer.max_epochs=1")
    fit("--trainer.max_epochs=3", "--ckpt_path=last")
    for part in compare_checkpoints(Path("checkpoints/straight/last.ckpt"), RUN / "last.ckpt"):
        assert part.difference == ""


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
def test_checkpoints_that_contradict_themselves(
    command: Command, change: Callable[[Any], None]
) -> None:
    checkpoint = small_checkpoint(1)
    change(checkpoint)
    torch.save(checkpoint, "x.ckpt")
    Path("mine.yaml").write_text("data:\n  text: sample\n")
    done = command("fit", "--config=mine.yaml", "--ckpt_path=x.ckpt", "--trainer.accelerator=cpu")
    assert done.code == 2, done.err
    assert done.err.count("\n") == 1, done.err
    assert "x.ckpt" in done.err
    assert sorted(os.listdir()) == ["mine.yaml", "x.ckpt"]


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"callbacks": {"Mine": {"path": Path("x")}}}, "checkpoint.callbacks.Mine.path"),
        ({"a": [1, {"b": np.float64(1.0)}]}, "checkpoint.a.1.b"),
        ({"a": {Path("k"): 1}}, "a key of checkpoint.a"),
        ({"a": (lambda: 0)}, "checkpoint.a"),
        ({"a": np.zeros(2)}, "checkpoint.a"),
    ],
)
def test_the_guard_names_what_would_not_load(content: Any, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: is a "):
        check_content(content)
    check_content({"a": [1, 2.0, None, True, b"x", "y", (torch.ones(1), {3})], 4: torch.float32})


class Unloadable(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"where": Path("x")}


def test_the_guard_in_a_run(command: Command) -> None:
    from conftest import ROOT, SMALL

    done = command("fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL,
                   "--trainer.max_steps=1", "--allow_import=test_durability",
                   "--trainer.callbacks+=test_durability.Unloadable")  # fmt: skip
    assert done.code == 2
    assert ".where: is a pathlib.PosixPath" in done.err.splitlines()[-1]
    assert not (RUN / "last.ckpt").exists()


# --- fuzz -----------------------------------------------------------------------------------------


def mutate(content: bytes, rng: random.Random) -> bytes:
    """A bit flipped, a page zeroed, the end cut off, bytes put in, or a piece moved."""
    if not content:
        return b"?"
    at = rng.randrange(len(content))
    match rng.randrange(5):
        case 0:
            return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        case 1:
            start = at // 512 * 512
            return content[:start] + bytes(min(512, len(content) - start)) + content[start + 512 :]
        case 2:
            return content[:at]
        case 3:
            return content[:at] + rng.randbytes(rng.randrange(1, 64)) + content[at:]
        case _:
            other = rng.randrange(len(content))
            piece = content[other : other + rng.randrange(1, 256)]
            return content[:at] + piece + content[at + len(piece) :]


MUTATIONS = 2000


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """What is mutated, and what reads it: it gives the content as it was, or refuses."""
    folder = tmp_path_factory.mktemp("targets")
    run, hf = folder / "run", folder / "hf"
    io = AtomicCheckpointIO()
    for step in (1, 2):
        io.save_checkpoint(small_checkpoint(step), run / "last.ckpt")
    bare = folder / "bare" / "last.ckpt"
    bare.parent.mkdir()
    shutil.copy(run / "last.ckpt", bare)
    hf.mkdir()
    from gpt_lightning import GPTConfig, GPTModel
    from gpt_lightning.pretrained.huggingface import write_huggingface
    from gpt_lightning.pretrained.weights import ModelWeights

    config = GPTConfig(vocab_size=40, context_length=4, emb_dim=8, n_heads=2, n_layers=1,
                       qkv_bias=True, tied_embeddings=True)  # fmt: skip
    write_huggingface(ModelWeights(config, GPTModel(config).state_dict()), hf)
    write_manifest(hf, [path.name for path in hf.iterdir()])

    def resumed() -> Any:
        path, config = checkpoint_to_resume(run, "last", {})
        return AtomicCheckpointIO().load_checkpoint(path)["state_dict"], config

    def source(path: Path) -> Callable[[], Any]:
        def read() -> Any:
            found = read_weights(str(path))
            return found.config, {name: t.clone() for name, t in found.state_dict.items()}

        return read

    return {
        "checkpoint": (run / "last.ckpt", resumed),
        "manifest": (run / MANIFEST, resumed),
        "checkpoint without manifest": (bare, source(bare)),
        "safetensors": (hf / "model.safetensors", source(hf)),
        "config.json": (hf / "config.json", source(hf)),
    }


@pytest.mark.parametrize(
    "what", ["checkpoint", "manifest", "checkpoint without manifest", "safetensors", "config.json"]
)
@pytest.mark.usefixtures("messages")
def test_no_mutation_goes_unnoticed(
    targets: dict[str, tuple[Path, Callable[[], Any]]],
    what: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, read = targets[what]
    original = path.read_bytes()
    expected = read()
    before = [small_checkpoint(1)["state_dict"], expected[1]]  # what previous.ckpt holds
    rng = random.Random(what)
    refused = fallen_back = 0
    for _ in range(MUTATIONS // 5):
        mutated = mutate(original, rng)
        path.write_bytes(mutated)
        caplog.clear()
        try:
            found = read()
        except (ValueError, OSError):
            refused += 1
            continue
        if same_bits(found[0], before[0]):
            assert "is damaged" in caplog.text
            fallen_back += 1
        else:  # nothing that was read has changed
            assert same_bits(list(found), list(expected)), mutated
    path.write_bytes(original)
    assert same_bits(list(read()), list(expected))
    if what == "checkpoint":
        assert fallen_back > 0.95 * MUTATIONS / 5
    elif what != "manifest":
        assert refused > 0.5 * MUTATIONS / 5


@pytest.mark.parametrize(
    "what",
    [
        "train-00000.bin",
        pytest.param("val-00000.bin", marks=pytest.mark.slow),
        pytest.param(MANIFEST, marks=pytest.mark.nightly),
    ],
)
@pytest.mark.usefixtures("messages")
def test_no_mutation_of_stored_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """A store in the cache that is damaged is made again: the tokens are always the text's."""
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "MIN_CACHED_BYTES", 100)
    text = tmp_path / "mine.txt"
    text.write_text("Every effort moves you. " * 200)
    split = int(0.8 * len(text.read_text()))
    expected = [tokenizer.encode_corpus(text.read_text()[:split]),
                tokenizer.encode_corpus(text.read_text()[split:])]  # fmt: skip

    def are_right(found: token_cache.Splits) -> bool:
        return all(
            np.array_equal(*pair) for pair in zip([a for (a,) in found], expected, strict=True)
        )

    assert are_right(token_cache.read_splits(str(text), 0.8))
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    original = (folder / what).read_bytes()
    rng = random.Random(what)
    made_again = 0
    for _ in range(200):
        (folder / what).write_bytes(mutate(original, rng))
        assert are_right(token_cache.read_splits(str(text), 0.8))
        made_again += "is damaged; tokenizing again" in caplog.text
        caplog.clear()
    assert made_again > 150
    assert isinstance(token_cache.read_splits(str(text), 0.8).training[0], np.memmap)
    assert [path.name for path in (tmp_path / "cache" / "tokens").iterdir()] == [folder.name]
    # without a place for it, it goes without
    shutil.rmtree(tmp_path / "cache" / "tokens")
    (tmp_path / "cache" / "tokens").write_text("a file")
    assert are_right(token_cache.read_splits(str(text), 0.8))


def test_no_mutation_of_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokenizer.gpt2_encoding().encode("Every effort moves you")
    rng = random.Random("vocabulary")
    real = tokenizer.vocabulary_file
    for name in ("encoder.json", "vocab.bpe"):
        original = Path(tokenizer.vocabulary_file(name)).read_bytes()
        for i in range(20):
            damaged = tmp_path / f"{i}{name}"
            damaged.write_bytes(mutate(original, rng))
            paths = {"encoder.json": real("encoder.json"), "vocab.bpe": real("vocab.bpe")}
            paths[name] = str(damaged)
            monkeypatch.setattr(tokenizer, "vocabulary_file", paths.__getitem__)
            tokenizer.token_ranks.cache_clear()
            with pytest.raises((ValueError, OSError)) as caught:
                tokenizer.token_ranks()
            assert "\n" not in str(caught.value)
        monkeypatch.undo()
        tokenizer.token_ranks.cache_clear()
    with ThreadPoolExecutor(1) as pool:  # a thread that has no encoding yet
        found = pool.submit(lambda: tokenizer.gpt2_encoding().encode("Every effort moves you"))
    assert found.result() == expected


def test_no_mutation_of_a_yaml_is_a_traceback(command: Command, tmp_path: Path) -> None:
    """A changed setting may well be a setting; what is none is one line, and no file is made."""
    from conftest import ROOT

    original = (ROOT / "configs" / "quickstart.yaml").read_bytes()
    rng = random.Random("yaml")
    refused = 0
    for _ in range(60):
        (tmp_path / "mine.yaml").write_bytes(mutate(original, rng))
        done = None
        with suppress(SystemExit):  # a configuration that was printed
            done = command("fit", "--config=mine.yaml", "--print_config")
        if done is None:
            continue
        assert done.code == 2
        assert done.err.count("\n") == 1, done.err
        assert done.err.startswith("gpt_lightning: error: ")
        refused += 1
    assert refused > 10
    assert os.listdir(tmp_path) == ["mine.yaml"]


def test_yaml_cut_off_anywhere_is_no_traceback(command: Command, tmp_path: Path) -> None:
    """Through a real fit: what parses may still be half a configuration."""
    from conftest import ROOT, SMALL

    lines = (ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8").splitlines()
    contents = ["\n".join(lines[:count]) for count in range(1, len(lines))]
    contents += [f"{group}: null\n" for group in ("trainer", "checkpoint", "data", "model")]
    contents += ["[" * 3000, "trainer: 3\n", "evaluation: [1]\n"]
    refused = 0
    for i, content in enumerate(contents):
        (tmp_path / "mine.yaml").write_text(content)
        done = command("fit", "--config=mine.yaml", *SMALL, "--model.config.n_layers=1",
                       "--trainer.fast_dev_run=true", f"--run=r{i}")  # fmt: skip
        assert done.code in (0, 2)
        assert "Traceback" not in done.err
        if done.code == 2:
            assert done.err.startswith("gpt_lightning: error: ")
            refused += 1
    assert refused >= 5


# --- malice ---------------------------------------------------------------------------------------


class Canary:
    def __reduce__(self) -> Any:
        return os.mkdir, ("canary",)


YAMLS = {
    "callback": "trainer:\n  callbacks:\n  - class_path: evil.Canary\n",
    "logger": "trainer:\n  logger:\n    class_path: evil.Canary\n",
    "strategy": "trainer:\n  strategy:\n    class_path: evil.Canary\n",
    "plugin": "trainer:\n  plugins:\n  - class_path: evil.Canary\n",
    "os": "trainer:\n  callbacks:\n  - class_path: os.system\n",
    "subprocess": "trainer:\n  callbacks:\n  - class_path: subprocess.Popen\n    init_args: {args: [mkdir, canary]}\n",
    "builtins": "trainer:\n  callbacks:\n  - class_path: builtins.eval\n",
    "hook": "trainer:\n  callbacks:\n  - class_path: lightning.pytorch.callbacks.LambdaCallback\n"
            "    init_args:\n      on_fit_start: os.system\n",
    "python tag": "run: !!python/object/apply:os.mkdir [canary]\n",
    "name tag": "run: !!python/name:os.mkdir\n",
    "allows itself": "allow_import: [evil]\ntrainer:\n  callbacks:\n  - class_path: evil.Canary\n",
    "run outside": "run: ../../canary\n",
}  # fmt: skip


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_runs_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('canary')\nclass Canary: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.yaml").write_text(YAMLS[name])
    from conftest import ROOT, SMALL

    done = command("fit", f"--config={ROOT}/configs/quickstart.yaml", "--config=mine.yaml", *SMALL,
                   "--trainer.max_steps=1")  # fmt: skip
    assert done.code == 2
    assert done.err.count("\n") == 1, done.err
    assert sorted(os.listdir()) == ["evil.py", "mine.yaml"]


def test_what_is_allowed_on_the_command_line_is_imported(
    fit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from lightning.pytorch import Callback\nclass Harmless(Callback): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.yaml").write_text("trainer:\n  callbacks:\n  - class_path: mine.Harmless\n")
    fit("--config=mine.yaml", "--allow_import=mine", "--trainer.max_steps=1")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.save(Canary(), "x.ckpt"),
        lambda: torch.save({"state_dict": Canary(), "hyper_parameters": {"config": {}}}, "x.ckpt"),
        lambda: torch.save({"state_dict": {}, "hyper_parameters": {"config": {"emb_dim": Canary()}}}, "x.ckpt"),
        lambda: torch.save({**small_checkpoint(1), "callbacks": Canary()}, "x.ckpt"),
        lambda: torch.save({**small_checkpoint(1), "optimizer_states": [Canary()]}, "x.ckpt"),
        lambda: torch.save({"model": {}, "model_args": Canary()}, "x.ckpt"),
        lambda: torch.save(Canary(), "x.ckpt", _use_new_zipfile_serialization=False),
        lambda: Path("x.ckpt").write_bytes(__import__("pickle").dumps(Canary())),
        lambda: torch.save({**small_checkpoint(1), "hyper_parameters": {"config": {
            "vocab_size": 10**12, "context_length": 4, "emb_dim": 10**9, "n_heads": 1, "n_layers": 10**7}}}, "x.ckpt"),
        lambda: save_file({"a": torch.ones(1)}, "x.ckpt"),
    ],
    ids=["bare", "weights", "config", "callbacks", "optimizer", "nanogpt", "old format", "pickle",
         "huge", "another format"],
)  # fmt: skip
def test_checkpoints_run_nothing(command: Command, make: Callable[[], Any]) -> None:
    from conftest import ROOT, SMALL

    make()
    for option in ("--ckpt_path", "--init_from"):
        done = command("fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL[6:],
                       "--trainer.max_steps=1", f"{option}=x.ckpt")  # fmt: skip
        assert done.code == 2
        assert done.err.count("\n") == 1, done.err
    assert os.listdir() == ["x.ckpt"]
