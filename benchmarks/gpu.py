"""Training and decoding speed on one GPU: python benchmarks/gpu.py [--minutes 8.5] [--only training|decoding] [--out FILE] [--tiny]

It measures two limits of the hardware (matrix products, copies); an ablation of training from the book's model in float32
to all optimizations (gpu_training.py), in tokens/s, MFU and memory, where the losses of 20 steps are compared with those
in float32; and decoding (gpu_decoding.py), also of transformers if it is installed. A variant that does not fit into
the time is skipped. If a variant fails, the cause is recorded and the next one runs. FILE is written after each variant;
the last line is JSON.

Without a GPU use --tiny, which tests that the benchmark runs: with a toy model and without compilation.
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
from gpu_training import TrainingVariant, ablation, large_ablation, measure
from machine import at_least, at_most, description, peak_memory, seconds_per_call

from gpt_lightning import GPTConfig
from gpt_lightning.generation.cuda_graph import MAX_FUSED_ROWS
from gpt_lightning.generation.engine import DecodeBackend
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.training.hardware import peak_flops

LARGE = "1558M"
# The targets are for an H200. An H100 has the same FLOP/s and less memory bandwidth.
TARGET_GPUS = ("H200", "H100")


class TimeLimitError(BaseException):
    """A variant took too long. Not an ``Exception``, which a compiler might catch."""


@dataclass
class BenchmarkRunner:
    """Run variants until the time is used up, and record of each its metrics, its failure, or why it was skipped."""

    device: torch.device
    end_time: float
    out: Path | None
    header: dict[str, Any]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def seconds_left(self) -> float:
        return self.end_time - time.perf_counter()

    def run(self, name: str, seconds: float, work: Callable[[], dict[str, Any]]) -> None:
        """Call ``work`` if ``seconds`` are left. It is stopped after three times as long."""
        entry: dict[str, Any] = {}
        if (left := self.seconds_left()) < seconds:
            entry["skipped"] = f"needs about {seconds:.0f} s, {max(0.0, left):.0f} s are left"
        else:
            cuda = self.device.type == "cuda"
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            start = time.perf_counter()
            try:
                with time_limit(min(left, 3 * seconds)):
                    entry |= work()
            except TimeLimitError as error:
                entry["failed"] = str(error)
            except Exception as error:  # a failure is a result too
                cause = (str(error).strip() or "no message").splitlines()[0][:300]
                entry["failed"] = f"{type(error).__name__}: {cause}"
            entry["seconds"] = round(time.perf_counter() - start, 1)
            if cuda:
                with suppress(RuntimeError):  # after a GPU error no CUDA call works
                    entry = peak_memory(self.device) | entry
                    free_memory()
        self.results[name] = entry
        print(f"{name:62} {summary(entry)}", flush=True)
        if self.out is not None:
            self.out.write_text(
                json.dumps({**self.header, "results": self.results}, indent=1) + "\n"
            )

    def rate(self, name: str) -> float | None:
        """Tokens/s of a variant that was compared with float32 and is within its tolerance."""
        entry = self.results.get(name, {})
        if "deviation" not in entry or not within_tolerance(entry):
            return None
        return float(entry["tokens_per_second"][0])


def within_tolerance(entry: dict[str, Any]) -> bool:
    return "deviation" not in entry or entry["deviation"] <= entry["tolerance"]


def summary(entry: dict[str, Any]) -> str:
    if cause := entry.get("skipped"):
        return f"skipped: {cause}"
    if cause := entry.get("failed"):
        return f"FAILED: {cause}"
    parts = []
    if "tokens_per_second" in entry:
        parts.append(f"{entry['tokens_per_second'][0]:12,.1f} tok/s")
    parts += [f"{key} {entry[key]:.3f}" for key in ("mfu", "of_measured_peak") if key in entry]
    parts += [f"{key} {value:,.3g}" for key, value in entry.items() if key.endswith("_per_s")]
    if "memory_gb" in entry:
        parts.append(f"{entry['memory_gb']:.1f} GB")
    if "deviation" in entry:
        suffix = "" if within_tolerance(entry) else ", TOO MUCH"
        parts.append(
            f"deviation {entry['deviation']:.1e} (tolerance {entry['tolerance']:.1e}){suffix}"
        )
    return "  ".join(parts)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def on_alarm(*_: Any) -> None:
        raise TimeLimitError(f"took more than {seconds:.0f} s")

    old_handler = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old_handler)


def free_memory() -> None:
    """Free the GPU memory of the last variant, and what was compiled for its shapes."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def hardware_limits(device: torch.device, size: int, copied: int, seconds: float) -> dict[str, Any]:
    """FLOP/s of square matrix products, and bytes/s that a copy reads and writes."""
    limits: dict[str, Any] = {}
    for name, dtype, precision in [
        ("bf16", torch.bfloat16, "high"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ]:
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)
        each = seconds_per_call(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, seconds)
        limits[f"{name}_flop_per_s"] = 2 * size**3 / statistics.median(each)
    torch.set_float32_matmul_precision("highest")
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    each = seconds_per_call(lambda: target.copy_(source), device, seconds)
    limits["copied_bytes_per_s"] = 2 * copied / statistics.median(each)
    return limits


