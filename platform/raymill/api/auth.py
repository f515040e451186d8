"""Who may call what: API keys by role, checked before anything else looks at a request.

In api_keys.json (mode 0600) only the sha256 of each key is stored; a key itself is shown once, when it is made. Keys are
256 random bits, so a plain hash is enough. The file is read again when it changes: a key made or removed while the
endpoint is up counts from the next request.

Default deny: a path that `POLICY` does not name answers 401 without a key and 404 with one, whatever routes exist.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import time
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from raymill.api.responses import error_response
from raymill.config import Config
from raymill.errors import MachineError, RequestError

Role = Literal["client", "metrics"]

POLICY: dict[str, Role | None] = {
    "/health": None,
    "/metrics": "metrics",
    "/v1/models": "client",
    "/v1/models/{id}": "client",
    "/v1/completions": "client",
    "/v1/chat/completions": "client",
}
"""The role a route asks for; None is open to everyone."""


class KeyEntry(Config):
    """One key."""

    role: Role
    """What it opens."""
    sha256: str
    """Hex digest of the key."""
    created_at: str
    """UTC time, ISO 8601."""


class KeyList(Config):
    """api_keys.json."""

    keys: tuple[KeyEntry, ...] = ()
    """Every key that is good."""


class KeyFile:
    """The keys of an endpoint, followed as their file changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, ...] | None = None
        self._list = KeyList()

    def role_of(self, key: str) -> Role | None:
        """The role a key has, or None. Every stored hash is compared, in constant time."""
        digest = _digest(key)
        found: Role | None = None
        for entry in self._current().keys:
            if hmac.compare_digest(entry.sha256, digest):
                found = entry.role
        return found

    def has(self, role: Role) -> bool:
        return any(entry.role == role for entry in self._current().keys)

    def create(self, role: Role) -> str:
        """Makes a key, stores its hash and returns it; it cannot be had again."""
        key = f"sk-{secrets.token_urlsafe(32)}"
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entry = KeyEntry(role=role, sha256=_digest(key), created_at=now)
        keys = KeyList(keys=(*self._current().keys, entry))
        write_private(self.path, keys.model_dump_json(indent=1) + "\n")
        return key

    def _current(self) -> KeyList:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._seen, self._list = None, KeyList()
            return self._list
        seen = (status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode)
        if seen != self._seen:
            self._list = self._read(status.st_mode)
            self._seen = seen
        return self._list

    def _read(self, mode: int) -> KeyList:
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise MachineError(
                f"{self.path} can be read by others",
                why=f"its mode is {stat.filemode(mode)}",
                fix=f"chmod 600 {self.path}",
            )
        try:
            return KeyList.model_validate_json(self.path.read_bytes())
        except ValidationError as error:
            why = str(error.errors()[0]["msg"])
            raise MachineError(
                f"{self.path} is damaged", why=why, fix="raymill serve --new-key makes new keys"
            ) from None


class Guard:
    """ASGI: lets a request through when its key has the role its path asks for."""

    def __init__(self, app: ASGIApp, keys: KeyFile) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        assert scope["type"] == "http", "websockets are not routed here"
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
    return "/v1/models/{id}" if head == "/v1/models" and last else None


def write_private(path: Path, text: str) -> None:
    """Writes a file only its owner can read, at one stroke."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _bearer(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            return key.strip() if scheme.lower() == "bearer" and key.strip() else None
    return None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
