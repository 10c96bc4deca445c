"""Tokens to a loss, Muon against AdamW: python benchmarks/tokens_to_loss.py --corpus PATH... [--work DIR] [--jobs 1] [--tiny]

Trains small GPTs on real text with a vocabulary of 4,096 tokens of its own, at most one pass over it. Both recipes have
the same batch, warmup, and linear decay over the last fifth to 0; each trains with its best learning rate:

1. AdamW with five learning rates on one seed (for a size after the first: three, around the best one of the size before).
   If the best rate is the lowest or the highest one, up to three beyond it are tried too.
2. Muon likewise with 70 % of the tokens; its embeddings, norms and biases have AdamW's best learning rate.
3. Both with their best rates on three seeds, Muon with 50 % and 70 % of the tokens.

The answer is the share of AdamW's tokens with which Muon ends at AdamW's final validation loss, between the two lengths
on a line in the logarithm of the tokens; the target is 0.70 in the median of the seeds. Each run is a `fit` that resumes
when the script runs again, so it may be stopped at any time. RESULTS.jsonl in DIR has a line per run. The last line of
the output is JSON.
"""

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import at_most, description

RATES = {"adamw": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), "muon": (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)}
MAX_MORE_RATES = 3
SHARES = (0.5, 0.7)  # of AdamW's tokens, for Muon
SEEDS = (1, 2, 3)
WINDOWS, LENGTH = 16, 256  # of an optimizer step
TARGET = 0.70


@dataclass(frozen=True)
class Size:
    """A model of 4 blocks, and the tokens that AdamW trains it on."""

    name: str
    emb_dim: int
    tokens: int


@dataclass(frozen=True)
class Recipe:
    """One run."""

    size: Size
    optimizer: str
    rate: float
    seed: int
    share: float = 1.0
    adamw_rate: float | None = None  # of what Muon leaves to AdamW

    @property
    def steps(self) -> int:
        return round(self.size.tokens * self.share / (WINDOWS * LENGTH))

    @property
    def name(self) -> str:
        return (
            f"{self.size.name}-{self.optimizer}-{self.rate:g}-{self.share:g}-{self.steps}-seed{self.seed}"
            + (f"-adamw{self.adamw_rate:g}" if self.adamw_rate else "")
        )

    def arguments(self, store: Path) -> list[str]:
        muon = (
            ["--model.optimizer=muon", f"--model.muon_lr={self.rate}"]
            if self.optimizer == "muon"
            else []
        )
        return [
            f"--run={self.name}", f"--seed_everything={self.seed}", f"--data.text={store}",
            "--trainer.accelerator=cpu", "--trainer.max_epochs=1", f"--trainer.max_steps={self.steps}",
            "--trainer.precision=bf16-mixed", "--trainer.gradient_clip_val=1.0", "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            f"--model.config.context_length={LENGTH}", f"--model.config.emb_dim={self.size.emb_dim}",
            "--model.config.n_layers=4", "--model.config.n_heads=4", "--model.config.drop_rate=0",
            "--model.config.tied_embeddings=true", "--model.config.qkv_bias=true",
            f"--model.lr={self.adamw_rate or self.rate}", *muon, "--model.betas=[0.9,0.95]",
            "--model.decay_matrices_only=true", "--model.warmup_steps=0.05",
            "--model.lr_schedule=wsd", "--model.decay_fraction=0.2",
            f"--data.batch_size={WINDOWS}", "--evaluation.prompt=null", "--evaluation.eval_freq=50",
            "--evaluation.eval_iter=5", "--checkpoint.save_best=false",
            "--checkpoint.every_n_train_steps=100", "--checkpoint.keep_previous=false",
        ]  # fmt: skip


