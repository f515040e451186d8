"""Files here and in object stores (s3, gs, abfs) through pyarrow.fs: list them, open them, tell whether they changed.

In: a local path or URI. Out: names, sizes and times; an open file; or one DataError that says what the store answered.
Credentials come from the environment, as pyarrow.fs finds them; a URI that carries some is refused, so that none ends in
a settings file, a manifest or a message. A URI ends with its options, ?name=value&...; a ? that no name= follows is the
glob's, [?] always is, and # is a character as any other. Every wait is bounded: a store that does not answer is told in under a minute.
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
from urllib.parse import parse_qsl, unquote

import pyarrow as pa

from raymill.errors import DataError, UsageError

if TYPE_CHECKING:
    from raymill.corpus.sources import SourceFile

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss")
_CONNECT_TIMEOUT_S, _REQUEST_TIMEOUT_S, _ANSWER_TIMEOUT_S, _ATTEMPTS = 5, 20, 60, 3
_HIDDEN = re.compile(r"(^|/)[.]")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "s3": ("region", "scheme", "endpoint_override", "tls_ca_file_path", "force_virtual_addressing"),
    **dict.fromkeys(("gs", "gcs"), ("scheme", "endpoint_override", "project_id")),
    **dict.fromkeys(
        ("abfs", "abfss"),
        ("blob_storage_authority", "dfs_storage_authority", "enable_tls", "credential_kind", "tenant_id", "client_id"),
    ),
}
"""What a URI may ask of its store."""
_FIRST_OPTION = re.compile(r"\?[^?/=&\]]*=")
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
    parts = _split(path)
    azure = scheme in ("abfs", "abfss")
    password = ":" in (parts.user or "") or (not azure and ":" in parts.host)  # no bucket's name has a colon
    user = parts.user is not None and not azure and not (parts.user == "anonymous" and scheme != "s3")
    secret = any(
        set(re.split(r"[_-]", name.lower())) & set(_SECRETS) or (name != "tls_ca_file_path" and "@" in unquote(value))
        for name, value in parts.options
    )
    if password or user or secret:
        what = f"this {scheme}:// address carries credentials"
        raise ValueError(f"{what}; fix: leave them to the environment (AWS_ACCESS_KEY_ID, ...)")
    for name, value in parts.options:
        if name not in _OPTIONS[scheme] or not value:
            shown = f"the option {name}" if value and re.fullmatch(r"[a-z_]{1,40}", name) else "an option"
            what = f"{shown} of {show(path)} is not known" if value else f"{shown} of {show(path)} has no value"
            raise ValueError(f"{what}; fix: known are {', '.join(_OPTIONS[scheme])}; write [?] for any one character")


def show(path: str) -> str:
    """A path or URI as it may stand in a message: without user, password and options."""
    if "://" not in path:
        return path
    scheme, _, rest = path.partition("://")
    if scheme in SCHEMES:
        rest = _FIRST_OPTION.split(rest, maxsplit=1)[0]
    else:
        rest = rest.partition("?")[0]
    host, slash, below = rest.partition("/")
    user, at, name = host.rpartition("@")
    keeps = at and scheme in ("abfs", "abfss") and ":" not in user  # the container of an account
    return f"{scheme}://{host if keeps else name}{slash}{below}"


def list_files(uri: str) -> list[Found]:
    """The visible files a URI names, sorted: one, those below a folder, or those a glob matches. Raises DataError."""
    from pyarrow import fs

    parts = _split(uri)
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
            found.append(Found(name, info.path, info.size, info.mtime_ns or 0, parts.store))
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


@dataclass(frozen=True)
class _Uri:
    """What a URI is made of."""

    scheme: str
    user: str | None
    host: str
    path: str
    """With its slash, as it was written."""
    options: tuple[tuple[str, str], ...]
    store: str
    """All but the path."""


def _split(uri: str) -> _Uri:
    scheme, _, rest = uri.partition("://")
    first = _FIRST_OPTION.search(rest)
    rest, query = (rest[: first.start()], rest[first.start() :]) if first is not None else (rest, "")
    place, slash, path = rest.partition("/")
    user, at, host = place.rpartition("@")
    options = tuple(parse_qsl(query[1:], keep_blank_values=True))
    return _Uri(scheme, user if at else None, host, slash + path, options, f"{scheme}://{place}{query}")


def _connect(uri: str) -> tuple[Any, str]:
    """The store's file system, made once per process, and the path within it."""
    parts = _split(uri)
    path = unquote(parts.path)
    if parts.scheme == "s3":
        return _ask(uri, lambda: _s3(parts.host, parts.options)), unquote(parts.host) + path
    if parts.scheme in ("gs", "gcs"):
        filesystem = _ask(uri, lambda: _gcs(parts.user == "anonymous", parts.options))
        return filesystem, unquote(parts.host) + path
    filesystem, container = _ask(uri, lambda: _azure(parts.store))
    return filesystem, container.rstrip("/") + path if container else path.lstrip("/")


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
        **given,
    )


@functools.lru_cache(maxsize=16)
def _gcs(anonymous: bool, options: tuple[tuple[str, str], ...]) -> Any:
    from pyarrow import fs

    limit = timedelta(seconds=_REQUEST_TIMEOUT_S)
    return fs.GcsFileSystem(anonymous=anonymous, retry_time_limit=limit, **dict(options))


@functools.lru_cache(maxsize=16)
def _azure(store: str) -> tuple[Any, str]:
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(store)
    return filesystem, path


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
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]/]+\])", pattern)
    known = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    made = []
    for piece in pieces:
        if piece.startswith("[") and piece.endswith("]"):
            made.append("[" + piece[1:-1].replace("\\", "\\\\").replace("!", "^", 1) + "]")
        else:
            made.append(known.get(piece) or re.escape(piece))
    return re.compile("".join(made) + r"(?:/.*)?\Z")
