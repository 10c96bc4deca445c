"""Training speed compared with transformers, LitGPT, nanoGPT and the book's code: python benchmarks/training.py [--repeats 5] [--tiny]

The model has the 124M shape and dropout 0. AdamW updates all weights, and all backends read the same random tokens, in
bf16, or in float32 if the CPU has no instructions for bf16. Each backend runs in a separate process, and the processes
take turns with one step each. The first two rounds are warm-up, in which compiled backends compile. Then Lightning's cost
is measured: the steps of the fit command with a very small model, compared with a plain loop over the same model.

--long adds B 4, T 1024. --book-run adds configs/verdict.yaml, compared with the book's loop, a quarter of an hour.
--litgpt and --transformers PYTHON are interpreters in which the peer is installed (default for transformers: this one).
--nanogpt FOLDER is a checkout of https://github.com/karpathy/nanoGPT.
The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from machine import at_least, at_most, commit_of, description, ratio
from worker import Worker

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.cli.main import main as command
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.model.flops import flops_per_token
from gpt_lightning.model.loss import cross_entropy
from gpt_lightning.training.hardware import measured_peak
from gpt_lightning.training.optimizer import build_adamw

HERE = Path(__file__).resolve().parent
# name → interpreter, backend of peers.py, its settings
Peers = dict[str, tuple[str, str, dict[str, Any]]]
WARM_UP_ROUNDS = 2  # compiled backends compile in the first
# variant of our model → its settings in peers.py
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, compiled": {"compile": True},
    "ours, chunked": {"chunk": 1024},
    "ours, head not tied": {"config": {"tied_embeddings": False}},  # as the book's is
}


@dataclass
class ModelMeasurement:
    """Measurements of each backend: seconds of the steps, peak memory of the process in bytes, and tokens/s (median,
    minimum, maximum).
    """

    seconds: dict[str, list[float]]
    memory: dict[str, int]
    rates: dict[str, list[float]]


def measure(
    title: str, backends: dict[str, tuple[str, str, dict[str, Any]]], tokens: int, repeats: int
) -> ModelMeasurement:
    """Measure steps of ``tokens`` tokens. ``backends``: interpreter, backend of peers.py and settings by name."""
    workers = {name: Worker("train", *backend) for name, backend in backends.items()}
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    for turn in range(repeats + WARM_UP_ROUNDS):
        for name, worker in workers.items():
            step_seconds = worker.go()
            if turn >= WARM_UP_ROUNDS:
                seconds[name].append(step_seconds)
    memory, rates = {}, {}
    for name, worker in workers.items():
        memory[name] = worker.peak_memory()
        worker.end()
        sorted_rates = sorted(tokens / value for value in seconds[name])
        median = statistics.median(sorted_rates)
        rates[name] = [round(r, 1) for r in (median, sorted_rates[0], sorted_rates[-1])]
        print(
            f"{title}  {name:28} {rates[name][0]:8.1f} tok/s ({rates[name][1]} – {rates[name][2]}), "
            f"{memory[name] / 1e9:.2f} GB",
            flush=True,
        )
    return ModelMeasurement(seconds, memory, rates)


def matrix_peak(size: int = 3072, rounds: int = 5) -> float:
    """FLOP/s of bfloat16 matrix products, the best of several measurements."""
    return max(measured_peak(torch.bfloat16, size, 3) for _ in range(rounds))


BLOCK = 50  # steps; each block logs once


class PlainLoopTurns(Callback):
    """After each block of ``fit``'s steps, runs a block of plain steps, and records the seconds per step of both.

    The command creates the object, so the benchmark sets ``plain_step`` and reads ``seconds`` on the class.
    """

    plain_step: Callable[[], None]
    seconds: ClassVar[list[tuple[float, float]]] = []
    _block_start = 0.0
    _steps = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._steps += 1
        if self._steps % BLOCK:
            return
        now = time.perf_counter()
        for _ in range(BLOCK):
            PlainLoopTurns.plain_step()
        end = time.perf_counter()
        if self._steps > 2 * BLOCK:
            self.seconds.append(((now - self._block_start) / BLOCK, (end - now) / BLOCK))
        self._block_start = time.perf_counter()


@contextmanager
def terminal() -> Iterator[None]:
    """Make stderr a terminal, so that a progress bar is drawn. Another process reads it, as a terminal window does."""
    reader, writer = os.openpty()
    with (
        subprocess.Popen(
            ["cat"], stdin=reader, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ),
        open(writer, "w") as stderr,
    ):
        os.close(reader)
        with redirect_stderr(stderr):
            yield


def lightning_cost(steps: int) -> list[tuple[float, float]]:
    """Seconds per step of a very small model with ``fit`` and with a plain loop, for each block of steps.

    Both run in one process and take turns.
    """
    length = 4
    config = GPTConfig(
        context_length=length, emb_dim=4, n_heads=1, n_layers=1, drop_rate=0.0, vocab_size=50257
    )
    model = GPTModel(config)
    optimizer = build_adamw(
        model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), decay_matrices_only=True
    )
    ids = torch.randint(config.vocab_size, (1, length + 1))

    def plain_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        optimizer.step()

    PlainLoopTurns.plain_step = plain_step
    PlainLoopTurns.seconds = []
    settings = [
        f"--model.config.{key}={value}" for key, value in vars(config).items() if value is not None
    ]
    with tempfile.TemporaryDirectory() as scratch, terminal():
        code = command(
            ["fit", *settings, "--data.text=sample", "--data.batch_size=1", "--trainer.accelerator=cpu",
             f"--trainer.default_root_dir={scratch}", "--evaluation.eval_freq=100000",
             "--evaluation.prompt=null", f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1",
             f"--checkpoint.every_n_train_steps={steps // 4}", f"--allow_import={__name__}",
             f"--trainer.callbacks+={__name__}.PlainLoopTurns"]
        )  # fmt: skip
    assert code == 0, "fit failed"
    return PlainLoopTurns.seconds


# trains with the book's loop and prints the last line of losses
BOOK_RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import book, torch
from gpt_lightning.data.corpus import read_corpus
from gpt_lightning.data.tokenizer import encode_prompt
config = dict(vocab_size=50257, context_length=256, emb_dim=768, n_heads=12, n_layers=12, drop_rate=0.1, qkv_bias=False)
run = book.new_run(config, lr=4e-4, weight_decay=0.1, seed=123)
loaders = book.loaders(read_corpus("verdict"), encode_prompt, length=256, stride=256, batch_size=2, train_ratio=0.9)
prompt = torch.tensor([encode_prompt("Every effort moves you")])
sample = lambda model: book.generate(model, prompt, 50, 256)
book.train(run, *loaders, epochs=int(sys.argv[2]), eval_freq=5, eval_iter=5, sample=sample)
print(run.lines[-1])
"""


