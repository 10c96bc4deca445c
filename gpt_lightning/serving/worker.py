"""One thread that calls the models: requests share decoding steps, jobs run between two steps."""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar, final

import torch
from torch import Tensor

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.generation.sampling import SamplingParams, make_generator, sample_rows
from gpt_lightning.generation.text import IncrementalDetokenizer
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.serving.batch import DecodeBatch, DecodedRow
from gpt_lightning.serving.token_scores import (
    Candidate,
    TokenScore,
    candidates,
    score_prompt,
    score_tokens,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_JOBS = 32  # jobs that wait
MAX_PREFILL_TOKENS = 2048  # of new rows that are computed together, unless one row has more
MAX_RETRY_AFTER = 60  # seconds
MAX_TIMEOUT = 86_400  # seconds

FinishReason = Literal["stop", "length"]


class BusyError(Exception):
    """Too many requests wait. ``retry_after`` is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the model is busy: too many requests wait")
        self.retry_after = retry_after


class TooSlowError(Exception):
    """A request did not end before its deadline."""


@dataclass(frozen=True)
class TextRequest:
    """One continuation of a prompt.

    Attributes:
        seed: Of the row's random generator; ``None``: a random one.
        num_top: Report a score of each new token, with this number of most probable tokens; ``None``: no scores.
        num_candidates: Report this number of tokens that each new token was chosen from; 0: none.
        scores_prompt: Whether the tokens of the prompt are scored, too.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    eos_id: int | None = None
    stop: tuple[str, ...] = ()
    num_top: int | None = None
    num_candidates: int = 0
    scores_prompt: bool = False


@dataclass(frozen=True)
class PromptEvent:
    """A row's prompt has been computed. ``scores`` has one entry per token but the first, if asked for."""

    row: int
    scores: list[TokenScore]


@dataclass(frozen=True)
class TokenEvent:
    """A row has one more token.

    Attributes:
        text: Text that became visible with it; text that may begin a stop string is withheld.
        offset: Position in the row's new text at which the token begins.
    """

    row: int
    token: int
    text: str
    offset: int
    score: TokenScore | None
    candidates: list[Candidate]


@dataclass(frozen=True)
class EndEvent:
    """A row has ended. ``text`` is the rest of its text, ``length`` the number of characters of all of it."""

    row: int
    text: str
    length: int
    reason: FinishReason


Event = PromptEvent | TokenEvent | EndEvent


@final
class Generation:
    """The rows of one request while they are generated: an asynchronous iterator of events.

    Iterating raises ``ValueError`` if the logits are not finite, ``MemoryError`` if there is no memory, and
    :class:`TooSlowError` after the deadline.
    """

    def __init__(self, requests: Sequence[TextRequest], deadline: float) -> None:
        self.requests = requests
        self.deadline = deadline
        self.is_canceled = False
        self.num_started = 0
        self.num_ended = 0
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[Event] | Exception | None] = asyncio.Queue()

    @property
    def is_over(self) -> bool:
        return self.is_canceled or self.num_ended == len(self.requests)

    def cancel(self) -> None:
        """End all rows: nobody waits for them."""
        self.is_canceled = True

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while (events := await self._events.get()) is not None:
                if isinstance(events, Exception):
                    raise events
                for event in events:
                    yield event
        finally:
            self.cancel()

    def send(self, events: "list[Event] | Exception | None") -> None:
        """Hand events to the iterator, from the thread of the models; ``None``: there are no more."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, events)
        except RuntimeError:  # the event loop is closed: the server has stopped
            self.is_canceled = True


@dataclass(eq=False)
class _Row(DecodedRow):
    """A row of a :class:`Generation`."""

    generation: Generation
    number: int
    request: TextRequest
    generator: torch.Generator
    text: IncrementalDetokenizer


@final
class ModelThread:
    """The one thread that calls models: two at once would share the processors and each be slower.

    It takes one job, then one decoding step of every model, and begins again.

    Attributes:
        executor: Threads that help it to draw random numbers.
    """

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(torch.get_num_threads(), "draws")
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._workers: list[ModelWorker] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[], T]) -> T:
        """Result of ``function()``, called between two decoding steps. Raises :class:`BusyError` if too many wait."""
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:  # the caller gets it
                future.set_exception(error)

        with self._changed:
            if len(self._jobs) >= MAX_JOBS or self._is_closing:
                raise BusyError(1)
            self._jobs.append(job)
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def add_worker(self, worker: "ModelWorker") -> None:
        with self._changed:
            self._workers.append(worker)

    def remove_worker(self, worker: "ModelWorker") -> None:
        with self._changed:
            self._workers.remove(worker)

    def notify(self) -> None:
        """Say that a worker has something to do."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """End the thread after the step that is being computed."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        self.executor.shutdown()

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._changed:
                while not (
                    self._is_closing or self._jobs or any(w.has_work for w in self._workers)
                ):
                    self._changed.wait()
                if self._is_closing:
                    return
                job = self._jobs.popleft() if self._jobs else None
                workers = [w for w in self._workers if w.has_work]
            if job is not None:
                job()
            for worker in workers:
                worker.step()


