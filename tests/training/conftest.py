"""A tiny token set and settings small enough that a step takes milliseconds."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex, learn_name, lengths_name
from raymill.model.config import ModelConfig
from raymill.training.config import TrainingConfig

VOCAB = 64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits depend on the number of threads, and threads of small operations wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train split of short documents that count upwards; most are not to be learned, of the others two thirds are."""
    folder = tmp_path_factory.mktemp("documents")
    generator = np.random.default_rng(8)
    lengths = generator.integers(2, 30, 300).astype(np.uint32)
    starts = generator.integers(1, VOCAB, 300)
    counted = [
        [*((start + np.arange(length - 1)) % (VOCAB - 1) + 1).tolist(), 0]
        for start, length in zip(starts, lengths, strict=True)
    ]
    ids = np.concatenate(counted).astype("<u2")
    ids.tofile(folder / "train-00000.bin")
    np.save(folder / lengths_name("train-00000.bin"), lengths)
    learned = np.repeat(generator.random(300) < 0.4, lengths) & (generator.random(len(ids)) < 0.67)
    learned.tofile(folder / learn_name("train-00000.bin"))
    sizes = {"documents": len(lengths), "tokens": len(ids), "text_bytes": 2 * len(ids)}
    entry = ShardEntry(path="train-00000.bin", split="train", has_learn_mask=True, **sizes)
    index = ShardIndex(dtype="uint16", vocab_size=VOCAB, end_of_document_id=0, shards=(entry,))
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
