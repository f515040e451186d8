"""Compress: a checkpoint in, a smaller and faster checkpoint out, with what it cost in quality.

First what is pruned goes, with a short recovery run if asked for; then the weights take the type of `method`. What was
written is read again, scored beside the original on the same held-out sequences, and run through the step that will serve
it with the threads of a serving replica. A result that is worse than `max_quality_loss` is refused and nothing is
published. Calibration and recovery read the train split alone. Runs in this process, without Ray; a minute or two for
10 M parameters. An attempt that was killed starts over: nothing in it is dear.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from raymill.artifact import Artifact, Draft, Kind
from raymill.cluster.config import RoleName
from raymill.compression.format import QUANTIZATION, GroupSize, Quantization
from raymill.config import Config as Settings
from raymill.errors import ArtifactError, QualityError
from raymill.model.files import TOKENIZER, WEIGHTS, read_config, read_model_config
from raymill.stages.contract import Demand, Inputs

if TYPE_CHECKING:
    from raymill.cluster.session import Cluster
    from raymill.compression.calibrate import Calibration
    from raymill.dataset.shards import TokenStream
    from raymill.evaluation.comparison import Quality
    from raymill.inference.loading import Device
    from raymill.model.transformer import Transformer

TAKES: tuple[Kind, ...] = ("checkpoint", "tokens")
MAY_TAKE: tuple[Kind, ...] = ()
GIVES: Kind = "checkpoint"
ROLE: RoleName = "serve"
LIVE = False

_FEW, _MANY = 1, 8  # sequences decoded at once where speed is measured


class PruneConfig(Settings):
    """What of the model goes before its weights take another type."""

    kind: Literal["magnitude", "wanda", "heads", "neurons", "layers"]
    """magnitude, wanda: single weights become zero; heads, neurons, layers: whole parts go and the model gets smaller."""
    share: Annotated[float, Field(gt=0, lt=1)]
    """Share of the weights, heads, neurons or layers that goes; 0.25 is a quarter."""
    recovery_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps of training afterwards, at a rate that falls to zero; for heads, neurons and layers only."""
    recovery_learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-4
    """Highest rate of that training."""
    recovery_batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    """Sequences per step of that training."""

    @model_validator(mode="after")
    def _recovers(self) -> PruneConfig:
        if self.recovery_steps and self.kind in ("magnitude", "wanda"):
            raise ValueError(
                f"training would fill the zeros of {self.kind} again; fix: leave recovery_steps out, "
                "or set kind to heads, neurons or layers"
            )
        return self


