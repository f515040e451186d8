"""The order of sequences is a pure function of seed and step, on any number of workers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from raymill.dataset.loader import Loader
from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex, TokenStream, id_dtype
from raymill.errors import ArtifactError, DataError


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    """Ids 0..149 over two shards, so that a value tells its position."""
    sizes, first, entries = (70, 80), 0, []
    for number, size in enumerate(sizes):
        name = f"train-{number:05d}.bin"
        np.arange(first, first + size, dtype="<u2").tofile(tmp_path / name)
        entries.append(ShardEntry(path=name, split="train", documents=1, tokens=size, text_bytes=size))
        first += size
    index = ShardIndex(dtype="uint16", vocab_size=200, end_of_document_id=0, shards=tuple(entries))
    (tmp_path / INDEX).write_text(index.model_dump_json())
    return TokenStream(tmp_path, "train")


def test_a_read_crosses_shards(stream: TokenStream) -> None:
    assert len(stream) == 150
    assert stream.read(68, 5).tolist() == [68, 69, 70, 71, 72]
    assert stream.read(0, 150).tolist() == list(range(150))
    assert stream.read(145, 5).tolist() == [145, 146, 147, 148, 149]


def test_targets_are_the_inputs_moved_by_one(stream: TokenStream) -> None:
    inputs_BT, targets_BT = Loader(stream, seq_len=8, global_batch_size=4, seed=0).batch(3, 0, 4)
    assert inputs_BT.shape == targets_BT.shape == (4, 8)
    assert torch.equal(targets_BT, inputs_BT + 1)


def test_an_epoch_visits_every_sequence_once_and_the_next_in_another_order(stream: TokenStream) -> None:
    loader = Loader(stream, seq_len=8, global_batch_size=6, seed=0)
    assert loader.num_sequences == 18
    first = [number for step in range(3) for number in loader.sequence_numbers(step)]
    second = [number for step in range(3, 6) for number in loader.sequence_numbers(step)]
    assert sorted(first) == sorted(second) == list(range(18))
    assert first != second


def test_the_order_depends_on_seed_and_step_alone(stream: TokenStream) -> None:
    loaders = [Loader(stream, seq_len=8, global_batch_size=5, seed=seed) for seed in (1, 1, 2)]
    loaders[0].sequence_numbers(9)  # what was read before must not matter
    assert loaders[0].sequence_numbers(4) == loaders[1].sequence_numbers(4) != loaders[2].sequence_numbers(4)


def test_workers_share_the_global_batch(stream: TokenStream) -> None:
    loader = Loader(stream, seq_len=8, global_batch_size=6, seed=0)
    whole, _ = loader.batch(2, 0, 6)
    parts = [loader.batch(2, first, 2)[0] for first in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)


def test_too_few_tokens_say_what_is_needed(stream: TokenStream) -> None:
    with pytest.raises(DataError, match="150 tokens make 2 sequences of 64; a batch has 3") as error:
        Loader(stream, seq_len=64, global_batch_size=3, seed=0)
    assert "max_seq_len" in error.value.fix


def test_a_shard_of_another_length_is_refused(stream: TokenStream, tmp_path: Path) -> None:
    with (tmp_path / "train-00001.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ArtifactError, match="is damaged"):
        TokenStream(tmp_path, "train")


def test_a_folder_without_index_or_split_is_refused(stream: TokenStream, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no token shards"):
        TokenStream(tmp_path / "nothing", "train")
    with pytest.raises(DataError, match="has no val tokens"):
        TokenStream(tmp_path, "val")


def test_ids_take_two_bytes_while_they_fit() -> None:
    assert (id_dtype(65536), id_dtype(65537)) == ("uint16", "uint32")
