"""Tokenizer files beside weights: GPT-2's is recognized, a tokenizer.json is read, others are refused for text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning import load_model
from gpt_lightning.data.tokenizer import encode_prompt, vocabulary_file
from gpt_lightning.generation.sampling import SamplingParams
from gpt_lightning.reports.model_comparison import ComparisonTask, measure
from helpers import (
    ROOT,
    Command,
    json_of,
)
from random_gpt2 import random_gpt2, transformers
from weight_files import (
    edit_json,
    nanogpt_file,
    swap,
)


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with its tokenizer as transformers saves it, in one file and in two."""
    folder = tmp_path_factory.mktemp("tokenizer") / "hf"
    random_gpt2(folder, emb_dim=8, n_heads=2, n_layers=1, n_positions=32)
    shutil.copy(vocabulary_file("encoder.json"), folder / "vocab.json")
    shutil.copy(vocabulary_file("vocab.bpe"), folder / "merges.txt")
    transformers.GPT2Tokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def spell_differently(folder: Path) -> None:
    """Rewrite the files with the same content: other key order, indents, merges as strings, line ends."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    del content["model"]["vocab"]["<|endoftext|>"]
    content["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
    }
    path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
    vocabulary = json.loads((folder / "vocab.json").read_bytes())
    text = json.dumps(dict(reversed(vocabulary.items())), ensure_ascii=False, indent=1)
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    (folder / "merges.txt").write_bytes("\r\n".join(lines[1:]).encode())
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2TokenizerFast",
              pad_token="<|endoftext|>", clean_up_tokenization_spaces=True)  # fmt: skip


@pytest.mark.parametrize("change", [lambda folder: None, spell_differently])
def test_gpt2s_tokenizer_is_recognized_in_any_layout(
    with_tokenizer: Path, tmp_path: Path, command: Command, change: Callable[[Path], None]
) -> None:
    shutil.copytree(with_tokenizer, "hf")
    change(Path("hf"))
    result = command("generate", "--from=hf", "--prompt=a", "--max_new_tokens=1")
    assert (result.code, result.err) == (0, "")
    result = command("convert", "hf", "again", "--format=hf")
    assert result.code == 0, result.err
    assert command("generate", "--from=again", "--prompt=a", "--max_new_tokens=1").code == 0


def swap_merges(folder: Path) -> None:
    version, one, other, *rest = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    text = "\n".join([version, other, one, *rest])
    (folder / "merges.txt").write_text(text, encoding="utf-8")


def add_token(folder: Path) -> None:
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|user|>"])
    tokenizer.save_pretrained(folder)


def save_with(**settings: Any) -> Callable[[Path], None]:
    """A function that saves transformers' tokenizer with other settings."""

    def change(folder: Path) -> None:
        transformers.GPT2Tokenizer.from_pretrained(folder, **settings).save_pretrained(folder)
        edit_json(folder / "tokenizer_config.json", **dict.fromkeys(settings))

    return change


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "vocab.json": (lambda f: swap(f / "vocab.json"), "vocab.json has another vocabulary"),
    "merges.txt": (swap_merges, "merges.txt has other merges"),
    "vocabulary": (
        lambda f: swap(f / "tokenizer.json", "model", "vocab"),
        "tokenizer.json has another vocabulary",
    ),
    "merges": (
        lambda f: swap(f / "tokenizer.json", "model", "merges"),
        "tokenizer.json has other merges",
    ),
    "added": (add_token, "its vocabulary has 50257 tokens, fewer than hf (50,258 tokens"),
    "bos": (save_with(add_bos_token=True), "adds tokens to each text"),
    "prefix space": (save_with(add_prefix_space=True), "splits text differently"),
    "normalizer": (
        lambda f: edit_json(f / "tokenizer.json", normalizer={"type": "NFC"}),
        "has a normalizer",
    ),
    "not json": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be read"),
    "class": (
        lambda f: edit_json(f / "tokenizer_config.json", tokenizer_class="BertTokenizer"),
        "names BertTokenizer",
    ),
    "class in config": (
        lambda f: edit_json(f / "config.json", tokenizer_class="BertTokenizer"),
        "names BertTokenizer",
    ),
    "sentencepiece": (lambda f: (f / "spiece.model").touch(), "spiece.model belongs to another"),
}  # fmt: skip


SLOW = ("prefix space", "bos", "vocabulary", "merges")


