"""Is resume exact here? The same run twice, once killed and resumed, and everything it left compared."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gpt_lightning.data.dataloader import Batch, ResumableDataLoader
from gpt_lightning.data.epochs import EpochShape
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training.checkpoint_io import LAST

logger = logging.getLogger(__name__)

RUN = "verified"
Limit = Literal["max_steps", "max_epochs", "max_tokens"]


class WindowRecorder(Callback):
    """Writes down which windows each micro-batch had, and can end the process as a power cut would.

    Args:
        folder: For a file each rank, which a resumed run goes on with.
        kill_at: The update, counted from 0, at whose beginning every rank kills itself; none: none.
    """

    def __init__(self, folder: str, kill_at: int | None = None) -> None:
        self.folder = Path(folder)
        self.kill_at = kill_at

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        loader = trainer.train_dataloader
        numbers = loader.handed_out.tolist() if isinstance(loader, ResumableDataLoader) else None
        ids = hashlib.sha256(batch[0].cpu().numpy().tobytes()).hexdigest()
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        with (self.folder / f"windows-{trainer.global_rank}.jsonl").open("a") as file:
            print(json.dumps([trainer.global_step, micro_batch, numbers, ids]), file=file)


@dataclass(frozen=True)
class Compared:
    """One part of what both runs left.

    Attributes:
        straight: SHA-256 over it in the run that was not cut.
        resumed: The same of the run that was.
        difference: The first difference, in words; empty where the two are the same bits.
    """

    part: str
    straight: str
    resumed: str
    difference: str


@dataclass(frozen=True)
class Shortened:
    """A run that ends in its own way, by epochs, steps or tokens, but sooner.

    Attributes:
        limits: The arguments of ``fit`` that make it so.
        steps: Optimizer steps of the whole run.
        epoch_steps: Of an epoch.
        kills: The steps, counted from 0, at whose beginning it is killed; at least one begins an epoch.
        save_every: Steps from one checkpoint to the next.
    """

    limits: tuple[str, ...]
    steps: int
    epoch_steps: int
    kills: tuple[int, ...]
    save_every: int


def shorten(
    epoch: EpochShape,
    ends_by: Limit,
    steps: int,
    more_steps: int,
    kills: int,
    *,
    limit_unit: int = 1,
) -> Shortened:
    """Have a run end after ``steps + more_steps`` (with epochs: the whole epochs that hold them).

    The first kill comes after ``steps``, the others at even distances after it, one at an epoch's end. Where
    an epoch is too long for that, it is cut short.

    Args:
        epoch: As the run has it.
        limit_unit: What ``trainer.limit_train_batches`` counts in, in batches: 1, or those of a global batch.
    """
    total = steps + more_steps
    spread = list(dict.fromkeys(steps + i * more_steps // kills for i in range(kills)))
    length = epoch.steps
    ends = range(length, total, length)
    if (later := [end for end in ends if end > steps]) and kills > 1 and steps % length:
        # the last kill is moved: the first keeps its place
        spread[-1] = later[-1]
    elif steps % length:
        length = max(d for d in range(1, min(steps, length) + 1) if steps % d == 0)
    cut = length < epoch.steps
    limits = (
        [f"--trainer.limit_train_batches={length * epoch.accumulate // limit_unit}"] if cut else []
    )
    tokens = EpochShape(
        length * epoch.accumulate if cut else epoch.batches,
        epoch.accumulate,
        epoch.tokens_per_batch,
    )
    match ends_by:
        case "max_epochs":
            epochs = -(-total // length)
            total = epochs * length
            limits += [f"--trainer.max_epochs={epochs}"]
        case "max_steps":
            limits += [f"--trainer.max_steps={total}", "--trainer.max_epochs=-1"]
        case "max_tokens":
            limits += [f"--max_tokens={tokens.tokens_after(total)}", "--trainer.max_epochs=null"]
    # rarely enough that a kill costs steps, which are then done again
    apart = max(2, more_steps // kills)
    save_every = next((d for d in range(apart, steps) if steps % d == 0), steps)
    at = [
        kill + (kill % save_every == 0 and kill % length != 0 and kill + 1 < total)
        for kill in sorted(spread)
    ]
    return Shortened(tuple(limits), total, length, tuple(dict.fromkeys(at)), save_every)


def verify_resume(
    fit_arguments: list[str],
    folder: Path,
    plan: Shortened,
    on_run: Callable[[str], None] = lambda what: None,
) -> list[Compared]:
    """Train a run as ``plan`` says without a stop, and again with SIGKILLs and resumes; compare the two.

    Both are the real command in processes of its own, in ``folder``.

    Raises:
        ValueError: The command refuses ``fit_arguments``, with what it says.
        RuntimeError: A run failed in another way.
    """
    straight, cut = folder / "straight", folder / "cut"
    for place in (straight, cut):
        place.mkdir(parents=True, exist_ok=True)
    common = [
        *fit_arguments,
        f"--run={RUN}",
        *plan.limits,
        f"--checkpoint.every_n_train_steps={plan.save_every}",
    ]
    on_run(f"{plan.steps} steps without a stop")
    _fit(common, straight)
    resume: list[str] = []
    for kill_at in plan.kills:
        at_end = " (an epoch's end)" if kill_at % plan.epoch_steps == 0 else ""
        on_run(f"{'resumed, ' if resume else 'again, '}killed after step {kill_at}{at_end}")
        _fit([*common, *resume], cut, kill_at=kill_at)
        resume = ["--ckpt_path=last"]
    on_run("resumed, to the end")
    _fit([*common, *resume], cut)
    left = Path("checkpoints", RUN, LAST)
    return [
        *compare_checkpoints(straight / left, cut / left),
        _compare_windows(straight, cut),
    ]


def _fit(arguments: list[str], folder: Path, kill_at: int | None = None) -> None:
    recorder = f"{WindowRecorder.__module__}.{WindowRecorder.__name__}"
    command = [
        *(sys.executable, "-m", "gpt_lightning", "fit", *arguments),
        f"--trainer.default_root_dir={folder}",
        f"--trainer.callbacks+={recorder}",
        f"--trainer.callbacks.folder={folder}",
        *([f"--trainer.callbacks.kill_at={kill_at}"] if kill_at is not None else []),
        *([] if logger.isEnabledFor(logging.INFO) else ["--quiet"]),
        *(["--verbose"] if logger.isEnabledFor(logging.DEBUG) else []),
    ]
    # on a terminal the run's own progress is what one wants to see
    shown = None if sys.stderr.isatty() else subprocess.PIPE
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=shown, text=True, start_new_session=True
    )
    try:
        _, said = process.communicate()
    finally:
        # what a killed rank leaves behind, or all of it after Ctrl-C
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if kill_at is not None and process.returncode:
        return
    if process.returncode:
        last = (said or "see above").strip().splitlines()[-1]
        if process.returncode == 2:
            raise ValueError(last.removeprefix("gpt_lightning: error: "))
        raise RuntimeError(f"fit ended with {process.returncode}: {last}")
    if kill_at is not None:
        raise RuntimeError(f"the run was over before step {kill_at}")


def compare_checkpoints(straight: Path, resumed: Path) -> list[Compared]:
    """All that two checkpoints hold, in three parts: weights, optimizer, counters."""
    parts = [_parts(read_checkpoint(path)) for path in (straight, resumed)]
    return [_compare(part, parts[0][part], parts[1][part]) for part in parts[0]]


def _parts(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint in the parts that are compared; together they are all of it."""
    weights = checkpoint["state_dict"]
    optimizer = checkpoint["optimizer_states"]
    rest = {
        key: value
        for key, value in checkpoint.items()
        if key not in ("state_dict", "optimizer_states")
    }
    return {"weights": weights, "optimizer": optimizer, "counters": rest}


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key in sorted(tree, key=str):
            yield from _leaves(tree[key], f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{path}.{i}")
    else:
        yield path, tree


def _bytes(value: Any) -> bytes:
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype}{tuple(value.shape)}".encode() + raw
    return value.hex().encode() if isinstance(value, float) else repr(value).encode()


