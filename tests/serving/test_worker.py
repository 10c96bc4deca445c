"""Requests that share a model: their texts, their ends, and what one request's fault does to the others."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.generation.engine import stream_ids
from gpt_lightning.generation.sampling import SamplingParams, sample_rows
from gpt_lightning.model.kv_cache import KVCache
from gpt_lightning.serving import worker as serving_worker
from gpt_lightning.serving.generation_request import (
    BusyError,
    EndEvent,
    Generation,
    PromptEvent,
    RowRequest,
    TokenEvent,
    TooSlowError,
)
from gpt_lightning.serving.model_thread import ModelThread
from gpt_lightning.serving.token_scores import TokenScore
from gpt_lightning.serving.worker import ModelWorker, WorkerLimits
from helpers import make_generator, tiny_gpt2_vocabulary

MODEL = tiny_gpt2_vocabulary()
RANDOM = SamplingParams(temperature=1.0, top_k=50)


@pytest.fixture
def thread() -> Iterator[ModelThread]:
    thread = ModelThread()
    yield thread
    thread.close()


@pytest.fixture
def worker(thread: ModelThread) -> ModelWorker:
    return ModelWorker(MODEL, GPT2, thread, WorkerLimits(max_batch=4))


def request(
    prompt: list[int], max_new_tokens: int = 12, seed: int = 1, **changes: Any
) -> RowRequest:
    return replace(RowRequest(prompt, max_new_tokens, RANDOM, seed), **changes)


async def ids_of(generation: Generation) -> list[list[int]]:
    """New ids of each row."""
    rows: list[list[int]] = [[] for _ in generation.rows]
    async for event in generation:
        if isinstance(event, TokenEvent):
            rows[event.row].append(event.token)
    return rows


def generated(request: RowRequest) -> list[int]:
    """New ids of ``generate`` for the same request."""
    steps = stream_ids(
        MODEL,
        [request.prompt],
        request.max_new_tokens,
        request.sampling,
        eos_id=request.eos_id,
        generator=make_generator(request.seed or 0),
    )
    return [int(ids[0]) for ids in steps]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        RANDOM,
        SamplingParams(temperature=0.7, top_p=0.8, min_p=0.001),
        SamplingParams(temperature=1.5, repetition_penalty=1.8),
    ],
    ids=str,
)
def test_requests_that_share_steps_have_the_tokens_of_generate(
    worker: ModelWorker, sampling: SamplingParams
) -> None:
    requests = [
        request([7 * n + 1] * (1 + 5 * n % 23), 3 + 4 * n, seed=n, sampling=sampling)
        for n in range(11)
    ]

    async def all_at_once() -> list[list[list[int]]]:
        return await asyncio.gather(*(ids_of(worker.submit(r)) for r in requests))

    assert [rows[0] for rows in asyncio.run(all_at_once())] == [generated(r) for r in requests]


def test_rows_of_one_request_keep_their_numbers(worker: ModelWorker) -> None:
    requests = [request([3, 4], 2 + n % 3, seed=n) for n in range(9)]

    async def one_request() -> list[list[int]]:
        return await ids_of(worker.submit(*requests))

    assert asyncio.run(one_request()) == [generated(r) for r in requests]


async def _events(generation: Generation) -> list[Any]:
    return [event async for event in generation]


def test_scores_are_the_models_own_distribution(worker: ModelWorker) -> None:
    prompt = [40, 367, 2885]
    asked = request(prompt, 4, num_top=3, scores_prompt=True, num_candidates=5)
    first, *tokens, end = asyncio.run(_run(lambda: _events(worker.submit(asked))))
    assert isinstance(first, PromptEvent)
    assert isinstance(end, EndEvent)
    ids = prompt + [event.token for event in tokens]
    logprobs = MODEL(torch.tensor([ids]))[0].log_softmax(dim=-1)
    scores: list[TokenScore] = first.scores + [event.score for event in tokens]
    for position, (token, score) in enumerate(zip(ids[1:], scores, strict=True)):
        row = logprobs[position]
        assert score.token == token
        assert score.logprob == pytest.approx(row[token].item(), abs=1e-5)
        assert score.rank == int((row > row[token]).sum()) + 1
        assert [t for t, _ in score.top] == row.topk(3).indices.tolist()
    for (
        event
    ) in tokens:  # top_k 50: what is chosen is one of 50, and the five shown are the most probable
        shown = [c.probability for c in event.candidates]
        assert shown == sorted(shown, reverse=True)
        assert all(c.probability > c.model_probability for c in event.candidates)


async def _run(function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return await function()


def test_stop_string_and_end_of_text_end_a_row(worker: ModelWorker) -> None:
    whole = generated(request([1, 2], 12))
    text = GPT2.decode(whole)
    stop = text[5:9]

    async def ends() -> Any:
        stopped = await _events(worker.submit(request([1, 2], 12, stop=(stop,))))
        ended = await _events(worker.submit(request([1, 2], 12, eos_id=whole[4])))
        return stopped, ended

    stopped, ended = asyncio.run(ends())
    assert "".join(e.text for e in stopped[1:]) == text[: text.index(stop)]
    assert (stopped[-1].reason, stopped[-1].length) == ("stop", text.index(stop))
    assert [e.token for e in ended[1:-1]] == whole[:4]
    assert (ended[-1].reason, ended[-1].has_eos) == ("stop", True)


def test_canceled_request_frees_its_row(worker: ModelWorker) -> None:
    endless = request([5], 100_000)

    async def cancel_four() -> list[list[int]]:
        generations = [worker.submit(endless) for _ in range(4)]  # every row is taken
        waiting = asyncio.create_task(ids_of(worker.submit(request([3], 5))))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        generations[0].cancel()
        return await asyncio.wait_for(waiting, 20)

    assert asyncio.run(cancel_four())[0] == generated(request([3], 5))


def test_full_queue_says_when_to_come_back(thread: ModelThread) -> None:
    worker = ModelWorker(MODEL, GPT2, thread, WorkerLimits(max_batch=1, max_queue=2))

    async def fill() -> BusyError:
        generations = [worker.submit(request([5], 100_000))]
        await asyncio.sleep(0.2)
        generations += [worker.submit(request([5], 3)) for _ in range(2)]
        with pytest.raises(BusyError) as refused:
            worker.submit(request([5], 3))
        generations[0].cancel()
        for generation in generations[1:]:
            await ids_of(generation)
        await ids_of(worker.submit(request([5], 3)))
        return refused.value

    assert 1 <= asyncio.run(fill()).retry_after <= 60


def test_request_ends_at_its_deadline(thread: ModelThread) -> None:
    worker = ModelWorker(MODEL, GPT2, thread, WorkerLimits(timeout=0.3))

    async def wait() -> float:
        start = time.monotonic()
        with pytest.raises(TooSlowError, match=r"0\.3 seconds"):
            await ids_of(worker.submit(request([5], 100_000)))
        return time.monotonic() - start

    assert 0.3 <= asyncio.run(wait()) < 10


def test_damaged_weights_fail_the_request_and_not_the_thread(thread: ModelThread) -> None:
    damaged = tiny_gpt2_vocabulary()
    torch.nn.init.constant_(damaged.final_norm.weight, torch.nan)
    bad, good = (ModelWorker(m, GPT2, thread, WorkerLimits()) for m in (damaged, MODEL))

    async def both() -> list[list[int]]:
        for asked in (request([5]), request([5, 6], num_top=1, scores_prompt=True)):
            with pytest.raises(ValueError, match=r"finite|NaN"):
                await ids_of(bad.submit(asked))
        return await ids_of(good.submit(request([5])))

    assert asyncio.run(both())[0] == generated(request([5]))


def test_lack_of_memory_fails_one_request_only(
    worker: ModelWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = KVCache.allocate

    def without_memory(config: Any, batch_size: int, max_length: int, *rest: Any) -> KVCache:
        if max_length >= 20:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return allocate(config, batch_size, max_length, *rest)

    monkeypatch.setattr(KVCache, "allocate", staticmethod(without_memory))

    async def three() -> list[Any]:
        asked = [request([5], 6), request([5] * 20, 2), request([6], 6)]
        return await asyncio.gather(
            *(ids_of(worker.submit(r)) for r in asked), return_exceptions=True
        )

    first, second, third = asyncio.run(three())
    assert isinstance(second, MemoryError)
    assert [first[0], third[0]] == [generated(request([5], 6)), generated(request([6], 6))]


@pytest.mark.parametrize("max_new_tokens", [1, 5])
def test_lack_of_memory_while_sampling_fails_one_request_only(
    worker: ModelWorker, monkeypatch: pytest.MonkeyPatch, max_new_tokens: int
) -> None:
    def without_memory(
        logits: torch.Tensor, sampling: SamplingParams, generators: Any, **rest: Any
    ) -> Any:
        if len(generators) > 1 or generators[0].initial_seed() == 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return sample_rows(logits, sampling, generators, **rest)

    monkeypatch.setattr(serving_worker, "sample_rows", without_memory)

    async def three() -> list[Any]:
        asked = [request([5], max_new_tokens, seed) for seed in (1, 2, 3)]
        waiting = asyncio.gather(*(ids_of(worker.submit(r)) for r in asked), return_exceptions=True)
        return await asyncio.wait_for(waiting, 60)

    first, second, third = asyncio.run(three())
    assert isinstance(second, MemoryError)
    assert first[0] == generated(request([5], max_new_tokens, 1))
    assert third[0] == generated(request([5], max_new_tokens, 3))


def test_lack_of_memory_in_a_step_fails_the_longest_row(
    worker: ModelWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = MODEL.features

    def without_memory(idx: torch.Tensor, *rest: Any) -> torch.Tensor:
        if idx.shape == (2, 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return features(idx, *rest)

    monkeypatch.setattr(MODEL, "features", without_memory)

    async def two() -> list[Any]:
        asked = [request([5], 9), request([5] * 9, 9)]
        waiting = asyncio.gather(*(ids_of(worker.submit(r)) for r in asked), return_exceptions=True)
        return await asyncio.wait_for(waiting, 60)

    first, second = asyncio.run(two())
    assert first[0] == generated(request([5], 9))
    assert isinstance(second, MemoryError)


@pytest.mark.parametrize("max_new_tokens", [1, 5])
def test_fault_of_ours_ends_its_requests_and_not_the_thread(
    worker: ModelWorker, monkeypatch: pytest.MonkeyPatch, max_new_tokens: int
) -> None:
    def faulty(*args: Any, **rest: Any) -> Any:
        raise KeyError("a fault")

    async def one() -> list[list[int]]:
        return await asyncio.wait_for(ids_of(worker.submit(request([5], max_new_tokens))), 20)

    with monkeypatch.context() as patch:
        patch.setattr(serving_worker, "sample_rows", faulty)
        with pytest.raises(KeyError):
            asyncio.run(one())
    assert asyncio.run(one())[0] == generated(request([5], max_new_tokens))


def test_jobs_run_between_steps_and_their_errors_reach_the_caller(worker: ModelWorker) -> None:
    async def job_beside_text() -> int:
        endless = worker.submit(request([5], 100_000))
        await asyncio.sleep(0.05)
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda: 1 // 0)
        result = await asyncio.wait_for(worker.run(lambda: 6 * 7), 20)
        endless.cancel()
        return result

    assert asyncio.run(job_beside_text()) == 42


def test_large_request_does_not_keep_small_ones_waiting(worker: ModelWorker) -> None:
    async def order() -> list[str]:
        ended = []

        async def wait(name: str, *requests: RowRequest) -> None:
            await ids_of(worker.submit(*requests))
            ended.append(name)

        large = asyncio.create_task(wait("large", *[request([1], 20, seed=n) for n in range(60)]))
        await asyncio.sleep(0)
        await asyncio.gather(wait("small", request([2], 20)), large)
        return ended

    assert asyncio.run(order()) == ["small", "large"]


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({"max_batch": 0}, "max_batch"),
        ({"max_queue": -1}, "max_queue"),
        ({"timeout": 0.0}, "timeout"),
    ],
)
def test_limits_out_of_range_are_refused(limits: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        WorkerLimits(**limits)
