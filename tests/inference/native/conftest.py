"""Small checkpoints of every architecture and precision, made once; and the compiled step, or a skip without a compiler."""

from __future__ import annotations

import functools

import pytest
import torch

from raymill.compression.format import Quantization
from raymill.compression.quantize import quantize_model, save_quantized
from raymill.inference import native
from raymill.inference.native_step import NativeStep
from raymill.model.config import ModelConfig, RopeScaling
from raymill.model.transformer import Transformer
from raymill.model.weights import save_model

VOCAB = 97
PAGES = 160
SETTINGS = {
    "llama": {},
    "llama untied, odd widths": {"tie_embeddings": False, "head_dim": 6, "hidden_dim": 100, "num_kv_heads": 1},
    "llama3 rope": {"rope_scaling": RopeScaling(kind="llama3", factor=4, original_max_seq_len=12)},
    "mistral window": {"architecture": "mistral", "sliding_window": 37},
    "qwen2": {"architecture": "qwen2"},
    "qwen3 head_dim": {"architecture": "qwen3", "head_dim": 48, "tie_embeddings": False},
    "qwen3 window of 1": {"architecture": "qwen3", "sliding_window": 1},
    "gpt2": {"architecture": "gpt2", "num_kv_heads": 4},
}


def make_model(name: str, precision: str) -> Transformer:
    shape = {"num_layers": 2, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 96, "max_seq_len": 160}
    model = Transformer(ModelConfig(**{**shape, **SETTINGS[name]}), VOCAB)
    model.initialize(seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():  # away from init: norms that are not 1, biases that are not 0
            parameter.mul_(2 + 2 * torch.rand(parameter.shape, generator=generator))
            if parameter.ndim < 2:
                parameter.mul_(0.3).add_(0.5 * torch.rand(parameter.shape, generator=generator))
    model.requires_grad_(False).eval()
    if precision != "fp32":
        quantize_model(model, Quantization(precision))
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """(architecture, precision) -> its folder."""

    @functools.cache
    def make(name="llama", precision="int8"):
        folder = tmp_path_factory.mktemp("checkpoint")
        model = make_model(name, precision)
        if precision == "fp32":
            save_model(folder, model, end_id=0)
        else:
            save_quantized(folder, model, 0, Quantization(precision))
        return folder

    return make


@pytest.fixture
def load(checkpoint):
    """A step over one of these checkpoints; ended with the test."""
    if native.library() is None:
        pytest.skip("no C++ compiler")
    steps = []

    def load(name="llama", precision="int8", *, kv="fp32", threads=2, target=None):
        folder = checkpoint(name, precision)
        steps.append(NativeStep.load(folder, num_pages=PAGES, kv_precision=kv, threads=threads, target=target))
        return steps[-1]

    yield load
    for step in steps:
        step.close()
