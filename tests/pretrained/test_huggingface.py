"""Weights in Hugging Face's format: read, written, compared with transformers."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_lightning import GPTConfig, GPTModel, generate, load_model
from gpt_lightning.data.tokenizer import gpt2_encoding
from gpt_lightning.pretrained.convert import convert
from gpt_lightning.pretrained.source import read_weights
from gpt_lightning.pretrained.weights import ModelWeights, write_lightning
from helpers import (
    ROOT,
    Command,
)
from random_gpt2 import random_gpt2, transformers
from weight_files import SHAPES, SIZES, assert_same_logits, edit_json, random_ids


@pytest.mark.parametrize("size", SIZES)
def test_hugging_face_weights_give_transformers_logits(tmp_path: Path, size: str) -> None:
    theirs = random_gpt2(tmp_path / "hf", *SHAPES[size], n_positions=1024)
    ours = load_model(str(tmp_path / "hf"))
    assert ours.config.tied_embeddings
    assert ours.config.qkv_bias
    assert_same_logits(ours, theirs, random_ids(2, 20))
    assert_same_logits(ours, theirs, random_ids(1, 1024))  # to position 1,023


def test_sharded_and_untied_hugging_face_gives_transformers_logits(tmp_path: Path) -> None:
    theirs = random_gpt2(tmp_path / "whole", tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    ours = load_model(str(tmp_path / "shards"))
    assert not ours.config.tied_embeddings
    assert_same_logits(ours, theirs, random_ids(2, 20))


@torch.inference_mode()
def test_text_beyond_the_context_continues_from_the_last_window(tmp_path: Path) -> None:
    """Each token depends on the last window, as in the book; transformers reads the same window."""
    theirs = random_gpt2(tmp_path / "hf", n_positions=16)
    ours = load_model(str(tmp_path / "hf"))
    ids = random_ids(1, 12)
    found = generate(ours, ids, 20)
    for _ in range(20):
        next_id = theirs(ids[:, -16:]).logits[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat((ids, next_id), dim=1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize(("tied", "shards"), [(True, False), (None, True)])
def test_separate_head_is_kept_although_the_config_ties_it(
    tmp_path: Path, command: Command, tied: bool | None, shards: bool
) -> None:
    model = random_gpt2(tmp_path / "hf", tie_word_embeddings=False)
    if shards:
        shutil.rmtree(tmp_path / "hf")
        model.save_pretrained(tmp_path / "hf", max_shard_size="2MB")
    edit_json(tmp_path / "hf" / "config.json", tie_word_embeddings=tied)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    result = command("convert", "hf", "ours.ckpt", "--format=lightning")
    assert result.code == 0, result.err
    assert result.err.splitlines() == [
        "gpt_lightning: hf: its config.json ties the output head to the token embedding, but "
        "lm_head.weight has other weights; keeping them",
        "ours.ckpt: written",
    ]
    ours = load_model("ours.ckpt")
    assert not ours.config.tied_embeddings
    assert_same_logits(ours, theirs, random_ids(2, 20))
    assert_same_logits(ours, model, random_ids(2, 20))
    # an error stays one line
    result = command("convert", "hf", "tf", "--format=openai-tf")
    assert (result.code, result.err.count("\n")) == (2, 1)
    result = command("validate", f"--config={ROOT}/configs/gpt2.yaml", "--init_from=hf",
                   "--model.config.tied_embeddings=true")  # fmt: skip
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "the source's output head differs from its token embedding" in result.err


@pytest.mark.parametrize("saved_name", ["transformer.wte.weight", "lm_head.weight", "both"])
def test_tied_head_is_read_under_either_name(tmp_path: Path, saved_name: str) -> None:
    theirs = random_gpt2(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    head = tensors.pop("transformer.wte.weight")
    names = ("transformer.wte.weight", "lm_head.weight") if saved_name == "both" else (saved_name,)
    save_file({**tensors, **{name: head.clone() for name in names}}, path)
    weights = read_weights(str(tmp_path / "hf"))
    assert weights.warnings == ()
    assert weights.config.tied_embeddings
    assert_same_logits(load_model(str(tmp_path / "hf")), theirs, random_ids(2, 20))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_exported_model_gives_the_same_logits_in_transformers(
    tmp_path: Path, tied: bool, qkv_bias: bool
) -> None:
    torch.manual_seed(5)
    config = GPTConfig(context_length=32, emb_dim=32, n_heads=4, n_layers=2, qkv_bias=qkv_bias,
                       tied_embeddings=tied)  # fmt: skip
    ours = GPTModel(config).eval()
    write_lightning(ModelWeights(config, ours.state_dict()), tmp_path / "ours.ckpt")
    convert(str(tmp_path / "ours.ckpt"), tmp_path / "hf", "hf")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    assert_same_logits(ours, theirs, random_ids(2, 20))
    again = load_model(str(tmp_path / "hf"))
    assert again.config.tied_embeddings == tied
    assert_same_logits(again, theirs, random_ids(2, 20))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Every effort moves you, doesn't it? Ünïcödé 🙂"
    assert tokenizer(text)["input_ids"] == gpt2_encoding().encode(text)


def test_each_dropout_rate_is_kept(tmp_path: Path) -> None:
    random_gpt2(tmp_path / "hf", n_layers=1, resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3)
    convert(str(tmp_path / "hf"), tmp_path / "ours.ckpt", "lightning")
    convert(str(tmp_path / "ours.ckpt"), tmp_path / "model.pth", "book")
    convert(str(tmp_path / "model.pth"), tmp_path / "again", "hf")
    theirs = transformers.GPT2Config.from_pretrained(tmp_path / "again")
    assert (theirs.resid_pdrop, theirs.embd_pdrop, theirs.attn_pdrop) == (0.1, 0.2, 0.3)
    ours = load_model(str(tmp_path / "again"))
    assert ours.drop_emb.p == 0.2
    assert (ours.trf_blocks[0].drop_shortcut.p, ours.trf_blocks[0].att.drop_rate) == (0.1, 0.3)


def test_sizes_are_read_under_their_common_names(tmp_path: Path) -> None:
    theirs = random_gpt2(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", n_head=None, num_attention_heads=12, n_embd=None,
              hidden_size=24, n_layer=None, num_hidden_layers=2, n_positions=None,
              max_position_embeddings=64)  # fmt: skip
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    assert_same_logits(load_model(str(tmp_path / "hf")), theirs, random_ids(2, 20))
