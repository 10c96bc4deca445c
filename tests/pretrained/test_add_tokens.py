"""``convert --add_tokens``: new ids, old logits, the optimizer's moments, and tokens that travel with the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning import load_model, load_tokenizer, save_model
from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.pretrained.source import read_weights
from gpt_lightning.training.build import build_trainer
from gpt_lightning.training.config import RunConfig
from helpers import SMALL_QUICKSTART, Command, assert_refused, json_of, tiny_gpt2_vocabulary
from own_tokenizers import own_file, write_own
from random_gpt2 import transformers

pytest.importorskip("tokenizers")

ADD = ("--add_tokens", "<|user|>", "<|bot|>")
TEXT = "<|user|>Every effort<|bot|> moves you<|user|>"
WITHOUT = "Every effort moves you"


def added_rows(source: str, first: int) -> dict[str, torch.Tensor]:
    state_dict = read_weights(source).state_dict
    names = ("tok_emb.weight", "out_head.weight")
    return {name: state_dict[name][first:] for name in names if name in state_dict}


@pytest.mark.parametrize("weight_format", ["hf", "lightning"])
@pytest.mark.parametrize("tied", [False, True])
def test_old_logits_stay_and_text_round_trips(
    command: Command, tmp_path: Path, weight_format: str, tied: bool
) -> None:
    model = tiny_gpt2_vocabulary()
    if tied:
        model = load_tied(model)
    save_model(model, "source.ckpt", "lightning")
    dest = {"hf": "dest", "lightning": "dest.ckpt"}[weight_format]
    result = command("convert", "source.ckpt", dest, f"--format={weight_format}", *ADD)
    assert result.code == 0, result.err
    tokenizer, grown = load_tokenizer(dest), load_model(dest)
    assert grown.config.vocab_size == tokenizer.vocab_size == 50259
    assert grown.config.tied_embeddings == tied
    idx = torch.tensor([GPT2.encode_prompt(WITHOUT)])
    with torch.inference_mode():
        difference = grown(idx)[..., :50257] - model(idx)
    assert difference.abs().max() <= 1e-6
    for text in (TEXT, WITHOUT, "", "<|user|> <|bot|>", "<|us er|>"):
        assert tokenizer.decode(tokenizer.encode_prompt(text)) == text
    assert tokenizer.encode_prompt(WITHOUT) == GPT2.encode_prompt(WITHOUT)
    ids = tokenizer.encode_prompt(TEXT)
    assert [i for i in ids if i > 50256] == [50257, 50258, 50257]
    answer = json_of(
        command("generate", f"--from={dest}", f"--prompt={TEXT}", "--max_new_tokens=2", "--json")
    )
    assert answer["token_ids"][:-2] == ids
    assert answer["text"].startswith(TEXT)
    for name, rows in added_rows(dest, 50257).items():
        mean = read_weights("source.ckpt").state_dict[name].mean(dim=0)
        torch.testing.assert_close(rows, mean.expand(2, -1))
    if weight_format == "hf":
        theirs = transformers.AutoTokenizer.from_pretrained(dest)
        assert theirs(TEXT)["input_ids"] == ids
        assert theirs(WITHOUT)["input_ids"] == GPT2.encode_prompt(WITHOUT)
        assert theirs.decode(ids) == TEXT
        network = transformers.GPT2LMHeadModel.from_pretrained(dest).eval()
        idx = torch.tensor([ids])
        with torch.inference_mode():
            torch.testing.assert_close(network(idx).logits, grown(idx), atol=1e-5, rtol=1e-5)


def load_tied(model: Any) -> Any:
    """The model with the output head of its embedding."""
    from dataclasses import replace

    from gpt_lightning import GPTModel

    tied = GPTModel(replace(model.config, tied_embeddings=True)).eval()
    state_dict = model.state_dict()
    del state_dict["out_head.weight"]
    tied.load_state_dict(state_dict)
    return tied


def test_moments_grow_and_training_continues(command: Command, trained_run: Path) -> None:
    result = command("convert", str(trained_run), "more.ckpt", "--format=lightning", *ADD)
    assert result.code == 0, result.err
    before = read_weights(str(trained_run)).optimizer_state
    after = read_weights("more.ckpt").optimizer_state
    assert before is not None
    assert after is not None
    names = after["param_groups"][0]["param_names"]
    grown = []
    for index, name in enumerate(names):
        for key, moment in after["state"][index].items():
            old = before["state"][index][key]
            if moment.shape == old.shape:
                assert torch.equal(moment, old)
                continue
            grown.append((name, key))
            assert torch.equal(moment[:50257], old)
            assert moment.shape == (50259, old.shape[1])
            expected = torch.zeros(old.shape[1]) if key == "exp_avg" else old.mean(dim=0)
            torch.testing.assert_close(moment[50257:], expected.expand(2, -1))
    matrices = ("tok_emb.weight", "out_head.weight")
    assert sorted(grown) == sorted((n, k) for n in matrices for k in ("exp_avg", "exp_avg_sq"))
    Path("chat.txt").write_text(f"{TEXT}\n" * 300)
    fit = ["fit", *SMALL_QUICKSTART, "--run=chat", "--data.text=chat.txt", "--data.train_ratio=0.5",
           "--trainer.max_steps=2", "--init_from=more.ckpt", "--init_optimizer=true"]  # fmt: skip
    result = command(*fit)
    assert result.code == 0, result.err
    assert load_tokenizer("checkpoints/chat").equals(load_tokenizer("more.ckpt"))
    rows = [
        added_rows(source, 50257)["tok_emb.weight"] for source in ("more.ckpt", "checkpoints/chat")
    ]
    assert not torch.equal(*rows)
    assert not torch.equal(rows[1][0], rows[1][1])  # two tokens with the same rows become different
    result = command("prepare", "chat.txt", "--out=store", "--split=ratio", "--tokenizer=more.json")
    assert_refused(result, "more.json does not exist")


def test_padding_rows_are_used_first_and_tokens_can_be_added_again(
    command: Command, tmp_path: Path
) -> None:
    config = RunConfig(
        model={"config": {"vocab_size": 400, "context_length": 16, "emb_dim": 8, "n_heads": 1, "n_layers": 1}},
        data={"text": "sample", "tokenizer": str(write_own(tmp_path / "own", 390))},
        trainer={"accelerator": "cpu", "max_steps": 1, "enable_checkpointing": False},
    )  # fmt: skip
    trainer, module, data = build_trainer(config)
    trainer.fit(module, datamodule=data)
    tokenizer = module.tokenizer
    assert tokenizer.file == own_file(390)
    save_model(module.model, "padded", tokenizer=tokenizer)
    result = command(
        "convert", "padded", "one", "--format=hf", "--add_tokens=a b", "--init_added=normal"
    )
    assert result.code == 0, result.err
    result = command(
        "convert",
        "one",
        "two.ckpt",
        "--format=lightning",
        "--add_tokens",
        "<|x|>",
        *map(str, range(100, 115)),
    )
    assert result.code == 0, result.err
    assert load_model("one").config.vocab_size == 400
    assert load_model("two.ckpt").config.vocab_size == 390 + 1 + 16
    assert load_tokenizer("two.ckpt").encode_prompt("a b<|x|>114") == [390, 391, 406]
    first, second = (
        read_weights(source).state_dict["tok_emb.weight"] for source in ("padded", "one")
    )
    assert torch.equal(first[:390], second[:390])
    assert torch.equal(first[391:], second[391:])
    deviation = (second[390] - first[:390].mean(dim=0)) / first[:390].std(dim=0)
    assert 0.1 < deviation.abs().max() < 4


def test_bad_tokens_are_refused(command: Command, tmp_path: Path) -> None:
    save_model(tiny_gpt2_vocabulary(), "source.ckpt", "lightning")
    for tokens, weight_format, cause in [
        (["<|endoftext|>"], "hf", "add_tokens: '<|endoftext|>' is in the vocabulary already (id 50256)"),
        ([" effort"], "hf", "add_tokens: ' effort' is in the vocabulary already (id 3626)"),
        ([""], "hf", "add_tokens: a token is empty"),
        (["<|x|>", "<|x|>"], "hf", "add_tokens: '<|x|>' is given twice"),
        (["caf\udce9"], "hf", "add_tokens: is not valid UTF-8"),
        (["<|x|>"], "book", "add_tokens: the format book cannot hold tokens; give --format hf, lightning or gguf"),
        (["<|x|>"], "openai-tf", "add_tokens: the format openai-tf cannot hold tokens"),
    ]:  # fmt: skip
        dest = "dest.pth" if weight_format == "book" else "dest"
        result = command(
            "convert", "source.ckpt", dest, f"--format={weight_format}", "--add_tokens", *tokens
        )
        assert_refused(result, cause)
        assert not Path(dest).exists()
    assert command("convert", "source.ckpt", "one", "--format=hf", *ADD).code == 0
    result = command("convert", "one", "two", "--format=hf", "--add_tokens", "<|bot|>")
    assert_refused(result, "'<|bot|>' is in the vocabulary already (id 50258)")
