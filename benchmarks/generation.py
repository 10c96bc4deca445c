"""Greedy decoding compared with other programs: python benchmarks/generation.py [--repeats 5] [--tiny]

A model of the 124M shape with random weights reads a prompt of 64 tokens and generates 64. Each backend runs in a
separate process, and the processes take turns. --litgpt, --ctranslate2 and --transformers PYTHON are interpreters in which
the peer is installed (default for transformers: this one); CTranslate2 also needs transformers. --llama_bench PATH is
llama.cpp's program, which runs again for each turn; loading is not counted. Ours also generates after a prompt of one
token, for the speed of decoding alone, which is compared with llama.cpp's and with a loop that reads as many bytes as the weights have. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from llama import TYPES, LlamaBench, write_models
from machine import at_least, at_most, description, interleaved, ratio
from worker import Worker

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.generation.engine import stream_ids
from gpt_lightning.generation.sampling import SamplingParams
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.model.decoding_layout import prepare_for_decoding
from gpt_lightning.model.packed_linear import can_pack

PROMPT, NEW = 64, 64
AFTER_ONE = ", after one token"  # of backends whose prompt is one token
MEMORY = "what memory allows"  # a loop that reads as many bytes as the weights have
MIN_FRACTION_OF_MEMORY = {"float32": 0.75, "bfloat16": 0.65}
# ours and llama.cpp's type with as many bits, in the round of a dtype
SAME_BITS = {
    "float32": (("ours", "F32"), ("ours int8", "Q8_0"), ("ours int4", "Q4_0")),
    "bfloat16": (("ours", "BF16"),),
}


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
        MEMORY: (here, "memory", 1, dtype),
    }
    if litgpt:
        chosen["LitGPT"] = (litgpt, "litgpt", 1, dtype)
    if ctranslate2 and dtype == "float32":  # on a CPU it computes in float32 or int8
        for batch, more in ((1, ""), (8, ", batch 8")):
            chosen[f"CTranslate2{more}"] = (ctranslate2, "ctranslate2", batch, "float32")
            chosen[f"CTranslate2 int8{more}"] = (ctranslate2, "ctranslate2", batch, "int8")
    if dtype == "float32":
        chosen["ours int8"] = (here, "ours", 1, "int8")
        chosen["ours int4"] = (here, "ours", 1, "int4")
        chosen["the book"] = (here, "book", 1, dtype)
    return chosen


def measure(
    config: dict[str, Any],
    dtype: str,
    transformers: str,
    litgpt: str | None,
    ctranslate2: str | None,
    llama: dict[str, LlamaBench],
    repeats: int,
) -> tuple[dict[str, list[float]], dict[str, float], list[dict[str, Any]]]:
    """Tokens/s (median, minimum, maximum) and peak GB of each backend, and the targets, in one dtype.

    Args:
        llama: llama.cpp's benchmark by the type of the weights.
    """
    settings = {"config": config, "new": NEW}
    chosen = backends(dtype, transformers, litgpt, ctranslate2)
    of_llama = {
        f"llama.cpp {name}{after}": llama[name + after]
        for name in TYPES[dtype]
        for after in ("", AFTER_ONE)
        if name + after in llama
    }
    chosen |= {
        name + AFTER_ONE: chosen[name]
        for name, theirs in SAME_BITS[dtype]
        if name == "ours" or f"llama.cpp {theirs}" in of_llama
    }
    workers = {
        name: Worker("decode", python, backend, {
            **settings, "batch": batch, "dtype": stored, "prompt": 1 if name.endswith(AFTER_ONE) else PROMPT,
        })
        for name, (python, backend, batch, stored) in chosen.items()
    }  # fmt: skip
    same_bits = {
        name + after: f"llama.cpp {theirs}{after}"
        for name, theirs in SAME_BITS[dtype]
        for after in ("", AFTER_ONE)
    }
    runs = {}
    for name, worker in workers.items():
        if name == MEMORY:
            continue
        runs[name] = worker.go
        if name == "ours" + AFTER_ONE:
            runs[MEMORY] = workers[MEMORY].go
        if (
            theirs := same_bits.get(name)
        ) in of_llama:  # next to each other: the machine's speed drifts
            runs[theirs] = of_llama[theirs].go
    runs |= {name: bench.go for name, bench in of_llama.items() if name not in runs}
    seconds = interleaved(runs, repeats)
    tokens_per_second, memory_gb = {}, {}
    for name, values in seconds.items():
        peak = ""
        if name in workers:
            memory = workers[name].peak_memory() / 1e9
            memory_gb[f"{dtype}, {name}"] = round(memory, 2)
            peak = f", {memory:.2f} GB"
            workers[name].end()
        batch = chosen[name][2] if name in chosen else 1
        rates = sorted(batch * NEW / value for value in values)
        median = statistics.median(rates)
        tokens_per_second[f"{dtype}, {name}"] = [
            round(rate, 1) for rate in (median, rates[0], rates[-1])
        ]
        print(
            f"{dtype:9} {name:28} {median:8.1f} tok/s ({rates[0]:.1f} – {rates[-1]:.1f}){peak}",
            flush=True,
        )
    speedup = ratio(seconds["transformers"], seconds["ours"])
    batched = 8 * ratio(seconds["ours"], seconds["ours, batch 8"])
    of_memory = ratio(seconds[MEMORY], seconds["ours" + AFTER_ONE])
    against_llama = [
        at_least(f"{name} / {theirs}", ratio(seconds[theirs], seconds[name]), 1.0)
        for name, theirs in same_bits.items()
        if theirs in seconds
    ]  # fmt: skip
    return (
        tokens_per_second,
        memory_gb,
        [
            at_least(f"{dtype}: ours / transformers", speedup, 1.2),
            at_least(f"{dtype}: batch 8 / batch 1", batched, 4.0),
            at_least(f"{dtype}: ours / {MEMORY}", of_memory, MIN_FRACTION_OF_MEMORY[dtype]),
            *against_llama,
        ],
    )


def seconds_per_token(config: dict[str, Any], new: int, at: list[int], width: int) -> list[float]:
    """Median seconds per token around each of the positions ``at``, in one run of ``new`` tokens."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(**config)).eval()
    prepare_for_decoding(model, rows=1)  # as the generate command does
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
        "--llama_bench",
        metavar="PATH",
        type=Path,
        help="llama.cpp's llama-bench; needs the extra gguf",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="use a toy model, to test that the benchmark runs"
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    config = {**vars(GPT2_SIZES["gpt2-124M"]), "drop_rate": 0.0}
    if arguments.tiny:
        config |= {"emb_dim": 32, "n_heads": 2, "n_layers": 2}
        if not arguments.llama_bench:  # a GGUF file holds GPT-2's tokenizer
            config["vocab_size"] = 500
    tokens_per_second: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    targets: list[dict[str, Any]] = []
    not_measured = []
    llama: dict[str, LlamaBench] = {}
    peers: dict[str, str] = {}
    folder = tempfile.TemporaryDirectory()
    if arguments.llama_bench:
        files = write_models(config, arguments.llama_bench, Path(folder.name))
        llama = {
            name + after: LlamaBench(arguments.llama_bench, file, prompt, NEW)
            for name, file in files.items()
            for prompt, after in ((PROMPT, ""), (1, AFTER_ONE))
        }
        peers["llama.cpp"] = llama["F32"].version()
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
            llama,
            arguments.repeats,
        )
        tokens_per_second |= rates
        memory |= own_memory
        targets += own_targets
    folder.cleanup()
    early, late = zip(
        *(seconds_per_token(config, 930, [64, 900], 40) for _ in range(arguments.repeats)),
        strict=True,
    )
    targets.append(at_most("seconds per token at 900 / at 64", ratio(late, early), 1.15))
    for target in targets:
        print("passed" if target["passed"] else "FAILED", target)
    result: dict[str, Any] = {
        "benchmark": "generation",
        "machine": description(
            transformers=arguments.transformers,
            litgpt=arguments.litgpt,
            ctranslate2=arguments.ctranslate2,
        ),
    }
    result["machine"]["versions"] |= peers
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
