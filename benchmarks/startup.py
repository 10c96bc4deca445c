"""Start-up time of imports and of help texts: python benchmarks/startup.py [--repeats 9] [--tiny]

Each import and each command runs in a new process, and the processes take turns. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial

from machine import at_most, description, interleaved, ratio

# name → arguments of the interpreter
PROCESSES = {
    "import torch": ["-c", "import torch"],
    "import gpt_lightning": ["-c", "import gpt_lightning"],
    "from gpt_lightning import GPTModel, load_model, generate": [
        "-c",
        "from gpt_lightning import GPTModel, load_model, generate",
    ],
    "import lightning.pytorch": ["-c", "import lightning.pytorch"],
    "python -m gpt_lightning --help": ["-m", "gpt_lightning", "--help"],
    "python -m gpt_lightning generate --help": ["-m", "gpt_lightning", "generate", "--help"],
    "python -m gpt_lightning fit --help": ["-m", "gpt_lightning", "fit", "--help"],
    "python -m gpt_lightning fit --help-all": ["-m", "gpt_lightning", "fit", "--help-all"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="leave out the slowest: fit --help-all")
    arguments = parser.parse_args()
    processes = dict(PROCESSES)
    if arguments.tiny:
        del processes["python -m gpt_lightning fit --help-all"]
    with tempfile.TemporaryDirectory() as scratch:
        run = partial(subprocess.run, check=True, capture_output=True, cwd=scratch)
        seconds = interleaved(
            {name: partial(run, [sys.executable, *options]) for name, options in processes.items()},
            arguments.repeats,
        )
    medians = {}
    for name, values in seconds.items():
        medians[name] = round(statistics.median(values), 3)
        print(f"{name:58} {medians[name]:6.2f} s ({min(values):.2f} – {max(values):.2f})")
    targets = [
        at_most(f"{name} / import torch", ratio(seconds[name], seconds["import torch"]), 1.1)
        for name in list(processes)[1:3]
    ]
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
