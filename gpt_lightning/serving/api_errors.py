"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

import functools
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gpt_lightning.generation.sampling import NonFiniteLogitsError
from gpt_lightning.serving.generation_request import BusyError, TooSlowError
from gpt_lightning.suggestions import suggest

logger = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
}
_MAX_SHOWN = 60  # characters of a wrong value


class APIError(Exception):
    """An answer that is not a success.

    Args:
        param: Field of the request that is wrong.
        code: OpenAI's word for the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.content = {
            "error": {
                "message": message,
                "type": _TYPES.get(status, "invalid_request_error"),
                "param": param,
                "code": code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


def api_error(error: Exception) -> APIError:
    """The answer for an exception of a request. A fault of ours is logged and not described."""
    match error:
        case APIError():
            return error
        case BusyError(retry_after=seconds):
            headers = {"Retry-After": str(seconds)}
            return APIError(429, str(error), code="rate_limit_exceeded", headers=headers)
        case TooSlowError():
            return APIError(500, str(error), code="timeout")
        case MemoryError():
            return APIError(500, str(error) or "there is not enough memory", code="out_of_memory")
        case NonFiniteLogitsError():
            return APIError(500, str(error), code="damaged_weights")
    logger.error("serving: a request failed", exc_info=error)
    return APIError(500, "the server has a fault; its log has more")


def with_error_answers(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose exceptions become answers."""

    @functools.wraps(endpoint)
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:
            return api_error(error).response()

    return answer


def validation_error(error: ValidationError, fields: Mapping[str, str]) -> APIError:
    """The answer for a request that pydantic refuses.

    Args:
        fields: Of each field, what its value must be: ``"a number from 0 to 2"``. A field of an object is
            ``"object.field"``.
    """
    details = error.errors(include_url=False)[0]
    if details["type"] == "json_invalid":
        cause = details["ctx"]["error"]
        return APIError(400, f"the body is not valid JSON ({cause})", code="invalid_json")
    if not details["loc"]:
        return APIError(400, "the body must be a JSON object")
    name = ".".join(map(str, details["loc"][:2]))
    if name not in fields:
        name = str(details["loc"][0])
    shown_name = name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}…"
    if details["type"] == "missing":
        message = f"{name}: is missing; it must be {fields[name]}"
    elif name not in fields:
        remedy = suggest(shown_name, fields)
        message = f"{shown_name}: is not a parameter of this request; {remedy}"
    else:
        message = f"{name}: {_shown(details)} is not valid; it must be {fields[name]}"
    return APIError(400, message, param=shown_name)


def _shown(details: Any) -> str:
    """The wrong value, shortened."""
    try:
        text = json.dumps(details["input"], ensure_ascii=False)
        text.encode()  # a lone surrogate cannot be sent
    except (TypeError, ValueError, RecursionError):
        return "the value"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
