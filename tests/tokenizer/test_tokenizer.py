"""Text comes back whole, control ids come from code only, and a stream never shows half a character."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from raymill.errors import ArtifactError
from raymill.tokenizer.tokenizer import StreamDecoder, Tokenizer
from raymill.tokenizer.training import SMALLEST_VOCAB, SPECIAL_TOKENS

HARD = [
    "",
    " ",
    "plain text",
    "  leading and trailing \n\n",
    "tabs\tand\r\nline ends\n",
    "caf\u00e9 \u65e5\u672c\u8a9e \u043c\u0438\u0440 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ea\U0001f1fa",
    "\x00\x01\x7f",
    "12345678901234567890 3.14",
    "a" * 5000,
    "don't WE'LL",
    "\ufeff mark",
    "".join(map(chr, range(1, 0x250))),
]


@pytest.mark.parametrize("text", HARD, ids=lambda text: repr(text[:12]))
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids, lengths = tokenizer.encode_flat([text, "x"])
    assert np.split(ids, lengths[:1])[0].tolist() == tokenizer.encode(text)
    assert np.split(ids, lengths[:1])[1].tolist() == tokenizer.encode("x")


def test_it_learned_something(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.vocab_size == 600
    assert len(texts[0].encode()) / len(tokenizer.encode(texts[0])) > 2


def test_ids_are_below_the_vocabulary_and_every_id_has_bytes_unless_special(tokenizer: Tokenizer) -> None:
    special = {tokenizer.special_id(name) for name in SPECIAL_TOKENS}
    empty = {token for token in range(tokenizer.vocab_size) if not tokenizer.token_bytes(token)}
    assert empty == special == {0, 1, 2}
    assert tokenizer.token_bytes(-1) == tokenizer.token_bytes(600) == b""


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_text_that_spells_a_special_token_stays_text(tokenizer: Tokenizer, name: str, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    greedy = Tokenizer.train([f"{name} {name}\n{name}" * 1000], 2000)  # would love to merge it to one
    for each in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json"), greedy):
        for text in (name, f"x{name}y", f"{name}{name}", f" {name}\n"):
            ids = each.encode(text)
            assert not {each.special_id(special) for special in SPECIAL_TOKENS} & set(ids)
            assert each.encode_flat([text])[0].tolist() == ids
            assert each.decode(ids) == text


def test_special_ids_are_known_and_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_id == tokenizer.special_id("<|endoftext|>") == 0
    ids = tokenizer.encode("one two")
    assert tokenizer.decode([1, *ids, 2, 0]) == "one two"


def test_half_a_surrogate_pair_is_replaced(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\U0001f600"


def test_training_is_repeatable(texts: list[str]) -> None:
    first, second = (Tokenizer.train(iter(texts), 500)._inner.to_str() for _ in range(2))
    assert first == second


def test_a_tiny_text_gives_a_smaller_vocabulary() -> None:
    small = Tokenizer.train(["ab ab ab"], 1000)
    assert SMALLEST_VOCAB < small.vocab_size < SMALLEST_VOCAB + 5
    assert small.decode(small.encode("anything else")) == "anything else"


def test_the_file_holds_all_but_the_guard(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert Tokenizer.load(path).encode("def f(x):\n    return x") == tokenizer.encode("def f(x):\n    return x")
    plain = tokenizers.Tokenizer.from_file(str(path))
    assert plain.encode("<|endoftext|>").ids == [0], "other programs still see the special token"


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArtifactError, match="tokenizer"):
        Tokenizer.load(path)


def test_a_tokenizer_that_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    foreign = tokenizers.Tokenizer(tokenizers.models.BPE())
    foreign.save(str(path))
    with pytest.raises(ArtifactError) as caught:
        Tokenizer.load(path)
    assert caught.value.why == "it lacks <|endoftext|>, <|im_start|>, <|im_end|>"


@pytest.mark.parametrize("text", HARD, ids=lambda text: repr(text[:12]))
def test_a_stream_gives_the_same_text(tokenizer: Tokenizer, text: str) -> None:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert decoder.finish() == ""


def test_a_stream_holds_a_character_back_until_it_is_whole(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("\U0001f9ea")
    assert len(ids) > 1
    assert [decoder.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert decoder.push(tokenizer.end_id) == ""
    assert decoder.finish() == "\ufffd"
    assert "".join(decoder.push(token) for token in ids) == "\U0001f9ea", "it starts afresh after finish"


def test_any_ids_stream_as_they_decode(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(-1, tokenizer.vocab_size + 5) for _ in range(30)]
        decoder = StreamDecoder(tokenizer)
        text = "".join([decoder.push(token) for token in ids]) + decoder.finish()
        assert text == tokenizer.decode(ids)
        text.encode()
