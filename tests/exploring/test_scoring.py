"""Scores of a text: windows, and equality with the loss of the model."""

import math

import pytest
import torch
import torch.nn.functional as F

from gpt_lightning import GPTModel
from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.exploring.scoring import score_window, score_windows, scores_json
from gpt_lightning.exploring.tokens import Json
from helpers import tiny_gpt

TEXT = "I turned to Mrs. Gisburn. – What a waste: 5 × 7 € 🦜!"


def score(model: GPTModel, ids: list[int]) -> Json:
    scores = []
    for window in score_windows(len(ids), model.config.context_length):
        scores += score_window(model, ids, window)
    return scores_json(GPT2, ids, scores)


@pytest.mark.parametrize("context_length", [1, 2, 3, 8, 24])
def test_windows_score_each_token_once_with_half_a_context(context_length: int) -> None:
    for num_tokens in range(1, 80):
        scored: list[int] = []
        for window in score_windows(num_tokens, context_length):
            tokens = range(window.first, window.end)
            scored += tokens
            assert window.end - 1 - window.start <= context_length
            for token in tokens:
                before = token - window.start
                assert before == token or before >= context_length / 2
        assert scored == list(range(1, num_tokens))


@torch.inference_mode()
def test_scores_are_the_models() -> None:
    model = (
        tiny_gpt()
    )  # a small vocabulary: in a large one, rounding swaps tokens of nearly equal logits
    ids = [5, 1, 96, 40, 2, 2, 71, 8, 33, 14, 90, 11, 65]
    answer = score(model, ids)
    logits = model(torch.tensor([ids]))[0, :-1].double()
    targets = torch.tensor(ids[1:])
    losses = F.cross_entropy(logits, targets, reduction="none")
    first, *others = answer["tokens"]
    assert (first["surprisal"], first["rank"], first["candidates"]) == (None, None, [])
    assert [token["id"] for token in answer["tokens"]] == ids
    assert [token["surprisal"] for token in others] == pytest.approx(losses.tolist(), abs=1e-5)
    ranks = (logits > logits.gather(1, targets[:, None])).sum(dim=1) + 1
    assert [token["rank"] for token in others] == ranks.tolist()
    best = logits.softmax(dim=-1).topk(5)
    for token, ids_, p in zip(others, best.indices.tolist(), best.values.tolist(), strict=True):
        assert [candidate["id"] for candidate in token["candidates"]] == ids_
        assert [c["probability"] for c in token["candidates"]] == pytest.approx(p, abs=1e-6)
    assert answer["loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
    assert answer["perplexity"] == pytest.approx(math.exp(answer["loss"]))
    num_bytes = sum(len(GPT2.decode_bytes([token])) for token in ids[1:])
    bits = float(losses.sum()) / math.log(2) / num_bytes
    assert answer["bits_per_byte"] == pytest.approx(bits, abs=1e-5)
    assert answer["num_tokens"] == len(ids)


@torch.inference_mode()
def test_a_long_text_is_scored_in_windows(tiny: GPTModel) -> None:
    ids = GPT2.encode_prompt(TEXT * 3)
    assert len(ids) > 2 * tiny.config.context_length
    tokens = score(tiny, ids)["tokens"]
    for window in score_windows(len(ids), tiny.config.context_length):
        for i in range(window.first, window.end):
            logits = tiny(torch.tensor([ids[window.start : i]]))[0, -1]
            loss = F.cross_entropy(logits, torch.tensor(ids[i]))
            assert tokens[i]["surprisal"] == pytest.approx(float(loss), abs=1e-5)


def test_of_equal_logits_the_lower_id_comes_first() -> None:
    model = tiny_gpt()
    assert model.out_head is not None
    with torch.no_grad():
        model.out_head.weight.zero_()  # type: ignore[union-attr, operator]
    assert [token["rank"] for token in score(model, [5, 0, 96])["tokens"]] == [None, 1, 97]


def test_one_token(tiny: GPTModel) -> None:
    answer = score(tiny, [11])
    assert len(answer["tokens"]) == 1
    assert (answer["loss"], answer["perplexity"], answer["bits_per_byte"]) == (None, None, None)


def test_only_delimiters_have_no_bytes(tiny: GPTModel) -> None:
    answer = score(tiny, [11, 50256])
    assert answer["loss"] is not None
    assert answer["bits_per_byte"] is None
