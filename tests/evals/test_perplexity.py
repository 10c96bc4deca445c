"""Perplexity of pages: windows, definitions, and an independent computation with transformers."""

import math
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.evals.likelihood import log_likelihoods
from gpt_lightning.evals.perplexity import page_requests, page_windows, perplexity_result
from gpt_lightning.evals.task_files import detokenize_wikitext, read_pages
from gpt_lightning.pretrained.load import load_for_text
from plain_likelihood import WIKITEXT, plain_logprobs

PAGE = ' \n = A page = \n \n It has 1 @,@ 000 words , " all " of them ( short ) . \n'


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 40])
def test_windows_predict_each_token_once(length: int, stride: int) -> None:
    ids = list(range(1, length + 1))
    windows = list(page_windows(ids, 0, 8, stride))
    predicted = [token for window in windows for token in window.continuations[0]]
    assert predicted == ids
    for window in windows:
        whole = [*window.context, *window.continuations[0]]
        assert whole == list(range(whole[0], whole[-1] + 1))  # an unbroken part of the page
        assert len(whole) - 1 <= 8
        if whole[0] > 0:  # later windows are full, and have at most ``stride`` new tokens
            assert len(whole) - 1 == 8
            assert len(window.continuations[0]) <= stride


def test_empty_page_has_no_windows() -> None:
    assert list(page_windows([], 0, 8, 8)) == []


def test_wikitext_is_detokenized() -> None:
    assert (
        detokenize_wikitext(PAGE) == '\n= A page =\n\nIt has 1,000 words, "all" of them (short).\n'
    )
    assert detokenize_wikitext("x 's = = Part = = 5 @.@ 1 @-@ N b") == "x's == Part == 5.1-N b"


def test_brackets_are_those_of_the_harness_at_any_length() -> None:
    patterns = ((r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
                (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"))  # fmt: skip
    rng = random.Random(1)
    changed = 0
    for _ in range(2000):
        text = expected = "".join(rng.choices("()[]{}\"'ab \u3000", k=rng.randrange(1, 25)))
        for pattern, replacement in patterns:
            expected = re.sub(pattern, replacement, expected)
        found = detokenize_wikitext(text)
        changed += found != text
        # after the brackets the harness changes only marks and words that are not in these texts
        assert found == expected
    assert changed > 500
    start = time.perf_counter()
    blanks = "\u3000" * 4000
    assert detokenize_wikitext(f"({blanks}") == f"({blanks}"
    assert time.perf_counter() - start < 5  # 20 s and more with the harness's patterns


def plain_bits_per_byte(peer: Any, page: str, context: int) -> float:
    """Bits per byte over disjoint windows, computed with a loop over transformers."""
    ids = [GPT2.end_of_text_id, *GPT2.encode_prompt(detokenize_wikitext(page))]
    total, done = 0.0, 1
    while done < len(ids):
        end = min(done + context, len(ids))
        start = max(0, end - 1 - context)
        total += plain_logprobs(peer, ids[start:end], done - start)
        done = end
    return -total / math.log(2) / len(page.encode())


def check_perplexities(source: Path, peer: Any, pages: list[str]) -> float:
    """Compare with a plain computation; return the perplexity of a word."""
    model, tokenizer = load_for_text(str(source), device="cpu")
    context = model.config.context_length
    requests = page_requests(tokenizer, pages, context, context)
    result = perplexity_result(pages, log_likelihoods(model, requests, 8))
    num_bytes = [len(page.encode()) for page in pages]
    bits = sum(
        plain_bits_per_byte(peer, page, context) * n
        for page, n in zip(pages, num_bytes, strict=True)
    )
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    assert result.bits_per_byte == pytest.approx(bits / sum(num_bytes), rel=1e-4)
    assert result.byte_perplexity == pytest.approx(2 ** (bits / sum(num_bytes)), rel=1e-4)
    assert math.log(result.word_perplexity) == pytest.approx(bits * math.log(2) / words, rel=1e-5)
    assert result.word_perplexity == pytest.approx(2 ** (bits / words), rel=1e-4)
    print(f"perplexity of a word {result.word_perplexity:.1f}")
    return result.word_perplexity


def test_perplexities_are_those_of_a_plain_computation(source: Path, peer: Any) -> None:
    if WIKITEXT.exists():
        pages = [page[:1500] for page in read_pages(str(WIKITEXT))[:2]]
        assert pages[0].startswith(" = Robert <unk> = \n")
    else:
        pages = [PAGE * 40, PAGE * 3]
    check_perplexities(source, peer, pages)


@pytest.mark.slow
def test_perplexities_of_a_trained_model_are_those_of_a_plain_computation(trained: Path) -> None:
    from transformers import GPT2LMHeadModel

    pages = read_pages(str(WIKITEXT))[:3]
    perplexity = check_perplexities(trained, GPT2LMHeadModel.from_pretrained(trained).eval(), pages)
    assert perplexity < 50_257  # of a guess of a word of one token