def command(*arguments: str, folder: Path) -> str:
    """Run a command of the package in a folder and return what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "gpt_lightning", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def prepare(corpus: Sequence[Path], work: Path, vocab_size: int, *split: str) -> Path:
    """A token store of the corpus with a vocabulary of its own."""
    texts = [str(path.resolve()) for path in corpus]
    store, tokenizer = work / "store", work / "tokenizer"
    if not tokenizer.exists():
        command("train-tokenizer", *texts, f"--vocab_size={vocab_size}", f"--out={tokenizer}", folder=work)  # fmt: skip
    command("prepare", *texts, f"--tokenizer={tokenizer}", f"--out={store}", "--val_ratio=0.01", *split, folder=work)  # fmt: skip
    return store


class Runs:
    """Runs of ``fit`` in a folder, several at a time; a finished one is read from RESULTS.jsonl."""

    def __init__(self, work: Path, store: Path, jobs: int) -> None:
        self.work, self.store, self.jobs = work, store, jobs
        self.path = work / "RESULTS.jsonl"
        self.done: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                result = json.loads(line)
                self.done[result["name"]] = result

    def final_losses(self, recipes: Sequence[Recipe]) -> list[float]:
        """The validation loss at the end of each run; runs that are not there are trained."""
        with ThreadPoolExecutor(self.jobs) as pool:
            results = list(pool.map(self._run, recipes))
        return [result["val_loss"] for result in results]

    def _run(self, recipe: Recipe) -> dict[str, Any]:
        if recipe.name in self.done:
            return self.done[recipe.name]
        start = time.perf_counter()
        was_started = (self.work / "checkpoints" / recipe.name / "last.ckpt").exists()
        command("fit", *recipe.arguments(self.store), "--ckpt_path=auto", folder=self.work)
        last = torch.load(
            self.work / "checkpoints" / recipe.name / "last.ckpt", weights_only=True, mmap=True
        )
        if (seen := last["tokens_seen"]) != recipe.steps * WINDOWS * LENGTH:
            sys.exit(
                f"{recipe.name}: one pass has {seen:,} tokens only; give more text, or a smaller --tokens"
            )
        with (self.work / "checkpoints" / recipe.name / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["val_loss"]]
        curve = [[int(float(row["tokens_seen"])), float(row["val_loss"])] for row in rows]
        # the loss of the last weights over all validation windows
        validate = ("validate", f"--config=checkpoints/{recipe.name}/config.yaml", "--val_only", "--json",
                    f"--init_from=checkpoints/{recipe.name}")  # fmt: skip
        result = {
            "name": recipe.name,
            **asdict(recipe),
            "val_loss": json.loads(command(*validate, folder=self.work))["val_loss"],
            "curve": curve,
            "seconds": None if was_started else time.perf_counter() - start,
            "machine": description("lightning"),
        }
        self.done[recipe.name] = result
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{recipe.name}: {result['val_loss']:.4f}", flush=True)
        return result


def best_rate(runs: Runs, rates: Sequence[float], recipe: Recipe) -> float:
    """The learning rate with the lowest final loss; rates beyond the ends are tried while the best one is an end."""
    losses: dict[float, float] = {}
    wanted = list(rates)
    while wanted and len(losses) < len(rates) + MAX_MORE_RATES:
        found = runs.final_losses([replace(recipe, rate=rate) for rate in wanted])
        losses |= {
            rate: loss if math.isfinite(loss) else math.inf
            for rate, loss in zip(wanted, found, strict=True)
        }
        best = min(losses, key=lambda rate: losses[rate])
        wanted = [best / 2] if best == min(losses) else [2 * best] if best == max(losses) else []
    return best


def around(rate: float) -> tuple[float, ...]:
    return (rate / 2, rate, 2 * rate)


def share_of_tokens(target: float, losses: Sequence[float]) -> float:
    """The share of the tokens with which the loss would be ``target``, by a line through both lengths."""
    (a, b), (x, y) = losses, map(math.log, SHARES)
    if not a > b:
        return math.nan
    return math.exp(x + (a - target) / (a - b) * (y - x))


def measure(runs: Runs, size: Size, before: dict[str, Any] | None, seeds: Sequence[int]) -> dict[str, Any]:  # fmt: skip
    first = seeds[0]
    rates = {name: around(before[f"{name}_rate"]) if before else RATES[name] for name in RATES}
    adamw_rate = best_rate(runs, rates["adamw"], Recipe(size, "adamw", 0.0, first))
    with_muon = Recipe(size, "muon", 0.0, first, SHARES[-1], adamw_rate)
    muon_rate = best_rate(runs, rates["muon"], with_muon)
    adamw = runs.final_losses([Recipe(size, "adamw", adamw_rate, seed) for seed in seeds])
    muon = [
        runs.final_losses(
            [Recipe(size, "muon", muon_rate, seed, share, adamw_rate) for seed in seeds]
        )
        for share in SHARES
    ]
    shares = [
        share_of_tokens(loss, pair)
        for loss, pair in zip(adamw, zip(*muon, strict=True), strict=True)
    ]
    return {
        "size": asdict(size),
        "adamw_rate": adamw_rate,
        "muon_rate": muon_rate,
        "adamw_losses": adamw,
        "muon_losses": dict(zip(map(str, SHARES), muon, strict=True)),
        "shares": shares,
        "share": statistics.median(shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="what prepare reads")
    parser.add_argument("--work", type=Path, default=Path("tokens-to-loss"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--sizes", nargs="+", default=["small", "large"])
    parser.add_argument(
        "--tokens", type=float, default=1.0, help="factor of the tokens of both sizes"
    )
    parser.add_argument("--tiny", action="store_true", help="a toy model and few steps")
    arguments = parser.parse_args()
    sizes = [
        Size("small", 128, round(5_000_000 * arguments.tokens)),
        Size("large", 256, round(8_000_000 * arguments.tokens)),
    ]
    seeds, vocab_size = SEEDS, 4096
    if arguments.tiny:
        sizes, seeds, vocab_size = [Size("small", 8, 20 * WINDOWS * LENGTH)], (1,), 300
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    split = ["--split=ratio"] if arguments.tiny else []  # the toy's text may be one document
    runs = Runs(work, prepare(arguments.corpus, work, vocab_size, *split), arguments.jobs)
    measured: list[dict[str, Any]] = []
    for size in sizes:
        if size.name in arguments.sizes:
            measured.append(measure(runs, size, measured[-1] if measured else None, seeds))
            print(json.dumps(measured[-1], indent=1), flush=True)
    targets = [
        at_most(f"{one['size']['name']}: Muon's tokens / AdamW's", one["share"], TARGET)
        for one in measured
    ]
    print(
        json.dumps({"machine": description("lightning"), "measured": measured, "targets": targets})
    )


if __name__ == "__main__":
    main()
