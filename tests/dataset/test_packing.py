"""Best fit keeps every document that fits whole, wastes next to nothing, and loses no id."""

import numpy as np
import pytest

from raymill.dataset.packing import Packing, pack_best_fit, pack_stream


def random_lengths(seed: int) -> tuple[np.ndarray, int]:
    generator = np.random.default_rng(seed)
    seq_len = int(generator.integers(1, 70))
    return generator.integers(1, int(generator.integers(2, 4 * seq_len + 3)), 300).astype(np.uint32), seq_len


@pytest.mark.parametrize("seed", range(40))
def test_every_id_stands_in_one_row_and_no_document_that_fits_is_cut(seed: int) -> None:
    lengths, seq_len = random_lengths(seed)
    first = 1000 * seed
    packing = pack_best_fit(lengths, seq_len, first)
    ends = first + np.cumsum(lengths)
    begins = ends - lengths
    seen = np.zeros(int(lengths.sum()), int)
    for row in range(len(packing)):
        pieces = packing.pieces(row)
        assert 0 < sum(length for _, length, _ in pieces) == packing.targets(row) <= seq_len
        for start, length, continues in pieces:
            seen[start - first : start - first + length] += 1
            document = int(np.searchsorted(ends, start, side="right"))
            assert begins[document] <= start and start + length <= ends[document]
            assert continues == (start > begins[document])
            offset = start - begins[document]
            assert offset % seq_len == 0 and length == min(seq_len, int(lengths[document]) - offset)
    assert (seen == 1).all()


def test_rows_are_chosen_as_a_plain_best_fit_would() -> None:
    for seed in range(20):
        lengths, seq_len = random_lengths(seed)
        rests = sorted((int(length) % seq_len for length in lengths if length % seq_len), reverse=True)
        rooms: list[int] = []
        for rest in rests:
            fitting = [room for room in rooms if room >= rest]
            if fitting:
                rooms.remove(min(fitting))
            rooms.append((min(fitting) if fitting else seq_len) - rest)
        packing = pack_best_fit(lengths, seq_len)
        whole = int((lengths // seq_len).sum())
        assert sorted(seq_len - packing.targets(row) for row in range(whole, len(packing))) == sorted(rooms)


def concat_cuts(lengths: np.ndarray, seq_len: int) -> float:
    """Share of the documents that would fit in a sequence but are cut by windows of the stream."""
    ends = np.cumsum(lengths.astype(np.int64))
    fits = lengths <= seq_len
    return float((((ends - 1) // seq_len != (ends - lengths) // seq_len) & fits).sum() / fits.sum())


def test_padding_is_a_fifth_of_a_percent_at_most_where_concat_cuts_a_sixth() -> None:
    # 3 kB of text are about 700 ids; web documents are about lognormal.
    lengths = np.clip(np.random.default_rng(3).lognormal(6.0, 1.0, 20_000), 2, 100_000).astype(np.uint32)
    packing = pack_best_fit(lengths, 2048)
    assert 600 < lengths.mean() < 750
    assert concat_cuts(lengths, 2048) > 0.16
    assert packing.padding < 0.002


def test_memory_is_below_sixteen_bytes_a_document() -> None:
    lengths = np.random.default_rng(4).integers(1, 2049, 50_000).astype(np.uint32)
    packing = pack_best_fit(lengths, 2048)
    arrays = (packing.rows, packing.starts, packing.lengths, packing.continues)
    assert sum(array.nbytes for array in arrays) < 16 * len(lengths)


def test_the_same_lengths_give_the_same_rows() -> None:
    lengths, seq_len = random_lengths(5)
    one, other = pack_best_fit(lengths, seq_len), pack_best_fit(lengths.copy(), seq_len)
    assert all(one.pieces(row) == other.pieces(row) for row in range(len(one)))


@pytest.mark.parametrize(
    ("lengths", "rows"), [([], 0), ([8], 1), ([1] * 16, 2), ([17], 3), ([5, 3, 5, 3], 2), ([8, 9], 3)]
)
def test_small_cases(lengths: list[int], rows: int) -> None:
    packing: Packing = pack_best_fit(np.array(lengths, np.uint32), 8)
    assert len(packing) == rows


def test_a_split_is_packed_across_its_shards_in_groups(stream_of, documents_of, monkeypatch) -> None:
    stream = stream_of([documents_of(lengths, 1) for lengths in ([3, 9], [5, 2], [8], [4, 4], [1])])
    (whole,) = pack_stream(stream, 8)
    monkeypatch.setattr("raymill.dataset.packing._GROUP_DOCUMENTS", 3)
    parts = pack_stream(stream, 8)
    assert [int(part.lengths.sum()) for part in parts] == [19, 16, 1] and int(whole.lengths.sum()) == 36
    pieces = [piece for part in parts for row in range(len(part)) for piece in part.pieces(row)]
    assert sorted(start for start, _, _ in pieces) == [0, 3, 11, 12, 17, 19, 27, 31, 35]
