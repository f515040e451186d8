"""Our tokenizer in GGUF's words, for the readers that cut text as it does: llama.cpp, OpenVINO GenAI.

GGUF stores vocabulary and merges, but of the cut before them only a name that readers know by heart. Ours is known twice:
as `llama-bpe`, which takes a word that is in the vocabulary whole and asks no merges, and as `smaug-bpe`, which always
asks them. Where the merges make every such word anyway both give the same ids, and llama-bpe is written, as more readers
know it. What no name stands for is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raymill.errors import UsageError
from raymill.export.source import Source
from raymill.tokenizer.training import WORDS, byte_letters, spec

_QWEN2 = WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF keeps of a tokenizer."""

    pre: str
    """Name of the cut."""
    tokens: list[str]
    """By id, one for every row of the embedding."""
    types: list[int]
    merges: list[str]
    notes: list[str]


def vocabulary_of(source: Source) -> Vocabulary:
    """UsageError where no reader of GGUF would cut text as this tokenizer does."""
    content = spec(source.inner)
    model = content["model"]
    notes: list[str] = []
    pre = _cut_name(source, content)
    if pre == "smaug-bpe":
        notes.append(
            "some words of the vocabulary are not what the merges make, so the cut is named smaug-bpe: "
            "llama.cpp gives the same ids, OpenVINO GenAI does not know it and should be fed with ids"
        )
    if content["normalizer"]:
        notes.append(f"GGUF has no normalizer, and this tokenizer has one ({content['normalizer']['type']})")
    tokens, types = [], []
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    for index in range(source.vocab_size):
        token = source.inner.id_to_token(index)
        tokens.append(f"[UNUSED{index}]" if token is None else token)
        kind = _NORMAL if index not in added else _CONTROL if added[index] else _USER_DEFINED
        types.append(_UNUSED if token is None else kind)
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    # llama.cpp refuses a list of none. Text never makes a control token's name, so this one never applies.
    merges = merges or [f"{source.end_token} {source.end_token}"]
    return Vocabulary(pre, tokens, types, merges, notes)


def _cut_name(source: Source, content: dict[str, Any]) -> str:
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise _refusal(f"it is a {model['type']}, and GGUF's readers know byte-level BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refusal("its pieces bear marks inside or behind a word")
    cut = _cut(content["pre_tokenizer"])
    whole = bool(model.get("ignore_merges"))
    if cut == WORDS:
        return "llama-bpe" if whole or _merges_make_every_word(source) else "smaug-bpe"
    if cut not in ("gpt-2", _QWEN2):
        raise _refusal("it cuts text in a way that has no name there")
    if whole and not _merges_make_every_word(source):
        raise _refusal("it takes words whole that its merges do not make")
    return "qwen2" if cut == _QWEN2 else "gpt-2"


def _cut(content: dict[str, Any] | None) -> str | None:
    """The one pattern that text is cut by before it is written as letters; None where there is more to it."""
    if content is None:
        return None
    *splits, last = content["pretokenizers"] if content["type"] == "Sequence" else [content]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not splits:
        return "gpt-2" if last["use_regex"] else None
    split = splits[0]
    if len(splits) > 1 or last["use_regex"] or split["type"] != "Split" or split["behavior"] != "Isolated":
        return None
    pattern: str | None = split["pattern"].get("Regex")
    return None if split["invert"] else pattern


def _merges_make_every_word(source: Source) -> bool:
    """Whether each token that is a word by the cut is what merging its bytes gives."""
    inner, letters = source.inner, byte_letters()
    special = set(inner.get_added_tokens_decoder())
    for token, index in inner.get_vocab(with_added_tokens=False).items():
        if index in special or not all(letter in letters for letter in token):
            continue
        if [piece.id for piece in inner.model.tokenize(token)] == [index]:
            continue
        try:
            text = bytes(letters[letter] for letter in token).decode()
        except UnicodeDecodeError:
            continue  # a part of a character is never a word
        if len(inner.pre_tokenizer.pre_tokenize_str(text)) == 1:
            return False
    return True


def _refusal(why: str) -> UsageError:
    return UsageError(
        "GGUF has no way to say how this tokenizer cuts text",
        why=why,
        fix="write the model alone with --no-tokenizer and give its reader ids, or choose format hugging_face",
    )
