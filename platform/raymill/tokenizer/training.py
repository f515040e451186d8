"""Five kinds of vocabulary learned from text, all in the one tokenizer.json format and all lossless.

All of them write bytes as letters, as GPT-2 does, and hold all 256 letters: what is not in the vocabulary is spelled in
bytes, nothing is unknown.

    bpe        pairs merged in the order they were learned
    wordpiece  the longest known start of what is left; a piece inside a word is marked
    unigram    the likeliest way to cut a word, each piece with its own probability
    word       whole words of the cut below; a word that was not learned is spelled in bytes
    char       single characters; one that was not learned is spelled in bytes

All but unigram are a function of the texts alone, and bpe learns the merges that the `tokenizers` library would. Unigram is
trained by that library, which visits words in another order each time: two trainings differ in a few pieces.
Costs per core: bpe and wordpiece 17 MB/s of a 64 MB sample, word 30, char 13, unigram 0.8.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)

Model = Literal["bpe", "wordpiece", "unigram", "char", "word"]

# Words keep one leading mark or space, numbers come in groups of at most three digits, line breaks stay with the
# punctuation before them: the cut that Llama 3 uses, known to every inference engine as "llama-bpe".
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHARACTERS = r"[\s\S]"

# WordPiece takes time in the cube of a word's length (64 characters of emoji: 3 ms) and Unigram is not made for long
# ones either: a word of more characters than this goes in parts.
CHOP_CHARS = 24
CHOPS = rf"[\s\S]{{1,{CHOP_CHARS}}}"

# Marks a piece inside a word. Not the usual ##, which in bytes written as letters is also text; U+203F is none of them.
INSIDE_WORD = "\u203f"

_MIN_FREQUENCY = 2  # what occurs once teaches nothing; a tiny corpus gives a small vocabulary instead


def train(texts: Iterable[str], vocab_size: int, model: Model) -> tokenizers.Tokenizer:
    """Learns a vocabulary of at most `vocab_size`; fewer ids come out when the texts have too few repeated pieces."""
    assert vocab_size >= smallest_vocab(model)
    if model in ("char", "word"):
        return _train_pieces(texts, vocab_size, WORDS if model == "word" else CHARACTERS)
    if model == "unigram":
        return _train_unigram(texts, vocab_size)
    return _train_merges(texts, vocab_size, INSIDE_WORD if model == "wordpiece" else "")


def smallest_vocab(model: Model) -> int:
    """The special tokens and the bytes, which WordPiece needs twice: at the start of a word and inside."""
    return SMALLEST_VOCAB + (256 if model == "wordpiece" else 0)


def byte_letters() -> dict[str, int]:
    """The printable letter that byte-level tokenizers write for each byte, reversed.

    Bytes that are printable in Latin-1 stand for themselves; the others take the letters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    letters.update({chr(0x100 + rank): byte for rank, byte in enumerate(others)})
    return letters


def _cut(inner: tokenizers.Tokenizer, *patterns: str) -> tokenizers.Tokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    inner.decoder = decoders.ByteLevel()
    return inner


def _train_merges(texts: Iterable[str], vocab_size: int, inside_word: str) -> tokenizers.Tokenizer:
    """BPE, or with a mark for pieces inside a word WordPiece, whose vocabulary is learned the same way."""
    from raymill.tokenizer.counting import count_pieces
    from raymill.tokenizer.merges import learn_merges

    letters = byte_letters()
    spelled = sorted(letters)
    tokens = [*SPECIAL_TOKENS, *spelled, *(inside_word + letter for letter in spelled if inside_word)]
    table = {token: index for index, token in enumerate(tokens)}
    rows = [[table[mark + letter] for letter in sorted(letters, key=letters.__getitem__)] for mark in ("", inside_word)]
    pieces = count_pieces(texts, WORDS, CHOP_CHARS if inside_word else 0)
    learned = learn_merges(pieces, np.array(rows, np.int32), len(tokens), vocab_size - len(tokens), _MIN_FREQUENCY)
    merges = []
    for left, right, merged in learned.tolist():
        merges.append((tokens[left], tokens[right]))
        if merged == len(tokens):
            tokens.append(tokens[left] + tokens[right].removeprefix(inside_word))
    table = {token: index for index, token in enumerate(tokens)}
    if not inside_word:
        return _finished(models.BPE(table, merges), WORDS)
    model = models.WordPiece(
        table,
        unk_token=END_OF_TEXT,  # the library asks for one; it is never used
        continuing_subword_prefix=inside_word,
        max_input_chars_per_word=4 * CHOP_CHARS,
    )
    made = _finished(model, WORDS, CHOPS)
    made.decoder = decoders.Sequence([decoders.Replace(inside_word, ""), decoders.ByteLevel()])
    return made


def _train_unigram(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    inner = _cut(tokenizers.Tokenizer(models.Unigram()), WORDS, CHOPS)
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner


def _train_pieces(texts: Iterable[str], vocab_size: int, pattern: str) -> tokenizers.Tokenizer:
    """The commonest pieces as they stand: a BPE that has no merges and takes what is in its vocabulary whole."""
    from raymill.tokenizer.counting import count_pieces

    letters = {byte: letter for letter, byte in byte_letters().items()}
    counted = count_pieces(texts, pattern, 0)
    common = (piece for piece, count in counted if count >= _MIN_FREQUENCY and len(piece) > 1)
    kept = ["".join(letters[byte] for byte in piece) for piece in islice(common, vocab_size - SMALLEST_VOCAB)]
    tokens = [*SPECIAL_TOKENS, *sorted(letters.values()), *kept]
    table = {token: index for index, token in enumerate(tokens)}
    return _finished(models.BPE(table, [], ignore_merges=True), pattern)


def _finished(model: models.Model, *patterns: str) -> tokenizers.Tokenizer:
    made = _cut(tokenizers.Tokenizer(model), *patterns)
    made.add_special_tokens(list(SPECIAL_TOKENS))
    return made


def spec(inner: tokenizers.Tokenizer) -> dict[str, Any]:
    """The content of its tokenizer.json."""
    content: dict[str, Any] = json.loads(inner.to_str())
    return content
