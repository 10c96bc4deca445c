"""Greedy decoding beside transformers, LitGPT and the book's code: python benchmarks/generation.py [--repeats 5] [--tiny]

The 124M shape with random weights, prompt of 64 tokens, 64 new ones; each way in a process of its own, one after the
other in turn. --litgpt and --transformers PYTHON are interpreters that have the peer (transformers by default this one). The last
line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from typing import Any

import torch
from machine import at_least, at_most, description, interleaved, ratio
from worker import Worker

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.generation.engine import stream_ids
from gpt_lightning.generation.sampling import SamplingParams
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.model.packed_linear import can_pack, pack_weights

PROMPT, NEW = 64, 64


def ways(dtype: str, transformers: str, litgpt: str | None) -> dict[str, tuple[str, str, int]]:
    """Interpreter, way and batch of each."""
    here = sys.executable
    found = {
        "ours": (here, "ours", 1),
        "a plain loop over our model": (here, "plain", 1),
        "transformers": (transformers, "transformers", 1),
        "ours, batch 8": (here, "ours", 8),
    }
    if litgpt:
        found["LitGPT"] = (litgpt, "litgpt", 1)
    if dtype == "float32":
        found["the book"] = (here, "book", 1)
    return found


def measure(
    config: dict[str, Any], dtype: str, transformers: str, litgpt: str | None, repeats: int
) -> tuple[dict[str, list[float]], dict[str, float], list[dict[str, Any]]]:
    """Tokens a second (median, lowest, highest) and GB at most of each way, and the bars, at one dtype."""
    settings = {"config": config, "prompt": PROMPT, "new": NEW, "dtype": dtype}
    chosen = ways(dtype, transformers, litgpt)
    workers = {
        name: Worker("decode", python, way, {**settings, "batch": batch})
        for name, (python, way, batch) in chosen.items()
    }
    seconds = interleaved({name: worker.go for name, worker in workers.items()}, repeats)
    figures, memory_gb = {}, {}
    for name, values in seconds.items():
        memory = workers[name].peak_memory()
        memory_gb[f"{dtype}, {name}"] = round(memory / 1e9, 2)
        workers[name].end()
        rates = sorted(chosen[name][2] * NEW / value for value in values)
        median = statistics.median(rates)
        figures[f"{dtype}, {name}"] = [round(rate, 1) for rate in (median, rates[0], rates[-1])]
        print(
            f"{dtype:9} {name:28} {median:8.1f} tok/s ({rates[0]:.1f} – {rates[-1]:.1f}), "
            f"{memory / 1e9:.2f} GB",
            flush=True,
        )
    beside = ratio(seconds["transformers"], seconds["ours"])
    batched = 8 * ratio(seconds["ours"], seconds["ours, batch 8"])
    return (
        figures,
        memory_gb,
        [
            at_least(f"{dtype}: ours / transformers", beside, 1.2),
            at_least(f"{dtype}: batch 8 / batch 1", batched, 4.0),
        ],
    )


def seconds_per_token(config: dict[str, Any], new: int, at: list[int], width: int) -> list[float]:
    """Median seconds of a token around each of the positions ``at``, from one run of ``new`` tokens."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(**config)).eval()
    pack_weights(model)  # as the generate command does
    times = []
    last = time.perf_counter()
    for _ in stream_ids(model, [[1] * 16], new, SamplingParams()):
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return [statistics.median(times[place - width // 2 : place + width // 2]) for place in at]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--transformers", metavar="PYTHON", default=sys.executable, help="one that has transformers"
    )
    parser.add_argument("--litgpt", metavar="PYTHON", help="an interpreter that has LitGPT")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to see that it runs")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    config = {**vars(GPT2_SIZES["gpt2-124M"]), "drop_rate": 0.0}
    if arguments.tiny:
        config |= {"emb_dim": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 500}
    figures: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    bars: list[dict[str, Any]] = []
    not_measured = []
    for dtype in ("float32", "bfloat16"):
        if not (arguments.tiny or can_pack(getattr(torch, dtype))):
            print(f"{dtype} is not measured: this CPU has no instructions for it")
            not_measured.append(dtype)
            continue
        rates, own_memory, own_bars = measure(
            config, dtype, arguments.transformers, arguments.litgpt, arguments.repeats
        )
        figures |= rates
        memory |= own_memory
        bars += own_bars
    early, late = zip(
        *(seconds_per_token(config, 930, [64, 900], 40) for _ in range(arguments.repeats)),
        strict=True,
    )
    bars.append(at_most("seconds a token at 900 / at 64", ratio(late, early), 1.15))
    for bar in bars:
        print("holds " if bar["holds"] else "MISSED", bar)
    result = {
        "benchmark": "generation",
        "machine": description(transformers=arguments.transformers, litgpt=arguments.litgpt),
    }
    print(
        json.dumps(
            {
                **result,
                "tokens_per_second": figures,
                "memory_gb": memory,
                "bars": bars,
                "not_measured": not_measured,
            }
        )
    )


if __name__ == "__main__":
    main()
