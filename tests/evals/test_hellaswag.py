"""HellaSwag as a plain loop over transformers sees it, for a random and a trained model."""

from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.evals.likelihood import log_likelihoods
from gpt_lightning.evals.multiple_choice import choice_requests, chosen_endings
from gpt_lightning.evals.task_files import ChoiceExample, read_choices
from gpt_lightning.pretrained.load import load_for_text
from plain_likelihood import plain_logprobs, some_hellaswag
from servers import write_tiny_model

ALL = 10_042
TIE = 1e-4  # two endings that are nearer to each other may change places


def peer_of(folder: Path) -> Any:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder).eval()


def right(example: ChoiceExample, logprobs: list[float]) -> list[bool]:
    """Whether the answer is right, plain and per character."""
    return [chosen == example.label for chosen in chosen_endings(example, logprobs)]


def is_tie(example: ChoiceExample, logprobs: list[float]) -> list[bool]:
    """Whether the two best endings are equally good, plain and per character."""
    per_character = [p / len(e) for p, e in zip(logprobs, example.endings, strict=True)]
    found = []
    for scores in (logprobs, per_character):
        second, best = sorted(scores)[-2:]
        found.append(best - second < TIE)
    return found


def check_hellaswag(source: Path, peer: Any, file: Path, tolerance: float) -> tuple[int, list[int]]:
    """Compare all examples whose endings fit; return their number and those that are right."""
    model, tokenizer = load_for_text(str(source), device="cpu")
    context_length = model.config.context_length
    examples = read_choices(str(file))
    requests = choice_requests(tokenizer, examples)
    keep = [i for i, r in enumerate(requests) if r.longest <= context_length]
    examples, requests = [examples[i] for i in keep], [requests[i] for i in keep]
    counts, expected, ties = [0, 0], [0, 0], [0, 0]
    worst = 0.0
    answers = log_likelihoods(model, requests, 32)
    for example, request, answer in zip(examples, requests, answers, strict=True):
        plain = []
        for ids in request.continuations:
            whole = [*request.context, *ids][-context_length - 1 :]
            plain.append(plain_logprobs(peer, whole, len(whole) - len(ids)))
        ours = [each.logprob for each in answer]
        worst = max(worst, *(abs(a - b) for a, b in zip(ours, plain, strict=True)))
        tied = is_tie(example, plain)
        for i in range(2):
            mine, theirs = right(example, ours)[i], right(example, plain)[i]
            counts[i] += mine
            expected[i] += theirs
            ties[i] += tied[i]
            if tied[i]:
                print(f"tie: {example.context!r}, {plain}")
            assert mine == theirs or tied[i], (example, ours, plain)
    print(
        f"{len(examples)} examples, {counts} right, {expected} by transformers, {ties} ties, difference {worst:.1e}"
    )
    assert worst <= tolerance
    return len(examples), counts


def test_hellaswag_is_that_of_transformers(source: Path, peer: Any, tmp_path: Path) -> None:
    number, counts = check_hellaswag(source, peer, some_hellaswag(24, tmp_path), 1e-4)
    assert number >= 20
    assert 0 < counts[0] < number


@pytest.mark.slow
def test_hellaswag_of_a_trained_model_is_that_of_transformers(
    trained: Path, tmp_path: Path
) -> None:
    number, counts = check_hellaswag(trained, peer_of(trained), some_hellaswag(300, tmp_path), 1e-3)
    assert number == 300
    assert 40 < counts[0] < 200


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["random", "trained"])
def test_all_of_hellaswag_is_that_of_transformers(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    if kind == "trained":
        folder = request.getfixturevalue("trained")
    else:
        folder = write_tiny_model(tmp_path / "tiny", context_length=256)
    number, counts = check_hellaswag(folder, peer_of(folder), some_hellaswag(ALL, tmp_path), 1e-3)
    assert number == ALL
    assert ALL / 5 < counts[0] < ALL / 2  # a guess is right in a quarter
