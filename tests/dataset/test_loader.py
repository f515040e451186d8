"""The order of sequences is a pure function of seed and step, on any number of workers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from raymill.dataset.loader import IGNORE, Batch, Loader
from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex, TokenStream, id_dtype, lengths_name
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
    batch = Loader(stream, seq_len=8, global_batch_size=4, seed=0).batch(3, 0, 4)
    assert batch.inputs_BT.shape == batch.targets_BT.shape == batch.documents_BT.shape == (4, 8)
    assert torch.equal(batch.targets_BT, batch.inputs_BT + 1)


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
    whole = loader.batch(2, 0, 6).inputs_BT
    parts = [loader.batch(2, first, 2).inputs_BT for first in (0, 2, 4)]
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


def epoch_of(stream: TokenStream, packing: str) -> dict[int, Batch]:
    """The rows of one epoch by their first target."""
    loader = Loader(stream, seq_len=8, global_batch_size=1, seed=0, packing=packing)
    batches = [loader.batch(step, 0, 1) for step in range(loader.num_sequences)]
    return {int(batch.targets_BT[0, 0]): batch for batch in batches}


def test_windows_number_their_documents_from_the_end_ids(stream_of) -> None:
    stream = stream_of([[[1, 2, 0], [3, 0]], [[4, 5, 6, 0], [7, 8, 9, 0], [0], [10, 11, 12, 0]]])
    found = epoch_of(stream, "concat")
    assert len(found) == 2
    assert found[2].inputs_BT.tolist() == [[1, 2, 0, 3, 0, 4, 5, 6]]
    assert found[2].targets_BT.tolist() == [[2, 0, 3, 0, 4, 5, 6, 0]]
    assert found[2].documents_BT.tolist() == [[0, 0, 1, 1, 2, 2, 2, 2]]
    assert found[7].inputs_BT.tolist() == [[0, 7, 8, 9, 0, 0, 10, 11]]
    assert found[7].documents_BT.tolist() == [[0, 0, 0, 0, 1, 2, 2, 2]]


def test_rows_begin_each_document_after_an_end_id_and_ignore_what_is_empty(stream_of) -> None:
    # The second document was cut at a budget: it has no end id, and the third must not follow its last one.
    stream = stream_of([[[1, 2, 3, 4, 0], [5, 6]], [[*range(7, 20), 0]]])
    packed = epoch_of(stream, "best_fit")
    assert len(packed) == 3
    assert packed[7].inputs_BT.tolist() == [[0, 7, 8, 9, 10, 11, 12, 13]]
    assert packed[7].targets_BT.tolist() == [[7, 8, 9, 10, 11, 12, 13, 14]]
    assert packed[15].inputs_BT.tolist() == [[14, 15, 16, 17, 18, 19, 0, 5]]
    assert packed[15].targets_BT.tolist() == [[15, 16, 17, 18, 19, 0, 5, 6]]
    assert packed[15].documents_BT.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1]]
    assert packed[1].inputs_BT.tolist() == [[0, 1, 2, 3, 4, 0, 0, 0]]
    assert packed[1].targets_BT.tolist() == [[1, 2, 3, 4, 0, IGNORE, IGNORE, IGNORE]]
    assert packed[1].documents_BT.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]


def test_an_epoch_of_rows_predicts_every_id_once(stream_of, documents_of) -> None:
    lengths = np.random.default_rng(1).integers(1, 40, (4, 25))
    stream = stream_of([documents_of(part, 1 + 10_000 * number) for number, part in enumerate(lengths)])
    loader = Loader(stream, seq_len=16, global_batch_size=1, seed=3, packing="best_fit")
    batches = [loader.batch(step, 0, 1) for step in range(loader.num_sequences)]
    targets = torch.cat([batch.targets_BT for batch in batches]).flatten()
    assert sorted(targets[targets != IGNORE].tolist()) == sorted(stream.read(0, len(stream)).tolist())


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_unlearned_ids_are_inputs_but_no_targets(stream_of, documents_of, packing) -> None:
    lengths = np.random.default_rng(2).integers(1, 40, (3, 12))
    shards = [documents_of(part, 1 + 1000 * number) for number, part in enumerate(lengths)]
    masks = [[[id % 3 != 0 for id in document] for document in shard] for shard in shards]
    plain = Loader(stream_of(shards), seq_len=16, global_batch_size=4, seed=0, packing=packing)
    expected = [plain.batch(step, 0, 4) for step in range(8)]
    masked = Loader(stream_of(shards, masks), seq_len=16, global_batch_size=4, seed=0, packing=packing)
    for step, batch in enumerate(expected):
        found = masked.batch(step, 0, 4)
        assert torch.equal(found.inputs_BT, batch.inputs_BT)
        assert torch.equal(found.documents_BT, batch.documents_BT)
        unlearned = batch.targets_BT % 3 == 0
        assert torch.equal(found.targets_BT, torch.where(unlearned, IGNORE, batch.targets_BT))
        for loader, seen in ((plain, batch), (masked, found)):
            assert loader.learned_targets(step) == int((seen.targets_BT != IGNORE).sum())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rows_are_the_same_on_any_number_of_workers(stream_of, documents_of, world_size) -> None:
    lengths = np.random.default_rng(2).integers(1, 40, 200)
    stream = stream_of([documents_of(lengths, 1)])
    whole = Loader(stream, seq_len=16, global_batch_size=8, seed=0, packing="best_fit")
    workers = [Loader(stream, seq_len=16, global_batch_size=8, seed=0, packing="best_fit") for _ in range(world_size)]
    share = 8 // world_size
    for step in (0, 70, 3):
        parts = [worker.batch(step, rank * share, share) for rank, worker in enumerate(workers)]
        batch = whole.batch(step, 0, 8)
        for name in ("inputs_BT", "targets_BT", "documents_BT"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        assert {worker.learned_targets(step) for worker in workers} == {whole.learned_targets(step)}


def test_shards_without_lengths_can_be_cut_but_not_packed(stream: TokenStream) -> None:
    Loader(stream, seq_len=8, global_batch_size=2, seed=0)
    with pytest.raises(ArtifactError, match=r"no train-00000\.lengths\.npy") as error:
        Loader(stream, seq_len=8, global_batch_size=2, seed=0, packing="best_fit")
    assert "tokenize again" in error.value.fix and "concat" in error.value.fix


def test_lengths_that_do_not_add_up_are_refused(stream_of, tmp_path: Path) -> None:
    stream = stream_of([[[1, 2, 0], [3, 0]]])
    np.save(tmp_path / lengths_name("train-00000.bin"), np.array([3, 3], np.uint32))
    with pytest.raises(ArtifactError, match="2 documents of 6 ids; index says 2 of 5"):
        Loader(stream, seq_len=4, global_batch_size=1, seed=0, packing="best_fit")


def test_a_learn_file_of_another_length_is_refused(stream_of, tmp_path: Path) -> None:
    stream_of([[[1, 2, 0]]], [[[0, 1, 1]]])
    (tmp_path / "train-00000.learn.bin").write_bytes(b"\1")
    with pytest.raises(ArtifactError, match=r"learn\.bin is damaged"):
        TokenStream(tmp_path, "train")
