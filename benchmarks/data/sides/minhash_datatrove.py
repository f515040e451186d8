"""datatrove's MinhashDedupSignature: 14 x 8 minima of word 5-grams, as its own pipeline step computes them."""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import timing
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature


def load(options: Namespace) -> Callable[[list[str]], Any]:
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    step = MinhashDedupSignature(tempfile.mkdtemp(), config)

    def work(texts: list[str]) -> Any:
        shingles = (step.get_shingles(text) for text in texts)
        return [step.get_signature(each) if each.size else None for each in shingles]

    return work


timing.run(load)
