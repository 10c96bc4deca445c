"""Answers to ``POST /v1/completions`` in OpenAI's form, complete or in parts."""

import codecs
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.serving.completion_request import CompletionRequest
from gpt_lightning.serving.generation_request import (
    EndEvent,
    Event,
    FinishReason,
    PromptEvent,
    RowRequest,
    TokenEvent,
)
from gpt_lightning.serving.token_scores import TokenScore


@dataclass(frozen=True)
class _TokenEntry:
    """One entry of ``logprobs``."""

    token: int
    offset: int
    score: TokenScore | None
    is_end: bool = False  # the end-of-text token, which has no text


@dataclass
class _Choice:
    """The text of one row that the client does not have yet."""

    text: str = ""
    entries: list[_TokenEntry] = field(default_factory=list)
    num_visible: int = 0  # characters of the text that are decided
    echo_length: int = 0
    finish_reason: FinishReason | None = None


@final
class Completion:
    """One answer while its rows are generated.

    Args:
        rows: One per choice.
    """

    def __init__(
        self,
        request: CompletionRequest,
        model_id: str,
        tokenizer: Tokenizer,
        rows: Sequence[RowRequest],
    ) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._rows = rows
        self._choices = [_Choice() for _ in rows]
        self._header = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_id,
        }
        self._num_new_tokens = 0

    def add(self, event: Event) -> None:
        """Take over what a row has produced."""
        choice, row = self._choices[event.row], self._rows[event.row]
        match event:
            case PromptEvent() if self._request.echo:
                choice.text = self._tokenizer.decode(row.prompt)
                choice.echo_length = choice.num_visible = len(choice.text)
                if row.num_top is not None:
                    scores = [None, *event.scores]
                    offsets = _offsets(self._tokenizer, row.prompt)
                    choice.entries = [
                        _TokenEntry(*entry)
                        for entry in zip(row.prompt, offsets, scores, strict=True)
                    ]
            case TokenEvent():
                self._num_new_tokens += 1
                choice.text += event.text
                choice.num_visible += len(event.text)
                if event.score is not None:
                    offset = choice.echo_length + event.offset
                    choice.entries.append(_TokenEntry(event.token, offset, event.score))
            case EndEvent():
                choice.text += event.text
                choice.num_visible = choice.echo_length + event.length
                choice.finish_reason = event.reason
                self._num_new_tokens += event.has_eos
                if event.eos is not None:
                    entry = _TokenEntry(event.eos.token, choice.num_visible, event.eos, is_end=True)
                    choice.entries.append(entry)

    def answer(self) -> dict[str, Any]:
        """The complete answer, after all events."""
        choices = [self._pop(index) for index in range(len(self._choices))]
        return {**self._header, "choices": choices, "usage": self._usage()}

    def chunk(self, event: Event) -> dict[str, Any] | None:
        """The part of a streamed answer that became known with ``event``; ``None``: nothing."""
        choice = self._choices[event.row]
        if not choice.text and choice.finish_reason is None:
            return None
        content = {**self._header, "choices": [self._pop(event.row)]}
        return {**content, "usage": None} if self._request.includes_usage else content

    def usage_chunk(self) -> dict[str, Any] | None:
        """The last part of a streamed answer, if ``stream_options.include_usage`` asks for it."""
        if not self._request.includes_usage:
            return None
        return {**self._header, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        # the choices of a prompt are adjacent and share its tokens
        n = self._request.n or 1
        num_prompt_tokens = sum(len(row.prompt) for row in self._rows[::n])
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_new_tokens,
            "total_tokens": num_prompt_tokens + self._num_new_tokens,
        }

    def _pop(self, index: int) -> dict[str, Any]:
        """What choice ``index`` has produced since the last call."""
        choice = self._choices[index]
        ready: list[_TokenEntry] = []
        later: list[_TokenEntry] = []
        for entry in choice.entries:
            # the text of a later token is withheld, or belongs to the stop string
            is_ready = entry.is_end or entry.offset < choice.num_visible
            (ready if is_ready or choice.finish_reason == "length" else later).append(entry)
        content = {
            "index": index,
            "text": choice.text,
            "logprobs": None if self._request.logprobs is None else self._logprobs(ready),
            "finish_reason": choice.finish_reason,
        }
        choice.text = ""
        choice.entries = later
        return content

    def _logprobs(self, entries: Sequence[_TokenEntry]) -> dict[str, Any]:
        return {
            "tokens": [self._token_text(entry.token) for entry in entries],
            "token_logprobs": [e.score.logprob if e.score else None for e in entries],
            "top_logprobs": [self._top(e.score) if e.score else None for e in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def _top(self, score: TokenScore) -> dict[str, float]:
        """Log-probabilities of the most probable tokens and of the token itself, as in OpenAI's answers."""
        top = {self._token_text(token): logprob for token, logprob in score.top}
        return top | {self._token_text(score.token): score.logprob}

    def _token_text(self, token: int) -> str:
        r"""Text of a token. One that is not a whole number of characters is ``bytes:\xe2\x80``, as in OpenAI's answers."""
        if token >= len(self._tokenizer.token_bytes):  # of a padded vocabulary
            return f"id:{token}"
        content = self._tokenizer.decode_bytes([token])
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Position in the text at which each token begins; a token within a character begins where the character does."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    offsets = []
    length = 0
    for token in ids:
        offsets.append(length)
        length += len(decoder.decode(tokenizer.decode_bytes([token])))
    return offsets
