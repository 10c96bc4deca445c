"""A vocabulary of one's own through every command: train, prepare, fit, validate, generate, report, export."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt_lightning import load_model, load_tokenizer
from gpt_lightning.data.corpus import read_corpus
from gpt_lightning.data.token_store import open_store, store_tokenizer
from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.data.tokenizer_json import added_token, file_of, gpt2_content, read_tokenizer
from helpers import SMALL_QUICKSTART, Command, assert_refused, json_of
from own_tokenizers import OWN_VOCAB_SIZE, edit_own, own_file, write_own
from random_gpt2 import transformers
from token_stores import write_lines

tokenizers = pytest.importorskip("tokenizers")

SAMPLE = read_corpus("sample")
FIT = (*SMALL_QUICKSTART, "--trainer.max_steps=2")


def test_same_input_trains_the_same_file(command: Command, tmp_path: Path) -> None:
    """From text and from rows."""
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(SAMPLE.split("\n\n")), encoding="utf-8")
    write_lines(tmp_path / "rows.jsonl", SAMPLE.split("\n\n"))
    results = [
        json_of(command("train-tokenizer", name, "--vocab_size=400", f"--out={out}", "--json"))
        for name, out in (("a.txt", "one"), ("rows.jsonl", "two"), ("a.txt", "new/three"))
    ]
    files = {Path(out, "tokenizer.json").read_bytes() for out in ("one", "two", "new/three")}
    assert files == {own_file(400)}
    assert [result["vocab_size"] for result in results] == [400] * 3
    assert len({result["sha256"] for result in results}) == 1
    own = read_tokenizer(Path("one"))
    assert len(own.encode_corpus(SAMPLE)) < len(SAMPLE.encode()) / 1.8
    assert own.decode(own.encode_corpus(SAMPLE).tolist()) == SAMPLE


def test_bad_input_of_train_tokenizer(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc abc")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    write_own(tmp_path / "own")
    for arguments, *parts in [
        (["a.txt", "--vocab_size=256", "--out=new"], "vocab_size: 256 is too small"),
        (["a.txt", "--vocab_size=300", "--out=own"], "own/tokenizer.json exists"),
        (["a.txt", "--vocab_size=300", "--out=a.txt"], "out: a.txt is not a folder"),
        (["empty.txt", "--vocab_size=300", "--out=new"], "empty.txt: holds no document with text"),
        (["latin.txt", "--vocab_size=300", "--out=new"], "latin.txt: is not UTF-8"),
        (["missing.txt", "--vocab_size=300", "--out=new"], "missing.txt"),
    ]:
        assert_refused(command("train-tokenizer", *arguments), *parts)
    assert not Path("new").exists()
    result = command("train-tokenizer", "a.txt", "--vocab_size=300", "--out=new")
    assert result.code == 0
    assert "the text has pairs for 260 tokens only" in result.err


@pytest.fixture
def store(command: Command, tmp_path: Path) -> Path:
    """A store of the story, prepared with the tokenizer in the folder ``own``."""
    write_lines(tmp_path / "rows.jsonl", SAMPLE.split("\n\n") * 3)
    write_own(tmp_path / "own")
    result = json_of(
        command("prepare", "rows.jsonl", "--out=store", "--tokenizer=own", "--json",
                "--val_ratio=0.2", "--shard_tokens=2000")
    )  # fmt: skip
    assert result["tokenizer"] == read_tokenizer(Path("own")).record
    return tmp_path / "store"


def test_store_run_text_and_export(command: Command, store: Path) -> None:
    """Nothing but the store names the tokenizer; the run and its export hold it."""
    own = read_tokenizer(Path("own"))
    train, val = (np.concatenate(shards) for shards in open_store(store, own).values())
    documents = [own.decode(ids.tolist()) for ids in np.split(train, np.flatnonzero(train == 0))]
    assert {text.removeprefix("<|endoftext|>") for text in documents} < set(SAMPLE.split("\n\n"))
    assert store_tokenizer(store).equals(own)
    result = command("fit", *FIT, f"--data.text={store}", "--run=a")
    assert result.code == 0, result.err
    Path("own/tokenizer.json").unlink()
    model = load_model("checkpoints/a")
    assert model.config.vocab_size == OWN_VOCAB_SIZE
    assert load_tokenizer("checkpoints/a").equals(own)
    prompt = "The tower clock"
    generate = ["generate", f"--prompt={prompt}", "--max_new_tokens=5", "--json"]
    answer = json_of(command(*generate, "--from=checkpoints/a"))
    assert answer["token_ids"][:-5] == own.encode_prompt(prompt)
    assert answer["text"] == own.decode(answer["token_ids"])
    assert answer["settings"]["eos_id"] == own.end_of_text_id == 0

    validated = json_of(command("validate", "--init_from=checkpoints/a", "--json"))
    windows = validated["val_windows"]
    starts = np.arange(windows) * validated["stride"] + 1
    targets = np.concatenate([val[start : start + 16] for start in starts])
    text_bytes = len(own.decode_bytes(targets[targets != 0].tolist()))
    bits = validated["val_loss"] * len(targets) / math.log(2) / text_bytes
    assert math.isclose(validated["val_bits_per_byte"], bits, rel_tol=1e-6)

    for report in (["sampling", "--num_samples=5"], ["sweep", "--max_new_tokens=3"]):
        result = command("report", *report, "--from=checkpoints/a", f"--prompt={prompt}", "--json")
        assert result.code == 0, result.err
    assert command("convert", "checkpoints/a", "hf", "--format=hf").code == 0
    assert json_of(command(*generate, "--from=hf"))["token_ids"] == answer["token_ids"]
    theirs = transformers.AutoTokenizer.from_pretrained("hf")
    assert theirs(prompt)["input_ids"] == own.encode_prompt(prompt)
    assert theirs.eos_token == "<|endoftext|>"
    idx = torch.tensor([own.encode_prompt(prompt)])
    network = transformers.GPT2LMHeadModel.from_pretrained("hf").eval()
    assert network.config.eos_token_id == 0
    with torch.inference_mode():
        torch.testing.assert_close(network(idx).logits, model(idx), atol=1e-5, rtol=1e-5)
    assert command("convert", "hf", "again.ckpt", "--format=lightning").code == 0
    assert json_of(command(*generate, "--from=again.ckpt"))["token_ids"] == answer["token_ids"]
    for weight_format, dest in (("book", "a.pth"), ("openai-tf", "tf")):
        result = command("convert", "hf", dest, f"--format={weight_format}")
        assert_refused(result, f"format: {weight_format} cannot hold the tokenizer of hf, hf (500")


def test_raw_text_and_resume(command: Command, tmp_path: Path) -> None:
    write_own(tmp_path / "own")
    assert command("fit", *FIT, "--run=whole", "--data.tokenizer=own").code == 0
    assert (
        command("fit", *FIT, "--run=cut", "--data.tokenizer=own", "--trainer.max_steps=1").code == 0
    )
    again = command("fit", *FIT, "--run=cut", "--ckpt_path=last")  # the checkpoint names it
    assert again.code == 0, again.err
    weights = [torch.load(f"checkpoints/{run}/last.ckpt", weights_only=True)["state_dict"]
               for run in ("whole", "cut")]  # fmt: skip
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    Path("own").rename("moved")
    assert json_of(command("validate", "--init_from=checkpoints/cut", "--json"))["val_loss"] < 7
    Path("moved").rename("own")
    plan = json_of(command("plan", *FIT, "--data.tokenizer=own", "--json"))
    assert plan["settings"]["step"]["config"]["vocab_size"] == OWN_VOCAB_SIZE
    write_own(tmp_path / "other", 400)
    resume = ["fit", *FIT, "--run=cut", "--ckpt_path=last", "--trainer.max_steps=3"]
    for tokenizer, name in (("other", "other (400 tokens"), ("gpt2", "gpt2")):
        result = command(*resume, f"--data.tokenizer={tokenizer}")
        assert_refused(
            result, f"data.tokenizer {tokenizer} is {name}", "the model's is own (500 tokens"
        )


def test_different_tokenizers_are_refused_with_both_named(
    command: Command, store: Path, trained_run: Path
) -> None:
    """``trained_run`` has GPT-2's."""
    assert command("prepare", "rows.jsonl", "--out=gpt2_store", "--val_ratio=0.2").code == 0
    assert command("fit", *FIT, f"--data.text={store}", "--run=a").code == 0
    both = ("is own (500 tokens, SHA-256 ", " is gpt2")
    for arguments in (
        ["fit", *FIT, "--run=b", f"--data.text={store}", f"--init_from={trained_run}"],
        ["fit", *FIT, "--run=b", "--data.text=gpt2_store", "--init_from=checkpoints/a"],
        ["fit", *FIT, "--run=b", f"--data.text={store}", "--data.tokenizer=gpt2"],
        ["fit", *FIT, "--run=b", "--data.text=gpt2_store", "--data.tokenizer=own"],
        ["fit", *FIT, "--run=b", "--data.mixture={store: 1, gpt2_store: 1}"],
        ["validate", f"--init_from={trained_run}", f"--data.text={store}"],
    ):
        assert_refused(command(*arguments), "error: data.tokenizer: ", *both)
    result = command(
        "prepare", "rows.jsonl", f"--out={store}", "--val_ratio=0.2", "--shard_tokens=2000"
    )
    assert_refused(result, "was started with the tokenizer own (SHA-256 ", "), not gpt2")
    assert not Path("checkpoints/b").exists()


