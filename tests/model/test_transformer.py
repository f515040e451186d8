"""The model computes what its papers say, and its weights survive the disk."""

import math
from pathlib import Path

import pytest
import torch

from raymill.config import load
from raymill.errors import ArtifactError, ConfigError
from raymill.model.config import ModelConfig
from raymill.model.rope import rotary_tables, rotate
from raymill.model.transformer import Transformer
from raymill.model.weights import load_model, save_model

CONFIG = ModelConfig(num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, hidden_dim=48, max_seq_len=16)


@pytest.fixture
def model() -> Transformer:
    model = Transformer(CONFIG, 50)
    model.initialize(0)
    return model


def test_a_position_sees_nothing_after_it(model: Transformer) -> None:
    ids = torch.randint(0, 50, (1, 16), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 50
    one, other = model(ids), model(changed)
    assert torch.equal(one[0, :10], other[0, :10])
    assert not torch.allclose(one[0, 10:], other[0, 10:])


@pytest.mark.parametrize("lengths", [[5, 1, 7], [16], [0, 3, 13]])
def test_a_document_in_a_row_reads_as_it_does_alone(model: Transformer, lengths: list[int]) -> None:
    with torch.no_grad():  # an untrained model hardly attends: larger weights make the keys matter
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(4))
    documents = torch.full((2, 16), len(lengths))  # what no document fills has a number of its own
    documents[0, : sum(lengths)] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    packed = model(ids, documents)
    stop = 0
    for number in range(len(lengths) + 1):
        start, stop = stop, stop + int((documents[0] == number).sum())
        if stop > start:
            torch.testing.assert_close(packed[0, start:stop], model(ids[:1, start:stop])[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[1], model(ids[1:])[0], rtol=1e-5, atol=1e-5)


def test_parameters_are_counted_right(model: Transformer) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == CONFIG.num_parameters(50)
    untied = CONFIG.model_copy(update={"tie_embeddings": False})
    assert sum(p.numel() for p in Transformer(untied, 50).parameters()) == untied.num_parameters(50)


def test_an_untrained_model_knows_nothing(model: Transformer) -> None:
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(2))
    loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(7, 1).flatten())
    assert loss.item() == pytest.approx(math.log(50), abs=0.1)


def test_rotation_depends_on_distance_alone() -> None:
    cos, sin = rotary_tables(CONFIG)
    q, k = torch.randn(8), torch.randn(8)
    scores = [rotate(q, cos[i], sin[i]) @ rotate(k, cos[i - 3], sin[i - 3]) for i in (3, 9, 15)]
    assert scores[0].item() == pytest.approx(scores[1].item(), abs=1e-5) == pytest.approx(scores[2].item(), abs=1e-5)
    assert rotate(q, cos[5], sin[5]).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_survive_the_disk(tmp_path: Path, tied: bool) -> None:
    model = Transformer(CONFIG.model_copy(update={"tie_embeddings": tied}), 50)
    model.initialize(3)
    save_model(tmp_path, model, end_id=0)
    again = load_model(tmp_path)
    assert again.config == model.config
    ids = torch.arange(16)[None]
    assert torch.equal(again(ids), model(ids))


def test_a_checkpoint_that_is_not_whole_is_refused(model: Transformer, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no model"):
        load_model(tmp_path)
    save_model(tmp_path, model, end_id=0)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="is damaged"):
        load_model(tmp_path)
    save_model(tmp_path, Transformer(CONFIG.model_copy(update={"num_layers": 1}), 50), end_id=0)
    one_layer = weights.read_bytes()
    save_model(tmp_path, model, end_id=0)
    weights.write_bytes(one_layer)
    with pytest.raises(ArtifactError, match="does not match"):
        load_model(tmp_path)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="is not an even whole number"):
        load(ModelConfig, None, ["num_heads=3"])
    with pytest.raises(ConfigError, match="does not divide num_heads"):
        load(ModelConfig, None, ["num_kv_heads=3"])
