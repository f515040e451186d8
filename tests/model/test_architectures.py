"""What each architecture is made of, and what holds for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raymill.config import load
from raymill.errors import ConfigError
from raymill.model.config import ModelConfig, RopeScaling, describe_difference
from raymill.model.transformer import Transformer

VOCAB = 50
SHAPE = {"num_layers": 2, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 48, "max_seq_len": 16}
YARN = RopeScaling(kind="yarn", factor=4, original_max_seq_len=8, beta_fast=4)
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"tie_embeddings": False},
    "llama yarn": {"rope_scaling": YARN},
    "mistral window": {"architecture": "mistral", "sliding_window": 3},
    "qwen2": {"architecture": "qwen2"},
    "qwen2 window": {"architecture": "qwen2", "sliding_window": 5},
    "qwen3": {"architecture": "qwen3", "head_dim": 16},
    "gpt2": {"architecture": "gpt2", "num_kv_heads": 4},
    "gpt2 untied": {"architecture": "gpt2", "num_kv_heads": 4, "tie_embeddings": False},
}


def config_of(variant: str, **changes: Any) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **VARIANTS[variant], **changes})


def model_of(variant: str, **changes: Any) -> Transformer:
    """An untrained model hardly attends: this one's weights are large, its gains are not 1, its biases not 0."""
    model = Transformer(config_of(variant, **changes), VOCAB)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.ndim > 1 else 1 + 0.3 * noise)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [(5, 1, 10), (3, 13)])
def test_packed_documents_read_as_separate_sequences(variant: str, lengths: tuple[int, ...], ids: torch.Tensor) -> None:
    model = model_of(variant)
    documents = torch.full((2, 16), 7)
    documents[0] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    with torch.no_grad():
        packed = model(ids, documents)
        alone = torch.cat([model(piece[None])[0] for piece in ids[0].split(list(lengths))])
        torch.testing.assert_close(packed[0], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed[1], model(ids[1:])[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(packed[0], model(ids[:1])[0], atol=1e-2), "the mask matters here"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_slice_of_a_sequence_has_the_positions_of_the_whole(variant: str, ids: torch.Tensor) -> None:
    model = model_of(variant)
    documents = torch.tensor([[0] * 6 + [1] * 10, [0] * 16])
    whole = model.embed(ids, documents)
    assert torch.equal(model.embed(ids[:, 9:], documents, first=9), whole[:, 9:])
    for block in model.model.layers:  # no one else is seen, so that only positions are left
        block.self_attn.attend = lambda q, k, v, **_: q + k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    torch.testing.assert_close(model.run_blocks(whole[:, 9:], documents, 9), model.run_blocks(whole, documents)[:, 9:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_positions_matter(variant: str) -> None:
    model = model_of(variant)
    with torch.no_grad():
        one, other = model(torch.tensor([[1, 2, 3, 4]])), model(torch.tensor([[2, 1, 3, 4]]))
    assert not torch.allclose(one[0, -1], other[0, -1], atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_counted_right(variant: str) -> None:
    model = Transformer(config_of(variant), VOCAB)
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.num_parameters(VOCAB)


def gradients(model: Transformer, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(9)
        torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_computing_activations_again_gives_the_same_gradients_to_the_bit(variant: str, ids: torch.Tensor) -> None:
    model, ran = model_of(variant, dropout=0.2), []
    hooks = [block.register_forward_pre_hook(lambda *_: ran.append(1)) for block in model.model.layers]
    kept = gradients(model, ids)
    assert len(ran) == 2
    model.checkpoint_activations = True
    again = gradients(model, ids)
    assert len(ran) == 2 + 4, "each block ran forward twice"
    assert len(kept) == len(again) == len(list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    with torch.no_grad():
        model(ids)
    assert len(ran) == 2 + 4 + 2, "and once where nothing is learned"
    assert len(hooks) == 2


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_dropout_falls_on_what_is_added_to_the_residual_and_in_training_alone(variant: str, ids: torch.Tensor) -> None:
    model = model_of(variant, dropout=0.5)
    plain = model_of(variant)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        dropped_share = float((model.embed(ids) == 0).float().mean())
        x = plain.embed(ids)
        shares = []
        for block, silent in zip(model.model.layers, ("self_attn", "mlp"), strict=True):
            getattr(block, silent).forward = lambda x, *_: torch.zeros_like(x)
            shares.append(float((block(x, model.cos_TC, model.sin_TC, None) == x).float().mean()))
    assert dropped_share == pytest.approx(0.5 if variant == "gpt2" else 0, abs=0.05)
    assert shares == pytest.approx([0.5, 0.5], abs=0.05)
    model = model_of(variant, dropout=0.5).eval()
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "no grouped queries"),
        ({"architecture": "gpt2", "num_kv_heads": 4, "head_dim": 16}, "no head_dim"),
        ({"sliding_window": 4}, "llama has no sliding window"),
        ({"num_heads": 5, "num_kv_heads": 5, "head_dim": 8}, "no multiple of num_heads"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2}}, "no original_max_seq_len"),
        ({"rope_scaling": {"kind": "llama3", "factor": 2, "original_max_seq_len": 8, "low_freq_factor": 4}}, "below"),
    ],
)
def test_shapes_that_no_architecture_has_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(ModelConfig, None, [f"{key}={value}" for key, value in {**SHAPE, **changes}.items()])


@pytest.mark.parametrize(
    ("found", "wanted", "difference"),
    [
        ({}, {}, ""),
        ({"head_dim": 8}, {}, ""),
        ({"dropout": 0.1}, {}, ""),
        ({"architecture": "qwen2", "num_layers": 3}, {"architecture": "qwen3"}, "architecture is qwen2, not qwen3"),
        ({"num_layers": 3, "hidden_dim": 64}, {}, "num_layers is 3, not 2"),
        ({"head_dim": 16}, {}, "head_dim is 16, not 8"),
        ({"rope_theta": 5e5}, {}, "rope_theta is 500000.0, not 10000.0"),
        ({"rope_scaling": YARN}, {}, "rope_scaling is yarn by 4.0, not none"),
        (
            {"rope_scaling": YARN},
            {"rope_scaling": YARN.model_copy(update={"factor": 8.0})},
            "rope_scaling.factor is 4.0, not 8.0",
        ),
        (
            {"architecture": "gpt2", "num_kv_heads": 4, "rope_theta": 5e5},
            {"architecture": "gpt2", "num_kv_heads": 4},
            "",
        ),
        ({"tie_embeddings": False}, {}, "tie_embeddings is False, not True"),
    ],
)
def test_the_first_difference_of_two_shapes_is_told(
    found: dict[str, Any], wanted: dict[str, Any], difference: str
) -> None:
    assert describe_difference(ModelConfig(**{**SHAPE, **found}), ModelConfig(**{**SHAPE, **wanted})) == difference
