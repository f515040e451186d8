"""tiktoken with the vocabulary and the cutting rule of the same tokenizer.json."""

import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import tiktoken
import timing


def load(options: Namespace) -> Callable[[list[str]], Any]:
    stored = json.loads(options.tokenizer.read_text("utf-8"))
    special = {token["content"]: token["id"] for token in stored["added_tokens"] if token["special"]}
    letters = byte_letters()
    ranks = {
        bytes(letters[letter] for letter in token): number
        for token, number in stored["model"]["vocab"].items()
        if token not in special
    }
    steps = stored["pre_tokenizer"].get("pretokenizers", [stored["pre_tokenizer"]])
    pattern = next(step["pattern"]["Regex"] for step in steps if step["type"] == "Split")
    encoding = tiktoken.Encoding("same", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    return lambda texts: [encoding.encode_ordinary(text) for text in texts]


def byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary, reversed."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


timing.run(load)
