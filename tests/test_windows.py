"""All commands where the system refuses what Windows refuses. No real Windows was available.

The imitation is ``../shared/tools/windows_like``, a folder beside the repository: a folder cannot be opened, a descriptor
for reading cannot be synced, an open or mapped file can be neither removed nor replaced, and text is cp1252. It does not
see ``Path.read_text()``, so the other run of the same commands turns EncodingWarnings into errors.
"""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning.pretrained.weights import read_checkpoint
from helpers import ROOT, SMALL_QUICKSTART

IMITATION = ROOT.parent / "shared" / "tools" / "windows_like"
# libraries that read their own files in the system's encoding
LIBRARIES = ("torch", "matplotlib.font_manager", "regex._main")
WARNINGS = ",".join(
    ["error::EncodingWarning", *(f"ignore::EncodingWarning:{name}" for name in LIBRARIES)]
)
PROMPT = "The clock’s tower"  # cp1252 has ’, at another byte than UTF-8


class Commands:
    """Commands in a folder, each in a separate process."""

    def __init__(self, folder: Path, environment: dict[str, str], path: list[Path]) -> None:
        self.folder = folder
        folder.mkdir()
        self.environment = os.environ | environment | {
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "GPT_LIGHTNING_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def command_line(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "gpt_lightning", *arguments]

    def __call__(self, *arguments: str) -> bytes:
        result = subprocess.run(
            self.command_line(*arguments), cwd=self.folder, env=self.environment,
            capture_output=True, check=False, timeout=600,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr.decode(errors="replace")
        return result.stdout

    def interrupted(self, *arguments: str) -> None:
        """Ctrl-C after the first complete shard."""
        with subprocess.Popen(
            self.command_line(*arguments), cwd=self.folder, env=self.environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            progress = self.folder / "store" / "progress.json"
            while not (progress.exists() and b"train-00000" in progress.read_bytes()):
                assert process.poll() is None
                time.sleep(0.001)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without the speed."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def results(run: Commands) -> dict[str, Any]:
    """The sequence of commands, and everything in their results that does not depend on time or place."""
    folder = run.folder
    (folder / "mine.yaml").write_text(f"evaluation: {{prompt: '{PROMPT}'}}\n", encoding="utf-8")
    documents = [f"Line {i}: some words, naïve – and „quoted“ {i * 7}\n" for i in range(40_000)]
    text = "<|endoftext|>".join(documents)
    (folder / "long.txt").write_text(text, encoding="utf-8")
    fit = ("fit", *SMALL_QUICKSTART, "--config=mine.yaml", "--evaluation.eval_freq=3",
           "--checkpoint.every_n_train_steps=3")  # fmt: skip
    prepare = ("prepare", "long.txt", "--out=store", "--shard_tokens=20000", "--workers=1")

    run(*fit, "--trainer.max_steps=6")
    run(*fit, "--trainer.max_steps=12", "--ckpt_path=last")
    run(*fit, "--trainer.max_steps=2", "--run=cached", "--data.text=long.txt")
    validated = run("validate", "--run=quickstart", "--ckpt_path=best", "--json")
    generated = run("generate", "--from=checkpoints/quickstart", f"--prompt={PROMPT}", "--json")
    run("generate", "--from=checkpoints/quickstart", f"--prompt={PROMPT} 你好")
    run.interrupted(*prepare)
    run(*prepare)
    again = json.loads(run(*prepare, "--json"))
    assert again["already_prepared"]
    run("convert", "checkpoints/quickstart", "hf", "--format=hf")
    run("convert", "hf", "back.ckpt", "--format=lightning")
    run("report", "sampling", "--from=checkpoints/quickstart", f"--prompt={PROMPT}", "--out=figures",
        "--num_samples=20", "--temperatures=[1]")  # fmt: skip
    verified = json.loads(
        run("verify-resume", *SMALL_QUICKSTART, "--steps=2", "--more_steps=2", "--json")
    )
    assert verified["exact"]

    last = read_checkpoint(folder / "checkpoints/quickstart/last.ckpt")
    back = read_checkpoint(folder / "back.ckpt")
    assert last["global_step"] == 12
    assert all(torch.equal(back["state_dict"][name], t) for name, t in last["state_dict"].items())
    names = (
        "checkpoints/quickstart/config.yaml", "hf/config.json", "hf/model.safetensors", "figures/sampling.csv",
    )  # fmt: skip
    stores = [*folder.glob("store/*"), *folder.glob("cache/tokens/*/*.bin")]
    files = [*(folder / name for name in names), *stores]
    return {
        "validated": json.loads(validated),
        "generated": json.loads(generated),
        "weights": last["state_dict"],
        "metrics": [metrics(folder / "checkpoints" / name) for name in ("quickstart", "cached")],
        "verified": [part["straight"] for part in verified["compared"]],
        "files": {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        },
    }


@pytest.mark.slow
def test_every_command_gives_the_same_where_windows_refuses(tmp_path: Path) -> None:
    if not IMITATION.is_dir():
        pytest.skip(f"the imitation of Windows is not at {IMITATION}")
    usual = {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": WARNINGS}
    expected = results(Commands(tmp_path / "usual", usual, [ROOT]))
    shown = results(Commands(tmp_path / "windows", {}, [IMITATION, ROOT]))
    weights, others = expected.pop("weights"), shown.pop("weights")
    assert all(torch.equal(others[name], tensor) for name, tensor in weights.items())
    assert all(shown["metrics"])
    for part in expected:
        assert shown[part] == expected[part], part
    # what a killed or refused command would leave
    left = [
        p for p in (tmp_path / "windows").rglob(".*") if p.name != ".lock" or "store" in p.parts
    ]
    assert left == []
