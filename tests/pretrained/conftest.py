"""Fixtures of the tests of pretrained."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.pretrained import download as module
from gpt_lightning.pretrained.convert import convert
from helpers import Command, CommandResult


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 in each format that can be written without TensorFlow."""
    from random_gpt2 import random_gpt2

    folder = tmp_path_factory.mktemp("intact")
    random_gpt2(folder / "theirs", vocab_size=300, n_layer=1)
    convert(str(folder / "theirs"), folder / "hf", "hf")
    convert(str(folder / "theirs"), folder / "ours.ckpt", "lightning")
    convert(str(folder / "theirs"), folder / "model.pth", "book")
    return folder


@pytest.fixture(scope="module")
def intact_openai(intact: Path) -> Path:
    convert(str(intact / "theirs"), intact / "tf", "openai-tf")
    return intact / "tf"


@pytest.fixture
def refuse(command: Command) -> Any:
    """A function that converts ``source``: it must fail with one line that has all ``parts``, without a DEST."""

    def run(
        source: str, *parts: str, weight_format: str = "hf", options: tuple[str, ...] = ()
    ) -> CommandResult:
        before = set(os.listdir()) | {"cache"}  # which may hold a part that could be read
        result = command(
            "convert", source, "dest", "--format", weight_format, "--n_heads=12", *options
        )
        assert result.code == 2, (result.out, result.err)
        assert result.out == ""
        assert result.err.startswith("gpt_lightning: error: ")
        assert result.err.count("\n") == 1, result.err
        for part in parts:
            assert part in result.err
        assert set(os.listdir()) | {"cache"} == before  # nothing was written
        return result

    return run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nowhere: str) -> Path:
    """The cache of a test. No test asks a real host."""
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_OPENAI", (nowhere,))
    if find_spec("huggingface_hub") is not None:
        import huggingface_hub.constants

        template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return tmp_path / "cache"
