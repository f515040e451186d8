import numpy as np
import pytest
import torch

from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex
from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer
from raymill.model.weights import load_model, save_model
from raymill.training.recovery import recover


def test_a_model_of_any_shape_is_trained_on_from_its_weights_at_a_rate_that_falls(tmp_path):
    ids = (np.arange(3000) % 7 + 1).astype("<u2")
    shards = []
    for split in ("train", "val"):
        ids.tofile(tmp_path / f"{split}-00000.bin")
        shards.append(ShardEntry(path=f"{split}-00000.bin", split=split, documents=1, tokens=3000, text_bytes=9000))
    index = ShardIndex(dtype="uint16", vocab_size=20, end_of_document_id=0, shards=tuple(shards))
    (tmp_path / INDEX).write_text(index.model_dump_json())
    start = tmp_path / "start"
    start.mkdir()
    config = ModelConfig(
        architecture="qwen3", num_layers=1, model_dim=24, num_heads=1, num_kv_heads=1, head_dim=8, hidden_dim=32,
        max_seq_len=16,
    )  # fmt: skip
    model = Transformer(config, 20)
    model.initialize(seed=3)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)  # far from what any draw gives
    save_model(start, model, 0)
    rows = []
    how = {"steps": 12, "learning_rate": 1e-2, "batch_size": 4}
    made = recover(
        start,
        tmp_path,
        tmp_path / "work",
        on_step=rows.append,
        validate=lambda model, count: {"loss_nats": 1.0, "bits_per_byte": None, "accuracy": 0.5},
        **how,
    )
    trained = load_model(made)
    assert trained.config == config
    assert [row.step for row in rows] == list(range(1, 13))
    assert [row.learning_rate for row in rows[:2]] == pytest.approx([5e-3, 1e-2]), "a short rise"
    assert rows[-1].learning_rate == pytest.approx(1e-3), "the step after the last would have none"
    assert rows[0].loss == pytest.approx(float(loss_of(model, ids)), rel=0.02), "begun with the weights it was given"
    assert rows[-1].loss < 0.8 * rows[0].loss


def loss_of(model, ids):
    windows = torch.from_numpy(ids[: 17 * 100].astype(np.int64)).view(100, 17)
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
