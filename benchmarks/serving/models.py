"""The models of this table: random weights, made once by raymill and exported by it, so that all engines run the same.

    <cache>/serving-<name>-<version>/fp32, int8, int4        raymill's checkpoints
                                    /gguf-q8_0, gguf-q4_0    llama.cpp, OpenVINO GenAI
                                    /compressed              vLLM (W8A8)
                                    /hugging_face            transformers, and what ONNX Runtime GenAI's builder reads

The deviation of each matrix is that of its inputs (kaiming), so that the text of such a model is not one token forever: it
would be what speculation guesses. 125M takes two minutes and 2.5 GB. The tokenizer is learned from this Python's library.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import say
from benchmarks.training.tokens import standard_library

_VERSION = 1
_LEARN_BYTES = 6_000_000


@dataclass(frozen=True)
class Shape:
    """A Llama with heads of 64."""

    name: str
    vocab_size: int
    layers: int
    dim: int
    hidden_dim: int
    heads: int
    kv_heads: int
    tied: bool
    max_seq_len: int = 1024


SMALL = Shape("12.6M", 8192, 6, 384, 1024, 6, 2, tied=True)
LARGE = Shape("125M", 32000, 12, 768, 2048, 12, 4, tied=False)


@dataclass(frozen=True)
class Model:
    """A shape's checkpoint and exports in the cache."""

    cache: Path
    shape: Shape

    def checkpoint(self, method: str) -> Path:
        """fp32, int8 or int4, as raymill serves it."""
        return self._made(method, lambda folder: self._make(folder, method))

    def gguf(self, precision: str) -> Path:
        """One file; q8_0 of the int8 checkpoint, q4_0 of the int4 one."""
        source = self.checkpoint("int8" if precision == "q8_0" else "int4")
        return self._export(f"gguf-{precision}", source, "gguf", precision) / "model.gguf"

    def compressed(self) -> Path:
        """W8A8 for vLLM."""
        return self._export("compressed", self.checkpoint("int8"), "compressed_tensors", "fp32")

    def hugging_face(self) -> Path:
        return self._export("hugging_face", self.checkpoint("fp32"), "hugging_face", "fp32")

    def folder(self, name: str) -> Path:
        """Where what is made of this model lies."""
        return self.cache / f"serving-{self.shape.name}-{_VERSION}" / name

    def _made(self, name: str, make: Callable[[Path], Any]) -> Path:
        """The folder `name`, made aside where it is not there."""
        folder = self.folder(name)
        if not folder.exists():
            say(f"  making {self.shape.name} {name} (once) ...")
            aside = folder.with_name(f".{name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            make(aside)
            aside.rename(folder)
        return folder

    def _export(self, name: str, source: Path, form: str, precision: str) -> Path:
        from raymill.export.formats import export

        return self._made(name, lambda folder: export(source, form, folder, precision))

    def _make(self, folder: Path, method: str) -> None:
        from raymill.compression.format import Quantization
        from raymill.compression.quantize import quantize_model, save_quantized
        from raymill.model.weights import load_model, save_model
        from raymill.tokenizer.tokenizer import Tokenizer

        if method == "fp32":
            tokenizer = Tokenizer.train(_some_texts(), self.shape.vocab_size)
            tokenizer.save(folder / "tokenizer.json")
            save_model(folder, _random(self.shape), tokenizer.end_id)
            return
        whole = self.checkpoint("fp32")
        shutil.copy(whole / "tokenizer.json", folder)
        model = load_model(whole).requires_grad_(False).eval()
        quantization = Quantization("int8" if method == "int8" else "int4")
        quantize_model(model, quantization)
        end_id = Tokenizer.load(whole / "tokenizer.json").end_id
        save_quantized(folder, model, end_id, quantization)


def _random(shape: Shape) -> Any:
    from raymill.model.config import InitConfig, ModelConfig
    from raymill.model.transformer import Transformer

    config = ModelConfig(
        num_layers=shape.layers,
        model_dim=shape.dim,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        hidden_dim=shape.hidden_dim,
        max_seq_len=shape.max_seq_len,
        tie_embeddings=shape.tied,
    )
    model = Transformer(config, shape.vocab_size)
    model.initialize(0, InitConfig(name="kaiming"))
    return model


def _some_texts() -> list[str]:
    texts, size = [], 0
    for text in standard_library():
        texts.append(text)
        size += len(text)
        if size > _LEARN_BYTES:
            break
    return texts
