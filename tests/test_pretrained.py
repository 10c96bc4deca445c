"""Weights in every public form: read, written, held against transformers and the book's code."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import book
import pytest
import torch
from conftest import ROOT, SMALL, Command, python
from random_gpt2 import random_gpt2, transformers
from torch import Tensor, nn

from gpt_lightning import GPTConfig, GPTModel, generate, load_model
from gpt_lightning.data.tokenizer import gpt2_encoding
from gpt_lightning.pretrained.convert import Form, convert
from gpt_lightning.pretrained.formats import Source, write_lightning
from gpt_lightning.pretrained.source import read_source

needs_tensorflow = pytest.mark.skipif(
    find_spec("tensorflow") is None, reason="TensorFlow is not installed: pip install '.[openai]'"
)
# width and heads in the proportions of the four sizes, small
SHAPES = {"124M": (24, 12), "355M": (32, 16), "774M": (40, 20), "1558M": (50, 25)}


@torch.inference_mode()
def assert_same_logits(ours: GPTModel, theirs: Any, idx: Tensor) -> None:
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-5, rtol=1e-5)


def random_ids(*shape: int) -> Tensor:
    return torch.randint(50257, shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("size", SHAPES)
def test_hugging_face_gives_transformers_logits(tmp_path: Path, size: str) -> None:
    theirs = random_gpt2(tmp_path / "hf", *SHAPES[size], n_positions=1024)
    ours = load_model(str(tmp_path / "hf"))
    assert ours.config.tied_embeddings
    assert ours.config.qkv_bias
    assert_same_logits(ours, theirs, random_ids(2, 20))
    assert_same_logits(ours, theirs, random_ids(1, 1024))  # to position 1,023


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("form", ["book", pytest.param("openai-tf", marks=needs_tensorflow)])
def test_other_forms_give_transformers_logits(tmp_path: Path, size: str, form: Form) -> None:
    """From transformers through the form and back, at every position of the context."""
    emb_dim, n_heads = SHAPES[size]
    theirs = random_gpt2(tmp_path / "hf", emb_dim, n_heads, n_positions=1024)
    dest = tmp_path / ("model.pth" if form == "book" else "tf")
    convert(str(tmp_path / "hf"), dest, form)
    ours = load_model(str(dest), n_heads=n_heads)
    assert_same_logits(ours, theirs, random_ids(2, 20))
    assert_same_logits(ours, theirs, random_ids(1, 1024))


@torch.inference_mode()
def test_beyond_one_window_it_is_transformers_on_the_last(tmp_path: Path) -> None:
    """Past the context each token is read from the last window, as the book crops."""
    theirs = random_gpt2(tmp_path / "hf", n_positions=16)
    ours = load_model(str(tmp_path / "hf"))
    ids = random_ids(1, 12)
    found = generate(ours, ids, 20)
    for _ in range(20):
        next_id = theirs(ids[:, -16:]).logits[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat((ids, next_id), dim=1)
    assert torch.equal(found, ids)


def test_sharded_and_untied_hugging_face(tmp_path: Path) -> None:
    theirs = random_gpt2(tmp_path / "whole", tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    ours = load_model(str(tmp_path / "shards"))
    assert not ours.config.tied_embeddings
    assert_same_logits(ours, theirs, random_ids(2, 20))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_exported_model_is_a_hugging_face_model(tmp_path: Path, tied: bool, qkv_bias: bool) -> None:
    torch.manual_seed(5)
    config = GPTConfig(context_length=32, emb_dim=32, n_heads=4, n_layers=2, qkv_bias=qkv_bias,
                       tied_embeddings=tied)  # fmt: skip
    ours = GPTModel(config).eval()
    write_lightning(Source(config, ours.state_dict()), tmp_path / "ours.ckpt")
    convert(str(tmp_path / "ours.ckpt"), tmp_path / "hf", "hf")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    assert_same_logits(ours, theirs, random_ids(2, 20))
    again = load_model(str(tmp_path / "hf"))
    assert again.config.tied_embeddings == tied
    assert_same_logits(again, theirs, random_ids(2, 20))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Every effort moves you, doesn't it? Ünïcödé 🙂"
    assert tokenizer(text)["input_ids"] == gpt2_encoding().encode(text)


@needs_tensorflow
def test_tensorflow_to_ours_to_hugging_face(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = random_gpt2(tmp_path / "hf")
    idx = random_ids(2, 30)
    for arguments in [
        ("hf", "tf", "openai-tf"), ("tf", "ours.ckpt", "lightning"), ("ours.ckpt", "again", "hf"),
    ]:  # fmt: skip
        done = command("convert", arguments[0], arguments[1], "--format", arguments[2])
        assert done.code == 0, done.err
    written = {path.name for path in (tmp_path / "tf").iterdir()}
    assert {"checkpoint", "encoder.json", "hparams.json", "model.ckpt.data-00000-of-00001",
            "model.ckpt.index", "vocab.bpe"} <= written  # fmt: skip
    assert_same_logits(load_model("tf"), theirs, idx)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again").eval()
    with torch.inference_mode():
        assert torch.equal(again(idx).logits, theirs(idx).logits)
    # the names and shapes are OpenAI's
    header = json.loads(
        python(
            "-c",
            f"""
