"""One client of the API on one connection that it keeps: streams of completions, read as they come. Standard library only."""

import asyncio
import json
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What came back."""

    tokens: int
    first_s: float
    """From the request's first byte to the first text."""


class Client:
    """A connection to 127.0.0.1; `async with` opens and closes it."""

    def __init__(self, port: int, key: str) -> None:
        self._port, self._key = port, key

    async def __aenter__(self) -> "Client":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def complete(self, ids: list[int], max_tokens: int) -> Answer:
        asked = {"model": "benchmark", "prompt": ids, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        body = json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self._key}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        began = time.perf_counter()
        self._writer.write(head.encode() + body)
        status = await self._reader.readline()
        headers = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status or b"chunked" not in headers.lower():
            raise RuntimeError(f"answered {status!r}: {(await self._reader.read(300))!r}")
        first_s, last = 0.0, b""
        while size := int(await self._reader.readline(), 16):
            chunk = (await self._reader.readexactly(size + 2))[:-2]
            if not first_s and b"data:" in chunk:
                first_s = time.perf_counter() - began
            last = (last + chunk)[-4096:]
        await self._reader.readline()
        usage = json.loads(b"{" + last[last.rindex(b'"usage"') :].split(b"}")[0] + b"}}")["usage"]
        return Answer(usage["completion_tokens"], first_s)
