"""OpenAI's completions endpoint: ``POST /v1/completions`` and ``GET /v1/models``."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gpt_lightning.serving.api_errors import APIError, api_error, with_error_answers
from gpt_lightning.serving.completion import Completion
from gpt_lightning.serving.completion_request import (
    parse_request,
    prompts_of,
    rows_of,
)
from gpt_lightning.serving.generation_request import Generation
from gpt_lightning.serving.served_model import ServedModel

BODY_TIMEOUT = 30.0  # seconds for a client to send its body
SECONDS_TO_READ = 10.0  # for a client to read the end of a stream, after the deadline


def endpoint_routes(models: Mapping[str, ServedModel]) -> list[Route]:
    """Routes of the endpoint for ``models``, by their ids. The first one answers requests without ``model``."""

    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model_entry(m) for m in models.values()]})

    async def show_model(request: Request) -> Response:
        return JSONResponse(_model_entry(_model_of(models, request.path_params["model"])))

    async def complete(request: Request) -> Response:
        parsed = parse_request(await read_body(request))
        served = _model_of(models, parsed.model)
        prompts = await prompts_of(parsed, served)
        rows = rows_of(parsed, prompts, served.model.config, served.tokenizer)
        completion = Completion(parsed, served.id, served.tokenizer, rows)
        generation = served.worker.submit(*rows)
        if parsed.stream:
            return EventStream(generation, _stream(generation, completion))
        return await _complete(request, generation, completion)

    return [
        Route("/v1/completions", with_error_answers(complete), methods=["POST"]),
        Route("/v1/models", with_error_answers(list_models)),
        Route("/v1/models/{model:path}", with_error_answers(show_model)),
    ]


async def read_body(request: Request) -> bytes:
    """The body of a request; :class:`APIError` if the client does not send it in time."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            return await request.body()
    except TimeoutError as error:
        message = f"the body did not arrive within {BODY_TIMEOUT:g} seconds"
        raise APIError(400, message, headers={"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise APIError(400, "the client went away") from error  # nobody reads it


@final
class EventStream(StreamingResponse):
    """Server-sent events of a generation. It ends when the client goes away, or does not read until the deadline.

    Args:
        events: Made from the events of ``generation``, see :func:`server_sent_event`.
    """

    def __init__(self, generation: Generation, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seconds = self._generation.deadline - time.monotonic() + SECONDS_TO_READ
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


def server_sent_event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


async def _complete(request: Request, generation: Generation, completion: Completion) -> Response:
    """The complete answer. The rows end if the client goes away."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        generation.cancel()

    async def collect() -> None:
        async for event in generation:
            completion.add(event)

    collecting = asyncio.create_task(collect())
    watching = asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait((collecting, watching), return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # nobody reads it
        await collecting
        return JSONResponse(completion.answer())
    finally:
        generation.cancel()
        for task in (collecting, watching):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait((collecting, watching))


async def _stream(generation: Generation, completion: Completion) -> AsyncIterator[str]:
    """Server-sent events of an answer, at last ``data: [DONE]``."""
    try:
        async for event in generation:
            completion.add(event)
            if (chunk := completion.chunk(event)) is not None:
                yield server_sent_event(chunk)
        if (chunk := completion.usage_chunk()) is not None:
            yield server_sent_event(chunk)
    except Exception as error:  # the status has already been sent
        yield server_sent_event(api_error(error).content)
    yield "data: [DONE]\n\n"


def _model_of(models: Mapping[str, ServedModel], model_id: str | None) -> ServedModel:
    if model_id is None:
        return next(iter(models.values()))
    if model_id not in models:
        shown = model_id if len(model_id) <= 60 else f"{model_id[:60]}…"
        message = f"model: {shown} is not served; give one of {', '.join(models)}"
        raise APIError(404, message, param="model", code="model_not_found")
    return models[model_id]


def _model_entry(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.id,
        "object": "model",
        "created": served.created,
        "owned_by": "gpt_lightning",
    }
