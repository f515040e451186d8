"""Corpus files to files of ids, lengths and masks, and what the sample, the report and the counts say."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymill.tokenizer import encode
from raymill.tokenizer.chat import Message, render_chat
from raymill.tokenizer.encode import encode_file, read_counts, read_report, read_texts, sample_texts
from raymill.tokenizer.tokenizer import Tokenizer

TEXTS = ["first document", "text that says <|endoftext|> itself", "", "\u00fcber\n"]
SOURCES = ["web", "books", "web", "books"]
PARTS = pa.list_(pa.struct([("role", pa.string()), ("end_byte", pa.int64()), ("learn", pa.bool_())]))

Turn = tuple[str | None, str, bool]


def write_corpus(path: Path, texts: list[str], sources: list[str], parts: list[Any] | None = None) -> Path:
    columns = {
        "id": pa.array([f"d{row}" for row in range(len(texts))]),
        "source": pa.array(sources),
        "text": pa.array(texts, pa.large_string()),
        "parts": pa.array(parts or [None] * len(texts), PARTS),
    }
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def write_turns(path: Path, documents: list[list[Turn] | str]) -> Path:
    """Documents of parts, or of plain text."""
    texts, parts = [], []
    for document in documents:
        turns = document if isinstance(document, list) else []
        texts.append("".join(text for _, text, _ in turns) if turns else str(document))
        ends = np.cumsum([len(text.encode()) for _, text, _ in turns]).tolist()
        rows = [
            {"role": role, "end_byte": end, "learn": learn} for (role, _, learn), end in zip(turns, ends, strict=True)
        ]
        parts.append(rows or None)
    return write_corpus(path, texts, ["chat"] * len(texts), parts)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "train-00000.parquet", TEXTS, SOURCES)


def test_texts_come_in_order(source: Path) -> None:
    assert list(read_texts(source)) == TEXTS


@pytest.mark.parametrize(("dtype", "width"), [("uint16", 2), ("uint32", 4)])
@pytest.mark.parametrize("batch_bytes", [1, 20, 1 << 20])
def test_ids_are_those_of_the_documents_each_closed(
    source: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    dtype: str,
    width: int,
    batch_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encode, "_BATCH_BYTES", batch_bytes)
    final = tmp_path / "train-00000.bin"
    encode_file(source, tokenizer, dtype, final, tmp_path)
    documents = [[*tokenizer.encode(text), tokenizer.end_id] for text in TEXTS]
    expected = list(chain.from_iterable(documents))
    assert final.stat().st_size == width * len(expected)
    assert np.fromfile(final, dtype).tolist() == expected
    assert expected.count(tokenizer.end_id) == len(TEXTS)
    lengths = np.load(tmp_path / "train-00000.lengths.npy")
    assert lengths.dtype == np.uint32 and lengths.tolist() == [len(ids) for ids in documents]
    assert not (tmp_path / "train-00000.learn.bin").exists()
    counts = read_counts([final.name, final.name], tmp_path)
    assert counts.tolist() == (2 * np.bincount(expected, minlength=tokenizer.vocab_size)).tolist()


def test_the_report_counts_by_source(source: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    encode_file(source, tokenizer, "uint16", tmp_path / "train-00000.bin", tmp_path)
    sizes = {text: (len(tokenizer.encode(text)) + 1, len(text.encode())) for text in TEXTS}
    by_source = {
        name: {
            "documents": 2,
            "tokens": sum(sizes[text][0] for text, own in zip(TEXTS, SOURCES, strict=True) if own == name),
            "text_bytes": sum(sizes[text][1] for text, own in zip(TEXTS, SOURCES, strict=True) if own == name),
        }
        for name in ("books", "web")
    }
    assert read_report("train-00000.bin", tmp_path) == {
        "path": "train-00000.bin",
        "documents": 4,
        "tokens": sum(size[0] for size in sizes.values()),
        "text_bytes": sum(size[1] for size in sizes.values()),
        "has_learn_mask": False,
        "sources": by_source,
    }


CHAT: list[Turn] = [
    ("system", "Be brief.", False),
    ("user", "Hi <|im_end|>", False),
    ("assistant", "Hello \u00fcber", True),
]


def encoded(path: Path, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids and mask of a corpus file."""
    final = path.with_suffix(".bin")
    encode_file(path, tokenizer, "uint16", final, path.parent)
    report = read_report(final.name, path.parent)
    mask = path.with_suffix(".learn.bin")
    assert report is not None and report["has_learn_mask"] == mask.exists()
    ids = np.fromfile(final, np.uint16).tolist()
    return ids, np.fromfile(mask, np.uint8).tolist() if mask.exists() else [1] * len(ids)


def test_a_conversation_is_encoded_as_the_endpoint_renders_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids, learn = encoded(write_turns(tmp_path / "chat.parquet", [CHAT]), tokenizer)
    messages = [Message("system", CHAT[0][1]), Message("user", CHAT[1][1]), Message("assistant", CHAT[2][1])]
    assert ids == [*render_chat(tokenizer, messages, open_answer=False), tokenizer.end_id]
    prompt = render_chat(tokenizer, messages[:2])
    answer = [*tokenizer.encode(CHAT[2][1]), tokenizer.special_id("<|im_end|>")]
    line_break = tokenizer.encode("\n")
    # The model learns to speak and to stop: not who speaks, nor the line break that the server writes.
    assert learn == [0] * len(prompt) + [1] * len(answer) + [0] * len(line_break) + [1]


def test_parts_without_a_role_are_plain_text_cut_at_their_borders(tmp_path: Path, tokenizer: Tokenizer) -> None:
    parts: list[Turn] = [(None, "Translate: ca", False), (None, "f\u00e9", True), (None, "", True)]
    ids, learn = encoded(write_turns(tmp_path / "task.parquet", [parts]), tokenizer)
    first, second = tokenizer.encode("Translate: ca"), tokenizer.encode("f\u00e9")
    assert ids == [*first, *second, tokenizer.end_id]
    assert learn == [0] * len(first) + [1] * len(second) + [1]


@pytest.mark.parametrize("batch_bytes", [1, 30, 1 << 20])
def test_plain_documents_beside_conversations_are_learned(
    tmp_path: Path, tokenizer: Tokenizer, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_BATCH_BYTES", batch_bytes)
    documents: list[list[Turn] | str] = ["plain one", "plain two", "", CHAT, "plain three", "four", CHAT, "five"]
    ids, learn = encoded(write_turns(tmp_path / "mixed.parquet", documents), tokenizer)
    alone = [encoded(write_turns(tmp_path / f"{row}.parquet", [each]), tokenizer) for row, each in enumerate(documents)]
    assert ids == list(chain.from_iterable(each[0] for each in alone))
    assert learn == list(chain.from_iterable(each[1] for each in alone))
    lengths = np.load(tmp_path / "mixed.lengths.npy").tolist()
    assert lengths == [len(each[0]) for each in alone]


def test_no_mask_where_all_is_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_turns(tmp_path / "all.parquet", [[(None, "one ", True), (None, "two", True)], "three"])
    (tmp_path / "all.learn.bin").write_bytes(b"left by an earlier attempt")
    ids, _ = encoded(path, tokenizer)
    assert not (tmp_path / "all.learn.bin").exists()
    assert tokenizer.decode(ids) == "one twothree"


def test_a_file_without_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids, _ = encoded(write_corpus(tmp_path / "none.parquet", [], []), tokenizer)
    assert ids == [] and np.load(tmp_path / "none.lengths.npy").shape == (0,)


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
