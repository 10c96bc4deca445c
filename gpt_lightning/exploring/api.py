"""Routes ``/api/*`` of the page: JSON in, JSON out. Errors have the form of the endpoint's."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from importlib.metadata import version
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.exploring.explorer import Explorer, LoadedModel
from gpt_lightning.exploring.inside import hidden_states, layer_names, lens_json
from gpt_lightning.exploring.next_token import (
    MAX_BARS,
    chosen_token_json,
    distribution_json,
)
from gpt_lightning.exploring.scoring import (
    NUM_CANDIDATES,
    score_window,
    score_windows,
    scores_json,
)
from gpt_lightning.exploring.tokens import Json, finite_or_none, token_json, tokens_json
from gpt_lightning.generation.sampling import SamplingParams
from gpt_lightning.serving.api_errors import (
    APIError,
    api_error,
    validation_error,
    with_error_answers,
)
from gpt_lightning.serving.endpoint import EventStream, read_body, server_sent_event
from gpt_lightning.serving.generation_request import EndEvent, Generation, RowRequest, TokenEvent
from gpt_lightning.serving.served_model import ServedModel
from gpt_lightning.serving.token_scores import TokenScore

DEFAULT_PROMPT = "Every effort moves you"
MAX_CHARACTERS = 200_000
MAX_PATH = 20_000
MAX_DRAWS = 10_000
MAX_NEW_TOKENS = 10_000
MAX_POSITIONS = 64
MAX_SCORED_TOKENS = 8192
MAX_ATTENTION_TOKENS = 256
MAX_UNREAD = 50  # tokens before the context that an answer lists
MAX_CHOSEN = 32  # tokens at the end of a path that have a rank and the model's own probability
MAX_CHOSEN_SAMPLED = 16  # … and their probability under the settings, which takes 5 ms each
MAX_CHOSEN_CROPPED = 4  # … if the text exceeds the context: each of them costs a whole window

# what each field must be, for messages
FIELDS = {
    "model": "the id of a model, see GET /api/state",
    "prompt": f"a string of at most {MAX_CHARACTERS:,} characters",
    "path": f"a list of at most {MAX_PATH:,} token ids",
    "sampling": "an object of temperature, top_k, top_p, min_p and repetition_penalty",
    "sampling.temperature": "a number, 0 or more",
    "sampling.top_k": "a whole number from 1, or null",
    "sampling.top_p": "a number above 0 and at most 1, or null",
    "sampling.min_p": "a number above 0 and at most 1, or null",
    "sampling.repetition_penalty": "a number from 0.01 to 100",
    "draws": f"a whole number from 0 to {MAX_DRAWS:,}",
    "seed": "a whole number of at most 64 bits",
    "bars": f"a whole number from 0 to {MAX_BARS}",
    "include_tokens": "true or false",
    "max_new_tokens": f"a whole number from 0 to {MAX_NEW_TOKENS:,}",
    "text": f"a string of at most {MAX_CHARACTERS:,} characters",
    "positions": f"a whole number from 1 to {MAX_POSITIONS}",
    "layer": "a whole number, 0 or more",
    "head": "a whole number, 0 or more, or null for the mean of the heads",
}

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class _Body(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True
    )


class ModelBody(_Body):
    model: str


class SequenceBody(ModelBody):
    """A prompt, and the tokens that were chosen after it."""

    prompt: Text
    path: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_PATH)] = []


class SamplingBody(_Body):
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0


class NextBody(SequenceBody):
    sampling: SamplingBody = SamplingBody()
    draws: Annotated[int, Field(ge=0, le=MAX_DRAWS)] = 0
    seed: Seed = 123
    bars: Annotated[int, Field(ge=0, le=MAX_BARS)] = 40
    include_tokens: bool = True


class GenerateBody(SequenceBody):
    sampling: SamplingBody = SamplingBody()
    max_new_tokens: Annotated[int, Field(ge=0, le=MAX_NEW_TOKENS)] = 50
    seed: Seed = 123


class ScoreBody(ModelBody):
    text: Text


class LensBody(SequenceBody):
    positions: Annotated[int, Field(ge=1, le=MAX_POSITIONS)] = 24


class AttentionBody(SequenceBody):
    layer: Annotated[int, Field(ge=0)]
    head: Annotated[int, Field(ge=0)] | None = None


B = TypeVar("B", bound=ModelBody)


def routes(explorer: Explorer) -> list[Route]:
    """Routes of the page's interface to the models of ``explorer``."""

    async def state(request: Request) -> Response:
        content = {"version": version("gpt-lightning"), "default_prompt": DEFAULT_PROMPT}
        return JSONResponse({**content, "models": await explorer.state()})

    async def load(request: Request) -> Response:
        body = await _read(request, ModelBody)
        return JSONResponse(await explorer.reload(body.model))

    def post(
        name: str, body: type[B], answer: Callable[[LoadedModel, B, Request], Awaitable[Response]]
    ) -> Route:
        async def endpoint(request: Request) -> Response:
            parsed = await _read(request, body)
            async with explorer.use(parsed.model) as loaded:
                return await answer(loaded, parsed, request)

        return Route(f"/api/{name}", with_error_answers(endpoint), methods=["POST"])

    return [
        Route("/api/state", with_error_answers(state)),
        Route("/api/load", with_error_answers(load), methods=["POST"]),
        post("tokens", SequenceBody, _tokens),
        post("next", NextBody, _next),
        post("generate", GenerateBody, _generate),
        post("score", ScoreBody, _score),
        post("lens", LensBody, _lens),
        post("attention", AttentionBody, _attention),
    ]


