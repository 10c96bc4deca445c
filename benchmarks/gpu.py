"""What one GPU does: python benchmarks/gpu.py [--minutes 8.5] [--only training|decoding] [--out FILE] [--tiny]

Two ceilings (matrix products, copying); the training ladder from the book's model in float32 up (gpu_training.py) in
tokens a second, share of the peak and memory, each rung's losses over 20 steps held against float32's; decoding
(gpu_decoding.py) beside transformers where that is installed. What there is no time for is said to be skipped, a rung
that fails is kept with its cause, and the next goes on. FILE is written after each rung; the last line is JSON.

Without a GPU it can only be seen to run, with --tiny: a toy model, and nothing is compiled.
"""

import argparse
import gc
import json
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_decoding
import gpu_training
import torch
from gpu_training import Rung, ladder, large_ladder, measure
from machine import at_least, at_most, description, peak_memory, seconds_a_call

from gpt_lightning import GPTConfig
from gpt_lightning.generation.cuda_graph import MAX_FUSED_ROWS
from gpt_lightning.generation.engine import DecodeBackend
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.training.hardware import peak_flops

LARGE = "1558M"
MEASURED_ON = (
    "H200",
    "H100",
)  # the bars are an H200's; an H100 has its products and less bandwidth


class Overtime(BaseException):
    """A rung took too long; no ``Exception``, which a compiler might keep for itself."""


@dataclass
class Rungs:
    """Runs rungs while there is time, and keeps what each said: figures, its failure, that it was skipped."""

    device: torch.device
    ends: float
    out: Path | None
    head: dict[str, Any]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def left(self) -> float:
        return self.ends - time.perf_counter()

    def run(self, name: str, seconds: float, work: Callable[[], dict[str, Any]]) -> None:
        """``work``, if the ``seconds`` it needs are left; it may take three times as long, no longer."""
        entry: dict[str, Any] = {}
        if (left := self.left()) < seconds:
            entry["skipped"] = f"needs about {seconds:.0f} s, {max(0.0, left):.0f} s are left"
        else:
            cuda = self.device.type == "cuda"
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            began = time.perf_counter()
            try:
                with time_limit(min(left, 3 * seconds)):
                    entry |= work()
            except Overtime as error:
                entry["failed"] = str(error)
            except Exception as error:  # a rung's failure is a result
                cause = (str(error).strip() or "no message").splitlines()[0][:300]
                entry["failed"] = f"{type(error).__name__}: {cause}"
            entry["seconds"] = round(time.perf_counter() - began, 1)
            if cuda:
                with suppress(RuntimeError):  # after a fault of the GPU nothing works any more
                    entry = peak_memory(self.device) | entry
                    tidy()
        self.found[name] = entry
        print(f"{name:62} {summary(entry)}", flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps({**self.head, "results": self.found}, indent=1) + "\n")

    def rate(self, name: str) -> float | None:
        """Tokens a second of a rung that is done, and was held against float32 and found right."""
        entry = self.found.get(name, {})
        if "deviation" not in entry or not is_right(entry):
            return None
        return float(entry["tokens_per_second"][0])


def is_right(entry: dict[str, Any]) -> bool:
    return "deviation" not in entry or entry["deviation"] <= entry["tolerance"]


