"""Words are those of spaCy's blank English tokenizer: recorded examples, and the compiled loop against the plain rules."""

from __future__ import annotations

import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from raymill.corpus import words as words_module
from raymill.corpus.chunks import cut_chunk, exceptions
from raymill.corpus.word_facts import (
    AFTER_SPACES,
    CHARS_SHIFT,
    ENDS_SENTENCE,
    LETTER,
    POINTS,
    PUNCTUATION,
    STARTS_LINE,
    STOP_SHIFT,
    STOP_WORDS,
    VISIBLE,
    facts_of,
)
from raymill.corpus.words import WordSplitter

# Recorded from spaCy 3.8.18; words are parted by a blank.
RECORDED = """
word|cannot, can not ,|gonna. gon na .|(don't) ( do n't )|shouldn't've should n't 've|they'll've they 'll 've
don\u2019t do n\u2019t|it's it 's|its|Its|hell|I'm I 'm|Im I m|y'all y' all|'cause|rock'n'roll|O'Brien's O'Brien 's|dogs' dogs '
Mr.|Mr.. Mr ..|(Mr.) ( Mr. )|U.S.|U.S., U.S. ,|a.m.|10am 10 am|12p.m. 12 p.m.|e.g., e.g. ,|etc. etc .|I.|NASA. NASA .|McD.
id. i d.|itd. it d.|end.Start end . Start|end.start|v1.2.3|3.14. 3.14 .|3.14|1,000|1,000, 1,000 ,|a,b a , b|a,1
well-known well - known|3-4 3 - 4|3-a 3 - a|a-3|state-of-the-art, state - of - the - art ,|to--|foo--bar foo -- bar
5km 5 km|5km/h 5 km/h|20% 20 %|20%. 20 % .|$5 $ 5|5$ 5 $|US$10 US$ 10|10\u20ac.|20\u00b0C. 20 \u00b0 C .|\u00b0C. \u00b0 C .
http://a.com/b?c=d|www.example.org. www.example.org .|a@b.com|user:pw@host.org:80/x|x@y x@y|127.0.0.1|10.0.0.1:80/a 10.0.0.1:80 / a
:)|:-) :-)|ok:) ok :)|(:|8) 8)|(8) ( 8)|x-8) x-8 )|(8-D ( 8-D|^_^|<3|and/or|x/and/or/y x / and/or / y|:o( :o (|;-);-) ; -);- )
... ...|so... so ...|...so ... so|a..b a .. b|\u2026 \u2026|\u201cq\u201d \u201c q \u201d|\u2018tis \u2018 tis|``q'' ` ` q ''
#tag # tag|@user|C++|C++, C++ ,|x=y x = y|x==y|a/b a / b|a//b|1/2|key:value key : value|3:30|A&B|A& A &|[1] [ 1 ]|f(x) f(x )
caf\u00e9, caf\u00e9 ,|\u043c\u0438\u0440. \u043c\u0438\u0440 .|\u4e16\u754c\u3002 \u4e16\u754c \u3002|\U0001f600\U0001f600 \U0001f600 \U0001f600|a\U0001f600b a \U0001f600 b|\u2603
"q". " q " .|"q." " q. "|x). x ) .|x)) x ) )|x); x ) ;|x): x ):|the). the ) .|the." the . "|cannot). can not ) .|(8 ( 8
"""  # noqa: E501
ALPHABET = "aabBzZ019.,'\u2019-\u2013\u2014:;!?()[]{}<>=/+*^~@#$%&_\"\u2026\u00b0\u00ac\u30c4\u00e9\u0434\u65e5\u0416\u044f\U0001f600\u20ac\u00b2|\\sStTmMkK"  # noqa: E501


def recorded() -> list[tuple[str, list[str]]]:
    cases = [item.split(" ") for line in RECORDED.strip().splitlines() for item in line.split("|")]
    return [(chunk, words or [chunk]) for chunk, *words in cases]


@pytest.mark.parametrize(("chunk", "words"), recorded())
def test_recorded(chunk: str, words: list[str]) -> None:
    assert cut_chunk(chunk) == words


def split(splitter: WordSplitter, text: str) -> tuple[list[int], list[int]]:
    hashes, facts = splitter.split(np.frombuffer(text.encode(), np.uint8))
    return hashes.tolist(), facts.tolist()


def random_chunks(count: int) -> list[str]:
    draw = random.Random(5)
    fixed = sorted(chunk for chunk in exceptions() if chunk.strip())
    chunks = [chunk for chunk, _ in recorded()]
    for _ in range(count):
        chunk = "".join(draw.choice(ALPHABET) for _ in range(draw.randint(1, 8)))
        if draw.random() < 0.5:
            at = draw.randint(0, len(chunk))
            chunk = chunk[:at] + draw.choice(fixed + list(STOP_WORDS)) + chunk[at:]
        if draw.random() < 0.3:
            chunk = draw.choice("(\"'[") + chunk
        chunks.append(chunk)
    parts = ["dog", "Mr", "8", "x", "id", "cannot", "a", "", "NASA", "caf\u00e9", "\u043c\u0438\u0440", *STOP_WORDS]
    for _ in range(count):
        body = "".join(draw.choice(parts) + draw.choice(list("-.,')\"?;:")) for _ in range(draw.randint(0, 3)))
        end = draw.choice(["", ".", "..", ",", ").", "'.", '."', "!)", ":)", "))", "'s"])
        chunks.append(draw.choice(["", "(", '"', "'"]) + body + draw.choice(draw.choice([parts, fixed])) + end)
    links = [
        "a",
        "b.",
        "co",
        ".com",
        "\u00e9",
        ".\u043c\u0438\u0440",
        "9",
        "10",
        ".",
        "@",
        "/",
        ":",
        ":80",
        "-",
        "_",
        "://",
        "?",
        "B",
        "\u0661",
    ]
    links += [
        "1.2.3.4",
        "US$",
        "C$",
        "km/h",
        "m\u00b2",
        "---",
        "\u2014\u2014",
        "...",
        "'s",
        "\u2019S",
        "\u00b0F",
        "\u05b0",
        "\U00020000",
        "\U00050000",
    ]
    chunks += ["".join(draw.choices(links, k=draw.randint(2, 9))) for _ in range(count)]
    chunks += ["a.com:8/b", "a.com:88/b", "a.com:123456/b", "a.com:88", "x@a.com:8/b"]
    return [chunk for chunk in chunks if chunk]


