"""`raymill tokenizer`: vocabularies side by side on your own text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raymill.tokenizer.compare import Row
    from raymill.tokenizer.tokenizer import Tokenizer

app = typer.Typer(no_args_is_help=True, help="Compare tokenizers.")

_HELD_OUT = 5  # every fifth document is compared on, the others are learned from


@app.callback()
def _group() -> None:
    """Compare tokenizers."""


@app.command("compare")
def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="TOKENIZER...",
            help="A tokenizer.json, or a kind to learn here: bpe, wordpiece, unigram, word, char.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="PATH", help="Text to compare on, as for run; may be repeated, one column each."
        ),
    ] = None,
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", min=259, help="Vocabulary of the kinds learned here.")
    ] = 8192,
    end_token: Annotated[
        str | None, typer.Option("--end-token", metavar="NAME", help="The token of your files that ends a document.")
    ] = None,
    sample_mib: Annotated[
        float, typer.Option("--sample-mib", min=0.1, max=1024, help="Text read of each source, MiB.")
    ] = 8,
) -> None:
    """Bytes per token, tokens per word by source, speed and how much of the vocabulary is used."""
    from raymill.corpus.sources import BUILTIN_PYTHON
    from raymill.errors import DataError
    from raymill.tokenizer.compare import compare as compare_tokenizers

    texts = _sample(data or [BUILTIN_PYTHON], int(sample_mib * 2**20))
    if not texts:
        raise DataError("there is no document in the text", where="--data", fix="name files that hold text")
    learned = [text for source in texts.values() for place, text in enumerate(source) if place % _HELD_OUT]
    held_out = {name: source[::_HELD_OUT] for name, source in texts.items()}
    _print(compare_tokenizers({name: _get(name, learned, vocab_size, end_token) for name in names}, held_out))


def _sample(paths: Sequence[str], sample_bytes: int) -> dict[str, list[str]]:
    """Documents of each source by its name: whole files in an order by chance that is always the same."""
    import random

    from raymill.corpus.document import Document
    from raymill.corpus.limits import ReadLimits
    from raymill.corpus.readers import read
    from raymill.corpus.sources import Source, list_files

    limits = ReadLimits(segment_bytes=1 << 16, max_document_bytes=1 << 24)
    texts: dict[str, list[str]] = {}
    taken: dict[str, int] = {}
    files = list_files([Source(path=path) for path in paths])
    random.Random(0).shuffle(files)
    for file in files:
        for record in read(file, limits):
            if taken.get(file.source, 0) >= sample_bytes:
                break
            if isinstance(record, Document) and record.text.strip():
                texts.setdefault(file.source, []).append(record.text)
                taken[file.source] = taken.get(file.source, 0) + len(record.text.encode("utf-8", "replace"))
    return texts


def _get(name: str, texts: Sequence[str], vocab_size: int, end_token: str | None) -> Tokenizer:
    from typing import get_args

    from raymill.errors import UsageError
    from raymill.tokenizer.tokenizer import Tokenizer
    from raymill.tokenizer.training import Model, smallest_vocab

    if name in get_args(Model):
        least = smallest_vocab(name)  # type: ignore[arg-type]
        if vocab_size < least:
            raise UsageError(f"a vocabulary of {vocab_size} is too small for {name}", fix=f"give at least {least}")
        return Tokenizer.train(texts, vocab_size, name)  # type: ignore[arg-type]
    if not Path(name).exists():
        kinds = ", ".join(get_args(Model))
        raise UsageError(f"there is no tokenizer {name}", fix=f"name a tokenizer.json, or a kind to learn: {kinds}")
    return Tokenizer.bring(Path(name), end_token)


def _print(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("tokenizer", "vocabulary", "used", "MB/s", "bytes per token", title="tokens per word by source")
    for source in rows[0].sources:
        table.add_column(source)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.vocab_size:,}",
            f"{row.used_share:.0%}",
            f"{row.mb_per_s:.1f}",
            f"{row.bytes_per_token:.2f}",
            *(f"{each.fertility:.2f}" for each in row.sources.values()),
        )
    Console().print(table)
