"""One checkpoint file: a crash, a full disk or damage leaves the previous one."""

import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning import GPTLightningModule
from gpt_lightning.pretrained.source import read_weights
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.storage import direct_file
from gpt_lightning.storage.checksum import MANIFEST, write_manifest
from gpt_lightning.storage.direct_file import DirectFile
from gpt_lightning.training.checkpoint_io import (
    AtomicCheckpointIO,
    corruption_reason,
    read_manifest,
)
from gpt_lightning.training.optimizer import OptimizerConfig
from gpt_lightning.training.resume import checkpoint_to_resume, latest_valid_checkpoint
from helpers import (
    ENVIRONMENT,
    SMALL_QUICKSTART,
    Command,
    limited_file_size,
    mutate,
    python,
)
from runs import (
    RUN,
    same_bits,
    small_checkpoint,
)


def test_checkpoints_hold_tensors_and_primitives_only(fit: Command) -> None:
    fit("--trainer.max_epochs=1")
    for name in ("last", "best"):
        checkpoint = torch.load(f"checkpoints/quickstart/{name}.ckpt", weights_only=True)
        assert checkpoint["hyper_parameters"]["config"]["emb_dim"] == 8
    module = GPTLightningModule.load_from_checkpoint("checkpoints/quickstart/last.ckpt")
    assert module.config.emb_dim == 8
    assert not list(Path("checkpoints/quickstart").glob(".*"))


CRASHES = """
import os, sys
from pathlib import Path
from runs import same_bits, small_checkpoint
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.storage import direct_file
from gpt_lightning.training import checkpoint_io as module
from gpt_lightning.training.resume import latest_valid_checkpoint

direct_file.BUFFER_SIZE = 4096  # several writes to a file
folder = Path(sys.argv[1])
first, old, new, later = (small_checkpoint(step) for step in range(4))
steps = {0: first, 2: new}  # of which the newest one is kept

def names_of(step):
    return {"also_named": [module.step_name(step), "best.ckpt"]}

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
    for name in ("write", "fsync", "replace", "link", "unlink"):
        around(module.os, name)

point = 0
while True:
    point += 1
    run = folder / str(point)
    io = module.AtomicCheckpointIO(max_to_keep=1)
    io.save_checkpoint(first, run / "last.ckpt", names_of(0))
    io.save_checkpoint(old, run / "last.ckpt")
    child = os.fork()
    if not child:
        dying_at(point)
        io.save_checkpoint(new, run / "last.ckpt", names_of(2))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = latest_valid_checkpoint(run)
    state = read_checkpoint(found)
    whole = same_bits(state, old) or same_bits(state, new)
    assert whole and found.name == "last.ckpt", (point, found)
    assert not code or same_bits(read_checkpoint(run / "last.ckpt"), state)
    # best.ckpt is never ahead of last.ckpt
    kept = read_checkpoint(run / "best.ckpt")
    assert same_bits(kept, first) or same_bits(kept, state), point
    assert code or same_bits(kept, new)
    # the older step goes after the newer one has its name
    found_steps = module.step_checkpoints(run)
    assert set(found_steps) in ([{0}, {0, 2}, {2}] if code else [{2}]), point
    assert all(same_bits(read_checkpoint(path), steps[i]) for i, path in found_steps.items())
    # the next save works with what is left, and removes it
    module.remove_leftovers(run)
    next_io = module.AtomicCheckpointIO()
    next_io.load_checkpoint(found)
    next_io.save_checkpoint(later, run / "last.ckpt")
    assert same_bits(read_checkpoint(latest_valid_checkpoint(run)), later)
    assert same_bits(read_checkpoint(run / "previous.ckpt"), state)
    assert same_bits(read_checkpoint(run / "best.ckpt"), kept)
    for name in ("previous.ckpt", "best.ckpt", *(path.name for path in found_steps.values())):
        assert module.corruption_reason(run / name, module.read_manifest(run)) == ""
    names = {"last.ckpt", "previous.ckpt", "best.ckpt", "manifest.json"}
    names |= {path.name for path in found_steps.values()}
    assert {p.name for p in run.iterdir()} == names
    if code == 0:
        break
    assert code == 137
print(point - 1, "points")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_crash_at_any_point_of_a_save_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    result = python("-c", CRASHES, str(tmp_path), env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    *points, count = result.stdout.splitlines()
    assert int(count.split()[0]) == len(points) >= 20
    assert points.count("after write") > 2  # before the last, the file has a part of its bytes
    for name in ("before fsync", "after fsync", "before replace",
                 "after replace", "before link", "after link", "before unlink", "after unlink"):  # fmt: skip
        assert name in points


def test_save_writes_syncs_records_renames_and_syncs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def name_of(what: Any) -> str:
        """Name of a path or of an open file descriptor."""
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


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("buffer_size", [direct_file.BUFFER_SIZE, 4096])
def test_disk_full_at_any_point_of_a_save_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, buffer_size: int
) -> None:
    """A small buffer is full during ``torch.save``, a large one at the end of it."""
    monkeypatch.setattr(direct_file, "BUFFER_SIZE", buffer_size)
    io, last = AtomicCheckpointIO(async_save=asynchronous), tmp_path / "last.ckpt"
    old, new = small_checkpoint(1), small_checkpoint(2)
    io.save_checkpoint(old, last)
    io.finish()
    size = last.stat().st_size
    for point in range(30):
        with limited_file_size(point * size // 30):
            io.save_checkpoint(new, last)
            io.finish()
        failure = io.failures.pop("last.ckpt", None)
        assert "last.ckpt: cannot be written" in str(failure), (point, failure)
        assert same_bits(read_checkpoint(latest_valid_checkpoint(tmp_path)), old), point
        assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt", "manifest.json"}, point
    io.save_checkpoint(new, last)
    io.finish()
    assert not io.failures
    assert same_bits(read_checkpoint(latest_valid_checkpoint(tmp_path)), new)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_ctrl_c_during_a_save_is_no_failure_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    io, last = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(small_checkpoint(1), last)
    calls, real = itertools.count(1), DirectFile.write

    def interrupted(file: DirectFile, data: Any) -> int:
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(file, data)

    monkeypatch.setattr(DirectFile, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint(small_checkpoint(2), last)
    assert not io.failures
    assert same_bits(read_checkpoint(latest_valid_checkpoint(tmp_path)), small_checkpoint(1))
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt", "manifest.json"}


def test_failed_first_save_is_reported(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    (tmp_path / "run").write_text("a file where the folder should be")
    io.save_checkpoint(small_checkpoint(1), tmp_path / "run" / "last.ckpt")
    assert str(io.failures["last.ckpt"]).endswith("; there is no such file")


def test_manifest_of_an_earlier_version_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its manifest has no kind and no checksum of itself."""
    AtomicCheckpointIO().save_checkpoint(small_checkpoint(1), tmp_path / "last.ckpt")
    entries = read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"checkpoints": entries}, indent=1) + "\n")
    assert read_manifest(tmp_path) == entries
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:-1])
    assert "manifest.json recorded" in corruption_reason(tmp_path / "last.ckpt", entries)
    assert not caplog.records