def _shown(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]


def _compare(part: str, straight: Any, resumed: Any) -> Compared:
    sums, leaves = [], []
    for tree in (straight, resumed):
        total = hashlib.sha256()
        flat = {}
        for path, value in _leaves(tree):
            content = _bytes(value)
            total.update(path.encode() + b"\0" + content)
            flat[path] = hashlib.sha256(content).digest(), value
        sums.append(total.hexdigest())
        leaves.append(flat)
    difference = ""
    for path in [*leaves[0], *(leaves[1].keys() - leaves[0].keys())]:
        ours, theirs = leaves[0].get(path), leaves[1].get(path)
        if ours is None or theirs is None:
            difference = f"{path} is only in the {'resumed' if ours is None else 'straight'} run"
        elif ours[0] != theirs[0]:
            difference = f"{path}: {_difference(ours[1], theirs[1])}"
        if difference:
            break
    return Compared(part, sums[0], sums[1], difference)


def _difference(straight: Any, resumed: Any) -> str:
    both = isinstance(straight, Tensor) and isinstance(resumed, Tensor)
    if both and straight.shape == resumed.shape:
        largest = (straight.double() - resumed.double()).abs().max()
        return f"by {float(largest):.3g} at most, of {straight.numel():,} values"
    return f"{_shown(straight)} straight, {_shown(resumed)} resumed"


def _compare_windows(straight: Path, cut: Path) -> Compared:
    """Each update's windows on each rank, those of work that was done twice included."""
    sums = []
    seen: list[dict[str, list[Any]]] = []
    difference = ""
    for folder in (straight, cut):
        of_run: dict[str, list[Any]] = {}
        for file in sorted(folder.glob("windows-*.jsonl")):
            rank = file.stem.removeprefix("windows-")
            for line in file.read_text().splitlines():
                step, micro_batch, *what = json.loads(line)
                key = f"step {step}, micro-batch {micro_batch}, rank {rank}"
                if of_run.setdefault(key, what) != what and not difference:
                    difference = f"{key}: windows {of_run[key][0]}, then {what[0]}"
        seen.append(of_run)
        content = json.dumps(of_run, sort_keys=True)
        sums.append(hashlib.sha256(content.encode()).hexdigest())
    for key in sorted(seen[0].keys() | seen[1].keys()):
        ours, theirs = seen[0].get(key), seen[1].get(key)
        if ours != theirs and not difference:
            difference = (
                f"{key}: windows {ours and ours[0]} straight, {theirs and theirs[0]} resumed"
            )
    return Compared("windows", sums[0], sums[1], difference)
