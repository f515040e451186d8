"""Training documents that hold pieces of evaluation files, found by their word 13-grams.

In: evaluation files. Every string of every record gives its 13-grams, after GPT-3 (Brown et al. 2020, appendix C): lower
case, marks dropped, words parted by white space. A string of 8 to 12 words counts as one gram, whole; a shorter one says
nothing, as it stands in many sound texts, and is left out.
Out: an index in one .npy file, which workers map into memory and share (20 to 40 bytes per gram), and how
many grams of a document are in it. Building takes 1 us per gram; a core looks through 80-95 MB/s of documents of 3 kB
against an index of 1.3 million grams.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raymill.artifact import open_aside
from raymill.config import Config
from raymill.corpus.phrases import PhraseTable, build_table, count_hits, hash_words
from raymill.errors import DataError

MIN_WORDS = 8
_FORMATS = ".jsonl .json .csv .tsv .txt"
_FIX = f"name files that end in {_FORMATS.replace(' ', ', ')}, plain or .gz"


class Decontamination(Config):
    """What training text may not hold."""

    against: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Evaluation files: .jsonl, .json, .csv, .tsv or .txt, plain or .gz."""
    ngram: Annotated[int, Field(ge=8, le=64)] = 13
    """Words in a row that count as a match."""
    min_hits: Annotated[int, Field(ge=1)] = 1
    """Matching grams from which on a document is dropped."""


@dataclass(frozen=True)
class Index:
    """The grams of evaluation files."""

    ngram: int
    """Words of a gram; shorter grams are whole strings."""
    grams: PhraseTable


def build_index(paths: Sequence[Path | str], ngram: int = 13) -> Index:
    """The index of all strings in these files; their order does not matter. Raises DataError for a file without any."""
    phrases = []
    for path in map(Path, paths):
        found = False
        for string in _read_strings(path):
            words = hash_words(unicodedata.normalize("NFC", string), join_at_marks=True)
            found = found or len(words) > 0
            length = min(len(words), ngram)
            if length >= MIN_WORDS:
                phrases.append((length, words))
        if not found:
            raise DataError(
                "the evaluation file holds no text", where=str(path), fix="remove it from the list or mend it"
            )
    return Index(ngram, build_table(MIN_WORDS, phrases))


def contaminated(text: str, index: Index) -> int:
    """How many places of a text begin a gram of the index."""
    return int(count_hits(hash_words(text, join_at_marks=True), index.grams).sum())


def save_index(index: Index, path: Path) -> None:
    """Writes the index to a .npy file, aside and then renamed."""
    grams = index.grams
    head = np.array([index.ngram, grams.phrases, len(grams.lengths), len(grams.filter)], np.uint64)
    with open_aside(path) as file:
        np.save(file, np.concatenate([head, grams.lengths.astype(np.uint64), grams.filter, grams.slots]))


def load_index(path: Path) -> Index:
    """The index of a file that `save_index` wrote, mapped into memory."""
    whole: NDArray[np.uint64] = np.asarray(np.load(path, mmap_mode="r"))
    ngram, phrases, lengths, filter_words = whole[:4].tolist()
    slots = 4 + lengths + filter_words
    table = PhraseTable(
        MIN_WORDS, whole[4 : 4 + lengths].astype(np.int64), whole[4 + lengths : slots], whole[slots:], phrases
    )
    return Index(ngram, table)


def _read_strings(path: Path) -> Iterator[str]:
    """Every string value of every record of a file."""
    ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if ending not in _FORMATS.split():
        raise DataError(f"an evaluation file cannot be {ending or 'without an ending'}", where=str(path), fix=_FIX)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig", "replace")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError("the evaluation file cannot be read", where=str(path), why=str(error), fix=_FIX) from None
    if ending == ".txt":
        yield from text.splitlines()
    elif ending == ".json":
        yield from _strings_of(_parse(text, str(path)))
    elif ending == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield from _strings_of(_parse(line, f"{path}:{number}"))
    else:
        csv.field_size_limit(sys.maxsize)
        rows = csv.reader(io.StringIO(text, newline=""), delimiter="," if ending == ".csv" else "\t")
        try:
            for row in rows:
                yield from row
        except csv.Error as error:
            where = f"{path}:{rows.line_num}"
            raise DataError("the evaluation file is no csv", where=where, why=str(error), fix="mend the file") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError("the evaluation file is no JSON", where=where, why=str(error), fix="mend the file") from None


def _strings_of(value: Any) -> Iterator[str]:
    """The strings in a JSON value, keys not counted; a walk without recursion, as nesting may be deep."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