class Config(Settings):
    """How the model is made smaller, and how much worse it may become."""

    method: Literal["int8", "int4", "fp16", "bf16", "fp32"] = "int8"
    """Type of the weights. int8: per output channel; int4: per group of input channels, embedding and head int8; both
    with activations int8 per token. fp16, bf16: for GPUs. fp32: as they are, for pruning alone."""
    group_size: GroupSize = 32
    """int4: input channels that share one scale; 32 is the most exact, 128 the smallest."""
    prune: PruneConfig | None = None
    """What goes first; none means nothing does."""
    kv_cache: Literal["fp32", "int8"] = "fp32"
    """Precision of keys and values the result is measured with; set serve.kv_cache to the same."""
    calibration_sequences: Annotated[int, Field(ge=1, le=65_536)] | None = 64
    """Sequences of the train split that GPTQ (int8, int4) and pruning decide by; none means plain rounding."""
    max_quality_loss: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Largest relative rise of held-out perplexity that is accepted; 0.02 is 2 %."""
    max_sequences: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Held-out sequences both models are scored on."""
    max_choices: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Held-out pieces of text whose real continuation both models pick out of four."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    """Sequences scored at once."""

    @model_validator(mode="after")
    def _does_something(self) -> Config:
        if self.method == "fp32" and self.prune is None and self.kv_cache == "fp32":
            raise ValueError("nothing is compressed; fix: set method, prune or kv_cache")
        if self.prune is not None and self.prune.kind != "magnitude" and self.calibration_sequences is None:
            raise ValueError(f"{self.prune.kind} is decided by calibration_sequences; fix: set them, for example to 64")
        return self

    @property
    def quantization(self) -> Quantization | None:
        return Quantization(self.method, self.group_size) if self.method in ("int8", "int4") else None

    @property
    def name(self) -> str:
        """In a few words."""
        pruned = [] if self.prune is None else [f"{self.prune.share:.0%} of {_PRUNED[self.prune.kind]} pruned"]
        method = f"int4 in groups of {self.group_size}" if self.method == "int4" else self.method
        stored = [] if self.method == "fp32" else [method]
        return ", ".join([*pruned, *stored, *(["int8 KV cache"] if self.kv_cache == "int8" else [])])


_PRUNED = {"magnitude": "weights", "wanda": "weights", "heads": "heads", "neurons": "neurons", "layers": "layers"}


def demand(config: Config) -> Demand:
    return Demand(1)


def source_state(config: Config) -> Any:
    return None


def run(config: Config, inputs: Inputs, cluster: Cluster) -> Artifact:
    """Compresses, measures before and after, and publishes; QualityError with the figures when it lost too much."""
    from raymill.inference.kv_cache import PAGE_TOKENS, page_bytes

    source, folder = inputs["checkpoint"], inputs.draft.path
    _check(config, source)
    _empty(inputs.draft)
    threads = cluster.config.roles.serve.threads
    with _threads(threads):
        _make(config, inputs)
        shutil.copyfile(source.file(TOKENIZER), folder / TOKENIZER)
        before, after = _measure_quality(config, inputs)
        device: Device = "cuda" if cluster.config.roles.serve.gpus_per_worker else "cpu"
        speed = _measure_speed(config, (source.path, folder), device, threads)
    sizes = [(path / WEIGHTS).stat().st_size for path in (source.path, folder)]
    loss = _loss(before, after)
    figures: dict[str, Any] = {
        "method": config.method,
        "weights_bytes_before": sizes[0],
        "weights_bytes": sizes[1],
        **{f"{name}_before": value for name, value in asdict(before).items()},
        **asdict(after),
        "quality_loss": loss,
        "kv_cache": config.kv_cache,
        "kv_cache_bytes_per_token_before": page_bytes(read_model_config(source.path)[0]) // PAGE_TOKENS,
        "kv_cache_bytes_per_token": page_bytes(read_model_config(folder)[0], config.kv_cache) // PAGE_TOKENS,
        "threads": threads,
        **{f"tokens_per_s_{count}_sequences_{when}": rate for (when, count), rate in sorted(speed.items())},
    }
    for line in _table(figures):
        inputs.progress.note(line)
    _check_loss(config, before, after)
    summary = (
        f"{config.name}: {sizes[0] / 1e6:.1f} -> {sizes[1] / 1e6:.1f} MB ({sizes[0] / sizes[1]:.1f}x), "
        f"{speed['before', _MANY]:,.0f} -> {speed['after', _MANY]:,.0f} tokens/s "
        f"({speed['after', _MANY] / speed['before', _MANY]:.1f}x, {_MANY} sequences at once), perplexity {loss:+.2%}"
    )
    return inputs.publish("compress", GIVES, config, summary, figures)


def _check(config: Config, source: Artifact) -> None:
    """What can be found wrong before anything is computed."""
    from raymill.compression.shrink import shrunk_config

    values = read_config(source.path)
    if QUANTIZATION in values:
        raise ArtifactError(
            f"{source.path} is compressed already",
            why=f"{QUANTIZATION}: {values[QUANTIZATION]}",
            fix="name the checkpoint of train or tune",
        )
    shape, _ = read_model_config(source.path)
    prune = config.prune
    if prune is not None and prune.kind != "magnitude" and prune.kind != "wanda":
        shape = shrunk_config(shape, prune.kind, prune.share)
    if config.quantization is not None:
        config.quantization.check_fits(shape)


def _make(config: Config, inputs: Inputs) -> None:
    """Writes the compressed weights and their config.json into the draft."""
    from raymill.compression.half import save_half
    from raymill.compression.quantize import quantize_model, save_quantized
    from raymill.model.weights import load_model, save_model

    folder, end_id = inputs.draft.path, read_config(inputs["checkpoint"].path)["eos_token_id"]
    model = load_model(inputs["checkpoint"].path).requires_grad_(False).eval()
    calibration = _calibration(config, inputs, model)
    if config.prune is not None:
        model = _prune(config.prune, inputs, model, calibration, end_id)
    if config.quantization is not None:
        quantize_model(
            model, config.quantization, calibration, lambda done, of: inputs.progress.update(done, of, "layers")
        )
        save_quantized(folder, model, end_id, config.quantization)
    elif config.method == "fp16" or config.method == "bf16":
        save_half(folder, model, end_id, config.method)
    else:
        save_model(folder, model, end_id)


def _calibration(config: Config, inputs: Inputs, model: Transformer) -> Calibration | None:
    from raymill.compression.calibrate import read_calibration
    from raymill.dataset.shards import TokenStream

    if config.calibration_sequences is None or (config.quantization is None and config.prune is None):
        return None
    stream = TokenStream(inputs["tokens"].path, "train")
    return read_calibration(stream, config.calibration_sequences, model.config.max_seq_len)


def _prune(
    prune: PruneConfig, inputs: Inputs, model: Transformer, calibration: Calibration | None, end_id: int
) -> Transformer:
    from raymill.compression.prune import prune_by_magnitude, prune_by_wanda
    from raymill.compression.shrink import shrink
    from raymill.dataset.shards import TokenStream
    from raymill.model.weights import load_model, save_model
    from raymill.training.recovery import recover

    if prune.kind == "magnitude":
        prune_by_magnitude(model, prune.share)
        return model
    assert calibration is not None
    if prune.kind == "wanda":
        prune_by_wanda(model, prune.share, calibration)
        return model
    model = shrink(model, prune.kind, prune.share, calibration)
    if not prune.recovery_steps:
        return model
    pruned = inputs.draft.work / "pruned"
    shutil.rmtree(pruned, ignore_errors=True)  # of an attempt that was killed
    pruned.mkdir()
    save_model(pruned, model, end_id)
    recovered = recover(
        pruned,
        inputs["tokens"].path,
        pruned / "recovery",
        steps=prune.recovery_steps,
        learning_rate=prune.recovery_learning_rate,
        batch_size=prune.recovery_batch_size,
        validate=partial(_validate, TokenStream(inputs["tokens"].path, "val"), prune.recovery_batch_size),
        on_step=lambda row: inputs.progress.update(row.step, prune.recovery_steps, "steps", f"loss {row.loss:.3f}"),
    )
    return load_model(recovered).requires_grad_(False).eval()


def _validate(
    stream: TokenStream, batch_size: int, model: Transformer, max_sequences: int | None
) -> dict[str, float | None]:
    """Of one batch: a recovery is judged by what the stage measures afterwards."""
    from raymill.evaluation.perplexity import evaluate_stream

    length = model.config.max_seq_len
    scores = evaluate_stream(model, stream, seq_len=length, max_sequences=batch_size, batch_size=batch_size)
    return {"loss_nats": scores.loss_nats, "bits_per_byte": scores.bits_per_byte, "accuracy": scores.accuracy}


def _measure_quality(config: Config, inputs: Inputs) -> tuple[Quality, Quality]:
    """Of the original and of what stands in the draft."""
    from raymill.compression.kv_cache import round_keys_and_values
    from raymill.compression.quantize import load_served_model
    from raymill.dataset.shards import TokenStream
    from raymill.evaluation.comparison import compare

    before, after = load_served_model(inputs["checkpoint"].path), load_served_model(inputs.draft.path)
    if config.kv_cache == "int8":
        round_keys_and_values(after)
    return compare(
        (before, after),
        TokenStream(inputs["tokens"].path, "val"),
        seq_len=before.config.max_seq_len,
        max_sequences=config.max_sequences,
        max_choices=config.max_choices,
        batch_size=config.batch_size,
        on_sequences=lambda done, of: inputs.progress.update(done, of, "sequences"),
    )


def _loss(before: Quality, after: Quality) -> float:
    return after.perplexity / before.perplexity - 1


def _check_loss(config: Config, before: Quality, after: Quality) -> None:
    """QualityError when the relative rise of perplexity is above the bound."""
    loss = _loss(before, after)
    if not loss <= config.max_quality_loss:  # written so that NaN is refused too
        raise QualityError(
            f"{config.name} makes the model {loss:+.2%} worse",
            where="compress",
            why=f"held-out perplexity {before.perplexity:.3f} -> {after.perplexity:.3f}; "
            f"max_quality_loss is {config.max_quality_loss:.2%}",
            fix=f"{_milder(config)}, or raise compress.max_quality_loss",
        )


def _milder(config: Config) -> str:
    """What loses less."""
    prune = config.prune
    if prune is not None:
        less = "lower compress.prune.share"
        if prune.kind == "magnitude" or prune.kind == "wanda":
            return less
        return f"{'raise' if prune.recovery_steps else 'set'} compress.prune.recovery_steps, {less}"
    if config.quantization is not None and config.calibration_sequences is None:
        return "set compress.calibration_sequences, for example to 64"
    if config.method == "int4":
        return f"{'lower compress.group_size, ' if config.group_size > 32 else ''}set compress.method to int8"
    return "serve the full-precision checkpoint"


def _measure_speed(
    config: Config, folders: tuple[Path, Path], device: Device, threads: int
) -> dict[tuple[str, int], float]:
    """Tokens per second by ("before" or "after", sequences at once)."""
    from raymill.inference.loading import load_step
    from raymill.inference.speed import decode_speeds, pages_for_bursts

    pages = pages_for_bursts(_MANY)
    steps = {
        "before": load_step(folders[0], "auto", device, pages, "fp32", threads),
        "after": load_step(folders[1], "auto", device, pages, config.kv_cache, threads),
    }
    return decode_speeds(steps, (_FEW, _MANY))


def _table(figures: dict[str, Any]) -> list[str]:
    """Before and after, one line a figure."""
    rows = [("weights", "weights_bytes_before", "weights_bytes", 1e-6, " MB", 1)]
    rows.append(("KV cache of a token", "kv_cache_bytes_per_token_before", "kv_cache_bytes_per_token", 1, " B", 0))
    for count in (_FEW, _MANY):
        name = f"tokens_per_s_{count}_sequences"
        label = f"tokens/s, {count} sequence{'s' if count > 1 else ''}"
        rows.append((label, f"{name}_before", f"{name}_after", 1, "", 0))
    rows.append(("perplexity", "perplexity_before", "perplexity", 1, "", 3))
    rows.append(("next-token accuracy", "accuracy_before", "accuracy", 100, " %", 2))
    rows.append(("continuation of four", "choice_accuracy_before", "choice_accuracy", 100, " %", 2))
    lines = [f"{'':22}{'before':>14}{'after':>14}{'change':>10}"]
    for label, first, second, factor, unit, digits in rows:
        before, after = figures[first] * factor, figures[second] * factor
        shown = [f"{value:,.{digits}f}{unit}" for value in (before, after)]
        change = f"{after / before - 1:+.2%}" if before else "-"
        lines.append(f"{label:22}{shown[0]:>14}{shown[1]:>14}{change:>10}")
    return lines


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
