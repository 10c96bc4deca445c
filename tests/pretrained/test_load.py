"""Memory of loading, and sources that do not exist."""

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import book
from gpt_lightning.pretrained.convert import WeightFormat, convert
from helpers import Command, python
from random_gpt2 import random_gpt2

# prints how much the peak memory of loading exceeds the memory before, over the size of the model. Counted is
# anonymous memory, which a process needs: the resident set also counts pages of the mapped file that the process has
# read, but they are the system's cache, which it frees when memory runs low. The small model before it lets torch
# import what it needs for the meta device, about 80 MB.
_PEAK = """
import sys, threading, torch
from gpt_lightning import GPTConfig, GPTModel, load_model
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))
def watch():
    while not is_loaded.wait(0.001):
        seen.append(anonymous())
dtype = getattr(torch, sys.argv[2])
torch.zeros(64, 64, dtype=dtype) @ torch.zeros(64, 64, dtype=dtype)
with torch.device("meta"):
    GPTModel(GPTConfig(emb_dim=4, n_heads=2, n_layers=1, tied_embeddings=True))
before, seen, is_loaded = anonymous(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(sys.argv[1], dtype=dtype)
seen.append(anonymous())
is_loaded.set()
watcher.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((max(seen) - before) / size)
"""


@pytest.fixture(scope="module")
def shape_of_124m(tmp_path_factory: pytest.TempPathFactory) -> Callable[[WeightFormat], Path]:
    """A function that returns the path of such a model in a format."""
    folder = tmp_path_factory.mktemp("124M")

    @cache
    def path_in(weight_format: WeightFormat) -> Path:
        if weight_format == "hf":
            random_gpt2(folder / "gpt2", emb_dim=768, n_heads=12, n_layers=12, n_positions=1024)
            return folder / "gpt2"
        path = folder / {"lightning": "gpt2.ckpt", "book": "gpt2.pth"}[weight_format]
        convert(str(path_in("hf")), path, weight_format)
        return path

    return path_in


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc"
)
@pytest.mark.parametrize(
    ("weight_format", "dtype"),
    [
        pytest.param("hf", "bfloat16", marks=pytest.mark.slow),
        # the book's query, key and value are concatenated before they are converted
        pytest.param("book", "float32", marks=pytest.mark.slow),
        pytest.param("hf", "float32", marks=pytest.mark.slow),
        pytest.param("lightning", "float32", marks=pytest.mark.slow),
        pytest.param("lightning", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_loading_needs_memory_for_one_copy(
    shape_of_124m: Callable[[WeightFormat], Path], weight_format: WeightFormat, dtype: str
) -> None:
    result = python("-c", _PEAK, str(shape_of_124m(weight_format)), dtype)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 1.15


def test_folder_without_weights_names_the_expected_files(refuse: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse("empty", "last.ckpt", "config.json with model.safetensors",
           "hparams.json with model.ckpt.index")  # fmt: skip
    refuse("nowhere", "nowhere: does not exist", "gpt2-124M")
    refuse("gpt2-128M", "did you mean gpt2-124M?")
    refuse("gpt2-meduim", "gpt2-meduim: does not exist; did you mean gpt2-medium?")
    refuse("GPT2-XL", "did you mean gpt2-xl?")
    refuse("./gpt2", "./gpt2: does not exist; did you mean gpt2?")


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("checkpoints/quikstart", "checkpoints/quickstart"),
        ("checkpoint/quickstart", "checkpoints/quickstart"),
        ("Checkpoints/quickstrat/last", "checkpoints/quickstart/last"),
        ("quickstart", "checkpoints/quickstart"),
        ("quikstart", "checkpoints/quickstart"),
        ("models/modle.pth", "models/model.pth"),
        ("model/model.pth", "models/model.pth"),
        ("models/weights.safetensor", "models/weights.safetensors"),
    ],
)
def test_missing_path_suggests_the_closest_one(refuse: Any, source: str, meant: str) -> None:
    Path("checkpoints/quickstart").mkdir(parents=True)
    Path("checkpoints/quickstart/last.ckpt").touch()
    Path("checkpoints/verdict").mkdir()
    Path("models").mkdir()
    Path("models/model.pth").touch()
    Path("models/weights.safetensors").touch()
    refuse(source, f"{source}: does not exist", f"did you mean {meant}?")


def test_missing_path_without_a_close_one_names_the_choices(refuse: Any) -> None:
    refuse("nowhere/at/all", "does not exist; give a file, a folder or one of gpt2-124M")


def test_dest_that_exists_or_does_not_fit_is_refused(
    command: Command, refuse: Any, intact: Path, tmp_path: Path
) -> None:
    shutil.copytree(intact / "theirs", tmp_path / "hf")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    for dest, weight_format, cause in [
        ("hf", "hf", "dest: hf exists"),
        ("no/such", "hf", "dest: no is not a folder"),
        ("x", "book", "call it x.pth"),
        ("x.pth", "lightning", "call it x.pth.ckpt"),
    ]:
        result = command("convert", "hf", dest, "--format", weight_format)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert cause in result.err
    os.symlink("nowhere", "link")
    assert "link exists" in command("convert", "hf", "link", "--format=hf").err
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    assert sorted(os.listdir()) == ["hf", "link"]
    untied = book.BookGPT({"vocab_size": 300, "context_length": 8, "emb_dim": 24, "n_heads": 12,
                           "n_layers": 1, "drop_rate": 0.0, "qkv_bias": True})  # fmt: skip
    torch.save(untied.state_dict(), "untied.pth")
    refuse("untied.pth", "cannot hold a separate output head", weight_format="openai-tf")
