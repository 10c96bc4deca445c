"""``serve`` as OpenAI's client sees it."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from gpt_lightning import load_model
from gpt_lightning.data.tokenizer import GPT2
from helpers import Command, json_of
from servers import RunningServer, running_server, write_tiny_model

PROMPT = "Every effort moves you"


def complete(client: openai.OpenAI, **settings: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": PROMPT, **settings})


def generated(command: Command, source: Path, **options: Any) -> str:
    """The continuation that ``generate`` prints."""
    arguments = [f"--{name}={value}" for name, value in options.items()]
    answer = json_of(
        command("generate", "--from", str(source), "--prompt", PROMPT, "--json", *arguments)
    )
    return str(answer["text"].removeprefix(PROMPT))


def test_text_is_that_of_generate(client: openai.OpenAI, command: Command, source: Path) -> None:
    answer = complete(client, max_tokens=20, temperature=0)
    assert answer.choices[0].text == generated(command, source, max_new_tokens=20)
    sampled = complete(client, max_tokens=20, temperature=0.9, top_p=0.9, seed=7)
    options = {"max_new_tokens": 20, "temperature": 0.9, "top_p": 0.9, "seed": 7}
    assert sampled.choices[0].text == generated(command, source, **options)
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 4, "completion_tokens": 20, "total_tokens": 24,
    }  # fmt: skip


def test_defaults_are_openais(client: openai.OpenAI) -> None:
    answer = complete(client, seed=7)  # without a seed, it may sample the end of the text
    assert answer.usage.completion_tokens == 16
    explicit = complete(client, seed=7, max_tokens=16, temperature=1, top_p=1, n=1)
    assert answer.choices == explicit.choices
    assert len({complete(client).choices[0].text for _ in range(3)}) == 3  # no seed


def test_streamed_parts_are_the_complete_answer(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {
        "prompt": [PROMPT, "Yes"], "max_tokens": 24, "n": 3, "seed": 3, "logprobs": 2, "echo": True,
    }  # fmt: skip
    answer = complete(client, **settings)
    chunks = list(complete(client, **settings, stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 40
    *parts, last = chunks
    assert last.choices == []
    assert last.usage == answer.usage
    for choice in answer.choices:
        own = [c.choices[0] for c in parts if c.choices[0].index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        assert [p.finish_reason for p in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [entry for part in own for entry in getattr(part.logprobs, name)]
            expected = getattr(choice.logprobs, name)
            if name == "token_logprobs":
                assert joined[1:] == pytest.approx(expected[1:], abs=1e-4)
            elif name != "top_logprobs":
                assert joined == expected


def test_events_are_server_sent_events(server: RunningServer) -> None:
    body = {"prompt": "a", "max_tokens": 3, "stream": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_echo_with_logprobs_scores_every_token(
    client: openai.OpenAI, source: Path, num_top: int
) -> None:
    text = "Héllo 🦜 wörld, “yes”\n\nno"
    ids = GPT2.encode_prompt(text)
    answer = complete(client, prompt=text, max_tokens=0, echo=True, logprobs=num_top)
    (choice,) = answer.choices
    logprobs = choice.logprobs
    assert (choice.text, choice.finish_reason) == (text, "length")
    assert (
        len(logprobs.tokens)
        == len(logprobs.token_logprobs)
        == len(logprobs.top_logprobs)
        == len(ids)
    )
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    expected = load_model(str(source))(torch.tensor([ids]))[0].log_softmax(dim=-1)
    for n, top in enumerate(logprobs.top_logprobs[1:], 1):
        row = expected[n - 1]
        assert logprobs.token_logprobs[n] == pytest.approx(row[ids[n]].item(), abs=1e-4)
        assert top[logprobs.tokens[n]] == logprobs.token_logprobs[n]  # the same float
        assert num_top <= len(top) <= num_top + 1
        if num_top:
            assert max(top.values()) == pytest.approx(row.max().item(), abs=1e-4)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token
    incomplete = [t for t in logprobs.tokens if t.startswith("bytes:")]
    assert incomplete
    assert all(re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", t) for t in incomplete)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == 0


def test_greedy_token_is_the_most_probable_of_its_top_logprobs(client: openai.OpenAI) -> None:
    logprobs = complete(client, temperature=0, max_tokens=20, logprobs=5).choices[0].logprobs
    for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
        assert top[token] == max(top.values())


def test_prompt_has_four_forms(client: openai.OpenAI) -> None:
    texts = [PROMPT, "Yes, I am"]
    ids = [GPT2.encode_prompt(text) for text in texts]
    settings: dict[str, Any] = {"max_tokens": 8, "temperature": 0.8, "seed": 5}
    alone = [complete(client, prompt=text, **settings).choices[0].text for text in texts]
    for prompts in (texts, ids):
        answer = complete(client, prompt=prompts, **settings)
        assert [(c.index, c.text) for c in answer.choices] == list(enumerate(alone))
    assert complete(client, prompt=ids[1], **settings).choices[0].text == alone[1]
    assert answer.usage.prompt_tokens == sum(map(len, ids))


def test_choices_differ_and_the_first_is_that_of_one(client: openai.OpenAI) -> None:
    texts = [c.text for c in complete(client, n=4, seed=11, max_tokens=16).choices]
    assert len(set(texts)) == 4
    assert texts[0] == complete(client, seed=11, max_tokens=16).choices[0].text
    assert texts == [c.text for c in complete(client, n=4, seed=11, max_tokens=16).choices]


def test_stop_string_ends_the_text_and_its_logprobs(client: openai.OpenAI) -> None:
    whole = complete(client, temperature=0, max_tokens=20).choices[0].text
    stop = whole[7:10]
    for settings in ({"stop": stop}, {"stop": ["\x00never", stop]}):
        (choice,) = complete(client, temperature=0, max_tokens=20, logprobs=0, **settings).choices
        assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
        assert all(offset < len(choice.text) for offset in choice.logprobs.text_offset)
        streamed = complete(client, temperature=0, max_tokens=20, stream=True, **settings)
        assert "".join(c.choices[0].text for c in streamed) == choice.text


def test_models_are_listed_without_their_paths(client: openai.OpenAI, source: Path) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "gpt_lightning")
    assert client.models.retrieve("tiny") == model
    assert str(source.parent) not in model.model_dump_json()


WRONG = [
    ("prompt", 5), ("prompt", []), ("prompt", ""), ("prompt", [[]]), ("prompt", ["a", 1]), ("prompt", [1.5]),
    ("prompt", [-1]), ("prompt", [50257]), ("prompt", [True]), ("prompt", [["a"]]), ("prompt", None), ("prompt", {}),
    ("max_tokens", "5"), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", 10**30),
    ("temperature", "hot"), ("temperature", -0.1), ("temperature", 2.1), ("temperature", [1]),
    ("top_p", 1.1), ("top_p", "all"), ("n", 0), ("n", 129), ("n", 1.0), ("seed", 2**63), ("seed", "7"),
    ("stop", 5), ("stop", ""), ("stop", ["a", ""]), ("stop", ["a"] * 17), ("logprobs", 6), ("logprobs", -1), ("logprobs", True),
    ("echo", 1), ("stream", "yes"), ("stream_options", {"include_usage": True}), ("best_of", 2), ("user", 5),
    ("frequency_penalty", 0.5), ("presence_penalty", -1), ("logit_bias", {"50256": -100}), ("suffix", "end"), ("model", 3),
    ("top_n", 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_wrong_field_is_named(server: RunningServer, name: str, value: Any) -> None:
    body = {"prompt": "a", "max_tokens": 1, name: value}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", name)
    assert error["message"].startswith(f"{name}: ")


def test_defaults_of_unsupported_fields_are_accepted(server: RunningServer) -> None:
    body = {
        "prompt": "a", "max_tokens": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0.0,
        "logit_bias": {}, "suffix": None, "user": "me", "stop": None, "logprobs": None, "top_p": 0,
    }  # fmt: skip
    assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b"null", b'{"prompt": "a",}', b'{"prompt": NaN}', b"\xff\xfe", b"[" * 100_000,
     b'{"prompt": "\\ud800"}', b'{"temperature": Infinity, "prompt": "a"}', b'{"max_tokens": 1}'],
)  # fmt: skip
def test_damaged_body_is_refused(server: RunningServer, body: bytes) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def raised(
    error: type[openai.APIStatusError], function: Callable[[], object]
) -> openai.APIStatusError:
    with pytest.raises(error) as caught:
        function()
    return caught.value


def test_clients_errors_have_their_classes(client: openai.OpenAI) -> None:
    too_long = raised(openai.BadRequestError, lambda: complete(client, prompt="a " * 100))
    assert (too_long.code, too_long.param) == ("context_length_exceeded", "prompt")
    assert "48 tokens" in too_long.message
    unknown = raised(openai.NotFoundError, lambda: complete(client, model="gpt-5"))
    assert (unknown.code, unknown.param) == ("model_not_found", "model")
    raised(openai.NotFoundError, lambda: client.models.retrieve("gpt-5"))
    raised(
        openai.NotFoundError,
        lambda: client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a"}]
        ),
    )


def test_prompt_may_fill_the_context(client: openai.OpenAI) -> None:
    full = [464] * 48
    assert complete(client, prompt=full, max_tokens=1, seed=7).usage.completion_tokens == 1
    assert complete(client, prompt=full[:40], max_tokens=9, seed=7).usage.completion_tokens == 9
    raised(openai.BadRequestError, lambda: complete(client, prompt=full, max_tokens=2))


@pytest.fixture(scope="module")
def ending_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that finds the end of the text most probable, always."""
    return write_tiny_model(tmp_path_factory.mktemp("served") / "ending", ends=True)