def test_manifest_does_not_grow(tmp_path: Path) -> None:
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


def test_run_with_a_value_that_would_not_load_is_refused(command: Command) -> None:
    result = command("fit", *SMALL_QUICKSTART,
                   "--trainer.max_steps=1", "--allow_import=callbacks",
                   "--trainer.callbacks+=callbacks.HoldsAPath")  # fmt: skip
    assert result.code == 2
    assert ".where: is a pathlib.PosixPath" in result.err.splitlines()[-1]
    assert not (RUN / "last.ckpt").exists()


MUTATIONS = 2000


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """Files to mutate, and functions that read them: they return the original content or refuse."""
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
        path, config, _ = checkpoint_to_resume(run, "last", {}, OptimizerConfig())
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
    "what",
    [
        pytest.param("checkpoint", marks=pytest.mark.slow),
        pytest.param("manifest", marks=pytest.mark.slow),
        pytest.param("checkpoint without manifest", marks=pytest.mark.slow),
        "safetensors",
        "config.json",
    ],
)
@pytest.mark.usefixtures("messages")
def test_damaged_file_is_noticed(
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


@pytest.mark.parametrize("has_links", [True, False])
def test_best_stays_when_last_is_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    def link(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", link)
    io, last, best = AtomicCheckpointIO(), tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    io.save_checkpoint(small_checkpoint(1), last, {"also_named": ["best.ckpt"]})
    assert best.samefile(last) == has_links
    for step in (2, 3, 4):
        io.save_checkpoint(small_checkpoint(step), last)
        assert same_bits(read_checkpoint(best), small_checkpoint(1))
        assert same_bits(read_checkpoint(last), small_checkpoint(step))
        assert corruption_reason(best, read_manifest(tmp_path)) == ""
    assert not io.failures
    assert not list(tmp_path.glob(".*"))
