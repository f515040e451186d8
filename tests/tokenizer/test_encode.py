"""Corpus files to files of ids, and what the sample and the counts say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymill.tokenizer import encode
from raymill.tokenizer.bpe import Tokenizer
from raymill.tokenizer.encode import encode_file, read_counts, read_report, read_texts, sample_texts

TEXTS = ["first document", "text that says <|endoftext|> itself", "", "\u00fcber\n"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "train-00000.parquet"
    table = pa.table({"id": [f"d{row}" for row in range(len(TEXTS))], "text": TEXTS})
    pq.write_table(table, path, row_group_size=2)
    return path


def test_texts_come_in_order(source: Path) -> None:
    assert list(read_texts(source)) == TEXTS


@pytest.mark.parametrize(("dtype", "width"), [("uint16", 2), ("uint32", 4)])
def test_ids_are_those_of_the_documents_each_closed(
    source: Path, tmp_path: Path, tokenizer: Tokenizer, dtype: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_BATCH_CHARS", 20)
    final = tmp_path / "train-00000.bin"
    encode_file(source, tokenizer, dtype, final, tmp_path)
    expected = [token for text in TEXTS for token in [*tokenizer.encode(text), tokenizer.end_id]]
    assert final.stat().st_size == width * len(expected)
    assert np.fromfile(final, dtype).tolist() == expected
    assert expected.count(tokenizer.end_id) == len(TEXTS)
    assert read_report(final.name, tmp_path) == {
        "path": "train-00000.bin",
        "documents": len(TEXTS),
        "tokens": len(expected),
        "text_bytes": sum(len(text.encode()) for text in TEXTS),
    }
    counts = read_counts([final.name, final.name], tmp_path)
    assert counts.tolist() == (2 * np.bincount(expected, minlength=tokenizer.vocab_size)).tolist()


def test_no_report_before_it_is_done(tmp_path: Path) -> None:
    assert read_report("train-00000.bin", tmp_path) is None


def test_the_sample_is_a_fixed_share_of_whole_documents(tmp_path: Path) -> None:
    texts = [f"document number {row:04d}" for row in range(2000)]
    path = tmp_path / "train-00000.parquet"
    pq.write_table(pa.table({"id": [f"a/{row}" for row in range(2000)], "text": texts}), path)
    total = sum(map(len, texts))
    half = list(sample_texts([path], total // 2, total))
    assert set(half) < set(texts)
    assert len(half) == pytest.approx(1000, abs=90)
    assert half == list(sample_texts([path], total // 2, total))
    assert list(sample_texts([path], 2 * total, total)) == texts
