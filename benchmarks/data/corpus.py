"""A corpus of any size for the benchmarks: jsonl shards, made from text that every Python installation holds.

Paragraphs come from the language documentation, docstrings and comments of the standard library, and the readmes and
docstrings of installed packages; or, with `text`, from the user's own files alone. Document number n is a pure function
of (paragraphs, seed, n), so a corpus is a prefix of every larger one and a duplicate is made by making its original
again. Lengths are log-normal with a median of 2.5 kB. Of 100 documents about 5 are exact duplicates, 10 near duplicates
whose Jaccard similarity to their original (word 5-grams) is spread evenly over 0.3 to 0.95, and 8 junk of several kinds.
Paragraphs come back in large corpora, cut and joined otherwise; so caches of whole words fare well, on every side.
Kept in the cache folder: the paragraphs (16 MB at most; a minute on first use) and the shards (about 50 MB/s).
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SHARD_DOCUMENTS = 500
_PARAGRAPHS_BYTES = 16_000_000
_PROSE_LETTERS = 0.93
_OTHERS = 25
_SHORTEST_PARAGRAPH = 60
_EXACT, _NEAR, _JUNK = 0.05, 0.10, 0.08
_MEDIAN_CHARS, _SIGMA, _LONGEST_CHARS = 2500, 0.9, 200_000
_COMMENTS = re.compile(r"(?:^[ \t]*#.*\n?)+", re.MULTILINE)
_NOTICES = (
    "Please enable JavaScript in your browser to use this site.",
    "By using this site you agree to our terms of use and the privacy policy.",
    "This page uses cookies to improve your experience.",
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit.",
)
_WIDE = ((0x4E00, 0x9FA5), (0x3041, 0x3096), (0xAC00, 0xD7A3), (0x0430, 0x044F), (0x0391, 0x03C9), (0x1F600, 0x1F64F))


@dataclass(frozen=True)
class Library:
    """The paragraphs documents are made of."""

    paragraphs: tuple[str, ...]
    digest: str
    """Names what was gathered; part of the cache's file names."""

    @classmethod
    def load(cls, cache: Path, text: Path | None = None) -> Library:
        """Gathers once per machine; the user's own text is read every time."""
        if text is not None:
            return cls._of(sorted(set(_from_user(text))))
        kept = cache / "paragraphs.json"
        if not kept.exists():
            cache.mkdir(parents=True, exist_ok=True)
            aside = kept.with_suffix(".aside")
            aside.write_text(json.dumps(_gather()), "utf-8")
            aside.rename(kept)
        return cls._of(json.loads(kept.read_text("utf-8")))

    @classmethod
    def _of(cls, paragraphs: Sequence[str]) -> Library:
        if not paragraphs:
            raise SystemExit("no paragraph was found to make documents from; give txt, md or jsonl files with --text")
        digest = hashlib.blake2b("\0".join(paragraphs).encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
        return cls(tuple(paragraphs), digest)


def build(library: Library, megabytes: float, cache: Path, seed: int = 1) -> list[Path]:
    """Shards that hold together about `megabytes` (10^6 bytes of jsonl): the first of an endless corpus."""
    folder = cache / f"corpus-{library.digest}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    size = 0
    while size < megabytes * 1e6:
        path = folder / f"part-{len(shards):05d}.jsonl"
        if not path.exists():
            first = len(shards) * SHARD_DOCUMENTS
            numbers = range(first, first + SHARD_DOCUMENTS)
            rows = [to_row(f"d{number}", *document(number, library, seed)) for number in numbers]
            aside = path.with_suffix(".aside")
            aside.write_bytes(b"".join(rows))
            aside.rename(path)
        shards.append(path)
        size += path.stat().st_size
    return shards


def document(number: int, library: Library, seed: int) -> tuple[str, str]:
    """What a document is (original, exact, near or junk) and its text."""
    source = random.Random(f"{seed}:{number}")
    draw = source.random()
    if draw < _JUNK:
        return "junk", _junk(source, library)
    if number and draw < _JUNK + _EXACT + _NEAR:
        original = _original(source.randrange(number), library, seed)
        if draw < _JUNK + _EXACT:
            return "exact", original
        return "near", edit(original, source.uniform(0.3, 0.95), source, library)
    return "original", _original(number, library, seed)


def edit(text: str, similarity: float, source: random.Random, library: Library) -> str:
    """Replaces words by others so that the Jaccard similarity of word 5-grams becomes about `similarity`.

    With a share p of words replaced, s = (1 - p)^5 of the 5-grams stay; the similarity is then s / (2 - s).
    """
    stay = (2 * similarity / (1 + similarity)) ** 0.2
    pieces = re.split(r"(\s+)", text)
    spare = source.choice(library.paragraphs).split() + source.choice(library.paragraphs).split()
    for index in range(0, len(pieces), 2):
        if pieces[index] and source.random() > stay:
            pieces[index] = source.choice(spare)
    return "".join(pieces)


def to_row(name: str, made: str, text: str) -> bytes:
    """One line of jsonl. made: what the document is, for whoever looks into the file; no side reads it."""
    return json.dumps({"id": name, "made": made, "text": text}, ensure_ascii=False).encode() + b"\n"


def _original(number: int, library: Library, seed: int) -> str:
    """Runs of neighbouring paragraphs from random places until the length drawn is reached."""
    source = random.Random(f"{seed}:text:{number}")
    goal = min(_LONGEST_CHARS, _MEDIAN_CHARS * source.lognormvariate(0, _SIGMA))
    chosen: list[str] = []
    held = 0
    while held < goal:
        at = source.randrange(len(library.paragraphs))
        for paragraph in library.paragraphs[at : at + source.randint(1, 6)]:
            chosen.append(paragraph)
            held += len(paragraph) + 2
            if held >= goal:
                break
    return source.choice(("\n", "\n\n")).join(chosen)


def _junk(source: random.Random, library: Library) -> str:
    """Too short, repeated lines, repeated phrases, symbols, bullets, dots, notices between lines, other scripts."""
    words = (source.choice(library.paragraphs) + " " + source.choice(library.paragraphs)).split()
    some = [" ".join(source.sample(words, min(len(words), source.randint(3, 12)))) + "." for _ in range(12)]
    match source.randrange(9):
        case 0:
            return " ".join(words[: source.randint(1, 30)])
        case 1:
            return "\n".join(source.choice(some[:4]) for _ in range(40))
        case 2:
            return " ".join(words[:8] * 30) + "."
        case 3:
            return " ".join("".join(source.choices("#@*=-_|/~", k=source.randint(1, 9))) for _ in range(200))
        case 4:
            return "\n".join("- " + line for line in some * 3)
        case 5:
            return "\n".join(line.rstrip(".") + "..." for line in some * 2)
        case 6:
            lines = library.paragraphs[source.randrange(len(library.paragraphs)) :][:12]
            return "\n".join([*lines, source.choice(_NOTICES), *lines[:2], source.choice(_NOTICES)])
        case 7:
            first, last = source.choice(_WIDE)
            wide = ("".join(chr(source.randint(first, last)) for _ in range(source.randint(2, 30))) for _ in range(60))
            return " ".join(wide)
        case _:
            return " ".join("".join(source.choices("abcdefghij0123456789+/", k=64)) for _ in range(60))


def _gather() -> list[str]:
    """Paragraphs of this installation, none twice, in a fixed order: prose, and 1 in 25 of tables, code and the like."""
    paths = sysconfig.get_paths()
    found: dict[str, None] = {}
    size = others = 0
    for text in _texts(Path(paths["stdlib"]), Path(paths["purelib"])):
        for paragraph in _paragraphs(text):
            if not _is_prose(paragraph):
                others += 1
                if others % _OTHERS:
                    continue
            if paragraph not in found:
                found[paragraph] = None
                size += len(paragraph)
        if size >= _PARAGRAPHS_BYTES:
            break
    return list(found)


def _is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return "\n" not in paragraph and "{" not in paragraph and letters > _PROSE_LETTERS * len(paragraph)


def _texts(library: Path, packages: Path) -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    modules = (path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts)
    for path in modules:
        yield from _prose_of(path)
    for pattern in ("*.dist-info/METADATA", "**/*.md", "**/*.rst"):
        for path in sorted(packages.glob(pattern)):
            yield path.read_text("utf-8", "replace")
    for path in sorted(packages.rglob("*.py")):
        yield from _prose_of(path)


def _prose_of(path: Path) -> Iterator[str]:
    """Docstrings and blocks of comments of one module; nothing where it is not Python we can parse."""
    data = path.read_bytes()
    if len(data) > 2_000_000:
        return
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    for block in _COMMENTS.findall(data.decode("utf-8", "replace")):
        yield re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE)


def _paragraphs(text: str) -> Iterator[str]:
    """Blocks between blank lines; prose that was wrapped for a screen becomes one line, as on a web page."""
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        lines = [line.strip() for line in block.strip().split("\n")]
        joined = " ".join(lines)
        if len(joined) < _SHORTEST_PARAGRAPH or not joined.isprintable():
            continue
        wrapped = all(len(line) > 40 for line in lines[:-1]) and lines[0][0] not in ">-*#|+=:."
        yield joined if wrapped else "\n".join(lines)


def _from_user(text: Path) -> Iterator[str]:
    paths = [text] if text.is_file() else sorted(path for path in text.rglob("*") if path.is_file())
    for path in paths:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8", "replace")
        if ".jsonl" in path.suffixes:
            for line in text.splitlines():
                yield from _paragraphs_of_user(json.loads(line)["text"])
        elif path.suffix in (".txt", ".md"):
            yield from _paragraphs_of_user(text)


def _paragraphs_of_user(text: str) -> Iterator[str]:
    return (line.strip() for line in text.split("\n") if len(line.strip()) >= _SHORTEST_PARAGRAPH)