@pytest.fixture(scope="module")
def busy_server(ending_source: Path, source: Path) -> Iterator[RunningServer]:
    """A server with one row, no queue, and little patience."""
    arguments = ["--max_batch=1", "--max_queue=0", "--timeout=4"]
    with running_server("serve", "--from", str(source), str(ending_source), *arguments) as running:
        yield running


def test_end_of_text_has_an_entry_and_no_text(busy_server: RunningServer) -> None:
    """lm-evaluation-harness leaves the last entry out, which is that of the new token."""
    url = f"{busy_server.url}/v1/completions"
    body = {
        "model": "ending",
        "prompt": [1, 2, 3],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "echo": True,
    }
    for stream in (False, True):
        answer = httpx.post(url, json={**body, "stream": stream})
        if stream:
            events = [json.loads(e[6:]) for e in answer.text.split("\n\n")[:-2]]
            tokens = [t for event in events for t in event["choices"][0]["logprobs"]["tokens"]]
            choice = events[-1]["choices"][0]
        else:
            (choice,) = answer.json()["choices"]
            tokens = choice["logprobs"]["tokens"]
            assert answer.json()["usage"]["completion_tokens"] == 1
            assert choice["text"] == GPT2.decode([1, 2, 3])
            assert choice["logprobs"]["text_offset"][-1] == len(choice["text"])
        assert choice["finish_reason"] == "stop"
        assert tokens == [*(GPT2.decode([i]) for i in (1, 2, 3)), "<|endoftext|>"]


def test_busy_server_answers_429_with_retry_after(busy_server: RunningServer) -> None:
    long = {"prompt": ["a"] * 200, "max_tokens": 40}
    url = f"{busy_server.url}/v1/completions"
    client = openai.OpenAI(base_url=f"{busy_server.url}/v1", api_key="unused", max_retries=0)
    complete(client, max_tokens=1)  # imports its modules
    with (
        httpx.Client() as other,
        httpx.stream("POST", url, json={**long, "stream": True}) as running,
    ):
        parts = running.iter_bytes()
        next(parts)
        raised(openai.RateLimitError, lambda: complete(client))
        refused = [other.post(url, json={"prompt": "a", "max_tokens": 1}) for _ in range(2)]
    for answer in refused:
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"


def test_request_that_takes_too_long_ends(busy_server: RunningServer) -> None:
    body = {"prompt": ["a"] * 250, "max_tokens": 48, "n": 1}
    url = f"{busy_server.url}/v1/completions"
    for _ in range(20):  # the row of the last test is free soon
        answer = httpx.post(url, json=body, timeout=30)
        if answer.status_code != 429:
            break
        time.sleep(0.2)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "timeout")
    assert "4 seconds" in answer.json()["error"]["message"]