def book_run(epochs: int) -> tuple[float, float]:
    """Seconds of configs/verdict.yaml and of the book's loop. Both generate a text after each epoch.

    Ours saves checkpoints too.

    Raises:
        RuntimeError: The losses at the end differ.
    """
    root = HERE.parent
    with tempfile.TemporaryDirectory() as scratch:
        ours = [sys.executable, "-m", "gpt_lightning", "fit", f"--config={root}/configs/verdict.yaml",
                f"--trainer.max_epochs={epochs}", f"--trainer.default_root_dir={scratch}"]  # fmt: skip
        book = [sys.executable, "-c", BOOK_RUN, str(root / "tests"), str(epochs)]
        seconds, last_lines = [], []
        for run in (ours, book):
            start = time.perf_counter()
            done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=scratch)
            seconds.append(time.perf_counter() - start)
            lines = (done.stdout + done.stderr).splitlines()
            last_lines.append([line for line in lines if "Train loss" in line][-1])
    our_losses, book_losses = (line.split("Train")[1].split(",")[:2] for line in last_lines)
    if our_losses != book_losses:
        raise RuntimeError(f"the losses differ from the book's: {' and '.join(last_lines)}")
    return seconds[0], seconds[1]


Targets = list[dict[str, Any]]


def backends_of(peers: Peers, shape: dict[str, Any]) -> Peers:
    """The peers with the shape and the precision of a comparison."""
    return {
        f"{name}, {shape['precision']}": (python, backend, {**shape, **settings})
        for name, (python, backend, settings) in peers.items()
    }


def short_windows(
    config: dict[str, Any], peers: Peers, repeats: int, precision: str
) -> tuple[Targets, ModelMeasurement]:
    """B 2, T 256: all variants of ours, the peers and the book. There are targets only in bf16."""
    here = sys.executable
    shape = {"config": config, "batch": 2, "length": 256, "precision": precision}
    backends = {
        f"{name}, {precision}": (
            here, "ours", {**shape, **settings, "config": config | settings.get("config", {})},
        )
        for name, settings in VARIANTS.items()
    }  # fmt: skip
    backends |= backends_of(peers, shape)
    backends["the book, float32"] = (here, "book", {**shape, "precision": "float32"})
    measured = measure("B2 T256", backends, 512, repeats)
    if precision != "bf16":
        return [], measured
    targets = [
        at_least(f"{ours} / {peer}", ratio(measured.seconds[peer], measured.seconds[ours]), target)
        for ours, peer, target in [
            ("ours, bf16", "transformers, bf16", 1.25),
            ("ours, head not tied, bf16", "the book, float32", 1.6),
        ]
    ]
    return targets, measured


