"""Hugging Face tokenizers: encode_batch_fast on one thread, in batches of 1,000 documents as its users call it."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import timing
from tokenizers import Tokenizer

BATCH = 1000


def load(options: Namespace) -> Callable[[list[str]], Any]:
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    tokenizer.encode_special_tokens = True

    def work(texts: list[str]) -> Any:
        batches = (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
        return [
            encoding.ids
            for batch in batches
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        ]

    return work


timing.run(load)
