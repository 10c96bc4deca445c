"""Training steps beside transformers, LitGPT and the book's code: python benchmarks/training.py [--repeats 5] [--tiny]

12 layers x 768, AdamW over all weights, dropout 0, the same random tokens, bf16, or float32 where a CPU has no
instructions for it; each way in a process of its own, a step of each in turn, after two uncounted rounds, in which
compiled ways compile. Then Lightning's cost: the fit command's steps of a very small model beside a plain loop over
the same model. --long adds B 4, T 1024; --book-run the whole of configs/verdict.yaml beside the book's loop, a quarter
of an hour; --litgpt and --transformers PYTHON are interpreters that have the peer (transformers by default this one).
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
from machine import at_least, at_most, description, ratio
from worker import Worker

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.cli.main import main as command
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.model.flops import flops_per_token
from gpt_lightning.model.loss import cross_entropy
from gpt_lightning.training.hardware import measured_peak
from gpt_lightning.training.optimizer import build_adamw

HERE = Path(__file__).resolve().parent
# what fit is told for each way of ours
WAYS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, compiled": {"compile": True},
    "ours, chunked": {"chunk": 1024},
    "ours, head not tied": {"config": {"tied_embeddings": False}},  # as the book's is
}


@dataclass
class ModelMeasurement:
    """Of each way: a step's seconds, the process's bytes at most, tokens a second (median, lowest, highest)."""

    seconds: dict[str, list[float]]
    memory: dict[str, int]
    rates: dict[str, list[float]]


def measure(
    name: str, ways: dict[str, tuple[str, str, dict[str, Any]]], tokens: int, repeats: int
) -> ModelMeasurement:
    workers = {way: Worker("train", *how) for way, how in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 2):
        for way, worker in workers.items():
            taken = worker.go()
            if turn >= 2:
                seconds[way].append(taken)
    memory, rates = {}, {}
    for way, worker in workers.items():
        memory[way] = worker.peak_memory()
        worker.end()
        each = sorted(tokens / value for value in seconds[way])
        rates[way] = [round(r, 1) for r in (statistics.median(each), each[0], each[-1])]
        print(
            f"{name}  {way:28} {rates[way][0]:8.1f} tok/s ({rates[way][1]} – {rates[way][2]}), "
            f"{memory[way] / 1e9:.2f} GB",
            flush=True,
        )
    return ModelMeasurement(seconds, memory, rates)


def matrix_peak(size: int = 3072, rounds: int = 5) -> float:
    """FLOP/s of bfloat16 matrix products, the best of several looks at the machine."""
    return max(measured_peak(torch.bfloat16, size, 3) for _ in range(rounds))


BLOCK = 50  # steps, so that each has one logging


class Turns(Callback):
    """Takes as many plain steps after each block of a fit's, and notes the seconds a step of both."""

    plain_step: Callable[[], None]  # the command makes the object, the benchmark sets and reads
    seconds: ClassVar[list[tuple[float, float]]] = []
    _began = 0.0
    _steps = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._steps += 1
        if self._steps % BLOCK:
            return
        now = time.perf_counter()
        for _ in range(BLOCK):
            Turns.plain_step()
        ended = time.perf_counter()
        if self._steps > 2 * BLOCK:
            self.seconds.append(((now - self._began) / BLOCK, (ended - now) / BLOCK))
        self._began = time.perf_counter()


