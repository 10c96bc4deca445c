"""What several test files use: commands, settings, tiny models and data."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.data.dataloader import ResumableDataLoader

ROOT = Path(__file__).resolve().parent.parent
# a subprocess imports the package and the helpers of this folder; like a test, it has one core
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}

QUICKSTART = f"--config={ROOT}/configs/quickstart.yaml"
# a model and a text that train in a second, on top of any config
SMALL = [
    "--trainer.accelerator=cpu",
    "--model.config.context_length=16",
    "--model.config.emb_dim=8",
    "--model.config.n_heads=2",
    "--model.config.n_layers=2",
    "--data.text=sample",
    "--data.train_ratio=0.1",
    "--data.stride=40",
    "--data.batch_size=2",
    "--evaluation.eval_iter=2",
    "--evaluation.max_new_tokens=5",
]

# a still smaller model on top of SMALL, for tests with many steps and checkpoints
TINY_MODEL = (
    "--model.config.emb_dim=4",
    "--model.config.n_heads=1",
    "--model.config.n_layers=1",
)


@dataclass(frozen=True)
class CommandResult:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Command = Callable[..., CommandResult]


def assert_refused(result: CommandResult, *parts: str) -> None:
    assert result.code == 2, result.err
    assert result.out == ""
    assert result.err.startswith("gpt_lightning: error: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err


def some_tokens(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 50257, n).astype(np.uint16)


def window_numbers(loader: ResumableDataLoader, passes: int = 1) -> list[list[int]]:
    """Numbers of the windows of each batch."""
    return [loader.handed_out.tolist() for _ in range(passes) for _ in loader]


def flatten(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def tiny_model() -> GPTModel:
    torch.manual_seed(1)
    return GPTModel(GPTConfig(context_length=24, emb_dim=16, n_heads=2, n_layers=2)).eval()


def mutate(content: bytes, rng: random.Random) -> bytes:
    """``content`` with a flipped bit, a zeroed page, a lost end, inserted bytes or a moved part."""
    if not content:
        return b"?"
    at = rng.randrange(len(content))
    match rng.randrange(5):
        case 0:
            return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        case 1:
            start = at // 512 * 512
            return content[:start] + bytes(min(512, len(content) - start)) + content[start + 512 :]
        case 2:
            return content[:at]
        case 3:
            return content[:at] + rng.randbytes(rng.randrange(1, 64)) + content[at:]
        case _:
            other = rng.randrange(len(content))
            piece = content[other : other + rng.randrange(1, 256)]
            return content[:at] + piece + content[at + len(piece) :]


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


GPT2 = (f"--config={ROOT}/configs/gpt2.yaml", "--trainer.accelerator=cpu")


def validated_losses(command: Command, *arguments: str) -> dict[str, float]:
    result = command("validate", *GPT2, "--json", *arguments)
    assert result.code == 0, result.err
    metrics: dict[str, float] = json.loads(result.out)
    return metrics


TINY = GPTConfig(vocab_size=97, context_length=24, emb_dim=32, n_heads=4, n_layers=3, drop_rate=0.0)


def tiny_gpt(seed: int = 0, **changes: object) -> GPTModel:
    torch.manual_seed(seed)
    config = GPTConfig(**{**TINY.__dict__, **changes})  # type: ignore[arg-type]
    return GPTModel(config).eval()


PRETRAIN = ROOT / "configs" / "pretrain-124M.yaml"


def plan_as_json(command: Command, *arguments: str) -> dict[str, Any]:
    result = command("plan", *arguments, "--json")
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


DDP = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def json_of(result: Any) -> Any:
    assert result.code == 0, result.err
    return json.loads(result.out)


FSDP = (f"--config={ROOT}/configs/fsdp.yaml", "--trainer.devices=2", "--trainer.precision=32-true")


SMALL_QUICKSTART = (QUICKSTART, *SMALL)


SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def reference(name: str) -> dict[str, Any]:
    """Recorded digits of the book's code."""
    path = ROOT / "tests" / "data" / "reference" / name
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def python(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run this Python in a subprocess; a timeout fails the test."""
    settings.setdefault("timeout", 300)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **settings
    )
