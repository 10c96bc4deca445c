"""Test that killed runs lose nothing: python benchmarks/kill.py [--kills 20] [--seed 0] [--combinations 8]

A small run with dropout 0.1 trains twice: once without interruption, and once with many SIGKILLs, after each of which
--ckpt_path auto resumes it. Half of the kills come at random moments, and half during a save, which the file that it
writes shows. At the end weights, optimizer and counters of both runs must have the same bits. The kills are divided
among combinations of accumulation 1 and 4, workers 0 and 2, float32 and bf16. The last line is JSON.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import at_least, at_most, description

from gpt_lightning.training.verify_resume import compare_checkpoints

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
SMALL = [
    f"--config={ROOT}/configs/quickstart.yaml", "--trainer.accelerator=cpu", "--run=run",
    "--model.config.context_length=32", "--model.config.emb_dim=16", "--model.config.n_layers=2",
    "--model.config.drop_rate=0.1", "--evaluation.eval_freq=7", "--evaluation.max_new_tokens=3",
    "--trainer.max_epochs=-1", f"--trainer.max_steps={STEPS}", "--checkpoint.every_n_train_steps=1",
]  # fmt: skip
COMBINATIONS = list(itertools.product((1, 4), (0, 2), ("32-true", "bf16-mixed")))


def command(folder: Path, combination: tuple[int, int, str]) -> list[str]:
    accumulation, workers, precision = combination
    return [
        *(sys.executable, "-m", "gpt_lightning", "fit", *SMALL, "--ckpt_path=auto"),
        f"--trainer.accumulate_grad_batches={accumulation}",
        f"--data.num_workers={workers}",
        f"--trainer.precision={precision}",
        f"--trainer.default_root_dir={folder}",
    ]


def run_until_end(folder: Path, combination: tuple[int, int, str]) -> None:
    finished = subprocess.run(
        command(folder, combination), check=False, capture_output=True, text=True
    )
    if finished.returncode:
        raise SystemExit(
            f"{folder.name}, {combination}: exit code {finished.returncode}\n{finished.stderr}"
        )


def kill_once(
    folder: Path, combination: tuple[int, int, str], rng: random.Random, during_save: bool
) -> str:
    """Start or resume the run and kill it. Returns where it was killed."""
    unfinished = folder / "checkpoints" / "run" / ".last.ckpt.tmp"
    process = subprocess.Popen(
        command(folder, combination), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    for line in process.stderr:  # training starts after this line
        if b"parameters on" in line:
            break
    # kill during the n-th save from here, or within about a second of training
    saves_to_skip, wait = rng.randrange(4), rng.random()
    start, was_saving = time.monotonic(), False
    while process.poll() is None:
        is_saving = unfinished.exists()
        if during_save and is_saving and not was_saving:
            if saves_to_skip == 0:
                time.sleep(rng.random() * 0.004)
                break
            saves_to_skip -= 1
        was_saving = is_saving
        if not during_save and time.monotonic() - start > wait:
            break
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    if code == 0:
        return "after the end"
    return "during a save" if unfinished.exists() else "elsewhere"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="number of kills in total")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument(
        "--combinations",
        type=int,
        default=len(COMBINATIONS),
        help="number of combinations, drawn at random",
    )
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    combinations = rng.sample(COMBINATIONS, arguments.combinations)
    os.environ["PYTHONUNBUFFERED"] = "1"
    places: list[str] = []
    mismatches = 0
    with tempfile.TemporaryDirectory() as scratch:
        for i, combination in enumerate(combinations):
            uninterrupted, killed = (
                Path(scratch, f"{i}-uninterrupted"),
                Path(scratch, f"{i}-killed"),
            )
            run_until_end(uninterrupted, combination)
            kills = range(i, arguments.kills, len(combinations))
            for kill in kills:
                during_save = kill // len(combinations) % 2 == 0
                places.append(kill_once(killed, combination, rng, during_save))
            run_until_end(killed, combination)
            checkpoint = Path("checkpoints", "run", "last.ckpt")
            compared = compare_checkpoints(uninterrupted / checkpoint, killed / checkpoint)
            differences = [
                f"{part.part}: {part.difference}" for part in compared if part.difference
            ]
            mismatches += bool(differences)
            print(
                combination,
                places[-len(kills) :] if kills else [],
                differences or "same bits",
                flush=True,
            )
    kills_during_save = places.count("during a save")
    targets = [
        at_most("runs with different bits at the end", mismatches, 0),
        at_least("kills", len(places) - places.count("after the end"), arguments.kills),
        at_least("kills during a save", kills_during_save, min(6, arguments.kills * 3 // 10)),
    ]
    print(json.dumps({"benchmark": "kill", "machine": description("lightning"), "seed": arguments.seed,
                      "kills": {place: places.count(place) for place in set(places)}, "targets": targets}))  # fmt: skip


if __name__ == "__main__":
    main()
