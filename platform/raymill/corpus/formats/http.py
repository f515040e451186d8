"""The response an archive holds: its headers, and its body with transfer and content encodings undone.

Memory: the body, never more than the limit whatever it unpacks to.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from raymill.corpus.limits import RecordError

_HEADER_END = re.compile(rb"\r?\n\r?\n")
_CHUNK_SIZE = re.compile(rb"\s{0,4}([0-9a-fA-F]{1,8})[^\r\n]{0,200}\r?\n")


@dataclass(frozen=True)
class Response:
    """A body and what it says to be."""

    media_type: str
    """In lower case, without parameters; empty where it is not said."""
    body: bytes


def parse_response(data: bytes, limit_bytes: int) -> Response:
    """Raises RecordError when the bytes are no HTTP response, or packed in a way we do not know."""
    end = _HEADER_END.search(data)
    if not data.startswith(b"HTTP/") or end is None:
        raise RecordError("bad_http", "the record holds no HTTP response")
    headers = parse_headers(data[: end.start()])
    body = data[end.end() :]
    if headers.get("transfer-encoding", "").strip().lower() == "chunked":
        body = _join_chunks(body)
    coding = headers.get("content-encoding", "").strip().lower()
    if coding in ("gzip", "x-gzip", "deflate"):
        body = _unpack(body, limit_bytes)
    elif coding not in ("", "identity"):
        raise RecordError("http_encoding", f"the page is packed with {coding[:60]!r}")
    return Response(headers.get("content-type", "").partition(";")[0].strip().lower(), body)


def parse_headers(data: bytes) -> dict[str, str]:
    """Lines of `name: value` behind a first line; names in lower case, of several equal ones the first."""
    headers: dict[str, str] = {}
    for line in data.split(b"\n")[1:]:
        name, colon, value = line.decode("utf-8", "replace").partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), value.strip())
    return headers


def _join_chunks(body: bytes) -> bytes:
    """Archives often say chunked of a body that was joined already: it is then left as it is."""
    parts, at = [], 0
    while (match := _CHUNK_SIZE.match(body, at)) is not None:
        size = int(match[1], 16)
        parts.append(body[match.end() : match.end() + size])
        if size == 0:
            break
        at = match.end() + size
        at += 2 if body[at : at + 2] == b"\r\n" else body[at : at + 1] == b"\n"
    return b"".join(parts) if parts else body


def _unpack(body: bytes, limit_bytes: int) -> bytes:
    """Archives often keep the header of a body that was unpacked already: it is then left as it is."""
    unpacker = zlib.decompressobj(wbits=47)  # either header
    try:
        unpacked = unpacker.decompress(body, limit_bytes + 1)
    except zlib.error:
        return body
    if len(unpacked) > limit_bytes:
        raise RecordError("too_long", f"the page unpacks to over {limit_bytes:,} bytes")
    return unpacked
