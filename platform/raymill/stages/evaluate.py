"""Evaluate: a checkpoint and token shards in, scores on the held-out split out.

Ray Data hands ranges of the val split to its workers; sums come back and are added in the split's order, so the
figures do not depend on the number of workers.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from raymill.artifact import Artifact, Kind, write_atomic
from raymill.cluster.config import RoleName
from raymill.cluster.data import map_items
from raymill.config import Config as Settings
from raymill.stages.contract import Demand, Inputs

if TYPE_CHECKING:
    import torch

    from raymill.cluster.session import Cluster
    from raymill.dataset.shards import TokenStream
    from raymill.evaluation.perplexity import Sums
    from raymill.model.transformer import Transformer

TAKES: tuple[Kind, ...] = ("checkpoint", "tokens")
MAY_TAKE: tuple[Kind, ...] = ()
GIVES: Kind = "scores"
ROLE: RoleName = "data"
LIVE = False

_RANGE = 64
"""Sequences one Ray Data row stands for: some seconds of work, and so the grain of progress."""


class Config(Settings):
    """How the held-out split is scored."""

    batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    """Sequences scored at once by one worker."""


def demand(config: Config) -> Demand:
    """One worker is enough; it uses all the cluster has, and the figures are the same."""
    return Demand(1)


def source_state(config: Config) -> Any:
    return None


def run(config: Config, inputs: Inputs, cluster: Cluster) -> Artifact:
    """Scores the checkpoint on the val split and publishes scores.json."""
    from raymill.dataset.shards import TokenStream
    from raymill.evaluation.perplexity import Sums, choose_windows, describe_loss
    from raymill.model.files import read_model_config

    checkpoint, tokens = inputs["checkpoint"], inputs["tokens"]
    stream = TokenStream(tokens.path, "val")
    windows = len(choose_windows(stream, read_model_config(checkpoint.path)[0].max_seq_len, None))
    ranges = [range(first, min(first + _RANGE, windows)) for first in range(0, windows, _RANGE)]
    work = partial(
        _score,
        model=checkpoint.path.absolute(),
        tokens=tokens.path.absolute(),
        batch_size=config.batch_size,
        threads=cluster.config.roles.data.threads,
        gpu=cluster.config.roles.data.gpus_per_worker > 0,
    )
    sums: dict[int, Sums] = {}
    for first, part in map_items(cluster, work, ranges):
        sums[first] = part
        inputs.progress.update(min(len(sums) * _RANGE, windows), windows, "sequences")
    scores = sum((sums[first] for first in sorted(sums)), Sums()).scores(stream)
    figures = {
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte,
        "accuracy": scores.accuracy,
        "loss_nats": scores.loss_nats,
        "tokens": scores.tokens,
    }
    write_atomic(inputs.draft.path / "scores.json", json.dumps(figures, indent=1) + "\n")
    assert math.isfinite(scores.loss_nats)
    summary = (
        f"perplexity {scores.perplexity:.2f}, {describe_loss(scores.loss_nats, scores.bits_per_byte)}, "
        f"next-token accuracy {scores.accuracy:.1%} on {scores.tokens:,} held-out tokens"
    )
    return inputs.publish("evaluate", GIVES, config, summary, figures)


def _score(windows: range, model: Path, tokens: Path, batch_size: int, threads: int, gpu: bool) -> tuple[int, Sums]:
    """Runs in a Ray Data worker: the sums over some windows, with the first window's number."""
    import torch

    from raymill.evaluation.perplexity import sum_windows

    torch.set_num_threads(threads)
    device = torch.device("cuda" if gpu else "cpu")
    scored, stream = _load(model, tokens, device)
    length = scored.config.max_seq_len
    sums = sum_windows(scored, stream, windows, seq_len=length, batch_size=batch_size, device=device)
    return windows.start, sums


@lru_cache(maxsize=1)
def _load(model: Path, tokens: Path, device: torch.device) -> tuple[Transformer, TokenStream]:
    """Once per worker process, which scores many ranges."""
    from raymill.compression.quantize import load_served_model
    from raymill.dataset.shards import TokenStream

    return load_served_model(model).to(device), TokenStream(tokens, "val")
