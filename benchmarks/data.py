"""Time and memory to prepare a corpus: python benchmarks/data.py [--megabytes 1000] [--corpus FILE] [--repeats 3] [--tiny]

The benchmark generates a varied text, half plain text and half JSON lines. It prepares the text with one, two and four
workers, and with two workers and five SIGKILLs; all stores must be the same. With two workers it also prepares
``--corpus``, or a twentieth of the text, with and without the extra ``fast`` in turn. Last it opens a store of 10⁹
tokens (a sparse file) and measures time and memory. The last line is JSON.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import at_least, at_most, description, ratio

from gpt_lightning.data.corpus import read_corpus
from gpt_lightning.data.token_store import KIND
from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.storage.checksum import write_self_checksummed

KILLS = 5
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"

PREPARE = """
import sys
from gpt_lightning.cli.main import main
code = main(sys.argv[1:])
with open("/proc/self/status") as file:
    print(next(line.split()[1] for line in file if line.startswith("VmHWM:")))
sys.exit(code)
"""

WITHOUT_FAST = "import sys; sys.modules.update(fastokens=None, orjson=None)\n" + PREPARE

# prints the seconds to open a store, and the growth of the process in MB
OPEN = """
import json, sys, time
from gpt_lightning.data.token_cache import read_splits

def memory_mb():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS:"))

before, start = memory_mb(), time.perf_counter()
parts, _ = read_splits(sys.argv[1], 1.0)
print(json.dumps({"seconds": time.perf_counter() - start, "mb": memory_mb() - before}))
"""


def make_text(folder: Path, megabytes: float, seed: int = 0) -> list[str]:
    """Write two plain texts and two files of JSON lines, with a quarter of the megabytes each.

    The words follow Zipf's law. There are 130,000 of them, those of the sample story first, with numbers, capitalized
    words and a few words in other scripts. Documents have 200 bytes to 2 MB.
    """
    rng = random.Random(seed)
    words = ["".join(rng.choices(LETTERS, range(27, 1, -1), k=rng.choice([2, 3, 4, 5, 5, 6, 7, 9, 12])))
             for _ in range(100_000)]  # fmt: skip
    words += [word.capitalize() for word in words[:30_000]]
    common = [word for word, _ in Counter(read_corpus("sample").split()).most_common()]
    words = common + words[len(common) :]
    words[50:80] = [*"aI7", "слово", "Größe", "naïve", "2,048", "1999", "don't", "it's"] * 3
    ends = [" "] * 10 + [", ", ". ", ".\n", "\n\n", '" ']
    parts = np.array([word + rng.choice(ends) for word in words], dtype=object)
    numbers = np.random.default_rng(seed)
    zipf = np.cumsum(1 / np.arange(10, len(parts) + 10))
    folder.mkdir()

    def document() -> str:
        n = int(np.exp(numbers.uniform(np.log(40), np.log(4000))))
        return "".join(parts[np.searchsorted(zipf, numbers.uniform(0, zipf[-1], n))])

    paths = [folder / name for name in ("a.txt", "a.jsonl", "b.txt", "b.jsonl")]
    for path in paths:
        left = megabytes * 1e6 / 4
        with path.open("wb") as file:
            while left > 0:
                if path.suffix == ".txt":  # 200 of them make a document
                    line = document() + ("\n" if rng.random() < 0.995 else "<|endoftext|>")
                else:
                    line = json.dumps({"id": rng.random(), "text": document()}) + "\n"
                left -= file.write(line.encode())
    return [str(path) for path in paths]


def prepare_arguments(inputs: list[str], out: Path, workers: int, shard_tokens: int) -> list[str]:
    return ["prepare", *inputs, f"--out={out}", f"--workers={workers}",
            f"--shard_tokens={shard_tokens}", "--json"]  # fmt: skip


class Run(NamedTuple):
    """Seconds, peak memory in MB, and the fraction of the machine's CPU time that other processes used."""

    seconds: float
    peak_mb: float
    others: float