def test_the_compiled_loop_cuts_as_the_plain_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when what it remembers is forgotten all the time."""
    monkeypatch.setattr(words_module, "_LEARNED_CHUNKS", 1 << 9)
    monkeypatch.setattr(words_module, "_LEARNED_WORDS", 1 << 11)
    assert_cut_as_plain_rules(random_chunks(4000))


def test_the_chunks_of_real_text_too() -> None:
    """Sources hold addresses, names with dots, brackets and quotations of all kinds."""
    sources = [path.read_text(errors="replace") for path in sorted(Path(random.__file__).parent.glob("*.py"))[::12]]
    chunks = sorted({chunk for text in sources for chunk in text.split()})
    assert len(chunks) > 10_000
    assert_cut_as_plain_rules(chunks)


def assert_cut_as_plain_rules(chunks: list[str]) -> None:
    splitter = WordSplitter()
    hash_of: dict[str, int] = {}
    for chunk in chunks:
        words = cut_chunk(chunk)
        assert "".join(words) == chunk
        hashes, facts = split(splitter, chunk)
        assert facts == [facts_of(word) for word in words], (chunk, words)
        assert [hash_of.setdefault(word, value) for word, value in zip(words, hashes, strict=True)] == hashes, chunk
    assert len(set(hash_of.values())) == len(hash_of)


def test_facts() -> None:
    for word in [
        "a",
        "of",
        "Of",
        "\u00e9t\u00e9",
        "\u65e5",
        "42",
        ".",
        "\u3002",
        "--",
        "-a",
        "\u0661",
        "\U0001f600",
        "\U0010ffff",
        "+",
        "\x00",
    ]:
        fact = facts_of(word)
        assert fact >> CHARS_SHIFT == len(word)
        assert bool(fact & LETTER) == any(map(str.isalpha, word)), word
        assert bool(fact & ENDS_SENTENCE) == (word in list(".\u3002")), word
        assert bool(fact & PUNCTUATION) == all(unicodedata.category(char)[0] == "P" for char in word), word
        assert bool(fact & VISIBLE) == (word not in [".", "\u3002", "--", "+", "\x00"]), word
        assert fact >> STOP_SHIFT & 15 == (STOP_WORDS.index(word) + 1 if word in STOP_WORDS else 0), word
    for point in range(POINTS, 0x110000):
        assert not chr(point).isalpha() and unicodedata.category(chr(point))[0] != "P"


def test_only_odd_addresses_are_left_to_the_plain_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost 30 times as much as the compiled loops."""
    left: list[str] = []
    monkeypatch.setattr(words_module, "cut_chunk", lambda chunk: left.append(chunk) or cut_chunk(chunk))
    odd = ["10.0.0.1:80/a", "v1.2.3.4", "a.co:\u0661\u0662", "\u00e9ab.c://a.bc"]
    text = " ".join([*(chunk for chunk, _ in recorded()), *random_chunks(300), *odd])
    split(WordSplitter(), text)
    assert set(odd) <= set(left)
    assert all("." in chunk and re.search(r"\.\d+\.\d+\.|[^\x00-\x7f]", chunk) for chunk in left), left


def test_flags() -> None:
    text = "The  cat -- (a cat)\nof  42\tof\u2028x\u00a0y #,\u3000\u2014"
    _, facts = split(WordSplitter(), text)
    words = ["The", "cat", "--", "(", "a", "cat", ")", "of", "42", "of", "x", "y", "#", ",", "\u2014"]
    assert [fact >> CHARS_SHIFT for fact in facts] == [len(word) for word in words]

    def marked(flag: int) -> list[str]:
        return [word for word, fact in zip(words, facts, strict=True) if fact & flag]

    assert marked(VISIBLE) == ["The", "cat", "a", "cat", "of", "42", "of", "x", "y"]
    assert marked(PUNCTUATION) == ["--", "(", ")", "#", ",", "\u2014"]
    assert marked(STARTS_LINE) == ["of", "x"]
    assert marked(AFTER_SPACES) == ["cat", "of", "42", "of", "x", "y", "\u2014"]


@pytest.mark.parametrize("text", ["", " ", "\n\n", "a", "\u00e9", "\U0001f600", ".", "\u2028", "\x00", "("])
def test_the_smallest_texts(text: str) -> None:
    assert len(split(WordSplitter(), text)[0]) == len(text.split())


def test_long_chunks_cost_no_more_than_their_length() -> None:
    splitter = WordSplitter()
    assert len(split(splitter, "!" * 50_000)[0]) == 50_000
    assert len(split(splitter, "a@b." * 50_000)[0]) == 2
    assert len(split(splitter, "." * 200_000)[0]) == 1
    assert len(split(splitter, "a-" * 600_000 + "b")[0]) == 1_200_001
    for chunk in ["a@b-" * 200_000 + "c.1.2.3.4", ".a" * 200_000 + "/" + ":)" * 200_000]:
        assert split(splitter, chunk)[1] == [facts_of(word) for word in cut_chunk(chunk)]
