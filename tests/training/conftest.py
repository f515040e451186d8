"""A tiny token set and settings small enough that a step takes milliseconds."""

from pathlib import Path

import numpy as np
import pytest

from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex
from raymill.model.config import ModelConfig
from raymill.training.loop import TrainingConfig

VOCAB = 64


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two train shards and one val shard of a learnable pattern."""
    folder = tmp_path_factory.mktemp("tokens")
    generator = np.random.default_rng(7)
    entries = []
    for name, split, count in (
        ("train-00000", "train", 3000),
        ("train-00001", "train", 1100),
        ("val-00000", "val", 700),
    ):
        ids = (np.cumsum(generator.integers(1, 3, count)) % VOCAB).astype("<u2")
        ids.tofile(folder / f"{name}.bin")
        entry = ShardEntry(path=f"{name}.bin", split=split, documents=1, tokens=count, text_bytes=2 * count)
        entries.append(entry)
    index = ShardIndex(dtype="uint16", vocab_size=VOCAB, end_of_document_id=0, shards=tuple(entries))
    (folder / INDEX).write_text(index.model_dump_json())
    return folder


@pytest.fixture
def config() -> TrainingConfig:
    return TrainingConfig(
        model=ModelConfig(num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, hidden_dim=32, max_seq_len=16),
        steps=12,
        global_batch_size=8,
        microbatch_size=2,
        checkpoint_every_steps=4,
        validate_every_steps=6,
        validation_sequences=4,
    )
