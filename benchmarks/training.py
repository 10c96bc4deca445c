"""Training steps beside transformers and the book's code: python benchmarks/training.py [--repeats 5] [--tiny]

12 layers x 768, AdamW over all weights, dropout 0, the same random tokens. Steps of each way in turn, after an
uncounted first round, which compiles. Then Lightning's cost: the fit command's steps of a very small model beside
a plain loop over the same model. --long adds B 4, T 1024. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from machine import at_least, at_most, description, interleaved, ratio

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.model.cost import flops_per_token
from gpt_lightning.model.loss import chunked_cross_entropy, cross_entropy
from gpt_lightning.training.optim import build_adamw
from gpt_lightning.training.throughput import measured_peak

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def tokens(config: GPTConfig, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (batch, length + 1), generator=generator)


def ours(
    config: GPTConfig, ids: torch.Tensor, *, bf16: bool, compiled: bool, chunk: int | None
) -> Callable[[], None]:
    torch.manual_seed(0)
    model = GPTModel(config).train()
    if compiled:
        for block in model.trf_blocks:
            block.compile()
    optimizer = build_adamw(
        model, lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), decay_matrices_only=True
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if chunk is None:
                loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
            else:
                features = model.features(ids[:, :-1])
                loss = chunked_cross_entropy(features, model.head_weight, ids[:, 1:], chunk)
        loss.backward()
        optimizer.step()

    return step


def transformers_step(config: GPTConfig, ids: torch.Tensor, *, bf16: bool) -> Callable[[], None]:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.emb_dim,
            n_head=config.n_heads, n_layer=config.n_layers, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
            use_cache=False, bos_token_id=None, eos_token_id=None,
        )
    ).train()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = torch.nn.functional.cross_entropy(
                model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()
            )
        loss.backward()
        optimizer.step()

    return step


def book_step(config: GPTConfig, ids: torch.Tensor) -> Callable[[], None]:
    """The book's model and loop in float32, as in tests/book.py; its head is not tied."""
    import book

    torch.manual_seed(0)
    model = book.BookGPT({**vars(config), "drop_rate": 0.0}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
        ).backward()
        optimizer.step()

    return step


def lightnings_cost(repeats: int) -> tuple[float, float, float]:
    """Seconds a step of a very small model: the fit command's, a plain loop's, and what is between them."""
    steps = 300
    config = GPTConfig(
        vocab_size=50257, context_length=16, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.0
    )
    model = GPTModel(config)
    optimizer = build_adamw(
        model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), decay_matrices_only=True
    )
    ids = tokens(config, 2, 16)
    plain, fit, between = [], [], []
    script = (
        "import sys, time; from lightning.pytorch import Callback; from gpt_lightning.cli import main\n"
        "class Clock(Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, i):\n"
        "        if trainer.global_step in (100, 300): print('at', time.perf_counter(), file=sys.stderr)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    for _ in range(repeats):
        for step in range(steps):
            if step == 100:
                began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
            optimizer.step()
        plain.append((time.perf_counter() - began) / (steps - 100))
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch, "clocked.py").write_text(script)
            done = subprocess.run(
                [sys.executable, "clocked.py", "fit", "--trainer.accelerator=cpu", "--data.text=sample",
                 *(f"--model.config.{k}={v}" for k, v in [("context_length", 16), ("emb_dim", 16), ("n_heads", 2),
                                                          ("n_layers", 2), ("drop_rate", 0.0)]),
                 "--evaluation.eval_freq=100000", "--evaluation.prompt=null", "--trainer.max_steps=301",
                 "--trainer.max_epochs=-1", "--checkpoint.every_n_train_steps=100000",
                 "--allow_import=__main__", "--trainer.callbacks+=__main__.Clock"],
                cwd=scratch, capture_output=True, text=True, check=True,
            )  # fmt: skip
        at = [float(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("at ")]
        fit.append((at[1] - at[0]) / (steps - 100))
        between.append(fit[-1] - plain[-1])
    return statistics.median(fit), statistics.median(plain), statistics.median(between)


def measure(
    name: str, config: GPTConfig, batch: int, length: int, repeats: int, *, with_book: bool
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    ids = tokens(config, batch, length)
    ways: dict[str, Callable[[], None]] = {
        "ours, bf16": ours(config, ids, bf16=True, compiled=False, chunk=None),
        "ours, bf16, compiled": ours(config, ids, bf16=True, compiled=True, chunk=None),
        "ours, bf16, compiled, chunked": ours(config, ids, bf16=True, compiled=True, chunk=1024),
        "transformers, bf16": transformers_step(config, ids, bf16=True),
    }
    if with_book:
        ways["the book, float32"] = book_step(config, ids)
    seconds = interleaved(ways, repeats)
    rates = {}
    for way, values in seconds.items():
        each = sorted(batch * length / value for value in values)
        rates[f"{name}: {way}"] = [
            round(r, 1) for r in (statistics.median(each), each[0], each[-1])
        ]
        print(
            f"{name}  {way:30} {statistics.median(each):8.1f} tok/s ({each[0]:.1f} – {each[-1]:.1f})",
            flush=True,
        )
    return seconds, rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long", action="store_true", help="also B 4, T 1024; ten minutes more")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to see that it runs")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    settings = {**vars(GPT2_SIZES["gpt2-124M"]), "drop_rate": 0.0}
    if arguments.tiny:
        settings |= {"emb_dim": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 500}
    config = GPTConfig(**settings)
    bars = []
    seconds, rates = measure("B2 T256", config, 2, 256, arguments.repeats, with_book=True)
    best = min(
        (w for w in seconds if w.startswith("ours")), key=lambda w: statistics.median(seconds[w])
    )
    bars.append(
        at_least(
            f"{best} / transformers, bf16",
            ratio(seconds["transformers, bf16"], seconds[best]),
            1.25,
        )
    )
    bars.append(
        at_least(
            f"{best} / the book, float32", ratio(seconds["the book, float32"], seconds[best]), 1.6
        )
    )
    if arguments.long:
        seconds, more = measure(
            "B4 T1024", config, 4, 1024, max(1, arguments.repeats // 2), with_book=False
        )
        rates |= more
        best = min(
            (w for w in seconds if w.startswith("ours")),
            key=lambda w: statistics.median(seconds[w]),
        )
        rate = 4096 / statistics.median(seconds[best])
        share = rate * flops_per_token(config, 1024) / measured_peak(torch.bfloat16, 3072, 5)
        bars.append(at_least(f"B4 T1024, {best}: share of the bf16 peak", share, 0.65))
    fit, plain, between = lightnings_cost(arguments.repeats)
    print(f"a very small model: fit {1e3 * fit:.2f} ms a step, a plain loop {1e3 * plain:.2f} ms")
    bars.append(at_most("Lightning's cost a step in ms", 1e3 * between, 0.5))
    for bar in bars:
        print("holds " if bar["holds"] else "MISSED", bar)
    machine = description("transformers", "lightning")
    print(
        json.dumps(
            {"benchmark": "training", "machine": machine, "tokens_per_second": rates, "bars": bars}
        )
    )


if __name__ == "__main__":
    main()