@dataclass(frozen=True)
class WorkerLimits:
    """Limits of the requests to one model.

    Args:
        max_batch: Rows that are decoded together.
        max_queue: Requests that may wait for a row.
        timeout: Seconds after which a request is given up.
    """

    max_batch: int = 16
    max_queue: int = 64
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError(f"max_batch: {self.max_batch} is too small; give 1 or more")
        if self.max_queue < 0:
            raise ValueError(f"max_queue: {self.max_queue} is negative; give 0 or more")
        if not 0 < self.timeout <= MAX_TIMEOUT:
            raise ValueError(
                f"timeout: {self.timeout:g} is out of range; give more than 0 and at most {MAX_TIMEOUT:,} seconds"
            )


@final
class ModelWorker:
    """Requests to one model: those that wait, and those that share decoding steps."""

    def __init__(
        self,
        model: GPTModel,
        tokenizer: Tokenizer,
        thread: ModelThread,
        limits: WorkerLimits,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._thread = thread
        self._executor = thread.executor
        self._limits = limits
        self._batch: DecodeBatch[_Row] = DecodeBatch(model)
        self._lock = threading.Lock()
        self._waiting: deque[Generation] = deque()  # requests with rows that have not started
        self._is_closed = False
        self._seconds = 1.0  # a running mean of the time of a request
        thread.add_worker(self)

    async def run(self, function: Callable[[], T]) -> T:
        """Result of ``function()``, called on the thread of the models between two decoding steps."""
        return await self._thread.run(function)

    def submit(self, *requests: TextRequest) -> Generation:
        """Queue the rows of one request. Call it in the event loop that reads the events.

        Raises:
            BusyError: Too many requests wait, or the model is being replaced.
        """
        with self._lock:
            if self._is_closed:
                raise BusyError(1)
            waiting = sum(g.num_started == 0 and not g.is_over for g in self._waiting)
            # as many as free rows will start with the next step, so they do not wait
            free = max(0, self._limits.max_batch - len(self._batch.rows))
            if waiting >= self._limits.max_queue + free:
                seconds = self._seconds * waiting / self._limits.max_batch
                raise BusyError(min(MAX_RETRY_AFTER, max(1, math.ceil(seconds))))
            generation = Generation(requests, time.monotonic() + self._limits.timeout)
            self._waiting.append(generation)
        self._thread.notify()
        return generation

    def close(self) -> None:
        """Give up all requests."""
        self._thread.remove_worker(self)
        with self._lock:
            self._is_closed = True
            generations = {*self._waiting, *(row.generation for row in self._batch.rows)}
            self._waiting.clear()
        for generation in generations:
            self._fail(generation, TooSlowError("the model was replaced or the server stops"))

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._batch.rows)

    def step(self) -> None:
        """Start waiting rows, then continue all rows by one token. Called by the thread of the models."""
        try:
            self._remove_abandoned()
            if self._batch.rows:
                self._continue(*self._batch.step())
            if new := self._next_rows():
                self._start(new)
        except Exception as error:  # a fault of ours must not end the thread
            logger.exception("serving: a decoding step failed")
            for generation in {row.generation for row in self._batch.rows}:
                self._fail(generation, error)
            self._batch = DecodeBatch(self._model)

    def _remove_abandoned(self) -> None:
        now = time.monotonic()
        with self._lock:
            generations = {*self._waiting, *(row.generation for row in self._batch.rows)}
        for generation in generations:
            if now > generation.deadline and not generation.is_over:
                self._fail(
                    generation, TooSlowError(f"not done after {self._limits.timeout:g} seconds")
                )
        with self._lock:
            self._waiting = deque(g for g in self._waiting if not g.is_over)
        for row in self._batch.rows:
            if row.generation.is_canceled:
                self._batch.remove(row)

    def _next_rows(self) -> list[_Row]:
        """Rows that start now: of the waiting requests one row each in turn, as long as there are free rows."""
        rows: list[_Row] = []
        num_tokens = 0
        with self._lock:
            while self._waiting and len(self._batch.rows) + len(rows) < self._limits.max_batch:
                generation = self._waiting[0]
                number = generation.num_started
                request = generation.requests[number]
                num_tokens += min(len(request.prompt), self._model.config.context_length)
                if rows and num_tokens > MAX_PREFILL_TOKENS:
                    break
                self._waiting.popleft()
                generation.num_started += 1
                if generation.num_started < len(generation.requests):
                    self._waiting.append(generation)
                rows.append(self._new_row(generation, number, request))
        return rows

    def _new_row(self, generation: Generation, number: int, request: TextRequest) -> _Row:
        device = self._model.tok_emb.weight.device
        if request.seed is None:
            generator = torch.Generator(device=device)
            generator.seed()
        else:
            generator = make_generator(request.seed, device)
        return _Row(
            ids=list(request.prompt),
            max_length=len(request.prompt) + request.max_new_tokens,
            generation=generation,
            number=number,
            request=request,
            generator=generator,
            text=IncrementalDetokenizer(request.stop, self._tokenizer),
        )

    def _start(self, rows: list[_Row]) -> None:
        """Compute the prompts of new rows, and their first tokens."""
        try:
            features = self._batch.add(rows)
            logits = self._model.head(features[:, -1])
        except (MemoryError, RuntimeError) as error:
            for row in rows:
                self._batch.remove(row)
            if len(rows) > 1:  # find the row that needs too much memory
                for row in rows:
                    self._start([row])
                return
            self._fail_row(rows[0], error)
            return
        started = []
        for i, row in enumerate(rows):
            scores: list[TokenScore] = []
            if row.request.scores_prompt:
                ids = row.ids[-self._model.config.context_length :]
                try:
                    scores = score_prompt(
                        self._model,
                        features[i, features.shape[1] - len(ids) :],
                        ids,
                        row.request.num_top or 0,
                    )
                except (MemoryError, RuntimeError, ValueError) as error:
                    self._batch.remove(row)
                    self._fail_row(row, error)
                    continue
            row.generation.send([PromptEvent(row.number, scores)])
            if row.num_remaining == 0:
                self._end(row, "length")
            else:
                started.append(i)
        if started:
            self._continue([rows[i] for i in started], logits[started])

    def _continue(self, rows: list[_Row], logits: Tensor) -> None:
        """Sample one token for each row from logits ``(R, V)``."""
        finite = logits.amax(dim=-1).isfinite().tolist()
        groups: dict[SamplingParams, list[int]] = {}
        for i, row in enumerate(rows):
            if finite[i]:
                groups.setdefault(row.request.sampling, []).append(i)
            else:
                self._batch.remove(row)
                self._fail_row(
                    row, ValueError("logits: are not finite; the model's weights are damaged")
                )
        tokens: dict[int, int] = {}
        shown: dict[int, list[Candidate]] = {}
        for sampling, members in groups.items():
            part = logits if len(members) == len(rows) else logits[members]
            ids = None
            if sampling.repetition_penalty != 1.0:
                ids = _padded([rows[i].ids for i in members], logits.device)
            generators = [rows[i].generator for i in members]
            sampled = sample_rows(part, sampling, generators, ids=ids, executor=self._executor)
            tokens |= zip(members, sampled.tolist(), strict=True)
            for n, i in enumerate(members):
                if num := rows[i].request.num_candidates:
                    previous = None if ids is None else ids[n : n + 1]
                    shown[i] = candidates(part[n : n + 1], sampling, num, previous)
        scores = self._scores(rows, tokens, logits)
        for i, token in tokens.items():
            self._add_token(rows[i], token, scores.get(i), shown.get(i, []))

    def _scores(
        self, rows: list[_Row], tokens: dict[int, int], logits: Tensor
    ) -> dict[int, TokenScore]:
        """Scores of the new tokens, by row, of the rows that ask for them."""
        asked = {i: num for i in tokens if (num := rows[i].request.num_top) is not None}
        if not asked:
            return {}
        scores = score_tokens(logits[list(asked)], [tokens[i] for i in asked], max(asked.values()))
        return {
            i: replace(score, top=score.top[:num])
            for (i, num), score in zip(asked.items(), scores, strict=True)
        }

    def _add_token(
        self, row: _Row, token: int, score: TokenScore | None, shown: list[Candidate]
    ) -> None:
        """Report the new token of a row, or the row's end."""
        if token == row.request.eos_id:
            self._end(row, "stop")
            return
        row.ids.append(token)
        offset = len(row.text.text)
        row.text.add(token)
        event = TokenEvent(row.number, token, row.text.pop_text(), offset, score, shown)
        row.generation.send([event])
        if row.text.is_over:
            self._end(row, "stop")
        elif row.num_remaining == 0:
            self._end(row, "length")

    def _end(self, row: _Row, reason: FinishReason) -> None:
        self._batch.remove(row)
        row.text.finish()
        generation = row.generation
        generation.send([EndEvent(row.number, row.text.pop_text(), len(row.text.text), reason)])
        generation.num_ended += 1
        if generation.is_over:
            seconds = time.monotonic() - generation.deadline + self._limits.timeout
            self._seconds += 0.1 * (seconds - self._seconds)
            generation.send(None)

    def _fail_row(self, row: _Row, error: Exception) -> None:
        """End the request of a row with an error; a lack of memory becomes ``MemoryError``."""
        if isinstance(error, RuntimeError) and not isinstance(error, ValueError):
            cause = str(error).splitlines()[0]
            if isinstance(error, torch.OutOfMemoryError) or "allocate" in cause:
                error = MemoryError("there is not enough memory for this request")
            else:
                logger.error(f"serving: a request failed: {cause}")
        self._fail(row.generation, error)

    def _fail(self, generation: Generation, error: Exception) -> None:
        if not generation.is_canceled:
            generation.send(error)
            generation.cancel()


def _padded(rows: list[list[int]], device: torch.device) -> Tensor:
    """Ids of rows of different length, ``(R, T)``; -1 where a row has none."""
    width = max(map(len, rows))
    return torch.tensor([[-1] * (width - len(ids)) + ids for ids in rows], device=device)
