"""OpenAI's TensorFlow files: other architectures and damage are refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gpt_lightning import load_model
from gpt_lightning.data.tokenizer import vocabulary_file
from gpt_lightning.pretrained import openai
from gpt_lightning.pretrained.convert import convert
from gpt_lightning.pretrained.name_map import gpt2_params
from gpt_lightning.pretrained.openai import _variable_name
from gpt_lightning.pretrained.source import read_weights
from gpt_lightning.storage.checksum import MANIFEST
from helpers import Command, python
from random_gpt2 import random_gpt2
from weight_files import (
    FILE_SIZE_LIMITED,
    assert_same_logits,
    flip_bit,
    needs_tensorflow,
    random_ids,
    swap,
    truncate,
)


def test_openai_files_with_another_head_or_tokenizer_are_refused(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TensorFlow: the test writes the safetensors file to which a checkpoint is converted."""
    theirs = random_gpt2(tmp_path / "hf", n_layers=1)
    weights = read_weights("hf")
    tensors = {
        _variable_name(param): t.t()[None].contiguous()
        if param.kind == "matrix"
        else t.contiguous()
        for param in gpt2_params(1)
        for t in [weights.state_dict[param.ours]]
    }
    save_file(tensors, tmp_path / "converted.safetensors")
    monkeypatch.setattr(openai, "_as_safetensors", lambda _: tmp_path / "converted.safetensors")
    Path("tf").mkdir()
    hparams = {"n_vocab": 50257, "n_ctx": 64, "n_embd": 24, "n_head": 12, "n_layer": 1}
    Path("tf/hparams.json").write_text(json.dumps(hparams))
    Path("tf/model.ckpt.index").touch()
    shutil.copy(vocabulary_file("encoder.json"), "tf")
    shutil.copy(vocabulary_file("vocab.bpe"), "tf")
    assert_same_logits(load_model("tf"), theirs, random_ids(2, 20))
    assert command("generate", "--from=tf", "--prompt=a", "--max_new_tokens=1").err == ""
    swap(Path("tf/encoder.json"))
    result = command("generate", "--from=tf", "--prompt=a")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "tf: has another tokenizer than GPT-2's: tf/encoder.json has another" in result.err
    shutil.copy(vocabulary_file("encoder.json"), "tf")
    more = {"head/w": tensors["model/wte"] + 1, "beta1_power": torch.ones(())}
    save_file(tensors | more, tmp_path / "converted.safetensors")
    result = command("generate", "--from=tf", "--prompt=a")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "tf: has head/w, which a GPT-2 of its hparams.json does not have" in result.err


DATA, INDEX = "model.ckpt.data-00000-of-00001", "model.ckpt.index"


@needs_tensorflow
@pytest.mark.parametrize("file", [DATA, INDEX])
def test_damaged_openai_files_are_refused(
    refuse: Any, intact_openai: Path, tmp_path: Path, file: str
) -> None:
    size = (intact_openai / file).stat().st_size
    for manifest in (True, False):  # TensorFlow has its own checksums
        for damage in (lambda p: flip_bit(p, size // 3), lambda p: truncate(p, 0.7)):
            shutil.copytree(intact_openai, tmp_path / "tf", dirs_exist_ok=True)
            damage(tmp_path / "tf" / file)
            if not manifest:
                (tmp_path / "tf" / MANIFEST).unlink()
            refuse("tf", "damaged" if manifest else "TensorFlow cannot read it")
    (tmp_path / "tf" / DATA).unlink()
    refuse("tf", DATA)


@needs_tensorflow
def test_openai_files_that_contradict_each_other_are_refused(
    refuse: Any, intact_openai: Path, tmp_path: Path
) -> None:
    shutil.copytree(intact_openai, tmp_path / "tf")
    (tmp_path / "tf" / MANIFEST).unlink()
    hparams = tmp_path / "tf" / "hparams.json"
    settings = json.loads(hparams.read_text())
    for changes, cause in [
        ({"n_layer": 2}, "has no variable model/h1/"),
        ({"n_ctx": 10**18}, "context_length"),
        ({"n_embd": 36}, "its architecture says"),
        ({"n_ctx": None}, "n_ctx is None"),
    ]:
        hparams.write_text(json.dumps(settings | changes))
        refuse("tf", cause)


@needs_tensorflow
def test_openai_variables_beyond_the_architecture_are_refused(refuse: Any, tmp_path: Path) -> None:
    random_gpt2(tmp_path / "theirs", vocab_size=300, n_layer=2)
    convert(str(tmp_path / "theirs"), tmp_path / "tf", "openai-tf")
    (tmp_path / "tf" / MANIFEST).unlink()
    hparams = tmp_path / "tf" / "hparams.json"
    hparams.write_text(json.dumps(json.loads(hparams.read_text()) | {"n_layer": 1}))
    refuse("tf", "has model/h1/", "which a GPT-2 of its hparams.json does not have")


@needs_tensorflow
def test_full_disk_leaves_no_openai_dest(intact: Path, tmp_path: Path) -> None:
    shutil.copytree(intact / "theirs", tmp_path / "theirs")
    result = python("-c", FILE_SIZE_LIMITED, "20000", "convert", "theirs", "d", "--format", "openai-tf",
                  cwd=tmp_path)  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert os.listdir(tmp_path) == ["theirs"]


def test_openai_without_tensorflow_names_the_package(
    refuse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt_lightning.pretrained.openai.find_spec", lambda _: None)
    (tmp_path / "tf").mkdir()
    hparams = {"n_vocab": 300, "n_ctx": 64, "n_embd": 24, "n_head": 12, "n_layer": 1}
    (tmp_path / "tf" / "hparams.json").write_text(json.dumps(hparams))
    for name in (DATA, INDEX):
        (tmp_path / "tf" / name).write_bytes(b"x")
    (tmp_path / "cache" / "from-tensorflow").mkdir(parents=True)
    refuse("tf", "needs TensorFlow", "gpt-lightning[openai]")
