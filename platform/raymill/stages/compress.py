"""Compress: a checkpoint in, a smaller and faster checkpoint out, with what it cost in quality.

Both models are scored on the same held-out sequences and run through the step that will serve them, with the threads of
a serving replica. A result that is worse than `max_quality_loss` is refused and nothing is published. Runs in this
process, without Ray; about a minute for 10 M parameters. An attempt that was killed starts over: nothing in it is dear.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from raymill.artifact import Artifact, Draft, Kind
from raymill.cluster.config import RoleName
from raymill.config import Config as Settings
from raymill.errors import ArtifactError, QualityError
from raymill.stages.contract import Demand, Inputs

if TYPE_CHECKING:
    from raymill.cluster.session import Cluster
    from raymill.dataset.shards import TokenStream
    from raymill.model.transformer import Transformer

TAKES: tuple[Kind, ...] = ("checkpoint", "tokens")
MAY_TAKE: tuple[Kind, ...] = ()
GIVES: Kind = "checkpoint"
ROLE: RoleName = "serve"
LIVE = False

_FEW, _MANY = 1, 8  # sequences decoded at once where speed is measured


class Config(Settings):
    """How the model is made smaller, and how much worse it may become."""

    method: Literal["int8"] = "int8"
    """int8: weights int8 per output channel, activations int8 per token."""
    max_quality_loss: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Largest relative rise of held-out perplexity that is accepted; 0.02 is 2 %."""
    max_sequences: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Held-out sequences both models are scored on."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    """Sequences scored at once."""


def demand(config: Config) -> Demand:
    return Demand(1)


def source_state(config: Config) -> Any:
    return None


def run(config: Config, inputs: Inputs, cluster: Cluster) -> Artifact:
    """Quantizes, measures before and after, and publishes; QualityError with the figures when it lost too much."""
    from raymill.compression.quantize import load_served_model, quantize_model, save_quantized
    from raymill.dataset.shards import TokenStream
    from raymill.inference.kv_cache import pages_for
    from raymill.inference.speed import decode_speeds
    from raymill.inference.torch_step import TorchStep
    from raymill.model.files import TOKENIZER, WEIGHTS, read_config

    source, folder = inputs["checkpoint"], inputs.draft.path
    values = read_config(source.path)
    if "quantization" in values:
        raise ArtifactError(
            f"{source.path} is compressed already",
            why=f"quantization: {values['quantization']}",
            fix="name the checkpoint of train or tune",
        )
    _empty(inputs.draft)
    stream = TokenStream(inputs["tokens"].path, "val")
    threads = cluster.config.roles.serve.threads
    with _threads(threads):
        before, after = load_served_model(source.path), load_served_model(source.path)
        quantize_model(after)
        perplexities = _perplexities(config, inputs, stream, before, after)
        loss = _check_loss(config, *perplexities)
        pages = _MANY * pages_for(before.config.max_seq_len)
        steps = {"before": TorchStep(before, pages), "after": TorchStep(after, pages)}
        speed = decode_speeds(steps, (_FEW, _MANY))
    save_quantized(folder, after, values["eos_token_id"])
    shutil.copyfile(source.file(TOKENIZER), folder / TOKENIZER)
    sizes = [(path / WEIGHTS).stat().st_size for path in (source.path, folder)]
    figures: dict[str, Any] = {
        "method": config.method,
        "weights_bytes_before": sizes[0],
        "weights_bytes": sizes[1],
        "perplexity_before": perplexities[0],
        "perplexity": perplexities[1],
        "quality_loss": loss,
        "threads": threads,
        **{f"tokens_per_s_{count}_sequences_{when}": rate for (when, count), rate in sorted(speed.items())},
    }
    summary = (
        f"{config.method}: {sizes[0] / 1e6:.1f} -> {sizes[1] / 1e6:.1f} MB ({sizes[0] / sizes[1]:.1f}x), "
        f"{speed['before', _MANY]:,.0f} -> {speed['after', _MANY]:,.0f} tokens/s "
        f"({speed['after', _MANY] / speed['before', _MANY]:.1f}x, {_MANY} sequences at once), perplexity {loss:+.2%}"
    )
    return inputs.publish("compress", GIVES, config, summary, figures)


def _check_loss(config: Config, before: float, after: float) -> float:
    """The relative rise of perplexity; QualityError when it is above the bound."""
    loss = after / before - 1
    if not loss <= config.max_quality_loss:  # written so that NaN is refused too
        raise QualityError(
            f"{config.method} makes the model {loss:+.2%} worse",
            where="compress",
            why=f"held-out perplexity {before:.3f} -> {after:.3f}; max_quality_loss is {config.max_quality_loss:.2%}",
            fix="train longer, serve the full-precision checkpoint, or raise compress.max_quality_loss",
        )
    return loss


def _perplexities(
    config: Config, inputs: Inputs, stream: TokenStream, before: Transformer, after: Transformer
) -> tuple[float, float]:
    """Of both models over the same windows."""
    from raymill.evaluation.perplexity import Sums, choose_windows, sum_windows

    length = before.config.max_seq_len
    windows = choose_windows(stream, length, config.max_sequences)
    sums = [Sums(), Sums()]
    for first in range(0, len(windows), config.batch_size):
        part = windows[first : first + config.batch_size]
        for which, model in enumerate((before, after)):
            sums[which] += sum_windows(model, stream, part, seq_len=length, batch_size=config.batch_size)
        inputs.progress.update(first + len(part), len(windows), "sequences")
    scores = [each.scores(stream) for each in sums]
    return scores[0].perplexity, scores[1].perplexity


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch with this many threads, as a serving replica has."""
    import torch

    earlier = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(earlier)


def _empty(draft: Draft) -> None:
    """Drops what a killed attempt left; the draft's own work folder stays."""
    for path in draft.path.iterdir():
        if path == draft.work:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
