"""API keys by role, and the two files of a run's folder that hold them, both mode 0600.

api_keys.json   the sha256 of each key; a key itself is shown once, when it is made. Keys are 256 random bits, so a
                plain hash is enough. The file is read again when it changes: a key made or removed while the endpoint
                is up counts from the next request.
metrics_key     the key Prometheus sends, as it is; it opens /metrics and nothing else
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

from raymill.config import Config
from raymill.errors import MachineError

Role = Literal["client", "metrics"]
API_KEYS = "api_keys.json"
METRICS_KEY = "metrics_key"


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


def new_key(run_folder: Path) -> str | None:
    """The run's client key when it had none: made now, to be shown once. None when there is one already."""
    keys = KeyFile(run_folder / API_KEYS)
    return None if keys.has("client") else keys.create("client")


def forget_keys(run_folder: Path) -> None:
    """Makes every key of the run worthless; the next start makes new ones."""
    (run_folder / API_KEYS).unlink(missing_ok=True)
    (run_folder / METRICS_KEY).unlink(missing_ok=True)


def ensure_metrics_key(run_folder: Path) -> None:
    """Makes the run's metrics key unless it has one that is good."""
    keys, plain = KeyFile(run_folder / API_KEYS), run_folder / METRICS_KEY
    if not plain.exists() or keys.role_of(plain.read_text(encoding="utf-8")) != "metrics":
        write_private(plain, keys.create("metrics"))


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


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
