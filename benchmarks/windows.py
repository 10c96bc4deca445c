"""Speed and memory of the data loader on a store of 10^9 tokens: python benchmarks/windows.py [--tiny]

The store is a sparse file, which is memory-mapped in ten parts, as the shards of a store are. The loader reads 10^6
windows of 1024 tokens in random order, in batches, as in training. It runs in three separate processes: without workers,
with two workers, and without workers on a mixture of two such stores. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import at_least, at_most, description

# prints tokens per second, the largest growth of the process in MB, and the seconds to the first batch
CHILD = """
import sys, time
import numpy as np
from gpt_lightning.data.sampler import MixtureSampler
from gpt_lightning.data.dataloader import ResumableDataLoader
from gpt_lightning.data.dataset import ConcatWindowDataset, WindowDataset

def memory_mb(kind):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1000 for line in file if line.startswith(kind))

path, tokens, draws, length, batch_size, workers, stores = sys.argv[1], *map(int, sys.argv[2:])

def loader(tokens):
    cuts = np.linspace(0, tokens, 11).astype(int)
    parts = [np.memmap(path, "<u2", "r", 2 * int(a), (int(b - a),)) for a, b in zip(cuts, cuts[1:])]
    datasets = [WindowDataset(parts, length, length // 2) for _ in range(stores)]
    mixture = MixtureSampler([len(d) for d in datasets], [0.7, 0.3], 1) if stores > 1 else None
    dataset = ConcatWindowDataset(datasets) if mixture else datasets[0]
    return ResumableDataLoader(dataset, batch_size, shuffle=True, drop_last=True, seed=1, num_workers=workers,
                               mixture=mixture)

for _ in zip(range(9), loader(20 * length * batch_size)):  # warm-up: threads, torch
    pass
before, start = memory_mb("VmRSS:"), time.perf_counter()
batches = iter(loader(tokens))
next(batches)
first = time.perf_counter() - start
drawn, growth, start = 0, 0.0, time.perf_counter()
for i, (inputs, _) in enumerate(batches):
    drawn += len(inputs)
    if i % 500 == 0:
        growth = max(growth, memory_mb("VmRSS:") - before)
    if drawn >= draws:
        break
seconds = time.perf_counter() - start
print(drawn * length / seconds, max(growth, memory_mb("VmHWM:") - before), first)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10**9)
    parser.add_argument("--draws", type=int, default=10**6)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument(
        "--tiny", action="store_true", help="use a small store, to test that the benchmark runs"
    )
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.tokens, arguments.draws = 10**7, 2000
    targets = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "tokens")
        with path.open("wb") as file:
            file.truncate(2 * arguments.tokens)
        for name, workers, stores in [
            ("no workers", 0, 1), ("two workers", 2, 1), ("a mixture of two", 0, 2)
        ]:  # fmt: skip
            sizes = (arguments.tokens, arguments.draws, arguments.length, arguments.batch_size)
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(path), *map(str, (*sizes, workers, stores))],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            rate, growth, first = map(float, done.stdout.split())
            print(
                f"{name:17} {rate / 1e6:6.1f} million tokens/s, {growth:5.1f} MB more, "
                f"first batch after {first * 1e3:.1f} ms",
                flush=True,
            )
            targets += [
                at_least(f"{name}: million tokens/s", rate / 1e6, 20.0),
                at_most(f"{name}: MB of memory", growth, 50.0),
            ]
    sizes = {name: getattr(arguments, name) for name in ("tokens", "draws", "length", "batch_size")}
    print(
        json.dumps(
            {"benchmark": "windows", "machine": description("numpy"), **sizes, "targets": targets}
        )
    )


if __name__ == "__main__":
    main()
