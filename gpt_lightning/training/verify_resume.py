"""Check that resume is exact: train a run twice, once with kills and resumes, and compare all results."""

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

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gpt_lightning.data.dataloader import Batch, ResumableDataLoader
from gpt_lightning.data.epochs import EpochShape
from gpt_lightning.pretrained.weights import EMA_STATE, read_checkpoint
from gpt_lightning.storage.atomic import created_folder
from gpt_lightning.training.checkpoint_io import LAST
from gpt_lightning.training.schedule import STEP_SETTINGS, Schedule

logger = logging.getLogger(__name__)

RUN_NAME = "verified"
Limit = Literal["max_steps", "max_epochs", "max_tokens"]


class WindowRecorder(Callback):
    """Callback that records the windows of each micro-batch and can kill the process, without a warning.

    Args:
        folder: Where each rank has its file; a resumed run appends to it.
        kill_at: The optimizer step, counted from 0, at whose start every rank kills itself; ``None``: no kill.
    """

    def __init__(self, folder: str, kill_at: int | None = None) -> None:
        self.folder = Path(folder)
        self.kill_at = kill_at

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step == self.kill_at:
            psutil.Process().kill()  # SIGKILL, or TerminateProcess on Windows
        loader = trainer.train_dataloader
        indices = loader.handed_out.tolist() if isinstance(loader, ResumableDataLoader) else None
        ids = hashlib.sha256(batch[0].cpu().numpy().tobytes()).hexdigest()
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        with (self.folder / f"windows-{trainer.global_rank}.jsonl").open(
            "a", encoding="utf-8"
        ) as file:
            print(json.dumps([trainer.global_step, micro_batch, indices, ids]), file=file)


@dataclass(frozen=True)
class Comparison:
    """One part of the results of both runs.

    Attributes:
        part: "weights", "optimizer", "counters" or "windows".
        straight: SHA-256 of the part in the uninterrupted run.
        resumed: SHA-256 of the part in the killed and resumed run.
        difference: A description of the first difference; empty if both have the same bits.
    """

    part: str
    straight: str
    resumed: str
    difference: str


@dataclass(frozen=True)
class ShortRun:
    """Plan of a short run that ends by the same limit (epochs, steps or tokens) as the user's run.

    Attributes:
        limits: The arguments of ``fit`` that set its length.
        steps: Optimizer steps of the run.
        epoch_steps: Optimizer steps of an epoch.
        kills: The steps, counted from 0, at whose start the run is killed; at least one starts an epoch.
        save_every: Steps between two checkpoints.
        schedule: The arguments of ``fit`` that give it the first steps of the user's schedule.
    """

    limits: tuple[str, ...]
    steps: int
    epoch_steps: int
    kills: tuple[int, ...]
    save_every: int
    schedule: tuple[str, ...] = ()


