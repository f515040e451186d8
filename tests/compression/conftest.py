"""Small models with nothing at its neutral value, and text for them to be measured on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from raymill.compression.calibrate import Calibration
from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer

ARCHITECTURES = {
    "llama": {},
    "mistral": {"architecture": "mistral", "sliding_window": 4},
    "qwen2": {"architecture": "qwen2"},
    "qwen3": {"architecture": "qwen3", "head_dim": 32},
    "gpt2": {"architecture": "gpt2", "num_kv_heads": 4},
}


@pytest.fixture
def small_model() -> Callable[..., Transformer]:
    def build(architecture: str = "llama", **settings: object) -> Transformer:
        shape = {"num_layers": 2, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 96}
        config = ModelConfig(**{**shape, "max_seq_len": 64, **ARCHITECTURES[architecture], **settings})
        model = Transformer(config, 300)
        model.initialize(seed=1)
        with torch.no_grad():  # gains that are not 1, biases that are not 0
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(2)) - 0.5)
        return model.requires_grad_(False).eval()

    return build


@pytest.fixture
def calibration() -> Calibration:
    ids = torch.randint(0, 300, (12, 32), generator=torch.Generator().manual_seed(5))
    return Calibration(ids, (ids == 0).cumsum(1))
