"""Untrusted files: neither YAML nor checkpoints run code."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers import (
    QUICKSTART,
    SMALL,
    SMALL_QUICKSTART,
    Command,
    assert_refused,
)
from runs import (
    small_checkpoint,
)


@pytest.mark.parametrize(
    "yaml",
    [
        "trainer:\n  callbacks:\n  - class_path: evil.Canary\n",
        "trainer:\n  logger:\n    class_path: evil.Canary\n",
        "trainer:\n  callbacks:\n  - class_path: lightning.pytorch.callbacks.LambdaCallback\n"
        "    init_args:\n      on_fit_start: os.system\n",
    ],
)
def test_class_paths_of_other_packages_are_not_imported(
    refused_fit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yaml: str
) -> None:
    (tmp_path / "evil.py").write_text("open('canary', 'w').close()\nclass Canary: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml)
    assert_refused(refused_fit("--config=mine.yaml"), "is not imported from a configuration")
    assert not (tmp_path / "canary").exists()


YAMLS = {
    "callback": "trainer:\n  callbacks:\n  - class_path: evil.Canary\n",
    "logger": "trainer:\n  logger:\n    class_path: evil.Canary\n",
    "strategy": "trainer:\n  strategy:\n    class_path: evil.Canary\n",
    "plugin": "trainer:\n  plugins:\n  - class_path: evil.Canary\n",
    "os": "trainer:\n  callbacks:\n  - class_path: os.system\n",
    "subprocess": "trainer:\n  callbacks:\n  - class_path: subprocess.Popen\n    init_args: {args: [mkdir, canary]}\n",
    "builtins": "trainer:\n  callbacks:\n  - class_path: builtins.eval\n",
    "hook": "trainer:\n  callbacks:\n  - class_path: lightning.pytorch.callbacks.LambdaCallback\n"
            "    init_args:\n      on_fit_start: os.system\n",
    "python tag": "run: !!python/object/apply:os.mkdir [canary]\n",
    "name tag": "run: !!python/name:os.mkdir\n",
    "allows itself": "allow_import: [evil]\ntrainer:\n  callbacks:\n  - class_path: evil.Canary\n",
    "run outside": "run: ../../canary\n",
}  # fmt: skip


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_runs_no_code(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('canary')\nclass Canary: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.yaml").write_text(YAMLS[name])
    result = command("fit", QUICKSTART, "--config=mine.yaml", *SMALL,
                   "--trainer.max_steps=1")  # fmt: skip
    assert result.code == 2
    assert result.error.count("\n") == 1, result.err
    assert sorted(os.listdir()) == ["evil.py", "mine.yaml"]


def test_package_allowed_on_the_command_line_is_imported(
    fit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from lightning.pytorch import Callback\nclass Harmless(Callback): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.yaml").write_text("trainer:\n  callbacks:\n  - class_path: mine.Harmless\n")
    fit("--config=mine.yaml", "--allow_import=mine", "--trainer.max_steps=1")


class Canary:
    def __reduce__(self) -> Any:
        return os.mkdir, ("canary",)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.save(Canary(), "x.ckpt"),
        lambda: torch.save({"state_dict": Canary(), "hyper_parameters": {"config": {}}}, "x.ckpt"),
        lambda: torch.save({"state_dict": {}, "hyper_parameters": {"config": {"emb_dim": Canary()}}}, "x.ckpt"),
        lambda: torch.save({**small_checkpoint(1), "callbacks": Canary()}, "x.ckpt"),
        lambda: torch.save({**small_checkpoint(1), "optimizer_states": [Canary()]}, "x.ckpt"),
        lambda: torch.save({"model": {}, "model_args": Canary()}, "x.ckpt"),
        lambda: torch.save(Canary(), "x.ckpt", _use_new_zipfile_serialization=False),
        lambda: Path("x.ckpt").write_bytes(__import__("pickle").dumps(Canary())),
        lambda: torch.save({**small_checkpoint(1), "hyper_parameters": {"config": {
            "vocab_size": 10**12, "context_length": 4, "emb_dim": 10**9, "n_heads": 1, "n_layers": 10**7}}}, "x.ckpt"),
        lambda: save_file({"a": torch.ones(1)}, "x.ckpt"),
    ],
    ids=["bare", "weights", "config", "callbacks", "optimizer", "nanogpt", "old format", "pickle",
         "huge", "another format"],
)  # fmt: skip
def test_checkpoint_runs_no_code(command: Command, make: Callable[[], Any]) -> None:
    make()
    for option in ("--ckpt_path", "--init_from"):
        result = command("fit", *SMALL_QUICKSTART[6:],
                       "--trainer.max_steps=1", f"{option}=x.ckpt")  # fmt: skip
        assert result.code == 2
        assert result.error.count("\n") == 1, result.err
    assert os.listdir() == ["x.ckpt"]
