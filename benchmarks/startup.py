"""What waits before anything begins: python benchmarks/startup.py [--repeats 9] [--tiny]

Seconds of fresh processes, one after the other in turn: imports, and commands that train nothing. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial

from machine import at_most, description, interleaved, ratio

WAYS = {
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
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="without fit's help, the slowest")
    arguments = parser.parse_args()
    ways = dict(WAYS)
    if arguments.tiny:
        del ways["python -m gpt_lightning fit --help"]
    with tempfile.TemporaryDirectory() as scratch:
        run = partial(subprocess.run, check=True, capture_output=True, cwd=scratch)
        seconds = interleaved(
            {way: partial(run, [sys.executable, *how]) for way, how in ways.items()},
            arguments.repeats,
        )
    medians = {}
    for way, values in seconds.items():
        medians[way] = round(statistics.median(values), 3)
        print(f"{way:58} {medians[way]:6.2f} s ({min(values):.2f} – {max(values):.2f})")
    targets = [
        at_most(f"{way} / import torch", ratio(seconds[way], seconds["import torch"]), 1.1)
        for way in list(ways)[1:3]
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
