"""Time and memory to save a checkpoint, compared with torch.save and an fsync: python benchmarks/saving.py [--repeats 20] [--tiny]

The checkpoint has 536 MB: weights and two moments. The two functions take turns. Memory is measured in a separate
process for each. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from machine import at_most, description, interleaved, ratio

from gpt_lightning.training.checkpoint_io import AtomicCheckpointIO

Saver = Callable[[dict[str, object], Path], None]

# prints how much a save grows the process's peak memory, as a fraction of the file's size
CHILD = """
import os, sys
sys.path.insert(0, sys.argv[4])
from pathlib import Path
import saving
def memory(kind):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(kind))
save, path, numbers = saving.SAVERS[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3])
save(saving.checkpoint(1000), path)  # loads the libraries
content = saving.checkpoint(numbers)
before = memory("VmRSS:")
save(content, path)
print((memory("VmHWM:") - before) / path.stat().st_size)
"""


def checkpoint(numbers: int) -> dict[str, object]:
    """A checkpoint with this number of float32 numbers, as weights and two moments."""

    def tensors() -> dict[str, torch.Tensor]:
        return {str(i): torch.randn(numbers // 12) for i in range(4)}

    return {
        "state_dict": tensors(),
        "optimizer_states": [{"state": {"exp_avg": tensors(), "exp_avg_sq": tensors()}}],
        "hyper_parameters": {"config": {}},
        "global_step": 1,
    }


def ours(content: dict[str, object], path: Path) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint(content, path)
    assert not io.failures


def plain(content: dict[str, object], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


SAVERS = {"ours": ours, "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--tiny", action="store_true", help="use a small file, to test that the benchmark runs"
    )
    arguments = parser.parse_args()
    numbers = 120_000 if arguments.tiny else 134_000_000
    with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark-") as scratch:
        content = checkpoint(numbers)
        seconds = interleaved(
            {
                name: lambda save=save, name=name: save(content, Path(scratch, name, "last.ckpt"))
                for name, save in [("ours", ours), ("plain", _in_folder(plain))]
            },
            arguments.repeats,
        )
        size = Path(scratch, "ours", "last.ckpt").stat().st_size
        peaks = {}
        for name in SAVERS:
            done = subprocess.run(
                [sys.executable, "-c", CHILD, name, str(Path(scratch, "peak.ckpt")), str(numbers),
                 str(Path(__file__).parent)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            peaks[name] = float(done.stdout)
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:6} {median:6.2f} s ({min(values):.2f} – {max(values):.2f}), "
              f"{size / median / 1e6:,.0f} MB/s, peak memory {peaks[name]:.3f} of its size")  # fmt: skip
    plain_median = statistics.median(seconds["plain"])
    targets = [
        at_most(
            "seconds: ours / torch.save + fsync", ratio(seconds["ours"], seconds["plain"]), 1.15
        ),
        at_most(
            "the slowest of ours / the median of the other",
            max(seconds["ours"]) / plain_median,
            1.5,
        ),
        at_most("peak memory / file size", peaks["ours"], 0.05),
    ]
    print(json.dumps({"benchmark": "saving", "machine": description(), "bytes": size,
                      "seconds": seconds, "memory": peaks, "targets": targets}))  # fmt: skip


def _in_folder(save: Saver) -> Saver:
    def create_folder_and_save(content: dict[str, object], path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        save(content, path)

    return create_folder_and_save


if __name__ == "__main__":
    main()
