"""A checkpoint of any method, read once for export: its shape, its matrices as they are stored, its tokenizer.

In: a folder with config.json, tokenizer.json and model.safetensors or its shards. Out: a Source, whose weights bear Llama's names whatever
the architecture: a float32 tensor, or a Quantized matrix that keeps the integers and scales, so that a format of the
same kind takes them over unchanged. Costs: the weights once in memory, as they lie on disk; `full` widens one at a time.

Shapes: N output channels, K input channels, G groups of a row (1 for a scale per channel).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from raymill.compression.format import read_quantization
from raymill.compression.int4 import unpack
from raymill.errors import ArtifactError
from raymill.model.config import ModelConfig
from raymill.model.files import CONFIG, TOKENIZER, WEIGHTS, read_config, read_model_config
from raymill.model.transformer import Transformer
from raymill.model.weights import read_stored, read_weights
from raymill.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Quantized:
    """A matrix of small integers: weight[n, k] = values[n, k] * scale[n, k // (K / G)]."""

    values_NK: Tensor
    """int8, symmetric around zero; -8 to 7 where `bits` is 4."""
    scale_NG: Tensor
    """float32."""
    bits: int
    """8 or 4."""

    @property
    def group_size(self) -> int:
        """Input channels that share a scale."""
        return self.values_NK.shape[1] // self.scale_NG.shape[1]

    def full(self) -> Tensor:
        """The matrix in float32."""
        grouped = self.values_NK.float().unflatten(1, (self.scale_NG.shape[1], -1))
        widened: Tensor = (grouped * self.scale_NG[:, :, None]).flatten(1)
        return widened

    def rows(self, order: Callable[[Tensor], Tensor]) -> Quantized:
        """The same with its rows put into another order."""
        return Quantized(order(self.values_NK), order(self.scale_NG), self.bits)


Weight = Tensor | Quantized


@dataclass(frozen=True)
class Source:
    """What every format is written from."""

    config: ModelConfig
    vocab_size: int
    """Rows of the embedding; the tokenizer may know fewer ids."""
    weights: dict[str, Weight]
    """By Llama's parameter names, without a tied head."""
    method: str
    """fp32, int8 or int4."""
    tokenizer: Tokenizer
    inner: tokenizers.Tokenizer
    """The library's form of the same, as its file has it."""
    with_tokenizer: bool = True
    """Whether the tokenizer goes along where a format could do without."""

    def full(self, name: str) -> Tensor:
        """One weight in float32."""
        weight = self.weights[name]
        return weight.full() if isinstance(weight, Quantized) else weight

    @property
    def end_token(self) -> str:
        """The name of the token behind every document."""
        return str(self.inner.id_to_token(self.tokenizer.end_id))


def read_source(folder: Path) -> Source:
    """Reads a checkpoint; ArtifactError when it is not whole, or its tokenizer is not the model's."""
    config, vocab_size = read_model_config(folder)
    quantization = read_quantization(read_config(folder), str(folder / CONFIG))
    if quantization is None:
        weights: dict[str, Weight] = dict(read_weights(folder, config, vocab_size))
    else:
        weights = _read_quantized(folder, config, vocab_size)
    if config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    if tokenizer.vocab_size > vocab_size:
        why = f"it has ids up to {tokenizer.vocab_size - 1}, and the model only {vocab_size} rows"
        raise ArtifactError(f"{folder / TOKENIZER} is not this model's", why=why, fix="name a complete checkpoint")
    method = "fp32" if quantization is None else quantization.method
    inner = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    return Source(config, vocab_size, weights, method, tokenizer, inner)


def _read_quantized(folder: Path, config: ModelConfig, vocab_size: int) -> dict[str, Weight]:
    tensors = read_stored(folder)
    with torch.device("meta"):
        wanted = dict(Transformer(config, vocab_size).named_parameters())
    weights: dict[str, Weight] = {}
    for name, parameter in wanted.items():
        found, scale = tensors.get(name), tensors.get(f"{name}_scale")
        weight = None if found is None else found.float() if scale is None else _take(found, scale)
        shape = weight.values_NK.shape if isinstance(weight, Quantized) else None if weight is None else weight.shape
        if weight is None or shape != parameter.shape:
            why = f"{name} is missing or of another shape or type"
            raise ArtifactError(
                f"{folder / WEIGHTS} does not match {CONFIG}", why=why, fix="name a complete checkpoint"
            )
        weights[name] = weight
    return weights


def _take(stored: Tensor, scale: Tensor) -> Quantized | None:
    """A matrix as format.py has it; None: not one."""
    if stored.ndim != 2 or scale.ndim != 2 or len(scale) != len(stored):
        return None
    if stored.dtype == torch.int8:
        return Quantized(stored, scale.float(), 8) if scale.shape[1] == 1 else None
    if stored.dtype != torch.uint8 or (2 * stored.shape[1]) % scale.shape[1]:
        return None
    return Quantized(unpack(stored).to(torch.int8), scale.float(), 4)
