"""Greedy decoding compared with transformers, LitGPT and the book's code: python benchmarks/generation.py [--repeats 5] [--tiny]

A model of the 124M shape with random weights reads a prompt of 64 tokens and generates 64. Each backend runs in a
separate process, and the processes take turns. --litgpt, --ctranslate2 and --transformers PYTHON are interpreters in which
the peer is installed (default for transformers: this one); CTranslate2 also needs transformers. The last line is JSON.
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


def backends(
    dtype: str, transformers: str, litgpt: str | None, ctranslate2: str | None
) -> dict[str, tuple[str, str, int, str]]:
    """Interpreter, backend of peers.py, batch size and dtype by name."""
    here = sys.executable
    chosen = {
        "ours": (here, "ours", 1, dtype),
        "a plain loop over our model": (here, "plain", 1, dtype),
        "transformers": (transformers, "transformers", 1, dtype),
        "ours, batch 8": (here, "ours", 8, dtype),
    }
    if litgpt:
        chosen["LitGPT"] = (litgpt, "litgpt", 1, dtype)
    if ctranslate2 and dtype == "float32":  # on a CPU it computes in float32 or int8
        for batch, more in ((1, ""), (8, ", batch 8")):
            chosen[f"CTranslate2{more}"] = (ctranslate2, "ctranslate2", batch, "float32")
            chosen[f"CTranslate2 int8{more}"] = (ctranslate2, "ctranslate2", batch, "int8")
    if dtype == "float32":
        chosen["ours int8"] = (here, "ours", 1, "int8")
        chosen["the book"] = (here, "book", 1, dtype)
    return chosen


def measure(
    config: dict[str, Any],
    dtype: str,
    transformers: str,
    litgpt: str | None,
    ctranslate2: str | None,
    repeats: int,
) -> tuple[dict[str, list[float]], dict[str, float], list[dict[str, Any]]]:
    """Tokens/s (median, minimum, maximum) and peak GB of each backend, and the targets, in one dtype."""
    settings = {"config": config, "prompt": PROMPT, "new": NEW}
    chosen = backends(dtype, transformers, litgpt, ctranslate2)
    workers = {
        name: Worker("decode", python, backend, {**settings, "batch": batch, "dtype": stored})
        for name, (python, backend, batch, stored) in chosen.items()
    }
    seconds = interleaved({name: worker.go for name, worker in workers.items()}, repeats)
    tokens_per_second, memory_gb = {}, {}
    for name, values in seconds.items():
        memory = workers[name].peak_memory()
        memory_gb[f"{dtype}, {name}"] = round(memory / 1e9, 2)
        workers[name].end()
        rates = sorted(chosen[name][2] * NEW / value for value in values)
        median = statistics.median(rates)
        tokens_per_second[f"{dtype}, {name}"] = [
            round(rate, 1) for rate in (median, rates[0], rates[-1])
        ]
        print(
            f"{dtype:9} {name:28} {median:8.1f} tok/s ({rates[0]:.1f} – {rates[-1]:.1f}), "
            f"{memory / 1e9:.2f} GB",
            flush=True,
        )
    speedup = ratio(seconds["transformers"], seconds["ours"])
    batched = 8 * ratio(seconds["ours"], seconds["ours, batch 8"])
    return (
        tokens_per_second,
        memory_gb,
        [
            at_least(f"{dtype}: ours / transformers", speedup, 1.2),
            at_least(f"{dtype}: batch 8 / batch 1", batched, 4.0),
        ],
    )


def seconds_per_token(config: dict[str, Any], new: int, at: list[int], width: int) -> list[float]:
    """Median seconds per token around each of the positions ``at``, in one run of ``new`` tokens."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(**config)).eval()
    pack_weights(model)  # as the generate command does
    times = []
    last = time.perf_counter()
    for _ in stream_ids(model, [[1] * 16], new, SamplingParams()):
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return [statistics.median(times[i - width // 2 : i + width // 2]) for i in at]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--transformers",
        metavar="PYTHON",
        default=sys.executable,
        help="interpreter in which transformers is installed",
    )
    parser.add_argument(
        "--litgpt", metavar="PYTHON", help="interpreter in which LitGPT is installed"
    )
    parser.add_argument(
        "--ctranslate2", metavar="PYTHON", help="interpreter in which CTranslate2 is installed"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="use a toy model, to test that the benchmark runs"
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    config = {**vars(GPT2_SIZES["gpt2-124M"]), "drop_rate": 0.0}
    if arguments.tiny:
        config |= {"emb_dim": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 500}
    tokens_per_second: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    targets: list[dict[str, Any]] = []
    not_measured = []
    for dtype in ("float32", "bfloat16"):
        if not (arguments.tiny or can_pack(getattr(torch, dtype))):
            print(f"{dtype} is not measured: this CPU has no instructions for it")
            not_measured.append(dtype)
            continue
        rates, own_memory, own_targets = measure(
            config,
            dtype,
            arguments.transformers,
            arguments.litgpt,
            arguments.ctranslate2,
            arguments.repeats,
        )
        tokens_per_second |= rates
        memory |= own_memory
        targets += own_targets
    early, late = zip(
        *(seconds_per_token(config, 930, [64, 900], 40) for _ in range(arguments.repeats)),
        strict=True,
    )
    targets.append(at_most("seconds per token at 900 / at 64", ratio(late, early), 1.15))
    for target in targets:
        print("passed" if target["passed"] else "FAILED", target)
    result = {
        "benchmark": "generation",
        "machine": description(
            transformers=arguments.transformers,
            litgpt=arguments.litgpt,
            ctranslate2=arguments.ctranslate2,
        ),
    }
    print(
        json.dumps(
            {
                **result,
                "tokens_per_second": tokens_per_second,
                "memory_gb": memory,
                "targets": targets,
                "not_measured": not_measured,
            }
        )
    )


if __name__ == "__main__":
    main()