def train(
    runner: BenchmarkRunner,
    name: str,
    config: GPTConfig,
    variants: list[TrainingVariant],
    reference: TrainingVariant,
    rows: int,
    length: int,
) -> None:
    """Measure the variants. Their losses are compared with those of ``reference``."""
    limits = runner.results.get("hardware limits", {})
    peaks = {
        "mfu": peak_flops(runner.device, "bf16-mixed"),
        "of_measured_peak": limits.get("bf16_flop_per_s"),
    }
    seconds = 3.0 if runner.device.type == "cuda" else 0.1
    for variant in variants:
        expected = runner.results.get(f"{name} training: {reference.name}", {}).get("losses")
        runner.run(
            f"{name} training: {variant.name}",
            variant.seconds,
            lambda variant=variant, expected=expected: measure(
                variant, config, rows, length, runner.device, expected, peaks, seconds
            ),
        )


def fit(
    runner: BenchmarkRunner, name: str, config: GPTConfig, batch: int, length: int, steps: int
) -> None:
    runner.run(
        f"{name} fit",
        45 if runner.device.type == "cuda" else 20,
        lambda: gpu_training.fit(
            config, batch, length, runner.device, steps, peak_flops(runner.device, "bf16-mixed")
        ),
    )


def decode(
    runner: BenchmarkRunner,
    name: str,
    config: GPTConfig,
    seconds: dict[DecodeBackend, float],
    lengths: tuple[int, int],
) -> None:
    for batch in (1, 4, 8):
        for backend in seconds:
            if backend == "fused" and batch > MAX_FUSED_ROWS:
                continue
            runner.run(
                f"{name} decoding, batch {batch}: {backend}",
                seconds[backend],
                lambda batch=batch, backend=backend: gpu_decoding.measure(
                    config, runner.device, batch, backend, *lengths
                ),
            )


def decode_peer(
    runner: BenchmarkRunner, name: str, config: GPTConfig, seconds: float, lengths: tuple[int, int]
) -> None:
    for batch in (1, 8):
        runner.run(
            f"{name} decoding, batch {batch}: transformers",
            seconds,
            lambda batch=batch: gpu_decoding.transformers(config, runner.device, batch, *lengths),
        )


