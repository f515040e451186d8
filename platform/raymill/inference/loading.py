"""A checkpoint folder to a running engine: what a serving replica does once, when it starts.

Which engine: "native" is compiled code on the CPU, "torch" runs everywhere and is the one for a GPU, "vllm" hands requests to
vLLM. "auto" takes native where it can be compiled and torch elsewhere, and says so once. Each is imported only when it is
taken: a native replica never loads torch. The torch step needs twice the size of the weights while matrices are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from raymill.errors import ArtifactError, MachineError
from raymill.inference import native
from raymill.inference.adapters import load_adapter
from raymill.inference.draws import check_vocabulary
from raymill.inference.engine import BatchingEngine
from raymill.inference.kv_cache import KvPrecision, fit_pages
from raymill.inference.requests import Engine, EngineStats
from raymill.inference.step import ModelStep
from raymill.model.files import CONFIG, TOKENIZER, read_model_config
from raymill.tokenizer.tokenizer import StreamDecoder, Tokenizer

EngineName = Literal["auto", "native", "torch", "vllm"]
Device = Literal["cpu", "cuda"]


def load_engine(
    checkpoint: Path,
    *,
    engine: EngineName = "auto",
    device: Device = "cpu",
    threads: int = 1,
    max_slots: int,
    max_kv_cache_bytes: int,
    kv_precision: KvPrecision = "fp32",
    max_queued: int,
    prefill_chunk_tokens: int,
    adapters: Mapping[str, Path] | None = None,
    on_stats: Callable[[EngineStats], None] | None = None,
) -> tuple[Engine, Tokenizer]:
    """ArtifactError when the checkpoint, its tokenizer or an adapter is not whole or they do not match, or the vocabulary is
    too large; MachineError when not one sequence fits, or the device or what the engine needs is not there.

    adapters: LoRA folders by the name that requests call them. threads: that a step computes on.
    """
    config, vocab_size = read_model_config(checkpoint, exported=engine == "vllm")
    tokenizer = Tokenizer.load(checkpoint / TOKENIZER)
    if tokenizer.vocab_size > vocab_size:
        raise ArtifactError(
            f"{checkpoint / TOKENIZER} does not match the model",
            why=f"it has {tokenizer.vocab_size} ids, the model {vocab_size}",
            fix="name a complete checkpoint",
        )
    loras = {name: load_adapter(folder, config) for name, folder in (adapters or {}).items()}
    if engine == "vllm":
        from raymill.inference.vllm import VllmEngine

        return VllmEngine.load(
            checkpoint,
            tokenizer,
            config,
            vocab_size,
            device=device,
            threads=threads,
            max_slots=max_slots,
            max_kv_cache_bytes=max_kv_cache_bytes,
            kv_precision=kv_precision,
            max_queued=max_queued,
            adapters=adapters or {},
        ), tokenizer
    check_vocabulary(vocab_size, str(checkpoint / CONFIG))
    pages = fit_pages(config, max_slots, max_kv_cache_bytes, kv_precision)
    step = load_step(checkpoint, engine, device, pages, kv_precision, threads)
    return BatchingEngine(
        step,
        lambda: StreamDecoder(tokenizer),
        num_slots=max_slots,
        max_queued=max_queued,
        max_step_tokens=max_slots + prefill_chunk_tokens,
        adapters=loras,
        on_stats=on_stats,
    ), tokenizer


def load_step(
    checkpoint: Path, engine: EngineName, device: Device, pages: int, kv_precision: KvPrecision, threads: int
) -> ModelStep:
    """The step that such an engine computes with; not for "vllm". ArtifactError and MachineError as `load_engine`."""
    if engine == "native" and device != "cpu":
        raise MachineError("the native engine computes on the CPU", fix="set serve.engine to torch to use the GPU")
    if device == "cpu" and engine != "torch":
        if native.library() is not None:  # else it has said why
            from raymill.inference.native_step import NativeStep

            return NativeStep.load(checkpoint, num_pages=pages, kv_precision=kv_precision, threads=threads)
        if engine == "native":
            raise MachineError(
                "the native engine cannot be compiled here",
                why="no C++ compiler works on this node; the log says what was tried",
                fix="install g++ or clang, or set serve.engine to auto or torch",
            )
    from raymill.inference.torch_loading import load_torch_step

    return load_torch_step(checkpoint, device, pages, kv_precision, threads)
