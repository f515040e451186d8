"""Errors and answers in OpenAI's shape.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}} for every status of 400 and above.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
from starlette.responses import Response

from raymill.api.context import ContextError
from raymill.errors import RequestError

RETRY_AFTER_S = 1

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CONTEXT_CODE = "context_length_exceeded"
_CODES = {
    401: "invalid_api_key",
    403: "wrong_role",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_too_slow",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
}


def error_response(error: RequestError) -> Response:
    """A request's refusal as a response, with the headers its status asks for."""
    headers = {}
    if error.status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if error.status == 408:
        headers["Connection"] = "close"  # the rest of the body may still come
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error_body(error), error.status, headers)


def error_body(error: RequestError) -> dict[str, Any]:
    """The object of one error; also the last event of a stream that failed."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    code = _CONTEXT_CODE if isinstance(error, ContextError) else _CODES.get(error.status)
    return {"error": {"message": f"{error.what}; {error.fix}", "type": kind, "param": error.field, "code": code}}


@contextmanager
def renamed(field: str, name: str) -> Iterator[None]:
    """A field that the engine refuses is called as the client called it."""
    try:
        yield
    except RequestError as error:
        if error.field == field:
            error.field = name
        raise


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # Text of a user can hold half a surrogate pair only before it is decoded; here everything is UTF-8.
    return Response(
        orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), status, headers, media_type="application/json"
    )
