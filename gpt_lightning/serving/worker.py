"""The requests to one model: those that wait, and those that share decoding steps."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar, final

import torch
from torch import Tensor

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.generation.sampling import (
    NonFiniteLogitsError,
    SamplingParams,
    make_generator,
    sample_rows,
)
from gpt_lightning.generation.text import IncrementalDetokenizer
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.serving.batch import DecodeBatch, DecodedRow
from gpt_lightning.serving.generation_request import (
    BusyError,
    EndEvent,
    FinishReason,
    Generation,
    PromptEvent,
    RowRequest,
    TokenEvent,
    TooSlowError,
)
from gpt_lightning.serving.model_thread import ModelThread
from gpt_lightning.serving.token_scores import (
    Candidate,
    TokenScore,
    candidates,
    score_prompt,
    score_tokens,
)

T = TypeVar("T")

MAX_PREFILL_TOKENS = 2048  # of new rows that are computed together, unless one row has more
MAX_INLINE_CHARACTERS = 4096  # of a text that is tokenized in the event loop, in less than 1 ms
MAX_RETRY_AFTER = 60  # seconds
MAX_TIMEOUT = 86_400  # seconds


@dataclass(eq=False)
class _Row(DecodedRow):
    """A row of a :class:`Generation`."""

    generation: Generation
    number: int
    request: RowRequest
    generator: torch.Generator
    text: IncrementalDetokenizer


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
        self._open: set[Generation] = set()  # requests that have not ended
        self._waiting: deque[Generation] = deque()  # those with rows that have not started
        self._is_closed = False
        self._seconds = 1.0  # a running mean of the time of a request
        thread.add_worker(self)

    async def run(self, function: Callable[[], T]) -> T:
        """Result of ``function()``, called on the thread of the models between two decoding steps."""
        return await self._thread.run(function)

    async def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt. Errors are those of :meth:`Tokenizer.encode_prompt`."""
        if len(text) <= MAX_INLINE_CHARACTERS:
            return self._tokenizer.encode_prompt(text)
        # a long text takes a while: the event loop serves the other clients meanwhile
        loop = asyncio.get_running_loop()
        executor = self._thread.text_executor
        return await loop.run_in_executor(executor, self._tokenizer.encode_prompt, text)

    def submit(self, *rows: RowRequest) -> Generation:
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
            generation = Generation(rows, time.monotonic() + self._limits.timeout)
            self._waiting.append(generation)
            self._open.add(generation)
        self._thread.notify()
        return generation

    def close(self) -> None:
        """Give up all requests."""
        self._thread.remove_worker(self)
        with self._lock:
            self._is_closed = True
            generations = set(self._open)
            self._waiting.clear()
        for generation in generations:
            self._fail(generation, TooSlowError("the model was replaced or the server stops"))

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def step(self) -> None:
        """Continue all rows by one token, then start waiting rows. Called by the thread of the models."""
        try:
            self._remove_abandoned()
            if self._batch.rows:
                self._step_all()
            if new := self._next_rows():
                self._start(new)
        except Exception as error:  # a fault of ours must not end the thread
            with self._lock:
                started = [g for g in self._open if g.num_started]
            for generation in started:
                self._fail(generation, error)
            self._batch = DecodeBatch(self._model)

    def _step_all(self) -> None:
        """One decoding step of all rows. Without memory for it, the longest row fails."""
        try:
            rows, logits = self._batch.step()
        except (MemoryError, RuntimeError) as error:
            self._fail_row(max(self._batch.rows, key=lambda row: len(row.ids)), error)
        else:
            self._continue(rows, logits)

    def _remove_abandoned(self) -> None:
        """Forget requests that have ended, or whose client or time is gone."""
        now = time.monotonic()
        with self._lock:
            late = [g for g in self._open if now > g.deadline and not g.is_over]
        for generation in late:
            self._fail(generation, TooSlowError(f"not done after {self._limits.timeout:g} seconds"))
        with self._lock:
            self._open = {g for g in self._open if not g.is_over}
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
                request = generation.rows[number]
                num_tokens += min(len(request.prompt), self._model.config.context_length)
                if rows and num_tokens > MAX_PREFILL_TOKENS:
                    break
                self._waiting.popleft()
                generation.num_started += 1
                if generation.num_started < len(generation.rows):
                    self._waiting.append(generation)
                rows.append(self._new_row(generation, number, request))
        return rows

    def _new_row(self, generation: Generation, number: int, request: RowRequest) -> _Row:
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
            if len(rows) == 1:
                self._fail_row(rows[0], error)
            else:  # find the row that needs too much memory
                for row in rows:
                    self._start([row])
            return
        started = []
        for i, row in enumerate(rows):
            try:
                row.generation.send(
                    [PromptEvent(row.number, self._prompt_scores(row, features[i]))]
                )
            except (MemoryError, RuntimeError, NonFiniteLogitsError) as error:
                self._fail_row(row, error)
                continue
            if row.num_remaining == 0:
                self._end(row, "length")
            else:
                started.append(i)
        if started:
            self._continue([rows[i] for i in started], logits[started])

    def _prompt_scores(self, row: _Row, features: Tensor) -> list[TokenScore]:
        """Scores of a row's prompt from features ``(T, C)``, whose last ones are the row's; empty if not asked for."""
        if not row.request.scores_prompt:
            return []
        ids = row.ids[-self._model.config.context_length :]
        own = features[len(features) - len(ids) :]
        return score_prompt(self._model, own, ids, row.request.num_top or 0)

    def _continue(self, rows: list[_Row], logits: Tensor) -> None:
        """Sample one token for each row from logits ``(R, V)``."""
        groups: dict[SamplingParams, list[int]] = {}
        for i, is_finite in enumerate(logits.amax(dim=-1).isfinite().tolist()):
            if is_finite:
                groups.setdefault(rows[i].request.sampling, []).append(i)
            else:
                self._fail_row(rows[i], NonFiniteLogitsError())
        for members in groups.values():
            part = logits if len(members) == len(rows) else logits[members]
            self._continue_alike([rows[i] for i in members], part)

    def _continue_alike(self, rows: list[_Row], logits: Tensor) -> None:
        """Sample one token for each row from logits ``(R, V)``; all rows have the same settings."""
        try:
            sampled = self._sample(rows, logits)
        except (MemoryError, RuntimeError) as error:
            if len(rows) == 1:
                self._fail_row(rows[0], error)
            else:  # one row needs less memory than all
                for row, row_logits in zip(rows, logits.split(1), strict=True):
                    self._continue_alike([row], row_logits)
            return
        for row, (token, score, shown) in zip(rows, sampled, strict=True):
            self._add_token(row, token, score, shown)

    def _sample(
        self, rows: list[_Row], logits: Tensor
    ) -> list[tuple[int, TokenScore | None, list[Candidate]]]:
        """The new token of each row, its score, and what it was chosen from, if these are asked for."""
        sampling = rows[0].request.sampling
        ids = None
        if sampling.repetition_penalty != 1.0:
            ids = _padded([row.ids for row in rows], logits.device)
        generators = [row.generator for row in rows]
        tokens = sample_rows(
            logits, sampling, generators, ids=ids, executor=self._executor
        ).tolist()
        scores: list[TokenScore | None] = [None] * len(rows)
        nums = {i: num for i, row in enumerate(rows) if (num := row.request.num_top) is not None}
        if nums:
            asked = list(nums)
            scored = score_tokens(logits[asked], [tokens[i] for i in asked], max(nums.values()))
            for i, score in zip(asked, scored, strict=True):
                scores[i] = replace(score, top=score.top[: nums[i]])
        shown: list[list[Candidate]] = []
        for i, row in enumerate(rows):
            num = row.request.num_candidates
            previous = None if ids is None else ids[i : i + 1]
            shown.append(candidates(logits[i : i + 1], sampling, num, previous) if num else [])
        return list(zip(tokens, scores, shown, strict=True))

    def _add_token(
        self, row: _Row, token: int, score: TokenScore | None, shown: list[Candidate]
    ) -> None:
        """Report the new token of a row, or the row's end."""
        if token == row.request.eos_id:
            self._end(row, "stop", has_eos=True, eos=score)
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

    def _end(
        self,
        row: _Row,
        reason: FinishReason,
        *,
        has_eos: bool = False,
        eos: TokenScore | None = None,
    ) -> None:
        self._batch.remove(row)
        row.text.finish()
        generation = row.generation
        text, length = row.text.pop_text(), len(row.text.text)
        generation.send([EndEvent(row.number, text, length, reason, has_eos, eos)])
        generation.num_ended += 1
        if generation.is_over:
            seconds = time.monotonic() - generation.deadline + self._limits.timeout
            self._seconds += 0.1 * (seconds - self._seconds)
            generation.send(None)

    def _fail_row(self, row: _Row, error: Exception) -> None:
        """End the request of a row with an error."""
        self._batch.remove(row)
        self._fail(row.generation, as_memory_error(error))

    def _fail(self, generation: Generation, error: Exception) -> None:
        if not generation.is_canceled:
            generation.send(error)
            generation.cancel()


def as_memory_error(error: Exception) -> Exception:
    """``MemoryError`` if torch says in another way that there is no memory, else ``error`` itself."""
    if isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate" in str(error)
    ):
        return MemoryError("there is not enough memory for this request")
    return error


def _padded(rows: list[list[int]], device: torch.device) -> Tensor:
    """Ids of rows of different length, ``(R, T)``; -1 where a row has none."""
    width = max(map(len, rows))
    return torch.tensor([[-1] * (width - len(ids)) + ids for ids in rows], device=device)
