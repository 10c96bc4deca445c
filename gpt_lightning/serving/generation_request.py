"""A request for texts, what the thread of the models says about it, and its errors."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from gpt_lightning.generation.sampling import SamplingParams
from gpt_lightning.serving.token_scores import Candidate, TokenScore

FinishReason = Literal["stop", "length"]


class BusyError(Exception):
    """Too many requests wait. ``retry_after`` is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the model is busy: too many requests wait")
        self.retry_after = retry_after


class TooSlowError(Exception):
    """A request did not end before its deadline."""


@dataclass(frozen=True)
class RowRequest:
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
    """A row has ended.

    Attributes:
        text: The rest of its text.
        length: Number of characters of its complete text.
        eos: Score of the end-of-text token, if it ended the row and scores are asked for.
        has_eos: Whether the end-of-text token ended the row.
    """

    row: int
    text: str
    length: int
    reason: FinishReason
    has_eos: bool = False
    eos: TokenScore | None = None


Event = PromptEvent | TokenEvent | EndEvent


@final
class Generation:
    """The rows of one request while they are generated: an asynchronous iterator of events.

    Iterating raises :class:`NonFiniteLogitsError`, ``MemoryError`` if there is no memory, and :class:`TooSlowError` after
    the deadline.
    """

    def __init__(self, rows: Sequence[RowRequest], deadline: float) -> None:
        self.rows = rows
        self.deadline = deadline
        self.is_canceled = False
        self.num_started = 0
        self.num_ended = 0
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[Event] | Exception | None] = asyncio.Queue()

    @property
    def is_over(self) -> bool:
        return self.is_canceled or self.num_ended == len(self.rows)

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