async def _read(request: Request, body: type[B]) -> B:
    """The body of a request; :class:`APIError` with the field's name if it is not valid."""
    # browsers let other sites' pages send some other types without asking this server
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise APIError(400, "Content-Type: must be application/json")
    try:
        return body.model_validate_json(await read_body(request))
    except ValidationError as error:
        raise validation_error(error, FIELDS) from error


async def _tokens(loaded: LoadedModel, body: SequenceBody, request: Request) -> Response:
    ids = await _ids(loaded, body, may_be_empty=True)
    tokens = tokens_json(loaded.served.tokenizer, ids)
    return JSONResponse({"tokens": tokens, "cropped": _cropped(loaded, ids)})


async def _next(loaded: LoadedModel, body: NextBody, request: Request) -> Response:
    start = time.perf_counter()
    tokenizer = loaded.served.tokenizer
    sampling = _sampling(body.sampling, loaded)
    ids = await _ids(loaded, body)
    cropped = _cropped(loaded, ids)
    # before the first token of a text there is nothing to predict it from
    num_chosen = min(len(body.path), MAX_CHOSEN_CROPPED if cropped else MAX_CHOSEN, len(ids) - 1)
    lengths = range(len(ids) - num_chosen, len(ids))
    *before, after = await loaded.next_tokens(ids, [*lengths, len(ids)])

    def compute() -> Json:
        distribution = distribution_json(
            after,
            tokenizer,
            ids,
            sampling,
            draws=body.draws,
            seed=body.seed,
            bars=body.bars,
        )
        chosen = [
            chosen_token_json(
                next_token,
                tokenizer,
                ids[:length],
                ids[length],
                sampling if len(ids) - length <= MAX_CHOSEN_SAMPLED else None,
            )
            for next_token, length in zip(before, lengths, strict=True)
        ]
        return {"path": chosen, **distribution}

    content = {"num_tokens": len(ids), "cropped": cropped, **await loaded.run(compute)}
    if body.include_tokens:
        content["tokens"] = tokens_json(tokenizer, ids[max(0, cropped - MAX_UNREAD) :])
    others = tokens_json(tokenizer, body.path[: len(body.path) - num_chosen])
    figures = dict.fromkeys(("rank", "model_probability", "probability"))
    content["path"] = [*({**token, **figures} for token in others), *content["path"]]
    content["milliseconds"] = round(1e3 * (time.perf_counter() - start), 3)
    return JSONResponse(content)


async def _generate(loaded: LoadedModel, body: GenerateBody, request: Request) -> Response:
    served = loaded.served
    row = RowRequest(
        await _ids(loaded, body),
        body.max_new_tokens,
        _sampling(body.sampling, loaded),
        seed=body.seed,
        eos_id=served.tokenizer.end_of_text_id,
        num_top=0,
        num_candidates=NUM_CANDIDATES,
    )
    generation = served.worker.submit(row)
    return EventStream(generation, _events(generation, served.tokenizer))


async def _events(generation: Generation, tokenizer: Tokenizer) -> AsyncIterator[str]:
    try:
        async for event in generation:
            match event:
                case TokenEvent():
                    yield server_sent_event(_event_json(event, tokenizer))
                case EndEvent():
                    yield server_sent_event({"done": event.reason, "error": None})
    except Exception as error:  # the status has already been sent
        yield server_sent_event(
            {"done": "error", "error": api_error(error).content["error"]["message"]}
        )


