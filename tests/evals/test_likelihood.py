"""Log-likelihoods: batches, shared contexts and crops give what one text at a time gives."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.evals.likelihood import (
    Likelihood,
    Request,
    encode_request,
    is_cropped,
    log_likelihoods,
)
from gpt_lightning.evals.multiple_choice import choice_requests, chosen_endings
from gpt_lightning.evals.task_files import read_choices
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.pretrained.load import load_for_text
from helpers import tiny_gpt
from plain_likelihood import plain_logprobs, some_hellaswag


@torch.inference_mode()
def one_at_a_time(model: GPTModel, requests: Sequence[Request]) -> list[list[Likelihood]]:
    """Likelihoods without batches and without a cache."""
    answers = []
    for request in requests:
        answer = []
        for continuation in request.continuations:
            ids = [*request.context, *continuation][-model.config.context_length - 1 :]
            logits = model(torch.tensor([ids[:-1]]))[0, -len(continuation) :]
            targets = torch.tensor(continuation)
            scores = logits.log_softmax(-1).gather(1, targets[:, None])
            answer.append(
                Likelihood(float(scores.sum()), bool((logits.argmax(-1) == targets).all()))
            )
        answers.append(answer)
    return answers


def random_requests(seed: int, count: int, max_context: int, max_ending: int) -> list[Request]:
    rng = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [rng.randrange(97) for _ in range(length)]

    return [
        Request(
            ids(rng.randint(1, max_context)),
            [ids(rng.randint(1, max_ending)) for _ in range(rng.randint(1, 4))],
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
@pytest.mark.parametrize(("max_context", "max_ending"), [(8, 1), (10, 6), (24, 24), (60, 5)])
def test_batches_change_nothing(batch_size: int, max_context: int, max_ending: int) -> None:
    """Lengths up to the model's 24 positions and beyond, and 1 to 4 endings per context."""
    model = tiny_gpt()
    requests = random_requests(batch_size, 40, max_context, max_ending)
    seen: list[int] = []
    answers = log_likelihoods(model, requests, batch_size, seen.append)
    expected = one_at_a_time(model, requests)
    assert [len(a) for a in answers] == [len(r.continuations) for r in requests]
    for answer, other in zip(answers, expected, strict=True):
        for a, b in zip(answer, other, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert a.is_greedy == b.is_greedy
    assert seen == sorted(seen)
    assert seen[-1] == sum(len(r.continuations) for r in requests)


def test_greedy_continuations_are_found() -> None:
    model = tiny_gpt()
    context = [5, 17, 40]
    ids = list(context)
    for _ in range(4):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    greedy = ids[3:]
    wrong = [*greedy[:3], (greedy[3] + 1) % 97]
    for continuations in ([greedy, wrong, greedy[:1]], [greedy], [wrong]):
        (answer,) = log_likelihoods(model, [Request(context, continuations)], 8)
        assert [a.is_greedy for a in answer] == [each is not wrong for each in continuations]


def test_cropped_contexts_are_counted() -> None:
    ids = list(range(20))
    assert not is_cropped(Request(ids, [[1, 2, 3, 4, 5]]), 24)  # the last token needs no position
    assert is_cropped(Request(ids, [[1], [1, 2, 3, 4, 5, 6]]), 24)


def test_ending_longer_than_the_context_is_refused() -> None:
    requests = [Request([1], [[2]]), Request([1], [[2], [3] * 25])]
    with pytest.raises(ValueError, match="example 2: an ending has 25 tokens, the model reads 24"):
        log_likelihoods(tiny_gpt(), requests, 8)


def test_damaged_weights_are_refused() -> None:
    model = tiny_gpt()
    with torch.no_grad():
        model.final_norm.bias[0] = torch.nan
    with pytest.raises(ValueError, match="logits: are not finite"):
        log_likelihoods(model, [Request([1], [[2], [3, 4]])], 8)


def test_texts_are_split_as_the_harness_splits_them() -> None:
    request = encode_request(GPT2, "The clock ", [" strikes", "ticks"])
    assert request.context == GPT2.encode_prompt("The clock")
    assert [GPT2.decode(ids) for ids in request.continuations] == ["  strikes", " ticks"]
    assert encode_request(GPT2, "", ["x"]).context == [GPT2.end_of_text_id]


def check_hellaswag(source: Path, peer: Any, file: Path) -> None:
    """Log-likelihoods and numbers of right answers are those of a plain loop over transformers."""
    model, tokenizer = load_for_text(str(source), device="cpu")
    examples = read_choices(str(file))
    requests = choice_requests(tokenizer, examples)
    keep = [i for i, r in enumerate(requests) if r.longest <= model.config.context_length]
    examples, requests = [examples[i] for i in keep], [requests[i] for i in keep]
    answers = log_likelihoods(model, requests, 32)
    counts, expected = [0, 0], [0, 0]
    for example, request, answer in zip(examples, requests, answers, strict=True):
        plain = []
        for ids in request.continuations:
            whole = [*request.context, *ids][-model.config.context_length - 1 :]
            plain.append(plain_logprobs(peer, whole, len(whole) - len(ids))[0])
        assert [a.logprob for a in answer] == pytest.approx(plain, abs=1e-4)
        for numbers, scores in ((counts, [a.logprob for a in answer]), (expected, plain)):
            chosen = chosen_endings(example, scores)
            for i in range(2):
                numbers[i] += chosen[i] == example.label
    assert counts == expected
    assert len(examples) >= 20
    assert 0 < counts[0] < len(examples)


def test_hellaswag_is_that_of_transformers(source: Path, peer: Any, tmp_path: Path) -> None:
    check_hellaswag(source, peer, some_hellaswag(24, tmp_path))


@pytest.mark.nightly
def test_all_of_hellaswag_is_that_of_transformers(source: Path, peer: Any, tmp_path: Path) -> None:
    check_hellaswag(source, peer, some_hellaswag(10_042, tmp_path))
