"""Files here and in object stores (s3, gs, abfs) through pyarrow.fs: list them, open them, tell whether they changed.

In: a local path or URI. Out: names, sizes and times; an open file; or one DataError that says what the store answered.
Credentials come from the environment, as pyarrow.fs finds them; a URI that carries some is refused, so that none ends in
a settings file, a manifest or a message. Every wait is bounded: a store that does not answer is told in under a minute.
"""

from __future__ import annotations

import functools
import glob
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa

from raymill.errors import DataError, UsageError

if TYPE_CHECKING:
    from raymill.corpus.sources import SourceFile

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss")
_CONNECT_TIMEOUT_S, _REQUEST_TIMEOUT_S, _ANSWER_TIMEOUT_S, _ATTEMPTS = 5, 20, 60, 3
_HIDDEN = re.compile(r"(^|/)[.]")
_SECRETS = ("key", "secret", "token", "password", "signature", "sig")
_LINKS = re.compile(r"\w+://\S*")
T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A file of an object store."""

    name: str
    """Path below what was asked for."""
    path: str
    """Path within the store, the bucket first."""
    size_bytes: int
    mtime_ns: int
    store: str
    """URI of the store, without the path and with its options."""


class Opened(Protocol):
    """What a local file and one of a store share."""

    def read(self, size: int, /) -> bytes: ...
    def seek(self, offset: int, /) -> int: ...
    def close(self) -> None: ...


def is_remote(path: str) -> bool:
    return "://" in path and path.partition("://")[0] in SCHEMES


def check(path: str) -> None:
    """Raises ValueError for a URI of another kind, or one that carries credentials."""
    scheme, separator, _ = path.partition("://")
    if not separator or not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]*", scheme):
        return
    if scheme not in SCHEMES:
        raise ValueError(f"{scheme}:// is no place text is read from; fix: use a path, s3://, gs://, abfs:// or hf://")
    parts = urlsplit(path)
    user = parts.username is not None and scheme in ("s3", "gs", "gcs") and parts.username != "anonymous"
    options = [name for name, _ in parse_qsl(parts.query) if set(re.split(r"[_-]", name.lower())) & set(_SECRETS)]
    if parts.password is not None or user or options:
        raise ValueError(
            f"{show(path)} carries credentials; fix: leave them to the environment (AWS_ACCESS_KEY_ID, ...)"
        )


def show(path: str) -> str:
    """A path or URI as it may stand in a message: without user, password and options."""
    if "://" not in path:
        return path
    scheme, _, rest = path.partition("://")
    host, slash, below = rest.partition("?")[0].partition("/")
    user, at, name = host.rpartition("@")
    keeps = at and scheme in ("abfs", "abfss") and ":" not in user  # the container of an account
    return f"{scheme}://{host if keeps else name}{slash}{below}"


def list_files(uri: str) -> list[Found]:
    """The visible files a URI names, sorted: one, those below a folder, or those a glob matches. Raises DataError."""
    from pyarrow import fs

    parts = urlsplit(uri)
    store = f"{parts.scheme}://{parts.netloc}" + (f"?{parts.query}" if parts.query else "")
    files, root = _connect(uri)
    steps = root.split("/")
    fixed = next((index for index, step in enumerate(steps) if glob.has_magic(step)), None)
    base = "/".join(steps[:fixed]) if fixed is not None else root.rstrip("/")
    kind = _ask(uri, lambda: files.get_file_info(base)).type
    if kind == fs.FileType.NotFound:
        raise UsageError(f"there is no {show(uri)}", where="prepare.sources", fix="check the bucket and the path")
    if kind == fs.FileType.File:
        infos, base = _ask(uri, lambda: [files.get_file_info(base)]), base.rpartition("/")[0]
    else:
        infos = _ask(uri, lambda: files.get_file_info(fs.FileSelector(base, recursive=True)), limited=False)
    matches = _pattern("/".join(steps[fixed:])) if fixed is not None else re.compile("")
    found = []
    for info in infos:
        name = info.path[len(base) :].lstrip("/")
        if info.type == fs.FileType.File and not _HIDDEN.search(name) and matches.match(name):
            found.append(Found(name, info.path, info.size, info.mtime_ns or 0, store))
    return sorted(found, key=lambda each: each.name)


def open_file(file: SourceFile) -> Opened:
    """Its bytes from the first on, seekable. Raises OSError, or DataError where the store refuses."""
    if file.store is None:
        return Path(file.path).open("rb")
    opened: Opened = open_arrow(file)
    return opened


def open_arrow(file: SourceFile) -> pa.NativeFile:
    """The same for pyarrow's readers."""
    if file.store is None:
        return pa.OSFile(file.path)
    filesystem, _ = _connect(file.store)
    return _ask(file.shown, lambda: filesystem.open_input_file(file.path))


