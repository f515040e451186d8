"""raymill's encoder over one list of texts."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import timing

from raymill.tokenizer.bpe import Tokenizer


def load(options: Namespace) -> Callable[[list[str]], Any]:
    tokenizer = Tokenizer.load(options.tokenizer)

    return tokenizer.encode_batch


timing.run(load)
