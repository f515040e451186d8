"""raymill's loader: inputs, targets and document numbers of a batch. `--variant`: how documents are packed."""

from argparse import Namespace
from typing import Any

from timing import FEEDS, Loaded, serve

from raymill.dataset.loader import Loader
from raymill.dataset.shards import TokenStream


def load(options: Namespace) -> Loaded:
    loader = Loader(
        TokenStream(options.tokens, "train"),
        seq_len=options.seq_len,
        global_batch_size=options.batch_size,
        seed=0,
        packing=options.variant or "concat",
    )
    step = 0

    def work() -> dict[str, Any]:
        nonlocal step
        for each in range(step, step + FEEDS):
            loader.batch(each, 0, options.batch_size)
        step += FEEDS
        return {}

    return {}, work


serve(load)
