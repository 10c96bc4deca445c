"""What a durable save costs beside torch.save and an fsync: python benchmarks/saving.py [--repeats 5] [--tiny]

A checkpoint of 537 MB, weights and two moments, saved in turn by both ways in one process each for memory.
The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import at_most, description, interleaved, ratio

from gpt_lightning.training.checkpoint_io import AtomicCheckpointIO

# what one save by "ours" or "plain" takes more than the process had, over the file's bytes
CHILD = """
import os, sys
sys.path.insert(0, sys.argv[4])
from pathlib import Path
import saving
def resident(what):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(what))
way, path, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
saving.WAYS[way](saving.checkpoint(1000), path)  # the libraries are there
content = saving.checkpoint(size)
before = resident("VmRSS:")
saving.WAYS[way](content, path)
print((resident("VmHWM:") - before) / path.stat().st_size)
"""


def checkpoint(numbers: int) -> dict[str, object]:
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


WAYS = {"ours": ours, "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small file, to see that it runs")
    arguments = parser.parse_args()
    numbers = 120_000 if arguments.tiny else 134_000_000
    with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark-") as scratch:
        content = checkpoint(numbers)
        seconds = interleaved(
            {
                name: lambda way=way, name=name: way(content, Path(scratch, name, "last.ckpt"))
                for name, way in [("ours", ours), ("plain", _in_folder(plain))]
            },
            arguments.repeats,
        )
        size = Path(scratch, "ours", "last.ckpt").stat().st_size
        peaks = {}
        for name in WAYS:
            done = subprocess.run(
                [sys.executable, "-c", CHILD, name, str(Path(scratch, "peak.ckpt")), str(numbers),
                 str(Path(__file__).parent)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            peaks[name] = float(done.stdout)
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:6} {median:6.2f} s ({min(values):.2f} – {max(values):.2f}), "
              f"{size / median / 1e6:,.0f} MB/s, {peaks[name]:.3f} of its size in memory")  # fmt: skip
    targets = [
        at_most(
            "seconds: ours / torch.save + fsync", ratio(seconds["ours"], seconds["plain"]), 1.2
        ),
        at_most("memory: of the file's size", peaks["ours"], 0.05),
    ]
    print(json.dumps({"benchmark": "saving", "machine": description(), "bytes": size,
                      "seconds": seconds, "memory": peaks, "targets": targets}))  # fmt: skip


def _in_folder(way):
    def save(content: dict[str, object], path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        way(content, path)

    return save


if __name__ == "__main__":
    main()
