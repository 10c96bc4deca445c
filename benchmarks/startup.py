"""Start-up time of imports, help texts and first steps: python benchmarks/startup.py [--repeats 9] [--tiny]

Each import and each command runs in a new process, and the processes take turns. `fit` and `validate`
end at their first step. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from machine import at_most, description, interleaved, ratio

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART, VERDICT = str(CONFIGS / "quickstart.yaml"), str(CONFIGS / "verdict.yaml")

LIGHTNING = "import lightning.pytorch"
IMPORTS = [
    "import torch",
    "import gpt_lightning",
    "from gpt_lightning import GPTModel, load_model, generate",
    LIGHTNING,
]
HELP_TEXTS = [["--help"], ["generate", "--help"], ["fit", "--help"], ["fit", "--help-all"]]
TO_FIRST_STEP = """
import os, sys
from gpt_lightning.cli.main import main
from gpt_lightning.training.module import GPTLightningModule

def stop(*arguments, **options):
    os._exit(0)

GPTLightningModule.training_step = GPTLightningModule.validation_step = stop
sys.exit(f"no step: exit code {main(sys.argv[1:])}")
"""
SECONDS_AFTER_LIGHTNING = 2.5  # at most, until a command begins its first step


def to_first_step(run: str) -> dict[str, list[str]]:
    """Commands, as arguments of the interpreter. ``run`` is a finished run of quickstart."""
    in_124m = ["--config", VERDICT, "--data.text=sample"]
    return {
        "fit --config configs/quickstart.yaml": [
            "-c", TO_FIRST_STEP, "fit", "--config", QUICKSTART
        ],
        "fit --config configs/verdict.yaml": ["-c", TO_FIRST_STEP, "fit", *in_124m],
        "validate --init_from checkpoints/quickstart": [
            "-c", TO_FIRST_STEP, "validate", "--init_from", run
        ],
        "plan --config configs/verdict.yaml": ["-m", "gpt_lightning", "plan", *in_124m],
    }  # fmt: skip


def run_in_new_folder(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="leave out fit --help-all and 124M")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "gpt_lightning", "fit", "--config", QUICKSTART]
        settings = ["--trainer.max_steps=1", "--quiet"]
        subprocess.run([*command, *settings], check=True, cwd=scratch)
        commands = to_first_step(f"{scratch}/checkpoints/quickstart")
        processes = {
            **{code: ["-c", code] for code in IMPORTS},
            **{
                f"python -m gpt_lightning {' '.join(options)}": ["-m", "gpt_lightning", *options]
                for options in HELP_TEXTS
            },
            **commands,
        }
        if arguments.tiny:
            for name in [name for name in processes if "--help-all" in name or "verdict" in name]:
                del processes[name]
        seconds = interleaved(
            {name: partial(run_in_new_folder, options) for name, options in processes.items()},
            arguments.repeats,
        )
    medians = {}
    for name, values in seconds.items():
        medians[name] = round(statistics.median(values), 3)
        print(f"{name:58} {medians[name]:6.2f} s ({min(values):.2f} – {max(values):.2f})")
    targets = [
        at_most(f"{name} / import torch", ratio(seconds[name], seconds["import torch"]), 1.1)
        for name in IMPORTS[1:3]
    ]
    for name in [name for name in commands if name in seconds]:
        pairs = zip(seconds[name], seconds[LIGHTNING], strict=True)
        after = statistics.median(a - b for a, b in pairs)
        targets.append(at_most(f"seconds: {name} - {LIGHTNING}", after, SECONDS_AFTER_LIGHTNING))
    for target in targets:
        print("passed" if target["passed"] else "FAILED", target)
    print(
        json.dumps(
            {
                "benchmark": "startup",
                "machine": description("lightning"),
                "seconds": medians,
                "targets": targets,
            }
        )
    )


if __name__ == "__main__":
    main()
