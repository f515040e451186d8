"""raymill's encoder: `encode_flat` over one list of texts."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import timing

from raymill.tokenizer.tokenizer import Tokenizer


def load(options: Namespace) -> Callable[[list[str]], Any]:
    tokenizer = Tokenizer.load(options.tokenizer)

    def work(texts: list[str]) -> Any:
        ids, counts = tokenizer.encode_flat(texts)
        ends = counts.cumsum()
        return (ids[end - count : end] for end, count in zip(ends, counts, strict=True))  # cut when it is asked for

    return work


timing.run(load)
