"""The first weights: what each method draws, and that a piece of a model draws what the whole one does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from raymill.model.config import InitConfig, ModelConfig
from raymill.model.initialize import initialize
from raymill.model.transformer import Transformer

CONFIG = ModelConfig(num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, hidden_dim=160, tie_embeddings=False)
GPT2 = ModelConfig(num_layers=2, model_dim=64, num_heads=4, num_kv_heads=4, hidden_dim=160, architecture="gpt2")
VOCAB = 300


def weights_of(config: ModelConfig = CONFIG, seed: int = 0, **init: Any) -> dict[str, torch.Tensor]:
    model = Transformer(config, VOCAB)
    model.initialize(seed, InitConfig(**init))
    return dict(model.state_dict())


@pytest.mark.parametrize(
    ("method", "up", "down", "head"),
    [
        ("normal", 0.03, 0.03, 0.03),
        ("scaled", 0.03, 0.03 / 2, 0.03),
        ("xavier", math.sqrt(2 / (64 + 160)), math.sqrt(2 / (64 + 160)), math.sqrt(2 / (64 + VOCAB))),
        ("kaiming", math.sqrt(1 / 64), math.sqrt(1 / 160), math.sqrt(1 / 64)),
    ],
)
def test_a_method_gives_its_deviations(method: str, up: float, down: float, head: float) -> None:
    weights = weights_of(name=method, std=0.03)
    assert float(weights["model.layers.1.mlp.up_proj.weight"].std()) == pytest.approx(up, rel=0.05)
    assert float(weights["model.layers.1.mlp.down_proj.weight"].std()) == pytest.approx(down, rel=0.05)
    assert float(weights["lm_head.weight"].std()) == pytest.approx(head, rel=0.05)
    assert float(weights["model.embed_tokens.weight"].std()) == pytest.approx(0.03, rel=0.05)


def test_gains_are_one_and_biases_zero() -> None:
    weights = weights_of(GPT2, name="kaiming", std=0.03)
    vectors = {name: tensor for name, tensor in weights.items() if tensor.ndim < 2}
    assert len(vectors) == 2 * (2 * 2 + 6) + 2
    assert all(bool((tensor == (0 if name.endswith("bias") else 1)).all()) for name, tensor in vectors.items())
    assert float(weights["model.embed_positions.weight"].std()) == pytest.approx(0.03, rel=0.05)


@pytest.mark.parametrize("config", [CONFIG, GPT2], ids=["llama", "gpt2"])
def test_zero_projections_make_every_block_the_identity(config: ModelConfig) -> None:
    model = Transformer(config, VOCAB)
    model.initialize(0, InitConfig(name="xavier", zero_projections=True))
    x = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.run_blocks(x), x)


def test_a_piece_of_a_model_starts_as_the_whole_does() -> None:
    whole = weights_of(seed=3)
    piece = Transformer(CONFIG, VOCAB)
    del piece.model.layers[0]  # names move up: what is drawn follows the name
    piece.model.layers = torch.nn.ModuleDict({"1": piece.model.layers[0]})  # type: ignore[assignment]
    initialize(piece, 3, InitConfig(), CONFIG.num_layers)
    drawn = dict(piece.state_dict())
    assert len(drawn) == len(whole) - 9
    assert all(torch.equal(whole[name], tensor) for name, tensor in drawn.items())


def test_names_and_seeds_draw_apart_and_the_global_generator_stays() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model = Transformer(CONFIG, VOCAB)
    torch.set_rng_state(state)
    model.initialize(0)
    assert torch.equal(torch.get_rng_state(), state)
    weights = dict(model.state_dict())
    gates = [weights[f"model.layers.{number}.mlp.gate_proj.weight"] for number in (0, 1)]
    assert not torch.equal(*gates)
    assert not torch.equal(gates[0], weights_of(seed=1)["model.layers.0.mlp.gate_proj.weight"])
    assert torch.equal(gates[0], weights_of(seed=0)["model.layers.0.mlp.gate_proj.weight"])