def plan_short_run(
    epoch: EpochShape,
    ends_by: Limit,
    steps: int,
    more_steps: int,
    kills: int,
    *,
    limit_unit: int = 1,
) -> ShortRun:
    """Plan a run of ``steps + more_steps`` optimizer steps; with ``max_epochs``, rounded up to complete epochs.

    The first kill comes after ``steps``, the others follow at equal distances, and one kill is at the end of an
    epoch. If an epoch is too long for that, the plan shortens it.

    Args:
        epoch: The epoch of the user's run.
        ends_by: The limit that ends the user's run.
        limit_unit: Batches that ``trainer.limit_train_batches`` counts as one: 1, or those of a global batch.
    """
    total = steps + more_steps
    spread = list(dict.fromkeys(steps + i * more_steps // kills for i in range(kills)))
    length = epoch.steps
    ends = range(length, total, length)
    if (later := [end for end in ends if end > steps]) and kills > 1 and steps % length:
        # only the last kill moves: the first must stay after `steps`
        spread[-1] = later[-1]
    elif steps % length:
        length = max(d for d in range(1, min(steps, length) + 1) if steps % d == 0)
    is_shortened = length < epoch.steps
    limits = (
        [f"--trainer.limit_train_batches={length * epoch.accumulate // limit_unit}"]
        if is_shortened
        else []
    )
    tokens = EpochShape(
        length * epoch.accumulate if is_shortened else epoch.batches,
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
    # checkpoints are so rare that a kill loses steps, which the resumed run repeats
    interval = max(2, more_steps // kills)
    save_every = next((d for d in range(interval, steps) if steps % d == 0), steps)
    kill_steps = [
        kill + (kill % save_every == 0 and kill % length != 0 and kill + 1 < total)
        for kill in sorted(spread)
    ]
    return ShortRun(tuple(limits), total, length, tuple(dict.fromkeys(kill_steps)), save_every)


def schedule_options(schedule: Schedule, *, clip_from_step: int) -> Iterator[str]:
    """Options that give a short run the first steps of a schedule, and start clipping at ``clip_from_step`` at the latest.

    Args:
        schedule: The schedule of the user's run, without shares.
    """
    for name in STEP_SETTINGS:
        steps = getattr(schedule, name)
        if name == "clip_from_step" and steps is not None:
            steps = min(steps, clip_from_step)
        if steps is not None:
            yield f"--model.{name}={steps}"


def verify_resume(
    fit_arguments: list[str],
    folder: Path,
    plan: ShortRun,
    on_run: Callable[[str], None] = lambda description: None,
) -> list[Comparison]:
    """Train the planned run without interruption, and again with SIGKILLs and resumes; compare the results.

    Each run is the real command in a separate process, which writes to a folder in ``folder``.

    Args:
        on_run: Called with a description before each run.

    Raises:
        ValueError: ``fit`` refuses ``fit_arguments``; the message is the one of ``fit``.
        RuntimeError: A run failed for another reason.
    """
    straight, cut = folder / "straight", folder / "cut"
    common = [
        *fit_arguments,
        f"--run={RUN_NAME}",
        *plan.limits,
        *plan.schedule,
        f"--checkpoint.every_n_train_steps={plan.save_every}",
        "--checkpoint.keep_every_n_train_steps=null",  # each of these would save too, and a kill lose no steps
        "--checkpoint.max_to_keep=null",
        "--checkpoint.save_best=false",  # each best evaluation would save, and a kill lose no steps
    ]
    on_run(f"{plan.steps} steps without interruption")
    _run_fit(common, straight)
    resume: list[str] = []
    for kill_at in plan.kills:
        where = " (the end of an epoch)" if kill_at % plan.epoch_steps == 0 else ""
        on_run(f"{'resumed' if resume else 'a second run'}, killed after step {kill_at}{where}")
        _run_fit([*common, *resume], cut, kill_at=kill_at)
        resume = ["--ckpt_path=last"]
    on_run("resumed until the end")
    _run_fit([*common, *resume], cut)
    checkpoint = Path("checkpoints", RUN_NAME, LAST)
    return [
        *compare_checkpoints(straight / checkpoint, cut / checkpoint),
        _compare_windows(straight, cut),
    ]


def _run_fit(arguments: list[str], folder: Path, kill_at: int | None = None) -> None:
    root_option = f"--trainer.default_root_dir={folder}"
    recorder = f"{WindowRecorder.__module__}.{WindowRecorder.__name__}"
    command = [
        *(sys.executable, "-m", "gpt_lightning", "fit", *arguments),
        root_option,
        f"--trainer.callbacks+={recorder}",
        f"--trainer.callbacks.folder={folder}",
        *([f"--trainer.callbacks.kill_at={kill_at}"] if kill_at is not None else []),
        *([] if logger.isEnabledFor(logging.INFO) else ["--quiet"]),
        *(["--verbose"] if logger.isEnabledFor(logging.DEBUG) else []),
    ]
    # on a terminal the run shows its own progress bar
    stderr = None if sys.stderr.isatty() else subprocess.PIPE
    with created_folder(folder):  # fit may refuse its arguments and write nothing
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
        )
        try:
            _, messages = process.communicate()
        finally:
            _kill_rest(process.pid, root_option)
    if kill_at is not None and process.returncode:
        return
    if process.returncode:
        last = (messages or "see above").strip().splitlines()[-1]
        if process.returncode == 2:
            raise ValueError(last.removeprefix("gpt_lightning: error: "))
        raise RuntimeError(f"fit ended with {process.returncode}: {last}")
    if kill_at is not None:
        raise RuntimeError(f"the run ended before step {kill_at}")


def _kill_rest(pid: int, root_option: str) -> None:
    """Kill what is left of a run: the other ranks after a kill, or all processes after Ctrl-C.

    Args:
        pid: The first process, which started a session.
        root_option: An option that only the processes of this run have, to find them on Windows, which has no sessions
            and forgets the children of a process that has ended.
    """
    if hasattr(os, "killpg") and hasattr(signal, "SIGKILL"):
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return
    for process in psutil.process_iter(["cmdline"]):
        if root_option in (process.info["cmdline"] or ()):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def compare_checkpoints(straight: Path, resumed: Path) -> list[Comparison]:
    """Comparison of everything in two checkpoints, in three parts: weights, optimizer, counters."""
    parts = [_split_checkpoint(read_checkpoint(path)) for path in (straight, resumed)]
    return [_compare_part(part, parts[0][part], parts[1][part]) for part in parts[0]]


def _split_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint, divided into the parts that are compared."""
    weights = checkpoint["state_dict"]
    if EMA_STATE in checkpoint:
        weights = {"weights": weights, "average": checkpoint[EMA_STATE]}
    optimizer = checkpoint["optimizer_states"]
    rest = {
        key: value
        for key, value in checkpoint.items()
        if key not in ("state_dict", EMA_STATE, "optimizer_states")
    }
    return {"weights": weights, "optimizer": optimizer, "counters": rest}


def _walk(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested mappings and sequences, each with its path."""
    if isinstance(tree, Mapping):
        for key in sorted(tree, key=str):
            yield from _walk(tree[key], f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from _walk(value, f"{path}.{i}")
    else:
        yield path, tree


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype}{tuple(value.shape)}".encode() + raw
    return value.hex().encode() if isinstance(value, float) else repr(value).encode()


def _describe(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]


def _compare_part(part: str, straight: Any, resumed: Any) -> Comparison:
    checksums, leaves = [], []
    for tree in (straight, resumed):
        total = hashlib.sha256()
        flat = {}
        for path, value in _walk(tree):
            content = _as_bytes(value)
            total.update(path.encode() + b"\0" + content)
            flat[path] = hashlib.sha256(content).digest(), value
        checksums.append(total.hexdigest())
        leaves.append(flat)
    difference = ""
    for path in [*leaves[0], *(leaves[1].keys() - leaves[0].keys())]:
        first, second = leaves[0].get(path), leaves[1].get(path)
        if first is None or second is None:
            difference = f"{path} is only in the {'resumed' if first is None else 'straight'} run"
        elif first[0] != second[0]:
            difference = f"{path}: {_describe_difference(first[1], second[1])}"
        if difference:
            break
    return Comparison(part, checksums[0], checksums[1], difference)


def _describe_difference(straight: Any, resumed: Any) -> str:
    both = isinstance(straight, Tensor) and isinstance(resumed, Tensor)
    if both and straight.shape == resumed.shape:
        largest = (straight.double() - resumed.double()).abs().max()
        return f"differs by up to {float(largest):.3g} (a tensor of {straight.numel():,} values)"
    return f"{_describe(straight)} in the straight run, {_describe(resumed)} in the resumed run"


def _compare_windows(straight: Path, cut: Path) -> Comparison:
    """Comparison of the windows of each optimizer step on each rank, including repeated steps."""
    checksums = []
    windows: list[dict[str, list[Any]]] = []
    difference = ""
    for folder in (straight, cut):
        windows_of_run: dict[str, list[Any]] = {}
        for file in sorted(folder.glob("windows-*.jsonl")):
            rank = file.stem.removeprefix("windows-")
            for line in file.read_text(encoding="utf-8").splitlines():
                step, micro_batch, *batch = json.loads(line)
                key = f"step {step}, micro-batch {micro_batch}, rank {rank}"
                if windows_of_run.setdefault(key, batch) != batch and not difference:
                    difference = f"{key}: windows {windows_of_run[key][0]}, then {batch[0]}"
        windows.append(windows_of_run)
        content = json.dumps(windows_of_run, sort_keys=True)
        checksums.append(hashlib.sha256(content.encode()).hexdigest())
    for key in sorted(windows[0].keys() | windows[1].keys()):
        first, second = windows[0].get(key), windows[1].get(key)
        if first != second and not difference:
            difference = f"{key}: windows {first and first[0]} in the straight run, {second and second[0]} in the resumed run"
    return Comparison("windows", checksums[0], checksums[1], difference)