import json, tensorflow as tf
print(json.dumps(dict(tf.train.list_variables({str(tmp_path / "tf")!r}))))""",
        ).stdout
    )
    assert header["model/h0/attn/c_attn/w"] == [1, 24, 72]
    assert header["model/wte"] == [50257, 24]
    assert header["model/ln_f/g"] == [24]
    assert len(header) == 2 + 2 * 12 + 2


def book_model(**settings: Any) -> tuple[book.BookGPT, dict[str, Any]]:
    cfg = {"vocab_size": 50257, "context_length": 16, "emb_dim": 64, "n_heads": 1, "n_layers": 2,
           "drop_rate": 0.0, "qkv_bias": False, **settings}  # fmt: skip
    torch.manual_seed(6)
    return book.BookGPT(cfg).eval(), cfg


@pytest.mark.parametrize("qkv_bias", [False, True])
@torch.inference_mode()
def test_books_model_pth(tmp_path: Path, qkv_bias: bool) -> None:
    theirs, _ = book_model(qkv_bias=qkv_bias)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    ours = load_model(str(tmp_path / "model.pth"))
    assert not ours.config.tied_embeddings
    idx = random_ids(2, 16)
    torch.testing.assert_close(ours(idx), theirs(idx), atol=1e-5, rtol=1e-5)

    convert(str(tmp_path / "model.pth"), tmp_path / "again.pth", "book")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert list(again.keys() - {k for k in again if k.endswith("mask")})
    book_again = book_model(qkv_bias=qkv_bias)[0]
    book_again.load_state_dict(again)  # strict
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_books_heads_are_asked_for_where_they_cannot_be_known(
    tmp_path: Path, command: Command
) -> None:
    theirs, _ = book_model(emb_dim=24, n_heads=4)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    done = command("generate", "--from=model.pth", "--prompt=a")
    assert done.code == 2
    assert "n_heads" in done.err
    done = command("generate", "--from=model.pth", "--prompt=a", "--n_heads=4", "--json",
                   "--max_new_tokens=3")  # fmt: skip
    assert done.code == 0, done.err
    ids = json.loads(done.out)["token_ids"]
    assert len(ids) == 4
    for i in (1, 2, 3):
        assert int(theirs(torch.tensor([ids[:i]]))[0, -1].argmax()) == ids[i]


def test_a_books_gpt2_is_tied(tmp_path: Path) -> None:
    theirs, _ = book_model()
    theirs.out_head.weight = nn.Parameter(theirs.tok_emb.weight.clone())
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    assert load_model(str(tmp_path / "model.pth")).config.tied_embeddings


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(tmp_path: Path, bias: bool) -> None:
    theirs = random_gpt2(tmp_path / "hf", activation_function="gelu_new")
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith("weight") and ("c_attn" in name or "c_proj" in name or "c_fc" in name):
            tensor = tensor.t().contiguous()  # nn.Linear, not Conv1D
        if name.endswith("bias") and not bias:
            tensor.zero_()
            continue
        state[f"_orig_mod.{name}"] = tensor
    padded = torch.cat((theirs.transformer.wte.weight.data, torch.randn(47, 24)))
    state["_orig_mod.transformer.wte.weight"] = state["_orig_mod.lm_head.weight"] = padded
    arguments = {"n_layer": 2, "n_head": 12, "n_embd": 24, "block_size": 64, "bias": bias,
                 "vocab_size": 50304, "dropout": 0.0}  # fmt: skip
    torch.save({"model": state, "model_args": arguments, "optimizer": {}, "iter_num": 3,
                "best_val_loss": torch.tensor(1.0), "config": {}}, tmp_path / "ckpt.pt")  # fmt: skip
    ours = load_model(str(tmp_path / "ckpt.pt"))
    assert ours.config.vocab_size == 50257
    assert ours.config.qkv_bias == bias
    assert_same_logits(ours, theirs, random_ids(2, 20))


def test_nanogpts_head_that_is_its_own_is_kept(tmp_path: Path) -> None:
    theirs = random_gpt2(tmp_path / "hf", tie_word_embeddings=False)
    state = {
        name: tensor.t().contiguous() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        else tensor
        for name, tensor in theirs.state_dict().items()
    }  # fmt: skip
    arguments = {"n_layer": 2, "n_head": 12, "n_embd": 24, "block_size": 64, "bias": True,
                 "vocab_size": 50257, "dropout": 0.0}  # fmt: skip
    torch.save({"model": state, "model_args": arguments}, tmp_path / "ckpt.pt")
    ours = load_model(str(tmp_path / "ckpt.pt"))
    assert not ours.config.tied_embeddings
    assert_same_logits(ours, theirs, random_ids(2, 20))


def test_moments_go_to_the_book_and_back(fit_to_convert: Path) -> None:
    """ours → the book's .pth → ours is the identity, optimizer included; and the book's AdamW takes it."""
    convert(str(fit_to_convert), Path("book.pth"), "book")
    convert("book.pth", Path("again.ckpt"), "lightning", n_heads=2)
    before, after = read_source(str(fit_to_convert)), read_source("again.ckpt")
    assert before.config.differences(vars(after.config)) == {}
    assert before.state_dict.keys() == after.state_dict.keys()
    for name, tensor in before.state_dict.items():
        assert torch.equal(after.state_dict[name], tensor), name
    moments = [
        {n: s.optimizer_state["state"][i]
         for g in s.optimizer_state["param_groups"]
         for i, n in zip(g["params"], g["param_names"], strict=True)}
        for s in (before, after)
    ]  # fmt: skip
    assert moments[0].keys() == moments[1].keys() == before.state_dict.keys()
    for name, state in moments[0].items():
        for key, value in state.items():
            assert torch.equal(moments[1][name][key], value), (name, key)

    saved = torch.load("book.pth", weights_only=True)
    config = before.config
    model = book.BookGPT(vars(config))
    model.load_state_dict(saved["model_state_dict"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.load_state_dict(saved["optimizer_state_dict"])
    by_parameter = dict(model.named_parameters())
    for name, parameter in by_parameter.items():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape, name
    thirds = [
        optimizer.state[by_parameter[f"trf_blocks.1.att.{w}.weight"]]["exp_avg"]
        for w in ("W_query", "W_key", "W_value")
    ]
    assert torch.equal(torch.cat(thirds), moments[0]["trf_blocks.1.att.qkv.weight"]["exp_avg"])


@pytest.fixture
def fit_to_convert(command: Command) -> Path:
    done = command("fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL,
                   "--trainer.max_steps=2", "--model.config.qkv_bias=true", "--run=r",
                   "--model.config.tied_embeddings=false")  # fmt: skip
    assert done.code == 0, done.err
    return Path("checkpoints/r/last.ckpt")
