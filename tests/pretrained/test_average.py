"""The mean of the weights of several checkpoints."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt_lightning import GPTModel, load_model, save_model
from gpt_lightning.data.tokenizer_json import tokenizer_from
from gpt_lightning.pretrained.weights import read_checkpoint
from helpers import Command, assert_refused, tiny_gpt
from own_tokenizers import own_file
from random_gpt2 import transformers


@pytest.fixture
def models(command: Command) -> list[GPTModel]:
    """Three models in the files a.ckpt, b.ckpt and c.ckpt of the working directory."""
    models = [tiny_gpt(seed, tied_embeddings=True, qkv_bias=True) for seed in range(3)]
    for name, model in zip("abc", models, strict=True):
        save_model(model, f"{name}.ckpt", "lightning")
    return models


def test_the_average_is_the_plain_mean(command: Command, models: list[GPTModel]) -> None:
    for dest, options in (("mean.ckpt", []), ("mean", ["--format=hf"])):
        result = command("convert", "a", "b.ckpt", "c", dest, "--average", *options)
        assert result.code == 0, result.err
    mean = load_model("mean.ckpt").state_dict()
    states = [model.state_dict() for model in models]
    assert mean.keys() == states[0].keys()
    for name, tensor in mean.items():
        expected = np.mean([state[name].double().numpy() for state in states], axis=0)
        assert tensor.dtype == torch.float32
        assert np.array_equal(tensor.numpy(), expected.astype(np.float32)), name
    theirs = transformers.GPT2LMHeadModel.from_pretrained("mean").eval()
    idx = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(theirs(idx).logits, load_model("mean.ckpt").eval()(idx))


def test_average_of_a_run_starts_another_one(
    command: Command, fit: Command, trained_run: Path
) -> None:
    files = [trained_run / name for name in ("last.ckpt", "best.ckpt")]
    result = command("convert", *map(str, files), "mean.ckpt", "--average")
    assert result.code == 0, result.err
    mean = read_checkpoint(Path("mean.ckpt"))
    assert "optimizer_states" not in mean
    states = [read_checkpoint(file)["state_dict"] for file in files]
    for name, tensor in mean["state_dict"].items():
        assert torch.equal(tensor, ((states[0][name].double() + states[1][name]) / 2).float())
    fit("--init_from=mean.ckpt", "--trainer.max_steps=1")


def test_what_cannot_be_averaged_is_refused(command: Command, models: list[GPTModel]) -> None:
    save_model(tiny_gpt(4, emb_dim=16, qkv_bias=True), "other.ckpt", "lightning")
    for sources, parts in (
        (("a", "other"), ("average: other has another architecture", "emb_dim is 16 there and 32")),
        (("a",), ("average: there is one SOURCE",)),
        (("a", "b", "a"), ("average: a is given twice",)),
        (("a", "missing"), ("missing: does not exist",)),
    ):
        assert_refused(command("convert", *sources, "mean.ckpt", "--average"), *parts)
        assert not Path("mean.ckpt").exists()
    assert_refused(command("convert", "a", "b", "mean.ckpt"), "source: 2 are given", "--average")
    assert_refused(command("convert", "a", "b", "mean", "--average"), "format: is missing")


def test_one_file_under_two_names_is_refused(command: Command, models: list[GPTModel]) -> None:
    os.link("b.ckpt", "best.ckpt")
    save_model(models[0], "hf")
    for sources in (("a", "a.ckpt"), ("c", "./c", "a"), ("b", "best"), ("hf", "hf/", "c")):
        result = command("convert", *sources, "mean.ckpt", "--average")
        assert_refused(result, f"average: {sources[0]} and {sources[1]} are one file")
        assert not Path("mean.ckpt").exists()


@pytest.mark.parametrize("order", [("bare.pth", "known"), ("known", "bare.pth")])
def test_an_assumed_number_of_heads_does_not_replace_a_known_one(
    command: Command, order: tuple[str, str]
) -> None:
    model = tiny_gpt(emb_dim=128, n_heads=4)
    torch.save(model.state_dict(), "bare.pth")  # without its heads, of which it seems to have 2
    save_model(tiny_gpt(1, emb_dim=128, n_heads=4), "known.ckpt", "lightning")
    arguments = ["convert", *order, "mean.ckpt", "--average"]
    assert_refused(command(*arguments), "n_heads is", "give the number of heads with --n_heads")
    assert not Path("mean.ckpt").exists()
    assert command(*arguments, "--n_heads=4").code == 0
    assert load_model("mean.ckpt").config.n_heads == 4


def test_models_with_two_tokenizers_are_refused(command: Command) -> None:
    for name, size in (("a", 500), ("b", 510)):
        model, tokenizer = tiny_gpt(vocab_size=520), tokenizer_from(own_file(size), name)
        save_model(model, f"{name}.ckpt", "lightning", tokenizer=tokenizer)
    result = command("convert", "a", "b", "mean.ckpt", "--average")
    assert_refused(result, "average: b has another tokenizer than a: ", "510 tokens", "500 tokens")


def test_values_that_are_not_finite_are_refused(command: Command, models: list[GPTModel]) -> None:
    models[1].trf_blocks[0].ff.layers[0].bias.data[3] = torch.nan  # type: ignore[union-attr,index]
    save_model(models[1], "nan.ckpt", "lightning")
    result = command("convert", "a", "nan.ckpt", "mean.ckpt", "--average")
    assert_refused(result, "average: nan.ckpt has values that are not finite in trf_blocks.0.ff")
    assert not Path("mean.ckpt").exists()
