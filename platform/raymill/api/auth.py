"""Who may call what: the role of a request's key, checked before anything else of the app looks at the request.

Default deny: a path that `POLICY` does not name answers 401 without a key and 404 with one, whatever routes the app has;
a websocket is closed. In front of the app stands Ray Serve's own proxy, which answers two paths itself, without a key:
/-/healthz says that the proxy runs and /-/routes names the Serve application and its prefix, nothing more. Serve has no
setting that closes them: where even that is too much, close /-/ in the load balancer or firewall before it.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from raymill.api.keys import KeyFile, Role
from raymill.api.responses import error_response
from raymill.errors import RequestError

POLICY: dict[str, Role | None] = {
    "/health": None,
    "/metrics": "metrics",
    "/openapi.json": "client",
    "/v1/models": "client",
    "/v1/models/{model}": "client",
    "/v1/completions": "client",
    "/v1/chat/completions": "client",
    "/v1/embeddings": "client",
}
"""The role a route asks for; None is open to everyone."""
_POLICY_VIOLATION = 1008


class Guard:
    """ASGI: lets a request through when its key has the role its path asks for."""

    def __init__(self, app: ASGIApp, keys: KeyFile) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})  # before accept: the client sees a 403
            return
        refusal = self._refuse(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(refusal)(scope, receive, send)

    def _refuse(self, scope: Scope) -> RequestError | None:
        route = route_of(scope["path"])
        if route is not None and POLICY[route] is None:
            return None
        key = _bearer(scope)
        if key is None:
            return RequestError("no API key", status=401, fix="send it as `Authorization: Bearer sk-...`")
        role = self._keys.role_of(key)
        if role is None:
            return RequestError(
                "this API key is not known here", status=401, fix="`raymill serve --new-key` makes a new one"
            )
        if route is None:
            return RequestError(f"there is no {scope['path'][:200]!r}", status=404, fix="see /v1/models")
        if role != POLICY[route]:
            return RequestError(
                f"a {role} key does not open {route}", status=403, fix=f"use a {POLICY[route]} key for it"
            )
        return None


def route_of(path: str) -> str | None:
    """The row of POLICY that a path falls under."""
    if path in POLICY:
        return path
    head, _, last = path.rpartition("/")
    return "/v1/models/{model}" if head == "/v1/models" and last else None


def _bearer(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            return key.strip() if scheme.lower() == "bearer" and key.strip() else None
    return None
