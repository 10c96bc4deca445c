"""``evaluate``: results, options and bad input."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.pretrained.load import load_model
from helpers import Command, assert_refused, json_of
from servers import write_tiny_model
from task_examples import PAGES, ROWS, write_tasks


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context_length=16))


@pytest.fixture
def files(command: Command, tmp_path: Path) -> None:
    """Small files of all tasks in the working directory."""
    write_tasks(tmp_path)
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(ROWS[0])}\n{{", encoding="utf-8")
    (tmp_path / "empty").touch()


@torch.inference_mode()
def logprob(model: Any, context: str, ending: str) -> float:
    ids = GPT2.encode_prompt(context + ending)
    count = len(ids) - len(GPT2.encode_prompt(context))
    scores = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    return float(scores[-count:].sum())


@pytest.mark.usefixtures("files")
def test_choices_are_counted(command: Command, source: str) -> None:
    base = ("evaluate", "--from", source, "--task", "hellaswag", "--file", "choices.jsonl")
    result = json_of(command(*base, "--json"))
    model = load_model(source)
    right, right_norm = [], []
    for row in ROWS:
        scores = [logprob(model, str(row["ctx"]), f" {e}") for e in row["endings"]]  # type: ignore[attr-defined]
        per_character = [s / len(e) for s, e in zip(scores, row["endings"], strict=True)]  # type: ignore[call-overload]
        right.append(scores.index(max(scores)) == row["label"])
        right_norm.append(per_character.index(max(per_character)) == row["label"])
    assert result["task"] == "hellaswag"
    assert result["examples"] == 5
    assert (result["acc"], result["acc_norm"]) == (sum(right) / 5, sum(right_norm) / 5)
    share = sum(right) / 5
    assert result["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 4))
    assert result["cropped"] == 0
    limited = json_of(command(*base, "--json", "--limit", "1", "--batch_size", "1"))
    assert (limited["examples"], limited["acc"]) == (1, float(right[0]))
    assert limited["acc_stderr"] is None
    shown = command(*base)
    assert shown.code == 0
    assert f"{result['acc']:.4f} ± {result['acc_stderr']:.4f}" in shown.out


@pytest.mark.usefixtures("files")
def test_long_context_is_cropped_and_counted(command: Command, source: str, tmp_path: Path) -> None:
    row = {"ctx": "so on and on " * 20 + "it", "endings": ["is", "was not so"], "label": 0}
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, [row, ROWS[0]])))
    base = ("evaluate", f"--from={source}", "--task=hellaswag", "--json")
    result = json_of(command(*base, "--file=long.jsonl"))
    assert (result["examples"], result["cropped"]) == (2, 1)


@pytest.mark.usefixtures("files")
def test_last_words_are_judged(command: Command, source: str) -> None:
    base = ("evaluate", f"--from={source}", "--task=lambada", "--file=texts.jsonl")
    result = json_of(command(*base, "--json"))
    model = load_model(source)
    scores = [logprob(model, "She gave the book to her", " friend"),
              logprob(model, "A dog saw another", " dog")]  # fmt: skip
    assert result["perplexity"] == pytest.approx(math.exp(-sum(scores) / 2), rel=1e-4)
    assert (result["task"], result["examples"], result["acc"]) == ("lambada", 2, 0.0)


@pytest.mark.usefixtures("files")
def test_pages_have_a_perplexity(command: Command, source: str) -> None:
    base = ("evaluate", f"--from={source}", "--task=wikitext", "--file=pages.txt")
    result = json_of(command(*base, "--json"))
    num_bytes = len(PAGES) - 1  # a newline separates the two pages
    assert (result["examples"], result["bytes"]) == (2, num_bytes)
    assert result["byte_perplexity"] == pytest.approx(2 ** result["bits_per_byte"])
    loss = result["bits_per_byte"] * math.log(2) * num_bytes
    assert math.log(result["word_perplexity"]) == pytest.approx(loss / result["words"])
    sliding = json_of(command(*base, "--json", "--stride=1"))
    assert sliding["bits_per_byte"] != result["bits_per_byte"]
    assert (sliding["settings"]["stride"], result["settings"]["stride"]) == (1, 16)
    assert json_of(command(*base, "--json", "--limit=1"))["examples"] == 1
    assert "word_perplexity" in command(*base).out


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--task=hellaswag"], ["hellaswag: its file is not downloaded", "download hellaswag, or give", "--file FILE"]),
        (["--task=wikitext"], ["wikitext: its file is not downloaded", "download wikitext-2"]),
        (["--file=choices.jsonl"], ["task: is missing", "hellaswag, lambada or wikitext"]),
        (["--task=hellaswagg", "--file=choices.jsonl"], ["task", "hellaswagg"]),
        (["--task=hellaswag", "--file=nowhere"], ["file: nowhere cannot be read (No such file"]),
        (["--task=hellaswag", "--file=bad.jsonl"], ["bad.jsonl, line 2: is not JSON"]),
        (["--task=hellaswag", "--file=texts.jsonl"], ["texts.jsonl, line 1: has no endings"]),
        (["--task=lambada", "--file=choices.jsonl"], ["choices.jsonl, line 1: has no text"]),
        (["--task=wikitext", "--file=empty"], ["empty: has no examples"]),
        (["--task=lambada", "--file=texts.jsonl", "--limit=0"], ["limit: 0 is too small"]),
        (["--task=lambada", "--file=texts.jsonl", "--batch_size=0"], ["batch_size: 0"]),
        (["--task=lambada", "--file=texts.jsonl", "--stride=4"], ["stride: has no meaning"]),
        (["--task=wikitext", "--file=pages.txt", "--stride=0"], ["stride: 0 is too small"]),
        (["--task=wikitext", "--file=pages.txt", "--stride=17"], ["stride: 17 is more than", "16"]),
    ],
)  # fmt: skip
def test_bad_input_of_evaluate_is_refused(
    command: Command, source: str, arguments: list[str], parts: list[str]
) -> None:
    assert_refused(command("evaluate", f"--from={source}", *arguments), *parts)


@pytest.mark.usefixtures("files")
def test_evaluate_needs_a_model(command: Command) -> None:
    base = ("evaluate", "--task=lambada", "--file=texts.jsonl")
    assert_refused(command(*base), "from: is missing")
    assert_refused(command(*base, "--from=nowhere"), "nowhere: does not exist")
