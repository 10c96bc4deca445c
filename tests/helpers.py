"""What several test files use: commands, settings, tiny models and data."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.data.dataloader import ResumableDataLoader

ROOT = Path(__file__).resolve().parent.parent
# subprocesses import the package and these modules; like the test itself, they have one core
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
SMALL_QUICKSTART = (QUICKSTART, *SMALL)
# a still smaller model on top of SMALL, for tests with many steps and checkpoints
TINY_MODEL = (
    "--model.config.emb_dim=4",
    "--model.config.n_heads=1",
    "--model.config.n_layers=1",
)
GPT2 = (f"--config={ROOT}/configs/gpt2.yaml", "--trainer.accelerator=cpu")
PRETRAIN = ROOT / "configs" / "pretrain-124M.yaml"
DDP = ["--trainer.devices=2", "--trainer.strategy=ddp"]
FSDP = (f"--config={ROOT}/configs/fsdp.yaml", "--trainer.devices=2", "--trainer.precision=32-true")
SCALING = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")

# --- commands and what they answer ----------------------------------------------------------------


@dataclass(frozen=True)
class CommandResult:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """What it wrote to standard error after the first line of ``fit``, which names the run."""
        first, _, rest = self.err.partition("\n")
        return rest if first.startswith("fit: ") else self.err


Command = Callable[..., CommandResult]


def python(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run this Python in a subprocess; a timeout fails the test."""
    settings.setdefault("timeout", 300)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **settings
    )


@contextmanager
def limited_file_size(limit: int) -> Iterator[None]:
    """No file of this process can grow beyond ``limit`` bytes, as on a full disk (Python ignores the signal)."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_refused(result: CommandResult, *parts: str) -> None:
    """The command failed with exit code 2 and one line that has all ``parts``."""
    assert (result.code, result.out) == (2, ""), result
    assert result.error.startswith("gpt_lightning: error: ")
    assert result.error.count("\n") == 1, result.err
    for part in parts:
        assert part in result.error


def json_of(result: CommandResult) -> Any:
    """The JSON that a successful command printed."""
    assert result.code == 0, result.err
    return json.loads(result.out)


def plan_as_json(command: Command, *arguments: str) -> dict[str, Any]:
    return dict(json_of(command("plan", *arguments, "--json")))


def validated_losses(command: Command, *arguments: str) -> dict[str, float]:
    """Losses and other metrics that ``validate`` prints for a configuration of GPT-2."""
    return dict(json_of(command("validate", *GPT2, "--json", *arguments)))


def reference(name: str) -> dict[str, Any]:
    """Recorded digits of the book's code."""
    path = ROOT / "tests" / "data" / "reference" / name
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


# --- models and data ------------------------------------------------------------------------------

TINY = GPTConfig(vocab_size=97, context_length=24, emb_dim=32, n_heads=4, n_layers=3, drop_rate=0.0)


def tiny_gpt(seed: int = 0, **changes: object) -> GPTModel:
    """A model with the configuration ``TINY`` and ``changes``."""
    torch.manual_seed(seed)
    config = GPTConfig(**{**TINY.__dict__, **changes})  # type: ignore[arg-type]
    return GPTModel(config).eval()


def tiny_gpt2_vocabulary() -> GPTModel:
    """A tiny model with the vocabulary of GPT-2, whose texts have an EOT delimiter."""
    torch.manual_seed(1)
    return GPTModel(GPTConfig(context_length=24, emb_dim=16, n_heads=2, n_layers=2)).eval()


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def some_tokens(n: int) -> np.ndarray:
    """``n`` random tokens, always the same."""
    return np.random.default_rng(n).integers(0, 50257, n).astype(np.uint16)


def window_numbers(loader: ResumableDataLoader, passes: int = 1) -> list[list[int]]:
    """Numbers of the windows of each batch."""
    return [loader.handed_out.tolist() for _ in range(passes) for _ in loader]


def flatten(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


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
            chunk = content[other : other + rng.randrange(1, 256)]
            return content[:at] + chunk + content[at + len(chunk) :]
