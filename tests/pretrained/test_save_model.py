"""``save_model`` and ``push_to_hub``: a model in memory becomes files that every reader understands."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import book
from gpt_lightning import GPTLightningModule, GPTModel, load_model, push_to_hub, save_model
from gpt_lightning.pretrained import hub
from gpt_lightning.pretrained.convert import WeightFormat, convert
from random_gpt2 import transformers
from weight_files import needs_tensorflow, random_ids

CONFIG = {
    "vocab_size": 50257, "context_length": 16, "emb_dim": 24, "n_heads": 4, "n_layers": 2,
    "drop_rate": 0.2, "qkv_bias": False,
}  # fmt: skip
NAMES = {"hf": "hf", "openai-tf": "tf", "lightning": "ours.ckpt", "book": "model.pth"}


@pytest.fixture
def model() -> GPTModel:
    torch.manual_seed(3)
    return GPTModel(CONFIG).eval()


@torch.inference_mode()
def same_logits(one: nn.Module, other: nn.Module) -> bool:
    idx = random_ids(2, 16)
    return torch.equal(one(idx), other(idx))


@pytest.mark.parametrize("weight_format", ["hf", "lightning", "book"])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_model_is_loaded(tmp_path: Path, weight_format: WeightFormat, tied: bool) -> None:
    torch.manual_seed(3)
    model = GPTModel({**CONFIG, "tied_embeddings": tied}).eval()
    path = tmp_path / NAMES[weight_format]
    save_model(model, path, format=weight_format)
    read = load_model(str(path))
    assert same_logits(read, model)
    assert (read.config.n_heads, read.config.drop_rate) == (4, 0.2)
    assert read.config.tied_embeddings == tied
    assert os.listdir(tmp_path) == [path.name]  # nothing temporary is left


@needs_tensorflow
def test_openai_of_a_tied_model(tmp_path: Path) -> None:
    model = GPTModel({**CONFIG, "tied_embeddings": True, "qkv_bias": True}).eval()
    save_model(model, tmp_path / "tf", format="openai-tf")
    assert same_logits(load_model(str(tmp_path / "tf")), model)


def test_files_are_those_of_convert(tmp_path: Path, model: GPTModel) -> None:
    """Bit by bit, so there is one writer."""
    save_model(model, tmp_path / "ours.ckpt", format="lightning")
    save_model(model, str(tmp_path / "saved"))
    convert(str(tmp_path / "ours.ckpt"), tmp_path / "converted", "hf")
    for name in os.listdir(tmp_path / "converted"):
        saved, converted = (tmp_path / folder / name for folder in ("saved", "converted"))
        assert saved.read_bytes() == converted.read_bytes(), name
    assert len(os.listdir(tmp_path / "saved")) == len(os.listdir(tmp_path / "converted"))


def test_transformers_and_the_book_load_it(tmp_path: Path, model: GPTModel) -> None:
    save_model(model, tmp_path / "hf")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    idx = random_ids(2, 16)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-5, rtol=1e-5)
    save_model(model, tmp_path / "model.pth", format="book")
    books = book.BookGPT(CONFIG)
    books.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))  # strict
    with torch.inference_mode():
        torch.testing.assert_close(books.eval()(idx), model(idx), atol=1e-5, rtol=1e-5)


def test_compiled_and_lightning_models_are_saved(tmp_path: Path, model: GPTModel) -> None:
    save_model(torch.compile(model, backend="eager"), tmp_path / "compiled")  # type: ignore[arg-type]
    assert same_logits(load_model(str(tmp_path / "compiled")), model)
    module = GPTLightningModule(CONFIG)  # type: ignore[arg-type]
    module.configure_model()
    save_model(module, tmp_path / "module")  # type: ignore[arg-type]
    assert same_logits(load_model(str(tmp_path / "module")), module.model.eval())


def with_classification_head(model: GPTModel) -> None:
    model.out_head = nn.Linear(24, 2)


def with_one_block(model: GPTModel) -> None:
    del model.trf_blocks[1]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (with_classification_head, r"model: out_head.weight is \(2, 24\), .*; save a model with"),
        (with_one_block, "model: has 1 blocks, its architecture says 2; save a model with"),
    ],
)
def test_other_layers_are_refused(
    tmp_path: Path, model: GPTModel, change: Callable[[GPTModel], None], cause: str
) -> None:
    """Chapter 6 replaces the head: the config would contradict the weights."""
    change(model)
    with pytest.raises(ValueError, match=cause):
        save_model(model, tmp_path / "hf")
    assert os.listdir(tmp_path) == []


def test_mistakes(tmp_path: Path, model: GPTModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists; give a new name"):
        save_model(model, tmp_path / "there")
    with pytest.raises(FileNotFoundError, match="no is not a folder; create it first"):
        save_model(model, tmp_path / "no" / "hf")
    with pytest.raises(ValueError, match=r"one file in the format book; call it .*/x.pth"):
        save_model(model, tmp_path / "x", format="book")
    with pytest.raises(ValueError, match="format: safetensors is unknown; did you mean hf"):
        save_model(model, tmp_path / "x", format="safetensors")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: Linear is not a GPTModel; give the GPTModel"):
        save_model(nn.Linear(2, 2), tmp_path / "x")  # type: ignore[arg-type]
    monkeypatch.setenv("HOME", str(tmp_path))
    save_model(model, "~/home")
    assert sorted(os.listdir(tmp_path)) == ["home", "there"]


class Hub:
    """Stand-in for ``huggingface_hub.HfApi`` that keeps what it receives."""

    calls: list[tuple[str, Any]]

    def create_repo(self, repo_id: str, **options: Any) -> None:
        Hub.calls.append(("create", (repo_id, options)))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        Hub.calls.append(("upload", (repo_id, sorted(os.listdir(folder_path)))))
        Hub.calls.append(("logits", load_model(str(folder_path))))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    api = pytest.importorskip("huggingface_hub", reason="pip install '.[hub]'")
    Hub.calls = []
    monkeypatch.setattr(api, "HfApi", Hub)
    return Hub


def test_push_to_hub(stand_in: type[Hub], model: GPTModel) -> None:
    assert push_to_hub(model, "me/gpt", private=True) == "https://huggingface.co/me/gpt/commit/1"
    create, upload, (_, read) = stand_in.calls
    assert create == ("create", ("me/gpt", {"private": True, "exist_ok": True}))
    assert upload[1][0] == "me/gpt"
    assert {"config.json", "model.safetensors", "vocab.json", "manifest.json"} <= {*upload[1][1]}
    assert same_logits(read, model)


def test_refused_upload_is_one_line(
    stand_in: type[Hub], model: GPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("401 Client Error:\n\nInvalid username or password.")

    monkeypatch.setattr(stand_in, "create_repo", refuse)
    with pytest.raises(OSError, match=r"^push_to_hub: me/gpt cannot .*\(401 .*\); check [^\n]*$"):
        push_to_hub(model, "me/gpt")
    assert stand_in.calls == []


def test_push_to_hub_without_huggingface_hub(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"needs huggingface_hub; install it with pip install"):
        push_to_hub(model, "me/gpt")