def test_bad_tokenizers_are_refused(command: Command, store: Path) -> None:
    """One line, and nothing is written."""
    write_own(Path("words"))
    edit_own(Path("words/tokenizer.json"), model={"type": "WordPiece"})
    Path("damaged.json").write_text("{")
    for tokenizer, cause in (
        ("words", "words/tokenizer.json holds a WordPiece tokenizer"),
        ("damaged.json", "damaged.json is not JSON"),
        ("missing", "missing does not exist"),
    ):
        for arguments in (
            ["prepare", "rows.jsonl", "--out=new", f"--tokenizer={tokenizer}"],
            ["fit", *FIT, "--run=new", f"--data.tokenizer={tokenizer}"],
        ):
            assert_refused(command(*arguments), cause)
    result = command("fit", *FIT, f"--data.text={store}", "--model.config.vocab_size=499")
    assert_refused(result, "model.config.vocab_size: 499 is less than the tokenizer's 500")
    (store / "tokenizer.json").unlink()
    result = command("fit", *FIT, f"--data.text={store}")
    assert_refused(result, "holds tokens of another tokenizer (own)", "tokenizer.json is missing")
    assert not Path("checkpoints").exists()
    assert not Path("new").exists()


def test_ids_above_65535_are_stored_as_uint32(command: Command, tmp_path: Path) -> None:
    content = gpt2_content()
    content["added_tokens"] += [
        added_token(f"<|{i}|>", i, special=False) for i in range(50257, 65600)
    ]
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "tokenizer.json").write_bytes(file_of(content))
    texts = [f"Token <|{i}|> of a large vocabulary." for i in range(65500, 65600)]
    write_lines(tmp_path / "rows.jsonl", texts)
    prepare = ["prepare", "rows.jsonl", "--out=store", "--tokenizer=large", "--split=ratio",
               "--val_ratio=0.3", "--shard_tokens=301"]  # fmt: skip
    assert command(*prepare).code == 0
    large = read_tokenizer(Path("large"))
    train, val = open_store(Path("store"), large).values()
    assert {shard.dtype for shard in (*train, *val)} == {np.dtype("<u4")}
    ids = np.concatenate([*train, [50256], *val]).astype(int)
    text = large.decode(ids.tolist())
    assert text == "<|endoftext|>".join(texts)
    assert ids.max() == 65599
    assert GPT2.encode_prompt("Token ") == large.encode_prompt("Token ")
    assert "is already prepared" in command(*prepare).err
    manifest = json.loads(Path("store/manifest.json").read_text())
    size = Path("store", manifest["shards"]["train"][0]["name"]).stat().st_size
    assert size == 4 * 301
    result = command("fit", *FIT, "--data.text=store", "--run=a", "--data.num_workers=1")
    assert result.code == 0, result.err
    assert load_model("checkpoints/a").config.vocab_size == 65600
