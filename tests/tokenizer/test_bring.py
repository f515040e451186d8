"""A tokenizer.json from elsewhere: taken over whole, with its end token found and the chat's control tokens added."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from raymill.errors import ArtifactError, UsageError
from raymill.tokenizer.tokenizer import END_TOKENS, StreamDecoder, Tokenizer
from raymill.tokenizer.training import IM_END, IM_START

TEXTS = [
    "",
    "two words",
    "  spaced \n",
    "caf\u00e9 \U0001f468\u200d\U0001f469",
    "x<|endoftext|> </s> <s>y",
    "don't 12345",
]


def gpt2_shaped(texts: Iterable[str], end: str) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    inner.add_special_tokens([end])
    return inner


def llama2_shaped(texts: Iterable[str], end: str) -> tokenizers.Tokenizer:
    """Spaces as U+2581, one put before the text, what is unknown in bytes."""
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", end, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    content = json.loads(inner.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def t5_shaped(texts: Iterable[str], end: str) -> tokenizers.Tokenizer:
    """Unigram whose vocabulary holds the end token with the best score of all."""
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=[end, "<unk>"], unk_token="<unk>", show_progress=False,
        initial_alphabet=[chr(code) for code in range(33, 127)],
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    return inner


def bert_shaped(texts: Iterable[str], end: str) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]", end], show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return inner


Shape = Callable[[Iterable[str], str], tokenizers.Tokenizer]


def bring(shape: Shape, texts: list[str], folder: Path, end: str, named: str | None = None) -> Tokenizer:
    path = folder / "foreign.json"
    shape(texts, end).save(str(path))
    return Tokenizer.bring(path, named)


def test_a_byte_level_one_is_lossless_and_keeps_its_ids(texts: list[str], tmp_path: Path) -> None:
    foreign = gpt2_shaped(texts, "<|end_of_text|>")
    brought = bring(gpt2_shaped, texts, tmp_path, "<|end_of_text|>")
    assert brought._fast is not None
    for text in TEXTS:
        assert brought.encode(text) == foreign.encode(text).ids == brought.encode_flat([text])[0].tolist()
        assert brought.decode(brought.encode(text)) == text
        decoder = StreamDecoder(brought)
        assert "".join([decoder.push(token) for token in brought.encode(text)]) + decoder.finish() == text


def test_a_token_not_spelled_in_the_letters_of_bytes_is_its_own_text(texts: list[str], tmp_path: Path) -> None:
    added = ["<tool call>", "two\u00a0parts", "\u4e2d\u6587"]

    def shape(texts: Iterable[str], end: str) -> tokenizers.Tokenizer:
        inner = gpt2_shaped(texts, end)
        inner.add_tokens(added)
        return inner

    tokenizer = bring(shape, texts, tmp_path, "<|endoftext|>")
    for text in added:
        [token] = tokenizer.encode(text)
        assert tokenizer.token_bytes(token).decode() == text


@pytest.mark.parametrize("end", END_TOKENS)
def test_the_end_token_is_found_by_its_name_and_kept(texts: list[str], tmp_path: Path, end: str) -> None:
    brought = bring(gpt2_shaped, texts, tmp_path, end)
    brought.save(tmp_path / "tokenizer.json")
    for each in (brought, Tokenizer.load(tmp_path / "tokenizer.json")):
        assert each.end_id == 500 and each.token_bytes(500) == b""
        assert [each.special_id(name) for name in (IM_START, IM_END)] == [501, 502]
        assert each.vocab_size == 503
        assert not {500, 501, 502} & set(each.encode(f"{end} {IM_START}{IM_END}"))
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode("two").ids == brought.encode("two"), "the note of the end token adds nothing"


def test_the_named_end_token_wins(texts: list[str], tmp_path: Path) -> None:
    def two_ends(texts: Iterable[str], end: str) -> tokenizers.Tokenizer:
        inner = gpt2_shaped(texts, end)
        inner.add_tokens(["<odd>"])
        return inner

    brought = bring(two_ends, texts, tmp_path, "</s>", "<odd>")
    assert brought.end_id == 501 != brought._inner.token_to_id("</s>") == 500
    brought.save(tmp_path / "tokenizer.json")
    for read in (Tokenizer.load, Tokenizer.bring):
        assert read(tmp_path / "tokenizer.json").end_id == brought.end_id
    assert brought._fast is not None and brought.end_id not in brought.encode("<odd>"), "it is special now"


def test_no_end_token(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no end-of-document token") as caught:
        bring(gpt2_shaped, texts, tmp_path, "<odd>")
    assert "<|endoftext|>, " in str(caught.value)
    assert bring(gpt2_shaped, texts, tmp_path, "<odd>", "<odd>").end_id == 500
    with pytest.raises(UsageError, match="no token '<none>'") as caught:
        bring(gpt2_shaped, texts, tmp_path, "</s>", "<none>")
    assert "known end-of-document tokens in it: </s>" in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "foreign.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArtifactError, match="tokenizer"):
        Tokenizer.bring(path)


def test_a_sentencepiece_one(texts: list[str], tmp_path: Path) -> None:
    brought = bring(llama2_shaped, texts, tmp_path, "</s>")
    assert brought._fast is None
    for text in TEXTS:
        ids, lengths = brought.encode_flat([text], close=True)
        assert ids.tolist() == [*brought.encode(text), brought.end_id] and lengths.tolist() == [len(ids)]
        assert brought.decode(brought.encode(text)) == (f" {text}" if text else ""), "the space before it stays"
    assert brought.token_bytes(brought._inner.token_to_id("<0x0A>")) == b"\n"


def test_text_that_spells_the_end_token_of_a_unigram_stays_text(texts: list[str], tmp_path: Path) -> None:
    foreign = t5_shaped([*texts, "</s>"], "</s>")
    foreign.encode_special_tokens = True
    assert 0 in foreign.encode("a</s> </s>").ids, "the library alone is forged"
    brought = bring(t5_shaped, [*texts, "</s>"], tmp_path, "</s>")
    for text in ("a</s> </s>", "</s></s>", "</s>"):
        ids = brought.encode(text)
        assert brought.end_id == 0 not in ids
        assert brought.encode_flat([text, "b"])[0].tolist() == ids + brought.encode("b")
        assert brought.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_a_bert_one_decodes_to_words(texts: list[str], tmp_path: Path) -> None:
    brought = bring(bert_shaped, texts, tmp_path, "[SEP]")
    assert brought.decode(brought.encode("return wrapper")).strip() == "return wrapper"


def test_truncation_and_padding_in_the_file_are_not_for_us(texts: list[str], tmp_path: Path) -> None:
    def clipped(texts: Iterable[str], end: str) -> tokenizers.Tokenizer:
        inner = gpt2_shaped(texts, end)
        inner.enable_truncation(3)
        inner.enable_padding(length=8)
        inner.post_processor = processors.TemplateProcessing(f"{end} $A", None, [(end, 500)])
        return inner

    brought = bring(clipped, texts, tmp_path, "</s>")
    assert brought._inner.encode("a").ids == [500, *brought.encode("a")], "what others put around a text is kept"
    assert brought.decode(brought.encode("a text of many tokens")) == "a text of many tokens"
    assert brought.end_id not in brought.encode("a")
