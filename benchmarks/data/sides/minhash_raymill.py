"""raymill's signatures: 14 band keys of 112 minima over word 5-grams, and the exact hash."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import timing

from raymill.corpus.dedup import sign


def load(options: Namespace) -> Callable[[list[str]], Any]:
    return lambda texts: [sign(text.encode(), bands=True) for text in texts]


timing.run(load)
