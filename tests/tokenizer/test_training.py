"""Every kind of vocabulary gives every text back, from one file format, and says nothing is unknown."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from raymill.tokenizer.tokenizer import StreamDecoder, Tokenizer
from raymill.tokenizer.training import SPECIAL_TOKENS, WORDS, Model, smallest_vocab, spec

MODELS: tuple[Model, ...] = ("bpe", "wordpiece", "unigram", "char", "word")


def hostile_texts() -> list[str]:
    draw = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    texts = ["".join(map(chr, draw.choices(points, k=draw.randrange(50)))) for _ in range(200)]
    texts += ["".join(map(chr, draw.choices(range(128), k=draw.randrange(50)))) for _ in range(200)]
    texts += ["##a #### ##", "\u203f \u203fa a\u203fb", "\u2581a \u2581", "<0x41>", "\u0120\u010a", "\x00\x00"]
    texts += [
        "a" * 5000,
        "x\u0301" * 300,
        " " * 999,
        "\r\n" * 99,
        *SPECIAL_TOKENS,
        "".join(SPECIAL_TOKENS),
        "[UNK]",
        "",
    ]
    return texts


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, texts: list[str]) -> Tokenizer:
    return Tokenizer.train(texts, 900, request.param)


def test_every_text_comes_back(trained: Tokenizer) -> None:
    texts = hostile_texts()
    ids, lengths = trained.encode_flat(texts)
    assert not {trained.special_id(name) for name in SPECIAL_TOKENS} & set(ids.tolist())
    start = 0
    for text, length in zip(texts, lengths.tolist(), strict=True):
        own = ids[start : start + length].tolist()
        start += length
        assert own == trained.encode(text)
        assert trained.decode(own) == text
        assert trained._inner.decode(own) == text, "other programs read the same"
        decoder = StreamDecoder(trained)
        assert "".join([decoder.push(token) for token in own]) + decoder.finish() == text


def test_the_kernel_is_in_use_and_agrees_with_the_library(trained: Tokenizer, texts: list[str]) -> None:
    assert trained._fast is not None
    ids, _ = trained.encode_flat(texts)
    assert ids.tolist() == [token for text in texts for token in trained.encode(text)]


def test_the_file_holds_all(trained: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    trained.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == trained.vocab_size
    assert loaded.encode(texts[0]) == trained.encode(texts[0])
    assert [loaded.special_id(name) for name in SPECIAL_TOKENS] == [0, 1, 2]


@pytest.mark.parametrize("model", [model for model in MODELS if model != "unigram"])
def test_training_is_repeatable(model: Model, texts: list[str]) -> None:
    first, second = (Tokenizer.train(iter(texts), 800, model)._inner.to_str() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("model", MODELS)
def test_the_vocabulary_is_as_large_as_asked_where_the_text_allows(model: Model, texts: list[str]) -> None:
    size = Tokenizer.train(texts, 800, model).vocab_size
    if model == "char":  # English sources have few characters that are not one byte
        assert smallest_vocab(model) <= size < smallest_vocab(model) + 50
    elif model == "unigram":  # its trainer prunes down to the goal, and may end a little below
        assert 760 <= size <= 800
    else:
        assert size == 800


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("corpus", [[], [""], ["a"], ["ab ab ab"]], ids=str)
def test_next_to_no_text_gives_a_small_vocabulary(model: Model, corpus: list[str]) -> None:
    small = Tokenizer.train(corpus, 1000, model)
    assert smallest_vocab(model) <= small.vocab_size < smallest_vocab(model) + 6
    assert small.decode(small.encode("anything else \u65e5")) == "anything else \u65e5"


def test_bpe_learns_the_merges_of_the_library(texts: list[str]) -> None:
    theirs = tokenizers.Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(WORDS), "isolated")
    theirs.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(texts, trainer)
    ours = Tokenizer.train(texts, 2000)
    assert spec(ours._inner)["model"]["merges"] == spec(theirs)["model"]["merges"]
    assert ours._inner.get_vocab() == theirs.get_vocab()


def test_what_each_kind_keeps_whole(texts: list[str]) -> None:
    corpus = ["the cat \u65e5\u65e5 the catalogue\n"] * 9
    pieces = {}
    for model in MODELS:
        made = Tokenizer.train(corpus, 700, model)
        pieces[model] = [made.token_bytes(token).decode() for token in made.encode("the catalogue")]
        assert "".join(pieces[model]) == "the catalogue"
    assert pieces["word"] == ["the", " catalogue"]
    assert pieces["char"] == list("the catalogue")
    assert pieces["bpe"] == pieces["wordpiece"] == ["the", " catalogue"]


def test_a_character_that_was_learned_is_one_token() -> None:
    made = Tokenizer.train(["\u65e5\u672c\u65e5"], 700, "char")
    assert len(made.encode("\u65e5")) == 1, "twice in the text"
    assert len(made.encode("\u672c")) == 3, "once in the text"


@pytest.mark.parametrize("model", ["word", "char"])
def test_the_commonest_pieces_are_kept(model: Model) -> None:
    made = Tokenizer.train(["\u65e5 " * 5 + "\u672c " * 3 + "\u4eba " * 2], 259 + 2, model)
    spaced = "" if model == "char" else " "
    assert len(made.encode(spaced + "\u672c")) == 1 < len(made.encode(spaced + "\u4eba"))