def _event_json(event: TokenEvent, tokenizer: Tokenizer) -> Json:
    assert event.score is not None
    return {
        "token": token_json(tokenizer, event.token),
        "surprisal": finite_or_none(event.score.surprisal),
        "rank": event.score.rank,
        "candidates": [
            {
                **token_json(tokenizer, candidate.token),
                "probability": candidate.probability,
                "model_probability": candidate.model_probability,
            }
            for candidate in event.candidates
        ],
    }


async def _score(loaded: LoadedModel, body: ScoreBody, request: Request) -> Response:
    served = loaded.served
    ids = await _encode(served, body.text, "text")
    if not ids:
        raise APIError(400, "text: is empty; give some text", param="text")
    if len(ids) > MAX_SCORED_TOKENS:
        message = (
            f"text: has {len(ids):,} tokens, at most {MAX_SCORED_TOKENS:,} are scored; shorten it"
        )
        raise APIError(413, message, param="text", code="text_too_long")
    scores: list[TokenScore] = []
    # one job per window: other requests have their turn between two
    for window in score_windows(len(ids), served.model.config.context_length):
        if await request.is_disconnected():
            return Response(status_code=499)  # nobody reads it
        scores += await loaded.run(partial(score_window, served.model, ids, window))
    return JSONResponse(scores_json(served.tokenizer, ids, scores))


async def _lens(loaded: LoadedModel, body: LensBody, request: Request) -> Response:
    served = loaded.served
    ids = await _ids(loaded, body)
    positions = min(body.positions, len(ids), served.model.config.context_length)
    states = await loaded.run(partial(hidden_states, served.model, ids, positions))
    layers = []
    # one job per layer: other requests have their turn between two
    for name, hidden in zip(layer_names(served.model), states, strict=True):
        if await request.is_disconnected():
            return Response(status_code=499)  # nobody reads it
        layers.append(
            await loaded.run(partial(lens_json, served.model, served.tokenizer, name, hidden))
        )
    return JSONResponse(
        {"tokens": tokens_json(served.tokenizer, ids[-positions:]), "layers": layers}
    )


async def _attention(loaded: LoadedModel, body: AttentionBody, request: Request) -> Response:
    served = loaded.served
    config = served.model.config
    for name, value, count in (
        ("layer", body.layer, config.n_layers),
        ("head", body.head or 0, config.n_heads),
    ):
        if value >= count:
            message = f"{name}: {value} is outside the model; give 0 to {count - 1}"
            raise APIError(400, message, param=name)
    ids = await _ids(loaded, body)
    shown = min(MAX_ATTENTION_TOKENS, len(ids), config.context_length)
    weights = (await loaded.attention(ids, body.layer, shown))[:, :, -shown:]
    matrix = weights.mean(dim=0) if body.head is None else weights[body.head]
    return JSONResponse(
        {
            "tokens": tokens_json(served.tokenizer, ids[-shown:]),
            # fewer digits halve the answer
            "weights": matrix.double().round(decimals=8).tolist(),
            "cropped": len(ids) - shown,
        }
    )


def _sampling(body: SamplingBody, loaded: LoadedModel) -> SamplingParams:
    try:
        sampling = SamplingParams(**body.model_dump())
        sampling.check_vocabulary(loaded.served.model.config.vocab_size)
    except ValueError as error:
        name = str(error).partition(":")[0]
        raise APIError(400, str(error), param=f"sampling.{name}") from error
    return sampling


async def _ids(loaded: LoadedModel, body: SequenceBody, *, may_be_empty: bool = False) -> list[int]:
    """Token ids of the prompt and the path."""
    vocab_size = loaded.served.model.config.vocab_size
    ids = await _encode(loaded.served, body.prompt, "prompt") + body.path
    if body.path and max(body.path) >= vocab_size:
        message = f"path: {max(body.path)} is outside the vocabulary of {vocab_size:,} tokens"
        raise APIError(400, message, param="path")
    if not ids and not may_be_empty:
        raise APIError(400, "prompt: is empty; give some text", param="prompt")
    return ids


async def _encode(served: ServedModel, text: str, name: str) -> list[int]:
    """Token ids of the field ``name``. ``<|endoftext|>`` in it is plain characters."""
    try:
        return await served.worker.encode_prompt(text)
    except ValueError as error:
        cause = str(error).removeprefix("prompt: ")
        raise APIError(400, f"{name}: {cause}", param=name) from error


def _cropped(loaded: LoadedModel, ids: list[int]) -> int:
    """Number of tokens at the start of ``ids`` that are outside the model's context."""
    return max(0, len(ids) - loaded.served.model.config.context_length)
