"""What ``POST /v1/completions`` accepts: OpenAI's fields, checked."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.generation.sampling import SamplingParams
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.serving.api_errors import APIError, validation_error
from gpt_lightning.serving.generation_request import RowRequest
from gpt_lightning.serving.served_model import ServedModel

MAX_CHOICES = 128  # of one prompt
MAX_ROWS = 256  # prompts × choices
MAX_STOPS = 16
MAX_LOGPROBS = 5
_CHOICE_SEED_STEP = 0x9E3779B97F4A7C15  # far apart, so that seeds 1 and 2 do not share choices

# what each field must be, for messages
FIELDS = {
    "model": "the id of a model, see GET /v1/models",
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists; none of them empty",
    "max_tokens": "a whole number, 0 or more",
    "temperature": "a number from 0 to 2",
    "top_p": "a number from 0 to 1",
    "n": f"a whole number from 1 to {MAX_CHOICES}",
    "seed": "a whole number of at most 64 bits",
    "stop": f"a string or a list of at most {MAX_STOPS} strings; none of them empty",
    "logprobs": f"a whole number from 0 to {MAX_LOGPROBS}",
    "echo": "true or false",
    "stream": "true or false",
    "stream_options": 'an object such as {"include_usage": true}',
    "user": "a string",
    "best_of": "left out: it is not supported",
    "frequency_penalty": "left out or 0: it is not supported",
    "presence_penalty": "left out or 0: it is not supported",
    "logit_bias": "left out: it is not supported",
    "suffix": "left out: it is not supported",
}

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class StreamOptions(BaseModel):
    model_config = _STRICT
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI's, against eavesdroppers; without effect here


class CompletionRequest(BaseModel):
    """The body of a request. ``null`` is the default of each field."""

    model_config = _STRICT

    model: str | None = None
    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_ROWS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_ROWS)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def parse_request(body: bytes) -> CompletionRequest:
    """The request in a body; :class:`APIError` with the field's name if it is not valid."""
    try:
        request = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise validation_error(error, FIELDS) from error
    if request.stream_options is not None and not request.stream:
        message = 'stream_options: has no effect without "stream": true; leave it out'
        raise APIError(400, message, param="stream_options")
    return request


async def prompts_of(request: CompletionRequest, served: ServedModel) -> list[list[int]]:
    """Token ids of the prompts. ``<|endoftext|>`` in a string is plain characters."""
    match request.prompt:
        case str(text):
            prompts: list[Any] = [text]
        case [int(), *_] as ids:
            prompts = [ids]
        case entries:
            prompts = entries
    try:
        return [
            await served.worker.encode_prompt(prompt) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
    except ValueError as error:
        raise APIError(400, str(error), param="prompt") from error


def rows_of(
    request: CompletionRequest, prompts: list[list[int]], config: GPTConfig, tokenizer: Tokenizer
) -> list[RowRequest]:
    """One row per prompt and choice. The choices of a prompt are adjacent.

    Raises:
        APIError: The prompts do not fit the model.
    """
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    n = request.n or 1
    if len(prompts) * n > MAX_ROWS:
        message = f"n: {len(prompts)} prompts × {n} choices are more than {MAX_ROWS} texts; send several requests"
        raise APIError(400, message, param="n")
    for ids in prompts:
        if max(ids) >= config.vocab_size:
            message = (
                f"prompt: token {max(ids)} is outside the vocabulary of {config.vocab_size} tokens"
            )
            raise APIError(400, message, param="prompt")
        # the last new token is not read by the model, so it needs no position
        if max(len(ids), len(ids) + max_tokens - 1) > config.context_length:
            message = (
                f"prompt: this model's maximum context length is {config.context_length} tokens; the prompt has "
                f"{len(ids)} and max_tokens is {max_tokens}; shorten one of them"
            )
            code = "context_length_exceeded"
            raise APIError(400, message, param="prompt", code=code)
    sampling = SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        # 0 leaves the most probable token, as the smallest positive number does
        top_p=None if request.top_p in (None, 1.0) else max(request.top_p or 0.0, 1e-300),
    )
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return [
        RowRequest(
            ids,
            max_tokens,
            sampling,
            seed=None if request.seed is None else _choice_seed(request.seed, choice),
            eos_id=tokenizer.end_of_text_id,
            stop=stop,
            num_top=request.logprobs,
            scores_prompt=bool(request.echo) and request.logprobs is not None,
        )
        for ids in prompts
        for choice in range(n)
    ]


def _choice_seed(seed: int, choice: int) -> int:
    """Seed of one choice: the first has the request's own, so that its text is that of ``generate``."""
    return seed if choice == 0 else (seed + choice * _CHOICE_SEED_STEP) % 2**63