def long_windows(
    config: dict[str, Any], peers: Peers, repeats: int, precision: str
) -> tuple[Targets, ModelMeasurement]:
    """B 4, T 1024: ours with a chunked loss, and the peers. There are targets only in bf16."""
    shape = {"config": config, "batch": 4, "length": 1024, "precision": precision}
    ours = f"ours, chunked, {precision}"
    backends = {ours: (sys.executable, "ours", {**shape, "chunk": 1024})}
    backends |= backends_of(peers, shape)
    if precision != "bf16":
        return [], measure("B4 T1024", backends, 4096, repeats)
    peak = matrix_peak()
    measured = measure("B4 T1024", backends, 4096, repeats)
    peak = max(peak, matrix_peak())
    rate = 4096 / statistics.median(measured.seconds[ours])
    fraction = rate * flops_per_token(GPTConfig(**config), 1024) / peak
    targets = [
        at_least(
            f"B4 T1024, {ours}: fraction of the bf16 peak, {peak / 1e9:.0f} GFLOP/s", fraction, 0.7
        ),
        at_most(
            f"B4 T1024, {ours} / transformers: peak memory",
            measured.memory[ours] / measured.memory["transformers, bf16"],
            0.75,
        ),
    ]
    compiled = "nanoGPT, compiled, bf16"
    if compiled in measured.seconds:
        faster = ratio(measured.seconds[compiled], measured.seconds[ours])
        targets.append(at_least(f"B4 T1024, {ours} / {compiled}", faster, 1.15))
    return targets, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--long",
        action="store_true",
        help="also measure B 4, T 1024: ten more minutes, twenty in float32",
    )
    parser.add_argument(
        "--book-run", action="store_true", help="also run configs/verdict.yaml and the book's loop"
    )
    parser.add_argument(
        "--cost", action="store_true", help="measure Lightning's cost, without B 2, T 256"
    )
    parser.add_argument(
        "--transformers",
        metavar="PYTHON",
        default=sys.executable,
        help="interpreter in which transformers is installed",
    )
    parser.add_argument(
        "--litgpt", metavar="PYTHON", help="interpreter in which LitGPT is installed"
    )
    parser.add_argument("--nanogpt", metavar="FOLDER", type=Path, help="checkout of nanoGPT")
    parser.add_argument(
        "--tiny", action="store_true", help="use a toy model, to test that the benchmark runs"
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    config = {**vars(GPT2_SIZES["gpt2-124M"]), "drop_rate": 0.0}
    if arguments.tiny:
        config |= {"emb_dim": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 500}
    has_bf16 = measured_peak(torch.bfloat16) > measured_peak(torch.float32)
    peers: Peers = {"transformers": (arguments.transformers, "transformers", {})}
    if arguments.litgpt:
        peers["LitGPT, compiled"] = (arguments.litgpt, "litgpt", {})
    if arguments.nanogpt:
        if not (arguments.nanogpt / "model.py").is_file():
            parser.error(f"{arguments.nanogpt}: is not a checkout of nanoGPT; it has no model.py")
        folder = str(arguments.nanogpt.resolve())
        peers["nanoGPT, compiled"] = (sys.executable, "nanogpt", {"folder": folder})
    precision = "bf16" if has_bf16 or arguments.tiny else "float32"
    comparisons = {} if arguments.cost else {"B2 T256": short_windows}
    if arguments.long:
        comparisons["B4 T1024"] = long_windows
    targets: Targets = []
    rates, memory = {}, {}
    for title, compare in comparisons.items():
        its_targets, measured = compare(config, peers, arguments.repeats, precision)
        targets += its_targets
        rates |= {f"{title}: {name}": rate for name, rate in measured.rates.items()}
        memory |= {f"{title}: {name}": round(m / 1e9, 2) for name, m in measured.memory.items()}
    not_measured = [] if precision == "bf16" else [f"{title}, bf16" for title in comparisons]
    if not_measured:
        print("bfloat16 is slower than float32 on this CPU, so its targets are not measured")
    costs = []
    for _ in range(arguments.repeats):
        blocks = lightning_cost(400 if arguments.tiny else 3000)
        fit, plain = (1e3 * statistics.median(seconds) for seconds in zip(*blocks, strict=True))
        costs.append(statistics.median(1e3 * (fit - plain) for fit, plain in blocks))
        print(
            f"a very small model: fit {fit:.2f} ms per step, a plain loop {plain:.2f} ms, "
            f"median difference {costs[-1]:.2f} ms",
            flush=True,
        )
    targets.append(at_most("Lightning's cost per step in ms", statistics.median(costs), 0.5))
    if arguments.book_run:
        ours, book = book_run(10)
        print(f"verdict.yaml: {ours:.0f} s, the book's loop: {book:.0f} s")
        targets.append(at_most("verdict.yaml / the book's loop", ours / book, 0.85))
    for target in targets:
        print("passed" if target["passed"] else "FAILED", target)
    machine = description("lightning", transformers=arguments.transformers, litgpt=arguments.litgpt)
    if arguments.nanogpt:
        machine["versions"]["nanoGPT"] = commit_of(arguments.nanogpt)
    print(
        json.dumps(
            {
                "benchmark": "training",
                "machine": machine,
                "tokens_per_second": rates,
                "memory_gb": memory,
                "lightnings_cost_ms": [round(cost, 3) for cost in costs],
                "targets": targets,
                "not_measured": not_measured,
            }
        )
    )


if __name__ == "__main__":
    main()
