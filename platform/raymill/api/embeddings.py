"""/v1/embeddings: texts in, one vector of length 1 each out.

At most as many texts as the engine has slots are in it at once. When the client goes away, what is left is taken out.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from raymill.api.completion import when_there_is_room
from raymill.api.completion_requests import Texts
from raymill.api.context import check_fits
from raymill.api.schema import MAX_COUNT, WHOLE, Body
from raymill.errors import RequestError
from raymill.inference.limits import check_ids
from raymill.inference.requests import Engine
from raymill.inference.step import Floats


class EmbeddingRequest(Body):
    """The body of /v1/embeddings."""

    input: Texts
    """Text, token ids, or a list of either: each gets a vector."""
    encoding_format: Literal["float", "base64"] | None = None
    """float: a list of numbers; base64: of the numbers as little-endian fp32. float without it."""
    dimensions: Annotated[int, Field(ge=1, le=MAX_COUNT), WHOLE] | None = None
    """Only the model's own number of them: vectors are not shortened."""

    @field_validator("input")
    @classmethod
    def _not_empty(cls, texts: list[str | list[int]]) -> list[str | list[int]]:
        if not all(texts):
            raise ValueError("an empty text has no embedding")
        return texts


async def embed(engine: Engine, texts_ids: Sequence[tuple[int, ...]], adapter: str | None) -> list[Floats]:
    """The vectors. RequestError where a text is outside the model's limits, or the first finds the queue full."""
    for ids in texts_ids:
        check_fits(len(ids), engine.max_seq_len, "input")
        check_ids(ids, 0, engine.max_seq_len, engine.vocab_size)
    at_once = max(1, engine.stats().num_slots)
    asked: list[asyncio.Future[Floats]] = []
    try:
        for number, ids in enumerate(texts_ids):
            if number >= at_once:
                await asked[number - at_once]
            submit = partial(engine.embed, ids, adapter)
            asked.append(asyncio.wrap_future(await when_there_is_room(submit) if number else submit()))
        return [await future for future in asked]
    finally:
        for future in asked:
            future.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


def check_dimensions(asked: int, found: int) -> None:
    """RequestError where other dimensions are asked for than the vectors have."""
    if asked != found:
        what = f"dimensions is {asked}; this model's vectors have {found}"
        raise RequestError(what, field="dimensions", fix=f"leave it out, or set it to {found}")


def embedding_body(asked: EmbeddingRequest, vectors: Sequence[Floats], prompt_tokens: int) -> Mapping[str, Any]:
    """The answer."""
    coded = asked.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode() if coded else vector,
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "data": data, "model": asked.model, "usage": usage}