def check_targets(runner: BenchmarkRunner, gpu: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The targets that were measured, and the names of those that were not."""
    checked, not_measured = [], []
    deviations = [
        e["deviation"] / e["tolerance"] for e in runner.results.values() if "deviation" in e
    ]
    if deviations:
        checked.append(
            at_most("every variant against float32: deviation / tolerance", max(deviations), 1.0)
        )
    if not any(name in gpu for name in TARGET_GPUS):
        return checked, not_measured

    def best(prefix: str) -> float | None:
        rates = [rate for n in runner.results if n.startswith(prefix) if (rate := runner.rate(n))]
        return max(rates, default=None)

    by_fit = runner.results.get("124M fit", {}).get("tokens_per_second", [None])[0]
    for name, value, target in [
        ("124M, the fit command: tok/s", by_fit, 462_000.0),
        ("124M, the fit command: tok/s, stretch", by_fit, 555_000.0),
        ("124M training tok/s, the best variant", best("124M training"), 462_000.0),
        ("124M training tok/s, the best variant, stretch", best("124M training"), 555_000.0),
        (f"{LARGE} training tok/s", best(f"{LARGE} training"), 38_000.0),
        *(
            (
                f"{size} decoding tok/s, batch 1",
                runner.rate(f"{size} decoding, batch 1: fused"),
                target,
            )
            for size, target in (("124M", 4_000.0), (LARGE, 800.0))
        ),
    ]:
        if value is None:
            not_measured.append(name)
        else:
            checked.append(at_least(name, value, target))
    return checked, not_measured


def without_dropout(config: GPTConfig) -> GPTConfig:
    return replace(config, drop_rate=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="time limit of the complete benchmark"
    )
    parser.add_argument("--only", choices=["training", "decoding"])
    parser.add_argument("--out", type=Path, help="JSON, written after each variant")
    parser.add_argument(
        "--tiny", action="store_true", help="use a toy model, to test that the benchmark runs"
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if not arguments.tiny:
            parser.error("there is no CUDA GPU; give --tiny to test that the benchmark runs")
        torch.compiler.set_stance("force_eager")  # compiling would take minutes
    peer = find_spec("transformers") is not None
    machine = description("transformers", "triton", "lightning")
    runner = BenchmarkRunner(
        device,
        time.perf_counter() + 60 * arguments.minutes - 5,
        arguments.out,
        {"benchmark": "gpu", "machine": machine, "tiny": arguments.tiny},
    )
    small, large = (without_dropout(GPT2_SIZES[f"gpt2-{n}"]) for n in ("124M", LARGE))
    has_large_memory = (
        device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > 70e9
    )
    rows, large_rows, length = 16 if has_large_memory else 4, 2, 1024
    lengths = (gpu_decoding.PROMPT, gpu_decoding.NEW)
    if arguments.tiny:
        toy = {"vocab_size": 500, "context_length": 64, "emb_dim": 32, "n_heads": 2, "n_layers": 2}
        small, large = replace(small, **toy), replace(large, **toy | {"n_layers": 3})
        rows, length, lengths = 2, 16, (8, 24)

    runner.run(
        "hardware limits",
        8,
        lambda: hardware_limits(
            device, *((256, 2**20, 0.05) if arguments.tiny else (8192, 2**31, 1.5))
        ),
    )
    variants = ablation(rows, length)
    if arguments.only != "decoding":
        train(runner, "124M", small, variants, variants[0], rows, length)
        fit(
            runner,
            "124M",
            replace(small, vocab_size=50257),
            (8 if has_large_memory else 2) * rows,
            length,
            40,
        )
        large_variants = large_ablation(large_rows)
        train(runner, LARGE, large, large_variants, large_variants[0], large_rows, length)
    if arguments.only != "training":
        decode(runner, "124M", small, {"eager": 18, "cuda_graph": 5, "fused": 15}, lengths)
        if peer:
            decode_peer(runner, "124M", small, 16, lengths)
        decode(runner, LARGE, large, {"eager": 25, "cuda_graph": 8, "fused": 20}, lengths)
    if arguments.only != "decoding":
        last = variants[-1]
        more = [replace(last, name=f"{last.name}, all compiled", compiled="model", seconds=30)]
        if device.type == "cuda":
            more.insert(0, replace(last, name=f"{last.name}, cuDNN's attention", cudnn=True))
        train(runner, "124M", small, more, variants[0], rows, length)
    if arguments.only != "training" and peer:
        decode_peer(runner, LARGE, large, 30, lengths)

    checked, not_measured = check_targets(runner, machine.get("gpu", {}).get("name", ""))
    for target in checked:
        print("passed" if target["passed"] else "FAILED", target)
    result = {
        **runner.header,
        "results": runner.results,
        "targets": checked,
        "not_measured": not_measured,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
