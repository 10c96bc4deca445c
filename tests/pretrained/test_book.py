"""Weights of the book's model."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import book
from gpt_lightning import load_model
from gpt_lightning.pretrained.convert import convert
from gpt_lightning.pretrained.source import read_weights
from helpers import (
    SMALL_QUICKSTART,
    Command,
)
from weight_files import (
    book_model,
    random_ids,
)


@pytest.mark.parametrize("qkv_bias", [False, True])
@torch.inference_mode()
def test_books_model_pth_gives_the_books_logits_and_returns_unchanged(
    tmp_path: Path, qkv_bias: bool
) -> None:
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


def test_books_heads_must_be_given_if_no_rule_gives_them(tmp_path: Path, command: Command) -> None:
    theirs, _ = book_model(emb_dim=24, n_heads=4)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    result = command("generate", "--from=model.pth", "--prompt=a")
    assert result.code == 2
    assert "n_heads" in result.err
    result = command("generate", "--from=model.pth", "--prompt=a", "--n_heads=4", "--json",
                   "--max_new_tokens=3")  # fmt: skip
    assert result.code == 0, result.err
    ids = json.loads(result.out)["token_ids"]
    assert len(ids) == 4
    for i in (1, 2, 3):
        assert int(theirs(torch.tensor([ids[:i]]))[0, -1].argmax()) == ids[i]


def test_a_books_gpt2_is_tied(tmp_path: Path) -> None:
    theirs, _ = book_model()
    theirs.out_head.weight = nn.Parameter(theirs.tok_emb.weight.clone())
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    assert load_model(str(tmp_path / "model.pth")).config.tied_embeddings


@pytest.fixture
def fit_to_convert(command: Command) -> Path:
    result = command("fit", *SMALL_QUICKSTART,
                   "--trainer.max_steps=2", "--model.config.qkv_bias=true", "--run=r",
                   "--model.config.tied_embeddings=false")  # fmt: skip
    assert result.code == 0, result.err
    return Path("checkpoints/r/last.ckpt")


def test_moments_to_the_book_and_back_are_unchanged(fit_to_convert: Path) -> None:
    """Ours → the book's .pth → ours is the identity, with the optimizer; the book's AdamW loads it too."""
    convert(str(fit_to_convert), Path("book.pth"), "book")
    convert("book.pth", Path("again.ckpt"), "lightning")
    before, after = read_weights(str(fit_to_convert)), read_weights("again.ckpt")
    assert (
        before.config == after.config
    )  # with heads and dropout, which do not follow from the weights
    assert read_weights("book.pth").warnings == ()
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