def summary(entry: dict[str, Any]) -> str:
    if cause := entry.get("skipped"):
        return f"skipped: {cause}"
    if cause := entry.get("failed"):
        return f"FAILED: {cause}"
    shown = []
    if "tokens_per_second" in entry:
        shown.append(f"{entry['tokens_per_second'][0]:12,.1f} tok/s")
    shown += [f"{key} {entry[key]:.3f}" for key in ("mfu", "of_measured_peak") if key in entry]
    shown += [f"{key} {value:,.3g}" for key, value in entry.items() if key.endswith("_per_s")]
    if "memory_gb" in entry:
        shown.append(f"{entry['memory_gb']:.1f} GB")
    if "deviation" in entry:
        right = "" if is_right(entry) else ", TOO MUCH"
        shown.append(f"off by {entry['deviation']:.1e} of {entry['tolerance']:.1e}{right}")
    return "  ".join(shown)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def over(*_: Any) -> None:
        raise Overtime(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tidy() -> None:
    """Nothing of the last rung is left on the GPU, nor what was compiled for its shapes."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def ceilings(device: torch.device, size: int, copied: int, seconds: float) -> dict[str, Any]:
    """FLOP/s of square matrix products, bytes a second read and written by a copy."""
    found: dict[str, Any] = {}
    for name, dtype, precision in [
        ("bf16", torch.bfloat16, "high"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ]:
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)
        each = seconds_a_call(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, seconds)
        found[f"{name}_flop_per_s"] = 2 * size**3 / statistics.median(each)
    torch.set_float32_matmul_precision("highest")
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    each = seconds_a_call(lambda: target.copy_(source), device, seconds)
    found["copied_bytes_per_s"] = 2 * copied / statistics.median(each)
    return found


def train(
    rungs: Rungs,
    name: str,
    config: GPTConfig,
    steps: list[Rung],
    reference: Rung,
    rows: int,
    length: int,
) -> None:
    """The rungs, of which ``reference`` says what the others' losses must be."""
    ceiling = rungs.found.get("ceilings", {})
    peaks = {
        "mfu": peak_flops(rungs.device, "bf16-mixed"),
        "of_measured_peak": ceiling.get("bf16_flop_per_s"),
    }
    seconds = 3.0 if rungs.device.type == "cuda" else 0.1
    for rung in steps:
        expected = rungs.found.get(f"{name} training: {reference.name}", {}).get("losses")
        rungs.run(
            f"{name} training: {rung.name}",
            rung.seconds,
            lambda rung=rung, expected=expected: measure(
                rung, config, rows, length, rungs.device, expected, peaks, seconds
            ),
        )


def fit(rungs: Rungs, name: str, config: GPTConfig, batch: int, length: int, updates: int) -> None:
    rungs.run(
        f"{name} fit",
        45 if rungs.device.type == "cuda" else 20,
        lambda: gpu_training.fit(
            config, batch, length, rungs.device, updates, peak_flops(rungs.device, "bf16-mixed")
        ),
    )


def decode(
    rungs: Rungs,
    name: str,
    config: GPTConfig,
    seconds: dict[DecodeBackend, float],
    lengths: tuple[int, int],
) -> None:
    for batch in (1, 4, 8):
        for backend in seconds:
            if backend == "fused" and batch > MAX_FUSED_ROWS:
                continue
            rungs.run(
                f"{name} decoding, batch {batch}: {backend}",
                seconds[backend],
                lambda batch=batch, backend=backend: gpu_decoding.measure(
                    config, rungs.device, batch, backend, *lengths
                ),
            )


def decode_peer(
    rungs: Rungs, name: str, config: GPTConfig, seconds: float, lengths: tuple[int, int]
) -> None:
    for batch in (1, 8):
        rungs.run(
            f"{name} decoding, batch {batch}: transformers",
            seconds,
            lambda batch=batch: gpu_decoding.transformers(config, rungs.device, batch, *lengths),
        )


def bars(rungs: Rungs, gpu: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Those that were measured, and the names of those that were not."""
    held, missing = [], []
    off = [e["deviation"] / e["tolerance"] for e in rungs.found.values() if "deviation" in e]
    if off:
        held.append(at_most("every rung against float32: deviation / tolerance", max(off), 1.0))
    if not any(name in gpu for name in MEASURED_ON):
        return held, missing

    def best(prefix: str) -> float | None:
        rates = [rate for n in rungs.found if n.startswith(prefix) if (rate := rungs.rate(n))]
        return max(rates, default=None)

    by_fit = rungs.found.get("124M fit", {}).get("tokens_per_second", [None])[0]
    for name, value, bar in [
        ("124M, the fit command: tok/s", by_fit, 462_000.0),
        ("124M, the fit command: tok/s, stretch", by_fit, 555_000.0),
        ("124M training tok/s, the best rung", best("124M training"), 462_000.0),
        ("124M training tok/s, the best rung, stretch", best("124M training"), 555_000.0),
        (f"{LARGE} training tok/s", best(f"{LARGE} training"), 38_000.0),
        *(
            (f"{size} decoding tok/s, batch 1", rungs.rate(f"{size} decoding, batch 1: fused"), bar)
            for size, bar in (("124M", 4_000.0), (LARGE, 800.0))
        ),
    ]:
        if value is None:
            missing.append(name)
        else:
            held.append(at_least(name, value, bar))
    return held, missing


def without_dropout(config: GPTConfig) -> GPTConfig:
    return replace(config, drop_rate=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.5, help="in which all must be done")
    parser.add_argument("--only", choices=["training", "decoding"])
    parser.add_argument("--out", type=Path, help="JSON, written after each rung")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to see that it runs")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if not arguments.tiny:
            parser.error("there is no CUDA GPU; give --tiny to see that it runs")
        torch.compiler.set_stance(
            "force_eager"
        )  # compiling takes minutes; here it is only seen to run
    peer = find_spec("transformers") is not None
    machine = description("transformers", "triton", "lightning")
    rungs = Rungs(
        device,
        time.perf_counter() + 60 * arguments.minutes - 5,
        arguments.out,
        {"benchmark": "gpu", "machine": machine, "tiny": arguments.tiny},
    )
    small, large = (without_dropout(GPT2_SIZES[f"gpt2-{n}"]) for n in ("124M", LARGE))
    roomy = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > 70e9
    rows, large_rows, length = 16 if roomy else 4, 2, 1024
    lengths = (gpu_decoding.PROMPT, gpu_decoding.NEW)
    if arguments.tiny:
        toy = {"vocab_size": 500, "context_length": 64, "emb_dim": 32, "n_heads": 2, "n_layers": 2}
        small, large = replace(small, **toy), replace(large, **toy | {"n_layers": 3})
        rows, length, lengths = 2, 16, (8, 24)

    rungs.run(
        "ceilings",
        8,
        lambda: ceilings(device, *((256, 2**20, 0.05) if arguments.tiny else (8192, 2**31, 1.5))),
    )
    steps = ladder(rows, length)
    if arguments.only != "decoding":
        train(rungs, "124M", small, steps, steps[0], rows, length)
        fit(rungs, "124M", replace(small, vocab_size=50257), (8 if roomy else 2) * rows, length, 40)
        large_steps = large_ladder(large_rows)
        train(rungs, LARGE, large, large_steps, large_steps[0], large_rows, length)
    if arguments.only != "training":
        decode(rungs, "124M", small, {"eager": 18, "cuda_graph": 5, "fused": 15}, lengths)
        if peer:
            decode_peer(rungs, "124M", small, 16, lengths)
        decode(rungs, LARGE, large, {"eager": 25, "cuda_graph": 8, "fused": 20}, lengths)
    if arguments.only != "decoding":
        last = steps[-1]
        more = [replace(last, name=f"{last.name}, all compiled", compiled="model", seconds=30)]
        if device.type == "cuda":
            more.insert(0, replace(last, name=f"{last.name}, cuDNN's attention", cudnn=True))
        train(rungs, "124M", small, more, steps[0], rows, length)
    if arguments.only != "training" and peer:
        decode_peer(rungs, LARGE, large, 30, lengths)

    held, missing = bars(rungs, machine.get("gpu", {}).get("name", ""))
    for bar in held:
        print("holds " if bar["holds"] else "MISSED", bar)
    result = {**rungs.head, "results": rungs.found, "bars": held, "not_measured": missing}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
