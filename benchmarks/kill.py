"""Does a run survive? python benchmarks/kill.py [--kills 20] [--seed 0]

The same small run with dropout 0.1, once straight and once killed with SIGKILL again and again and resumed
by --ckpt_path auto: at random moments, and half of the times inside a save, which is seen from the file it
writes. Weights, optimizer and counters must be the same bits. Combinations of accumulation 1 and 4, workers
0 and 2, float32 and bf16 take turns. The last line is JSON.
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
UPDATES = 60
SMALL = [
    f"--config={ROOT}/configs/quickstart.yaml", "--trainer.accelerator=cpu", "--run=run",
    "--model.config.context_length=32", "--model.config.emb_dim=16", "--model.config.n_layers=2",
    "--model.config.drop_rate=0.1", "--evaluation.eval_freq=7", "--evaluation.max_new_tokens=3",
    "--trainer.max_epochs=-1", f"--trainer.max_steps={UPDATES}", "--checkpoint.every_n_train_steps=1",
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


def run_to_the_end(folder: Path, combination: tuple[int, int, str]) -> None:
    finished = subprocess.run(
        command(folder, combination), check=False, capture_output=True, text=True
    )
    if finished.returncode:
        raise SystemExit(
            f"{folder.name}, {combination}: exit code {finished.returncode}\n{finished.stderr}"
        )


def kill_once(
    folder: Path, combination: tuple[int, int, str], rng: random.Random, inside: bool
) -> str:
    """Start or go on, and kill; returns where it was killed."""
    unfinished = folder / "checkpoints" / "run" / ".last.ckpt.tmp"
    process = subprocess.Popen(
        command(folder, combination), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    for line in process.stderr:  # training begins with this line
        if b"parameters on" in line:
            break
    # the n-th save from here, or a moment within about a second of training
    skip, wait = rng.randrange(4), rng.random()
    began, seen = time.monotonic(), False
    while process.poll() is None:
        is_there = unfinished.exists()
        if inside and is_there and not seen:
            if skip == 0:
                time.sleep(rng.random() * 0.004)
                break
            skip -= 1
        seen = is_there
        if not inside and time.monotonic() - began > wait:
            break
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    if code == 0:
        return "after the end"
    return "inside a save" if unfinished.exists() else "elsewhere"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--combinations", type=int, default=len(COMBINATIONS))
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    combinations = rng.sample(COMBINATIONS, arguments.combinations)
    os.environ["PYTHONUNBUFFERED"] = "1"
    places: list[str] = []
    mismatches = 0
    with tempfile.TemporaryDirectory() as scratch:
        for i, combination in enumerate(combinations):
            straight, cut = Path(scratch, f"{i}-straight"), Path(scratch, f"{i}-cut")
            run_to_the_end(straight, combination)
            own = range(i, arguments.kills, len(combinations))
            for kill in own:
                places.append(
                    kill_once(cut, combination, rng, inside=kill // len(combinations) % 2 == 0)
                )
            run_to_the_end(cut, combination)
            left = Path("checkpoints", "run", "last.ckpt")
            compared = compare_checkpoints(straight / left, cut / left)
            differences = [
                f"{part.part}: {part.difference}" for part in compared if part.difference
            ]
            mismatches += bool(differences)
            print(
                combination,
                places[-len(own) :] if own else [],
                differences or "the same bits",
                flush=True,
            )
    inside = places.count("inside a save")
    targets = [
        at_most("runs that ended with other bits", mismatches, 0),
        at_least("kills", len(places) - places.count("after the end"), arguments.kills),
        at_least("kills inside a save", inside, min(6, arguments.kills * 3 // 10)),
    ]
    print(json.dumps({"benchmark": "kill", "machine": description("lightning"), "seed": arguments.seed,
                      "kills": {place: places.count(place) for place in set(places)}, "targets": targets}))  # fmt: skip


if __name__ == "__main__":
    main()