def prepare(
    inputs: list[str], out: Path, workers: int, shard_tokens: int, program: str = PREPARE
) -> Run:
    machine_before, usage_before = cpu_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, *prepare_arguments(inputs, out, workers, shard_tokens)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    elapsed = time.perf_counter() - start
    machine, usage = cpu_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
    child_seconds = (usage.ru_utime + usage.ru_stime) - (
        usage_before.ru_utime + usage_before.ru_stime
    )
    others = max(0.0, machine - machine_before - child_seconds) / (elapsed * (os.cpu_count() or 1))
    result, peak = done.stdout.splitlines()
    return Run(json.loads(result)["seconds"], int(peak) * 1024 / 1e6, round(others, 3))


def cpu_seconds() -> float:
    """CPU seconds that all processes of the machine have used."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def quiet_pair(inputs: list[str], folder: Path, shard_tokens: int, attempts: int) -> dict[str, Run]:
    """Runs with one and with two workers; each is the one of up to ``attempts`` with the least load by others.

    A run is repeated if other processes used more than 5 % of the machine.
    """
    best: dict[str, Run] = {}
    for workers in ("1", "2"):
        for attempt in range(attempts):
            out = folder / workers
            if attempt:
                shutil.rmtree(out)
            run = prepare(inputs, out, int(workers), shard_tokens)
            best[workers] = min(run, best.get(workers, run), key=lambda one: one.others)
            if run.others < 0.05:
                break
    return best


def fast_pair(inputs: list[str], folder: Path, shard_tokens: int) -> dict[str, Run]:
    """Runs of two workers with and without the extra ``fast``, whose stores must be the same."""
    programs = {"fast": PREPARE, "without": WITHOUT_FAST}
    pair = {name: prepare(inputs, folder / name, 2, shard_tokens, program) for name, program in programs.items()}  # fmt: skip
    if len({folder_checksum(folder / name) for name in programs}) != 1:
        raise SystemExit("data.py: the extra fast makes another store")
    return pair


def prepare_and_kill(inputs: list[str], out: Path, shard_tokens: int, wait: float) -> int:
    """Run ``prepare``, kill it ``KILLS`` times, each time after one more shard, and let it finish. Returns the kills."""
    rng = random.Random(1)
    kills = 0
    command = [
        sys.executable,
        "-m",
        "gpt_lightning",
        *prepare_arguments(inputs, out, 2, shard_tokens),
    ]
    for _ in range(KILLS):
        shards_before = len(list(out.glob("*.bin")))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("*.bin"))) <= shards_before:
            time.sleep(0.002)
        time.sleep(rng.random() * wait)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return kills


def folder_checksum(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def open_twice(folder: Path, tokens: int) -> list[dict[str, float]]:
    """Measure twice how a store of one sparse shard is opened. The first time, its checksum is computed."""
    folder.mkdir()
    shard = folder / "train-00000.bin"
    with shard.open("wb") as file:
        file.truncate(2 * tokens)
    with shard.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    shards = [{"name": shard.name, "tokens": tokens, "sha256": sha256}]
    manifest = {"tokenizer": GPT2.record, "settings": {"val_ratio": 0.0},
                "shards": {"train": shards, "val": []}}  # fmt: skip
    write_self_checksummed(folder / "manifest.json", KIND, manifest)
    measurements = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=True
        )
        measurements.append(json.loads(done.stdout))
    return measurements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=1000, help="size of the text")
    parser.add_argument(
        "--corpus", metavar="FILE", help="your own text, to prepare with and without the extra fast"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="pairs of runs on a twentieth of the text"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="use a short text, to test that the benchmark runs"
    )
    arguments = parser.parse_args()
    megabytes = 4 if arguments.tiny else arguments.megabytes
    shard_tokens = 50_000 if arguments.tiny else 10_000_000
    with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark-") as name:
        scratch = Path(name).resolve()
        os.environ["GPT_LIGHTNING_CACHE"] = str(scratch / "cache")
        text = make_text(scratch / "text", megabytes)
        half = text[:2]
        short_text = make_text(scratch / "short", megabytes / 20)
        size = sum(Path(path).stat().st_size for path in text) / 1e6
        half_size = sum(Path(path).stat().st_size for path in half) / 1e6
        print(f"{size:,.0f} MB of text", flush=True)

        (scratch / "out").mkdir()
        runs = quiet_pair(text, scratch / "out", shard_tokens, attempts=2)
        runs["4"] = prepare(text, scratch / "out" / "4", 4, shard_tokens)
        checksums = {
            f"{workers} workers": folder_checksum(scratch / "out" / workers) for workers in runs
        }
        tokens = sum(path.stat().st_size for path in (scratch / "out" / "1").glob("*.bin")) // 2
        for workers, run in runs.items():
            print(f"{workers} workers: {run.seconds:.1f} s, {size / run.seconds:.1f} MB/s, {run.peak_mb:.0f} MB "
                  f"of memory; other processes used {run.others:.0%} of the machine", flush=True)  # fmt: skip
        runs["2, half the text"] = prepare(half, scratch / "half", 2, shard_tokens)
        kills = prepare_and_kill(text, scratch / "killed", shard_tokens, megabytes / 500)
        checksums["killed"] = folder_checksum(scratch / "killed")
        are_same = len(set(checksums.values())) == 1
        print(f"{kills} kills: {'the same store' if are_same else checksums}", flush=True)

        pairs = []
        for repeat in range(arguments.repeats):
            folder = scratch / f"pair-{repeat}"
            folder.mkdir()
            pairs.append(quiet_pair(short_text, folder, shard_tokens, attempts=3))
        seconds = {workers: [pair[workers].seconds for pair in pairs] for workers in ("1", "2")}
        fast_pairs = []
        for repeat in range(arguments.repeats):
            folder = scratch / f"fast-{repeat}"
            folder.mkdir()
            corpus = [arguments.corpus] if arguments.corpus else short_text
            fast_pairs.append(fast_pair(corpus, folder, shard_tokens))
            print("with the extra fast {fast.seconds:.2f} s, without {without.seconds:.2f} s".format(
                **fast_pairs[-1]), flush=True)  # fmt: skip
            shutil.rmtree(folder)
        opened = open_twice(scratch / "sparse", 10**7 if arguments.tiny else 10**9)
    for name, opening in zip(("first", "second"), opened, strict=True):
        print(f"{name} opening: {opening['seconds']:.3f} s, {opening['mb']:.1f} MB")
    peak = {name: run.peak_mb for name, run in runs.items()}
    slope = (peak["2"] - peak["2, half the text"]) / ((size - half_size) / 1000)
    targets = [
        at_most("peak memory in GB", max(peak.values()) / 1000, 1.0),
        at_most("MB of memory per GB of text", slope, 10.0),
        at_least("speed: two workers / one", ratio(seconds["1"], seconds["2"]), 1.6),
        at_least("speed: two workers / one, all of the text", runs["1"].seconds / runs["2"].seconds, 1.6),
        at_least("speed: with the extra fast / without", ratio(
            *([pair[name].seconds for pair in fast_pairs] for name in ("without", "fast"))), 3.0),
        at_most("different stores from 1, 2, 4 workers and after kills", len(set(checksums.values())) - 1, 0),
        at_least("kills", kills, KILLS),
        at_most("opening 10⁹ tokens: MB of memory", max(opening["mb"] for opening in opened), 50),
    ]  # fmt: skip
    print(json.dumps({"benchmark": "data", "machine": description("tiktoken", "numpy", "fastokens", "orjson", "pyarrow"), "megabytes": size,
                      "tokens": tokens, "runs": {name: run._asdict() for name, run in runs.items()},
                      "pairs": [{name: run._asdict() for name, run in pair.items()} for pair in pairs],
                      "fast_pairs": [{name: run._asdict() for name, run in pair.items()} for pair in fast_pairs],
                      "opening": opened, "targets": targets}))  # fmt: skip


if __name__ == "__main__":
    main()