@pytest.mark.parametrize(
    "other",
    [pytest.param(other, marks=pytest.mark.slow if other in SLOW else ()) for other in OTHERS],
)
def test_another_tokenizer_is_refused_for_text(
    with_tokenizer: Path, tmp_path: Path, command: Command, other: str
) -> None:
    shutil.copytree(with_tokenizer, "hf")
    change, cause = OTHERS[other]
    change(Path("hf"))
    result = command("generate", "--from=hf", "--prompt=a")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(
        "gpt_lightning: error: hf: has another tokenizer than GPT-2's: "
    ), result.err
    assert cause in result.err
    assert result.err.count("\n") == 1


def test_another_byte_level_bpe_is_read(
    with_tokenizer: Path, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(with_tokenizer, "hf")
    edit_json(Path("hf/tokenizer.json"), normalizer={"type": "NFC"})
    edit_json(Path("hf/tokenizer_config.json"), tokenizer_class="PreTrainedTokenizerFast")
    text = "cafe\u0301"
    result = json_of(
        command("generate", "--from=hf", f"--prompt={text}", "--max_new_tokens=1", "--json")
    )
    expected = transformers.AutoTokenizer.from_pretrained("hf")(text)["input_ids"]
    assert result["token_ids"][:-1] == expected != encode_prompt(text)


@pytest.fixture
def other_tokenizers(with_tokenizer: Path, command: Command) -> list[str]:
    shutil.copytree(with_tokenizer, "hf")
    OTHERS["vocab.json"][0](Path("hf"))
    characters = random_gpt2(Path("x"), emb_dim=8, n_heads=2, n_layers=1, vocab_size=65)
    content = nanogpt_file(characters)
    torch.save(content, "ckpt.pt")
    Path("beside").mkdir()
    gpt2 = transformers.GPT2LMHeadModel.from_pretrained(with_tokenizer)
    torch.save(nanogpt_file(gpt2), "beside/ckpt.pt")
    Path("beside/meta.pkl").write_bytes(b"never opened")
    torch.save(nanogpt_file(gpt2, vocab_size=50257), "gpt2.pt")
    return ["hf", "ckpt.pt", "beside/ckpt.pt"]


def test_another_tokenizer_is_refused_by_every_command_with_text(
    other_tokenizers: list[str], command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    gpt2 = f"--config={ROOT}/configs/gpt2.yaml"
    for source in other_tokenizers:
        for arguments in (
            ["generate", f"--from={source}", "--prompt=A"],
            ["report", "sampling", f"--from={source}", "--prompt=A"],
            ["report", "sweep", f"--from={source}", "--prompt=A"],
            ["validate", gpt2, f"--init_from={source}", "--data.text=sample"],
            ["fit", gpt2, f"--init_from={source}", "--data.text=sample"],
            ["plan", gpt2, f"--init_from={source}", "--data.text=sample"],
        ):
            result = command(*arguments)
            assert result.code == 2, (arguments, result.out)
            assert f"{source}: has another tokenizer than GPT-2's: " in result.err
            assert result.error.count("\n") == 1
    result = command("generate", "--from=gpt2.pt", "--prompt=A", "--max_new_tokens=1")
    assert result.code == 0, result.err
    task = ComparisonTask(
        prompt="A", sampling=SamplingParams(), num_samples=1, max_new_tokens=1, seed=1
    )
    with pytest.raises(ValueError, match="has another tokenizer than GPT-2's"):
        measure("ckpt.pt", task)  # what report sizes runs in a separate process
    load_model("ckpt.pt")  # its ids can be used
    assert "ckpt.pt: has another tokenizer than GPT-2's" in caplog.text
    assert not Path("checkpoints").exists()


def test_conversion_does_not_hide_another_tokenizer(
    other_tokenizers: list[str], command: Command
) -> None:
    """Every format shows a smaller vocabulary, and no format shows another tokenizer."""
    for weight_format, dest in (("hf", "dest"), ("book", "dest.pth"), ("lightning", "dest.ckpt")):
        for source in ("hf", "beside/ckpt.pt"):
            result = command("convert", source, dest, f"--format={weight_format}", "--n_heads=2")
            assert (result.code, result.err.count("\n")) == (2, 1)
            assert f"{source}: has another tokenizer than GPT-2's: " in result.err
        result = command("convert", "ckpt.pt", dest, f"--format={weight_format}")
        assert result.code == 0, result.err
        result = command("generate", f"--from={dest}", "--prompt=A")
        assert result.code == 2
        assert "its vocabulary has 65 tokens" in result.err
    assert not Path("dest/vocab.json").exists()
