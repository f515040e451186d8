import numpy as np
import pytest
import torch

from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex, TokenStream
from raymill.errors import DataError
from raymill.evaluation.continuation import choose_continuations


def stream_of(folder, ids):
    np.asarray(ids, dtype="<u2").tofile(folder / "val-00000.bin")
    entry = ShardEntry(path="val-00000.bin", split="val", documents=1, tokens=len(ids), text_bytes=4 * len(ids))
    index = ShardIndex(dtype="uint16", vocab_size=100, end_of_document_id=0, shards=(entry,))
    (folder / INDEX).write_text(index.model_dump_json())
    return TokenStream(folder, "val")


@pytest.fixture
def counting(tmp_path):
    """Text in which every id is one more than the last, up to 96, begun anew at another id by each piece of 48."""
    starts = np.random.default_rng(0).permutation(90)[:40]
    return stream_of(tmp_path, np.concatenate([(start + np.arange(48)) % 96 + 1 for start in starts]))


def sure(step):
    def forward(ids, documents):
        return 10.0 * torch.nn.functional.one_hot((ids - 1 + step) % 96 + 1, 100).float()

    return forward


def test_a_model_that_knows_the_text_finds_it_and_one_that_is_wrong_does_not(counting):
    right = choose_continuations(sure(1), counting, max_items=20, max_seq_len=256)
    assert (right.accuracy, right.items) == (1.0, 20)
    wrong = choose_continuations(sure(2), counting, max_items=20, max_seq_len=256)
    assert wrong.accuracy < 0.5
    undecided = choose_continuations(
        lambda ids, _: torch.zeros(*ids.shape, 100), counting, max_items=20, max_seq_len=256
    )
    assert undecided.accuracy == 0.0


def test_only_what_follows_the_context_counts(counting):
    lengths = []

    def forward(ids, documents):
        lengths.append(ids.shape[1])
        logits = sure(1)(ids, documents)
        logits[:, :31] = torch.randn(logits[:, :31].shape)
        return logits

    assert choose_continuations(forward, counting, max_items=20, max_seq_len=256).accuracy == 1.0
    assert set(lengths) == {47}


def test_a_short_model_reads_short_pieces(counting):
    lengths = set()

    def forward(ids, documents):
        lengths.add(ids.shape[1])
        return sure(1)(ids, documents)

    assert choose_continuations(forward, counting, max_items=20, max_seq_len=12).accuracy > 0.9
    assert lengths == {11}


def test_pieces_hold_no_end_of_document(tmp_path):
    ids = np.tile(np.arange(1, 49), 12)
    ids[48 * 5 + 3] = 0
    seen = []

    def forward(ids, documents):
        seen.append(ids)
        return torch.zeros(*ids.shape, 100)

    assert choose_continuations(forward, stream_of(tmp_path, ids), max_items=100, max_seq_len=64).items == 11
    assert not bool((torch.cat(seen) == 0).any())


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="3 pieces of 48 tokens"):
        choose_continuations(sure(1), stream_of(tmp_path, np.ones(150)), max_items=9, max_seq_len=64)
