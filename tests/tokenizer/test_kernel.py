"""The compiled encoder gives the ids of the `tokenizers` library, text by text, whatever the text is."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from raymill.tokenizer import fast
from raymill.tokenizer.tokenizer import Tokenizer
from raymill.tokenizer.training import SPECIAL_TOKENS, WORDS

# All that a rule of the cut names, one character of each class, and the odd ones of case folding.
TRICKY = (
    "'\u2019sStTmMdDrReEvVlL\u017f\u212aaz \t\n\r\x0b\x1c\x85\xa0\u2028\u3000019\u00b2\u0663\u2164.,<|>_-\u00e9\u0301"
)
TRICKY += "\u01c5\u02b0\u05d0\u0e01\u65e5\uac00\ufb05\U0001d400\U0001f600\U00020000\U000e0001\u200d\ufeff\x00\x7f\ud7a3\U000323af"


def library_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [each.ids for each in tokenizer._inner.encode_batch_fast(texts, add_special_tokens=False)]


def flat_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    assert tokenizer._fast is not None, "the kernel is not in use"
    ids, lengths = tokenizer.encode_flat(texts)
    assert ids.dtype == np.uint32 and lengths.dtype == np.int64 and lengths.sum() == len(ids)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def assert_same(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    for text, ours, theirs in zip(texts, flat_ids(tokenizer, texts), library_ids(tokenizer, texts), strict=True):
        assert ours == theirs, text[:200]


def byte_level(model: models.Model, pre_tokenizer: pre_tokenizers.PreTokenizer, texts: Sequence[str]) -> Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizer
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner)


@pytest.fixture(scope="module")
def gpt2(texts: list[str]) -> Tokenizer:
    return byte_level(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), texts)


@pytest.fixture(scope="module")
def llama3(texts: list[str]) -> Tokenizer:
    cut = pre_tokenizers.Split(Regex(WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(models.BPE(ignore_merges=True), pre_tokenizers.Sequence([cut, letters]), texts)


@pytest.fixture(scope="module")
def cut_teller(texts: list[str]) -> Tokenizer:
    """WordPiece with next to no pieces: the first byte of a word has another id than the rest, so ids show the cut."""
    return Tokenizer.train(texts[:1], 520, "wordpiece")


@pytest.fixture(params=["ours", "gpt2", "llama3", "cut_teller"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    if request.param == "ours":
        return tokenizer
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def test_real_documents(tokenizer: Tokenizer) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    for path in sorted(library.glob("*/*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        texts += [text[start : start + 1200] for start in range(0, len(text), 8000)]
    assert len(texts) > 2500
    assert_same(tokenizer, texts)


def test_random_text_of_what_the_rules_name(any_tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices(TRICKY, k=draw.randrange(25))) for _ in range(6000)]
    assert_same(any_tokenizer, texts)


def test_random_characters(any_tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    assert_same(any_tokenizer, ["".join(map(chr, draw.choices(points, k=draw.randrange(40)))) for _ in range(500)])


def contexts(points: Sequence[int]) -> list[str]:
    return [text.replace("_", chr(point)) for point in points for text in ("a_a", "._. _", "1_\n", "'_s", "\t__1")]


def test_the_class_of_every_character_where_classes_change(cut_teller: Tokenizer) -> None:
    edges = np.flatnonzero(np.diff(fast.classes()))
    assert len(edges) > 1000
    points = sorted({int(edge) + step for edge in edges for step in (0, 1)} - set(range(0xD800, 0xE000)))
    assert_same(cut_teller, contexts(points))


def test_no_character_past_the_last_classed_one_has_a_class() -> None:
    rest = "".join(map(chr, range(fast._LAST_CLASSED, 0x110000)))
    assert pre_tokenizers.Split(Regex(r"[\p{L}\p{N}\s]"), "removed", invert=True).pre_tokenize_str(rest) == []


@pytest.mark.slow
def test_every_character(cut_teller: Tokenizer, gpt2: Tokenizer) -> None:
    for start in range(0, 0x110000, 0x8000):
        points = [point for point in range(start, start + 0x8000) if not 0xD800 <= point < 0xE000]
        if points:
            assert_same(cut_teller, contexts(points))
            assert_same(gpt2, contexts(points))


@pytest.mark.parametrize(
    "letter", ["a", "ab", " ", "\n", "\r\n ", "1", ".", "\u00e9", "\u65e5\u672c", "' ", "\U0001f600"]
)
def test_long_runs(any_tokenizer: Tokenizer, letter: str) -> None:
    sizes = [1, 2, 3, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000]
    texts = [head + (letter * size)[:size] + tail for size in sizes for head in ("", " ") for tail in ("", "x", " ")]
    assert_same(any_tokenizer, texts)


@pytest.mark.parametrize("letter", [" ", "\n", "1", ".", "\u65e5"])
def test_very_long_runs(tokenizer: Tokenizer, letter: str) -> None:
    assert_same(tokenizer, [letter * 100_000, letter * 99_999 + "x"])


def test_a_megabyte_of_one_letter_that_merges() -> None:
    runs = Tokenizer.train(["a" * size for size in range(1, 200)], 300)
    assert_same(runs, ["a" * 1_000_000, " " + "a" * 999_999])


def test_merges_of_long_words() -> None:
    """Deep merges over two letters: their order matters, and words are long enough for the heap."""
    draw = random.Random(2)
    words = ["".join(draw.choices("ab", k=draw.randrange(1, 60))) for _ in range(3000)]
    deep = Tokenizer.train(words, 600)
    assert_same(deep, ["".join(draw.choices("ab", k=draw.randrange(1, 400))) for _ in range(1000)])


def test_a_table_that_forgets_changes_nothing(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_BPE_PIECES", 16)
    monkeypatch.setattr(fast, "_OTHER_PIECES", 16)
    for model in ("bpe", "unigram"):
        assert_same(Tokenizer.train(texts, 600, model), [*texts, *texts])


def test_texts_do_not_see_their_neighbours(tokenizer: Tokenizer) -> None:
    text = "def don't\n\n  x = 12345 \u00e9\u65e5"
    pieces = [text[start:stop] for start in range(len(text)) for stop in range(start, len(text) + 1)]
    assert_same(tokenizer, pieces)


def test_arrow_arrays_of_every_kind(tokenizer: Tokenizer) -> None:
    texts = ["one two", "", "three \u00fc", "four"]
    whole = flat_ids(tokenizer, texts)
    for kind in (pa.string(), pa.large_string()):
        array = pa.array(texts, kind)
        assert flat_ids(tokenizer, array) == whole
        assert flat_ids(tokenizer, array.slice(1, 2)) == whole[1:3]
    for empty in ([], pa.array([], pa.large_string())):
        ids, lengths = tokenizer.encode_flat(empty)
        assert len(ids) == len(lengths) == 0


def test_closed_texts_end_with_the_end_id(tokenizer: Tokenizer) -> None:
    ids, lengths = tokenizer.encode_flat(["one", "", "two"], close=True)
    closed = [[*tokenizer.encode(text), tokenizer.end_id] for text in ("one", "", "two")]
    assert ids.tolist() == list(chain.from_iterable(closed))
    assert lengths.tolist() == [len(each) for each in closed]


def test_bytes_that_are_no_text_are_survived(tokenizer: Tokenizer) -> None:
    draw = random.Random(3)
    rows = [draw.randbytes(draw.randrange(30)) for _ in range(2000)] + [b"\xf4\x90\x80\x80", b"a\xf0", b"\xe2\x82"]
    ends = np.cumsum([0, *map(len, rows)])
    broken = pa.Array.from_buffers(
        pa.large_string(), len(rows), [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(b"".join(rows))]
    )
    ids, lengths = tokenizer.encode_flat(broken)
    for row, part in zip(rows, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        assert b"".join(tokenizer.token_bytes(token) for token in part.tolist()) == row


def test_half_a_surrogate_pair(any_tokenizer: Tokenizer) -> None:
    texts = ["a\ud800b", "\ud83d\ude00", "fine"]
    assert flat_ids(any_tokenizer, texts) == flat_ids(any_tokenizer, ["a\ufffdb", "\U0001f600", "fine"])


def test_a_tokenizer_the_kernel_does_not_know_is_encoded_by_the_library(texts: list[str]) -> None:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False)
    )
    unknown = Tokenizer(inner)
    assert unknown._fast is None
    ids, lengths = unknown.encode_flat(["one 12", "", "<|im_end|>"], close=True)
    expected = [[*ids, unknown.end_id] for ids in library_ids(unknown, ["one 12", "", "<|im_end|>"])]
    assert ids.tolist() == list(chain.from_iterable(expected)) and lengths.tolist() == [len(each) for each in expected]
