"""The package where no clone is: its wheel and source archive in a fresh environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, SMALL, TINY_MODEL


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command that must succeed; returns its standard output. No setting of the tests' environment stays."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GPT_LIGHTNING_"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept | environment, check=False,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_works_without_a_clone(tmp_path: Path) -> None:
    """quickstart, generate, a report, and DDP on two processes, by the names of the configurations."""
    dist, room, work = (tmp_path / name for name in ("dist", "venv", "work"))
    work.mkdir()
    # the wheel is built from the source archive
    run(sys.executable, "-m", "build", "--outdir", dist, ROOT, cwd=work)
    assert {path.name.rpartition("-")[2] for path in dist.iterdir()} == {"any.whl", "0.1.0.tar.gz"}
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "venv", room, cwd=work)
    python = next(
        path for path in (room / "bin" / "python", room / "Scripts" / "python.exe") if path.exists()
    )
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=work)
    where = run(python, "-c", "import gpt_lightning; print(gpt_lightning.__file__)", cwd=work)
    assert Path(where.strip()).is_relative_to(room)

    def command(*arguments: str) -> str:
        cache = str(tmp_path / "cache")
        return run(python, "-m", "gpt_lightning", *arguments, cwd=work, GPT_LIGHTNING_CACHE=cache)

    small = (*SMALL, *TINY_MODEL)
    command("fit", "--config", "quickstart", *small, "--trainer.max_steps=3")
    prompt = ("--from=checkpoints/quickstart", "--prompt=The tower clock")
    assert command("generate", *prompt, "--max_new_tokens=3").startswith("The tower clock")
    assert "temperature" in command("report", "sampling", *prompt, "--num_samples=10")
    command("fit", "--config", "quickstart", "--config", "ddp", *small, "--trainer.devices=2",
            "--trainer.max_steps=3", "--run=ddp")  # fmt: skip
    assert (work / "checkpoints" / "ddp" / "last.ckpt").exists()
    assert "quickstart" in command("configs", "list")
