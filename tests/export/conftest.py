"""Tiny models of every architecture, away from their first weights, with a tokenizer of their own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raymill.compression.format import Quantization
from raymill.compression.quantize import quantize_model, save_quantized
from raymill.export.source import read_source
from raymill.model.config import InitConfig, ModelConfig
from raymill.model.transformer import Transformer
from raymill.model.weights import save_model
from raymill.tokenizer.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog; it doesn't stop at 1234567 fences, they'll say.\n\n\tWHO'S there?",
    "def walk(path):\n    for name in sorted(path.iterdir()):\n        yield name  # a comment\n\n\nclass Walker:\n    pass\n",
    "Gr\u00fc\u00dfe aus K\u00f6ln, "
    "\u4f60\u597d\u4e16\u754c\uff0c\u043f\u0440\u0438\u0432\u0435\u0442 \U0001f600\U0001f469\u200d\U0001f467!  end   ",
]

OF_ARCHITECTURE = {
    "mistral": {"tie_embeddings": False},
    "qwen3": {"head_dim": 32, "tie_embeddings": False},
    "gpt2": {"num_kv_heads": 4},
}
SHAPE = {"num_layers": 2, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 96, "max_seq_len": 64}


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Learned from, and encoded by both sides."""
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, 400)


Make = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> Make:
    """`checkpoint("qwen2", "int8", rope_theta=500.0)`: the folder of a model."""

    def make(
        architecture: str = "llama", method: str = "fp32", tokenizer: Tokenizer = tokenizer, **settings: object
    ) -> Path:
        folder = tmp_path / f"checkpoint{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        of_architecture = OF_ARCHITECTURE.get(architecture, {})
        model = a_model(tokenizer.vocab_size, architecture=architecture, **{**of_architecture, **settings})
        if method == "fp32":
            save_model(folder, model, tokenizer.end_id)
        else:
            quantization = Quantization(method)
            quantize_model(model, quantization)
            save_quantized(folder, model, tokenizer.end_id, quantization)
        tokenizer.save(folder / "tokenizer.json")
        return folder

    return make


def a_model(vocab_size: int, **settings: object) -> Transformer:
    """Gains that are not 1, biases that are not 0, and matrices large enough that texts differ."""
    model = Transformer(ModelConfig(**{**SHAPE, **settings}), vocab_size)
    model.initialize(seed=1, init=InitConfig(std=0.3))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return model.requires_grad_(False).eval()


@pytest.fixture
def widened() -> Callable[[Path], Transformer]:
    """A checkpoint's model in float32: quantized matrices multiplied out."""

    def load(folder: Path) -> Transformer:
        source = read_source(folder)
        model = Transformer(source.config, source.vocab_size)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(source.full(name))
        return model.requires_grad_(False).eval()

    return load


@pytest.fixture
def greedy() -> Callable[..., list[int]]:
    """The likeliest `count` ids after a prompt."""

    def choose(model: Transformer, ids: list[int], count: int) -> list[int]:
        made = list(ids)
        for _ in range(count):
            made.append(int(model(torch.tensor([made]))[0, -1].argmax()))
        return made[len(ids) :]

    return choose


@pytest.fixture
def peer() -> Callable[[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """`peer("run_llama", jobs)`: what that script of peers/ makes of the jobs, under the Python RAYMILL_PEERS names."""

    def run(script: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        python = os.environ.get("RAYMILL_PEERS")
        if python is None:
            pytest.skip("RAYMILL_PEERS names no Python that has the peers")
        command = [python, str(Path(__file__).parent / "peers" / f"{script}.py")]
        done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True)
        if "ModuleNotFoundError" in done.stderr:
            pytest.skip(done.stderr.strip().splitlines()[-1])
        assert done.returncode == 0, done.stderr[-2000:]
        found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    return run
