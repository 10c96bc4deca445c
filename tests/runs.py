"""Runs that tests train, and comparisons of what they leave."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.pretrained.weights import read_checkpoint
from helpers import TINY_MODEL

if TYPE_CHECKING:
    from gpt_lightning import RunConfig

RUN = Path("checkpoints/quickstart")
LAST = RUN / "last.ckpt"
# settings on top of SMALL
THREE_EPOCHS = (
    "--trainer.max_epochs=3",
    "--model.config.drop_rate=0.1",
    "--evaluation.eval_freq=1",
    "--checkpoint.save_best=false",
    *TINY_MODEL,
)
# without dropout, warm-up, samples, best checkpoint and TensorBoard
BARE = ("--model.config.drop_rate=0", "--evaluation.prompt=null", "--evaluation.eval_freq=100",
        "--evaluation.eval_iter=1", "--checkpoint.save_best=false", "--model.warmup_steps=0",
        "--trainer.logger=false", *TINY_MODEL)  # fmt: skip


def same_bits(a: Any, b: Any) -> bool:
    """Whether two nested containers hold the same values; tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return bool(a == b)


def small_checkpoint(step: int) -> dict[str, Any]:
    """A complete checkpoint of a very small model."""
    torch.manual_seed(step)
    config = {"vocab_size": 40, "context_length": 4, "emb_dim": 8, "n_heads": 2, "n_layers": 1,
              "drop_rate": 0.0, "qkv_bias": False, "tied_embeddings": False}  # fmt: skip

    weights = {f"model.{n}": t for n, t in GPTModel(GPTConfig(**config)).state_dict().items()}
    moments = {i: {"exp_avg": torch.randn_like(t)} for i, t in enumerate(weights.values())}
    return {
        "state_dict": weights,
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"config": config},
        "global_step": step,
        "tokens_seen": 4 * step,
        "epoch": 0,
        "pytorch-lightning_version": "2.6.6",
        "loops": {"fit_loop": {}},
        "callbacks": {},
        "lr_schedulers": [],
    }


def same_weights(one: Path | str, other: Path | str) -> bool:
    """Whether two checkpoints hold the same weights and optimizer state."""
    first, second = (torch.load(path, weights_only=True) for path in (one, other))
    return same_bits(first["state_dict"], second["state_dict"]) and same_bits(
        first["optimizer_states"][0]["state"], second["optimizer_states"][0]["state"]
    )


def losses(run: str) -> list[list[str]]:
    """Steps, epochs, losses and tokens of a run, as metrics.csv has them."""
    header, *rows = Path(f"checkpoints/{run}/metrics.csv").read_text().splitlines()
    kept = ("step", "epoch", "train_loss", "val_loss", "tokens_seen")
    places = [header.split(",").index(name) for name in kept]
    cells = [[row.split(",")[i] for i in places] for row in rows]
    return [row for row in cells if row[kept.index("val_loss")]]


def same_runs(one: str, other: str) -> bool:
    """Whether two runs have the same losses, last weights and optimizer state."""
    return losses(one) == losses(other) and same_weights(
        f"checkpoints/{one}/last.ckpt", f"checkpoints/{other}/last.ckpt"
    )


def file_times(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file in a folder."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def last_checkpoint(run: str) -> dict[str, Any]:
    """Content of the last checkpoint of a run."""
    return dict(read_checkpoint(Path(f"checkpoints/{run}/last.ckpt")))


def same_checkpoints(one: str, other: str) -> bool:
    """Whether the last checkpoints of two runs are equal in all that verify-resume compares."""
    from gpt_lightning.training.verify_resume import compare_checkpoints

    files = [Path(f"checkpoints/{run}/last.ckpt") for run in (one, other)]
    return not any(part.difference for part in compare_checkpoints(*files))


def read_metrics(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [
            {key: float(value) for key, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


# a run of a second, in Python and as a command
ARCHITECTURE = {"context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 1}


def small_run(folder: Path, name: str = "run", max_steps: int = 12) -> "RunConfig":
    """Run of a second, in Python."""
    from gpt_lightning import EvaluationConfig, RunConfig

    return RunConfig(
        run=name,
        model={"config": dict(ARCHITECTURE)},
        data={"text": "sample", "train_ratio": 0.1, "stride": 40},
        trainer={"accelerator": "cpu", "max_steps": max_steps, "default_root_dir": str(folder)},
        evaluation=EvaluationConfig(eval_iter=2, max_new_tokens=3),
    )


def small_command(folder: Path, name: str = "command", max_steps: int = 12) -> list[str]:
    """The same run as arguments of the command."""
    return [
        "fit", f"--run={name}", *(f"--model.config.{k}={v}" for k, v in ARCHITECTURE.items()),
        "--data.text=sample", "--data.train_ratio=0.1", "--data.stride=40", "--trainer.accelerator=cpu",
        f"--trainer.max_steps={max_steps}", f"--trainer.default_root_dir={folder}",
        "--evaluation.eval_iter=2", "--evaluation.max_new_tokens=3",
    ]  # fmt: skip


def assert_same_bits(one: Path, other: Path) -> None:
    """Both checkpoints are equal in all that verify-resume compares."""
    from gpt_lightning.training.verify_resume import compare_checkpoints

    assert [part.difference for part in compare_checkpoints(one, other)] == [""] * 3
