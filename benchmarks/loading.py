"""Memory and time of loading: python benchmarks/loading.py [--sizes gpt2-355M gpt2-1558M] [--tiny]

Random weights of each size, written in three forms to a temporary folder (up to 20 GB of disk) and loaded in
a process of its own each. The last line is JSON.
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

SUFFIXES = {"hf": "", "lightning": ".ckpt", "book": ".pth"}

# what loading took more than the process had, over the model's own bytes; and its seconds. Counted is anonymous
# memory: pages of a mapped file are the system's cache
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
before, began = anonymous(), time.perf_counter()
watcher.start()
model = load_model(sys.argv[1])
seconds = time.perf_counter() - began
seen.append(anonymous())
is_loaded.set()
watcher.join()
own = sum(p.numel() * p.element_size() for p in model.parameters())
print(own, (max(seen) - before) / own, seconds)
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
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that it runs")
    arguments = parser.parse_args()
    configs = {name: GPT2_SIZES[name] for name in arguments.sizes}
    if arguments.tiny:
        configs = {"tiny": GPTConfig(emb_dim=256, n_heads=4, n_layers=4, tied_embeddings=True)}
    loads, targets = [], []
    for name, config in configs.items():
        with tempfile.TemporaryDirectory() as scratch:
            whole = Path(scratch) / "hf"
            write(config, getattr(torch, arguments.dtype), whole)
            for form, suffix in SUFFIXES.items():
                source = Path(scratch) / f"{form}{suffix}"
                if form != "hf":
                    convert(str(whole), source, form)
                done = subprocess.run(
                    [sys.executable, "-c", CHILD, str(source)],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                own, share, seconds = map(float, done.stdout.split())
                print(
                    f"{name:10} {form:9} {own / 1e9:6.2f} GB, at most {share:.3f} x in {seconds:.1f} s"
                )
                loads.append([name, form, arguments.dtype, own, round(share, 4), round(seconds, 2)])
                targets.append(at_most(f"{name}, {form}: peak / own bytes", share, 1.15))
                if form != "hf":
                    source.unlink()
    machine = description("safetensors")
    print(
        json.dumps({"benchmark": "loading", "machine": machine, "loads": loads, "targets": targets})
    )


if __name__ == "__main__":
    main()
