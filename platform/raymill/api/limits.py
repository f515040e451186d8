"""What every request meets before its route: bounds on its body's size and time, and a count in the metrics."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raymill.api.auth import route_of
from raymill.api.responses import error_response
from raymill.errors import RequestError
from raymill.telemetry.metrics import DURATION, REQUESTS, Metrics


class BodyLimit:
    """ASGI: refuses a body over `max_bytes` by its declared length or as soon as so much has come in, and a slow one.

    Without the bound on time, a client that never ends its body would hold its task for ever.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            refusal = RequestError("compressed bodies are not read", fix="send the body without Content-Encoding")
            await error_response(refusal)(scope, receive, send)
            return
        if not declared.isdigit() or int(declared) > self._max_bytes:
            await error_response(self._refusal())(scope, receive, send)
            return
        came, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self._timeout_s

        async def counted() -> Message:
            nonlocal came, complete
            if complete:  # what comes now is the client's going away
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                what = f"the body did not come within {self._timeout_s:g} s"
                raise RequestError(what, status=408, fix="send it at once") from None
            complete = not message.get("more_body", False)
            came += len(message.get("body", b""))
            if came > self._max_bytes:
                raise self._refusal()
            return message

        await self._app(scope, counted, send)

    def _refusal(self) -> RequestError:
        return RequestError(
            f"the body is larger than {self._max_bytes} bytes", status=413, fix="shorten the prompt or the conversation"
        )


class Recorder:
    """ASGI: counts and times every request by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        # A path is whatever a stranger types: as a label only its row of the policy counts.
        route = route_of(scope["path"]) or "other"
        try:
            await self._app(scope, receive, noted)
        finally:
            self._metrics.add(REQUESTS, route=route, status=str(status))
            self._metrics.observe(DURATION, time.perf_counter() - began, route=route)