def state(file: SourceFile) -> tuple[int, int] | None:
    """Size and time of change as they are now; None when it is gone."""
    if file.store is None:
        try:
            found = Path(file.path).stat()
        except FileNotFoundError:
            return None
        return found.st_size, found.st_mtime_ns
    filesystem, _ = _connect(file.store)
    info = _ask(file.shown, lambda: filesystem.get_file_info(file.path))
    return (info.size, info.mtime_ns or 0) if info.is_file else None


def _connect(uri: str) -> tuple[Any, str]:
    """The store's file system, made once per process, and the path within it."""
    parts = urlsplit(uri)
    options = tuple(parse_qsl(parts.query))
    if parts.scheme == "s3":
        path = unquote(parts.netloc + parts.path)
        return _ask(uri, lambda: _s3(parts.netloc, options)), path
    if parts.scheme in ("gs", "gcs"):
        path = unquote((parts.hostname or "") + parts.path)
        return _ask(uri, lambda: _gcs(parts.username == "anonymous", options)), path
    return _ask(uri, lambda: _azure(uri))


@functools.lru_cache(maxsize=16)
def _s3(bucket: str, options: tuple[tuple[str, str], ...]) -> Any:
    from pyarrow import fs

    given = dict(options)
    region = given.pop("region", None) or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and "endpoint_override" not in given:
        region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        region=region,
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        force_virtual_addressing=given.pop("force_virtual_addressing", "false") == "true",
        **_known(given, "scheme", "endpoint_override", "tls_ca_file_path"),
    )


@functools.lru_cache(maxsize=16)
def _gcs(anonymous: bool, options: tuple[tuple[str, str], ...]) -> Any:
    from pyarrow import fs

    limit = timedelta(seconds=_REQUEST_TIMEOUT_S)
    given = _known(dict(options), "scheme", "endpoint_override", "project_id")
    return fs.GcsFileSystem(anonymous=anonymous, retry_time_limit=limit, **given)


@functools.lru_cache(maxsize=16)
def _azure(store: str) -> tuple[Any, str]:
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(store)
    return filesystem, path


def _known(given: dict[str, str], *names: str) -> dict[str, str]:
    other = sorted(set(given) - set(names))
    if other:
        raise ValueError(f"the option {other[0]} is not known; known: {', '.join(names)}")
    return given


def _ask(uri: str, question: Callable[[], T], *, limited: bool = True) -> T:
    """The store's answer, or one DataError; no library's own patience counts, which may be many minutes."""
    timeout_s = _ANSWER_TIMEOUT_S if limited else None
    box: list[Any] = []

    def work() -> None:
        try:
            box.append((question(), None))
        except (OSError, ValueError, NotImplementedError, pa.ArrowException) as error:
            box.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    answer, error = box[0] if box else (None, TimeoutError(f"no answer within {timeout_s:g} s"))
    if error is None:
        return cast(T, answer)
    text = str(error)
    denied = re.search(
        r"ACCESS_DENIED|AccessDenied|HTTP status 40[13]|[Ff]orbidden|InvalidAccessKey|SignatureDoes", text
    )
    missing = re.search(r"NO_SUCH_BUCKET|NoSuchBucket|[Bb]ucket (does not exist|.* not found)", text)
    fix = "check the endpoint, its options and the network"
    if denied:
        fix = "give credentials that may list and read it, in the environment (AWS_ACCESS_KEY_ID, ...)"
    elif missing:
        fix = "check the name of the bucket"
    why = re.sub(r"\s+", " ", _LINKS.sub("", text))[:300] or type(error).__name__
    raise DataError(f"{show(uri)} cannot be read", where="prepare.sources", why=why, fix=fix) from None


def _pattern(pattern: str) -> re.Pattern[str]:
    """A glob as an expression for whole names; a folder that matches stands for what is below it."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\[!?[^\]/]+\])", pattern)
    known = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*"}
    made = []
    for piece in pieces:
        if piece.startswith("[") and piece.endswith("]"):
            made.append("[" + piece[1:-1].replace("\\", "\\\\").replace("!", "^", 1) + "]")
        else:
            made.append(known.get(piece) or re.escape(piece))
    return re.compile("".join(made) + r"(?:/.*)?\Z")
