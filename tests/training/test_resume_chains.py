"""A run that is stopped many times, at any point and by any signal, equals an uninterrupted run."""

import csv
import json
import random
import shutil
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from forked_runs import POINTS, Runs, Stop
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training.verify_resume import compare_checkpoints
from helpers import (
    SMALL_QUICKSTART,
)
from runs import (
    file_times,
)

TINY_RUN = [
    *SMALL_QUICKSTART, "--run=r", "--model.config.emb_dim=4",
    "--model.config.n_layers=1", "--model.config.n_heads=1", "--model.config.drop_rate=0.1",
    "--evaluation.eval_freq=2", "--throughput.every_n_steps=3", "--evaluation.log_next_token=true",
    "--trainer.callbacks+=gpt_lightning.training.verify_resume.WindowRecorder",
    "--trainer.callbacks.folder=.",
]  # fmt: skip


def folder_with_text(folder: Path) -> Path:
    folder.mkdir()
    text = "".join(f"Line {i} of a text of its own.\n" for i in range(300))
    (folder / "my.txt").write_text(text, encoding="utf-8")
    return folder


RATES = ("tokens_per_second", "throughput/")


def tensorboard(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Steps and values of each tag as TensorBoard shows them; only the steps of rates."""
    files = [list(EventFileLoader(str(path)).Load()) for path in folder.glob("events.*")]
    shown: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for events in sorted(files, key=lambda events: events[0].wall_time):
        for event in events:
            if event.HasField("session_log"):  # a resumed run removes what it will log again
                for tag, points in shown.items():
                    shown[tag] = [point for point in points if point[0] < event.step]
            for value in event.summary.value:
                if value.tag.startswith("_hparams_"):  # with the time
                    continue
                content = None if value.tag.startswith(RATES) else value.SerializeToString()
                shown[value.tag].append((event.step, content))
    return {tag: points for tag, points in shown.items() if points}


def results_of(folder: Path) -> dict[str, Any]:
    """Results of a run besides its checkpoints, without times and rates."""
    windows = defaultdict(list)
    for line in (folder / "windows-0.jsonl").read_text(encoding="utf-8").splitlines():
        step, micro_batch, *seen = json.loads(line)
        windows[step, micro_batch].append(seen)
    for seen in windows.values():
        assert all(one == seen[0] for one in seen)  # repeated steps read the same windows
    with (folder / "checkpoints/r/metrics.csv").open(encoding="utf-8") as file:
        rows = [{k: v for k, v in row.items() if k not in RATES} for row in csv.DictReader(file)]
    return {
        "windows": {key: seen[0] for key, seen in sorted(windows.items())},
        "metrics.csv": rows,
        "tensorboard": tensorboard(folder / "checkpoints/r"),
    }


def assert_same(straight: Path, cut: Path) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        compared = compare_checkpoints(
            straight / "checkpoints/r" / name, cut / "checkpoints/r" / name
        )
        assert [part.difference for part in compared if part.difference] == []
    expected, found = results_of(straight), results_of(cut)
    for part in expected:
        assert found[part] == expected[part], part


def errors_of(folder: Path) -> str:
    return (folder / "err").read_text(encoding="utf-8")


@pytest.mark.slow
def test_run_extended_epoch_by_epoch_equals_uninterrupted_run(runs: Runs, tmp_path: Path) -> None:
    """Each resume is at the end of an epoch; the same command again changes nothing."""
    straight, cut = folder_with_text(tmp_path / "straight"), folder_with_text(tmp_path / "cut")
    assert runs.run(straight, ["fit", *TINY_RUN, "--trainer.max_epochs=3"]) == 0, errors_of(
        straight
    )
    for epochs in (1, 2, 3):
        fit = ["fit", *TINY_RUN, "--ckpt_path=auto", f"--trainer.max_epochs={epochs}"]
        assert runs.run(cut, fit) == 0, errors_of(cut)
        before = file_times(cut / "checkpoints")
        assert runs.run(cut, fit) == 0
        assert f"already finished (epoch {epochs} of {epochs})" in errors_of(cut).splitlines()[-1]
        assert file_times(cut / "checkpoints") == before
    assert_same(straight, cut)


@pytest.mark.parametrize(
    "when",
    [
        # among the hooks at an epoch's end
        pytest.param(["--trainer.callbacks.every_n_epochs=1"], marks=pytest.mark.slow),
        pytest.param(
            ["--trainer.callbacks.monitor=val_loss", "--trainer.limit_val_batches=2",
             "--trainer.val_check_interval=3"],
            marks=pytest.mark.slow,
        ),  # after Lightning's validation
    ],
)  # fmt: skip
def test_checkpoints_of_lightnings_callback_resume_exactly(
    runs: Runs, tmp_path: Path, when: list[str]
) -> None:
    validation = [option for option in when if not option.startswith("--trainer.callbacks")]
    straight, cut = folder_with_text(tmp_path / "straight"), folder_with_text(tmp_path / "cut")
    fit = ["fit", *TINY_RUN, *validation, "--trainer.max_epochs=3"]
    assert runs.run(straight, fit) == 0, errors_of(straight)
    saving = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=kept",
              "--trainer.callbacks.save_top_k=-1", *when]  # fmt: skip
    first = ["fit", *TINY_RUN, "--run=first", "--trainer.max_epochs=2", *saving]
    assert runs.run(cut, first) == 0, errors_of(cut)
    kept = sorted((cut / "kept").glob("*.ckpt"))
    assert len(kept) >= 2
    for path in kept:
        shutil.rmtree(cut / "checkpoints/r", ignore_errors=True)
        assert runs.run(cut, [*fit, f"--ckpt_path={path}"]) == 0, errors_of(cut)
        last = Path("checkpoints/r/last.ckpt")
        compared = compare_checkpoints(straight / last, cut / last)
        assert [part.difference for part in compared if part.difference] == []


VARIANTS = {
    "plain": [],
    "book": ["--rng=global"],
    "accumulated": ["--trainer.accumulate_grad_batches=3"],
    "global batch": ["--data.global_batch_size=4", "--checkpoint.every_n_train_steps=2"],
    "mixture": ["--data.mixture={sample: 2, my.txt: 1}", "--checkpoint.every_n_train_steps=3"],
    "scheduled": [
        "--trainer.callbacks+=GradientAccumulationScheduler",
        "--trainer.callbacks.scheduling={0: 1, 1: 3, 2: 2}",
        "--checkpoint.every_n_train_steps=2",
    ],
    "book, accumulated": ["--rng=global", "--trainer.accumulate_grad_batches=2",
                          "--checkpoint.every_n_train_steps=1"],
    "limited": ["--trainer.limit_train_batches=5", "--data.num_workers=1", "--skip_spikes=true"],
}  # fmt: skip


EPOCHS = 4


def chain(rng: random.Random, steps: int, tokens: int) -> list[tuple[list[str], Stop | None]]:
    """Limits and stops of up to six successive runs, then of one that ends by itself.

    Args:
        steps: Optimizer steps of the whole run.
        tokens: The same in tokens.
    """
    ways = {
        "epochs": lambda part: [f"--trainer.max_epochs={max(1, round(part * EPOCHS))}"],
        "steps": lambda part: ["--trainer.max_epochs=-1", f"--trainer.max_steps={max(1, round(part * steps))}"],
        "tokens": lambda part: ["--trainer.max_epochs=null", f"--max_tokens={max(1, round(part * tokens))}"],
    }  # fmt: skip
    links: list[tuple[list[str], Stop | None]] = []
    for part in sorted(rng.random() for _ in range(rng.randint(1, 6))):
        kind = rng.choice(["killed", "killed", "terminated", "finished", "given again"])
        if kind == "given again" and links and links[-1][1] is None:
            links.append(links[-1])
        elif kind in ("finished", "given again"):
            links.append((ways[rng.choice(list(ways))](part), None))
        else:
            signum = signal.SIGKILL if kind == "killed" else signal.SIGTERM
            per_epoch = steps / EPOCHS
            epoch = int(part * EPOCHS)
            # at the first, a middle or the last batch of an epoch
            place = rng.choice([0, 1, per_epoch // 2, per_epoch - 1, per_epoch])
            stop = Stop(int(signum), rng.choice(POINTS), int(epoch * per_epoch + place))
            links.append((ways["epochs"](1), stop))
    return [*links, (ways[rng.choice(["epochs", "epochs", "tokens", "steps"])](1), None)]


@pytest.mark.parametrize(
    "seed",
    [
        2,
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 1, *range(3, 11))),
        *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(11, 211)),
    ],
)
def test_any_chain_of_stops_equals_uninterrupted_run(runs: Runs, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    variant = list(VARIANTS)[seed % len(VARIANTS)]
    fit = ["fit", *TINY_RUN, *VARIANTS[variant]]
    straight, cut = folder_with_text(tmp_path / "straight"), folder_with_text(tmp_path / "cut")
    assert runs.run(straight, [*fit, f"--trainer.max_epochs={EPOCHS}"]) == 0, errors_of(straight)
    whole = read_checkpoint(straight / "checkpoints/r/last.ckpt")
    links = chain(rng, whole["global_step"], whole["tokens_seen"])
    for arguments, stop in links:
        code = runs.run(cut, [*fit, *arguments, "--ckpt_path=auto"], stop)
        assert code in (0, 143, -signal.SIGKILL), (links, errors_of(cut))
    assert code == 0
    last = links[-1][0]
    if last != [f"--trainer.max_epochs={EPOCHS}"]:
        straight = folder_with_text(tmp_path / "other limit")
        assert runs.run(straight, [*fit, *last]) == 0, errors_of(straight)
    try:
        assert_same(straight, cut)
    except AssertionError as error:
        raise AssertionError(f"{variant}: {links}") from error
