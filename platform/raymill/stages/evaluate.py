"""Evaluate: a checkpoint and token shards in, scores on the held-out split out.

Ray Data hands ranges of the val split to one scorer per worker; sums come back and are added in the split's order, so the
figures do not depend on the number of workers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from raymill.artifact import Artifact, Kind, write_atomic
from raymill.cluster.config import RoleName
from raymill.config import Config as Settings
from raymill.stages.contract import Demand, Inputs

if TYPE_CHECKING:
    from raymill.cluster.session import Cluster

TAKES: tuple[Kind, ...] = ("checkpoint", "tokens")
MAY_TAKE: tuple[Kind, ...] = ()
GIVES: Kind = "scores"
ROLE: RoleName = "data"
LIVE = False

_WINDOWS_PER_ROW = 64
"""Sequences one Ray Data row stands for: some seconds of work, and so the grain of progress."""


class Config(Settings):
    """How the held-out split is scored."""

    max_sequences: Annotated[int, Field(ge=1)] | None = None
    """Sequences of the val split to score; none means all of it."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    """Sequences scored at once by one worker."""
    num_workers: Annotated[int, Field(ge=1, le=4096)] = 2
    """Scorers at work."""


def demand(config: Config) -> Demand:
    return Demand(config.num_workers)


def source_state(config: Config) -> Any:
    return None


def run(config: Config, inputs: Inputs, cluster: Cluster) -> Artifact:
    """Scores the checkpoint on the val split and publishes scores.json."""
    from raymill.dataset.shards import TokenStream
    from raymill.evaluation.perplexity import Sums, count_windows
    from raymill.model.weights import read_config

    checkpoint, tokens = inputs["checkpoint"], inputs["tokens"]
    stream = TokenStream(tokens.path, "val")
    windows = count_windows(stream, read_config(checkpoint.path)["max_position_embeddings"], config.max_sequences)
    ranges = [
        {"first": first, "stop": min(first + _WINDOWS_PER_ROW, windows)}
        for first in range(0, windows, _WINDOWS_PER_ROW)
    ]
    cluster.connect()
    sums: dict[int, Sums] = {}
    for row in _score_ranges(config, ranges, checkpoint.path, tokens.path, cluster):
        sums[row["first"]] = Sums(row["nats"], row["right"], row["tokens"])
        done = sum(each.tokens for each in sums.values())
        inputs.progress.update(done, windows * done / (len(sums) * _WINDOWS_PER_ROW), "tokens")
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
        f"perplexity {scores.perplexity:.2f}, {scores.bits_per_byte:.3f} bits per byte, "
        f"next-token accuracy {scores.accuracy:.1%} on {scores.tokens:,} held-out tokens"
    )
    return inputs.publish("evaluate", GIVES, config, summary, figures)


def _score_ranges(config: Config, ranges: list[dict[str, int]], model: Path, tokens: Path, cluster: Cluster) -> Any:
    import ray.data

    role = cluster.config.roles.data
    settings = (str(model.absolute()), str(tokens.absolute()), config.batch_size, role.threads)
    workers = min(config.num_workers, len(ranges))
    dataset = ray.data.from_items(ranges, override_num_blocks=len(ranges)).map(
        _Scorer,
        fn_constructor_args=settings,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=role.cpus_per_worker,
        num_gpus=role.gpus_per_worker,
    )
    return dataset.iter_rows()


class _Scorer:
    """Lives in a Ray Data worker: one model, many ranges."""

    def __init__(self, model: str, tokens: str, batch_size: int, threads: int) -> None:
        import torch

        from raymill.dataset.shards import TokenStream
        from raymill.model.weights import default_device, load_model

        torch.set_num_threads(threads)
        self._device = default_device()
        self._model = load_model(Path(model)).to(self._device)
        self._stream = TokenStream(Path(tokens), "val")
        self._batch_size = batch_size

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        from raymill.evaluation.perplexity import sum_windows

        windows = range(row["first"], row["stop"])
        length = self._model.config.max_seq_len
        sums = sum_windows(
            self._model, self._stream, windows, seq_len=length, batch_size=self._batch_size, device=self._device
        )
        return {"first": row["first"], "nats": sums.nats, "right": sums.right, "tokens": sums.tokens}
