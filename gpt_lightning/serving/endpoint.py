"""OpenAI's completions endpoint: ``POST /v1/completions`` and ``GET /v1/models``."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gpt_lightning.serving.api_errors import APIError, api_error, with_error_answers
from gpt_lightning.serving.completion import Completion
from gpt_lightning.serving.completion_request import (
    parse_request,
    prompts_of,
    rows_of,
)
from gpt_lightning.serving.served_model import ServedModel
from gpt_lightning.serving.worker import Generation

BODY_TIMEOUT = 30.0  # seconds for a client to send its body


def endpoint_routes(models: Mapping[str, ServedModel]) -> list[Route]:
    """Routes of the endpoint for ``models``, by their ids. The first one answers requests without ``model``."""

    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model_entry(m) for m in models.values()]})

    async def show_model(request: Request) -> Response:
        return JSONResponse(_model_entry(_model_of(models, request.path_params["model"])))

    async def complete(request: Request) -> Response:
        parsed = parse_request(await read_body(request))
        served = _model_of(models, parsed.model)
        # a long text takes a while: the event loop serves the other clients meanwhile
        prompts = await run_in_threadpool(prompts_of, parsed, served.tokenizer)
        rows = rows_of(parsed, prompts, served.model.config, served.tokenizer)
        completion = Completion(parsed, served.id, served.tokenizer, rows)
        generation = served.worker.submit(*rows)
        if parsed.stream:
            events = _stream(generation, completion)
            return StreamingResponse(events, media_type="text/event-stream")
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


def sse(content: Any) -> str:
    """One server-sent event."""
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
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((collecting, watching))


async def _stream(generation: Generation, completion: Completion) -> AsyncIterator[str]:
    """Server-sent events of an answer, at last ``data: [DONE]``."""
    try:
        async for event in generation:
            completion.add(event)
            if (chunk := completion.chunk(event)) is not None:
                yield sse(chunk)
        if (chunk := completion.usage_chunk()) is not None:
            yield sse(chunk)
    except Exception as error:  # the status has already been sent
        yield sse(api_error(error).content)
    finally:
        generation.cancel()  # the client may have gone away
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
