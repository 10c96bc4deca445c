"""Conversion between all formats."""

import json
from pathlib import Path

import pytest
import torch

import book
from gpt_lightning import load_model
from gpt_lightning.pretrained.convert import WeightFormat, convert
from helpers import (
    Command,
    python,
)
from random_gpt2 import random_gpt2, transformers
from weight_files import (
    SHAPES,
    SIZES,
    assert_same_logits,
    book_model,
    needs_tensorflow,
    random_ids,
)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "weight_format", ["book", pytest.param("openai-tf", marks=needs_tensorflow)]
)
def test_other_formats_give_transformers_logits(
    tmp_path: Path, size: str, weight_format: WeightFormat
) -> None:
    """From transformers to the format and back, at every position of the context."""
    emb_dim, n_heads = SHAPES[size]
    theirs = random_gpt2(tmp_path / "hf", emb_dim, n_heads, n_positions=1024)
    dest = tmp_path / ("model.pth" if weight_format == "book" else "tf")
    convert(str(tmp_path / "hf"), dest, weight_format)
    ours = load_model(str(dest), n_heads=n_heads)
    assert_same_logits(ours, theirs, random_ids(2, 20))
    assert_same_logits(ours, theirs, random_ids(1, 1024))


@needs_tensorflow
def test_tensorflow_to_ours_to_hugging_face(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = random_gpt2(tmp_path / "hf")
    idx = random_ids(2, 30)
    for arguments in [
        ("hf", "tf", "openai-tf"), ("tf", "ours.ckpt", "lightning"), ("ours.ckpt", "again", "hf"),
    ]:  # fmt: skip
        result = command("convert", arguments[0], arguments[1], "--format", arguments[2])
        assert result.code == 0, result.err
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


def test_our_files_contain_the_number_of_heads(
    tmp_path: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    """4 heads cannot be derived from emb_dim 128; the book's own code still loads the file."""
    theirs, cfg = book_model(emb_dim=128, n_heads=4, n_layers=1, vocab_size=300)
    torch.save(theirs.state_dict(), "model.pth")
    assumed = (
        f"gpt_lightning: {tmp_path}/model.pth: does not contain its number of attention heads; assuming 2 (64 "
        "dimensions each); if that is wrong, give --n_heads (--model.config.n_heads with fit and validate)"
    )
    result = command("convert", "model.pth", "guessed.ckpt", "--format=lightning")
    dropout = "gpt_lightning: model.pth: does not contain its dropout rate; writes 0.1"
    assert result.err.splitlines() == [assumed, dropout, "guessed.ckpt: written"]
    load_model("model.pth")
    assert assumed == f"gpt_lightning: {caplog.messages[0]}"

    result = command("convert", "model.pth", "again.pth", "--format=book", "--n_heads=4")
    assert result.err.splitlines() == [dropout, "again.pth: written"]
    book_again = book.BookGPT(cfg)
    book_again.load_state_dict(torch.load("again.pth", weights_only=True))  # strict
    result = command("convert", "again.pth", "ours.ckpt", "--format=lightning")
    assert (result.code, result.err) == (0, "ours.ckpt: written\n")
    for source in ("again.pth", "ours.ckpt"):
        ours = load_model(source)
        assert ours.config.n_heads == 4
        with torch.inference_mode():
            idx = random_ids(2, 16) % 300
            torch.testing.assert_close(ours(idx), theirs(idx), atol=1e-5, rtol=1e-5)
    for verb in (["convert", "again.pth", "x.ckpt", "--format=lightning"],
                 ["generate", "--from=again.pth", "--prompt=a"]):  # fmt: skip
        result = command(*verb, "--n_heads=8")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "n_heads: again.pth has 4, not 8" in result.err
