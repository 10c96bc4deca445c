"""Log-likelihoods: batches, shared contexts and crops give what one text at a time gives."""

import random
from collections.abc import Sequence

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
from gpt_lightning.model.gpt import GPTModel
from helpers import tiny_gpt


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
