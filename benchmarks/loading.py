"""Memory and time to load weights: python benchmarks/loading.py [--sizes gpt2-355M gpt2-1558M] [--dtype float32] [--tiny]

Random weights of each size are written in three formats to a temporary folder (up to 20 GB of disk). Each file is
loaded in a separate process. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import at_most, description

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.pretrained.convert import convert
from gpt_lightning.pretrained.huggingface import write_huggingface
from gpt_lightning.pretrained.weights import ModelWeights

SUFFIXES = {"hf": "", "lightning": ".ckpt", "book": ".pth"}  # of each format

# prints the bytes of the model, the growth of the process's anonymous memory as a fraction of them, and the seconds;
# pages of a mapped file are the system's cache
CHILD = """
import sys, threading, time, torch
from gpt_lightning import load_model
import gpt_lightning.model.gpt
def anonymous():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon:"))
def watch():
    while not is_loaded.wait(0.001):
        seen.append(anonymous())
torch.zeros(64, 64) @ torch.zeros(64, 64)
seen, is_loaded = [], threading.Event()
watcher = threading.Thread(target=watch)
before, start = anonymous(), time.perf_counter()
watcher.start()
model = load_model(sys.argv[1])
seconds = time.perf_counter() - start
seen.append(anonymous())
is_loaded.set()
watcher.join()
model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
print(model_bytes, (max(seen) - before) / model_bytes, seconds)
"""


def write(config: GPTConfig, dtype: torch.dtype, folder: Path) -> None:
    torch.manual_seed(0)
    model = GPTModel(config).to(dtype)
    folder.mkdir()
    write_huggingface(ModelWeights(config, model.state_dict()), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["gpt2-355M", "gpt2-1558M"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--tiny", action="store_true", help="use a small model, to test that the benchmark runs"
    )
    arguments = parser.parse_args()
    configs = {name: GPT2_SIZES[name] for name in arguments.sizes}
    if arguments.tiny:
        configs = {"tiny": GPTConfig(emb_dim=256, n_heads=4, n_layers=4, tied_embeddings=True)}
    loads, targets = [], []
    for name, config in configs.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "hf"
            write(config, getattr(torch, arguments.dtype), folder)
            for weight_format, suffix in SUFFIXES.items():
                source = Path(scratch) / f"{weight_format}{suffix}"
                if weight_format != "hf":
                    convert(str(folder), source, weight_format)
                done = subprocess.run(
                    [sys.executable, "-c", CHILD, str(source)],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                model_bytes, fraction, seconds = map(float, done.stdout.split())
                print(
                    f"{name:10} {weight_format:9} {model_bytes / 1e9:6.2f} GB, peak memory {fraction:.3f} of that, "
                    f"{seconds:.1f} s"
                )
                loads.append(
                    [name, weight_format, arguments.dtype, model_bytes, round(fraction, 4), round(seconds, 2)]
                )  # fmt: skip
                targets.append(
                    at_most(f"{name}, {weight_format}: peak memory / model bytes", fraction, 1.15)
                )
                if weight_format != "hf":
                    source.unlink()
    machine = description("safetensors")
    print(
        json.dumps({"benchmark": "loading", "machine": machine, "loads": loads, "targets": targets})
    )


if __name__ == "__main__":
    main()