@contextmanager
def terminal() -> Iterator[None]:
    """stderr is one, on which a progress bar is drawn, and another process reads it, as a terminal's window does."""
    ours, theirs = os.openpty()
    with (
        subprocess.Popen(["cat"], stdin=ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
        open(theirs, "w") as stderr,
    ):
        os.close(ours)
        with redirect_stderr(stderr):
            yield


def lightnings_cost(steps: int) -> list[tuple[float, float]]:
    """Seconds a step of a very small model by the fit command, and by a plain loop, in one process by turns."""
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

    Turns.plain_step = plain_step
    Turns.seconds = []
    settings = [
        f"--model.config.{key}={value}" for key, value in vars(config).items() if value is not None
    ]
    with tempfile.TemporaryDirectory() as scratch, terminal():
        code = command(
            ["fit", *settings, "--data.text=sample", "--data.batch_size=1", "--trainer.accelerator=cpu",
             f"--trainer.default_root_dir={scratch}", "--evaluation.eval_freq=100000",
             "--evaluation.prompt=null", f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1",
             f"--checkpoint.every_n_train_steps={steps // 4}", f"--allow_import={__name__}",
             f"--trainer.callbacks+={__name__}.Turns"]
        )  # fmt: skip
    assert code == 0, "fit failed"
    return Turns.seconds


BOOKS_RUN = """
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
    """Wall seconds of configs/verdict.yaml and of the book's loop, a sample after each epoch in both.

    Ours saves checkpoints too. Both must end with the same losses.
    """
    root = HERE.parent
    with tempfile.TemporaryDirectory() as scratch:
        ours = [sys.executable, "-m", "gpt_lightning", "fit", f"--config={root}/configs/verdict.yaml",
                f"--trainer.max_epochs={epochs}", f"--trainer.default_root_dir={scratch}"]  # fmt: skip
        book = [sys.executable, "-c", BOOKS_RUN, str(root / "tests"), str(epochs)]
        walls, ends = [], []
        for run in (ours, book):
            began = time.perf_counter()
            done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=scratch)
            walls.append(time.perf_counter() - began)
            ends.append(
                [x for x in (done.stdout + done.stderr).splitlines() if "Train loss" in x][-1]
            )
    if ends[0].split("Train")[1].split(",")[:2] != ends[1].split("Train")[1].split(",")[:2]:
        raise RuntimeError(f"other losses than the book's: {ends[0]} and {ends[1]}")
    return walls[0], walls[1]


Targets = list[dict[str, Any]]


def short_windows(
    config: dict[str, Any], peers: dict[str, tuple[str, str]], repeats: int, precision: str
) -> tuple[Targets, ModelMeasurement]:
    """With the targets where it is bf16."""
    here = sys.executable
    shape = {"config": config, "batch": 2, "length": 256, "precision": precision}
    ways = {
        f"{way}, {precision}": (
            here, "ours", {**shape, **how, "config": config | how.get("config", {})},
        )
        for way, how in WAYS.items()
    }  # fmt: skip
    ways |= {f"{way}, {precision}": (*peer, shape) for way, peer in peers.items()}
    ways["the book, float32"] = (here, "book", {**shape, "precision": "float32"})
    found = measure("B2 T256", ways, 512, repeats)
    if precision != "bf16":
        return [], found
    targets = [
        at_least(f"{way} / {peer}", ratio(found.seconds[peer], found.seconds[way]), target)
        for way, peer, target in [
            ("ours, bf16", "transformers, bf16", 1.25),
            ("ours, head not tied, bf16", "the book, float32", 1.6),
        ]
    ]
    return targets, found


def long_windows(
    config: dict[str, Any], peers: dict[str, tuple[str, str]], repeats: int, precision: str
) -> tuple[Targets, ModelMeasurement]:
    """With the targets where it is bf16."""
    shape = {"config": config, "batch": 4, "length": 1024, "precision": precision}
    best = f"ours, chunked, {precision}"
    ways = {best: (sys.executable, "ours", {**shape, "chunk": 1024})}
    ways |= {f"{way}, {precision}": (*peer, shape) for way, peer in peers.items()}
    if precision != "bf16":
        return [], measure("B4 T1024", ways, 4096, repeats)
    peak = matrix_peak()
    found = measure("B4 T1024", ways, 4096, repeats)
    peak = max(peak, matrix_peak())
    rate = 4096 / statistics.median(found.seconds[best])
    share = rate * flops_per_token(GPTConfig(**config), 1024) / peak
    targets = [
        at_least(
            f"B4 T1024, {best}: share of the bf16 peak, {peak / 1e9:.0f} GFLOP/s", share, 0.65
        ),
        at_most(
            f"B4 T1024, {best} / transformers: peak memory",
            found.memory[best] / found.memory["transformers, bf16"],
            0.75,
        ),
    ]
    return targets, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--long", action="store_true", help="also B 4, T 1024; ten minutes more, twenty in float32"
    )
    parser.add_argument(
        "--book-run", action="store_true", help="also configs/verdict.yaml as a whole"
    )
    parser.add_argument("--cost", action="store_true", help="Lightning's cost, not B 2, T 256")
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
    has_bf16 = measured_peak(torch.bfloat16) > measured_peak(torch.float32)
    peers = {"transformers": (arguments.transformers, "transformers")}
    if arguments.litgpt:
        peers["LitGPT, compiled"] = (arguments.litgpt, "litgpt")
    precision = "bf16" if has_bf16 or arguments.tiny else "float32"
    asked = {} if arguments.cost else {"B2 T256": short_windows}
    if arguments.long:
        asked["B4 T1024"] = long_windows
    targets: Targets = []
    rates, memory = {}, {}
    for name, steps in asked.items():
        step_targets, found = steps(config, peers, arguments.repeats, precision)
        targets += step_targets
        rates |= {f"{name}: {way}": rate for way, rate in found.rates.items()}
        memory |= {f"{name}: {way}": round(m / 1e9, 2) for way, m in found.memory.items()}
    not_measured = [] if precision == "bf16" else [f"{name}, bf16" for name in asked]
    if not_measured:
        print("bfloat16 is slower than float32 on this CPU: its targets are not measured")
    costs = []
    for _ in range(arguments.repeats):
        blocks = lightnings_cost(400 if arguments.tiny else 3000)
        fit, plain = (1e3 * statistics.median(of_one) for of_one in zip(*blocks, strict=True))
        costs.append(statistics.median(1e3 * (one - other) for one, other in blocks))
        print(f"a very small model: fit {fit:.2f} ms a step, a plain loop {plain:.2f}; between them {costs[-1]:.2f}", flush=True)  # fmt: skip
    targets.append(at_most("Lightning's cost a step in ms", statistics.median(costs), 0.5))
    if arguments.book_run:
        ours, book = book_run(10)
        print(f"the book's run: {ours:.0f} s, the book's loop {book:.0f} s")
        targets.append(at_most("verdict.yaml / the book's loop", ours / book, 0.85))
    for target in targets:
        print("passed" if target["passed"] else "FAILED", target)
    machine = description("lightning", transformers=arguments.transformers, litgpt=arguments.litgpt)
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
